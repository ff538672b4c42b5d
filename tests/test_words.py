"""Both languages say everything, name the same values, and nothing English is left on the Chinese page except names and units."""
import json
import random
import re
from dataclasses import replace

import numpy as np
import pytest

from medimg.config import RESEARCH_USE
from medimg.deployment import words
from medimg.deployment.cards import advice, card, in_words, table, toy_advice
from medimg.deployment.guidelines import decide, guidelines
from medimg.deployment.key_slices import key_slices, toy_detection
from medimg.deployment.prediction import Finding, Prediction
from medimg.deployment.report import render_report, volume_section
from medimg.errors import ConfigError

PLACES = re.compile(r"{(\w+)}")
CJK = re.compile(r"[\u4e00-\u9fff]")


@pytest.fixture(scope="module")
def case():
    from medimg.data.phantom import thorax_phantom
    return thorax_phantom(1, shape=(40, 96, 96), spacing_mm=(7.5, 3.8, 3.8))


def film(**changes):
    grey = np.tile(np.arange(40, dtype="uint8") * 6, (40, 1))
    base = Prediction("answered", "a.dcm", task="binary", classes=("normal", "pneumonia"), label="pneumonia", score={"pneumonia": 1.2}, probability={"normal": 0.18, "pneumonia": 0.82},
                      threshold={"pneumonia": 0.41}, picture=grey, heat_map=grey.astype("float32") / 255, explanation={"class": "pneumonia"},
                      model={"name": "m", "version": "1", "digest": "ab" * 32, "origin": "unsigned", "signature": None}, ood={"method": "mahalanobis", "score": 9.0, "threshold": 20.0},
                      warnings=("unsigned bundle: its files are whole, but who made it is not proven", "the file does not state body part, view: whether the model fits could not be checked"),
                      uncertainty={"entropy_bits": 0.6, "note": "probability calibrated by temperature on 500 validation images; it holds for patients like those, at the same share of disease"},
                      findings=(Finding("region that moved the score", "evidence-region", score=0.7, box_yx=(1, 2, 30, 30),
                                        note="score is the share of the map's evidence inside the region; it is not a probability, and the region need not be the disease"),),
                      study={"modality": "DX", "patient_age_years": 4.0, "shape": [1, 40, 40], "patient_sex": "F"})
    return replace(base, **changes)


def test_every_key_speaks_both_languages():
    rows = {**words.WORDS, **{f"limit {k}": row for k, row in enumerate(words.LIMITS)}, **{f"sentence {k}": row for k, row in enumerate(words.SENTENCES)}}
    for key, (en, zh) in rows.items():
        assert en.strip() and zh.strip(), key
        assert sorted(PLACES.findall(en)) == sorted(PLACES.findall(zh)), key
        assert not CJK.search(en), key
        bare = PLACES.sub("", zh)
        assert CJK.search(bare) or not re.search(r"[A-Za-z]{3,}", bare), key
    assert all(CJK.search(zh) and not CJK.search(en) for en, zh in words.TERMS.items())
    assert words.say("research_use").lower() == RESEARCH_USE and words.say("for_clinician") == "for the clinician's decision"


def test_refusals():
    for call in (lambda: words.say("no such key"), lambda: words.say("made", "fr"), lambda: words.column("EN")):
        with pytest.raises(ConfigError):
            call()


def test_sentences_of_other_modules_are_known(case):
    """What the package itself writes as reason or warning is said again in Chinese, with its numbers."""
    from medimg.data.pictures import to_uint8
    from medimg.deployment import bundle, intake, predict
    from medimg.deployment.manifest import example_manifest
    manifest = example_manifest()
    manifest = {**manifest, "input": {**manifest["input"], "modality": ["DX", "CR"], "body_part": "CHEST", "view": ["PA"]}, "population": {**manifest["population"], "age_years": [1, 5], "sex": "F"}}
    study = intake.Study("a", np.zeros((10, 90), "uint8"), {"modality": "CT", "body_part": "HEAD", "view": "AP", "patient_age_years": 60.0, "patient_sex": "M"})
    said = [*predict.check_scope(study, manifest)[0], *predict.check_scope(intake.Study("a", np.tile(np.arange(90, dtype="uint8"), (90, 1)), {"modality": "DX"}), manifest)[1],
            *intake.study_of(case.volume, "a").reasons, *intake.check_range(np.array([0.0, 0.5])), *to_uint8(np.array([[1, 9]], "uint16"))[1], bundle.UNSIGNED, bundle.UNVERIFIED,
            predict.hottest_region(np.eye(4, dtype="float32")).note, *(note.format(how="temperature", n=12, on="validation", share="90%", names="normal and pneumonia", label="normal") for note in predict.NOTES.values())]
    assert len(said) > 12
    for text in said:
        zh, known = words.translated(text, "zh")
        assert known and CJK.search(zh), text
        assert set(re.findall(r"\d+", zh)) >= set(re.findall(r"\d+", text)) - {"0", "255"}, (text, zh)
        assert words.translated(text, "en") == (text, True)


