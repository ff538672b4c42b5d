"""DeLong, BCa and the numbers of cases against published values, slow definitions and SciPy: ties, one class, clusters, the edge at 1."""
import math
import warnings

import numpy as np
import pytest
from scipy import stats
from sklearn import metrics as theirs

from medimg.errors import ConfigError
from medimg.evaluation import intervals as ours
from medimg.evaluation.metrics import _Resamples, auc, bootstrap_ci, wilson_interval


def draw(seed, n=90, values=None, shift=1.0):
    rng = np.random.default_rng(seed)
    y = (rng.random(n) < 0.4).astype(int)
    s = rng.normal(shift * y)
    return y, s if values is None else np.round(s * values) / values


def pairs_of(y, s):
    return (s[y == 1][:, None] > s[y == 0]) + 0.5 * (s[y == 1][:, None] == s[y == 0])


def obuchowski(y, columns, groups):
    """Her formula (Biometrics 1997), written with all pairs and a loop over patients."""
    pairs = [pairs_of(y, s) for s in columns]
    theta, ids = [p.mean() for p in pairs], list(dict.fromkeys(groups))
    g1, g0, m, n = groups[y == 1], groups[y == 0], (y == 1).sum(), (y == 0).sum()
    v10 = [[p.mean(1)[g1 == g].sum() - (g1 == g).sum() * t for g in ids] for p, t in zip(pairs, theta)]
    v01 = [[p.mean(0)[g0 == g].sum() - (g0 == g).sum() * t for g in ids] for p, t in zip(pairs, theta)]
    i10, i01, i = len(set(g1)), len(set(g0)), len(ids)
    s10, s01 = i10 / ((i10 - 1) * m) * np.dot(v10, np.transpose(v10)), i01 / ((i01 - 1) * n) * np.dot(v01, np.transpose(v01))
    s11 = i / (i - 1) * np.dot(v10, np.transpose(v01))
    return s10 / m + s01 / n + (s11 + s11.T) / (m * n)


# ---- DeLong ------------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("values", [None, 2, 0.5])
@pytest.mark.parametrize("seed", range(6))
def test_placements_and_covariance_equal_all_pairs(seed, values):
    y, s = draw(seed, values=values)
    t = np.random.default_rng(seed + 50).normal(s)
    pairs, v = pairs_of(y, s), ours.placements(y, s)
    assert np.allclose(v[y == 1], pairs.mean(1), rtol=0, atol=1e-12) and np.allclose(v[y == 0], pairs.mean(0), rtol=0, atol=1e-12)
    parts = [(pairs_of(y, c).mean(1), pairs_of(y, c).mean(0)) for c in (s, t)]
    expected = np.cov([p[0] for p in parts]) / (y == 1).sum() + np.cov([p[1] for p in parts]) / (y == 0).sum()      # DeLong 1988
    aucs, covariance = ours._auc_covariance(y, [s, t])
    assert np.allclose(covariance, expected, rtol=1e-10, atol=1e-15)
    assert np.allclose(aucs, [theirs.roc_auc_score(y, s), theirs.roc_auc_score(y, t)], rtol=0, atol=1e-12)


@pytest.mark.parametrize("seed", range(4))
def test_covariance_of_patients_equals_obuchowskis_formula(seed):
    y, s = draw(seed, n=80, values=3)
    rng = np.random.default_rng(seed)
    t, groups = rng.normal(s), rng.integers(0, 25, 80)          # a patient may have sick and healthy images (eyes, breasts)
    assert np.allclose(ours._auc_covariance(y, [s, t], groups)[1], obuchowski(y, [s, t], groups), rtol=1e-10, atol=1e-15)


