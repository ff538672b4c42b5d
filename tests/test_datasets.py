"""Data sets: identity, provenance, download, splits. Independent references: hashlib, zipfile, plain loops."""
import hashlib
import importlib.util
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medimg.data import datasets as ds
from medimg.data import splits as sp
from medimg.data.datasheets import datasheet, list_datasets
from medimg.errors import ConfigError, DatasetError

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def site(tmp_path, monkeypatch):
    """An empty MEDIMG_DATA folder and an empty cache."""
    (tmp_path / "data").mkdir()
    monkeypatch.setenv("MEDIMG_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("MEDIMG_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("MEDIMG_OFFLINE", raising=False)
    ds._UNREACHABLE.clear()
    return tmp_path / "data"


def toy(n=12, seed=0, splits=None, patients=None):
    rng = np.random.default_rng(seed)
    return ds.ImageDataset("toy", rng.integers(0, 256, (n, 6, 6), dtype="uint8"), rng.integers(0, 2, n),
                           splits if splits is not None else rng.choice(ds.SPLITS, n), classes=("no", "yes"), patient_ids=patients)


# ---------------------------------------------------------------- identity

def test_image_id_is_sha256_of_shape_type_and_bytes():
    image = np.arange(12, dtype="uint8").reshape(3, 4)
    assert ds.image_id(image) == hashlib.sha256(b"(3, 4)|u1" + image.tobytes()).hexdigest()[:16]
    assert ds.image_id(image) == ds.image_id(np.asfortranarray(image)) != ds.image_id(image.T)
    assert len({ds.image_id(image), ds.image_id(image.astype("uint16")), ds.image_id(image.reshape(4, 3))}) == 3


def test_checksum_is_what_the_design_says():
    d = toy()
    rows = sorted(f"{ds.image_id(i)},{y},{s}" for i, y, s in zip(d.images, d.labels, d.splits))
    assert d.checksum == hashlib.sha256("\n".join(rows).encode()).hexdigest()


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 30), st.integers(0, 10**6))
def test_order_of_the_file_does_not_matter(n, seed):
    rng = np.random.default_rng(seed)
    images, labels = rng.integers(0, 3, (n, 1, 2), dtype="uint8"), rng.integers(0, 2, n)      # many equal images
    splits, patients = rng.choice(ds.SPLITS, n), rng.integers(0, 5, n).astype(str)
    mixed = rng.permutation(n)
    a = ds.ImageDataset("a", images, labels, splits, classes=("x", "y"), patient_ids=patients, meta={"age": np.arange(n), "k": 1})
    b = ds.ImageDataset("b", images[mixed], labels[mixed], splits[mixed], classes=("x", "y"), patient_ids=patients[mixed])
    assert a.checksum == b.checksum
    for column in ("images", "labels", "splits", "patient_ids", "image_ids"):
        assert (getattr(a, column) == getattr(b, column)).all()
    assert sorted(a.meta["age"]) == list(range(n)) and (labels[a.meta["age"]] == a.labels).all()
    assert list(a.image_ids) == sorted(a.image_ids)


def test_any_change_changes_the_checksum():
    d, seen = toy(splits=["train"] * 6 + ["val"] * 3 + ["test"] * 3), set()
    for column in (None, "images", "labels", "splits"):
        columns = {k: np.array(getattr(d, k)) for k in ("images", "labels", "splits")}
        if column == "splits":
            columns["splits"][0] = "val" if columns["splits"][0] != "val" else "test"
        elif column:
            columns[column].flat[0] ^= 1
        seen.add(ds.ImageDataset("c", **columns, classes=("no", "yes")).checksum)
    assert len(seen) == 4


def test_rows_cannot_be_written_and_survive_pickle():
    d = toy()
    with pytest.raises(ValueError):
        d.images[0] = 0
    with pytest.raises(AttributeError):
        d.labels = None
    assert pickle.loads(pickle.dumps(d)).checksum == d.checksum


