"""The trainer: killed and resumed equals uninterrupted, errors name their remedy, and the arithmetic agrees with plain NumPy."""
import csv
import json
import math
import os
import platform
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

from medimg.data.datasets import ImageDataset
from medimg.data.preprocess import Preprocessor
from medimg.errors import ConfigError, DatasetError, MedimgError
from medimg.training.record import RunRecord, TrainConfig, environment, history_csv, latest_checkpoint, load_checkpoint, save_checkpoint
from medimg.training.trainer import TrainState, by_patient, choose_threshold, fit, learning_rate_at, log_loss, make_loss, rank_auc

CONFIG = TrainConfig(epochs=6, batch_size=16, learning_rate=3e-3, warmup_epochs=1, label_smoothing=0.1, class_weights=True, ema=0.9,
                     weight_decay=0.01, seed=3)


def toy_dataset(n=128, side=16, seed=0):
    """Noise with a bright spot in every second image."""
    rng = np.random.default_rng(seed)
    images, labels = rng.integers(0, 90, (n, side, side)).astype(np.uint8), np.arange(n) % 2
    images[labels == 1, 5:10, 6:11] += 110
    splits = np.where(np.arange(n) % 4 < 3, "train", "val")
    splits[np.arange(n) % 8 < 1] = "val"
    return ImageDataset("toy", images, labels, splits, classes=("empty", "spot"))


def toy_network(seed=0):
    from medimg.models.networks import build_model
    return build_model("resnet", (16, 16, 1), 2, seed=seed, width=8, blocks=(1, 1), dropout=0.3)


def toy_fit(out, config=CONFIG, *, seed=0, dataset=None, **options):
    return fit(toy_network(seed), dataset or toy_dataset(), config, preprocessor=Preprocessor([("scale", {"low": 0, "high": 255})]),
               out=out, **{"progress": False} | options)


def slow_auc(y, p):
    time.sleep(0.25)
    return rank_auc(y, p)


def arrays_of(folder):
    return load_checkpoint(Path(folder) / "checkpoint.npz")[0]


def assert_same_arrays(left, right):
    left, right = arrays_of(left), arrays_of(right)
    assert left.keys() == right.keys()
    assert [name for name in left if not np.array_equal(left[name], right[name])] == []


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "alone"
    return out, toy_fit(out)


def start(out):
    """The same run in a process of its own, slow enough to be hit in the middle."""
    code = "import sys; sys.path.insert(0, sys.argv[1]); import test_trainer as t; t.toy_fit(sys.argv[2], progress=True, metrics={'auc': t.slow_auc})"
    return subprocess.Popen([sys.executable, "-c", code, str(Path(__file__).parent), str(out)], stderr=subprocess.PIPE, text=True)


def epochs_on_disk(out):
    """How many rows history.csv has; -1 before the first checkpoint. Only looks: a reader must not take part in the renaming of checkpoints."""
    file = Path(out) / "history.csv"
    return len(file.read_text().splitlines()) - 1 if file.exists() else -1


def wait_for_epoch(out, epoch, process, limit_s=120):
    end = time.monotonic() + limit_s
    while time.monotonic() < end:
        if epochs_on_disk(out) >= epoch:
            return
        assert process.poll() is None, process.stderr.read()[-2000:]
        time.sleep(0.02)
    raise AssertionError("the run did not get there in time")


