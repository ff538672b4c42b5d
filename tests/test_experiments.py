"""The protocol of experiments: intervals against scipy, pairing, the ledger, the table, and what the stored results must contain."""
import json
import math
import subprocess
import sys
from dataclasses import replace

import nbchecks as checks
import numpy as np
import pytest

from medimg import reproduction
from medimg.errors import ConfigError, DatasetError
from medimg.experiments import protocol
from medimg.experiments.protocol import EXPERIMENTS, PARTS, difference_figure, log_test_read, results_table, run_experiment, seeds_figure, store_result, stored_results

ROOT = checks.ROOT
STORED = {name: r for part in PARTS if (path := ROOT / "results" / f"{part}.json").is_file() for name, r in stored_results(path).items()}


def mean_of(y, p):
    return float(np.mean(p))


def agreement(y, p):
    return float(np.mean(np.asarray(y) == (np.asarray(p) > 0.5)))


def test_interval_equals_scipys_percentile_bootstrap():
    from scipy import stats
    values = np.random.default_rng(0).gamma(2.0, size=80)
    ours = seeds_figure(mean_of, np.zeros(80), [values], n_boot=4000)
    theirs = stats.bootstrap((values,), np.mean, n_resamples=4000, method="percentile", random_state=1).confidence_interval
    assert ours["value"] == pytest.approx(values.mean()) and ours["sd"] is None and ours["n"] == 80
    assert abs(ours["low"] - theirs.low) < 0.05 * values.std() and abs(ours["high"] - theirs.high) < 0.05 * values.std()


def test_patients_are_drawn_whole():
    """Ten equal images of each patient carry the information of one: scipy's bootstrap of the patients' values is the oracle."""
    from scipy import stats
    patients = np.random.default_rng(3).normal(size=40)
    order = np.random.default_rng(4).permutation(400)
    p, groups = np.repeat(patients, 10)[order], np.repeat(np.arange(40), 10)[order]
    ours = seeds_figure(mean_of, np.zeros(400), [p], groups=groups, n_boot=4000)
    theirs = stats.bootstrap((patients,), np.mean, n_resamples=4000, method="percentile", random_state=1).confidence_interval
    assert abs(ours["low"] - theirs.low) < 0.05 and abs(ours["high"] - theirs.high) < 0.05
    assert "40 patients" in ours["interval"]
    blind = seeds_figure(mean_of, np.zeros(400), [p], n_boot=500)
    assert blind["high"] - blind["low"] < 0.5 * (ours["high"] - ours["low"]) and "too narrow" in blind["interval"]


def test_patients_of_unequal_size_are_weighted_by_their_images():
    """A patient with many images counts with all of them, in the value and in each resample."""
    p, groups = np.r_[np.zeros(30), np.ones(10)], np.r_[np.zeros(30), np.arange(1, 11)]
    f = seeds_figure(mean_of, np.zeros(40), [p], groups=groups, n_boot=2000)
    assert f["value"] == pytest.approx(0.25) and f["low"] < 0.15 and f["high"] == 1.0     # without the first patient all are 1


def test_spread_over_seeds_is_the_sample_standard_deviation():
    y = np.arange(100) % 2
    parts = [np.where(np.arange(100) < k, 1 - y, y) for k in (0, 10, 20)]
    f = seeds_figure(agreement, y, parts, n_boot=50, target=0.85)
    assert f["values"] == [1.0, 0.9, 0.8] and f["sd"] == pytest.approx(0.1) and f["value"] == pytest.approx(0.9) and f["target"] == 0.85


def test_difference_is_paired_and_antisymmetric():
    rng = np.random.default_rng(0)
    y = rng.integers(0, 2, 300)
    hard = rng.random(300) < 0.3                             # both fail on the same cases; b fails on 5 more
    a = np.where(hard, 1 - y, y)
    b = a.copy()
    b[np.flatnonzero(~hard)[:5]] = 1 - b[np.flatnonzero(~hard)[:5]]
    ab, ba = (difference_figure(agreement, y, *pair, n_boot=400) for pair in (([a], [b]), ([b], [a])))
    assert ab["value"] == pytest.approx(5 / 300) and ba["value"] == pytest.approx(-5 / 300)
    assert ab["low"] == pytest.approx(-ba["high"]) and ab["low"] >= 0
    single = seeds_figure(agreement, y, [a], n_boot=400)
    assert ab["high"] - ab["low"] < 0.5 * (single["high"] - single["low"]), "pairing takes out what both share"
    same = difference_figure(agreement, y, [a], [a], n_boot=50)
    assert same["value"] == same["low"] == same["high"] == 0


def test_coverage_of_the_interval():
    """Over 200 invented test folds the 95 % interval holds the truth about 95 times in 100."""
    hits = 0
    for seed in range(200):
        p = (np.random.default_rng(seed).random(120) < 0.7).astype(float)
        f = seeds_figure(mean_of, np.zeros(120), [p], n_boot=300, seed=seed)
        hits += f["low"] <= 0.7 <= f["high"]
    assert 180 <= hits <= 199


