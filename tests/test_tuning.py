"""The search: killed and gone on with equals uninterrupted, ASHA does what its paper says, workers lose and repeat nothing, and mistakes are one line."""
import importlib.util
import json
import math
import os
import random
import signal
import sqlite3
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

from medimg.errors import ConfigError, MedimgError
from medimg.training import study as study_module
from medimg.training import tuning
from medimg.training.crossval import cross_validate, patient_folds
from medimg.training.tuned import TrainObjective, search_inside, tune
from medimg.training.tuning import SearchConfig, check_space, parse_space, search

SPACE = {"a": ("log", 0.1, 9.0), "w": (8, 16), "k": ("int", 1, 4)}
SOAK = os.environ.get("MEDIMG_SOAK", "") not in ("", "0")


def score(params, epoch):
    return 1 - (params["a"] - 3) ** 2 / 40 - 1 / epoch - 0.1 * (params["w"] == 8) - 0.01 * params["k"]


def curve(params, report, folder):
    for epoch in range(1, 10):
        report(epoch, score(params, epoch))
    return score(params, 9)


def run(objective=curve, space=SPACE, out=None, *, plan=None, first=(), **options):
    return search(objective, space, SearchConfig(**{"trials": 12, "epochs": 9} | options), out=out, plan=plan, first=first, progress=False)


