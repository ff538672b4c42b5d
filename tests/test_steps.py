"""The table of steps against NumPy, OpenCV, scikit-image, SimpleITK, and properties; every step in JSON, in a batch, on volumes."""
import builtins
import json

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from medimg.data import denoise
from medimg.data.phantom import radiograph, thorax_phantom
from medimg.data.preprocess import STEPS, Preprocessor
from medimg.data.steps import body_box, n4
from medimg.data.volume import Volume, make_affine
from medimg.errors import ConfigError, DatasetError

#: Parameters that have no default.
NEEDED = {"standardize": {"mean": [10.0], "std": [3.0]}, "resize": {"height": 20, "width": 24}, "letterbox": {"height": 20, "width": 24},
          "window": {"center": 120.0, "width": 200.0}, "resample": {"spacing_mm": [2.0]}, "bilateral": {"sigma_grey": 20.0},
          "nlm": {"h": 10.0}, "tv": {"weight": 10.0}}
IMAGES = np.random.default_rng(0).integers(0, 256, (3, 40, 48), dtype="uint8")
IMAGES[:, 8:30, 10:40] = IMAGES[:, 8:30, 10:40] // 4 + 150
ON_IMAGES = sorted(k for k, s in STEPS.items() if s.function)
ON_VOLUMES = sorted(k for k, s in STEPS.items() if s.volume)


def recipe(name):
    return Preprocessor([(name, NEEDED.get(name, {}))])


@pytest.fixture(scope="module")
def ct():
    return thorax_phantom(0, shape=(20, 64, 64), spacing_mm=(15, 5.6, 5.6)).volume


def test_the_table_is_complete():
    """What the issue lists, by the names that a recipe uses."""
    assert {"grayscale", "scale", "standardize", "center_square", "resize", "clahe", "window", "hu_clip", "zscore", "minmax", "percentile",
            "resample", "letterbox", "crop_body", "crop_chest", "median", "gaussian", "bilateral", "nlm", "tv", "equalize", "n4"} <= set(STEPS)


@pytest.mark.parametrize("name", sorted(STEPS))
def test_each_step_survives_json_bit_for_bit(name, ct):
    pre = recipe(name)
    back = Preprocessor.from_json(json.loads(pre.to_json()))
    assert back == pre and back.to_json() == pre.to_json()
    if STEPS[name].function:
        assert back(IMAGES[0]).tobytes() == pre(IMAGES[0]).tobytes()
    if STEPS[name].volume and name not in ("nlm", "n4"):
        assert back(ct).array.tobytes() == pre(ct).array.tobytes()


@pytest.mark.parametrize("name", ON_IMAGES)
def test_serving_one_image_equals_training_on_a_batch(name):
    pre, images = recipe(name), IMAGES if name != "n4" else IMAGES[:2]
    images = images if name not in ("crop_body", "crop_chest") else np.stack([IMAGES[0]] * 2)
    batch = pre.batch(images)
    assert batch.dtype == np.float32 and batch.ndim == 4 and np.isfinite(batch).all()
    assert batch.tobytes() == np.stack([pre(image) for image in images]).tobytes()
    assert pre.batch(images[::-1])[-1].tobytes() == batch[0].tobytes()
    assert all(size in (None, real) for size, real in zip(pre.output_shape, batch.shape[1:]))


@pytest.mark.parametrize("name", ON_VOLUMES)
def test_volumes_keep_their_place(name, ct):
    out = recipe(name)(ct.crop(z=slice(4, 12)))
    assert isinstance(out, Volume) and out.array.dtype == np.float32 and np.isfinite(out.array).all() and out.modality == "CT"
    assert out.units in (("HU",) if STEPS[name].units is None else ("raw",))
    if name not in ("resample", "crop_body"):
        assert np.array_equal(out.affine, ct.crop(z=slice(4, 12)).affine) and out.shape == (8, 64, 64)


@pytest.mark.parametrize("name", sorted(set(STEPS) - set(ON_VOLUMES)))
def test_steps_for_images_refuse_volumes(name, ct):
    with pytest.raises(DatasetError, match="not on volumes.*hu_clip"):
        recipe(name)(ct)


@pytest.mark.parametrize("name", sorted(STEPS))
def test_parameters_are_bounded(name):
    for key, (kind, low, high, _) in STEPS[name].parameters.items():
        for beyond in (low - 1 - abs(low), high + 1 + abs(high), float("nan"), float("inf"), "1", None):
            with pytest.raises(ConfigError, match=key):
                Preprocessor([(name, {**NEEDED.get(name, {}), key: [beyond] if kind is list else beyond})])
        with pytest.raises(ConfigError, match=f"did you mean {key}|known"):
            Preprocessor([(name, {**NEEDED.get(name, {}), key + "x": 1})])


