"""Networks over slices and recurrence by hand: Keras and NumPy as oracles, padding, order, saving, ONNX, pointing, refusals."""
import numpy as np
import pytest

from medimg.errors import ConfigError, MedimgError
from medimg.models.networks import build_model, load_model
from medimg.models.recurrence import gru_step, lstm_step, recur
from medimg.models.sequence import attention_mil, attention_model, cnn_rnn, leave_one_out, pointing

SHAPE = (5, 16, 16, 1)
BUILDS = {"mean": ("mil", {"pooling": "mean"}), "max": ("mil", {"pooling": "max"}), "attention": ("mil", {"pooling": "attention"}), "gated": ("mil", {}),
          "gru": ("cnn-rnn", {}), "lstm": ("cnn-rnn", {"cell": "lstm", "memory": 2.0}), "plain": ("cnn-rnn", {"cell": "rnn", "bidirectional": False}),
          "gru-gated": ("cnn-rnn", {"read": "gated"}), "lstm-max": ("cnn-rnn", {"cell": "lstm", "read": "max", "bidirectional": False})}
BAGS = ("mean", "max", "attention", "gated")


@pytest.fixture(scope="module")
def nets():
    return {name: build_model(net, SHAPE, 3, seed=0, filters=(4, 8), units=6, **options) for name, (net, options) in BUILDS.items()}


@pytest.fixture(scope="module")
def scans():
    """Four scans of 5, 5, 3 and 1 slices; the rest is padding."""
    x = np.random.default_rng(0).random((4, *SHAPE), dtype=np.float32)
    x[2, 3:] = x[3, 1:] = 0
    return x


# --- recurrence by hand

@pytest.mark.parametrize("cell, options", [("rnn", {}), ("gru", {}), ("gru", {"reset_after": False}), ("lstm", {}), ("lstm", {"unit_forget_bias": False})])
@pytest.mark.parametrize("masked", [False, True])
def test_cells_equal_keras(cell, options, masked):
    import keras
    rng = np.random.default_rng(1)
    x, mask = rng.normal(size=(3, 25, 4)).astype(np.float32), rng.random((3, 25)) > 0.3
    layer = {"rnn": keras.layers.SimpleRNN, "gru": keras.layers.GRU, "lstm": keras.layers.LSTM}[cell](6, return_sequences=True, return_state=True, **options)
    theirs, *state = layer(x, mask=mask if masked else None)
    layer.set_weights([rng.normal(0, 0.5, w.shape) for w in layer.get_weights()])
    theirs, *state = (np.asarray(a) for a in layer(x, mask=mask if masked else None))
    ours = recur(cell, x, layer.get_weights(), mask=mask if masked else None)
    assert np.abs(ours[..., :6] - theirs).max() < 1e-5
    assert np.abs(ours[:, -1] - np.concatenate(state, axis=1)).max() < 1e-5        # the LSTM's cell too


def test_gates_by_hand():
    """One number, no matrices: the update gate is a weighted mean, the forget gate a decay."""
    zero = np.zeros((1, 3))
    for bias in (-2.0, 0.0, 3.0):
        keep = 1 / (1 + np.exp(-bias))
        assert np.isclose(gru_step([[0.0]], np.array([[0.8]]), [zero, zero, np.array([[bias, 0, 0], [0, 0, 0.0]])])[0, 0], keep * 0.8)
        forget = [np.zeros((1, 4)), np.zeros((1, 4)), np.array([-50.0, bias, 0, 0])]
        assert np.isclose(lstm_step(np.ones((1, 1)), np.array([[0.0, 5.0]]), forget)[0, 1], keep * 5)


def test_gradient_of_the_gru_equals_tensorflow():
    import keras
    import tensorflow as tf
    keras.utils.set_random_seed(0)
    layer = keras.layers.GRU(5)
    x = tf.constant(np.random.default_rng(2).normal(size=(1, 12, 3)), tf.float32)
    with tf.GradientTape() as tape:
        tape.watch(x)
        y = tf.reduce_sum(layer(x))
    theirs, weights, x = tape.gradient(y, x).numpy()[0], [w.astype(float) for w in layer.get_weights()], x.numpy().astype(float)
    ours = np.zeros_like(theirs)
    for t, k in np.ndindex(12, 3):
        nudge = np.zeros_like(x)
        nudge[0, t, k] = 1e-5
        ours[t, k] = (recur("gru", x + nudge, weights)[0, -1].sum() - recur("gru", x - nudge, weights)[0, -1].sum()) / 2e-5
    assert np.abs(ours - theirs).max() < 1e-5 and np.abs(theirs).max() > 1e-2


