"""HD95, NSD and ASSD of one pair of masks, MONAI, SimpleITK and medimg in turns: python benchmarks/evaluation/surfaces.py [--json FILE]

Masks of 128 x 256 x 256 voxels of 2.5 x 0.8 x 0.8 mm. MONAI is asked for its 95 % Hausdorff distance, its surface Dice and its symmetric mean distance, each by a call
of its own, as a script would; SimpleITK for its Hausdorff filter. Ours is one call of `surface_scores`. Before the clock starts MONAI's numbers must agree to 1e-6, of
the number where it is above 1. The pairs: an organ outlined 1 to 3 mm off; the same with fifty stray voxels all over the image; a lesion; two lesions far apart; an organ with one voxel in twenty
missing at random, which has six times the surface. Each row has the most memory that our call takes above the masks, as a multiple of one mask (bool, 8 MB).

    python benchmarks/evaluation/surfaces.py --values     the numbers that tests/test_segmentation_metrics.py holds
"""
import json
import subprocess
import sys
import tempfile
import tracemalloc
from pathlib import Path

import numpy as np

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parents[2])]
import sidebyside  # noqa: E402

SHAPE, SPACING, TOLERANCE = (128, 256, 256), (2.5, 0.8, 0.8), 2.0
MONAI = """
import json, warnings
import numpy as np, torch
from monai.metrics import compute_average_surface_distance, compute_hausdorff_distance, compute_surface_dice
torch.set_num_threads(2)
warnings.simplefilter("ignore")
data = {name: (torch.from_numpy(a)[None, None], torch.from_numpy(b)[None, None]) for name, (a, b) in
        ((name, np.load(f"{FOLDER}/{name}.npy")) for name in NAMES)}

def run(name, spacing, tolerance, keep=False):
    a, b = data[name]
    numbers = [float(compute_hausdorff_distance(a, b, include_background=True, percentile=95, spacing=spacing)),
               float(compute_average_surface_distance(a, b, include_background=True, symmetric=True, spacing=spacing)),
               float(compute_surface_dice(a, b, [tolerance], include_background=True, spacing=spacing))]
    if keep:
        with open(f"{FOLDER}/{name}.json", "w") as file:
            json.dump(numbers, file)
"""
SITK = """
import numpy as np, SimpleITK as sitk
data = {}
for name in NAMES:
    a, b = (sitk.GetImageFromArray(m.astype(np.uint8)) for m in np.load(f"{FOLDER}/{name}.npy"))
    data[name] = a, b
    for image in (a, b):
        image.SetSpacing(SPACING[::-1])

def run(name, **other):
    measure = sitk.HausdorffDistanceImageFilter()
    measure.Execute(*data[name])
    measure.GetHausdorffDistance()
"""


def ellipsoid(centre, radii_mm, shape=SHAPE, spacing=SPACING):
    """A filled ellipsoid; bool (z, y, x)."""
    axes = np.ogrid[tuple(slice(0, n) for n in shape)]
    return sum(((x - c) * s / r) ** 2 for x, c, s, r in zip(axes, centre, spacing, radii_mm)) <= 1


def pairs():
    """Name and (mask, truth) of each case."""
    rng = np.random.default_rng(0)
    organ, other = ellipsoid((64, 128, 128), (90, 70, 60)), ellipsoid((65, 131, 126), (92, 68, 61))
    stray = organ.copy()
    stray.ravel()[rng.choice(stray.size, 50, replace=False)] = True
    return {"organ": (organ, other), "stray voxels": (stray, other), "lesion": (ellipsoid((64, 128, 128), (12, 12, 12)), ellipsoid((65, 131, 126), (13, 11, 12))),
            "far apart": (ellipsoid((20, 50, 50), (15, 15, 15)), ellipsoid((100, 200, 200), (30, 30, 30))), "noise": (organ & (rng.random(SHAPE) > 0.05), other)}


def peak(function) -> int:
    """Most bytes that a call holds at a time, as Python and NumPy count them."""
    tracemalloc.start()
    function()
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return most


def measure(repeats):
    """Rows of the table, once both sides are known to compute the same."""
    from medimg.evaluation.surfaces import surface_scores
    masks, rows = pairs(), []
    with tempfile.TemporaryDirectory() as folder:
        for name, pair in masks.items():
            np.save(f"{folder}/{name}.npy", np.stack(pair))
        facts = f"FOLDER, NAMES, SPACING = {folder!r}, {list(masks)!r}, {SPACING!r}\n"
        peers = {} if sidebyside.peer_python() is None else {"MONAI, HD95 + ASSD + NSD": sidebyside.Peer(facts + MONAI), "SimpleITK, Hausdorff": sidebyside.Peer(facts + SITK)}
        for name, pair in masks.items():
            def ours(name, **other):
                return surface_scores(*masks[name], SPACING, tolerance_mm=TOLERANCE)
            apart = None
            if peers:
                peers["MONAI, HD95 + ASSD + NSD"](name=name, spacing=SPACING, tolerance=TOLERANCE, keep=True)
                theirs = np.array(json.loads(Path(folder, f"{name}.json").read_text()))
                apart = float((np.abs(np.array(ours(name)[1:]) - theirs) / np.maximum(theirs, 1)).max())
                print(f"{name}: largest difference from MONAI {apart:.1e}")
                assert apart < 1e-6, "the two sides do not compute the same thing"
            memory = peak(lambda name=name, ours=ours: ours(name)) / pair[0].nbytes
            print(f"{name}: memory above the masks, {memory:.2f} of one mask")
            for row in sidebyside.compare(name, ours, peers, repeats=repeats, name=name, spacing=SPACING, tolerance=TOLERANCE):
                rows.append(row | {"memory_in_masks": memory, "largest_difference": apart, "shape": list(SHAPE)})
        for peer in peers.values():
            peer.close()
    return rows


VALUES = """
import json, sys
import numpy as np, torch
from monai.metrics import compute_average_surface_distance, compute_hausdorff_distance, compute_surface_dice, compute_iou, compute_dice
from monai.metrics.panoptic_quality import compute_panoptic_quality
rows = {}
for name, (a, b, spacing, tolerance) in json.loads(sys.stdin.read()).items():
    a, b = (torch.tensor(m, dtype=torch.uint8) for m in (a, b))
    x, y = a.bool()[None, None], b.bool()[None, None]
    many = {"include_background": True, "spacing": spacing}
    rows[name] = [float(v) for v in (compute_hausdorff_distance(x, y, **many), compute_hausdorff_distance(x, y, percentile=95, **many),
                  compute_average_surface_distance(x, y, symmetric=True, **many), compute_surface_dice(x, y, [tolerance], **many),
                  compute_surface_dice(x, y, [tolerance], use_subvoxels=True, **many), compute_iou(x, y), compute_dice(x, y))]
print(json.dumps(rows))
"""


def values():
    """Print MONAI's numbers for the small masks of the tests."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))
    from test_segmentation_metrics import cases
    asked = {name: [a.tolist(), b.tolist(), spacing, tolerance] for name, (a, b, spacing, tolerance) in cases().items()}
    done = subprocess.run([sidebyside.peer_python(), "-W", "ignore", "-c", VALUES], input=json.dumps(asked), capture_output=True, text=True)
    print(done.stderr[-2000:] if done.returncode else "".join(f"    {name!r}: {row},\n" for name, row in json.loads(done.stdout).items()))


if __name__ == "__main__":
    if "--values" in sys.argv:
        values()
    else:
        sidebyside.main(measure, __doc__.splitlines()[0])
