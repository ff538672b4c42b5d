"""Numbers of a classifier and thresholds against scikit-learn and plain searches: ties, one class, unknown labels, ordered grades."""
import math
import warnings

import numpy as np
import pytest
from sklearn import metrics as theirs

from medimg.errors import ConfigError
from medimg.evaluation import operating as ours
from medimg.evaluation.metrics import sensitivity, specificity

UNDEFINED = "is not defined"


def draw(seed, n=120, k=2, values=None):
    """Labels, answers and scores; `values` few distinct scores make many ties."""
    rng = np.random.default_rng(seed)
    y = rng.integers(0, k, n)
    s = rng.normal(y, 1.0)
    return y, rng.integers(0, k, n), s if values is None else np.round(s * values) / values


@pytest.mark.parametrize("k", [2, 3, 6])
@pytest.mark.parametrize("seed", range(8))
def test_tables_equal_sklearn(seed, k):
    y, y_hat, _ = draw(seed, k=k)
    assert abs(ours.balanced_accuracy(y, y_hat) - theirs.balanced_accuracy_score(y, y_hat)) <= 1e-12
    assert abs(ours.mcc(y, y_hat) - theirs.matthews_corrcoef(y, y_hat)) <= 1e-12
    for weights in (None, "linear", "quadratic"):
        assert abs(ours.kappa(y, y_hat, weights=weights) - theirs.cohen_kappa_score(y, y_hat, weights=weights)) <= 1e-12


def test_kappa_of_published_tables():
    """Cohen 1960 (200 patients, three diagnoses): 0.492; and grades keep their distance when one of them does not occur."""
    table = np.array([[88, 14, 18], [10, 40, 10], [2, 6, 12]])
    first, second = (np.repeat(g.ravel(), table.ravel()) for g in np.indices((3, 3)))
    assert round(ours.kappa(first, second), 3) == 0.492
    y, y_hat = np.array([0, 0, 3, 3, 1]), np.array([0, 3, 3, 1, 1])        # no grade 2
    assert abs(ours.kappa(y, y_hat, weights="linear") - theirs.cohen_kappa_score(y, y_hat, weights="linear", labels=range(4))) <= 1e-12
    assert abs(ours.kappa(y, y_hat, weights="linear") - theirs.cohen_kappa_score(y, y_hat, weights="linear")) > 0.01


@pytest.mark.parametrize("values", [None, 4, 1])
@pytest.mark.parametrize("seed", range(8))
def test_average_precision_equals_sklearn(seed, values):
    y, _, s = draw(seed, values=values)
    assert abs(ours.average_precision(y, s) - theirs.average_precision_score(y, s)) <= 1e-12
    precision, recall, thresholds = theirs.precision_recall_curve(y, s)
    curve = ours.pr_curve(y, s)
    assert np.allclose(curve.precision, precision[-2::-1], rtol=0, atol=1e-12) and np.allclose(curve.recall, recall[-2::-1], rtol=0, atol=1e-12)
    assert np.array_equal(curve.thresholds, thresholds[::-1])


def test_average_precision_of_weights_is_that_of_repeated_cases():
    y, _, s = draw(3, values=3)
    w = np.random.default_rng(0).integers(0, 4, (20, len(y))).astype(float)
    expected = [theirs.average_precision_score(y, s, sample_weight=row) for row in w]
    assert np.allclose(ours._ap_weighted(y, s, w), expected, rtol=0, atol=1e-12)
    assert np.isnan(ours._ap_weighted(y, s, w * (1 - y))).all()


