"""The pipeline: order, exact resume, equality of the twins, and geometry against SciPy."""
import hashlib
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medimg.data.datasets import ImageDataset
from medimg.data.pipeline import Augment, Tensors, as_augment, augment_batch, batches, epoch_order, to_tensors, to_tf, uniforms
from medimg.data.preprocess import Preprocessor
from medimg.errors import ConfigError, DatasetError

PRE = Preprocessor([("grayscale", {}), ("scale", {})])
STILL = {"shift": 0, "rotate_deg": 0, "zoom": 0, "brightness": 0, "contrast": 0}


def made(n=23, size=12, seed=0, channels=()):
    rng = np.random.default_rng(seed)
    return ImageDataset("toy", rng.integers(0, 256, (n, size, size, *channels), dtype="uint8"), rng.integers(0, 2, n), ["train"] * n, classes=("a", "b"))


def ids_of(n):
    return np.array([hashlib.sha256(str(i).encode()).hexdigest()[:16] for i in range(n)])


def test_splitmix_against_plain_integers():
    mask = (1 << 64) - 1

    def mix(z):
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & mask
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB & mask
        return z ^ (z >> 31)

    golden, seed, epoch, ident = 0x9E3779B97F4A7C15, 42, 7, "00ff00ff12345678"
    run = mix((mix((seed + golden) & mask) + epoch * golden) & mask)
    expected = [(mix((mix(int(ident, 16) ^ run) + j * golden) & mask) >> 11) * 2.0**-53 for j in range(1, 6)]
    assert uniforms([ident], seed, epoch, 5)[0].tolist() == expected


def test_uniform_enough():
    from scipy.stats import kstest
    u = uniforms(ids_of(4000), 1, 2, 7)
    assert all(kstest(u[:, j], "uniform").pvalue > 1e-4 for j in range(7))
    assert np.abs(np.corrcoef(u.T) - np.eye(7)).max() < 0.07
    assert np.abs(np.corrcoef(u[:, 0], uniforms(ids_of(4000), 2, 2, 1)[:, 0])[0, 1]) < 0.07


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 60), st.integers(0, 2**40), st.integers(0, 500), st.integers(1, 17))
def test_every_image_once_in_an_order_of_its_own(n, seed, epoch, size):
    t = Tensors(np.arange(n, dtype=np.float32)[:, None, None, None] * np.ones((1, 2, 2, 1), np.float32), np.arange(n, dtype=np.int32), ids_of(n))
    parts = list(batches(t, batch_size=size, seed=seed, epoch=epoch))
    y = np.concatenate([y for _, y in parts])
    assert sorted(y) == list(range(n)) and all((x[:, 0, 0, 0] == y).all() for x, y in parts)
    assert [len(y) for _, y in parts[:-1]] == [size] * (len(parts) - 1)
    mixed = np.random.default_rng(n).permutation(n)
    other = Tensors(t.x[mixed], t.y[mixed], t.image_ids[mixed])
    assert (np.concatenate([y for _, y in batches(other, batch_size=size, seed=seed, epoch=epoch)]) == y).all()


def test_epochs_and_seeds_differ():
    ids = ids_of(50)
    orders = {tuple(epoch_order(ids, seed=s, epoch=e)) for s in range(4) for e in range(4)}
    assert len(orders) == 16 and (epoch_order(ids, shuffle=False) == np.arange(50)).all()


def test_resume_is_exact_in_another_process():
    code = ("import numpy as np, hashlib; from medimg.data.pipeline import *\n"
            "x = np.random.default_rng(0).random((20, 9, 9, 1)).astype('float32'); ids = [f'{i * 7919:x}' for i in range(20)]\n"
            "t = Tensors(x, np.arange(20, dtype='int32'), np.array(ids)); h = hashlib.sha256()\n"
            "for e in EPOCHS:\n    h = hashlib.sha256()\n    for a, b in batches(t, batch_size=6, seed=3, epoch=e, augment=True): h.update(a.tobytes() + b.tobytes())\n"
            "print(h.hexdigest())")
    runs = [subprocess.run([sys.executable, "-c", code.replace("EPOCHS", e)], capture_output=True, text=True, check=True).stdout
            for e in ("range(5)", "[4]")]
    assert runs[0] == runs[1] and len(runs[0]) == 65


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 12), st.integers(0, 99), st.sampled_from([1, 3]), st.booleans())
def test_augmentation_ignores_the_neighbours(n, epoch, channels, flip):
    x = np.random.default_rng(epoch).random((n, 10, 14, channels)).astype(np.float32)
    ids = ids_of(n)
    together = augment_batch(x, ids, augment={"flip": flip}, seed=1, epoch=epoch)
    alone = [augment_batch(x[i:i + 1], ids[i:i + 1], augment={"flip": flip}, seed=1, epoch=epoch) for i in range(n)]
    assert together.tobytes() == np.concatenate(alone).tobytes() and together.dtype == np.float32 and together.shape == x.shape
    low, high = x.min(axis=(1, 2, 3), keepdims=True), x.max(axis=(1, 2, 3), keepdims=True)
    assert (together >= low).all() and (together <= high).all()