# ---- what is proposed, and what is stopped ---------------------------------------------------------------------------------------
def test_asha_equals_the_rule_of_its_paper_written_down_plainly():
    """At rung r·η^k a trial goes on when it is among the best ⌊n/η⌋ of the n that have been there, or the best of all."""
    found, at_rung = run(trials=40), {1: [], 3: []}
    assert found.config.rungs == (1, 3)
    for trial in found.trials:
        reached = 9
        for rung in (1, 3):
            at_rung[rung].append(score(trial.params, rung))
            if score(trial.params, rung) < sorted(at_rung[rung])[-max(len(at_rung[rung]) // 3, 1)]:
                reached = rung
                break
        assert max(trial.epochs) == reached and trial.state == ("finished" if reached == 9 else "stopped")
        assert trial.epochs == {e: score(trial.params, e) for e in range(1, reached + 1)}
    assert found.spent == sum(max(t.epochs) for t in found.trials) < 0.4 * 40 * 9
    assert found.best.scores[0] == max(t.scores[0] for t in found.trials if t.scores)


def test_minimising_is_maximising_the_negative():
    up = run(trials=20)
    down = run(lambda p, report, folder: -curve(p, lambda e, s: report(e, -s), folder), trials=20, goals=("minimize",))
    assert [t.params for t in up.trials] == [t.params for t in down.trials] and [t.state for t in up.trials] == [t.state for t in down.trials]


def test_proposals_stay_in_the_space_and_fill_it():
    found = run(trials=60, sampler="random", pruner="none")
    a = np.log([t.params["a"] for t in found.trials])
    assert np.all((a >= np.log(0.1)) & (a <= np.log(9))) and {t.params["w"] for t in found.trials} == {8, 16} and {t.params["k"] for t in found.trials} == {1, 2, 3, 4}
    assert abs(a.mean() - np.log([0.1, 9]).mean()) < 3 * np.ptp(np.log([0.1, 9])) / math.sqrt(12 * 60)
    lists = run(lambda p, r, f: len(p["blocks"]), {"blocks": ([1], [1, 2]), "b": (True, None)}, trials=6, epochs=1)
    assert all(t.params["blocks"] in ([1], [1, 2]) and t.params["b"] in (True, None) for t in lists.trials) and lists.best.params["blocks"] == [1, 2]


def test_tpe_beats_chance_on_a_parabola():
    def parabola(params, report, folder):
        return -(math.log10(params["a"]) - 0.5) ** 2
    best = {kind: [run(parabola, {"a": ("log", 1e-3, 1e3)}, trials=30, epochs=1, sampler=kind, seed=s).best.scores[0] for s in range(5)] for kind in ("tpe", "random")}
    assert np.median(best["tpe"]) > np.median(best["random"])


def test_settings_in_use_are_tried_first():
    found = run(first=[{"a": 2.0, "w": 16}], trials=3)
    assert found.trials[0].params["a"] == 2.0 and found.trials[0].params["w"] == 16 and found.trials[1].params["a"] != 2.0
    for wrong, word in (({"b": 1}, "'b'"), ({"a": 99.0}, "outside"), ({"w": 9}, "outside")):
        with pytest.raises(ConfigError, match=word):
            run(first=[wrong])


def test_the_front_is_what_brute_force_finds():
    rng = np.random.default_rng(0)
    found = search(lambda p, r, f: (round(float(rng.random()), 1), round(float(rng.random()), 1)), {"a": ("uniform", 0, 1)},
                   SearchConfig(trials=30, goals=("maximize", "minimize")), progress=False)
    points = [t.scores for t in found.trials]
    beaten = [any(b[0] >= a[0] and b[1] <= a[1] and b != a for b in points) for a in points]
    assert {t.number for t in found.front} == {n for n, bad in enumerate(beaten) if not bad}
    with pytest.raises(ConfigError, match="front"):
        found.best


def test_importance_finds_the_setting_that_matters():
    share = run(lambda p, r, f: -p["a"] ** 2 + 1e-3 * p["b"], {"a": ("uniform", -1, 1), "b": ("uniform", -1, 1)}, trials=40, epochs=1).importance()
    assert share["a"] > 0.8 and sum(share.values()) == pytest.approx(1)


def test_a_score_that_is_not_finite_is_a_failed_trial_and_never_the_best():
    found = run(lambda p, r, f: math.nan if p["a"] > 1 else p["a"], trials=20, epochs=1)
    states = {t.state for t in found.trials}
    assert states == {"finished", "failed"} and found.best.params["a"] <= 1 and all(not t.scores for t in found.trials if t.state == "failed")
    with pytest.raises(MedimgError, match="no trial"):
        run(lambda p, r, f: math.nan, trials=2, epochs=1).best


# ---- killed and gone on with --------------------------------------------------------------------------------------------------------
TOY = """
import json, sys, time
from medimg.config import write_atomic
from medimg.training.tuning import SearchConfig, search
def objective(params, report, folder):
    file = folder / "scores.json"
    kept = json.loads(file.read_text()) if file.exists() else []
    for epoch in range(1, 10):
        if epoch > len(kept):
            time.sleep(float(sys.argv[4]))
            kept.append(1 - (params["a"] - 3) ** 2 / 40 - 1 / epoch - 0.1 * (params["w"] == 8))
            write_atomic(file, json.dumps(kept))
            with open(folder / "made.txt", "a") as log:
                print(epoch, file=log)
        report(epoch, kept[epoch - 1])
        print("epoch", flush=True)
    return kept[-1]
config = SearchConfig(trials=int(sys.argv[2]), epochs=9, workers=int(sys.argv[3]))
search(objective, {"a": ("log", 0.1, 9.0), "w": (8, 16)}, config, out=sys.argv[1], progress=False)
"""

REAL = """
import sys
from medimg.data.datasets import load_dataset
from medimg.training.record import TrainConfig
from medimg.training.recipes import plain_recipe
from medimg.training.tuned import TrainObjective
from medimg.training.tuning import SearchConfig, search
data = load_dataset("phantom-cxr", data="phantom", n=60, quiet=True)
plain = plain_recipe("phantom-cxr")
train = TrainObjective(data, TrainConfig(epochs=4, batch_size=16), plain.preprocessor(data.images), model_options={"blocks": [1]})
def told(params, report, folder):
    def say(epoch, score):
        print("epoch", flush=True)
        report(epoch, score)
    return train(params, say, folder)
search(told, {"learning_rate": ("log", 1e-4, 1e-1), "width": (4, 8)}, SearchConfig(trials=6, epochs=4), out=sys.argv[1], plan=train.plan(), progress=False)
"""


def table(folder):
    return [{k: v for k, v in t.items() if k != "seconds"} for t in json.loads((Path(folder) / "search.json").read_text())["trials"]]


def end(process, group=False):
    os.killpg(process.pid, signal.SIGKILL) if group else process.send_signal(signal.SIGKILL)
    process.communicate()


def kill_at(command, lines, delay):
    """kill -9 so many printed lines and seconds after the start; True if it was alive until then."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    for _ in range(lines):
        if not process.stdout.readline():
            break
    try:
        process.wait(delay)
    except subprocess.TimeoutExpired:
        end(process, group=True)
        return True
    assert process.returncode == 0, process.stderr.read()
    return False


@pytest.mark.slow
@pytest.mark.parametrize("script, arguments, pause", [(TOY, ["20", "1", "0"], 0.1), (REAL, [], 1.0)], ids=["plain function", "trainings"])
def test_killed_at_random_points_equals_uninterrupted(tmp_path, script, arguments, pause):
    """MEDIMG_SOAK=1: ten points; else three."""
    def command(name): return [sys.executable, "-c", script, str(tmp_path / name), *arguments]
    subprocess.run(command("whole"), check=True, capture_output=True)
    seed = random.SystemRandom().randrange(10 ** 6)
    rng, points, rounds = random.Random(seed), 0, 0
    print("seed", seed)
    while points < (10 if SOAK else 3):
        rounds += 1
        while points < (10 if SOAK else 3) and kill_at(command(f"cut{rounds}"), rng.randrange(0, 8), rng.uniform(0, pause)):
            points += 1
        subprocess.run(command(f"cut{rounds}"), check=True, capture_output=True)
        assert table(tmp_path / "whole") == table(tmp_path / f"cut{rounds}"), f"seed {seed}"
    for log in tmp_path.glob("cut*/trials/*/made.txt"):
        epochs = log.read_text().split()
        assert len(epochs) - len(set(epochs)) <= points, "more epochs were made twice than kills could lose"


@pytest.mark.slow
def test_workers_killed_with_their_search_lose_and_repeat_nothing(tmp_path):
    command = [sys.executable, "-c", TOY, str(tmp_path / "cut"), "16", "2", "0.02"]
    for _ in range(2):
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
        before = finished(tmp_path / "cut")
        deadline = time.time() + 120
        while len(finished(tmp_path / "cut")) < len(before) + 3 and process.poll() is None and time.time() < deadline:
            time.sleep(0.05)
        assert process.poll() is None, process.stderr.read()
        end(process, group=True)
        kept = finished(tmp_path / "cut")
        assert len(kept) >= len(before) + 3 and all(kept[n] == row for n, row in before.items())
    subprocess.run(command, check=True, capture_output=True)
    rows = table(tmp_path / "cut")
    assert [t["number"] for t in rows] == list(range(16)) and all(finished(tmp_path / "cut")[n] == row for n, row in kept.items())
    for log in (tmp_path / "cut" / "trials").glob("*/made.txt"):
        epochs = log.read_text().split()
        assert len(epochs) - len(set(epochs)) <= 2


def test_no_waiting_trial_is_given_to_two_workers(tmp_path):
    """SQLite alone does: this failed in every one of six runs before workers took turns."""
    script = """
import sys
from medimg.training.tuning import SearchConfig, search
def objective(params, report, folder):
    with open(folder / "made.txt", "a") as log:
        print(1, file=log)
    report(1, params["a"])
    return params["a"]
search(objective, {"a": ("uniform", 0, 9)}, SearchConfig(trials=32, workers=4), out=sys.argv[1], first=[{"a": k / 8} for k in range(32)], progress=False)
"""
    subprocess.run([sys.executable, "-c", script, str(tmp_path / "search")], check=True)
    made = [log.read_text().split() for log in (tmp_path / "search" / "trials").glob("*/made.txt")]
    assert made == [["1"]] * 32 and [t["params"]["a"] for t in table(tmp_path / "search")] == [k / 8 for k in range(32)]


def finished(folder):
    """number -> (state, params) of the finished trials in the study's file, by SQL, without Optuna."""
    if not (folder / "study.db").exists():
        return {}
    with sqlite3.connect(f"file:{folder / 'study.db'}?mode=ro", uri=True, timeout=20) as db:
        try:
            rows = db.execute("select t.number, t.state, group_concat(p.param_name || '=' || p.param_value) from trials t join trial_params p using (trial_id) "
                              "where t.state in ('COMPLETE', 'PRUNED') group by t.trial_id").fetchall()
        except sqlite3.OperationalError:      # no tables yet
            return {}
    return {number: (state, params) for number, state, params in rows}


def test_an_error_ends_the_search_and_the_next_call_takes_the_same_trial_up(tmp_path):
    seen = []

    def breaks(params, report, folder):
        seen.append(params)
        if len(seen) == 4:
            raise RuntimeError("a bug")
        return curve(params, report, folder)
    with pytest.raises(RuntimeError, match="a bug"):
        run(breaks, out=tmp_path, trials=6)
    found = run(breaks, out=tmp_path, trials=6)
    assert seen[3] == seen[4] and found.table() == run(trials=6).table()
    assert run(breaks, out=tmp_path, trials=8).table()[:6] == found.table() and len(seen) == 9, "a search that grows keeps what it has"


@pytest.mark.parametrize("cut", [1, 2, 3])
def test_cut_while_the_half_made_trial_is_taken_out(tmp_path, monkeypatch, cut):
    def stops(params, report, folder):
        if stops.after == 0:
            raise KeyboardInterrupt
        stops.after -= 1
        return curve(params, report, folder)
    stops.after = 2
    with pytest.raises(KeyboardInterrupt):
        run(stops, out=tmp_path, trials=4)
    optuna, calls = tuning._optuna(), []
    real = {name: getattr(optuna, name) for name in ("delete_study", "create_study")}

    def counted(name):
        def call(*args, **kwargs):
            calls.append(name)
            if len(calls) > cut:
                raise KeyboardInterrupt
            return real[name](*args, **kwargs)
        return call
    for name in real:
        monkeypatch.setattr(optuna, name, counted(name))
    with pytest.raises(KeyboardInterrupt):
        run(out=tmp_path, trials=4)
    monkeypatch.undo()
    assert run(out=tmp_path, trials=4).table() == run(trials=4).table()


# ---- workers, Ray, databases ------------------------------------------------------------------------------------------------------
def slow_square(params, report, folder):
    (folder / f"{os.getpid()}.txt").write_text("here")
    time.sleep(0.3)
    return -params["a"] ** 2


@pytest.mark.slow
def test_two_workers_share_a_study(tmp_path):
    found = run(slow_square, {"a": ("uniform", -1, 1)}, tmp_path, trials=8, epochs=1, workers=2)
    where = [p.name for p in tmp_path.glob("trials/*/*.txt")]
    assert [t.number for t in found.trials] == list(range(8)) and len(where) == 8 and len(set(where)) == 2 and f"{os.getpid()}.txt" not in where


def dies(params, report, folder):
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_worker_that_dies_is_one_line(tmp_path):
    with pytest.raises(MedimgError, match="worker was killed"):
        run(dies, out=tmp_path, trials=2, epochs=1, workers=2)
    assert len(run(slow_square, out=tmp_path, trials=2, epochs=1).trials) == 2


@pytest.mark.slow
def test_ray_makes_the_same_search_on_two_cpus(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]))
    found = run(ray_curve, out=tmp_path, trials=9, engine="ray", workers=2)
    assert len(found.trials) == 9 and {t.state for t in found.trials} <= {"finished", "stopped", "failed"} and "stopped" in {t.state for t in found.trials}
    for t in found.trials:
        length = max(t.epochs)
        assert t.epochs == {e: score(t.params, e) for e in range(1, length + 1)} and (t.state == "stopped" if length in (1, 3) else length == 9)
        assert t.scores == (() if t.state != "finished" else (score(t.params, 9),))
    assert all(t.state in ("failed", "stopped") for t in found.trials if t.params["k"] == 4 and max(t.epochs) == 9), "Ray's last rung may stop a trial that has just ended"
    assert run(out=tmp_path, trials=9).table() == found.table(), "a finished search is read by either engine"
    assert len(run(out=tmp_path, trials=10).trials) == 10, "and gone on with"


