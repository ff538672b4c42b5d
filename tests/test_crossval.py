"""Cross-validation against scikit-learn, against simulated truth, and against every way to make a figure false."""
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from scipy.stats import binom, norm, rankdata, t
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import LeaveOneGroupOut, StratifiedGroupKFold, cross_val_predict

from medimg.errors import ConfigError, DatasetError, MedimgError
from medimg.training.crossval import CrossValidation, Folds, cross_validate, fold_leaks, mean_interval, nested, patient_folds, site_folds
from medimg.training.learning_curve import LearningCurve, Needed, PowerLaw, fit_power_law, learning_curve, nested_patients


def ward(seed, patients=60, images=2, apart=0.8, columns=6):
    """Features, labels and patients; the first two columns tell a little."""
    rng = np.random.default_rng(seed)
    ill, who = rng.permutation(np.arange(patients) % 2), np.repeat(np.arange(patients), images)
    own = (rng.normal(size=(patients, columns))[who] + rng.normal(size=(len(who), columns))) / np.sqrt(2)
    own[:, :2] += apart * ill[who, None]
    return own, ill[who], who


def auc(y, p):
    """By ranks; scikit-learn's own is slow in loops (they agree: see below)."""
    ranks, ill = rankdata(p), np.asarray(y) == 1
    return (ranks[ill].sum() - ill.sum() * (ill.sum() + 1) / 2) / (ill.sum() * (~ill).sum())


def ridge(x, y):
    c = x - x.mean(0)
    return np.linalg.solve(c.T @ c + np.eye(x.shape[1]), c.T @ (y - y.mean()))


def ridge_on(x, y):
    return lambda train, test: x[test] @ ridge(x[train], y[train])


# ---- folds ---------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("seed", range(6))
def test_each_patient_is_tested_once_a_round_and_never_trained_on(seed):
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, 6, 80)
    who = rng.permutation(np.repeat([f"P{k}" for k in range(80)], sizes))
    y = (rng.random(len(who)) < 0.3).astype(int)
    folds = patient_folds(y, who, folds=5, repeats=3, seed=seed)
    assert len(folds) == 15 and folds.repeat.tolist() == [0] * 5 + [1] * 5 + [2] * 5
    for k, (train, test) in enumerate(folds):
        assert not set(who[train]) & set(who[test]) and sorted([*train, *test]) == list(range(len(y)))
        assert abs(y[test].mean() - y.mean()) < 0.12 and abs(len(test) - len(y) / 5) < 0.1 * len(y)
    for r in range(3):
        tested = np.concatenate([test for k, (_, test) in enumerate(folds) if folds.repeat[k] == r])
        assert sorted(tested) == list(range(len(y)))
    assert folds.pairs[0][1].tolist() != folds.pairs[5][1].tolist()


@pytest.mark.parametrize("seed", [0, 7])
def test_the_folds_are_those_of_scikit_learn(seed):
    _, y, who = ward(seed, 40, 3)
    ours = patient_folds(y, who, folds=4, repeats=2, seed=seed)
    theirs = [pair for r in range(2) for pair in StratifiedGroupKFold(4, shuffle=True, random_state=seed + r).split(y, y, who)]
    assert all(np.array_equal(a, b) for one, two in zip(ours, theirs, strict=True) for a, b in zip(one, two, strict=True))
    site = np.array(["N", "S", "W"])[who % 3]
    assert all(np.array_equal(a[1], b[1]) for a, b in zip(site_folds(y, site, who), LeaveOneGroupOut().split(y, y, site), strict=True))


def test_ids_of_any_kind_make_the_same_folds_and_are_not_kept():
    _, y, who = ward(3, 30)
    names = np.array([f"DOE^{k:03d}" for k in who])
    a, b = patient_folds(y, who), patient_folds(y, names)
    assert "DOE" not in repr(vars(b)) and a.digest == b.digest == patient_folds(y, who).digest
    assert len({a.digest, patient_folds(y, who, seed=1).digest, patient_folds(1 - y, who).digest, patient_folds(y, "each").digest}) == 4


