"""Burnt-in text: a part of the measured set, every photometric interpretation, noise with known statistics."""
import io
import json
import sys
from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom.data import get_testdata_file
from pydicom.dataset import Dataset

from medimg.data import deid_pixels
from medimg.data.deid_pixels import add_noise, as_picture, black_out, find_text, text_mask
from medimg.data.deid_profile import Pseudonyms, make_policy
from medimg.data.deid_rewrite import rewrite
from medimg.data.deidentify import deidentify
from medimg.data.phantom import radiograph, thorax_phantom
from medimg.errors import ConfigError

ROOT, NAMES = Path(__file__).resolve().parents[1], Pseudonyms(b"the key of the tests, 32 bytes..")
sys.path.insert(0, str(ROOT / "benchmarks" / "data"))
import deid_ocr  # noqa: E402

LINE = np.s_[40:60, 30:150]


@pytest.fixture
def ocr():
    pytest.importorskip("rapidocr", reason="rapidocr is not installed; remedy: pip install 'medimg[ocr]'")


@pytest.fixture
def two_boxes(monkeypatch):
    """A detector of known answer in place of the network."""
    monkeypatch.setattr(deid_pixels, "find_text", lambda image: [(40, 30, 60, 150)] if np.asarray(image).max() > 0 else [])


def test_planted_strings_are_removed(ocr):
    """A part of what results/deid_ocr.json measures: 6 images with 6 strings each, two of them JPEG-compressed."""
    film = radiograph(thorax_phantom(5, shape=(32, 80, 80), spacing_mm=(10, 4.4, 4.4)), size=512)[0].array[0]
    groups = deid_ocr.measure(images=6, strings=6, seed=21, film=film)["groups"]
    assert groups["all"]["planted"] >= 34 and groups["all"]["removed"] >= groups["all"]["planted"] - 2 and groups["jpeg"]["planted"] >= 10


def test_stored_result_meets_the_target():
    result = json.loads((ROOT / "results" / "deid_ocr.json").read_text())
    every = result["groups"]["all"]
    assert every["planted"] >= 500 and every["share"] >= 0.98 and result["groups"]["rotated"]["planted"] >= 100 and result["groups"]["jpeg"]["planted"] >= 100
    from scipy.stats import binomtest
    low, high = binomtest(every["removed"], every["planted"]).proportion_ci(method="wilson")
    assert every["ci95"] == pytest.approx([low, high], abs=1e-4)


def test_text_in_a_large_image_is_found_in_its_tiles(ocr):
    """A string of 14 pixels on a film of 700 x 1300, which one look at the whole would shrink."""
    import cv2
    image = np.full((700, 1300), 900, "uint16")
    ink = cv2.putText(np.zeros(image.shape, "u1"), "DOE JANE 1961", (1020, 400), cv2.FONT_HERSHEY_SIMPLEX, 0.5, 255, 1) > 0
    image[ink] = 3000
    mask = text_mask(find_text(image), image.shape)
    assert mask[ink].mean() > 0.95 and mask.mean() < 0.02


def test_a_whole_file(ocr):
    """A CT slice with a name drawn in, compressed losslessly or not: the ink has one value afterwards, the rest is as it was."""
    import cv2
    ds = pydicom.dcmread(get_testdata_file("CT_small.dcm"))
    pixels = np.kron(ds.pixel_array, np.ones((3, 3), "int16"))
    ink = cv2.putText(np.zeros(pixels.shape, "u1"), "DOE^JANE", (20, 60), cv2.FONT_HERSHEY_SIMPLEX, 0.8, 255, 2) > 0
    ds.Rows, ds.Columns, ds.PixelData = *pixels.shape, np.where(ink, 4000, pixels).astype("<i2").tobytes()
    out = deidentify(ds, key=NAMES, policy=make_policy(options=["clean-pixels"]))
    assert out.BurnedInAnnotation == "NO" and np.unique(out.pixel_array[ink]).size == 1
    same = out.pixel_array == pixels
    assert same.mean() > 0.85 and "113101" in [c.CodeValue for c in out.DeidentificationMethodCodeSequence]


