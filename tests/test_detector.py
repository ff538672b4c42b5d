"""Detector, candidates and their scoring against NumPy, scikit-image, the phantom's own FROC, and properties."""
import numpy as np
import pytest

from medimg.data.phantom import Nodule, thorax_phantom
from medimg.data.phantom_cohort import phantom_cohort
from medimg.data.phantom_realism import froc_cpm
from medimg.data.volume import Volume, make_affine
from medimg.deployment.prediction import Finding, Prediction
from medimg.errors import ConfigError, DatasetError, MedimgError
from medimg.experiments.boxes import box_draw, usual_boxes
from medimg.experiments.detection import PLANS, merged, nodule_draw, second_draw, second_set
from medimg.experiments.froc import cpm_figure, quality, score_scan, sensitivities
from medimg.experiments.nodules import KINDS, crowd, cut, free_places, lung_scan, nodule_patches
from medimg.models.candidates import Detection, candidate_net, ct_channels, cube_around, find_lesions, hu_to_unit, judge, nms_mm
from medimg.models.detector import STRIDE, centre_detector, centre_targets, decode, detection_loss, head_slices


def lesions(rng, shape, n, apart, *, box=False):
    """n lesions at least `apart` voxels from each other."""
    index = []
    while len(index) < n:
        p = rng.uniform(2, np.array(shape) - 3)
        if all(np.linalg.norm(p - q) > apart for q in index):
            index.append(p)
    return {"index": np.array(index), "size": rng.uniform(4, 12, (n, len(shape) if box else 1)), "kind": rng.integers(0, 3, n)}


def as_logits(targets):
    maps = targets[..., 1:].copy()
    maps[..., 0] = np.where(maps[..., 0] == 1, 5.0, -5.0)
    return maps


# ---- targets and decode --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("shape, box", [((48, 64), False), ((48, 64), True), ((32, 40, 48), False), ((24, 24, 32), True)])
def test_targets_and_decode_are_inverse(shape, box):
    truth = lesions(np.random.default_rng(len(shape)), shape, 4, 10, box=box)
    found = decode(as_logits(centre_targets(shape, truth, classes=3, box=box)), classes=3, box=box, threshold=0.5)
    order = [int(np.linalg.norm(found["index"] - p, axis=1).argmin()) for p in truth["index"]]
    assert sorted(order) == [0, 1, 2, 3]
    assert np.allclose(found["index"][order], truth["index"], atol=1e-4) and np.allclose(found["size"][order], truth["size"], rtol=1e-5)
    assert (found["kind"][order].argmax(1) == truth["kind"]).all() and np.allclose(found["kind"].sum(1), 1)


def test_hills_are_gaussians_with_one_peak_each():
    y = centre_targets((64, 64), {"index": [[20.5, 40.5], [50.0, 10.0]], "size": [8.0, 36.0], "kind": [0, 0]})
    heat = y[..., 1]
    assert (heat == 1).sum() == 2 and heat[10, 20] == 1 and heat.min() == 0 and heat.max() == 1
    assert np.isclose(heat[10, 21], np.exp(-0.5 / 0.75**2)) and np.isclose(heat[25 - 3, 5], np.exp(-0.5), atol=1e-6)      # sigma: 0.75 cells; 36 / 6 / 2 = 3 cells
    assert (y[..., 0] > 0).sum() < (heat > 0).sum() and set(np.unique(y[..., 0] > 0)) == {False, True}


def test_targets_do_not_move_with_the_window():
    """Cutting the image elsewhere (by whole cells) cuts the targets, lesions beyond the edge included."""
    truth = {"index": np.array([[30.2, 21.7], [4.0, 50.0]]), "size": [14.0, 6.0], "kind": [0, 0]}
    whole = centre_targets((64, 64), truth)
    part = centre_targets((40, 40), {**truth, "index": truth["index"] - [24, 14]})
    assert np.allclose(part, whole[12:32, 7:27])


