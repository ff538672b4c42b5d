"""Guideline engine: row by row against an independent transcription, total over all facts, sound when facts are missing, exact at every threshold."""
import csv
import itertools
import json

import pytest
from conftest import ROOT, leave_out
from hypothesis import given, settings
from hypothesis import strategies as st

from medimg.deployment.guidelines import NOTE, STATUSES, decide, guideline_named, guidelines, holds, possible_outcomes, read_guideline, recommendation_schema
from medimg.deployment.manifest import check_schema
from medimg.deployment.prediction import Finding, Prediction
from medimg.deployment.recommend import PatientContext, at_prevalence, change_since, measured, recommend, rounded
from medimg.errors import ConfigError

FLEISCHNER, RADS = guideline_named("fleischner-2017"), guideline_named("lung-rads-2022")
FIT = {"age_years": 61, "screening": False, "known_cancer": False, "immunosuppressed": False}


@pytest.fixture(scope="module")
def table(data_root):
    """`table(name)`: rows of an independent transcription, which lies beside the data folder and is never committed."""
    def rows(name):
        for folder in (data_root.parent / "guidelines", ROOT.parent / "shared" / "guidelines", data_root / "guidelines"):
            if (folder / name).is_file():
                with open(folder / name, newline="", encoding="utf-8") as file:
                    return list(csv.DictReader(file))
        leave_out(f"no {name} in a folder `guidelines` beside the data", "put the transcribed tables there")
    return rows


def within(low, high, step):
    """Values of [low, high) worth trying, with both ends; empty bounds are open."""
    low, high = (float(v) if v else None for v in (low, high))
    top = high - step if high is not None else (low or 0) + 40 * step
    return sorted({round(v, 3) for v in (low if low is not None else step, ((low or 0) + top) / 2, top)})


# ---- Fleischner 2017, row by row -------------------------------------------------------------------------------------------------
def test_fleischner_row_by_row(table):
    rows, seen = table("fleischner_2017.csv"), 0
    assert len(rows) == 18
    for row in rows:
        kinds = ["part-solid", "ground-glass"] if row["type"] == "sub-solid" else [row["type"]]
        risks = ["low", "high", None] if row["risk"] == "any" else [row["risk"]]
        for kind, risk, mm in itertools.product(kinds, risks, [int(v) for v in within(row["min_mm"], row["max_mm"], 1)]):
            findings = [{"type": kind, "mean_diameter_mm": mm, "solid_diameter_mm": min(mm, 5) if kind == "part-solid" else None}] * (2 if row["count"] == "multiple" else 1)
            for axes in ((mm, mm), (mm + 0.4, mm + 0.5), (mm - 0.4, mm - 0.6)):       # all of these are rounded to mm
                measures = [{**f, "long_axis_mm": max(axes), "short_axis_mm": min(axes)} for f in findings]
                (answer,) = recommend(measures, PatientContext(**FIT, risk=risk), names=["fleischner-2017"])
                assert answer["status"] == "applies", (row, mm, answer)
                assert answer["text"] == row["recommendation"], (row, mm, answer)
                seen += 1
    assert seen > 200


def test_fleischner_volumes(table):
    """100 and 250 mm³ stand for 6 and 8 mm: the class '6-8 mm' includes both."""
    by_mm = {int(row["min_mm"] or 0): row["recommendation"] for row in table("fleischner_2017.csv") if (row["type"], row["count"], row["risk"]) == ("solid", "single", "low")}
    for mm3, mm in ((99, 0), (99.4, 0), (99.5, 6), (100, 6), (250, 6), (250.4, 6), (251, 9)):
        (answer,) = recommend([{"type": "solid", "volume_mm3": mm3}], PatientContext(**FIT, risk="low"), names=["fleischner-2017"])
        assert answer["text"] == by_mm[mm], mm3


@pytest.mark.parametrize("change, reason", [({"age_years": 34.9}, "35"), ({"known_cancer": True}, "cancer"), ({"immunosuppressed": True}, "immuno"), ({"screening": True}, "Lung-RADS")])
def test_fleischner_is_not_for_everybody(change, reason):
    (answer,) = recommend([{"type": "solid", "mean_diameter_mm": 7}], PatientContext(**{**FIT, **change}, risk="low"), names=["fleischner-2017"])
    assert answer["status"] == "not applicable" and reason in answer["reason"] and answer["category"] is None
    (name,) = change
    (answer,) = recommend([{"type": "solid", "mean_diameter_mm": 7}], PatientContext(**{**FIT, name: None}, risk="low"), names=["fleischner-2017"])
    assert answer["status"] == "not assessable" and name in answer["inputs_missing"] and "CT at 6-12 months" in answer["text"]


