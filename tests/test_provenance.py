"""What differs between two runs is named, every run of a folder is shown whatever its state, and equality has three levels."""
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import nbchecks as checks
from medimg.data.datasets import ImageDataset
from medimg.data.preprocess import Preprocessor
from medimg.errors import ConfigError, MedimgError
from medimg.reproduction import shipped_result, verdict
from medimg.training import record
from medimg.training.provenance import COLUMNS, KINDS, because, causes, checkpoint_facts, compare, plot_runs, read_run, runs, trajectory, trajectory_elsewhere
from medimg.training.record import RunRecord, TrainConfig, data_hashes, environment, load_checkpoint, module_hashes, save_checkpoint
from medimg.training.trainer import _digest, fit

CONFIG = TrainConfig(epochs=2, batch_size=16, learning_rate=3e-3, augment=False, ema=0.9, keep="last")


def toy(n=96):
    rng, labels = np.random.default_rng(0), np.arange(n) % 2
    images = rng.integers(0, 90, (n, 16, 16)).astype(np.uint8)
    images[labels == 1, 5:10, 6:11] += 60
    return ImageDataset("toy", images, labels, np.where(np.arange(n) % 3 < 2, "train", "val"), classes=("empty", "spot"))


def train(out, dataset=None, config=CONFIG, **options):
    from medimg.models.networks import build_model
    network = build_model("resnet", (16, 16, 1), 2, seed=config.seed, width=8, blocks=(1,))
    return fit(network, dataset or toy(), config, preprocessor=Preprocessor([("scale", {"low": 0, "high": 255})]), out=out, progress=False, **options)


class Stop(Exception):
    pass


def stop(row):
    raise Stop


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "reference"
    train(out)
    return out


@pytest.fixture(scope="module")
def cut_off(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "cut"
    with pytest.raises(Stop):
        train(out, on_epoch=stop)
    return out


def medimg(*arguments, cwd=None):
    return subprocess.run([sys.executable, "-m", "medimg.cli", *map(str, arguments)], capture_output=True, text=True, cwd=cwd, timeout=300)


# --- a changed byte, seed or package is named

def altered(column, fold):
    """The toy data with the last bit of one number, or one fold, changed."""
    dataset = toy()
    row = np.flatnonzero(dataset.splits == fold)[0]
    values = getattr(dataset, column).copy()
    values[(row, *[0] * (values.ndim - 1))] = "test" if column == "splits" else values[(row, *[0] * (values.ndim - 1))] ^ 1
    return replace(dataset, **{column: values})


@pytest.mark.parametrize("column, fold, kind, said", [
    ("images", "train", "data", "images {old} there, {new} here (1 of 64 training images is another)"),
    ("images", "val", "data", "images {old} there, {new} here (the training images are the same)"),
    ("labels", "train", "data", "labels {old} there, {new} here (the same images and folds)"),
    ("splits", "val", "split", "folds {old} there, {new} here (the same images, dealt otherwise)")])
def test_one_byte_one_label_or_one_fold_is_named(tmp_path, reference, column, fold, kind, said):
    train(tmp_path, altered(column, fold), CONFIG)
    [cause] = causes(tmp_path, reference)
    assert cause.kind == kind and str(cause) == said.format(old=cause.there[:8], new=cause.here[:8]) and cause.there != cause.here


def test_seed_and_setting_are_named_with_both_values(tmp_path, reference):
    train(tmp_path, config=replace(CONFIG, seed=7, learning_rate=1e-3))
    assert [str(c) for c in causes(tmp_path, reference)] == ["learning_rate 0.003 there, 0.001 here", "seed 0 there, 7 here"]
    record = RunRecord.load(tmp_path)
    assert causes(record, tmp_path) == [] and causes(replace(record, model_options={"blocks": (1,)}), replace(record, model_options={"blocks": [1]})) == []


def test_a_package_is_named(tmp_path, monkeypatch):
    from importlib import metadata
    there = environment()
    real = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: "2.20.0" if name == "tensorflow" else real(name))
    here = environment()
    assert [str(c) for c in causes(here, there)] == [f"tensorflow {real('tensorflow')} there, 2.20.0 here"]
    result = {"metrics": {"auc": {"value": 0.91}}, **here}
    stored = {"metrics": {"auc": {"value": 0.90, "low": 0.85, "high": 0.95}}, **there}
    assert verdict(result, stored) == f"within the stated interval (what differs: tensorflow {real('tensorflow')} there, 2.20.0 here)"
    stored["metrics"]["auc"] |= {"low": 0.89, "high": 0.905}
    assert verdict(result, stored) == f"different, because tensorflow {real('tensorflow')} there, 2.20.0 here"