def ray_curve(params, report, folder):
    for epoch in range(1, 10):
        report(epoch, 1 - (params["a"] - 3) ** 2 / 40 - 1 / epoch - 0.1 * (params["w"] == 8) - 0.01 * params["k"])
    return math.nan if params["k"] == 4 else 1 - (params["a"] - 3) ** 2 / 40 - 1 / 9 - 0.1 * (params["w"] == 8) - 0.01 * params["k"]


def test_without_ray_or_a_driver_the_message_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r'pip install "medimg\[ray\]"'):
        run(out=tmp_path, engine="ray")
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(ConfigError, match=r'pip install "psycopg\[binary\]"') as error:
        run(out=tmp_path, storage="postgresql://anna:secret@host/base")
    assert "secret" not in str(error.value)
    for url in ("nothing", "oracel://x/y"):
        with pytest.raises(ConfigError, match="names no database"):
            run(out=tmp_path, storage=url)


def test_a_locked_or_damaged_database_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(study_module, "_PATIENCE_S", 0.2)
    whole = run(out=tmp_path, trials=3)
    other = sqlite3.connect(tmp_path / "study.db")
    other.execute("BEGIN EXCLUSIVE")
    with pytest.raises(MedimgError, match="locked by another program"):
        run(out=tmp_path, trials=4)
    other.close()
    assert run(out=tmp_path, trials=3).table() == whole.table()
    (tmp_path / "study.db").write_bytes(b"not a database" * 100)
    with pytest.raises(MedimgError, match="does not answer"):
        run(out=tmp_path)


