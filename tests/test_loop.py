"""The step loop: killed and resumed equals uninterrupted, it equals a plain Keras loop, rates by layer, and what it refuses."""
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

from medimg.errors import ConfigError, MedimgError
from medimg.training.loop import train_steps
from medimg.training.record import TrainConfig, load_checkpoint
from medimg.training.trainer import learning_rate_at

CONFIG = TrainConfig(learning_rate=0.02, weight_decay=0.1, ema=0.9, clip_norm=0.5, seed=5)


def draw(step):
    """Sixteen points and two targets of each: a pure function of the step."""
    rng = np.random.default_rng([1, step])
    x = rng.normal(size=(16, 3)).astype(np.float32)
    return x, {"sum": x.sum(axis=1, keepdims=True), "product": x.prod(axis=1, keepdims=True)}


def loss(y, prediction):
    import tensorflow as tf
    return tf.reduce_mean((prediction["sum"] - y["sum"]) ** 2) + tf.reduce_mean((prediction["product"] - y["product"]) ** 2)


def network(seed=0):
    """Two outputs, dropout and batch normalisation: everything that has a state."""
    import keras
    keras.utils.set_random_seed(seed)
    x = keras.Input((3,), name="images")
    h = keras.layers.Dense(8, activation="tanh", name="hidden")(x)
    h = keras.layers.Dropout(0.2)(keras.layers.BatchNormalization(momentum=0.9)(h))
    return keras.Model(x, {name: keras.layers.Dense(1, name=name)(h) for name in ("sum", "product")})


def slow_draw(step):
    time.sleep(0.05)
    return draw(step)


def start(out):
    code = ("import sys; sys.path.insert(0, sys.argv[1]); import test_loop as t; "
            "t.train_steps(t.network(), t.slow_draw, t.loss, steps=120, config=t.CONFIG, save_every=15, out=sys.argv[2], progress=False)")
    return subprocess.Popen([sys.executable, "-c", code, str(Path(__file__).parent), str(out)], stderr=subprocess.PIPE, text=True)


def test_killed_and_resumed_is_bitwise_equal(tmp_path):
    """kill -9 in the middle; the same call ends with the weights and losses of a run that was left alone."""
    job, end = start(tmp_path), time.monotonic() + 120
    while time.monotonic() < end and not ((tmp_path / "checkpoint.npz").exists() and load_checkpoint(tmp_path / "checkpoint.npz")[1]["step"] >= 30):
        assert job.poll() is None, job.stderr.read()
        time.sleep(0.02)
    job.send_signal(signal.SIGKILL)
    job.wait()
    killed_at = load_checkpoint(tmp_path / "checkpoint.npz")[1]["step"]
    assert 30 <= killed_at < 120 and killed_at % 15 == 0
    settings = {"steps": 120, "config": CONFIG, "save_every": 15, "progress": False}
    resumed, straight = network(seed=9), network()      # other first weights: all must come from the checkpoint
    a = train_steps(resumed, draw, loss, out=tmp_path, **settings)
    b = train_steps(straight, draw, loss, **settings)
    assert all(np.array_equal(x, y) for x, y in zip(resumed.get_weights(), straight.get_weights()))
    assert [row["step"] for row in a] == [row["step"] for row in b]
    assert [row["loss"] for row in a if row["step"] > killed_at] == [row["loss"] for row in b if row["step"] > killed_at]


def test_a_finished_run_is_found_and_costs_no_batch(tmp_path):
    settings = {"steps": 6, "config": CONFIG, "out": tmp_path, "progress": False}
    first = network()
    history = train_steps(first, draw, loss, **settings)

    def never(step):
        raise AssertionError("a batch was drawn")
    again = network(seed=4)
    assert train_steps(again, never, loss, **settings) == history
    assert all(np.array_equal(x, y) for x, y in zip(first.get_weights(), again.get_weights()))
    assert history[-1]["step"] == 6 and history[-1]["cpu_s"] > 0