def test_35_years_is_old_enough():
    (answer,) = recommend([{"type": "solid", "mean_diameter_mm": 7}], PatientContext(**{**FIT, "age_years": 35}, risk="low"), names=["fleischner-2017"])
    assert answer["status"] == "applies"


def test_the_form_of_a_lymph_node_needs_no_follow_up():
    """Fleischner 2017, text on perifissural nodules: only for the stated form, solid, small, not growing; named as missing where it would change the answer."""
    def ask(mm=7, kind="solid", growth=None, **facts):
        nodule = {"type": kind, "mean_diameter_mm": mm, "growth": growth}
        return recommend([nodule], PatientContext(**FIT, risk="high", prior_ct=growth is not None, nodules={0: facts}), names=["fleischner-2017"])[0]
    grown, same = ({"relation": "matched", "prior_mean_diameter_mm": before, "interval_days": 200} for before in (5.0, 7.0))
    for growth in (None, same, {"relation": "new"}):
        answer = ask(juxtapleural=True, growth=growth)
        assert (answer["status"], answer["rule"], answer["category"]) == ("applies", "FL-lymph-node", None) and "no follow-up" in answer["text"] and "our reading" in answer["reason"]
    assert "juxtapleural" in ask()["inputs_missing"] and ask()["text"] == ask(juxtapleural=False)["text"] == "CT at 6-12 months, then CT at 18-24 months"
    assert ask(9.4, juxtapleural=True)["rule"] == "FL-lymph-node" and ask(9.5, juxtapleural=True)["rule"] == "FL-solid-1-high-gt8"
    assert ask(juxtapleural=True, growth=grown)["rule"] == "FL-grown" and ask(kind="ground-glass", juxtapleural=True)["rule"] == "FL-ggn-1-ge6"
    assert all("juxtapleural" not in ask(**facts)["inputs_missing"] for facts in ({"mm": 12}, {"kind": "ground-glass"}, {"growth": grown}))
    for closed in ({"known_cancer": True}, {"screening": True}):
        assert recommend([{"type": "solid", "mean_diameter_mm": 7}], PatientContext(**{**FIT, **closed}, nodules={0: {"juxtapleural": True}}), names=["fleischner-2017"])[0]["status"] == "not applicable"


# ---- Lung-RADS v2022, row by row -------------------------------------------------------------------------------------------------
CYSTS = {"growing cystic component": [{"cyst": "thick-walled", "cyst_change": "cyst grows"}],
         "baseline": [{"cyst": c, "cyst_change": "none", "status": "baseline"} for c in ("thick-walled", "multilocular")] + [{"cyst": "thin-walled", "cyst_change": "becomes multilocular"}]}


def lung_rads_facts(row):
    """The facts of one row of the transcription, without sizes."""
    kind, status = row["type"], row["status"]
    if kind == "none":
        return [{"nodules": 0}, {"benign_features": True}]
    if kind == "cyst":
        return [{"structure": "cyst", **facts} for facts in CYSTS[status]]
    if kind.startswith("category"):
        prior = kind.split()[1]
        return [{"type": t, "status": s, "prior_category": prior, "interval_days": 182 if prior == "3" else 92} for t in ("solid", "part-solid") for s in ("stable", "decreased")]
    words = [w.strip() for part in status.split(",") for w in part.split(" or ")]
    if kind == "airway":
        return [{"structure": "airway", "airway_level": row["note"], "status": w} for w in words]
    if status == "new or growing solid component":
        return [{"type": kind, "status": "growing solid component"}, {"type": kind, "status": "new", "size": {"mm": 9.0}}]
    kinds = {"juxtapleural": ["solid"], "solid or part-solid": ["solid", "part-solid"]}.get(kind, [kind])
    words = ["slowly growing"] if status.startswith("slowly") else words
    return [{"type": t, "status": w, **({"juxtapleural": True} if kind == "juxtapleural" else {})} for t in kinds for w in words]


