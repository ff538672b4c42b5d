"""Losses against scikit-learn, Keras, numbers that MONAI computed, NumPy by hand in float64, central differences, and what must hold for every one of them."""
import itertools
import math

import keras
import numpy as np
import pytest
import tensorflow as tf
from scipy.spatial.distance import cdist
from sklearn.metrics import log_loss, mean_squared_error

from medimg.errors import ConfigError
from medimg.experiments.segmentation import dice_and_entropy
from medimg.models.detector import centre_targets, detection_loss
from medimg.models.heads import masked_loss, positive_weights
from medimg.models.networks import build_model
from medimg.training import losses
from medimg.training.loop import train_steps
from medimg.training.losses import (
    LOSSES,
    boundary_loss,
    corn_loss,
    cross_entropy,
    dice_loss,
    focal_loss,
    generalised_dice_loss,
    get_loss,
    heatmap_focal_loss,
    signed_distance,
    squared_error,
    tversky_loss,
)
from medimg.training.record import TrainConfig
from medimg.training.trainer import make_loss


def volumes(seed=5):
    """As in benchmarks/training/losses.py: labels (2, 4, 5, 6), the same as 0 and 1 for each class, logits; class 2 is absent from the first volume."""
    rng = np.random.default_rng(seed)
    y = rng.integers(0, 3, (2, 4, 5, 6))
    y[0][y[0] == 2] = 0
    return y, np.eye(3)[y], rng.normal(0, 2, (2, 4, 5, 6, 3))


def sigmoid(z):
    return 1 / (1 + np.exp(-z))


def softmax(z):
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def slope(loss, z):
    z = tf.constant(z)
    with tf.GradientTape() as tape:
        tape.watch(z)
        value = loss(z)
    return tape.gradient(value, z).numpy()


# ---- other programs --------------------------------------------------------------------------------------------------------------
# MONAI 1.6.1 on PyTorch 2.13.0 (the last two: PyTorch alone), from benchmarks/training/losses.py, which compares the gradients too.
PEERS = {
    "dice, sigmoid": (lambda y, t, z: dice_loss(t, z, smooth=1.0), 0.634679627),
    "dice, softmax": (lambda y, t, z: dice_loss(y, z, smooth=1.0), 0.732500738),
    "dice, batch": (lambda y, t, z: dice_loss(y, z, smooth=1e-5, batch=True), 0.712682877),
    "tversky": (lambda y, t, z: tversky_loss(y, z, errors=(0.3, 0.7), smooth=1.0), 0.712586192),
    "generalised dice": (lambda y, t, z: generalised_dice_loss(y, z, smooth=1e-9), 0.723772359),
    "focal, sigmoid": (lambda y, t, z: focal_loss(t, z, gamma=2.0, alpha=0.25), 0.434524208),
    "focal, softmax": (lambda y, t, z: focal_loss(y, z, gamma=1.5), 1.851028442),
    "dice and entropy": (lambda y, t, z: dice_loss(y, z, smooth=1.0) + cross_entropy(y, z), 2.849994296),
    "smoothed entropy": (lambda y, t, z: cross_entropy(y, z, smoothing=0.1), 2.110659191),
    "weighted entropy": (lambda y, t, z: cross_entropy(t, z, weights=[1.0, 2.0, 5.0]), 1.440093044),
}


@pytest.mark.parametrize("name", PEERS)
def test_equals_monai(name):
    ours, theirs = PEERS[name]
    assert float(ours(*volumes())) == pytest.approx(theirs, abs=1e-7)


def test_equals_scikit_learn_with_weights_of_samples():
    rng = np.random.default_rng(1)
    y, z, w = rng.integers(0, 4, 300), rng.normal(0, 3, (300, 4)), rng.uniform(0, 3, 300)
    assert float(cross_entropy(y, z, mask=w)) == pytest.approx(log_loss(y, softmax(z), sample_weight=w), rel=1e-12)
    yes = (y > 1).astype(float)
    assert float(cross_entropy(yes, z[:, :1], mask=w)) == pytest.approx(log_loss(yes, sigmoid(z[:, 0]), sample_weight=w), rel=1e-12)
    assert float(squared_error(z[:, 1], z[:, 2], mask=w)) == pytest.approx(mean_squared_error(z[:, 1], z[:, 2], sample_weight=w), rel=1e-12)
    assert float(squared_error(z[:, :2], z[:, 2:], mask=w)) == pytest.approx(mean_squared_error(z[:, :2], z[:, 2:], sample_weight=w), rel=1e-12)


