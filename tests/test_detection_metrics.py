"""Hits, false alarms, FROC and average precision: LUNA16's rule by hand and as a program, scikit-learn, MONAI's numbers, loops, and what must hold at the edges."""
import math

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, roc_curve

from medimg.data.boxes import Box, box_iou
from medimg.errors import ConfigError
from medimg.evaluation.detection import RATES, Match, cpm_draws, froc_curve, match_points, only_lesions, sensitivities
from medimg.evaluation.precision import average_precision, evaluate_detection, match_boxes, match_centres


def box_cases():
    """Name -> images of (boxes, scores, truths, ignored): what benchmarks/evaluation/detection.py asks MONAI about. 23 counted lesions, so that no recall is a multiple of 1/100."""
    made = {}
    for name, noise, some in (("sharp", 2.0, False), ("rough", 6.0, False), ("with ignored", 4.0, True)):
        rng, images, left = np.random.default_rng(len(name)), [], 23
        while left:
            k = min(left, int(rng.integers(0, 4)))
            corner = np.array([[10.0 + 60 * j, *rng.uniform(0, 80, 1)] for j in range(k)]).reshape(k, 2)
            truth = np.concatenate([corner, corner + rng.uniform(15, 40, (k, 2))], axis=1)
            near = [t + rng.normal(0, noise, 4).clip(-7, 7) for t in truth for _ in range(rng.integers(0, 3))]
            away = rng.uniform(0, 60, (rng.integers(0, 4), 2))
            boxes = np.array(near + [[*a, *(a + 20)] for a in away]).reshape(-1, 4)
            ignored = np.zeros(k, bool)
            if some and k > 1:
                extra = [400.0, 400, 440, 430]
                truth, ignored = np.vstack([truth, extra]), np.r_[ignored, True]
                boxes = np.vstack([boxes, np.add(extra, rng.normal(0, 1, 4))])
            images.append((boxes, rng.random(len(boxes)), truth, ignored))
            left -= k
        made[name] = images
    return made


def froc_cases():
    """Name -> parts, some lesions never marked."""
    made = {}
    for seed, (scans, level) in enumerate(((40, 3), (10, 1), (5, 8))):
        rng = np.random.default_rng(seed)
        parts = [(rng.normal(1, 1, rng.integers(0, 4)), rng.normal(0, 1, rng.poisson(level))) for _ in range(scans)]
        made[f"froc {scans} scans"] = [(np.where(rng.random(len(h)) < 0.15, -np.inf, h), a) for h, a in parts]
    return made


# MONAI 1.6.1: average precision at IoU 0.3 and 0.5 (COCOMetric), and the mean sensitivity at the seven rates (compute_froc_score)
MONAI = {
    "sharp": [0.3209006123, 0.3043989622],
    "rough": [0.3209006123, 0.1530544576],
    "with ignored": [0.280950531, 0.2409240924],
    "froc 40 scans": 0.587755102,
    "froc 10 scans": 0.7755102041,
    "froc 5 scans": 0.1428571429,
}