@pytest.mark.parametrize("change, word", [
    ({"labels": [0]}, "labels"), ({"labels": [0, 2]}, "0 to 1"), ({"labels": [0.0, 1.0]}, "whole"), ({"labels": [-1, 0]}, "whole"),
    ({"splits": ["train", "dev"]}, "dev"), ({"splits": ["train"]}, "splits"), ({"task": "binar"}, "binary"),
    ({"images": np.zeros((2, 4, 4))}, "float64"), ({"images": np.zeros((4, 4), "uint8")}, "uint8"), ({"task": "multilabel"}, "multilabel"),
    ({"patient_ids": ["a"]}, "patient_ids"), ({"masks": np.zeros((3, 4, 4), bool)}, "masks")])
def test_wrong_columns_are_refused(change, word):
    good = dict(images=np.zeros((2, 4, 4), "uint8"), labels=[0, 1], splits=["train", "val"], classes=("a", "b"))
    ds.ImageDataset("ok", **good)
    with pytest.raises(DatasetError, match=word):
        ds.ImageDataset("bad", **{**good, **change})


def test_multilabel_columns():
    d = ds.ImageDataset("m", np.arange(32, dtype="uint8").reshape(2, 4, 4), [[0, 1], [1, 1]], ["train", "val"], "multilabel", ("a", "b"))
    assert d.split("val").labels.shape == (1, 2) and "b 2" in repr(d)


def test_split_and_unknown_split():
    d = toy()
    assert sum(len(d.split(s)) for s in ds.SPLITS) == len(d)
    with pytest.raises(DatasetError, match="train"):
        d.split("trian")


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 90), st.integers(0, 50))
def test_take_keeps_proportions(n, seed):
    d = toy(80, seed=3)
    part = d.take(n, seed)
    assert len(part) == min(n, 80) and part.checksum == d.take(n, seed).checksum
    assert set(part.image_ids) <= set(d.image_ids)
    for split in ds.SPLITS:
        for label in (0, 1):
            whole = ((d.splits == split) & (d.labels == label)).sum()
            got = ((part.splits == split) & (part.labels == label)).sum()
            assert abs(got - whole * len(part) / 80) <= 1


def test_take_is_nested_and_depends_on_the_seed():
    d = toy(80)
    assert set(d.take(20, 1).image_ids) <= set(d.take(40, 1).image_ids)
    assert d.take(20, 1).checksum != d.take(20, 2).checksum
    with pytest.raises(DatasetError):
        d.take(0)


def test_duplicates_and_drop_shared(capsys):
    images = np.array([1, 1, 1, 2, 2, 3, 4], "uint8")[:, None, None] * np.ones((1, 4, 4), "uint8")
    d = ds.ImageDataset("d", images, [0, 0, 0, 1, 1, 0, 1], ["train", "val", "test", "train", "train", "val", "train"], classes=("a", "b"))
    groups = [sorted(d.splits[rows]) for rows in d.duplicates()]
    assert sorted(groups) == [["test", "train", "val"], ["train", "train"]]
    clean = ds.drop_shared(d)
    assert "removed 1 of 4 training and 1 of 2 validation" in capsys.readouterr().out
    assert clean.meta["dropped"] == {"train": 1, "val": 1} and len(clean) == 5
    assert ds.drop_shared(clean, quiet=True).checksum == clean.checksum
    assert len(clean.split("test")) == len(d.split("test"))


# ---------------------------------------------------------------- real data

def test_published_facts_of_pneumoniamnist(data_root):
    d = ds.load_dataset("pneumoniamnist", data="real", quiet=True)
    folds = [sorted(d.splits[rows]) for rows in d.duplicates()]
    assert [(d.splits == s).sum() for s in ds.SPLITS] == [4708, 524, 624]
    assert sum(f.count("train") > 1 for f in folds) == 18
    assert sum({"train", "val"} <= set(f) for f in folds) == 8
    assert not any("test" in f and len(set(f)) > 1 for f in folds)
    assert [np.bincount(d.split(s).labels).tolist() for s in ds.SPLITS] == [[1214, 3494], [135, 389], [234, 390]]
    raw = np.load(data_root / "medmnist/pneumoniamnist.npz")      # independent: a set of bytes, no hash
    train, val = ({i.tobytes() for i in raw[f"{s}_images"]} for s in ("train", "val"))
    assert len(train & val) == 8 and 4708 - len(train) == 18
    clean = ds.drop_shared(d, quiet=True)
    assert clean.meta["dropped"] == {"train": 10, "val": 0}
    assert not set(clean.split("train").image_ids) & set(clean.split("val").image_ids)