def test_equals_keras_focal_and_smoothed():
    rng = np.random.default_rng(2)
    y, z = rng.integers(0, 2, (100, 3)).astype("float32"), rng.normal(0, 2, (100, 3)).astype("float32")
    theirs = keras.losses.BinaryFocalCrossentropy(apply_class_balancing=True, alpha=0.3, gamma=1.5, from_logits=True)(y, z)
    assert float(focal_loss(y, z, alpha=0.3, gamma=1.5)) == pytest.approx(float(theirs), rel=1e-4)
    theirs = keras.losses.BinaryCrossentropy(from_logits=True, label_smoothing=0.2)(y, z)
    assert float(cross_entropy(y, z, smoothing=0.2)) == pytest.approx(float(theirs), rel=1e-5)


def test_the_other_losses_of_the_package_are_special_cases():
    rng = np.random.default_rng(3)
    y, z = rng.integers(0, 2, (40, 5)).astype("float32"), rng.normal(0, 2, (40, 5)).astype("float32")
    y[rng.random(y.shape) < 0.3] = np.nan
    w = positive_weights(y)
    assert float(cross_entropy(y, z, weights=w, smoothing=0.1)) == pytest.approx(float(masked_loss(smoothing=0.1, weights=w)(y, z)), rel=1e-5)
    grade, w = rng.integers(0, 5, 40), np.array([1.0, 2.0, 0.5, 3.0, 1.0])
    assert float(cross_entropy(grade, z, weights=w, smoothing=0.1)) == pytest.approx(float(make_loss("ordinal", smoothing=0.1, weights=w)(grade, z)), rel=1e-5)
    ill = (grade > 2).astype("float32")
    assert float(cross_entropy(ill, z[:, :1], smoothing=0.05)) == pytest.approx(float(make_loss("binary", smoothing=0.05)(ill, z[:, :1])), rel=1e-5)
    labels, _, z = volumes()
    z = z.astype("float32")
    assert float(dice_loss(labels, z) + cross_entropy(labels, z)) == pytest.approx(float(dice_and_entropy(labels[..., None], z)), rel=1e-5)
    one, t = z[..., :1], (labels[..., None] == 1).astype("float32")
    assert float(dice_loss(t, one) + cross_entropy(t, one)) == pytest.approx(float(dice_and_entropy(t, one)), rel=1e-5)


def test_heat_map_equals_the_detector():
    rng = np.random.default_rng(4)
    truth = np.stack([centre_targets((16, 24), {"index": at, "size": [5.0] * len(at), "kind": [0] * len(at)}) for at in ([[3.0, 20.0], [9.5, 7.0]], [])])
    z = rng.normal(-2, 2, (2, 8, 12, 4)).astype("float32")
    assert float(heatmap_focal_loss(truth[..., 1:2], z[..., :1])) == pytest.approx(float(detection_loss(2, 1, weights=(1, 0, 0, 0))(truth, z)), rel=1e-5)


def test_heat_map_by_hand():
    """Other exponents, weights, and a map without a centre, which divides by 1."""
    y, z, w = np.array([[[1.0], [0.6], [0.0], [1.0]], [[0.9], [0.2], [0.0], [0.0]]]), np.random.default_rng(14).normal(size=(2, 4, 1)), np.array([[1.0, 1, 0, 0], [1, 1, 1, 1]])
    p = sigmoid(z)
    each = np.where(y == 1, -(1 - p)**1.5 * np.log(p), -(1 - y)**3 * p**1.5 * np.log(1 - p))[..., 0] * w
    assert float(heatmap_focal_loss(y, z, mask=w, gamma=1.5, fade=3.0)) == pytest.approx(each.sum(), rel=1e-12)
    assert float(heatmap_focal_loss(y[1:], z[1:], gamma=1.5, fade=3.0)) == pytest.approx(each[1].sum(), rel=1e-12)
    assert float(heatmap_focal_loss(y, z, gamma=1.5, fade=3.0, mask=w + [[0, 0, 1, 1], [0] * 4])) == pytest.approx((each.sum() + (
        -(1 - p[0, 3, 0])**1.5 * np.log(p[0, 3, 0]) - p[0, 2, 0]**1.5 * np.log(1 - p[0, 2, 0]))) / 2, rel=1e-12)


