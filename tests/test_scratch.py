"""Layers by hand: against Keras (forwards and its own gradients), SciPy, scikit-learn, central differences, and exact identities."""
import numpy as np
import pytest

from medimg.errors import ConfigError, MedimgError
from medimg.models import scratch as s
from medimg.models import scratch_layers as layers
from medimg.models import scratch_train as training

CONVS = [((9, 7), (3, 3), 1, "same"), ((9, 7), (3, 3), 2, "same"), ((8, 8), (3, 3), 2, "same"), ((7, 8), (4, 2), 1, "same"), ((7, 8), (2, 4), 3, "same"),
         ((8, 9), (3, 3), 1, "valid"), ((9, 9), (4, 4), 2, "valid"), ((5, 6), (1, 1), 1, "same"), ((5, 6), (1, 1), 2, "valid"), ((5, 5), (5, 5), 1, "valid"),
         ((6, 6), (7, 7), 1, "same"), ((28, 28), (5, 3), (2, 1), "same")]
POOLS = [((8, 8), 2, None, "valid"), ((7, 9), 2, None, "valid"), ((7, 9), 2, None, "same"), ((9, 9), 3, 2, "same"), ((9, 8), 3, 1, "same"), ((8, 8), (2, 3), 2, "valid"), ((7, 7), 3, 3, "same")]


@pytest.fixture(scope="module")
def keras():
    from medimg.models.blocks import _keras
    return _keras()


def draw(*shape, seed=0, dtype=np.float32):
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


def taped(function, *arrays, pull):
    """TensorFlow's gradients of sum(pull * function(*arrays))."""
    import tensorflow as tf
    variables = [tf.Variable(a) for a in arrays]
    with tf.GradientTape() as tape:
        value = tf.reduce_sum(tf.constant(pull) * function(*variables))
    return [g.numpy() for g in tape.gradient(value, variables)]


# ---- convolution ---------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("size, kernel, stride, padding", CONVS)
def test_convolution_is_keras(keras, size, kernel, stride, padding):
    x, b = draw(3, *size, 4), draw(5, seed=2)
    w = draw(*kernel, 4, 5, seed=1) / np.sqrt(np.prod(kernel) * 4).astype("f4")
    y = s.conv2d(x, w, b, stride=stride, padding=padding)
    theirs = np.asarray(keras.ops.conv(x, w, strides=stride, padding=padding)) + b
    assert y.shape == theirs.shape and y.dtype == np.float32
    assert np.abs(y - theirs).max() <= 1e-5
    assert np.abs(s.conv2d_direct(x, w, b, stride=stride, padding=padding) - theirs).max() <= 1e-5


