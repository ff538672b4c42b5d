"""Conformal sets, doubt and strangers: coverage within binomial error over 1,000 repetitions, and references that share no code with ours."""
import itertools
import json
import math

import numpy as np
import nbchecks as checks
import pytest
from scipy.spatial import cKDTree
from scipy.special import logsumexp
from scipy.stats import beta, entropy
from sklearn.covariance import LedoitWolf
from sklearn.metrics import roc_auc_score

from medimg.deployment.reference import fit_reference
from medimg.errors import ConfigError
from medimg.evaluation.conformal import Conformal, conformal_quantile, density_ratio, evaluate_sets, strangeness, weighted_sets
from medimg.evaluation.out_of_distribution import Mahalanobis, Neighbours, choose_score, energy, novelty, stranger_auc, shrunk_covariance
from medimg.evaluation.uncertainty import aurc, doubts, excess_aurc, risk_coverage
from medimg.experiments.protocol import run_experiment, stored_results

STORED = stored_results(checks.ROOT / "results" / "evaluation.json").get("uncertainty-pneumonia")
REPEATS = 1000


def ward(n, share, rng, shift=1.5):
    """Labels, probabilities that are right at a share of 0.6, and the score behind them."""
    y = (rng.random(n) < share).astype(int)
    x = shift * (y - 0.5) + rng.normal(size=n)
    p = 1 / (1 + np.exp(-(shift * x + math.log(0.6 / 0.4))))
    return y, np.stack([1 - p, p], axis=1), x


def within_error(hits, total, wanted, margin=4.0):
    """Binomial: the mean over independent repetitions lies within `margin` standard errors."""
    assert abs(hits / total - wanted) < margin * math.sqrt(wanted * (1 - wanted) / total), (hits / total, wanted)


# ---- the promise ---------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("n, coverage", [(19, 0.9), (50, 0.8), (101, 0.95)])
def test_marginal_coverage_is_exact(n, coverage):
    """One new case a repetition: a Bernoulli with the probability rank / (n + 1), and the spread over calibration sets is a beta distribution."""
    rng, hits, kept = np.random.default_rng(n), 0, []
    rank = math.ceil((n + 1) * coverage - 1e-9)
    for _ in range(REPEATS):
        y, p, _ = ward(n + 1, 0.6, rng)
        hits += Conformal.fit(p[:n], y[:n], coverage=coverage).apply(p[n:])[0, y[n]]
        kept.append(conformal_quantile(rng.random(n), coverage))          # of uniform scores the coverage is the limit itself
    within_error(hits, REPEATS, rank / (n + 1))
    law = beta(rank, n + 1 - rank)
    assert abs(np.mean(kept) - law.mean()) < 4 * law.std() / math.sqrt(REPEATS) and abs(np.std(kept) / law.std() - 1) < 0.12


def test_coverage_by_class_and_under_label_shift():
    """Calibrated at 60 % ill, used at 15 %: by class each class keeps its promise, weights keep the marginal one, plain sets do not."""
    rng, hits, seen = np.random.default_rng(7), {"plain": 0, "target": 0, "class 0": 0, "class 1": 0}, [0, 0]
    for _ in range(REPEATS):
        y, p, _ = ward(200, 0.6, rng)
        new_y, new_p, _ = ward(1, 0.15, rng)
        c = int(new_y[0])
        seen[c] += 1
        hits["plain"] += Conformal.fit(p, y).apply(new_p)[0, c]
        hits["target"] += Conformal.fit(p, y, target=[0.85, 0.15]).apply(new_p)[0, c]
        hits[f"class {c}"] += Conformal.fit(p, y, by_class=True).apply(new_p)[0, c]
    assert hits["plain"] / REPEATS < 0.885
    assert 0.9 - 4 * 0.0095 < hits["target"] / REPEATS < 0.94
    for c in (0, 1):
        assert 0.9 - 4 * math.sqrt(0.09 / seen[c]) < hits[f"class {c}"] / seen[c] < 0.9 + 1 / 60 + 4 * math.sqrt(0.09 / seen[c])


def test_weights_keep_the_promise_under_covariate_shift():
    """Known density ratio between two normal wards, labels by one rule: weighted sets hold, plain ones do not."""
    rng, plain, weighted = np.random.default_rng(3), 0, 0
    rule = lambda x: 1 / (1 + np.exp(-6.0 * x))
    ratio = lambda x: np.exp(-2.0 * x ** 2 + 0.5 * x ** 2) * 2                 # N(0, 1/2) against N(0, 1)
    for _ in range(REPEATS):
        x, new = rng.normal(size=300), rng.normal(size=1) / 2
        y, new_y = ((rng.random(len(v)) < rule(v)).astype(int) for v in (x, new))
        p, new_p = (np.stack([1 - rule(v), rule(v)], axis=1) for v in (x, new))
        plain += Conformal.fit(p, y).apply(new_p)[0, new_y[0]]
        weighted += weighted_sets((p, y), new_p, weights=(ratio(x), ratio(new)))[0, new_y[0]]
    assert plain / REPEATS < 0.87 and 0.9 - 4 * 0.0095 < weighted / REPEATS < 0.94


