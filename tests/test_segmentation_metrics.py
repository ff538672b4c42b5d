"""Contours, surfaces, volumes and lesions against MONAI's numbers, SimpleITK, scipy, brute force, and what must hold at the edges."""
import itertools
import warnings

import numpy as np
import pytest
import SimpleITK as sitk
from scipy import ndimage, spatial
from scipy.spatial.distance import cdist

from medimg.data.volume import Volume, make_affine
from medimg.errors import ConfigError, DatasetError, GeometryError
from medimg.evaluation import segmentation
from medimg.evaluation.segmentation import dice, evaluate_masks, hausdorff95, surface_distances
from medimg.evaluation.surfaces import evaluate_segmentation, iou, lesion_scores, panoptic_quality, surface_scores, volume_error


def ball(centre, radius, shape, spacing=(1.0, 1.0, 1.0)):
    axes = np.ogrid[tuple(slice(0, n) for n in shape)]
    return sum(((x - c) * s) ** 2 for x, c, s in zip(axes, centre, spacing)) <= radius**2


def blobs(shape, seed, sigma=2.0):
    return ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=shape), sigma) > 0.02


def cases():
    """Name -> mask, truth, spacing_mm, tolerance_mm: what benchmarks/evaluation/surfaces.py --values asks MONAI about."""
    thick, one = (3.0, 0.8, 0.7), np.zeros((6, 7, 8), bool)
    one[2, 3, 4] = True
    border = np.zeros((8, 10, 12), bool)
    border[:3, :, 5:] = True
    return {
        "moved ball": (ball((8, 10, 11), 8, (16, 22, 24), thick), ball((9, 12, 10), 8, (16, 22, 24), thick), thick, 1.5),
        "blobs": (blobs((12, 20, 18), 1), blobs((12, 20, 18), 2), (2.5, 1.0, 0.6), 1.0),
        "plane": (blobs((40, 30), 3), blobs((40, 30), 4), (0.5, 2.0), 1.0),
        "single voxels": (np.roll(one, (1, -2), (0, 2)), one, thick, 1.0),
        "at the border": (border, np.roll(border, 1, 0), (2.0, 1.0, 1.0), 1.0),
        "identical": (blobs((10, 11, 12), 5), blobs((10, 11, 12), 5), thick, 0.5),
        "nested": (ball((10, 10, 10), 9, (21, 21, 21)), ball((10, 10, 10), 3, (21, 21, 21)), (1.0, 1.0, 1.0), 6.0),
        "noise": (np.random.default_rng(6).random((12, 14, 16)) > 0.9, blobs((12, 14, 16), 7), (1.0, 1.5, 2.0), 2.0),
    }


# MONAI 1.6.1 on PyTorch 2.13.0: HD, HD95, symmetric ASD, surface Dice by voxels, surface Dice by areas, IoU, Dice
MONAI = {
    "moved ball": [3.47131109, 3.1827662, 1.80824113, 0.403225809, 0.606282294, 0.518213868, 0.682662547],
    "blobs": [8.84081459, 4.75499725, 1.53448379, 0.461915135, 0.534714222, 0.225186348, 0.367595255],
    "plane": [6.94622183, 4.5, 1.3823384, 0.572033882, 0.607701838, 0.267250836, 0.421780467],
    "single voxels": [3.31058908, 3.31058908, 3.31058908, 0.0, 0.25, 0.0, 0.0],
    "at the border": [2.0, 2.0, 1.16470587, 0.482352942, 0.621710956, 0.5, 0.666666687],
    "identical": [0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 1.0],
    "nested": [6.3245554, 6.3245554, 5.75820351, 0.837104082, 0.951619923, 0.040052101, 0.0770194083],
    "noise": [10.3923044, 7.27284431, 2.09042883, 0.60071516, 0.815019131, 0.0732394382, 0.136482939],
}


def pair(name):
    return cases()[name]