@pytest.mark.parametrize("kind,dtype", [("MONOCHROME2", "uint16"), ("MONOCHROME2", "int16"), ("MONOCHROME1", "uint8"), ("RGB", "uint8")])
def test_black_is_black(two_boxes, kind, dtype):
    """Boxes of one frame are blacked in all frames, with the darkest value of each interpretation."""
    header, rng = Dataset(), np.random.default_rng(1)
    header.PhotometricInterpretation = kind
    frames = rng.integers(1, 100, (3, 80, 160) + ((3,) if kind == "RGB" else ())).astype(dtype)
    frames[1:] = 0
    frames[2, 0, 0] = 7
    before = frames.copy()
    done, boxes = black_out(frames, header)
    black = before.max() if kind == "MONOCHROME1" else 0
    assert boxes == 2 and (done[(slice(None), *LINE)] == black).all() and np.array_equal(frames, before)
    outside = np.ones((80, 160), bool)
    outside[LINE] = False
    assert np.array_equal(done[:, outside], before[:, outside])


def test_palette_and_compressed_colour(monkeypatch):
    """A palette image keeps its palette; its box holds the index of the darkest colour. A JPEG colour image comes out as RGB."""
    monkeypatch.setattr(deid_pixels, "find_text", lambda image: [(40, 30, 60, 150)])
    monkeypatch.setattr(deid_pixels, "_detector", lambda: None)
    for name in ("examples_palette.dcm", "examples_ybr_color.dcm"):
        source = Path(get_testdata_file(name)).read_bytes()
        policy = make_policy(options=["clean-pixels"])
        out = pydicom.dcmread(io.BytesIO(rewrite(source, NAMES, policy, edit=deid_pixels.pixel_editor(policy, NAMES)).data))
        before = pydicom.pixels.pixel_array(pydicom.dcmread(io.BytesIO(source)))
        after = pydicom.pixels.pixel_array(out)
        line = (..., *LINE) if name == "examples_palette.dcm" else (..., *LINE, slice(None))
        outside = np.ones(before.shape, bool)
        outside[line] = False
        assert np.array_equal(after[outside], before[outside]) and np.unique(after[line]).size == 1
        assert not out.file_meta.TransferSyntaxUID.is_compressed
        assert out.PhotometricInterpretation == ("PALETTE COLOR" if name == "examples_palette.dcm" else "RGB")


def test_noise_is_gaussian_repeatable_and_bounded():
    from scipy import stats
    flat = np.full((1, 200, 200), 2000, "uint16")
    noisy = add_noise(flat, 12.0, seed=3, limits=(0, 4095)).astype(float) - 2000
    assert abs(noisy.mean()) < 0.3 and abs(noisy.std() - 12) < 0.3 and stats.kstest(noisy.ravel()[::7] / 12, "norm").pvalue > 1e-3
    assert add_noise(np.array([0, 4095], "uint16"), 50.0, seed=1, limits=(0, 4095)).max() <= 4095
    policy = make_policy(noise_sd=5)
    source = Path(get_testdata_file("CT_small.dcm")).read_bytes()
    one, two = (rewrite(source, NAMES, policy, edit=deid_pixels.pixel_editor(policy, NAMES)).data for _ in range(2))
    before, after = (pydicom.dcmread(io.BytesIO(d)).pixel_array.astype(float) for d in (source, one))
    assert one == two and 4.5 < (after - before).std() < 5.5


def test_without_the_extra(monkeypatch):
    deid_pixels._detector.cache_clear()
    monkeypatch.setitem(sys.modules, "rapidocr", None)
    with pytest.raises(ConfigError, match="medimg\\[ocr\\]"):
        deidentify(get_testdata_file("CT_small.dcm"), key=NAMES, policy=make_policy(options=["clean-pixels"]))
    deid_pixels._detector.cache_clear()


def test_the_picture_keeps_outlying_text_in_view():
    """A CT with padding of -2000 and text of 32000: tissue still has contrast."""
    image = np.random.default_rng(1).normal(40, 30, (200, 200)).astype("int16")
    image[:1, :20], image[1:2, :20] = -2000, 32000
    picture = as_picture(image)
    assert picture.dtype == np.uint8 and picture[50:, 50:].std() > 20
