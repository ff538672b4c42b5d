"""Leaks: the fast search against slow ones, planted copies, the known duplicates of public sets, groups against a graph walk."""
import json

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medimg.data.datasets import ImageDataset, load_dataset, split_by_patient
from medimg.data.leaks import (BITS, connect, find_leaks, leak_groups, near_duplicate_groups, near_duplicate_pairs, near_pairs,
                               perceptual_hash, show_leaks, similarity)
from medimg.errors import DatasetError


def pictures(n, size=48, seed=0):
    """Smooth random images, no two alike."""
    rng = np.random.default_rng(seed)
    noise = rng.normal(size=(n, size, size)).astype(np.float32)
    smooth = np.stack([cv2.GaussianBlur(a, (0, 0), 2) + 3 * cv2.GaussianBlur(a, (0, 0), 8) for a in noise])
    low, high = smooth.min(axis=(1, 2), keepdims=True), smooth.max(axis=(1, 2), keepdims=True)
    return (30 + 190 * (smooth - low) / (high - low)).astype(np.uint8)


def jpeg(image, quality=50):
    return cv2.imdecode(cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, quality])[1], 0)


def trim(image, share=0.02):
    n = max(1, round(share * len(image)))
    return cv2.resize(image[n:-n, n:-n], image.shape[::-1])


CHANGES = {"brightness": lambda i: np.clip(i * 1.1 + 10, 0, 255).astype(np.uint8), "gamma": lambda i: (255 * (i / 255) ** 1.2).astype(np.uint8),
           "jpeg": jpeg, "half size": lambda i: cv2.resize(i, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA), "trim": trim,
           "inverted twice": lambda i: 255 - (255 - i), "16 bit": lambda i: i.astype(np.uint16) * 200, "colour": lambda i: np.stack([i] * 3, -1)}


@pytest.mark.parametrize("change", CHANGES)
def test_planted_copies_are_found_and_strangers_left_alone(change):
    base = pictures(60, 64)
    copies = [CHANGES[change](i) for i in base[:40]]
    pairs = near_duplicate_pairs([*base, *copies])
    got, planted = set(map(tuple, pairs.rows.tolist())), {(k, 60 + k) for k in range(40)}
    assert len(got & planted) >= 38, sorted(planted - got)
    assert not got - planted


