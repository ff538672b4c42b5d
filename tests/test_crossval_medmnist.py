"""The experiment crossval-medmnist: what a fold may depend on, figures against scipy and scikit-learn, no look at a test fold, and a run that goes on."""
import json
from dataclasses import replace

import nbchecks as checks
import numpy as np
import pytest

from medimg.data.datasets import ImageDataset, select
from medimg.evaluation.metrics import auc
from medimg.experiments import crossval as x
from medimg.experiments.protocol import Run, run_experiment, stored_results
from medimg.training.crossval import cross_validate, fold_leaks, patient_folds

STORED = stored_results(checks.ROOT / "results" / "training.json").get("crossval-medmnist")
KINDS = {"pneumoniamnist": ["auc"], "retinamnist": ["auc", "accuracy", "quadratic_kappa"]}


def toy_run(tmp_path, seeds=(0,)):
    return Run("crossval-medmnist", tmp_path, "ci", seeds, "phantom", progress=False)


def test_copies_and_mirror_images_stay_in_one_fold():
    rng = np.random.default_rng(0)
    base = rng.integers(0, 200, (20, 40, 40)).astype(np.uint8)
    images = np.concatenate([base, base[:, :, ::-1], (base // 2 + 30)])
    toy = ImageDataset("toy", images, np.tile(np.arange(20) % 2, 3), ["train"] * 60, classes=("no", "yes"))
    groups = x.fold_groups(toy)
    assert len(set(groups.tolist())) == 20
    assert not fold_leaks(patient_folds(toy.labels, groups), images=toy.images)
    assert {leak.kind for leak in fold_leaks(patient_folds(toy.labels, "each"), images=toy.images)} == {"near-copy", "mirror"}


def test_patients_are_kept_where_they_are_known():
    images = np.random.default_rng(1).integers(0, 200, (4, 40, 40)).astype(np.uint8)
    toy = ImageDataset("toy", images, [0, 1, 0, 1], ["train"] * 4, classes=("no", "yes"), patient_ids=["a", "b", "a", "c"])
    groups = dict(zip(toy.patient_ids.tolist(), x.fold_groups(toy).tolist()))
    assert len(set(groups.values())) == 3 and len(set(x.fold_groups(toy).tolist())) == 3


def test_the_test_fold_is_left_out_and_nothing_is_logged(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(x, "fold_groups", lambda dataset: seen.append(set(dataset.splits.tolist())) or dataset.groups)
    made = run_experiment("crossval-medmnist", out=tmp_path, profile="ci", data="phantom", progress=False)
    assert seen == [{"train", "val"}] * 2 and made["test_reads"] == {} and not list(tmp_path.rglob("test_reads.jsonl"))
    assert {f"{name}: {label}, {kind}" for name in KINDS for label in KINDS[name] for kind in ("out of fold", "mean over folds")} < made["figures"].keys()
    trained = []
    monkeypatch.setattr(x, "recipe_fit", lambda *a: lambda train, test: trained.append(1))
    again = run_experiment("crossval-medmnist", out=tmp_path, profile="ci", data="phantom", progress=False)
    assert again["figures"] == made["figures"] and not trained, "finished folds are read, not made"


@pytest.mark.parametrize("name, plan", [("pneumoniamnist", x.recipe("pneumonia")), ("retinamnist", x.RETINA)])
def test_what_is_held_out_does_not_act(tmp_path, name, plan):
    """Other images taken away, labels of the held-out ones false: the same answers, bit for bit. Other training labels: other answers."""
    run = toy_run(tmp_path)
    toy = x._images(run, name)
    learn, held = np.arange(40), np.arange(60, len(toy))
    few = select(toy, np.r_[learn, held])
    false = replace(few, labels=np.r_[toy.labels[learn], len(toy.classes) - 1 - toy.labels[held]])
    p, same = x.recipe_fit(run, plan, toy, 0)(learn, held)[0], x.recipe_fit(run, plan, false, 0)(learn, np.arange(40, len(few)))[0]
    assert np.array_equal(p, same) and p.shape == (len(held), len(toy.classes)) and np.allclose(p.sum(axis=1), 1)
    other = x.recipe_fit(run, plan, replace(toy, labels=len(toy.classes) - 1 - toy.labels), 0)(learn, held)[0]
    assert not np.array_equal(p, other)


def test_figures_equal_scipys_and_scikit_learns():
    from scipy import stats
    from sklearn.metrics import roc_auc_score
    rng = np.random.default_rng(3)
    y, who = np.arange(240) % 2, np.arange(240) // 4
    score = y + rng.normal(size=60)[who] + rng.normal(size=240)
    rounds = [cross_validate(lambda train, test: score[test] + 1e-3 * test[0], patient_folds(y, who, seed=s), metric=auc, progress=False) for s in range(3)]
    f = x.fold_figures(rounds, auc, n_boot=200)
    each = np.array([[roc_auc_score(y[test], score[test]) for _, test in cv.folds] for cv in rounds])
    mean = f["mean over folds"]
    assert np.allclose(mean["values"], each.ravel()) and mean["value"] == pytest.approx(each.mean())
    assert mean["sd"] == pytest.approx(each.mean(axis=1).std(ddof=1)) and mean["sd_folds"] == pytest.approx(each.std(ddof=1))
    assert np.allclose(mean["naive"], stats.t.interval(0.95, 14, each.mean(), stats.sem(each, axis=None)))
    half = stats.t.ppf(0.975, 14) * each.std(ddof=1) * np.sqrt(1 / 15 + 12 / 48)
    assert (mean["low"], mean["high"]) == pytest.approx((each.mean() - half, each.mean() + half))
    pooled = f["out of fold"]
    assert np.allclose(pooled["values"], [roc_auc_score(y, cv.predictions[0]) for cv in rounds]) and "60 groups" in pooled["interval"]


def test_equal_folds_have_no_interval():
    y = np.arange(40) % 2
    rounds = [cross_validate(lambda train, test: y[test], patient_folds(y, "each"), metric=auc, progress=False)]
    mean = x.fold_figures(rounds, auc, n_boot=20)["mean over folds"]
    assert mean["value"] == 1 and "low" not in mean and mean["sd"] is None and json.dumps(mean, allow_nan=False)


@pytest.mark.parametrize("name, label", [(name, label) for name in KINDS for label in KINDS[name]])
def test_what_is_stored_hangs_together(name, label):
    from scipy import stats
    pooled, mean = (STORED["figures"][f"{name}: {label}, {kind}"] for kind in ("out of fold", "mean over folds"))
    values = np.array(mean["values"])
    assert len(values) == 15 and len(pooled["values"]) == 3 and mean["value"] == pytest.approx(values.mean())
    assert np.allclose(mean["naive"], stats.t.interval(0.95, 14, values.mean(), stats.sem(values)))
    assert (mean["high"] - mean["low"]) / (mean["naive"][1] - mean["naive"][0]) == pytest.approx(np.sqrt(1 + 15 / 4), rel=0.01)
    assert "no patient ids" in mean["interval"] and "no patient ids" in pooled["interval"] and abs(pooled["value"] - mean["value"]) < 0.05
    assert STORED["test_reads"] == {} and STORED["about"][name]["images"] == {"pneumoniamnist": 5232, "retinamnist": 1200}[name] == pooled["n"]
    assert stored_results()["crossval-medmnist"] == STORED