def sizes(row):
    """(size, solid) pairs inside the row, by diameter and by volume."""
    mm = [{"mm": v} for v in within(row["min_mm"], row["max_mm"], 0.1)] if row["min_mm"] or row["max_mm"] else [None]
    mm3 = [{"mm": None, "mm3": v} for v in within(row["min_mm3"], row["max_mm3"], 1)] if row["min_mm3"] or row["max_mm3"] else []
    solid = [{"mm": v} for v in within(row["solid_min_mm"], row["solid_max_mm"], 0.1)] if row["solid_min_mm"] or row["solid_max_mm"] else [None]
    return itertools.product(mm + mm3, solid)


def test_lung_rads_row_by_row(table):
    rows = table("lung_rads_2022.csv")
    assert len(rows) == 30
    for row in rows:
        if row["category"] == "4X":
            continue
        for facts, (size, solid) in itertools.product(lung_rads_facts(row), sizes(row)):
            total = size or facts.get("size") or {"mm": 12.0}
            inputs = {"screening": True, "nodules": 1, "size": total, "solid": solid or {"mm": 3.0}, **{k: v for k, v in facts.items() if k != "size"}}
            answer = decide(RADS, inputs)
            assert (answer["status"], answer["category"]) == ("applies", row["category"]), (row, inputs, answer)
            assert answer["text"] == row["management"], (row, answer)


def test_lung_rads_4x(table):
    """Every row of categories 3 and 4 becomes 4X with suspicious features; no row of 1 and 2 does."""
    for row in table("lung_rads_2022.csv"):
        if row["category"] == "4X":
            continue
        for facts, (size, solid) in itertools.product(lung_rads_facts(row), sizes(row)):
            inputs = {"screening": True, "nodules": 1, "solid": solid or {"mm": 3.0}, "size": size or {"mm": 12.0}, **facts, "suspicious_features": True}
            expected = "4X" if row["category"] in ("3", "4A", "4B") else row["category"]
            assert decide(RADS, inputs)["category"] == expected, (row, inputs)


@pytest.mark.parametrize("level, status, category, ours", [("segmental or more proximal", "baseline", "4A", False), ("segmental or more proximal", "new", "4A", True), ("segmental or more proximal", "stable", "4B", True),
                                                           ("segmental or more proximal", "slowly growing", "4B", True), ("segmental or more proximal", "crossed", "4B", True), ("subsegmental", "baseline", "2", False),
                                                           ("subsegmental", "new", "2", False), ("subsegmental", "stable", "2", False), ("subsegmental", "decreased", "2", True)])
def test_an_answer_says_where_it_is_our_reading(level, status, category, ours):
    answer = decide(RADS, {"screening": True, "nodules": 1, "structure": "airway", "airway_level": level, "status": status, "size": {"mm": 7.0}})
    assert answer["category"] == category and ("our reading: " in answer["reason"]) == ours
    worse = decide(RADS, {"screening": True, "nodules": 1, "structure": "airway", "airway_level": level, "status": status, "size": {"mm": 7.0}, "suspicious_features": True})
    assert worse["category"] == ("4X" if category != "2" else "2") and ("our reading" in worse["reason"]) == (ours and category == "2")


@pytest.mark.parametrize("screening, status", [(False, "not applicable"), (None, "not assessable"), (True, "applies")])
def test_lung_rads_is_for_screening(screening, status):
    (answer,) = recommend([{"type": "solid", "mean_diameter_mm": 7}], {"screening": screening, "prior_ct": False}, names=["lung-rads-2022"])
    assert answer["status"] == status


def test_no_nodule():
    rads, fleischner = recommend([], {"screening": True}, names=["lung-rads-2022", "fleischner-2017"])
    assert (rads["category"], rads["text"], rads["finding"]) == ("1", "12-month screening LDCT", None) and fleischner["status"] == "not applicable"


# ---- thresholds on both sides ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("mm, category", [(5.9, "2"), (5.94, "2"), (5.95, "3"), (6.0, "3"), (7.94, "3"), (7.95, "4A"), (14.94, "4A"), (14.95, "4B")])
def test_lung_rads_rounds_to_a_decimal(mm, category):
    (answer,) = recommend([{"type": "solid", "mean_diameter_mm": mm}], {"screening": True, "prior_ct": False}, names=["lung-rads-2022"])
    assert answer["category"] == category


