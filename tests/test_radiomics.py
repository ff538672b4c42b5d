"""Radiomics against published values (IBSI phantom), MIRP, scikit-image, scikit-learn's sums and properties."""
import numpy as np
import pytest

from medimg.config import find_data
from medimg.data.phantom import FIELD_MM, radiograph
from medimg.data.phantom_anatomy import draw_anatomy
from medimg.data.volume import Volume, make_affine
from medimg.errors import ConfigError, DatasetError, GeometryError, MedimgError
from medimg.models.cardiothoracic import cardiothoracic_ratio, lung_fields, measure_heart, phantom_silhouettes
from medimg.models.patterns import PATTERNS, gabor_energy, hog_vector, lbp_histogram, table_patterns
from medimg.models.radiomics import FAMILIES, FEATURES_28, RadiomicSettings, features_28, interpolate, radiomic_features, resegment, table_28
from medimg.models.texture import AGGREGATIONS, discretise, first_order, glcm, glcm_features, region

# The digital phantom of the IBSI (CC BY 4.0): four slices of 4 rows of 5 voxels, a dot is outside the region.
PHANTOM = """14411 14611 41641 44641   14411 11611 .1311 44611   144.. 11111 11.11 11611   144.. 11111 11111 11611"""
# Zwanenburg et al., Radiology 2020; 295:328; values of the reference manual, arXiv:1612.07003, sections 3.3 and 3.6, data set "dig. phantom".
FIRST_ORDER = {"mean": 2.15, "variance": 3.05, "skewness": 1.08, "kurtosis": -0.355, "median": 1, "minimum": 1, "p10": 1, "p90": 4, "maximum": 6,
               "interquartile_range": 3, "range": 5, "mean_absolute_deviation": 1.55, "robust_mean_absolute_deviation": 1.11,
               "median_absolute_deviation": 1.15, "coefficient_of_variation": 0.812, "quartile_dispersion": 0.6, "energy": 567, "root_mean_square": 2.77}
# columns: 2D averaged, 2D slice-merged, 2.5D direction-merged, 2.5D merged, 3D averaged, 3D merged
GLCM = """
joint_maximum 0.519 0.512 0.489 0.492 0.503 0.509
joint_average 2.14 2.14 2.2 2.2 2.14 2.15
joint_variance 2.69 2.71 3.22 3.24 3.1 3.13
joint_entropy 2.05 2.24 2.48 2.61 2.4 2.57
difference_average 1.42 1.4 1.46 1.44 1.43 1.38
difference_variance 2.9 3.06 3.11 3.23 3.06 3.21
difference_entropy 1.4 1.49 1.61 1.67 1.56 1.64
sum_average 4.28 4.29 4.41 4.41 4.29 4.3
sum_variance 5.47 5.66 7.48 7.65 7.07 7.41
sum_entropy 1.6 1.79 2.01 2.14 1.92 2.11
angular_second_moment 0.368 0.352 0.286 0.277 0.303 0.291
contrast 5.28 5.19 5.39 5.29 5.32 5.12
dissimilarity 1.42 1.4 1.46 1.44 1.43 1.38
inverse_difference 0.678 0.683 0.668 0.673 0.677 0.688
normalised_inverse_difference 0.851 0.854 0.847 0.85 0.851 0.856
inverse_difference_moment 0.619 0.625 0.606 0.613 0.618 0.631
normalised_inverse_difference_moment 0.899 0.901 0.897 0.899 0.898 0.902
inverse_variance 0.0567 0.0553 0.0597 0.0582 0.0604 0.0574
correlation -0.0121 0.0173 0.178 0.182 0.157 0.183
autocorrelation 5.09 5.14 5.4 5.45 5.06 5.19
cluster_tendency 5.47 5.66 7.48 7.65 7.07 7.41
cluster_shade 7 6.98 16.6 16.4 16.6 17.4
cluster_prominence 79.1 80.4 147 142 145 147
information_correlation_1 -0.155 -0.0341 -0.124 -0.0334 -0.157 -0.0288
information_correlation_2 0.487 0.263 0.487 0.291 0.52 0.269
"""
REFERENCE = {name: [float(v) for v in values] for name, *values in (line.split() for line in GLCM.strip().splitlines())}
MIRP_CM = ("joint_max joint_avg joint_var joint_entr diff_avg diff_var diff_entr sum_avg sum_var sum_entr energy contrast dissimilarity inv_diff inv_diff_norm inv_diff_mom "
           "inv_diff_mom_norm inv_var corr auto_corr clust_tend clust_shade clust_prom info_corr1 info_corr2").split()
