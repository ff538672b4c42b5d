"""The page is whole, loads nothing, runs nothing, and shows refusals as clearly as answers."""
import re
import shutil
from html.parser import HTMLParser

import numpy as np
import pytest

from medimg.config import RESEARCH_USE
from medimg.data.volume import Volume
from medimg.deployment.prediction import Finding, Prediction
from medimg.deployment.report import Section, card, hu_histogram, outlines, plain, render_report, volume_section, write_report
from medimg.errors import ConfigError

MODEL = {"name": "m", "version": "1.0", "digest": "ab" * 32, "origin": "shipped", "signature": None}
VOID = {"meta", "img", "input", "br", "hr", "link", "polygon", "rect", "path", "line"}


class Page(HTMLParser):
    """Collects elements, attributes, text and nesting errors."""

    def __init__(self, html):
        super().__init__(convert_charrefs=True)
        self.open, self.tags, self.attrs, self.text, self.faults = [], [], [], [], []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attrs += [(tag, k, v) for k, v in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attrs += [(tag, k, v) for k, v in attrs]

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.faults.append(tag)

    def handle_data(self, data):
        self.text.append(data)


def records():
    picture = np.random.default_rng(0).integers(0, 256, (40, 30), dtype="uint8")
    heat = np.linspace(0, 1, 1200, dtype="float32").reshape(40, 30)
    answered = Prediction("answered", "a.dcm", task="binary", classes=("no", "yes"), label="yes", score={"yes": 1.25}, probability={"no": 0.2, "yes": 0.8},
                          threshold={"yes": 0.4}, model=MODEL, picture=picture, heat_map=heat, explanation={"class": "yes"}, warnings=("bear this",),
                          ood={"method": "mahalanobis", "score": 5.0, "threshold": 20.0}, uncertainty={"entropy_bits": 0.7, "note": "calibrated"},
                          findings=(Finding("region", "evidence-region", score=0.5, box_yx=(1, 2, 30, 20), note="n"),),
                          study={"patient_key": "k" * 16, "modality": "DX", "patient_age_years": 0.5, "shape": [1, 40, 30]}, input_sha256="cd" * 32, duration_ms=1.5)
    refused = Prediction("refused", "b.dcm", model=MODEL, reasons=("age 60 years",), picture=picture, score={"yes": 3.0})
    return [answered, refused, Prediction("error", "c.dcm", error={"type": "NotDicom", "what": "no marker", "remedy": "copy it"})]


def test_the_page_does_not_promise_what_file_names_may_break():
    html = render_report([Prediction("error", "DOE_JANE.dcm", error={"type": "E", "what": "w", "remedy": None})])
    assert "DOE_JANE.dcm" in html and "are not on this page" not in html
    assert "file names and series descriptions are shown as given, so rename files that carry a name" in html


def volume():
    rng = np.random.default_rng(0)
    return Volume(rng.integers(-1000, 500, (20, 30, 30)).astype("int16"), modality="CT", units="HU", meta={"description": "thorax", "patient_id": "SECRET", "findings": []})


def test_page(tmp_path):
    path = write_report(tmp_path / "r.html", records(), title="T", question="Q?", sections=[volume_section(volume(), window=(-600, 1500))],
                        truths={"a.dcm": np.eye(40, 30, dtype=bool)})
    html = path.read_text(encoding="utf-8")
    page = Page(html)
    assert not page.faults and not page.open, (page.faults, page.open)
    text = " ".join(" ".join(page.text).split())
    for words in ("T", "Q?", "0.80", "called from 0.40", "1.25", "age 60 years", "No answer", "Could not be read", "no marker", "bear this", "6 months",
                  "CT thorax", "Histogram of HU", RESEARCH_USE[1:], "abababababab"):
        assert words in text, words
    assert "3.00" not in text                      # the score of a refused picture is not shown
    ids = [v for _, k, v in page.attrs if k == "id"]
    assert len(ids) == len(set(ids)) and {v[1:] for t, k, v in page.attrs if t == "a" and k == "href"} <= set(ids)
    assert [k for k in ("h1",) if page.tags.count(k) != 1] == [] and ("html", "lang", "en") in page.attrs
    assert page.tags.count("img") == len([1 for t, k, v in page.attrs if t == "img" and k == "alt" and v])


def test_loads_and_runs_nothing():
    html = render_report(records(), sections=[volume_section(volume())])
    page = Page(html)
    assert not {"script", "link", "iframe", "object", "embed", "form", "base"} & set(page.tags)
    assert "http://" not in html and "https://" not in html and "url(" not in html and "@import" not in html
    for tag, name, value in page.attrs:
        assert not name.startswith("on"), (tag, name)
        if name in ("src", "href", "srcset", "action", "data"):
            assert value.startswith(("data:image/png;base64,", "#")), (tag, value[:40])
    policy = next(v for t, k, v in page.attrs if t == "meta" and k == "content" and "default-src" in v)
    assert policy.startswith("default-src 'none'") and "script" not in policy


@pytest.mark.parametrize("evil", ['<script>alert(1)</script>', '"><img src=x onerror=alert(1)>', "' onmouseover='alert(1)", "{{ 7919*7 }}", "</style><script>",
                                  "&lt;script&gt;", "\u202eevil\x1b[31m\x00"])
def test_text_from_strangers(evil):
    hostile = [Prediction("refused", evil, reasons=(evil,), warnings=(evil,), model={**MODEL, "name": evil, "version": evil, "digest": evil, "origin": evil},
                          study={"modality": evil, "view": evil, "body_part": evil, "series_uid": evil, "patient_sex": evil, "patient_key": evil}),
               Prediction("error", evil, error={"type": evil, "what": evil, "remedy": evil}),
               Prediction("answered", evil, label=evil, probability={evil: 0.5}, score={evil: 1.0}, threshold={evil: 0.4}, model=MODEL,
                          picture=np.zeros((4, 4), "uint8"), heat_map=np.ones((4, 4), "float32"), explanation={"class": evil},
                          uncertainty={"entropy_bits": 1.0, "note": evil}, findings=(Finding(evil, evil, note=evil),)),
               Prediction("answered", evil, task="detection", model=MODEL, findings=(Finding(evil, evil, score=0.5, slice=1, side=evil, lobe=evil, note=evil, growth={"relation": "matched"}),),
                          recommendations=({"guideline": evil, "edition": evil, "rule": evil, "source": evil, "status": evil, "category": evil, "text": evil, "finding": 0,
                                            "inputs_used": {evil: evil}, "inputs_missing": [evil], "reason": evil, "note": evil},))]
    html = render_report(hostile, title=evil, question=evil, sections=[Section(evil, lead=evil, facts=[(evil, evil)], findings=[("warning", evil)], caption=evil)])
    page = Page(html)
    assert not {"script"} & set(page.tags) and page.tags.count("img") == 2 and page.tags.count("style") == 1
    assert not [row for row in page.attrs if row[1].startswith("on")] and not page.faults
    assert not set("\u202e\x1b\x00") & set(html) and "55433" not in re.sub(r"<style>.*?</style>|base64,[^\"]*", "", html, flags=re.S).replace("2049", "") or "{{" not in evil
    if "{{" in evil:
        assert "{{ 7919*7 }}" in " ".join(page.text)


def test_policy_is_the_hash_of_the_style():
    """The browser's own rule: SHA-256 of the text between the style tags."""
    import base64
    import hashlib
    for lang in ("en", "zh"):
        html = render_report(records(), lang=lang)
        style = re.search(r"<style>(.*?)</style>", html, re.S)[1]
        assert f"style-src 'sha256-{base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()}'" in html.replace("&#39;", "'")
        assert "unsafe" not in html.split("<style>")[0] and not re.search(r"<[^>]+\sstyle=", html)


@pytest.mark.parametrize("lang", ["en", "zh"])
def test_pdf(tmp_path, lang):
    """PDF/A by poppler: title, tags, all fonts embedded, the words can be read, the foot of each page says research use."""
    import subprocess
    pytest.importorskip("weasyprint", reason="weasyprint is not installed; remedy: pip install 'medimg[pdf]'", exc_type=ImportError)
    if not shutil.which("pdffonts"):
        pytest.skip("poppler is not installed; remedy: apt-get install poppler-utils")
    if lang == "zh" and not subprocess.run(["fc-list", ":lang=zh-cn"], capture_output=True).stdout:
        pytest.skip("no Chinese font; remedy: apt-get install fonts-noto-cjk")
    path = write_report(tmp_path / "r.pdf", records(), title="Title <T>", lang=lang)
    ask = lambda *a: subprocess.run(a, capture_output=True, text=True, check=True).stdout      # noqa: E731
    info, fonts = ask("pdfinfo", path), ask("pdffonts", path).splitlines()[2:]
    assert re.search(r"Title:\s+Title <T>", info) and re.search(r"Tagged:\s+yes", info) and "pdfaid:part" in ask("pdfinfo", "-meta", path)
    assert fonts and all(re.search(r"\s+yes yes yes\s", line) for line in fonts) and ("CJK" in " ".join(fonts)) == (lang == "zh")
    for page in range(1, int(re.search(r"Pages:\s+(\d+)", info)[1]) + 1):
        text = ask("pdftotext", "-f", str(page), "-l", str(page), path, "-")
        assert ("仅供研究使用，非医疗器械" if lang == "zh" else "Research use, not a medical device") in text


def whole_pdf(path):
    """The bytes of a PDF with every Flate stream opened."""
    import zlib
    raw = path.read_bytes()
    opened = [raw]
    for part in re.finditer(rb"stream\r?\n", raw):
        try:
            opened.append(zlib.decompressobj().decompress(raw[part.end():]))
        except zlib.error:
            pass
    return b"\n".join(opened)


@pytest.mark.parametrize("lang", ["en", "zh"])
def test_decisive_rules_of_pdfa(tmp_path, lang):
    """ISO 19005-2: identified in XMP, a colour profile as output intent, nothing that runs, asks or hides, no picture that asks to be smoothed; and tagged, with title and language."""
    import subprocess
    pytest.importorskip("weasyprint", reason="weasyprint is not installed; remedy: pip install 'medimg[pdf]'", exc_type=ImportError)
    if lang == "zh" and not subprocess.run(["fc-list", ":lang=zh-cn"], capture_output=True).stdout:
        pytest.skip("no Chinese font; remedy: apt-get install fonts-noto-cjk")
    content = whole_pdf(write_report(tmp_path / "r.pdf", records(), title="T", lang=lang, sections=[volume_section(volume(), lang=lang)]))
    assert re.search(rb"pdfaid:part[=>]\"?2", content) and re.search(rb"pdfaid:conformance[=>]\"?B", content)
    assert b"/OutputIntent" in content and b"/GTS_PDFA1" in content and re.search(rb"/DestOutputProfile", content)
    for forbidden in (b"/Encrypt", b"/JavaScript", b"/JS", b"/Launch", b"/AA", b"/XFA", b"/EmbeddedFile", b"/LZWDecode", b"/PostScript", b"/Movie", b"/Sound"):
        assert not re.search(re.escape(forbidden) + rb"(?![A-Za-z])", content), forbidden
    assert b"/Interpolate true" not in content and re.search(rb"/Marked\s+true", content) and re.search(rb"/Lang\s*\((zh-CN|en)", content) and b"/StructTreeRoot" in content
    assert re.search(rb"/DisplayDocTitle\s+true", content)


#: Where PDF/A-1 is stricter than the PDF/A-2 that is written: transparency, CID sets, OpenType fonts, cross-reference streams, filters of metadata.
RELAXED = ("4.1", "2.2.1", "3.1.11", "3.1.3", "1.4", "1.2.7")


def test_apache_preflight_finds_nothing_that_pdfa2_forbids(tmp_path):
    """The validator of Apache PDFBox knows part 1 of the standard; what it says beside the points that part 2 relaxed would be a fault here too."""
    import subprocess
    from pathlib import Path
    pytest.importorskip("weasyprint", reason="weasyprint is not installed; remedy: pip install 'medimg[pdf]'", exc_type=ImportError)
    jars = [Path("/usr/share/java") / f"{name}.jar" for name in ("preflight", "pdfbox2", "fontbox2", "xmpbox", "commons-io", "commons-logging", "javax.activation", "jaxb-api")]
    if not shutil.which("java") or not all(jar.exists() for jar in jars):
        pytest.skip("Apache Preflight is not installed; remedy: apt-get install default-jre-headless libpdfbox2-java libactivation-java libjaxb-api-java")
    path = write_report(tmp_path / "r.pdf", records(), title="T", sections=[volume_section(volume())])
    done = subprocess.run(["java", "-cp", ":".join(map(str, jars)), "org.apache.pdfbox.preflight.Validator_A1b", str(path)], capture_output=True, text=True, timeout=300)
    assert "PDF/A-1b file" in done.stdout, done.stderr[-500:]
    said = [line for line in done.stdout.splitlines() if re.match(r"\d+(\.\d+)+ :", line)]
    assert said and not [line for line in said if not line.startswith(RELAXED)], said


def test_pdf_fetches_nothing(tmp_path):
    """A picture from a file or from the network stops the PDF, whatever wrote it into the page."""
    from medimg.deployment.report import pdf_bytes
    pytest.importorskip("weasyprint", reason="weasyprint is not installed; remedy: pip install 'medimg[pdf]'", exc_type=ImportError)
    (tmp_path / "x.png").write_bytes(b"secret")
    page = render_report(records())
    for address in ("file:///etc/hostname", (tmp_path / "x.png").as_uri(), "http://127.0.0.1:9/x.png", "ftp://127.0.0.1/x.png"):
        with pytest.raises(ConfigError, match="outside itself"):
            pdf_bytes(page.replace("<main", f'<img src="{address}"><main'))


def test_pdf_without_weasyprint(tmp_path, monkeypatch):
    import sys
    monkeypatch.setitem(sys.modules, "weasyprint", None)
    with pytest.raises(ConfigError, match=r"medimg\[pdf\]"):
        write_report(tmp_path / "r.pdf", records())
    assert list(tmp_path.iterdir()) == []


def test_no_patient_identity():
    html = render_report([], sections=[volume_section(volume())])
    assert "SECRET" not in html


def test_refusals(tmp_path):
    for call in (lambda: write_report(tmp_path / "r.html", []), lambda: write_report(tmp_path / "r.txt", records()), lambda: write_report(tmp_path / "r.html", records(), lang="fr")):
        with pytest.raises(ConfigError):
            call()
    with pytest.raises(ConfigError, match="1600"):
        render_report([], sections=[Section("x", picture=np.zeros((2000, 10), "uint8"))])
    assert list(tmp_path.iterdir()) == []


def test_pieces():
    assert plain("a\tb\nc\x07\u2066") == "a\tb\nc" or plain("a\tb\nc\x07\u2066") == "ab\nc" or "\x07" not in plain("\x07")
    assert plain(3) == 3 and outlines(np.zeros((3, 3), bool)) == []
    square = np.zeros((50, 50), bool)
    square[10:20, 5:30] = True
    xs, ys = zip(*(map(float, p.split(",")) for p in outlines(square)[0].split()))
    assert (min(xs), max(xs), min(ys), max(ys)) == (5.5, 29.5, 10.5, 19.5)
    c = card(records()[0])
    assert c["bars"] == [{"name": "yes", "p": 0.8, "shown": "0.80", "cut": 0.4, "cut_at": 40.0, "called": True}] and c["ood_at"] == 12.5 and c["boxes"] == [(1, 2, 30, 20)]
    many = Prediction("answered", "m", label="c7", probability={f"c{i}": (i + 1) / 55 for i in range(10)}, score={})
    assert [b["name"] for b in card(many)["bars"]] == ["c9", "c8", "c7", "c6", "c5"]


def test_histogram_counts():
    h = hu_histogram(np.r_[np.full(400, -1000.0), np.full(100, 40.0), 5000.0], bins=22, low=-1100, high=1100)
    heights = [122 - float(y) for y in re.findall(r"L[\d.]+,([\d.]+)", h["path"])[:-1:2]]
    assert heights[1] == pytest.approx(110) and heights[11] == pytest.approx(55, abs=0.1) and heights[21] == pytest.approx(110 / 20, abs=0.1)
    assert [t["value"] for t in h["ticks"]] == [-1000, -500, -100, 40, 500, 1000]


def test_large_pictures_are_reduced():
    big = Prediction("refused", "x", reasons=("r",), picture=np.random.default_rng(0).integers(0, 256, (3000, 2000), dtype="uint8"), model=MODEL)
    assert len(render_report([big])) < 600_000


def test_section_states():
    states = {(): "read, no findings", ("warning",): "read with warnings", ("info", "error"): "problems found"}
    for severities, words in states.items():
        section = volume_section(volume(), findings=[(s, "text") for s in severities])
        assert words in render_report([], sections=[section])
    uneven = Volume(np.zeros((3, 4, 4)), slice_positions_mm=[0, 1, 5], modality="CT", units="HU")
    assert ("Spacing (z, y, x)", "uneven mm") in volume_section(uneven).facts


@pytest.mark.slow
def test_in_a_browser(tmp_path):
    """Chromium lays the page out at three widths without a request, a message on the console or a sideways scroll bar."""
    if not shutil.which("chromium"):
        pytest.skip("chromium is not installed; remedy: apt-get install chromium")
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed; remedy: pip install playwright")
    path = write_report(tmp_path / "r.html", records(), sections=[volume_section(volume())])
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        for width, scheme in ((1280, "light"), (1280, "dark"), (360, "light")):
            page = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme).new_page()
            asked, said = [], []
            page.on("request", lambda r: asked.append(r.url))
            page.on("console", lambda m: said.append(m.text))
            page.goto(path.as_uri())
            assert [u for u in asked if not u.startswith("data:")] == [path.as_uri()] and not said
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            assert page.locator("article").count() == 3 and page.locator("img").first.evaluate("i => i.naturalWidth") == 30
            page.locator(".toggle").first.uncheck()
            assert page.locator(".marks").first.evaluate("e => getComputedStyle(e).visibility") == "hidden"
        browser.close()