def test_axes_are_rounded_before_their_mean_in_lung_rads():
    """5.94 and 5.96: each axis to a decimal (5.9, 6.0), their mean 5.95 to a decimal: 6.0."""
    assert measured({"long_axis_mm": 5.96, "short_axis_mm": 5.94}, RADS["measure"])["mm"] == 6.0
    assert measured({"long_axis_mm": 5.92, "short_axis_mm": 5.94}, RADS["measure"])["mm"] == 5.9


@pytest.mark.parametrize("value, decimals, expected", [(0.5, 0, 1), (1.5, 0, 2), (2.5, 0, 3), (2.499999, 0, 2), (1.05, 1, 1.1), (2.675, 2, 2.68), (3 * 0.1 + 0.25, 1, 0.6), (7, 0, 7)])
def test_rounding_half_up(value, decimals, expected):
    assert rounded(value, decimals) == expected


@given(st.integers(0, 400))
def test_rounding_agrees_with_integers(tenths):
    """Independent: in tenths of a millimetre, half up is (n + 5) // 10."""
    assert rounded(tenths / 10, 0) == (tenths + 5) // 10


@pytest.mark.parametrize("now, days, expected", [(7.5, 365, "stable"), (7.6, 365, "growing"), (7.6, 389, "growing"), (7.6, 390, {"growing", "slowly growing"}), (7.6, 200, "growing"), (9.1, 730, "growing"), (9.0, 730, {"growing", "slowly growing"}),
                                                 (4.5, 365, "stable"), (4.4, 365, "decreased"), (7.6, None, {"growing", "slowly growing"})])
def test_growth_by_lung_rads(now, days, expected):
    nodule = {"type": "ground-glass", "mean_diameter_mm": now, "growth": {"relation": "matched", "prior_mean_diameter_mm": 6.0, "interval_days": days}}
    assert change_since(nodule, RADS) == expected


def test_a_threshold_crossed_without_growth_is_classified_by_size():
    nodule = {"type": "solid", "mean_diameter_mm": 6.2, "growth": {"relation": "matched", "prior_mean_diameter_mm": 5.5, "interval_days": 365}}
    (answer,) = recommend([nodule], {"screening": True, "prior_ct": True, "prior_category": "2"}, names=["lung-rads-2022"])
    assert answer["category"] == "3"
    (answer,) = recommend([{**nodule, "mean_diameter_mm": 5.9}], {"screening": True, "prior_ct": True, "prior_category": "2"}, names=["lung-rads-2022"])
    assert answer["category"] == "2"


@pytest.mark.parametrize("core, was, expected", [(5.0, 3.4, "growing solid component"), (5.0, 3.5, "stable"), (6.1, 5.9, "crossed"), (1.0, 0.0, "growing solid component")])
def test_the_solid_part_decides(core, was, expected):
    nodule = {"type": "part-solid", "mean_diameter_mm": 12.0, "solid_diameter_mm": core, "growth": {"relation": "matched", "prior_mean_diameter_mm": 12.0, "prior_solid_diameter_mm": was, "interval_days": 365}}
    assert change_since(nodule, RADS) == expected
    assert change_since({**nodule, "solid_diameter_mm": None}, RADS) == {"stable", "growing solid component"}


def test_stepped_management_needs_the_interval():
    nodule = {"type": "solid", "mean_diameter_mm": 7.0, "growth": {"relation": "matched", "prior_mean_diameter_mm": 7.0, "interval_days": 182}}
    def ask(days, prior):
        return recommend([{**nodule, "growth": {**nodule["growth"], "interval_days": days}}], {"screening": True, "prior_ct": True, "prior_category": prior}, names=["lung-rads-2022"])[0]
    assert [ask(d, "3")["category"] for d in (149, 150)] == [None, "2"] and [ask(d, "4A")["category"] for d in (59, 60)] == [None, "3"]
    assert ask(365, "4B")["status"] == "not assessable" and ask(365, "2")["category"] == "2"


@pytest.mark.parametrize("now, expected", [(7.4, "stable"), (7.5, "growing")])
def test_fleischner_growth_is_two_whole_millimetres(now, expected):
    assert change_since({"type": "solid", "mean_diameter_mm": now, "growth": {"relation": "matched", "prior_mean_diameter_mm": 6.0, "interval_days": 300}}, FLEISCHNER) == expected


