"""Sources and the flow: equal for every number of workers, in tf.data and after a kill; shares, patches and affines against plain indexing."""
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medimg.data.augment import Affine, Compose, Flip, generator
from medimg.data.datasets import ImageDataset
from medimg.data.flow import STAGES, Flow, Timing, _stored, balanced_order, cache_key, profile_pipeline
from medimg.data.pipeline import batches
from medimg.data.preprocess import Preprocessor
from medimg.data.sources import ArraySource, FileSource, PatchSource, SliceSource, Source
from medimg.data.volume import Volume, make_affine
from medimg.errors import ConfigError, DatasetError, GeometryError
from medimg.plots import png_bytes

PRE = Preprocessor([("resize", {"height": 8, "width": 10}), ("scale", {})])


def images(n=23, size=12, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, size, size), dtype=np.uint8)


def made(n=23, **parts):
    return ImageDataset("toy", images(n), np.random.default_rng(1).integers(0, 2, n), ["train"] * n, classes=("a", "b"), **parts)


def equal(one, two):
    one, two = list(one), list(two)
    flat = lambda batch: [batch[0], *(batch[1] if isinstance(batch[1], tuple) else (batch[1],))]
    return len(one) == len(two) and all(a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
                                        for x, y in zip(one, two) for a, b in zip(flat(x), flat(y)))