BALL = np.sqrt((np.mgrid[-6:7, -6:7, -6:7] ** 2).sum(0))


def three_digits(value):
    return float(f"{value:.3g}")


@pytest.fixture(scope="module")
def levels():
    return np.array([[0 if v == "." else int(v) for v in row] for row in PHANTOM.split()]).reshape(4, 4, 5)


@pytest.fixture(scope="module")
def nodule():
    rng = np.random.default_rng(0)
    hu = -830 + np.clip(4.5 - BALL, 0, 1) * 850 + rng.normal(0, 30, BALL.shape)
    return Volume(np.rint(hu).astype(np.int16), make_affine((2.5, 1.5, 1.5)), units="HU"), BALL <= 4


# ---- the IBSI phantom -----------------------------------------------------------------------------------------------------------
def test_typed_phantom_is_the_published_file(levels):
    folder = find_data("ibsi_1_digital_phantom")
    if folder is None:
        pytest.skip("the IBSI phantom is not on this machine; remedy: MEDIMG_DATA=/path/to/data")
    image, mask = (Volume.from_nifti(folder / f"nifti/{name}.nii.gz") for name in ("image/phantom", "mask/mask"))
    assert np.array_equal(np.where(mask.array > 0, image.array, 0), levels) and image.spacing_mm == (2.0, 2.0, 2.0)


def test_first_order_equals_the_reference(levels):
    ours = first_order(levels, levels > 0)
    assert ours.keys() == FIRST_ORDER.keys()
    assert {k: three_digits(v) for k, v in ours.items()} == FIRST_ORDER


@pytest.mark.parametrize("column, aggregate", list(enumerate(AGGREGATIONS)))
def test_glcm_equals_the_reference(levels, column, aggregate):
    ours = glcm_features(levels, aggregate=aggregate)
    assert ours.keys() == REFERENCE.keys() and len(ours) == 25
    assert {k: three_digits(v) for k, v in ours.items()} == {k: v[column] for k, v in REFERENCE.items()}


# ---- MIRP -----------------------------------------------------------------------------------------------------------------------
def needs_mirp():
    return pytest.importorskip("mirp", reason="MIRP is not installed; remedy: pip install 'medimg[radiomics]'")


@pytest.mark.parametrize("settings, how", [(RadiomicSettings(bins=16, families=("statistics", "cooccurrence_matrix")), {"bins": 16}),
                                           (RadiomicSettings(spacing_mm=2.0, grey_range=(-900, 200), width=25.0, families=("statistics", "cooccurrence_matrix")),
                                            {"width": 25, "start": -900})])
def test_our_steps_equal_mirp(nodule, settings, how):
    needs_mirp()
    volume, mask = nodule
    theirs = radiomic_features(volume, mask, settings)
    if settings.spacing_mm:
        volume, mask = interpolate(volume, mask, settings.spacing_mm)
    mask = resegment(volume, mask, *(settings.grey_range or (None, None)))
    stats, texture = first_order(volume, mask), glcm_features(discretise(volume, mask, **how), aggregate="3d_volume_merge")
    stat = [v for k, v in theirs.items() if k.startswith("stat_")]
    assert len(stat) == len(stats) == 18 and np.allclose(list(stats.values()), stat, rtol=2e-6)
    for (name, value), tag in zip(texture.items(), MIRP_CM, strict=True):
        (found,) = [v for k, v in theirs.items() if k.startswith(f"cm_{tag}_d1_3d_v_mrg_")]
        assert np.isclose(value, found, rtol=1e-6, atol=1e-9), name