def test_provenance_names_mirror_or_official(data_root):
    path = ds.find_dataset("pneumoniamnist").path
    official = hashlib.md5(path.read_bytes()).hexdigest() == ds.REGISTRY["pneumoniamnist"].md5
    d = ds.load_dataset("pneumoniamnist", data="real", quiet=True)
    assert ("official file" if official else "not byte-identical") in d.source and str(data_root) not in d.source + repr(d)
    assert "official file, MD5 verified" in ds.load_dataset("retinamnist", quiet=True).source


def test_retinamnist(data_root):
    d = ds.load_dataset("retinamnist", data="real", n=160, quiet=True)
    assert d.images.shape == (160, 28, 28, 3) and d.task == "ordinal" and d.duplicates() == []
    assert set(d.labels) == set(range(5))


def test_a_mirror_in_another_order_is_the_same_set(data_root, site):
    raw = np.load(data_root / "medmnist/pneumoniamnist.npz")
    parts = {}
    for s in ds.SPLITS:
        mixed = np.random.default_rng(1).permutation(len(raw[f"{s}_images"]))
        parts |= {f"{s}_{k}": raw[f"{s}_{k}"][mixed] for k in ("images", "labels")}
    file = site / "copy" / "pneumoniamnist.npz"
    file.parent.mkdir()
    np.savez_compressed(file, **parts)
    (site / "SHA256SUMS").write_text(f"{hashlib.sha256(file.read_bytes()).hexdigest()}  ./copy/pneumoniamnist.npz\n")
    mirrored = ds.load_dataset("pneumoniamnist", quiet=True)
    os.environ["MEDIMG_DATA"] = str(data_root)       # put back by the `site` fixture
    original = ds.load_dataset("pneumoniamnist", quiet=True)
    assert mirrored.checksum == original.checksum and (mirrored.images == original.images).all()


@pytest.mark.parametrize("name", ["pneumoniamnist", "retinamnist"])
def test_data_scripts(data_root, capsys, name, site):
    spec = importlib.util.spec_from_file_location(name, ROOT / "data_scripts" / f"{name}.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    os.environ["MEDIMG_DATA"] = str(data_root)
    assert script.main([]) == 0
    out = capsys.readouterr().out
    assert "CC BY 4.0" in out and "zenodo.org/records/10519652" in out and "Yang" in out and str(data_root) not in out
    os.environ["MEDIMG_DATA"], os.environ["MEDIMG_OFFLINE"] = str(site), "1"
    try:
        assert script.main([]) == 2
    finally:
        del os.environ["MEDIMG_OFFLINE"]
    assert "MEDIMG_DATA" in capsys.readouterr().err


# ---------------------------------------------------------------- stand-ins

def test_offline_falls_back_or_says_where(site, monkeypatch, capsys):
    monkeypatch.setenv("MEDIMG_OFFLINE", "1")
    with pytest.raises(DatasetError) as error:
        ds.load_dataset("pneumoniamnist", data="real")
    assert "https://zenodo.org/records/10519652/files/pneumoniamnist.npz" in str(error.value) and "MEDIMG_DATA" in str(error.value)
    d = ds.load_dataset("pneumoniamnist", n=10)
    assert "standing in for pneumoniamnist" in capsys.readouterr().out
    assert d.name == "phantom-cxr" and d.images.shape == (10, 28, 28) and d.classes == ("clear", "opacity") and d.masks.shape == d.images.shape
    again = ds.load_dataset("pneumoniamnist", n=10, data="phantom", quiet=True)
    assert again.checksum == d.checksum
    cached = next((site.parent / "cache/phantom").iterdir())
    cached.write_bytes(cached.read_bytes()[:100])            # a damaged cache is made again
    assert ds.load_dataset("phantom-cxr", n=10, quiet=True).images.shape == (10, 64, 64)
    graded = ds.load_dataset("retinamnist", n=10, data="phantom", quiet=True)
    assert graded.images.shape == (10, 28, 28, 3) and graded.task == "ordinal" and graded.labels.max() == 4
    assert (graded.labels > 0).sum() == d.labels.sum()


@pytest.mark.parametrize("call, error, word", [
    (lambda: ds.load_dataset("pneumonia"), DatasetError, "pneumoniamnist"), (lambda: ds.load_dataset("pneumoniamnist", data="mirror"), ConfigError, "auto"),
    (lambda: ds.fetch("phantom-cxr"), DatasetError, "no official file"), (lambda: ds.find_dataset("xyz"), DatasetError, "known")])
def test_wrong_names(call, error, word):
    with pytest.raises(error, match=word):
        call()


# ---------------------------------------------------------------- splits

@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 5), min_size=80, max_size=300), st.integers(0, 100))
def test_no_patient_on_two_sides(images_each, seed):
    patients = np.repeat(np.arange(len(images_each)), np.array(images_each) + (np.arange(len(images_each)) < 80))
    labels = (patients * 7919 + np.arange(len(patients))) % 2
    splits = ds.split_by_patient(patients, labels, seed=seed, quiet=True)
    for p in np.unique(patients):
        assert len(set(splits[patients == p])) == 1
    mixed = np.random.default_rng(seed).permutation(len(patients))
    assert (ds.split_by_patient(patients[mixed], labels[mixed], seed=seed, quiet=True) == splits[mixed]).all()