# ---- other programs ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", cases())
def test_equals_monai(name):
    a, b, spacing, tolerance = pair(name)
    hd, hd95, assd, nsd, _, overlap, twice = MONAI[name]
    ours = surface_scores(a, b, spacing, tolerance_mm=tolerance)
    assert np.allclose(ours, (hd, hd95, assd, nsd), rtol=1e-6, atol=1e-6)
    assert np.allclose((iou(a, b), dice(a, b)), (overlap, twice), atol=1e-6) and hausdorff95(a, b, spacing) == ours.hd95


def test_areas_and_voxels_differ_only_by_convention():
    """MONAI's second surface Dice weighs each piece of surface with its area. On the moved ball of thick slices it is another number; both are 1 for identical masks."""
    assert abs(MONAI["moved ball"][3] - MONAI["moved ball"][4]) > 0.01 and MONAI["identical"][3] == MONAI["identical"][4] == 1


def images(a, b, spacing):
    made = [sitk.GetImageFromArray(m.astype("uint8")) for m in (a, b)]
    for image in made:
        image.SetSpacing([float(s) for s in spacing[::-1]])
    return made


@pytest.mark.parametrize("name", cases())
def test_overlap_equals_simpleitk(name):
    a, b, spacing, _ = pair(name)
    measure = sitk.LabelOverlapMeasuresImageFilter()
    measure.Execute(*images(a, b, spacing))
    assert abs(dice(a, b) - measure.GetDiceCoefficient()) <= 1e-12 and abs(iou(a, b) - measure.GetJaccardCoefficient()) <= 1e-12
    ml, share = volume_error(a, b, spacing)
    assert np.isclose(ml, np.prod(spacing) * (int(a.sum()) - int(b.sum())) / 1000) and np.isclose(share / (1 + share / 2), measure.GetVolumeSimilarity())


@pytest.mark.parametrize("name", ["moved ball", "single voxels", "at the border", "identical"])
def test_hausdorff_equals_simpleitk(name):
    a, b, spacing, _ = pair(name)
    measure = sitk.HausdorffDistanceImageFilter()
    measure.Execute(*images(a, b, spacing))
    assert surface_scores(a, b, spacing).hd == pytest.approx(measure.GetHausdorffDistance(), rel=1e-12, abs=0)


@pytest.mark.parametrize("seed", range(12))
def test_simpleitk_and_we_agree_with_a_k_d_tree_in_double_precision(seed):
    """Random blobs and odd spacings: SimpleITK between the sets, we between the surfaces, both against brute force over points."""
    rng = np.random.default_rng(seed)
    a, b = (ndimage.gaussian_filter(rng.normal(size=(16, 20, 18)), 2.0) > 0.05 for _ in range(2))
    spacing = tuple(rng.uniform(0.3, 5, 3))
    measure = sitk.HausdorffDistanceImageFilter()
    measure.Execute(*images(a, b, spacing))
    rims = [m & ~ndimage.binary_erosion(m) for m in (a, b)]
    for masks, value in (((a, b), measure.GetHausdorffDistance()), (rims, surface_scores(a, b, spacing).hd)):
        p, q = (np.argwhere(m) * spacing for m in masks)
        assert value == pytest.approx(max(spatial.cKDTree(q).query(p)[0].max(), spatial.cKDTree(p).query(q)[0].max()), rel=1e-12)


def test_simpleitk_measures_between_sets():
    """SimpleITK asks how far each voxel of one *set* is from the other set, voxels inside included; we ask surfaces.

    For a ball within a ball both are the gap between the surfaces. A full ball against the same ball with a hollow: SimpleITK's distance is that of the centre from the
    shell; for us the hollow is a surface that the full ball lacks, so the way from it to the full ball's surface counts.
    """
    a, b, spacing, _ = pair("nested")
    measure = sitk.HausdorffDistanceImageFilter()
    measure.Execute(*images(a, b, spacing))
    assert surface_scores(a, b, spacing).hd == pytest.approx(measure.GetHausdorffDistance(), rel=1e-12)
    full = ball((10, 10, 10), 9, (21, 21, 21))
    shell = full & ~ball((10, 10, 10), 5, (21, 21, 21))
    measure.Execute(*images(full, shell, spacing))
    there, back = surface_distances(full, shell, spacing)
    assert there.max() == 0 and measure.GetHausdorffDistance() > 5              # every voxel of the full ball's surface is on the shell's
    sets = ndimage.distance_transform_edt(~shell)[full].max()
    assert measure.GetHausdorffDistance() == pytest.approx(sets, rel=1e-12) and surface_scores(full, shell).hd == back.max()