def test_a_folder_or_study_of_another_search_is_refused(tmp_path):
    def run(**options):
        return globals()["run"](**{"trials": 3} | options)
    run(out=tmp_path / "a", plan={"data": "x"})
    for options, word in (({"space": SPACE | {"k": ("int", 1, 5)}}, "another space"), ({"plan": {"data": "y"}}, "another plan"), ({"seed": 1}, "another search"), ({"epochs": 8}, "another search")):
        with pytest.raises(ConfigError, match=word):
            run(**{"out": tmp_path / "a", "plan": {"data": "x"}} | options)
    url = f"sqlite:///{tmp_path / 'shared.db'}"
    first = run(out=tmp_path / "b", storage=url)
    with pytest.raises(ConfigError, match="another folder"):
        run(out=tmp_path / "c", storage=url)
    assert run(out=tmp_path / "c", storage=url, name="mine").table() == first.table() == run(out=tmp_path / "b", storage=url).table()
    with study_module._alone(tmp_path / "b"), pytest.raises(ConfigError, match="another search works"):
        run(out=tmp_path / "b", storage=url)


@pytest.mark.parametrize("wrong, word", [
    (lambda: check_space({"learning_rat": (1, 2)}, known=["learning_rate", "width"]), "did you mean learning_rate"),
    (lambda: check_space({"a": ("log", -1, 1)}), "above zero"), (lambda: check_space({"a": ("int", 1, 2.5)}), "two numbers"), (lambda: check_space({"a": ("log", 1)}), "two numbers"),
    (lambda: check_space({"a": ("uniform", 0, math.inf)}), "plain values"), (lambda: check_space({"a": (object(), 1)}), "plain values"), (lambda: check_space({"a": (1, 1)}), "different"),
    (lambda: check_space([]), "empty"), (lambda: parse_space(["a=1,2", "a=3,4"]), "twice"), (lambda: SearchConfig(epochs=0), "epochs"), (lambda: SearchConfig(workers=1.5), "workers"),
    (lambda: SearchConfig(sampler="tpes"), "did you mean tpe"), (lambda: SearchConfig(pruner="asha", goals=("maximize",) * 2), "2 goals"), (lambda: SearchConfig(pruner="asha", epochs=1), "first_rung"),
    (lambda: run(lambda p, r, f: (1, 2)), "2|goals"), (lambda: run(lambda p, r, f: "good"), "number"), (lambda: run(workers=2), "folder"), (lambda: run(engine="ray"), "folder")])
