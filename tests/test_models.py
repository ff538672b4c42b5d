"""The networks: shapes, counts by hand, NumPy oracles, saving, export, costs, and refusals; every entry of the registry, in 2-D and 3-D."""
import re
import subprocess
import sys

import numpy as np
import pytest

from medimg.errors import ConfigError, MedimgError
from medimg.models import costs, networks, resnet
from medimg.models.networks import MODELS, build_model, load_model, task_of, to_probability

SMALL = {"resnet": [(28, 28, 1), (16, 18, 20, 1)], "article-cnn": [(32, 32, 3)], "gated-cnn": [(29, 31, 1)], "mlp-28": [(28,)], "lung-ct-cnn": [(32, 32, 3)],
         "cnn-rnn": [(6, 24, 24, 1)], "mil": [(4, 24, 24, 1)]}
BY_RANK = {"(y, x, channels)": (32, 32, 1), "(z, y, x, channels)": (16, 16, 16, 1), "(features,)": (12,), "(instances, y, x, channels)": (4, 24, 24, 1)}
CASES = [pytest.param(name, shape, id=f"{name}-{len(shape)}") for name in MODELS for shape in SMALL.get(name, [BY_RANK[axes] for axes in MODELS[name].axes])]
ONE_ANSWER = [case for case in CASES if MODELS[case.values[0]].kind in ("classification", "features")]
each_case, each_answering = pytest.mark.parametrize("name, shape", CASES), pytest.mark.parametrize("name, shape", ONE_ANSWER)


@pytest.fixture(scope="module")
def built():
    """`built(name, shape)`: each network once, small, three classes, seed 0."""
    made = {}

    def get(name, shape=None):
        shape = shape or SMALL[name][0]
        return made.setdefault((name, shape), build_model(name, shape, 3, seed=0))
    return get


def batch(shape, n=4, seed=0):
    return np.random.default_rng(seed).random((n, *shape), dtype=np.float32)


def scene(shape, n=4):
    """Phantom-like input: smooth greys with a bright ball, in [0, 1]; standard normal features for a vector."""
    if len(shape) == 1:
        return np.random.default_rng(1).normal(size=(n, *shape)).astype("float32")
    axes = np.meshgrid(*[np.linspace(-1, 1, s) for s in shape[:-1]], indexing="ij")
    r = np.sqrt(sum(a**2 for a in axes))
    ball = [0.4 + 0.2 * np.cos(3 * axes[-1] + i) + 0.35 * (r < 0.2 + 0.1 * i) for i in range(n)]
    return np.repeat(np.array(ball, "float32")[..., None], shape[-1], axis=-1).clip(0, 1)


# --- probabilities, without TensorFlow

@pytest.mark.parametrize("scale", [1, 30, 200])
def test_probabilities_equal_scipy(scale):
    from scipy.special import expit, softmax
    a = np.random.default_rng(0).normal(0, scale, (300, 4))
    assert np.allclose(to_probability(a, "multiclass"), softmax(a, axis=1), rtol=1e-12, atol=0)
    assert np.allclose(to_probability(a, "ordinal"), softmax(a, axis=1), rtol=1e-12, atol=0)
    assert np.allclose(to_probability(a, "multilabel"), expit(a), rtol=1e-12, atol=0)
    p = to_probability(a[:, 0], "binary")
    assert np.allclose(p[:, 1], expit(a[:, 0]), rtol=1e-12, atol=0) and np.allclose(p.sum(axis=1), 1)
    assert np.array_equal(p, to_probability(a[:, :1], "binary"))


@pytest.mark.parametrize("logits, task", [([[np.nan]], "binary"), ([[np.inf, 0]], "multiclass"), ([[1, 2]], "binary"), ([[1]], "multiclass"),
                                          ([1, 2], "multiclass"), ([[1, 2]], "binery"), ([[[1.0]]], "binary")])
def test_probabilities_refuse(logits, task):
    with pytest.raises(MedimgError):
        to_probability(logits, task)


def test_one_label_is_a_multilabel_task():
    assert to_probability([[0.0]], "multilabel").tolist() == [[0.5]]


@pytest.mark.parametrize("classes, task", [(1, None), (0, None), (2.5, None), (True, None), (3, "binary"), (2, "segmentation")])
def test_task_refuses(classes, task):
    with pytest.raises(ConfigError):
        task_of(classes, task)


# --- the networks

