"""Table models against scikit-learn's own answers, published agreement values, and properties of folds by patient."""
import numpy as np
import pytest

from medimg.errors import ConfigError, DatasetError, MedimgError
from medimg.models.classical import (METHODS, ClassicalPredictor, choose_params, fit_rows, grouped_folds, icc, load_classical, nested_cv,
                                     selection_frequency)
from medimg.models.networks import Predictor
from medimg.models.radiomics import table_28
from medimg.models.tables import TableModel, compile_model, compile_svm, load_arrays, save_arrays, walk_trees


def table(n=150, d=5, classes=2, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(3, 10, (n, d))
    cuts = np.quantile(x[:, 0] + x[:, 1], np.arange(1, classes) / classes)
    return x, np.digitize(x[:, 0] + x[:, 1] + rng.normal(0, 3, n), cuts), np.arange(n) // 3


# ---- arrays against scikit-learn ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("kind", ["logistic", "forest", "boosting"])
def test_arrays_answer_like_scikit_learn(kind, classes):
    from sklearn.ensemble import GradientBoostingClassifier, RandomForestClassifier
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler
    x, y, _ = table(classes=classes)
    model = {"logistic": LogisticRegression(), "forest": RandomForestClassifier(20, random_state=0), "boosting": GradientBoostingClassifier(n_estimators=20, random_state=0)}[kind]
    scaler = StandardScaler().fit(x)
    model.fit(scaler.transform(x), y)
    unseen = table(400, seed=1)[0]
    unseen[:20] = scaler.inverse_transform(np.float32(scaler.transform(x[:20])))      # on and beside the thresholds
    assert np.allclose(compile_model(scaler, model).predict(unseen), model.predict_proba(scaler.transform(unseen)), atol=1e-12)


def test_svm_arrays_equal_the_decision_function():
    from sklearn.preprocessing import StandardScaler
    from sklearn.svm import SVC
    x, y, _ = table()
    scaler = StandardScaler().fit(x)
    machine = SVC(C=3, gamma=0.1).fit(scaler.transform(x), y)
    p = compile_svm(scaler, [machine], [2.0], [-0.5]).predict(x)[:, 1]
    assert np.allclose(p, 1 / (1 + np.exp(-(2 * machine.decision_function(scaler.transform(x)) - 0.5))), atol=1e-12)


def test_only_known_estimators_are_compiled():
    from sklearn.naive_bayes import GaussianNB
    from sklearn.preprocessing import StandardScaler
    with pytest.raises(ConfigError, match="GaussianNB"):
        compile_model(StandardScaler().fit(table()[0]), GaussianNB())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("classes", [2, 3])
def test_methods_learn_and_give_probabilities(method, classes):
    x, y, groups = table(classes=classes)
    model = fit_rows(x, y, method=method, groups=groups)
    p = model.predict(table(200, classes=classes, seed=3)[0])
    truth = table(200, classes=classes, seed=3)[1]
    assert p.shape == (200, classes) and np.allclose(p.sum(1), 1) and (p >= 0).all()
    assert (p.argmax(1) == truth).mean() > 0.6
    again = fit_rows(x, y, method=method, groups=groups).predict(x)
    assert np.array_equal(again, model.predict(x))                               # same seed, same model


def test_walk_by_hand():
    stump = {"left": np.array([1, 1, 2]), "right": np.array([2, 1, 2]), "feature": np.array([0, 0, 0]), "threshold": np.array([0.5, 0, 0]),
             "value": np.array([[0.0], [10], [20]]), "root": np.array([0])}
    assert walk_trees(stump, [[0.5], [0.50001]]).ravel().tolist() == [10, 20]


# ---- files ----------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("method", METHODS)
def test_predictor_is_kept_without_a_pickle(method, tmp_path):
    images = np.random.default_rng(0).random((24, 12, 12)) * (1 + np.arange(24) % 2)[:, None, None]
    predictor = ClassicalPredictor(fit_rows(table_28(images), np.arange(24) % 2, method=method), ("dim", "bright"))
    again = load_classical(predictor.save(tmp_path / "p.npz"))
    assert isinstance(again, Predictor) and again.classes == ("dim", "bright")
    assert np.array_equal(again.predict(images), predictor.predict(images)) and again.features(images).dtype == np.float32
    with np.load(tmp_path / "p.npz", allow_pickle=False) as kept:
        assert all(kept[name].dtype != object for name in kept.files)


def test_files_that_are_no_models(tmp_path):
    good = save_arrays(tmp_path / "a.npz", {"w": np.ones(1000)}, {"kind": "toy"})
    objects = tmp_path / "o.npz"
    np.savez(objects, w=np.array([{}], dtype=object), facts=np.array("{}"))
    (tmp_path / "cut.npz").write_bytes(good.read_bytes()[:100])
    (tmp_path / "text.npz").write_text("hello")
    for path in (objects, tmp_path / "cut.npz", tmp_path / "text.npz", tmp_path / "absent.npz", tmp_path):
        with pytest.raises(MedimgError):
            load_arrays(path)
    with pytest.raises(MedimgError, match="unpacks to"):
        load_arrays(good, limit=100)
    with pytest.raises(MedimgError, match="not a classical predictor"):
        load_classical(good)
    bad = save_arrays(tmp_path / "b.npz", {"mean": np.zeros(28)}, {"medimg": "classical-1", "kind": "logistic", "classes": ["a", "b"], "extractor": "features-28"})
    with pytest.raises(MedimgError, match="damaged"):
        load_classical(bad)


# ---- folds ----------------------------------------------------------------------------------------------------------------------
def test_folds_hold_whole_patients_and_all_classes():
    _, y, groups = table(300)
    fold = grouped_folds(y, groups, folds=4, seed=1)
    for k in range(4):
        assert not set(groups[fold == k]) & set(groups[fold != k]) and set(y[fold == k]) == {0, 1}
    assert np.bincount(fold).min() > 300 / 4 * 0.7 and np.array_equal(fold, grouped_folds(y, groups, folds=4, seed=1))


def test_nested_answers_do_not_use_the_own_patient():
    """A label that is only the patient's number cannot be predicted for a patient never seen."""
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(40), 5)
    y = rng.integers(0, 2, 40)[groups]
    x = rng.normal(size=(40, 4))[groups] + 0.05 * rng.normal(size=(200, 4))
    honest = nested_cv(x, y, groups, method="forest", folds=3)
    leaky = nested_cv(x, y, None, method="forest", folds=3)
    right = [(r.probability.argmax(1) == y).mean() for r in (honest, leaky)]
    assert right[0] < 0.7 < 0.95 < right[1] and len(honest.chosen) == 3
    with pytest.raises(DatasetError, match="is in fold"):
        nested_cv(x, y, groups, method="logistic", folds=np.arange(200) % 3)


