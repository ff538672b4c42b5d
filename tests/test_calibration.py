"""Calibration and decisions against scikit-learn, loops and solvers that share no code with ours; ties, one class, NaN, empty, separable."""
import json
import math

import numpy as np
import pytest
from scipy.optimize import minimize, minimize_scalar
from sklearn.calibration import calibration_curve
from sklearn.isotonic import IsotonicRegression
from sklearn.metrics import brier_score_loss, log_loss, roc_auc_score

from medimg.deployment.reference import fit_temperature
from medimg.errors import ConfigError
from medimg.evaluation.calibration import (Isotonic, Platt, Temperature, VectorScaling, brier, brier_decomposition, calibrator_from_json, cross_fitted, ece, reliability,
                                           reliability_plot)
from medimg.evaluation.decisions import decision_curve, decision_plot, estimate_prevalence, net_benefit, to_prevalence


def cases(seed, n=200, k=2, ties=False):
    """Labels (n,) and probabilities (n, k) that are honest, rounded when ties are wanted."""
    rng = np.random.default_rng(seed)
    p = rng.dirichlet(np.ones(k), n)
    p = np.round(p, 1) if ties else p
    p = p / p.sum(axis=1, keepdims=True)
    return np.array([rng.choice(k, p=row) for row in p]), p


def guo_ece(y, p, bins):
    """The definition of Guo et al. (2017), bin by bin in a loop; bins (low, high], the first with its lower end."""
    claim, right = (p[:, 1], y) if p.shape[1] == 2 else (p.max(axis=1), p.argmax(axis=1) == y)
    total, edges = 0.0, np.linspace(0, 1, bins + 1)
    for b in range(bins):
        inside = (claim > edges[b]) & (claim <= edges[b + 1]) | ((claim == 0) & (b == 0))
        if inside.any():
            total += inside.mean() * abs(right[inside].mean() - claim[inside].mean())
    return total


# ---- reliability and ECE -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("k", [2, 3, 5])
@pytest.mark.parametrize("ties", [False, True])
def test_ece_is_guos(seed, k, ties):
    y, p = cases(seed, k=k, ties=ties)
    for bins in (1, 10, 15):
        assert abs(ece(y, p, bins=bins, by="width") - guo_ece(y, p, bins)) < 1e-12


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("by, theirs", [("mass", "quantile"), ("width", "uniform")])
def test_bins_are_those_of_scikit_learn(by, theirs, ties):
    for seed in range(5):
        y, p = cases(seed, n=157, ties=ties)
        observed, claimed = calibration_curve(y, p[:, 1], n_bins=8, strategy=theirs)
        table = reliability(y, p, bins=8, by=by)
        assert np.allclose(table.observed, observed, atol=1e-12) and np.allclose(table.claimed, claimed, atol=1e-12) and table.count.sum() == 157


def test_equal_claims_never_part():
    table = reliability([0, 1, 0, 1, 1], [0.3] * 5, bins=10)
    assert len(table.count) == 1 and table.count[0] == 5 and table.observed[0] == 0.6


