"""The authors' tools, and a bad example for each check: a check that cannot fail proves nothing."""
import base64
import copy
import json
import re
import subprocess
import sys

import nbchecks as checks
import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

nbtool, ROOT = checks.nbtool, checks.ROOT


def chapter():
    """A small chapter that every check accepts."""
    hidden = {"jupyter": {"source_hidden": True}}
    said = [new_output("stream", name="stdout", text="2\n")]
    nb = new_notebook(cells=[
        new_markdown_cell("# Count to two\n\n> The smallest chapter that is one."),
        new_markdown_cell("| You need | Minutes | Data and licence | |\n|---|---|---|---|\n| nothing | 1 | none | research use, not a medical device |"),
        new_code_cell('profile = "course"', metadata={"tags": ["parameters"]}),
        new_code_cell("#| default_exp toy"),
        new_code_cell('#| export\ndef two() -> int:\n    """The number two, always.\n\n    Examples\n    --------\n    >>> two()\n    2\n    """\n    return 2'),
        new_code_cell("print(two())", outputs=said),
        new_code_cell('course.exercise("toy-a", expected=2, hint="count", wrong=[1, 3])', metadata=hidden),
        new_code_cell('answer = ...\ncourse.check("toy-a", answer)'),
        new_code_cell('# solution toy-a\nassert course.check("toy-a", two())', metadata=hidden)])
    nbtool.tidy(nb)
    return nb


NOTEBOOK_CHECKS = [checks.missing_outputs, checks.error_outputs, checks.machine_paths, checks.too_big, checks.outside_requests,
                   checks.title_and_promise, checks.parameters_cell, checks.wrong_directives, checks.export_place, checks.untidy,
                   checks.bad_fences, checks.bad_figures, checks.bad_exercises]


@pytest.mark.parametrize("check", NOTEBOOK_CHECKS, ids=lambda c: c.__name__)
def test_a_good_chapter_passes(check):
    assert check(chapter()) == []


def edit(i, source=None, **changes):
    """A fault: replace the source (text, or a function of it) or other fields of cell `i`."""
    def apply(nb):
        cell = nb.cells[i]
        if source is not None:
            cell.source = source(cell.source) if callable(source) else source
        for key, value in changes.items():
            cell[key] = nbformat.from_dict(value)
    return apply


def stdout(text):
    return [nbformat.from_dict(dict(output_type="stream", name="stdout", text=text))]


def shown(mime, data):
    return [nbformat.from_dict(dict(output_type="display_data", metadata={}, data={mime: data}))]


