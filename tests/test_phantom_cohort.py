"""The phantom as a whole: scanner physics, cohort and Brock model, realism and its yardstick, and what version 1 may never change."""
import hashlib
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from medimg.data.phantom import LABELS, NODULE_HU, Nodule, ct_noise, thorax_phantom
from medimg.data.phantom_anatomy import LOBES, draw_anatomy, lobe_of, lung_distance, twigs
from medimg.data.phantom_cohort import brock_probability, phantom_cohort, write_case
from medimg.data.phantom_realism import BANDS, blob_candidates, froc_cpm, hu_overlap, lung_core, realism
from medimg.data.phantom_scanner import KERNELS, kernel_mtf, scan_ct
from medimg.data.volume import Volume, make_affine
from medimg.errors import ConfigError

STORED = json.loads((Path(__file__).resolve().parents[1] / "results" / "phantom_v1.json").read_text())


@pytest.fixture(scope="module")
def still():
    return thorax_phantom(7, nodules=2, dose=None, shape=(24, 96, 96), spacing_mm=(4.0, 3.7, 3.7))


@pytest.fixture(scope="module")
def cohort():
    return phantom_cohort(120, seed=0)


# ---- frozen ----------------------------------------------------------------------------------------------------------------------
def test_version_1_is_frozen(cohort):
    """Truth to the last bit, voxels within 1 HU."""
    facts = STORED["cohort_truth"]
    truth = [p.truth() for p in cohort[:facts["patients"]]]
    assert hashlib.sha256(json.dumps(truth, sort_keys=True).encode()).hexdigest() == facts["sha256"] \
        == "2933ba632819af128178ae0e6dcbb1eb8949f3eac934f29e2d123ad7e7933787"
    voxels = STORED["voxels"]
    case = thorax_phantom(voxels["seed"], nodules=voxels["nodules"], shape=voxels["shape"], spacing_mm=voxels["spacing_mm"])
    assert case.truth_sha256 == voxels["truth_sha256"] == "71711f5dde2f65014d26c525f9819c79e0e8b8b1321dfa19d833076ef8bd2a04"
    assert np.abs(case.volume.array[voxels["slice"], voxels["row"]].astype(int) - voxels["sample"]).max() <= 1
    assert case.volume.array.mean() == pytest.approx(-576.85, abs=0.05) and case.volume.array.std() == pytest.approx(467.22, abs=0.05)
    count = np.bincount(case.labels.ravel(), minlength=len(voxels["voxels_per_label"]))
    assert np.abs(count - voxels["voxels_per_label"]).max() <= 3


def test_the_stored_measurement_is_inside_its_bands():
    assert STORED["version"] == "1" and STORED["detector"]["cohort_seed"] == 1 and STORED["detector"]["scans"] >= 100
    assert STORED["bands"] == {k: list(v) for k, v in BANDS.items()}
    assert BANDS["cpm"][0] <= STORED["detector"]["cpm"] <= BANDS["cpm"][1]
    for facts in [*STORED["phantom"].values(), {**STORED["real"], "hu_overlap": 1.0}]:
        for name in ("lung_noise_hu", "vessels_per_cm2", "hu_overlap"):
            assert BANDS[name][0] <= facts[name] <= BANDS[name][1], name


def test_the_real_ct_still_measures_what_is_stored(data_root):
    from medimg.data.dicom import read
    real = read(data_root / "thorax_ct" / "dicom").crop(z=slice(30, 60))
    facts = realism(real)
    assert 16 < facts["lung_noise_hu"] < 28 and hu_overlap(facts["histogram"], STORED["real"]["histogram"]) > 0.85


# ---- anatomy ---------------------------------------------------------------------------------------------------------------------
def test_lobes_fill_the_lungs_on_the_right_sides():
    an = draw_anatomy(2)
    z, y, x = (v.ravel() for v in np.mgrid[-130:120:8.0, -92:93:8.0, -130:131:8.0])
    inside = lung_distance(an, z, y, x) < 0
    names = lobe_of(z, y, x)[inside]
    share = {lobe: (names == lobe).mean() for lobe in LOBES}
    assert sum(share.values()) == pytest.approx(1) and min(share.values()) > 0.05 and share["RML"] == min(share.values())
    assert all((name[0] == "R") == (side < 0) for name, side in zip(names[::97], x[inside][::97]))
    assert z[inside][names == "RUL"].mean() > z[inside][names == "RML"].mean() and y[inside][names == "LLL"].mean() > y[inside][names == "LUL"].mean()


def test_small_vessels_stay_in_the_lungs():
    start, end, r0, r1 = twigs(draw_anatomy(3))
    assert (lung_distance(draw_anatomy(3), *end.T) < 2).mean() > 0.98 and (r1 <= r0).all() and np.isfinite(start).all()