@pytest.mark.parametrize("point", range(10) if os.environ.get("MEDIMG_SOAK") else (1, 6))      # all ten: make soak
def test_kill_9_then_resume_is_bitwise_equal(tmp_path, uninterrupted, point):
    epoch, process = point // 2, start(tmp_path / "run")
    try:
        wait_for_epoch(tmp_path / "run", epoch, process)
        time.sleep(random.Random(point).uniform(0, 0.4))
    finally:
        process.kill()
        process.communicate()
    facts = latest_checkpoint(tmp_path / "run" / "checkpoint.npz")[1]
    assert facts["status"] == "running" and epoch <= facts["epoch"] < CONFIG.epochs
    record = toy_fit(tmp_path / "run", seed=77)          # other first weights: nothing of them may be left
    assert record.resumed == 1
    assert_same_arrays(uninterrupted[0], tmp_path / "run")
    timeless = [{k: v for k, v in row.items() if k != "seconds"} for row in record.history]
    assert timeless == [{k: v for k, v in row.items() if k != "seconds"} for row in uninterrupted[1].history]


def test_ctrl_c_leaves_a_good_checkpoint_and_says_how_to_go_on(tmp_path, uninterrupted):
    process = start(tmp_path / "run")
    wait_for_epoch(tmp_path / "run", 1, process)
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=60)[1]
    assert process.returncode in (130, -signal.SIGINT)
    assert "run the same command again" in said and "KeyboardInterrupt" in said
    toy_fit(tmp_path / "run")
    assert_same_arrays(uninterrupted[0], tmp_path / "run")


def test_resume_says_the_epoch_and_a_finished_run_is_not_trained_again(tmp_path, uninterrupted, capsys):
    def once(y, p, calls=[]):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return rank_auc(y, p)

    with pytest.raises(KeyboardInterrupt):
        toy_fit(tmp_path / "run", metrics={"auc": once})
    toy_fit(tmp_path / "run", progress=True)
    assert "resuming at epoch 3" in capsys.readouterr().err
    (tmp_path / "run" / "run.json").unlink()             # the power failed between the last epoch and the last file
    before = (tmp_path / "run" / "checkpoint.npz").read_bytes()
    again = toy_fit(tmp_path / "run", progress=True)
    assert "already finished" in capsys.readouterr().err
    assert (tmp_path / "run" / "checkpoint.npz").read_bytes() == before
    assert (again.best_epoch, again.threshold) == (uninterrupted[1].best_epoch, uninterrupted[1].threshold)


def test_no_output_without_progress(tmp_path, capfd):
    toy_fit(tmp_path / "run", replace(CONFIG, epochs=1, warmup_epochs=0))
    out, err = capfd.readouterr()
    assert out == "" and "epoch" not in err


def test_kept_model_is_the_best_average_and_the_files_agree(uninterrupted):
    import keras
    out, record = uninterrupted
    arrays, saved = arrays_of(out), keras.saving.load_model(out / "model.keras")
    best = [arrays[f"best/{i:04d}"] for i in range(len(saved.weights))]
    assert all(np.array_equal(a, b) for a, b in zip(best, saved.get_weights()))
    scores = [row["val_auc"] for row in record.history]
    assert record.best_epoch == 1 + scores.index(max(scores)) and record.metrics["auc"] == max(scores)
    rows = list(csv.DictReader((out / "history.csv").open()))
    assert [{k: float(v) for k, v in row.items()} for row in rows] == record.history
    train = toy_dataset().split("train")
    assert (out / "training_ids.txt").read_text().split() == sorted(train.image_ids)
    assert Preprocessor.load(out / "preprocess.json").to_json() == Preprocessor([("scale", {"low": 0, "high": 255})]).to_json()


def test_record_round_trip_and_privacy(uninterrupted):
    out, record = uninterrupted
    assert RunRecord.load(out) == record == RunRecord.from_json(record.to_json())
    text = (out / "run.json").read_text()
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} in run.json"))
    for secret in (platform.node(), str(Path.home()), str(out), str(Path(__file__).parents[1]), os.environ.get("USER")):
        assert not secret or f"{secret}" not in text or len(secret) < 4, secret
    assert record.dataset["checksum"] == toy_dataset().checksum and record.versions["numpy"] == np.__version__
    assert record.machine["cores"] >= 1 and record.research_use == "research use, not a medical device"
    assert set(environment()) == {"versions", "machine", "code_commit", "code_changed", "code_diff_sha256", "modules", "lock_sha256"}