# ---- brute force ---------------------------------------------------------------------------------------------------------------
def edge(mask):
    return mask & ~ndimage.binary_erosion(mask)


def by_map(a, b, spacing):
    a, b = edge(a), edge(b)
    return ndimage.distance_transform_edt(~b, sampling=spacing)[a], ndimage.distance_transform_edt(~a, sampling=spacing)[b]


@pytest.mark.parametrize("seed", range(60))
def test_random_masks_equal_a_distance_map(seed):
    rng = np.random.default_rng(seed)
    shape = rng.integers(1, 22, 2 + seed % 2)
    spacing = np.exp(rng.normal(0, 3.0 if seed % 5 == 0 else 0.7, len(shape)))
    a, b = (blobs(shape, 10 * seed + k) if seed % 3 else rng.random(shape) < rng.choice([0.003, 0.05, 0.5, 0.97]) for k in (0, 1))
    a.ravel()[0], b.ravel()[-1] = True, True
    for ours, theirs in zip(surface_distances(a, b, spacing), by_map(a, b, spacing)):
        assert np.allclose(ours, theirs, rtol=1e-12)


@pytest.mark.parametrize("near", [1, 7, 10_000])
def test_near_steps_tree_and_map_agree(monkeypatch, near):
    a, b, spacing, _ = pair("blobs")
    a = a | ball((2, 2, 2), 1, a.shape)
    monkeypatch.setattr(segmentation, "_NEAR", near)
    whole = surface_distances(a, b, spacing)
    assert all(np.allclose(x, y) for x, y in zip(whole, by_map(a, b, spacing)))
    far = cdist(np.argwhere(edge(a)) * spacing, np.argwhere(edge(b)) * spacing)
    assert np.allclose(whole[0], far.min(1)) and np.allclose(whole[1], far.min(0))


def test_far_apart_goes_to_the_tree(monkeypatch):
    a, b = ball((5, 5, 5), 3, (90, 90, 90)), ball((80, 80, 80), 4, (90, 90, 90))
    monkeypatch.setattr(ndimage, "distance_transform_edt", None)
    far = cdist(np.argwhere(edge(a)), np.argwhere(edge(b)))
    assert np.allclose(surface_distances(a, b)[0], far.min(1)) and surface_scores(a, b).hd == max(far.min(1).max(), far.min(0).max())


# ---- what must hold ------------------------------------------------------------------------------------------------------------
def test_scores_scale_with_the_spacing_and_turn_around():
    a, b, spacing, tolerance = pair("moved ball")
    one, two = surface_scores(a, b, spacing, tolerance_mm=tolerance), surface_scores(b, a, np.multiply(spacing, 2), tolerance_mm=2 * tolerance)
    assert np.allclose(two, (2 * one.hd, 2 * one.hd95, 2 * one.assd, one.nsd))
    wide = tuple(np.pad(m, 3) for m in (a, b))
    assert np.allclose(surface_scores(*wide, spacing, tolerance_mm=tolerance), one)
    assert surface_scores(Volume(a, make_affine(spacing)), Volume(b, make_affine(spacing)), tolerance_mm=tolerance) == one


def test_masks_are_not_changed():
    a, b, spacing, _ = pair("blobs")
    before = a.copy(), b.copy()
    surface_scores(a, b, spacing), lesion_scores(a, b), panoptic_quality(a, b)
    assert (a == before[0]).all() and (b == before[1]).all()


def test_tolerance_is_inclusive_and_monotone():
    a, b = np.zeros((1, 9), bool), np.zeros((1, 9), bool)
    a[0, 2], b[0, 5] = True, True
    assert [surface_scores(a, b, (1, 0.5), tolerance_mm=t).nsd for t in (0, 1.49, 1.5, 9)] == [0, 0, 1, 1]