def test_emphysema_makes_holes_of_the_stated_share():
    an = draw_anatomy(5)
    grid = {"shape": (40, 64, 64), "spacing_mm": (6.0, 5.0, 5.0), "nodules": 0, "dose": None}
    well, sick = (thorax_phantom(a, **grid) for a in (an, replace(an, emphysema=0.2)))
    lung = np.isin(well.labels, [LABELS["lung_right"], LABELS["lung_left"]])
    share = [(case.volume.array[lung] < -950).mean() for case in (well, sick)]
    assert share[0] < 0.01 and 0.1 < share[1] < 0.25 and np.array_equal(well.volume.array[~lung & (well.labels == LABELS["heart"])],
                                                                      sick.volume.array[~lung & (well.labels == LABELS["heart"])])


def test_spicules_surround_a_nodule_and_are_not_counted():
    ball = Nodule((-62.0, 10.0, 30.0), 14.0, "solid", 30.0, "right")
    grid = {"shape": (60, 80, 100), "spacing_mm": (1.5, 3.0, 3.0), "dose": None}
    bare, spiky = (thorax_phantom(11, nodules=[replace(ball, spiculated=s)], **grid) for s in (False, True))
    assert np.array_equal(bare.nodule_mask(0), spiky.nodule_mask(0))
    world = bare.volume.world(np.argwhere(bare.volume.array != spiky.volume.array)) - ball.centroid_mm
    far = np.linalg.norm(world, axis=1)
    assert len(far) > 50 and far.max() < 7 + 9 + 6 and (spiky.volume.array.astype(int) - bare.volume.array).min() > -60


# ---- scanner ---------------------------------------------------------------------------------------------------------------------
def test_only_a_clean_patient_can_be_scanned(still):
    scan = scan_ct(still, dose=0.5)
    assert scan.truth() == still.truth() and scan.dose == 0.5 and scan.volume.meta["model"].endswith("v1")
    for bad in ({"dose": 0}, {"kernel": "bone"}, {"slice_mm": 1}, {"motion_mm": -1}, {"slice_mm": (8, 2)}):
        with pytest.raises(ConfigError):
            scan_ct(still, **bad)
    with pytest.raises(ConfigError, match="already"):
        scan_ct(scan)


def test_scan_is_the_phantom_plus_its_noise(still):
    """The default scan equals what thorax_phantom makes with noise, up to two roundings."""
    other = thorax_phantom(7, nodules=2, dose=0.4, shape=(24, 96, 96), spacing_mm=(4.0, 3.7, 3.7))
    assert np.abs(scan_ct(still, dose=0.4).volume.array.astype(int) - other.volume.array).max() <= 1
    again = scan_ct(still, dose=0.4, seed=99).volume.array
    assert not np.array_equal(again, other.volume.array) and np.array_equal(again, scan_ct(still, dose=0.4, seed=99).volume.array)


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_line_has_the_mtf_that_the_kernel_states(kernel, still):
    """The picture of a line, turned into frequencies, against the stated gain."""
    array = np.zeros((8, 128, 128), np.int16)
    array[:, :, 64] = 1000
    line = replace(still, volume=Volume(array, make_affine((3.0, 1.0, 1.0)), modality="CT", units="HU", meta=still.volume.meta), labels=array > 0)
    profile = scan_ct(line, dose=1e9, kernel=kernel).volume.array[4, 64].astype(float)
    f = np.fft.rfftfreq(128)
    assert np.allclose(np.abs(np.fft.rfft(profile)) / 1000, kernel_mtf(kernel, f), atol=0.02)


def test_thick_slices_are_means_of_thin_ones(still):
    thick = scan_ct(still, dose=1e9, slice_mm=8.0)
    assert thick.volume.spacing_mm[0] == pytest.approx(8.0) and thick.volume.shape[0] == 12
    pairs = still.volume.array.reshape(12, 2, 96, 96).mean(1)
    assert np.abs(thick.volume.array - pairs).max() <= 1
    assert thick.volume.world((0, 0, 0))[2] == pytest.approx(still.volume.world((0, 0, 0))[2] + 2.0)
    apart = scan_ct(still, dose=1e9, slice_mm=(4.0, 12.0))
    assert np.abs(apart.volume.array.astype(int) - still.volume.array[::3]).max() <= 1 and apart.volume.spacing_mm[0] == pytest.approx(12.0)
    assert np.array_equal(apart.labels, still.labels[::3])


def test_averaging_slices_quietens_by_the_root(still):
    noise = [(scan_ct(still, slice_mm=t).volume.array.astype(float) - scan_ct(still, dose=1e9, slice_mm=t).volume.array) for t in (4.0, 16.0)]
    assert noise[0][:, 40:56, 40:56].std() / noise[1][:, 40:56, 40:56].std() == pytest.approx(2.0, rel=0.1)