def test_delong_of_the_published_ratings():
    """109 CT ratings of Hanley and McNeil 1982; Stata's manual (roctab) prints 0.8932, standard error 0.0307, interval 0.83295 to 0.95339."""
    y = np.repeat([0, 1], [58, 51])
    s = np.r_[np.repeat(range(1, 6), [33, 6, 6, 11, 2]), np.repeat(range(1, 6), [3, 2, 2, 11, 33])]
    found = ours.delong_interval(y, s, scale="linear")
    assert (round(found.value, 4), round(found.low, 5), round(found.high, 5)) == (0.8932, 0.83295, 0.95339)
    assert round(float(np.sqrt(ours._auc_covariance(y, [s])[1][0, 0])), 4) == 0.0307


def test_infinite_scores_tie():
    """Log-odds of a sure network are infinite; two of them are a tie, not a difference."""
    y, s = np.array([0, 0, 1, 1, 1]), np.array([-np.inf, np.inf, np.inf, np.inf, 0.0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.allclose(ours.placements(y, s), [1, 1 / 3, 0.75, 0.75, 0.5])


def test_the_logit_interval_is_the_delta_method():
    y, s = draw(2)
    linear, logit = (ours.delong_interval(y, s, scale=scale) for scale in ("linear", "logit"))
    a, error = linear.value, (linear.high - linear.value) / stats.norm.ppf(0.975)
    ends = 1 / (1 + np.exp(-(np.log(a / (1 - a)) + np.array([-1, 1]) * stats.norm.ppf(0.975) * error / (a * (1 - a)))))
    assert np.allclose((logit.low, logit.high), ends, rtol=0, atol=1e-10)
    assert 0 < logit.low < logit.value < logit.high < 1


def test_perfect_separation_and_single_patients_claim_no_certainty():
    with pytest.warns(UserWarning, match="only 9 independent cases of class 0"):
        found = ours.delong_interval([0] * 9 + [1] * 9, range(18))
    assert (found.value, found.high) == (1, 1) and found.low == wilson_interval(9, 9)[0] and "Wilson" in found.method
    with pytest.warns(UserWarning, match="DeLong's variance is not defined|independent cases"):
        alone = ours.delong_interval([0, 0, 0, 1], [0.1, 0.9, 0.2, 0.5])
    assert alone.value == 2 / 3 and math.isnan(alone.low) and math.isnan(alone.high)


# ---- bootstrap ---------------------------------------------------------------------------------------------------------------------
PEERS = {"auc": theirs.roc_auc_score, "average_precision": theirs.average_precision_score, "brier": theirs.brier_score_loss, "accuracy": theirs.accuracy_score,
         "balanced_accuracy": theirs.balanced_accuracy_score, "sensitivity": theirs.recall_score, "ppv": theirs.precision_score, "f1": theirs.f1_score,
         "mcc": theirs.matthews_corrcoef, "kappa": theirs.cohen_kappa_score,
         "specificity": lambda y, a, sample_weight=None: theirs.recall_score(y, a, pos_label=0, sample_weight=sample_weight),
         "npv": lambda y, a, sample_weight=None: theirs.precision_score(y, a, pos_label=0, sample_weight=sample_weight)}
ON_SCORES = ("auc", "average_precision", "brier")


@pytest.mark.parametrize("groups", [None, np.arange(90) // 4])
@pytest.mark.parametrize("values", [None, 2])
def test_every_resample_of_every_metric_equals_sklearn(values, groups):
    y, s = draw(1, values=values)
    p = 1 / (1 + np.exp(-s))
    answers = (p >= 0.6).astype(int)
    drawn = ours.bootstrap_values(y, p, threshold=0.6, groups=groups, n_boot=25, seed=3)
    weights = np.concatenate(list(_Resamples(90, groups, 25, 3).weights()))
    assert set(ours.METRICS) == set(PEERS) and len(ours.METRICS) == 12
    for name, peer in PEERS.items():
        given = p if name in ON_SCORES else answers
        assert np.allclose(drawn[name], [peer(y, given, sample_weight=w) for w in weights], rtol=0, atol=1e-12), name
    found = ours.bootstrap_metrics(y, p, threshold=0.6, groups=groups, n_boot=25)
    for name, peer in PEERS.items():
        assert abs(found[name].value - peer(y, p if name in ON_SCORES else answers)) <= 1e-12, name


def test_same_resamples_as_bootstrap_ci_whatever_the_block():
    y, s = draw(4, n=300)
    p = 1 / (1 + np.exp(-s))
    values = ours.bootstrap_values(y, p, metrics=("auc",), groups=np.arange(300) // 2, n_boot=2500, seed=9)["auc"]
    percentile = bootstrap_ci(auc, y, p, groups=np.arange(300) // 2, n_boot=2500, seed=9)
    assert np.allclose(np.quantile(values, [0.025, 0.975]), (percentile.low, percentile.high), rtol=0, atol=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_bca_equals_scipy_for_a_mean(seed):
    x = np.random.default_rng(seed).exponential(size=50)
    peer = stats.bootstrap((x,), np.mean, n_resamples=999, method="BCa", rng=np.random.default_rng(seed))
    mine = ours.bca_interval(peer.bootstrap_distribution, x.mean(), x - x.mean())
    assert np.allclose(mine, peer.confidence_interval, rtol=0, atol=1e-12)
    y, s = draw(seed, n=120)
    p = 1 / (1 + np.exp(-s))
    loss = stats.bootstrap(((p - y) ** 2,), np.mean, n_resamples=999, method="BCa", rng=np.random.default_rng(seed)).confidence_interval
    found = ours.bootstrap_metrics(y, p, metrics=("brier",), n_boot=999, seed=seed)["brier"]
    assert np.allclose((found.low, found.high), loss, rtol=0, atol=1e-12)       # SciPy draws the same cases for the same seed


@pytest.mark.parametrize("name", ["auc", "average_precision", "mcc"])
def test_bca_is_close_to_scipys_jackknife(name):
    """SciPy takes the acceleration from leaving one case out, we from influences: they agree to order 1 / n."""
    y, s = draw(6, n=150, shift=1.5)
    p = 1 / (1 + np.exp(-s))
    given = p if name in ON_SCORES else (p >= 0.5).astype(int)
    peer = stats.bootstrap((y, given), lambda a, b: PEERS[name](a, b), paired=True, vectorized=False, n_resamples=300, method="BCa",
                           rng=np.random.default_rng(0)).confidence_interval
    found = ours.bootstrap_metrics(y, p, metrics=(name,), n_boot=300)[name]
    assert np.allclose((found.low, found.high), peer, rtol=0, atol=2e-3)


def test_influence_is_the_jackknife_in_the_limit():
    y, s = draw(8, n=400, values=4)
    p = 1 / (1 + np.exp(-s))
    order = np.argsort(-p, kind="stable")
    args = y[order], p[order], (p[order] >= 0.5).astype(int), ours._falling(y[order], p[order])
    exact, leave_out = ours._influences(*args), ours._all_metrics(*args, [1 - np.eye(400)])
    value = ours._all_metrics(*args, [np.ones((1, 400))])
    for name in ours.METRICS:
        jackknife = value[name] - leave_out[name]
        assert abs(exact[name].sum()) < 1e-7 and np.corrcoef(exact[name], jackknife)[0, 1] > 0.999, name
        assert np.allclose(exact[name], jackknife, rtol=0.02, atol=2e-3 if name == "average_precision" else 1e-4), name      # steep at the top rank


def test_no_spread_is_no_certainty():
    with pytest.warns(UserWarning, match="only 2 independent cases of class 1"):
        found = ours.bootstrap_metrics([0, 0, 0, 0, 1, 1], [0.1, 0.2, 0.3, 0.4, 0.8, 0.9])
    assert found["sensitivity"].low == wilson_interval(2, 2)[0] and found["specificity"].low == wilson_interval(4, 4)[0]
    assert found["accuracy"].n == 6 and found["mcc"].low < 0.5 and found["auc"].low < 0.5
    y, p = np.tile([0, 1], 30), np.full(60, 0.2)
    with pytest.warns(UserWarning, match="ppv is not defined"):
        silent = ours.bootstrap_metrics(y, p)
    assert math.isnan(silent["ppv"].value) and math.isnan(silent["mcc"].value) and silent["ppv"].n == 0
    assert silent["auc"].value == 0.5 and silent["sensitivity"].low == 0 < silent["sensitivity"].high


def test_intervals_hold_the_truth():
    """Coverage of the logit interval at a true AUC of 0.98, where the linear one fails."""
    kept = np.zeros(2)
    for seed in range(300):
        rng = np.random.default_rng(seed)
        y = np.repeat([1, 0], [30, 30])
        s = rng.normal(2 ** 0.5 * stats.norm.ppf(0.98) * y)
        kept += [e.low <= 0.98 <= e.high for e in (ours.delong_interval(y, s, scale=k) for k in ("logit", "linear"))]
    assert kept[0] / 300 > 0.92 and kept[1] / 300 < 0.92


# ---- numbers of cases --------------------------------------------------------------------------------------------------------------
def test_hanley_mcneil_is_the_error_of_exponential_scores():
    """The formula is exact for exponential scores; A = r / (1 + r) where the sick have r times the mean."""
    rng, y = np.random.default_rng(0), np.repeat([1, 0], [40, 60])
    seen = [(s[:40, None] > s[40:]).mean() for s in rng.exponential(np.where(y, 4.0, 1.0), (4000, 100))]
    assert abs(np.std(seen) / ours.hanley_mcneil_error(0.8, 40, 60) - 1) < 0.05 and abs(np.mean(seen) - 0.8) < 0.005


@pytest.mark.parametrize("value, width", [(0.9, 0.1), (0.5, 0.2), (1.0, 0.05), (0.97, 0.03)])
def test_case_numbers_are_the_smallest(value, width):
    n = ours.cases_needed(value, width, prevalence=0.2).positives
    z = stats.norm.ppf(0.975)
    def wide(n):
        return 2 * z / (1 + z * z / n) * math.sqrt(value * (1 - value) / n + z * z / (4 * n * n))
    assert wide(n) <= width < wide(n - 1)
    assert ours.cases_needed(value, width, metric="specificity", prevalence=0.8).negatives == n
    if value < 1:
        m, k = ours.cases_needed(value, width, metric="auc")
        assert 2 * z * ours.hanley_mcneil_error(value, m, k) <= width < 2 * z * ours.hanley_mcneil_error(value, m - 1, k - 1)


@pytest.mark.parametrize("call", [
    lambda: ours.placements([1, 1], [0, 1]), lambda: ours.placements([0, 1], [0, math.nan]), lambda: ours.delong_interval([0, 1, 2], [0, 1, 2]),
    lambda: ours.delong_interval([0, 1], [0, 1], scale="log"), lambda: ours.delong_interval([0, 1], [0, 1], groups=[1]),
    lambda: ours.delong_interval([0, 1], [0, 1], level=95), lambda: ours.bootstrap_metrics([0, 1], [0.1, 0.9], metrics=("auroc",)),
    lambda: ours.bootstrap_metrics([0, 1], [-3.0, 3.0]), lambda: ours.bootstrap_metrics([0, 0], [0.1, 0.9]), lambda: ours.bootstrap_metrics([0, 1], [0.1, 0.9], n_boot=0),
    lambda: ours.bootstrap_metrics([0, 1, 1], np.eye(3)), lambda: ours.bca_interval([math.nan], 0.5, [1, 2]), lambda: ours.cases_needed(0.9, 10),
    lambda: ours.cases_needed(1.0, 0.1, metric="auc"), lambda: ours.cases_needed(0.9, 0.1, metric="f1"), lambda: ours.cases_needed(0.9, 0.1, prevalence=0),
    lambda: ours.hanley_mcneil_error(0.9, 0, 5)])
def test_bad_input_is_refused_with_a_remedy(call):
    with pytest.raises(ConfigError) as caught:
        call()
    assert caught.value.remedy