@pytest.mark.parametrize("setting", [{"shift": 0.2}, {"rotate_deg": 30}, {"zoom": 0.3}, {"shift": 0.1, "rotate_deg": 20, "zoom": 0.2, "flip": True}])
def test_warp_against_scipy(setting):
    from scipy.ndimage import affine_transform, gaussian_filter

    from medimg.data.pipeline import _matrices
    rng = np.random.default_rng(0)
    x = np.stack([gaussian_filter(rng.random((24, 30)), 2) for _ in range(4)])[..., None].astype(np.float32)
    augment, ids = as_augment({**STILL, **setting}), ids_of(4)
    ours = augment_batch(x, ids, augment=augment, seed=5, epoch=2)
    for image, moved, m in zip(x, ours, _matrices(uniforms(ids, 5, 2, 7), augment, (24, 30))):
        matrix, offset = m[::-1, [1, 0]], m[::-1, 2]      # (x, y) -> (y, x)
        theirs = affine_transform(image[..., 0], matrix, offset, order=1, mode="nearest")
        span = np.ptp(image)
        assert np.abs(moved[..., 0] - np.clip(theirs, image.min(), image.max())).max() < 0.03 * span      # OpenCV may use 1/32 pixel


def test_turns_about_the_centre_and_by_the_drawn_angle():
    x = np.zeros((1, 41, 41, 1), np.float32)
    x[0, 19:22, 19:22], x[0, 19:22, 33:36] = 1, 1
    ids, augment = ids_of(1), {**STILL, "rotate_deg": 90}
    moved = augment_batch(x, ids, augment=augment, seed=2)[0, ..., 0]
    assert moved[20, 20] > 0.9      # the centre stays
    angle = 90 * (2 * uniforms(ids, 2, 0, 7)[0, 2] - 1)
    rows, columns = np.mgrid[:41, :41] - 20
    far = moved * (np.hypot(rows, columns) > 7)
    got = np.degrees(np.arctan2((far * rows).sum(), (far * columns).sum()))
    assert min(abs(got - angle), abs(got + angle)) < 2


def test_zero_is_the_identity_and_flip_the_mirror():
    x = np.random.default_rng(0).random((16, 9, 9, 2)).astype(np.float32)
    assert np.allclose(augment_batch(x, ids_of(16), augment=STILL), x, atol=1e-5)
    flipped = augment_batch(x, ids_of(16), augment={**STILL, "flip": True})
    mirrored = [np.allclose(f, a[:, ::-1], atol=1e-5) for f, a in zip(flipped, x)]
    assert 2 < sum(mirrored) < 14 and all(m or np.allclose(f, a, atol=1e-5) for m, f, a in zip(mirrored, flipped, x))
    assert not Augment().flip


def test_brightness_and_contrast_stay_small():
    x = np.random.default_rng(0).random((30, 9, 9, 1)).astype(np.float32)
    only = augment_batch(x, ids_of(30), augment={**STILL, "brightness": 0.1})
    change = (only - x).reshape(30, -1)
    assert np.abs(change).max() <= 0.1 + 1e-5 and np.abs(np.median(change, axis=1)).max() > 0.05
    assert (augment_batch(np.full((2, 5, 5, 1), 0.4, np.float32), ids_of(2)) == np.float32(0.4)).all()      # a flat image stays flat


@pytest.mark.parametrize("channels, augment, multilabel", [((), None, False), ((), True, False), ((3,), {"flip": True}, True)])
def test_the_twins_are_bit_equal(channels, augment, multilabel):
    d = made(23, channels=channels)
    if multilabel:
        d = ImageDataset("m", d.images, np.eye(3, dtype=int)[np.arange(23) % 3], d.splits, "multilabel", ("a", "b", "c"))
    pre = Preprocessor([("scale", {})])
    settings_ = dict(batch_size=5, seed=9, epoch=2, augment=augment)
    flow = to_tf(d, pre, **settings_)
    for _ in range(2):      # a tf.data set may be read again
        ours, theirs = list(batches(d, pre, **settings_)), list(flow.as_numpy_iterator())
        assert len(ours) == len(theirs) == int(flow.cardinality()) == 5
        for (x, y), (u, v) in zip(ours, theirs):
            assert x.tobytes() == u.tobytes() and y.tobytes() == v.tobytes() and x.dtype == u.dtype and y.dtype == v.dtype and x.shape == u.shape


def test_tensors_once_or_every_time():
    d = made()
    a, b = list(batches(d, PRE, seed=1, augment=True)), list(batches(to_tensors(d, PRE), seed=1, augment=True))
    assert all(x.tobytes() == u.tobytes() for (x, _), (u, _) in zip(a, b))
    assert to_tensors(d, PRE).y.dtype == np.int32


@pytest.mark.parametrize("wrong, error", [
    ({"batch_size": 0}, "batch size"), ({"batch_size": 2.5}, "batch size"), ({"epoch": -1}, "epoch"), ({"augment": {"zom": 1}}, "zoom"),
    ({"augment": {"zoom": 2}}, "zoom"), ({"augment": {"rotate_deg": "5"}}, "rotate_deg"), ({"augment": {"flip": 1}}, "flip"), ({"augment": "yes"}, "augment"),
    ({"augment": {"shift": float("nan")}}, "shift")])
def test_bad_settings_fail_before_the_first_batch(wrong, error):
    t = to_tensors(made(3), PRE)
    for make in (batches, to_tf):
        with pytest.raises(ConfigError, match=error):
            make(t, **wrong)


def test_bad_batches():
    with pytest.raises(ConfigError, match="preprocessor"):
        batches(made())
    for x, ids in ((np.zeros((2, 4, 4)), ids_of(2)), (np.zeros((2, 4, 4, 1)), ids_of(3))):
        with pytest.raises(DatasetError, match="ids"):
            augment_batch(x, ids)
    assert list(batches(Tensors(np.zeros((0, 4, 4, 1), "f4"), np.zeros(0, "i4"), np.array([], "<U16")))) == []


def test_settings_round_trip():
    assert as_augment(Augment(zoom=0.2).to_dict()) == Augment(zoom=0.2) and as_augment(None) is as_augment(False) is None and as_augment(True) == Augment()