@pytest.mark.parametrize("cell, change", [("gruu", {}), ("gru", {"x": np.zeros((2, 3))}), ("gru", {"x": np.zeros((2, 0, 3))}), ("gru", {"x": np.zeros((2, 4, 2))}),
                                          ("gru", {"x": np.full((2, 4, 3), np.nan)}), ("gru", {"mask": np.ones((2, 5), bool)})])
def test_recur_refuses(cell, change):
    weights = [np.zeros((3, 6)), np.zeros((2, 6)), np.zeros((2, 6))]
    with pytest.raises(MedimgError):
        recur(cell, **{"x": np.zeros((2, 4, 3)), "weights": weights} | change)


# --- the networks

def test_attention_equals_the_formula(nets, scans):
    """Softmax of w(tanh(Vh) * sigmoid(Uh)) over real slices, in float64."""
    import keras
    net = nets["gated"]
    h = np.asarray(keras.Model(net.inputs[0], net.get_layer("instances").output)(scans), float)
    (v, bv), (u, bu), (w,) = (net.get_layer(f"attention_{part}").get_weights() for part in ("tanh", "gate", "score"))
    score = (np.tanh(h @ v + bv) / (1 + np.exp(-(h @ u + bu))) @ w)[..., 0]
    e = np.where(scans.any(axis=(2, 3, 4)), np.exp(score), 0)
    expected = e / e.sum(axis=1, keepdims=True)
    seen = attention_model(net)(scans)
    assert np.abs(seen["attention"] - expected).max() < 1e-5
    kernel, bias = net.get_layer("logits").get_weights()
    assert np.abs(seen["logits"] - ((expected[..., None] * h).sum(axis=1) @ kernel + bias)).max() < 1e-4


@pytest.mark.parametrize("name", ["gated", "attention", "gru-gated"])
def test_contributions_add_up_to_the_logit(nets, scans, name):
    seen = {k: np.asarray(v) for k, v in attention_model(nets[name])(scans).items()}
    bias = nets[name].get_layer("logits").get_weights()[1]
    assert np.abs(seen["contributions"].sum(axis=1) + bias - seen["logits"]).max() < 1e-5
    assert np.allclose(seen["attention"].sum(axis=1), 1, atol=1e-6) and not seen["attention"][2, 3:].any()
    assert np.array_equal(seen["logits"], nets[name](scans))


@pytest.mark.parametrize("name", BUILDS)
def test_padding_changes_nothing(nets, scans, name):
    """The same weights in a network for more slices, padding at the end, before, and between."""
    net, options = BUILDS[name]
    longer = build_model(net, (8, *SHAPE[1:]), 3, filters=(4, 8), units=6, **options)
    longer.set_weights(nets[name].get_weights())
    for places in ([0, 1, 2, 3, 4], [3, 4, 5, 6, 7], [0, 2, 3, 5, 7]):
        wide = np.zeros((4, 8, *SHAPE[1:]), np.float32)
        wide[:, places] = scans
        assert np.abs(np.asarray(longer(wide)) - nets[name](scans)).max() < 1e-5, places


@pytest.mark.parametrize("name", BUILDS)
def test_only_sequences_know_the_order(nets, scans, name):
    same = np.allclose(nets[name](scans[:2]), nets[name](scans[:2, ::-1]), atol=1e-5)
    assert same == (name in BAGS)


@pytest.mark.parametrize("name", BUILDS)
def test_nothing_but_padding_is_answered_with_numbers(nets, name):
    assert np.isfinite(nets[name](np.zeros((2, *SHAPE), np.float32))).all()


@pytest.mark.parametrize("name", BUILDS)
def test_saved_and_loaded_is_the_same(nets, scans, name, tmp_path):
    nets[name].save(tmp_path / "m.keras")
    again = load_model(tmp_path / "m.keras")
    assert np.array_equal(again(scans), nets[name](scans)) and again.input.name == "images"
    assert again.get_layer("features").output.shape[1:] == again.get_layer("logits").input.shape[1:]


@pytest.mark.parametrize("name", ["max", "gated", "gru", "lstm", "lstm-max"])
def test_onnx_gives_the_same_numbers(nets, scans, name, tmp_path):
    ort = pytest.importorskip("onnxruntime", reason="pip install onnxruntime to test the export")
    from medimg.deployment.engine import export_onnx
    session = ort.InferenceSession(str(export_onnx(nets[name], tmp_path / "m.onnx")), providers=["CPUExecutionProvider"])
    for n in (1, 3, 4):
        (logits,) = session.run(["logits"], {"images": scans[:n]})
        assert np.abs(logits - np.asarray(nets[name](scans[:n]))).max() < 1e-4