def test_one_class_is_typed():
    from medimg.evaluation.metrics import auc
    with pytest.raises((ConfigError, DatasetError)):
        seeds_figure(auc, np.zeros(20, int), [np.arange(20.0)])


# --- made once, asked in parts

def test_what_is_made_once_is_made_once_and_is_whole_or_absent(tmp_path):
    path, calls = tmp_path / "deep" / "a.npz", []

    def make():
        calls.append(1)
        return {"x": np.arange(6.0).reshape(2, 3), "names": np.array(["a", "b"])}
    first, again = protocol.made_once(path, make), protocol.made_once(path, make)
    assert calls == [1] and all(np.array_equal(first[k], again[k]) and first[k].dtype == again[k].dtype for k in ("x", "names"))
    assert protocol.made_once(None, make)["x"].shape == (2, 3) and calls == [1, 1]
    with pytest.raises(ZeroDivisionError):
        protocol.made_once(tmp_path / "b.npz", lambda: {"x": np.array(1 / 0)})
    with pytest.raises(ValueError, match="allow_pickle"):
        protocol.made_once(tmp_path / "c.npz", lambda: {"x": np.array([object()])})
    assert not (tmp_path / "b.npz").exists()


def test_answers_in_parts_equal_answers_at_once():
    seen, x = [], np.random.default_rng(0).normal(size=(11, 3)).astype(np.float32)

    def net(part, training):
        seen.append((len(part), training))
        return part @ np.ones((3, 2), np.float32)
    assert np.allclose(protocol.logits_of(net, x, size=4), x @ np.ones((3, 2)), atol=1e-6)
    assert seen == [(4, False), (4, False), (3, False)]


# --- ledger and table

def test_the_ledger_counts_these_images_only_and_survives_a_cut_line(tmp_path):
    path = tmp_path / "deep" / "reads.jsonl"
    assert log_test_read(path, dataset="a", checksum="1") == 1
    with open(path, "a") as file:
        file.write('{"checksum": "1", "da\n')
    assert log_test_read(path, dataset="b", checksum="2") == 1 and log_test_read(path, dataset="a", checksum="1", model="m") == 2
    assert json.loads(path.read_text().splitlines()[-1])["model"] == "m"


def test_results_from_several_programs_are_all_kept(tmp_path):
    code = ("import sys; from medimg.experiments.protocol import store_result\n"
            "for k in range(12): store_result({'name': f'{sys.argv[1]}-{k}', 'figures': {}}, sys.argv[2])")
    jobs = [subprocess.Popen([sys.executable, "-c", code, name, str(tmp_path)]) for name in "abc"]
    assert [job.wait() for job in jobs] == [0, 0, 0]
    kept = stored_results(tmp_path / "results" / "models.json")
    assert len(kept) == 36
    assert (tmp_path / "medimg" / "experiments" / "models.json").read_bytes() == (tmp_path / "results" / "models.json").read_bytes()


def test_nan_is_not_stored(tmp_path):
    store_result({"name": "good", "figures": {}}, tmp_path)
    with pytest.raises(ValueError):
        store_result({"name": "bad", "figures": {"auc": {"value": math.nan}}}, tmp_path)
    assert list(stored_results(tmp_path / "results" / "models.json")) == ["good"]


def test_table_says_met_and_missed():
    figures = {"auc": {"value": 0.9, "low": 0.8, "high": 0.95, "sd": 0.01, "target": 0.95}, "error": {"value": 1.5, "unit": "mm", "target": 2.0, "at_most": True}}
    rows = results_table({"toy": {"figures": figures}}).splitlines()[2:]
    assert "≥ 0.95: missed" in rows[0] and "0.800 to 0.950" in rows[0] and "≤ 2: met" in rows[1] and "1.500 mm" in rows[1]


# --- running

@pytest.fixture
def toy(monkeypatch):
    """An experiment of this file, in the registry."""
    def function(run):
        run.read_test(("toy-data", "c0ffee"), metric="mean")
        return {"figures": {"mean": seeds_figure(mean_of, np.zeros(30), [np.arange(30.0) + s for s in run.seeds], n_boot=50)}, "about": {"profile": run.profile}}
    entry = replace(EXPERIMENTS["xray-lungs"], target="test_experiments:TOY")
    monkeypatch.setitem(protocol.EXPERIMENTS, "toy", entry)
    monkeypatch.setattr(sys.modules[__name__], "TOY", function, raising=False)
    monkeypatch.setitem(sys.modules, "test_experiments", sys.modules[__name__])


def test_a_run_has_everything_that_its_figures_depend_on(toy, tmp_path):
    made = run_experiment("toy", out=tmp_path, profile="ci", progress=False)
    assert made["seeds"] == [0] and made["about"] == {"profile": "ci"} and made["command"] == "medimg reproduce toy"
    assert {"code_commit", "lock_sha256", "versions", "machine", "wall_s", "cpu_s", "research_use"} <= made.keys()
    assert made["test_reads"] == {"toy-data test": 1}
    assert json.loads((tmp_path / "test_reads.jsonl").read_text())["metric"] == "mean"
    assert run_experiment("toy", out=tmp_path, progress=False)["seeds"] == [0, 1, 2]
    assert json.dumps(made, allow_nan=False)


