"""`calibration.json`: other repairs than a temperature, prediction sets that keep their promise, and contradictions that are not believed."""
import json

import numpy as np
import pytest
from scipy.stats import betabinom

from medimg.deployment import bundle as b
from medimg.deployment.intake import Study
from medimg.deployment.predict import answer, predict
from medimg.deployment.prediction import Prediction, from_json
from medimg.deployment.reference import calibrated, check_calibration, fit_calibration, fit_conformal, fit_temperature, in_set, with_sets
from medimg.errors import BundleError, ConfigError
from medimg.evaluation.calibration import Isotonic, Platt, Temperature, VectorScaling
from medimg.evaluation.conformal import Conformal
from medimg.training.recipes import RECIPES


def drawn(n, k, seed=0):
    """Logits (n, k) and labels drawn by softmax of the logits; for k = 1 by their sigmoid."""
    rng = np.random.default_rng(seed)
    z = rng.normal(0, 1.5, (n, k))
    two = np.c_[np.zeros(n), z[:, 0]] if k == 1 else z
    return z, (two + rng.gumbel(size=two.shape)).argmax(axis=1)


TASKS = [("binary", 1), ("multiclass", 4), ("ordinal", 3)]


@pytest.mark.parametrize("coverage", [0.8, 0.9, 0.95])
@pytest.mark.parametrize("task, k", TASKS)
def test_marginal_coverage_lies_within_the_exact_bounds(task, k, coverage):
    """Of exchangeable cases without ties, the number covered among m new ones is beta-binomial (Vovk 2012)."""
    n, m, inside = 200, 300, 0
    rank = int(np.ceil(coverage * (n + 1)))
    low, high = betabinom(m, rank, n + 1 - rank).interval(0.99)
    for seed in range(100):
        z, y = drawn(n + m, k, seed)
        plain = {"method": "temperature", "temperature": 1.0, "n": n, "fitted_on": "validation"}
        sets = with_sets(plain, z[:n], y[:n], task=task, coverage=coverage)["conformal"]
        hit = in_set(calibrated(z[n:], plain, task=task), sets)[np.arange(m), y[n:]].sum()
        inside += low <= hit <= high
    assert inside >= 95, inside


@pytest.mark.parametrize("by_class", [False, True])
@pytest.mark.parametrize("task, k", TASKS)
def test_sets_are_those_of_evaluation_and_of_the_definition(task, k, by_class):
    z, y = drawn(150, k, 3)
    new, _ = drawn(400, k, 4)
    found = fit_calibration(z, y, task=task, by_class=by_class, coverage=0.85)
    p, q = calibrated(z, found, task=task), calibrated(new, found, task=task)
    ours = in_set(q, found["conformal"])
    assert np.array_equal(ours, Conformal.fit(p, y, coverage=0.85, by_class=by_class).apply(q))
    assert np.array_equal(ours, Conformal.from_json(json.dumps({"method": "conformal", **found["conformal"]})).apply(q))
    for row, one in zip(ours[:60], q):                             # a class stays unless too many calibration cases were less strange: by counting
        for c, kept in enumerate(row):
            own = 1 - p[np.arange(len(y)), y][y == c] if by_class else 1 - p[np.arange(len(y)), y]
            below = np.sum(own < 1 - one[c])
            assert kept == (below < np.ceil(0.85 * (len(own) + 1) - 1e-9))


def test_methods_are_those_of_evaluation():
    z, y = drawn(300, 1)
    new = drawn(50, 1, 9)[0]
    for method, oracle in (("platt", Platt), ("isotonic", Isotonic), ("temperature", Temperature)):
        found = json.loads(json.dumps(check_calibration(fit_calibration(z, y, task="binary", method=method), task="binary", classes="ab")))
        assert np.allclose(calibrated(new, found, task="binary"), oracle.fit(z, y).apply(new), atol=1e-5 if method == "temperature" else 1e-12)
    z, y = drawn(300, 3)
    found = check_calibration(fit_calibration(z, y, task="multiclass", method="vector"), task="multiclass", classes="abc")
    assert np.allclose(calibrated(z, found, task="multiclass"), VectorScaling.fit(z, y).apply(z))


@pytest.mark.parametrize("method, task", [("platt", "multiclass"), ("isotonic", "multilabel"), ("vector", "binary"), ("plat", "binary")])
def test_methods_that_do_not_fit_are_refused(method, task):
    z, y = drawn(60, 1 if task == "binary" else 3)
    with pytest.raises(ConfigError):
        fit_calibration(z, y, task=task, method=method)


def test_sets_are_left_out_where_there_are_none():
    z, y = drawn(8, 1)
    assert "conformal" not in fit_calibration(z, np.arange(8) % 2, task="binary", coverage=0.9)                 # nine cases are the least
    assert "conformal" in fit_calibration(*drawn(9, 1, 5), task="binary", coverage=0.9)
    many = np.random.default_rng(0).normal(size=(50, 3))
    assert "conformal" not in fit_calibration(many, (many > 0).astype(int), task="multilabel") and "conformal" not in fit_calibration(z, np.arange(8) % 2, task="binary", coverage=None)


