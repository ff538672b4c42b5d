"""Write reference.qmd: every public name of the package, one line of purpose, and a link to the chapter that explains it.

    python tools/reference.py            # write
    python tools/reference.py --check    # exit 1 when the file is not what would be written
"""
import ast
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
HEAD = '''---
title: "Reference"
description: "Every public name, what it does in one line, and the chapter that explains it."
---

<!-- Made by tools/reference.py; do not edit. -->
'''
ORDER = ["foundations", "data", "models", "training", "evaluation", "deployment", "experiments"]
PARTS = dict(zip(ORDER, ["Foundations", "Data", "Models", "Training", "Evaluation", "Deployment", "Experiments"]))


def module_pages():
    """[(part, module, notebook)] in reading order, from the header that nbdev writes into each module."""
    rows = []
    for file in (ROOT / "medimg").rglob("*.py"):
        head = re.search(r"File to edit: (\S+\.ipynb)\.$", file.read_text(encoding="utf-8")[:2000], re.M)
        if head and file.name != "_modidx.py":
            page = (file.parent / head[1]).resolve().relative_to(ROOT)
            rows.append((page.parts[1], ".".join(file.relative_to(ROOT).with_suffix("").parts), page.as_posix()))
    return sorted(rows, key=lambda r: (ORDER.index(r[0]) if r[0] in ORDER else 99, r[2]))


def purpose(node) -> str:
    """First paragraph of a docstring up to its first full stop, on one line, safe inside a table."""
    doc = (ast.get_docstring(node) or "").split("\n\n")[0]
    line = re.match(r".*?[.!?](?=\s+[A-Z(]|$)|.*", " ".join(doc.split()))[0]
    return line.replace("|", r"\|").replace("[", r"\[").replace("<", r"\<")


def public(tree):
    """The public functions and classes of a module, in source order; methods added by `@patch` belong to their class's page."""
    for node in tree.body:
        if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) and not node.name.startswith("_"):
            names = [getattr(d.func if isinstance(d, ast.Call) else d, "id", "") for d in node.decorator_list]
            yield node, next((a.annotation.id for a in node.args.args[:1] if isinstance(a.annotation, ast.Name)), None) \
                if any(n.startswith("patch") for n in names) else None


def page() -> str:
    """The whole reference page."""
    text, part = [HEAD], None
    for folder, module, notebook in module_pages():
        if folder != part:
            part = folder
            text.append(f"## {PARTS.get(folder, folder.title())}\n")
        tree = ast.parse(ROOT.joinpath(*module.split(".")).with_suffix(".py").read_text(encoding="utf-8"))
        text.append(f"### [`{module}`]({notebook}) {{#{module.replace('.', '-')}}}\n\n{purpose(tree)}\n\n| Name | Purpose |\n|---|---|")
        for node, owner in public(tree):
            text.append(f"| [`{owner + '.' if owner else ''}{node.name}`]({notebook}#api-{node.name}) | {purpose(node)} |")
        text.append("")
    return "\n".join(text).rstrip() + "\n"


def main():
    target, text = ROOT / "reference.qmd", page()
    if "--check" in sys.argv[1:]:
        if not target.is_file() or target.read_text(encoding="utf-8") != text:
            raise SystemExit("reference.qmd is not what the docstrings say; remedy: python tools/reference.py")
        return
    target.write_text(text, encoding="utf-8")
    print(f"{target.name}: {text.count('| [')} names")


if __name__ == "__main__":
    main()