FAULTS = [
    (checks.missing_outputs, edit(5, outputs=[]), "prints, but no output"),
    (checks.missing_outputs, lambda nb: [c.update(outputs=[]) for c in checks.code_cells(nb)], "no output is stored at all"),
    (checks.error_outputs, edit(5, outputs=[dict(output_type="error", ename="ValueError", evalue="no", traceback=["x"])]), "ValueError: no"),
    (checks.machine_paths, edit(5, outputs=stdout("wrote /home/ann/x.png\n")), "/home/ann"),
    (checks.machine_paths, edit(5, outputs=stdout("in '/tmp/tmpab12/x'\n")), "/tmp/tmpab12"),
    (checks.machine_paths, edit(5, outputs=stdout("lib/python3.11/site-packages/x.py:3: Warning\n")), "site-packages"),
    (checks.machine_paths, edit(5, 'open("C:\\\\data\\\\x.dcm")'), "C:"),
    (checks.machine_paths, edit(5, outputs=shown("text/html", "<img src='/work/x.png'>")), "/work/x.png"),
    (checks.too_big, edit(5, "\n".join(f"a{i} = {i}" for i in range(36))), "36 lines"),
    (checks.too_big, edit(5, outputs=shown("image/png", base64.b64encode(bytes(100_001)).decode())), "100001 bytes"),
    (checks.outside_requests, edit(5, outputs=shown("text/html", '<script src="https://cdn.example.org/x.js"></script>')), "cdn.example.org"),
    (checks.outside_requests, edit(5, outputs=shown("text/html", "<style>@import '//fonts.example.org/a.css'</style>")), "fonts.example.org"),
    (checks.title_and_promise, edit(0, "## Count\n\n> Promise."), "first cell"),
    (checks.title_and_promise, edit(0, "# Count\n\nno promise"), "first cell"),
    (checks.title_and_promise, edit(1, "# Again"), "2 first-level"),
    (checks.parameters_cell, edit(2, metadata={}), "0 cells"),
    (checks.parameters_cell, edit(2, 'profile = "ci"'), "does not set"),
    (checks.wrong_directives, edit(5, lambda s: "#| eval: false\n" + s), "eval"),
    (checks.wrong_directives, edit(5, lambda s: "#|hide: true\n" + s), "hide"),
    (checks.wrong_directives, edit(4, lambda s: s.replace("export", "exporti")), "exporti"),
    (checks.export_place, edit(3, "#| default_exp toy\nimport os"), "shares its cell"),
    (checks.export_place, edit(3, "pass"), "exports before"),
    (checks.untidy, edit(5, execution_count=3), "not as tools/nb.py"),
    (checks.untidy, edit(5, id="abcd"), "not as tools/nb.py"),
    (checks.untidy, edit(5, metadata={"collapsed": True}), "not as tools/nb.py"),
    (checks.untidy, edit(5, outputs=shown("application/vnd.jupyter.widget-view+json", {"model_id": "1"})), "not as tools/nb.py"),
    (checks.untidy, lambda nb: nb.metadata.update(language_info={"name": "python"}), "metadata"),
    (checks.bad_fences, edit(1, "::: {.callout-note}\ntext"), "left open"),
    (checks.bad_fences, edit(1, "text\n:::"), "never opened"),
    (checks.bad_fences, edit(1, "```python\nx = 1"), "code fence"),
    (checks.bad_figures, edit(1, "See @fig-roc."), "@fig-roc"),
    (checks.bad_exercises, edit(6, 'course.exercise("toy-a", expected=2, hint="count", wrong=[1])'), "two wrong"),
    (checks.bad_exercises, edit(6, 'course.exercise("toy-a", expected=2, hint="", wrong=[1, 3])'), "no hint"),
    (checks.bad_exercises, edit(6, metadata={}), "shows its check"),
    (checks.bad_exercises, edit(8, metadata={}), "shows its solution"),
    (checks.bad_exercises, edit(8, "# solution toy-b\npass"), "no cell `# solution toy-a`"),
    (checks.bad_exercises, edit(8, '# solution toy-a\ncourse.check("toy-a", 2)'), "not asserted"),
    (checks.bad_exercises, edit(7, "pass"), "never asked"),
    (checks.bad_exercises, lambda nb: nb.cells.__delitem__(slice(6, None)), "no exercise"),
]


@pytest.mark.parametrize("check,fault,word", FAULTS, ids=[f"{c.__name__}-{i}" for i, (c, _, _) in enumerate(FAULTS)])
def test_a_bad_chapter_fails(check, fault, word):
    nb = chapter()
    fault(nb)
    complaints = check(nb)
    assert complaints and word in "\n".join(complaints)


def test_every_notebook_check_has_a_fault():
    assert {c for c, _, _ in FAULTS} == set(NOTEBOOK_CHECKS)


def test_docstrings_do_not_count_as_lines():
    """35 lines of code pass with a docstring of 40 lines; 36 lines of code do not (`too_big` above)."""
    source = '#| export\ndef f():\n    """Doc.\n' + "\n" * 40 + '    """\n' + "\n".join(f"    a{i} = {i}\n" for i in range(34))
    assert checks.code_lines(source) == 35


# ---- modules and docstrings ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("module,source,bad", [
    ("medimg.models.x", "from ..data.volume import Volume", False),
    ("medimg.models.x", "def f():\n    from medimg.evaluation.metrics import auc", True),
    ("medimg.training.x", "from ..evaluation import metrics", True),
    ("medimg.data.x", "import importlib\nimportlib.import_module('medimg.models.resnet')", True),
    ("medimg.models.x", "NETS = {'resnet': 'medimg.training.later:f'}", False),
    ("medimg.config", "from .errors import ConfigError", False),
    ("medimg.errors", "from .config import sha256_of", True),
    ("medimg.plots", "from .course import check", True),
    ("medimg.deployment.x", "import medimg\nfrom .. import predict", True),
    ("medimg.deployment.x", "def f():\n    import medimg\n    return medimg.__version__", False),
    ("medimg.deployment.x", "def f():\n    import medimg\n    return medimg.predict", True),
    ("medimg.data.volume", "from .dicom import scan", True), ("medimg.data.volume", "def f():\n    from .dicom import scan", False),
    ("medimg.data.dicom", "from .volume import Volume", False)])