def test_interpolation_equals_mirps_own(nodule):
    mirp = needs_mirp()
    volume, mask = nodule
    import tempfile
    from pathlib import Path
    with tempfile.TemporaryDirectory() as folder:
        paths = [str(v.to_nifti(Path(folder) / f"{name}.nii")) for name, v in (("i", volume.with_array(volume.array.astype(np.float32))),
                                                                           ("m", volume.with_array(mask.astype(np.uint8))))]
        row = mirp.extract_features(image=paths[0], mask=paths[1], image_modality="ct", base_feature_families=["statistics"], new_spacing=1.2, spline_order=1,
                                    anti_aliasing=False)[0].iloc[0]
    ours = first_order(*interpolate(volume, mask, 1.2))
    assert np.allclose([ours["mean"], ours["variance"], ours["minimum"]], [row["stat_mean"], row["stat_var"], row["stat_min"]], rtol=1e-5)


def test_full_set_is_finite_named_and_geometric(nodule):
    needs_mirp()
    import logging
    before = logging.getLogger().handlers[:], logging.getLogger().level, logging.root.manager.disable
    volume, mask = nodule
    row = radiomic_features(volume, mask)
    assert len(row) > 120 and np.isfinite(list(row.values())).all()
    assert abs(row["morph_volume"] / (mask.sum() * 2.5 * 1.5 * 1.5) - 1) < 0.1
    assert (logging.getLogger().handlers[:], logging.getLogger().level, logging.root.manager.disable) == before
    turned = Volume(volume.array, make_affine((2.5, 1.5, 1.5), origin_mm=(50, -20, 7)), units="HU")
    assert radiomic_features(turned, mask, RadiomicSettings(families=("statistics",)))["stat_mean"] == row["stat_mean"]


def test_missing_mirp_is_a_typed_error(nodule, monkeypatch):
    import sys
    monkeypatch.setitem(sys.modules, "mirp", None)
    with pytest.raises(ConfigError, match=r"medimg\[radiomics\]"):
        radiomic_features(*nodule)


# ---- bad input ------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("function", [first_order, discretise, features_28, lambda a, m: radiomic_features(Volume(a), m)])
@pytest.mark.parametrize("image, mask, error", [
    (BALL, np.zeros(BALL.shape), DatasetError), (BALL, BALL[1:] > 0, GeometryError), (BALL * 0 + 3, BALL > 2, DatasetError),
    (np.where(BALL == 0, np.nan, BALL), BALL < 3, DatasetError), (np.where(BALL == 0, np.inf, BALL), BALL < 3, DatasetError)])
def test_bad_regions(function, image, mask, error):
    with pytest.raises(error):
        function(image, mask, bins=8) if function is discretise else function(image, mask)


def test_a_mask_elsewhere_is_refused(nodule):
    volume, mask = nodule
    other = Volume(mask.astype(np.uint8), make_affine((2.5, 1.5, 1.5), origin_mm=(5, 0, 0)))
    for function in (features_28, first_order, radiomic_features, lambda v, m: interpolate(v, m, 2.0)):
        with pytest.raises(GeometryError, match="apart"):
            function(volume, other)
    tilted = np.array(volume.affine)
    tilted[1, 0] = 1.0
    with pytest.raises(GeometryError, match="tilt"):
        interpolate(Volume(volume.array, tilted), mask, 2.0)


def test_nan_outside_the_mask_is_allowed():
    image = np.where(BALL > 5.5, np.nan, BALL)
    assert np.isfinite(features_28(image, BALL < 4)).all()


