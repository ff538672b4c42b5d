"""What `fit` costs beside a bare loop and beside PyTorch, how long a step waits for its images, and what a checkpoint adds.

    make bench SUBJECT=fit
    python benchmarks/training/fit.py --json results/benchmarks/training_fit.json

The network is the small ResNet at 28 px, batch 64, AdamW, gradient clipping and an average of the weights on all sides; two threads. Ours is an epoch of
`fit` itself, with its drawing and augmenting of images, its checks and its progress (and once without augmenting); the bare loop calls one `tf.function` with the same arithmetic on batches that
lie ready (once with Keras' batch norm, as a user would write it, and once with the kernel that `fit` uses: that one shows what `fit` adds), and so does PyTorch (eager
and compiled, in both memory layouts) without augmentation. All take turns, round after round. `waits` are the share of a step that it stood still for its images, which
a thread draws ahead as `fit` does: PneumoniaMNIST in memory, patches cut from phantom CT, and a folder of DICOM slices
of 512 × 512 pixels, read anew each epoch and with the prepared images kept (`Flow(cache=)`).
"""
import contextlib
import itertools
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

THREADS = 2
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import numpy as np  # noqa: E402
from sidebyside import Peer, compare, main, peer_python  # noqa: E402

STEPS, BATCH = 24, 64
TORCH = """
import numpy as np, torch, torch.nn as nn, torch.nn.functional as F
torch.set_num_threads(THREADS)

class Block(nn.Module):
    def __init__(self, i, o, stride):
        super().__init__()
        self.n1, self.n2 = nn.BatchNorm2d(i), nn.BatchNorm2d(o)
        self.c1, self.c2 = nn.Conv2d(i, o, 3, stride, 1, bias=False), nn.Conv2d(o, o, 3, 1, 1, bias=False)
        self.short = nn.Conv2d(i, o, 1, stride, bias=False) if stride > 1 or i != o else None

    def forward(self, x):
        y = F.relu(self.n1(x))
        return self.c2(F.relu(self.n2(self.c1(y)))) + (x if self.short is None else self.short(y))

class Net(nn.Module):
    def __init__(self, width=16, blocks=(1, 1, 2)):
        super().__init__()
        self.stem, i, parts = nn.Conv2d(1, width, 3, 1, 1, bias=False), width, []
        for k, count in enumerate(blocks):
            for j in range(count):
                parts.append(Block(i, width * 2**k, 2 if k and not j else 1))
                i = width * 2**k
        self.body, self.norm, self.out = nn.Sequential(*parts), nn.BatchNorm2d(i), nn.Linear(i, 1)

    def forward(self, x):
        return self.out(F.dropout(F.relu(self.norm(self.body(self.stem(x)))).mean((2, 3)), 0.1, self.training))

layout = torch.channels_last if LAST else torch.contiguous_format
net = Net().to(memory_format=layout)
average = [p.detach().clone() for p in net.parameters()]
call = torch.compile(net) if COMPILE else net
optimizer = torch.optim.AdamW(net.parameters(), 1e-3, weight_decay=1e-4, foreach=True)
x, y = torch.randn(BATCH, 1, 28, 28).to(memory_format=layout), torch.randint(0, 2, (BATCH, 1)).float()

def run():
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = F.binary_cross_entropy_with_logits(call(x), y)
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        torch._foreach_lerp_(average, list(net.parameters()), 0.01)
        loss.item()
run()
"""


def torch_peer(last, compiled):
    """A PyTorch process, or None when it does not get there (torch.compile needs a compiler)."""
    code = TORCH
    for name, value in (("THREADS", THREADS), ("LAST", last), ("COMPILE", compiled), ("BATCH", BATCH), ("STEPS", STEPS)):
        code = code.replace(name, repr(value))
    try:
        return Peer(code)
    except (RuntimeError, BrokenPipeError) as error:
        print(f"left out: PyTorch {'compiled' if compiled else 'eager'}: {str(error)[-200:]}", file=sys.stderr)
        return None