def test_motion_moves_the_base_and_keeps_the_mass(still):
    rest, moving = (scan_ct(still, dose=1e9, motion_mm=m).volume.array.astype(float) for m in (0.0, 20.0))
    change = np.abs(moving - rest).mean((1, 2))
    assert np.abs(rest - still.volume.array).max() <= 1 and change.max() > 5 and abs(moving[2:-2].mean() - rest[2:-2].mean()) < 6
    more = np.abs(scan_ct(still, dose=1e9, motion_mm=40.0).volume.array.astype(float) - rest).mean()
    assert more > 1.2 * np.abs(moving - rest).mean()


def test_metal_streaks_near_the_rods_and_less_with_more_dose():
    body = thorax_phantom(7, nodules=0, dose=None, shape=(20, 64, 64), spacing_mm=(12.0, 5.5, 5.5))
    z = body.volume.world([(k, 0, 0) for k in range(20)])[:, 2]
    error = {}
    for dose in (0.2, 5.0):
        plain, rods = (scan_ct(body, dose=dose, metal=m).volume.array.astype(float) for m in (False, True))
        error[dose] = np.abs(rods - plain)
    assert error[0.2][np.abs(z + 15) > 60].max() == 0 and (error[0.2].max((1, 2))[np.abs(z + 15) < 40] > 1000).all()
    heart = body.labels == LABELS["heart"]
    heart &= (np.abs(z + 15) < 40)[:, None, None]
    assert error[0.2][heart].mean() > 2 * error[5.0][heart].mean()


# ---- cohort ----------------------------------------------------------------------------------------------------------------------
def test_brock_equals_the_uncentred_form_of_another_publication():
    """Table 2 of Eur Radiol 29 (2019) 5367 (PMC6717521) states the model with every constant inside its intercept."""
    for age, sex, family, emphysema, size, kind, lobe, spiculated, count in (
            (55, "M", False, False, 5.0, "solid", "RLL", False, 1), (70, "F", True, True, 18.0, "part-solid", "LUL", True, 2),
            (62, "F", False, True, 9.0, "ground-glass", "RUL", False, 7), (48, "M", True, False, 27.0, "solid", "RML", True, 4)):
        x = (0.2761 + 0.0287 * age + 0.6011 * (sex == "F") + 0.2961 * family + 0.2953 * emphysema + 0.6581 * (lobe[1] == "U") - 5.3854 * (size / 10)**-0.5
             + 0.7729 * spiculated + {"solid": 0, "part-solid": 0.377, "ground-glass": -0.1276}[kind] - 0.0824 * count)
        ball = Nodule((0.0, 0.0, 0.0), size, kind, 0.0, "left", lobe=lobe, spiculated=spiculated)
        ours = brock_probability(ball, age_years=age, sex=sex, family_history=family, emphysema=emphysema, count=count)
        assert ours == pytest.approx(1 / (1 + np.exp(-x)), abs=2e-5)


def test_patient_k_is_the_same_in_any_cohort(cohort):
    assert phantom_cohort(7, seed=0) == cohort[:7] and phantom_cohort(7, seed=1)[0] != cohort[0]
    assert len({p.patient_id for p in cohort + phantom_cohort(20, seed=1)}) == 140
    for bad in ({"n": 0}, {"n": 3, "seed": -1}):
        with pytest.raises(ConfigError):
            phantom_cohort(**bad)


def test_every_kind_size_band_and_lobe_is_present(cohort):
    nodules = [n for p in cohort for n in p.nodules]
    for kind in NODULE_HU:
        sizes = np.array([n.diameter_mm for n in nodules if n.kind == kind])
        bands = [(sizes < 6).sum(), ((sizes >= 6) & (sizes < 8)).sum(), ((sizes >= 8) & (sizes < 15)).sum(), (sizes >= 15).sum()]
        assert min(bands[kind == "part-solid":]) >= 3, (kind, bands)
    assert {n.lobe for n in nodules} == set(LOBES) and {n.side for n in nodules} == {"left", "right"} and {n.spiculated for n in nodules} == {True, False}
    assert {p.family_history for p in cohort} == {bool(p.anatomy.emphysema) for p in cohort} == {True, False} and {0, 1, 2, 4} <= {len(p.nodules) for p in cohort}
    for patient in cohort[:30]:
        for k, n in enumerate(patient.nodules):
            assert lung_distance(patient.anatomy, *n.centroid_mm[::-1]) < -n.diameter_mm / 2 and (n.lobe[0] == "L") == (n.side == "left")
            assert all(np.linalg.norm(np.subtract(n.centroid_mm, m.centroid_mm)) > (n.diameter_mm + m.diameter_mm) / 2 for m in patient.nodules[:k])