def test_only_the_ratio_of_weights_counts():
    rng = np.random.default_rng(15)
    y, z, w = rng.integers(0, 2, (6, 2)).astype(float), rng.normal(size=(6, 2)), rng.uniform(1, 2, 6)
    for loss in (squared_error, cross_entropy, focal_loss, boundary_loss):
        assert float(loss(y, z, mask=0.001 * w)) == pytest.approx(float(loss(y, z, mask=w)), rel=1e-12)


# ---- by hand ---------------------------------------------------------------------------------------------------------------------
def test_corn_is_the_likelihood_of_the_chain():
    """P(y = k) multiplied out patient by patient, and the head whose softmax gives it."""
    rng = np.random.default_rng(6)
    y, z, known = np.array([0, 1, 2, 3, 3, 1, 0]), rng.normal(0, 2, (7, 3)), np.array([1, 1, 1, 1, 1, 0, 1])
    total = questions = 0
    for grade, row in zip(y[known == 1], sigmoid(z)[known == 1]):
        chance = math.prod(row[:grade]) * (1 - row[grade] if grade < 3 else 1)
        total, questions = total - math.log(chance), questions + min(grade + 1, 3)
    assert float(corn_loss(y, z, mask=known)) == pytest.approx(total / questions, rel=1e-12)
    assert float(corn_loss(np.where(known, y, -1), z)) == pytest.approx(total / questions, rel=1e-12)
    log_p = np.concatenate([np.zeros((7, 1)), np.cumsum(-np.log1p(np.exp(-z)), 1)], 1) + np.concatenate([-np.log1p(np.exp(z)), np.zeros((7, 1))], 1)
    assert float(cross_entropy(y, log_p, mask=known)) == pytest.approx(total / known.sum(), rel=1e-9)


def test_corn_as_published():
    """Shi, Cao and Raschka: question j is trained on those with y >= j only, so the logits of the others have no gradient."""
    got = slope(lambda z: corn_loss([0, 1, 2], z), np.zeros((3, 2)))
    asked = np.array([[1, 0], [1, 1], [1, 1]])
    assert np.allclose(got, (0.5 - np.array([[0, 0], [1, 0], [1, 1]])) * asked / asked.sum())


@pytest.mark.parametrize("p, factor", [(0.9, 100), (0.968, 1000)])
def test_focal_as_published(p, factor):
    """Lin et al. 2017, section 3.2: at gamma 2, p = 0.9 costs 100 times less than in cross-entropy, p = 0.968 about 1000 times."""
    z = np.array([[np.log(p / (1 - p))]])
    assert float(cross_entropy([[1.0]], z) / focal_loss([[1.0]], z)) == pytest.approx(factor, rel=0.03)


def test_overlap_by_hand():
    """Loops over images and classes, with an unknown voxel, a weighted one, and a class that is absent."""
    y, _, z = volumes()
    mask = np.random.default_rng(7).integers(0, 3, y.shape).astype(float)
    p = softmax(z)
    dice, tversky, generalised = [], [], []
    for n in range(2):
        top = below = 0
        sizes = [float((mask[n] * (y[n] == c)).sum()) for c in range(3)]
        for c in range(3):
            t, q, m = y[n] == c, p[n, ..., c], mask[n]
            a, f, miss = (m * q * t).sum(), (m * q * ~t).sum(), (m * (1 - q) * t).sum()
            w = min(s for s in sizes if s)**2 / (sizes[c] or min(s for s in sizes if s))**2
            top, below = top + 2 * w * a, below + w * (2 * a + f + miss)
            if c:
                dice.append(1 - (2 * a + 2) / (2 * a + f + miss + 2))
                tversky.append(1 - (a + 3) / (a + 0.2 * f + 0.6 * miss + 3))
        generalised.append(1 - (top + 4) / (below + 4))
    assert float(dice_loss(y, z, mask=mask, smooth=2.0)) == pytest.approx(np.mean(dice), rel=1e-12)
    assert float(tversky_loss(y, z, mask=mask, errors=(0.2, 0.6), smooth=3.0)) == pytest.approx(np.mean(tversky), rel=1e-12)
    assert float(generalised_dice_loss(y, z, mask=mask, smooth=4.0)) == pytest.approx(np.mean(generalised), rel=1e-12)