def measures(text):
    """Numbers, units and signs of a text, in either language."""
    text = text.replace(">=", "≥").replace("<=", "≤")
    return sorted([*re.findall(r"\d+(?:\.\d+)?", text), *re.findall(r"(?<![a-z])mm3?(?![a-z0-9])|%|[<>≥≤]", text), *re.findall(r"(?<![A-Za-z0-9])[1-4][ABCX](?![A-Za-z0-9])", text)])


def texts_of(guideline):
    """Everything that a recommendation of a guideline may quote."""
    rows = [*guideline["rules"], *guideline.get("upgrades", ())]
    return {guideline["guideline"], *(row["text"] for row in rows), *(row["reason"] for row in rows if row.get("reason")), *(one["text"] for row in rows for one in row.get("reading", ())),
            *(p["else"] for p in guideline["preconditions"]), *([guideline["measure"]["rule"]] if "measure" in guideline else [])}


def test_every_text_of_a_guideline_has_a_chinese_one_with_the_same_numbers():
    shipped = json.loads((words.files("medimg.deployment") / "rules" / "texts" / "zh.json").read_text(encoding="utf-8"))
    assert set(shipped["guidelines"]) == set(guidelines())
    for name, guideline in guidelines().items():
        assert set(shipped["guidelines"][name]) == texts_of(guideline), name                   # none missing, none left over from an earlier edition
        for en, zh in shipped["guidelines"][name].items():
            assert CJK.search(zh) and not CJK.search(en) and measures(en) == measures(zh), (en, zh)
        for pair in words._conditions(guideline):
            en, zh = words_of(*pair), words._condition(*pair)
            assert measures(en) == measures(zh) and CJK.search(zh) and not re.search(r"[A-Za-z]{3,}", zh), (en, zh)
    pairs = [pair for part in shipped["guidelines"].values() for pair in part.items()]
    assert len(dict(pairs)) == len(set(pairs))                                                 # one English sentence, one Chinese sentence


def words_of(name, condition):
    from medimg.deployment import guidelines as module
    return module._words(name, condition)


def random_facts(guideline, dice):
    pick = {"size": lambda: {"mm": dice.choice([3, 5, 7, 9, 12, 16, 31])}, "number": lambda: dice.choice([0, 1, 0.05, 20, 40, 70, 200, 2000])}
    return {name: pick[about["values"]]() if isinstance(about["values"], str) else dice.choice(about["values"]) for name, about in guideline["inputs"].items() if dice.random() > 0.45}


@pytest.mark.parametrize("name", guidelines())
def test_whatever_the_engine_says_is_said_in_chinese(name):
    """Composed texts and reasons, for facts known and missing: all known, all numbers kept, no English left but names."""
    dice, guideline, seen = random.Random(name), guidelines()[name], set()
    for _ in range(300):
        answer = decide(guideline, random_facts(guideline, dice))
        seen |= {answer["text"], answer["reason"] or "no routine follow-up", f"{answer['guideline']}, {answer['edition']}"}
    for text in seen:
        zh, known = words.translated(text, "zh")
        assert known and CJK.search(zh) and measures(zh) == measures(text), (text, zh)
        assert not set(re.findall(r"[A-Za-z]{3,}", zh)) - {"LDCT", "PET", "RADS", "Lung", "ACR", "ADA", "ATS", "IDSA", "BTS", "ICO", "PIDS", "Fleischner", "Bankier", "Radiology"}, zh
    assert len(seen) > 3