# ---- LUNA16 --------------------------------------------------------------------------------------------------------------------
def test_luna16_by_hand():
    """Two scans, three nodules and one excluded finding; every number worked out here.

    Scan A: nodule N1 (diameter 10 mm at x = 0), nodule N2 (6 mm at x = 30), excluded E (8 mm at x = 60). Marks: .9 at 1 (N1), .8 at 4.9 (N1 again), .7 at 5.0 (on the radius:
    alarm), .6 at 62 (E, ignored), .5 at 28 (N2). Scan B: nodule N3 (20 mm at x = 0), marks .85 at 40 (alarm), .4 at 3 (N3), .3 at -40 (alarm).
    Alarms .85, .7, .3; nodules .9, .5, .4. Two scans: at 1/8 and 1/4 no alarm is allowed: above .85 is 1 nodule of 3. At 1/2 one is: above .7, 1 of 3. At 1 two are: above .3, 3 of 3.
    """
    a = match_points([[1.0, 0, 0], [4.9, 0, 0], [5.0, 0, 0], [62.0, 0, 0], [28.0, 0, 0]], [0.9, 0.8, 0.7, 0.6, 0.5], [[0.0, 0, 0], [30.0, 0, 0], [60.0, 0, 0]], [5.0, 3.0, 4.0],
                     counted=[True, True, False])
    b = match_points([[40.0, 0, 0], [3.0, 0, 0], [-40.0, 0, 0]], [0.85, 0.4, 0.3], [[0.0, 0, 0]], 10.0)
    assert a.hits.tolist() == [0.9, 0.5] and a.alarms.tolist() == [0.7] and a.best == [0, 4] and b.hits.tolist() == [0.4] and b.alarms.tolist() == [0.85, 0.3]
    assert np.allclose(sensitivities([a, b]), [1 / 3, 1 / 3, 1 / 3, 1, 1, 1, 1]) and math.isclose(sensitivities([a, b]).mean(), 5 / 7)
    # straight lines: points (0, 1/3), (1/2, 1/3), (1, 1/3), then .5 and .4 lift to 1 at one alarm a scan, which np.interp reads at its top
    assert np.allclose(sensitivities([a, b], interpolate=True), [1 / 3, 1 / 3, 1 / 3, 1, 1, 1, 1])
    curve = froc_curve([a, b])
    assert curve.alarms.tolist() == [0, 0, 0.5, 1, 1, 1, 1.5] and np.allclose(curve.sensitivity, np.array([0, 1, 1, 1, 2, 3, 3]) / 3) and curve.thresholds[1:].tolist() == [0.9, 0.85, 0.7, 0.5, 0.4, 0.3]


def luna16_program(scans, rates=RATES):
    """The challenge's own counting, written anew from its description: loops over nodules and marks, scikit-learn's ROC curve, straight lines between its points."""
    truth, score, missed = [], [], 0
    for points, scores, centres, radii, counted in scans:
        left = dict(enumerate(scores))
        for centre, radius, wanted in zip(centres, radii, counted):
            inside = [k for k, point in enumerate(points) if sum((point - centre) ** 2) < radius**2]
            for k in inside:
                left.pop(k, None)
            if wanted and inside:
                truth.append(1)
                score.append(max(scores[k] for k in inside))
            elif wanted:
                missed += 1
        truth += [0] * len(left)
        score += left.values()
    fpr, tpr, _ = roc_curve(truth, score, drop_intermediate=False)
    hits = sum(truth)
    return np.interp(rates, fpr * (len(truth) - hits) / len(scans), tpr * hits / (hits + missed))


@pytest.mark.parametrize("seed", range(10))
def test_points_equal_luna16s_program(seed):
    rng, scans = np.random.default_rng(seed), []
    for _ in range(12):
        k, m = rng.integers(0, 5), rng.integers(0, 12)
        centres, radii = rng.uniform(-30, 30, (k, 3)), rng.uniform(2, 15, k)
        points = np.concatenate([rng.uniform(-40, 40, (m, 3)), np.repeat(centres, 2, 0) + rng.normal(0, 6, (2 * k, 3))])
        scans.append((points, rng.random(len(points)).round(1 if seed % 3 == 0 else 9), centres, radii, rng.random(k) < 0.8))
    parts = [match_points(*scan[:4], counted=scan[4]) for scan in scans]
    assert np.allclose(sensitivities(parts, interpolate=True), luna16_program(scans), atol=1e-12)
    assert (sensitivities(parts) <= sensitivities(parts, interpolate=True) + 1e-12).all()


def test_one_mark_in_two_lesions_finds_both_and_exclusion_yields_to_a_hit():
    both = match_points([[4.0, 0.0]], [0.9], [[0.0, 0.0], [8.0, 0.0]], 7.0)
    assert both.hits.tolist() == [0.9, 0.9] and both.best == [0, 0] and len(both.alarms) == 0
    mixed = match_points([[4.0, 0.0]], [0.9], [[0.0, 0.0], [8.0, 0.0]], 7.0, counted=[True, False])
    assert mixed.hits.tolist() == [0.9] and len(mixed.alarms) == 0


