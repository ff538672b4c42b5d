"""Bundles that say where: masks on the picture's own pixels, marks in millimetres, sets of scans, a watched folder."""
import json
import subprocess
import sys
from dataclasses import replace

import cv2
import numpy as np
import pytest
from pydicom.data import get_testdata_file

from medimg.data import scans
from medimg.data.phantom_cohort import phantom_cohort
from medimg.data.volume import Volume
from medimg.deployment.arrivals import Arrivals, group_of, watch
from medimg.deployment.bundle import Bundle, build_bundle, inspect, toy_bundle, toy_images, verify
from medimg.deployment.intake import Study, find_studies
from medimg.deployment.located import fold_answers, ground_of, mask_of, marks_of, toy_outliner
from medimg.deployment.manifest import ANSWERS, check_manifest, example_manifest
from medimg.deployment.predict import answer
from medimg.deployment.reference import SCAN_FACTS, scan_facts
from medimg.deployment.study import with_prior
from medimg.errors import BundleError, ConfigError, DatasetError, SignatureError

BRIGHT = np.pad(np.full((20, 30), 200, "uint8"), 10)


@pytest.fixture(scope="module")
def outliner(tmp_path_factory):
    return toy_outliner(tmp_path_factory.mktemp("toy") / "b", size=32)


@pytest.fixture(scope="module")
def nodules():
    return Bundle.load("phantom-nodules")


@pytest.fixture(scope="module")
def patient():
    """A patient with a solid nodule of 6 mm or more, scanned with slices of 2 mm."""
    who = next(p for p in phantom_cohort(60, seed=77) if any(n.kind == "solid" and n.diameter_mm > 6 for n in p.nodules))
    return who, who.case(**scans.ACQUISITIONS["routine"].grid)


# ---- manifest and files -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("change", [{"task": "segmentation"}, {"task": "detection", "answer": {"keep": 1, "holes": True}}, {"answer": dict.fromkeys(ANSWERS["detection"])},
                                    {"task": "detection", "answer": {"top": 5, "call": 1.5, "within": None, "cube": None, "weight": 0}}, {"ood": None}, {"classes": ["one"], "thresholds": {}},
                                    {"ood": {"method": "scan facts", "threshold": 9.0, "quantile": 1.0}},
                                    {"task": "detection", "answer": {"top": 5, "call": 0.5, "within": "lungs", "cube": None, "weight": 0}},
                                    {"task": "detection", "answer": {"top": 5, "call": 0.5, "within": None, "cube": None, "weight": 0}, "ood": {"method": "scan facts", "threshold": 9.0, "quantile": 1.0}}])
def test_manifests_that_contradict_themselves_are_refused(change):
    with pytest.raises(BundleError):
        check_manifest(example_manifest(**change))


def test_the_second_network_belongs_to_the_bundle(nodules, tmp_path):
    import shutil
    copy = shutil.copytree(nodules.path, tmp_path / "copy")
    (copy / "second.onnx").unlink()
    with pytest.raises(SignatureError, match="second.onnx"):
        Bundle.load(copy, verify=False)
    assert "second.onnx" in inspect("phantom-nodules")["sizes"] and verify("phantom-nodules")["parts_opened"] == 6


def test_the_second_network_is_exported_and_compared_like_the_first(nodules, tmp_path, monkeypatch):
    """A Keras second look gives a bundle whose second graph answers as Keras does; a graph that answers otherwise is refused."""
    keras = pytest.importorskip("keras", reason='pip install "medimg[train]"')
    import medimg.deployment.engine as engine
    from medimg.models.candidates import candidate_net
    keras.utils.set_random_seed(0)
    judges = [candidate_net((9, 9, 9, 2), 1 + len(nodules.classes), width=4) for _ in range(2)]
    facts = {k: nodules.manifest[k] for k in ("name", "version", "classes", "task", "input", "population", "thresholds", "training", "metrics", "licence")}
    facts |= {"answer": {**nodules.manifest["answer"], "cube": 9}, "preprocessor": nodules.preprocessor, "reference": None, "calibration": nodules.calibration, "training_ids": ["0" * 16]}
    made = build_bundle(tmp_path / "made", model=nodules.path / "model.onnx", second=judges[0], sign=False, **facts)
    x = np.random.default_rng(3).random((5, 9, 9, 9, 2), dtype="float32")
    assert np.allclose(made.second.run(x)["logits"], np.asarray(judges[0](x, training=False)), atol=1e-4)
    again = build_bundle(tmp_path / "again", model=nodules.path / "model.onnx", second=(made.path / "second.onnx").read_bytes(), sign=False, **facts)
    assert again.digest == made.digest
    export = engine.export_onnx
    monkeypatch.setattr(engine, "export_onnx", lambda model, path: export(judges[1], path))
    with pytest.raises(BundleError, match="differs from Keras"):
        build_bundle(tmp_path / "wrong", model=nodules.path / "model.onnx", second=judges[0], sign=False, **facts)
    assert not (tmp_path / "wrong").exists()