def test_choice_is_the_smallest_log_loss():
    x, y, groups = table(200)
    chosen, tried = choose_params(x, y, groups, method="logistic")
    assert chosen == min(tried, key=lambda pair: pair[1])[0] and [p for p, _ in tried] == list(METHODS["logistic"])


@pytest.mark.parametrize("x, y", [(np.zeros((6, 0)), np.arange(6) % 2), (np.full((6, 2), np.nan), np.arange(6) % 2), (np.zeros((6, 2)), np.zeros(6, int)),
                                  (np.zeros((6, 2)), np.arange(5) % 2), (np.zeros((6, 2)), np.array([0, 2] * 3)), (np.zeros((6, 2)), np.array([0.5] * 6)), (np.zeros(6), np.arange(6) % 2)])
def test_tables_that_teach_nothing(x, y):
    with pytest.raises(DatasetError):
        fit_rows(x, y, method="logistic")


def test_unknown_methods_settings_and_rows():
    x, y, _ = table()
    for call in (lambda: fit_rows(x, y, method="forrest"), lambda: fit_rows(x, y, method="svm", params={"depth": 3}), lambda: choose_params(x, y, method="magic"),
                 lambda: TableModel("magic", {}), lambda: fit_rows(x, y, method="logistic").predict(x[:, :2])):
        with pytest.raises(ConfigError):
            call()
    with pytest.raises(MedimgError, match="NaN"):
        fit_rows(x, y, method="logistic").predict(np.full((1, 5), np.nan))
    with pytest.raises(DatasetError, match="folds"):
        grouped_folds([0, 0, 0, 1], [0, 1, 2, 3], folds=2)


# ---- stability ------------------------------------------------------------------------------------------------------------------
def test_icc_of_shrout_and_fleiss():
    """Psychological Bulletin 86 (1979) 420, table 2: ICC(2,1) = .29."""
    assert round(icc([[9, 2, 5, 8], [6, 1, 3, 2], [8, 4, 6, 8], [7, 1, 2, 6], [10, 5, 6, 9], [6, 2, 4, 7]]), 2) == 0.29


def test_icc_limits():
    rng = np.random.default_rng(0)
    truth = rng.normal(size=(60, 1))
    assert np.isclose(icc(np.repeat(truth, 3, 1)), 1) and abs(icc(rng.normal(size=(400, 3)))) < 0.1
    assert icc(truth + np.array([[0.0, 5.0]])) < 0.2                         # a reader who always says more does not agree
    for wrong in (np.ones((5, 2)), np.zeros(4), np.full((3, 3), np.nan), np.zeros((1, 4))):
        with pytest.raises(DatasetError):
            icc(wrong)


def test_selection_finds_the_column_that_matters():
    x, y, groups = table(240, d=8)
    kept = selection_frequency(x, y, groups, draws=12, strength=0.1)
    assert kept[:2].min() > 0.9 and kept[2:].mean() < 0.5
    with pytest.raises(DatasetError, match="3 classes"):
        selection_frequency(*table(classes=3))


# ---- the experiment -------------------------------------------------------------------------------------------------------------
def test_outline_finds_a_ball_in_lung():
    from medimg.experiments.classical import outline
    rng, r = np.random.default_rng(0), np.sqrt((np.mgrid[-8:8, -8:8, -8:8] ** 2).sum(0))
    for hu in (30, -600):
        cube = np.where(r <= 4, hu, -790) + rng.normal(0, 20, r.shape)
        found = outline(cube, 2.0)
        assert 2 * (found & (r <= 4)).sum() / (found.sum() + (r <= 4).sum()) > 0.85
    assert outline(np.full((16, 16, 16), -790.0), 2.0).sum() >= 7