@pytest.mark.parametrize("make", [lambda: RadiomicSettings(bins=8, width=5.0), lambda: RadiomicSettings(width=5.0), lambda: RadiomicSettings(families=("glcm2",)),
                                  lambda: RadiomicSettings(grey_range=(3, 1)), lambda: discretise(BALL), lambda: discretise(BALL, bins=1),
                                  lambda: discretise(BALL, width=1e-9), lambda: glcm(BALL), lambda: glcm(np.ones((3, 3), int), aggregate="4d"),
                                  lambda: features_28(BALL, spacing_mm=-1), lambda: interpolate(Volume(BALL), BALL > 1, 0)])
def test_bad_settings(make):
    with pytest.raises(ConfigError):
        make()


def test_no_neighbours_and_batches():
    lonely = np.zeros((3, 3, 3), int)
    lonely[0, 0, 0], lonely[2, 2, 2] = 1, 2
    with pytest.raises(DatasetError, match="neighbours"):
        glcm(lonely)
    with pytest.raises(DatasetError, match="image 1: the mask is empty"):
        table_28([BALL, BALL], [BALL < 3, BALL < -1])
    with pytest.raises(GeometryError, match="1 masks for 2"):
        table_28([BALL, BALL], [BALL < 3])


# ---- properties -----------------------------------------------------------------------------------------------------------------
def test_glcm_against_scikit_image():
    from skimage.feature import graycomatrix, graycoprops
    a = np.random.default_rng(1).integers(0, 6, (12, 15)).astype(np.uint8)
    theirs = graycomatrix(a, [1], [0], levels=6, symmetric=True, normed=True)
    from medimg.models.texture import _counts, _directions, _one_table
    p = _counts(a[None].astype(int) + 1, True)[_directions(True).index((0, 0, 1)), 0]
    assert np.allclose(p / p.sum(), theirs[:, :, 0, 0])
    ours = _one_table(p / p.sum())
    for name, prop in (("contrast", "contrast"), ("dissimilarity", "dissimilarity"), ("inverse_difference_moment", "homogeneity"), ("angular_second_moment", "ASM"), ("correlation", "correlation")):
        assert np.isclose(ours[name], graycoprops(theirs, prop)[0, 0])


def test_texture_does_not_depend_on_axes_order_or_unit():
    a = np.random.default_rng(2).normal(size=(7, 8, 9))
    first = glcm_features(discretise(a, bins=8))
    for other in (a.transpose(2, 1, 0), a[::-1], 5 * a + 100):
        assert np.allclose(list(glcm_features(discretise(other, bins=8)).values()), list(first.values()))


def test_features_28_names_geometry_and_kinds(nodule):
    volume, mask = nodule
    row = dict(zip(FEATURES_28, features_28(volume, mask)))
    assert len(FEATURES_28) == 28 == len(set(FEATURES_28)) and features_28(volume, mask).dtype == np.float32
    voxel = 2.5 * 1.5 * 1.5
    assert np.isclose(row["diameter_mm"], (6 * mask.sum() * voxel / np.pi) ** (1 / 3), rtol=1e-5)
    assert np.isclose(row["mean"], volume.array[mask].mean(), rtol=1e-5) and row["rim_contrast"] > 400
    twice = dict(zip(FEATURES_28, features_28(np.asarray(volume.array), mask, spacing_mm=(5.0, 3.0, 3.0))))
    assert np.isclose(twice["diameter_mm"], 2 * row["diameter_mm"], rtol=1e-5) and np.isclose(twice["edge"], row["edge"] / 2, rtol=1e-5)
    assert np.isclose(twice["compactness"], row["compactness"], rtol=1e-5)
    assert features_28(np.random.default_rng(0).random((9, 9))).shape == (28,)


def test_disc_and_ball_are_compact():
    y, x = np.mgrid[-20:21, -20:21]
    noise = np.random.default_rng(0).normal(size=y.shape)
    k, e = FEATURES_28.index("compactness"), FEATURES_28.index("elongation")
    disc, bar = features_28(noise, x**2 + y**2 <= 250), features_28(noise, (abs(y) <= 2) & (abs(x) <= 15))
    assert disc[k] > 0.99 and disc[e] > 0.98 and bar[k] < 0.6 and bar[e] < 0.2