def test_empty_image_has_empty_targets_and_no_lesions():
    y = centre_targets((16, 16, 16), {"index": np.zeros((0, 3)), "size": [], "kind": []}, classes=3)
    assert y.shape == (8, 8, 8, 9) and not y.any()
    maps = np.full((8, 8, 8, 8), -9.0)
    assert {name: len(part) for name, part in decode(maps, classes=3).items()} == dict.fromkeys(("score", "index", "size", "kind"), 0)


def test_peaks_agree_with_scikit_image():
    from skimage.feature import peak_local_max
    maps = np.random.default_rng(0).normal(size=(20, 24, 16, 5)).astype(np.float32)
    maps[..., 2:] = 0
    ours = decode(maps, classes=1, threshold=0.6, top=10_000)["index"]
    theirs = peak_local_max(maps[..., 0], min_distance=1, threshold_abs=np.log(0.6 / 0.4), exclude_border=False)
    assert sorted(map(tuple, ours)) == sorted(map(tuple, theirs * STRIDE + 0.5)) and len(ours) > 50


@pytest.mark.parametrize("bad", [{"size": [0.0]}, {"kind": [3]}])
def test_impossible_truth_is_refused(bad):
    with pytest.raises(ConfigError, match="no targets"):
        centre_targets((16, 16), {"index": [[3.0, 3.0]], "size": [4.0], "kind": [0]} | bad, classes=3)


def test_decode_refuses_nan_and_other_channels():
    maps = np.zeros((4, 4, 4), np.float32)
    with pytest.raises(MedimgError, match="NaN"):
        decode(np.where(np.arange(4) == 0, np.nan, maps), classes=1)
    with pytest.raises(ConfigError, match="channels"):
        decode(maps, classes=2)
    with pytest.raises(ConfigError, match="rank"):
        head_slices(1, 2)


# ---- loss ----------------------------------------------------------------------------------------------------------------------
def test_loss_equals_numpy():
    rng = np.random.default_rng(1)
    y = np.stack([centre_targets((16, 24), lesions(rng, (16, 24), 2, 8), classes=3) for _ in range(2)])
    z = rng.normal(size=(*y.shape[:-1], y.shape[-1] - 1)).astype(np.float32)
    w, t, p = y[..., 0], y[..., 1:].astype(float), 1 / (1 + np.exp(-z[..., 0].astype(float)))
    focal = np.where(t[..., 0] == 1, -(1 - p)**2 * np.log(p), -(1 - t[..., 0])**4 * p**2 * np.log(1 - p)).sum() / (t[..., 0] == 1).sum()

    def huber(e):
        return np.where(np.abs(e) < 0.1, 5 * e**2, np.abs(e) - 0.05)
    size, offset = (w * huber(t[..., 1] - z[..., 1])).sum() / w.sum(), (w[..., None] * huber(t[..., 2:4] - z[..., 2:4])).sum() / w.sum() / 2
    kind = (w * -(t[..., 4:] * (z[..., 4:] - np.log(np.exp(z[..., 4:].astype(float)).sum(-1, keepdims=True)))).sum(-1)).sum() / w.sum()
    assert np.isclose(float(detection_loss(2, 3)(y, z)), focal + size + offset + 0.5 * kind, rtol=1e-4)


def test_loss_of_an_image_without_lesions_is_finite():
    y = np.zeros((1, 4, 4, 5), np.float32)
    assert 0 < float(detection_loss(2, 1)(y, np.zeros((1, 4, 4, 4), np.float32))) < 10


# ---- network -------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("shape, classes, out", [((32, 48, 1), 1, (16, 24, 4)), ((16, 24, 32, 2), 3, (8, 12, 16, 8))])
def test_one_definition_two_ranks(shape, classes, out):
    model = centre_detector(shape, classes, width=4)
    assert model.output_shape[1:] == out and model.name == "detector" and model.get_layer("images") and model.get_layer("logits")
    heat = model(np.zeros((1, *shape), np.float32))[..., 0]
    assert np.allclose(1 / (1 + np.exp(-np.asarray(heat))), 0.01)