@pytest.mark.parametrize("text", ["CT at 6-12 months, then ask the aunt", "if risk: medium → no routine follow-up", "no routine follow-up.", "; " * 50_000 + "xyz", "if " * 50_000])
def test_a_recommendation_that_nobody_wrote_stays_as_it_is(text):
    assert words.translated(text, "zh") == (text, False) and words.translated(text) == (text, True)


NAMES = {"medimg", "Python", "phantom", "truth", "ct", "CT", "HU", "mm", "px", "UTC", "SHA", "logit", "DX", "ramp", "thorax", "SPL", "ms", "lang"}


def visible_text(html):
    """Text and spoken attributes of a page, without the parts marked as English, style and pictures."""
    from html.parser import HTMLParser

    class Reader(HTMLParser):
        """Skips what is marked lang="en"."""

        def __init__(self):
            super().__init__(convert_charrefs=True)
            self.stack, self.text = [], []

        def handle_starttag(self, tag, attrs):
            facts = dict(attrs)
            if tag not in ("meta", "img", "input", "br", "rect", "line", "polygon", "path"):
                self.stack.append((tag, facts.get("lang") == "en" or tag in ("style", "code")))
            if not any(hidden for _, hidden in self.stack):
                self.text += [v for k, v in attrs if k in ("alt", "aria-label", "title") and v]

        def handle_endtag(self, tag):
            if tag in [t for t, _ in self.stack]:
                while self.stack.pop()[0] != tag:
                    pass

        def handle_data(self, data):
            if not any(hidden for _, hidden in self.stack):
                self.text.append(data)
    reader = Reader()
    reader.feed(html)
    return reader.text


def test_no_english_sentence_on_the_chinese_page(case):
    scan = replace(toy_detection(case), recommendations=toy_advice())
    none = replace(scan, findings=(), mask=None, recommendations=())
    refused = film(status="refused", label=None, probability=None, findings=(), reasons=("age 60 years; the model was trained on 1 to 5 years", "a stack of 3 slices, not a single picture"))
    many = [scan, none, film(), film(prediction_set=("normal", "pneumonia"), probability={"normal": 0.56, "pneumonia": 0.44}), film(prediction_set=("pneumonia",)), film(prediction_set=()), refused,
            Prediction("error", "x.dcm", error={"type": "NotDicom", "what": "no marker", "remedy": None})]
    html = render_report(many, sections=[volume_section(case.volume, title="胸部", window=(-600, 1500), lang="zh")], lang="zh")
    for text in visible_text(html):
        left = [w for w in re.findall(r"[A-Za-z][A-Za-z-]+", text) if w not in NAMES and w not in ("dcm", "RUL")]
        assert len(left) < 2, (text, left)
    assert '<html lang="zh-CN">' in html and "no marker" in html and 'class="orig" lang="en"' in html
    assert words.say("guideline_text", "zh") in html and '<span class="orig" lang="en">CT again after 3 months.</span>' in html and words.say("for_clinician", "zh") in html


def test_a_recommendation_on_the_chinese_page(case):
    """Chinese first, the English original below it and marked; nothing of it is left in English unmarked."""
    from medimg.deployment.recommend import recommend
    scan = toy_detection(case)
    facts = {"age_years": 61, "screening": False, "known_cancer": False, "prior_ct": True}
    html = render_report([replace(scan, recommendations=recommend(scan, facts))], lang="zh")
    said = " ".join(visible_text(html))
    for words_zh in ("Fleischner 学会：偶然发现的肺结节", "无法评估", "前提是免疫抑制为否：", "无法核实患者是否属于本指南的适用人群", "不适用", "非筛查 CT：Lung-RADS 仅用于筛查", "以所附英文原文为准"):
        assert words_zh in said, words_zh
    for text in visible_text(html):
        left = [w for w in re.findall(r"[A-Za-z][A-Za-z-]+", text) if w not in NAMES | {"dcm", "RUL", "PET", "Lung-RADS", "ACR", "Fleischner", "LDCT"} and "-gt" not in w and w != "FL-solid-"]
        assert len(left) < 2, (text, left)
    (original,) = re.findall(r'<p class="fine" lang="en">(provided that[^<]*)</p>', html)
    assert words.translated(original.replace("&gt;", ">").replace("&lt;", "<"), "zh")[0] in said.replace("\n", " ")


