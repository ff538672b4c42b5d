"""Authors' tool for the chapters: notebook <-> text, export, run and store outputs.

    python tools/nb.py text nbs/data/02_dicom.ipynb      # -> nbs/data/02_dicom.py (percent script, ignored by git)
    python tools/nb.py store nbs/data/02_dicom.py        # -> back into the notebook; outputs of unchanged cells are kept
    python tools/nb.py export [NOTEBOOK ...]             # notebook -> medimg/*.py (all notebooks when none is named)
    python tools/nb.py run NOTEBOOK ... | --stale        # execute top to bottom, store cleaned outputs and hashes
    python tools/nb.py status                            # which notebooks are stale, and why
"""
import argparse
import ast
import hashlib
import os
import re
import sys
import time
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parent.parent
NBS = ROOT / "nbs"
UNTRACKED = {"medimg", "medimg._modidx"}     # tables of names: what a name leads to is tracked by its own module
KEEP_CELL_METADATA = {"tags", "jupyter"}
NOISE = re.compile(r"^(WARNING:.*AutoGraph could not transform|Cause: Unable to locate the source|To silence this warning, decorate|20\d\d-\d\d-\d\d .*(tensorflow|cuda|TensorFlow)|[WEI]0000 |WARNING: All log messages before absl)", re.M)


def chapters():
    """Every committed notebook in reading order."""
    return sorted(p for p in NBS.rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)


def read(path):
    return nbformat.read(path, as_version=4)


def write(nb, path):
    """Write `nb` atomically with stable ids and only the metadata that belongs in git."""
    tidy(nb)
    tmp = Path(path).with_suffix(".ipynb.tmp")
    nbformat.write(nb, tmp)
    os.replace(tmp, path)


def tidy(nb):
    """Give each cell an id made from its text (a diff then shows only what changed) and drop counters and editor metadata."""
    seen = {}
    for cell in nb.cells:
        digest = hashlib.sha256(f"{cell.cell_type}\n{cell.source}".encode()).hexdigest()[:8]
        seen[digest] = seen.get(digest, -1) + 1
        cell["id"] = digest if not seen[digest] else f"{digest}-{seen[digest]}"
        cell.metadata = {k: v for k, v in cell.metadata.items() if k in KEEP_CELL_METADATA}
        if cell.cell_type == "code":
            cell.execution_count = None
            cell.outputs = clean_outputs(cell.outputs)
    kernel = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}
    nb.metadata = {"kernelspec": kernel, **({"medimg": nb.metadata["medimg"]} if "medimg" in nb.metadata else {})}
    nb.nbformat, nb.nbformat_minor = 4, 5


def clean_outputs(outputs):
    """Outputs without counters, widget state, memory addresses and TensorFlow's start-up lines; neighbouring streams joined."""
    kept = []
    for out in outputs:
        out = nbformat.from_dict({k: v for k, v in out.items() if k != "execution_count"})
        if out.output_type == "execute_result":
            out.execution_count = None
        if "data" in out:
            out.data.pop("application/vnd.jupyter.widget-view+json", None)
            for mime, text in out.data.items():
                if mime.startswith("text/") and isinstance(text, str):
                    out.data[mime] = re.sub(r" at 0x[0-9a-f]{6,}", "", text)
            out.metadata = {}
            if not out.data:
                continue
        if out.output_type == "stream":
            lines = [line for line in out.text.splitlines(keepends=True) if not NOISE.match(line)]
            out.text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", "".join(line.rsplit("\r", 1)[-1] for line in lines))
            if not out.text.strip():
                continue
            if kept and kept[-1].output_type == "stream" and kept[-1].name == out.name:
                kept[-1].text += out.text
                continue
        kept.append(out)
    return kept


def source_sha256(nb):
    """Hash of what the reader sees run: the sources of the code cells, in order."""
    text = "\n\0".join(c.source for c in nb.cells if c.cell_type == "code")
    return hashlib.sha256(text.encode()).hexdigest()


def module_sha256(path):
    """Hash of a module's code, not of its comments, docstrings or line numbers: mending a docstring makes no output stale."""
    tree = ast.parse(Path(path).read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) and body \
                and isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant) and isinstance(body[0].value.value, str):
            body[0].value.value = ""
    return hashlib.sha256(ast.dump(tree).encode()).hexdigest()[:16]


