"""Sliding-window inference of a 3-D U-Net over 256 x 256 x 128 voxels, MONAI and medimg in turns: python benchmarks/models/sliding_window.py [--json FILE]

One network on both sides: MONAI's UNet (16, 32, 64, 128 channels, strides of 2, two classes), its weights drawn once and read by both. MONAI runs it by
PyTorch in its own `sliding_window_inference`; here the same weights stand in an ONNX graph under `medimg.models.windows.sliding_window`. Windows of
64 x 96 x 96, overlap a quarter, Gaussian weights; with one thread and with two. Before the clock starts both answers must agree to 1e-3. Each row has the
seconds on the wall, which a busy machine distorts, and the CPU seconds, which it hardly does (with two threads PyTorch's waiting counts as work: compare those of one).
"""
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import sidebyside  # noqa: E402

SHAPE, WINDOW, OVERLAP = (128, 256, 256), (64, 96, 96), 0.25
MONAI = """
import time
import numpy as np
import torch
from monai.inferers import sliding_window_inference
from monai.networks.nets import UNet
torch.manual_seed(0)
net = UNet(spatial_dims=3, in_channels=1, out_channels=2, channels=(16, 32, 64, 128), strides=(2, 2, 2)).eval()
np.savez({folder!r} + "/weights.npz", **{{k: v.numpy() for k, v in net.state_dict().items()}})
scan = torch.from_numpy(np.load({folder!r} + "/scan.npy"))[None, None]

def run(windows, threads, mode="gaussian", keep=False):
    torch.set_num_threads(threads)
    start = time.process_time()
    with torch.inference_mode():
        out = sliding_window_inference(scan, {window}, windows, net, overlap={overlap}, mode=mode)
    with open({folder!r} + "/cpu.txt", "w") as file:
        file.write(str(time.process_time() - start))
    if keep:
        np.save({folder!r} + "/monai.npy", out[0].permute(1, 2, 3, 0).numpy())
"""


def graph(weights):
    """MONAI's network as an ONNX file: `images` (n, z, y, x, 1) to `logits` (n, z, y, x, 2)."""
    from onnx import TensorProto, helper, numpy_helper
    nodes, tables = [], []

    def constant(name, value):
        tables.append(numpy_helper.from_array(np.ascontiguousarray(value, dtype=np.float32), name))
        return name

    def node(kind, *inputs, **settings):
        nodes.append(helper.make_node(kind, inputs, [f"v{len(nodes)}"], **settings))
        return nodes[-1].output[0]

    def normed(x, name, channels):
        x = node("InstanceNormalization", x, constant(f"{name}.one", np.ones(channels)), constant(f"{name}.zero", np.zeros(channels)), epsilon=1e-5)
        return node("LeakyRelu", x, alpha=float(weights[f"{name}.adn.A.weight"].item()))     # a PReLU of one slope; ONNX Runtime's own PRelu costs a quarter of the time

    def layer(x, name, kind="Conv", stride=2, last=False):
        w = weights[f"{name}.conv.weight"]
        more = {"output_padding": [1] * 3} if kind == "ConvTranspose" else {}
        x = node(kind, x, constant(f"{name}.w", w), constant(f"{name}.b", weights[f"{name}.conv.bias"]), kernel_shape=[3] * 3, strides=[stride] * 3, pads=[1] * 6, **more)
        return x if last else normed(x, name, w.shape[kind == "ConvTranspose"])

    top, inner = "model.1.submodule", "model.1.submodule.1.submodule"
    a = layer(node("Transpose", "images", perm=[0, 4, 1, 2, 3]), "model.0")
    b = layer(a, f"{top}.0")
    c = layer(b, f"{inner}.0")
    x = layer(c, f"{inner}.1.submodule", stride=1)
    for skip, name in ((c, f"{inner}.2"), (b, f"{top}.2"), (a, "model.2")):
        x = layer(node("Concat", skip, x, axis=1), name, "ConvTranspose", last=name == "model.2")
    nodes.append(helper.make_node("Transpose", [x], ["logits"], perm=[0, 2, 3, 4, 1]))
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", *WINDOW, c]) for name, c in (("images", 1), ("logits", 2))]
    made = helper.make_graph(nodes, "monai-unet", ends[:1], ends[1:], tables)
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=8).SerializeToString()


class Measured(sidebyside.Peer):
    """A call that gives its seconds, as `compare` expects of a peer, and notes its CPU seconds."""

    def __init__(self, call, cpu_file):
        self.call, self.cpu_file, self.cpu_s = call, cpu_file, []

    def __call__(self):
        seconds = self.call()
        self.cpu_s.append(float(self.cpu_file.read_text()))
        return seconds


def compared(threads, scan, engine, peer, *, folder, repeats):
    """Rows for one number of threads: MONAI with one window and with four windows a call, against ours with a worker for each thread."""
    from medimg.models.windows import sliding_window
    own = []

    def ours():
        start = time.process_time()
        sliding_window(scan, engine, WINDOW, overlap=OVERLAP, workers=threads)
        own.append(time.process_time() - start)

    peers = {f"MONAI, {n} window{'s' * (n > 1)} a call": Measured(lambda n=n: peer(windows=n, threads=threads), Path(folder, "cpu.txt")) for n in (1, 4)}
    rows = sidebyside.compare(f"sliding window, {threads} thread{'s' * (threads > 1)}", ours, peers, repeats=repeats)
    for row in rows:
        mine, theirs = statistics.median(own[1:]), statistics.median(peers[row["peer"]].cpu_s[1:])
        row |= {"threads": threads, "ours_cpu_s": mine, "peer_cpu_s": theirs, "cpu_ratio": theirs / mine}
        print(f"   CPU seconds: medimg {mine:.2f}, {row['peer']} {theirs:.2f}, ratio {theirs / mine:.2f}", flush=True)
    return rows


def measure(repeats):
    """Rows of the table, once both sides are known to compute the same."""
    if sidebyside.peer_python() is None:
        return []
    from medimg.deployment.engine import Engine
    from medimg.models.windows import sliding_window
    with tempfile.TemporaryDirectory() as folder:
        scan = np.random.default_rng(0).normal(size=SHAPE).astype(np.float32)
        np.save(f"{folder}/scan.npy", scan)
        peer = sidebyside.Peer(MONAI.format(folder=folder, window=WINDOW, overlap=OVERLAP))
        peer(windows=1, threads=2, mode="constant", keep=True)
        with np.load(f"{folder}/weights.npz") as file:
            engine = Engine(graph(dict(file)), threads=1)
        apart = float(np.abs(sliding_window(scan, engine, WINDOW, overlap=OVERLAP, blend="constant") - np.load(f"{folder}/monai.npy")).max())
        print(f"largest difference between the two answers: {apart:.1e}")
        assert apart < 1e-3, "the two sides do not compute the same thing"
        rows = [row for threads in (1, 2) for row in compared(threads, scan, engine, peer, folder=folder, repeats=repeats)]
        peer.close()
    return [row | {"shape": list(SHAPE), "window": list(WINDOW), "overlap": OVERLAP, "largest_difference": apart} for row in rows]


if __name__ == "__main__":
    sidebyside.main(measure, __doc__.splitlines()[0])