def test_a_recommendation_on_the_review_page():
    from medimg.deployment.recommend import recommend
    from medimg.deployment.page_view import _recommended
    (row,) = recommend([{"type": "solid", "mean_diameter_mm": 7.0}], {"age_years": 61, "screening": False, "known_cancer": False, "immunosuppressed": False, "prior_ct": False}, names=["fleischner-2017"])
    zh, en = _recommended(row, "zh"), _recommended(row, "en")
    assert zh["said"]["guideline"]["text"] == "Fleischner 学会：偶然发现的肺结节" and "若肺癌风险为低 → 6-12 个月时复查 CT" in zh["said"]["text"]["text"] and not zh["said"]["text"]["attr"]
    assert "肺癌风险" in zh["missing"] and "邻近胸膜" in zh["missing"] and "年龄（岁）: 61" in zh["used"] and "size: 7.0 mm" in en["used"]
    assert en["said"]["text"]["text"] == zh["text"] == row["text"]
    other = {"size": {"mm": 7.0}, "solid": {"mm": 3.0}, "other_findings": [{"finding": 1, "rule": "R", "status": "not assessable", "category": None}, {"finding": 2, "rule": "R", "status": "applies", "category": "4A"}]}
    assert _recommended({**row, "inputs_used": other}, "zh")["used"] == "大小: 7.0 mm; 实性成分: 3.0 mm; 其他病灶: 2 无法评估, 3 4A"
    strange = _recommended({**row, "text": "ask the aunt", "inputs_missing": ["her_name"]}, "zh")
    assert strange["said"]["text"] == {"text": "ask the aunt", "attr": ' lang="en"'} and strange["missing"] == "her name"


def test_one_rounding_of_a_probability_everywhere():
    """What a network says with certainty is printed alike by card, terminal, repr and the picture for the archive, never as a promise."""
    from medimg.cli import answers_text
    from medimg.deployment.dicom_pictures import _lines
    for p, said in ((1.0, "> 0.99"), (0.9996, "> 0.99"), (0.994, "0.99"), (0.5, "0.50"), (0.004, "< 0.01"), (0.0, "< 0.01")):
        answer = film(probability={"normal": 1 - p, "pneumonia": p}, warnings=())
        assert words.chance(p) == said and card(answer)["p"] == card(answer)["bars"][0]["shown"] == said
        assert f"pneumonia  {said} " in answers_text([answer]) and f"P(pneumonia) {said if said[0] in '<>' else '= ' + said}" in repr(answer) and said in _lines(answer, "en")[0]
        assert not any(promise in text for text in (answers_text([answer]), repr(answer), *_lines(answer, "en")) for promise in ("1.00", "0.00"))


def test_the_limits_of_a_card_name_the_classes_of_the_bundle(monkeypatch):
    from medimg.deployment.bundle import Bundle
    from medimg.experiments import protocol
    from medimg.reproduction import known_limits
    bundle = Bundle.load("pneumonia")
    assert known_limits("pneumonia", bundle.classes) in bundle.card and known_limits("pneumonia", ("clear", "opacity")) == ""
    figures = protocol.stored_results()["uncertainty-pneumonia"]["figures"]
    three = {**figures, **{key.replace("normal", "grade 2"): value for key, value in figures.items()}, **{key.replace("coverage[0]", "coverage[2]"): value for key, value in figures.items()}}
    monkeypatch.setattr(protocol, "stored_results", lambda: {"uncertainty-pneumonia": {"figures": three}})
    said = known_limits("pneumonia", ("normal", "pneumonia", "grade 2"))
    assert "of normal, pneumonia and grade 2" in said and "of grade 2)" in said