def test_groups_widen_the_band():
    y, p = cases(0, n=400)
    images, patients = reliability(y, p, bins=5), reliability(y, p, bins=5, groups=np.arange(400) // 8)
    assert (patients.high - patients.low >= images.high - images.low - 1e-12).all() and (patients.observed == images.observed).all()
    with pytest.raises(ConfigError, match="3 patient ids for 400"):
        reliability(y, p, groups=[1, 2, 3])


def test_debiased_squares_are_exact_on_average():
    """Kumar 2019: E[sum w (d² − noise)] is the true squared error; the plain one is too large."""
    rng, n, plain, debiased = np.random.default_rng(0), 120, [], []
    claim = np.repeat([0.2, 0.5, 0.8], n // 3)
    truth = np.repeat([0.3, 0.5, 0.75], n // 3)
    for _ in range(3000):
        y = (rng.random(n) < truth).astype(int)
        d, m = np.array([y[claim == c].mean() - c for c in (0.2, 0.5, 0.8)]), n // 3
        noise = np.array([y[claim == c].mean() * (1 - y[claim == c].mean()) / (m - 1) for c in (0.2, 0.5, 0.8)])
        raw = np.mean(d ** 2 - noise)
        debiased.append(raw)
        plain.append(ece(y, claim, bins=3, by="width", norm=2) ** 2)
        assert abs(ece(y, claim, bins=3, by="width", norm=2, debiased=True) ** 2 - max(0, raw)) < 1e-12
    true = np.mean([0.1 ** 2, 0, 0.05 ** 2])
    assert abs(np.mean(debiased) - true) < 4 * np.std(debiased) / math.sqrt(3000) and np.mean(plain) > 1.5 * true


def test_debiased_distance_is_kumars_lottery():
    """The closed form against drawing the noise, as Kumar's own code does for norm 1."""
    rng = np.random.default_rng(1)
    y, p = cases(3, n=150)
    table = reliability(y, p, bins=6)
    d, w = table.observed - table.claimed, table.count / table.count.sum()
    s = np.sqrt(table.observed * (1 - table.observed) / (table.count - 1))
    lottery = w @ np.abs(d) - (np.abs(d + s * rng.normal(size=(200_000, len(d)))).mean(axis=0) - np.abs(d)) @ w
    assert abs(ece(y, p, bins=6, debiased=True) - lottery) < 1e-3
    assert ece(y, p, bins=6, debiased=True) < ece(y, p, bins=6)


def test_one_class_and_one_case_are_defined():
    assert ece([1, 1], [0.25, 0.75], bins=2, by="width") == 0.5 and ece([1], [0.25]) == 0.75
    assert math.isfinite(ece([1], [0.25], debiased=True)) and reliability([1], [0.25]).low[0] < 1


@pytest.mark.parametrize("y, p", [([0, 1], [0.5, np.nan]), ([0, 1], [0.5, 1.2]), ([0, 1], [-0.1, 0.2]), ([], []), ([0, 1, 1], [0.5, 0.5]), ([0, 2], [0.5, 0.5]),
                                  ([0, 1], [[0.5, 0.2], [0.5, 0.5]]), ([0, 0.5], [0.5, 0.5]), ([0, 1], np.zeros((2, 2, 2)))])
def test_bad_input_is_refused(y, p):
    for question in (ece, brier, reliability, brier_decomposition):
        with pytest.raises(ConfigError):
            question(y, p)
    for options in ({"bins": 0}, {"by": "depth"}, {"norm": 3}):
        with pytest.raises(ConfigError):
            ece([0, 1], [0.5, 0.5], **options)


# ---- Brier ---------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("ties", [False, True])
def test_brier_is_scikit_learns(seed, ties):
    y, p = cases(seed, ties=ties)
    assert abs(brier(y, p) - brier_score_loss(y, p[:, 1])) < 1e-12 and brier(y, p) == brier(y, p[:, 1])
    y, p = cases(seed, k=4, ties=ties)
    assert abs(brier(y, p) - brier_score_loss(y, p, labels=range(4), scale_by_half=False)) < 1e-12


@pytest.mark.parametrize("bins", [None, 1, 5, 20])
@pytest.mark.parametrize("by", ["mass", "width"])
def test_murphys_parts_add_up(bins, by):
    for seed in range(4):
        y, p = cases(seed, ties=seed % 2 == 0)
        parts = brier_decomposition(y, p, bins=bins, by=by)
        assert abs(parts.score - brier(y, p)) < 1e-12 and abs(parts.uncertainty - y.mean() * (1 - y.mean())) < 1e-12
        assert abs(parts.reliability - parts.resolution + parts.uncertainty + parts.within - parts.score) < 1e-12
        assert min(parts.reliability, parts.resolution) >= 0 and (bins is not None or abs(parts.within) < 1e-12)
        if bins and by == "mass":
            table = reliability(y, p, bins=bins)
            inside = [p[:, 1][np.searchsorted(np.quantile(p[:, 1], np.linspace(0, 1, bins + 1))[1:-1], p[:, 1]) == b] for b in range(bins)]
            spread = sum(((q - q.mean()) ** 2).sum() for q in inside if len(q)) / len(y)
            assert abs(parts.reliability - np.average((table.claimed - table.observed) ** 2, weights=table.count)) < 1e-12
            assert parts.within <= spread + 0.05     # within-bin variance of the claims minus twice their covariance with the truth


def test_constant_claim_has_no_resolution():
    parts = brier_decomposition([0, 1, 1, 1], [0.75] * 4)
    assert (parts.reliability, parts.resolution, parts.within) == (0, 0, 0) and parts.score == parts.uncertainty == 0.1875


# ---- repairs -------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("k", [1, 3, 6])
def test_temperature_is_that_of_the_bundle(k):
    for seed, size in ((0, 300), (1, 40)):
        rng = np.random.default_rng(seed)
        z = rng.normal(size=(size, k)) * 4
        y = np.array([rng.choice(max(k, 2), p=np.exp(row) / np.exp(row).sum()) for row in (np.c_[0 * z, z] if k == 1 else z) / 2.5])
        ours, theirs = Temperature.fit(z, y), fit_temperature(z, y, task="binary" if k == 1 else "multiclass")
        assert abs(ours.temperature / theirs["temperature"] - 1) < 1e-4 and abs(ours.log_loss_after - theirs["log_loss_after"]) < 1e-9
        assert set(theirs) == set(ours.to_dict())
        assert abs(ours.log_loss_after - log_loss(y, ours.apply(z), labels=range(max(k, 2)))) < 1e-6
        assert (ours.apply(z).argmax(axis=1) == (z[:, 0] > 0 if k == 1 else z.argmax(axis=1))).all()


def test_temperature_of_separable_and_of_reversed_scores_stays_within_bounds():
    assert Temperature.fit([-1.0, 1.0], [0, 1]).temperature == 0.05 and Temperature.fit([-1.0, 1.0], [1, 0]).temperature == 20.0
    assert np.isfinite(Temperature(1.0).apply([1e6, -1e6])).all()


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("ties", [False, True])
def test_platt_is_the_least_loss(seed, ties):
    rng = np.random.default_rng(seed)
    s = rng.normal(3, 7, 120)
    s = np.round(s) if ties else s
    y = (rng.random(120) < 1 / (1 + np.exp(-(s - 3) / 4))).astype(int)
    aim = np.where(y == 1, (y.sum() + 1) / (y.sum() + 2), 1 / ((1 - y).sum() + 2))
    theirs = minimize(lambda v: np.mean(np.logaddexp(0, v[0] * s + v[1]) - aim * (v[0] * s + v[1])), [0.1, 0], method="Nelder-Mead",
                      options={"xatol": 1e-10, "fatol": 1e-15, "maxiter": 4000}).x
    line = Platt.fit(s, y)
    assert np.allclose([line.slope, line.intercept], theirs, atol=1e-5)
    assert abs(line.apply(s)[:, 1].mean() - aim.mean()) < 1e-9        # the score equation of the intercept
    assert Platt.fit(s * 1e6 + 1e8, y).apply(s * 1e6 + 1e8) == pytest.approx(line.apply(s), abs=1e-5)


def test_platt_of_separable_constant_and_two_column_scores():
    line = Platt.fit(np.r_[-np.ones(5), np.ones(5)], np.repeat([0, 1], 5))
    assert np.allclose(line.apply([-1.0, 1.0])[:, 1], [1 / 7, 6 / 7], atol=1e-6)         # Platt's targets are reached exactly
    flat = Platt.fit(np.ones(8), [0, 1] * 4)
    assert np.allclose(flat.apply([1.0]), 0.5, atol=1e-6)
    s = np.linspace(-2, 2, 20)
    assert Platt.fit(np.c_[-s, s], np.arange(20) % 2) == Platt.fit(s, np.arange(20) % 2)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("ties", [False, True])
def test_isotonic_is_scikit_learns(seed, ties):
    rng = np.random.default_rng(seed)
    s = rng.normal(size=90)
    s = np.round(s, 1) if ties else s
    y = (rng.random(90) < 1 / (1 + np.exp(-2 * s * (-1) ** (seed == 5)))).astype(int)      # seed 5: falling, one block
    theirs = IsotonicRegression(out_of_bounds="clip").fit(s, y)
    grid = np.r_[np.linspace(-6, 6, 400), s]
    assert np.allclose(Isotonic.fit(s, y).apply(grid)[:, 1], theirs.predict(grid), atol=1e-12)


def test_isotonic_of_few_cases():
    assert Isotonic.fit([1.0, 1.0], [0, 1]).values == (0.5,) and Isotonic.fit([2.0, 1.0], [0, 1]).values == (0.5, 0.5)
    assert Isotonic.fit([1.0, 2.0], [0, 1]).apply([0.0, 1.5, 9.0])[:, 1].tolist() == [0.0, 0.5, 1.0]


@pytest.mark.parametrize("k", [2, 4])
def test_vector_scaling_finds_what_was_bent(k):
    rng = np.random.default_rng(k)
    z = rng.normal(size=(6000, k)) * 2
    scale, shift = rng.uniform(0.5, 1.5, k), rng.normal(size=k)
    q = np.exp(scale * z + shift)
    y = np.array([rng.choice(k, p=row / row.sum()) for row in q])
    made, t = VectorScaling.fit(z, y), Temperature.fit(z, y)
    off = made.apply(z) - np.eye(k)[y]
    assert np.abs(off.mean(axis=0)).max() < 1e-3 and np.abs((off * z).mean(axis=0)).max() < 1e-3         # the gradient vanishes, but for the ridge
    assert np.allclose(made.scale, scale, atol=0.15) and np.allclose(made.shift, shift - shift.mean(), atol=0.15)
    assert log_loss(y, made.apply(z)) <= t.log_loss_after + 1e-4
    assert np.isfinite(VectorScaling.fit(np.eye(k) * 50, np.arange(k)).scale).all()                       # separable


def test_json_round_trip_and_refusals():
    s, y = np.linspace(-2, 2, 40), np.arange(40) % 3 % 2
    for made in (Temperature.fit(s, y), Platt.fit(s, y), Isotonic.fit(s, y), VectorScaling.fit(np.c_[s, -s], y)):
        assert type(made).from_json(made.to_json()) == calibrator_from_json(made.to_json()) == made
        assert json.loads(made.to_json())["method"] == made.method and made.fitted_on == "validation" and made.n == 40
        with pytest.raises(AttributeError):
            made.n = 3
        other = Platt if made.method != "platt" else Isotonic
        with pytest.raises(ConfigError, match=f"this is a {made.method} calibration"):
            other.from_json(made.to_json())
    for text in ("", "[]", "{}", "null", '{"method": "platt"}', '{"method": "platt", "slope": 1, "intercept": 0, "more": 1}', '{"method": ["platt"]}', '{"method": "isotonic", "scores": ["a"], "values": [1]}'):
        with pytest.raises(ConfigError):
            calibrator_from_json(text)


@pytest.mark.parametrize("fit", [Temperature.fit, Platt.fit, Isotonic.fit, lambda z, y: VectorScaling.fit(np.c_[z, z], y)])
def test_repairs_refuse(fit):
    for z, y in (([1.0, 2.0], [1, 1]), ([1.0, np.nan], [0, 1]), ([1.0, np.inf], [0, 1]), ([], []), ([1.0], [0, 1]), ([1.0, 2.0], [0, 2]), ([1.0, 2.0], [0, 0.5])):
        with pytest.raises(ConfigError):
            fit(z, y)
    with pytest.raises(ConfigError, match="use Temperature or VectorScaling"):
        Platt.fit(np.ones((4, 3)), [0, 1, 0, 1])
    with pytest.raises(ConfigError, match="2 logits a case for a scaling of 3"):
        VectorScaling((1, 1, 1), (0, 0, 0)).apply(np.ones((2, 2)))


def test_cross_fitting_sees_no_label_of_its_own():
    rng = np.random.default_rng(0)
    s, y = rng.normal(size=60), rng.integers(0, 2, 60)
    first = cross_fitted(Isotonic.fit, s, y)
    for i in range(0, 60, 7):       # replacing the case's own pair by another of its class changes no other input of its repair
        seen = []
        cross_fitted(lambda z, t: seen.append(set(z.tolist())) or Platt.fit(z, t), s, y)
        assert sum(s[i] in part for part in seen) == 1
    assert first.shape == (60, 2) and np.allclose(first.sum(axis=1), 1) and np.array_equal(first, cross_fitted(Isotonic.fit, s, y))
    assert not np.array_equal(first, cross_fitted(Isotonic.fit, s, y, seed=1))
    with pytest.raises(ConfigError, match="3 parts"):
        cross_fitted(Platt.fit, s[:5], [0, 0, 0, 1, 1], folds=3)


def test_cross_fitting_keeps_patients_together():
    rng = np.random.default_rng(1)
    group = np.repeat(np.arange(30), 4)
    y = np.repeat(rng.integers(0, 2, 30), 4)
    s, seen = np.arange(120.0), []
    cross_fitted(lambda z, t: seen.append(set((z.astype(int) // 4).tolist())) or Platt.fit(z, t), s, y, groups=group)
    assert not seen[0] & seen[1] and seen[0] | seen[1] == set(range(30))


def test_calibration_repairs_what_was_broken():
    rng = np.random.default_rng(2)
    z = rng.normal(size=4000) * 2
    y = (rng.random(4000) < 1 / (1 + np.exp(-z))).astype(int)
    raw = 1 / (1 + np.exp(-3 * z + 1))
    for fit in (Platt.fit, Isotonic.fit):
        fixed = cross_fitted(fit, 3 * z - 1, y)
        assert ece(y, fixed) < 0.03 < 0.09 < ece(y, raw) and brier(y, fixed) < brier(y, raw)
        assert abs(roc_auc_score(y, fixed[:, 1]) - roc_auc_score(y, raw)) < 0.005
    assert "naive" in repr(reliability_plot({"naive": reliability(y, raw)}))


# ---- prevalence ----------------------------------------------------------------------------------------------------------------
def test_prevalence_by_hand_and_back():
    p = np.array([[0.2, 0.3, 0.5], [0.0, 1.0, 0.0], [1 / 3, 1 / 3, 1 / 3]])
    new = to_prevalence(p, source=[0.2, 0.3, 0.5], target=[0.5, 0.25, 0.25])
    assert np.allclose(new[0], [0.5, 0.25, 0.25]) and np.allclose(new[1], [0, 1, 0])
    assert np.allclose(to_prevalence(new, source=[0.5, 0.25, 0.25], target=[0.2, 0.3, 0.5]), p)
    assert np.allclose(to_prevalence(p[:, 0], source=0.3, target=0.3), p[:, 0])


def test_prevalence_correction_is_bayes():
    """Three discrete findings with known likelihoods: the corrected claims are the exact posteriors of the new ward."""
    like = np.array([[0.7, 0.2, 0.1], [0.1, 0.3, 0.6]])       # class, finding
    post = lambda share: (like[1] * share / (like[1] * share + like[0] * (1 - share)))
    assert np.allclose(to_prevalence(post(0.7), source=0.7, target=0.05), post(0.05))
    seen = np.repeat(np.arange(3), np.round(10_000 * (like[1] * 0.05 + like[0] * 0.95)).astype(int))
    assert abs(estimate_prevalence(post(0.7)[seen], source=0.7)[1] - 0.05) < 1e-3


@pytest.mark.parametrize("seed", range(5))
def test_em_reaches_the_top(seed):
    rng = np.random.default_rng(seed)
    p = rng.beta(0.7, 0.9, 300)
    loss = lambda share: -np.log(p * share / 0.6 + (1 - p) * (1 - share) / 0.4).sum()
    direct = minimize_scalar(loss, bounds=(1e-9, 1 - 1e-9), method="bounded", options={"xatol": 1e-12}).x
    assert abs(estimate_prevalence(p, source=0.6, steps=20_000, tol=1e-12)[1] - direct) < 1e-5
    q = rng.dirichlet([1, 2, 3], 400)
    s = estimate_prevalence(q, source=[0.2, 0.3, 0.5], steps=20_000, tol=1e-13)
    ratio = q / [0.2, 0.3, 0.5]
    slope = (ratio / (ratio @ s)[:, None]).mean(axis=0)       # Karush-Kuhn-Tucker: 1 where the share is positive, else at most 1
    assert abs(s.sum() - 1) < 1e-12 and (slope[s > 1e-6] == pytest.approx(1, abs=1e-4)) and (slope < 1 + 1e-4).all()


@pytest.mark.parametrize("bad", [0.0, 1.0, 75, [0.5, 0.6], [0.2, 0.3, 0.5], -0.1, np.nan])
def test_shares_are_checked(bad):
    for question in (lambda: to_prevalence([0.3], source=bad, target=0.5), lambda: to_prevalence([0.3], source=0.5, target=bad), lambda: estimate_prevalence([0.3], source=bad)):
        with pytest.raises(ConfigError):
            question()
    with pytest.raises(ConfigError):
        to_prevalence([np.nan], source=0.5, target=0.5)


# ---- decision curve ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("ties", [False, True])
def test_net_benefit_by_counting(ties):
    for seed in range(3):
        y, p = cases(seed, ties=ties)
        p, t = p[:, 1], np.array([0.05, 0.1, 0.5, 0.9])
        slow = [sum(1 if c else -ti / (1 - ti) for c, q in zip(y, p) if q >= ti) / len(y) for ti in t]
        assert np.allclose(net_benefit(y, p, t), slow, atol=1e-12)
        assert np.allclose(net_benefit(y, p, t, prevalence=y.mean()), slow, atol=1e-12)
        curve = decision_curve(y, p, thresholds=t, n_boot=100)
        assert np.allclose(curve.model, slow) and np.allclose(curve.everybody, y.mean() - (1 - y.mean()) * t / (1 - t))
        assert (curve.low <= curve.model).all() and (curve.model <= curve.high).all()
        assert np.array_equal(curve.low, decision_curve(y, p, thresholds=t, n_boot=100).low)


def test_net_benefit_of_one_class_and_bad_thresholds():
    assert net_benefit([1, 1], [0.9, 0.1], 0.5).tolist() == [0.5] and net_benefit([0, 0], [0.9, 0.1], 0.5).tolist() == [-0.5]
    for t in (0.0, 1.0, -0.1, [], [[0.5]], np.nan):
        with pytest.raises(ConfigError):
            net_benefit([0, 1], [0.1, 0.9], t)
    with pytest.raises(ConfigError):
        net_benefit([0, 1, 2], np.full((3, 3), 1 / 3), 0.5)
    with pytest.raises(ConfigError, match="prevalence"):
        net_benefit([1, 1], [0.9, 0.1], 0.5, prevalence=0.3)


def test_patients_are_drawn_whole():
    rng = np.random.default_rng(0)
    y = np.repeat(rng.integers(0, 2, 40), 5)
    p = np.clip(np.repeat(rng.random(40), 5) * 0.6 + 0.4 * y * np.repeat(rng.random(40), 5), 0, 1)
    image, patient = (decision_curve(y, p, thresholds=[0.3], groups=g, n_boot=500) for g in (None, np.repeat(np.arange(40), 5)))
    assert patient.high[0] - patient.low[0] > 1.5 * (image.high[0] - image.low[0])
    assert "everybody" not in repr(decision_plot({"one": image}, title="t"))