# ---- curves --------------------------------------------------------------------------------------------------------------------
def slow_sensitivities(parts, rates=RATES):
    """The largest sensitivity over all thresholds that keep within the rate."""
    hits, alarms = (np.concatenate([np.asarray(p[k], float) for p in parts]) for k in (0, 1))
    limits = np.r_[np.inf, hits, alarms, np.nextafter(np.r_[hits[np.isfinite(hits)], alarms], np.inf), -1e300]
    return [max((hits[np.isfinite(hits)] >= t).sum() / len(hits) for t in limits if (alarms >= t).sum() <= rate * len(parts)) for rate in rates]


@pytest.mark.parametrize("name", froc_cases())
@pytest.mark.parametrize("digits", [0, 1, 9])
def test_stairs_equal_a_search_over_thresholds(name, digits):
    parts = [(np.round(h, digits), np.round(a, digits)) for h, a in froc_cases()[name]]
    assert np.allclose(sensitivities(parts), slow_sensitivities(parts), atol=1e-12)
    assert np.allclose(sensitivities(parts, rates=(0.3, 0.7)), slow_sensitivities(parts, (0.3, 0.7)), atol=1e-12)
    curve = froc_curve(parts)
    assert (np.diff(curve.alarms) >= 0).all() and (np.diff(curve.sensitivity) >= 0).all() and (np.diff(curve.thresholds) < 0).all()


@pytest.mark.parametrize("name", froc_cases())
def test_lines_equal_monais_froc(name):
    assert abs(sensitivities(froc_cases()[name], interpolate=True).mean() - MONAI[name]) <= 1e-6


def test_only_the_order_of_scores_matters():
    parts = froc_cases()["froc 40 scans"]
    bent = [(np.exp(h), np.exp(a)) for h, a in parts]
    bent = [(np.where(b == 0, -np.inf, b), a) for b, a in bent]
    assert (sensitivities(bent) == sensitivities(parts)).all() and average_precision(bent) == average_precision(parts)
    assert (sensitivities(parts[::-1]) == sensitivities(parts)).all()


# ---- average precision ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", froc_cases())
@pytest.mark.parametrize("digits", [0, 9])
def test_average_precision_equals_sklearn(name, digits):
    """scikit-learn knows no lesion without a mark: its recall ends at 1, ours at the share that was marked, so ours is that share of it."""
    parts = [(np.round(h, digits), np.round(a, digits)) for h, a in froc_cases()[name]]
    hits, alarms = (np.concatenate([p[k] for p in parts]) for k in (0, 1))
    marked = hits[np.isfinite(hits)]
    theirs = average_precision_score(np.r_[np.ones(len(marked)), np.zeros(len(alarms))], np.r_[marked, alarms])
    assert abs(average_precision(parts) - theirs * len(marked) / len(hits)) <= 1e-12


@pytest.mark.parametrize("name", box_cases())
def test_average_precision_equals_monais_coco(name):
    for limit, theirs in zip((0.3, 0.5), MONAI[name]):
        parts = [match_boxes(b, s, t, least_iou=limit, counted=~i) for b, s, t, i in box_cases()[name]]
        assert sum(len(p.hits) for p in parts) == 23 and abs(average_precision(parts, rule="coco") - theirs) <= 1e-6


def test_three_rules_by_hand():
    """Hits .9, .6, .5 and one lesion without a mark; alarms .8, .7: precision 1, 1/2, 3/5 at recall 1/4, 2/4, 3/4."""
    parts = [([0.9, -np.inf], [0.8]), ([0.6, 0.5], [0.7])]
    assert average_precision(parts) == pytest.approx((1 + 1 / 2 + 3 / 5) / 4) and average_precision(parts, rule="envelope") == pytest.approx((1 + 3 / 5 + 3 / 5) / 4)
    assert average_precision(parts, rule="coco") == pytest.approx((26 + 50 * 3 / 5) / 101)


def slow_match(boxes, scores, truths, limit, counted, repeats):
    overlap, taken, hits, alarms = box_iou(boxes, truths), {}, {}, []
    for mark in sorted(range(len(boxes)), key=lambda k: -scores[k]):
        fits = [k for k in range(len(truths)) if overlap[mark, k] >= limit]
        free = [k for k in fits if counted[k] and k not in taken]
        if free:
            best = max(free, key=lambda k: overlap[mark, k])
            taken[best], hits[best] = mark, scores[mark]
        elif not any(not counted[k] for k in fits) and not (repeats == "free" and fits):
            alarms.append(scores[mark])
    return [hits.get(k, -np.inf) for k in range(len(truths)) if counted[k]], sorted(alarms)


