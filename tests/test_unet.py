"""U-Net, sliding windows, pieces and contours against NumPy by hand, SciPy, SimpleITK, ONNX Runtime and properties that must hold."""
import itertools
import tracemalloc

import numpy as np
import pytest
import SimpleITK as sitk
from conftest import leave_out
from scipy import ndimage
from scipy.spatial.distance import cdist

from medimg.config import find_data
from medimg.data.volume import Volume, make_affine
from medimg.errors import ConfigError, DatasetError, GeometryError, MedimgError
from medimg.evaluation.segmentation import dice, evaluate_masks, hausdorff95, surface_distances
from medimg.experiments import segmentation as seg
from medimg.experiments.protocol import EXPERIMENTS, Run
from medimg.models.networks import build_model
from medimg.models.unet import supervised, unet
from medimg.models.windows import fill_holes, largest_components, same_grid, segment, sliding_window, window_starts, window_weights

rng = np.random.default_rng(0)


# ---- the network ---------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("shape, classes, units", [((64, 64, 1), 2, 1), ((48, 32, 3), 4, 4), ((8, 16, 24, 2), 3, 3)])
def test_output_has_one_vector_a_voxel(shape, classes, units):
    net = build_model("unet", shape, classes, width=4, levels=3)
    assert net.output.shape == (None, *shape[:-1], units)
    assert net.input.name == "images" and net.layers[-1].name == "logits" and net.layers[-2].name == "features"
    assert np.isfinite(net(rng.normal(size=(2, *shape)).astype("float32"), training=False)).all()