def test_names_of_classes_and_masks_are_taken():
    y = np.array(["ill", "well"] * 10)
    folds = Folds(y, "each", [(np.arange(20) < 10, np.arange(20) >= 10)])
    assert folds.pairs[0][1].tolist() == list(range(10, 20)) and folds.ratio == 1
    assert Folds(y.astype(object), "each", folds.pairs).digest == folds.digest
    with pytest.raises(DatasetError, match="type object"):
        Folds(np.array(["ill", None] * 10, object), "each", folds.pairs)


E20 = np.arange(20) % 2
ERRORS = {
    "no patient ids": lambda: patient_folds(E20),
    "2 of 20 cases have no patient id, the first in row 3": lambda: patient_folds(E20, [None if k in (3, 5) else k for k in range(20)]),
    "1 of 20 cases have no patient id": lambda: patient_folds(E20, [float("nan"), *range(19)]),
    "20 labels and patient ids of shape (19,)": lambda: patient_folds(E20, range(19)),
    "4 patients cannot fill 5 folds": lambda: patient_folds(E20, np.arange(20) // 5),
    "a class has 2 patients only": lambda: patient_folds([1, 1, *[0] * 18], "each", folds=3),
    "all 20 cases are of one class": lambda: patient_folds(np.zeros(20, int), "each"),
    "cut a continuous value": lambda: patient_folds(np.linspace(0, 1, 20), "each"),
    "2 or more folds": lambda: patient_folds(E20, "each", folds=1),
    "all cases are of one site": lambda: site_folds(E20, ["N"] * 20, "each"),
    "no site ids": lambda: site_folds(E20, None, "each"),
    "class 1 is absent from the test part of fold 0": lambda: site_folds(E20, np.where((E20 == 0) & (np.arange(20) < 10), "A", "B"), "each"),
    "1 patients are in training and in test of fold 0, for example that of rows 0 and 1": lambda: Folds([0, 0, 1, 1], [5, 5, 6, 7], [([0, 2], [1, 3])]),
    "the test part of fold 1 has no case": lambda: Folds(E20, "each", [(range(10), range(10, 20)), (range(10), [])]),
    "the training part of fold 0 has no case": lambda: Folds(E20, "each", [(np.zeros(20, bool), np.ones(20, bool))]),
    "class 0 is absent from the training part": lambda: Folds(E20, "each", [([1, 3], [0, 5])]),
    "class ill is absent from the test part": lambda: Folds(["ill", "well"] * 2, "each", [([0, 1], [3])]),
    "different rows from 0 to 19": lambda: Folds(E20, "each", [([0, 1], [2, 20])]),
    "does not list different rows": lambda: Folds(E20, "each", [([0, 1, 1], [2, 3])]),
    "there is no fold": lambda: Folds(E20, "each", []),
}


@pytest.mark.parametrize("text", ERRORS)
def test_what_would_make_a_figure_false_is_refused(text):
    with pytest.raises(DatasetError) as caught:
        ERRORS[text]()
    assert text in str(caught.value) and caught.value.remedy


def test_a_patient_at_two_sites_is_refused():
    with pytest.raises(DatasetError, match="that of rows 10 and 0"):
        site_folds(E20, np.arange(20) // 10, [0, *range(1, 10), 0, *range(11, 20)])


# ---- intervals -----------------------------------------------------------------------------------------------------------------
def test_interval_by_hand():
    v = np.array([0.7, 0.8, 0.75, 0.85, 0.9])
    half = t.ppf(0.975, 4) * v.std(ddof=1) * np.sqrt(1 / 5 + 1 / 4)
    assert mean_interval(v, ratio=0.25) == pytest.approx((v.mean() - half, v.mean() + half))
    assert mean_interval(v, ratio=0) == pytest.approx(t.interval(0.95, 4, v.mean(), v.std(ddof=1) / np.sqrt(5)))
    assert np.isnan(mean_interval([1.0, 1.0], ratio=0.25)).all()


@pytest.mark.parametrize("wrong", [dict(values=[0.5], ratio=0), dict(values=[0.5, np.nan], ratio=0), dict(values=[0.5, 0.6], ratio=0, level=95), dict(values=[0.5, 0.6], ratio=-1)])
def test_interval_errors(wrong):
    with pytest.raises(ConfigError, match="no interval"):
        mean_interval(**wrong)


def test_coverage_of_the_intervals():
    """On simulated wards with a known true AUC: the naive interval over rounds covers too rarely, the corrected one does not."""
    apart = np.r_[0.8, 0.8, np.zeros(4)]
    true = np.mean([norm.cdf(w @ apart / np.sqrt(2 * w @ w)) for w in (ridge(*ward([1, s], 48)[:2]) for s in range(800))])
    wards, hits = 120, np.zeros(2, int)
    for seed in range(wards):
        x, y, who = ward([2, seed])
        cv = cross_validate(ridge_on(x, y), patient_folds(y, who, repeats=4, seed=seed), metric=auc, progress=False)
        for k, ratio in enumerate((0, cv.folds.ratio)):
            low, high = mean_interval(cv.values, ratio=ratio)
            hits[k] += low <= true <= high
        assert cv.interval() == (low, high)
    assert hits[0] < binom.ppf(0.001, wards, 0.8), f"naive: {hits[0]} of {wards}"
    assert hits[1] >= binom.ppf(0.001, wards, 0.9), f"corrected: {hits[1]} of {wards}"


def test_patient_interval_is_that_of_the_patients():
    """With accuracy and one image a patient, the bootstrap of patients is near the binomial standard error; copies of images do not narrow it."""
    rng = np.random.default_rng(0)
    y, right = np.arange(200) % 2, rng.random(200) < 0.8

    def run(copies):
        labels, ok = np.repeat(y, copies), np.repeat(right, copies)
        folds = patient_folds(labels, np.repeat(np.arange(200), copies))
        return cross_validate(lambda train, test: np.where(ok[test], labels[test], 1 - labels[test]), folds, metric=lambda a, b: np.mean(a == b), progress=False)
    low, high = run(1).patient_interval(n_boot=600)
    expected = 2 * 1.96 * np.sqrt(right.mean() * (1 - right.mean()) / 200)
    assert 0.85 < (high - low) / expected < 1.15 and low < right.mean() < high
    assert 0.85 < np.subtract(*run(4).patient_interval(n_boot=600)[::-1]) / expected < 1.15


def test_patient_interval_says_when_no_draw_is_defined(monkeypatch):
    cv = cross_validate(lambda train, test: test, Folds([0, 1, 0, 1], "each", [([0, 1], [2, 3])]), metric=lambda y, p: 0.5, progress=False)
    monkeypatch.setattr("medimg.training.crossval._on_draw", lambda cv, counts: [])
    with pytest.raises(MedimgError, match="none of 9 draws"):
        cv.patient_interval(n_boot=9)


# ---- cross_validate ------------------------------------------------------------------------------------------------------------
def test_answers_equal_cross_val_predict():
    from sklearn.linear_model import LogisticRegression
    x, y, who = ward(5)
    folds = patient_folds(y, who, seed=3)
    ours = cross_validate(lambda train, test: LogisticRegression().fit(x[train], y[train]).predict_proba(x[test]), folds, metric=lambda y, p: roc_auc_score(y, p[:, 1]), progress=False)
    theirs = cross_val_predict(LogisticRegression(), x, y, groups=who, cv=StratifiedGroupKFold(5, shuffle=True, random_state=3), method="predict_proba")
    np.testing.assert_array_equal(ours.predictions[0], theirs)
    assert ours.values == pytest.approx([auc(y[test], theirs[test, 1]) for _, test in folds])
    assert ours.values.tolist() == [roc_auc_score(y[test], theirs[test, 1]) for _, test in folds]


def test_cases_that_a_round_does_not_test_stay_nan():
    cv = cross_validate(lambda train, test: test, Folds([0, 1] * 4, "each", [([0, 1], [2, 3]), ([0, 1], [2, 5])]), metric=lambda y, p: 0.5, progress=False)
    assert cv.predictions.shape == (2, 8) and np.isnan(cv.predictions).sum() == 12


KILLED = """
import sys, time
import numpy as np
from medimg.training.crossval import cross_validate, patient_folds
y, x = np.arange(60) % 2, np.random.default_rng(0).normal(size=60) + np.arange(60) % 2
def slow(train, test):
    time.sleep(0.4)
    print("trained", flush=True)
    return x[test] - x[train].mean()
cv = cross_validate(slow, patient_folds(y, "each", folds=6), metric=lambda y, p: np.mean((p > 0) == y), out=sys.argv[1])
np.save(sys.argv[2], cv.predictions)
"""


def test_a_kill_loses_at_most_one_fold(tmp_path):
    command = [sys.executable, "-c", KILLED, str(tmp_path / "kept"), str(tmp_path / "p.npy")]
    first = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ)
    try:
        for line in first.stdout:
            if line.startswith("fold 3"):
                break
        time.sleep(0.1)
    finally:
        first.send_signal(signal.SIGKILL)
        first.wait()
    done = len(list((tmp_path / "kept").glob("fold-*.npz")))
    assert 3 <= done < 6
    again = subprocess.run(command, capture_output=True, text=True, check=True)
    assert again.stdout.count("trained") == 6 - done and again.stdout.count("(kept)") == done
    fresh = subprocess.run([*command[:3], str(tmp_path / "fresh"), str(tmp_path / "q.npy")], capture_output=True, text=True, check=True)
    assert fresh.stdout.count("trained") == 6
    np.testing.assert_array_equal(np.load(tmp_path / "p.npy"), np.load(tmp_path / "q.npy"))


def test_files_of_another_split_or_plan_are_refused_before_any_training(tmp_path):
    x, y, who = ward(6)
    folds, calls = patient_folds(y, who), []

    def counted(train, test):
        calls.append(1)
        return x[test, 0]
    cross_validate(counted, folds, metric=roc_auc_score, out=tmp_path, plan={"model": "a", "sizes": (1, 2)}, progress=False)
    cross_validate(counted, folds, metric=roc_auc_score, out=tmp_path, plan={"model": "a", "sizes": [1, 2]}, progress=False)
    assert len(calls) == 5
    for other, plan, text in ((patient_folds(y, who, seed=1), {"model": "a", "sizes": [1, 2]}, "split"), (folds, {"model": "b"}, "plan"), (folds, None, "plan")):
        with pytest.raises(ConfigError, match=f"another {text}"):
            cross_validate(counted, other, metric=roc_auc_score, out=tmp_path, plan=plan, progress=False)
    assert len(calls) == 5


def test_a_damaged_file_is_named_and_made_again(tmp_path):
    x, y, who = ward(6)
    run = lambda: cross_validate(ridge_on(x, y), patient_folds(y, who), metric=roc_auc_score, out=tmp_path, progress=False)
    before, file = run(), tmp_path / "fold-002.npz"
    file.write_bytes(file.read_bytes()[:-40])
    with pytest.raises(MedimgError, match="fold-002.npz.*delete this file"):
        run()
    file.unlink()
    np.testing.assert_array_equal(run().predictions, before.predictions)


@pytest.mark.parametrize("answer, text", [(lambda n: np.zeros(n - 1), "for 20 test cases"), (lambda n: np.full(n, np.nan), "finite"), (lambda n: np.array(["ill"] * n), "finite"), (lambda n: 0.5, "one row")])
def test_answers_that_do_not_fit_are_refused_and_not_stored(tmp_path, answer, text):
    with pytest.raises(ConfigError, match=text):
        cross_validate(lambda train, test: answer(len(test)), patient_folds(np.arange(100) % 2, "each"), metric=lambda y, p: 0.0, out=tmp_path, progress=False)
    assert not list(tmp_path.glob("*.npz"))


def test_answers_of_two_forms_and_metrics_without_a_number_are_refused():
    folds, sizes = patient_folds(E20, "each", folds=2), iter((1, 2))
    with pytest.raises(ConfigError, match="in the same form"):
        cross_validate(lambda train, test: np.zeros((len(test), next(sizes))), folds, metric=lambda y, p: 0.0, progress=False)
    with pytest.raises(ConfigError, match="the metric of fold 0 is nan"):
        cross_validate(lambda train, test: test, folds, metric=lambda y, p: np.nan, progress=False)


# ---- nested --------------------------------------------------------------------------------------------------------------------
def test_nested_never_shows_the_outer_fold_to_a_candidate():
    x, y, who = ward(8)
    folds, seen = patient_folds(y, who), []

    def watched(train, test):
        seen.append((set(train.tolist()), set(test.tolist())))
        return x[test, 0]
    cv = cross_validate(nested({"a": watched, "b": lambda train, test: -x[test, 0]}, folds, metric=roc_auc_score), folds, metric=roc_auc_score, progress=False)
    assert [note["chosen"] for note in cv.notes] == ["a"] * 5 and all(note["inner"]["a"] > note["inner"]["b"] for note in cv.notes)
    assert len(seen) == 5 * 4
    for k, (train, test) in enumerate(folds):
        inner, last = seen[4 * k:4 * k + 3], seen[4 * k + 3]
        assert all((a | b) == set(train.tolist()) and not set(who[list(a)]) & set(who[list(b)]) for a, b in inner)
        assert last == (set(train.tolist()), set(test.tolist()))


def test_nested_is_not_flattered_by_choosing():
    """Columns of noise: the best of 15 on the reported folds is above chance, the one chosen inside is not (mean over 30 wards)."""
    best, inside = [], []
    for seed in range(30):
        x, y = np.random.default_rng([9, seed]).normal(size=(60, 15)), np.arange(60) % 2
        folds = patient_folds(y, "each", seed=seed)
        columns = {c: (lambda train, test, c=c: x[test, c] * np.sign(x[train, c] @ (y[train] - 0.5))) for c in range(15)}
        best.append(max(cross_validate(f, folds, metric=auc, progress=False).mean for f in columns.values()))
        inside.append(cross_validate(nested(columns, folds, metric=auc), folds, metric=auc, progress=False).mean)
    error = np.std(inside) / np.sqrt(30)
    assert np.mean(best) > 0.6 and np.mean(inside) < 0.5 + 3 * error < 0.58


def test_nested_needs_a_choice():
    with pytest.raises(ConfigError, match="1 candidate"):
        nested({"a": None}, patient_folds(E20, "each"), metric=roc_auc_score)


# ---- leaks ---------------------------------------------------------------------------------------------------------------------
def pictures(n, seed=0, side=48):
    """Smooth random pictures (n, y, x) uint8, unlike each other."""
    from scipy.ndimage import gaussian_filter
    rough = np.random.default_rng(seed).normal(size=(n, side, side))
    smooth = np.array([gaussian_filter(a, 2.0) for a in rough])
    return (128 + 90 * (smooth / np.abs(smooth).max(axis=(1, 2), keepdims=True))).astype(np.uint8)


def halves(n):
    return Folds(np.arange(n) % 2, "each", [(np.arange(n // 2), np.arange(n // 2, n))])


def kinds(leaks):
    return {leak.kind: leak.rows.tolist() for leak in leaks}


@pytest.mark.parametrize("seed", range(4))
def test_no_leak_where_there_is_none(seed):
    images = pictures(80, seed)
    features = np.random.default_rng(seed).normal(size=(80, 30))
    features[:, 0] += (np.arange(80) % 2) * 2          # a good column, not the label
    assert fold_leaks(halves(80), patients=np.arange(80), studies=[f"1.2.{k}" for k in range(80)], images=images, features=features) == []


def altered(image, how):
    image = image.astype(float)
    moved = {"equal": image, "brighter": image * 0.7 + 60, "noisy": image + np.random.default_rng(1).normal(0, 2, image.shape),
             "shifted": np.pad(image, 1, mode="edge")[2:, 2:], "mirrored": image[:, ::-1], "mirrored and brighter": image[:, ::-1] * 0.7 + 60}
    return moved[how].clip(0, 255).round().astype(np.uint8)


@pytest.mark.parametrize("how, kind", [("equal", "identical"), ("brighter", "near-copy"), ("noisy", "near-copy"), ("shifted", "near-copy"), ("mirrored", "mirror"), ("mirrored and brighter", "mirror")])
def test_planted_copies_are_found_in_every_pair_and_only_they(how, kind):
    images = pictures(60)
    planted = {(3, 33), (10, 59), (29, 30)}
    for a, b in planted:
        images[b] = altered(images[a], how)
    assert {k: set(map(tuple, rows)) for k, rows in kinds(fold_leaks(halves(60), images=images)).items()} == {kind: planted}


def test_copies_on_one_side_are_no_leak():
    images = pictures(60)
    images[4] = images[3]
    images[41] = altered(images[40], "brighter")
    assert fold_leaks(halves(60), images=images) == []
    assert kinds(fold_leaks(Folds(np.arange(60) % 2, "each", [(np.arange(4), np.arange(4, 60))]), images=images)) == {"identical": [[3, 4]]}


def test_equal_images_are_found_though_the_first_of_them_is_in_no_part():
    images = pictures(20)
    images[[6, 15]] = images[0]
    images[16] = altered(images[0], "brighter")
    folds = Folds(np.arange(20) % 2, "each", [(np.arange(1, 10), np.arange(10, 20))])
    assert kinds(fold_leaks(folds, images=images)) == {"identical": [[6, 15]], "near-copy": [[6, 16]]}


def test_shared_patients_and_studies_are_found_in_their_fold():
    folds = patient_folds(np.arange(40) % 2, "each", folds=4)
    who = np.arange(40)
    a, b = folds.pairs[1][1][0], folds.pairs[2][1][0]
    who[b] = who[a]
    leaks = fold_leaks(folds, patients=who, studies=[f"1.2.{k}" for k in range(40)])
    assert [(leak.kind, leak.fold) for leak in leaks] == [("patient", 1), ("patient", 2)]
    assert leaks[0].rows.tolist() == [[b, a]] and leaks[1].rows.tolist() == [[a, b]]
    assert [leak.kind for leak in fold_leaks(folds, studies=who)] == ["study", "study"]
    _, y, same = ward(1)
    assert fold_leaks(patient_folds(y, same), patients=same) == []


def test_columns_that_are_the_label_are_found():
    rng = np.random.default_rng(0)
    y = np.arange(90) % 3
    table = rng.normal(size=(90, 5))
    table[:, 1] = np.array([7.0, -2, 3])[y]                       # a code of the class
    table[:, 3] = y * 10 + rng.random(90)
    found = [leak.note.split(" alone")[0] for leak in fold_leaks(patient_folds(y, "each"), features=table, names=list("abcde"))]
    assert found == ["b", "d"]
    two = (np.arange(60) % 2)
    missing = np.where(two == 1, np.nan, rng.normal(size=60))[:, None]          # only the ill were not measured
    assert [leak.note[:8] for leak in fold_leaks(patient_folds(two, "each"), features=missing)] == ["column 0"]


def test_few_cases_do_not_accuse_a_column():
    """Six cases are sorted by one of 200 random columns by luck."""
    table, y = np.random.default_rng(0).normal(size=(6, 200)), np.array([0, 0, 0, 1, 1, 1])
    lucky = [c for c in range(200) if table[:3, c].max() < table[3:, c].min()]
    assert lucky and fold_leaks(Folds(y, "each", [([0, 1, 3], [2, 4, 5])]), features=table) == []


@pytest.mark.parametrize("wrong, text", [(dict(patients=range(3)), r"20 labels and patient ids of shape \(3,\)"), (dict(studies=[""] + ["1"] * 19), "have no study id"),
                                         (dict(images=np.zeros((3, 8, 8))), "images of 3 cases"), (dict(features=np.zeros(20)), "features of 20 cases")])
def test_leak_detector_errors(wrong, text):
    with pytest.raises(DatasetError, match=text):
        fold_leaks(halves(20), **wrong)


def test_without_scikit_learn_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    for call in (lambda: patient_folds(E20, "each"), lambda: site_folds(E20, np.arange(20) // 10, "each")):
        with pytest.raises(ConfigError, match="medimg\\[train\\]"):
            call()


# ---- learning curves -----------------------------------------------------------------------------------------------------------
def test_sets_of_patients_are_nested_whole_and_stratified():
    rng = np.random.default_rng(0)
    who = rng.permutation(np.repeat(np.arange(90), rng.integers(1, 5, 90)))
    y = (who % 3 == 0).astype(int)
    folds = patient_folds(y, who)
    for k, (train, _) in enumerate(folds):
        sizes = [9, 18, 36, 64]
        sets = nested_patients(train, folds, sizes, seed=k)
        for n, rows, larger in zip(sizes, sets, [*sets[1:], train]):
            chosen = np.unique(who[rows])
            assert len(chosen) == n and set(rows) <= set(larger)
            assert sorted(rows) == sorted(train[np.isin(who[train], chosen)])          # all images of each patient
            assert abs((chosen % 3 == 0).mean() - 1 / 3) <= 1.5 / n
    assert set(nested_patients(train, folds, [9], seed=1)[0]) != set(nested_patients(train, folds, [9], seed=2)[0])


@pytest.mark.parametrize("law", [(0.9, 1.2, 0.5), (0.75, 4.0, 1.0), (1.0, 0.5, 0.3)])
def test_power_law_is_recovered(law):
    n = np.array([16, 32, 64, 128, 256])
    found = fit_power_law(n, PowerLaw(*law).at(n))
    assert found == pytest.approx(law, abs=1e-6)
    assert found.at(found.patients(law[0] - 0.05)) == pytest.approx(law[0] - 0.05) and found.patients(law[0] + 0.01) == np.inf


def test_power_law_is_the_least_squares_fit():
    """No worse than scipy's own search on the same bounds, with weights, and one row at a time equals many at once."""
    from scipy.optimize import least_squares
    n, rng = np.array([20, 40, 80, 160, 320, 640]), np.random.default_rng(0)
    rows, w = 0.8 - 1.5 * n ** -0.7 + rng.normal(0, 0.01, (8, 6)), rng.uniform(0.5, 2, 6)
    many = fit_power_law(n, rows, weights=w)
    for k, row in enumerate(rows):
        one = fit_power_law(n, row, weights=w)
        assert one == pytest.approx(tuple(part[k] for part in many)) and one.top <= 1 and one.drop >= 0
        residual = lambda q, row=row: np.sqrt(w) * (q[0] - q[1] * n ** -q[2] - row)
        theirs = min(least_squares(residual, start, bounds=([-1, 0, 0.1], [1, 1e4, 2])).cost for start in ((0.8, 1.5, 0.7), (0.9, 0.5, 0.3)))
        assert 0.5 * (residual(one) ** 2).sum() <= theirs * 1.02 + 1e-9
    falling = fit_power_law(n, np.linspace(0.8, 0.7, 6))
    assert falling.drop == 0 and falling.top == pytest.approx(0.75)
    assert fit_power_law(n, np.linspace(0.9, 1.0, 6)).top <= 1


@pytest.mark.parametrize("n, v", [([10, 20, 40], [0.5, 0.6, 0.7]), ([10, 10, 20, 40], [0.5] * 4), ([10, 20, 40, 80], [0.5] * 3), ([10, 20, 40, 80], [0.5, 0.5, 0.5, np.nan])])
def test_power_law_errors(n, v):
    with pytest.raises(ConfigError, match="four different sizes"):
        fit_power_law(n, v)


def test_each_size_is_what_its_own_training_gives(tmp_path):
    x, y, who = ward(4, 90)
    folds, sizes = patient_folds(y, who, repeats=2), [12, 24, 48, 72]
    curve = learning_curve(ridge_on(x, y), folds, sizes=sizes, metric=auc, seed=3, out=tmp_path, plan={"model": "ridge"}, progress=False)
    for k, (train, test) in enumerate(folds):
        for s, rows in enumerate(nested_patients(train, folds, sizes, seed=[3, k])):
            assert curve.cross.values[k, s] == auc(y[test], x[test] @ ridge(x[rows], y[rows]))
    full = cross_validate(ridge_on(x, y), folds, metric=auc, progress=False)
    assert curve.cross.values[:, -1] == pytest.approx(full.values)          # 72 patients are all of a training part
    assert curve.interval()[:, -1] == pytest.approx(full.interval())
    never = lambda train, test: 1 / 0
    again = learning_curve(never, folds, sizes=sizes, metric=auc, seed=3, out=tmp_path, plan={"model": "ridge"}, progress=False)
    assert np.array_equal(again.cross.values, curve.cross.values)
    for changed in (dict(sizes=[12, 24, 48, 71]), dict(seed=4), dict(plan={"model": "svm"})):
        with pytest.raises(ConfigError, match="another plan"):
            learning_curve(never, folds, **{**dict(sizes=sizes, metric=auc, seed=3, out=tmp_path, plan={"model": "ridge"}, progress=False), **changed})


@pytest.mark.parametrize("sizes, kind, text", [([5, 10, 20], ConfigError, "3 sizes"), ([1, 2, 3, 4], ConfigError, "from 2 upwards"),
                                               ([10, 20, 30, 49], DatasetError, "49 patients are asked for, a training part has 48"), ([2, 3, 4, 5], DatasetError, "a class is absent among 2")])
def test_learning_curve_errors(sizes, kind, text):
    y = (np.arange(60) % 10 == 0).astype(int)
    with pytest.raises(kind, match=text):
        learning_curve(lambda train, test: test, patient_folds(y, "each"), sizes=sizes, metric=lambda y, p: 0.5, progress=False)


def test_too_few_folds_give_no_interval():
    x, y, who = ward(0)
    curve = learning_curve(ridge_on(x, y), patient_folds(y, who, folds=3), sizes=[8, 12, 20, 30], metric=auc, progress=False)
    with pytest.raises(ConfigError, match="3 folds are too few"):
        curve.needed(0.8)


def test_coverage_of_what_is_needed():
    """Wards whose true curve is known: the goal that 200 patients reach is in the interval, though often without an upper bound; so is the figure after 200."""
    apart, wards, hits = np.r_[0.8, 0.8, np.zeros(14)], 60, np.zeros(2, int)
    draw = lambda seed, n: ward(seed, n, images=1, columns=16)[:2]
    goal = np.mean([norm.cdf(w @ apart / np.sqrt(2 * w @ w)) for w in (ridge(*draw([1, s], 200)) for s in range(500))])
    for seed in range(wards):
        x, y = draw([2, seed], 120)
        curve = learning_curve(ridge_on(x, y), patient_folds(y, "each", repeats=3, seed=seed), sizes=[20, 30, 50, 70, 96], metric=auc, seed=seed, progress=False)
        need, (value, low, high) = curve.needed(goal, draws=300), curve.predict(200, draws=300)
        assert need.low <= need.high and low <= value <= high
        hits += [need.low <= 200 <= need.high, low <= goal <= high]
        assert curve.needed(goal + 0.05, draws=300).low >= need.low
    assert (hits >= binom.ppf(0.001, wards, 0.9)).all(), f"{hits} of {wards}"


def test_a_firm_curve_gives_a_firm_answer():
    """With hardly any noise the interval closes on the truth; far beyond the data nothing is promised."""
    n, folds = np.array([20, 40, 80, 160]), patient_folds(np.arange(400) % 2, "each")
    values = 0.9 - n ** -0.5 + np.random.default_rng(0).normal(0, 1e-4, (5, 4))
    curve = LearningCurve(n, CrossValidation(folds, auc, values, None, ()))
    near, far = curve.needed(0.85), curve.needed(0.885)
    assert 360 < near.low < 400 < near.high < 440 and near.patients == pytest.approx(400, rel=0.05)
    assert far.patients == far.low == far.high == np.inf          # 4,444 patients, beyond ten times 160
    assert 4000 < curve.needed(0.885, horizon=100).patients < 5000


def test_needed_in_words():
    assert str(Needed(240.4, 90, np.inf)) == "at least 90 patients, best guess 240, no upper bound"
    assert str(Needed(np.inf, 90, np.inf)) == "at least 90 patients, best guess none, no upper bound"
    assert str(Needed(240, 90, 500)) == "at least 90 patients, best guess 240, at most 500"
    assert str(Needed(np.inf, np.inf, np.inf)).startswith("not reached")