@pytest.mark.parametrize("repeats", ["alarm", "free"])
@pytest.mark.parametrize("seed", range(8))
def test_boxes_equal_a_loop(seed, repeats):
    rng = np.random.default_rng(seed)
    low, low2 = rng.uniform(0, 40, (9, 2)), rng.uniform(0, 40, (4, 2))
    boxes, truths = np.c_[low, low + rng.uniform(8, 30, (9, 2))], np.c_[low2, low2 + rng.uniform(8, 30, (4, 2))]
    scores, counted = rng.random(9), rng.random(4) < 0.7
    match = match_boxes(boxes, scores, truths, least_iou=0.2, counted=counted, repeats=repeats)
    hits, alarms = slow_match(boxes, scores, truths, 0.2, counted, repeats)
    assert match.hits.tolist() == hits and sorted(match.alarms) == alarms
    assert [None if k is None else scores[k] for k in match.best] == [None if np.isinf(h) else h for h in match.hits]
    same = match_boxes([Box(*b) for b in boxes], scores, [Box(*t) for t in truths], least_iou=0.2, counted=counted, repeats=repeats)
    assert same.hits.tolist() == hits


def test_centres_match_one_to_one_within_a_distance():
    match = match_centres([[0.0, 0], [1.0, 0], [9.0, 0], [14.0, 0]], [0.5, 0.9, 0.8, 0.7], [[0.0, 0], [10.0, 0]], within_mm=4.0)
    assert match.best == [1, 2] and match.hits.tolist() == [0.9, 0.8] and match.alarms.tolist() == [0.5, 0.7]      # 14 is within 4 mm of a lesion that is taken
    assert match_centres([[4.0, 0, 0]], [1.0], [[0.0, 0, 0]], within_mm=4.0).best == [0]                            # inclusive


# ---- intervals -----------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("groups", [None, "patients"])
def test_draws_equal_a_loop(groups):
    parts = [(np.round(h, 1), np.round(a, 1)) for h, a in froc_cases()["froc 10 scans"]]
    ids = np.array([0, 0, 1, 2, 2, 2, 3, 4, 5, 5]) if groups else np.arange(10)
    rng, loop = np.random.default_rng(7), []
    for _ in range(60):
        chosen = np.concatenate([np.flatnonzero(ids == g) for g in rng.integers(0, ids.max() + 1, ids.max() + 1)])
        try:
            loop.append(sensitivities([parts[k] for k in chosen]).mean())
        except ConfigError:
            loop.append(np.nan)
    assert np.allclose(cpm_draws(parts, groups=ids if groups else None, n_boot=60, seed=7), loop, atol=1e-12, equal_nan=True)


def test_average_precision_of_draws_equals_a_loop():
    parts = [(np.round(h, 1), np.round(a, 1)) for h, a in froc_cases()["froc 40 scans"]]
    report, rng = evaluate_detection(parts, n_boot=80, seed=3), np.random.default_rng(3)
    loop = [average_precision([parts[k] for k in rng.integers(0, 40, 40)]) for _ in range(80)]
    assert np.allclose((report["ap"].low, report["ap"].high), np.percentile(loop, [2.5, 97.5]), atol=1e-12)


def test_report_and_strata():
    parts = froc_cases()["froc 40 scans"]
    rng = np.random.default_rng(0)
    sizes = [rng.uniform(3, 20, len(h)) for h, _ in parts]
    report = evaluate_detection(parts, sizes_mm=sizes, edges_mm=(8, 14), n_boot=100)
    assert np.allclose([report[f"sensitivity[{r}]"].value for r in ("1/8", "1/4", "1/2", "1", "2", "4", "8")], sensitivities(parts)) and report["ap"].value == average_precision(parts)
    small = only_lesions(parts, [s < 8 for s in sizes])
    assert report["cpm[<8 mm]"].value == sensitivities(small).mean() and report["sensitivity[1, <8 mm]"].value == sensitivities(small)[3]
    assert sum(report[f"cpm[{name}]"].n for name in ("<8 mm", "8 to <14 mm", ">=14 mm")) == report["cpm"].n == sum(map(len, sizes))
    marked = np.concatenate([np.isfinite(h) for h, _ in parts])
    assert report["sensitivity[all marks]"].value == marked.mean() and report["alarms"].value == np.mean([len(a) for _, a in parts]) and report["alarms"].n == 40
    assert all(e.low <= e.value <= e.high for e in report.values()) and "40 scans" in report["cpm"].method
    with pytest.warns(UserWarning, match="no lesion of >=30 mm"):
        empty = evaluate_detection(parts, sizes_mm=sizes, edges_mm=(30,), n_boot=20)
    assert np.isnan(empty["cpm[>=30 mm]"].value) and empty["cpm[<30 mm]"].value == report["cpm"].value


