"""Ensembles: against SciPy, scikit-learn, exact laws; graphs against NumPy and ONNX Runtime; what belongs to no ensemble is refused."""
import numpy as np
import pytest

from medimg.errors import ConfigError, DatasetError, MedimgError
from medimg.models import ensemble as e


def members(m=3, n=200, k=2, seed=0, skill=1.0):
    """Probabilities (m, n, k) that carry some truth, and the truth (n,)."""
    rng = np.random.default_rng(seed)
    y = rng.integers(0, k, n)
    z = rng.normal(size=(m, n, k)) + skill * np.eye(k)[y] * np.linspace(0.5, 2, m)[:, None, None]
    p = np.exp(z)
    return p / p.sum(axis=2, keepdims=True), y


def log_loss(p, y):
    return -np.log(p[np.arange(len(y)), y]).mean()


# ---- NumPy ---------------------------------------------------------------------------------------------------------------------
def test_mean_of_logits_is_scipys_geometric_mean():
    from scipy.stats import gmean
    p, _ = members(k=4)
    w = np.array([1.0, 2.0, 5.0])
    wanted = gmean(p, axis=0, weights=w[:, None, None] * np.ones_like(p))
    assert np.allclose(e.combine(p, w, space="logit"), wanted / wanted.sum(axis=1, keepdims=True))
    assert np.allclose(e.combine(p, w), np.average(p, axis=0, weights=w))


def test_one_member_is_itself_and_the_order_does_not_matter():
    p, _ = members()
    for space in ("probability", "logit"):
        assert np.allclose(e.combine(p[:1], space=space), p[0])
        assert np.allclose(e.combine(p, [1, 2, 3], space=space), e.combine(p[::-1], [3, 2, 1], space=space))


def test_the_ensemble_beats_its_mean_member_by_their_disagreement():
    p, y = members(m=5)
    mean, t = e.combine(p)[:, 1], y
    assert np.isclose(((mean - t) ** 2).mean(), ((p[..., 1] - t) ** 2).mean() - p[..., 1].var(axis=0).mean())
    assert log_loss(e.combine(p), y) <= np.mean([log_loss(q, y) for q in p])


def test_weights_are_the_likeliest_scipy_finds():
    from scipy.optimize import minimize
    p, y = members(m=3, n=400)
    credit = p[:, np.arange(len(y)), y]
    found = minimize(lambda v: -np.log(np.exp(v) / np.exp(v).sum() @ credit).mean(), np.zeros(3), method="Nelder-Mead", options={"xatol": 1e-8, "fatol": 1e-12, "maxiter": 5000})
    wanted = np.exp(found.x) / np.exp(found.x).sum()
    assert np.allclose(e.fit_weights(p, y, steps=5000), wanted, atol=2e-3)
    losses = [log_loss(e.combine(p, e.fit_weights(p, y, steps=s)), y) for s in (0, 1, 5, 50)]
    assert losses == sorted(losses, reverse=True)


def test_a_stack_without_penalty_is_logistic_regression():
    from sklearn.linear_model import LogisticRegression
    p, y = members(m=3, n=300)
    z = np.log(p[..., 1] / p[..., 0]).T
    theirs = LogisticRegression(C=np.inf, tol=1e-8, max_iter=1000).fit(z, y).predict_proba(z)
    assert np.allclose(e.Stack(0.0).fit(p, y).predict(p), theirs, atol=1e-3)


def test_the_stacks_gradient_is_right():
    from medimg.models.scratch import numerical_gradient, relative_difference
    p, y = members(m=3, n=20, k=3)
    args = np.log(p), y, np.r_[np.full(3, 1 / 3), np.zeros(3)], 0.1
    at = np.random.default_rng(0).normal(size=6)
    assert relative_difference(e._stack_loss(at, *args)[1], numerical_gradient(lambda v: e._stack_loss(v, *args)[0], at)) < 1e-6


def test_a_heavy_penalty_is_the_mean_of_logits():
    p, y = members()
    assert np.allclose(e.Stack(1e6).fit(p, y).predict(p), e.combine(p, space="logit"), atol=1e-4)


def test_out_of_fold_never_answers_what_it_learned_from():
    folds, seen = np.arange(20) % 4, []

    def fit_predict(learn, held):
        assert not (learn & held).any() and (learn | held).all()
        seen.append(held.sum())
        return np.tile(np.flatnonzero(held)[:, None], (1, 2))
    assert np.array_equal(e.out_of_fold(fit_predict, folds, classes=2)[:, 0], np.arange(20)) and seen == [5] * 4
    with pytest.raises(ConfigError, match="one fold"):
        e.out_of_fold(fit_predict, np.zeros(4), classes=2)
    with pytest.raises(ConfigError, match="answers of shape"):
        e.out_of_fold(lambda learn, held: np.zeros((1, 2)), folds, classes=2)