# ---- the flow ------------------------------------------------------------------------------------------------------------------
@settings(max_examples=12, deadline=None)
@given(st.integers(1, 30), st.integers(1, 9), st.integers(0, 5), st.booleans())
def test_equals_the_simple_pipeline(n, size, workers, augment):
    d = made(n)
    flow = Flow(ArraySource(d), PRE, augment or None, batch_size=size, seed=7, workers=workers)
    assert equal(flow.batches(3), batches(d, PRE, batch_size=size, seed=7, epoch=3, augment=augment or None)) and len(flow) == -(-n // size)


@pytest.mark.parametrize("settings_", [{}, {"balance": True}, {"balance": {0: 0.25, 1: 0.75}}, {"cache": "memory"}, {"shuffle": False}])
def test_workers_runs_and_tf_agree(settings_):
    d = made(40, masks=(images(40, seed=5) > 128))
    chain = Compose([Flip(x=0.5, laterality="free"), Affine(rotate_deg=8)])
    make = lambda workers: Flow(ArraySource(d), None, chain, batch_size=7, seed=3, workers=workers, target=("label", "mask"), **settings_)
    reference = list(make(0).batches(2))
    for workers in (1, 3):
        flow = make(workers)
        assert equal(flow.batches(2), reference) and equal(flow.batches(2), reference)
    assert not equal(make(0).batches(1), reference) or settings_.get("shuffle") is False
    tf_flow = make(2).tf(2)
    assert equal(tf_flow.as_numpy_iterator(), reference) and int(tf_flow.cardinality()) == len(reference)


def test_free_order_gives_the_same_batches():
    d = made(60)

    class Slow(ArraySource):
        def fetch(self, i):
            time.sleep(0.02 if i % 13 == 0 else 0)
            return i
    key = lambda batch: batch[0].tobytes() + batch[1].tobytes()
    fixed = sorted(map(key, Flow(Slow(d), PRE, True, batch_size=4).batches()))
    assert sorted(map(key, Flow(Slow(d), PRE, True, batch_size=4, workers=4, deterministic=False).batches())) == fixed


def test_few_batches_are_under_way():
    started = []

    class Counting(ArraySource):
        def fetch(self, i):
            started.append(i)
            return i
    flow = iter(Flow(Counting(made(200)), PRE, batch_size=1, workers=3).batches())
    for k in range(5):
        next(flow)
    time.sleep(0.1)
    assert len(started) <= 5 + 3 + 2
    flow.close()


def test_mask_follows_the_image():
    smooth = np.stack([np.add.outer(np.arange(24) * k, np.arange(24) * 5) % 256 for k in range(1, 13)]).astype(np.uint8)
    blocks = np.repeat(np.repeat(smooth[:, ::6, ::6], 6, axis=1), 6, axis=2)
    d = ImageDataset("toy", blocks, [0] * 12, ["train"] * 12, classes=("a", "b"), masks=(blocks > 128).astype(np.uint8))
    chain = Compose([Flip(x=0.5, laterality="free"), Flip(y=0.5)])
    changed = 0
    for x, y in Flow(ArraySource(d), None, chain, batch_size=5, target="mask").batches():
        assert ((x[..., 0] > 128) == (y > 0)).all() and y.dtype == np.int32
        changed += sum(not any((image[..., 0] == one).all() for one in d.images) for image in x)
    assert changed > 2
    with pytest.raises(ConfigError, match="leave its mask"):
        list(Flow(ArraySource(d), PRE, target="mask").batches())
    with pytest.raises(ConfigError, match="Compose"):
        list(Flow(ArraySource(d), None, True, target="mask").batches())


def test_boxes_are_padded():
    boxes = np.full((4, 2, 4), np.nan)
    boxes[0, 0], boxes[1] = [1, 2, 3, 4], [[0, 0, 2, 2], [5, 5, 6, 7]]
    source = ArraySource(images(4), [0] * 4, boxes=boxes, ids=list("abcd"))
    (x, y), = Flow(source, batch_size=4, shuffle=False, target="boxes").batches()
    assert np.array_equal(y, boxes.astype(np.float32), equal_nan=True)


def test_functions_prepare_samples():
    d = ImageDataset("toy", images(6), [0] * 6, ["train"] * 6, classes=("a", "b"), masks=images(6) > 100)

    def half(sample):
        return {**sample, "image": sample["image"][::2, ::2] / 255, "mask": sample["mask"][::2, ::2]}
    x, y = next(iter(Flow(ArraySource(d), half, batch_size=6, shuffle=False, target="mask").batches()))
    assert x.shape == (6, 6, 6, 1) and (y == d.masks[:, ::2, ::2]).all() and np.allclose(x[..., 0], d.images[:, ::2, ::2] / 255)


@pytest.mark.parametrize("wrong, words", [({"batch_size": 0}, "batch_size"), ({"workers": -1}, "workers"), ({"target": "sex"}, "target"), ({"augment": {"zom": 1}}, "zom"),
                                          ({"balance": {0: 0.5, 1: 0.6}}, "balance"), ({"balance": {0: 0.5, 7: 0.5}}, "balance")])
def test_refusals_before_reading(wrong, words):
    with pytest.raises(ConfigError, match=words):
        Flow(ArraySource(made()), PRE, **wrong)


def test_what_is_missing_is_said():
    with pytest.raises(ConfigError, match="no mask"):
        list(Flow(ArraySource(made()), PRE, target="mask").batches())
    with pytest.raises(ConfigError, match="balance needs"):
        Flow(ArraySource(images(3), ids=list("abc")), balance=True)
    with pytest.raises(DatasetError, match="no samples|0 samples"):
        Source([])


# ---- balance -------------------------------------------------------------------------------------------------------------------
@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 3), min_size=4, max_size=120), st.integers(0, 9), st.integers(0, 99))
def test_shares_are_exact(labels, epoch, seed):
    labels = np.array(labels)
    ids = np.array([f"{k * 2654435761:016x}" for k in range(len(labels))])
    rows, repeats = balanced_order(ids, labels, seed=seed, epoch=epoch)
    classes = np.unique(labels)
    counts = np.array([(labels[rows] == c).sum() for c in classes])
    assert len(rows) == len(labels) and np.abs(counts - len(labels) / len(classes)).max() <= 1
    for row in set(rows.tolist()):      # repeats count 0, 1, 2 … and rows of a class come equally often
        assert sorted(repeats[rows == row]) == list(range((rows == row).sum()))
    for c in classes:
        times = [(rows == r).sum() for r in np.flatnonzero(labels == c)]
        assert max(times) - min(times) <= 1
    other = np.random.default_rng(0).permutation(len(ids))
    again, _ = balanced_order(ids[other], labels[other], seed=seed, epoch=epoch)
    assert (ids[other][again] == ids[rows]).all()


def test_frequent_images_take_turns_and_repeats_differ():
    labels, ids = np.repeat([0, 1], [90, 10]), np.array([f"{k:04x}" for k in range(100)])
    seen = [set(balanced_order(ids, labels, epoch=e)[0][labels[balanced_order(ids, labels, epoch=e)[0]] == 0].tolist()) for e in (0, 1)]
    assert len(seen[0]) == 50 and len(seen[0] | seen[1]) == 90
    flow = Flow(ArraySource(images(100), labels, ids=ids), PRE, True, balance=True)
    assert flow.sample(95, repeat=0)["image"].tobytes() != flow.sample(95, repeat=1)["image"].tobytes()


