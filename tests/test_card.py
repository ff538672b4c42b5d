"""The model card: page, Markdown and JSON say the same; a bundle, and answers of classifiers, segmentations and detectors, go through one door."""
import json
import re
import sys
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from conftest import leave_out
from scipy.stats import mannwhitneyu
from sklearn.metrics import average_precision_score, brier_score_loss, cohen_kappa_score, confusion_matrix, matthews_corrcoef, roc_auc_score

import medimg
from medimg.data.datasets import ImageDataset, find_dataset
from medimg.errors import ConfigError, DatasetError
from medimg.evaluation import answers, places, questions
from medimg.evaluation.card import chart, make_card, render_html, render_markdown, section, table, tidy


class Page(HTMLParser):
    """What a reader of the page can see, apart: numbers, words, tags."""

    def __init__(self, text):
        super().__init__()
        self.numbers, self.words, self.tags, self.alts, self.stack = Counter(), [], Counter(), [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags[tag] += 1
        if tag == "img":
            self.alts.append(dict(attributes).get("alt"))
        if tag not in ("meta", "img", "br"):
            self.stack.append(tag)

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag, f"</{tag}> closes another element"

    def handle_data(self, text):
        if self.stack and self.stack[-1] == "data":
            self.numbers[json.loads(text)] += 1
        elif self.stack and self.stack[-1] not in ("style", "title"):
            self.words.append(text)


def numbers_in(value):
    if isinstance(value, (dict, list)):
        return sum((numbers_in(v) for v in (value.values() if isinstance(value, dict) else value)), Counter())
    return Counter([value]) if isinstance(value, (int, float)) and not isinstance(value, bool) else Counter()


def texts_in(value):
    if isinstance(value, (dict, list)):
        return [t for v in (value.values() if isinstance(value, dict) else value) for t in texts_in(v)]
    return [value] if isinstance(value, str) else []


def same(folder):
    """The three files of a card agree; returns the JSON and the page."""
    card, page = json.loads((folder / "card.json").read_text()), Page((folder / "card.html").read_text())
    assert page.numbers == numbers_in(card)
    shown, markdown = " ".join(page.words), (folder / "MODEL_CARD.md").read_text()
    for line in [line for s in card["sections"] for line in s["reading"]] + [row["text"] for row in card["checklist"]]:
        assert line in shown, line
    for s in card["sections"]:
        for t in s["tables"]:
            for row in t["rows"]:
                assert all(v is None or json.dumps(v) in markdown for v in row if isinstance(v, float))
    assert "research use, not a medical device" in shown and all(page.alts) and page.tags["h1"] == page.tags["main"] == 1 and not page.stack
    return card, page


def toy(n=120, seed=0, **more):
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (n, 24, 24)).astype(np.uint8)
    return ImageDataset("toy", images, rng.integers(0, 2, n), ["test"] * n, classes=("healthy", "ill"), **more)


@pytest.fixture(scope="module")
def judged(tmp_path_factory):
    """The card of a classifier's answers, and what it was made from."""
    home, rng = tmp_path_factory.mktemp("card"), np.random.default_rng(1)
    dataset = toy(meta={"sex": rng.choice(["F", "M"], 120), "age": rng.integers(1, 90, 120)}, patient_ids=np.repeat(np.arange(60), 2))
    p = np.clip(0.35 + 0.3 * dataset.labels + rng.normal(0, 0.2, 120), 0.01, 0.99)
    order = rng.permutation(120)
    file = answers.write_answers(home / "a.npz", image_ids=dataset.image_ids[order], p=np.stack([1 - p, p], 1)[order], threshold=0.55, name="other", version="7")
    result = medimg.evaluate(file, dataset, n_boot=200, log=home / "reads.jsonl", card=home / "out", progress=False)
    return dataset, p, result, home


def figures(card, key, caption=0):
    return {row[0]: row[1] for s in card["sections"] if s["key"] == key for row in s["tables"][caption]["rows"]}


def test_page_markdown_and_json_of_a_classifier_agree(judged):
    card, page = same(judged[3] / "out")
    assert [s["key"] for s in card["sections"]] == ["skill", "cut", "meaning", "silence", "whom", "errors", "sheet"] and page.tags["img"] >= 4 + 12