NOTHING, SOME = np.zeros((30, 40), bool), np.zeros((30, 40), bool)
SOME[3:5, 3:5] = True


@pytest.mark.parametrize("a, b, wanted", [(NOTHING, NOTHING, (1, 1, 0, 0, 0, 1, 0, np.nan, np.nan, np.nan, np.nan)), (NOTHING, SOME, (0, 0, 50, 50, 50, 0, -0.004, -1, 0, np.nan, 0)),
                                          (SOME, NOTHING, (0, 0, 50, 50, 50, 0, 0.004, np.nan, np.nan, 0, 0)), (SOME, SOME, (1, 1, 0, 0, 0, 1, 0, 0, 1, 1, 1))])
def test_empty_masks_follow_the_table(a, b, wanted):
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        volume = volume_error(a, b)
    assert len(said) == int(not b.any()) and all("truth is empty" in str(w.message) for w in said)
    lesion = lesion_scores(a, b)
    row = dice(a, b), iou(a, b), *surface_scores(a, b), *volume, lesion.sensitivity, lesion.precision, panoptic_quality(a, b).pq
    assert np.allclose(row, wanted, equal_nan=True)


BAD = {"grids": (lambda a: surface_scores(a, a[:-1]), GeometryError, "resample"), "grids, lesions": (lambda a: lesion_scores(a, a[:-1]), GeometryError, "resample"),
       "grids, instances": (lambda a: panoptic_quality(a, a[:-1]), GeometryError, "resample"), "NaN": (lambda a: iou(np.where(a, np.nan, 0.0), a), DatasetError, "threshold"),
       "probabilities": (lambda a: volume_error(a * 0.5, a), DatasetError, "threshold"), "rank": (lambda a: surface_scores(a[0], a[0]), DatasetError, "one case"),
       "spacing": (lambda a: surface_scores(a, a, (1, 0)), ConfigError, "spacing_mm"), "spacing NaN": (lambda a: lesion_scores(a, a, (1, np.nan)), ConfigError, "spacing_mm"),
       "tolerance": (lambda a: surface_scores(a, a, tolerance_mm=np.nan), ConfigError, "0 or more"), "share": (lambda a: lesion_scores(a, a, least_share=1), ConfigError, "below 1"),
       "limit": (lambda a: panoptic_quality(a, a, least_iou=0.4), ConfigError, "two lesions"), "floats": (lambda a: panoptic_quality(a * 1.0, a), DatasetError, "instance"),
       "negative": (lambda a: panoptic_quality(a * -1, a), DatasetError, "instance"), "no cases": (lambda a: evaluate_segmentation([], []), DatasetError, "one of each"),
       "one too many": (lambda a: evaluate_segmentation([a], [a, a]), DatasetError, "one of each"), "groups": (lambda a: evaluate_segmentation([a], [a], groups=[1, 2]), ConfigError, "id"),
       "spacings": (lambda a: evaluate_segmentation([a, a], [a, a], [(1, 1)]), ConfigError, "one for each")}


@pytest.mark.parametrize("name", BAD)
def test_wrong_input_is_refused(name):
    call, kind, said = BAD[name]
    with pytest.raises(kind, match=said):
        call(np.eye(6, dtype=bool))


# ---- lesions -------------------------------------------------------------------------------------------------------------------
def test_lesions_by_hand():
    truth = np.zeros((8, 20), int)
    truth[1:3, 1:5], truth[1:3, 8:10], truth[5:7, 15:18] = 1, 1, 1              # 8, 4 and 6 voxels
    mask = np.zeros_like(truth)
    mask[1:3, 1:3], mask[1:3, 9:12], mask[6, 0:2] = 1, 1, 1                     # half of the first, half of the second and outside, a false alarm
    got = lesion_scores(mask, truth, (2.0, 0.5))
    assert got.covered.tolist() == [0.5, 0.5, 0] and got.found.tolist() == [True, True, False] and np.allclose(got.volume_ml, [0.008, 0.004, 0.006])
    assert (got.pieces, got.false_alarms, got.sensitivity, got.precision) == (3, 1, 2 / 3, 2 / 3)
    assert lesion_scores(mask, truth, least_share=0.5).found.sum() == 0 and lesion_scores(mask, truth, least_share=0.49).found.sum() == 2