def test_hash_against_scipy():
    from scipy.fft import dctn
    images = pictures(5)
    words = perceptual_hash(images)
    bits = np.unpackbits(words.view(np.uint8), axis=1)
    for image, row in zip(images, bits):
        small = cv2.resize(image.astype(np.float32), (32, 32), interpolation=cv2.INTER_AREA)
        f = dctn(small, norm="ortho")[:11, :11].ravel()[1:]
        clear = np.abs(f - np.median(f)) > 1e-3 * np.abs(f).max()      # rounding may turn a bit at the median itself
        assert (row[:BITS].astype(bool) == (f > np.median(f)))[clear].all() and not row[BITS:].any()


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 700), st.integers(0, 40), st.integers(0, 2**32 - 1), st.booleans())
def test_near_pairs_against_every_pair(n, limit, seed, two_sets):
    rng = np.random.default_rng(seed)
    centres = rng.integers(0, 2, (5, 128), dtype=np.uint8)
    bits = centres[rng.integers(0, 5, n)] ^ (rng.random((n, 128)) < 0.1)
    words = np.packbits(bits, axis=1).view(np.uint64).reshape(n, 2)
    others = words[::-1][: n // 2] if two_sets else None
    rows, found = near_pairs(words, others, max_bits=limit)
    second = (bits[::-1][: n // 2] if two_sets else bits).astype(np.int64)
    far = (bits.astype(np.int64)[:, None, :] != second[None]).sum(axis=2) if n else np.zeros((0, 0), int)
    near = far <= limit if two_sets else np.triu(far <= limit, 1)
    assert rows.tolist() == np.argwhere(near).tolist() and found.tolist() == far[near].tolist()


def test_similarity_is_a_correlation():
    a, b = pictures(2, 32)
    s = similarity([a, 255 - a, b, np.roll(a, 1, axis=0), np.full_like(a, 9)], [[0, 0], [0, 1], [0, 2], [0, 3], [0, 4], [3, 0]])
    assert s[0] == pytest.approx(1, abs=1e-4) and s[1] < 0.3 and s[2] < 0.6 and s[3] > 0.85 and s[4] == 0
    assert s[5] == pytest.approx(s[3], abs=1e-5)      # symmetric


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 40), st.lists(st.tuples(st.integers(0, 39), st.integers(0, 39)), max_size=40))
def test_groups_against_a_walk(n, pairs):
    pairs = [(i % n, j % n) for i, j in pairs]
    expected = list(range(n))
    for _ in range(n):
        for i, j in pairs:
            expected[i] = expected[j] = min(expected[i], expected[j])
    assert connect(n, pairs).tolist() == expected


def test_equal_images_cost_nothing_and_flat_ones_are_no_copies():
    black = np.zeros((3000, 16, 16), np.uint8)
    groups = near_duplicate_groups(np.concatenate([black, black[:50] + np.arange(50, dtype=np.uint8)[:, None, None]]))
    assert (groups[:3001] == 0).all() and len(set(groups[3001:].tolist())) == 49      # row 3000 is black too; other greys stay apart
    assert near_duplicate_groups(np.zeros((0, 8, 8), np.uint8)).tolist() == []
    assert near_duplicate_groups(pictures(1)).tolist() == [0]


def test_mirror_images_only_when_asked():
    base = pictures(10, 64)
    both = [*base, *(i[:, ::-1] for i in base)]
    assert not len(near_duplicate_pairs(both))
    pairs = near_duplicate_pairs(both, mirrored=True)
    assert pairs.rows.tolist() == [[k, 10 + k] for k in range(10)] and pairs.mirrored.all()


def test_too_many_pairs_are_refused(monkeypatch):
    from medimg.data import leaks
    monkeypatch.setattr(leaks, "MAX_PAIRS", 10)
    with pytest.raises(DatasetError, match="more than 10 pairs.*max_bits"):
        near_pairs(np.zeros((20, 2), np.uint64))


def toy(labels=None, splits=None, patients=None):
    base = pictures(6, 40)
    images = np.concatenate([base, np.stack([jpeg(i, 70) for i in base[:3]]), base[5:]])
    return ImageDataset("toy", images, labels or [0, 1, 0, 1, 0, 1, 0, 1, 0, 0], splits or ["train"] * 6 + ["test"] * 4, classes=("a", "b"),
                        patient_ids=patients)


def test_report_counts_what_was_planted():
    report = find_leaks(toy(patients=list("abcdefabcf")))
    d = report.to_dict()
    assert (d["exact_groups"], d["exact_groups_across"], d["copy_groups"], len(d["across"]), d["patients_in_two_folds"]) == (1, 1, 4, 4, 4)
    assert len(d["label_conflicts"]) == 1 and not report.clean and "LEAKS" in repr(report) and json.loads(json.dumps(d)) == d
    clean = find_leaks(toy(splits=["train"] * 10))
    assert clean.clean and not clean.across and len(clean.copies) == 4 and "nothing leaks" in repr(clean)
    assert show_leaks(toy(), report, n=2).png[:4] == b"\x89PNG"


def test_no_copies_no_picture():
    d = ImageDataset("toy", pictures(4), [0, 1, 0, 1], ["train"] * 4, classes=("a", "b"))
    with pytest.raises(DatasetError, match="no copies"):
        show_leaks(d, find_leaks(d))


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(0, 4), min_size=10, max_size=10), st.integers(0, 5))
def test_groups_join_patients_and_copies_whatever_the_order(patients, turn):
    d = toy(patients=[str(p) for p in patients])
    groups, report = leak_groups(d), find_leaks(d)
    assert all(len(set(groups[rows].tolist())) == 1 for rows in report.copies)
    assert all(len(set(groups[d.patient_ids == p].tolist())) == 1 for p in set(d.patient_ids.tolist()))
    splits = split_by_patient(groups, d.labels, fractions=(1, 0, 0), quiet=True)
    assert set(splits) == {"train"}


def test_known_duplicates_of_pneumoniamnist(data_root):
    report = find_leaks(load_dataset("pneumoniamnist", data="real", quiet=True))
    folds = [tuple(sorted(set(report.splits[rows].tolist()))) for rows in report.exact]
    assert folds.count(("train", "val")) == 8 and sum((report.splits[rows] == "train").sum() > 1 for rows in report.exact) == 18
    across = {tuple(rows.tolist()) for rows in report.across}
    assert all(any(set(rows.tolist()) <= set(a) for a in across) for rows, f in zip(report.exact, folds) if len(f) > 1)


def test_known_duplicate_of_busi(data_root):
    with np.load(data_root / "busi" / "busi_128.npz", allow_pickle=False) as file:
        busi = ImageDataset("busi", file["images"], file["labels"].astype(int), ["train"] * 780, "multiclass",
                            tuple(file["class_names"].tolist()), meta={"names": file["names"]})
    report = find_leaks(busi)
    conflicts = [set(busi.meta["names"][rows].tolist()) for rows in report.conflicts]
    assert {"benign (433)", "malignant (145)"} in conflicts
    assert 150 <= len(report.pairs) <= 210      # 182 when the thresholds were chosen
    which = np.unique(leak_groups(busi, report), return_inverse=True)[1]
    fold = np.random.default_rng(0).permutation(which.max() + 1)[which] % 5
    assert (fold[report.pairs.rows[:, 0]] == fold[report.pairs.rows[:, 1]]).all()


def test_false_alarms_among_strangers_are_rare(data_root):
    with np.load(data_root / "nih_cxr" / "nih_pneumonia1000_128.npz", allow_pickle=False) as file:
        images, patients = file["images"], file["patient_id"]
    pairs = near_duplicate_pairs(images)
    same = patients[pairs.rows[:, 0]] == patients[pairs.rows[:, 1]]
    print(f"NIH: {(~same).sum()} of {len(images) * (len(images) - 1) // 2} pairs are alarms about two patients, {same.sum()} about one")
    assert (~same).sum() <= 2 and same.sum() >= 1