def test_notes_come_in_parts():
    """Records with codes and records from before say the same; what the set says is not said twice, whatever the words of the note."""
    from medimg.deployment import predict
    parts = [predict._note("calibrated", how="temperature", n=500, on="validation"), predict._note("set-many", names="normal and pneumonia", share="90%")]
    coded, old = {**predict._noted(parts), "level": 0.9}, {"note": predict._noted(parts)["note"], "level": 0.9}
    for lang in words.LANGUAGES:
        a, b = (in_words(film(prediction_set=("normal", "pneumonia"), uncertainty={"entropy_bits": 0.1, **one}), lang) for one in (coded, old))
        assert a == b and sum("500" in line for line in a) == 1 and not any("told apart" in line for line in a)
    reworded = [{"code": "set-many", "text": "another wording"}, {"code": "news", "text": "a sentence that mentions: no prediction set"}]
    said = in_words(film(prediction_set=("normal", "pneumonia"), uncertainty={"entropy_bits": 0.1, "note": "", "notes": reworded}))
    assert "A sentence that mentions: no prediction set." in said and not any("another wording" in line for line in said)
    answer = film(study=None, explanation=None, uncertainty={"entropy_bits": 0.1, **coded})
    assert Prediction.from_json(answer.to_json()).uncertainty["notes"] == parts and coded["note"] == "; ".join(one["text"] for one in parts)


def test_both_pages_say_the_same_numbers(case):
    scan = replace(toy_detection(case), recommendations=toy_advice())
    pages = {lang: re.sub(r"<style>.*?</style>|base64,[^\"]*|[0-9a-f]{64}", "", render_report([scan, film()], title="T", lang=lang), flags=re.S) for lang in words.LANGUAGES}
    numbers = {lang: sorted(re.findall(r"\d+\.\d+", page)) for lang, page in pages.items()}
    assert numbers["en"] == numbers["zh"] and len(numbers["en"]) > 30


def test_words_fit_what_was_said():
    said = " ".join(in_words(film()))
    assert "about 82 are right and 18 are wrong" in said and "called from 0.41" in said and "no prediction set" in said
    negative = in_words(film(label="normal", probability={"normal": 0.82, "pneumonia": 0.18}))
    assert "about 82 are right" in negative[0]
    assert any("near the threshold" in line for line in in_words(film(probability={"normal": 0.55, "pneumonia": 0.45})))
    assert "cannot decide between: normal, pneumonia" in " ".join(in_words(film(prediction_set=("normal", "pneumonia"))))
    assert "everything but “pneumonia” is excluded" in " ".join(in_words(film(prediction_set=("pneumonia",))))
    assert "no class fits" in " ".join(in_words(film(prediction_set=())))
    note = film().uncertainty["note"] + "; the set leaves out the answer normal: answer and set are drawn at different borders; no prediction set: this model has no limits for one"
    for lang, first, second, left in (("en", "calibrated by temperature on 500", "leaves out the answer normal", "no limits"), ("zh", "概率经温度缩放校准（500 幅验证图像）", "集合不包含结果“正常”", "界限。")):
        lines = in_words(film(prediction_set=("pneumonia",), uncertainty={"entropy_bits": 0.1, "note": note, "level": 0.9}), lang)
        assert sum(first in line for line in lines) == 1 and sum(second in line for line in lines) == 1 and not any(left in line and second not in line for line in lines)
    for kept, en, zh in ((("pneumonia",), "Not excluded at 90 %: pneumonia", "90% 置信水平下不能排除：肺炎"), (("normal", "pneumonia"), "Not excluded at 90 %: normal, pneumonia", "90% 置信水平下不能排除：正常、肺炎"),
                         ((), "At 90 % no class fits: read it as unknown", "90% 置信水平下没有类别符合：请视为未知")):
        one = film(prediction_set=kept, uncertainty={"entropy_bits": 0.1, "note": "", "level": 0.9})
        assert card(one)["set"] == en and zh in render_report([one], lang="zh") and card(film())["set"] == ""
        assert any("are right" in line for line in in_words(one)) == bool(kept)
    sure = in_words(film(probability={"normal": 0.003, "pneumonia": 0.997}))
    assert "more than 99 are right" in sure[0] and not any(" 0 are wrong" in line or "100 are right" in line for line in sure)
    assert card(film(probability={"normal": 0.003, "pneumonia": 0.997}))["bars"][0]["shown"] == "> 0.99"
    assert "90 % of such sets" in " ".join(in_words(film(prediction_set=("pneumonia",), uncertainty={"entropy_bits": 0.1, "note": "", "level": 0.9})))
    assert in_words(film(status="refused")) == [words.say("refusal")]
    empty = in_words(Prediction("answered", "ct", task="detection"))
    assert "not a statement of health" in empty[0] and not any("Marked" in line for line in empty)