def test_the_figures_are_those_of_scikit_learn(judged):
    dataset, p, result, home = judged
    card, y = json.loads((home / "out" / "card.json").read_text()), dataset.labels
    found = figures(card, "skill")
    assert found["auc"] == tidy(roc_auc_score(y, p)) and found["average_precision"] == tidy(average_precision_score(y, p))
    assert found["mcc"] == tidy(matthews_corrcoef(y, p >= 0.55))
    assert figures(card, "meaning")["Brier score"] == tidy(brier_score_loss(y, p))
    assert result["metrics"]["auc"]["value"] == pytest.approx(roc_auc_score(y, p)) and result["test_reads"] == 1 and len((home / "reads.jsonl").read_text().splitlines()) == 1
    roc = next(c for s in card["sections"] for c in s["charts"] if c["title"] == "ROC curve")["series"][0]
    assert roc["y"][-1] == 1 and (np.diff(roc["y"]) >= 0).all() and all(low <= y <= high for y, low, high in zip(roc["y"], roc["low"], roc["high"]))


def test_worst_errors_are_the_worst(judged):
    dataset, p, _, home = judged
    card = json.loads((home / "out" / "card.json").read_text())
    true, wrong = np.where(dataset.labels == 1, p, 1 - p), (p >= 0.55) != dataset.labels
    worst = sorted((true[i], dataset.image_ids[i][:12]) for i in np.flatnonzero(wrong))[:12]
    assert [(row[3], row[0]) for row in next(s for s in card["sections"] if s["key"] == "errors")["tables"][0]["rows"]] == [(tidy(t), name) for t, name in worst]
    assert next(s for s in card["sections"] if s["key"] == "errors")["reading"][0].startswith(f"{wrong.sum()} of {len(p)} answers are wrong; the {len(worst)} in which")


@pytest.mark.parametrize("kind", ["segmentation", "detection"])
def test_a_segmentation_and_a_detector_get_the_same_page(kind, tmp_path):
    rng, n = np.random.default_rng(3), 24
    corners = rng.integers(2, 8, (n, 2))
    truth = np.zeros((n, 24, 24), np.uint8)
    for t, (y, x) in zip(truth, corners):
        t[y:y + 10, x:x + 12] = 1
    if kind == "segmentation":
        dataset = toy(n, task="segmentation", masks=truth)
        masks = np.array([np.roll(m, rng.integers(0, 3), axis=1) for m in dataset.masks])
        given = {"masks": masks}
    else:
        dataset = toy(n, task="detection", boxes=np.concatenate([corners, corners + (10, 12)], axis=1)[:, None].astype(float))
        given = {"boxes": np.concatenate([dataset.boxes[:, 0] + (1, 0, 1, 0), [[0, 0, 2, 2]] * 6]), "scores": rng.random(n + 6), "rows": np.r_[np.arange(n), np.arange(6)]}
    result = medimg.evaluate(answers.write_answers(tmp_path / "a.npz", image_ids=dataset.image_ids, **given), dataset, n_boot=50, log=tmp_path / "log", card=tmp_path / "out", progress=False)
    card, _ = same(tmp_path / "out")
    assert card["sections"][0]["reading"] and card["model"]["task"] == kind
    if kind == "segmentation":
        pairs = [2 * (a & b).sum() / (a.sum() + b.sum()) for a, b in zip(masks.astype(bool), dataset.masks.astype(bool))]
        assert result["metrics"]["dice"]["value"] == pytest.approx(np.mean(pairs), abs=1e-12)
    else:
        assert result["metrics"]["sensitivity[all marks]"]["value"] == 1 and result["metrics"]["alarms"]["value"] == pytest.approx(6 / n)


def test_a_shipped_bundle_on_validation_images_says_that_they_were_used(tmp_path):
    if find_dataset("pneumoniamnist") is None:
        leave_out("PneumoniaMNIST is not on this computer", "medimg data fetch pneumoniamnist")
    result = medimg.evaluate("pneumonia", split="val", n_boot=100, card=tmp_path, progress=False)
    card, page = same(tmp_path)
    assert card["warnings"] and "too good" in card["warnings"][0] and card["model"]["digest"] and figures(card, "skill")["auc"] == tidy(result["metrics"]["auc"]["value"])
    states = {row["point"]: row["state"] for row in card["checklist"]}
    assert states["robustness"] == "filled" and next(s for s in card["sections"] if s["key"] == "breaks")["tables"][0]["rows"]
    why = next(s for s in card["sections"] if s["key"] == "why")
    assert "not judged" in why["reading"][0] and len(why["pictures"]) == 6 and states["explanations judged"] == "open"
    assert states["who was included"] == "filled" and states["readers of the reference"] == "open"