def test_an_image_without_known_voxels_does_not_dilute_the_mean():
    y, _, z = volumes()
    mask = np.ones(2)
    mask[0] = 0
    for loss in (dice_loss, tversky_loss, generalised_dice_loss, cross_entropy, focal_loss):
        assert float(loss(y, z, mask=mask)) == pytest.approx(float(loss(y[1:], z[1:])), rel=1e-12)


def test_empty_reference():
    """As the docstring says: nothing predicted costs 0; the slope of a false alarm is that of s / (P + s), with P the sum of probabilities."""
    y, nothing = np.zeros((1, 6, 6, 1)), np.full((1, 6, 6, 1), -50.0)
    assert float(dice_loss(y, nothing)) == pytest.approx(0, abs=1e-12) and float(tversky_loss(y, nothing)) == pytest.approx(0, abs=1e-12)
    z = np.random.default_rng(8).normal(size=(1, 6, 6, 1))
    p = sigmoid(z)
    for s in (1e-5, 1.0, 20.0):
        assert float(dice_loss(y, z, smooth=s)) == pytest.approx(p.sum() / (p.sum() + s), rel=1e-12)
        assert np.allclose(slope(lambda z: dice_loss(y, z, smooth=s), z), s / (p.sum() + s)**2 * p * (1 - p), rtol=1e-9, atol=0)
    both = np.concatenate([y, 1 - y])                                  # an empty image and a full one
    assert 0.3 < float(dice_loss(both, np.zeros_like(both), batch=True)) < float(dice_loss(both, np.zeros_like(both))) < 0.7


def test_generalised_dice_counts_epsilon_in_voxels():
    """A tiny and a huge volume with the same answer have the same loss; MONAI's form ends at 0.286 for two classes of a million voxels."""
    y, z = np.array([[0] * 4 + [1] * 4]), np.zeros((1, 8, 2))
    z[..., 0] = np.where(y == 0, -3.0, 3.0)
    small = float(generalised_dice_loss(np.tile(y, 10), np.tile(z, (1, 10, 1)), smooth=1e-3))
    assert float(generalised_dice_loss(np.tile(y, 50_000), np.tile(z, (1, 50_000, 1)), smooth=1e-3)) == pytest.approx(small, abs=1e-4)
    assert small > 0.9


# ---- distances -------------------------------------------------------------------------------------------------------------------
def test_signed_distance_by_comparing_all_pairs():
    rng = np.random.default_rng(9)
    mask, spacing = rng.random((4, 6, 5)) < 0.3, np.array([5.0, 0.7, 1.3])
    inside, outside = np.argwhere(mask) * spacing, np.argwhere(~mask) * spacing
    want = np.zeros(mask.shape)
    want[mask], want[~mask] = -cdist(inside, outside).min(1), cdist(outside, inside).min(1)
    got = signed_distance(mask, spacing_mm=tuple(spacing))
    assert got.dtype == np.float32 and np.allclose(got, want, rtol=1e-6)
    assert np.allclose(signed_distance(~mask, spacing_mm=tuple(spacing)), -got)
    assert not signed_distance(np.zeros((3, 3))).any() and not signed_distance(np.ones((3, 3))).any()


def test_boundary_by_hand_and_least_at_the_reference():
    y = np.zeros((1, 9, 9), int)
    y[0, 2:6, 3:7] = 1
    phi = signed_distance(y[0], spacing_mm=(2.0, 0.5))[None, ..., None].astype(float)
    z = np.random.default_rng(10).normal(size=phi.shape)
    mask = np.random.default_rng(11).integers(0, 2, y.shape)
    assert float(boundary_loss(phi, z, mask=mask)) == pytest.approx((sigmoid(z) * phi)[mask == 1].mean(), rel=1e-12)
    best = float(boundary_loss(phi, 100.0 * y[..., None] - 50))
    assert best == pytest.approx(phi[phi < 0].sum() / phi.size, rel=1e-9)
    for move, axis in itertools.product((-1, 1), (1, 2)):
        assert float(boundary_loss(phi, 100.0 * np.roll(y, move, axis)[..., None] - 50)) > best
    two = np.concatenate([-phi, phi], -1)
    pair = np.concatenate([np.zeros_like(z), z], -1)                   # a softmax over (0, z) is a sigmoid of z
    assert float(boundary_loss(two, pair, mask=np.array([0.0, 1.0]).reshape(1, 1, 1, 2))) == pytest.approx((sigmoid(z) * phi).mean(), rel=1e-12)