# ---- masks ------------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("shape", [(40, 50), (333, 211), (32, 32)])
def test_a_disc_of_any_size_comes_back_on_its_own_pixels(outliner, shape):
    y, x = np.mgrid[:shape[0], :shape[1]]
    disc = np.hypot((y + 0.5) / shape[0] - 0.5, (x + 0.5) / shape[1] - 0.5) < 0.3
    mask = mask_of(outliner, (200 * disc).astype("uint8"))
    assert mask.shape == shape and 2 * (mask & disc).sum() / (mask.sum() + disc.sum()) > 0.9


def test_keep_and_holes_are_the_bundles_rule(tmp_path):
    picture = BRIGHT.copy()
    picture[0:8, 0:8], picture[18:22, 20:24] = 255, 0
    one, two = (mask_of(toy_outliner(tmp_path / str(k), size=40, keep=k), cv2.resize(picture, (80, 80))) for k in (1, None))
    assert not one[:14, :10].any() and two[:14, :10].any() and one[40, 36] == 1


def test_a_classifier_is_not_asked_for_a_mask_nor_an_outliner_for_a_probability(outliner, tmp_path):
    with pytest.raises(BundleError, match="binary"):
        mask_of(toy_bundle(tmp_path / "toy"), BRIGHT)
    with pytest.raises(BundleError, match="where"):
        outliner.predict(BRIGHT[None])
    with pytest.raises(BundleError, match="segmentation"):
        marks_of(outliner, Volume(np.zeros((4, 4, 4)), units="HU"))


def test_an_outline_is_a_record(outliner):
    record = answer(outliner, Study("a.png", BRIGHT))
    assert record.status == "answered" and record.findings[0].label == "bright" and record.mask.shape == BRIGHT.shape
    stored = json.loads(record.to_json())
    assert "mask" not in stored and "volume" not in stored and stored["task"] == "segmentation" and any("no check" in w for w in stored["warnings"])


def test_shipped_lungs_know_a_film_from_a_stranger():
    bundle = Bundle.load("phantom-lungs")
    held = scans.phantom_lungs(10).split("test")
    record = answer(bundle, Study("a.png", held.images[0], {"modality": "DX"}))
    truth = held.masks[0] > 0
    assert record.status == "answered" and 2 * (record.mask & truth).sum() / (record.mask.sum() + truth.sum()) > 0.95
    assert {f.label for f in record.findings} == {"lung"} and len(record.findings) == 2
    strange = answer(bundle, Study("b.png", 255 - held.images[0], {"modality": "DX"}))
    assert strange.status == "refused" and "unlike the training images" in strange.reasons[-1] and strange.mask is None


# ---- marks ------------------------------------------------------------------------------------------------------------------------
def test_a_planted_nodule_is_found_typed_placed_and_on_its_slice(nodules, patient):
    who, case = patient
    big = max((n for n in who.nodules if n.kind == "solid"), key=lambda n: n.diameter_mm)
    found = answer(nodules, Study("ct", case.volume.display()[40], {"modality": "CT"}, volume=case.volume))
    near = [f for f in found.findings if np.linalg.norm(np.subtract(f.centroid_mm, big.centroid_mm)) < big.diameter_mm / 2]
    assert found.status == "answered" and len(near) == 1
    assert near[0].type == "solid" and abs(near[0].mean_diameter_mm - big.diameter_mm) < 2 and near[0].side == big.side
    assert near[0].slice == round(float(case.volume.index(big.centroid_mm)[0])) and [f.score for f in found.findings] == sorted((f.score for f in found.findings), reverse=True)