FULL_COUNTS = {
    "article-cnn": (9 * 3 * 32 + 32) + (32 * 128 + 128) + (128 * 10 + 10),
    "gated-cnn": (9 * 32 + 32) + 4 * 32 + (9 * 32 * 64 + 64) + 65,
    "mlp-28": (28 * 64 + 64) + (64 * 64 + 64) + (64 * 10 + 10),
    "lung-ct-cnn": (9 * 3 * 32 + 32) + (9 * 32 * 64 + 64) + (62 * 62 * 64 * 128 + 128) + 129,
}


@pytest.mark.parametrize("name", FULL_COUNTS)
def test_parameters_by_hand(name):
    entry = MODELS[name]
    assert build_model(name, entry.input_shape, entry.classes).count_params() == FULL_COUNTS[name]


@each_case
def test_shapes_and_names(built, name, shape):
    net, kind = built(name, shape), MODELS[name].kind
    assert net.input.name == "images" and net.input.shape[1:] == shape and net.layers[-1].name == "logits"
    assert np.isfinite(np.asarray(net(batch(shape)))).all()
    if kind == "segmentation":
        assert net.output_shape == (None, *shape[:-1], 3) and build_model(name, shape, 2).output_shape == (None, *shape[:-1], 1)
    if kind in ("classification", "features"):
        assert net.output_shape == (None, 3)
        assert build_model(name, shape, 2).output_shape == (None, 1)
        assert build_model(name, shape, 2, task="multiclass").output_shape == (None, 2)
        assert len(net.get_layer("features").output.shape) == 2
    if kind == "detection":
        assert len(net.output_shape) == len(shape) + 1 and all(s % o == 0 for s, o in zip(shape, net.output_shape[1:-1]))


@each_case
def test_saved_and_loaded_is_the_same(built, name, shape, tmp_path):
    net = built(name, shape)
    net.save(tmp_path / "m.keras")
    again = load_model(tmp_path / "m.keras")
    assert np.array_equal(again(batch(shape)), net(batch(shape)))
    assert [layer.name for layer in again.layers] == [layer.name for layer in net.layers]


@each_case
def test_gradients_reach_every_weight(name, shape):
    import tensorflow as tf
    net, goal = build_model(name, shape, 3, seed=1), np.random.default_rng(2)
    with tf.GradientTape() as tape:
        answer = net(scene(shape, 8) + 0.1 * batch(shape, 8), training=True)
        loss = tf.reduce_sum(answer * goal.normal(size=answer.shape).astype("float32"))
    for weight, gradient in zip(net.trainable_variables, tape.gradient(loss, net.trainable_variables)):
        assert gradient is not None and np.isfinite(gradient).all(), weight.path
        assert np.abs(gradient).max() > 0, weight.path


@each_case
def test_onnx_of_every_entry(built, name, shape, tmp_path):
    """Parity on noise and on a picture, and a batch size that is free."""
    import onnxruntime

    from medimg.deployment.engine import export_onnx
    net = built(name, shape)
    session = onnxruntime.InferenceSession(export_onnx(net, tmp_path / "m.onnx"))
    assert [i.name for i in session.get_inputs()] == ["images"] and [o.name for o in session.get_outputs()] == ["logits"]
    for x in (batch(shape, 1), batch(shape, 5), scene(shape, 3)):
        got, expected = session.run(None, {"images": x})[0], np.asarray(net(x, training=False))
        assert got.shape == expected.shape and np.abs(got - expected).max() <= 1e-4 * max(1, np.abs(expected).max())


@each_case
def test_wrong_ranks_are_refused(name, shape):
    for wrong in (shape[:-1], (*shape, 1, 1), (*shape[:-1], 0), (*shape[:-1], 1.5), "28"):
        if len(wrong) not in {axes.count(",") + (not axes.endswith(",)")) for axes in MODELS[name].axes} or wrong[-1] in (0, 1.5):
            with pytest.raises(ConfigError, match="input shape") as error:
                build_model(name, wrong, 3)
            assert MODELS[name].axes[0] in str(error.value)
    with pytest.raises(ConfigError, match="no option"):
        build_model(name, shape, 3, no_such_option=1)
    with pytest.raises(ConfigError, match="classes"):
        build_model(name, shape, 0)


# --- what they cost

def counted_by_tensorflow(model):
    """Floating-point operations of convolutions and matrix products, from the compiled graph by TensorFlow's profiler."""
    import tensorflow as tf
    from tensorflow.python.framework.convert_to_constants import convert_variables_to_constants_v2
    compiled = tf.function(lambda x: model(x, training=False)).get_concrete_function(tf.TensorSpec((1, *model.input_shape[1:])))
    options = tf.compat.v1.profiler.ProfileOptionBuilder.float_operation() | {"output": "none"}
    todo, total = [tf.compat.v1.profiler.profile(convert_variables_to_constants_v2(compiled).graph, options=options, cmd="op")], 0
    while todo:
        node = todo.pop()
        todo += list(node.children)
        total += node.float_ops * (node.name in ("Conv2D", "Conv3D", "DepthwiseConv2dNative", "MatMul", "BatchMatMulV2"))
    return total