def test_text_from_outside_does_not_become_markup():
    evil = '"><script>alert(1)</script>'
    card = make_card({"name": evil, evil: evil}, {"dataset": evil}, [section("a b", evil, reading=[evil], tables=[table(evil, [evil], [[evil]])], images=[(evil, np.zeros((2, 2), np.uint8))])], warnings=[evil])
    page = Page(render_html(card))
    assert not page.tags["script"] and not re.search(r"<script", render_html(card)) and "<script" not in render_markdown(card)


@pytest.mark.parametrize("value", [object(), {1: {2}}, b"x"])
def test_a_card_takes_only_what_json_can_hold(value):
    with pytest.raises(ConfigError, match="cannot hold"):
        tidy(value)


def test_tidy_rounds_once():
    rng = np.random.default_rng(0)
    values = np.r_[rng.normal(size=200) * 10.0 ** rng.integers(-8, 8, 200), 0, np.nan, np.inf]
    once = tidy(values)
    assert tidy(once) == once and once[-2:] == [None, None]
    assert all(abs(a - b) <= 5.01e-4 * abs(b) for a, b in zip(once[:200], values))


@pytest.mark.parametrize("change, match", [({"y": [2] * 40}, "outside"), ({"y": [0.5] * 40}, "outside"), ({"p": np.full((40, 2), 0.7)}, "add up"), ({"p": np.full((40, 2), np.nan)}, "add up"),
                                           ({"p": np.full((39, 2), 0.5)}, "labels"), ({"groups": [1]}, "patient ids"), ({"y": [0] * 35 + [1] * 5}, "too few"), ({"y": [0] * 40}, "too few")])
def test_answers_that_cannot_be_judged_are_refused(change, match):
    with pytest.raises(ConfigError, match=match):
        questions.Answers(**{"y": np.tile([0, 1], 20), "p": np.full((40, 2), 0.5), "classes": ("no", "yes")} | change)


def test_a_small_set_is_framed():
    y = np.tile([0, 1], 12)
    parts, warnings = questions.classifier_sections(questions.Answers(y, np.clip(0.4 + 0.2 * y + np.random.default_rng(0).normal(0, 0.3, 24), 0, 1), ("no", "yes"), n_boot=100))
    assert warnings and "Too small to tell" in warnings[0] and "patients are needed" in warnings[0]


@pytest.mark.parametrize("arrays, match", [({"p": np.ones((2, 2))}, "no answers|answers for"), ({"masks": np.ones((3, 2, 2)), "p": np.ones((3, 2))}, "holds"), ({}, "holds"),
                                           ({"boxes": np.ones((2, 4)), "scores": np.ones(2)}, "need scores"), ({"boxes": np.ones((2, 4)), "scores": np.ones(2), "rows": [0, 7]}, "need scores")])
def test_files_of_answers_that_do_not_fit_are_refused(arrays, match, tmp_path):
    with pytest.raises(ConfigError, match=match):
        answers.read_answers(answers.write_answers(tmp_path / "a.npz", image_ids=["a", "b", "c"], **arrays))


def test_objects_damage_and_bombs_are_refused(tmp_path, monkeypatch):
    np.savez(tmp_path / "objects.npz", image_ids=np.array(["a"]), p=np.array([{}], dtype=object))
    (tmp_path / "cut.npz").write_bytes(answers.write_answers(tmp_path / "a.npz", image_ids=["a"], p=[[0.0, 1.0]]).read_bytes()[:60])
    for name in ("objects", "cut", "none"):
        with pytest.raises(ConfigError):
            answers.read_answers(tmp_path / f"{name}.npz")
    monkeypatch.setattr(answers, "MOST_BYTES", 10)
    with pytest.raises(ConfigError, match="unpacks to more"):
        answers.read_answers(tmp_path / "a.npz")


def test_holes_and_missing_truth_are_refused(tmp_path):
    dataset = toy(40)
    few = answers.read_answers(answers.write_answers(tmp_path / "a.npz", image_ids=dataset.image_ids[:30], p=np.full((30, 2), 0.5)))
    with pytest.raises(DatasetError, match="10 of 40"):
        answers.judge_answers(few, dataset)
    masks = answers.read_answers(answers.write_answers(tmp_path / "b.npz", image_ids=dataset.image_ids, masks=np.ones((40, 24, 24))))
    with pytest.raises(DatasetError, match="no masks"):
        answers.judge_answers(masks, dataset)
    with pytest.raises(ConfigError, match="which images"):
        medimg.evaluate(tmp_path / "a.npz", progress=False)


def test_a_chart_needs_columns_of_one_length():
    with pytest.raises(ConfigError, match="different lengths"):
        chart("t", "x", "y", {"a": {"x": [0, 1], "y": [0]}})


def no_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)


