"""Write README.md from nbs/index.ipynb: its prose, code and text outputs, with links that work from the root.

    python tools/readme.py            # write
    python tools/readme.py --check    # exit 1 when README.md is not what would be written
"""
import posixpath
import re
import sys
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parent.parent
NOTE = "<!-- Made from nbs/index.ipynb by tools/readme.py; do not edit. -->"
FENCED = re.compile(r"(^(`{3,}|~{3,}).*?^\2[`~]*\s*?$)", re.M | re.S)
REPO = "https://github.com/medimg/medimg/blob/main/"      # on the site such links leave it; in the README they need not
TARGET = re.compile(r"(\]\(\s*)([^)\s]+)(?=[)\s])")


def relink(text: str) -> str:
    """Relative links as seen from the root instead of from nbs/; code blocks stay as they are."""
    def move(match):
        target = match[2].removeprefix(REPO)
        if target != match[2]:
            return match[1] + target
        if re.match(r"[a-z][a-z0-9+.-]*:|[#/]", target):
            return match[0]
        return match[1] + posixpath.normpath(posixpath.join("nbs", target))
    parts = re.split(FENCED, text)
    # split() gives text, block, fence, text, …: only every third part is prose
    return "".join(TARGET.sub(move, p) if i % 3 == 0 else p if i % 3 == 1 else "" for i, p in enumerate(parts))


def output_text(out) -> str:
    """One stored output as markdown: markdown as it is, text in a fence, pictures left out."""
    if out.output_type == "stream":
        return f"```text\n{out.text.rstrip()}\n```" if out.name == "stdout" else ""
    data = out.get("data", {})
    if "text/markdown" in data:
        return relink(data["text/markdown"].strip())
    return f"```text\n{data['text/plain'].rstrip()}\n```" if "text/plain" in data and "image/png" not in data else ""


def cell_text(cell) -> list[str]:
    """The parts of README that a cell becomes."""
    if cell.cell_type == "markdown":
        return [relink(cell.source.strip())]
    if cell.cell_type != "code" or re.match(r"#\|\s*(?:hide|default_exp)\b", cell.source):
        return []
    shown = [] if cell.metadata.get("jupyter", {}).get("source_hidden") else [f"```python\n{cell.source.strip()}\n```"]
    return shown + [text for out in cell.outputs if (text := output_text(out))]


def readme(notebook=ROOT / "nbs" / "index.ipynb") -> str:
    """The whole README."""
    parts = [part for cell in nbformat.read(notebook, as_version=4).cells for part in cell_text(cell)]
    return "\n\n".join([*parts, NOTE]) + "\n"


def main():
    target, text = ROOT / "README.md", readme()
    if "--check" in sys.argv[1:]:
        if not target.is_file() or target.read_text(encoding="utf-8") != text:
            raise SystemExit("README.md is not what nbs/index.ipynb says; remedy: python tools/readme.py")
        return
    target.write_text(text, encoding="utf-8")
    print(f"README.md: {len(text.splitlines())} lines")


if __name__ == "__main__":
    main()