# ---- total and sound -------------------------------------------------------------------------------------------------------------
def facts_of(guideline):
    """A strategy for any facts of a guideline, each known or not, sizes at and around the thresholds."""
    mm = st.sampled_from([None, 0.1, 3.9, 4, 5, 5.9, 6, 7.9, 8, 9, 14.9, 15, 29.9, 30, 60])
    kinds = {"size": mm.map(lambda v: {"mm": v}), "number": st.sampled_from([None, 0, 0.02, 0.1, 0.25, 0.5, 0.95, 1, 15, 16, 17, 34, 35, 50, 51, 60, 150, 730, 1826])}
    return st.fixed_dictionaries({name: kinds[about["values"]] if isinstance(about["values"], str) else st.sampled_from([None, *about["values"]])
                                  for name, about in guideline["inputs"].items()})


@pytest.mark.parametrize("name", guidelines())
def test_any_facts_give_one_answer_or_a_reason(name):
    guideline = guideline_named(name)

    @settings(max_examples=120, deadline=None)
    @given(facts_of(guideline))
    def check(facts):
        answer = decide(guideline, facts)
        check_schema(answer, recommendation_schema(), "recommendation")
        json.dumps(answer)
        assert answer["status"] in STATUSES and answer["text"] and answer["rule"] and answer["source"] and answer["note"] == NOTE
        assert answer["status"] == "applies" or answer["reason"]
        assert set(answer["inputs_used"]).isdisjoint(answer["inputs_missing"])
        for missing in answer["inputs_missing"]:
            assert facts.get(missing) in (None, {"mm": None})
    check()


@pytest.mark.parametrize("name", guidelines())
def test_an_answer_despite_missing_facts_holds_for_each_value_of_them(name):
    """Sound: where a fact is missing and an answer stands, no value of that fact changes it (but for what the answer says it assumed)."""
    guideline = guideline_named(name)

    @settings(max_examples=120, deadline=None)
    @given(facts_of(guideline), facts_of(guideline))
    def check(facts, truth):
        answer = decide(guideline, facts)
        if answer["status"] != "applies":
            return
        full = {k: truth[k] if facts[k] in (None, {"mm": None}) and k not in guideline["assume"] else facts[k] for k in facts}
        later = decide(guideline, full)
        assert (later["status"], later["category"], later["text"]) == (answer["status"], answer["category"], answer["text"])
    check()


def test_every_combination_of_lung_rads_is_decided():
    """With every fact known there is exactly one outcome: 8,000 combinations."""
    count = 0
    for kind, status, prior, mm, core in itertools.product(("solid", "part-solid", "ground-glass"), RADS["inputs"]["status"]["values"], ("1", "2", "3", "4A", "4B"),
                                                           (3, 3.9, 4, 5.9, 6, 7.9, 8, 14.9, 15, 29.9, 30), (3.9, 4, 5.9, 6, 8)):
        facts = {"screening": True, "nodules": 1, "type": kind, "status": status, "prior_category": prior, "interval_days": 200, "size": {"mm": mm}, "solid": {"mm": core}}
        assert len(possible_outcomes(RADS, facts, most=9)) == 1
        answer = decide(RADS, facts)
        assert answer["category"] or answer["status"] == "not assessable"
        count += 1
    assert count > 7000


def test_more_suspicion_never_gives_a_lower_category():
    """Independent property: for a given kind and change, the category never falls as the nodule gets larger."""
    order = ["1", "2", "3", "4A", "4B", "4X"]
    for kind, status in itertools.product(("solid", "ground-glass"), ("baseline", "new", "growing")):
        ranks = [order.index(a["category"]) for mm in range(20, 600) if (a := decide(RADS, {"screening": True, "nodules": 1, "type": kind, "status": status, "size": {"mm": mm / 10}}))["category"]]
        assert ranks == sorted(ranks)


# ---- missing facts, several nodules, other guidelines ----------------------------------------------------------------------------
def test_unknown_risk_names_both_and_matters_only_where_it_does():
    def ask(mm):
        return recommend([{"type": "solid", "mean_diameter_mm": mm}], PatientContext(**FIT), names=["fleischner-2017"])[0]
    assert ask(7)["status"] == "not assessable" and "then consider CT" in ask(7)["text"] and "then CT at 18-24" in ask(7)["text"] and "risk" in ask(7)["inputs_missing"]
    assert ask(9)["status"] == "applies" and "risk" in ask(9)["inputs_missing"]