def test_a_module_is_named_and_another_commit_alone_is_no_cause():
    there = environment()
    here = there | {"code_commit": "b" * 40, "modules": there["modules"] | {"training.record": "0" * 16}}
    [cause] = causes(here, there)
    assert cause.kind == "code" and cause.note == "other code in training.record"
    assert causes(here | {"modules": there["modules"]}, there) == []
    [cause] = causes(here | {"modules": {}}, there)
    assert cause.note == "which modules differ was not kept"


def test_order_of_causes_and_what_an_old_record_does_not_know():
    machine = {"cpu": "A", "cores": 2, "flags": 10, "flags_sha256": "a", "simd": ["avx", "avx2"], "settings": {}}
    there = {"lock_sha256": "a" * 64, "versions": {"numpy": "1", "keras": "3"}, "machine": machine, "seed": 0, "config": {"epochs": 2}, "dataset": {"checksum": "a" * 64},
             "code_commit": "a" * 40, "profile": "full", "fingerprint": {"model": "a" * 16}, "modules": {}}
    here = {"lock_sha256": "b" * 64, "versions": {"numpy": "2", "keras": None, "scipy": "1"}, "seed": 1, "config": {"epochs": 3, "patience": 0}, "dataset": {"checksum": "b" * 64}, "code_commit": "b" * 40,
            "profile": "ci", "fingerprint": {"model": "b" * 16}, "modules": {},
            "machine": machine | {"cpu": "B", "flags": 9, "flags_sha256": "b", "simd": ["avx"], "settings": {"OMP_NUM_THREADS": "1"}}}
    found = causes(here, there)
    assert [KINDS.index(c.kind) for c in found] == sorted(KINDS.index(c.kind) for c in found)
    assert [c.name for c in found] == ["data checksum", "profile", "network", "epochs", "seed", "code", "keras", "numpy", "processor", "CPU flags", "OMP_NUM_THREADS", "lock file"]
    assert str(found[9]) == "CPU flags 10 there, 9 here (only there: avx2)" and str(found[6]) == "keras 3 there, none here"
    assert causes(here, {"metrics": {}}) == []                               # an unknown setting is not guessed; `patience` has its default
    assert because(found, most=2).endswith("; profile full there, ci here; and 10 more")


# --- the record

def test_split_hash_is_that_of_the_rows_and_knows_no_labels():
    import hashlib
    dataset = toy()
    rows = "\n".join(sorted(f"{i},{s}" for i, s in zip(dataset.image_ids, dataset.splits)))
    assert data_hashes(dataset)["split_sha256"] == hashlib.sha256(rows.encode()).hexdigest()
    other = replace(dataset, labels=1 - dataset.labels)
    assert data_hashes(other) == data_hashes(dataset) and other.checksum != dataset.checksum


def test_module_hashes_ignore_words_and_see_code(tmp_path):
    source = Path(record.__file__).read_text()
    words = source.replace('"""The settings as JSON', '"""All settings as JSON').replace("# %% ", "# cell ")
    for name, text in (("words", words), ("code", source.replace("1e-12", "1e-11"))):
        assert text != source
        (tmp_path / f"{name}.py").write_text(text)
    here = module_hashes()
    assert here["training.record"] == record._code_sha256(tmp_path / "words.py", 0) != record._code_sha256(tmp_path / "code.py", 0)
    assert not here.keys() & {"cli", "demo", "plots", "errors", "course"}


def test_changed_code_is_flagged(tmp_path, monkeypatch):
    def git(*words):
        subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", *words], cwd=tmp_path, check=True, capture_output=True)
    (tmp_path / "medimg").mkdir()
    (tmp_path / "medimg" / "a.py").write_text("a = 1\n")
    (tmp_path / "settings.ini").write_text("")
    git("init")
    git("add", "-A")
    git("commit", "-m", "a")
    monkeypatch.setattr(record, "_root", lambda: tmp_path)
    clean = record._code()
    (tmp_path / "medimg" / "result.json").write_text("{}")                    # not code
    assert record._code() == clean and clean["code_changed"] is False and len(clean["code_commit"]) == 40
    (tmp_path / "medimg" / "a.py").write_text("a = 2\n")
    edited = record._code()
    (tmp_path / "medimg" / "b.py").write_text("b = 1\n")
    added = record._code()
    (tmp_path / "medimg" / "b.py").write_text("b = 2\n")
    assert edited["code_commit"] == clean["code_commit"] + "+changes" and edited["code_changed"] and len({e["code_diff_sha256"] for e in (edited, added, record._code())}) == 3
    monkeypatch.setattr(record, "_root", lambda: None)
    assert set(record._code().values()) == {None}