# ---- every loss ------------------------------------------------------------------------------------------------------------------
def case(name):
    """(labels, logits, labels with an unknown one, mask that leaves out the same) for a loss."""
    rng = np.random.default_rng(12)
    if name == "corn":
        y, z = np.array([0.0, 3.0, 1.0, 2.0]), rng.normal(size=(4, 3))
    elif name in ("squared_error", "cross_entropy", "focal"):
        y, z = rng.integers(0, 2, (4, 3)).astype(float), rng.normal(size=(4, 3))
    else:
        y, z = rng.integers(0, 2, (2, 4, 5, 1)).astype(float), rng.normal(size=(2, 4, 5, 1))
    if name == "heatmap_focal":
        y = np.where(y == 1, y, 0.5)
    if name == "boundary":
        y = np.stack([signed_distance(one[..., 0])[..., None] for one in y]).astype(float)
    hole, mask = y.copy(), np.ones_like(y)
    hole.reshape(-1)[[1, 5 % y.size]], mask.reshape(-1)[[1, 5 % y.size]] = np.nan, 0
    return y, z, hole, mask


each_loss = pytest.mark.parametrize("name", LOSSES)


@each_loss
def test_gradient_is_the_central_difference(name):
    y, z, _, mask = case(name)
    loss, h = get_loss(name), 1e-5
    want = np.zeros_like(z)
    for i in np.ndindex(z.shape):
        step = np.zeros_like(z)
        step[i] = h
        want[i] = (float(loss(y, z + step, mask=mask)) - float(loss(y, z - step, mask=mask))) / (2 * h)
    got = slope(lambda z: loss(y, z, mask=mask), z)
    assert np.allclose(got, want, rtol=1e-6, atol=1e-9) and np.abs(got).max() > 1e-3


@each_loss
def test_unknown_is_left_out(name):
    """NaN in the labels and 0 in the mask are one; what the network says there changes nothing, and pulls at nothing."""
    y, z, hole, mask = case(name)
    loss, other = LOSSES[name], z + 5 * (np.isnan(hole).reshape(*hole.shape, *[1] * (z.ndim - hole.ndim)))
    assert float(loss(hole, z)) == pytest.approx(float(loss(y, z, mask=mask)), rel=1e-12)
    assert float(loss(hole, other)) == pytest.approx(float(loss(hole, z)), rel=1e-12) and not (other == z).all()
    assert float(loss(y, z)) != pytest.approx(float(loss(hole, z)), rel=1e-6)
    pull = slope(lambda z: loss(hole, z), z)
    assert not pull[np.isnan(hole)].any() and pull[~np.isnan(hole)].any()


@each_loss
def test_nothing_known_costs_nothing(name):
    y, z, _, mask = case(name)
    for labels, weight in ((y, 0 * mask), (y * np.nan, None)):
        assert float(LOSSES[name](labels, z, mask=weight)) == 0
        assert not slope(lambda z: LOSSES[name](labels, z, mask=weight), z).any()


@each_loss
def test_extreme_logits(name):
    """Finite in float32 at logits of -50 and 50, right or wrong, with finite gradients; and what is right costs no more than what is wrong."""
    y, z, *_ = case(name)
    right = np.where(y.reshape(*y.shape, *[1] * (z.ndim - y.ndim)) > np.arange(z.shape[-1]) if name == "corn" else y < 0 if name == "boundary" else y == 1, 50.0, -50.0)
    right = right.reshape(z.shape).astype("float32")
    values = []
    for logits in (right, -right):
        values.append(float(LOSSES[name](y, logits)))
        assert np.isfinite(values[-1]) and np.isfinite(slope(lambda z: LOSSES[name](y, z), logits)).all()
    assert values[0] < values[1]


@pytest.mark.parametrize("loss", [cross_entropy, focal_loss, dice_loss, tversky_loss, generalised_dice_loss])
def test_extreme_logits_of_classes(loss):
    y, t, _ = volumes()
    for logits in (100 * t - 50, 50 - 100 * t):
        logits = logits.astype("float32")
        assert np.isfinite(float(loss(y, logits))) and np.isfinite(slope(lambda z: loss(y, z), logits)).all()
    assert float(loss(y, (100 * t - 50).astype("float32"))) == pytest.approx(0, abs=1e-6)


