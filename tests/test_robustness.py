"""Attacks against closed forms and the Adversarial Robustness Toolbox, corruptions against what is known by hand, training against attacks through the loop as it is."""
import os
import sys
import warnings

import numpy as np
import pytest

from medimg.errors import ConfigError
from medimg.evaluation import corruptions as c
from medimg.evaluation import robustness as r

keras = pytest.importorskip("keras")
from medimg.models.networks import build_model  # noqa: E402
from medimg.training.loop import drawer, train_steps  # noqa: E402
from medimg.training.record import TrainConfig  # noqa: E402
from medimg.training.trainer import make_loss  # noqa: E402


@pytest.fixture(scope="module")
def task():
    """Images of 16 px with a bright corner in half of them, and a small network that was trained on them for two seconds."""
    from medimg.data.pipeline import Tensors
    rng = np.random.default_rng(0)
    y = np.arange(240) % 2
    x = np.clip(rng.normal(0.5, 0.12, (240, 16, 16, 1)), 0, 1).astype("float32")
    x[:, 2:8, 2:8] += 0.2 * y[:, None, None, None]
    x = np.clip(x, 0, 1)
    net = build_model("resnet", (16, 16, 1), 2, seed=0, width=8, blocks=(1,), dropout=0.0)
    data = Tensors(x[:160], y[:160].astype("int32"), np.array([f"{i:08d}" for i in range(160)]))
    train_steps(net, drawer(data, batch_size=32), make_loss("binary"), steps=60, config=TrainConfig(learning_rate=5e-3, ema=0.9), progress=False)
    return net, data, x[160:], y[160:]


def loss_of(net, x, y):
    return np.asarray(r.worst_loss(net)(x.astype("float32"), y.astype("int32")))


# ---- attacks -------------------------------------------------------------------------------------------------------------------
def test_linear_network_in_closed_form():
    rng = np.random.default_rng(1)
    model = keras.Sequential([keras.Input((5, 4, 1)), keras.layers.Flatten(), keras.layers.Dense(1)])
    w = rng.normal(size=(20, 1)).astype("float32")
    model.layers[-1].set_weights([w, np.zeros(1, "float32")])
    x, y = rng.random((30, 5, 4, 1)).astype("float32"), rng.integers(0, 2, 30)
    for eps in (0.0, 0.02, 0.3):
        wanted = np.clip(x - eps * np.sign(w).reshape(5, 4, 1) * np.where(y, 1, -1).reshape(-1, 1, 1, 1), 0, 1)
        for made in (r.fgsm(model, x, y, r.Attack(eps=eps)), r.pgd(model, x, y, r.Attack(eps=eps, steps=8, restarts=3))):
            assert np.allclose(made, wanted, atol=1e-5)


def test_softmax_and_named_outputs(task):
    _, _, x, y = task
    several = build_model("resnet", (16, 16, 1), 3, seed=0, width=8, blocks=(1,), dropout=0.0)
    want = -np.log(np.exp(np.asarray(several(x, training=False)))[np.arange(len(y)), y] / np.exp(np.asarray(several(x, training=False))).sum(1))
    assert np.allclose(loss_of(several, x, y), want, atol=1e-4)
    from medimg.models.resnet import inference_model
    named = inference_model(several)
    a, b = (r.pgd(model, x, y, r.Attack(eps=0.02, steps=3, restarts=1)) for model in (several, named))
    assert np.allclose(a, b, atol=1e-6)
    assert r.robust_accuracy(named, x, y, r.Attack(eps=0.02, steps=2, restarts=1)).holds.shape == (len(y),)


def test_ball_range_and_monotone(task):
    net, _, x, y = task
    before, worst = loss_of(net, x, y), None
    for eps in (0.0, 0.01, 0.03, 0.06):
        attack = r.Attack(eps=eps, steps=10, restarts=2)
        made = r.pgd(net, x, y, attack)
        assert np.abs(made - x).max() <= eps + 1e-6 and made.min() >= 0 and made.max() <= 1
        now = loss_of(net, made, y)
        assert (now >= before - 1e-4).all() and (now >= loss_of(net, r.pgd(net, x, y, r.Attack(eps=eps, steps=10, restarts=1)), y) - 1e-4).all()
        assert worst is None or now.mean() >= worst - 1e-6
        worst = now.mean()
    assert np.array_equal(r.pgd(net, x, y, attack), made)