def test_import_direction(module, source, bad):
    order = {"medimg.data.volume": 1, "medimg.data.dicom": 2}
    assert bool(checks.upward_imports(source, module, order)) == bad


@pytest.mark.parametrize("source,bad", [
    ("import numpy as np\nimport json\nfrom medimg.errors import x", False), ("import scipy", True), ("from pydicom import dcmread", True),
    ("def f():\n    import tensorflow", False), ("try:\n    import keras\nexcept ImportError: pass", True),
    ("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import pandas", False), ("class A:\n    import cv2", True)])
def test_heavy_imports(source, bad):
    assert bool(checks.heavy_imports(source, "medimg.data.x")) == bad


GOOD_DOC = '''
def f(image, *, mm) -> "np.ndarray":
    """The image, drawn at a size.

    Parameters
    ----------
    image, mm : array
        What it is.

    Returns
    -------
    array

    Examples
    --------
    >>> f(1)
    """
'''


@pytest.mark.parametrize("change,word", [
    (lambda s: s, None), (lambda s: s.replace("image, mm :", "image :"), "'mm' is not documented"), (lambda s: s.replace("    Returns\n    -------\n", ""), "no Returns"),
    (lambda s: s.replace(">>> f(1)", "f(1)"), "no example"), (lambda s: s.replace("The image, drawn at a size.", "Draw."), "no purpose"),
    (lambda s: re.sub(r'""".*"""', "pass", s, flags=re.S), "no docstring"), (lambda s: s.replace("def f", "def _f"), None),
    (lambda s: "@dataclass\nclass R:\n    \"\"\"A row of a table.\"\"\"\n    name: str\n", "'name' is not documented"),
    (lambda s: "@dataclass\nclass R:\n    \"\"\"A row of a table.\"\"\"\n    name: str   # whose row\n", None),
    (lambda s: "class E(Exception):\n    \"\"\"Something is wrong.\"\"\"\n", None)])
def test_docstring_check(change, word):
    complaints = checks.bad_docstrings(change(GOOD_DOC))
    assert bool(complaints) == bool(word) and (not word or word in "\n".join(complaints))


# ---- links -----------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("heading,expected", [      # from pandoc's manual, section auto_identifiers
    ("Heading identifiers in HTML", "heading-identifiers-in-html"), ("Maître d'hôtel", "maître-dhôtel"),
    ("*Dogs*?--in *my* house?", "dogs--in-my-house"), ("[HTML], [S5], or [RTF]?", "html-s5-or-rtf"), ("3. Applications", "applications"), ("33", "section")])
def test_heading_ids_are_pandocs(heading, expected):
    assert checks.heading_id(heading) == expected


def test_links_and_anchors(tmp_path):
    (tmp_path / "b.md").write_text("# B\n\n## Same\n\n## Same\n\n## Own name {#mine}\n\n[term]{#term}\n\n```\n## no heading\n```\n")
    page = tmp_path / "a.md"
    good = "[x](b.md) [y](b.md#same-1) [z](b.md#mine) [t](b.md#term) [u](https://example.org/#x) `[no](link.md)`\n\n```\n[no](link.md)\n```\n"
    assert checks.bad_links(good, page, root=tmp_path) == []
    for bad in ["[x](c.md)", "[x](b.md#own-name)", "[x](b.md#no-heading)", "[](b.md)", "![](b.md)", "![alt](no.png)", "[x](#nowhere)", "[x](../../etc)"]:
        assert checks.bad_links(bad, page, root=tmp_path), bad


# ---- tools/nb.py -----------------------------------------------------------------------------------------------------------------
@pytest.fixture
def tool_root(tmp_path, monkeypatch):
    """tools/nb.py working on a repository of its own."""
    (tmp_path / "medimg").mkdir()
    (tmp_path / "nbs").mkdir()
    monkeypatch.setattr(nbtool, "ROOT", tmp_path)
    monkeypatch.setattr(nbtool, "NBS", tmp_path / "nbs")
    return tmp_path


