"""Subgroups and shortcuts against scikit-learn, brute force and cohorts whose truth is known."""
import math

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from medimg.errors import ConfigError
from medimg.evaluation.metrics import _Resamples
from medimg.evaluation.subgroups import AT_LEAST, age_bands, balancing_weights, shortcut_report, subgroup_table


def cohort(n=240, seed=0, ties=False):
    """Labels, scores, patients of two images each, and a view that goes with the label."""
    rng = np.random.default_rng(seed)
    y = rng.integers(0, 2, n)
    view = np.where(rng.random(n) < 0.3 + 0.4 * y, "AP", "PA")
    s = 0.6 * y + 0.5 * (view == "AP") + rng.normal(size=n)
    return y, np.round(s, 1) if ties else s, np.arange(n) // 2, view


@pytest.mark.parametrize("ties", [False, True])
def test_a_report_equals_scikit_learn_and_brute_force(ties):
    y, s, who, view = cohort(ties=ties)
    got = shortcut_report(y, s, view, groups=who, n_boot=20)
    assert got["overall"].value == pytest.approx(roc_auc_score(y, s), abs=1e-12)
    share = {v: y[view == v].mean() for v in set(view)}
    assert got["attribute alone"].value == pytest.approx(roc_auc_score(y, [share[v] for v in view]), abs=1e-12)
    assert got["re-weighted"].value == pytest.approx(roc_auc_score(y, s, sample_weight=balancing_weights(y, view)), abs=1e-12)
    pairs = [(a > b) + 0.5 * (a == b) for v in set(view) for a in s[(y == 1) & (view == v)] for b in s[(y == 0) & (view == v)]]
    assert got["within"].value == pytest.approx(np.mean(pairs), abs=1e-12)
    assert got["overall minus within"].value == pytest.approx(got["overall"].value - got["within"].value, abs=1e-12)


def test_the_resamples_of_a_report_are_those_of_repeated_cases():
    """Weights in place of repeated rows: each resample by brute force."""
    y, s, who, view = cohort(n=80, seed=3)
    got, values = shortcut_report(y, s, view, groups=who, n_boot=30, seed=5), []
    for row in next(_Resamples(80, who, 30, 5).weights()):
        i = np.repeat(np.arange(80), row.astype(int))
        values.append(roc_auc_score(y[i], s[i], sample_weight=balancing_weights(y[i], view[i])))
    assert (got["re-weighted"].low, got["re-weighted"].high) == pytest.approx(tuple(np.quantile(values, [0.025, 0.975])), abs=1e-12)


def test_weights_make_label_and_attribute_independent():
    y, _, _, view = cohort(seed=7)
    w = balancing_weights(y, view)
    joint = np.array([[w[(y == c) & (view == v)].sum() for v in ("AP", "PA")] for c in (0, 1)]) / w.sum()
    assert np.allclose(joint, np.outer([np.mean(y == 0), np.mean(y == 1)], [np.mean(view == "AP"), np.mean(view == "PA")]))
    with pytest.raises(ConfigError, match="one class only"):
        balancing_weights([0, 0, 1], ["a", "a", "b"])


def test_a_score_that_is_only_the_shortcut_has_nothing_within():
    y, _, who, view = cohort(n=2000, seed=1)
    noise = np.random.default_rng(2).random(2000)
    got = shortcut_report(y, (view == "AP") + 0.1 * noise, view, groups=who, n_boot=200)
    assert got["within"].low < 0.5 < got["within"].high and got["overall"].low > 0.6


def test_no_level_with_both_classes_is_refused():
    with pytest.raises(ConfigError, match="no level"):
        shortcut_report([0, 0, 1, 1], [0.1, 0.2, 0.3, 0.4], ["a", "a", "b", "b"], n_boot=10)


def test_each_row_equals_its_own_cases():
    y, s, who, view = cohort(seed=4)
    p = 1 / (1 + np.exp(-s))
    table = subgroup_table(y, p, {"view": view}, groups=who, n_boot=50)
    for row in table.rows:
        own = view == row.level
        assert row.estimates["auc"].value == pytest.approx(roc_auc_score(y[own], p[own]), abs=1e-12)
        assert row.estimates["sensitivity"].value == pytest.approx(np.mean(p[own & (y == 1)] >= 0.5), abs=1e-12)
        assert (row.n, row.ill, row.patients) == (own.sum(), y[own].sum(), len(set(who[own])))
    first, second = table.rows
    assert first.differences["auc"].value == pytest.approx(first.estimates["auc"].value - second.estimates["auc"].value, abs=1e-12)
    assert not second.differences and not second.p, "two levels are one question"


def test_a_difference_is_found_where_there_is_one_and_holm_is_never_smaller():
    rng = np.random.default_rng(0)
    y, level = np.tile([0, 1], 600), np.repeat(["a", "b", "c"], 400)
    s = np.where(level == "a", 0.0, 1.5) * y + rng.normal(size=1200)
    table = subgroup_table(y, s, {"site": level, "lot": rng.choice(["x", "y"], 1200)}, threshold=0.7, n_boot=1000)
    found = {(r.attribute, r.level): r for r in table.rows}
    assert found["site", "a"].p_holm["auc"] < 0.05 and found["site", "a"].differences["auc"].high < 0
    assert found["lot", "x"].p_holm["auc"] > 0.05
    assert all(r.p_holm[m] >= r.p[m] for r in table.rows for m in r.p)
    said = table.reading()
    assert any("site a" in line and "lower" in line for line in said) and any("lot x" in line and "no difference in AUC shown" in line for line in said)


def test_too_few_cases_give_no_number_and_say_so():
    y, s, _, _ = cohort(n=200, seed=2)
    level = np.array(["rest"] * 200, dtype=object)
    few = np.flatnonzero(y == 1)[:AT_LEAST - 1]
    level[few], level[np.flatnonzero(y == 0)[:30]], level[0] = "small", "small", None
    table = subgroup_table(y, s, {"group": level}, threshold=0.3, n_boot=20)
    small = next(r for r in table.rows if r.level == "small")
    assert math.isnan(small.estimates["auc"].value) and "too few" in small.estimates["auc"].method and not math.isnan(small.estimates["specificity"].value)
    assert "auc" not in small.differences and {r.level for r in table.rows} == {"rest", "small", "unknown"}
    assert small.to_dict()["estimates"]["auc"]["value"] is None and "too few" in next(t for t in table.reading() if "small" in t)


@pytest.mark.parametrize("attributes", [{"a": [1]}, {"a": list(range(200))}])
def test_columns_that_do_not_fit_are_refused(attributes):
    y, s, _, _ = cohort(n=200)
    with pytest.raises(ConfigError, match="values of|levels"):
        subgroup_table(y, s, attributes, n_boot=10)


def test_age_bands_have_their_lower_end():
    assert age_bands([0, 17.99, 18, 39, 40, 65, 121, -3, float("nan")]).tolist() == ["under 18"] * 2 + ["18 to 39"] * 2 + ["40 to 64", "65 and over"] + ["unknown"] * 3
