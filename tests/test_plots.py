"""Pictures: right greys, true geometry, files that other programs read, and no drawing library where none is needed."""
import base64
import subprocess
import sys
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from medimg import plots
from medimg.errors import ConfigError, GeometryError


def volume(shape=(6, 20, 30), spacing=(3.0, 1.0, 0.5), **more):
    array = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    return SimpleNamespace(array=array, spacing_mm=spacing, units="HU", orientation="SPL", meta={}, **more)


@settings(deadline=None)
@given(hnp.arrays(np.float64, hnp.array_shapes(max_dims=3, max_side=6), elements=st.floats(-3000, 3000)),
       st.floats(-1000, 1000), st.floats(1, 4000))
def test_window_is_monotone_and_clips(array, center, width):
    grey = plots.to_grey(array, (center, width)).astype(int)
    assert grey.shape == array.shape
    assert (grey[array <= center - width / 2 - 1e-3] == 0).all() and (grey[array >= center + width / 2 + 1e-3] == 255).all()
    order = np.argsort(array, axis=None)
    assert (np.diff(grey.ravel()[order]) >= 0).all()


def test_grey_edge_cases():
    same = np.array([[3, 200]], np.uint8)
    assert plots.to_grey(same) is same
    assert plots.to_grey(np.array([np.nan, np.inf, -np.inf, 0, 1])).tolist() == [0, 255, 0, 0, 255]
    assert plots.to_grey(np.full((2, 2), np.nan)).tolist() == [[0, 0], [0, 0]]
    assert plots.to_grey(np.array([False, True])).tolist() == [0, 255]


@pytest.mark.parametrize("window", ["lung", (1,), (40, 0), (40, -1), (1, 2, 3)])
def test_bad_windows(window):
    with pytest.raises(ConfigError, match="width above 0"):
        plots.to_grey(np.zeros(3), window)


@settings(deadline=None)
@given(hnp.arrays(np.uint8, st.tuples(st.integers(1, 20), st.integers(1, 20)) | st.tuples(st.integers(1, 9), st.integers(1, 9), st.just(3))))
def test_png_is_read_back_by_opencv(image):
    read = cv2.imdecode(np.frombuffer(plots.png_bytes(image), np.uint8), cv2.IMREAD_UNCHANGED)
    assert np.array_equal(read if image.ndim == 2 else read[..., ::-1], image)


@pytest.mark.parametrize("image", [np.zeros((2, 2)), np.zeros((2, 2, 4), np.uint8), np.zeros(4, np.uint8), np.zeros((0, 4), np.uint8)])
def test_bad_png(image):
    with pytest.raises(ConfigError, match="PNG needs uint8"):
        plots.png_bytes(image)


@pytest.mark.parametrize("shape", [(1, 8, 8), (100, 512, 512), (7, 33, 90), (50, 60), (3, 600, 10), (5, 40, 30, 3)])
def test_montage_png(tmp_path, shape):
    path = plots.montage_png(np.random.default_rng(0).integers(0, 255, shape, np.uint8), tmp_path / "m.png", tiles=6)
    image = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
    assert image is not None and image.ndim == max(2, len(shape) - 1) and max(image.shape) <= 6 * 194


@settings(deadline=None)
@given(st.integers(1, 300), st.integers(1, 40))
def test_spread(n, k):
    chosen = plots.spread(n, k)
    assert len(chosen) == min(n, k) and chosen.min() >= 0 and chosen.max() < n and (np.diff(chosen) > 0).all()


def test_no_matplotlib_needed(tmp_path):
    code = ("import sys; sys.modules['matplotlib'] = None; import numpy as np; from medimg import plots\n"
            "plots.montage_png(np.zeros((9, 30, 30)), sys.argv[1]); plots.heatmap_overlay(np.eye(9), np.eye(3))\n"
            "try: plots.use_style()\nexcept Exception as error: print(error)")
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "m.png")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == 'matplotlib is not installed; pip install "medimg[course]"'


