"""The examples in the docstrings of every exported module run and print what they say."""
import doctest
import importlib
import os

import nbchecks as checks
import pytest

FLAGS = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS


@pytest.mark.parametrize("name", checks.modules())
def test_examples(name, tmp_path, monkeypatch, capsys):
    """In an empty folder with an empty cache and no data; a network or a left-over file would show."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MEDIMG_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("MEDIMG_DATA", raising=False)
    module = importlib.import_module(name)
    found = [t for t in doctest.DocTestFinder(exclude_empty=True).find(module, name) if t.examples]
    if any(">>>" in (n and checks.ast.get_docstring(n) or "") for _, n, _ in checks.public_nodes(checks.modules()[name].read_text(encoding="utf-8"))):
        assert found, "the module has examples, but doctest found none"
    runner, report = doctest.DocTestRunner(optionflags=FLAGS), []
    for test in found:
        runner.run(test, out=report.append)
    assert runner.failures == 0, "\n" + "".join(report)
    print(f"{name}: {runner.tries} examples")
    assert os.getcwd() == str(tmp_path) and not [p for p in tmp_path.iterdir() if p.name != "cache"], "an example left a file behind"