@pytest.mark.parametrize("damage", ["cut", "byte", "empty", "text"])
def test_damaged_checkpoint_is_named_with_a_remedy(tmp_path, uninterrupted, damage):
    whole = (uninterrupted[0] / "checkpoint.npz").read_bytes()
    middle = len(whole) // 2
    broken = {"cut": whole[:middle], "byte": whole[:middle] + bytes([whole[middle] ^ 255]) + whole[middle + 1:], "empty": b"", "text": b"hello"}
    (tmp_path / "checkpoint.npz").write_bytes(broken[damage])
    with pytest.raises(MedimgError, match="damaged checkpoint.*--fresh") as caught:
        toy_fit(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("damage", ["cut", "missing"])
def test_a_damaged_checkpoint_falls_back_to_the_one_before_and_ends_the_same(tmp_path, uninterrupted, damage, capsys):
    seen = []

    def power_cut(row):
        seen.append(row["epoch"])
        if row["epoch"] == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        toy_fit(tmp_path, on_epoch=power_cut)
    now = tmp_path / "checkpoint.npz"
    if damage == "cut":
        now.write_bytes(now.read_bytes()[:5000])
    else:                                       # killed between the two renames
        now.unlink()
    capsys.readouterr()
    record = toy_fit(tmp_path, seed=5, on_epoch=power_cut_after(seen))
    said = capsys.readouterr().err
    assert ("damaged" in said and "one before" in said) == (damage == "cut") == (tmp_path / "checkpoint.damaged.npz").exists()
    assert seen == [1, 2, 3, 4, 4, 5, 6] and record.resumed == 1
    assert_same_arrays(uninterrupted[0], tmp_path)


def power_cut_after(seen):
    return lambda row: seen.append(row["epoch"])


def test_history_is_on_disk_after_each_epoch(tmp_path):
    def look(row):
        rows = list(csv.DictReader(open(tmp_path / "history.csv")))
        assert [int(r["epoch"]) for r in rows] == list(range(1, row["epoch"] + 1)) and float(rows[-1]["loss"]) == row["loss"]

    toy_fit(tmp_path, replace(CONFIG, epochs=3), on_epoch=look)


def test_checkpoint_holds_no_pickle(tmp_path):
    np.savez(tmp_path / "c.npz", facts=np.array([{"epoch": 1}], dtype=object))
    with pytest.raises(MedimgError, match="damaged"):
        load_checkpoint(tmp_path / "c.npz")
    save_checkpoint(tmp_path / "d.npz", {"w": np.ones(2)}, {"epoch": 1, "loss": float("nan")})
    assert load_checkpoint(tmp_path / "d.npz")[1] == {"epoch": 1, "loss": None}


def test_another_run_in_the_folder_is_refused_by_name_and_fresh_starts_over(tmp_path, uninterrupted):
    out = tmp_path / "run"
    out.mkdir()
    (out / "checkpoint.npz").write_bytes((uninterrupted[0] / "checkpoint.npz").read_bytes())
    with pytest.raises(ConfigError, match=r"learning_rate 0.003 there, 0.1 now.*--out.*--fresh"):
        toy_fit(out, replace(CONFIG, learning_rate=0.1))
    with pytest.raises(ConfigError, match="other images"):
        toy_fit(out, dataset=toy_dataset(seed=5))
    with pytest.raises(ConfigError, match="other preprocessing"):
        fit(toy_network(), toy_dataset(), CONFIG, preprocessor=Preprocessor([("scale", {"low": 0, "high": 250})]), out=out, progress=False)
    from medimg.models.networks import build_model
    with pytest.raises(ConfigError, match="another network"):
        fit(build_model("resnet", (16, 16, 1), 2, seed=0, width=8, blocks=(1,)), toy_dataset(), CONFIG,
            preprocessor=Preprocessor([("scale", {"low": 0, "high": 255})]), out=out, progress=False)
    record = toy_fit(out, replace(CONFIG, epochs=1, warmup_epochs=0), resume=False)
    assert len(record.history) == 1 and record.resumed == 0
    for name in ("checkpoint.npz", "checkpoint.before.npz"):
        (out / name).unlink()
    with pytest.raises(ConfigError, match="without its checkpoint"):
        toy_fit(out)


def test_nan_stops_with_the_last_good_weights(tmp_path):
    import keras
    wild = replace(CONFIG, learning_rate=99.0, weight_decay=5.0, clip_norm=0.0, warmup_epochs=0)
    with pytest.raises(MedimgError, match=r"not finite in epoch \d+, batch \d+ of 5 \(its 16 images: diverged.json\); .* kept; lower learning_rate") as caught:
        toy_fit(tmp_path / "run", wild)
    assert type(caught.value) is MedimgError and RunRecord.load(tmp_path / "run").status == "diverged"
    model = keras.saving.load_model(tmp_path / "run" / "model.keras")
    assert all(np.isfinite(w).all() for w in model.get_weights())
    facts = json.loads((tmp_path / "run" / "diverged.json").read_text())
    assert f"epoch {facts['epoch']}, batch {facts['batch']} of 5" in str(caught.value) and facts["input_is_finite"]


def test_a_broken_image_is_found_in_the_batch_that_is_named(tmp_path):
    data = toy_dataset()
    bad = data.split("train").image_ids[7]

    class Breaks:
        """A preprocessor that makes NaN of one image, as a division by an empty image's range does."""

        def __init__(self):
            self.own = Preprocessor([("scale", {"low": 0, "high": 255})])
            self.to_json = self.own.to_json

        def batch(self, images):
            x = self.own.batch(images)
            x[(images == data.split("train").images[7]).all(axis=(1, 2))] = np.nan
            return x

    with pytest.raises(MedimgError, match=r"an input value is not finite in epoch 1, batch \d of 5.*diverged.json"):
        fit(toy_network(), data, replace(CONFIG, augment=False), preprocessor=Breaks(), out=tmp_path, progress=False)
    facts = json.loads((tmp_path / "diverged.json").read_text())
    assert bad in facts["image_ids"] and len(facts["image_ids"]) == 16 and not facts["input_is_finite"]


def test_patients_count_once():
    rng = np.random.default_rng(0)
    y, p, patients = rng.integers(0, 2, 60), rng.random((60, 2)), rng.integers(0, 9, 60).astype(str)
    by_hand = {name: (y[patients == name].max(), p[patients == name].mean(axis=0)) for name in sorted(set(patients))}
    got_y, got_p = by_patient(y, p, patients)
    assert got_y.tolist() == [v[0] for v in by_hand.values()] and np.allclose(got_p, [v[1] for v in by_hand.values()])
    labels, scores, _ = by_patient(np.eye(3, dtype=int)[[0, 1, 1]], np.ones((3, 3)), ["a", "a", "b"]) + (None,)
    assert labels.tolist() == [[1, 1, 0], [0, 1, 0]] and scores.shape == (2, 3)


def test_early_stopping_can_watch_patients(tmp_path):
    data = toy_dataset()
    with pytest.raises(DatasetError, match="no patient ids.*monitor auc"):
        toy_fit(tmp_path / "a", replace(CONFIG, monitor="patient_auc"))
    with pytest.raises(ConfigError, match="did you mean patient_auc"):
        toy_fit(tmp_path / "a", replace(CONFIG, monitor="patient_auk"))
    patients = np.array([f"P{i // 4}" for i in range(len(data))])           # train and val lie within patients here: fit does not split
    record = toy_fit(tmp_path / "b", replace(CONFIG, epochs=2, monitor="patient_auc"), dataset=replace(data, patient_ids=patients))
    assert set(record.metrics) == {"loss", "auc", "patient_auc"} and record.history[0]["val_patient_auc"] >= 0


def test_the_average_of_a_resting_weight_is_that_weight():
    network = toy_network()
    for layer in network.layers[:4]:
        layer.trainable = False
    state, rng = TrainState(network, CONFIG, make_loss("binary")), np.random.default_rng(0)
    frozen = [i for i, w in enumerate(network.weights) if any(w is v for layer in network.layers[:4] for v in layer.weights)]
    before = [network.get_weights()[i] for i in frozen]
    for number in range(20):
        state.step(rng.random((8, 16, 16, 1), np.float32), np.arange(8, dtype=np.int32) % 2, number, 1e-2)
    assert frozen and all(np.array_equal(state.average[i].numpy(), w) for i, w in zip(frozen, before))


def test_early_stopping_counts_epochs_without_a_better_value(tmp_path):
    values = iter([0.5, 0.7, 0.7, 0.6, 0.9, 0.9])
    record = toy_fit(tmp_path / "run", replace(CONFIG, patience=2, monitor="given"), metrics={"given": lambda y, p: next(values)})
    assert (record.status, len(record.history), record.best_epoch) == ("stopped early", 4, 2)


def test_bad_input_is_refused(tmp_path):
    data = toy_dataset()
    with pytest.raises(ConfigError, match="did you mean auc"):
        toy_fit(tmp_path, replace(CONFIG, monitor="auk"))
    with pytest.raises(DatasetError, match="validation images"):
        toy_fit(tmp_path, dataset=replace(data, splits=np.where(data.splits == "val", "test", data.splits)))
    images, splits = data.images.copy(), data.splits.copy()
    images[np.flatnonzero(splits == "val")[0]] = images[np.flatnonzero(splits == "train")[0]]
    with pytest.raises(DatasetError, match="both training and validation.*drop_shared"):
        toy_fit(tmp_path, dataset=replace(data, images=images, splits=splits))
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match="not a folder"):
        toy_fit(tmp_path / "file")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("settings, says", [({"learning_rat": 1}, "did you mean learning_rate"), ({"epochs": 0}, "epochs = 0"), ({"ema": 1}, "ema"),
                                            ({"epochs": 2.5}, "int"), ({"batch_size": True}, "batch_size"), ({"learning_rate": math.nan}, "nan"),
                                            ({"epochs": 3, "warmup_epochs": 3}, "warm-up"), ({"keep": "newest"}, "keep")])