def test_confident_mistakes_keep_their_slope():
    """At a logit of -50 cross-entropy and focal loss pull with 1; (1 - p) ** gamma computed as a power of 0 would give NaN for gamma below 1."""
    z = np.array([[-50.0]], "float32")
    assert slope(lambda z: cross_entropy([[1.0]], z), z)[0, 0] == pytest.approx(-1)
    for gamma in (0.5, 2.0):
        assert slope(lambda z: focal_loss([[1.0]], z, gamma=gamma), z)[0, 0] == pytest.approx(-1)
        assert np.isfinite(slope(lambda z: focal_loss([[1.0]], z, gamma=gamma), -z)).all()
        assert np.isfinite(slope(lambda z: focal_loss([0], z, gamma=gamma), np.array([[50.0, -50.0]], "float32"))).all()


@each_loss
def test_takes_numpy_tensors_lists_and_half_precision(name):
    y, z, *_ = case(name)
    want = float(LOSSES[name](y, z))
    assert LOSSES[name](y, z.astype("float16")).dtype == tf.float32
    for labels, logits in ((tf.constant(y), tf.constant(z)), (y.tolist(), z.astype("float32")), (y.astype("float32"), z.tolist())):
        assert float(LOSSES[name](labels, logits)) == pytest.approx(want, rel=1e-5)


@each_loss
def test_in_a_graph_with_free_sides(name):
    y, z, *_ = case(name)
    free = [tf.TensorSpec([None] * (a.ndim - 1) + ([None] if name == "corn" and a is y else [a.shape[-1]]), tf.float64) for a in (y, z)]
    graph = tf.function(LOSSES[name], input_signature=free)
    assert float(graph(y, z)) == pytest.approx(float(LOSSES[name](y, z)), rel=1e-12)


# ---- shapes, masks and options ---------------------------------------------------------------------------------------------------
def test_a_mask_is_read_from_the_left():
    rng = np.random.default_rng(13)
    y, z = rng.integers(0, 2, (3, 3)).astype(float), rng.normal(size=(3, 3))
    assert float(cross_entropy(y, z, mask=[0, 1, 1])) == pytest.approx(float(cross_entropy(y[1:], z[1:])), rel=1e-12)
    assert float(cross_entropy(y, z, mask=[[0, 1, 1]])) == pytest.approx(float(cross_entropy(y[:, 1:], z[:, 1:])), rel=1e-12)
    for bad in (np.ones(2), np.ones((3, 2)), np.ones((3, 3, 2))):
        with pytest.raises(ConfigError, match="mask"):
            cross_entropy(y, z, mask=bad)


def test_labels_of_classes_in_all_their_forms():
    y, t, z = volumes()
    for loss in (cross_entropy, focal_loss, dice_loss, generalised_dice_loss):
        assert float(loss(y[..., None], z)) == float(loss(y, z)) == float(loss(y.astype("uint8"), z))
        assert float(loss(y, z)) != pytest.approx(float(loss(t, z)), rel=1e-3)          # the same as yes or no, by a sigmoid each, is another question
        mask = (y != 1)
        assert float(loss(y, z, mask=mask[..., None])) == float(loss(y, z, mask=mask)) == float(loss(np.where(mask, y, -1), z))
        with pytest.raises(ConfigError, match="a label is 3"):
            loss(y + 1, z)
    with pytest.raises(ConfigError, match="a label is 4"):
        corn_loss([4], np.zeros((1, 3)))


@pytest.mark.parametrize("y, z", [((3, 2), (3, 4)), ((3,), (4, 2)), ((2, 5, 5, 1), (2, 5, 4, 1)), ((2, 5), (2, 5, 5, 3))])
def test_shapes_that_do_not_fit(y, z):
    for loss in (squared_error, cross_entropy, focal_loss, dice_loss, tversky_loss, generalised_dice_loss, boundary_loss, heatmap_focal_loss):
        with pytest.raises(ConfigError, match="do not fit"):
            loss(np.zeros(y), np.zeros(z))


