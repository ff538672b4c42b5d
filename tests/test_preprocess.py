"""Preprocessing against OpenCV, scikit-image or SciPy where installed, plain NumPy, and its own promises."""
import json

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from medimg.data.preprocess import Preprocessor, fit_standardize
from medimg.errors import ConfigError, DatasetError

FULL = [("grayscale", {}), ("center_square", {}), ("resize", {"height": 16, "width": 12}), ("clahe", {"clip_limit": 2.0, "tiles": 4}),
        ("scale", {"low": 0, "high": 255}), ("standardize", {"mean": [0.5], "std": 0.25})]
images = hnp.arrays(np.uint8, st.one_of(st.tuples(st.integers(1, 40), st.integers(1, 40)), st.tuples(st.integers(1, 40), st.integers(1, 40), st.sampled_from([1, 3]))))


@settings(max_examples=60, deadline=None)
@given(images)
def test_any_image_gives_finite_float32_of_the_stated_shape(image):
    pre = Preprocessor(FULL)
    out = pre(image)
    assert out.dtype == np.float32 and out.shape == pre.output_shape == (16, 12, 1) and np.isfinite(out).all()
    assert out.min() >= -2 and out.max() <= 2


@settings(max_examples=40, deadline=None)
@given(images, st.integers(1, 5))
def test_one_image_is_a_batch_of_one_bit_for_bit(image, n):
    pre = Preprocessor(FULL)
    stack = np.stack([np.roll(image, i, axis=0) for i in range(n)])
    assert pre.batch(stack).tobytes() == np.stack([pre(i) for i in stack]).tobytes() == pre.batch(list(stack)).tobytes()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from(["grayscale", "center_square", "scale", "standardize", "resize"]), max_size=5), st.floats(-1e5, 1e5), st.floats(1e-3, 1e5), st.integers(1, 4096))
def test_json_round_trip_is_exact(names, low, span, side):
    numbers = {"scale": {"low": low, "high": min(low + span, 1e6)}, "standardize": {"mean": [low, 0.1], "std": [span]}, "resize": {"height": side, "width": 7}}
    pre = Preprocessor([(n, numbers.get(n, {})) for n in names])
    back = Preprocessor.from_json(pre.to_json())
    assert back == pre and hash(back) == hash(pre) and back.to_json() == pre.to_json()
    assert Preprocessor.from_json(json.loads(pre.to_json())) == pre


def test_scale_by_hand():
    pre = Preprocessor([("scale", {"low": 50, "high": 150})])
    assert pre(np.array([[0, 50, 100, 150, 255]], "uint8")).ravel().tolist() == [0, 0, 0.5, 1, 1]


def test_standardize_channels_by_hand():
    pre = Preprocessor([("standardize", {"mean": [10, 20, 30], "std": [1, 2, 5]})])
    assert pre(np.full((1, 1, 3), 40, "uint8")).ravel().tolist() == [30, 10, 2]


def test_grayscale_is_rec_601():
    image = np.random.default_rng(0).integers(0, 256, (9, 11, 3), dtype="uint8")
    ours = Preprocessor([("grayscale", {})])(image)[..., 0]
    assert np.allclose(ours, cv2.cvtColor(image.astype(np.float32), cv2.COLOR_RGB2GRAY), atol=1e-3)
    assert np.allclose(ours, image @ np.array([0.299, 0.587, 0.114]), atol=1e-3)


@pytest.mark.parametrize("factor", [2, 5])
def test_shrinking_is_the_mean_of_each_area(factor):
    image = np.random.default_rng(0).integers(0, 256, (factor * 6, factor * 8), dtype="uint8")
    ours = Preprocessor([("resize", {"height": 6, "width": 8})])(image)[..., 0]
    assert np.allclose(ours, image.reshape(6, factor, 8, factor).mean(axis=(1, 3)), atol=1e-3)
    assert abs(ours.mean() - image.mean()) < 1e-3


def test_growing_agrees_with_simpleitk():
    sitk = pytest.importorskip("SimpleITK")
    image = np.random.default_rng(0).integers(0, 256, (6, 6)).astype(np.float32)
    ours = Preprocessor([("resize", {"height": 12, "width": 12})])(image)[..., 0]
    source = sitk.GetImageFromArray(image)
    theirs = sitk.Resample(source, (12, 12), sitk.Transform(), sitk.sitkLinear, (-0.25, -0.25), (0.5, 0.5), (1, 0, 0, 1), 0.0, sitk.sitkFloat32)
    inner = slice(1, -1)      # beyond the outermost centres SimpleITK has no value
    assert np.allclose(ours[inner, inner], sitk.GetArrayFromImage(theirs)[inner, inner], atol=1e-3)


def test_center_square_keeps_the_middle():
    image = np.arange(35, dtype="uint8").reshape(5, 7)
    assert (Preprocessor([("center_square", {})])(image)[..., 0] == image[:, 1:6]).all()
    assert (Preprocessor([("center_square", {})])(image.T)[..., 0] == image.T[1:6]).all()


def test_clahe_is_opencv_and_spreads_contrast():
    image = (100 + 20 * np.random.default_rng(0).random((64, 64))).astype("uint8")
    ours = Preprocessor([("clahe", {"clip_limit": 3.0, "tiles": 4})])(image)[..., 0]
    assert (ours == cv2.createCLAHE(3.0, (4, 4)).apply(image)).all() and np.ptp(ours) > 2 * np.ptp(image)


