"""Continuous improvement: nobody in two folds, a rule stated before the test, a worse challenger refused, the champion never touched."""
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

from medimg import api
from medimg.data.datasets import ImageDataset, select
from medimg.data.preprocess import Preprocessor
from medimg.deployment.bundle import Bundle, bundle_of_run
from medimg.errors import BundleError, ConfigError, DatasetError
from medimg.training.record import RunRecord, TrainConfig, load_checkpoint
from medimg.training.trainer import fit
from medimg.training.update import decide, join, next_version, open_update, rarest, replay_mix, same_question

CONFIG = TrainConfig(epochs=6, batch_size=16, learning_rate=4e-3, ema=0.9, augment=False, keep="last", monitor="loss")


def cohort(name, n=320, seed=0, dark=False, **changes):
    """Noise with a bright spot in every second picture; `dark`: another scanner, which writes the negative and a steeper grey scale."""
    rng = np.random.default_rng(seed)
    x, ill = rng.normal(0.35, 0.1, (n, 16, 16)), np.arange(n) % 2
    for k in np.flatnonzero(ill):
        row, column = rng.integers(2, 10, 2)
        x[k, row:row + 4, column:column + 4] += 0.22
    x = 1 - x.clip(0, 1) ** 0.7 if dark else x
    splits = np.array(["train", "test", "train", "val", "test", "train", "test", "train"])[np.arange(n) // 2 % 8]
    columns = {"splits": splits, "classes": ("empty", "spot"), "patient_ids": [f"{name}{k // 2}" for k in range(n)]} | changes
    return ImageDataset(name, (x.clip(0, 1) * 255).astype(np.uint8), ill, licence=f"licence of {name}", source="made here", **columns)


OLD, NEW = cohort("old"), cohort("new", seed=1, dark=True)


@pytest.fixture(scope="module", autouse=True)
def local_key(tmp_path_factory):
    """A user who ran `medimg trust init` once: bundles made here are signed and may be opened again."""
    from medimg.deployment import trust
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MEDIMG_TRUST", str(tmp_path_factory.mktemp("trust") / "trust"))
        yield trust.init("tests")


@pytest.fixture(scope="module")
def champion(tmp_path_factory):
    """A run and its bundle side by side, as `reproduce` leaves them."""
    from medimg.models.networks import build_model
    home = tmp_path_factory.mktemp("champion")
    network = build_model("resnet", (16, 16, 1), 2, seed=0, width=8, blocks=(1, 1))
    run = fit(network, OLD, replace(CONFIG, epochs=12), preprocessor=Preprocessor([("scale", {})]), out=home / "run", progress=False,
              about={"name": "spots", "model": "resnet", "model_options": {"width": 8, "blocks": [1, 1]}})
    assert run.metrics["auc"] > 0.9
    bundle_of_run(home / "bundle", home / "run", OLD, name="spots", version="1.4", input={}, population={"description": "spots", "source": "made here"}, metrics={})
    return home


def updated(champion, out, new=NEW, **options):
    settings = {"old": OLD, "n_boot": 200, "log": out.parent / f"{out.name}.jsonl", "progress": False, "config": CONFIG, "margin": 0.1}
    return api.update(champion, new, out=out, **settings | options)


@pytest.fixture(scope="module")
def promoted(champion, tmp_path_factory):
    """(folder, result) of an update that helps."""
    out = tmp_path_factory.mktemp("update") / "out"
    return out, updated(champion / "bundle", out)


def bytes_below(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}



# ---- the rule ------------------------------------------------------------------------------------------------------------------
def difference(low, high, rarest=50):
    return {"value": (low + high) / 2, "low": low, "high": high, "rarest": rarest}


@pytest.mark.parametrize(("old", "new", "promoted", "says"), [
    (difference(-0.019, 0.01), difference(0.001, 0.1), True, "no loss of more than 0.02"),
    (difference(-0.02, 0.01), difference(0.001, 0.1), False, "old data .* may be a loss of more than 0.02"),
    (difference(-0.3, -0.1), difference(0.001, 0.1), False, "old data .* is a loss"),
    (difference(0.1, 0.2), difference(0.0, 0.0), False, "new data .* may be chance"),
    (difference(0.1, 0.2), difference(-0.2, -0.1), False, "new data .* is a loss"),
    (difference(0.1, 0.2), difference(float("nan"), float("nan")), False, "new data"),
    (difference(0.1, 0.2, rarest=9), difference(0.1, 0.2), False, "old test fold is too small to tell: 9 patients"),
    (difference(0.1, 0.2), difference(0.1, 0.2, rarest=1), False, "new test fold is too small"),
    (None, difference(0.1, 0.2), False, "nobody can say what it forgot")])
def test_the_rule_by_hand(old, new, promoted, says):
    import re
    verdict = decide(old, new)
    assert verdict.promoted is promoted and re.search(says, str(verdict))


def test_the_margin_is_a_difference_of_auc():
    for margin in (-0.01, 0.6, float("nan")):
        with pytest.raises(ConfigError, match="margin"):
            decide(None, difference(0, 1), margin=margin)


# ---- the data ------------------------------------------------------------------------------------------------------------------
def test_labels_follow_the_champions_order():
    turned = cohort("t", 16, classes=("spot", "empty"))
    same = same_question(turned, ("empty", "spot"), "binary")
    assert same.labels.tolist() == (1 - turned.labels).tolist() and same.classes == ("empty", "spot")
    named = same_question(cohort("t", 16, classes=("no finding", "spot")), ("empty", "spot"), "binary", rename={"no finding": "empty"})
    assert named.labels.tolist() == cohort("t", 16).labels.tolist()


def test_another_question_is_named():
    with pytest.raises(DatasetError, match="only in the new data: nodule; only in the champion: spot"):
        same_question(cohort("t", 16, classes=("empty", "nodule")), ("empty", "spot"), "binary")
    with pytest.raises(ConfigError, match="no class 'emty' to rename; did you mean empty"):
        same_question(OLD, ("empty", "spot"), "binary", rename={"emty": "empty"})
    several = replace(OLD, task="multilabel", labels=np.eye(2)[OLD.labels])
    with pytest.raises(DatasetError, match="multilabel"):
        same_question(several, ("empty", "spot"), "binary")


@pytest.mark.parametrize("share", [0.0, 0.2, 0.5, 0.9])
def test_the_share_of_old_images(share):
    mix = replay_mix(OLD, NEW, share=share, quiet=True)
    train = mix.split("train")
    old, new = (int((train.meta["origin"] == name).sum()) for name in ("old", "new"))
    assert new == len(NEW.split("train")) and old == min(round(share / (1 - share) * new), len(OLD.split("train")))
    assert abs(train.labels[train.meta["origin"] == "old"].mean() - 0.5) < 0.02 if old else ("old" in mix.split("val").meta["origin"]) is False
    assert set(OLD.split("test").image_ids) | set(NEW.split("test").image_ids) == set(mix.split("test").image_ids)
    assert set(train.image_ids) <= set(mix.meta["training_ids"]) and train.image_ids.tolist() == replay_mix(OLD, NEW, share=share, quiet=True).split("train").image_ids.tolist()


@pytest.mark.parametrize("seed", range(5))
def test_nobody_is_on_two_sides(seed):
    rng = np.random.default_rng(seed)
    pool = cohort("pool", 240, seed=seed, patient_ids=[str(k) for k in rng.integers(0, 90, 240)])
    old, new = (replace(select(pool, rng.random(240) < 0.6), name=name) for name in ("one", "two"))
    old, new = (replace(d, splits=rng.choice(["train", "val", "test"], len(d))) for d in (old, new))
    seen = set(pool.image_ids[:30].tolist())
    mix = replay_mix(old, new, seen=seen, quiet=True)
    parts = {s: mix.split(s) for s in ("train", "val", "test")}
    for early, late in (("train", "val"), ("train", "test"), ("val", "test")):
        assert not set(parts[early].image_ids) & set(parts[late].image_ids)
        assert not set(parts[early].patient_ids) & set(parts[late].patient_ids)
    fresh = parts["test"].meta["origin"] == "two"
    known = set(old.patient_ids[old.splits != "test"])
    assert not seen & set(parts["test"].image_ids) and not known & set(parts["test"].patient_ids[fresh])


def test_equal_ids_of_two_institutions():
    new = replace(NEW, patient_ids=[p.replace("new", "old") for p in NEW.patient_ids])
    assert set(join([OLD, new]).patient_ids) == set(OLD.patient_ids)
    assert replay_mix(OLD, new, same_patients=False, quiet=True).meta["replay"]["left_out"] == {"train": 0, "val": 0, "test": 0}
    assert replay_mix(OLD, replace(new, splits=NEW.splits[::-1]), quiet=True).meta["replay"]["left_out"]["test"] > 0


def test_images_of_another_size_take_the_champions_form(capsys):
    large = replace(NEW, images=NEW.images.repeat(2, axis=1).repeat(2, axis=2))
    form = Preprocessor([("resize", {"height": 16, "width": 16}), ("scale", {})])
    with pytest.raises(DatasetError, match="differ in shape"):
        replay_mix(OLD, large, quiet=True)
    mix = replay_mix(OLD, large, form=form, seen=large.split("test").image_ids[:3])
    assert mix.images.shape[1:] == (16, 16) and mix.meta["replay"]["left_out"]["test"] == 3 and "left out, in two folds: 3 test" in capsys.readouterr().out
    assert set(large.split("train").image_ids) <= set(mix.meta["training_ids"])


def test_what_cannot_be_mixed():
    for share in (-0.1, 1.0, 2):
        with pytest.raises(ConfigError, match="share"):
            replay_mix(OLD, NEW, share=share)
    with pytest.raises(DatasetError, match="no old images"):
        replay_mix(None, NEW)
    for fold, says in (("test", r"0 test \(new\)"), ("train", "0 new training")):
        with pytest.raises(DatasetError, match=says):
            replay_mix(OLD, select(NEW, NEW.splits != fold), quiet=True)
    with pytest.raises(DatasetError, match="new: no test image of the class 'spot'"):
        replay_mix(OLD, select(NEW, (NEW.splits != "test") | (NEW.labels == 0)), quiet=True)
    assert rarest(select(OLD, OLD.labels == 0)) == 0


# ---- the whole call ------------------------------------------------------------------------------------------------------------
def test_a_better_challenger_is_promoted_and_knows_its_parent(champion, promoted):
    from sklearn.metrics import roc_auc_score
    out, result = promoted
    assert result["promoted"], result["verdict"]
    old, new = Bundle.load(champion / "bundle"), Bundle.load(out / "bundle")
    assert old.origin == new.origin == "signed by tests" and new.warnings == ()
    assert (new.name, new.version) == ("spots", "1.5") and new.manifest["digest"] == result["bundle"]["digest"]
    step = new.manifest["training"]["updates"]
    assert [s["parent"] for s in step] == [{"name": "spots", "version": "1.4", "digest": old.digest}]
    assert (step[0]["checksum"], new.manifest["training"]["checksum"]) == (NEW.checksum, OLD.checksum)
    assert new.training_ids == {*OLD.split("train").image_ids, *NEW.split("train").image_ids} and not new.training_ids & set(NEW.split("test").image_ids)
    assert "licence of old" in new.manifest["licence"]["data"] and "licence of new" in new.manifest["licence"]["data"] and old.digest[:12] in new.card
    for which, d in (("old", OLD), ("new", NEW)):
        fold, found = d.split("test"), result["folds"][which]
        auc = {who: roc_auc_score(fold.labels, b.predict(fold.images)[:, 1]) for who, b in (("champion", old), ("challenger", new))}
        assert abs(auc["challenger"] - auc["champion"] - found["difference"]["value"]) < 1e-3 and found["interval"] == "patient-level"
        assert new.manifest["metrics"][f"auc, {d.name}"] == found["challenger"]
    run = RunRecord.load(out / "run")
    assert run.parent["digest"] == old.digest and run.name == "spots" and run.config == CONFIG.to_dict()


def test_the_test_folds_are_read_once(champion, promoted, monkeypatch):
    out, result = promoted
    lines = [json.loads(line) for line in (out.parent / "out.jsonl").read_text().splitlines()]
    assert [(line["dataset"], line["checksum"], line["split"]) for line in lines] == [(d.name, d.checksum, "test") for d in (OLD, NEW)]
    before = bytes_below(out)
    assert updated(champion / "bundle", out) == result and bytes_below(out) == before
    shutil.rmtree(out / "bundle")           # killed between verdict and bundle
    assert updated(champion / "bundle", out)["bundle"]["version"] == "1.5"
    assert len((out.parent / "out.jsonl").read_text().splitlines()) == 2


def test_stopped_and_resumed_ends_with_the_same_weights(champion, promoted, tmp_path, monkeypatch):
    from medimg.training import trainer
    whole, epochs = trainer._epoch, []

    def epoch(run, advance):
        epochs.append(run.epoch)
        if len(epochs) == 4:
            raise KeyboardInterrupt
        return whole(run, advance)
    monkeypatch.setattr(trainer, "_epoch", epoch)
    with pytest.raises(KeyboardInterrupt):
        updated(champion / "bundle", tmp_path / "out")
    assert not (tmp_path / "out.jsonl").exists()
    result = updated(champion / "bundle", tmp_path / "out")
    assert epochs == [0, 1, 2, 3, 3, 4, 5] and result["folds"] == promoted[1]["folds"]
    left, right = (load_checkpoint(folder / "run" / "checkpoint.npz")[0] for folder in (tmp_path / "out", promoted[0]))
    assert left.keys() == right.keys() and all(np.array_equal(left[k], right[k]) for k in left)


def test_the_bundle_of_an_update_can_travel_and_be_updated(promoted, tmp_path):
    away = shutil.copytree(promoted[0] / "bundle", tmp_path / "away")
    champion = api._champion(away)
    weights = zip(champion.network().get_weights(), api._champion(promoted[0] / "run").network().get_weights())
    assert champion.parent["version"] == "1.5" and all(np.array_equal(a, b) for a, b in weights)
    with pytest.raises(DatasetError, match="the champion's old images: .*give them as old"):
        updated(away, tmp_path / "out", old=None)


def test_without_replay_it_forgets_and_is_refused(champion, tmp_path):
    before = bytes_below(champion)
    result = updated(champion / "bundle", tmp_path / "out", replay=0.0, margin=0.02)
    assert not result["promoted"] and result["bundle"] is None and "old data" in result["verdict"]
    assert result["folds"]["old"]["difference"]["high"] < 0 < result["folds"]["new"]["difference"]["low"]
    assert not (tmp_path / "out" / "bundle").exists() and bytes_below(champion) == before
    with pytest.raises(ConfigError, match="another update .*margin 0.02 there, 0.1 now"):
        updated(champion / "bundle", tmp_path / "out", replay=0.0)
    with pytest.raises(ConfigError, match="another update .*new "):
        updated(champion / "bundle", tmp_path / "out", cohort("new", seed=2, dark=True), replay=0.0, margin=0.02)


def test_too_few_patients_promote_nothing(champion, promoted, tmp_path):
    few = select(NEW, (NEW.splits != "test") | (np.cumsum(NEW.splits == "test") <= 12))
    result = updated(champion / "run", tmp_path / "out", few, config=replace(CONFIG, epochs=1))
    assert not result["promoted"] and "too small to tell" in result["verdict"]


def test_without_the_old_images_nothing_is_promoted(champion, tmp_path):
    with pytest.raises(DatasetError, match="no-such-set"):
        updated(champion / "run", tmp_path / "out", old=["no-such-set"], replay=0)
    result = updated(champion / "run", tmp_path / "out", old=None, replay=0, config=replace(CONFIG, epochs=2))
    assert list(result["folds"]) == ["new"] and result["folds"]["new"]["difference"]["low"] > 0
    assert not result["promoted"] and "nobody can say what it forgot" in result["verdict"]


def test_a_run_beside_a_bundle_must_be_its_own(champion, promoted, tmp_path):
    shutil.copytree(champion / "bundle", tmp_path / "bundle")
    shutil.copytree(promoted[0] / "run", tmp_path / "run")
    with pytest.raises(BundleError, match="another network"):
        updated(tmp_path / "bundle", tmp_path / "out")


def test_refused_before_anything_is_written(champion, tmp_path):
    with pytest.raises(BundleError, match="pneumonia: holds no weights .*medimg reproduce pneumonia"):
        updated("pneumonia", tmp_path / "out")
    with pytest.raises(ConfigError, match="has a run that is no update"):
        updated(champion / "bundle", champion)
    with pytest.raises(DatasetError, match="old images"):
        updated(champion / "bundle", tmp_path / "out", old=["no-such-set"])
    with pytest.raises(DatasetError, match="another question"):
        updated(champion / "bundle", tmp_path / "out", cohort("new", classes=("a", "b")))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("version", ["1.0", "1", "2.7.1", None])
def test_next_version_is_higher(version):
    new = tuple(map(int, next_version(version).split(".")))
    assert new > tuple(map(int, (version or "1.0").split(".")))


def test_a_damaged_record_is_named(tmp_path):
    for text in ("", "[]", '{"plan": 3}'):
        (tmp_path / "update.json").write_text(text)
        with pytest.raises(ConfigError, match="update.json: not the record"):
            open_update(tmp_path, {"a": 1})


# ---- the command ---------------------------------------------------------------------------------------------------------------
def as_folder(dataset, root):
    """The data set as a tree of pictures, fold/class/file."""
    from medimg.plots import png_bytes
    for k, (image, label, fold) in enumerate(zip(dataset.images, dataset.labels, dataset.splits)):
        (root / fold / dataset.classes[label]).mkdir(parents=True, exist_ok=True)
        (root / fold / dataset.classes[label] / f"{k}.png").write_bytes(png_bytes(image))
    return root


def command(*arguments, cache):
    return subprocess.run([sys.executable, "-m", "medimg.cli", "update", *map(str, arguments)], capture_output=True, text=True, timeout=600,
                          env={**os.environ, "MEDIMG_CACHE": str(cache)})


def test_the_command_on_folders_of_pictures(champion, tmp_path):
    old, new = as_folder(OLD, tmp_path / "old"), as_folder(NEW, tmp_path / "new")
    options = ("--with", new, "--old", old, "--out", tmp_path / "out", "--epochs", 1, "--n-boot", 100, "--json")
    done = command(champion / "bundle", *options, cache=tmp_path)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["promoted"] is False and "image-level" in result["folds"]["old"]["interval"] and len((tmp_path / "test_reads.jsonl").read_text().splitlines()) == 2
    again = command(champion / "bundle", *options[:-1], cache=tmp_path)
    assert again.returncode == 0 and result["verdict"] in again.stdout and "the champion stays as it is" in again.stdout


@pytest.mark.parametrize(("arguments", "says"), [(("pneumonia", "--with", "phantom-cxr"), "medimg reproduce pneumonia"), (("pneumonia", "--with", "x", "--rename", "a"), "NEW=OLD")])
def test_a_mistake_is_one_line(tmp_path, arguments, says):
    done = command(*arguments, "--out", tmp_path / "out", cache=tmp_path)
    assert done.returncode == 2 and says in done.stderr and len(done.stderr.strip().splitlines()) == 1 and not (tmp_path / "out").exists()


def test_what_doctors_said_becomes_the_data_of_an_update(champion, tmp_path):
    """Verdicts in a store, taken out by `medimg store labels`, learned by `medimg update`: each picture under the class that its reader gave it."""
    from medimg.deployment.prediction import STUDY_FIELDS, Prediction
    from medimg.deployment.store import Store
    store, said = Store(tmp_path / "kept"), NEW.labels[:240]
    for k, (image, right) in enumerate(zip(NEW.images, said)):
        study = dict.fromkeys(STUDY_FIELDS) | {"patient_key": str(NEW.patient_ids[k])}
        number = store.add_result(Prediction("answered", f"{k}.png", task="binary", classes=NEW.classes, label="spot", probability={"empty": 0.4, "spot": 0.6}, picture=image, study=study))
        store.add_label(number, user="dr.wu", verdict="agree" if right else "disagree", label=None if right else "empty")
    out = subprocess.run([sys.executable, "-m", "medimg.cli", "store", "labels", str(store.folder), "--out", str(tmp_path / "new"), "--json"], capture_output=True, text=True, timeout=120)
    assert out.returncode == 0 and json.loads(out.stdout)["images"] == {"empty": int((said == 0).sum()), "spot": int((said == 1).sum())}, out.stderr
    done = command(champion / "bundle", "--with", tmp_path / "new", "--patients", tmp_path / "new" / "patients.csv", "--old", as_folder(OLD, tmp_path / "old"), "--out", tmp_path / "out", "--epochs", 1, "--n-boot", 100, "--json",
                   cache=tmp_path)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert 20 <= result["folds"]["new"]["n"] <= 120 and "patient" in result["folds"]["new"]["interval"] and "image-level" not in result["folds"]["new"]["interval"]