def test_other_ranges(task):
    """A network that takes 0 to 255: the same attack, the same answers."""
    net, _, x, y = task
    inputs = keras.Input((16, 16, 1))
    greys = keras.Model(inputs, net(keras.layers.Rescaling(1 / 255)(inputs)))
    a = r.robust_accuracy(net, x, y, r.Attack(eps=0.02, steps=5, restarts=1))
    b = r.robust_accuracy(greys, x * 255, y, r.Attack(eps=0.02, steps=5, restarts=1, value_range=(0, 255)))
    assert np.abs(b.images / 255 - a.images).max() < 0.021 and abs(a.robust.value - b.robust.value) <= 0.03


def test_threshold_moves_the_aim(task):
    net, _, x, y = task
    p = 1 / (1 + np.exp(-np.asarray(net(x, training=False))[:, 0]))
    for t in (0.2, 0.5, 0.9):
        made = r.robust_accuracy(net, x, y, r.Attack(eps=0.0, steps=1, restarts=1), threshold=t)
        assert np.isclose(made.clean.value, np.mean((p > t) == y)) and made.clean == made.robust


def toolbox():
    """The Adversarial Robustness Toolbox, from the environment or from MEDIMG_ART (a folder, as made by `pip install --target DIR --no-deps adversarial-robustness-toolbox`)."""
    if os.environ.get("MEDIMG_ART"):
        sys.path.append(os.environ["MEDIMG_ART"])
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import art.attacks.evasion as evasion
            from art.estimators.classification import TensorFlowV2Classifier
    except ImportError as error:
        pytest.skip(f"the Adversarial Robustness Toolbox is not installed ({error}); remedy: pip install --no-deps adversarial-robustness-toolbox==1.20.1")
    return evasion, TensorFlowV2Classifier


@pytest.mark.parametrize("eps", [2 / 255, 6 / 255])
def test_as_strong_as_the_toolbox(task, eps):
    """On the same network: FGSM pixel for pixel; PGD without random start step for step; with restarts at least as strong."""
    import tensorflow as tf
    evasion, classifier = toolbox()
    net, _, x, y = task
    inputs = keras.Input((16, 16, 1))
    two = keras.Model(inputs, keras.layers.Concatenate()([-0.5 * net(inputs), 0.5 * net(inputs)]))     # softmax of two = sigmoid of one
    peer = classifier(model=lambda v, training=False: two(v, training=False), nb_classes=2, input_shape=(16, 16, 1), clip_values=(0.0, 1.0),
                      loss_object=tf.keras.losses.SparseCategoricalCrossentropy(from_logits=True, reduction="sum"))
    labels = np.eye(2)[y]
    theirs = evasion.FastGradientMethod(peer, eps=eps, batch_size=128).generate(x, labels)
    ours = r.fgsm(net, x, y, r.Attack(eps=eps))
    assert np.mean(np.abs(theirs - ours) > 1e-5) < 0.002       # a slope of almost zero may have either sign
    step = eps / 4
    theirs = evasion.ProjectedGradientDescentTensorFlowV2(peer, eps=eps, eps_step=step, max_iter=10, num_random_init=0, batch_size=128, verbose=False).generate(x, labels)
    ours = r.pgd(net, x, y, r.Attack(eps=eps, steps=10, restarts=1, step_size=step), keep="last")
    gap = np.abs(loss_of(net, theirs, y) - loss_of(net, ours, y))
    print(f"eps {eps:.4f}: loss theirs {loss_of(net, theirs, y).mean():.4f}, ours {loss_of(net, ours, y).mean():.4f}, largest gap {gap.max():.2e}")
    assert np.median(gap) < 1e-3
    theirs = evasion.ProjectedGradientDescentTensorFlowV2(peer, eps=eps, eps_step=step, max_iter=20, num_random_init=3, batch_size=128, verbose=False).generate(x, labels)
    strong = r.robust_accuracy(net, x, y, r.Attack(eps=eps, steps=20, restarts=3, step_size=step))
    held = np.mean((np.asarray(net(theirs, training=False))[:, 0] > 0) == y)
    print(f"right under the toolbox's PGD {held:.3f}, under ours {strong.robust.value:.3f}")
    assert strong.robust.value <= held + 1e-9 and loss_of(net, strong.images, y).mean() >= loss_of(net, theirs, y).mean() - 1e-3


