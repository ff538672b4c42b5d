"""Values and gradients of the losses beside MONAI and PyTorch: MEDIMG_BENCH_PYTHON=... python benchmarks/training/losses.py [--json FILE]

Not a timing. Both sides get the same seeded logits and labels (two small volumes, three classes, one class absent from one volume). Printed are both values and
the largest difference of a gradient, as a share of the largest gradient; more than 1e-5 of either ends with an error. The column `peer` is what tests/test_losses.py holds.
MONAI's generalised Dice has its epsilon after weighting, ours before, so there both are made negligible. The last line is MONAI's generalised Dice loss, with its own
default, of the worst possible answer to two classes of a million voxels each.
"""
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parents[2])]
import sidebyside  # noqa: E402

# name: (ours, of the module L, y numbers of classes, t the same as 0 and 1, z logits; theirs, channels first)
CASES = {
    "dice, sigmoid": (lambda L, y, t, z: L.dice_loss(t, z, smooth=1.0), "DiceLoss(sigmoid=True, smooth_nr=1, smooth_dr=1)(z, t)"),
    "dice, softmax": (lambda L, y, t, z: L.dice_loss(y, z, smooth=1.0), "DiceLoss(softmax=True, include_background=False, smooth_nr=1, smooth_dr=1)(z, t)"),
    "dice, batch": (lambda L, y, t, z: L.dice_loss(y, z, smooth=1e-5, batch=True), "DiceLoss(softmax=True, include_background=False, batch=True)(z, t)"),
    "tversky": (lambda L, y, t, z: L.tversky_loss(y, z, errors=(0.3, 0.7), smooth=1.0), "TverskyLoss(softmax=True, include_background=False, alpha=0.3, beta=0.7, smooth_nr=1, smooth_dr=1)(z, t)"),
    "generalised dice": (lambda L, y, t, z: L.generalised_dice_loss(y, z, smooth=1e-9), "GeneralizedDiceLoss(softmax=True, smooth_nr=1e-12, smooth_dr=1e-12)(z, t)"),
    "focal, sigmoid": (lambda L, y, t, z: L.focal_loss(t, z, gamma=2.0, alpha=0.25), "FocalLoss(gamma=2.0, alpha=0.25)(z, t)"),
    "focal, softmax": (lambda L, y, t, z: L.focal_loss(y, z, gamma=1.5), "FocalLoss(gamma=1.5, use_softmax=True)(z, t) * z.shape[1]"),
    "dice and entropy": (lambda L, y, t, z: L.dice_loss(y, z, smooth=1.0) + L.cross_entropy(y, z), "DiceCELoss(softmax=True, include_background=False, smooth_nr=1, smooth_dr=1)(z, t)"),
    "smoothed entropy": (lambda L, y, t, z: L.cross_entropy(y, z, smoothing=0.1), "torch.nn.CrossEntropyLoss(label_smoothing=0.1)(z, y)"),
    "weighted entropy": (lambda L, y, t, z: L.cross_entropy(t, z, weights=[1.0, 2.0, 5.0]), "torch.nn.BCEWithLogitsLoss(pos_weight=torch.tensor([1.0, 2.0, 5.0]).reshape(1, 3, 1, 1, 1))(z, t)"),
}
PEER = """
import json, sys
import monai, numpy as np, torch
from monai.losses import DiceCELoss, DiceLoss, FocalLoss, GeneralizedDiceLoss, TverskyLoss
data = np.load({file!r})
y, t = torch.from_numpy(data["y"]), torch.from_numpy(data["t"]).movedim(-1, 1).double()
rows = {{}}
for name, code in json.loads({cases!r}).items():
    z = torch.from_numpy(data["z"]).movedim(-1, 1).clone().double().requires_grad_()
    value = eval(code)
    value.backward()
    rows[name] = float(value)
    np.save({folder!r} + "/" + name + ".npy", z.grad.movedim(1, -1).numpy())
worst = torch.zeros(1, 2, 200, 100, 100)
worst[:, 0, :100] = worst[:, 1, 100:] = 1
rows["worst"] = float(GeneralizedDiceLoss()(1 - worst, worst))
print(json.dumps({{"monai": monai.__version__, "torch": torch.__version__, "rows": rows}}))
"""


def volumes(seed=5):
    """(labels (2, 4, 5, 6) int, the same as 0 and 1 with an axis of 3 classes, logits (2, 4, 5, 6, 3) float64)."""
    rng = np.random.default_rng(seed)
    y = rng.integers(0, 3, (2, 4, 5, 6))
    y[0][y[0] == 2] = 0
    return y, np.eye(3)[y], rng.normal(0, 2, (2, 4, 5, 6, 3))


def ours(loss, y, t, z):
    """Value and gradient of one of our losses."""
    import tensorflow as tf
    from medimg.training import losses
    z = tf.constant(z)
    with tf.GradientTape() as tape:
        tape.watch(z)
        value = loss(losses, y, t, z)
    return float(value), tape.gradient(value, z).numpy()


def main(python, out=None):
    y, t, z = volumes()
    with tempfile.TemporaryDirectory() as folder:
        np.savez(f"{folder}/data.npz", y=y, t=t, z=z)
        source = PEER.format(file=f"{folder}/data.npz", folder=folder, cases=json.dumps({name: theirs for name, (_, theirs) in CASES.items()}))
        done = subprocess.run([python, "-c", source], capture_output=True, text=True, check=True)
        peer = json.loads(done.stdout.splitlines()[-1])
        print(f"MONAI {peer['monai']}, PyTorch {peer['torch']}\n{'':18}{'ours':>14}{'peer':>14}{'gradients differ by':>22}")
        rows = {}
        for name, (loss, _) in CASES.items():
            value, gradient = ours(loss, y, t, z)
            theirs = np.load(f"{folder}/{name}.npy")
            rows[name] = {"ours": value, "peer": peer["rows"][name], "gradient": float(np.abs(gradient - theirs).max() / np.abs(theirs).max())}
            print(f"{name:18}{value:14.9f}{rows[name]['peer']:14.9f}{rows[name]['gradient']:22.1e}")
    print(f"generalised Dice of the worst answer to two classes of a million voxels, MONAI's default: {peer['rows']['worst']:.3f}")
    if out:
        Path(out).write_text(json.dumps({**peer, "rows": rows, "worst": peer["rows"]["worst"]}, indent=1) + "\n", encoding="utf-8")
    bad = [name for name, row in rows.items() if abs(row["ours"] - row["peer"]) > 1e-5 or row["gradient"] > 1e-5]
    return f"these differ: {', '.join(bad)}" if bad else 0


if __name__ == "__main__":
    if (found := sidebyside.peer_python()) is None:
        print("MONAI is left out: no .venv-bench; remedy: make bench-peers")
    else:
        sys.exit(main(found, sys.argv[sys.argv.index("--json") + 1] if "--json" in sys.argv else None))