def test_config_refuses(settings, says):
    with pytest.raises(ConfigError, match=says):
        TrainConfig.from_dict(settings)


def test_config_round_trip():
    config = TrainConfig(augment={"shift": 0.1}, learning_rate=1)
    assert TrainConfig.from_json(config.to_json()) == config and isinstance(config.learning_rate, float)


def test_learning_rate_by_hand():
    rates = [learning_rate_at(t, total=12, warmup=4, peak=2.0) for t in range(12)]
    assert rates[:4] == [0.5, 1.0, 1.5, 2.0] and rates[4] == 2.0 and math.isclose(rates[8], 1.0)
    assert all(math.isclose(rates[4 + i] + rates[12 - i], 2.0) for i in range(1, 4)) and rates == sorted(rates[:4]) + sorted(rates[4:], reverse=True)
    assert learning_rate_at(0, total=4, warmup=0, peak=1.0) == 1.0


def test_step_against_numpy():
    """AdamW (Kingma and Ba's efficient form, as in Keras) with clipping, decay of the kernel only, and the running average, in float64."""
    import keras
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(5, 8, 3)).astype("float32"), rng.integers(0, 2, (5, 8))
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
    config = TrainConfig(learning_rate=0.05, weight_decay=0.1, ema=0.8, clip_norm=0.3)
    model.set_weights([rng.normal(size=(3, 1)), np.zeros(1)])
    state = TrainState(model, config, make_loss("binary", smoothing=0.2))
    weights = [w.astype(float) for w in model.get_weights()]
    mean, m, v = [w.copy() for w in weights], [0 * w for w in weights], [0 * w for w in weights]
    for t in range(5):
        rate, beta1, beta2 = 0.05 / (t + 1), 0.9, 0.999
        z = x[t] @ weights[0] + weights[1]
        p, goal = 1 / (1 + np.exp(-z)), y[t][:, None] * 0.8 + 0.1
        loss = -np.mean(goal * np.log(p) + (1 - goal) * np.log(1 - p))
        gradient = [x[t].T @ (p - goal) / 8, (p - goal).mean(axis=0)]
        norm = math.sqrt(sum((g**2).sum() for g in gradient))
        gradient = [g * min(1, 0.3 / norm) for g in gradient]
        weights[0] = weights[0] * (1 - rate * 0.1)
        for i, g in enumerate(gradient):
            m[i], v[i] = beta1 * m[i] + (1 - beta1) * g, beta2 * v[i] + (1 - beta2) * g**2
            alpha = rate * math.sqrt(1 - beta2 ** (t + 1)) / (1 - beta1 ** (t + 1))
            weights[i] = weights[i] - alpha * m[i] / (np.sqrt(v[i]) + 1e-7)
            decay = min(0.8, (1 + t) / (10 + t))
            mean[i] = decay * mean[i] + (1 - decay) * weights[i]
        assert abs(state.step(x[t], y[t], t, rate) - loss) < 1e-5
    for ours, theirs in zip([*weights, *mean], [*model.get_weights(), *(a.numpy() for a in state.average)]):
        assert np.abs(ours - theirs).max() < 1e-5