def test_an_earlier_scan_is_laid_beside_without_seeking_the_lungs_again(nodules, patient, monkeypatch):
    """The answer carries the middle of the lungs; one without it, as of a model that seeks everywhere, gets the same growth from its volume."""
    scan = patient[1].volume
    shifted = Volume(scan.array, scan.affine + np.outer([12.0, -7.0, 9.0, 0], [0, 0, 0, 1]), modality=scan.modality, units=scan.units)
    now, before = (answer(nodules, Study(name, v.display()[40], {"modality": "CT", "study_date": day}, volume=v))
                   for name, day, v in (("now", "2026-01-05", shifted), ("before", "2025-01-05", scan)))
    assert np.allclose(np.subtract(now.lungs_mm, before.lungs_mm), (12, -7, 9), atol=0.5) and "lungs_mm" not in now.to_dict()
    bare = [replace(one, lungs_mm=None) for one in (now, before)]
    from_volumes = with_prior(*bare)
    monkeypatch.setattr("medimg.data.lungs.segment_lungs", lambda volume: pytest.fail("the lungs were sought again"))
    found = with_prior(now, before)
    assert found.to_dict() == from_volumes.to_dict() and found.findings and {f.growth["relation"] for f in found.findings} == {"matched"}


def test_marks_do_not_depend_on_the_order_of_axes(nodules, patient):
    _, case = patient
    turned = case.volume.reorient("SPL") if case.volume.orientation != "SPL" else case.volume.reorient("IPL")
    call = nodules.manifest["answer"]["call"]
    first, second = ([d for d in marks_of(nodules, v).detections if d.score >= call] for v in (case.volume, turned))
    assert len(first) == len(second) > 0 and np.allclose([d.centroid_mm for d in first], [d.centroid_mm for d in second], atol=1.5)


# ---- scans unlike the training's ----------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def ground(nodules, patient):
    return ground_of(nodules, patient[1].volume)