def test_mistakes(wrong, word):
    with pytest.raises(ConfigError, match=word):
        wrong()


# ---- trainings ----------------------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def objective():
    from medimg.data.datasets import load_dataset
    from medimg.training.record import TrainConfig
    from medimg.training.recipes import plain_recipe
    data = load_dataset("phantom-cxr", data="phantom", n=60, quiet=True)
    return TrainObjective(data, TrainConfig(epochs=2, batch_size=16), plain_recipe("phantom-cxr").preprocessor(data.images), model_options={"blocks": [1]})


def test_no_trial_can_see_the_test_fold(objective):
    from medimg.data.datasets import load_dataset
    data = load_dataset("phantom-cxr", data="phantom", n=60, quiet=True)
    hidden = set(data.split("test").image_ids)
    assert hidden and not hidden & set(objective.dataset.image_ids) and set(objective.dataset.splits) == {"train", "val"}


def test_a_tuned_training_equals_the_same_training_by_hand(objective, tmp_path):
    from medimg.models.networks import build_model
    from medimg.training.trainer import fit
    from dataclasses import replace
    found = tune(objective, {"learning_rate": ("log", 1e-3, 1e-2), "width": (4, 8)}, SearchConfig(trials=2, pruner="none"), out=tmp_path)
    trial = found.trials[1]
    net = build_model("resnet", (64, 64, 1), 2, task="binary", seed=0, width=trial.params["width"], blocks=[1])
    run = fit(net, objective.dataset, replace(objective.config, learning_rate=trial.params["learning_rate"]), preprocessor=objective.preprocessor, out=tmp_path / "hand", progress=False)
    assert trial.scores == (run.metrics["auc"],) and trial.epochs == {row["epoch"]: row["val_auc"] for row in run.history}
    assert json.loads((tmp_path / trial.folder / "run.json").read_text())["fingerprint"] == run.fingerprint