def folder_is_a_file(monkeypatch):
    Path("cards").write_text("in the way")


def folder_is_read_only(monkeypatch):
    monkeypatch.setattr("tempfile.TemporaryFile", lambda **_: (_ for _ in ()).throw(PermissionError(13, "Permission denied")))


@pytest.mark.parametrize("trouble, match", [(no_matplotlib, "matplotlib is not installed.*medimg\\[course\\]"), (folder_is_a_file, "no card can be written"), (folder_is_read_only, "permission denied")])
@pytest.mark.parametrize("what", ["answers", "bundle"])
def test_what_a_card_needs_is_checked_before_a_test_fold_is_read(trouble, match, what, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    dataset = toy()
    source = answers.write_answers(tmp_path / "a.npz", image_ids=dataset.image_ids, p=np.full((120, 2), 0.5)) if what == "answers" else "phantom-cxr"
    monkeypatch.setattr(ImageDataset, "split", lambda *_: pytest.fail("a fold was touched"))
    trouble(monkeypatch)
    with pytest.raises(ConfigError, match=match):
        medimg.evaluate(source, dataset, log=tmp_path / "log", card=tmp_path / "cards", progress=False)
    assert not (tmp_path / "log").exists()


def test_without_matplotlib_there_are_figures_but_no_card(monkeypatch, tmp_path):
    dataset = toy()
    file = answers.write_answers(tmp_path / "a.npz", image_ids=dataset.image_ids, p=np.full((120, 2), 0.5))
    no_matplotlib(monkeypatch)
    assert medimg.evaluate(file, dataset, n_boot=20, log=tmp_path / "log", progress=False)["metrics"]["auc"]["value"] == 0.5


class Model:
    """A model that has nothing but answers, and says how often it was asked."""

    manifest = {"name": "m", "version": "1", "created": "2026-01-01", "digest": "0" * 64, "classes": ["healthy", "ill"], "task": "binary", "thresholds": {"ill": 0.5},
                "training": {"dataset": "toy", "checksum": None, "seed": 0, "commit": None}, "population": {"description": "nobody"}, "research_use": "research use, not a medical device",
                "input": {"shape": [24, 24, 1], "modality": None}, "licence": {"code": "Apache-2.0", "data": "none", "citation": "none"}}

    def __init__(self, **changes):
        self.manifest, self.asked = self.manifest | changes, []

    def predict(self, images):
        self.asked.append(len(images))
        p = np.asarray(images, float).reshape(len(images), -1).mean(axis=1)
        p = (p - p.min()) / (np.ptp(p) or 1)
        return np.stack([1 - p, p], axis=1)


def test_model_and_answers_take_one_path_and_are_measured_once(monkeypatch, tmp_path):
    from medimg import api
    from medimg.evaluation import questions as q
    dataset, model, calls = toy(), Model(), []
    monkeypatch.setattr(api, "load_bundle", lambda _: model)
    monkeypatch.setattr(q, "evaluate_classification", lambda *args, plain=q.evaluate_classification, **options: calls.append(1) or plain(*args, **options))
    asked = medimg.evaluate("a-bundle", dataset, n_boot=60, log=tmp_path / "log", card=tmp_path / "model", progress=False)
    assert len(calls) == 1 and model.asked[0] == 120
    file = answers.write_answers(tmp_path / "a.npz", image_ids=dataset.image_ids, p=Model().predict(dataset.images), threshold=0.5)
    given = medimg.evaluate(file, dataset, n_boot=60, log=tmp_path / "log", card=tmp_path / "file", progress=False)
    assert len(calls) == 2 and asked["metrics"] == given["metrics"] and given["test_reads"] == 2
    cards = [same(tmp_path / name)[0]["sections"] for name in ("model", "file")]
    assert [s for s in cards[0] if s["key"] != "breaks"] == cards[1]


@pytest.mark.parametrize("task, shape", [("segmentation", [64, 64, 1]), ("detection", [16, 32, 32, 1])])
def test_a_bundle_that_draws_or_finds_goes_the_same_way(task, shape, monkeypatch, tmp_path):
    from medimg import api
    truth = np.zeros((24, 24, 24), np.uint8)
    truth[:, 4:14, 4:16] = 1
    drawn = toy(24, task=task, masks=truth, boxes=np.full((24, 1, 4), (4.0, 4.0, 14.0, 16.0)))
    model = Model(task=task, classes=["Background", "healthy", "ill"], thresholds={}, input={"shape": shape, "modality": None})
    located = type(sys)("medimg.deployment.located")
    located.fold_answers = lambda bundle, part: {"name": "m", "version": "1", "threshold": None, "task": task, "image_ids": part.image_ids, "kind": task} | (
        {"masks": part.masks} if task == "segmentation" else {"boxes": part.boxes[:, 0], "scores": np.ones(24), "rows": np.arange(24)})
    monkeypatch.setitem(sys.modules, "medimg.deployment.located", located)
    monkeypatch.setattr(api, "load_bundle", lambda _: model)
    result = medimg.evaluate("a-bundle", drawn, n_boot=20, log=tmp_path / "log", card=tmp_path / "out", progress=False)
    card, _ = same(tmp_path / "out")
    assert result["metrics"]["dice" if task == "segmentation" else "cpm"]["value"] == 1 and card["model"]["takes"].startswith("any, ")
    assert ("(z, y, x, channels)" if task == "detection" else "(y, x, channels)") in card["model"]["takes"]
    with pytest.raises(DatasetError, match="classes"):
        model.manifest["classes"] = ["background", "nodule"]
        medimg.evaluate("a-bundle", drawn, n_boot=20, log=tmp_path / "log", progress=False)


def grades(n=300, seed=0):
    rng = np.random.default_rng(seed)
    y = rng.integers(0, 4, n)
    return ImageDataset("toy", rng.integers(0, 256, (n, 24, 24)).astype(np.uint8), y, ["test"] * n, task="ordinal", classes=("none", "mild", "moderate", "severe"))


def test_grades_get_the_same_page_with_a_weighted_kappa(tmp_path):
    dataset = grades()
    rng = np.random.default_rng(5)
    p = rng.dirichlet(np.ones(4), 300) * 0.5 + 0.5 * np.eye(4)[np.clip(dataset.labels + rng.integers(-1, 2, 300), 0, 3)]
    file = answers.write_answers(tmp_path / "a.npz", image_ids=dataset.image_ids, p=p)
    result = medimg.evaluate(file, dataset, n_boot=60, log=tmp_path / "log", card=tmp_path / "out", progress=False)
    card, _ = same(tmp_path / "out")
    skill = next(s for s in card["sections"] if s["key"] == "skill")
    y_hat = p.argmax(axis=1)
    assert figures(card, "skill")["quadratic_kappa"] == tidy(cohen_kappa_score(dataset.labels, y_hat, weights="quadratic"))
    assert [row[1:] for row in skill["tables"][1]["rows"]] == confusion_matrix(dataset.labels, y_hat).tolist()
    assert skill["reading"][0].startswith("Quadratic kappa 0.") and [s["name"] for s in skill["charts"][0]["series"]] == ["mild or more", "moderate or more", "severe or more"]
    roc = {s["name"]: s for s in skill["charts"][0]["series"]}["moderate or more"]
    y, s = dataset.labels >= 2, p[:, 2:].sum(axis=1)
    assert np.isclose(np.trapezoid(roc["y"], roc["x"]), roc_auc_score(y, s), atol=0.02) and result["metrics"]["auc[>= moderate]"]["value"] == pytest.approx(roc_auc_score(y, s))


def several(n=300, seed=0, holes=0.15):
    rng = np.random.default_rng(seed)
    truth = (rng.random((n, 4)) < (0.4, 0.25, 0.01, 0.3)).astype(float)
    p = 1 / (1 + np.exp(-(np.array([2.0, 1.0, 1.0, 0.0]) * (truth - 0.5) + rng.normal(0, 1, (n, 4)))))
    truth[rng.random((n, 4)) < holes] = np.nan
    return truth, p


def test_several_findings_are_judged_where_they_are_known(tmp_path):
    truth, p = several()
    images = np.random.default_rng(1).integers(0, 256, (300, 24, 24)).astype(np.uint8)
    patients = np.repeat(np.arange(150), 2)
    dataset = ImageDataset("toy", images, truth, ["test"] * 300, task="multilabel", classes=("effusion", "mass", "hernia", "fracture"), patient_ids=patients, meta={"sex": np.tile(["F", "M"], 150)})
    order = [images.tobytes().find(image.tobytes()) // 576 for image in dataset.images]
    p, cuts = p[order], [0.4, 0.5, 0.5, 0.6]
    file = answers.write_answers(tmp_path / "a.npz", image_ids=dataset.image_ids, p=p, threshold=cuts)
    result = medimg.evaluate(file, dataset, n_boot=60, log=tmp_path / "log", card=tmp_path / "out", progress=False)
    card, _ = same(tmp_path / "out")
    assert [s["key"] for s in card["sections"]] == ["skill", "meaning", "whom", "errors", "sheet"] and "hernia" in card["warnings"][0]
    known, worst = ~np.isnan(dataset.labels), next(s for s in card["sections"] if s["key"] == "errors")
    assert worst["reading"][0].startswith(f"{(known & ((p >= cuts) != (dataset.labels == 1))).sum()} of {known.sum()} known answers are wrong; the 12 in which")
    assert worst["tables"][0]["columns"] == ["case", "finding", "truth", "probability of the truth"]
    rows = {row[0]: row for row in card["sections"][0]["tables"][1]["rows"]}
    for c, name in enumerate(dataset.classes):
        known = ~np.isnan(dataset.labels[:, c])
        y = dataset.labels[known, c]
        assert rows[name][1:3] == [known.sum(), y.sum()]
        if name == "hernia":
            assert rows[name][3:15] == [None] * 12 and rows[name][-1] is None
        else:
            assert rows[name][3] == tidy(roc_auc_score(y, p[known, c])) and rows[name][6] == tidy(average_precision_score(y, p[known, c]))
            assert rows[name][9] == tidy(((p[known, c] >= cuts[c]) & (y == 1)).sum() / (y == 1).sum())
    assert rows["effusion"][-1] < 1e-3 and rows["fracture"][-1] > 0.05
    assert result["metrics"]["auc[mass]"]["n"] == rows["mass"][1] and result["threshold"] == cuts
    states = {row["point"]: row["text"] for row in card["checklist"]}
    assert states["threshold"].startswith("0.4, 0.5, 0.5, 0.6")
    table_ = next(s for s in card["sections"] if s["key"] == "whom")["tables"][0]
    assert {row[0] for row in table_["rows"]} == {"effusion", "mass", "fracture"} and all(row[-1] is None or 0 <= row[-1] <= 1 for row in table_["rows"])


def test_a_multilabel_bundle_is_asked_again(monkeypatch, tmp_path):
    from medimg import api
    truth, _ = several(120)
    dataset = ImageDataset("toy", toy().images, truth[:, :2], ["test"] * 120, task="multilabel", classes=("effusion", "mass"))
    model = Model(task="multilabel", classes=["effusion", "mass"], thresholds={"effusion": 0.4})
    monkeypatch.setattr(api, "load_bundle", lambda _: model)
    result = medimg.evaluate("a-bundle", dataset, n_boot=20, log=tmp_path / "log", card=tmp_path / "out", progress=False)
    card, _ = same(tmp_path / "out")
    assert result["threshold"] == [0.4, 0.5] and [s["key"] for s in card["sections"]] == ["skill", "meaning", "breaks", "errors", "sheet"]
    assert "mean AUC" in card["sections"][2]["tables"][0]["caption"]


def test_chance_is_called_chance_and_skill_is_not():
    from medimg.evaluation.findings import beyond_chance
    rng, p = np.random.default_rng(0), []
    for _ in range(400):
        y = rng.permutation(np.arange(80) < 25).astype(int)
        p.append(beyond_chance(y, rng.random(80)))
    assert 0.02 < np.mean(np.array(p) < 0.05) < 0.085
    s = rng.normal(y * 0.8, 1)
    assert abs(np.log(beyond_chance(y, s) / mannwhitneyu(s[y == 1], s[y == 0]).pvalue)) < 1.5 and beyond_chance(y, s) < 0.05
    assert beyond_chance(y, s) == beyond_chance(y, np.exp(s)) and 0 < beyond_chance([0] * 12 + [1] * 12, np.arange(24)) < 1e-3
    assert beyond_chance(np.repeat(y, 4), np.repeat(s, 4), groups=np.repeat(np.arange(80), 4)) == pytest.approx(beyond_chance(y, s), rel=0.15)


@pytest.mark.parametrize("change, match", [({"p": np.full((20, 2), 1.5)}, "0 to 1"), ({"p": np.full((20, 2), np.nan)}, "0 to 1"), ({"y": np.full((20, 2), 2)}, "something else"), ({"y": np.zeros(20)}, "findings"),
                                           ({"threshold": (0.1, 0.2, 0.3)}, "thresholds"), ({"groups": [1]}, "patient ids")])
def test_findings_that_cannot_be_judged_are_refused(change, match):
    from medimg.evaluation.findings import Findings, findings_sections
    plain = {"y": np.tile([0, 1], (20, 1)), "p": np.full((20, 2), 0.5), "classes": ("a", "b")}
    with pytest.raises(ConfigError, match=match):
        Findings(**plain | change)
    with pytest.raises(ConfigError, match="too few"):
        findings_sections(Findings(**plain))


def hand_made():
    """The eight scans and six nodules of chapter 04, worked out there by hand, twice over; each alarm lies on nothing."""
    hits, alarms = [0.97, 0.94, 0.85, 0.70, 0.52, None], [0.91, 0.80, 0.74, 0.66, 0.60, 0.45, 0.41, 0.33, 0.28, 0.20]
    sizes, kinds = [5.0, 7.0, 9.0, 11.0, 13.0, 15.0], ["solid", "solid", "part-solid", "part-solid", "ground-glass", "ground-glass"]
    lesions, rows = [[] for _ in range(16)], {k: [] for k in ("points", "scores", "rows", "kinds", "diameters_mm")}

    def mark(place, score, scan, kind="solid", size=4.0):
        for k, v in zip(rows, (place, score, scan, kind, size)):
            rows[k].append(v)
    for copy in (0, 8):
        for k, (score, size, kind) in enumerate(zip(hits, sizes, kinds)):
            place = np.array([10.0 * k, -50.0, 200.0])
            lesions[copy + k].append({"centroid_mm": tuple(place), "diameter_mm": size, "kind": kind, "relevant": True})
            if score:
                mark(place + (0, 0, 1.5), score, copy + k, "part-solid" if k == 1 else kind, size + (2 if k % 2 else -1))
                mark(place + (0, 0, size / 2 - 0.01), score / 2, copy + k)          # a repeat: no alarm
                mark(place + (size / 2, 0, 0), 0.001, copy + k)                     # on the radius: outside
        lesions[copy].append({"centroid_mm": (0.0, 90.0, 0.0), "diameter_mm": 30.0, "kind": None, "relevant": False})
        mark((0.0, 95.0, 0.0), 0.99, copy)                                          # on an excluded finding
        for k, score in enumerate(alarms):
            mark((300.0, 300.0, 10.0 * k), score, copy + k % 8)
    return lesions, rows


def test_marks_in_scans_by_hand(tmp_path):
    lesions, marks = hand_made()
    images = np.random.default_rng(0).integers(0, 256, (16, 4, 12, 12)).astype(np.uint8)
    dataset = ImageDataset("scans", images, np.zeros(16, int), ["test"] * 16, classes=("no", "nodule"), meta={"lesions": places.lesion_column(lesions)})
    ids = [next(i for i, image in zip(dataset.image_ids, dataset.images) if (image == one).all()) for one in images]
    file = answers.write_answers(tmp_path / "a.npz", image_ids=ids, **marks)
    result = medimg.evaluate(file, dataset, n_boot=100, log=tmp_path / "log", card=tmp_path / "out", progress=False)
    got = {k: v["value"] for k, v in result["metrics"].items()}
    assert got["cpm"] == pytest.approx(5 / 7)                                       # 3/6, 3/6, 4/6, 5/6, 5/6, 5/6, 5/6
    assert [got[f"sensitivity[{r}]"] for r in ("1/8", "1/4", "1/2", "1", "8")] == pytest.approx([3 / 6, 3 / 6, 4 / 6, 5 / 6, 5 / 6])
    assert got["alarms"] == (10 + 5) / 8 and got["centre_error_mm"] == 1.5
    assert got["diameter_bias_mm"] == pytest.approx((-1 + 2 - 1 + 2 - 1) / 5) and got["diameter_error_mm"] == pytest.approx(7 / 5) and got["kind_right"] == 4 / 5
    assert got["sensitivity[1, <6 mm]"] == got["sensitivity[1, 6 to <8 mm]"] == 1 and got["sensitivity[1, >=8 mm]"] == 3 / 4
    card, _ = same(tmp_path / "out")
    parts = {s["key"]: s for s in card["sections"]}
    assert [row[:3] for row in parts["size"]["tables"][0]["rows"]] == [["<6 mm", 2, 2], ["6 to <8 mm", 2, 2], [">=8 mm", 8, 6]]
    kinds = parts["place"]["tables"][1]
    assert kinds["columns"] == ["truth", "called ground-glass", "called part-solid", "called solid", "not found"]
    assert kinds["rows"] == [["ground-glass", 2, 0, 0, 2], ["part-solid", 0, 4, 0, 0], ["solid", 0, 2, 2, 0]]
    missed, alarms = parts["errors"]["tables"]
    assert [row[1:] for row in missed["rows"]] == [["ground-glass", 15.0, 50.0, -50.0, 200.0]] * 2
    assert [row[1] for row in alarms["rows"][:4]] == [0.91, 0.91, 0.8, 0.8] and card["model"]["task"] == "detection"
    assert alarms["rows"][0][-1] == tidy(min(np.linalg.norm(np.array([300, 300, 0]) - p) for p in ((0, -50, 200), (0, 90, 0))))
    assert "2 findings are excluded" in parts["found"]["reading"][2] and "Of 52 marks 30 are false alarms" in parts["found"]["reading"][2]


def test_marks_of_other_scans_do_not_count_and_truth_is_needed(tmp_path):
    lesions, marks = hand_made()
    images = np.random.default_rng(0).integers(0, 256, (16, 4, 12, 12)).astype(np.uint8)
    dataset = ImageDataset("scans", images, np.zeros(16, int), ["test"] * 16, classes=("no", "nodule"))
    file = answers.write_answers(tmp_path / "a.npz", image_ids=dataset.image_ids, **marks)
    with pytest.raises(DatasetError, match="no lesions in mm"):
        answers.judge_answers(answers.read_answers(file), dataset)
    whole = places.Places(lesions, **marks, n_boot=20).estimates
    more = {k: [*v, v[0]] for k, v in marks.items()} | {"rows": [*marks["rows"], 16]}
    given = answers.read_answers(answers.write_answers(tmp_path / "b.npz", image_ids=[*dataset.image_ids, "another"], **more))
    sorted_truth = replace(dataset, meta={"lesions": places.lesion_column(lesions)})
    assert answers.judge_answers(given, sorted_truth, n_boot=20)[0]["cpm"].value == whole["cpm"].value


@pytest.mark.parametrize("change, match", [({"points": np.zeros((1, 2))}, "points"), ({"scores": [0.1, 0.2]}, "points"), ({"rows": [3]}, "points"), ({"rows": [0.5]}, "points"), ({"threshold": "high"}, "threshold"), ({"threshold": np.nan}, "threshold")])
def test_marks_that_do_not_fit_are_refused(change, match, tmp_path):
    plain = {"points": np.zeros((1, 3)), "scores": [0.5], "rows": [0]}
    with pytest.raises(ConfigError, match=match):
        answers.read_answers(answers.write_answers(tmp_path / "a.npz", image_ids=["a"], **plain | change))


@pytest.mark.parametrize("change, match", [({"scores": [np.inf]}, "finite"), ({"points": [[np.nan, 0, 0]]}, "finite"), ({"diameters_mm": [0.0]}, "diameter"), ({"kinds": ["a", "b"]}, "kinds"), ({"groups": [1, 2]}, "patient ids"),
                                           ({"lesions": [[{"centroid_mm": (0, 0), "diameter_mm": 3}]]}, "lesion"), ({"lesions": [[{"centroid_mm": (0, 0, 0), "diameter_mm": -3}]]}, "lesion")])
def test_places_that_cannot_be_judged_are_refused(change, match):
    with pytest.raises(ConfigError, match=match):
        places.Places(**{"lesions": [[]], "points": [[0, 0, 0]], "scores": [0.5], "rows": [0]} | change)


def test_the_whole_data_sheet_is_on_the_card(judged):
    from medimg.data.datasheets import cramers_v
    dataset, _, _, home = judged
    card, page = same(home / "out")
    sheet = card["sections"][-1]
    assert sheet["key"] == "sheet" and sheet["reading"] == ["No problem of these data is recorded, which is not the same as none."]
    classes, facts, sex = sheet["tables"]
    assert classes["rows"] == [["healthy", 0, 0, int((dataset.labels == 0).sum())], ["ill", 0, 0, int((dataset.labels == 1).sum())], ["patients", 0, 0, 60], ["images", 0, 0, 120]]
    known = dict(facts["rows"])
    assert known["licence"] == "not stated" and known["mean grey value"] == tidy(dataset.images.mean()) and known["equal images in different folds, groups"] == 0
    assert sex["rows"][0][-1] == tidy(cramers_v(dataset.meta["sex"], dataset.labels)) and sum(row[1] for row in sex["rows"]) == pytest.approx(1, abs=1e-3)


def test_faults_and_licence_of_a_registered_set_are_told(tmp_path):
    from medimg.data.registry import REGISTRY
    info = next(i for i in REGISTRY.values() if i.problems)
    sheet = answers.sheet_section(replace(toy(), name=info.name, licence=info.licence, citation=info.citation, source="/home/someone/secret/a.npz"))
    assert all(any(p.rstrip(".") in line for line in sheet["reading"]) for p in info.problems)
    facts = dict(sheet["tables"][1]["rows"])
    assert facts["licence"] == info.licence and facts["read from"] == "a.npz" and "secret" not in json.dumps(sheet, default=str)
