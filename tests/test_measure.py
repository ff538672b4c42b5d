"""Measuring nodules: against balls and ellipsoids drawn analytically, on any grid and in any orientation, and against the phantom's truth."""
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medimg.data.volume import Volume, make_affine
from medimg.deployment.guidelines import guideline_named
from medimg.deployment.measure import KINDS, lung_shift, lungs_middle, match_nodules, measure_nodule, outline_nodule, slice_axes, volume_doubling_days, with_growth
from medimg.deployment.prediction import Finding, Prediction
from medimg.deployment.recommend import change_since
from medimg.errors import ConfigError, DatasetError

LUNG = -840.0


def drawn(spacing, semi_mm, *, turn_deg=0.0, hu=30.0, core_mm=0.0, noise=0.0, vessel=False, wall=False, centre=(3.3, -2.1, 1.7), size_mm=50, fine=3):
    """(volume, lungs): an ellipsoid of semi-axes (x, y, z) turned about z, each voxel the mean of fine³ samples: nothing of the phantom's code."""
    shape = [int(size_mm / s) for s in spacing]
    affine = make_affine(spacing, origin_mm=[-(n - 1) / 2 * s for n, s in zip(shape[::-1], spacing[::-1])])
    axes = [(np.arange(n * fine) + 0.5) / fine - 0.5 for n in shape]
    z, y, x = (a * s - (n - 1) / 2 * s for a, s, n in zip(axes, spacing, shape))
    x, y, z = x[None, None] - centre[0], y[None, :, None] - centre[1], z[:, None, None] - centre[2]
    c, s = np.cos(np.deg2rad(turn_deg)), np.sin(np.deg2rad(turn_deg))
    array = np.where(((x * c + y * s) / semi_mm[0]) ** 2 + ((y * c - x * s) / semi_mm[1]) ** 2 + (z / semi_mm[2]) ** 2 <= 1, np.float32(hu), np.float32(LUNG))
    if core_mm:
        array[np.broadcast_to(x**2 + y**2 + z**2 <= (core_mm / 2) ** 2, array.shape)] = 30.0
    if vessel:
        array[np.broadcast_to((np.abs(y) < 1.2) & (np.abs(z) < 1.2), array.shape)] = 40.0
    wall_at = semi_mm[0] - 1.0
    if wall:
        array[np.broadcast_to(x > wall_at, array.shape)] = 40.0
    array = array.reshape(shape[0], fine, shape[1], fine, shape[2], fine).mean((1, 3, 5))
    array += np.random.default_rng(0).normal(0, noise, array.shape) if noise else 0
    lungs = np.ones(shape, np.uint8)
    if wall:
        lungs[..., (np.arange(shape[2]) - (shape[2] - 1) / 2) * spacing[2] - centre[0] > wall_at] = 0
    return Volume(np.rint(array).astype(np.int16), affine, modality="CT", units="HU"), lungs


CENTRE = (3.3, -2.1, 1.7)


@pytest.mark.parametrize("spacing", [(1.0, 0.7, 0.7), (1.5, 1.5, 1.5), (2.5, 0.8, 0.8), (1.25, 0.6, 0.9)])
@pytest.mark.parametrize("diameter", [5.0, 8.0, 15.0, 28.0])
def test_a_solid_ball(spacing, diameter):
    volume, lungs = drawn(spacing, (diameter / 2,) * 3)
    found = measure_nodule(volume, np.add(CENTRE, (1.0, -0.7, 0.5)), diameter * 1.2, kind="solid", lungs=lungs)
    assert abs(found.mean_diameter_mm - diameter) < 0.3 + 0.35 * max(spacing)
    assert abs(found.volume_mm3 / (np.pi / 6 * diameter**3) - 1) < (0.16 if diameter < 6 else 0.1)
    assert np.linalg.norm(np.subtract(found.centroid_mm, CENTRE)) < 0.6
    assert found.slice == round(volume.index(CENTRE)[0]) or abs(found.slice - volume.index(CENTRE)[0]) <= 1


