"""Metrics: hand values, published values, scikit-learn and scipy as oracles, properties, intervals that keep their promise."""
import json
import math
import time
from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medimg.errors import ConfigError
from medimg.evaluation import metrics as m

RATIOS = ("accuracy", "sensitivity", "specificity", "ppv", "npv", "f1")


@st.composite
def scored(draw, min_size=4, max_size=60):
    n = draw(st.integers(min_size, max_size))
    y = draw(st.lists(st.integers(0, 1), min_size=n, max_size=n).filter(lambda v: 0 < sum(v) < len(v)))
    s = draw(st.lists(st.integers(0, 12), min_size=n, max_size=n))
    return np.array(y), np.array(s) / 8


def cohort(n=624, seed=0, shift=1.5):
    rng = np.random.default_rng(seed)
    y = (rng.random(n) < 0.6).astype(int)
    return y, 1 / (1 + np.exp(-(shift * y + rng.normal(size=n) - shift / 2)))


# ---- oracles -------------------------------------------------------------------------------------------------------------------
@settings(deadline=None)
@given(scored())
def test_against_scikit_learn(case):
    sk = pytest.importorskip("sklearn.metrics", reason="scikit-learn is missing; remedy: pip install 'medimg[course]'")
    y, s = case
    assert m.auc(y, s) == pytest.approx(sk.roc_auc_score(y, s), abs=1e-12)
    for ours, theirs in zip(m.roc_curve(y, s), sk.roc_curve(y, s, drop_intermediate=False)):
        assert np.allclose(ours, theirs)
    y_hat = (s >= np.median(s)).astype(int)
    assert np.array_equal(m.confusion(y, y_hat, 2), sk.confusion_matrix(y, y_hat, labels=[0, 1]))
    assert m.accuracy(y, y_hat) == pytest.approx(sk.accuracy_score(y, y_hat))
    assert m.sensitivity(y, y_hat) == pytest.approx(sk.recall_score(y, y_hat))
    assert m.specificity(y, y_hat) == pytest.approx(sk.recall_score(1 - y, 1 - y_hat))
    assert m.ppv(y, y_hat) == pytest.approx(sk.precision_score(y, y_hat))
    assert m.f1(y, y_hat) == pytest.approx(sk.f1_score(y, y_hat))


def test_macro_auc_and_per_class_against_scikit_learn():
    sk = pytest.importorskip("sklearn.metrics", reason="scikit-learn is missing; remedy: pip install 'medimg[course]'")
    rng = np.random.default_rng(3)
    y = rng.integers(0, 4, 400)
    p = rng.dirichlet([1] * 4, 400) + 0.4 * np.eye(4)[y]
    p /= p.sum(axis=1, keepdims=True)
    result = m.evaluate_classification(y, p, classes="abcd", task="multiclass", n_boot=50)
    assert result["auc"].value == pytest.approx(sk.roc_auc_score(y, p, multi_class="ovr"))
    assert result["accuracy"].value == pytest.approx(sk.accuracy_score(y, p.argmax(1)))
    for c, name in enumerate("abcd"):
        one = (y == c, p.argmax(1) == c)
        assert result[f"auc[{name}]"].value == pytest.approx(sk.roc_auc_score(y == c, p[:, c]))
        assert result[f"sensitivity[{name}]"].value == pytest.approx(sk.recall_score(*one))
        assert result[f"ppv[{name}]"].value == pytest.approx(sk.precision_score(*one))
        assert result[f"f1[{name}]"].value == pytest.approx(sk.f1_score(*one))
        assert result[f"specificity[{name}]"].value == pytest.approx(sk.recall_score(~one[0], ~one[1]))


def test_auc_is_mann_whitney():
    stats = pytest.importorskip("scipy.stats", reason="scipy is missing; remedy: pip install medimg")
    y, s = cohort(200)
    s = np.round(s, 1)
    u = stats.mannwhitneyu(s[y == 1], s[y == 0]).statistic
    assert m.auc(y, s) == pytest.approx(u / ((y == 1).sum() * (y == 0).sum()))


@settings(deadline=None)
@given(st.integers(1, 2000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))), st.sampled_from([0.8, 0.9, 0.95, 0.99]))
def test_wilson_against_scipy(share, level):
    stats = pytest.importorskip("scipy.stats", reason="scipy is missing; remedy: pip install medimg")
    theirs = stats.binomtest(*share).proportion_ci(confidence_level=level, method="wilson")
    assert m.wilson_interval(*share, level) == pytest.approx(tuple(theirs), abs=1e-9)


