"""The verbs: which images are used, what is counted, what is refused, and how undefined numbers are told."""
import json
import subprocess
import sys
from dataclasses import replace

import cv2
import numpy as np
import pytest

from medimg import api, reproduction
from medimg.cli import metrics_text
from medimg.errors import ConfigError, DatasetError, MedimgError, printable


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of one epoch on 48 phantoms."""
    folder = tmp_path_factory.mktemp("run") / "run"
    api.train("phantom-cxr", out=folder, profile="ci", n=48, epochs=1, seed=3, progress=False)
    return folder


@pytest.fixture
def no_data(tmp_path, monkeypatch):
    """A computer without data and without network."""
    monkeypatch.delenv("MEDIMG_DATA", raising=False)
    monkeypatch.setenv("MEDIMG_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("MEDIMG_OFFLINE", "1")
    return tmp_path


def test_training_without_a_recipe_on_colour_images(tmp_path):
    done = api.train("retinamnist", out=tmp_path, profile="ci", n=40, epochs=1, data="phantom", progress=False)
    assert done.input_shape[-1] in (1, 3) and len(done.classes) == 5
    assert json.loads((tmp_path / "data.json").read_text()) == {"data": "phantom", "n": 40, "name": "retinamnist", "seed": 0}


def test_a_fall_back_to_phantoms_is_said_on_stderr(no_data, capsys, monkeypatch):
    from medimg.data import datasets
    monkeypatch.setattr(datasets, "_UNREACHABLE", set())
    made = api._load("pneumoniamnist", "auto", 20)
    said = capsys.readouterr()
    assert made.meta["loaded"]["data"] == "phantom" and said.out == ""
    assert len(said.err.splitlines()) == 1 and "pneumoniamnist" in said.err and "medimg data fetch" in said.err
    api._load("pneumoniamnist", "phantom", 20)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("name, remedy", [("busi", "fetch"), ("rsna-pneumonia", "import_rsna"), ("lidc-idri", "series by series")])
def test_a_set_that_is_no_array_has_no_stand_in(name, remedy, no_data, capsys, tmp_path):
    """A folder of files can never be loaded by name: neither phantoms in its place nor advice to look for it."""
    with pytest.raises(DatasetError, match=f"{name} is a folder of files, not one array; .*{remedy}"):
        api.train(name, out=tmp_path / "run", profile="ci", progress=False)
    assert capsys.readouterr().err == "" and api._load(name, "phantom", 20).meta["stand_in_for"] == name


def test_evaluate_loads_the_images_of_the_run(run, tmp_path):
    result = api.evaluate(run, split="val", n_boot=50, progress=False)
    assert result["same_data"] is True and "not the images" not in metrics_text(result)
    other = api.evaluate(run, split="val", n_boot=50, n=60, progress=False)
    assert other["same_data"] is False and "not the images" in metrics_text(other)


def test_evaluate_never_takes_phantoms_for_a_real_set(no_data):
    with pytest.raises(DatasetError, match="pneumoniamnist.*medimg data fetch pneumoniamnist.*MEDIMG_DATA"):
        api.evaluate("pneumonia", progress=False)


def test_one_ledger_counts_the_reads_of_the_same_images(run, tmp_path, monkeypatch):
    dataset = api._load("phantom-cxr", "phantom", 48)
    monkeypatch.setenv("MEDIMG_CACHE", str(tmp_path))
    ledger = tmp_path / "test_reads.jsonl"
    ledger.write_text('{"checksum": "another", "dataset": "phantom-cxr"}\n{"cut off\n[]\n')
    reads = [api.evaluate(run, dataset, n_boot=50, progress=False)["test_reads"] for _ in range(2)]
    assert reads == [1, 2] and not (run / "test_reads.jsonl").exists()
    assert "read 2 times on this computer" in metrics_text({**api.evaluate(run, dataset, n_boot=50, log=tmp_path / "b", progress=False), "test_reads": 2})


def test_a_read_that_failed_is_not_counted(run, tmp_path):
    dataset = api._load("phantom-cxr", "phantom", 48)
    with pytest.raises(MedimgError):
        api.evaluate(run, replace(dataset, labels=np.zeros(len(dataset), int)), n_boot=50, log=tmp_path / "log", progress=False)
    assert not (tmp_path / "log").exists()


def test_the_threshold_is_that_of_the_positive_class(monkeypatch):
    class Bundle:
        manifest = {"name": "b", "version": "1", "task": "binary", "classes": ["no", "yes"], "thresholds": {"no": 0.9, "yes": 0.0},
                    "training": {"dataset": "d", "checksum": None, "seed": 0}}
    monkeypatch.setattr(api, "load_bundle", lambda name: Bundle)
    assert api.load_predictor("b")[1]["threshold"] == 0.0
    Bundle.manifest["thresholds"] = {}
    assert api.load_predictor("b")[1]["threshold"] is None


def test_as_many_images_as_recipe_and_profile_allow():
    assert api._most(3000, 512) == 512 and api._most(3000, None) == 3000 and api._most(None, None) is None


RESULT = {"name": "m", "dataset": "d", "n": 9, "interval": "patient-level", "source": "here", "research_use": "research use", "metrics": {
    "auc": {"value": 0.9, "low": 0.8, "high": 1.0, "method": "bootstrap, 50 resamples of 9 patients"},
    "ppv": {"value": 0.5, "low": 0.1, "high": 0.9, "method": "Wilson, 4 of 9 patients"},
    "npv": {"value": None, "low": None, "high": None, "method": "not defined: nothing was called negative"}}}


def test_metrics_text_tells_what_is_not_defined_and_how_intervals_were_made():
    text = metrics_text(RESULT)
    assert "not defined" in text and "nothing was called negative" in text
    assert "bootstrap, 50 resamples of 9 patients (auc)" in text and "Wilson" in text and "(ppv)" in text
    assert "patient" not in metrics_text({**RESULT, "source": "phantom v1, seed 0"})


def test_verdict_with_missing_and_undefined_metrics():
    old = {"metrics": RESULT["metrics"]}
    assert reproduction.verdict(old, old) == "same"
    assert reproduction.verdict({"metrics": {}}, old) == "different, because no auc, npv and ppv any more"
    assert reproduction.verdict({"metrics": {}, "seed": 1}, old | {"seed": 0}) == "different, because no auc, npv and ppv any more; seed 0 there, 1 here"
    defined = {"metrics": {**RESULT["metrics"], "npv": {"value": 0.5, "low": 0.1, "high": 0.9}}}
    assert reproduction.verdict(defined, old) == reproduction.verdict(old, defined) == "different, because of something that was not recorded in both"


def test_reproduce_refuses_other_data_and_partial_updates(tmp_path):
    with pytest.raises(DatasetError, match="pneumoniamnist"):
        reproduction.reproduce("pneumonia", out=tmp_path / "a", data="phantom", progress=False)
    for other in ({"profile": "ci"}, {"data": "phantom"}, {"seed": 1}, {"n": 99}):
        with pytest.raises(ConfigError, match="whole recipe"):
            reproduction.reproduce("pneumonia", out=tmp_path / "a", update=True, progress=False, **other)
    assert not (tmp_path / "a").exists()


def test_shipping_swaps_whole_folders(tmp_path, monkeypatch):
    import shutil
    for name in ("new", "shipped"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model").write_text(name)
    (tmp_path / "shipped" / "stale").write_text("")
    whole = shutil.copytree
    monkeypatch.setattr(shutil, "copytree", lambda *a: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError):
        reproduction._swap(tmp_path / "new", tmp_path / "shipped")
    assert (tmp_path / "shipped" / "model").read_text() == "shipped"
    monkeypatch.setattr(shutil, "copytree", whole)
    reproduction._swap(tmp_path / "new", tmp_path / "shipped")
    assert [p.name for p in (tmp_path / "shipped").iterdir()] == ["model"] and sorted(p.name for p in tmp_path.iterdir()) == ["new", "shipped"]


def test_a_bundle_names_no_run_and_the_shape_of_its_input(run, tmp_path, monkeypatch):
    from medimg.deployment import bundle
    from medimg.training.recipes import recipe
    from medimg.training.record import RunRecord
    monkeypatch.setattr(bundle, "build_bundle", lambda out, **facts: facts)
    dataset = api._load("phantom-cxr", "phantom", 48)
    made = reproduction._pack(recipe("phantom-cxr"), RunRecord.load(run), dataset, {"n": 1, "interval": "", "metrics": {}}, run.parent)
    assert made["training"]["run"] is None and made["input"]["shape"] == [64, 64, 1]


def test_nothing_steers_the_terminal():
    from medimg.demo import columns
    nasty = "a\x1b[2J\u202eb\x9b\nc\td"
    assert printable(nasty) == "a[2Jb c d" and "\x1b" not in str(ConfigError(nasty, path=nasty))
    assert columns((nasty,), [(nasty,)]).count("\n") == 2 and "\u202e" not in columns((nasty,), [(nasty,)])


def test_the_kept_errors_are_one_line_in_a_real_process(no_data):
    code = "from medimg.cli import main; main(['evaluate', 'pneumonia'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1 and "MEDIMG_DATA" in done.stderr


def test_explain_draws_what_the_methods_say(run, tmp_path):
    from medimg.evaluation.explain import grad_cam
    from medimg.models.networks import load_model
    dataset = api._load("phantom-cxr", "phantom", 48)
    picture = dataset.images[dataset.labels == 1][0]
    found = {method: api.explain(run, picture, method=method, out=tmp_path / f"{method}.png") for method in ("cam", "grad_cam", "occlusion", "saliency", "integrated_gradients", "smooth_grad")}
    predictor, _ = api.load_predictor(run)
    heat = grad_cam(load_model(run / "model.keras"), predictor.preprocessor.batch(picture[None]), 1)[0]
    peak = found["grad_cam"]["peak_yx"]
    assert peak is None or np.abs(np.array(peak) - np.unravel_index(heat.argmax(), heat.shape)).max() <= 1
    for method, told in found.items():
        drawn = cv2.imread(str(tmp_path / f"{method}.png"))
        assert drawn.shape == (256, 512, 3) and (drawn[::4, :256:4, 0] == picture).all()
        if told["share"] is not None:
            y0, x0, y1, x1 = told["region_yx"]
            assert 0 < told["share"] <= 1 and y0 <= y1 <= 64 and (drawn[:, 256:] != drawn[:, :256]).any()
    assert found["cam"]["probability"] == pytest.approx(predictor.predict(picture[None])[0, 1]) and "not judged" not in found["cam"]["research_use"]


def test_explain_of_a_bundle_agrees_with_its_prediction_and_refuses_with_it(tmp_path):
    from medimg.cli import explained_text
    dataset = api._load("phantom-cxr", "phantom", 48)
    ill = [i for i in dataset.images if (a := api.predict("phantom-cxr", i, progress=False)[0]).status == "answered" and a.label == dataset.classes[1]]
    answer = api.predict("phantom-cxr", ill[0], progress=False)[0]
    told = api.explain("phantom-cxr", ill[0], out=tmp_path / "a.png")
    assert told["peak_yx"] == answer.explanation["peak_yx"] and told["share"] == answer.findings[0].score and told["probability"] == pytest.approx(answer.probability[dataset.classes[1]])
    assert "peak at row" in explained_text(told) and "research use" in explained_text(told)
    covered = api.explain("phantom-cxr", ill[0], method="occlusion", out=tmp_path / "b.png", size=12)
    y0, x0, y1, x1 = covered["region_yx"]
    darker = ill[0].copy()
    darker[y0:y1, x0:x1] = int(ill[0].mean())
    bundle, _ = api.load_predictor("phantom-cxr")
    assert bundle.run(darker[None])["logits"][0, 0] < bundle.run(ill[0][None])["logits"][0, 0]
    healthy = api.explain("phantom-cxr", ill[0], target=dataset.classes[0], out=tmp_path / "c.png")
    assert healthy["class"] == dataset.classes[0] and healthy["probability"] == pytest.approx(1 - told["probability"])
    with pytest.raises(MedimgError, match="no answer to explain"):
        api.explain("phantom-cxr", np.zeros((64, 64), np.uint8), out=tmp_path / "d.png")
    assert not (tmp_path / "d.png").exists()


@pytest.mark.parametrize("options, match", [({"method": "grad_cam"}, "name a run folder"), ({"method": "gradcam"}, "one of cam, occlusion"), ({"target": "hernia"}, "no class"), ({"target": 7}, "no class"), ({"size": 3}, "cam has no option")])
def test_what_cannot_be_explained_is_refused(options, match, tmp_path):
    dataset = api._load("phantom-cxr", "phantom", 48)
    with pytest.raises(ConfigError, match=match):
        api.explain("phantom-cxr", dataset.images[dataset.labels == 1][0], out=tmp_path / "a.png", **options)
    with pytest.raises(ConfigError, match="says itself where"):
        api.explain("phantom-lungs", dataset.images[0], out=tmp_path / "a.png")