def test_one_piece_over_two_lesions_finds_both_and_corners_can_part():
    truth = np.array([[1, 0, 1], [0, 0, 0], [0, 1, 0]])
    got = lesion_scores(np.ones_like(truth), truth)
    assert (got.sensitivity, got.pieces, got.precision) == (1, 1, 1) and panoptic_quality(np.ones((3, 3), bool), truth > 0).pq == 0
    diagonal = np.eye(3, dtype=bool)
    assert lesion_scores(diagonal, diagonal).pieces == 1 and lesion_scores(diagonal, diagonal, corners=False).pieces == 3


def slow_panoptic(a, b):
    matched, seen = [], set()
    for i, j in itertools.product(set(a.ravel()) - {0}, set(b.ravel()) - {0}):
        x = ((a == i) & (b == j)).sum() / ((a == i) | (b == j)).sum()
        if x > 0.5:
            assert i not in seen
            seen.add(i)
            matched.append(x)
    n = len(set(a.ravel()) - {0}) + len(set(b.ravel()) - {0})
    return sum(matched) / (n / 2) if n else np.nan


@pytest.mark.parametrize("seed", range(12))
def test_panoptic_quality_equals_a_loop(seed):
    rng = np.random.default_rng(seed)
    b = rng.integers(0, 4, (6, 7)).repeat(3, 0).repeat(3, 1) * rng.choice([1, 1000])
    a = np.where(rng.random(b.shape) < 0.1 * (seed % 4), rng.integers(0, 5, b.shape), np.roll(b, seed % 3, 0) * 7)
    assert panoptic_quality(a, b).pq == pytest.approx(slow_panoptic(a, b), abs=1e-12, nan_ok=True)
    assert panoptic_quality(b, b).pq == panoptic_quality(b + 1, b + 1).pq == 1


# ---- many cases ----------------------------------------------------------------------------------------------------------------
def test_report_over_cases():
    masks = [SOME, NOTHING, NOTHING, SOME | np.roll(SOME, 9, 1)]
    truths = [SOME, SOME, NOTHING, SOME]
    report = evaluate_segmentation(masks, truths, n_boot=100)
    table = evaluate_masks(masks, truths)
    assert report["dice"].value == table["dice"].mean() and report["hd95"].value == table["hd95"].mean() and (report["missed"], report["invented"]) == (1, 0)
    assert report["lesion_sensitivity"].value == 2 / 3 and report["lesion_sensitivity"].n == 3 and report["lesion_precision"].value == 2 / 3 and report["false_alarms"].value == 0.25
    assert (report["volume_error"].value, report["volume_error"].n) == (pytest.approx((0 + 1 + 1) / 3), 3) and report["pq"].n == 3
    assert all(one.low <= one.value <= one.high for one in report.values() if hasattr(one, "low")) and "4 cases" in report["dice"].method
    assert "2 patients" in evaluate_segmentation(masks, truths, groups=["a", "a", "b", "b"], n_boot=20)["dice"].method


def test_a_report_without_lesions_says_so():
    with pytest.warns(UserWarning, match="lesion_sensitivity is not defined"):
        report = evaluate_segmentation([NOTHING] * 3, [NOTHING] * 3, n_boot=20)
    assert np.isnan(report["lesion_sensitivity"].value) and report["lesion_sensitivity"].n == 0 and report["dice"].value == 1


def test_interval_covers_more_when_patients_are_alike():
    rng = np.random.default_rng(0)
    shift = np.repeat(rng.integers(0, 6, 12), 5)
    truths = [ball((15, 20), 8, (30, 40), (1, 1))] * 60
    masks = [np.roll(t, s, 1) for t, s in zip(truths, shift)]
    width = [np.subtract(*(getattr(evaluate_segmentation(masks, truths, groups=g, n_boot=300)["dice"], end) for end in ("high", "low"))) for g in (None, np.repeat(np.arange(12), 5))]
    assert width[1] > 1.5 * width[0]