def test_novelty_is_a_p_value():
    rng, hits = np.random.default_rng(5), 0
    for _ in range(REPEATS):
        hits += novelty(rng.normal(size=39), rng.normal(size=1))[0] <= 0.1
    within_error(hits, REPEATS, 0.1)
    assert novelty([1.0, 2.0, 2.0], [2.0, 9.0, 0.0]).tolist() == [0.75, 0.25, 1.0]


# ---- conformal, by hand ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("ties", [False, True])
def test_quantile_by_brute_force(ties):
    rng = np.random.default_rng(0)
    for n in (1, 5, 9, 10, 37, 100):
        s = np.round(rng.random(n), 1) if ties else rng.random(n)
        for coverage in (0.1, 0.5, 0.9, 0.95):
            rank = math.ceil(round((n + 1) * coverage, 9))
            assert conformal_quantile(s, coverage) == (np.sort(s)[rank - 1] if rank <= n else np.inf)
            w, new = rng.random(n), rng.random(4) * n / 3
            for limit, v in zip(conformal_quantile(s, coverage, weights=w, new_weight=new), new):
                shares = [t for t in [*s, np.inf] if (w[s <= t].sum() + (v if t == np.inf else 0)) >= coverage * (w.sum() + v) - 1e-12]
                assert limit == min(shares)


def test_strangeness_by_hand():
    p = np.random.default_rng(0).dirichlet([1, 1, 1, 1], 50)
    aps = [[sum(q for q in row if q > row[c]) + row[c] for c in range(4)] for row in p]
    assert np.allclose(strangeness(p, kind="aps"), aps) and np.allclose(strangeness(p), 1 - p)
    assert strangeness([0.3, 0.6]).tolist() == strangeness([[0.7, 0.3], [0.4, 0.6]]).tolist()


@pytest.mark.parametrize("kind", ["lac", "aps"])
def test_sets_depend_on_the_order_only(kind):
    """A temperature changes no set of two classes; sets grow with the coverage."""
    y, p, _ = ward(300, 0.6, np.random.default_rng(1))
    z = np.log(p[:, 1] / p[:, 0])
    q = 1 / (1 + np.exp(-z / 3))
    a, b = (Conformal.fit(v, y).apply(v) for v in (p, np.stack([1 - q, q], axis=1)))
    assert np.array_equal(a, b)
    sizes = [Conformal.fit(p, y, coverage=c, kind=kind).apply(p).sum() for c in (0.5, 0.8, 0.95)]
    assert sizes == sorted(sizes)
    for options in ({}, {"by_class": True}, {"target": [0.5, 0.5]}):
        made = Conformal.fit(p, y, kind=kind, **options)
        assert Conformal.from_json(made.to_json()) == made


def test_too_few_cases_say_so():
    with pytest.warns(UserWarning, match="class 1: 1 of 31 calibration cases are too few"):
        made = Conformal.fit(np.full((31, 2), 0.5), [0] * 30 + [1], by_class=True)
    assert made.limits[1] == np.inf and json.loads(made.to_json())["limits"][1] is None and Conformal.from_json(made.to_json()) == made
    with pytest.warns(UserWarning, match="no case of class sick"):
        result = evaluate_sets([[True, False]], [0], classes=("well", "sick"))
    assert math.isnan(result["coverage[sick]"].value) and result["coverage"].value == 1.0
    with pytest.warns(UserWarning) as said:
        assert math.isnan(evaluate_sets([[True, True]], [1])["single right"].value)
    assert any("no set holds exactly one class" in str(w.message) for w in said)


@pytest.mark.parametrize("bad", [lambda: Conformal.fit([[0.5, 0.6]], [0]), lambda: Conformal.fit([0.5], [2]), lambda: Conformal.fit([], []), lambda: Conformal.fit([[np.nan, 1]], [0]),
                                 lambda: conformal_quantile([1, np.nan], 0.5), lambda: conformal_quantile([1], 0), lambda: conformal_quantile([1], 0.5, weights=[-1]),
                                 lambda: conformal_quantile([1], 0.5, weights=[np.inf]), lambda: Conformal.fit([0.2, 0.7], [0, 0], target=[0.5, 0.5]), lambda: strangeness([0.5], kind="magic"),
                                 lambda: Conformal((1.0,), 0.9).apply([[0.5, 0.5]]), lambda: Conformal.from_json("[1]"), lambda: Conformal.from_json("{}"), lambda: evaluate_sets([[True]], [1]),
                                 lambda: evaluate_sets(np.zeros((0, 2)), []), lambda: density_ratio([[1.0]], [[1.0, 2.0]]), lambda: weighted_sets(([0.2], [0]), [0.3, 0.4], weights=([1], [1]))])