def test_a_record_of_schema_1_is_still_read(reference, tmp_path):
    old = json.loads((reference / "run.json").read_text())
    for name in ("modules", "code_changed", "code_diff_sha256"):
        del old[name]
    (tmp_path / "run.json").write_text(json.dumps(old | {"schema_version": 1}))
    found = RunRecord.load(tmp_path)
    assert found.schema_version == 1 and found.modules == {} and found.code_changed is None and RunRecord.load(reference).schema_version == 2
    assert {c.kind for c in causes(reference, tmp_path)} <= {"code"}


@pytest.mark.parametrize("name", ["pneumonia", "phantom-cxr"])
def test_shipped_results_keep_what_a_verdict_needs(name):
    kept = shipped_result(name)
    whole = json.loads((checks.ROOT / "results" / f"{name}.json").read_text())
    assert _digest(kept["config"]) == kept["fingerprint"]["config"] and kept["dataset"]["checksum"][:16] == kept["fingerprint"]["data"]
    assert all(kept[k] == whole[k] for k in ("metrics", "bundle", "machine", "code_commit", "lock_sha256", "dataset", "versions"))
    assert verdict(kept, kept) == "same" and {c.note for c in causes(kept, kept)} <= {"whether these are the same changes was not kept"}


# --- all runs of a folder