def test_a_perfect_and_a_silent_program():
    perfect = [([0.9, 0.8], [])] * 5
    silent = [([-np.inf, -np.inf], [])] * 5
    assert sensitivities(perfect).tolist() == [1] * 7 and average_precision(perfect) == average_precision(perfect, rule="coco") == 1
    assert sensitivities(silent).tolist() == [0] * 7 and all(average_precision(silent, rule=r) == 0 for r in ("step", "envelope", "coco"))
    assert evaluate_detection(silent, n_boot=10)["cpm"].high == 0
    nobody = [match_points([], [], [], 5.0)] * 3
    assert nobody[0] == Match(nobody[0].hits, nobody[0].alarms, []) and sensitivities([*nobody, perfect[0]])[0] == 1


BAD = {"no scan": (lambda: sensitivities([]), "no scan"), "no lesion": (lambda: sensitivities([((), [0.3])]), "no nodule"), "no lesion, AP": (lambda: average_precision([((), [0.3])]), "no nodule"),
       "no lesion, report": (lambda: evaluate_detection([((), [0.3])]), "no nodule"), "NaN score": (lambda: froc_curve([([np.nan], [])]), "NaN"),
       "NaN mark": (lambda: match_points([[0.0, 0]], [np.nan], [[0.0, 0]], 1.0), "NaN"), "scores": (lambda: match_points([[0.0, 0]], [1, 2], [[0.0, 0]], 1.0), "one score"),
       "radius": (lambda: match_points([[0.0, 0]], [1], [[0.0, 0]], 0.0), "diameter"), "radii": (lambda: match_points([[0.0, 0]], [1], [[0.0, 0]], [1.0, 2.0]), "diameter"),
       "axes": (lambda: match_points([[0.0, 0]], [1], [[0.0, 0, 0]], 1.0), "same axes"), "place": (lambda: match_points([[np.inf, 0]], [1], [[0.0, 0]], 1.0), "not finite"),
       "counted": (lambda: match_points([[0.0, 0]], [1], [[0.0, 0]], 1.0, counted=[True, True]), "counted"), "box": (lambda: match_boxes([[5, 5, 5, 9]], [1], [[0, 0, 9, 9]]), "empty"),
       "box NaN": (lambda: match_boxes([[5, 5, np.nan, 9]], [1], [[0, 0, 9, 9]]), "finite"), "box shape": (lambda: match_boxes([[5, 5, 9]], [1], [[0, 0, 9, 9]]), "four"),
       "IoU": (lambda: match_boxes([[0, 0, 9, 9]], [1], [[0, 0, 9, 9]], least_iou=0), "above 0"), "repeats": (lambda: match_boxes([[0, 0, 9, 9]], [1], [[0, 0, 9, 9]], repeats="hit"), "free"),
       "within": (lambda: match_centres([[0.0, 0]], [1], [[0.0, 0]], within_mm=-1), "above 0"), "rule": (lambda: average_precision([([0.5], [])], rule="voc"), "envelope"),
       "edges": (lambda: evaluate_detection([([0.5], [])], sizes_mm=[[5]], edges_mm=(9, 6)), "growing"), "sizes": (lambda: evaluate_detection([([0.5], [])], sizes_mm=[[5, 6]]), "1 lesions"),
       "groups": (lambda: evaluate_detection([([0.5], [])], groups=[1, 2]), "ids")}


@pytest.mark.parametrize("name", BAD)
def test_wrong_input_is_refused(name):
    call, said = BAD[name]
    with pytest.raises(ConfigError, match=said):
        call()