@each_case
def test_flops_equal_tensorflow(built, name, shape):
    facts = costs.model_facts(built(name, shape))
    assert facts.uncounted == () and facts.parameters == built(name, shape).count_params()
    assert 0 < facts.peak_mb <= facts.training_mb
    if name != "cnn-rnn":       # the profiler cannot look into a loop; counted by hand below
        assert facts.flops == counted_by_tensorflow(built(name, shape))


@pytest.mark.parametrize("layer, gates", [("GRU", 3), ("LSTM", 4), ("SimpleRNN", 1)])
def test_recurrent_layers_by_hand(layer, gates):
    import keras
    x = keras.Input((7, 5))
    once = 7 * gates * (5 * 6 + 6 * 6)
    assert costs.model_facts(keras.Model(x, getattr(keras.layers, layer)(6)(x))).multiply_adds == once
    both = keras.layers.Bidirectional(getattr(keras.layers, layer)(6))
    assert costs.model_facts(keras.Model(x, both(x))).multiply_adds == 2 * once


def test_repeated_shared_and_nested_layers_by_hand():
    import keras
    x, dense = keras.Input((5, 8, 8, 2)), keras.layers.Dense(3)
    repeated = keras.layers.TimeDistributed(keras.layers.Conv2D(4, 3, padding="same"))(x)
    assert costs.model_facts(keras.Model(x, repeated)).multiply_adds == 5 * 64 * 9 * 2 * 4
    inner_in = keras.Input((8, 8, 2))
    inner = keras.Model(inner_in, keras.layers.Conv2D(4, 3)(inner_in))
    assert costs.model_facts(keras.Model(x, keras.layers.TimeDistributed(inner)(x))).multiply_adds == 5 * 36 * 9 * 2 * 4
    v = keras.Input((3,))
    twice = costs.model_facts(keras.Model(v, dense(dense(v))))
    assert (twice.multiply_adds, twice.parameters) == (18, 12)
    t = keras.Input((4, 4, 2))
    assert costs.model_facts(keras.Model(t, keras.layers.Conv2DTranspose(5, 3, strides=2)(t))).multiply_adds == 16 * 9 * 2 * 5
    folded = keras.ops.reshape(x, (-1, 8, 8, 2))
    assert costs.model_facts(keras.Model(x, keras.layers.Conv2D(4, 1)(folded))).multiply_adds == 5 * 64 * 2 * 4


def test_peak_memory_by_hand():
    """Two convolutions and a shortcut: while the second runs, its input, its output and the shortcut are alive."""
    import keras
    x = keras.Input((8, 8, 2))
    a = keras.layers.Conv2D(4, 1)(x)
    b = keras.layers.Conv2D(4, 1)(a)
    facts = costs.layer_facts(keras.Model(x, keras.layers.Add()([a, b])))
    assert [f.alive for f in facts] == [128, 128 + 256, 512, 768] and [f.values for f in facts] == [128, 256, 256, 256]


def test_what_cannot_be_counted_is_named():
    import keras
    x = keras.Input((6, 8))
    attended = keras.layers.MultiHeadAttention(2, 4, name="heads")(x, x)
    assert costs.model_facts(keras.Model(x, attended)).uncounted == ("heads",)
    with pytest.raises(ConfigError, match="no graph"):
        costs.model_facts(keras.Sequential([keras.layers.Dense(2)]))
    with pytest.raises(ConfigError, match="resnet"):
        costs.list_models(["resnett"])


def test_the_table_lists_the_registry():
    rows = costs.list_models(["resnet", "mlp-28"])
    assert [(row["name"], row["input"]) for row in rows] == [("resnet", (28, 28, 1)), ("resnet", MODELS["resnet"].volume_shape), ("mlp-28", (28,))]
    assert costs.models_table(rows).count("\n") == 4 and "6,666" in costs.models_table(rows)
    assert all(entry.kind in ("classification", "segmentation", "detection", "features") and entry.about for entry in MODELS.values())


def test_seed_decides_the_weights():
    a, b, c = (build_model("resnet", (28, 28, 1), 2, seed=s).get_weights() for s in (3, 3, 4))
    assert all(np.array_equal(x, y) for x, y in zip(a, b)) and not all(np.array_equal(x, y) for x, y in zip(a, c))