def our_run(folder, augment):
    """The function that trains an epoch of a run of `fit` over noise, as many images as PyTorch has."""
    from medimg.data.datasets import ImageDataset
    from medimg.data.preprocess import Preprocessor
    from medimg.models.networks import build_model
    from medimg.training import trainer
    from medimg.training.record import TrainConfig
    rng, n = np.random.default_rng(0), STEPS * BATCH + 64
    splits = np.where(np.arange(n) < STEPS * BATCH, "train", "val")
    noise = ImageDataset("noise", rng.integers(0, 255, (n, 28, 28)).astype(np.uint8), np.arange(n) % 2, splits, classes=("a", "b"))
    run = trainer._Run(build_model("resnet", (28, 28, 1), 2, seed=0), noise, TrainConfig(epochs=100, batch_size=BATCH, augment=augment), Preprocessor([("scale", {"low": 0, "high": 255})]),
                       folder, {"auc": trainer.rank_auc})
    return lambda: trainer._train_epoch(run, lambda loss: None)


def bare_loop(norms):
    """The same arithmetic as a user would write it, on one batch that lies ready; traced within the context manager `norms` of the network."""
    import keras
    import tensorflow as tf

    from medimg.models.networks import build_model
    net = build_model("resnet", (28, 28, 1), 2, seed=0)
    optimizer = keras.optimizers.AdamW(1e-3, weight_decay=1e-4)
    optimizer.build(net.trainable_variables)
    averages = [tf.Variable(w) for w in net.get_weights()]

    @tf.function
    def step(x, y):
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(tf.nn.sigmoid_cross_entropy_with_logits(labels=y, logits=net(x, training=True)))
        gradients, _ = tf.clip_by_global_norm(tape.gradient(loss, [v.value for v in net.trainable_variables]), 1.0)
        optimizer.apply(gradients, net.trainable_variables)
        for mean, weight in zip(averages, net.weights):
            mean.assign(0.99 * mean + 0.01 * weight.value)
        return loss

    rng = np.random.default_rng(0)
    x, y = tf.constant(rng.random((BATCH, 28, 28, 1)).astype("float32")), tf.constant(rng.integers(0, 2, (BATCH, 1)).astype("float32"))

    def epoch():
        for _ in range(STEPS):
            float(step(x, y))
    with norms(net):
        step(x, y)
    return epoch


def waits():
    """Rows of (what, share of the time of a step that it waits) for three kinds of input."""
    from medimg.data import dicom
    from medimg.data.datasets import drop_shared, load_dataset
    from medimg.data.flow import Flow
    from medimg.data.phantom import thorax_phantom
    from medimg.data.preprocess import Preprocessor
    from medimg.data.sources import FileSource, PatchSource
    from medimg.models.networks import build_model
    from medimg.training.record import TrainConfig
    from medimg.training.step_time import profile_steps
    from medimg.training.trainer import TrainState, _ahead, make_loss
    xrays, scale = drop_shared(load_dataset("pneumoniamnist", n=2000, quiet=True), quiet=True), Preprocessor([("scale", {"low": 0, "high": 255})])
    spent = profile_steps(build_model("resnet", (28, 28, 1), 2, seed=0), xrays, preprocessor=scale, rounds=20)
    yield f"wait, {xrays.name} 28 px, batch 64", spent.waiting, spent.total_ms

    def of_flow(what, flow, shape):
        state = TrainState(build_model("resnet", shape, 2, seed=0), TrainConfig(), make_loss("binary"))
        still, spent, stream = [], [], _ahead(itertools.chain.from_iterable(map(flow.batches, range(4))))
        while True:
            start = time.perf_counter()
            if (batch := next(stream, None)) is None:
                break
            still.append(time.perf_counter() - start)
            if len(batch[0]) == flow.batch_size:
                state.step(*batch, 0, 1e-3)
            spent.append(time.perf_counter() - start)
        return what, sum(still[1:]) / sum(spent[1:]), 1e3 * statistics.mean(spent[1:])      # the first step builds the graph

    scans = [thorax_phantom(seed, shape=(50, 112, 112), spacing_mm=(6.0, 3.2, 3.2), dose=None).volume for seed in range(2)]
    yield of_flow("wait, phantom CT patches 32 voxels, batch 8", Flow(PatchSource(scans, (32, 32, 32), labels=[0, 1], per_volume=64), lambda s: s | {"image": s["image"] / 1000}, batch_size=8), (32, 32, 32, 1))
    if folder := os.environ.get("MEDIMG_DATA"):
        series = max(dicom.scan(Path(folder) / "thorax_ct"), key=lambda s: len(s.files))
        resize = Preprocessor([("resize", {"height": 128, "width": 128}), ("scale", {"low": -1000, "high": 1000})])
        for how, cache in (("read anew each epoch", None), ("prepared once", "memory")):
            flow = Flow(FileSource(series.files, np.arange(len(series.files)) % 2), resize, batch_size=16, cache=cache)
            yield of_flow(f"wait, DICOM folder 512 px to 128 px, batch 16, {how}", flow, (128, 128, 1))