# ---- published values ----------------------------------------------------------------------------------------------------------
def test_altman_and_bland_liver_scans():
    """BMJ 1994; 308: 1552 (sensitivity 0.90, specificity 0.63) and 309: 102 (PPV 0.88, NPV 0.67; at prevalence 0.25: 0.45, 0.95)."""
    y, scan = np.repeat([1, 1, 0, 0], [231, 27, 32, 54]), np.repeat([1, 0, 1, 0], [231, 27, 32, 54])
    assert [round(f(y, scan), 2) for f in (m.sensitivity, m.specificity, m.ppv, m.npv)] == [0.90, 0.63, 0.88, 0.67]
    assert [round(v, 2) for v in m.predictive_values(231 / 258, 54 / 86, 0.25)] == [0.45, 0.95]


@pytest.mark.parametrize("k, n, interval", [(81, 263, (0.2553, 0.3662)), (15, 148, (0.0624, 0.1605)),
                                            (0, 20, (0.0, 0.1611)), (1, 29, (0.0061, 0.1718))])
def test_newcombe_table(k, n, interval):
    """Newcombe, Stat Med 1998; 17: 857-872, table I, method 3."""
    assert tuple(round(v, 4) for v in m.wilson_interval(k, n)) == interval


# ---- properties ----------------------------------------------------------------------------------------------------------------
@settings(deadline=None)
@given(scored(), st.sampled_from([np.exp, np.sqrt, lambda s: 3 * s - 7, lambda s: s ** 3]))
def test_auc_sees_only_ranks(case, rise):
    y, s = case
    assert m.auc(y, rise(s)) == pytest.approx(m.auc(y, s), abs=1e-12)
    assert m.auc(y, -s) == pytest.approx(1 - m.auc(y, s)) == pytest.approx(m.auc(1 - y, s))


@settings(deadline=None)
@given(scored(), st.randoms(use_true_random=False))
def test_order_of_cases_does_not_matter(case, random):
    y, s = case
    order = np.array(random.sample(range(len(y)), len(y)))
    assert m.auc(y[order], s[order]) == pytest.approx(m.auc(y, s))
    assert m.youden_threshold(y[order], s[order]) == m.youden_threshold(y, s)
    assert np.array_equal(m.confusion(y[order], (s > 0.5)[order], 2), m.confusion(y, s > 0.5, 2))


@settings(deadline=None)
@given(scored())
def test_youden_threshold_is_the_best(case):
    y, s = case
    t = m.youden_threshold(y, s)
    index = [m.sensitivity(y, s >= u) + m.specificity(y, s >= u) for u in (t, *np.unique(s))]
    assert index[0] == pytest.approx(max(index)) and s.min() <= t <= s.max()


@settings(max_examples=25, deadline=None)
@given(scored(min_size=8), st.integers(0, 5))
def test_interval_contains_the_value(case, seed):
    y, s = case
    groups = np.arange(len(y)) // 2
    for e in m.evaluate_classification(y, s / 2, classes="ab", groups=groups, n_boot=30, seed=seed).values():
        assert math.isnan(e.value) or 0 <= e.low <= e.value <= e.high <= 1
    for metric in (m.auc, lambda y, p: float(np.mean(p))):
        e = m.bootstrap_ci(metric, y, s, n_boot=30, seed=seed)
        assert e.low <= e.value <= e.high


def test_weights_equal_the_loop():
    """The matrix of weights gives, resample for resample, what a loop over drawn cases gives."""
    y, p = cohort(80)
    p, groups = np.round(p, 1), np.arange(80) // 3
    for metric in (m.auc, m.accuracy, m.sensitivity, m.specificity, m.ppv, m.npv, m.f1):
        q = p if metric is m.auc else (p > 0.5).astype(int)
        fast = m.bootstrap_ci(metric, y, q, groups=groups, n_boot=40, seed=2)
        slow = m.bootstrap_ci(lambda a, b, metric=metric: metric(a, b), y, q, groups=groups, n_boot=40, seed=2)
        assert (fast.value, fast.low, fast.high) == pytest.approx((slow.value, slow.low, slow.high))