def test_losses_by_hand():
    import tensorflow as tf
    logits, y = np.array([[1.0, 2.0, 0.5]], "float32"), np.array([1])
    p = np.exp(logits) / np.exp(logits).sum()
    goal = np.array([[0.1, 0.8, 0.1]])
    assert math.isclose(float(make_loss("multiclass", smoothing=0.3)(y, tf.constant(logits))), -(goal * np.log(p)).sum(), rel_tol=1e-5)
    assert math.isclose(float(make_loss("binary", weights=[1.0, 3.0])(y, tf.zeros((1, 1)))), 3 * math.log(2), rel_tol=1e-6)
    several = float(make_loss("multilabel")(np.array([[1, 0, 1]]), tf.zeros((1, 3))))
    assert math.isclose(several, math.log(2), rel_tol=1e-6)


def test_metrics_against_references():
    from sklearn.metrics import log_loss as sk_loss
    from sklearn.metrics import roc_auc_score
    rng = np.random.default_rng(1)
    y, p = rng.integers(0, 3, 300), rng.dirichlet([1, 1, 1], 300).round(2)
    p /= p.sum(axis=1, keepdims=True)
    assert math.isclose(rank_auc(y, p), roc_auc_score(y, p, multi_class="ovr"), rel_tol=1e-9)
    q = rng.dirichlet([2, 2, 2], 300)
    assert math.isclose(log_loss(y, q), sk_loss(y, q), rel_tol=1e-6)
    truth, score = rng.integers(0, 2, 300), rng.random(300).round(2)
    grid = np.r_[-0.1, (np.unique(score)[1:] + np.unique(score)[:-1]) / 2, 1.1]
    youden = [np.mean(score[truth == 1] >= t) - np.mean(score[truth == 0] >= t) for t in grid]
    cut = choose_threshold(truth, score)
    assert math.isclose(np.mean(score[truth == 1] >= cut) - np.mean(score[truth == 0] >= cut), max(youden))
    with pytest.raises(DatasetError):
        rank_auc(np.zeros(4, int), np.full((4, 2), 0.5))


def test_history_csv_of_nothing():
    assert history_csv([]) == "epoch\n"
