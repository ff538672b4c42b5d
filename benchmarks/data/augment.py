"""Augmentation of an image with its mask beside TorchIO, MONAI (3-D) and albumentations (2-D): each on one thread, draw included.

    python benchmarks/data/augment.py --json results/benchmarks/augment.json
"""
import os
import sys
from pathlib import Path

ONE = {name: "1" for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS", "NO_ALBUMENTATIONS_UPDATE")}
os.environ.update(ONE)

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import cv2  # noqa: E402
from sidebyside import Peer, compare, main, peer_python  # noqa: E402

from medimg.data import augment_grey as grey  # noqa: E402
from medimg.data.augment import Affine, Compose, Crop, Elastic, Flip, Sample, generator  # noqa: E402

VOLUME = """
import numpy as np, warnings
warnings.filterwarnings("ignore")
rng = np.random.default_rng(0)
coarse = rng.random((8, 16, 16)).astype(np.float32)
image = np.ascontiguousarray(coarse.repeat(8, 0).repeat(8, 1).repeat(8, 2))
mask = (image > 0.6).astype(np.uint8)
"""
TORCHIO = VOLUME + """
import torch, torchio as tio
torch.set_num_threads(1)
subject = tio.Subject(image=tio.ScalarImage(tensor=torch.from_numpy(image)[None]), mask=tio.LabelMap(tensor=torch.from_numpy(mask)[None]))
steps = {"affine": tio.RandomAffine(scales=0.1, degrees=10, translation=5), "elastic": tio.RandomElasticDeformation(),
         "flip": tio.RandomFlip(axes=(0, 1, 2), flip_probability=1), "noise": tio.RandomNoise(std=(0.05, 0.05)), "blur": tio.RandomBlur(std=(1, 1)),
         "gamma": tio.RandomGamma(), "bias": tio.RandomBiasField(), "ghosting": tio.RandomGhosting(), "spike": tio.RandomSpike(),
         "low resolution": tio.RandomAnisotropy(axes=(2,), downsampling=(3, 3))}
def run(step):
    steps[step](subject)
"""
MONAI = VOLUME + """
import torch, monai.transforms as mt
torch.set_num_threads(1)
both = ["image", "mask"]
pair = {"mode": ("bilinear", "nearest"), "padding_mode": "border", "prob": 1}
steps = {"affine": mt.RandAffined(both, rotate_range=[0.17] * 3, scale_range=[0.1] * 3, translate_range=[5] * 3, **pair),
         "elastic": mt.Rand3DElasticd(both, sigma_range=(5, 7), magnitude_range=(50, 150), **pair),
         "flip": mt.Compose([mt.RandFlipd(both, prob=1, spatial_axis=(0, 1, 2))]), "noise": mt.RandGaussianNoised(["image"], prob=1, std=0.05),
         "blur": mt.RandGaussianSmoothd(["image"], prob=1, sigma_x=(1, 1), sigma_y=(1, 1), sigma_z=(1, 1)),
         "gamma": mt.RandAdjustContrastd(["image"], prob=1), "bias": mt.RandBiasFieldd(["image"], prob=1),
         "low resolution": mt.RandSimulateLowResolutiond(["image"], prob=1, zoom_range=(0.33, 0.34))}
sample = {"image": torch.from_numpy(image)[None], "mask": torch.from_numpy(mask)[None]}
def run(step):
    steps[step](dict(sample))
"""
FILM = """
import numpy as np
rng = np.random.default_rng(0)
image = rng.random((32, 32)).astype(np.float32).repeat(16, 0).repeat(16, 1)
mask = (image > 0.6).astype(np.uint8)
"""
ALBUMENTATIONS = FILM + """
import albumentations as A, cv2
cv2.setNumThreads(1)
edge = {"border_mode": cv2.BORDER_REPLICATE}
steps = {"affine": A.Affine(scale=(0.9, 1.1), translate_px=(-10, 10), rotate=(-10, 10), p=1, **edge), "elastic": A.ElasticTransform(alpha=60, sigma=10, p=1, **edge),
         "flip": A.HorizontalFlip(p=1), "crop": A.RandomCrop(256, 256, p=1), "noise": A.GaussNoise(std_range=(0.05, 0.05), p=1),
         "blur": A.GaussianBlur(blur_limit=0, sigma_limit=(1, 1), p=1), "gamma": A.RandomGamma(gamma_limit=(70, 140), p=1),
         "contrast": A.RandomBrightnessContrast(p=1), "cutout": A.CoarseDropout(num_holes_range=(2, 2), hole_height_range=(20, 60), hole_width_range=(20, 60), p=1),
         "low resolution": A.Downscale(scale_range=(0.4, 0.4), p=1), "affine + elastic": A.Compose([
             A.Affine(scale=(0.9, 1.1), translate_px=(-10, 10), rotate=(-10, 10), p=1, **edge), A.ElasticTransform(alpha=60, sigma=10, p=1, **edge)])}
def run(step, times=20):
    for _ in range(times):
        steps[step](image=image, mask=mask)
"""
TURN = {"rotate_deg": 10, "scale": 0.1}
DEEP = {"affine": [Affine(**TURN, translate_mm=5)], "elastic": [Elastic(control_mm=21, max_mm=7.5)], "flip": [Flip(1, 1, 1, laterality="free")],
        "noise": [grey.Noise((0.05, 0.05))], "blur": [grey.Blur((1, 1))], "gamma": [grey.Gamma()], "bias": [grey.BiasField()], "ghosting": [grey.Ghosting()],
        "spike": [grey.Spike()], "low resolution": [grey.LowResolution((3, 3), axes="zyx")]}
FLAT = {"affine": [Affine(**TURN, translate_mm=10)], "elastic": [Elastic(control_mm=30, max_mm=6)], "flip": [Flip(x=1, laterality="free")], "crop": [Crop((256, 256))],
        "noise": [grey.Noise((0.05, 0.05))], "blur": [grey.Blur((1, 1))], "gamma": [grey.Gamma()], "contrast": [grey.Contrast()],
        "cutout": [grey.Cutout(2, (20, 60), fill=0)], "low resolution": [grey.LowResolution((2.5, 2.5))],
        "affine + elastic": [Affine(**TURN, translate_mm=10), Elastic(control_mm=30, max_mm=6)]}


def ours(source, chains, times=1):
    space = {}
    exec(source, space)  # noqa: S102  (the constants above)
    sample = Sample(space["image"], (1.0,) * space["image"].ndim, mask=space["mask"])
    count = iter(range(10**9))

    def run(step):
        for _ in range(times):
            Compose(chains[step])(sample, generator(0, 0, next(count)))
    return run


def measure(repeats):
    cv2.setNumThreads(1)
    rows, have = [], peer_python() is not None
    peers = {"TorchIO": Peer(TORCHIO, env=ONE), "MONAI": Peer(MONAI, env=ONE)} if have else {}
    deep = ours(VOLUME, DEEP)
    for what in DEEP:
        able = {name: p for name, p in peers.items() if not (name == "MONAI" and what in ("ghosting", "spike"))}
        rows += compare(f"3-D {what}", deep, able, repeats=repeats, step=what) if able else []
    for peer in peers.values():
        peer.close()
    flat, other = ours(FILM, FLAT, times=20), Peer(ALBUMENTATIONS, env=ONE) if have else None
    for what in FLAT if have else ():
        rows += compare(f"2-D {what}, 20 times", flat, {"albumentations": other}, repeats=repeats, step=what)
    if other:
        other.close()
    return rows


if __name__ == "__main__":
    main(measure, __doc__.splitlines()[0])