@pytest.mark.parametrize("size, kernel, stride, padding", CONVS)
def test_convolution_gradients_are_keras(keras, size, kernel, stride, padding):
    x, w = draw(3, *size, 4), draw(*kernel, 4, 5, seed=1) / np.sqrt(np.prod(kernel) * 4).astype("f4")
    pull = draw(*s.conv2d(x, w, stride=stride, padding=padding).shape, seed=3)
    dx, dw, db = s.conv2d_gradient(x, w, pull, stride=stride, padding=padding)
    theirs = taped(lambda x, w: keras.ops.conv(x, w, strides=stride, padding=padding), x, w, pull=pull)
    assert dx.dtype == dw.dtype == np.float32
    assert s.relative_difference(dx, theirs[0]) <= 1e-4 and s.relative_difference(dw, theirs[1]) <= 1e-4
    assert np.allclose(db, pull.sum(axis=(0, 1, 2)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("size, kernel, stride, padding", CONVS)
def test_convolution_gradients_are_adjoints(size, kernel, stride, padding):
    """<conv(x, w), dy> = <x, dx> = <w, dw>, because the convolution is linear in each: exact, whatever the numbers."""
    x, w = draw(2, *size, 3, dtype=float), draw(*kernel, 3, 4, seed=1, dtype=float)
    y = s.conv2d(x, w, stride=stride, padding=padding)
    pull = draw(*y.shape, seed=2, dtype=float)
    dx, dw, _ = s.conv2d_gradient(x, w, pull, stride=stride, padding=padding)
    assert np.isclose((y * pull).sum(), (x * dx).sum()) and np.isclose((y * pull).sum(), (w * dw).sum())


def test_convolution_is_scipys_correlation():
    from scipy.signal import correlate
    x, w = draw(1, 11, 9, 2, dtype=float), draw(4, 3, 2, 1, seed=1, dtype=float)
    assert np.allclose(s.conv2d(x, w, padding="valid")[0, ..., 0], correlate(x[0], w[..., 0], mode="valid")[..., 0])


def test_blocks_do_not_change_the_answer(monkeypatch):
    x, w = draw(7, 12, 12, 3, dtype=float), draw(3, 3, 3, 4, seed=1, dtype=float)
    pull = draw(7, 12, 12, 4, seed=2, dtype=float)
    whole = s.conv2d(x, w), *s.conv2d_gradient(x, w, pull)
    monkeypatch.setattr(s, "_BLOCK_BYTES", 1)
    assert len(s._blocks(x, (12, 12), w.shape)) == 7
    for a, b in zip(whole, (s.conv2d(x, w), *s.conv2d_gradient(x, w, pull))):
        assert np.allclose(a, b)


def test_convolution_moves_with_the_image():
    x, w = draw(1, 12, 12, 2, dtype=float), draw(3, 3, 2, 3, seed=1, dtype=float)
    assert np.allclose(s.conv2d(x[:, 1:], w, padding="valid"), s.conv2d(x, w, padding="valid")[:, 1:])


def test_windows_own_no_memory():
    x = draw(2, 6, 6, 1)
    assert np.shares_memory(s.windows(x, 3), x) and not s.windows(x, 3).flags.writeable


def test_pixels_may_be_left_out():
    x, w, pull = draw(2, 5, 5, 1), draw(3, 3, 1, 2), draw(2, 5, 5, 2)
    assert s.conv2d_gradient(x, w, pull, pixels=False)[0] is None
    assert np.array_equal(s.conv2d_gradient(x, w, pull, pixels=False)[1], s.conv2d_gradient(x, w, pull)[1])


# ---- pooling -------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["max", "average"])
@pytest.mark.parametrize("shape, size, stride, padding", POOLS)
def test_pooling_is_keras(keras, kind, shape, size, stride, padding):
    x, theirs = draw(2, *shape, 3), {"max": keras.ops.max_pool, "average": keras.ops.average_pool}[kind]
    y = s.pool(x, size, kind=kind, stride=stride, padding=padding)
    assert y.dtype == np.float32 and np.abs(y - theirs(x, size, stride, padding)).max() <= 1e-5
    pull = draw(*y.shape, seed=1)
    dx = s.pool_gradient(x, pull, size, kind=kind, stride=stride, padding=padding)
    assert s.relative_difference(dx, taped(lambda v: theirs(v, size, stride, padding), x, pull=pull)[0]) <= 1e-4


def test_equal_pixels_have_one_winner(keras):
    x, pull = np.ones((1, 4, 4, 1), "f4"), draw(1, 2, 2, 1)
    dx = s.pool_gradient(x, pull)
    assert np.isclose(dx.sum(), pull.sum()) and (dx != 0).sum() == 4
    assert np.allclose(dx, taped(lambda v: keras.ops.max_pool(v, 2, 2), x, pull=pull)[0])


def test_global_pool():
    x = draw(2, 5, 3, 4)
    assert np.allclose(s.global_pool(x), x.mean(axis=(1, 2)), atol=1e-6) and np.array_equal(s.global_pool(x, kind="max"), x.max(axis=(1, 2)))


# ---- the judge -----------------------------------------------------------------------------------------------------------------
def test_numerical_gradient_is_scipys():
    from scipy.optimize import approx_fprime
    f = lambda v: float(np.sin(v).prod() + (v**3).sum())
    at = np.array([0.3, -1.2, 2.0])
    assert np.allclose(s.numerical_gradient(f, at), approx_fprime(at, f, 1e-8), atol=1e-5)


def test_relative_difference():
    assert s.relative_difference(np.zeros(3), np.zeros(3)) == 0 and s.relative_difference([0, 2.0], [0, 1.0]) == 0.5
    with pytest.raises(ConfigError, match="cannot be compared"):
        s.relative_difference(np.zeros(2), np.zeros(3))


LAYERS = {"relu": layers.ReLU, "sigmoid": layers.Sigmoid, "conv": lambda: layers.Conv(2, 3), "strided": lambda: layers.Conv(2, 3, 4, stride=2, bias=False),
          "max": layers.Pool, "overlapping": lambda: layers.Pool(3, stride=2, padding="same"), "average": lambda: layers.Pool(3, kind="average", stride=1, padding="same"),
          "global": layers.GlobalAverage, "flatten": layers.Flatten, "batch norm": lambda: layers.BatchNorm(2), "dropout": lambda: layers.Dropout(0.4),
          "nothing": layers.Layer}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", LAYERS)
def test_every_layer_passes_the_gradient_check(name, training):
    net = layers.Network([LAYERS[name]()]).astype(float)
    found = layers.check_gradients(net, draw(3, 7, 6, 2, dtype=float), training=training)
    assert max(found.values()) <= 1e-6, found


def test_dense_and_a_whole_network_pass_the_gradient_check():
    assert max(layers.check_gradients(layers.Network([layers.Dense(5, 3)]).astype(float), draw(4, 5, dtype=float)).values()) <= 1e-6
    net = layers.Network([layers.Conv(2, 3, 5, bias=False, seed=1), layers.BatchNorm(3), layers.ReLU(), layers.Pool(2), layers.Conv(3, 4, seed=2), layers.Sigmoid(),
                          layers.GlobalAverage(), layers.Dropout(0.3), layers.Dense(4, 2, seed=3)]).astype(float)
    found = layers.check_gradients(net, draw(3, 8, 8, 2, dtype=float))
    assert len(found) == 8 and max(found.values()) <= 1e-6, found


def test_the_judge_condemns_a_wrong_gradient():
    class Wrong(layers.BatchNorm):
        def backward(self, dy):
            super().backward(dy)
            return dy * (self.weights["gamma"] * self.scale)
    assert layers.check_gradients(layers.Network([Wrong(2)]).astype(float), draw(3, 5, 5, 2, dtype=float))["x"] > 1e-2


# ---- layers against Keras ------------------------------------------------------------------------------------------------------
def pair(keras, name):
    """Our layer, Keras' layer with the same weights, and an input."""
    k, x4, x2 = keras.layers, draw(6, 8, 8, 3), draw(6, 5)
    ours, theirs, x = {
        "dense": (lambda: layers.Dense(5, 4), lambda: k.Dense(4), x2), "conv": (lambda: layers.Conv(3, 4, 3, stride=2), lambda: k.Conv2D(4, 3, 2, padding="same"), x4),
        "relu": (layers.ReLU, k.ReLU, x4), "sigmoid": (layers.Sigmoid, lambda: k.Activation("sigmoid"), x4), "pool": (layers.Pool, lambda: k.MaxPooling2D(2), x4),
        "global": (layers.GlobalAverage, k.GlobalAveragePooling2D, x4), "norm": (lambda: layers.BatchNorm(3), lambda: k.BatchNormalization(momentum=0.9), x4),
        "flatten": (layers.Flatten, k.Flatten, x4)}[name]
    ours, theirs = ours(), theirs()
    theirs.build(x.shape)
    if name == "norm":
        ours.weights = {"gamma": draw(3, seed=4), "beta": draw(3, seed=5)}
    theirs.set_weights([*ours.weights.values(), *ours.state.values()])
    return ours, theirs, x


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ["dense", "conv", "relu", "sigmoid", "pool", "global", "norm", "flatten"])
def test_layers_are_keras(keras, name, training):
    import tensorflow as tf
    ours, theirs, x = pair(keras, name)
    y, v = ours.forward(x, training=training), tf.Variable(x)
    pull = draw(*y.shape, seed=7)
    with tf.GradientTape() as tape:
        out = theirs(v, training=training)
        value = tf.reduce_sum(out * pull)
    wanted = tape.gradient(value, [v, *[w.value for w in theirs.trainable_weights]])
    assert y.dtype == np.float32 and np.abs(y - out).max() <= 1e-5
    assert s.relative_difference(ours.backward(pull), wanted[0]) <= 1e-4
    for mine, other in zip(ours.gradients.values(), wanted[1:]):
        assert s.relative_difference(mine, other) <= 1e-4


def test_running_averages_are_keras(keras):
    ours, theirs, _ = pair(keras, "norm")
    for k in range(5):
        batch = draw(8, 4, 4, 3, seed=k) * 3 + k
        ours.forward(batch, training=True)
        theirs(batch, training=True)
    assert np.allclose(ours.state["mean"], theirs.moving_mean, atol=1e-5) and np.allclose(ours.state["variance"], theirs.moving_variance, rtol=1e-4)


def test_a_whole_network_is_keras(keras):
    """The chapter's network rebuilt in Keras, weights copied: logits and first-layer gradients agree."""
    import tensorflow as tf
    net, k = training.scratch_cnn((28, 28, 1), seed=3), keras.layers
    net.layers[0].pixels = True
    rows = [k.Input((28, 28, 1))]
    for layer in net.layers:
        rows.append({layers.Conv: lambda own: k.Conv2D(own.weights["w"].shape[3], own.weights["w"].shape[0], padding="same", use_bias=False),
                     layers.BatchNorm: lambda own: k.BatchNormalization(momentum=0.9), layers.ReLU: lambda own: k.ReLU(), layers.Pool: lambda own: k.MaxPooling2D(2),
                     layers.GlobalAverage: lambda own: k.GlobalAveragePooling2D(), layers.Dense: lambda own: k.Dense(1)}[type(layer)](layer))
    twin = keras.Sequential(rows)
    for ours, theirs in zip(net.layers, twin.layers):
        theirs.set_weights([*ours.weights.values(), *ours.state.values()])
    x, y = np.random.default_rng(0).random((16, 28, 28, 1), dtype=np.float32), np.arange(16) % 2
    value, pull = layers.binary_cross_entropy(net.forward(x, training=True), y)
    net.backward(pull)
    with tf.GradientTape() as tape:
        loss = tf.reduce_mean(keras.losses.binary_crossentropy(y[:, None].astype("f4"), twin(x, training=True), from_logits=True))
    theirs = tape.gradient(loss, twin.trainable_weights[0].value)
    assert abs(value - float(loss)) <= 1e-5 and s.relative_difference(net.layers[0].gradients["w"], theirs) <= 1e-3
    assert np.abs(net.logits(x) - twin(x, training=False)).max() <= 1e-4


# ---- losses --------------------------------------------------------------------------------------------------------------------
def test_losses_are_sklearns_and_keras(keras):
    from sklearn.metrics import log_loss, mean_squared_error
    z, t, labels = draw(9, 1, dtype=float) * 3, np.arange(9) % 2, np.arange(9) % 4
    z4, target = draw(9, 4, seed=1, dtype=float), draw(9, 4, seed=2, dtype=float)
    assert np.isclose(layers.binary_cross_entropy(z, t)[0], log_loss(t, layers.sigmoid(z[:, 0])))
    assert np.isclose(layers.softmax_cross_entropy(z4, labels)[0], log_loss(labels, layers.softmax(z4)))
    assert np.isclose(layers.mean_squared_error(z4, target)[0], mean_squared_error(target, z4))
    pull = np.full(9, 1 / 9)
    theirs = taped(lambda v: keras.ops.sparse_categorical_crossentropy(labels, v, from_logits=True), z4, pull=pull)[0]
    assert np.allclose(layers.softmax_cross_entropy(z4, labels)[1], theirs, atol=1e-6)


def test_weighted_loss_counts_images_as_often_as_it_says():
    z, t, w = draw(4, 1, dtype=float), np.array([0, 1, 1, 0]), np.array([2.0, 0.0, 1.0, 1.0])
    repeated = layers.binary_cross_entropy(z[[0, 0, 2, 3]], t[[0, 0, 2, 3]])[0]
    assert np.isclose(layers.binary_cross_entropy(z, t, weights=w)[0], repeated)


@pytest.mark.parametrize("z", [1e4, -1e4, 800.0, -800.0])
def test_extreme_logits_stay_finite(z):
    with np.errstate(all="raise", under="ignore"):
        value, pull = layers.binary_cross_entropy(np.array([[z]]), [1])
        several, pulls = layers.softmax_cross_entropy(np.array([[z, 0.0, -z]]), [0])
    assert np.isfinite([value, several]).all() and np.isfinite(pull).all() and np.isfinite(pulls).all()
    assert np.isclose(value, max(-z, 0))


def test_two_classes_of_a_softmax_are_a_sigmoid():
    z = draw(6, 1, dtype=float)
    assert np.allclose(layers.softmax(np.concatenate([np.zeros_like(z), z], axis=1))[:, 1:], layers.sigmoid(z))


# ---- dropout, network ----------------------------------------------------------------------------------------------------------
def test_dropout_is_replayable_and_keeps_the_mean():
    layer, x = layers.Dropout(0.25, seed=3), np.ones((400, 100))
    first = layer.forward(x, training=True)
    assert np.array_equal(first, layer.forward(x, training=True)) and abs(first.mean() - 1) < 0.02 and abs((first == 0).mean() - 0.25) < 0.01
    layer.step = 1
    assert not np.array_equal(first, layer.forward(x, training=True)) and np.array_equal(layer.forward(x), x)


def test_network_refuses_nonsense():
    net = training.scratch_cnn((12, 12, 1))
    with pytest.raises(MedimgError, match="2 images hold NaN"):
        net.logits(np.stack([np.zeros((12, 12, 1)), np.full((12, 12, 1), np.nan), np.full((12, 12, 1), np.inf)]))
    with pytest.raises(MedimgError, match="no image"):
        net.logits(np.zeros((0, 12, 12, 1)))
    with pytest.raises(ConfigError, match="3 channels"):
        net.logits(np.zeros((1, 12, 12, 3)))
    net.layers[-1].weights["b"][:] = np.nan
    with pytest.raises(MedimgError, match="diverged"):
        net.logits(np.zeros((1, 12, 12, 1)))


@pytest.mark.parametrize("call, text", [
    (lambda: s.conv2d(np.zeros((4, 4, 1)), np.zeros((3, 3, 1, 1))), "do not make a layer"), (lambda: s.conv2d(np.zeros((1, 4, 4, 2)), np.zeros((3, 3, 1, 1))), "2 channels"),
    (lambda: s.conv2d(np.zeros((1, 2, 2, 1)), np.zeros((3, 3, 1, 1)), padding="valid"), "does not fit"), (lambda: s.conv2d(np.zeros((1, 4, 4, 1)), np.zeros((3, 3, 1, 1)), padding="full"), "'full'"),
    (lambda: s.conv2d(np.zeros((1, 4, 4, 1)), np.zeros((3, 3, 1, 1)), stride=0), "stride 0"), (lambda: s.pool(np.zeros((1, 4, 4, 1)), kind="min"), "'min'"),
    (lambda: s.pool(np.zeros((4, 4))), "shape"), (lambda: s.pool_gradient(np.zeros((1, 4, 4, 1)), np.zeros((1, 3, 3, 1))), "dy has the shape"),
    (lambda: s.conv2d_gradient(np.zeros((1, 4, 4, 1)), np.zeros((3, 3, 1, 2)), np.zeros((1, 4, 4, 1))), "dy has the shape"), (lambda: s.global_pool(np.zeros((3, 3))), "shape"),
    (lambda: layers.Dropout(1.5), "1.5"), (lambda: layers.Network([]), "without layers"), (lambda: layers.Dense(3, 1).forward(np.zeros((2, 4))), "3 inputs"),
    (lambda: layers.binary_cross_entropy(np.zeros((2, 1)), [0, 1, 1]), "do not fit"), (lambda: layers.binary_cross_entropy(np.zeros(2), [0, 1]), "do not fit"),
    (lambda: layers.softmax_cross_entropy(np.zeros((2, 2)), [0, 2]), "do not fit"), (lambda: layers.softmax_cross_entropy(np.zeros((2, 2)), [0, -1]), "do not fit"),
    (lambda: layers.mean_squared_error(np.zeros((2, 1)), np.zeros(2)), "truth of shape"), (lambda: training.scratch_cnn((28, 28)), "images of shape"),
    (lambda: training.scratch_cnn((2, 2, 1)), "images of shape"), (lambda: training.draw_batches(np.zeros((4, 2, 2, 1)), np.zeros(3)), "3 labels"),
    (lambda: training.draw_batches(np.zeros((4, 2, 2, 1)), np.zeros(4)), "batches of 64"), (lambda: training.ScratchPredictor(None, ("one",)), "1 classes")])
def test_bad_input_is_named(call, text):
    with pytest.raises(ConfigError, match=text):
        call()


# ---- training ------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW"])
def test_optimisers_walk_as_keras(keras, name):
    ours, theirs = {"SGD": (training.SGD(0.02), keras.optimizers.SGD(0.02, momentum=0.9)), "Adam": (training.Adam(0.02), keras.optimizers.Adam(0.02)),
                    "AdamW": (training.Adam(0.02, decay=0.1), keras.optimizers.AdamW(0.02, weight_decay=0.1))}[name]
    net, w = layers.Network([layers.Dense(6, 2)]), keras.Variable(layers.Dense(6, 2).weights["w"])
    for k in range(40):
        g = draw(6, 2, seed=k)
        net.layers[0].gradients = {"w": g}
        ours.update(net)
        theirs.apply([g], [w])
    assert np.abs(net.layers[0].weights["w"] - np.asarray(w)).max() <= 1e-5


def test_batches_hold_every_image_once_and_are_replayable():
    x = np.arange(20.0).reshape(20, 1, 1, 1)
    pick = training.draw_batches(x, np.arange(20), batch=5, seed=1)
    epochs = [np.concatenate([pick(4 * e + k)[1] for k in range(4)]) for e in (0, 1)]
    assert all(sorted(e) == list(range(20)) for e in epochs) and not np.array_equal(*epochs)
    assert np.array_equal(pick(7)[0].ravel(), pick(7)[1]) and np.array_equal(pick(7)[0], pick(7)[0])


def test_jitter_keeps_range_size_and_a_flat_mean():
    x = np.random.default_rng(0).random((50, 9, 9, 2), dtype=np.float32)
    moved = training.jitter(x, np.random.default_rng(1))
    assert moved.shape == x.shape and moved.dtype == x.dtype and moved.min() >= 0 and moved.max() <= 1
    still = training.jitter(x, np.random.default_rng(1), shift_px=0, contrast=0.0, brightness=0.0)
    assert np.allclose(still, x, atol=1e-6)


def rings(n, seed):
    rng, (y, x) = np.random.default_rng(seed), np.mgrid[:16, :16]
    labels = np.arange(n) % 2
    r = np.hypot(y[None] - rng.uniform(6, 9, (n, 1, 1)), x[None] - rng.uniform(6, 9, (n, 1, 1)))
    shape = np.where(labels[:, None, None] == 1, np.abs(r - 3.4) < 1.25, r < 4.2)
    return np.clip(0.5 * shape + rng.normal(0.2, 0.1, (n, 16, 16)), 0, 1).astype("f4")[..., None], labels


def test_training_learns_and_is_repeatable():
    from medimg.evaluation.metrics import auc
    (x, y), (x_new, y_new) = rings(256, 0), rings(200, 1)

    def once():
        net = training.scratch_cnn((16, 16, 1), filters=(4, 8), seed=1)
        rows = training.train(net, training.draw_batches(x, y, batch=32, augment=training.jitter), layers.binary_cross_entropy, steps=120)
        return net, rows
    net, rows = once()
    assert auc(y_new, net.logits(x_new)[:, 0]) > 0.9 and np.mean([r["loss"] for r in rows[-10:]]) < 0.6 * np.mean([r["loss"] for r in rows[:5]])
    assert np.array_equal(once()[0].logits(x_new), net.logits(x_new))
    assert rows[0]["rate"] < rows[5]["rate"] > rows[-1]["rate"]


def test_training_stops_when_the_loss_is_no_number():
    with pytest.raises(MedimgError, match="step 1 of 3"):
        training.train(training.scratch_cnn((8, 8, 1)), lambda step: (np.full((2, 8, 8, 1), np.nan, "f4"), np.array([0, 1])), layers.binary_cross_entropy, steps=3)


def test_weights_survive_a_round_trip_and_nothing_else_is_read(tmp_path):
    net, x = training.scratch_cnn((12, 12, 1), filters=(2, 3), seed=1), draw(3, 12, 12, 1)
    net.forward(x, training=True)
    path = training.save_network(net, tmp_path / "net.npz")
    again = training.load_network(training.scratch_cnn((12, 12, 1), filters=(2, 3), seed=9), path)
    assert np.array_equal(net.logits(x), again.logits(x))
    with pytest.raises(ConfigError, match="another network"):
        training.load_network(training.scratch_cnn((12, 12, 1), filters=(2, 4)), path)
    np.savez(tmp_path / "evil.npz", **{"0.w": np.array([print], dtype=object)})
    for name, content in (("evil.npz", None), ("text.npz", b"hello"), ("short.npz", path.read_bytes()[:200])):
        if content:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(ConfigError, match="not readable weights"):
            training.load_network(training.scratch_cnn((12, 12, 1), filters=(2, 3)), tmp_path / name)


def test_predictor_keeps_the_protocol():
    from medimg.models.networks import Predictor
    one = training.ScratchPredictor(training.scratch_cnn((28, 28, 1)), ("normal", "pneumonia"))
    images = np.random.default_rng(0).integers(0, 256, (5, 28, 28), dtype=np.uint8)
    assert isinstance(one, Predictor) and one.predict(images).shape == (5, 2) and one.features(images).shape == (5, 32)
    assert np.allclose(one.predict(images).sum(axis=1), 1) and np.allclose(one.predict(images)[2:3], one.predict(images[2:3]), atol=1e-6)