def test_text_round_trip_keeps_outputs(tool_root):
    """notebook → text → notebook changes nothing; an edit drops the outputs of the edited cell only."""
    path = tool_root / "nbs" / "toy.ipynb"
    nb = chapter()
    nb.cells[4:4] = [new_code_cell("print(1)", outputs=stdout("first\n")), new_code_cell("print(1)", outputs=stdout("second\n"))]
    nb.metadata["medimg"] = {"source_sha256": "x", "modules": {}}
    nbtool.write(nb, path)
    before = path.read_bytes()
    nbtool.to_text(path)
    nbtool.from_text(path.with_suffix(".py"))
    assert path.read_bytes() == before
    text = path.with_suffix(".py")
    text.write_text(text.read_text().replace("print(two())", "print(two() + 1)"))
    nbtool.from_text(text)
    outputs = {c.source: c.outputs for c in checks.code_cells(nbtool.read(path))}
    assert outputs["print(two() + 1)"] == []
    assert [c.outputs[0].text for c in checks.code_cells(nbtool.read(path)) if c.source == "print(1)"] == ["first\n", "second\n"]


def test_cleaning_is_idempotent_and_thorough():
    nb = chapter()
    nb.metadata["language_info"] = {"name": "python", "version": "3.11.4"}
    nb.cells[5].update(execution_count=7, outputs=nbformat.from_dict([
        *stdout("10 %\r20 %\r100 %\n"), *stdout("done\n"), dict(output_type="stream", name="stderr", text="WARNING: All log messages before absl::x\n"),
        dict(output_type="execute_result", execution_count=7, metadata={"x": 1}, data={
            "text/plain": "<Thing at 0x7f0123456789>", "application/vnd.jupyter.widget-view+json": {"model_id": "1"}})]))
    nb.cells[5].metadata.update(collapsed=True, tags=["keep"])
    nbtool.tidy(nb)
    once = copy.deepcopy(nb)
    nbtool.tidy(nb)
    assert nb == once
    cell = nb.cells[5]
    assert cell.execution_count is None and cell.metadata == {"tags": ["keep"]}
    assert [o.get("text", o.get("data")) for o in cell.outputs] == ["100 %\ndone\n", {"text/plain": "<Thing>"}]
    assert len({c.id for c in nb.cells}) == len(nb.cells)
    nbformat.validate(nb)


def test_module_hash(tmp_path):
    """A docstring, a comment or a line break changes nothing; a number does."""
    def digest(text):
        (tmp_path / "m.py").write_text(text)
        return nbtool.module_sha256(tmp_path / "m.py")
    base = digest('"""A."""\ndef f(x):\n    """Doc."""\n    return x + 1\n')
    assert digest('"""B."""\n# comment\n\n\ndef f(x):\n    """Other\n    words."""\n    return x + 1   # why\n') == base
    assert digest('"""A."""\ndef f(x):\n    """Doc."""\n    return x + 2\n') != base
    assert digest('"""A."""\ndef f(x, y=0):\n    """Doc."""\n    return x + 1\n') != base


def test_staleness(tool_root):
    """Fresh after a run; stale after a change of a cell or of a module it used; not after a change of the table of names."""
    module, path = tool_root / "medimg" / "toy.py", tool_root / "nbs" / "toy.ipynb"
    module.write_text("ONE = 1\n")
    (tool_root / "medimg" / "__init__.py").write_text("")
    nb = chapter()
    nbtool.write(nb, path)
    assert nbtool.staleness(path) == ["never run by `tools/nb.py run`"]
    nb.metadata["medimg"] = {"source_sha256": nbtool.source_sha256(nb),
                             "modules": {m: nbtool.module_sha256(nbtool.module_path(m)) for m in ("medimg", "medimg.toy")}}
    nbtool.write(nb, path)
    assert nbtool.staleness(path) == []
    (tool_root / "medimg" / "__init__.py").write_text("NAMES = {}\n")
    assert nbtool.staleness(path) == []
    module.write_text("ONE = 2\n")
    assert nbtool.staleness(path) == ["medimg.toy changed after the outputs were stored"]
    module.unlink()
    assert nbtool.staleness(path) == ["medimg.toy changed after the outputs were stored"]
    module.write_text("ONE = 1\n")
    nb.cells[1].source += "\n\nMore prose."
    nbtool.write(nb, path)
    assert nbtool.staleness(path) == []
    nb.cells[5].source = "print(two() * 1)"
    nbtool.write(nb, path)
    assert nbtool.staleness(path) == ["a code cell changed after the outputs were stored"]