def test_unknown_step_names_the_nearest():
    with pytest.raises(ConfigError, match="did you mean .*hu_clip"):
        Preprocessor([("hu_clipp", {})])


# ---- grey values ---------------------------------------------------------------------------------------------------------------
@settings(max_examples=40, deadline=None)
@given(st.floats(-2000, 1000), st.floats(1, 3000), st.integers(0, 2**32 - 1))
def test_clip_is_idempotent_and_keeps_what_lies_inside(low, span, seed):
    x = np.random.default_rng(seed).normal(0, 1500, (6, 7)).astype(np.float32)
    pre = Preprocessor([("hu_clip", {"low": low, "high": low + span})])
    once = pre(x)
    assert pre(once).tobytes() == once.tobytes()
    inside = (x > low) & (x < low + span)
    assert (once[..., 0][inside] == x[inside]).all() and once.min() >= np.float32(low) and once.max() <= np.float32(low + span)


@settings(max_examples=40, deadline=None)
@given(st.floats(-500, 500), st.floats(0.5, 200), st.integers(0, 2**32 - 1))
def test_own_statistics_ignore_gain_and_offset(offset, gain, seed):
    x = np.random.default_rng(seed).normal(0, 1, (12, 9)).astype(np.float32)
    for name in ("zscore", "minmax", "percentile"):
        assert np.allclose(recipe(name)(x), recipe(name)(x * gain + offset), atol=2e-3)


def test_statistics_match_numpy():
    x = np.random.default_rng(1).normal(200, 30, (2, 30, 20, 3)).astype(np.float32)
    z = recipe("zscore").batch(x)
    assert np.allclose(z, (x - x.mean((1, 2), keepdims=True)) / x.std((1, 2), keepdims=True), atol=1e-4)
    low, high = np.percentile(x, [5, 90], axis=(1, 2), keepdims=True)
    ours = Preprocessor([("percentile", {"low": 5, "high": 90})]).batch(x)
    assert np.allclose(ours, np.clip((x - low) / (high - low), 0, 1), atol=1e-5)
    m = recipe("minmax").batch(x)
    assert (m.min((1, 2)) == 0).all() and (m.max((1, 2)) == 1).all()


def test_statistics_of_a_volume_are_of_all_its_voxels(ct):
    z = recipe("zscore")(ct).array
    assert abs(z.mean()) < 1e-4 and abs(z.std() - 1) < 1e-3 and np.ptp(z.mean((1, 2))) > 0.1


@pytest.mark.parametrize("name", ["zscore", "minmax", "percentile"])
def test_a_constant_image_becomes_zero(name):
    assert (recipe(name)(np.full((8, 8), 77, "uint8")) == 0).all() and (recipe(name)(np.full((8, 8), -1e5)) == 0).all()


def test_window_is_the_volume_s_window_in_display_greys(ct):
    ours = Preprocessor([("window", {"center": 40, "width": 400})])(ct)
    assert np.array_equal(ours.array, ct.window("mediastinum") * np.float32(255))


def test_equalize_by_its_formula():
    """255 · (cdf − cdf_min) / (1 − cdf_min), Gonzalez and Woods."""
    image = (60 + 40 * np.random.default_rng(0).random((64, 64)) ** 2).astype("uint8")
    ours = recipe("equalize")(image)[..., 0]
    cdf = np.cumsum(np.bincount(image.ravel(), minlength=256)) / image.size
    first = cdf[cdf > 0].min()
    assert np.abs(ours - 255 * (cdf[image] - first) / (1 - first)).max() <= 1 and ours.min() == 0 and ours.max() == 255


@pytest.mark.parametrize("late", ["clahe", "equalize"])
@pytest.mark.parametrize("early", ["scale", "zscore", "minmax", "percentile", "standardize"])
def test_histogram_steps_come_before_rescaling(late, early):
    with pytest.raises(ConfigError, match=f"{late} after {early}"):
        Preprocessor([(early, NEEDED.get(early, {})), (late, {})])


@pytest.mark.parametrize("name, numbers", [("hu_clip", {"low": 5, "high": 5}), ("percentile", {"low": 60, "high": 40})])
def test_upside_down_ranges(name, numbers):
    with pytest.raises(ConfigError, match="not above"):
        Preprocessor([(name, numbers)])(IMAGES[0])