def test_a_training_that_diverges_is_a_failed_trial(objective, tmp_path, monkeypatch):
    from medimg.training import trainer
    real = trainer.TrainState.step
    monkeypatch.setattr(trainer.TrainState, "step", lambda self, x, y, number, rate: real(self, x, y, number, rate) if self.config.label_smoothing < 0.1 else math.nan)
    found = tune(objective, {"label_smoothing": (0.0, 0.2)}, SearchConfig(trials=3, pruner="none"), out=tmp_path, first=[{"label_smoothing": 0.2}, {"label_smoothing": 0.0}])
    assert [t.state for t in found.trials[:2]] == ["failed", "finished"] and found.best.params == {"label_smoothing": 0.0}


def test_cost_is_a_second_goal(objective, tmp_path):
    from medimg.models.costs import model_facts
    from medimg.models.networks import build_model
    both = TrainObjective(objective.dataset, objective.config, objective.preprocessor, model_options={"blocks": [1]}, cost="multiply_adds")
    found = tune(both, {"width": (4, 8)}, SearchConfig(trials=2), out=tmp_path, first=[{"width": 4}, {"width": 8}])
    assert [t.scores[1] for t in found.trials] == [model_facts(build_model("resnet", (64, 64, 1), 2, width=w, blocks=[1])).multiply_adds for w in (4, 8)]
    with pytest.raises(ConfigError, match="2 goals"):
        tune(both, {"width": (4, 8)}, SearchConfig(pruner="asha"), out=tmp_path / "b")
    with pytest.raises(ConfigError, match="did you mean width"):
        tune(both, {"widht": (4, 8)}, out=tmp_path / "c")