def test_reproduce_compares_with_what_is_stored(toy, tmp_path, monkeypatch):
    settings = {"out": tmp_path, "profile": "ci", "progress": False}
    assert reproduction.reproduce("toy", **settings)["verdict"] == "first"
    monkeypatch.setattr(protocol, "stored_results", lambda path=None: {"toy": {"figures": {"mean": {"value": 14.5}}}})
    assert reproduction.reproduce("toy", **settings)["verdict"] == "same"
    monkeypatch.setattr(protocol, "stored_results", lambda path=None: {"toy": {"figures": {"mean": {"value": 14.0, "low": 13.0, "high": 15.0}}}})
    assert reproduction.reproduce("toy", **settings)["verdict"] == "within the stated interval"
    elsewhere = {"figures": {"mean": {"value": 9.0, "low": 8.0, "high": 10.0}}, "profile": "full", "seeds": [0], "checksums": {"toy-data": "decade"}}
    monkeypatch.setattr(protocol, "stored_results", lambda path=None: {"toy": elsewhere})
    assert reproduction.reproduce("toy", **settings)["verdict"] == "different, because checksum of toy-data decade there, c0ffee here; profile full there, ci here"
    assert json.loads((tmp_path / "result.json").read_text())["causes"] == ["checksum of toy-data decade there, c0ffee here", "profile full there, ci here"]


def test_an_experiment_keeps_the_code_it_used_and_other_code_is_named(toy, tmp_path, monkeypatch):
    """A constant of an experiment's module is part of its plan: with another one, the module is named."""
    made = reproduction.reproduce("toy", out=tmp_path, profile="ci", progress=False)
    assert made["modules"].keys() >= {"experiments.protocol", "evaluation.metrics", "training.record"} and made["checksums"] == {"toy-data": "c0ffee"}
    mean = {"value": 9.0, "low": 8.0, "high": 10.0}
    stored = made | {"figures": {"mean": mean}, "modules": made["modules"] | {"evaluation.metrics": "0" * 16}}
    monkeypatch.setattr(protocol, "stored_results", lambda path=None: {"toy": stored})
    again = reproduction.reproduce("toy", out=tmp_path, profile="ci", progress=False)
    assert again["verdict"].startswith("different, because code ") and again["verdict"].endswith("(other code in evaluation.metrics)") and len(again["causes"]) == 1


@pytest.mark.parametrize("name, settings, said", [
    ("deep-vs-classicle", {}, "deep-vs-classical"), ("toy", {"update": True, "profile": "ci"}, "whole experiment"), ("toy", {"update": True, "seeds": [0]}, "whole experiment"),
    ("toy", {"n": 5}, "no n"), ("toy", {"profile": "fulll"}, "full")])
def test_what_is_refused(toy, tmp_path, name, settings, said):
    with pytest.raises(ConfigError, match=said):
        reproduction.reproduce(name, out=tmp_path / "x", progress=False, **settings)
    assert not (tmp_path / "x").exists()


# --- what is stored

@pytest.mark.parametrize("name", list(EXPERIMENTS))
def test_each_experiment_has_a_function_and_a_page(name):
    module = EXPERIMENTS[name].function().__module__
    page = checks.quarto_filter.module_of
    pages = [p for p in checks.nbtool.chapters() if p.parent.name == "experiments" and page(checks.nbtool.read(p)) == module]
    assert len(pages) == 1 and name in "".join(c.source for c in checks.nbtool.read(pages[0]).cells), f"{name} is not told on its page"


@pytest.mark.parametrize("name", list(EXPERIMENTS))
def test_each_experiment_is_stored(name):
    r = STORED.get(name)
    assert r, f"results/{EXPERIMENTS[name].part}.json has no {name}; remedy: medimg reproduce {name} --update"
    assert r["profile"] == "full" and r["command"] == f"medimg reproduce {name}" and r["cpu_s"] > 0 and r["seeds"] and r["figures"]
    for key, f in r["figures"].items():
        assert math.isfinite(f["value"]), key
        if f.get("low") is not None:
            assert f["low"] <= f["high"] and f.get("interval"), f"{key}: an interval that is none, or does not say what it is"
    ledger = [json.loads(line) for line in (ROOT / "results" / "test_reads.jsonl").read_text(encoding="utf-8").splitlines()]
    for what in r["test_reads"]:
        assert any(what.startswith(line["dataset"] + " ") for line in ledger), f"{what} was read, but no line of the ledger says so"


def test_the_package_carries_the_same_table():
    for part in PARTS:
        results = ROOT / "results" / f"{part}.json"
        assert not results.exists() or (ROOT / "medimg" / "experiments" / f"{part}.json").read_bytes() == results.read_bytes()
        assert all(EXPERIMENTS[name].part == part for name in (stored_results(results) if results.exists() else ()))
    assert set(STORED) <= set(EXPERIMENTS), "results of experiments that are gone"