# ---- size and place ------------------------------------------------------------------------------------------------------------
@settings(max_examples=40, deadline=None)
@given(st.integers(1, 60), st.integers(1, 60), st.integers(1, 40), st.integers(1, 40))
def test_letterbox_keeps_the_aspect_ratio(height, width, to_height, to_width):
    out = Preprocessor([("letterbox", {"height": to_height, "width": to_width, "fill": -1})])(np.full((height, width), 9, "uint8"))[..., 0]
    out = np.round(out, 4)
    assert out.shape == (to_height, to_width) and set(np.unique(out)) <= {-1, 9}
    rows, columns = (out == 9).any(1).sum(), (out == 9).any(0).sum()
    assert rows == to_height or columns == to_width
    ratio = min(to_height / height, to_width / width)
    assert abs(rows - max(height * ratio, 1)) <= 0.5 + 1e-9 and abs(columns - max(width * ratio, 1)) <= 0.5 + 1e-9


def test_letterbox_is_resize_when_the_ratio_fits():
    pair = [Preprocessor([(name, {"height": 20, "width": 24})])(IMAGES[0]) for name in ("letterbox", "resize")]
    assert np.array_equal(*pair)


def test_resample_agrees_with_simpleitk():
    sitk = pytest.importorskip("SimpleITK")
    x = np.random.default_rng(0).normal(size=(6, 8, 10)).astype(np.float32)
    volume = Volume(ndimage.gaussian_filter(x, 1), make_affine((4, 2, 2), (5, 6, 7)), units="HU")
    ours = Preprocessor([("resample", {"spacing_mm": [2.0, 1.0, 1.0]})])(volume)
    target = ours.to_sitk()
    theirs = sitk.GetArrayFromImage(sitk.Resample(volume.to_sitk(), target, sitk.Transform(), sitk.sitkLinear, 0.0))
    inner = (slice(2, -2),) * 3
    assert ours.spacing_mm == (2, 1, 1) and np.allclose(ours.array[inner], theirs[inner], atol=1e-4)


def test_resample_to_coarser_does_not_alias():
    """A pattern finer than the new grid becomes its mean; without the blur it would turn into a coarse one."""
    fine = Volume(np.tile(np.where(np.arange(64) % 2, 100.0, 0.0), (8, 8, 1)), make_affine((2, 2, 1)))
    soft = Preprocessor([("resample", {"spacing_mm": [2.0, 2.0, 3.0]})])(fine).array[..., 3:-3]
    assert np.abs(soft - 50).max() < 10 and np.abs(fine.resample((2, 2, 3.0)).array[..., 3:-3] - 50).max() > 30


def test_resample_needs_a_volume_and_one_or_three_spacings(ct):
    with pytest.raises(DatasetError, match="Volume"):
        recipe("resample")(IMAGES[0])
    with pytest.raises(DatasetError, match="one number, or three"):
        Preprocessor([("resample", {"spacing_mm": [1, 2]})])(ct)


def test_crop_body_keeps_the_body():
    case = thorax_phantom(2, shape=(30, 112, 112), spacing_mm=(10, 3.2, 3.2))
    out = recipe("crop_body")(case.volume)
    box = body_box(case.volume.array)
    body = ~np.isin(case.labels, [0, 8])
    assert body[box].sum() > 0.995 * body.sum() and out.array.size < 0.8 * case.volume.array.size
    assert np.allclose(out.origin_mm, case.volume.world([s.start for s in box]))
    assert body_box(np.full((9, 9), -1000.0)) == (slice(0, 9), slice(0, 9))


def test_crop_body_lets_go_of_a_table_that_touches():
    image = np.full((200, 200), -1000.0)
    image[40:140, 60:140] = 40
    image[140:143, 5:195] = 200                                         # a thin, bright plate right under the body
    y, x = body_box(image)
    assert y.start == 40 and 140 <= y.stop <= 143 and 58 <= x.start <= 60 and 140 <= x.stop <= 142


def test_crops_of_different_sizes_need_a_resize():
    images = np.full((2, 40, 40), -1000.0)
    images[0, 5:20, 5:20] = images[1, 5:35, 5:30] = 40
    with pytest.raises(DatasetError, match="resize"):
        recipe("crop_body").batch(images)
    pre = Preprocessor([("crop_body", {}), ("letterbox", {"height": 16, "width": 16})])
    assert pre.batch(images).shape == (2, 16, 16, 1) and pre.output_shape == (16, 16, None) and recipe("crop_body").output_shape == (None, None, None)


def test_crop_chest_cuts_a_radiograph():
    image = radiograph(thorax_phantom(1, shape=(10, 16, 16), spacing_mm=(30, 22, 22), nodules=0).anatomy, size=128)[0].array[0]
    out = recipe("crop_chest")(image)
    assert out.shape[0] < 128 and out.shape[1] < 128 and out.size > 0.3 * image.size


