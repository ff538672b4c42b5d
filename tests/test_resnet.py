"""The default network and its heads: graph of the shipped bundles, volumes against their flat twin, grades against plain formulas, unknown labels."""
import re

import numpy as np
import pytest

from medimg.errors import ConfigError, DatasetError, MedimgError
from medimg.models import heads, resnet
from medimg.models.networks import build_model, load_model, to_probability


@pytest.fixture(scope="module")
def keras():
    from medimg.models.networks import _keras
    return _keras()


def noise(*shape, seed=0):
    return np.random.default_rng(seed).random(shape, dtype=np.float32)


# ---- the graph that shipped bundles were trained with ------------------------------------------------------------------------------
@pytest.mark.parametrize("name, side", [("pneumonia", 28), ("phantom-cxr", 64)])
def test_the_shipped_networks_are_still_the_same_graph(name, side):
    from medimg.reproduction import shipped_result
    from medimg.training.recipes import recipe
    from medimg.training.trainer import _digest
    net = build_model("resnet", (side, side, 1), 2, seed=0, **recipe(name).model_options)
    layers = [[type(layer).__name__, {k: v for k, v in layer.get_config().items() if k not in ("name", "layers", "input_layers", "output_layers")},
               [tuple(w.shape) for w in layer.weights]] for layer in net.layers]
    assert _digest(layers) == shipped_result(name)["fingerprint"]["model"]


def test_names_of_layers_stay():
    names = [layer.name for layer in build_model("resnet", (28, 28, 1), 2, blocks=(1, 1)).layers]
    assert names == ["images", "stem_conv", "s1b1a_norm", "s1b1a_relu", "s1b1a_conv", "s1b1b_norm", "s1b1b_relu", "s1b1b_conv", "s1b1_add",
                     "s2b1a_norm", "s2b1a_relu", "s2b1a_conv", "s2b1b_norm", "s2b1_average", "s2b1b_relu", "s2b1_mix", "s2b1b_conv", "s2b1_add",
                     "last_norm", "feature_map", "features", "dropout", "logits"]


def by_hand(rank, channels=1, width=16, blocks=(1, 1, 2), units=1):
    taps, c = 3**rank, width
    total = taps * channels * width
    for i, count in enumerate(blocks):
        for _ in range(count):
            w = width * 2**i
            total, c = total + 4 * c + taps * c * w + 4 * w + taps * w * w + (c * w if c != w else 0), w
    return total + 4 * c + c * units + units


@pytest.mark.parametrize("shape, options", [((28, 28, 1), {}), ((64, 48, 3), {"width": 8, "blocks": (2, 1)}), ((28, 28, 28, 1), {}),
                                            ((16, 20, 24, 2), {"width": 8, "blocks": (1, 1)})])