def test_diagnoses_are_drawn_with_their_probabilities(cohort):
    risk, drawn = (np.array([v for p in cohort for v in getattr(p, name)], float) for name in ("probabilities", "malignant"))
    assert abs(risk.sum() - drawn.sum()) < 4 * np.sqrt((risk * (1 - risk)).sum()) and risk[drawn == 1].mean() > 1.5 * risk[drawn == 0].mean()


def test_a_written_patient_comes_back(cohort, tmp_path, tool):
    import subprocess

    import nibabel
    import pydicom

    from medimg.data.dicom import read, scan
    patient = next(p for p in cohort if len(p.nodules) > 1)
    scanned = scan_ct(patient.case(shape=(24, 64, 64), spacing_mm=(6.0, 5.5, 5.5), dose=None), slice_mm=(6.0, 12.0), kernel="soft")
    files = write_case(patient, tmp_path, case=scanned)
    back = read(tmp_path / "ct")
    assert np.array_equal(back.array, scanned.volume.array) and np.allclose(back.affine, scanned.volume.affine, atol=1e-4)
    assert {row.patient_id for row in scan(tmp_path)} == {patient.patient_id}
    labels = nibabel.load(files["labels"])
    assert np.array_equal(np.asarray(labels.dataobj).astype(int).T if labels.shape != scanned.labels.shape else np.asarray(labels.dataobj), scanned.labels)
    truth = json.loads(files["truth"].read_text())
    assert truth["nodules"] == json.loads(json.dumps(patient.truth()))["nodules"] and truth["version"] == "1"
    for path in (files["ct"][0], files["dx"]):
        header = pydicom.dcmread(path)
        assert "phantom v1" in header.SoftwareVersions and "phantom v1" in header.ImageComments
        said = subprocess.run([tool("dciodvfy"), str(path)], capture_output=True, text=True, timeout=60)
        assert not [line for line in (said.stdout + said.stderr).splitlines() if line.startswith("Error")]
    thin = pydicom.dcmread(files["ct"][0])
    assert (thin.SliceThickness, thin.SpacingBetweenSlices, thin.ConvolutionKernel) == (6, 12, "soft")


# ---- realism ---------------------------------------------------------------------------------------------------------------------
def test_noise_estimator_finds_added_noise():
    body = thorax_phantom(1, nodules=0, dose=None, shape=(16, 128, 128), spacing_mm=(3.0, 2.8, 2.8))
    rng, found = np.random.default_rng(0), []
    for sd in (0.0, 20.0):
        noisy = body.volume.array + rng.normal(0, sd, body.volume.shape)
        found.append(realism(body.volume.with_array(noisy.astype(np.float32)))["lung_noise_hu"])
    assert np.hypot(found[0], 20) == pytest.approx(found[1], rel=0.12)


def test_lung_core_lies_in_the_truths_lungs(still):
    core = lung_core(still.volume)
    inside = np.isin(still.labels, [LABELS["lung_right"], LABELS["lung_left"], LABELS["vessel"], LABELS["airway"], 16, 17])
    assert core.sum() * np.prod(still.volume.spacing_mm) > 5e5 and (inside[core]).mean() > 0.97
    with pytest.raises(ConfigError, match="lung"):
        lung_core(still.volume.with_array(np.zeros(still.volume.shape, np.int16)))


def test_froc_by_hand():
    ball = Nodule((0.0, 0.0, 0.0), 10.0, "solid", 30.0, "left")
    points, scores = np.array([[100.0, 0, 0], [0, 0, 0]]), np.array([2.0, 1.0])
    one = froc_cpm([(points, scores, (ball,))])                                 # one scan, one false alarm above the hit
    assert one["sensitivity"] == [0, 0, 0, 1, 1, 1, 1] and one["cpm"] == round(4 / 7, 4)
    assert froc_cpm([(points[:0], scores[:0], (ball,))])["cpm"] == 0.0
    assert froc_cpm([(points[[1, 1]], scores, (ball,))])["cpm"] == 1.0          # twice inside one nodule is no false alarm


def test_yardstick_prefers_a_ball_to_a_tube():
    an = replace(draw_anatomy(4), vessels=0.85)
    ball = Nodule((-60.0, 0.0, 20.0), 12.0, "solid", 30.0, "right")
    case = thorax_phantom(an, nodules=[ball], shape=(70, 80, 110), spacing_mm=(2.5, 2.5, 2.5))
    points, scores = blob_candidates(case.volume, top=20)
    assert (np.diff(scores) <= 0).all() and np.linalg.norm(points[:3] - ball.centroid_mm, axis=1).min() < 4


def test_noise_scales_with_thickness_and_dose_of_the_scanner():
    water = np.zeros((4, 64, 64), np.float32)
    assert ct_noise(water, (6, 4, 4)).std() * np.sqrt(2) == pytest.approx(ct_noise(water, (3, 4, 4)).std(), rel=1e-3)