# ---- denoisers and N4 ----------------------------------------------------------------------------------------------------------
def test_denoisers_are_the_libraries():
    x = IMAGES[0].astype(np.float32)
    assert np.array_equal(denoise.median(x, 3), cv2.medianBlur(x, 3)) and np.array_equal(denoise.median(x, 5), cv2.medianBlur(x, 5))
    kernel = cv2.GaussianBlur(x, (0, 0), 1.0, borderType=cv2.BORDER_REPLICATE)
    assert np.allclose(denoise.gaussian(x, 1.0)[5:-5, 5:-5], kernel[5:-5, 5:-5], atol=0.5)
    restoration = pytest.importorskip("skimage.restoration")
    theirs = restoration.denoise_bilateral(x / 255, sigma_color=20 / 255, sigma_spatial=1.5) * 255
    assert np.corrcoef(denoise.bilateral(x, 20.0).ravel(), theirs.ravel())[0, 1] > 0.99
    assert np.allclose(denoise.tv(x / 255, 0.1), restoration.denoise_tv_chambolle(x / 255, weight=0.1), atol=1e-6)


@pytest.mark.parametrize("function", [lambda v: denoise.median(v, 3), lambda v: denoise.gaussian(v, 1.0), lambda v: denoise.bilateral(v, 30.0),
                                      lambda v: denoise.nlm(v, 30.0), lambda v: denoise.tv(v, 30.0)])
def test_denoisers_remove_noise_slice_by_slice(function):
    rng = np.random.default_rng(3)
    truth = np.full((2, 40, 40), -850.0)
    noisy = (truth + rng.normal(0, 20, truth.shape)).astype(np.float32)
    out = function(noisy)
    assert out.dtype == np.float32 and (out - truth).std() < 0.6 * 20 and abs(out.mean() + 850) < 3
    assert out[0].tobytes() == function(noisy[0]).tobytes()             # a slice does not see its neighbours
    assert np.allclose(function(noisy + 100), out + 100, atol=0.5)      # no step knows where zero is


def test_edge_width_of_an_error_function():
    from scipy.special import erf
    d = np.random.default_rng(0).uniform(-6, 6, 20_000)
    for sigma in (0.7, 1.1):
        rising = 500 * erf(d / sigma / np.sqrt(2)) + np.random.default_rng(1).normal(0, 30, d.size)
        assert abs(denoise.edge_width_mm(d, -rising) - 2.563 * sigma) < 0.25 and abs(denoise.edge_width_mm(d, rising) - 2.563 * sigma) < 0.25
    assert np.isnan(denoise.edge_width_mm(d[:5], d[:5])) and np.isnan(denoise.edge_width_mm(d, np.zeros(d.size)))


def test_quality_is_scikit_image():
    metrics = pytest.importorskip("skimage.metrics")
    rng = np.random.default_rng(0)
    truth = rng.uniform(-1300, 100, (40, 40))
    image = truth + rng.normal(0, 20, truth.shape)
    a, b = (np.clip((v + 1350) / 1500, 0, 1) for v in (truth, image))
    ours = denoise.quality(image, truth)
    assert abs(ours["psnr_db"] - metrics.peak_signal_noise_ratio(a, b, data_range=1)) < 1e-9
    assert abs(ours["ssim"] - metrics.structural_similarity(a, b, data_range=1)) < 1e-9


def test_n4_flattens_a_planted_field():
    yy, xx = np.mgrid[-1:1:48j, -1:1:48j]
    body = np.hypot(yy, xx) < 0.8
    truth = np.where(body, 200.0, 0) + np.where(body & (np.hypot(yy - 0.2, xx) < 0.3), 80.0, 0) + np.random.default_rng(0).normal(0, 2, body.shape) * body
    field = np.exp(0.4 * yy + 0.15 * xx)
    tissue = body & (np.hypot(yy - 0.2, xx) > 0.4) & (np.hypot(yy, xx) < 0.7)
    before, after = ((v[tissue].std() / v[tissue].mean()) for v in (truth * field, n4(truth * field)))
    assert before > 0.1 and after < 0.4 * before
    assert n4(truth * field).tobytes() == n4(truth * field).tobytes()
    with pytest.raises(DatasetError, match="brighter"):
        n4(np.zeros((16, 16)))


@pytest.mark.parametrize("name, package", [("n4", "SimpleITK"), ("nlm", "skimage"), ("tv", "skimage")])
def test_a_missing_extra_is_named(name, package, monkeypatch):
    real = builtins.__import__

    def refuse(module, *rest, **kw):
        if module.split(".")[0] == package:
            raise ImportError(module)
        return real(module, *rest, **kw)
    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ConfigError, match=r"medimg\[train\]"):
        recipe(name)(IMAGES[0])


def test_bad_shapes():
    for x in (np.zeros(5), np.zeros((2, 2, 2, 2)), np.zeros((0, 4))):
        with pytest.raises(DatasetError, match="shape"):
            denoise.median(x)
    volume = Volume(np.full((2, 3, 4), np.nan))
    with pytest.raises(DatasetError, match="NaN"):
        recipe("hu_clip")(volume)