@pytest.mark.parametrize("side", [14, 17, 23, 31])
def test_white_stays_white_through_area_averaging(side):
    """The mean of whites may round to 255.00002, which is not out of range."""
    assert Preprocessor(FULL[:4])(np.full((side, side), 255, "uint8")).max() <= 255


def test_fit_standardize_matches_numpy():
    x = np.random.default_rng(0).integers(0, 256, (300, 7, 5, 3), dtype="uint8")
    base = Preprocessor([("scale", {})])
    out = fit_standardize(x, base).batch(x)
    reference = (x / 255 - (x / 255).mean((0, 1, 2))) / (x / 255).std((0, 1, 2))
    assert np.allclose(out, reference, atol=1e-4)


def test_a_saved_recipe_is_the_same_object(tmp_path):
    pre = Preprocessor(FULL)
    assert Preprocessor.load(pre.save(tmp_path / "preprocess.json")) == pre
    assert json.loads((tmp_path / "preprocess.json").read_text())["schema_version"] == 1
    image = np.random.default_rng(0).integers(0, 256, (30, 40), dtype="uint8")
    assert Preprocessor.load(tmp_path / "preprocess.json")(image).tobytes() == pre(image).tobytes()
    with pytest.raises(AttributeError):
        pre.steps = ()


def test_the_input_is_not_changed_nor_shared():
    image = np.full((4, 4), 7, np.float32)
    Preprocessor([])(image)[:] = 0
    assert (image == 7).all()


def test_output_shape():
    assert Preprocessor([]).output_shape == (None, None, None)
    assert Preprocessor([("resize", {"height": 8, "width": 6}), ("center_square", {})]).output_shape == (6, 6, None)


@pytest.mark.parametrize("steps, word", [
    ([("rezise", {})], "resize"), ([("resize", {"height": 2})], "width"), ([("resize", {"height": 0, "width": 2})], "height"),
    ([("resize", {"height": 2.5, "width": 2})], "whole"), ([("resize", {"height": True, "width": 2})], "height"), ([("scale", {"low": "0"})], "low"),
    ([("scale", {"high": float("nan")})], "high"), ([("scale", {"hi": 1})], "hi"), ([("grayscale", {"x": 1})], "takes none"),
    ([("standardize", {"mean": 0})], "std"), ([("standardize", {"mean": 0, "std": 0})], "std"), ([("standardize", {"mean": [], "std": 1})], "empty"),
    (["scale"], "step is"), ([("clahe", {"clip_limit": 0})], "clip_limit"), ([("scale", {}), ("clahe", {})], "before"), ([3], "step is")])
def test_wrong_recipes(steps, word):
    with pytest.raises(ConfigError, match=word):
        Preprocessor(steps)


@pytest.mark.parametrize("steps, image, word", [
    ([], np.zeros(4), "axes"), ([], np.zeros((2, 2, 2, 2)), "axes"), ([], np.zeros((0, 4)), "axes"), ([], np.full((2, 2), np.inf), "NaN"),
    ([], np.array([["a"]]), "are"), ([], np.zeros((2, 2), complex), "complex"), ([("grayscale", {})], np.zeros((2, 2, 4)), "4"),
    ([("clahe", {})], np.zeros((8, 8, 3)), "one channel"), ([("clahe", {})], np.full((8, 8), 300.0), "255"),
    ([("standardize", {"mean": [1, 2], "std": 1})], np.zeros((2, 2, 3)), "2 mean")])
def test_wrong_images(steps, image, word):
    with pytest.raises(DatasetError, match=word):
        Preprocessor(steps)(image)


def test_scale_upside_down():
    with pytest.raises(ConfigError, match="not above"):
        Preprocessor([("scale", {"low": 2, "high": 1})])(np.zeros((2, 2)))


def test_lists_of_sizes():
    parts = [np.zeros((4, 5), "uint8"), np.zeros((6, 3, 3), "uint8")]
    assert Preprocessor(FULL).batch(parts).shape == (2, 16, 12, 1)
    with pytest.raises(DatasetError, match="resize"):
        Preprocessor([("grayscale", {})]).batch(parts)


@pytest.mark.parametrize("text", ["", "[]", "{}", "null", "7", '{"schema_version": 2, "steps": []}', '{"schema_version": 1, "steps": {}}',
                                  '{"schema_version": 1, "steps": [["scale"]]}', '{"schema_version": 1, "steps": [["scale", {"low": NaN}]]}'])
def test_bad_json(text, tmp_path):
    with pytest.raises(ConfigError):
        Preprocessor.from_json(text)
    (tmp_path / "p.json").write_text(text)
    with pytest.raises(ConfigError, match="p.json"):
        Preprocessor.load(tmp_path / "p.json")


def test_missing_file(tmp_path):
    with pytest.raises(ConfigError, match="no.json"):
        Preprocessor.load(tmp_path / "no.json")


def test_constant_training_images():
    for x in (np.zeros((3, 4, 4), "uint8"), np.zeros((0, 4, 4), "uint8")):
        with pytest.raises(DatasetError):
            fit_standardize(x, Preprocessor([]))