def test_one_class_is_nan_with_a_warning_never_a_number():
    """scikit-learn answers 0 for the MCC and for average precision here; a zero would be averaged with real values."""
    with pytest.warns(UserWarning, match="average precision is not defined: no case of class 1"):
        assert math.isnan(ours.average_precision([0, 0, 0], [0.1, 0.2, 0.3]))
    with pytest.warns(UserWarning, match="MCC is not defined"):
        assert math.isnan(ours.mcc([0, 1, 1], [1, 1, 1]))
    with pytest.warns(UserWarning, match="no case of class 1"):
        assert math.isnan(ours.balanced_accuracy([0, 0, 2], [0, 1, 2]))
    with pytest.warns(UserWarning, match="kappa is not defined"):
        assert math.isnan(ours.kappa([1, 1], [1, 1], weights="quadratic"))
    assert ours.average_precision([1, 1], [0.3, 0.2]) == 1.0 == theirs.average_precision_score([1, 1], [0.3, 0.2])


@pytest.mark.parametrize("groups", [None, np.arange(240) // 2])
def test_multilabel_leaves_unknown_labels_out(groups):
    rng = np.random.default_rng(5)
    truth = (rng.random((240, 3)) < [0.4, 0.2, 0.1]).astype(float)
    p = np.round(1 / (1 + np.exp(-rng.normal(1.5 * truth - 1))), 2)       # ties
    y = np.where(rng.random(truth.shape) < 0.3, np.nan, truth)
    found, names = ours.evaluate_multilabel(y, p, classes="abc", threshold=[0.5, 0.4, 0.3], groups=groups, n_boot=100), "abc"
    for c, name in enumerate(names):
        here = ~np.isnan(y[:, c])
        assert abs(found[f"auc[{name}]"].value - theirs.roc_auc_score(y[here, c], p[here, c])) <= 1e-12
        assert abs(found[f"average_precision[{name}]"].value - theirs.average_precision_score(y[here, c], p[here, c])) <= 1e-12
        assert abs(found[f"sensitivity[{name}]"].value - theirs.recall_score(y[here, c], p[here, c] >= (0.5, 0.4, 0.3)[c])) <= 1e-12
        assert found[f"sensitivity[{name}]"].n == (y[:, c] == 1).sum()
    assert abs(found["auc"].value - np.mean([found[f"auc[{n}]"].value for n in names])) <= 1e-12
    assert all(e.low <= e.value <= e.high for e in found.values())
    again = y.copy()
    again[:, 1] = np.nan                    # what is unknown everywhere changes nothing for the others
    with pytest.warns(UserWarning, match="b is not defined: no known case"):
        without = ours.evaluate_multilabel(again, p, classes="abc", threshold=[0.5, 0.4, 0.3], groups=groups, n_boot=100)
    assert without["auc[a]"] == found["auc[a]"] and math.isnan(without["auc[b]"].value) and "mean of 2 findings" in without["auc"].method


def test_multilabel_without_any_judgeable_finding():
    with pytest.warns(UserWarning, match="no negative case"):
        result = ours.evaluate_multilabel([[1], [1]], [[0.2], [0.9]], classes=("x",), n_boot=10)
    assert math.isnan(result["auc"].value) and result["sensitivity[x]"].value == 0.5 and math.isnan(result["specificity[x]"].value)
    perfect = ours.evaluate_multilabel([[1], [0]], [[0.9], [0.1]], classes=("x",), n_boot=10)["auc"]
    assert perfect.value == 1 and perfect.low < 0.5         # two cases prove nothing


def test_ordinal_equals_sklearn():
    rng = np.random.default_rng(2)
    y, p = rng.integers(0, 5, 200), rng.dirichlet(np.ones(5), 200)
    result, answer = ours.evaluate_ordinal(y, p, classes="abcde", n_boot=50), p.argmax(1)
    assert abs(result["quadratic_kappa"].value - theirs.cohen_kappa_score(y, answer, weights="quadratic")) <= 1e-12
    assert abs(result["balanced_accuracy"].value - theirs.balanced_accuracy_score(y, answer)) <= 1e-12
    assert abs(result["mean_grades_off"].value - theirs.mean_absolute_error(y, answer)) <= 1e-12
    assert abs(result["auc[>= d]"].value - theirs.roc_auc_score(y >= 3, p[:, 3:].sum(1))) <= 1e-12
    assert result["within_one"].value == np.mean(abs(y - answer) <= 1) and result["accuracy"].value == np.mean(y == answer)
    with pytest.warns(UserWarning, match="AUC of grades from e on is not defined: no positive case"):
        assert math.isnan(ours.evaluate_ordinal(y[y < 4], p[y < 4], classes="abcde", n_boot=20)["auc[>= e]"].value)


@pytest.mark.parametrize("values", [None, 3])
@pytest.mark.parametrize("seed", range(6))
def test_thresholds_are_the_best_of_all(seed, values):
    y, _, s = draw(seed, values=values)
    every = np.r_[np.unique(s), np.inf]
    sens, spec = (np.array([f(y, s >= t) for t in every]) for f in (sensitivity, specificity))
    for wanted in (0.0, 0.5, 0.9, 1.0):
        t, u = ours.sensitivity_threshold(y, s, wanted), ours.specificity_threshold(y, s, wanted)
        assert sensitivity(y, s >= t) >= wanted and specificity(y, s >= t) == spec[sens >= wanted].max()
        assert specificity(y, s >= u) >= wanted and sensitivity(y, s >= u) == sens[spec >= wanted].max()
    for prevalence, missed in ((0.01, 50), (0.5, 1), (0.001, 1), (0.9, 9)):
        t = ours.cost_threshold(y, s, prevalence=prevalence, missed=missed)
        cost = ours.expected_cost(sensitivity(y, s >= t), specificity(y, s >= t), prevalence=prevalence, missed=missed)
        assert np.isclose(cost, ours.expected_cost(sens, spec, prevalence=prevalence, missed=missed).min(), rtol=0, atol=1e-9)
    assert ours.cost_threshold(y, s, prevalence=0, missed=9) == math.inf


def test_a_wanted_specificity_is_not_lost_to_rounding():
    """1 - 1/10 is below 0.9 in binary arithmetic: 9 of 10 healthy must count as 0.9."""
    y, s = np.r_[np.zeros(10, int), 1], np.r_[np.arange(10.0), 8.5]
    assert specificity(y, s >= ours.specificity_threshold(y, s, 0.9)) == 0.9 and sensitivity(y, s >= ours.specificity_threshold(y, s, 0.9)) == 1


@pytest.mark.parametrize("call", [
    lambda: ours.kappa([0, 1], [0, 1], weights="quadrat"), lambda: ours.kappa([0, 1], [0]), lambda: ours.mcc([0, 3], [0, 1], k=2),
    lambda: ours.average_precision([0, 1], [0.1, math.nan]), lambda: ours.average_precision([0, 1, 1], [0.1, 0.2]), lambda: ours.pr_curve([0, 0], [1, 2]),
    lambda: ours.sensitivity_threshold([0, 1], [0, 1], 95), lambda: ours.sensitivity_threshold([1, 1], [0, 1], 0.9),
    lambda: ours.cost_threshold([0, 1], [0, 1], prevalence=5, missed=1), lambda: ours.cost_threshold([0, 1], [0, 1], prevalence=0.5, missed=0, alarm=0),
    lambda: ours.evaluate_multilabel([[2]], [[0.1]], classes="a"), lambda: ours.evaluate_multilabel([[0, 1]], [[0.1]], classes="a"),
    lambda: ours.evaluate_multilabel([[0], [1]], [[0.1], [math.nan]], classes="a"), lambda: ours.evaluate_ordinal([0, 1], [[0.1, 0.9]], classes="ab"),
    lambda: ours.evaluate_ordinal([0, 5], np.eye(2), classes="ab"), lambda: ours.evaluate_multilabel([[0], [1]], [[0.1], [0.2]], classes="a", groups=[1]),
    lambda: ours.average_precision([], [])])
def test_bad_input_is_refused_with_a_remedy(call):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ConfigError) as caught:
            call()
    assert caught.value.remedy