@settings(max_examples=30, deadline=None)
@given(st.integers(100, 400), st.integers(1, 300), st.integers(0, 9), st.integers(0, 9))
def test_test_fold_never_moves(n, more, seed_a, seed_b):
    names = np.array([f"patient {i}" for i in range(n + more)])
    labels = np.arange(n + more) % 3
    before = ds.split_by_patient(names[:n], labels[:n], seed=seed_a, quiet=True)
    after = ds.split_by_patient(names, labels, seed=seed_b, quiet=True)[:n]
    assert ((before == "test") == (after == "test")).all()


def test_fractions_and_strata():
    rng = np.random.default_rng(0)
    patients, rare = rng.integers(0, 5000, 20_000), rng.random(5000) < 0.04
    labels = rare[patients].astype(int)
    splits = ds.split_by_patient(patients, labels, seed=1, quiet=True)
    for split, fraction in zip(ds.SPLITS, (0.7, 0.1, 0.2)):
        assert abs((splits == split).mean() - fraction) < 0.02
    who, first = np.unique(patients, return_index=True)
    val = splits[first] == "val"
    expected = rare[who][splits[first] != "test"].mean()
    assert abs(rare[who][val].mean() - expected) < 1.5 / val.sum()      # stratified: exact up to one patient
    assert (ds.split_by_patient(patients, labels, seed=2, quiet=True) != splits).any()


def test_a_hundred_thousand_rows():
    patients = np.random.default_rng(0).integers(0, 30_000, 100_000)
    splits = ds.split_by_patient(patients, np.zeros(len(patients), int), quiet=True)
    sets = [set(patients[splits == s].tolist()) for s in ds.SPLITS]
    assert not sets[0] & sets[1] and not sets[0] & sets[2] and not sets[1] & sets[2]


def test_split_prints_its_proof(capsys):
    ds.split_by_patient(np.arange(60), np.arange(60) % 2)
    assert capsys.readouterr().out.startswith("0 of 60 patients shared between folds; train ")


@pytest.mark.parametrize("patients, labels, more, word", [
    (["a"], [0, 1], {}, "1 patient ids but 2"), (["a", "", "b"], [0, 0, 0], {}, "no patient id"), ([1.0, float("nan")], [0, 0], {}, "no patient id"),
    (["a", None], [0, 0], {}, "no patient id"), (["a", "a"], [0, 0], {}, "too few"), ([1, 2], [0, 0], {"fractions": (0.5, 0.1, 0.1)}, "add up"),
    ([1, 2], [0, 0], {"fractions": (1.2, -0.4, 0.2)}, "add up"), ([], [], {}, "too few")])
def test_bad_patients(patients, labels, more, word):
    with pytest.raises(DatasetError, match=word):
        ds.split_by_patient(patients, labels, quiet=True, **more)


# ---------------------------------------------------------------- folds that only grow

def cohort(n_patients, per=2, seed=0, known=True):
    """Random small images; labels by patient; without ids every image is its own group."""
    rng = np.random.default_rng(seed)
    people = np.repeat(np.arange(n_patients), per)
    images = np.stack([np.random.default_rng(1000 + i).integers(0, 256, (4, 4), dtype="uint8") for i in range(len(people))])
    return ds.ImageDataset("study", images, (people % 3 == 0).astype(int), rng.choice(["train"], len(people)), classes=("no", "yes"),
                           patient_ids=[f"patient {p}" for p in people] if known else None)