def test_the_most_suspicious_nodule_decides():
    glass, solid = Finding("nodule", "ground-glass", mean_diameter_mm=20.0), Finding("nodule", "solid", mean_diameter_mm=8.0)
    for findings, index in (([glass, solid], 1), ([solid, glass], 0)):
        (answer,) = recommend(findings, {"screening": True, "prior_ct": False}, names=["lung-rads-2022"])
        assert (answer["category"], answer["finding"]) == ("4A", index) and answer["inputs_used"]["other_findings"][0]["category"] == "2"
    (answer,) = recommend([Finding("region", "evidence-region"), solid], {"screening": True, "prior_ct": False}, names=["lung-rads-2022"])
    assert answer["finding"] == 1


def test_a_reader_adds_what_only_a_reader_sees():
    findings = [Finding("nodule", "solid", mean_diameter_mm=9.0)]
    def ask(**facts):
        return recommend(findings, PatientContext(screening=True, prior_ct=False, nodules={0: facts}), names=["lung-rads-2022"])[0]["category"]
    assert [ask(), ask(juxtapleural=True), ask(suspicious_features=True), ask(benign_features=True)] == ["4A", "2", "4X", "1"]


def film(label, classes=("normal", "pneumonia")):
    return Prediction("answered", "a.png", task="binary", classes=classes, label=label, probability={classes[0]: 0.2, classes[1]: 0.8})


@pytest.mark.parametrize("age, expected", [(0.25, {"bts-child-2011"}), (0.3, {"bts-child-2011", "pids-idsa-2011"}), (15.9, {"bts-child-2011", "pids-idsa-2011"}),
                                           (16, {"bts-adult-2009", "pids-idsa-2011"}), (18, {"bts-adult-2009", "ats-idsa-2019"})])
def test_children_and_adults_have_their_own_guideline(age, expected):
    names = [n for n, g in guidelines().items() if g["about"] == "pneumonia"]
    facts = {"age_years": age, "immunosuppressed": False}
    open_ones = {n for n, a in zip(names, recommend(film("pneumonia"), facts, names=names)) if a["status"] != "not applicable"}
    assert open_ones == expected
    assert all(a["status"] == "not applicable" for a in recommend(film("normal"), facts))


@pytest.mark.parametrize("facts, part", [({"age_years": 50, "smoker": False, "persisting_symptoms": False}, "no repeat"), ({"age_years": 51, "smoker": False, "persisting_symptoms": False}, "6 weeks"),
                                         ({"age_years": 30, "smoker": True, "persisting_symptoms": False}, "6 weeks"), ({"age_years": 30, "smoker": False, "persisting_symptoms": True}, "bronchoscopy")])
def test_bts_adult(facts, part):
    (answer,) = recommend(film("pneumonia"), facts, names=["bts-adult-2009"])
    assert answer["status"] == "applies" and part in answer["text"]


def breast(p):
    return Prediction("answered", "us.png", task="binary", classes=("malignant", "normal, benign"), label="malignant", probability={"malignant": p, "normal, benign": 1 - p})


@pytest.mark.parametrize("p, category", [(0.02, None), (0.0201, "4A"), (0.10, "4A"), (0.1001, "4B"), (0.5, "4B"), (0.5001, "4C"), (0.9499, "4C"), (0.95, "5")])
def test_bi_rads_at_its_limits(p, category):
    facts = {"organ": "breast", "setting": "diagnostic", "calibration_prevalence": 0.3, "prevalence": 0.3}
    (answer,) = recommend(breast(p), facts)
    assert answer["category"] == category and answer["status"] == ("applies" if category else "not assessable")


@pytest.mark.parametrize("facts", [{}, {"prevalence": 0.1}, {"calibration_prevalence": 0.1}, {"prevalence": 0.1, "calibration_prevalence": 0.1, "setting": "screening"}])
def test_bi_rads_needs_a_stated_prevalence(facts):
    (answer,) = recommend(breast(0.8), {"organ": "breast", "setting": "diagnostic", **facts})
    assert answer["status"] == "not assessable" and answer["category"] is None
    if "setting" not in facts:
        assert set(answer["inputs_missing"]) >= {"malignancy_probability", *({"prevalence", "calibration_prevalence"} - set(facts))}


@given(st.integers(1, 99), st.integers(1, 99), st.integers(1, 99))
def test_prevalence_by_counting_people(sensitive, false, now):
    """Independent: Bayes' rule by counting people with a given output among ill and healthy."""
    def probability(prevalence):
        ill, well = sensitive / 100 * prevalence, false / 100 * (1 - prevalence)
        return ill / (ill + well)
    assert abs(at_prevalence(probability(0.3), 0.3, now / 100) - probability(now / 100)) < 1e-9