@pytest.mark.slow
@pytest.mark.parametrize("lang", ["en", "zh"])
def test_axe_finds_nothing_serious(tmp_path, lang):
    """axe-core, in light and dark: contrast, names, structure of a page with an answer, a refusal and an error."""
    if not shutil.which("chromium"):
        pytest.skip("chromium is not installed; remedy: apt-get install chromium")
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed; remedy: pip install playwright")
    from test_review import axe_source, serious
    axe, path = axe_source(tmp_path / "axe"), write_report(tmp_path / "r.html", records(), sections=[volume_section(volume(), lang=lang)], lang=lang)
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        for scheme in ("light", "dark"):
            page = browser.new_context(color_scheme=scheme, bypass_csp=True).new_page()
            page.goto(path.as_uri())
            assert serious(page, axe) == []
        browser.close()


def test_a_gap_is_never_called_good():
    from dataclasses import dataclass

    @dataclass
    class Found:
        severity: str
        text: str
    flat = np.zeros((3, 8, 8), "int16")
    noted = Volume(flat, modality="CT", units="HU", meta={"findings": [{"code": "missing", "severity": "error", "text": "1 slice missing"}]})
    for v, wanted in ((noted, [("error", "1 slice missing")]), (Volume(flat, slice_positions_mm=[0, 1, 3]), [("error", "The slices are not evenly spaced.")]),
                      (Volume(flat), [("info", "The slices' places were not checked.")]),
                      (Volume(flat, meta={"findings": []}), [("good", "No gaps, duplicates or mixed slices were found.")])):
        assert list(volume_section(v).findings) == wanted
    assert list(volume_section(noted, findings=[Found("warning", "tilted")]).findings) == [("warning", "tilted")]