def test_a_search_inside_the_folds_never_touches_an_outer_patient():
    y, folds, seen = np.arange(60) % 2, patient_folds(np.arange(60) % 2, np.arange(60) // 2), []

    def fit_predict(params, train, test):
        seen.append((set(train), set(test)))
        return y[test] * params["a"]
    cv = cross_validate(search_inside(fit_predict, {"a": (0, 1)}, folds, metric=lambda y, p: float(np.mean((p > 0) == y)), config=SearchConfig(trials=6)),
                        folds, metric=lambda y, p: float(np.mean((p > 0) == y)), progress=False)
    per_fold = len(seen) // 5
    for k, (train, test) in enumerate(folds):
        *inner, last = seen[k * per_fold:(k + 1) * per_fold]
        assert all(not (a | b) & set(test) and not a & b for a, b in inner) and last == (set(train), set(test)) and len(inner) == 18
    assert cv.mean == 1.0


# ---- the command line -----------------------------------------------------------------------------------------------------------------
def medimg(*arguments):
    return subprocess.run([sys.executable, "-m", "medimg.cli", *map(str, arguments)], capture_output=True, text=True, timeout=600)


@pytest.mark.slow
def test_the_command_line_searches_goes_on_and_its_best_run_can_be_evaluated(tmp_path):
    line = ["tune", "phantom-cxr", "--out", tmp_path / "s", "--profile", "ci", "--n", 60, "--data", "phantom", "--space", "learning_rate=log:0.001:0.01", "--space", "label_smoothing=0,0.1"]
    done = medimg(*line, "--trials", 2, "--json")
    assert done.returncode == 0, done.stderr
    first = json.loads(done.stdout)
    done = medimg(*line, "--trials", 4, "--quiet", "--picture", tmp_path / "s.png")
    assert done.returncode == 0 and done.stdout.startswith("4 trials") and (tmp_path / "s.png").read_bytes()[:4] == b"\x89PNG", done.stderr
    assert json.loads((tmp_path / "s" / "search.json").read_text())["trials"][:2] == first["trials"]
    best = done.stdout.strip().splitlines()[-1].split()[-1]
    done = medimg("evaluate", best, "--split", "val", "--n-boot", 100, "--json")
    assert done.returncode == 0 and json.loads(done.stdout)["same_data"], done.stderr


def test_mistakes_on_the_command_line_are_one_line(tmp_path):
    for extra, word in ((["--space", "learning_rat=log:0.001:0.1"], "learning_rate"), (["--pruner", "asha", "--cost", "parameters"], "2 goals"), (["--engine", "rai"], "ray")):
        done = medimg("tune", "phantom-cxr", "--out", tmp_path, "--profile", "ci", "--n", 40, "--data", "phantom", "--quiet", *extra)
        assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1 and word in done.stderr and not done.stdout, done.stderr


@pytest.fixture(scope="module")
def postgres(tmp_path_factory):
    """The URL of a real PostgreSQL server on a socket of its own, gone afterwards."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb")) or [Path(p) for p in [shutil.which("initdb")] if p]
    if not found or importlib.util.find_spec("psycopg") is None:
        pytest.skip("no PostgreSQL server (Debian: postgresql) or no psycopg (pip install 'psycopg[binary]') on this machine")
    home, bin = Path(tempfile.mkdtemp(prefix="pg")), found[-1].parent       # a short path: sockets have at most 107 characters
    who = []
    if os.geteuid() == 0:                                                    # the server refuses to run as root
        shutil.chown(home, "postgres")
        who = ["runuser", "-u", "postgres", "--"]
    def run(*command): subprocess.run([*who, *map(str, command)], check=True, capture_output=True, cwd=home)
    run(bin / "initdb", "-D", home / "data", "-A", "trust", "-U", "course")
    run(bin / "pg_ctl", "-D", home / "data", "-o", f"-k {home} -c listen_addresses=''", "-l", home / "log", "-w", "start")
    try:
        yield f"postgresql://course@/postgres?host={home}"
    finally:
        run(bin / "pg_ctl", "-D", home / "data", "-m", "immediate", "stop")
        shutil.rmtree(home, ignore_errors=True)


@pytest.mark.slow
def test_a_search_in_postgresql_equals_one_in_sqlite_and_goes_on_after_a_kill(postgres, tmp_path):
    script = TOY.replace("workers=int(sys.argv[3]))", "workers=int(sys.argv[3]), storage=sys.argv[5] if len(sys.argv) > 5 else None, name=sys.argv[1][-3:])")
    assert script != TOY
    def command(name, *more): return [sys.executable, "-c", script, str(tmp_path / name), "12", "1", "0", *more]
    subprocess.run(command("aaa"), check=True, capture_output=True)
    assert kill_at(command("bbb", postgres), 30, 0.05), "the search was over before the kill"
    subprocess.run(command("bbb", postgres), check=True, capture_output=True)
    assert table(tmp_path / "aaa") == table(tmp_path / "bbb") and not (tmp_path / "bbb" / "study.db").exists()


def test_a_server_that_does_not_answer_is_one_line(postgres, tmp_path):
    with pytest.raises(MedimgError, match="does not answer"):
        search(lambda params, report, folder: 1.0, {"a": ("uniform", 0.0, 1.0)}, SearchConfig(trials=2, epochs=1, storage=postgres.replace("host=", "host=/nowhere")), out=tmp_path, progress=False)