def test_import_is_light():
    done = subprocess.run([sys.executable, "-c", "import medimg.plots, sys; print({'matplotlib', 'cv2', 'scipy'} & set(sys.modules))"],
                          capture_output=True, text=True)
    assert done.stdout.strip() == "set()", done.stderr


@pytest.mark.parametrize("axis, size_mm, labels", [("z", (15, 20), ("x (mm)", "y (mm)")), ("y", (15, 18), ("x (mm)", "z (mm)")),
                                                  ("x", (20, 18), ("y (mm)", "z (mm)"))])
def test_slices_have_true_proportions(axis, size_mm, labels):
    ax = plots.show_slice(volume(), axis=axis, window=(1000, 2000)).figure.axes[0]
    assert (ax.get_xlabel(), ax.get_ylabel()) == labels and ax.get_aspect() == 1
    assert (np.ptp(ax.get_xlim()), np.ptp(ax.get_ylim())) == size_mm
    assert (ax.get_ylim()[0] < ax.get_ylim()[1]) == (axis != "z"), "the head is up"
    assert ax.images[0].get_cmap().name == "gray" and ax.images[0].get_interpolation() == "nearest"


def test_sides_come_from_the_orientation():
    letters = [t.get_text() for t in plots.show_slice(volume()).figure.axes[0].texts]
    assert letters == ["R", "L", "P", "A"]
    flipped = volume()
    flipped.orientation = "SPR"
    assert [t.get_text() for t in plots.show_slice(flipped).figure.axes[0].texts][:2] == ["L", "R"]
    assert not plots.show_slice(volume((1, 20, 30))).figure.axes[0].texts, "a radiograph's plane is not a patient axis here"


def test_window_stands_in_the_title():
    vol = volume()
    vol.meta = {"window": (-600, 1500)}
    assert "W 1500 L -600 HU" in plots.show_slice(vol, 2, title="t").figure.axes[0].get_title()
    assert "slice z = 5 of 0..5" in plots.show_slice(vol, -1).alt
    assert "W 80 L 40 HU" in plots.show_slice(vol, window=(40, 80)).alt


def test_volumes_without_a_spacing_count_pixels():
    class Uneven:
        array, units, meta = np.zeros((4, 8, 8)), "HU", {}

        @property
        def spacing_mm(self):
            raise GeometryError("uneven slices")

        orientation = spacing_mm
    assert plots.show_slice(Uneven.array).figure.axes[0].get_xlabel() == "x (pixels)"
    assert plots.show_slice(Uneven()).figure.axes[0].get_xlabel() == "x (pixels)"
    assert plots.slice_slider(Uneven()).n == 4


@pytest.mark.parametrize("call, text", [
    (lambda: plots.show_slice(volume(), 6), "no slice 6 along z; use 0 to 5"), (lambda: plots.show_slice(volume(), axis="q"), "'q'"),
    (lambda: plots.show_slice(np.zeros(5)), r"shape \(5,\)"), (lambda: plots.montage([]), "0 images"),
    (lambda: plots.montage(np.zeros((2, 4, 4)), titles=["one"]), "2 images with 1 titles"),
    (lambda: plots.show_slice(np.zeros((0, 4, 4))), r"shape \(0, 4, 4\)"),
    (lambda: plots.slice_slider(volume(), axis="w"), "'w'"), (lambda: plots.heatmap_overlay(np.zeros((4, 4)), np.zeros(4)), r"\(4,\)"),
    (lambda: plots.confusion_plot(np.eye(2), "abc"), "3 classes")])
def test_mistakes_are_named(call, text):
    with pytest.raises(ConfigError, match=text):
        call()