@pytest.mark.parametrize("name, shape, classes, options, said", [
    ("resnett", (28, 28, 1), 2, {}, "resnet"), ("resnet", (28, 28), 2, {}, "(28, 28)"), ("resnet", (8, 8, 1), 2, {}, "16 x 16"),
    ("resnet", (None, None, 1), 2, {}, "None"), ("resnet", (28, 28, 1), 2, {"widht": 8}, "width"), ("resnet", (28, 28, 1), 2, {"norm": "bach"}, "batch"),
    ("resnet", (28, 28, 1), 2, {"width": "wide"}, "width"), ("resnet", (28, 28, 1), 2, {"dropout": None}, "dropout"),
    ("mlp-28", (28, 28, 1), 10, {}, "(features,)"), ("mlp-28", (28,), 10, {"units": ()}, "units"), ("lung-ct-cnn", (32, 32, 1), 2, {"head": "gpa"}, "gap"),
    ("article-cnn", (32, 32, 3), 10, {"conv": {"filter": 3}}, "filters"), ("article-cnn", (32, 32, 3), 1, {}, "classes"),
    ("gated-cnn", (3, 3, 1), 2, {}, "(3, 3, 1)"), ("gated-cnn", (28, 28, 1), 2, {"activation": "sigmiod"}, "sigmiod")])
def test_what_cannot_be_built(name, shape, classes, options, said):
    with pytest.raises(ConfigError, match=re.escape(said)) as error:
        build_model(name, shape, classes, **options)
    assert "\n" not in str(error.value)


def test_options_are_honoured():
    net = build_model("article-cnn", (32, 32, 3), 10, conv={"filters": 8, "kernel_size": 5}, dense={"units": 16}, concatenate=True)
    assert net.count_params() == (25 * 3 * 8 + 8) + (16 * 16 + 16) + (16 * 10 + 10)
    assert net.get_layer("feature_map").activation.__name__ == "relu"


# --- gated pooling