def test_conformal_refuses(bad):
    with pytest.raises(ConfigError):
        bad()


def test_density_ratio_of_two_normals():
    rng = np.random.default_rng(0)
    a, b = rng.normal(0, 1, (6000, 1)), rng.normal(1, 1, (6000, 1))
    old, new = density_ratio(a, b, ridge=1e-6)
    assert np.corrcoef(np.log(old), a[:, 0] - 0.5)[0, 1] > 0.999 and abs(np.polyfit(a[:, 0], np.log(old), 1)[0] - 1) < 0.1 and abs(old.mean() - 1) < 1e-9
    assert np.allclose(density_ratio(a, a)[0], 1, atol=1e-3) and len(new) == 6000


# ---- doubt -----------------------------------------------------------------------------------------------------------------------
def test_doubts_are_scipys():
    p = np.random.default_rng(0).dirichlet([1, 1, 1], (4, 60))
    found, mean = doubts(p), p.mean(axis=0)
    assert np.allclose(found["entropy"], entropy(mean, axis=1, base=2)) and np.allclose(found["least confident"], 1 - mean.max(axis=1))
    assert np.allclose(found["mutual information"], np.mean([entropy(q, mean, axis=1, base=2) for q in p], axis=0))
    assert np.allclose(doubts(p[0])["mutual information"], 0, atol=1e-12) and doubts([[1.0, 0.0]])["entropy"][0] == 0


def test_aurc_averages_over_ties():
    rng = np.random.default_rng(0)
    for _ in range(5):
        loss, doubt = rng.integers(0, 2, 6), rng.integers(0, 3, 6)
        orders = [o for o in itertools.permutations(range(6)) if (np.diff(doubt[list(o)]) >= 0).all()]
        risks = np.mean([np.cumsum(loss[list(o)]) / np.arange(1, 7) for o in orders], axis=0)
        assert np.allclose(risk_coverage(loss, doubt).risk, risks) and math.isclose(aurc(loss, doubt), risks.mean())


def test_excess_aurc_has_its_ends():
    loss = np.random.default_rng(1).random(50)
    assert excess_aurc(loss, loss) == 0 and math.isclose(excess_aurc(loss, np.zeros(50)), 1) and excess_aurc(loss, -loss) > 1
    assert math.isclose(excess_aurc(loss, loss), excess_aurc(loss, np.exp(loss)))
    with pytest.warns(UserWarning, match="all losses are equal"):
        assert math.isnan(excess_aurc([0, 0], [1, 2]))
    for bad in (([], []), ([0, 1], [0.5]), ([np.nan], [1]), ([1], [np.nan])):
        with pytest.raises(ConfigError):
            aurc(*bad)
    with pytest.raises(ConfigError):
        doubts([[0.7, 0.7]])


# ---- strangers -------------------------------------------------------------------------------------------------------------------
def test_mahalanobis_is_scikit_learns_and_the_bundles():
    rng = np.random.default_rng(0)
    x, new = rng.normal(size=(300, 12)) @ rng.normal(size=(12, 12)), rng.normal(size=(40, 12)) * 3
    ours, theirs = Mahalanobis.fit(x), LedoitWolf().fit(x)
    assert math.isclose(ours.shrinkage, theirs.shrinkage_, rel_tol=1e-9) and np.allclose(ours.score(new), theirs.mahalanobis(new), rtol=1e-4)
    assert np.allclose(ours.score(new), fit_reference(x, x).score(new), rtol=1e-4) and math.isclose(ours.shrinkage, shrunk_covariance(x)[1])
    y = rng.integers(0, 3, 300)
    means = np.stack([x[y == c].mean(axis=0) for c in range(3)])
    within = LedoitWolf(assume_centered=True).fit(x - means[y])
    slow = np.min([np.einsum("nd,de,ne->n", new - m, within.precision_, new - m) for m in means], axis=0)
    assert np.allclose(Mahalanobis.fit(x, y).score(new), slow, rtol=1e-4)