BAD = [("cross_entropy", {"smoothing": 1.0}), ("cross_entropy", {"smoothing": -0.1}), ("cross_entropy", {"smoothing": "much"}), ("cross_entropy", {"weights": [1.0, -1.0]}),
       ("cross_entropy", {"weights": [np.nan]}), ("focal", {"gamma": -1}), ("focal", {"gamma": math.nan}), ("focal", {"alpha": 1.5}), ("dice", {"smooth": 0}),
       ("dice", {"smooth": math.inf}), ("tversky", {"errors": (0, 0)}), ("tversky", {"errors": 0.5}), ("tversky", {"errors": (-1, 2)}), ("heatmap_focal", {"fade": -1}),
       ("generalised_dice", {"smooth": None})]


@pytest.mark.parametrize("name, options", BAD)
def test_options_out_of_range_are_refused_before_and_at_the_call(name, options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        get_loss(name, **options)
    y, z, *_ = case(name)
    with pytest.raises(ConfigError, match=next(iter(options))):
        LOSSES[name](y, z, **options)


def test_weights_of_another_length():
    with pytest.raises(ConfigError, match="weights of shape"):
        cross_entropy([0, 1], np.zeros((2, 3)), weights=[1.0, 2.0])
    with pytest.raises(ConfigError, match="weights of shape"):
        cross_entropy(np.zeros((2, 3)), np.zeros((2, 3)), weights=[1.0, 2.0])
    for alpha in ([1.0, 2.0], 0.25):
        with pytest.raises(ConfigError, match="weights of shape"):
            focal_loss([0, 1], np.zeros((2, 3)), alpha=alpha)
    with pytest.raises(ConfigError, match="alpha has 3 weights"):
        focal_loss(np.zeros((2, 3)), np.zeros((2, 3)), alpha=[1.0, 2.0, 3.0])
    y, _, z = volumes()
    weighed = float(focal_loss(y, z, alpha=[1.0, 2.0, 0.5]))
    assert weighed == pytest.approx(float(focal_loss(y, z, mask=np.array([1.0, 2.0, 0.5])[y])) * np.array([1.0, 2.0, 0.5])[y].mean(), rel=1e-12)


def test_names():
    with pytest.raises(ConfigError, match="did you mean generalised_dice"):
        get_loss("generalized_dice")
    with pytest.raises(ConfigError, match="did you mean gamma"):
        get_loss("focal", gama=2)
    with pytest.raises(ConfigError, match="no option 'mask'"):
        get_loss("dice", mask=np.ones(3))
    with pytest.raises(ConfigError, match="known: "):
        get_loss(None)
    y, z, *_ = case("tversky")
    assert float(get_loss("tversky", errors=(0.1, 0.9))(y, z)) == float(tversky_loss(y, z, errors=(0.1, 0.9))) != float(tversky_loss(y, z))
    public = {name for name in losses.__all__ if name.endswith("_loss") or name in ("squared_error", "cross_entropy")} - {"get_loss"}
    assert {f.__name__ for f in LOSSES.values()} == public


@pytest.mark.parametrize("spacing", [0.0, (1.0, 2.0, 3.0), -1.0, math.nan])
def test_signed_distance_refuses(spacing):
    with pytest.raises(ConfigError, match="spacing_mm"):
        signed_distance(np.eye(3), spacing_mm=spacing)
    with pytest.raises(ConfigError, match="0 and 1"):
        signed_distance(2 * np.eye(3), spacing_mm=1.0)


def test_trains_a_network():
    """A U-Net under the loop: Dice with cross-entropy falls on discs, with half of each image unknown."""
    yy, xx = np.mgrid[:16, :16]

    def draw(step):
        rng = np.random.default_rng([0, step])
        y = np.stack([np.hypot(yy - a, xx - b) < 4 for a, b in rng.uniform(4, 12, (4, 2))])[..., None].astype("float32")
        x = y + rng.normal(0, 0.3, y.shape).astype("float32")
        return x, np.where(xx[..., None] < 8, y, np.nan)
    net = build_model("unet", (16, 16, 1), 2, seed=0, width=4, levels=2)
    history = train_steps(net, draw, lambda y, z: dice_loss(y, z) + cross_entropy(y, z), steps=40, config=TrainConfig(learning_rate=1e-2), progress=False)
    assert history[-1]["loss"] < 0.5 * history[0]["loss"]