def as_study(volume):
    return Study("ct", volume.display()[len(volume.array) // 2], {"modality": "CT"}, volume=volume)


def spoilt(volume, change):
    return volume.with_array(np.clip(change(volume.array.astype(np.int32)), -1024, 3071).astype(np.int16))


def test_facts_are_those_that_were_drawn(ground):
    """Against the labels: litres, sides and heights counted by hand; moved by known steps."""
    grid, lungs = ground
    facts = dict(zip(SCAN_FACTS, scan_facts(grid, lungs)))
    rows = np.flatnonzero((lungs > 0).any((1, 2)))
    assert np.exp(facts["lungs, log l"]) == pytest.approx((lungs > 0).sum() * 1.5**3 / 1e6) and facts["right lung, share"] == pytest.approx((lungs == 1).sum() / (lungs > 0).sum())
    assert np.exp(facts["height, log mm"]) == pytest.approx(1.5 * (rows[-1] - rows[0] + 1)) and -900 < facts["lung 50 %, HU"] < -650 and 0 < facts["around 50 %, HU"] < 80
    lighter = dict(zip(SCAN_FACTS, scan_facts(grid.with_array(grid.array - 40), lungs)))
    assert all(lighter[k] == pytest.approx(facts[k] - 40, abs=0.01) for k in SCAN_FACTS[:5]) and all(lighter[k] == pytest.approx(facts[k], abs=1e-3) for k in SCAN_FACTS[9:])
    noisy = dict(zip(SCAN_FACTS, scan_facts(grid.with_array(grid.array + np.random.default_rng(0).normal(0, 80, grid.shape)), lungs)))
    assert noisy["grain across, log HU"] > facts["grain across, log HU"] + 0.5 and noisy["lungs, log l"] == facts["lungs, log l"]


def test_facts_do_not_depend_on_the_order_of_axes(ground):
    grid, lungs = ground
    turned = grid.reorient("IAR"), grid.with_array(lungs).reorient("IAR").array
    assert np.allclose(scan_facts(grid, lungs), scan_facts(*turned), rtol=0.02, atol=0.02)
    with pytest.raises(DatasetError, match="without lungs"):
        scan_facts(grid, np.zeros_like(lungs))


def test_an_ordinary_scan_is_answered_with_its_distance_and_its_lungs_are_sought_once(nodules, patient, monkeypatch):
    from medimg.data import lungs
    calls, real = [], lungs.segment_lungs
    monkeypatch.setattr(lungs, "segment_lungs", lambda *a, **k: calls.append(1) or real(*a, **k))
    found = answer(nodules, as_study(patient[1].volume))
    assert found.status == "answered" and found.ood["method"] == "scan facts" and 0 < found.ood["score"] <= found.ood["threshold"] == nodules.manifest["ood"]["threshold"]
    assert len(calls) == 1 and not any("no check" in w for w in found.warnings)


@pytest.mark.parametrize("change", [lambda hu: hu + 200, lambda hu: hu - 100, lambda hu: hu[::-1], lambda hu: hu[:, ::-1], lambda hu: hu * 2,
                                    lambda hu: hu + np.random.default_rng(0).normal(0, 300, hu.shape)], ids=["+200 HU", "-100 HU", "upside down", "front to back", "slope 2", "noise"])
def test_a_spoilt_scan_is_refused_before_a_network_sees_it(nodules, patient, change, monkeypatch):
    monkeypatch.setattr(type(nodules.engine), "run", lambda *a, **k: pytest.fail("the network ran"))
    found = answer(nodules, as_study(spoilt(patient[1].volume, change)))
    assert found.status == "refused" and len(found.reasons) == 1 and not found.findings and found.mask is None
    assert "unlike the training images" in found.reasons[0] and found.ood["score"] > found.ood["threshold"] or "no lungs" in found.reasons[0] and found.ood is None


def test_a_scan_without_lungs_is_refused_not_broken(nodules, patient):
    case = patient[1]
    found = answer(nodules, as_study(case.volume.with_array(np.where(case.volume.array < -400, 40, case.volume.array).astype(np.int16))))
    assert found.status == "refused" and found.reasons[0].startswith("no lungs found") and found.ood is None
    json.loads(found.to_json())


def test_a_real_patient_is_unlike_the_phantoms(nodules, data_root):
    from medimg.data.dicom import read
    found = answer(nodules, as_study(read(data_root / "thorax_ct" / "dicom")))
    assert found.status == "refused" and found.ood["score"] > 10 * found.ood["threshold"]


def test_the_shipped_reference_is_that_of_its_training_scans(nodules):
    """Two scans made again: those the networks learnt from lie within the border, and the recipe leaves the check out where scans are too few."""
    from medimg.data.lungs import segment_lungs
    from medimg.experiments.nodules import crowd
    from medimg.experiments.screening import SIZES, acquired_scan, scan_reference
    learnt = [acquired_scan(crowd(one, SIZES["full"].crowded), how, folder=False) for one, how in zip(phantom_cohort(2, seed=scans.COHORTS["train"][0]), scans.ACQUISITIONS)]
    facts = np.stack([scan_facts(scan.volume, segment_lungs(scan.volume)) for scan in learnt])
    assert (nodules.reference.score(facts) < nodules.reference.threshold).all() and nodules.reference.n == 64 and nodules.manifest["ood"]["quantile"] == 1.0
    assert scan_reference(learnt, learnt[:1]) is None


@pytest.mark.parametrize("volume, why", [(Volume(np.zeros((8, 64, 64), "int16"), modality="CT"), "not in HU"), (None, "single picture")])
def test_what_is_no_ct_is_refused(nodules, volume, why):
    with pytest.raises(BundleError, match=why):
        answer(nodules, Study("a", np.tile(np.arange(64, dtype="uint8") * 4, (64, 1)), {"modality": "CT"}, volume=volume))


def test_coarse_slices_and_other_modalities_are_refused_with_the_reason(nodules):
    stack = Volume(np.random.default_rng(0).normal(0, 300, (12, 64, 64)).astype("int16"), np.diag([1.0, 1, 5, 1])[:, [2, 1, 0, 3]], modality="CT", units="HU")
    picture = stack.display()[0]
    thick = answer(nodules, Study("a", picture, {"modality": "CT"}, volume=stack))
    foreign = answer(nodules, Study("a", picture, {"modality": "MR"}, volume=stack))
    assert thick.status == foreign.status == "refused" and any("voxels of 5" in r for r in thick.reasons) and any("modality MR" in r for r in foreign.reasons)


def test_a_series_is_read_whole_only_for_models_that_want_it(tmp_path):
    from medimg.data.phantom_cohort import write_case
    who = phantom_cohort(1, seed=77)[0]
    write_case(who, tmp_path, case=who.case(shape=(8, 64, 64), spacing_mm=(5.0, 5.0, 5.0)))
    flat = [load() for _, load in find_studies(tmp_path)]
    whole = [study for study in (load() for _, load in find_studies(tmp_path, stacks=True)) if study.facts["modality"] == "CT"]
    assert all(study.volume is None for study in flat) and len(whole) == 1 and whole[0].volume.shape == (8, 64, 64)
    assert whole[0].facts["study_date"].count("-") == 2


# ---- sets of scans ----------------------------------------------------------------------------------------------------------------
def test_nobody_is_in_two_folds_and_every_fold_has_every_acquisition():
    data = scans.phantom_scans()
    folds = {name: set(data.split(name).patient_ids) for name in ("train", "val", "test")}
    assert not (folds["train"] & folds["val"] | folds["train"] & folds["test"] | folds["val"] & folds["test"])
    for name in folds:
        how, counts = np.unique(data.split(name).meta["acquisition"], return_counts=True)
        assert set(how) == set(scans.ACQUISITIONS) and len(set(counts)) == 1
    with pytest.raises(DatasetError, match="no fold"):
        data.split("tset")


def test_lesions_lie_where_the_scan_is_dense():
    """Independent of any detector: a solid nodule of 6 mm is brighter than the lung around it, at the place that the truth names."""
    data = scans.phantom_scans(40)
    row = next(k for k in range(len(data)) if data.meta["acquisition"][k] == "routine" and any(o["kind"] == "solid" and o["diameter_mm"] > 6 for o in data.meta["lesions"][k]))
    volume, one = data.images[row], next(o for o in data.meta["lesions"][row] if o["kind"] == "solid" and o["diameter_mm"] > 6)
    z, y, x = np.rint(volume.index(one["centroid_mm"])).astype(int)
    assert volume.array[z, y, x] > -300


def test_answers_of_a_fold_are_those_of_each_image(outliner):
    from types import SimpleNamespace
    part = SimpleNamespace(images=np.stack([BRIGHT, np.roll(BRIGHT, 3, 0)]), image_ids=np.array(["a", "b"]))
    given = fold_answers(outliner, part)
    assert given["kind"] == "segmentation" and all((m == mask_of(outliner, i)).all() for m, i in zip(given["masks"], part.images))


# ---- a watched folder -------------------------------------------------------------------------------------------------------------
def test_slices_of_one_series_are_one_group_and_names_tell_nothing(tmp_path):
    ct, mr = get_testdata_file("CT_small.dcm"), get_testdata_file("MR_small.dcm")
    assert group_of(ct) != group_of(mr) and len(group_of(ct)) == 16


def test_a_group_waits_until_nothing_changes(tmp_path):
    state = Arrivals(tmp_path, settle_s=2.0)
    (tmp_path / "a.png").write_bytes(b"1")
    (tmp_path / ".hidden.png").write_bytes(b"1")
    (tmp_path / "b.png.part").write_bytes(b"1")
    assert state.ready(now=0.0) == [] and state.ready(now=1.9) == []
    (tmp_path / "a.png").write_bytes(b"12")
    assert state.ready(now=2.5) == [] and state.ready(now=4.0) == []
    [(group, files, signature)] = state.ready(now=4.6)
    assert [f.name for f in files] == ["a.png"]
    state.done[group] = signature
    assert state.ready(now=99.0) == []


def test_a_watch_that_is_killed_goes_on_and_answers_nothing_twice(tmp_path):
    toy_bundle(tmp_path / "toy")
    (tmp_path / "in").mkdir()
    for k, picture in enumerate(toy_images(4, seed=3)[0]):
        cv2.imwrite(str(tmp_path / "in" / f"{k}.png"), picture)
    (tmp_path / "in" / "bad.dcm").write_bytes(b"no dicom")
    code = f"""
from medimg.deployment.arrivals import watch
from medimg.deployment.bundle import Bundle
for row in watch(Bundle.load({str(tmp_path / 'toy')!r}, verify=False), {str(tmp_path / 'in')!r}, {str(tmp_path / 'out')!r}, settle_s=0.2, poll_s=0.05):
    print(row["group"], row["predictions"][0].status, flush=True)
"""
    def lines(k):
        process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        try:
            return [process.stdout.readline().split() for _ in range(k)]
        finally:
            process.kill()
            process.wait()
    first = lines(2)
    second = lines(3)
    assert len({group for group, _ in first} | {group for group, _ in second}) == 5 and sorted(s for _, s in first + second) == ["answered"] * 4 + ["error"]
    for path in (tmp_path / "out").glob("*.json"):
        json.loads(path.read_text())


def test_results_may_not_lie_among_what_is_watched(tmp_path):
    with pytest.raises(ConfigError, match="among"):
        next(watch("pneumonia", tmp_path, tmp_path / "out"))


def test_a_bundle_that_says_where_is_made_again_by_its_name(tmp_path):
    from medimg.reproduction import reproducible, reproduce
    made = reproduce("phantom-lungs", profile="ci", out=tmp_path / "r", log=tmp_path / "reads.jsonl", progress=False)
    assert {"phantom-lungs", "phantom-nodules"} <= {name for name, _ in reproducible()}
    assert made["n_test"] == 12 and made["metrics"]["dice"]["low"] <= made["metrics"]["dice"]["value"] and made["verdict"].startswith("different, because")
    packed = Bundle.load(tmp_path / "r" / "bundle", allow_unsigned=True)
    assert packed.digest == made["bundle"]["digest"] and packed.manifest["metrics"]["dice"]["value"] == made["metrics"]["dice"]["value"]
    assert len((tmp_path / "reads.jsonl").read_text().splitlines()) == 1