# ---- cache ---------------------------------------------------------------------------------------------------------------------
class Counted(ArraySource):
    decoded = 0

    def decode(self, raw, i, rng):
        type(self).decoded += 1
        return super().decode(raw, i, rng)


@pytest.mark.parametrize("kind", ["memory", "folder"])
def test_cache_gives_the_same_and_reads_once(tmp_path, kind):
    d = ImageDataset("toy", images(), [0] * 23, ["train"] * 23, classes=("a", "b"), masks=images() > 9)
    pre = Preprocessor([("scale", {})])
    plain = [list(Flow(ArraySource(d), pre, batch_size=4, target=("label", "mask")).batches(e)) for e in (0, 1)]
    Counted.decoded = 0
    flow = Flow(Counted(d), pre, batch_size=4, cache=kind if kind == "memory" else tmp_path, target=("label", "mask"))
    assert equal(flow.batches(0), plain[0]) and equal(flow.batches(1), plain[1]) and Counted.decoded == 23
    if kind == "folder":
        again = Flow(Counted(d), pre, batch_size=4, cache=tmp_path, target=("label", "mask"))
        assert equal(again.batches(1), plain[1]) and Counted.decoded == 23


def test_cache_key_changes_with_what_it_was_made_from(tmp_path):
    d, other = made(), Preprocessor([("resize", {"height": 8, "width": 11}), ("scale", {})])
    keys = {cache_key(ArraySource(d), PRE), cache_key(ArraySource(d), other), cache_key(ArraySource(made(22)), PRE), cache_key(ArraySource(d), None)}
    assert len(keys) == 4 and cache_key(ArraySource(made()), Preprocessor.from_json(PRE.to_json())) in keys
    path = tmp_path / "a.png"
    path.write_bytes(png_bytes(images(1)[0]))
    before = cache_key(FileSource([path]), PRE)
    path.write_bytes(png_bytes(images(2)[1]))
    os.utime(path, ns=(1, 1))
    assert cache_key(FileSource([path]), PRE) != before
    for wrong in ((PatchSource([Volume(np.zeros((4, 4, 4)))], (2, 2, 2)), None), (ArraySource(d), lambda s: s)):
        with pytest.raises(ConfigError):
            Flow(*wrong, cache="memory")


KILLED = """
import sys, time, numpy as np
from medimg.data.flow import Flow
from medimg.data.sources import ArraySource
class Slow(ArraySource):
    def decode(self, raw, i, rng):
        if i == 12:
            print("half", flush=True); time.sleep(60)
        return super().decode(raw, i, rng)
x = np.arange(24 * 64, dtype="uint8").reshape(24, 8, 8)
list(Flow(Slow(x, np.zeros(24, int), ids=[f"{i:x}" for i in range(24)]), workers=0, cache=sys.argv[1]).batches())
"""