def test_mahalanobis_of_flat_features():
    """A feature that is always 0, fewer images than features, two equal images: finite, and what varies elsewhere is foreign."""
    x = np.c_[np.random.default_rng(0).normal(size=(20, 3)), np.zeros(20)]
    assert Mahalanobis.fit(x).score([[0, 0, 0, 5.0]])[0] > Mahalanobis.fit(x).score([[0, 0, 0, 0.0]])[0]
    assert np.isfinite(Mahalanobis.fit(np.random.default_rng(1).normal(size=(5, 30))).score(np.ones((1, 30)))).all()
    assert np.isfinite(Mahalanobis.fit(np.ones((2, 3))).score(np.zeros((1, 3)))).all()


@pytest.mark.parametrize("scaled", [False, True])
def test_neighbours_are_those_of_a_tree(scaled):
    rng = np.random.default_rng(2)
    x, new = np.round(rng.normal(size=(700, 6)), 1), np.round(rng.normal(size=(1200, 6)), 1)
    unit = (lambda v: v / np.linalg.norm(v, axis=1, keepdims=True)) if scaled else (lambda v: v)
    for k in (1, 7, 700):
        theirs = cKDTree(unit(x)).query(unit(new), k=[k])[0][:, 0]
        assert np.allclose(Neighbours.fit(x, k=k, scaled=scaled).score(new), theirs, atol=1e-6)


def test_energy_and_auc():
    z = np.random.default_rng(3).normal(size=(30, 5)) * 100
    assert np.allclose(energy(z), -logsumexp(z, axis=1)) and np.allclose(energy(z, temperature=7), -7 * logsumexp(z / 7, axis=1))
    one = np.linspace(-5, 5, 11)
    assert np.allclose(energy(one), -logsumexp(np.c_[-one / 2, one / 2], axis=1)) and np.allclose(energy(one), energy(-one))
    assert np.allclose(np.argsort(energy(one[:6])), np.argsort(np.minimum(1 / (1 + np.exp(-one[:6])), 1 / (1 + np.exp(one[:6])))))
    a, b = np.round(np.random.default_rng(4).normal(size=(2, 60)), 1)
    assert math.isclose(stranger_auc(a, b + 1, n_boot=20).value, roc_auc_score([0] * 60 + [1] * 60, np.r_[a, b + 1]))
    winner, table = choose_score({"a": a, "b": a}, {"g": {"a": b, "b": b + 1}, "h": {"a": b + 1, "b": b + 2}})
    assert winner == "b" and table["b"]["g"] == roc_auc_score([0] * 60 + [1] * 60, np.r_[a, b + 1])


@pytest.mark.parametrize("bad", [lambda: Mahalanobis.fit([[1.0, np.inf]] * 3), lambda: Mahalanobis.fit(np.ones((3, 2)), [0]), lambda: Mahalanobis.fit([[1.0]]), lambda: Neighbours.fit(np.ones((3, 2)), k=4),
                                 lambda: Neighbours.fit(np.ones((3, 2)), k=1).score(np.ones((1, 3))), lambda: energy([np.nan]), lambda: energy([1.0], temperature=0), lambda: novelty([], [1]),
                                 lambda: novelty([1], [np.nan]), lambda: choose_score({}, {}), lambda: choose_score({"a": [1]}, {"g": {"b": [1]}}), lambda: stranger_auc([], [1.0])])
def test_strangers_refuse(bad):
    with pytest.raises(ConfigError):
        bad()


# ---- the experiment --------------------------------------------------------------------------------------------------------------
@pytest.mark.filterwarnings("ignore:class", "ignore:not defined")
def test_experiment_runs_on_phantoms_and_repeats(tmp_path):
    first, again = (run_experiment("uncertainty-pneumonia", out=tmp_path / n, profile="ci", data="phantom", progress=False) for n in "ab")
    assert first["figures"] == again["figures"] and list(first["test_reads"].values()) == [1]
    assert (tmp_path / "a" / "test_reads.jsonl").read_text().count("\n") == 1


@pytest.mark.skipif(STORED is None, reason="not stored yet")
def test_stored_figures_are_what_the_issue_asks():
    f = STORED["figures"]
    assert 0.89 <= f["validation: plain: coverage"]["value"] <= 0.91 and "1000 halvings" in f["validation: plain: coverage"]["interval"]
    assert f[f"validation: ECE, {STORED['about']['repair']}, cross-fitted"]["value"] <= 0.03
    for group in ("retina", "breast", "phantom"):
        assert f[f"strangers: AUROC, {group}, {STORED['about']['score']}"]["value"] >= 0.95
    assert f["test: coverage[normal], by class"]["high"] < 0.9 and STORED["test_reads"] and not STORED["code_changed"]
    for key, value in f.items():
        assert value.get("low") is None or value["low"] <= value["value"] <= value["high"], key