def test_a_hundred_thousand_rows_stay_while_twenty_thousand_join(tmp_path):
    """DESIGN §6: no patient on two sides, and adding data moves nobody, neither in the test fold (by hash) nor elsewhere (by the file)."""
    rng = np.random.default_rng(0)
    patients, labels = np.array([f"P{p}" for p in rng.integers(0, 36_000, 120_000)]), rng.integers(0, 2, 120_000)
    images = np.zeros((120_000, 1, 4), "uint8")
    images[:, 0] = np.arange(120_000)[:, None] // 256 ** np.arange(4) % 256
    whole = ds.ImageDataset("big", images, labels, np.full(120_000, "train"), classes=("a", "b"), patient_ids=patients)
    first = ds.select(whole, np.sort(rng.permutation(120_000)[:100_000]))
    file = tmp_path / "splits.json"
    before, after = sp.make_splits(first, file=file, quiet=True), sp.make_splits(whole, file=file, quiet=True)
    was = dict(zip(before.image_ids.tolist(), before.splits.tolist()))
    assert all(was[i] == s for i, s in zip(after.image_ids.tolist(), after.splits.tolist()) if i in was)
    assert ((after.splits == "test") == (ds.split_by_patient(whole.patient_ids, whole.labels, quiet=True) == "test")).all()
    for d in (before, after):
        sets = [set(d.patient_ids[d.splits == s].tolist()) for s in ds.SPLITS]
        assert not sets[0] & sets[1] and not sets[0] & sets[2] and not sets[1] & sets[2]
        assert [abs((d.splits == s).mean() - f) < 0.01 for s, f in zip(ds.SPLITS, (0.7, 0.1, 0.2))] == [True] * 3
    assert "P1" not in file.read_text().replace("splits", "")


def test_groups_of_near_copies_stay_together():
    import cv2
    rng = np.random.default_rng(0)
    large = np.stack([cv2.resize(rng.integers(0, 256, (9, 9), dtype="uint8"), (97, 97), interpolation=cv2.INTER_CUBIC) for _ in range(60)])
    smooth = large[:, :, :96]
    images = np.concatenate([smooth, (smooth * 0.8 + 20).astype("uint8"), large[:, :, 1:]])      # darker; a pixel further on
    d = ds.ImageDataset("frames", images, np.tile(np.arange(60) % 2, 3), ["train"] * 180, classes=("a", "b"), meta={"who": np.tile(np.arange(60), 3)})
    done = sp.make_splits(d, quiet=True)
    assert done.meta["interval"] == "image-level"
    assert all(len(set(done.splits[done.meta["who"] == w])) == 1 for w in range(60))


def test_a_new_image_that_joins_two_groups_pulls_nobody_out_of_the_test_fold(tmp_path):
    groups, keys = np.array(["g"] * 4), np.array(["a", "b", "c", "d"])
    stored = {"name": "n", "folds": {"a": "train", "b": "test", "c": "val"}}
    assert sp._kept(stored, groups, keys, np.array(["train"] * 4), {"name": "n"}).tolist() == ["test"] * 4
    assert sp._kept({"name": "n", "folds": {}}, groups, keys, np.array(["val"] * 4), {"name": "n"}).tolist() == ["val"] * 4


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 1}', '{"format": 1, "name": 1, "unit": 2, "fractions": 3, "seed": 4, "folds": {"dev": []}}',
                                  '{"format": 1, "name": 1, "unit": 2, "fractions": 3, "seed": 4, "folds": {"train": ["a"], "test": ["a"]}}',
                                  '{"format": 1, "name": 1, "unit": 2, "fractions": 3, "seed": 4, "folds": {"train": [1]}}', "[" * 100_000, "\xff"])
def test_damaged_splits_files(tmp_path, text):
    (tmp_path / "splits.json").write_text(text, encoding="latin-1")
    with pytest.raises(DatasetError, match="splits.json: not a splits file"):
        sp.make_splits(cohort(40), file=tmp_path / "splits.json", quiet=True)


