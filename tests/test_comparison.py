"""Two models on the same cases: published examples, SciPy, slow definitions; unpaired input; ties, perfect models and repeated images."""
import itertools
import math
import warnings

import numpy as np
import pytest
from scipy import stats
from sklearn import metrics as theirs

from medimg.errors import ConfigError
from medimg.evaluation import comparison as ours
from medimg.evaluation.metrics import Estimate


def draw(seed, n=80, values=None, gain=0.0):
    rng = np.random.default_rng(seed)
    y = (rng.random(n) < 0.4).astype(int)
    patient = rng.normal(size=n)
    a, b = (1 / (1 + np.exp(-(1.2 * y + g * y + patient + 0.7 * rng.normal(size=n)))) for g in (gain, 0.0))
    return y, *(s if values is None else np.round(s * values) / values for s in (a, b))


def pairs_of(y, s):
    return (s[y == 1][:, None] > s[y == 0]) + 0.5 * (s[y == 1][:, None] == s[y == 0])


@pytest.mark.parametrize("values", [None, 4])
@pytest.mark.parametrize("seed", range(6))
def test_delong_test_equals_all_pairs(seed, values):
    """DeLong 1988 by placements of every pair, with the contrast (1, -1)."""
    y, a, b = draw(seed, values=values, gain=0.5)
    parts = [(pairs_of(y, s).mean(1), pairs_of(y, s).mean(0)) for s in (a, b)]
    gap = parts[0][0].mean() - parts[1][0].mean()
    variance = np.var(parts[0][0] - parts[1][0], ddof=1) / (y == 1).sum() + np.var(parts[0][1] - parts[1][1], ddof=1) / (y == 0).sum()
    found = ours.delong_test(y, a, b)
    assert abs(found.difference.value - (theirs.roc_auc_score(y, a) - theirs.roc_auc_score(y, b))) <= 1e-12 and abs(gap - found.difference.value) <= 1e-12
    assert abs(found.p_value - 2 * stats.norm.sf(abs(gap) / variance ** 0.5)) <= 1e-9
    assert abs(found.difference.high - (gap + stats.norm.ppf(0.975) * variance ** 0.5)) <= 1e-9
    assert abs(ours.delong_test(y, b, a).p_value - found.p_value) <= 1e-12


def test_delong_test_at_its_edges():
    y, a, b = draw(0)
    same = ours.delong_test(y, a, np.exp(3 * a))
    assert (same.difference.value, same.p_value) == (0, 1)
    with pytest.warns(UserWarning, match="no test"):
        perfect = ours.delong_test(y, y + 0.0, np.zeros(len(y)))
    assert perfect.difference.value == 0.5 and math.isnan(perfect.p_value) and perfect.to_dict()["p_value"] is None
    doubled = ours.delong_test(np.tile(y, 2), np.tile(a, 2), np.tile(b, 2), groups=np.tile(np.arange(len(y)), 2))
    assert abs(doubled.p_value - ours.delong_test(y, a, b).p_value) < 0.01          # each image twice is no more evidence


@pytest.mark.parametrize("seed", range(3))
def test_permutation_equals_every_exchange(seed):
    """All 2^8 exchanges of ranks written out, AUC by scikit-learn; and DeLong's p-value for a larger study."""
    y, a, b = draw(seed, n=8, gain=1.0)
    y[:2] = 0, 1
    r, q = stats.rankdata(a), stats.rankdata(b)
    gaps = [theirs.roc_auc_score(y, np.where(swap, q, r)) - theirs.roc_auc_score(y, np.where(swap, r, q)) for swap in itertools.product((False, True), repeat=8)]
    found = ours.permutation_test(y, a, b)
    assert found.test.endswith("all 256 exchanges") and found.p_value == np.mean(np.abs(gaps) >= abs(gaps[0]) - 1e-12)
    y, a, b = draw(seed, n=200, gain=0.25)
    assert abs(ours.permutation_test(y, a, b, n=1000).p_value - ours.delong_test(y, a, b).p_value) < 0.05


