"""Curves, event files, the learning-rate test and the clock of a step: checked with TensorBoard's own reader, by hand, and against what must not change."""
import os
import socket

import numpy as np
import pytest

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

from test_trainer import CONFIG, toy_dataset, toy_fit, toy_network

from medimg.data.preprocess import Preprocessor
from medimg.errors import ConfigError, DatasetError
from medimg.training.finder import find_learning_rate, read_rates
from medimg.training.step_time import StepTime, profile_steps
from medimg.training.watch import draw_history, write_events

SCALE = Preprocessor([("scale", {"low": 0, "high": 255})])


def curves_of(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    events = EventAccumulator(str(folder)).Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_tensorboard_reads_the_history_of_a_run_that_was_cut_off(tmp_path):
    def power_cut(row):
        if row["epoch"] == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        toy_fit(tmp_path, tensorboard=True, on_epoch=power_cut)
    assert [step for step, _ in curves_of(tmp_path / "tensorboard")["loss/training"]] == [1, 2]
    record = toy_fit(tmp_path, tensorboard=True)
    curves = curves_of(tmp_path / "tensorboard")
    assert set(curves) == {"loss/training", "loss/validation", "auc/validation", "learning_rate", "seconds"}
    for tag, column in (("loss/training", "loss"), ("auc/validation", "val_auc")):
        assert curves[tag] == [(row["epoch"], pytest.approx(row[column], rel=1e-6)) for row in record.history]
    files = list((tmp_path / "tensorboard").iterdir())
    assert len(files) == 1 and socket.gethostname() not in files[0].name


def test_events_need_no_tensorboard(tmp_path, monkeypatch):
    import sys
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    path = write_events(tmp_path, [{"epoch": 1, "loss": 0.5}, {"epoch": 2, "loss": 0.25}])
    monkeypatch.undo()
    assert curves_of(path.parent) == {"loss/training": [(1, 0.5), (2, 0.25)]}


def test_history_is_drawn_with_its_best_epoch():
    rows = [{"epoch": e, "loss": 1 / e, "val_loss": v, "val_auc": a} for e, v, a in ((1, 0.7, 0.6), (2, 0.5, 0.9), (3, 0.6, 0.8))]
    picture = draw_history(rows)
    assert "best auc 0.900 in epoch 2" in repr(picture) and picture.figure.axes[1].lines[-1].get_xdata()[0] == 2
    assert "best loss 0.500 in epoch 2" in repr(draw_history(rows, monitor="loss"))
    with pytest.raises(ConfigError, match="did you mean auc"):
        draw_history(rows, monitor="auk")
    with pytest.raises(ConfigError, match="train an epoch"):
        draw_history([])


def test_progress_takes_three_words(tmp_path):
    with pytest.raises(ConfigError, match="progress = 'plto'"):
        toy_fit(tmp_path, progress="plto")


def test_rates_of_a_curve_that_is_known():
    rates = np.geomspace(1e-4, 1e0, 41)
    flat_then_line = np.concatenate([np.full(10, 1.0), np.linspace(1.0, 0.2, 21), np.linspace(0.3, 3.0, 10)])
    test = read_rates(rates, flat_then_line)
    assert test.largest == rates[30] and test.suggestion == pytest.approx(rates[20], rel=0.3)      # half of the fall is in its middle
    with pytest.raises(DatasetError, match="did not fall"):
        read_rates(rates, np.linspace(1, 2, 41))


def test_the_finder_gives_the_network_back_and_is_repeatable(tmp_path):
    network, data = toy_network(), toy_dataset()
    before = [np.array(v) for v in network.variables]
    first, again = (find_learning_rate(network, data, preprocessor=SCALE, config=CONFIG, steps=60) for _ in range(2))
    assert all(np.array_equal(a, np.array(v)) for a, v in zip(before, network.variables))
    assert np.array_equal(first.losses, again.losses) and first.suggestion == again.suggestion
    assert 1e-6 < first.suggestion < first.largest <= 10 and np.allclose(np.diff(np.log(first.rates)), np.diff(np.log(first.rates))[0])
    for wrong in ({"low": 1, "high": 0.1}, {"low": 0}, {"steps": 3}, {"smooth": 1.0}):
        with pytest.raises(ConfigError):
            find_learning_rate(network, data, preprocessor=SCALE, **wrong)


def test_the_clock_of_a_step_adds_up_and_moves_nothing():
    network = toy_network()
    before = [np.array(v) for v in network.variables]
    spent = profile_steps(network, toy_dataset(), preprocessor=SCALE, config=CONFIG, rounds=3)
    assert list(spent.parts) == ["forward", "backward", "update", "around", "input wait"] and min(spent.parts.values()) >= 0
    assert spent.total_ms == sum(spent.parts.values()) > 0 and spent.images_per_s == 1e3 * CONFIG.batch_size / spent.total_ms
    assert all(np.array_equal(a, np.array(v)) for a, v in zip(before, network.variables))
    assert StepTime({"forward": 1.0, "input wait": 3.0}, 3.0, 4).sentence() == "input wait takes most, 75 % of 4.0 ms; the step waits 75 % of its time for images"


def test_fused_normalisation_trains_as_keras_does():
    """Six steps of plain gradient descent, with the kernel and without: weights and running averages agree to rounding, frozen layers rest."""
    import contextlib

    import keras
    import tensorflow as tf

    from medimg.training.fused_norm import fused_norms
    rng = np.random.default_rng(0)
    x, y = rng.random((6, 16, 16, 16, 1), np.float32), (np.arange(16) % 2).astype(np.int32)
    ends = {}
    for rank in (2, 3):
        for name, use in (("kernel", fused_norms), ("keras", lambda net: contextlib.nullcontext())):
            from medimg.models.networks import build_model
            net = build_model("resnet", (16,) * rank + (1,), 2, seed=0, width=8, blocks=(1, 1), dropout=0.0)
            norms = [layer for layer in net.layers if isinstance(layer, keras.layers.BatchNormalization)]
            norms[0].trainable = False
            before, calls = [np.array(w) for w in norms[0].weights], [layer.call.__func__ for layer in norms]

            @tf.function
            def step(x, y):
                with tf.GradientTape() as tape, use(net):
                    z = net(x, training=True)
                    loss = tf.reduce_mean(tf.nn.sigmoid_cross_entropy_with_logits(labels=tf.cast(y[:, None], tf.float32), logits=z))
                for v, g in zip(net.trainable_variables, tape.gradient(loss, [v.value for v in net.trainable_variables])):
                    v.assign_sub(0.05 * g)

            for k in range(6):
                step(x[k] if rank == 2 else np.repeat(x[k][..., None, :], 16, 3)[:8], y if rank == 2 else y[:8])
            assert all(np.array_equal(a, np.array(w)) for a, w in zip(before, norms[0].weights))
            assert [layer.call.__func__ for layer in norms] == calls, "the layers are as they were"
            ends[rank, name] = net.get_weights()
        for a, b in zip(ends[rank, "kernel"], ends[rank, "keras"]):
            assert np.allclose(a, b, rtol=1e-3, atol=3e-4)
        assert any(not np.array_equal(a, b) for a, b in zip(ends[rank, "kernel"], ends[rank, "keras"])), "the kernel was not used"