def test_equals_a_plain_keras_loop():
    """AdamW with the schedule, clipping and the running average, written once more with Keras and a tape."""
    import keras
    import tensorflow as tf

    def plain_net():
        keras.utils.set_random_seed(2)
        x = keras.Input((3,), name="images")
        return keras.Model(x, {"sum": keras.layers.Dense(1, name="sum")(x), "product": keras.layers.Dense(1, name="product")(x)})
    ours, theirs, steps = plain_net(), plain_net(), 25
    train_steps(ours, draw, loss, steps=steps, warmup=5, config=CONFIG, progress=False)
    optimizer = keras.optimizers.AdamW(0.02, weight_decay=0.1)
    optimizer.exclude_from_weight_decay(var_list=[v for v in theirs.trainable_variables if len(v.shape) < 2])
    average = theirs.get_weights()
    for step in range(steps):
        x, y = draw(step)
        optimizer.learning_rate = learning_rate_at(step, total=steps, warmup=5, peak=0.02)
        with tf.GradientTape() as tape:
            value = loss(y, theirs(x, training=True))
        gradients, _ = tf.clip_by_global_norm(tape.gradient(value, [v.value for v in theirs.trainable_variables]), 0.5)
        optimizer.apply(gradients, theirs.trainable_variables)
        decay = min(0.9, (1 + step) / (10 + step))
        average = [decay * a + (1 - decay) * w for a, w in zip(average, theirs.get_weights())]
    for mine, other in zip(ours.get_weights(), average):
        assert np.allclose(mine, other, rtol=1e-5, atol=1e-6)


def test_scales_move_each_layer_at_its_own_speed():
    """Scale 0 freezes, 0.1 goes a tenth of the first step, what is not named goes the whole way."""
    nets = {scale: network() for scale in (1.0, 0.1, 0.0)}
    before = nets[1.0].get_layer("hidden").kernel.numpy()
    for scale, net in nets.items():
        train_steps(net, draw, loss, steps=1, warmup=1, scales={"hidden/kernel": scale}, config=TrainConfig(learning_rate=0.01, ema=0.0), progress=False)
    moved = {scale: net.get_layer("hidden").kernel.numpy() - before for scale, net in nets.items()}
    assert not moved[0.0].any() and np.abs(moved[1.0]).max() > 1e-3
    assert np.allclose(moved[0.1], 0.1 * moved[1.0], atol=1e-7)
    assert np.array_equal(nets[0.0].get_layer("sum").kernel.numpy(), nets[1.0].get_layer("sum").kernel.numpy())


def test_a_loss_that_is_not_finite_names_the_step_and_keeps_the_checkpoint(tmp_path):
    def broken(step):
        x, y = draw(step)
        return (x * np.nan if step == 7 else x), y
    with pytest.raises(MedimgError, match="step 8 of 20"):
        train_steps(network(), broken, loss, steps=20, save_every=5, config=CONFIG, out=tmp_path, progress=False)
    arrays, facts = load_checkpoint(tmp_path / "checkpoint.npz")
    assert facts["step"] == 5 and all(np.isfinite(a).all() for a in arrays.values() if a.dtype.kind == "f")


@pytest.mark.parametrize("changes, said", [({"steps": 0}, "steps is 0"), ({"save_every": 0}, "save_every is 0"), ({"scales": {"hiden/kernel": 0.5}}, "hidden/kernel"),
                                           ({"scales": {"hidden/kernel": -1.0}}, "0 to 100")])
def test_what_is_refused(changes, said):
    with pytest.raises(ConfigError, match=said):
        train_steps(network(), draw, loss, **{"steps": 4, "progress": False} | changes)


@pytest.mark.parametrize("changes, said", [({"steps": 8}, "steps"), ({"config": TrainConfig(seed=1)}, "seed"), ({"scales": {"hidden/kernel": 0.5}}, "scales")])
def test_a_folder_continues_only_its_own_plan(tmp_path, changes, said):
    settings = {"steps": 4, "warmup": 1, "config": TrainConfig(), "out": tmp_path, "progress": False}
    train_steps(network(), draw, loss, **settings)
    with pytest.raises(ConfigError, match=said):
        train_steps(network(), draw, loss, **settings | changes)


def test_errors_of_draw_reach_the_caller(tmp_path):
    def full(step):
        raise OSError("no such volume")
    with pytest.raises(OSError, match="no such volume"):
        train_steps(network(), full, loss, steps=3, config=CONFIG, progress=False)