def test_doubt_is_scipys_entropy_and_adds_up():
    from scipy.stats import entropy
    p, _ = members(k=3)
    doubt = e.disagreement(p)
    assert np.allclose(doubt["whole"], entropy(p.mean(axis=0), base=2, axis=1)) and np.allclose(doubt["shared"], entropy(p, base=2, axis=2).mean(axis=0))
    assert np.allclose(doubt["whole"], doubt["shared"] + doubt["between"]) and (doubt["between"] >= 0).all()
    assert np.allclose(e.disagreement(np.repeat(p[:1], 4, axis=0))["between"], 0, atol=1e-12)


class Constant:
    classes = ("no", "yes")

    def __init__(self, p):
        self.p = p

    def predict(self, images):
        return np.tile([1 - self.p, self.p], (len(images), 1))

    def features(self, images):
        return np.full((len(images), 2), self.p, np.float32)


class Brightness(Constant):
    """Sees the upper left pixel only."""

    def predict(self, images):
        q = np.asarray(images)[:, 0, 0] / 255.0
        return np.stack([1 - q, q], axis=1)


def test_ensembles_and_views_are_predictors():
    from medimg.models.networks import Predictor
    x = np.random.default_rng(0).integers(0, 256, (4, 5, 6))
    team = e.Ensemble([Constant(0.2), Constant(0.6)], weights=[1, 3])
    assert isinstance(team, Predictor) and isinstance(e.Views(team), Predictor)
    assert np.allclose(team.predict(x)[:, 1], 0.5) and team.features(x).shape == (4, 4) and np.allclose(team.doubt(x)["spread"], np.sqrt(0.75 * 0.25) * 0.4)
    seen = e.Views(Brightness(0)).predict(x)[:, 1] * 255
    assert np.allclose(seen, (3 * x[:, 0, 0] + x[:, 1, 0] + x[:, 0, 1]) / 5)
    stack = e.Stack().fit(*members(m=2))
    assert np.allclose(e.Ensemble([Constant(0.2), Constant(0.6)], stack=stack).predict(x), stack.predict(team.each(x)))


def test_views_keep_shape_and_the_middle():
    x = np.random.default_rng(0).random((2, 6, 7, 3))
    views = [view(x) for view in e.shifted_views(2)]
    assert all(v.shape == x.shape for v in views) and np.array_equal(views[0], x)
    assert np.array_equal(views[1][:, :4], x[:, 2:]) and np.array_equal(views[2][:, 2:], x[:, :4]) and np.array_equal(views[3][:, :, :5], x[:, :, 2:])


@pytest.mark.parametrize("call, text", [
    (lambda p, y: e.combine(p, space="odds"), "'odds'"), (lambda p, y: e.combine(p, [1, 1]), "for 3 members"), (lambda p, y: e.combine(p, [0, 0, 0]), "not all zero"),
    (lambda p, y: e.combine(p[0]), "members of shape"), (lambda p, y: e.combine(p * 0.9, space="logit"), "do not exclude"), (lambda p, y: e.fit_weights(p, y[:-1]), "labels of shape"),
    (lambda p, y: e.fit_weights(p, y + 1), "labels of shape"), (lambda p, y: e.Stack().predict(p), "not at all"), (lambda p, y: e.Stack().fit(p, y).predict(p[:2]), "fitted otherwise"),
    (lambda p, y: e.Ensemble([]), "members for"), (lambda p, y: e.Views(None, []), "no view")])
def test_bad_input_is_named(call, text):
    with pytest.raises(ConfigError, match=text):
        call(*members())


def test_broken_members_are_refused():
    p, y = members()
    p[1, 3] = np.nan
    for function in (e.combine, e.disagreement, lambda q: e.fit_weights(q, y)):
        with pytest.raises(MedimgError, match="NaN"):
            function(p)
    with pytest.raises(MedimgError, match="outside"):
        e.combine(members()[0] * 3)
    with pytest.raises(DatasetError, match="one class"):
        e.Stack().fit(members()[0], np.zeros(200, int))
    other = Constant(0.5)
    other.classes = ("yes", "no")
    with pytest.raises(ConfigError, match="same classes in the same order"):
        e.Ensemble([Constant(0.5), other])


# ---- graphs --------------------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def graph():
    """The module, and small networks `nets(classes, n)`."""
    from medimg.models import ensemble_graph
    from medimg.models.networks import build_model
    made = {}

    def nets(classes=2, n=3):
        return [made.setdefault((classes, s), build_model("resnet", (16, 16, 1), classes, seed=s, width=8, blocks=(1, 1))) for s in range(n)]
    ensemble_graph.nets = nets
    return ensemble_graph


X = np.random.default_rng(0).random((9, 16, 16, 1), dtype=np.float32)


