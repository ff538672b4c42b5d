"""Quarto's notebook filter: a stored notebook on stdin, the page to be rendered on stdout. Standard library only.

It makes a YAML front matter of the first cell (`# Title`, `> promise`), drops cells marked `#| hide` or `#| default_exp`, strips
nbdev's directives and keeps the code, puts an anchor `#api-NAME` and a link to the exported source on each public definition, folds
cells whose source is hidden, and leaves no widget views and no bare HTML (which would make every page load require.js).
"""
import ast
import json
import re
import sys
from configparser import ConfigParser
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BARE = re.compile(r"^#\|\s*(hide|default_exp|exports?|exporti)\b[^:\n]*$", re.M)
WIDGET = "application/vnd.jupyter.widget-"


def text_of(value) -> str:
    """Source or output text, which nbformat stores as one string or as a list of lines."""
    return value if isinstance(value, str) else "".join(value)


def lines_of(text: str) -> list[str]:
    """Text as the list of lines that Quarto wants."""
    return text.splitlines(keepends=True)


def directives(source: str) -> list[str]:
    """The bare nbdev directives of a cell, for example `["export"]`."""
    return BARE.findall(source)


def module_of(nb: dict) -> str | None:
    """The module that a notebook exports, from its `#| default_exp` line; None for a case."""
    for cell in nb["cells"]:
        if cell["cell_type"] == "code" and (found := re.search(r"^#\|\s*default_exp\s+([\w.]+)", text_of(cell["source"]), re.M)):
            return f"medimg.{found[1]}"
    return None


def definitions(source: str) -> list[ast.AST]:
    """The public classes and functions that a cell defines at its top level."""
    try:
        body = ast.parse(source).body
    except SyntaxError:     # a magic: no definitions that an anchor could point to
        return []
    return [n for n in body if isinstance(n, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) and not n.name.startswith("_")]


def repo_url() -> str | None:
    """Where the source is published, from settings.ini."""
    ini = ConfigParser(delimiters=["="])
    if not ini.read(ROOT / "settings.ini", encoding="utf-8"):
        return None
    return f"{ini['DEFAULT']['git_url']}/blob/{ini['DEFAULT']['branch']}"


def source_line(module: str, name: str) -> tuple[str, int] | None:
    """File (relative to the root) and line of a definition in the exported module, or None before the export."""
    file = ROOT.joinpath(*module.split(".")).with_suffix(".py")
    if not file.is_file():
        return None
    lines = {n.name: n.lineno for n in definitions(file.read_text(encoding="utf-8"))}
    return (file.relative_to(ROOT).as_posix(), lines[name]) if name in lines else None


def anchor_cell(names, module, cell_id) -> dict:
    """A small markdown cell before an export cell: an anchor, the full name and the source link of each definition."""
    parts, url = [], repo_url()
    for name in names:
        where = source_line(module, name) if module and url else None
        link = f" [source]({url}/{where[0]}#L{where[1]})" if where else ""
        parts.append(f"[`{module}.{name}`]{{#api-{name} .api-name}}{link}")
    return {"cell_type": "markdown", "id": f"api-{cell_id}"[:64], "metadata": {}, "source": lines_of(" · ".join(parts))}


def front_cell(source: str) -> list[dict]:
    """The first cell as a front matter and, when there is more than title and promise, a markdown cell with the rest."""
    match = re.match(r"\s*# +(?P<title>[^\n]+)\n*(?P<promise>(?:>[^\n]*(?:\n|$))*)(?P<rest>.*)", source, re.S)
    if not match:
        raise SystemExit("quarto_filter: the first cell must begin with `# Title`; remedy: write it so")
    promise = " ".join(line.lstrip("> ").strip() for line in match["promise"].splitlines()).strip()
    title = re.sub(r"\s*\{#[^}]*\}\s*$", "", match["title"]).strip()
    yaml = ["---", f"title: {json.dumps(title, ensure_ascii=False)}"]
    yaml += [f"description: {json.dumps(promise, ensure_ascii=False)}"] if promise else []
    cells = [{"cell_type": "raw", "id": "front-matter", "metadata": {}, "source": lines_of("\n".join([*yaml, "---"]))}]
    if rest := match["rest"].strip():
        cells.append({"cell_type": "markdown", "id": "after-title", "metadata": {}, "source": lines_of(rest)})
    return cells


def raw_html(html: str) -> str:
    """HTML as a raw block of pandoc markdown, fenced by more backticks than it contains."""
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall(r"`+", html)), default=0))
    return f"{fence}{{=html}}\n{html.strip()}\n{fence}\n"


def clean_output(out: dict) -> dict | None:
    """One output without widget views and bare HTML; None when nothing is left."""
    if "data" not in out:
        return out
    data = {mime: value for mime, value in out["data"].items() if not mime.startswith(WIDGET)}
    if "text/html" in data:
        data = {"text/markdown": lines_of(raw_html(text_of(data.pop("text/html"))))}
    return {**out, "data": data} if data else None


def code_cell(cell: dict, module: str | None) -> list[dict]:
    """The cells that a code cell becomes: none when hidden, an anchor before an export, a fold around a solution."""
    source = text_of(cell["source"])
    found = directives(source)
    if "hide" in found or "default_exp" in found:
        return []
    source = BARE.sub("", source).strip("\n")
    before = []
    if "export" in found and (names := [n.name for n in definitions(source)]):
        before = [anchor_cell(names, module, cell.get("id", names[0]))]
    if cell.get("metadata", {}).get("jupyter", {}).get("source_hidden"):
        title = "Solution" if source.startswith("# solution") else "Show the code"
        source = f'#| code-fold: true\n#| code-summary: "{title}"\n{source}'
    outputs = [o for o in map(clean_output, cell.get("outputs", [])) if o]
    return [*before, {**cell, "metadata": {}, "source": lines_of(source), "outputs": outputs}]


def transform(nb: dict) -> dict:
    """The notebook as Quarto shall see it."""
    module, cells = module_of(nb), []
    for i, cell in enumerate(nb["cells"]):
        if i == 0 and cell["cell_type"] == "markdown":
            cells += front_cell(text_of(cell["source"]))
        elif cell["cell_type"] == "code":
            cells += code_cell(cell, module)
        else:
            cells.append({**cell, "source": lines_of(text_of(cell["source"]))})
    metadata = {k: v for k, v in nb.get("metadata", {}).items() if k in ("kernelspec", "language_info")}
    return {**nb, "cells": cells, "metadata": metadata}


if __name__ == "__main__":
    sys.stdin.reconfigure(encoding="utf-8")
    sys.stdout.reconfigure(encoding="utf-8")
    json.dump(transform(json.load(sys.stdin)), sys.stdout, ensure_ascii=False, indent=1)
