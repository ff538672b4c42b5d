"""The style figures of the course: one row for each chapter, then the package. Printed, and read by a reviewer; not idolised.

    python tools/style.py
"""
import ast
import re
import statistics
import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

import nbchecks as checks  # noqa: E402

ARRAY = re.compile(r"\barray\b|ndarray|Volume\b|\bimages?\b *:", re.I)
SHAPE = re.compile(r"\((?:n|z|y|x|k|h|w|c|d|\d+|classes|units)(?:, *[\w.*\[\], +-]+)?,?\)")
UNIT = re.compile(r"\b(?:mm|HU|deg(?:rees)?|voxels?|pixels?|seconds?|ms|bytes|MB|years|mm3|mGy|SUV|0\.\.1|0\.\.255|grey values?|probabilit\w+|"
                  r"logits?|index|indices|fraction|mSv|mAs|kV)\b|_(?:mm|hu|deg|ms|s|years|mm3)\b|\[0, ?1\]|0 to \d")


def spread(values):
    """Median / 90th percentile / maximum."""
    values = sorted(values) or [0]
    return f"{statistics.median(values):.0f}/{values[int(0.9 * (len(values) - 1) + 0.5)]:.0f}/{values[-1]:.0f}"


def has_check(cell):
    """Whether a cell asserts something, or lets the course or a test helper do so."""
    return bool(re.search(r"\bassert\b|\bcourse\.(?:check|exercise)\(|np\.testing\.", cell.source))


def longest_run(nb):
    """The most visible code cells in a row without a word between them."""
    best = now = 0
    for cell in nb.cells:
        visible = cell.cell_type == "code" and not re.match(r"#\|\s*(?:default_exp|hide)", cell.source) \
            and not cell.metadata.get("jupyter", {}).get("source_hidden")
        now = now + 1 if visible else now if cell.cell_type == "code" else 0
        best = max(best, now)
    return best


def chapter_row(path):
    """One chapter: words, prose/code cells, lines per code cell, cells with a check, figures, exercises, longest run, kB."""
    nb = checks.nbtool.read(path)
    code = [c for c in checks.code_cells(nb) if not re.match(r"#\|\s*default_exp", c.source)]
    lines = [checks.code_lines(c.source) for c in code]
    figures = sum(1 for c in code for o in c.outputs if any(m.startswith("image/") for m in o.get("data", {}))
                  or "<img" in checks.quarto_filter.text_of(o.get("data", {}).get("text/html", "")))
    exercises = len({m for c in code for m in re.findall(r"^# solution (\S+)", c.source)})
    words, prose_cells = len(checks.prose(nb).split()), sum(c.cell_type == "markdown" for c in nb.cells)
    return dict(name=path.relative_to(ROOT / "nbs").with_suffix("").as_posix(), words=words, ratio=prose_cells / max(1, len(code)),
                lines=lines, checks=100 * sum(map(has_check, code)) / max(1, len(code)), figures=figures, exercises=exercises,
                run=longest_run(nb), kb=path.stat().st_size // 1024)


def own_lines(node, source):
    """Lines of code of a function or method without its docstring."""
    return checks.code_lines(textwrap.dedent("\n".join(source.splitlines()[node.lineno - 1:node.end_lineno])))


def package_figures():
    """Function length, parameters, module length, and how many docstrings name a shape or a unit."""
    length, params, modules, docs, array_docs = [], [], {}, [], []
    for name, path in checks.modules().items():
        source = path.read_text(encoding="utf-8")
        modules[name] = checks.code_lines(source)
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, checks.FUNCTION):
                length.append((own_lines(node, source), f"{name}.{node.name}"))
                params.append((len(checks.arguments(node)), f"{name}.{node.name}"))
        for qualified, node, _ in checks.public_nodes(source):
            doc = ast.get_docstring(node) or ""
            docs.append((f"{name}.{qualified}", doc))
            if isinstance(node, checks.FUNCTION) and ARRAY.search(doc):
                array_docs.append((f"{name}.{qualified}", doc))
    return length, params, modules, docs, array_docs


def share(items, pattern):
    """'37 of 40 (92 %)' of the docstrings match."""
    n = sum(bool(pattern.search(doc)) for _, doc in items)
    return f"{n} of {len(items)} ({100 * n / max(1, len(items)):.0f} %)"


def main():
    print("lines of code per cell and per function: docstrings, empty lines and directives not counted; median/p90/max")
    print(f"{'chapter':34}{'words':>6}{'md/code':>9}{'cells':>7}{'lines':>10}{'checks':>8}{'figs':>6}{'exer':>6}{'run':>5}{'kB':>6}")
    rows = [chapter_row(p) for p in checks.nbtool.chapters()]
    for r in rows:
        print(f"{r['name']:34}{r['words']:6}{r['ratio']:9.2f}{len(r['lines']):7}{spread(r['lines']):>10}{r['checks']:6.0f} %{r['figures']:6}"
              f"{r['exercises']:6}{r['run']:5}{r['kb']:6}")
    lines = [n for r in rows for n in r["lines"]]
    print(f"all: lines per code cell {spread(lines)} (target 7/18/35), cells with a check "
          f"{sum(r['checks'] * len(r['lines']) for r in rows) / max(1, len(lines)):.0f} % (target 25 %), {sum(r['words'] for r in rows)} words")
    length, params, modules, docs, array_docs = package_figures()
    print(f"functions: {len(length)}, lines {spread([n for n, _ in length])} (target 9/25), parameters {spread([n for n, _ in params])} (target at most 6)")
    print(f"longest: {', '.join(f'{name} {n}' for n, name in sorted(length, reverse=True)[:5])}")
    print(f"modules: {len(modules)}, lines of code {spread(modules.values())}; over 300: {', '.join(m for m, n in modules.items() if n > 300) or 'none'}")
    print(f"public names documented: {share(docs, re.compile('.'))}; with an example {share(docs, re.compile('>>>'))}")
    print(f"docstrings of functions that speak of arrays: shape {share(array_docs, SHAPE)}, unit or range {share(array_docs, UNIT)} (target 90 %)")
    print("without a shape:", ", ".join(n.removeprefix("medimg.") for n, d in array_docs if not SHAPE.search(d))[:600] or "none")


if __name__ == "__main__":
    main()