def test_table_rows():
    finding = Finding("nodule", "part-solid", score=0.912, slice=0, centroid_mm=(1.4, -2.6, 3.0), long_axis_mm=12.34, short_axis_mm=9.0, mean_diameter_mm=10.67, volume_mm3=1234.5, side="right", lobe="RML",
                      solid_diameter_mm=4.0, growth={"relation": "matched", "prior_study_uid": "1", "interval_days": 90, "prior_volume_mm3": 1000.0, "prior_mean_diameter_mm": 9.9, "volume_doubling_days": -95.2})
    row = table(Prediction("answered", "ct", findings=(finding,)))[0]
    assert (row["slice"], row["size"], row["mean"], row["solid"], row["score"], row["place"]) == ("1", "12.3 × 9.0", "mean 10.7", "solid part 4.0", "0.91", "right, RML")
    assert row["volume"] == "1\u202f234" and row["growth"] == ["90 days ago: 9.9 mm, 1\u202f000 mm³", "volume halves in 95 days"] and row["at"] == "X 1, Y \u22123, Z 3 mm"
    for growth, line in ((None, "no prior"), ({"relation": "new"}, "new since the prior study")):
        assert table(Prediction("answered", "ct", findings=(replace(finding, growth=growth),)))[0]["growth"] == [line]
    assert table(film()) == []


def test_advice_keeps_the_guideline(case):
    rows = {lang: advice(replace(film(), recommendations=toy_advice()), lang) for lang in words.LANGUAGES}
    assert [r["text"] for r in rows["en"]] == [r["text"] for r in rows["zh"]] == [r["text"] for r in toy_advice()]
    assert rows["zh"][0]["state"] == "适用" and rows["zh"][1]["missing"] == ["smoking history"] and rows["en"][0]["finding"] == "Finding 1"
    assert rows["en"][0]["used"] == [("type", "solid"), ("mean diameter mm", "12")] and rows["zh"][0]["used"][0] == ("type", "实性")
    others = ({"finding": 1, "rule": "R", "status": "applies", "category": "2"}, {"finding": 2, "rule": "R", "status": "not assessable", "category": None})
    late = ({**toy_advice()[1], "status": "not applicable"}, {**toy_advice()[0], "inputs_used": {"screening": True, "size": {"mm": 11.7, "mm3": 764.0}, "other_findings": list(others)}})
    first, last = advice(replace(film(), recommendations=late))
    assert (first["state"], last["state"]) == ("applies", "not applicable") and first["used"] == [("screening", "yes"), ("size", "11.7 mm, 764 mm3"), ("other findings", "Finding 2: 2; Finding 3: not assessable")]


def test_key_slices_show_the_voxels(case):
    """The crop holds the very voxels of the finding, whatever way the stack is stored."""
    answer = toy_detection(case)
    keys = key_slices(answer)
    assert [k["number"] for k in keys] == [1, 2, 3]
    for way in ("IPL", "SAL", "SPR"):
        turned = replace(answer, volume=case.volume.reorient(way), mask=case.volume.with_array(answer.mask).reorient(way).array)
        for a, b in zip(keys, key_slices(turned)):
            assert a["slice"] == b["slice"] and a["points"] == b["points"] and a["frame"] == b["frame"]
            assert all(np.array_equal(x["image"], y["image"]) for x, y in zip(a["crops"], b["crops"]))
    for k, key in enumerate(keys, 1):
        xs, ys = (np.array([float(p.split(",")[i]) for line in key["points"] for p in line.split()]) for i in (0, 1))
        area = (answer.mask[key["slice"] - 1] == k)
        assert (xs.max() - xs.min()) / 4 == pytest.approx(np.ptp(np.nonzero(area)[1]) + 1, abs=0.5) and (ys.max() - ys.min()) / 4 == pytest.approx(np.ptp(np.nonzero(area)[0]) + 1, abs=0.5)
    ring = key_slices(replace(answer, mask=None))
    assert not any(k["solid"] for k in ring) and all(k["points"] for k in ring)
    assert key_slices(replace(answer, volume=None)) == [] and card(replace(answer, volume=None))["keys"] == []
    outside = replace(answer, findings=(replace(answer.findings[0], centroid_mm=(900.0, 0.0, 0.0)),))
    assert key_slices(outside) == []
