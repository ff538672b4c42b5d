"""The networks: shapes, counts by hand, NumPy oracles, saving, export, and refusals."""
import re
import subprocess
import sys

import numpy as np
import pytest

from medimg.errors import ConfigError, MedimgError
from medimg.models import networks, resnet
from medimg.models.networks import MODELS, build_model, load_model, task_of, to_probability

SMALL = {"resnet": (28, 28, 1), "article-cnn": (32, 32, 3), "gated-cnn": (29, 31, 1), "mlp-28": (28,), "lung-ct-cnn": (32, 32, 3)}


@pytest.fixture(scope="module")
def built():
    """Each network once, small, three classes, seed 0."""
    return {name: build_model(name, shape, 3, seed=0) for name, shape in SMALL.items()}


def batch(shape, n=4, seed=0):
    return np.random.default_rng(seed).random((n, *shape), dtype=np.float32)


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
    "resnet": 151_697,
    "article-cnn": (9 * 3 * 32 + 32) + (32 * 128 + 128) + (128 * 10 + 10),
    "gated-cnn": (9 * 32 + 32) + 4 * 32 + (9 * 32 * 64 + 64) + 65,
    "mlp-28": (28 * 64 + 64) + (64 * 64 + 64) + (64 * 10 + 10),
    "lung-ct-cnn": (9 * 3 * 32 + 32) + (9 * 32 * 64 + 64) + (62 * 62 * 64 * 128 + 128) + 129,
}


@pytest.mark.parametrize("name", MODELS)
def test_parameters_by_hand(name):
    entry = MODELS[name]
    assert build_model(name, entry.input_shape, entry.classes).count_params() == FULL_COUNTS[name]


@pytest.mark.parametrize("name", MODELS)
def test_shapes_and_names(built, name):
    net = built[name]
    assert net.output_shape == (None, 3) and net.input.name == "images"
    assert net.get_layer("features").output.shape[1:] == net.get_layer("logits").input.shape[1:]
    assert name == "mlp-28" or len(net.get_layer("feature_map").output.shape) == 4
    assert np.isfinite(np.asarray(net(batch(SMALL[name])))).all()
    assert build_model(name, SMALL[name], 2).output_shape == (None, 1)
    assert build_model(name, SMALL[name], 2, task="multiclass").output_shape == (None, 2)


@pytest.mark.parametrize("name", MODELS)
def test_saved_and_loaded_is_the_same(built, name, tmp_path):
    built[name].save(tmp_path / "m.keras")
    again = load_model(tmp_path / "m.keras")
    assert np.array_equal(again(batch(SMALL[name])), built[name](batch(SMALL[name])))
    assert [layer.name for layer in again.layers] == [layer.name for layer in built[name].layers]


@pytest.mark.parametrize("name", MODELS)
def test_gradients_reach_every_weight(name):
    import tensorflow as tf
    net = build_model(name, SMALL[name], 3, seed=1)
    with tf.GradientTape() as tape:
        loss = tf.nn.sparse_softmax_cross_entropy_with_logits(np.arange(8) % 3, net(batch(SMALL[name], 8), training=True))
    for weight, gradient in zip(net.trainable_variables, tape.gradient(loss, net.trainable_variables)):
        assert gradient is not None and np.isfinite(gradient).all(), weight.path
        assert np.abs(gradient).max() > 0, weight.path


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
    assert sorted(resnet.inference_model(built[name]).output) == ["features", "logits"]


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
        resnet.KerasPredictor(built["mlp-28"], None, ("a", "b", "c")).cam(batch((28,)))


@pytest.mark.parametrize("images, said", [(np.zeros((2, 32, 32)), "32"), (np.zeros((2, 28, 28, 3)), "3"), (np.zeros((0, 28, 28)), "no image"),
                                          (np.full((2, 28, 28), np.nan), "2 images"), (np.zeros((28, 28)), "28")])
def test_predictor_refuses(images, said):
    predictor = resnet.KerasPredictor(build_model("resnet", (28, 28, 1), 2), None, ("a", "b"))
    with pytest.raises(MedimgError, match=said):
        predictor.predict(images)


@pytest.mark.parametrize("name", ["resnet", "gated-cnn"])
def test_onnx_gives_the_same_numbers(name, tmp_path):
    import onnxruntime
    net = resnet.inference_model(build_model(name, SMALL[name], 3, seed=0))
    net(batch(SMALL[name], 1))      # Keras exports only what was called once
    net.export(tmp_path / "m.onnx", format="onnx", verbose=False)
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx")
    for n in (1, 5):
        x = batch(SMALL[name], n)
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