def test_parameters_by_hand(shape, options):
    net = build_model("resnet", shape, 3, **options)
    assert net.count_params() == by_hand(len(shape) - 1, shape[-1], units=3, **options)
    assert net.get_layer("feature_map").output.shape[1:-1] == tuple(-(-s // (2 if min(shape[:-1]) >= 48 else 1) // 2 ** (len(options.get("blocks", (1, 1, 2))) - 1)) for s in shape[:-1])


# ---- volumes -----------------------------------------------------------------------------------------------------------------------
def lifted(kernel):
    out = np.zeros((kernel.shape[0], *kernel.shape), kernel.dtype)
    out[kernel.shape[0] // 2] = kernel
    return out


@pytest.mark.parametrize("options", [{}, {"pool": "blur", "squeeze": 4, "norm": "group", "stem": 2}, {"skip": False, "norm": "instance"}])
def test_a_volume_network_that_ignores_z_is_the_flat_one(options):
    flat, deep = (build_model("resnet", shape, 3, seed=s, width=8, **options) for s, shape in enumerate([(28, 24, 1), (16, 28, 24, 1)]))
    weights = [w + 0.1 * noise(*w.shape, seed=5) for w in flat.get_weights()]       # biases and averages off zero, too
    flat.set_weights(weights)
    deep.set_weights([lifted(w) if w.ndim == 4 else w for w in weights])
    slices = noise(2, 28, 24, 1)
    volume, expected = np.repeat(slices[:, None], 16, axis=1), np.asarray(flat(slices))
    assert np.allclose(deep(volume), expected, atol=1e-4 * max(1, np.abs(expected).max()))


@pytest.mark.parametrize("shape, options", [((20, 24, 28, 1), {}), ((28, 28, 3), {"task": "ordinal", "grades": "corn"}), ((28, 28, 3), {"task": "ordinal", "grades": "cumulative"}),
                                            ((16, 16, 16, 1), {"task": "ordinal", "grades": "cumulative", "pool": "blur", "squeeze": 8})])
def test_map_adds_up_and_onnx_agrees(shape, options, tmp_path):
    from medimg.deployment.engine import Engine, export_onnx, parity
    net = build_model("resnet", shape, 4, seed=1, width=8, **options)
    both, x = resnet.inference_model(net), noise(9, *shape, seed=2)
    out = {k: np.asarray(v) for k, v in both(x).items()}
    linear = net.get_layer("score" if "grades" in options else "logits")
    expected, mean = out["features"] @ np.asarray(linear.kernel), out["cam"].mean(axis=tuple(range(1, len(shape))))
    assert out["cam"].shape == (9, *net.get_layer("feature_map").output.shape[1:-1], 4)
    assert np.allclose(mean[:, -3:] if "grades" in options else mean, expected, atol=1e-4)          # one severity is every step's evidence
    assert "grades" not in options or np.allclose(mean[:, 0], -expected[:, 0], atol=1e-4)
    engine = Engine(export_onnx(both, tmp_path / "m.onnx"))
    assert set(engine.outputs) == {"logits", "features", "cam"} and parity(both, engine, x) < 1e-4
    net.save(tmp_path / "m.keras")
    assert np.array_equal(load_model(tmp_path / "m.keras")(x), net(x))


def test_predictor_answers_volumes():
    predictor = resnet.KerasPredictor(build_model("resnet", (16, 18, 20, 1), 3, seed=0, width=8), None, "abc", batch_size=2)
    x = noise(3, 16, 18, 20)
    assert np.allclose(predictor.predict(x), predictor.predict(x[..., None])) and predictor.cam(x).shape[:-1] == (3, 4, 5, 5)
    for bad in (x[:, :15], noise(3, 16, 18, 20, 2), np.full_like(x, np.nan), x[:0]):
        with pytest.raises(MedimgError):
            predictor.predict(bad)


def test_a_network_with_broken_weights_says_so():
    net = build_model("resnet", (16, 16, 1), 2, width=8, blocks=(1,))
    net.set_weights([np.full_like(w, np.nan) for w in net.get_weights()])
    with pytest.raises(MedimgError, match="NaN"):
        resnet.KerasPredictor(net, None, ("a", "b")).predict(noise(2, 16, 16))


@pytest.mark.parametrize("shape, options, said", [
    ((28, 28, 1), {"stem": 3}, "stem is 3"), ((28, 28, 1), {"pool": "blurr"}, "blur"), ((28, 28, 1), {"grades": "corn"}, 'task="ordinal"'),
    ((28, 28, 1), {"grades": "corm", "task": "ordinal"}, "corn"), ((8, 28, 28, 1), {}, "(8, 28, 28, 1)"), ((28, 28, 28, 28, 1), {}, "(28, 28, 28, 28, 1)"),
    ((28, 28, 1), {"squeeze": -1}, "-1"), ((28,), {}, "(28,)")])
def test_what_cannot_be_built(shape, options, said):
    with pytest.raises(ConfigError, match=re.escape(said)):
        build_model("resnet", shape, 3, **options)


def test_blur_makes_a_shift_matter_less():
    image = noise(4, 32, 32, 1)
    def change(pool, seed):
        net = build_model("resnet", (32, 32, 1), 2, seed=seed, width=8, blocks=(1, 1, 1), pool=pool)
        logits = [np.asarray(net(np.roll(image, k, axis=1))) for k in (0, 1)]
        return np.abs(logits[0] - logits[1]).mean() / np.abs(logits[0]).mean()
    assert np.mean([change("blur", s) for s in range(4)]) < np.mean([change("average", s) for s in range(4)])


# ---- heads of grades ---------------------------------------------------------------------------------------------------------------
def head_of(keras, grades, classes=5, features=4):
    x = keras.Input((features,), name="images")
    return keras.Model(x, heads.classifier_head(x, classes, task="ordinal", grades=grades))


@pytest.mark.parametrize("scale", [1, 20, 300])
def test_chain_is_the_product_of_its_questions(keras, scale):
    from scipy.special import expit, log_expit
    net, z = head_of(keras, "corn"), np.random.default_rng(0).normal(0, scale, (50, 4)).astype("float32")
    net.get_layer("score").set_weights([np.eye(4), np.zeros(4)])
    logits = np.asarray(net(z), float)
    wanted = np.c_[np.zeros(50), np.cumsum(log_expit(z.astype(float)), axis=1)] + np.c_[log_expit(-z.astype(float)), np.zeros(50)]
    assert np.allclose(logits, wanted, rtol=1e-5, atol=1e-4)
    p, share = to_probability(logits, "ordinal"), expit(z.astype(float))
    passed = np.c_[np.ones(50), np.cumprod(share, axis=1)]
    assert np.allclose(p, passed * np.c_[1 - share, np.ones(50)], atol=1e-5) and np.allclose(p.sum(axis=1), 1)


def test_cuts_are_differences_of_sigmoids(keras):
    from scipy.special import expit
    net, rng = head_of(keras, "cumulative"), np.random.default_rng(1)
    free = rng.normal(0, 2, (1, 4)).astype("float32")
    net.get_layer("score").set_weights([np.ones((4, 1))])
    net.get_layer("cuts").set_weights([free])
    cuts = np.cumsum(np.r_[free[0, 0] - 1.5, np.logaddexp(0, free[0, 1:] + 0.541)])
    s = rng.normal(0, 3, (40, 4)).astype("float32")
    below = expit(cuts - s.sum(axis=1, keepdims=True).astype(float))
    p = to_probability(np.asarray(net(s)), "ordinal")
    assert np.allclose(p, np.diff(np.c_[np.zeros(40), below, np.ones(40)], axis=1), atol=1e-5) and (np.diff(cuts) > 0).all()
    assert np.isfinite(np.asarray(net(1000 * s))).all()


def test_cross_entropy_of_the_chain_is_corns_loss(keras):
    """Σ over questions of the binary cross-entropy of those who were asked: the loss as the authors write it, not averaged by question."""
    z, y = np.random.default_rng(2).normal(0, 2, (30, 4)).astype("float32"), np.arange(30) % 5
    net = head_of(keras, "corn")
    net.get_layer("score").set_weights([np.eye(4), np.zeros(4)])
    ours = float(keras.losses.SparseCategoricalCrossentropy(from_logits=True, reduction="sum")(y, net(z)))
    theirs = sum(np.logaddexp(0, -a if label > k else a) for row, label in zip(z.astype(float), y) for k, a in enumerate(row) if label >= k)
    assert abs(ours - theirs) < 1e-3


def test_ordered_heads_learn_an_order(keras):
    """On grades of one hidden severity with noise both heads come near the truth; gradients reach all their weights."""
    from medimg.training.loop import train_steps
    from medimg.training.record import TrainConfig
    from medimg.training.trainer import make_loss
    rng = np.random.default_rng(0)
    x = rng.normal(size=(512, 4)).astype("float32")
    y = np.digitize(x @ [1.0, -1, 0.5, 0] + 0.3 * rng.normal(size=512), [-1.5, -0.5, 0.5, 1.5])
    for grades in ("corn", "cumulative"):
        net = head_of(keras, grades)
        before = [w.copy() for w in net.get_weights()]
        train_steps(net, lambda step: (x, y), make_loss("ordinal"), steps=200, config=TrainConfig(learning_rate=0.1, weight_decay=0.0), progress=False)
        p = to_probability(np.asarray(net(x)), "ordinal")
        assert np.mean(np.abs(p @ np.arange(5) - y)) < 0.45 and all((a != b).any() for a, b in zip(before, net.get_weights()))


# ---- unknown labels ----------------------------------------------------------------------------------------------------------------
def test_masked_loss_equals_keras_where_all_is_known(keras):
    a, y = np.random.default_rng(0).normal(0, 5, (7, 3)).astype("float32"), np.random.default_rng(1).integers(0, 2, (7, 3)).astype("float32")
    for smoothing in (0.0, 0.2):
        theirs = keras.losses.BinaryCrossentropy(from_logits=True, label_smoothing=smoothing)(y, a)
        assert np.allclose(float(heads.masked_loss(smoothing=smoothing)(y, a)), float(theirs), rtol=1e-5)
    weighted = np.mean([np.logaddexp(0, -t if s else t) * (w if s else 1) for row, truth in zip(a.astype(float), y) for t, s, w in zip(row, truth, (1, 2, 5))])
    assert np.allclose(float(heads.masked_loss(weights=[1, 2, 5])(y, a)), weighted, rtol=1e-5)


def test_unknown_labels_pull_at_nothing(keras):
    import tensorflow as tf
    y, a = np.array([[1, np.nan], [np.nan, 0]], "float32"), tf.Variable([[0.5, 80.0], [-80.0, 2.0]])
    with tf.GradientTape() as tape:
        value = heads.masked_loss()(y, a)
    gradient = np.asarray(tape.gradient(value, a))
    assert np.allclose(gradient, [[(1 / (1 + np.exp(-0.5)) - 1) / 2, 0], [0, 1 / (1 + np.exp(-2.0)) / 2]], atol=1e-6)
    assert np.allclose(float(value), (np.logaddexp(0, -0.5) + np.logaddexp(0, 2.0)) / 2)
    assert float(heads.masked_loss()(np.full((2, 2), np.nan, "float32"), np.ones((2, 2), "float32"))) == 0


def test_positive_weights():
    assert heads.positive_weights([[1, 0, np.nan]] + [[0, 0, 1]] * 30).tolist() == [20.0, 1.0, 1.0]
    for bad in ([0, 1], np.zeros((0, 3)), [[2, 0]], [[0.5]]):
        with pytest.raises(DatasetError):
            heads.positive_weights(bad)
    with pytest.raises(ConfigError):
        heads.masked_loss(smoothing=1.0)


# ---- the experiments' parts --------------------------------------------------------------------------------------------------------
def test_two_off_counts_grades():
    from medimg.experiments.classifiers import two_off
    y, z = np.random.default_rng(0).integers(0, 5, (2, 300))
    assert two_off(y, z) == np.mean(np.abs(y - z) > 1) and two_off(y, y) == 0


def test_drawer_takes_each_image_once_an_epoch():
    from medimg.data.pipeline import Tensors
    from medimg.training.loop import drawer
    few = Tensors(noise(10, 4, 4, 1), np.arange(10), np.array([f"{i:02x}" for i in range(10)]))
    draw = drawer(few, batch_size=5, seed=3, augment=True)
    first, second = ([draw(2 * e + k)[1] for k in (0, 1)] for e in (0, 1))
    assert sorted(np.concatenate(first).tolist()) == list(range(10)) and np.concatenate(first).tolist() != np.concatenate(second).tolist()
    assert np.array_equal(draw(1)[0], drawer(few, batch_size=5, seed=3, augment=True)(1)[0])
    with pytest.raises(ConfigError):
        drawer(few, batch_size=11)


def test_hidden_labels():
    from medimg.experiments.classifiers import hidden
    y = np.random.default_rng(0).integers(0, 2, (400, 5))
    masked, no = hidden(y, 0.5), hidden(y, 0.5, silence="no")
    known = ~np.isnan(masked)
    assert 0.45 < known.mean() < 0.55 and np.array_equal(masked[known], y[known]) and np.array_equal(no, np.where(known, y, 0))
    assert np.array_equal(hidden(y, 0.0), y)


@pytest.mark.parametrize("name, figures", [("resnet-ablation", ("retinamnist: no shortcuts",)), ("nih-findings", ("macro auc, half known, masked",))])
def test_experiments_run_on_phantoms(name, figures, tmp_path):
    from medimg.experiments.protocol import run_experiment
    result = run_experiment(name, profile="ci", data="phantom", out=tmp_path, progress=False)
    for key in figures:
        assert np.isfinite(result["figures"][key]["value"]) and result["figures"][key]["low"] <= result["figures"][key]["high"]
    assert (tmp_path / "test_reads.jsonl").exists() == (name != "resnet-ablation")      # the ablation looks at no test image