def gate(y):
    """NumPy reference for one map (y, x)."""
    rows, columns = y.shape
    p = np.array([[y[i // 2 * 2:i // 2 * 2 + 2, j // 2 * 2:j // 2 * 2 + 2].max() for j in range(columns)] for i in range(rows)])
    return 2 * (y * (1 - p) + p)


@pytest.mark.parametrize("shape", [(8, 8), (7, 9), (1, 1), (2, 5)])
@pytest.mark.parametrize("activation", [None, "sigmoid"])
def test_gated_pooling_equals_numpy(shape, activation):
    x = np.random.default_rng(0).normal(size=(2, *shape, 3)).astype("float32")
    layer = networks.gated_pooling(2, kernel_size=1, activation=activation)
    out = np.asarray(layer(x))
    kernel, bias = layer.conv.get_weights()
    y = x.astype(float) @ kernel[0, 0] + bias
    y = 1 / (1 + np.exp(-y)) if activation else y
    expected = np.stack([[gate(y[n, ..., c]) for c in range(2)] for n in range(2)]).transpose(0, 2, 3, 1)
    assert np.abs(out - expected).max() < 1e-6 * max(1, np.abs(expected).max())
    assert not activation or 0 <= out.min() <= out.max() <= 2


@pytest.mark.parametrize("strides", [1, 2, 3])
def test_gated_pooling_shape(strides):
    layer = networks.GatedPooling(4, 3, strides)
    assert tuple(layer(batch((7, 10, 2))).shape) == layer.compute_output_shape((4, 7, 10, 2)) == (4, -(-7 // strides), -(-10 // strides), 4)
    again = networks.GatedPooling.from_config(layer.get_config())
    assert again.get_config() == layer.get_config()


# --- heat maps and the predictor

@pytest.mark.parametrize("name, shape, classes", [("resnet", (28, 28, 1), 2), ("resnet", (64, 48, 3), 5), ("gated-cnn", (29, 31, 1), 3)])
def test_mean_of_cam_plus_bias_is_the_logit(name, shape, classes):
    net = build_model(name, shape, classes, seed=2)
    net.get_layer("logits").bias.assign_add(np.full(net.get_layer("logits").bias.shape, 0.7))
    out = {key: np.asarray(value) for key, value in resnet.inference_model(net)(batch(shape)).items()}
    total = out["cam"].mean(axis=(1, 2)) + np.asarray(net.get_layer("logits").bias)
    assert np.abs(total - out["logits"]).max() <= 1e-5 * max(1, np.abs(out["cam"]).max())
    assert np.allclose(out["logits"], net(batch(shape)), atol=1e-6 * max(1, np.abs(out["logits"]).max()))
    assert out["cam"].shape[1:3] == net.get_layer("feature_map").output.shape[1:3]


def test_inference_model_shares_the_weights():
    net = build_model("resnet", (28, 28, 1), 2, seed=0)
    both = resnet.inference_model(net)
    before = np.asarray(both(batch((28, 28, 1)))["cam"])
    net.set_weights([w + 0.01 for w in net.get_weights()])
    after = both(batch((28, 28, 1)))
    assert not np.allclose(before, after["cam"]) and np.allclose(after["logits"], net(batch((28, 28, 1))), atol=1e-5)


@pytest.mark.parametrize("name", ["article-cnn", "mlp-28", "lung-ct-cnn"])
def test_no_cam_without_an_average_head(built, name):
    assert sorted(resnet.inference_model(built(name)).output) == ["features", "logits"]


@pytest.mark.parametrize("side", [28, 64, 128, 224])
def test_resnet_keeps_a_useful_map_and_stays_small(side):
    net = build_model("resnet", (side, side, 1), 2)
    assert 7 <= net.get_layer("feature_map").output.shape[1] <= 16 and net.count_params() < 300_000


def test_predictor_answers_alone_as_in_a_batch(built):
    predictor = resnet.KerasPredictor(build_model("resnet", (28, 28, 1), 2, seed=0), None, ("normal", "pneumonia"), batch_size=3)
    assert isinstance(predictor, networks.Predictor) and predictor.task == "binary"
    images = batch((28, 28), 7)
    p = predictor.predict(images)
    assert p.shape == (7, 2) and p.dtype == np.float64 and np.allclose(p.sum(axis=1), 1)
    assert np.allclose(p, np.concatenate([predictor.predict(images[i:i + 1]) for i in range(7)]), atol=1e-6)
    assert predictor.features(images).shape == (7, 64) and predictor.cam(images).shape == (7, 7, 7, 1)
    with pytest.raises(ConfigError, match="no class-activation map"):
        resnet.KerasPredictor(built("mlp-28"), None, ("a", "b", "c")).cam(batch((28,)))


@pytest.mark.parametrize("images, said", [(np.zeros((2, 32, 32)), "32"), (np.zeros((2, 28, 28, 3)), "3"), (np.zeros((0, 28, 28)), "no image"),
                                          (np.full((2, 28, 28), np.nan), "2 images"), (np.zeros((28, 28)), "28")])
def test_predictor_refuses(images, said):
    predictor = resnet.KerasPredictor(build_model("resnet", (28, 28, 1), 2), None, ("a", "b"))
    with pytest.raises(MedimgError, match=said):
        predictor.predict(images)


@pytest.mark.parametrize("name", ["resnet", "gated-cnn"])
def test_onnx_gives_the_same_numbers(name, tmp_path):
    import onnxruntime
    shape = SMALL[name][0]
    net = resnet.inference_model(build_model(name, shape, 3, seed=0))
    net(batch(shape, 1))      # Keras exports only what was called once
    net.export(tmp_path / "m.onnx", format="onnx", verbose=False)
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx")
    for n in (1, 5):
        x = batch(shape, n)
        expected = sorted((np.asarray(v) for v in net(x, training=False).values()), key=lambda v: v.shape)
        got = sorted(session.run(None, {session.get_inputs()[0].name: x}), key=lambda v: v.shape)
        for a, b in zip(got, expected):
            assert a.shape == b.shape and np.abs(a - b).max() <= 1e-4 * max(1, np.abs(b).max())
    assert (tmp_path / "m.onnx").stat().st_size < 1_300_000


def test_broken_model_files_are_refused(tmp_path):
    net = build_model("mlp-28", (28,), 10)
    net.save(tmp_path / "m.keras")
    whole = (tmp_path / "m.keras").read_bytes()
    for name, data in (("cut.keras", whole[:300]), ("empty.keras", b"")):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ConfigError, match=name):
            load_model(tmp_path / name)


def test_a_lambda_layer_is_refused(tmp_path):
    import keras
    x = keras.Input((4,))
    keras.Model(x, keras.layers.Lambda(lambda v: v + 1)(x)).save(tmp_path / "evil.keras")
    with pytest.raises(ConfigError, match="evil.keras"):
        load_model(tmp_path / "evil.keras")


def test_importing_loads_no_keras():
    code = "import sys, medimg.models.networks, medimg.models.resnet; assert not {'keras', 'tensorflow'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