@pytest.mark.parametrize("turn", [0, 30, 45, 110])
@pytest.mark.parametrize("semi", [(10, 5, 6), (8, 6, 8), (6, 3.5, 4)])
def test_axes_of_an_ellipsoid(semi, turn):
    volume, lungs = drawn((1.0, 0.8, 0.8), semi, turn_deg=turn)
    found = measure_nodule(volume, CENTRE, 2 * np.mean(semi), kind="solid", lungs=lungs)
    assert abs(found.long_axis_mm - 2 * semi[0]) < 0.9 and abs(found.short_axis_mm - 2 * semi[1]) < 0.9
    assert found.mean_diameter_mm == pytest.approx((found.long_axis_mm + found.short_axis_mm) / 2, abs=0.01)
    assert abs(found.volume_mm3 / (4 / 3 * np.pi * np.prod(semi)) - 1) < 0.15


@pytest.mark.parametrize("hu", [-620.0, -500.0])
@pytest.mark.parametrize("diameter", [8.0, 14.0])
def test_ground_glass_has_its_own_level(hu, diameter):
    volume, lungs = drawn((1.25, 0.8, 0.8), (diameter / 2,) * 3, hu=hu, noise=15)
    found = measure_nodule(volume, CENTRE, diameter, lungs=lungs)
    assert found.type == "ground-glass" and found.solid_diameter_mm is None and abs(found.mean_diameter_mm - diameter) < 1.5
    assert measure_nodule(volume, CENTRE, diameter, kind="solid", lungs=lungs).volume_mm3 is None or hu > -600


def test_the_solid_part():
    volume, lungs = drawn((1.0, 0.7, 0.7), (8, 8, 8), hu=-600.0, core_mm=8.0, noise=10)
    found = measure_nodule(volume, CENTRE, 15.0, lungs=lungs)
    assert found.type == "part-solid" and abs(found.solid_diameter_mm - 8) < 1 and abs(found.mean_diameter_mm - 16) < 1.2


def test_a_vessel_is_cut_off():
    with_one, lungs = drawn((1.0, 0.7, 0.7), (5, 5, 5), vessel=True)
    without, _ = drawn((1.0, 0.7, 0.7), (5, 5, 5))
    a, b = (measure_nodule(v, CENTRE, 10.0, kind="solid", lungs=lungs) for v in (with_one, without))
    assert abs(a.volume_mm3 / b.volume_mm3 - 1) < 0.2 and a.long_axis_mm < b.long_axis_mm + 2.5


def test_the_chest_wall_is_kept_out():
    volume, lungs = drawn((1.0, 0.7, 0.7), (6, 6, 6), wall=True)
    found = measure_nodule(volume, CENTRE, 11.0, kind="solid", lungs=lungs)
    assert found.long_axis_mm < 14 and found.volume_mm3 < 1.25 * np.pi / 6 * 12**3


@pytest.mark.parametrize("code", ["SPL", "IAR", "SAR", "IPL"])
def test_orientation_changes_nothing(code):
    volume, lungs = drawn((1.25, 0.8, 0.8), (6, 4, 5), turn_deg=25)
    turned = volume.reorient(code)
    mask = volume.with_array(lungs).reorient(code).array
    a, where = outline_nodule(turned, CENTRE, 10.0, kind="solid", lungs=mask)
    b, reference = outline_nodule(volume, CENTRE, 10.0, kind="solid", lungs=lungs)
    assert a.mean_diameter_mm == pytest.approx(b.mean_diameter_mm, abs=0.3) and np.linalg.norm(np.subtract(a.centroid_mm, b.centroid_mm)) < 0.3
    assert where.shape == turned.shape and abs(int(where.sum()) - int(reference.sum())) <= 0.05 * reference.sum()


def test_the_outline_lies_on_the_nodule():
    volume, lungs = drawn((1.5, 0.8, 0.8), (6, 6, 6))
    _, mask = outline_nodule(volume, CENTRE, 12.0, kind="solid", lungs=lungs)
    truth = np.linalg.norm(volume.world(np.argwhere(np.ones(volume.shape))) - CENTRE, axis=1).reshape(volume.shape) <= 6
    assert 2 * (mask & truth).sum() / (mask.sum() + truth.sum()) > 0.93