def test_run_stores_outputs_and_reports_a_failure(tool_root, capsys):
    path = tool_root / "nbs" / "toy.ipynb"
    nbtool.write(new_notebook(cells=[new_code_cell("import os\nprint(os.path.basename(os.getcwd()))")]), path)
    assert nbtool.run(path) and nbtool.read(path).cells[0].outputs[0].text == "nbs\n" and len(nbtool.read(path).cells) == 1
    assert nbtool.staleness(path) == []
    assert "WARNING" not in capsys.readouterr().err
    before = path.read_bytes()
    nb = nbtool.read(path)
    nb.cells[0].source = "1 / 0"
    nbtool.write(nb, path)
    stored = path.read_bytes()
    assert nbtool.run(path) is False and path.read_bytes() == stored != before
    assert "ZeroDivisionError" in capsys.readouterr().err


# ---- the filter, README, reference -------------------------------------------------------------------------------------------------
def test_filter_on_a_page_with_everything():
    nb = chapter()
    nb.cells[0].source = '# Say "no": a lesson\n\n> It: works.\n\nMore.'
    nb.cells[5].outputs = nbformat.from_dict(shown("text/html", "<b>```</b>") + shown("application/vnd.jupyter.widget-view+json", {"model_id": "1"})
                                             + [dict(output_type="display_data", metadata={}, data={"image/png": "QUJD", "text/plain": "x"})])
    done = subprocess.run([sys.executable, "-I", "-S", ROOT / "tools/quarto_filter.py"], input=nbformat.writes(nb), capture_output=True, text=True)
    cells = json.loads(done.stdout)["cells"]
    text = ["".join(c["source"]) for c in cells]
    assert text[0] == '---\ntitle: "Say \\"no\\": a lesson"\ndescription: "It: works."\n---' and cells[0]["cell_type"] == "raw" and text[1] == "More."
    assert not any("default_exp" in t or "#| export" in t for t in text)
    assert any(t.startswith("[`medimg.toy.two`]{#api-two .api-name}") for t in text)
    shown_cell = next(c for c in cells if "".join(c["source"]) == "print(two())")
    assert [list(o["data"]) for o in shown_cell["outputs"]] == [["text/markdown"], ["image/png", "text/plain"]]
    assert "".join(shown_cell["outputs"][0]["data"]["text/markdown"]) == "````{=html}\n<b>```</b>\n````\n"
    assert sum(t.startswith('#| code-fold: true\n#| code-summary: "Solution"\n# solution toy-a') for t in text) == 1
    bad = chapter()
    bad.cells[0].source = "no title"
    done = subprocess.run([sys.executable, ROOT / "tools/quarto_filter.py"], input=nbformat.writes(bad), capture_output=True, text=True)
    assert done.returncode and "Title" in done.stderr


def test_readme_exporter(tmp_path):
    import readme
    nb = new_notebook(cells=[
        new_markdown_cell("# medimg\n\n[a](data/x.ipynb#b) [up](../LICENSE) [web](https://x.org/y) [here](#a)\n\n```sh\ncat [x](y.md)\n```\n\n[end](z.ipynb)"),
        new_code_cell("#| hide\nsecret = 1"), new_code_cell("print(1)", outputs=stdout("1\n")),
        new_code_cell("table()", metadata={"jupyter": {"source_hidden": True}}, outputs=shown("text/markdown", "| [t](data/t.ipynb) |"))])
    nbformat.write(nb, tmp_path / "index.ipynb")
    text = readme.readme(tmp_path / "index.ipynb")
    assert "[a](nbs/data/x.ipynb#b) [up](LICENSE) [web](https://x.org/y) [here](#a)" in text and "[end](nbs/z.ipynb)" in text
    assert "```sh\ncat [x](y.md)\n```" in text and text.count("```sh") == 1
    assert "secret" not in text and "table()" not in text and "| [t](nbs/data/t.ipynb) |" in text
    assert "```python\nprint(1)\n```\n\n```text\n1\n```" in text


@pytest.mark.parametrize("script", ["readme", "reference"])
def test_check_notices_a_change(script, tmp_path):
    """`--check` fails on a copy of the repository in which the made file was edited."""
    import shutil
    for name in ["tools", "nbs", "medimg"]:
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", "bundles", ".ipynb_checkpoints"))
    target = tmp_path / {"readme": "README.md", "reference": "reference.qmd"}[script]
    subprocess.run([sys.executable, tmp_path / "tools" / f"{script}.py"], check=True, capture_output=True)
    command = [sys.executable, tmp_path / "tools" / f"{script}.py", "--check"]
    assert subprocess.run(command, capture_output=True).returncode == 0
    target.write_text(target.read_text(encoding="utf-8") + "edited\n", encoding="utf-8")
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and "remedy" in done.stderr