@pytest.mark.parametrize("space", ["probability", "logit"])
@pytest.mark.parametrize("classes, task", [(2, "binary"), (4, "multiclass"), (3, "multilabel")])
def test_a_graph_says_what_numpy_says(graph, classes, task, space):
    from medimg.models.networks import to_probability
    nets, w = graph.nets(classes), [1.0, 2.0, 3.0]
    p = np.stack([to_probability(net(X), task) for net in nets])
    ours = to_probability(graph.one_model(graph.side_by_side(nets), task=task, weights=w, space=space)(X)["logits"], task)
    if task == "multilabel":
        z = np.log(p) - np.log1p(-p)
        wanted = np.average(p, axis=0, weights=w) if space == "probability" else 1 / (1 + np.exp(-np.average(z, axis=0, weights=w)))
    else:
        wanted = e.combine(p, w, space=space)
    assert np.abs(ours - wanted).max() < 1e-5


def test_certain_members_leave_a_finite_logit(graph):
    import keras
    z = keras.ops.convert_to_tensor(np.array([[[300.0], [-300.0]], [[90.0], [-1.0]]], "float32"))
    out = np.asarray(graph._vote_sigmoid(z, np.array([0.5, 0.5]), "probability"))[:, 0]
    assert np.isfinite(out).all() and np.isclose(out[0], 0, atol=1e-4) and np.isclose(1 / (1 + np.exp(-out[1])), (1 + 1 / (1 + np.e)) / 2, atol=1e-5)


def test_one_file_with_parity_and_a_predictor(graph, tmp_path):
    from medimg.deployment.engine import Engine, export_onnx, parity
    from medimg.models.resnet import KerasPredictor
    for name, model in (("apart", graph.side_by_side(graph.nets())), ("trunk", graph.shared_trunk(graph.nets(), "s1b1_add"))):
        whole = graph.one_model(model, task="binary")
        engine = Engine(export_onnx(whole, tmp_path / f"{name}.onnx"), threads=1)
        assert parity(whole, engine, X) <= 1e-4 and parity(whole, engine, 255 * X[:3]) <= 1e-2
        assert {k: v.shape for k, v in engine.run(X[:1]).items()} == {"logits": (1, 1), "features": (1, 48)}
        assert KerasPredictor(whole, None, ("a", "b")).predict(X).shape == (9, 2)


def test_an_ensemble_is_saved_and_loaded(graph, tmp_path):
    from medimg.models.networks import load_model
    whole = graph.one_model(graph.side_by_side(graph.nets()), task="binary")
    whole.save(tmp_path / "m.keras")
    assert np.allclose(load_model(tmp_path / "m.keras")(X)["logits"], whole(X)["logits"], atol=1e-6)


def test_a_trunk_has_the_first_networks_eyes_and_everybodys_head(graph):
    nets = graph.nets()
    trunk = graph.shared_trunk(nets, "s1b1_add")
    z = np.asarray(trunk(X)["members"])
    assert np.allclose(z[:, 0], nets[0](X), atol=1e-5) and not np.allclose(z[:, 1], nets[1](X), atol=1e-3)
    assert sum(np.prod(w.shape) for w in trunk.trainable_weights) < 3 * sum(np.prod(w.shape) for w in nets[0].trainable_weights)
    with pytest.raises(ConfigError, match="did you mean s1b1_add"):
        graph.shared_trunk(nets, "s1b1_ad")


def test_the_averages_of_batch_normalisation_are_taken_again(graph):
    import keras
    nets = graph.nets(n=2)
    mean = graph.average_weights(nets, np.repeat(X, 8, axis=0), batch=24)
    first = next(layer for layer in mean.layers if isinstance(layer, keras.layers.BatchNormalization))
    seen = np.asarray(keras.Model(mean.inputs, first.input)(np.repeat(X, 8, axis=0)))
    assert np.allclose(first.moving_mean, seen.mean(axis=(0, 1, 2)), atol=1e-4) and first.momentum == 0.9
    assert np.allclose(graph.average_weights(nets).get_weights()[0], (nets[0].get_weights()[0] + nets[1].get_weights()[0]) / 2)


def test_strangers_make_no_ensemble(graph):
    from medimg.models.networks import build_model
    nets = graph.nets()
    for call, text in ((lambda: graph.side_by_side([]), "do not make one"), (lambda: graph.side_by_side([nets[0], graph.nets(4)[0]]), "do not make one"),
                       (lambda: graph.one_model(nets[0], task="binary"), "has no members"), (lambda: graph.one_model(graph.side_by_side(nets), task="binry"), "did you mean binary"),
                       (lambda: graph.one_model(graph.side_by_side(nets), task="binary", weights=[1]), "for 3 members"), (lambda: graph.average_weights([]), "0 networks"),
                       (lambda: graph.average_weights([nets[0], build_model("mlp-28", (28,), 2)]), "other weights")):
        with pytest.raises(ConfigError, match=text):
            call()