def test_side_and_zone():
    volume, lungs = drawn((2.0, 1.6, 1.6), (5, 5, 5), centre=(-20.0, 0.0, 20.0), size_mm=80)
    for label, side in ((1, "right"), (2, "left")):
        found = measure_nodule(volume, (-20.0, 0.0, 20.0), 10.0, kind="solid", lungs=lungs * label)
        assert found.side == side and found.lobe is None and found.note.startswith("upper zone")
    assert measure_nodule(volume.with_array(volume.array), (-20.0, 0.0, 20.0), 10.0, kind="solid", lungs=lungs).note.endswith("not a lobe)")


def test_nothing_there_is_said():
    volume, lungs = drawn((1.5, 1.5, 1.5), (0.1, 0.1, 0.1))
    found, mask = outline_nodule(volume, CENTRE, 8.0, kind="solid", lungs=lungs)
    assert found.volume_mm3 is None and "could not be outlined" in found.note and not mask.any()
    outside, _ = outline_nodule(volume, CENTRE, 8.0, kind="solid", lungs=0 * lungs)
    assert outside.side is None and outside.volume_mm3 is None


@settings(max_examples=10, deadline=None)
@given(st.floats(-30, 30), st.floats(-30, 30), st.floats(-30, 30), st.floats(0.5, 100), st.sampled_from([None, *KINDS]))
def test_any_place_and_size_give_a_finding(x, y, z, diameter, kind):
    """Also at the border: a finding or a typed error, never a crash."""
    volume, lungs = drawn((3.0, 2.5, 2.5), (5, 5, 5), noise=30, fine=2)
    try:
        found = measure_nodule(volume, (x, y, z), diameter, kind=kind, lungs=lungs)
    except DatasetError:
        assert max(abs(x), abs(y), abs(z)) > 24
        return
    Prediction("answered", "a", task="detection", findings=(found,)).to_dict()
    assert found.volume_mm3 is None or found.long_axis_mm >= found.short_axis_mm > 0


@pytest.mark.parametrize("change", [{"diameter_mm": 0}, {"diameter_mm": -3}, {"diameter_mm": 101}, {"diameter_mm": float("nan")}, {"kind": "cyst"}, {"lungs": np.ones((2, 2, 2))}, {"centre_mm": (500, 0, 0)},
                                    {"centre_mm": (float("nan"), 0, 0)}])
def test_impossible_requests(change):
    volume, lungs = drawn((3.0, 2.5, 2.5), (5, 5, 5), fine=1)
    with pytest.raises((ConfigError, DatasetError)):
        measure_nodule(volume, **{"centre_mm": CENTRE, "diameter_mm": 8.0, "lungs": lungs, **change})
    with pytest.raises(DatasetError):
        measure_nodule(Volume(volume.array, volume.affine, units="raw"), CENTRE, 8.0, lungs=lungs)


# ---- axes, matching, growth --------------------------------------------------------------------------------------------------------
@given(st.integers(4, 25), st.integers(4, 25))
def test_axes_of_flat_ellipses(a, b):
    long, short = max(a, b), min(a, b)
    y, x = np.mgrid[-30:31, -30:31]
    got = slice_axes((x / a) ** 2 + (y / b) ** 2 <= 1, 1.0)
    assert abs(got[0] - 2 * long) <= 1.6 and abs(got[1] - 2 * short) <= 2 and got[0] >= got[1]


def nodule(x, d, **more):
    return Finding("nodule", "solid", centroid_mm=(x, 0.0, 0.0), mean_diameter_mm=d, volume_mm3=np.pi / 6 * d**3, **more)


def test_matching_is_one_to_one_and_by_size():
    before = [nodule(0, 6.0), nodule(8, 14.0)]
    assert match_nodules([nodule(4, 14.0), nodule(5, 6.0)], before) == [1, 0]
    assert match_nodules([nodule(0.5, 6.0), nodule(1, 6.0)], before[:1]) in ([0, None], [None, 0])
    assert match_nodules([nodule(15.1, 6.0)], before[:1]) == [None] and match_nodules([nodule(14.9, 6.0)], before[:1]) == [0]
    assert match_nodules([nodule(115.0, 6.0)], before[:1], shift_mm=(110, 0, 0)) == [0] and match_nodules([], before) == [] and match_nodules(before, []) == [None, None]