def test_cache_survives_a_kill(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "half\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    left = list(tmp_path.iterdir())
    assert len(left) == 1 and left[0].name.startswith(".")      # something hidden, nothing with a name
    x = np.arange(24 * 64, dtype="uint8").reshape(24, 8, 8)
    source = ArraySource(x, np.zeros(24, int), ids=[f"{i:x}" for i in range(24)])
    got = np.concatenate([b for b, _ in Flow(source, shuffle=False, cache=tmp_path).batches()])
    assert (got[..., 0] == x).all() and [p.name for p in tmp_path.iterdir()] == [cache_key(source, None)]
    assert _stored(tmp_path / cache_key(source, None))["image"].shape == (24, 8, 8, 1)


def test_samples_of_different_shape_are_refused(tmp_path):
    paths = []
    for k, size in enumerate((8, 9)):
        paths.append(tmp_path / f"{k}.png")
        paths[-1].write_bytes(png_bytes(images(1, size)[0]))
    for cache in (None, "memory", tmp_path / "kept"):
        with pytest.raises(ConfigError, match="shape"):
            list(Flow(FileSource(paths, [0, 1]), cache=cache).batches())
    assert not list((tmp_path / "kept").iterdir())


# ---- sources -------------------------------------------------------------------------------------------------------------------
def test_files_and_arrays_agree(tmp_path):
    x, paths = images(9), []
    for k, image in enumerate(x):
        paths.append(tmp_path / "abc"[k % 3] / f"{k}.png")
        paths[-1].parent.mkdir(exist_ok=True)
        paths[-1].write_bytes(png_bytes(image))
    files = FileSource(paths, np.arange(9) % 2)
    arrays = ArraySource(x, np.arange(9) % 2, ids=files.ids)
    assert equal(Flow(files, PRE, True, batch_size=4).batches(1), Flow(arrays, PRE, True, batch_size=4).batches(1))
    paths[0].write_bytes(paths[0].read_bytes()[:60])
    with pytest.raises(DatasetError, match="0.png"):
        list(Flow(FileSource(paths, np.zeros(9, int))).batches())
    with pytest.raises(DatasetError, match="1 of 2 files are missing"):
        FileSource([paths[0], tmp_path / "gone.png"])


def test_ids_of_files_do_not_depend_on_the_disk(tmp_path):
    for folder in ("one", "two"):
        (tmp_path / folder / "a").mkdir(parents=True)
        for k in range(3):
            (tmp_path / folder / "a" / f"{k}.png").write_bytes(png_bytes(images(3)[k]))
    one, two = (FileSource(sorted((tmp_path / f / "a").iterdir()), root=tmp_path / f) for f in ("one", "two"))
    assert (one.ids == two.ids).all() and len(set(one.ids)) == 3


def volumes(n=3, shape=(9, 14, 11), seed=0):
    rng = np.random.default_rng(seed)
    return [Volume(rng.normal(size=shape).astype(np.float32), make_affine((2.5, 0.7, 0.8), (10 * k, -5, 3))) for k in range(n)]


def test_slices_are_those_of_the_volumes():
    vs = volumes()
    masks = [(v.array > 2.2).astype(np.uint8) for v in vs]
    source = SliceSource(vs, masks=masks)
    assert len(source) == 27
    for i in range(27):
        v, k = divmod(i, 9)
        s = source.decode(source.fetch(i), i, None)
        assert (s["image"] == vs[v].array[k]).all() and (s["mask"] == masks[v][k]).all() and s["label"] == masks[v][k].any() and s["spacing_mm"] == (0.7, 0.8)
        assert np.allclose(s["affine"] @ [0, 3, 4, 1], vs[v].affine @ [k, 3, 4, 1])
    assert (SliceSource(vs, [4, 5, 6]).labels == np.repeat([4, 5, 6], 9)).all()


@settings(max_examples=40, deadline=None)
@given(st.tuples(st.integers(1, 9), st.integers(1, 14), st.integers(1, 11)), st.integers(0, 5), st.floats(0, 1))
def test_patches_lie_inside_and_keep_their_place(shape, epoch, share):
    vs = volumes()
    masks = [v.array > 2 for v in vs]
    source = PatchSource(vs, shape, masks=masks, per_volume=4, foreground=share)
    for i in range(len(source)):
        s = source.decode(source.fetch(i), i, generator(5, epoch, source.ids[i]))
        again = source.decode(source.fetch(i), i, generator(5, epoch, source.ids[i]))
        z, y, x = s["corner"]
        v = vs[source.owner[i]]
        box = (slice(z, z + shape[0]), slice(y, y + shape[1]), slice(x, x + shape[2]))
        assert s["image"].shape == shape and (s["image"] == v.array[box]).all() and (s["mask"] == masks[source.owner[i]][box]).all()
        assert np.allclose(s["affine"] @ [0, 0, 0, 1], v.affine @ [z, y, x, 1]) and again["corner"] == s["corner"] and s["label"] == s["mask"].any()


def test_share_of_foreground_and_where_it_lies():
    mask = np.zeros((40, 40, 40), bool)
    mask[18:21, 18:21, 18:21] = True
    volume = Volume(np.zeros((40, 40, 40), np.float32))
    held, places = {}, []
    for share in (0.0, 0.6, 1.0):
        source = PatchSource([volume], (8, 8, 8), masks=[mask], per_volume=400, foreground=share)
        samples = [source.decode(source.fetch(i), i, generator(0, 0, source.ids[i])) for i in range(400)]
        held[share] = np.mean([s["label"] for s in samples])
        if share == 1:
            places = [np.argwhere(s["mask"]).mean(axis=0) for s in samples]
    assert held[1.0] == 1 and abs(held[0.6] - (0.6 + 0.4 * held[0.0])) < 0.07 and held[0.0] < 0.1
    assert np.std(places, axis=0).min() > 1.2      # anywhere in the patch, not at its centre


def test_each_volume_is_opened_once_an_epoch(tmp_path):
    paths = [v.to_nifti(tmp_path / f"{k}.nii.gz") for k, v in enumerate(volumes(9))]
    source, opened = PatchSource(paths, (4, 4, 4), per_volume=6), []
    read = source.shelf._read
    source.shelf._read = lambda k: opened.append(k) or read(k)
    flow = Flow(source, lambda s: s, batch_size=5, workers=0, target=())
    shapes = [x.shape for x, _ in flow.batches(3)]
    assert sorted(opened) == list(range(9)) and shapes[0] == (5, 4, 4, 4, 1)
    rows = flow.order(3)[0]
    assert sorted(rows) == list(range(54)) and (np.diff(source.owner[rows][:24]) != 0).sum() > 6      # four volumes mixed


def test_volumes_through_preprocessor_and_tf():
    source = PatchSource(volumes(4), (4, 6, 6), masks=[v.array > 1 for v in volumes(4)], per_volume=3)
    flow = Flow(source, None, batch_size=5, target=("label", "mask"))
    in_numpy = list(flow.batches(1))
    assert in_numpy[0][0].shape == (5, 4, 6, 6, 1) and in_numpy[0][1][1].shape == (5, 4, 6, 6)
    assert equal(flow.tf(1).as_numpy_iterator(), in_numpy)
    sliced = Flow(source, Preprocessor([("scale", {"low": -4.0, "high": 4.0})]), batch_size=5)
    x, _ = next(iter(sliced.batches(1)))
    assert np.allclose(x, np.clip((in_numpy[0][0] + 4) / 8, 0, 1), atol=1e-5) or np.allclose(x, (in_numpy[0][0] + 4) / 8, atol=1e-5)


def test_what_cannot_be_cut_is_refused():
    v = volumes(1)[0]
    with pytest.raises(DatasetError, match="smaller than the patch"):
        PatchSource([v], (10, 4, 4)).decode(PatchSource([v], (10, 4, 4)).fetch(0), 0, np.random.default_rng(0))
    with pytest.raises(DatasetError, match="a mask"):
        PatchSource([v], (4, 4, 4), masks=[np.zeros((3, 3, 3))]).fetch(0)
    for wrong in ({"foreground": 1.5}, {"per_volume": 0}):
        with pytest.raises(ConfigError):
            PatchSource([v], (4, 4, 4), **wrong)
    with pytest.raises(ConfigError, match="no volume"):
        SliceSource([np.zeros((3, 3, 3))])
    uneven = Volume(v.array, v.affine, slice_positions_mm=np.cumsum([2.0 + k % 3 for k in range(9)]))
    with pytest.raises(GeometryError):
        PatchSource([uneven], (4, 4, 4)).decode(PatchSource([uneven], (4, 4, 4)).fetch(0), 0, np.random.default_rng(0))


# ---- profile -------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("slow", ["read", "decode", "preprocess", "augment", "step"])
def test_the_slow_stage_is_named(slow):
    def nap(stage):
        if stage == slow:
            time.sleep(0.02)

    class Napping(ArraySource):
        def fetch(self, i):
            nap("read")
            return i

        def decode(self, raw, i, rng):
            nap("decode")
            return super().decode(raw, i, rng)
    flow = Flow(Napping(made(6)), lambda s: nap("preprocess") or s, lambda s, rng: nap("augment") or s, batch_size=3, workers=2)
    timing = profile_pipeline(flow, lambda x, y: [nap("step") for _ in range(4)], batches=2)
    assert max(timing.ms, key=timing.ms.get) == slow and tuple(timing.ms) == STAGES and timing.ms[slow] >= 55
    assert ("The training step is the bottleneck" in timing.bottleneck) == (slow == "step")
    assert slow == "step" or f"{slow} is" in timing.bottleneck
    assert timing.bottleneck in repr(timing)


def test_workers_share_the_input():
    ms = {"read": 1.0, "decode": 40.0, "preprocess": 10.0, "augment": 28.0, "batch": 1.0, "step": 45.0}
    assert "input is the bottleneck" in Timing(ms, 8, 1).bottleneck and "step is the bottleneck" in Timing(ms, 8, 2).bottleneck
    assert "56%" in Timing(ms, 8, 1).bottleneck and "samples a second" in Timing({k: v for k, v in ms.items() if k != "step"}, 8, 2).bottleneck