def test_training_against_it(task):
    """The loop as it is: resumable, reproducible, and the trained network stands more."""
    net, data, x, y = task

    def train(out=None, steps=60):
        fresh = build_model("resnet", (16, 16, 1), 2, seed=0, width=8, blocks=(1,), dropout=0.0)
        model = r.hardened(fresh, r.Attack(eps=0.06, steps=3))
        train_steps(model, r.with_labels(drawer(data, batch_size=32)), make_loss("binary"), steps=steps, config=TrainConfig(learning_rate=5e-3, ema=0.9), progress=False, out=out)
        return fresh
    one, two = train(), train()
    assert all(np.array_equal(a, b) for a, b in zip(one.get_weights(), two.get_weights()))
    attack = r.Attack(eps=0.05, steps=10, restarts=1)
    before, after = (r.robust_accuracy(model, x, y, attack).robust.value for model in (net, one))
    print(f"right under attack: {before:.2f} before, {after:.2f} after training against it")
    assert after > before


def test_feature_distance_against_scikit_learn():
    neighbours = pytest.importorskip("sklearn.neighbors")
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(80, 6)), rng.normal(size=(700, 6))
    unit = [v / np.linalg.norm(v, axis=1, keepdims=True) for v in (a, b)]
    for k in (1, 5):
        wanted = neighbours.NearestNeighbors(n_neighbors=k).fit(unit[0]).kneighbors(unit[1])[0].mean(1)
        assert np.allclose(r.feature_distance(a, b, k=k), wanted, atol=1e-7)
    assert np.isfinite(r.feature_distance(a, np.zeros((2, 6)))).all()


def test_quiet_attack_comes_nearer(task):
    net, data, x, y = task
    eyes = keras.Model(net.inputs[0], net.get_layer("features").output)
    known = np.asarray(eyes(data.x))
    means = np.stack([known[data.y == k].mean(0) for k in (0, 1)])[::-1]
    attack = r.Attack(eps=0.08, steps=15, restarts=1)
    loud, quiet = r.pgd(net, x, y, attack), r.pgd(net, x, y, attack, objective=r.quiet_objective(net, eyes, means))
    unit = lambda v: v / np.linalg.norm(v, axis=1, keepdims=True)      # noqa: E731
    far = [np.linalg.norm(unit(np.asarray(eyes(z))) - unit(means)[y], axis=1).mean() for z in (loud, quiet)]
    assert far[1] <= far[0] + 1e-6


def test_bad_input_of_attacks(task):
    net, _, x, y = task
    import tensorflow as tf
    flat = lambda v, training=False: tf.zeros((tf.shape(v)[0], 1))      # noqa: E731
    for bad in (lambda: r.Attack(eps=4), lambda: r.Attack(steps=0), lambda: r.Attack(value_range=(1, 0)), lambda: r.pgd(net, x * 255, y), lambda: r.pgd(net, x, y[:2]), lambda: r.fgsm(net, x * np.nan, y),
                lambda: r.pgd(net, x[:0], y[:0]), lambda: r.robust_accuracy(net, x, y, threshold=1.0), lambda: r.feature_distance(np.ones((2, 3)), np.ones((2, 3))),
                lambda: r.feature_distance(np.ones((9, 3)), np.ones((2, 4))), lambda: r.pgd(flat, x, y)):
        with pytest.raises(ConfigError):
            bad()