def test_interpolation_keeps_place_and_size(nodule):
    volume, mask = nodule
    new, inside = interpolate(volume, mask, 1.0)
    assert abs(inside.sum() / (mask.sum() * 2.5 * 1.5**2) - 1) < 0.15
    middle = [v.world(np.argwhere(m).mean(0)) for v, m in ((volume, mask), (new, inside))]
    assert np.linalg.norm(middle[0] - middle[1]) < 0.3 and np.array_equal(new.array, np.rint(new.array))
    with pytest.raises(DatasetError, match="nothing of the mask"):
        interpolate(volume, BALL < 0.5, 9.0)


def test_single_slice_goes_through_mirp():
    needs_mirp()
    flat = Volume(np.random.default_rng(0).normal(size=(1, 16, 16)).astype(np.float32), make_affine((1, 0.5, 0.5)))
    row = radiomic_features(flat, np.ones((1, 16, 16)), RadiomicSettings(families=("statistics", "cooccurrence_matrix")))
    assert any("2d" in k or "2.5d" in k for k in row) and set(FAMILIES) >= {"statistics"}


# ---- patterns -------------------------------------------------------------------------------------------------------------------
def test_gabor_equals_scikit_image():
    from skimage.filters import gabor
    a = np.random.default_rng(3).random((40, 44))
    scaled = (a - a.min()) / np.ptp(a)
    scaled -= scaled.mean()
    theirs = [np.hypot(*gabor(scaled, 1 / w, theta=np.pi * k / 4, mode="reflect")).mean() for w in (3, 6, 12) for k in range(4)]
    assert np.allclose(gabor_energy(a), theirs, atol=1e-10)


def test_patterns_shapes_and_invariance():
    a = np.random.default_rng(4).random((30, 33))
    m = np.zeros(a.shape, bool)
    m[5:20, 6:25] = True
    assert table_patterns([a, a], [m, m]).shape == (2, len(PATTERNS)) and len(PATTERNS) == 54
    assert np.allclose(lbp_histogram(a, m), lbp_histogram(7 * a - 3, m)) and np.isclose(lbp_histogram(a, m).sum(), 1)
    assert hog_vector(a[:5, :5]).shape == (32,) and np.isfinite(hog_vector(a[:5, :5])).all()
    with pytest.raises(GeometryError, match="volume"):
        table_patterns([BALL])
    with pytest.raises(DatasetError, match="image 0"):
        table_patterns([a * 0])


# ---- cardiothoracic ratio -------------------------------------------------------------------------------------------------------
def test_ratio_of_phantoms_is_biased_but_steady():
    people = [draw_anatomy(900 + k) for k in range(5)]
    truth = np.array([cardiothoracic_ratio(*phantom_silhouettes(p, 96)) for p in people])
    found = np.array([measure_heart(radiograph(p, size=96)[0].array[0], FIELD_MM / 96)["ratio"] for p in people])
    assert (truth > 0.38).all() and (truth < 0.6).all()
    assert -0.13 < (found - truth).mean() < -0.04 and (found - truth).std() < 0.03


def test_silhouettes_agree_with_the_labels_of_the_ct():
    from medimg.data.phantom import LABELS, thorax_phantom
    person = draw_anatomy(4)
    case = thorax_phantom(person, shape=(70, 88, 88), spacing_mm=(4, 4, 4), nodules=0, dose=None)
    heart = (case.labels == LABELS["heart"]).any(axis=(0, 1))
    columns = np.flatnonzero(phantom_silhouettes(person, 88)[0].any(axis=0))
    assert abs((np.ptp(np.flatnonzero(heart)) + 1) - (np.ptp(columns) + 1)) <= 2


@pytest.mark.parametrize("image", [np.zeros((64, 64)), np.full((64, 64), np.nan), np.random.default_rng(0).random((3, 8, 8))])
def test_what_is_no_radiograph(image):
    with pytest.raises(MedimgError):
        lung_fields(image, 5.0)
    with pytest.raises(MedimgError):
        region(np.zeros((2, 2)), None)