@pytest.fixture
def zoo(reference, cut_off, tmp_path):
    """A finished run, one cut off, one of train_steps, eleven kinds of damage, a link in a circle and a folder without a run."""
    import shutil
    shutil.copytree(reference, tmp_path / "deep" / "done")
    shutil.copytree(cut_off, tmp_path / "cut")
    save_checkpoint(tmp_path / "steps" / "checkpoint.npz", {"w": np.zeros(3)}, {"step": 4, "history": [{"step": 4, "loss": 0.5}], "plan": {"steps": 9, "seed": 5}})
    text, whole = (reference / "run.json").read_text(), (reference / "checkpoint.npz").read_bytes()
    damage = {"half": text[:99], "list": "[]", "alien": '{"a": 1}', "types": json.dumps(json.loads(text) | {"history": 5}), "rows": json.dumps(json.loads(text) | {"history": [5]}),
              "deep-json": "[" * 100_000, "none": json.dumps(json.loads(text) | {"config": None}), "bytes": "\udcff"}
    for name, content in damage.items():
        (tmp_path / f"bad-{name}").mkdir()
        (tmp_path / f"bad-{name}" / "run.json").write_text(content, errors="surrogateescape")
    for name, content in (("cut", whole[:len(whole) // 2]), ("empty", b""), ("text", b"hello")):
        (tmp_path / f"bad-npz-{name}").mkdir()
        (tmp_path / f"bad-npz-{name}" / "checkpoint.npz").write_bytes(content)
    (tmp_path / "deep" / "loop").symlink_to(tmp_path)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.json").write_text("{}")
    return tmp_path


def test_every_run_is_a_row_whatever_its_state(zoo, reference):
    rows = {row["run"]: row for row in runs(zoo)}
    assert set(rows) == {"deep/done", "cut", "steps"} | {p.name for p in zoo.iterdir() if p.name.startswith("bad-")}
    assert all(set(row) == set(COLUMNS) and row["when"] for row in rows.values())
    assert all(row["status"].startswith("damaged") == name.startswith("bad-") for name, row in rows.items())
    kept = RunRecord.load(reference)
    done = {"status": "finished", "epochs": 2, "planned": 2, "monitor": "auc", "value": kept.metrics["auc"], "seconds": kept.wall_s, "seed": 0, "data": kept.dataset["checksum"][:8]}
    assert done.items() <= rows["deep/done"].items()
    assert {"status": "running or cut off", "epochs": 1, "planned": 2, "seed": 0, "value": load_checkpoint(zoo / "cut" / "checkpoint.npz")[1]["history"][0]["val_auc"]}.items() <= rows["cut"].items()
    assert {"status": "running or cut off", "epochs": 4, "planned": 9, "seed": 5, "value": None}.items() <= rows["steps"].items()
    assert rows["cut"]["data"] == rows["deep/done"]["data"]


def test_rows_are_sorted_and_mistakes_are_named(zoo):
    values = [row["value"] for row in runs(zoo, sort="value")]
    known = [v for v in values if v is not None]
    assert known == sorted(known) and values[:len(values) - len(known)] == [None] * (len(values) - len(known))
    with pytest.raises(ConfigError, match="seconds"):
        runs(zoo, sort="secnds")
    with pytest.raises(ConfigError, match="no such folder"):
        runs(zoo / "nowhere")
    assert runs(zoo / "other") == []


def test_facts_of_a_checkpoint_are_read_without_its_arrays(tmp_path):
    path = save_checkpoint(tmp_path / "c.npz", {"w": np.arange(100_000.0)}, {"epoch": 3})
    data = bytearray(path.read_bytes())
    place = data.find(np.arange(50_000.0, 50_002.0).tobytes())
    data[place] ^= 255
    path.write_bytes(data)
    with pytest.raises(MedimgError, match="damaged checkpoint"):
        load_checkpoint(path)
    assert place > 0 and checkpoint_facts(path) == {"epoch": 3}


def test_compare_and_resume(zoo, reference, tmp_path):
    found = compare(reference, zoo / "cut")
    assert found["status"] == ["finished", "running or cut off"] and found["epochs"] == [2, 1] and found["weights_apart"] > 0
    train(zoo / "cut")
    found = compare(reference, zoo / "cut")
    assert found["weights_apart"] == 0 and found["differences"] == [] and found["metrics"]["auc"][0] == found["metrics"]["auc"][1]
    assert compare(reference, zoo / "steps")["weights_apart"] is None
    assert read_run(reference)["training_ids"] == sorted(toy().split("train").image_ids)
    json.dumps(found, allow_nan=False)


def test_plot_shows_each_run_and_refuses_what_has_no_curve(zoo, reference):
    picture = plot_runs([reference, zoo / "cut", zoo / "steps"])
    lines = [line for ax in picture.figure.axes for line in ax.lines]
    assert [len(ax.lines) for ax in picture.figure.axes] == [6, 2] and [len(line.get_xdata()) for line in lines[:2]] == [2, 2]
    assert list(lines[1].get_ydata()) == [row["val_loss"] for row in RunRecord.load(reference).history]
    save_checkpoint(zoo / "young" / "checkpoint.npz", {"w": np.zeros(1)}, {"epoch": 0, "history": [], "config": {"monitor": "auc"}})
    with pytest.raises(ConfigError, match="no run with an epoch"):
        plot_runs([zoo / "young"])


def test_command_line(zoo, reference, tmp_path):
    said = medimg("runs", zoo)
    assert said.returncode == 0 and "running or cut off" in said.stdout and "1 of 2" in said.stdout and "damaged: not a run record" in said.stdout and said.stderr == ""
    assert json.loads(medimg("runs", zoo, "--json", "--sort", "seed").stdout)[-1]["run"] == "steps"
    said = medimg("runs", "compare", zoo / "deep" / "done", zoo / "cut")
    assert said.returncode == 0 and "kept weights: apart by" in said.stdout and "nothing that is recorded" in said.stdout
    said = medimg("runs", "plot", zoo / "deep" / "done", zoo / "cut", "--out", tmp_path / "curves.png", "--json")
    assert said.returncode == 0 and (tmp_path / "curves.png").read_bytes()[:4] == b"\x89PNG" and "done (auc" in json.loads(said.stdout)["alt"]
    for mistake, words in ((("runs",), "no such folder"), (("runs", zoo, "--sort", "sed"), "did you mean seed"), (("runs", "compare", zoo / "bad-half", zoo / "cut"), "not a run record"),
                           (("runs", "plot", zoo / "other", "--out", tmp_path / "x.png"), "no run here")):
        said = medimg(*mistake, cwd=tmp_path / "other")
        assert said.returncode == 2 and said.stdout == "" and len(said.stderr.strip().splitlines()) == 1 and words in said.stderr, said.stderr
    assert "compare" in medimg("runs", "--help").stdout and not (tmp_path / "x.png").exists()


# --- three levels of equality

def test_three_levels_of_equality():
    """Twice in a process and in two processes: equal bits. Without oneDNN: other last digits, which grow, and an AUC that hardly moves."""
    first, again, process = trajectory(25), trajectory(25), trajectory_elsewhere(steps=25)
    for other in (again, process):
        assert all(np.array_equal(first[name], other[name]) for name in first)
    machine = trajectory_elsewhere({"TF_ENABLE_ONEDNN_OPTS": "0", "TF_NUM_INTRAOP_THREADS": "1"}, steps=25)
    gap = np.abs(machine["weights"] - first["weights"]).max(axis=1)
    assert 0 < gap[0] < 1e-4 < 0.1 * np.abs(first["weights"]).max() and gap[0] < gap[-1] < 0.1 and abs(machine["auc"] - first["auc"]) < 0.02
    with pytest.raises(MedimgError, match="the other process failed"):
        trajectory_elsewhere({"PYTHONHOME": "/nowhere"}, steps=1)