def by_hand(x, net):
    """The default network in two dimensions in plain NumPy and SciPy, from its weights."""
    get = {w.path: w.numpy() for w in net.weights}

    def conv(x, name, bias=False):
        k = get[f"{name}/kernel"]
        out = np.stack([sum(ndimage.correlate(x[..., c], k[:, :, c, f], mode="constant") for c in range(x.shape[-1])) for f in range(k.shape[-1])], -1)
        return out + (get[f"{name}/bias"] if bias else 0)

    def normed(x, name):
        g, b, m, v = (get[f"{name}/{part}"] for part in ("gamma", "beta", "moving_mean", "moving_variance"))
        return g * (x - m) / np.sqrt(v + 1e-3) + b

    def unit(x, name):
        f = np.maximum(normed(conv(x, f"{name}a_conv"), f"{name}a_norm"), 0)
        f = normed(conv(f, f"{name}b_conv"), f"{name}b_norm")
        return np.maximum(f + (conv(x, f"{name}_mix") if f"{name}_mix/kernel" in get else x), 0)

    x = np.maximum(normed(conv(x, "stem_conv"), "stem_norm"), 0)
    top = unit(x, "down0")
    deep = unit(top.reshape(top.shape[0] // 2, 2, top.shape[1] // 2, 2, -1).max((1, 3)), "down1")
    below = np.repeat(np.repeat(conv(deep, "up0_halve", bias=True), 2, 0), 2, 1)
    return conv(unit(np.concatenate([top, below], -1), "up0"), "logits", bias=True)


def test_equals_a_forward_pass_by_hand():
    net = build_model("unet", (12, 16, 1), 2, seed=3, width=4, levels=2)
    net.set_weights([w if w.ndim > 1 else rng.uniform(0.5, 1.5, w.shape) for w in net.get_weights()])
    x = rng.normal(size=(12, 16, 1)).astype("float32")
    assert np.allclose(net(x[None], training=False)[0], by_hand(x, net), atol=1e-4)


def test_options_change_what_they_say():
    plain = unet((32, 32, 1), 2, width=4, levels=3)
    assert unet((32, 32, 1), 2, width=4, levels=3, skip=False).count_params() < plain.count_params()
    assert unet((32, 32, 1), 2, width=4, levels=3, attention=True).count_params() > plain.count_params()
    assert unet((32, 32, 1), 2, width=4, levels=3, residual=False).count_params() < plain.count_params()
    coarse = unet((32, 32, 1), 2, width=4, levels=3, stem=2)
    assert coarse.get_layer("features").output.shape == (None, 16, 16, 4) and coarse.output.shape == (None, 32, 32, 1)
    assert unet((16, 16, 1), 2, width=4, levels=2, norm="none").count_params() < unet((16, 16, 1), 2, width=4, levels=2).count_params()


@pytest.mark.parametrize("options, shape", [({"levels": 3}, (64, 64, 1)), ({"levels": 3, "stem": 2}, (64, 32, 1)), ({"levels": 2}, (16, 24, 24, 1)),
                                            ({"levels": 2, "stem": 2, "norm": "instance"}, (16, 16, 16, 1))])
def test_onnx_answers_the_same(options, shape, tmp_path):
    from medimg.deployment.engine import Engine, export_onnx, parity
    net = build_model("unet", shape, 2, seed=0, width=8, **options)
    engine = Engine(export_onnx(net, tmp_path / "unet.onnx"), threads=1)
    assert parity(lambda b: net(b, training=False), engine, rng.normal(size=(8, *shape)).astype("float32")) <= 1e-4


def test_supervised_shares_its_weights():
    net = build_model("unet", (32, 32, 1), 2, seed=0, width=4, levels=4)
    deep, x = supervised(net, 2), rng.normal(size=(1, 32, 32, 1)).astype("float32")
    before = net(x, training=False).numpy()
    deep.get_layer("up2b_conv").kernel.assign(0.5 * deep.get_layer("up2b_conv").kernel)
    after = net(x, training=False).numpy()
    assert not np.allclose(before, after) and np.array_equal(after, deep(x, training=False)["logits"])
    assert {k: v.shape[1] for k, v in deep.output.items()} == {"logits": 32, "logits1": 16, "logits2": 8}


@pytest.mark.parametrize("shape, options, said", [((100, 96, 1), {}, "multiple of 8"), ((64, 96, 1), {"levels": 5, "stem": 4}, "multiple of 64"), ((64, 64), {}, "channels"),
                                                  ((4, 4, 1), {}, "at least 8 x 8"), ((64, 64, 0), {}, "whole numbers"), ((64, 64, 1), {"levels": 0}, "1 to 8"),
                                                  ((64, 64, 1), {"norm": "bach"}, "batch"), ((64, 64, 1), {"task": "ordinal"}, "ordinal")])
def test_what_cannot_be_built_is_refused(shape, options, said):
    with pytest.raises(ConfigError, match=said):
        build_model("unet", shape, 2, **options)
    with pytest.raises(ConfigError, match="coarser"):
        supervised(unet((16, 16, 1), 2, width=4, levels=2))


# ---- the loss ------------------------------------------------------------------------------------------------------------------
def test_loss_is_the_printed_formula():
    z, y = rng.normal(size=(3, 6, 5, 1)), (rng.random((3, 6, 5, 1)) > 0.6).astype("float32")
    p = 1 / (1 + np.exp(-z))
    entropy = -(y * np.log(p) + (1 - y) * np.log(1 - p)).mean()
    share = np.mean([(2 * (a * b).sum() + 1) / (a.sum() + b.sum() + 1) for a, b in zip(p, y)])
    assert np.isclose(seg.dice_and_entropy(y, z.astype("float32")), entropy + 1 - share, atol=1e-5)


def test_loss_of_classes_and_levels():
    z, y = rng.normal(size=(2, 4, 4, 4, 3)).astype("float32"), rng.integers(0, 3, (2, 4, 4, 4, 1)).astype("float32")
    p = np.exp(z) / np.exp(z).sum(-1, keepdims=True)
    t = np.eye(3)[y[..., 0].astype(int)]
    ax = (1, 2, 3)
    wanted = -(t * np.log(p)).sum(-1).mean() + 1 - ((2 * (p * t).sum(ax) + 1) / (p.sum(ax) + t.sum(ax) + 1))[:, 1:].mean()
    assert np.isclose(seg.dice_and_entropy(y, z), wanted, atol=1e-5)
    half, small = rng.normal(size=(2, 2, 2, 2, 3)).astype("float32"), t.reshape(2, 2, 2, 2, 2, 2, 2, 3).mean((2, 4, 6))
    q = np.exp(half) / np.exp(half).sum(-1, keepdims=True)
    below = -(small * np.log(q)).sum(-1).mean() + 1 - ((2 * (q * small).sum(ax) + 1) / (q.sum(ax) + small.sum(ax) + 1))[:, 1:].mean()
    assert np.isclose(seg.dice_and_entropy(y, {"logits": z, "logits1": half}), (wanted + below / 2) / 1.5, atol=1e-5)


# ---- windows -------------------------------------------------------------------------------------------------------------------
def smoothing(batch):
    return np.stack([ndimage.gaussian_filter(x, (*(2,) * (x.ndim - 1), 0), mode="constant") for x in batch])


@pytest.mark.parametrize("shape, window, overlap", [((50, 37), (16, 20), 0.25), ((20, 33, 17), (8, 16, 16), 0.5), ((9, 40), (16, 16), 0.6)])
def test_equals_a_sum_over_windows_in_double_precision(shape, window, overlap):
    image = rng.normal(size=shape).astype("float32")
    lack = [max(0, w - s) for w, s in zip(window, shape)]
    padded = np.pad(image, [(n // 2, n - n // 2) for n in lack], mode="edge")
    top, below = np.zeros(padded.shape), np.zeros(padded.shape)
    bell = [np.maximum(np.exp(-0.5 * ((np.arange(w) - (w - 1) / 2) / (w / 8)) ** 2), 1e-3) for w in window]
    weight = bell[0]
    for b in bell[1:]:
        weight = np.multiply.outer(weight, b)
    for start in itertools.product(*(window_starts(s, w, overlap) for s, w in zip(padded.shape, window))):
        box = tuple(slice(a, a + w) for a, w in zip(start, window))
        top[box] += weight * smoothing(padded[box][None, ..., None])[0, ..., 0]
        below[box] += weight
    wanted = (top / below)[tuple(slice(n // 2, n // 2 + s) for n, s in zip(lack, shape))]
    for batch_size, workers in ((1, 1), (3, 2), (100, 1)):
        got = sliding_window(image, smoothing, window, overlap=overlap, batch_size=batch_size, workers=workers)
        assert got.dtype == np.float32 and np.allclose(got[..., 0], wanted, atol=1e-5)


@pytest.mark.parametrize("size, window, overlap", [(100, 32, 0.5), (256, 96, 0.25), (33, 32, 0.9), (16, 16, 0.0), (7, 1, 0.0)])
def test_every_position_has_weight_one(size, window, overlap):
    starts, total = window_starts(size, window, overlap), np.zeros(size)
    for blend in ("gaussian", "constant"):
        total[:] = 0
        for s, w in zip(starts, window_weights(size, window, overlap, blend=blend), strict=True):
            assert (w > 0).all()
            total[s:s + window] += w
        assert np.allclose(total, 1, atol=1e-12)
    assert starts[0] == 0 and starts[-1] == size - window and (np.diff(starts) > 0).all()


def test_a_keras_model_an_engine_and_a_function_are_one(tmp_path):
    from medimg.deployment.engine import Engine, export_onnx
    net = build_model("unet", (16, 16, 16, 1), 2, seed=1, width=4, levels=2)
    engine = Engine(export_onnx(net, tmp_path / "u.onnx"), threads=1)
    image = rng.normal(size=(20, 24, 18)).astype("float32")
    answers = [sliding_window(image, p, (16, 16, 16), workers=w) for p, w in ((net, 1), (engine, 2), (lambda b: np.asarray(net(b, training=False)), 1))]
    assert answers[0].shape == (20, 24, 18, 1) and all(np.allclose(a, answers[0], atol=1e-4) for a in answers)


def test_geometry_stays_and_memory_is_bounded():
    volume = Volume(rng.normal(size=(20, 24, 28)), make_affine((3.0, 0.7, 0.7), (5, -3, 9)), modality="CT", units="HU")
    got = segment(volume, lambda b: b, (16, 16, 16))
    assert np.array_equal(got.affine, volume.affine) and np.array_equal(got.array, volume.array > 0) and got.array.dtype == np.uint8
    more = []
    for depth in (32, 256):
        scan = np.zeros((depth, 64, 64), np.float32)
        tracemalloc.start()
        out = sliding_window(scan, lambda b: b, (16, 32, 32), overlap=0.5)
        more.append(tracemalloc.get_traced_memory()[1] - out.nbytes)
        tracemalloc.stop()
    assert more[1] < 1.5 * more[0] < 2e6


def test_wrong_input_to_windows_is_refused():
    same, image = (lambda b: b), np.zeros((20, 20))
    for bad, said in ((lambda: sliding_window(np.full((20, 20), np.inf), same, (8, 8)), "NaN or infinity|infinite"), (lambda: sliding_window(image, same, (8, 8, 8)), "windows"),
                      (lambda: sliding_window(image, same, (0, 8)), "1 or more"), (lambda: sliding_window(image, lambda b: b * np.nan, (8, 8)), "network answers NaN"),
                      (lambda: sliding_window(image, lambda b: b[:, 1:], (8, 8)), "one logit vector"), (lambda: sliding_window(image, 7, (8, 8)), "answers no batch"),
                      (lambda: sliding_window(image, same, (8, 8), overlap=-0.1), "overlap"), (lambda: sliding_window(image, same, (8, 8), blend="cubic"), "blend"),
                      (lambda: sliding_window(np.zeros((0, 20)), same, (8, 8)), "shape"), (lambda: largest_components(np.full((4, 4), 0.3)), "threshold"),
                      (lambda: largest_components(np.eye(4), keep=0), "1 or more")):
        with pytest.raises(MedimgError, match=said):
            bad()


def test_a_mask_of_another_grid_is_refused():
    grid = Volume(np.zeros((4, 5, 6)), make_affine((2, 1, 1)))
    same_grid(grid.with_array(np.ones((4, 5, 6))), grid)
    for other in (Volume(np.zeros((4, 5, 6)), make_affine((2, 1, 1), (0, 0, 1))), Volume(np.zeros((4, 5, 6)), make_affine((2, 1, 1.1))), np.zeros((4, 6, 5))):
        with pytest.raises(GeometryError, match="resample_to"):
            same_grid(other, grid)


@pytest.mark.parametrize("shape", [(60, 70), (20, 24, 28)])
def test_pieces_and_holes_equal_simpleitk(shape):
    mask = ndimage.gaussian_filter(rng.normal(size=shape), 2) > 0.03
    image = sitk.GetImageFromArray(mask.astype("uint8"))
    ordered = sitk.GetArrayFromImage(sitk.RelabelComponent(sitk.ConnectedComponent(image, False)))
    sizes = np.bincount(ordered.ravel())[1:]
    assert len(set(sizes[:3])) == len(sizes[:3]), "a tie would make the order arbitrary"
    for keep in (1, 2):
        assert np.array_equal(largest_components(mask, keep=keep), (ordered > 0) & (ordered <= keep))
    assert not largest_components(mask, least=mask.size).any()
    assert np.array_equal(fill_holes(mask), sitk.GetArrayFromImage(sitk.BinaryFillhole(image, False)) > 0)


def test_segment_keeps_what_each_class_may_have():
    z = np.zeros((12, 12, 3), "float32")
    z[1:4, 1:4, 1], z[6:8, 6:8, 1], z[9:11, 1:3, 2], z[9:11, 9:10, 2] = 5, 5, 5, 5
    z[..., 0] = 1
    labels = segment(np.zeros((12, 12)), lambda b: z[None], (12, 12), keep={1: 1})
    assert [(labels == k).sum() for k in (1, 2)] == [9, 6]
    assert [(segment(np.zeros((12, 12)), lambda b: z[None], (12, 12), keep=1) == k).sum() for k in (1, 2)] == [9, 4]


# ---- contours ------------------------------------------------------------------------------------------------------------------
def blobs(shape, seed):
    return ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=shape), 3, mode="constant") > 0.02


def surface(mask):
    """Voxels with a neighbour outside, found by moving the mask one step along each axis."""
    inside, padded = np.ones_like(mask), np.pad(mask, 1)
    core = (slice(1, -1),) * mask.ndim
    for axis, step in itertools.product(range(mask.ndim), (1, -1)):
        inside &= np.roll(padded, step, axis)[core]
    return np.argwhere(mask & ~inside)


@pytest.mark.parametrize("shape, spacing", [((40, 50), (1.0, 1.0)), ((40, 30), (0.5, 2.0)), ((12, 20, 18), (3.0, 0.8, 0.7))])
def test_distances_equal_brute_force_and_overlap_simpleitk(shape, spacing):
    for seed in range(4):
        a, b = blobs(shape, seed), blobs(shape, 100 + seed)
        far = cdist(surface(a) * spacing, surface(b) * spacing)
        there, back = surface_distances(a, b, spacing)
        assert np.allclose(np.sort(there), np.sort(far.min(1))) and np.allclose(np.sort(back), np.sort(far.min(0)))
        for q in (50, 95, 100):
            assert np.isclose(hausdorff95(a, b, spacing, percentile=q), max(np.percentile(far.min(1), q), np.percentile(far.min(0), q)))
        measure = sitk.LabelOverlapMeasuresImageFilter()
        measure.Execute(*(sitk.GetImageFromArray(m.astype("uint8")) for m in (a, b)))
        assert np.isclose(dice(a, b), measure.GetDiceCoefficient())
        assert np.isclose(hausdorff95(a, b, np.multiply(spacing, 2)), 2 * hausdorff95(b, a, spacing))


def test_hausdorff_equals_simpleitk_for_a_moved_ball():
    z, y, x = np.mgrid[:20, :30, :30]
    ball = np.hypot(np.hypot(2.5 * (z - 9), y - 14), x - 13) < 9
    moved, spacing = np.roll(ball, (1, 2), (0, 2)), (2.5, 1.0, 1.0)
    images = [sitk.GetImageFromArray(m.astype("uint8")) for m in (ball, moved)]
    for image in images:
        image.SetSpacing(spacing[::-1])
    measure = sitk.HausdorffDistanceImageFilter()
    measure.Execute(*images)
    assert np.isclose(hausdorff95(ball, moved, spacing, percentile=100), measure.GetHausdorffDistance(), atol=1e-5)


def test_empty_masks_have_stated_answers():
    nothing, something = np.zeros((30, 40), bool), np.zeros((30, 40), bool)
    something[3:5, 3:5] = True
    assert (dice(nothing, nothing), hausdorff95(nothing, nothing)) == (1.0, 0.0)
    assert dice(something, nothing) == dice(nothing, something) == 0.0
    assert hausdorff95(something, nothing, (2, 2)) == hausdorff95(nothing, something, (2, 2)) == 100.0
    table = evaluate_masks([nothing, something, something], [nothing, nothing, something])
    assert table["empty"].tolist() == [False, True, False] and table["dice"].tolist() == [1, 0, 1]
    with pytest.raises(DatasetError, match="no surface"):
        surface_distances(nothing, something)


def test_spacing_comes_from_a_volume():
    a = Volume(blobs((12, 20, 18), 1), make_affine((3.0, 0.8, 0.7)))
    b = a.with_array(blobs((12, 20, 18), 2))
    assert hausdorff95(a, b) == hausdorff95(a.array, b.array, (3.0, 0.8, 0.7)) != hausdorff95(a.array, b.array)


@pytest.mark.parametrize("bad, said", [(lambda m: dice(m, m[:-1]), "resample"), (lambda m: dice(m * 0.4, m), "threshold"), (lambda m: hausdorff95(m, m, (1, 1, 1)), "spacing_mm"),
                                       (lambda m: hausdorff95(m, m, (1, -1)), "spacing_mm"), (lambda m: dice(m[0], m[0]), "one case"), (lambda m: evaluate_masks([m], []), "one of each"),
                                       (lambda m: evaluate_masks([], []), "one of each")])
def test_wrong_masks_are_refused(bad, said):
    with pytest.raises(MedimgError, match=said):
        bad(np.eye(6))


# ---- the experiments' parts ----------------------------------------------------------------------------------------------------
def test_batches_are_a_function_of_the_step():
    images, masks = rng.integers(0, 255, (7, 32, 32)).astype("uint8"), rng.random((7, 32, 32)) > 0.5
    a, b = (seg.film_batches(images, masks, batch=3, seed=4) for _ in range(2))
    b(0), b(1)
    assert all(np.array_equal(p, q) for p, q in zip(a(5), b(5)))
    assert not np.array_equal(a(5)[0], seg.film_batches(images, masks, batch=3, seed=5)(5)[0])
    with pytest.raises(DatasetError, match="one grid"):
        seg.film_batches(images, masks[:, 1:])


def test_mask_moves_with_its_film():
    """A film that is its own mask: after the same move the bright pixels are where the mask is."""
    masks = np.zeros((2, 64, 64), bool)
    masks[:, 20:44, 16:40] = True
    for x, y in (seg.film_batches(masks.astype("uint8") * 200, masks, batch=2, seed=s)(s) for s in range(5)):
        for image, mask in zip(x[..., 0], y[..., 0] > 0):
            assert dice(image > (image.min() + image.max()) / 2, mask) > 0.95


def test_gas_lies_under_the_left_lung_only():
    """Against the geometry: nothing changes inside the lungs, left of the middle, or above the upper half of the left lung."""
    film, lungs = np.full((128, 128), 220, np.uint8), np.zeros((128, 128), bool)
    lungs[20:80, 16:52] = lungs[20:90, 76:112] = True
    film[lungs] = 60
    for seed in range(40):
        changed = seg.stomach_gas(film, lungs, np.random.default_rng(seed)) != film
        assert changed.any() and not changed[lungs].any() and not changed[:, :52].any() and not changed[:55].any()
    lungs[:, 64:] = False
    assert np.array_equal(seg.stomach_gas(film, lungs, np.random.default_rng(0)), film)


@pytest.mark.parametrize("bad, said", [(np.ones((2, 8, 8)), "constant"), (np.full((1, 8, 8), np.nan), "NaN")])
def test_films_without_contrast_are_refused(bad, said):
    with pytest.raises(MedimgError, match=said):
        seg.standardised(bad)


def test_real_folds_keep_patients_and_near_copies_apart():
    if find_data("cxr_lungs_256.npz") is None or find_data("busi_128.npz") is None:
        leave_out("cxr_lungs_256.npz or busi_128.npz is not found", "set MEDIMG_DATA to the folder that holds them")
    for films in (seg.lung_films("real", side=64, folds=("train", "val", "test")), seg.breast_films("real", side=32)):
        sides = [set(films.groups[films.rows(s)]) for s in ("train", "val", "test")]
        assert all(sides) and not (sides[0] & sides[1] or sides[0] & sides[2] or sides[1] & sides[2])
    assert not len(seg.lung_films("real", side=64).rows("test"))


@pytest.mark.parametrize("name, key", [("xray-lungs-sites", "A_on_B_dice"), ("breast-lesions", "healthy_left_empty")])
def test_experiments_run_and_log_their_look(name, key, tmp_path):
    run = Run(name, tmp_path, "ci", (0,), data="phantom", progress=False)
    made = EXPERIMENTS[name].function()(run)
    assert 0 <= made["figures"][key]["value"] <= 1 and run.reads and (tmp_path / "test_reads.jsonl").is_file()
    assert all(np.isfinite(f["value"]) for f in made["figures"].values())