def test_block_size_changes_nothing():
    resamples = m._Resamples(50, np.arange(50) // 2, 37, 4)
    whole, parts = (np.concatenate(list(resamples.weights(cells))) for cells in (10**7, 300))
    assert np.array_equal(whole, parts) and whole.shape == (37, 50)
    assert (whole[:, ::2] == whole[:, 1::2]).all() and (whole.sum(axis=1) == 50).all()


def test_seed_repeats_and_order_of_ids_is_free():
    y, p = cohort(100)
    names = np.array([f"patient {i // 2}" for i in range(100)])
    assert m.bootstrap_ci(m.auc, y, p, groups=names, n_boot=50, seed=1) == m.bootstrap_ci(m.auc, y, p, groups=names, n_boot=50, seed=1)
    assert m.bootstrap_ci(m.auc, y, p, n_boot=50, seed=1).low != m.bootstrap_ci(m.auc, y, p, n_boot=50, seed=2).low


# ---- intervals keep their promise ----------------------------------------------------------------------------------------------
def test_coverage_by_patient_and_by_image():
    truth, hits, studies = NormalDist().cdf(1.2 / 2 ** 0.5), [], 200
    for seed in range(studies):
        rng = np.random.default_rng(seed)
        sick, patient = rng.random(120) < 0.5, np.repeat(np.arange(120), 6)
        s = 1.2 * sick[patient] + 0.8 * rng.normal(size=120)[patient] + 0.6 * rng.normal(size=720)
        both = [m.bootstrap_ci(m.auc, sick[patient].astype(int), s, groups=g, n_boot=200, seed=seed + 999) for g in (patient, None)]
        hits.append([e.low <= truth <= e.high for e in both])
    by_patient, by_image = np.mean(hits, axis=0)
    print(f"coverage of 95 % intervals in {studies} studies: by patient {by_patient:.1%}, by image {by_image:.1%}")
    assert 0.90 <= by_patient <= 0.99 and by_image < 0.8


def test_speed():
    y, p = cohort(624)
    best = 9.0
    for _ in range(3):
        start = time.perf_counter()
        m.bootstrap_ci(m.auc, y, p, n_boot=1000)
        best = min(best, time.perf_counter() - start)
    print(f"AUC, 1000 resamples of 624 cases: {best * 1000:.0f} ms")
    assert best < 0.5


# ---- edges ---------------------------------------------------------------------------------------------------------------------
def test_constant_scores_are_chance():
    assert m.auc([0, 1, 1, 0], [0.3] * 4) == 0.5
    assert m.youden_threshold([0, 1], [0.3, 0.3]) == 0.3
    assert m.auc([0, 1], [-np.inf, np.inf]) == 1.0 and m.auc([0, 1, 1], [-np.inf, -np.inf, np.inf]) == 0.75


def test_perfect_and_hopeless_are_not_certain():
    for scores, value in (([0.1] * 10 + [0.9] * 10, 1.0), ([0.9] * 10 + [0.1] * 10, 0.0)):
        e = m.bootstrap_ci(m.auc, [0] * 10 + [1] * 10, scores, n_boot=100)
        assert e.value == value and 0.2 < e.high - e.low < 0.35 and "Wilson" in e.method
    one = m.evaluate_classification([0] * 10 + [1] * 10, [0.1] * 10 + [0.9] * 10, classes="ab", groups=np.arange(20) // 5, n_boot=50)
    assert one["sensitivity"].low == pytest.approx(m.wilson_interval(2, 2)[0]), "two patients, not ten images"


@pytest.mark.parametrize("call, text", [
    (lambda: m.auc([1, 1], [0.1, 0.2]), "no case of class 0"), (lambda: m.auc([0, 0], [0.1, 0.2]), "no case of class 1"),
    (lambda: m.auc([0, 1, 1], np.full((3, 3), 1 / 3)), "no case of class 2"), (lambda: m.auc([0, 1], [0.1, np.nan]), "1 of 2 scores are NaN"),
    (lambda: m.auc([0, 1], [0.1]), "for 2 cases"), (lambda: m.auc([], []), r"shape \(0,\)"), (lambda: m.auc([0, 2], [0.1, 0.2]), "0 to 1"),
    (lambda: m.auc([0, 0.5], [0.1, 0.2]), "whole numbers"), (lambda: m.auc(["a", "b"], [0.1, 0.2]), "whole numbers"),
    (lambda: m.accuracy([0, 1], [0]), "2 labels and 1 answers"), (lambda: m.sensitivity([0, 0], [0, 1]), "no case is positive"),
    (lambda: m.specificity([1, 1], [0, 1]), "no case is negative"), (lambda: m.ppv([0, 1], [0, 0]), "called no case positive"),
    (lambda: m.npv([0, 1], [1, 1]), "called no case negative"), (lambda: m.f1([0, 0], [0, 0]), "none was called so"),
    (lambda: m.confusion([0, 3], [0, 1], 2), "from 0 to 1"), (lambda: m.roc_curve([0, 1, 2], np.eye(3)), "ROC curve of 3"),
    (lambda: m.wilson_interval(3, 2), "3 of 2"), (lambda: m.wilson_interval(0, 0), "0 of 0"),
    (lambda: m.bootstrap_ci(m.auc, [0, 1], [0, 1], level=95), "level 95"), (lambda: m.bootstrap_ci(m.auc, [0, 1], [0, 1], n_boot=0), "0 bootstrap"),
    (lambda: m.bootstrap_ci(m.auc, [0, 1], [0, 1], groups=[1]), "1 patient ids for 2"),
    (lambda: m.predictive_values(0.9, 63, 0.2), "specificity 63"),
    (lambda: m.evaluate_classification([0, 1], [0, 1], classes="ab", task="binry"), "did you mean binary"),
    (lambda: m.evaluate_classification([0, 1], [0, 1], classes="abc"), "2 classes for binary"),
    (lambda: m.evaluate_classification([0, 1, 2], np.eye(3), classes="abc"), "3 classes for binary")])
def test_mistakes_are_named(call, text):
    with pytest.raises(ConfigError, match=text):
        call()


def test_two_columns_are_one_score():
    y, p = cohort(50)
    both = np.stack([1 - p, p], axis=1)
    a, b = (m.evaluate_classification(y, q, classes=("normal", "sick"), n_boot=20) for q in (p, both))
    assert a == b and list(a) == ["auc", *RATIOS]
    assert m.evaluate_classification(y, p[:, None], classes=("normal", "sick"), n_boot=20) == a


def test_threshold_is_inclusive_and_used():
    e = m.evaluate_classification([0, 0, 1, 1], [0.1, 0.4, 0.4, 0.8], classes="ab", threshold=0.4, n_boot=20)
    assert (e["sensitivity"].value, e["specificity"].value) == (1.0, 0.5)


def test_what_is_not_defined_is_null_and_says_why():
    e = m.evaluate_classification([0, 0, 1, 1], [0.1, 0.2, 0.3, 0.4], classes="ab", threshold=0.9, n_boot=20)["ppv"]
    assert str(e) == "not defined" and e.to_dict()["value"] is None and "called no case positive" in e.method
    json.dumps(e.to_dict(), allow_nan=False)
    assert m.Estimate.from_dict(e.to_dict()).to_dict() == e.to_dict()


def test_estimate_reads_well():
    e = m.Estimate(0.9691, 0.9552, 0.9808, n=624, method="bootstrap")
    assert repr(e) == "0.969 [0.955, 0.981]" and f"{e:.2f}" == "0.97 [0.96, 0.98]" and float(e) == 0.9691
    assert m.Estimate.from_dict(json.loads(json.dumps(e.to_dict()))) == e


def test_prevalence():
    share = np.linspace(0.01, 0.99, 50)
    ppv, npv = m.predictive_values(0.9, 0.8, share)
    assert (np.diff(ppv) > 0).all() and (np.diff(npv) < 0).all()
    assert m.predictive_values(0.95, 0.95, 0.05)[0] == pytest.approx(0.5)
    assert math.isnan(m.predictive_values(0.9, 1.0, 0.0)[0])


def test_band_encloses_the_curve():
    y, p = cohort(300)
    fpr, low, high = m.roc_band(y, p, groups=np.arange(300) // 2, n_boot=200)
    curve = m.roc_curve(y, p)
    middle = np.interp(fpr, curve.fpr, curve.tpr)
    assert np.mean((low <= middle + 0.02) & (middle - 0.02 <= high)) > 0.97
    assert ((0 <= low) & (low <= high) & (high <= 1)).all() and fpr[[0, -1]].tolist() == [0, 1]