@pytest.mark.parametrize("label, dme, resource, part", [("0", "none", "high", "1-2 years"), ("1", "none", "high", "6-12 months"), ("1", "none", "low", "1-2 years"), ("2", "none", "high", "3-6 months"),
                                                        ("2", "none", "low", "6-12 months"), ("3", "none", "low", "< 3 months"), ("4", None, None, "< 1 month"), ("0", "centre", None, "1 month")])
def test_ico(label, dme, resource, part):
    eye = Prediction("answered", "eye.png", task="ordinal", classes=tuple("01234"), label=label)
    (answer,) = recommend(eye, {"organ": "retina", "diabetes": True, "dme": dme, "resource": resource}, names=["ico-2017"])
    assert answer["status"] == "applies" and part in answer["text"]
    (answer,) = recommend(eye, {"organ": "retina", "diabetes": False}, names=["ico-2017"])
    assert answer["status"] == "not applicable"


def test_a_refused_study_gets_no_advice():
    refused = Prediction("refused", "a.dcm", task="detection", reasons=("a radiograph, not a CT",))
    answers = recommend(refused, {"screening": True})
    assert answers and all(a["status"] == "not assessable" and a["category"] is None and "radiograph" in a["reason"] for a in answers)
    assert recommend(Prediction("answered", "a.png", classes=("cat", "dog"), label="cat")) == ()


def test_recommendations_travel_in_the_record():
    answers = recommend([Finding("nodule", "solid", mean_diameter_mm=7.0)], {"screening": True})
    kept = Prediction.from_json(Prediction("answered", "a", task="detection", recommendations=answers).to_json()).recommendations
    assert list(kept) == list(answers)


# ---- bad input -------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("facts", [{"age": 3}, {"age_years": -1}, {"age_years": float("nan")}, {"age_years": "61"}, {"risk": "medium"}, {"screening": 1}, {"nodules": [1]}, {"nodules": {"x": {}}},
                                   {"nodules": {"0": {"colour": "red"}}}, {"facts": 3}, "61", {"risk": ["low"]}, {"prior_category": "5"}])
def test_wrong_facts_are_named(facts):
    with pytest.raises(ConfigError):
        recommend([], facts)


@pytest.mark.parametrize("names", [["fleischner"], ["../lung-rads-2022"], [3]])
def test_unknown_guidelines_are_named(names):
    with pytest.raises(ConfigError, match="no guideline"):
        recommend([], {}, names=names)


@pytest.mark.parametrize("break_it", [lambda g: g["rules"][0].pop("source"), lambda g: g["rules"][3]["when"].update(colour=["red"]), lambda g: g["rules"].append(g["rules"][0]), lambda g: g.pop("inputs"),
                                      lambda g: g["rules"][8]["when"].update(risk=["medium"]), lambda g: g["rules"][8]["when"].update(size={"mm": {"over": 3}}), lambda g: g.update(assume={"x": 1}),
                                      lambda g: g["rules"][0].update(reading=[{"when": {"colour": ["red"]}, "text": "x"}])])
def test_a_damaged_guideline_is_refused(break_it, tmp_path):
    guideline = json.loads(json.dumps(FLEISCHNER))
    break_it(guideline)
    (tmp_path / "g.json").write_text(json.dumps(guideline))
    with pytest.raises(ConfigError):
        read_guideline(tmp_path / "g.json")


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff\xfe", b'{"inputs": 1, "preconditions": [], "rules": []}', b"null"])
def test_bytes_that_are_no_guideline(content, tmp_path):
    (tmp_path / "g.json").write_bytes(content)
    with pytest.raises(ConfigError):
        read_guideline(tmp_path / "g.json")


def test_every_guideline_says_where_it_comes_from():
    for guideline in guidelines().values():
        assert guideline["citation"] and guideline["edition"] and guideline["reading"] is not None
        assert all(rule["source"] and rule["text"] for rule in guideline["rules"])


def test_three_valued_conditions():
    assert holds(True, [True]) and holds(None, [True]) is None and holds(False, [True]) is False
    assert holds({"mm": None, "mm3": None}, {"mm": {"min": 1}, "mm3": {"min": 1}}) is None
    assert [holds(v, {"above": 2, "max": 3}) for v in (2, 2.1, 3, 3.1)] == [False, True, True, False]