def checkpoint_share(folder):
    """(parameters, share) of the time that a checkpoint adds to an epoch of PneumoniaMNIST's size, for a network of ten million parameters."""
    from medimg.models.networks import build_model
    from medimg.training.record import TrainConfig, save_checkpoint
    from medimg.training.trainer import TrainState, make_loss
    net = build_model("resnet", (28, 28, 1), 2, seed=0, width=128, blocks=(2, 2, 3))
    state, x, y = TrainState(net, TrainConfig(), make_loss("binary")), np.zeros((BATCH, 28, 28, 1), "float32"), np.arange(BATCH, dtype="int32") % 2
    state.step(x, y, 0, 1e-3)
    step = min(_seconds(lambda: state.step(x, y, 0, 1e-3)) for _ in range(3))

    def save():
        best = {f"best/{i:04d}": a.numpy() for i, a in enumerate(state.average)}
        save_checkpoint(Path(folder) / "checkpoint.npz", state.arrays() | best, {"epoch": 1}, keep_before=True)
    save()
    saving, steps = statistics.median(_seconds(save) for _ in range(5)), 4708 // BATCH
    return net.count_params(), saving / (saving + steps * step), 1e3 * saving


def _seconds(call):
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def measure(repeats):
    """All rows; see the text above."""
    import tensorflow as tf

    from medimg.training.fused_norm import fused_norms
    tf.config.threading.set_intra_op_parallelism_threads(THREADS)
    tf.config.experimental.enable_op_determinism()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        epoch, plain = our_run(folder, True), our_run(folder, False)
        peers = {"bare tf.function loop": bare_loop(fused_norms), "bare loop, Keras' batch norm": bare_loop(lambda net: contextlib.nullcontext())}
        if peer_python():
            made = {f"PyTorch {'compiled' if c else 'eager'}, {'channels last' if last else 'channels first'}": torch_peer(last, c) for c in (False, True) for last in (False, True)}
            peers |= {name: peer for name, peer in made.items() if peer}
        rows += compare(f"fit, an epoch of {STEPS} steps of {BATCH}", epoch, peers, repeats=repeats, pause=0.3)
        rows += compare("fit without augmentation", plain, {"bare tf.function loop": peers["bare tf.function loop"]}, repeats=repeats, pause=0.3)
        for peer in peers.values():
            if isinstance(peer, Peer):
                peer.close()
        for what, share, ms in waits():
            print(f"{what:<48} {share:6.2%} of {ms:.1f} ms", flush=True)
            rows.append({"what": what, "share": share, "step_ms": ms})
        parameters, share, ms = checkpoint_share(folder)
        print(f"checkpoint of {parameters / 1e6:.1f} M parameters: {ms:.0f} ms, {share:.2%} of an epoch of PneumoniaMNIST", flush=True)
        rows.append({"what": f"checkpoint, {parameters} parameters", "share": share, "ms": ms})
    return rows


if __name__ == "__main__":
    main(measure, __doc__.splitlines()[0])