def test_a_splits_file_is_for_one_set_and_one_rule(tmp_path, capsys):
    file = tmp_path / "splits.json"
    sp.make_splits(cohort(60), file=file)
    out = capsys.readouterr().out
    assert out.splitlines()[0].split() == ["class", "train", "val", "test"] and out.splitlines()[-1].startswith("patients")
    assert sum(map(int, out.splitlines()[-1].split()[1:])) == 60
    for other, more in ((cohort(60), {"fractions": (0.6, 0.2, 0.2)}), (cohort(60, known=False), {})):
        with pytest.raises(DatasetError, match="has another"):
            sp.make_splits(other, file=file, quiet=True, **more)


def test_counts_of_many_labels_with_unknown_ones():
    labels = np.array([[1, np.nan], [0, 1], [1, 1]])
    d = ds.ImageDataset("m", np.arange(48, dtype="uint8").reshape(3, 4, 4), labels, ["train", "val", "test"], "multilabel", ("a", "b"))
    assert sp.class_counts(d).tolist() == [[1, 0, 1], [0, 1, 1]]


# ---------------------------------------------------------------- masks, boxes, sheets

@pytest.mark.parametrize("more, word", [
    ({"task": "segmentation"}, "needs masks"), ({"task": "detection"}, "needs boxes"), ({"task": "segmentation", "masks": np.full((2, 4, 4), 7)}, "0 to 1"),
    ({"task": "detection", "boxes": np.zeros((2, 4))}, "boxes are"), ({"task": "detection", "boxes": np.zeros((2, 1, 4), int)}, "boxes are"),
    ({"boxes": np.zeros((3, 1, 4))}, "boxes")])
def test_truth_must_fit_the_task(more, word):
    with pytest.raises(DatasetError, match=word):
        ds.ImageDataset("bad", np.zeros((2, 4, 4), "uint8"), [0, 1], ["train", "val"], classes=("a", "b"), **more)


def test_boxes_follow_their_images():
    images = np.random.default_rng(0).integers(0, 256, (9, 4, 4), dtype="uint8")
    boxes = images[:, :1].astype("float32").reshape(9, 1, 4)
    d = ds.ImageDataset("b", images, np.zeros(9, int), ["train"] * 5 + ["test"] * 4, "detection", ("none", "some"), boxes=boxes)
    for part in (d, d.split("test"), d.take(4)):
        assert (part.boxes[:, 0] == part.images[:, 0]).all()


def test_a_sheet_says_what_is_there(data_root):
    sheet = datasheet("pneumoniamnist", data="real")
    text = sheet.markdown()
    raw = np.load(data_root / "medmnist/pneumoniamnist.npz")
    assert sheet.counts.tolist() == [[int((raw[f"{s}_labels"] == k).sum()) for s in ds.SPLITS] for k in (0, 1)]
    assert sheet.shared == 8 and round(sheet.majority, 4) == 0.625
    for word in ("CC BY 4.0", "Yang", "| normal | 1214 | 135 | 234 |", "8 images lie in train and in val", "image-level", "research use", "8 groups"):
        assert word in text
    assert sheet.picture().png.startswith(b"\x89PNG") and str(data_root) not in text
    films = datasheet("nih-cxr-1000", data="real")
    from scipy.stats.contingency import association
    d = films.dataset
    table = np.array([[((d.meta["view"] == v) & (d.labels == k)).sum() for k in (0, 1)] for v in ("AP", "PA")])
    assert abs(films.confounds["view"][0] - association(table, method="cramer")) < 1e-12
    assert "| AP | 68% | 45% |" in films.markdown()


def test_every_registered_set_is_listed(site, monkeypatch):
    rows = {r["name"]: r for r in list_datasets()}
    assert rows.keys() == ds.REGISTRY.keys() and not any(r["found"] for r in rows.values())
    (site / "deep/er").mkdir(parents=True)
    (site / "deep/er/octmnist_64.npz").write_bytes(b"x")
    (site / "busi").mkdir()
    rows = {r["name"]: r for r in list_datasets()}
    assert rows["octmnist-64"]["found"] == "$MEDIMG_DATA/deep/er/octmnist_64.npz" and rows["busi"]["found"] == "$MEDIMG_DATA/busi" and not rows["octmnist"]["found"]
