"""Grad-CAM on one image beside one forward pass of the same network, both as Keras runs them when called, one thread.

    make bench SUBJECT=gradcam
    python benchmarks/evaluation/gradcam.py --json results/benchmarks/evaluation_gradcam.json

The forward pass is `np.asarray(model(image, training=False))`; Grad-CAM is `grad_cam(model, image)` with the map at the image's size. The ratio that is printed is
forward over Grad-CAM; its inverse, `forward_passes`, is the figure: at most 2 is wanted.
"""
import os
import sys
from pathlib import Path

os.environ.update({name: "1" for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "TF_NUM_INTRAOP_THREADS", "TF_NUM_INTEROP_THREADS")})
ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import numpy as np  # noqa: E402
from sidebyside import compare, main  # noqa: E402

#: What is timed: name, input shape, options of the network.
CASES = [("ResNet 28 px", (28, 28, 1), {}), ("ResNet 64 px", (64, 64, 1), {}), ("ResNet 224 px", (224, 224, 3), {}), ("3-D ResNet 32 voxels", (32, 32, 32, 1), {})]


def measure(repeats):
    """One row a network."""
    from medimg.evaluation.explain import grad_cam
    from medimg.models.networks import build_model
    rows = []
    for what, shape, options in CASES:
        model = build_model("resnet", shape, 2, seed=0, **options)
        image = np.random.default_rng(0).random((1, *shape), dtype=np.float32)
        timed = compare(what, lambda model=model, image=image: grad_cam(model, image), {"one forward pass": lambda model=model, image=image: np.asarray(model(image, training=False))},
                        repeats=max(repeats, 21))
        rows += [{**row, "forward_passes": 1 / row["ratio"]} for row in timed]
    return rows


if __name__ == "__main__":
    main(measure, __doc__.splitlines()[0])