def test_any_size_gives_the_same_answer_away_from_the_border():
    model = centre_detector((None, None, 1), 1, width=4, levels=2)
    image = np.random.default_rng(0).random((1, 96, 96, 1)).astype(np.float32)
    whole, part = np.asarray(model(image)), np.asarray(model(image[:, :64, :64]))
    assert np.allclose(whole[:, :20, :20], part[:, :20, :20], atol=1e-4)


@pytest.mark.parametrize("shape", [(30, 32, 1), (4, 32, 1), (32, 1), (32, 32, 32, 32, 1), "abc"])
def test_impossible_shapes_are_refused(shape):
    with pytest.raises(ConfigError, match="detector cannot take"):
        centre_detector(shape, 1)


def test_it_learns_where_a_lesion_is():
    from medimg.config import set_seed
    from medimg.training.loop import train_steps
    from medimg.training.record import TrainConfig
    set_seed(0)

    def batch(step):
        rng = np.random.default_rng(step)
        x, y = rng.normal(0, 0.2, (8, 32, 32, 1)).astype(np.float32), []
        for image in x:
            at = rng.uniform(8, 24, 2)
            image[..., 0] += np.hypot(*(np.mgrid[:32, :32] - at[:, None, None])) < 4
            y.append(centre_targets((32, 32), {"index": [at], "size": [8.0], "kind": [0]}))
        return x, np.stack(y)
    model = centre_detector((32, 32, 1), 1, width=4, levels=2)
    train_steps(model, batch, detection_loss(2, 1), steps=80, config=TrainConfig(learning_rate=1e-2, ema=0.9, clip_norm=5.0), progress=False)
    x, y = batch(1000)
    for maps, truth in zip(np.asarray(model(x)), y):
        best, want = decode(maps, classes=1, top=1, threshold=1e-6), decode(as_logits(truth), classes=1, top=1)
        assert np.linalg.norm(best["index"][0] - want["index"][0]) < 2


# ---- candidates ----------------------------------------------------------------------------------------------------------------
def test_suppression_by_brute_force():
    rng = np.random.default_rng(0)
    points, scores, radii = rng.uniform(0, 60, (80, 3)), rng.permutation(80) / 80, rng.uniform(1, 12, 80)
    alive, keep = set(range(80)), []
    while alive:
        best = max(alive, key=lambda k: scores[k])
        keep.append(best)
        alive = {k for k in alive if k != best and sum((points[k] - points[best])**2)**0.5 >= max(6.0, radii[best])}
    assert nms_mm(points, scores, radii=radii).tolist() == keep
    assert nms_mm(points + 100, scores, radii=radii).tolist() == keep and len(nms_mm(np.zeros((0, 3)), [])) == 0
    with pytest.raises(ConfigError, match="scores"):
        nms_mm(points, scores[1:])


@pytest.mark.parametrize("code", ["SPL", "IPL", "ARI"])
def test_a_perfect_network_gives_a_perfect_list_in_any_orientation(code):
    case = thorax_phantom(4, shape=(40, 48, 56), spacing_mm=(6.0, 6.0, 6.0), nodules=["solid", "ground-glass"])
    volume, mask = case.volume.reorient(code), case.volume.with_array((case.labels > 1).astype(np.int16)).reorient(code).array > 0
    low = np.maximum(np.argwhere(mask).min(0) - 16, 0)

    def oracle(x):
        truth = {"index": np.array([volume.index(n.centroid_mm) for n in case.nodules]) - low, "size": [n.diameter_mm for n in case.nodules], "kind": [0, 2]}
        return as_logits(centre_targets(x.shape[1:4], truth, spacing_mm=volume.spacing_mm, classes=3))[None]
    found = find_lesions(oracle, volume, kinds=KINDS, mask=mask)
    assert len(found) == 2
    for nodule in case.nodules:
        one = min(found, key=lambda d: np.linalg.norm(np.subtract(d.centroid_mm, nodule.centroid_mm)))
        assert np.allclose(one.centroid_mm, nodule.centroid_mm, atol=1e-3) and one.kind == nodule.kind and np.isclose(one.diameter_mm, nodule.diameter_mm)
        z, y, x = np.rint(volume.index(nodule.centroid_mm)).astype(int)
        assert one.box[0] <= z < one.box[3] and one.box[1] <= y < one.box[4] and one.box[2] <= x < one.box[5]