# ---- corruptions ---------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", list(c.CORRUPTIONS))
def test_corruptions_keep_the_form(kind):
    rng = np.random.default_rng(0)
    for images in (rng.integers(0, 256, (3, 20, 24)).astype(np.uint8), rng.random((3, 20, 24, 1)).astype("float32"), rng.random((2, 3, 20, 24, 1)), rng.random((2, 20, 24, 3))):
        worn = c.corrupt(images, kind, 3, seed=1)
        assert worn.shape == images.shape and worn.dtype == images.dtype and np.array_equal(worn, c.corrupt(images, kind, 3, seed=1))
        assert worn.min() >= 0 and worn.max() <= (255 if images.dtype == np.uint8 else 1) and not np.array_equal(worn, images)
        assert np.array_equal(c.corrupt(images, kind, 0), images)


@pytest.mark.parametrize("kind", list(c.CORRUPTIONS))
def test_severity_rises(kind):
    from scipy import ndimage
    images = np.clip(0.5 + 2 * ndimage.gaussian_filter(np.random.default_rng(0).normal(size=(6, 48, 48)), (0, 2, 2)), 0, 1)
    far = [np.sqrt(np.mean((c.corrupt(images, kind, s) - images) ** 2)) for s in range(6)]
    assert all(a < b for a, b in zip(far, far[1:])), (kind, far)


def test_corruptions_by_hand():
    from scipy import ndimage
    grey = np.full((3, 64, 64), 0.5)
    for s, share in enumerate(c.CORRUPTIONS["dose"][1], start=1):
        assert np.isclose(c.corrupt(grey, "dose", s).std(), np.sqrt((1 / share - 1) / 2e4 * np.exp(1.5)) / 3, rtol=0.05)
    step = np.repeat([0.2, 0.8], 32)[None, None] * np.ones((1, 64, 1))
    assert np.allclose(c.corrupt(step, "blur", 2), ndimage.gaussian_filter(step, (0, 0.02 * 64, 0.02 * 64), mode="nearest"))
    assert np.allclose(c.corrupt(step, "contrast", 3), 0.5 + 0.5 * (step - 0.5))
    for kind in ("blur", "motion", "jpeg", "kernel", "rotation", "contrast"):
        assert np.allclose(c.corrupt(grey, kind, 5), 0.5, atol=0.01), kind
    assert np.allclose(c.corrupt(step * 100 - 50, "contrast", 3, value_range=(-50, 50)), c.corrupt(step, "contrast", 3) * 100 - 50)


def test_curve():
    rng = np.random.default_rng(0)
    images, y = rng.random((40, 12, 12)), np.arange(40) % 2

    class Known:
        """A Predictor with the mean grey as answer."""

        def predict(self, images):
            """The mean."""
            return images.mean((1, 2))
    mean = lambda y, p: float(p.mean())        # noqa: E731
    curve = c.corruption_curve(Known(), images, y, mean, kinds=["noise", "contrast"])
    assert list(curve) == ["noise", "contrast"] and all(v.shape == (6,) and np.isclose(v[0], images.mean()) for v in curve.values())
    assert np.isclose(curve["noise"][2], c.corrupt(images, "noise", 2).mean())
    from medimg.evaluation.metrics import auc
    with pytest.warns(UserWarning, match="untouched: AUC is not defined"):
        assert np.isnan(c.corruption_curve(Known(), images, 0 * y, auc, kinds=["blur"])["blur"]).all()


def test_bad_input_of_corruptions():
    x = np.full((2, 8, 8), 0.5)
    for bad in (lambda: c.corrupt(x, "nois", 1), lambda: c.corrupt(x, "noise", 6), lambda: c.corrupt(x, "noise", 1.5), lambda: c.corrupt(x, "noise", True), lambda: c.corrupt(x * 9, "noise", 1),
                lambda: c.corrupt(x * np.nan, "blur", 0), lambda: c.corrupt(x[0], "blur", 1), lambda: c.corrupt(x[:0], "blur", 1), lambda: c.corrupt(np.ones((1, 8, 8, 2)), "jpeg", 1),
                lambda: c.corruption_curve(len, x, [1], len)):
        with pytest.raises(ConfigError):
            bad()