def module_path(name):
    """File of a `medimg` module by its dotted name, or None when it is gone."""
    base = ROOT.joinpath(*name.split("."))
    return next((p for p in (base.with_suffix(".py"), base / "__init__.py") if p.is_file()), None)


def staleness(path):
    """Why the stored outputs of a notebook can no longer be trusted; an empty list when they can."""
    nb, reasons = read(path), []
    stamp = nb.metadata.get("medimg")
    if not stamp:
        return ["never run by `tools/nb.py run`"]
    if stamp["source_sha256"] != source_sha256(nb):
        reasons.append("a code cell changed after the outputs were stored")
    for name, digest in stamp["modules"].items():
        if name in UNTRACKED:
            continue
        file = module_path(name)
        if file is None or module_sha256(file) != digest:
            reasons.append(f"{name} changed after the outputs were stored")
    return reasons


def to_text(path):
    import jupytext
    out = Path(path).with_suffix(".py")
    jupytext.write(jupytext.read(path), out, fmt="py:percent")
    print(out.relative_to(ROOT))


def from_text(path):
    """Percent script -> notebook; a code cell whose text did not change keeps its outputs."""
    import jupytext
    path = Path(path)
    target, nb = path.with_suffix(".ipynb"), jupytext.read(path, fmt="py:percent")
    if target.exists():
        old = read(target)
        stored = {}
        for cell in old.cells:
            if cell.cell_type == "code":
                stored.setdefault(cell.source, []).append(cell.outputs)
        for cell in nb.cells:
            if cell.cell_type == "code" and stored.get(cell.source):
                cell.outputs = stored[cell.source].pop(0)
        if "medimg" in old.metadata:
            nb.metadata["medimg"] = old.metadata["medimg"]
    write(nb, target)
    print(target.relative_to(ROOT))


def export(paths=()):
    """Notebook -> module, for the notebooks named or for all of them (then the symbol index is rebuilt as well)."""
    from nbdev.doclinks import nbdev_export
    from nbdev.export import nb_export
    os.chdir(ROOT)
    if not paths:
        nbdev_export.__wrapped__() if hasattr(nbdev_export, "__wrapped__") else nbdev_export()
    for path in paths:
        nb_export(str(Path(path).resolve()), lib_path=str(ROOT / "medimg"))


QUIET = ["--log-level=40"]      # of the kernel: it warns on each start that loopback TCP is not encrypted
USED = "import sys as _s, json as _j; print(_j.dumps(sorted(m for m in _s.modules if m.split('.')[0] == 'medimg')))"


def run(path, timeout=1200):
    """Execute a notebook from top to bottom in its folder; store cleaned outputs, source hash and the modules it used."""
    import json

    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError
    nb, start = read(path), time.time()
    client = NotebookClient(nb, timeout=timeout, kernel_name="python3", extra_arguments=QUIET,
                            resources={"metadata": {"path": str(Path(path).parent)}})
    probe = nbformat.v4.new_code_cell(USED)
    nb.cells.append(probe)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    try:
        client.execute()
    except CellExecutionError as error:
        print(f"{path}: {error}", file=sys.stderr)
        return False
    said = "".join(o.text for o in probe.outputs if o.output_type == "stream" and o.name == "stdout")       # may come in pieces
    used = [m for m in json.loads(said) if module_path(m) and m not in UNTRACKED]
    nb.cells.pop()
    nb.metadata["medimg"] = {"source_sha256": source_sha256(nb), "modules": {m: module_sha256(module_path(m)) for m in used}}
    write(nb, path)
    print(f"{Path(path).relative_to(ROOT)}: {time.time() - start:.0f} s, {Path(path).stat().st_size // 1024} kB")
    return True


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verb", choices=["text", "store", "export", "run", "status"])
    parser.add_argument("paths", nargs="*", type=lambda p: Path(p).resolve())
    parser.add_argument("--stale", action="store_true", help="run: every notebook whose outputs are stale")
    args = parser.parse_args()
    if args.verb == "export":
        export(args.paths)
    elif args.verb == "status":
        for path in chapters():
            for reason in staleness(path):
                print(f"{path.relative_to(ROOT)}: {reason}")
    else:
        paths = args.paths or ([p for p in chapters() if staleness(p)] if args.stale else [])
        verb = {"text": to_text, "store": from_text, "run": run}[args.verb]
        if [p for p in paths if verb(p) is False]:
            sys.exit(1)


if __name__ == "__main__":
    main()