@given(st.permutations(range(5)), st.tuples(*[st.floats(-40, 40)] * 3))
def test_matching_does_not_depend_on_order_or_place(order, shift):
    rng = np.random.default_rng(1)
    before = [Finding("nodule", "solid", centroid_mm=tuple(p), mean_diameter_mm=5.0 + k) for k, p in enumerate(rng.uniform(-100, 100, (5, 3)))]
    now = [Finding("nodule", "solid", centroid_mm=tuple(np.add(before[k].centroid_mm, shift)), mean_diameter_mm=5.0 + k) for k in order]
    assert match_nodules(now, before, shift_mm=shift) == list(order)


@pytest.mark.parametrize("v0, v1, days, expected", [(100, 200, 90, 90), (100, 800, 90, 30), (100, 100, 90, None), (200, 100, 90, -90), (800, 100, 90, -30), (268.1, 536.2, 400, 400)])
def test_doubling_time(v0, v1, days, expected):
    assert volume_doubling_days(v0, v1, days) == (None if expected is None else pytest.approx(expected))


@given(st.floats(10, 5000), st.floats(10, 1000), st.floats(20, 1000))
def test_doubling_time_against_growing_step_by_step(volume, doubling, days):
    """Independent: let it grow day by day at that pace, and ask."""
    grown = volume * 2 ** (days / doubling)
    assert volume_doubling_days(volume, grown, days) == pytest.approx(doubling, rel=1e-6)


@pytest.mark.parametrize("numbers", [(0, 1, 1), (1, -1, 1), (1, 1, 0), (float("nan"), 1, 1)])
def test_no_doubling_time_of_nothing(numbers):
    with pytest.raises(ConfigError):
        volume_doubling_days(*numbers)


def test_growth_travels_in_the_record_and_into_the_guideline():
    old = [Finding("nodule", "part-solid", centroid_mm=(0.0, 0.0, 0.0), mean_diameter_mm=12.0, volume_mm3=905.0, solid_diameter_mm=3.0)]
    new = [Finding("nodule", "part-solid", centroid_mm=(1.0, 0.0, 0.0), mean_diameter_mm=12.2, volume_mm3=950.0, solid_diameter_mm=5.0), nodule(60, 5.0)]
    found = with_growth(new, old, interval_days=365, prior_study_uid="1.2.3")
    assert found[0].growth["relation"] == "matched" and found[0].growth["prior_study_uid"] == "1.2.3" and found[1].growth["relation"] == "new"
    kept = Prediction.from_json(Prediction("answered", "a", task="detection", findings=found).to_json()).findings
    assert kept[0].growth == found[0].growth
    rads = guideline_named("lung-rads-2022")
    assert change_since(vars(found[0]), rads) == "growing solid component" and change_since(vars(found[1]), rads) == "new"


def test_shift_of_the_lungs():
    volume, _ = drawn((3.0, 2.5, 2.5), (5, 5, 5), fine=1)
    lungs = np.zeros(volume.shape, np.uint8)
    lungs[3:10, 6:15, 4:14] = 1
    moved = np.roll(lungs, (2, -1, 3), (0, 1, 2))
    assert np.allclose(lung_shift(volume, moved, volume, lungs), (3 * 2.5, -1 * 2.5, 2 * 3.0))
    with pytest.raises(DatasetError):
        lung_shift(volume, lungs, volume, 0 * lungs)
    assert np.allclose(lungs_middle(volume, moved), volume.world(np.argwhere(moved).mean(0)))


# ---- the phantom's truth -------------------------------------------------------------------------------------------------------------
def test_against_the_phantom():
    """Patients the method was not tuned on, a coarse grid: sides right, solid nodules within a millimetre on average."""
    from medimg.data.phantom import thorax_phantom
    from medimg.data.lungs import segment_lungs
    case = thorax_phantom(5, shape=(110, 150, 190), spacing_mm=(2.5, 1.7, 1.7), nodules=["solid"] * 5)
    lungs = segment_lungs(case.volume)
    found = [measure_nodule(case.volume, n.centroid_mm, n.diameter_mm * 1.15, kind="solid", lungs=lungs) for n in case.nodules]
    assert [f.side for f in found] == [n.side for n in case.nodules]
    assert np.mean([abs(f.mean_diameter_mm - n.diameter_mm) for f, n in zip(found, case.nodules)]) < 1.0
    assert np.median([abs(f.volume_mm3 / (np.pi / 6 * n.diameter_mm**3) - 1) for f, n in zip(found, case.nodules)]) < 0.2