def test_pictures_are_small_described_and_closed(tmp_path):
    import matplotlib.pyplot as plt
    picture = plots.montage(np.random.default_rng(0).random((12, 256, 256)), title="noise")
    assert len(picture.png) <= 100_000 and picture._repr_png_() == picture.png and repr(picture) == "Picture: noise, 12 images"
    assert picture.save(tmp_path / "p.png").read_bytes() == picture.png
    assert cv2.imdecode(np.frombuffer(picture.png, np.uint8), cv2.IMREAD_COLOR).shape[1] > 250
    assert b"Description" in picture.png and not plt.get_fignums()


def test_pictures_are_reproducible():
    first, second = (plots.show_slice(volume()).png for _ in range(2))
    assert first == second


def test_mask_is_outlined_where_it_is():
    mask = np.zeros((6, 20, 30), bool)
    mask[3, 5:10, 12:20] = True                     # y 5 to 10 mm, x 6 to 10 mm
    line = plots.show_slice(volume(), 3, mask=mask).figure.axes[0].collections[0].get_paths()[0].vertices
    assert np.allclose(line.min(axis=0), (6, 5), atol=0.51) and np.allclose(line.max(axis=0), (10, 10), atol=0.51)
    assert not plots.show_slice(volume(), 0, mask=mask).figure.axes[0].collections


def test_montage_shares_one_window():
    picture = plots.montage([np.zeros((4, 4)), np.ones((4, 4)), np.full((4, 4), 2.0)])
    assert [int(ax.images[0].get_array().mean()) for ax in picture.figure.axes] == [0, 128, 255]


def test_slider_bundle_has_a_twin():
    slider = plots.slice_slider(volume(), tiles=3)
    bundle = slider._repr_mimebundle_()
    assert set(bundle) == {"image/png", "text/plain"}, "no widget outside a live kernel"
    assert base64.b64decode(bundle["image/png"]) == slider.static.png and "z = 1; z = 3; z = 5" in bundle["text/plain"]


def test_slider_moves_in_a_kernel(monkeypatch):
    IPython = pytest.importorskip("IPython", reason="IPython is missing; remedy: pip install 'medimg[course]'")
    pytest.importorskip("ipywidgets", reason="ipywidgets is missing; remedy: pip install 'medimg[course]'")
    monkeypatch.setattr(IPython, "get_ipython", lambda: SimpleNamespace(kernel=object()))
    slider = plots.slice_slider(volume(), tiles=3)
    bundle = slider._repr_mimebundle_()
    assert "application/vnd.jupyter.widget-view+json" in bundle and "image/png" in bundle
    index, image = slider.widget.children
    assert image.value == slider.frame(3)
    index.value = 5
    assert image.value == slider.frame(5) != slider.frame(3)


def test_overlay_keeps_cold_places_grey():
    image = np.arange(256, dtype=np.uint8).reshape(16, 16)
    cold = plots.heatmap_overlay(image, np.zeros((4, 4)))
    assert all(np.array_equal(cold[..., c], image) for c in range(3))
    heat = np.zeros((4, 4))
    heat[0, 3] = 1
    change = np.abs(plots.heatmap_overlay(image, heat).astype(int) - image[..., None]).sum(axis=2)
    assert np.unravel_index(change.argmax(), change.shape)[0] < 4 and np.unravel_index(change.argmax(), change.shape)[1] >= 12
    assert change[8:].sum() == 0
    half = plots.heatmap_overlay(image, heat, limits=(0, 2)).astype(int)
    assert np.abs(half - image[..., None]).sum() < change.sum()


def test_roc_and_confusion():
    picture = plots.roc_plot({"a": ([0, 1], [0, 1], [9, 0]), "b": ([0, 0, 1], [0, 1, 1])}, point=(0.2, 0.5, "here"), title="two")
    assert [t.get_text() for t in picture.figure.axes[0].get_legend().get_texts()] == ["a", "b", "here"]
    assert plots.roc_plot(([0, 1], [0, 1])).figure.axes[0].get_legend() is None
    texts = [t.get_text() for t in plots.confusion_plot([[9, 1], [0, 0]], "ab").figure.axes[0].texts]
    assert texts == ["9\n90%", "1\n10%", "0\n0%", "0\n0%"]