def test_a_class_with_too_few_cases_is_in_every_set():
    y = np.r_[np.zeros(50, int), np.ones(5, int)]
    p = np.linspace(0.01, 0.99, 55)
    with pytest.warns(UserWarning, match="too few"):
        sets = fit_conformal(np.c_[1 - p, p], y, by_class=True)
    assert sets["limits"][1] is None and in_set([[1.0, 0.0]], sets)[0, 1]
    whole = {"method": "temperature", "temperature": 1.0, "n": 55, "fitted_on": "validation", "conformal": sets}
    assert check_calibration(whole, task="binary", classes="ab")


GOOD = fit_calibration(*drawn(200, 1), task="binary")
SETS = GOOD["conformal"]
LINE = {"method": "platt", "slope": 1.0, "intercept": 0.0, "n": 9, "fitted_on": "validation"}
BAD = [
    {**GOOD, "conformal": {**SETS, **change}} for change in (
        {"limits": [0.2, 0.7]}, {"limits": [None, None]}, {"limits": [0.5] * 3, "n": [1, 1, 198]}, {"limits": [1.5, 1.5]}, {"limits": ["0.5", "0.5"]}, {"limits": 0.5},
        {"coverage": 0.0}, {"coverage": 1.0}, {"coverage": 0.999}, {"kind": "aps"}, {"promise": "label shift"}, {"n": [100, 101]}, {"n": [-1, 201]}, {"more": 1},
        {"promise": "by class", "n": [200, 0]}, {"fitted_on": 3})
] + [{**GOOD, "conformal": None}, {**GOOD, "conformall": SETS}, {k: v for k, v in GOOD.items() if k != "n"}, {**GOOD, "method": "magic"}, {**GOOD, "method": ["temperature"]}, [], "x",
     {**GOOD, "temperature": 0}, {**GOOD, "temperature": True}, {**LINE, "slope": -1.0}, {**LINE, "slope": 0}, {**LINE, "temperature": 1.0}, {**LINE, "intercept": 1e300},
     {"method": "isotonic", "scores": [0.0, 1.0], "values": [0.9, 0.1], "n": 9, "fitted_on": "validation"}, {"method": "isotonic", "scores": [1.0, 1.0], "values": [0.1, 0.9], "n": 9, "fitted_on": "validation"},
     {"method": "isotonic", "scores": [0.0, 1.0], "values": [0.1, 1.9], "n": 9, "fitted_on": "validation"}, {"method": "isotonic", "scores": [0.0], "values": [0.1, 0.9], "n": 9, "fitted_on": "validation"},
     {"method": "vector", "scale": [1.0, 1.0], "shift": [0.0, 0.0], "n": 9, "fitted_on": "validation"}]


@pytest.mark.parametrize("bad", BAD, ids=[str(i) for i in range(len(BAD))])
def test_contradictions_are_refused(bad):
    with pytest.raises(BundleError, match="calibration.json"):
        check_calibration(bad, task="binary", classes=("a", "b"))


def test_old_files_are_accepted():
    old = {"fitted_on": "validation", "log_loss_after": 0.03, "log_loss_before": 0.05, "method": "temperature", "n": 300, "temperature": 0.606473}
    assert check_calibration(old, task="binary", classes="ab") is old
    none = {"fitted_on": "nothing: the score is not a probability", "method": "none", "n": 0, "temperature": 1.0}
    assert check_calibration(none, task="segmentation", classes=("background", "lung")) is none


# ---- in a bundle ---------------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def careful(tmp_path_factory):
    folder = tmp_path_factory.mktemp("careful")
    images, labels = b.toy_images(400, seed=8)
    logits = b.toy_bundle(folder / "old").run(images)["logits"]
    return {method: b.toy_bundle(folder / method, calibration=fit_calibration(logits, labels, task="binary", method=method)) for method in ("temperature", "platt")}


@pytest.mark.parametrize("method", ["temperature", "platt"])
def test_answers_carry_their_set(careful, method):
    bundle, sizes = careful[method], set()
    for image in b.toy_images(120, seed=9)[0]:
        p = answer(bundle, Study("a.png", image))
        if p.status == "refused":
            assert p.prediction_set is None and p.uncertainty is None
            continue
        limit = bundle.calibration["conformal"]["limits"][0]
        assert p.prediction_set == tuple(c for c, v in p.probability.items() if 1 - v <= limit) and p.uncertainty["level"] == 0.9
        sizes.add(len(p.prediction_set))
        assert ("told apart" in p.uncertainty["note"]) == (len(p.prediction_set) == 2) and ("no class fits" in p.uncertainty["note"]) == (len(p.prediction_set) == 0)
        assert f"by {method}" in p.uncertainty["note"] and from_json(p.to_json()).prediction_set == p.prediction_set
        assert p.probability["bright"] == pytest.approx(bundle.predict(image[None])[0, 1])
    assert len(sizes) > 1