def test_a_centre_outside_the_mask_is_no_finding():
    volume = Volume(np.full((32, 32, 32), -800, np.int16), modality="CT", units="HU")
    maps = as_logits(centre_targets((32, 32, 32), {"index": [[8.0, 8, 8], [24, 24, 24]], "size": [6.0, 6.0], "kind": [0, 1]}, classes=3))[None]
    mask = np.zeros(volume.shape, bool)
    mask[:16] = True
    both, one = find_lesions(lambda x: maps, volume, kinds=KINDS), find_lesions(lambda x: maps[:, :x.shape[1] // 2], volume, kinds=KINDS, mask=mask)
    assert len(both) == 2 and len(one) == 1 and np.allclose(one[0].centroid_mm, (8, 8, 8))


def test_wrong_volumes_and_masks_are_refused():
    volume = Volume(np.zeros((16, 16, 16), np.int16), units="HU")
    for one, mask in ((Volume(np.zeros((16, 16, 16))), None), (volume, np.zeros((16, 16, 16), bool)), (volume, np.ones((16, 16, 8), bool))):
        with pytest.raises(DatasetError):
            find_lesions(lambda x: x, one, kinds=KINDS, mask=mask)


def test_second_look_changes_scores_as_logits_do():
    volume = Volume(np.zeros((16, 16, 16), np.int16), units="HU")
    first = [Detection("nodule", 0.9, "solid", (4.0, 4.0, 4.0), 4.0), Detection("nodule", 0.6, "solid", (12.0, 12.0, 12.0), 4.0)]
    logits = np.array([[3.0, 0.0, -9.0, -9.0], [0.0, -9.0, 3.0, -9.0]])
    kept, mixed = (judge(lambda x: logits, volume, first, kinds=KINDS, size=8, weight=w) for w in (0.0, 0.5))
    assert [round(one.score, 6) for one in kept] == [0.9, 0.6]
    assert mixed[0].kind == "part-solid" and mixed[0].centroid_mm == (12.0, 12.0, 12.0) and np.isclose(sum(mixed[0].kind_scores), 1)
    odds = np.log(0.6 / 0.4) / 2 + (np.log(np.exp(-9) * 2 + np.exp(3))) / 2
    assert np.isclose(mixed[0].score, 1 / (1 + np.exp(-odds))) and judge(None, volume, [], kinds=KINDS) == []
    with pytest.raises(ConfigError, match="second network"):
        judge(lambda x: logits[:, :2], volume, first, kinds=KINDS, size=8)


def test_detections_fit_into_the_report():
    flat = Detection("opacity", 0.7, box=(3, 4, 20, 30))
    solid = Detection("nodule", 0.7, "solid", (1.0, 2.0, 3.0), 8.0, (1, 2, 3, 6, 7, 8))
    record = Prediction("answered", "a.dcm", findings=tuple(Finding(**one.finding()) for one in (flat, solid))).to_dict()
    assert [f["box_yx"] for f in record["findings"]] == [[3, 4, 20, 30], [2, 3, 7, 8]] and record["findings"][1]["slice"] == 3


def test_cubes_are_slices_of_the_padded_image():
    array = np.random.default_rng(0).integers(-1000, 1000, (9, 10, 11)).astype(np.int16)
    volume, wide = Volume(array, make_affine((2.0, 2.0, 2.0)), units="HU"), np.pad(array, 8, constant_values=-1000)
    for at in ((0, 0, 0), (4, 5, 6), (8, 9, 10)):
        want = wide[tuple(slice(a + 8 - 3, a + 8 + 3) for a in at)]
        assert np.array_equal(cut(array, at, 6), want) and np.array_equal(cube_around(volume, volume.world(np.array(at, float)), 6), want)
    assert (cut(array, (-20, 5, 5), 6) == -1000).all() and hu_to_unit(array).min() >= 0


def test_two_pictures_of_a_ct():
    hu = np.array([-1200, -1000, -750, -500, 400, 900])
    assert np.allclose(ct_channels(hu), np.c_[[0, 0, 250 / 1400, 500 / 1400, 1, 1], [0, 0, 0.5, 1, 1, 1]]) and ct_channels(hu).dtype == np.float32


def test_candidate_net_refuses_what_it_cannot_use():
    for shape, classes in (((7, 8, 8, 1), 4), ((8, 1), 4), ((8, 8, 8, 1), 1)):
        with pytest.raises(ConfigError, match="no candidate net"):
            candidate_net(shape, classes)


# ---- nodules and scores --------------------------------------------------------------------------------------------------------
def test_sensitivities_equal_the_phantoms_own_froc():
    rng = np.random.default_rng(3)
    scans = []
    for _ in range(12):
        nodules = [Nodule(tuple(rng.uniform(-80, 80, 3)), float(rng.uniform(4, 14)), "solid", 30.0, "left") for _ in range(rng.integers(0, 5))]
        near = [np.add(n.centroid_mm, rng.normal(0, 2, 3)) for n in nodules if rng.random() < 0.8]
        points = np.array(near + list(rng.uniform(-80, 80, (15, 3))))
        scans.append((points, rng.permutation(len(points)) / len(points) + 0.2 * (np.arange(len(points)) < len(near)), nodules))
    ours = sensitivities([score_scan(list(zip(p, s)), n) for p, s, n in scans])
    assert np.allclose(ours, froc_cpm(scans)["sensitivity"], atol=1e-4) and 0.2 < ours.mean() < 1
    figure = cpm_figure([[score_scan(list(zip(p, s)), n) for p, s, n in scans]], target=0.5)
    assert figure["low"] <= figure["value"] <= figure["high"] and figure["n"] == 12 and figure["sd"] is None


def test_small_nodules_are_neither_wanted_nor_false():
    small, large = (Nodule((x, 0.0, 0.0), d, "solid", 30.0, "left") for x, d in ((0.0, 3.5), (40.0, 8.0)))
    hits, alarms, best = score_scan([((0.0, 1, 0), 0.9), ((41.0, 0, 0), 0.8), ((90.0, 0, 0), 0.3)], [small, large])
    assert hits.tolist() == [0.8] and alarms.tolist() == [0.3] and best == [1]
    with pytest.raises(ConfigError, match="no nodule"):
        sensitivities([(np.zeros(0), np.zeros(1))])


def test_quality_measures_what_was_found():
    scan = lung_scan(phantom_cohort(2, seed=13)[1], spacing_mm=10.0, folder=False)
    large = [n for n in scan.nodules if n.diameter_mm >= 4]
    found = [Detection("nodule", 0.9, n.kind if k else "other", tuple(np.add(n.centroid_mm, (1.0, 0, 0))), n.diameter_mm + 0.5) for k, n in enumerate(large)]
    facts = quality([found], [scan])
    assert np.allclose(facts["centre_mm"], 1) and np.allclose(facts["diameter_mm"], 0.5) and facts["kind_right"].sum() == len(large) - 1


def test_crowded_patients_keep_their_nodules_and_hold_no_collisions():
    patient = phantom_cohort(3, seed=10)[2]
    many = crowd(patient, 14)
    assert many == crowd(patient, 14) and many.nodules[:len(patient.nodules)] == patient.nodules and many.malignant[:len(patient.nodules)] == patient.malignant
    gaps = [np.linalg.norm(np.subtract(a.centroid_mm, b.centroid_mm)) - (a.diameter_mm + b.diameter_mm) / 2 for i, a in enumerate(many.nodules) for b in many.nodules[:i]]
    assert min(gaps) > 5.9 and np.allclose(many.probabilities[:len(patient.nodules)], patient.probabilities)


def test_patches_hold_what_they_say(tmp_path):
    made = nodule_patches(10, [0, 2], size=16, spacing_mm=5.0, negatives=2, crowded=6, folder=tmp_path)
    kept = nodule_patches(10, [0, 2], size=16, spacing_mm=5.0, negatives=2, crowded=6, folder=tmp_path)
    assert all(np.array_equal(made[name], kept[name]) for name in made) and len(made["kind"]) == 16 and (made["kind"] < 0).sum() == 4
    large = (made["kind"] == 0) & (made["diameter_mm"] > 12)
    assert np.abs(made["offset_mm"]).max() <= 2.5 and (made["images"][large][:, 8, 8, 8] > -300).all() and len(set(made["patient_ids"])) == 2
    scan = lung_scan(crowd(phantom_cohort(1, seed=10)[0], 6), spacing_mm=5.0, folder=tmp_path)
    away = scan.volume.world(free_places(scan).astype(float))
    assert all((np.linalg.norm(away - n.centroid_mm, axis=1) > n.diameter_mm / 2 + 10).all() for n in scan.nodules)


def test_draws_are_functions_of_the_step_and_hold_centres():
    plan, scans = PLANS["ci"], [lung_scan(crowd(phantom_cohort(1, seed=10)[0], 6), spacing_mm=5.0, folder=False)]
    draw = nodule_draw(scans, plan, seed=3)
    (x, y), again = draw(5), nodule_draw(scans, plan, seed=3)(5)
    assert np.array_equal(x, again[0]) and np.array_equal(y, again[1]) and not np.array_equal(x, draw(6)[0]) and (y[0, ..., 1] == 1).any()
    data = second_set(scans, [[Detection("nodule", 0.5, None, tuple(scans[0].volume.world(p.astype(float))), 5.0) for p in free_places(scans[0])[:5]]], plan)
    cubes, labels = second_draw(data, plan)(0)
    assert cubes.shape == (8, 13, 13, 13, 2) and labels[1::2, 0].all() and not labels[::2, 0].any()


def test_a_candidate_stays_in_the_middle_of_every_pose():
    plan, one = PLANS["ci"], np.full((1, 13, 13, 13), -900, np.int16)
    one[0, 6, 6, 6], one[0, 1, 4, 9] = 300, 100
    poses = {np.argwhere((cube[..., 0] > 0.6) & (cube[..., 0] < 0.85)).tobytes() for step in range(8)
             for cube in second_draw({"images": one, "labels": np.array([1])}, plan)(step)[0] if cube[..., 0].argmax() == cube[..., 0].size // 2}
    assert 20 < len(poses) <= 48


def test_mirrored_boxes_stay_on_their_opacity():
    image = np.zeros((1, 128, 128), np.uint8)
    image[0, 30:50, 20:60] = 200
    draw = box_draw(image, np.array([[[30.0, 20, 50, 60]]]), batch=8)
    for step in range(3):
        for x, y in zip(*draw(step)):
            found = decode(as_logits(y), classes=1, box=True, threshold=0.5)
            middle, half = found["index"][0] + 0.5, found["size"][0] / 2
            bright = np.argwhere(x[..., 0] > 0.4)
            assert np.allclose(middle - half, bright.min(0), atol=0.01) and np.allclose(middle + half, bright.max(0) + 1, atol=0.01)


def test_usual_place_needs_no_image():
    boxes = np.array([[0.0, 80, 10, 100], [0, 90, 10, 110], [5, 10, 15, 20]])
    assert usual_boxes(boxes, 128).tolist() == [[0.0, 85.0, 10.0, 105.0], [5.0, 10.0, 15.0, 20.0]]


def test_merging_two_looks():
    one = Detection("nodule", 0.9, "solid", (0.0, 0.0, 0.0), 5.0)
    look = Detection("nodule", 0.1, "ground-glass", (0.0, 0.0, 0.0), 5.0)
    assert merged([{"detection": one, "second": look}], 0.5)[0].score == 0.5 and merged([{"detection": one, "second": look}], 0.0)[0] == one