def test_memory_sets_the_gate_only():
    for cell, gate in (("gru", (0, slice(6))), ("lstm", slice(6, 12))):
        layer = cnn_rnn(SHAPE, 2, cell=cell, units=6, memory=3.5, filters=(4,)).get_layer("recurrence")
        for part in (layer.forward_layer, layer.backward_layer):
            bias = part.get_weights()[2]
            assert (bias[gate] == 3.5).all() and (bias == 3.5).sum() == 6


# --- localisation

@pytest.mark.parametrize("name", ["max", "gated", "gru", "lstm-max"])
def test_leave_one_out_equals_blanked_slices(nets, scans, name):
    """The short way, from the slices' vectors, against the long way: blank the slice and ask the whole network."""
    ours, whole = leave_one_out(nets[name], scans), np.asarray(nets[name](scans))
    for k in range(SHAPE[0]):
        without = scans.copy()
        without[:, k] = 0
        assert np.abs(ours[:, k] - (whole - np.asarray(nets[name](without)))).max() < 1e-5


def test_pointing_counts_ties_by_their_share():
    lesion = np.array([[0, 1, 1, 0], [1, 0, 0, 0], [0, 0, 1, 0]], bool)
    real = np.array([[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0]], bool)
    hits, chance = pointing([[0, 0, 5, 1], [2, 2, 9, 9], [1, 2, 0, 7]], lesion, real=real)
    assert hits.tolist() == [1.0, 0.5, 0.0] and np.allclose(chance, [0.5, 0.5, 1 / 3])


def test_pointing_at_random_is_chance():
    rng = np.random.default_rng(0)
    lesion = rng.random((4000, 12)) < 0.2
    lesion[:, 3] |= ~lesion.any(axis=1)
    hits, chance = pointing(rng.random(lesion.shape), lesion)
    assert abs(hits.mean() - chance.mean()) < 4 * np.sqrt(0.25 / 4000)


def test_a_predictor_answers_scans(nets, scans):
    from medimg.models.resnet import KerasPredictor
    predictor = KerasPredictor(nets["gated"], None, ("clear", "nodule", "mass"))
    p = predictor.predict(scans[..., 0])
    assert p.shape == (4, 3) and np.allclose(p.sum(axis=1), 1) and predictor.features(scans).shape == (4, 8)
    with pytest.raises(MedimgError, match="NaN"):
        predictor.predict(np.full((1, *SHAPE), np.nan))


# --- refusals

@pytest.mark.parametrize("build, shape, options, said", [
    (attention_mil, (16, 16, 1), {}, "slices, y, x, channels"), (cnn_rnn, (5, None, 16, 1), {}, "whole numbers"), (cnn_rnn, (5, 4, 16, 1), {}, "8 x 8"),
    (attention_mil, SHAPE, {"pooling": "maxx"}, "did you mean max"), (cnn_rnn, SHAPE, {"cell": "lsmt"}, "lstm"), (cnn_rnn, SHAPE, {"read": "end"}, "end"),
    (cnn_rnn, SHAPE, {"units": 0}, "units"), (cnn_rnn, SHAPE, {"dropout": 1.0}, "dropout"), (attention_mil, SHAPE, {"filters": ()}, "filters"),
    (cnn_rnn, SHAPE, {"cell": "rnn", "memory": 4}, "gate"), (attention_mil, SHAPE, {"norm": "bach"}, "batch")])
def test_what_cannot_be_built(build, shape, options, said):
    with pytest.raises(ConfigError, match=said) as error:
        build(shape, 2, **options)
    assert "\n" not in str(error.value)


def test_localisation_refuses(nets):
    with pytest.raises(ConfigError, match="no attention"):
        attention_model(nets["max"])
    with pytest.raises(ConfigError, match="does not read slices"):
        leave_one_out(build_model("mlp-28", (28,), 2), np.zeros((1, 28)))
    for scores, lesion in ((np.zeros((2, 3)), np.ones((2, 4))), (np.zeros((1, 3)), np.zeros((1, 3))), (np.full((1, 3), np.nan), np.ones((1, 3)))):
        with pytest.raises(MedimgError):
            pointing(scores, lesion)