def test_unlike_images_get_no_set(careful):
    p = answer(careful["temperature"], Study("a.png", np.tile(np.array([0, 255], "uint8"), (32, 16))))
    assert p.status == "refused" and p.prediction_set is None and p.ood["score"] > p.ood["threshold"]


def test_the_card_says_what_is_promised_and_a_bundle_without_sets_says_so(careful, tmp_path):
    assert "hold the true class in 90% of patients" in careful["platt"].card
    old = b.toy_bundle(tmp_path / "old")
    p = answer(old, Study("a.png", b.toy_images(2, seed=5)[0][1]))
    assert p.prediction_set is None and "no limits" in p.uncertainty["note"] and "Prediction sets" not in old.card


def test_a_contradiction_is_refused_by_the_bundle(careful, tmp_path):
    bundle = careful["temperature"]
    wrong = {**bundle.calibration, "conformal": {**bundle.calibration["conformal"], "limits": [0.1, 0.9]}}
    with pytest.raises(BundleError, match="marginal"):
        b.toy_bundle(tmp_path / "new", calibration=wrong)
    files = b.read_files(bundle.path)
    files["calibration.json"] = b.encode(wrong)
    with pytest.raises(BundleError):
        b.check_whole(files)                                        # the seal does not hold
    manifest = b.seal({**bundle.manifest, "files": {**bundle.manifest["files"], "calibration.json": b.sha256_of(files["calibration.json"])}})
    files["manifest.json"] = b.encode(manifest)
    (tmp_path / "sealed.medimg").write_bytes(b.archive_of(files))
    sealed = b.Bundle.load(tmp_path / "sealed.medimg", allow_unsigned=True)
    with pytest.raises(BundleError, match="marginal"):
        predict(sealed, b.toy_images(1)[0][0])


@pytest.mark.parametrize("name", ["pneumonia", "phantom-cxr"])
def test_shipped_classifiers_have_sets(name):
    sets, bundle = b.Bundle.load(name).calibration["conformal"], b.Bundle.load(name)
    assert sets["fitted_on"] == "validation" and sum(sets["n"]) == bundle.calibration["n"] and sets["coverage"] == RECIPES[name].coverage
    assert ", ".join(f"{n} {c}" for n, c in zip(sets["n"], bundle.classes)) in bundle.card


def test_the_known_limit_is_in_the_card():
    from medimg.experiments.protocol import stored_results
    figures, card = stored_results()["uncertainty-pneumonia"]["figures"], b.Bundle.load("pneumonia").card
    for key in ("test: coverage, plain", "test: coverage[normal], plain", "test: coverage[normal], by class"):
        assert "{value:.1%} [{low:.1%}, {high:.1%}]".format(**figures[key]) in card


def test_cli_says_the_set(careful, tmp_path, capsys):
    from medimg.cli import main
    from medimg.plots import png_bytes
    (tmp_path / "a.png").write_bytes(png_bytes(b.toy_images(2, seed=5)[0][1]))
    folder = careful["temperature"].path
    import os
    os.environ["MEDIMG_ALLOW_UNSIGNED"], before = "1", os.environ.get("MEDIMG_ALLOW_UNSIGNED")
    try:
        main(["predict", str(folder), str(tmp_path / "a.png"), "--json"])
    except SystemExit as stop:
        assert not stop.code
    finally:
        os.environ.pop("MEDIMG_ALLOW_UNSIGNED") if before is None else os.environ.update(MEDIMG_ALLOW_UNSIGNED=before)
    said = json.loads(capsys.readouterr().out)
    record = said[0] if isinstance(said, list) else said
    assert record["prediction_set"] == ["bright"] and record["uncertainty"]["level"] == 0.9


# ---- the record ----------------------------------------------------------------------------------------------------------------
def test_recommendations_are_checked_by_their_schema():
    from medimg.deployment.guidelines import recommendation_schema
    good = {"guideline": "g", "edition": "e", "rule": "r", "source": "s", "status": "applies", "category": None, "text": "t", "finding": None, "inputs_used": {}, "inputs_missing": [],
            "reason": None, "note": "for the clinician's decision"}
    assert set(good) == set(recommendation_schema()["required"])
    again = from_json(Prediction("answered", "a.png", recommendations=(good,)).to_json())
    assert again.recommendations == (good,)
    for change in ({"status": "perhaps"}, {"note": ""}, {"finding": -1}, {"extra": 1}, {"text": 3}):
        with pytest.raises(BundleError, match="recommendations"):
            Prediction("answered", "a.png", recommendations=({**good, **change},)).to_dict()
    old = Prediction("answered", "a.png", uncertainty={"entropy_bits": 0.5, "note": "as before"})
    assert from_json(old.to_json()).uncertainty == old.uncertainty


def test_temperature_of_two_classes_changes_no_set():
    z, y = drawn(300, 1)
    fit = fit_temperature(3 * z, y, task="binary")
    one = with_sets({**fit, "temperature": 1.0}, 3 * z, y, task="binary")
    both = with_sets(fit, 3 * z, y, task="binary")
    assert np.array_equal(*(in_set(calibrated(3 * z, c, task="binary"), c["conformal"]) for c in (one, both)))