def test_permutation_of_answers_is_the_exact_mcnemar_test():
    y, a, b = draw(3, n=60, gain=1.5)
    answers = (a > 0.6).astype(int), (b > 0.6).astype(int)
    odd = np.flatnonzero(answers[0] != answers[1])[:11]                     # 2^11 exchanges: all of them
    args = y[odd], answers[0][odd], answers[1][odd]
    found = ours.permutation_test(*args, metric=lambda y, p: np.mean(y == p), n=2048)
    assert "all 2048" in found.test and abs(found.p_value - ours.mcnemar(*args, exact=True).p_value) < 1e-12


def test_permutation_exchanges_whole_patients():
    y, a, b = draw(1, n=12, gain=1.0)
    y[:2] = 0, 1
    assert ours.permutation_test(y, a, b, groups=np.arange(12) // 3).test.endswith("all 16 exchanges")


@pytest.mark.parametrize("counts", [(1, 7), (0, 5), (4, 4), (13, 30), (0, 1), (0, 0)])
def test_mcnemar_equals_the_binomial_test(counts):
    only_a, only_b = counts
    y, a, b = np.ones(60, int), np.zeros(60, int), np.zeros(60, int)
    a[:only_a], b[only_a:only_a + only_b], a[50:], b[50:] = 1, 1, 1, 1
    exact, mid = ours.mcnemar(y, a, b, exact=True).p_value, ours.mcnemar(y, a, b).p_value
    odd = only_a + only_b
    if not odd:
        assert exact == mid == 1
        return
    assert abs(exact - stats.binomtest(only_a, odd).pvalue) <= 1e-10
    tail = stats.binom.cdf(min(counts), odd, 0.5) - 0.5 * stats.binom.pmf(min(counts), odd, 0.5)
    assert abs(mid - (1 - 0.5 * stats.binom.pmf(only_a, odd, 0.5) if only_a == only_b else 2 * tail)) <= 1e-10


def test_mcnemar_of_the_published_example():
    """Fagerland, Lydersen and Laake 2013, table 1 (Bentur et al.): 21 children, 7 against 1; exact 0.070, mid-p 0.039."""
    y, before, after = np.ones(21, int), np.repeat([1, 1, 0, 0], [1, 7, 1, 12]), np.repeat([1, 0, 1, 0], [1, 7, 1, 12])
    assert round(ours.mcnemar(y, before, after, exact=True).p_value, 3) == 0.070
    found = ours.mcnemar(y, before, after)
    assert round(found.p_value, 3) == 0.039 and found.difference.low < 6 / 21 < found.difference.high
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        many = ours.mcnemar([0, 1, 2, 2], [0, 1, 2, 0], [0, 2, 2, 2])       # several classes
    assert many.difference.value == 0


@pytest.mark.parametrize("groups", [None, np.arange(80) // 2])
def test_paired_bootstrap_is_that_of_both_models_on_the_same_cases(groups):
    y, a, b = draw(2, gain=0.6)
    fast, slow = (ours.paired_bootstrap(m, y, a, b, groups=groups, n_boot=200, seed=5) for m in ("auc", theirs.roc_auc_score))
    assert abs(fast.value - slow.value) <= 1e-12 and abs(fast.low - slow.low) < 0.03 and "BCa" in fast.method
    assert ours.paired_bootstrap("brier", y, a, a, n_boot=50) == Estimate(0.0, 0.0, 0.0, 0.95, 80, "paired BCa bootstrap, 50 resamples of 80 images (no patient ids)")
    back = ours.paired_bootstrap("auc", y, b, a, groups=groups, n_boot=200, seed=5)
    assert np.allclose((-back.high, -back.low), (fast.low, fast.high), atol=0.01)
    if groups is None:
        loss = stats.bootstrap(((a - y) ** 2 - (b - y) ** 2,), np.mean, n_resamples=500, method="BCa", rng=np.random.default_rng(3)).confidence_interval
        found = ours.paired_bootstrap("brier", y, a, b, n_boot=500, seed=3)
        # the two models are sorted in different ways, so the draws are the same by patient, not by place
        assert np.allclose((found.low, found.high), loss, rtol=0, atol=1e-12)


def test_holm_by_its_definition():
    """Rejecting below a level is the same as Holm's steps; and the example of his procedure."""
    assert ours.holm({"x": 0.01, "y": 0.04, "z": 0.03}) == {"x": 0.03, "y": 0.06, "z": 0.06}
    rng = np.random.default_rng(0)
    for _ in range(200):
        p = np.round(rng.random(rng.integers(1, 9)) ** 3, 2)                # ties and zeros
        adjusted, alpha = ours.holm(p), 0.05
        rejected, order = np.zeros(len(p), bool), np.argsort(p, kind="stable")
        for step, i in enumerate(order):
            if p[i] > alpha / (len(p) - step):
                break
            rejected[i] = True
        assert np.array_equal(adjusted <= alpha + 1e-15, rejected) and (adjusted >= p).all() and (adjusted <= 1).all()
    assert len(ours.holm([])) == 0


def test_non_inferiority():
    verdicts = {(0.01, 0.03): "superior", (-0.01, 0.02): "non-inferior", (-0.015, -0.001): "non-inferior", (-0.03, 0.02): "inconclusive", (-0.05, -0.03): "inferior"}
    for (low, high), verdict in verdicts.items():
        found = ours.non_inferior(Estimate((low + high) / 2, low, high), 0.02)
        assert found.verdict == verdict and found.holds == (verdict in ("superior", "non-inferior"))
    y, a, b = draw(0, n=400)
    assert ours.non_inferior(ours.delong_test(y, a, b), 0.5).holds


def test_bland_altman_of_the_published_example():
    """Bland and Altman, Lancet 1986: peak flow of 17 people; bias -2.1 (-22.0 to 17.8), sd 38.8; limits by 2 sd -79.7 and 75.5."""
    wright = np.array([494, 395, 516, 434, 476, 557, 413, 442, 650, 433, 417, 656, 267, 478, 178, 423, 427])
    mini = np.array([512, 430, 520, 428, 500, 600, 364, 380, 658, 445, 432, 626, 260, 477, 259, 350, 451])
    found = ours.bland_altman(wright, mini)
    assert [round(v, 1) for v in (found.bias.value, found.bias.low, found.bias.high, found.sd)] == [-2.1, -22.0, 17.8, 38.8]
    assert np.allclose([found.bias.value + s * 2 * found.sd for s in (-1, 1)], [-79.7, 75.5], atol=0.1)         # theirs from rounded numbers
    assert abs((found.lower.high - found.lower.low) / 2 / (stats.t.ppf(0.975, 16) * (3 / 17) ** 0.5 * found.sd) - 1) < 0.03       # theirs: sqrt(3 s^2 / n)
    assert np.isclose(found.upper.value, found.bias.value + 1.959964 * np.std(wright - mini, ddof=1))


def test_limits_of_repeated_measurements_by_analysis_of_variance():
    rng = np.random.default_rng(1)
    sizes = rng.integers(1, 6, 50)
    patient = np.repeat(np.arange(50), sizes)
    d = rng.normal(0, 2, 50)[patient] + rng.normal(0, 1, len(patient))
    found = ours.bland_altman(d, np.zeros(len(d)), groups=patient, n_boot=200)
    parts = [d[patient == g] for g in range(50)]
    within = sum(((p - p.mean()) ** 2).sum() for p in parts) / (len(d) - 50)
    between = sum(len(p) * (p.mean() - d.mean()) ** 2 for p in parts) / 49
    m = (len(d) - (sizes ** 2).sum() / len(d)) / 49
    assert np.isclose(found.sd, np.sqrt((between - within) / m + within)) and np.isclose(found.bias.value, d.mean())
    plain = ours.bland_altman(d, np.zeros(len(d)))
    assert found.upper.high - found.upper.low > plain.upper.high - plain.upper.low


@pytest.mark.parametrize("seed", range(30))
def test_letters_say_what_is_told_apart(seed):
    rng = np.random.default_rng(seed)
    k = rng.integers(2, 9)
    different = np.triu(rng.random((k, k)) < rng.random(), 1)
    different |= different.T
    letters = ours.compact_letters(different)
    for i, j in itertools.combinations(range(k), 2):
        assert bool(set(letters[i]) & set(letters[j])) == (not different[i, j])
    assert all(letters) and "a" in letters[0]


@pytest.mark.parametrize("metric", ["auc", "accuracy", "brier", "mcc"])
def test_leader_board(metric):
    y, a, b = draw(4, n=300, gain=1.5)
    models = {"b": b, "a": a, "b again": b, "coin": np.random.default_rng(0).random(300)}
    board = ours.leader_board(y, models, metric=metric, n_boot=300)
    values = [e.value for e in board.values]
    assert values == sorted(values, reverse=metric != "brier") and board.names[0] == "a" and board.names[3] == "coin"
    place = {name: k for k, name in enumerate(board.names)}
    assert board.p_values[place["b"], place["b again"]] == 1 and set(board.letters[place["b"]]) & set(board.letters[place["b again"]])
    assert not set(board.letters[0]) & set(board.letters[3]) and "a" in board.ties() and "coin" not in board.ties()
    assert np.array_equal(board.p_values, board.p_values.T)
    if metric == "auc":
        pairs = list(itertools.combinations(board.names, 2))
        expected = ours.holm([ours.delong_test(y, models[m], models[n]).p_value for m, n in pairs])
        assert np.allclose([board.p_values[place[m], place[n]] for m, n in pairs], expected, rtol=1e-9, atol=1e-12)
    assert f"{metric} of 4 models: a " in repr(ours.leader_plot(board))


def test_pairing_by_id():
    found = ours.pair_by_id([3, 1, 2], {"a": ([1, 2, 3], [[0.1, 0.9], [0.2, 0.8], [0.3, 0.7]])})
    assert found["a"].tolist() == [[0.3, 0.7], [0.1, 0.9], [0.2, 0.8]]
    for ids, text in (([1, 2, 4], r"a has 1 missing \(first: 3\), 1 too many \(first: 4\)"), ([1, 2], "1 missing"), ([1, 1, 2], "occur twice")):
        with pytest.raises(ConfigError, match=text):
            ours.pair_by_id([3, 1, 2], {"a": (ids, np.zeros(len(ids)))})


Y, A = np.array([0, 1, 0, 1]), np.array([0.1, 0.9, 0.3, 0.6])


@pytest.mark.parametrize("call", [
    lambda: ours.delong_test(Y, A, A[:-1]), lambda: ours.delong_test(Y[:3], A, A), lambda: ours.delong_test(Y * 0, A, A), lambda: ours.delong_test(Y, A, A * math.nan),
    lambda: ours.permutation_test(Y, A, A[:-1]), lambda: ours.permutation_test(Y, A, A, metric="acc"), lambda: ours.permutation_test(Y * 0, A, A),
    lambda: ours.mcnemar(Y, Y, Y[:-1]), lambda: ours.mcnemar(Y, Y, A), lambda: ours.paired_bootstrap("auc", Y, A, A[:-1]), lambda: ours.paired_bootstrap("aucs", Y, A, A),
    lambda: ours.paired_bootstrap("ppv", Y, A, A * 0, n_boot=10), lambda: ours.holm([0.1, math.nan]), lambda: ours.holm([1.2]),
    lambda: ours.non_inferior(Estimate(0, -1, 1), 0), lambda: ours.non_inferior(Estimate(0, math.nan, math.nan), 0.1),
    lambda: ours.bland_altman([1, 2, 3], [1, 2]), lambda: ours.bland_altman([1, 2, math.inf], [1, 2, 3]), lambda: ours.bland_altman([1, 2], [1, 2]), lambda: ours.bland_altman([], []),
    lambda: ours.leader_board(Y, {"a": A, "b": A[:-1]}), lambda: ours.leader_board(Y, {"a": A}), lambda: ours.leader_board(Y, {"a": A, "b": A}, metric="acc"),
    lambda: ours.pair_by_id([1, 2], {"a": ([1, 2], [0.5])})])
def test_bad_input_is_refused_with_a_remedy(call):
    with pytest.raises(ConfigError) as caught:
        call()
    assert caught.value.remedy
