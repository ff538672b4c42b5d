"""What a chapter must be, as functions: each takes a notebook (or text) and returns a list of complaints, empty when all is well.

They live apart from the tests so that tests/test_tools.py can show each of them failing on a bad notebook.
"""
import ast
import base64
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))

import nb as nbtool  # noqa: E402  (tools/nb.py)
import quarto_filter  # noqa: E402

FUNCTION = (ast.FunctionDef, ast.AsyncFunctionDef)
MAX_CELL_LINES, MAX_PNG, MAX_NOTEBOOK, MAX_REPO = 35, 100_000, 600_000, 40_000_000
DIRECTIVES = {"export", "default_exp", "hide"}
MACHINE_PATH = re.compile(
    r"""(?<![\w.:/~<-])(?:/(?:home|root|tmp|work|Users|var/folders|private|mnt|opt|usr/(?:local/)?lib|workspace|content)/[\w.-]+)"""
    r"""|site-packages|dist-packages|\b[A-Za-z]:\\\\?(?:Users|Windows|Program|Documents|Temp|data|work)|\.venv/|ipykernel_\d+""")
LAYERS = [{"errors"}, {"config"}, {"plots", "course"}, {"data"}, {"models"}, {"training"}, {"evaluation"}, {"deployment"}, {"experiments"}, {"api"},
          {"reproduction"}, {"demo"}, {"cli"}]
TOP_LEVEL = {"numpy", "medimg"}
TOP_LEVEL_EXTRA = {"medimg.cli": {"typer", "rich"}}      # a command line cannot declare its commands without them


def code_cells(nb):
    """The code cells of a notebook."""
    return [c for c in nb.cells if c.cell_type == "code"]


def code_lines(source):
    """Lines of a cell or function that a reader has to follow: not empty, not a directive, not part of a docstring."""
    lines = {i for i, line in enumerate(source.splitlines(), 1) if line.strip() and not line.startswith("#|")}
    try:
        tree = ast.parse(source)
    except SyntaxError:
        return len(lines)
    for node in ast.walk(tree):
        if isinstance(node, (*FUNCTION, ast.ClassDef, ast.Module)) and ast.get_docstring(node, clean=False) is not None:
            lines -= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return len(lines)


def prose(nb):
    """All markdown of a notebook without fenced code."""
    return re.sub(r"^(`{3,}|~{3,}).*?^\1`*~*\s*$", "", "\n\n".join(c.source for c in nb.cells if c.cell_type == "markdown"), flags=re.M | re.S)


def name_of(cell):
    """A cell by its first line, for messages."""
    lines = [line for line in cell.source.splitlines() if line.strip() and not line.startswith("#|")]
    return repr(lines[0][:60]) if lines else repr(cell.source[:60])


def output_texts(nb):
    """(cell, text) for every stored text output, errors included."""
    for cell in code_cells(nb):
        for out in cell.outputs:
            if out.output_type == "stream":
                yield cell, out.text
            elif out.output_type == "error":
                yield cell, "\n".join(out.traceback)
            else:
                yield from ((cell, text) for mime, text in out.data.items() if isinstance(text, str) and not mime.startswith("image/png"))


# ---- outputs -------------------------------------------------------------------------------------------------------------------
def missing_outputs(nb):
    """Cells that print at their top level and have no stored output; a notebook without any output."""
    complaints = []
    for cell in code_cells(nb):
        calls = [n.value.func for n in body_of(cell) if isinstance(n, ast.Expr) and isinstance(n.value, ast.Call)]
        if not cell.outputs and any(isinstance(f, ast.Name) and f.id == "print" for f in calls):
            complaints.append(f"{name_of(cell)} prints, but no output is stored; remedy: python tools/nb.py run")
    if not any(c.outputs for c in code_cells(nb)):
        complaints.append("no output is stored at all; remedy: python tools/nb.py run")
    return complaints


def body_of(cell):
    """The top-level statements of a code cell; none for a cell with magics."""
    try:
        return ast.parse(cell.source).body
    except SyntaxError:
        return []


def error_outputs(nb):
    """Stored tracebacks."""
    return [f"{name_of(c)} stored an error: {o.ename}: {o.evalue}" for c in code_cells(nb) for o in c.outputs if o.output_type == "error"]


def machine_paths(nb):
    """Absolute paths of somebody's machine in sources or outputs."""
    texts = [(c, c.source) for c in nb.cells] + list(output_texts(nb))
    return [f"{name_of(c)}: {m[0]!r} belongs to one machine" for c, text in texts for m in MACHINE_PATH.finditer(text)]


def too_big(nb, path=None):
    """Pictures over 100 kB, a notebook over 600 kB, a code cell over 35 lines (docstrings not counted)."""
    complaints = []
    for cell in code_cells(nb):
        if (n := code_lines(cell.source)) > MAX_CELL_LINES:
            complaints.append(f"{name_of(cell)} has {n} lines of code; at most {MAX_CELL_LINES}")
        for out in cell.outputs:
            for mime, data in out.get("data", {}).items():
                if mime.startswith("image/") and mime != "image/svg+xml" and (n := len(base64.b64decode(data))) > MAX_PNG:
                    complaints.append(f"{name_of(cell)} stores a picture of {n} bytes; at most {MAX_PNG}")
    if path and (n := Path(path).stat().st_size) > MAX_NOTEBOOK:
        complaints.append(f"the file has {n} bytes; at most {MAX_NOTEBOOK}")
    return complaints


def outside_requests(nb):
    """HTML outputs that would load something from another host."""
    pattern = re.compile(r"""(?:\bsrc\s*=|<link[^>]*\bhref\s*=|@import|url\()\s*["']?\s*(?:https?:)?//[^\s"')>]+|require(?:js)?\.config""", re.I)
    return [f"{name_of(c)} loads {m[0]!r}" for c in code_cells(nb) for o in c.outputs
            for m in pattern.finditer(quarto_filter.text_of(o.get("data", {}).get("text/html", "")))]


# ---- form ----------------------------------------------------------------------------------------------------------------------
def title_and_promise(nb):
    """A first cell `# Title`, `> promise` and no second H1."""
    first = nb.cells[0] if nb.cells else None
    complaints = []
    if not (first and first.cell_type == "markdown" and re.match(r"# \S[^\n]*\n\n> \S", first.source)):
        complaints.append("the first cell is not `# Title`, an empty line and `> one-line promise`")
    if (n := len(re.findall(r"^# \S", prose(nb), re.M))) != 1:
        complaints.append(f"{n} first-level headings; exactly one is allowed")
    return complaints


def parameters_cell(nb):
    """Exactly one cell tagged `parameters`, which sets profile = "course" and is committed so."""
    tagged = [c for c in code_cells(nb) if "parameters" in c.metadata.get("tags", [])]
    if len(tagged) != 1:
        return [f"{len(tagged)} cells carry the tag `parameters`; exactly one must"]
    values = {t.id: n.value for n in body_of(tagged[0]) if isinstance(n, ast.Assign) for t in n.targets if isinstance(t, ast.Name)}
    good = isinstance(values.get("profile"), ast.Constant) and values["profile"].value == "course"
    return [] if good else ['the parameters cell does not set profile = "course"']


def wrong_directives(nb):
    """Directives other than export, default_exp and hide, in any spelling."""
    complaints = []
    for cell in code_cells(nb):
        for m in re.finditer(r"^\s*#\s*\|\s*([\w-]+)(.*)$", cell.source, re.M):
            bare = m[1] in DIRECTIVES and not m[2].lstrip().startswith(":") and m[0].startswith("#|")
            if not bare or (m[1] != "default_exp" and m[2].strip()):
                complaints.append(f"{name_of(cell)}: directive {m[0].strip()!r}; only {sorted(DIRECTIVES)} are used here")
    return complaints


def export_place(nb):
    """`#| default_exp` alone in its cell and before the first export."""
    seen, complaints = False, []
    for cell in code_cells(nb):
        found = quarto_filter.directives(cell.source)
        if "default_exp" in found:
            seen = True
            if len(cell.source.strip().splitlines()) > 1:
                complaints.append("`#| default_exp` shares its cell with code (which the site then drops)")
        if "export" in found and not seen:
            complaints.append(f"{name_of(cell)} exports before `#| default_exp`")
    return complaints


def untidy(nb):
    """Ids, counters and metadata that tools/nb.py would change: tidying a stored notebook must change nothing."""
    import copy
    again = copy.deepcopy(nb)
    nbtool.tidy(again)
    complaints = [f"{name_of(a)}: id, counter, metadata or output is not as tools/nb.py stores it"
                  for a, b in zip(nb.cells, again.cells) if a != b]
    return complaints + (["the notebook's metadata are not as tools/nb.py stores them"] if nb.metadata != again.metadata else [])


def fences(text):
    """Pandoc's `:::` divs and code fences that are opened and never closed, or closed and never opened."""
    depth, code = 0, None
    for line in text.splitlines():
        mark = re.match(r"\s{0,3}(`{3,}|~{3,})", line)
        if mark and code is None:
            code = mark[1]
        elif mark and code and line.strip().startswith(code) and not line.strip().strip(code[0]):
            code = None
        elif code is None and re.match(r":{3,}\s*[\w{]", line):
            depth += 1
        elif code is None and re.match(r":{3,}\s*$", line):
            depth -= 1
            if depth < 0:
                return ["`:::` closes a block that was never opened"]
    return ([f"{depth} `:::` left open"] if depth else []) + (["a code fence is left open"] if code else [])


def bad_fences(nb):
    """`fences` for each markdown cell: a block must not span cells."""
    return [f"{name_of(c)}: {what}" for c in nb.cells if c.cell_type == "markdown" for what in fences(c.source)]


def bad_figures(nb):
    """References `@fig-x`, `@tbl-x`, `@eq-x`, `@sec-x` to labels that no cell defines."""
    text = prose(nb)
    labels = set(re.findall(r"\{#((?:fig|tbl|eq|sec)-[\w-]+)", text))
    labels |= {m for c in code_cells(nb) for m in re.findall(r"#\|\s*label:\s*([\w-]+)", c.source)}
    used = re.findall(r"(?<![\w`{#])@((?:fig|tbl|eq|sec)-[\w-]+)", re.sub(r"`[^`]*`", "", text))
    return [f"@{name} is used, but nothing is labelled so" for name in used if name not in labels]


# ---- exercises -----------------------------------------------------------------------------------------------------------------
def bad_exercises(nb):
    """Exercises without two wrong answers, a hint, a folded check, a folded solution with an assert, or the learner's cell before it."""
    complaints, declared, solved, asked = [], {}, {}, {}
    for i, cell in enumerate(code_cells(nb)):
        for call in (n for n in ast.walk(ast.Module(body_of(cell), [])) if isinstance(n, ast.Call)):
            name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
            if name not in ("exercise", "check") or not call.args or not isinstance(call.args[0], ast.Constant):
                continue
            if name == "check":
                asked.setdefault(call.args[0].value, []).append(i)
            elif isinstance(call.func, ast.Attribute) or cell.metadata.get("jupyter", {}).get("source_hidden"):
                declared[call.args[0].value] = (cell, call)
        if m := re.match(r"# solution (\S+)", cell.source):
            solved[m[1]] = (i, cell)
    for name, (cell, call) in declared.items():
        complaints += [f"exercise {name!r} {what}" for what in _exercise(name, cell, call, solved, asked)]
    complaints += [f"solution {name!r} belongs to no exercise of this chapter" for name in solved if name not in declared]
    if not declared:
        complaints.append("no exercise; each chapter has at least one")
    return complaints


def _exercise(name, cell, call, solved, asked):
    keys = {k.arg: k.value for k in call.keywords}
    wrong = keys.get("wrong")
    if isinstance(wrong, (ast.List, ast.Tuple)) and len(wrong.elts) < 2 or wrong is None:
        yield "lists fewer than two wrong answers"
    if not isinstance(keys.get("hint"), (ast.Constant, ast.JoinedStr, ast.BinOp)) or not getattr(keys["hint"], "value", "x"):
        yield "has no hint"
    if not cell.metadata.get("jupyter", {}).get("source_hidden"):
        yield "shows its check: the registering cell needs jupyter.source_hidden"
    if name not in solved:
        yield f"has no cell `# solution {name}`"
        return
    place, solution = solved[name]
    if not solution.metadata.get("jupyter", {}).get("source_hidden"):
        yield "shows its solution: the cell needs jupyter.source_hidden"
    if not re.search(rf"assert (?:course\.)?check\(\s*[\"']{re.escape(name)}[\"']", solution.source):
        yield "has a solution that is not asserted by course.check"
    if not any(i < place for i in asked.get(name, [])):
        yield "is never asked of the learner (no course.check before the solution)"


# ---- modules -------------------------------------------------------------------------------------------------------------------
def modules():
    """Dotted name → file of every exported module."""
    files = sorted(p for p in (ROOT / "medimg").rglob("*.py") if p.name not in ("_modidx.py", "__init__.py"))
    return {".".join(p.relative_to(ROOT).with_suffix("").parts): p for p in files}


def imports_of(source, module):
    """(line, dotted module, at top level?) of every import in a module, relative ones resolved, `import_module("…")` included."""
    tree, package = ast.parse(source), module.split(".")[:-1]
    inner = {id(x) for f in ast.walk(tree) if isinstance(f, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)) for x in ast.walk(f)}
    typing_only = {id(x) for f in ast.walk(tree) if isinstance(f, ast.If) and "TYPE_CHECKING" in ast.dump(f.test) for x in ast.walk(f)}
    for node in ast.walk(tree):
        top = id(node) not in inner and id(node) not in typing_only
        if isinstance(node, ast.Import):
            yield from ((node.lineno, a.name, top) for a in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[:len(package) - node.level + 1] if node.level else []
            stem = ".".join([*base, *([node.module] if node.module else [])])
            known = modules()
            for a in node.names:
                yield node.lineno, f"{stem}.{a.name}" if f"{stem}.{a.name}" in known or stem == "medimg" else stem, top
        elif isinstance(node, ast.Call) and "import_module" in ast.dump(node.func) and node.args \
                and isinstance(node.args[0], ast.Constant):
            yield node.lineno, str(node.args[0].value), top


def rank(name):
    """The layer of a dotted medimg module; None for what has none (`medimg` itself, `medimg._modidx`)."""
    part = name.split(".")[1] if "." in name else ""
    return next((i for i, layer in enumerate(LAYERS) if part in layer), None)


def upward_imports(source, module, order=None):
    """Imports against DESIGN §2, at the top level of a sub-package also against the reading order (`order`: dotted name → number).

    `import medimg` is for `medimg.__version__` and the like only: its public names would lead anywhere.
    """
    complaints, order = [], order or {}
    through = sorted({n.attr for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Attribute) and isinstance(n.value, ast.Name)
                      and n.value.id == "medimg" and not n.attr.startswith("__")})
    for line, name, top in imports_of(source, module):
        if name.split(".")[0] != "medimg" or name == module:
            continue
        here, there = rank(module), rank(name)
        if there is None:
            if not (name == "medimg" and not through or name.startswith("medimg.__")):
                complaints.append(f"line {line}: imports {name} ({', '.join(through)}), which is in no layer: import from the module that defines it")
        elif there > here or (there == here and module.count(".") == 1):
            complaints.append(f"line {line}: {module} imports {name}, which is not to its left in DESIGN §2")
        elif top and there == here and order.get(name, 0) > order.get(module, 99):
            complaints.append(f"line {line}: {module} imports {name}, whose chapter comes later; import it inside the function that needs it")
    return complaints


def heavy_imports(source, module):
    """Imports at the top level of anything but the standard library, NumPy and medimg."""
    allowed = TOP_LEVEL | sys.stdlib_module_names | TOP_LEVEL_EXTRA.get(module, set())
    return [f"line {line}: {name} is imported at the top level; import it inside the function that needs it"
            for line, name, top in imports_of(source, module) if top and name.split(".")[0] not in allowed]


# ---- docstrings ----------------------------------------------------------------------------------------------------------------
SECTION = re.compile(r"^(\w[\w ]*)\n-{3,}\s*$", re.M)


def sections(doc):
    """numpy docstring → {section: text}; "" is the part before the first section."""
    parts = SECTION.split("\n" + doc if doc.startswith("-") else doc)
    return {"": parts[0], **{parts[i].strip(): parts[i + 1] for i in range(1, len(parts) - 1, 2)}}


def documented(text):
    """Names in a Parameters, Attributes or Yields section: `a, b : type` (or a bare `a` on a line of its own)."""
    heads = re.findall(r"^(\*{0,2}\w+(?:\s*,\s*\*{0,2}\w+)*)\s*(?::.*)?$", text, re.M)
    return {n.strip().lstrip("*") for head in heads for n in head.split(",")}


def is_patch(node):
    """Whether a top-level function is a method given to a class by `@patch`."""
    names = [getattr(d.func if isinstance(d, ast.Call) else d, "id", "") for d in getattr(node, "decorator_list", [])]
    return any(n.startswith("patch") for n in names)


def is_command(node):
    """Whether a function is a Typer command: its parameters are documented by their `help=`, its first line is the help text."""
    return any(isinstance(d, ast.Call) and isinstance(d.func, ast.Attribute) and d.func.attr == "command" for d in getattr(node, "decorator_list", []))


def public_nodes(source):
    """(qualified name, node, is it a method?) of each public function, class and method in a module."""
    tree = ast.parse(source)
    names = next((ast.literal_eval(n.value) for n in tree.body if isinstance(n, ast.Assign)
                  and getattr(n.targets[0], "id", "") == "__all__"), None)
    for node in tree.body:
        if not isinstance(node, (*FUNCTION, ast.ClassDef)) or node.name.startswith("_"):
            continue
        if is_patch(node) or names is None or node.name in names:
            yield node.name, node, is_patch(node)
        if isinstance(node, ast.ClassDef):
            yield from ((f"{node.name}.{m.name}", m, True) for m in node.body if isinstance(m, FUNCTION) and not m.name.startswith("_"))


def arguments(node, *, method=False):
    """Names of a function's parameters without self or cls."""
    a = node.args
    names = [x.arg for x in [*a.posonlyargs, *a.args]]
    static = any(getattr(d, "id", "") == "staticmethod" for d in node.decorator_list)
    names = names[1:] if method and not static else names
    return names + [x.arg for x in [a.vararg, *a.kwonlyargs, a.kwarg] if x]


def bad_docstrings(source):
    """Public names whose docstring misses its purpose, a parameter, what is returned, or an example."""
    complaints, lines = [], source.splitlines()
    for name, node, method in public_nodes(source):
        doc = ast.get_docstring(node)
        if not doc:
            complaints.append(f"{name}: no docstring")
            continue
        found = sections(doc)
        if len(found[""].split()) < 3:
            complaints.append(f"{name}: the first line says no purpose")
        if is_command(node):
            continue
        complaints += [f"{name}: parameter {p!r} is not documented" for p in _undocumented(node, method, found, lines)]
        if _needs_returns(node, method) and not {"Returns", "Yields"} & found.keys():
            complaints.append(f"{name}: returns {ast.unparse(node.returns)}, but has no Returns section")
        if not method and _needs_example(node) and ">>>" not in doc:
            complaints.append(f"{name}: no example")
    return complaints


def _undocumented(node, method, found, lines):
    """Parameters (fields, for a record) in no section, not in backticks in the text, and with no comment on a field's line."""
    named = documented("\n".join(found.get(s, "") for s in ("Parameters", "Attributes", "Other Parameters")))
    named |= set(re.findall(r"`(\w+)`", found[""]))
    if isinstance(node, FUNCTION):
        return [p for p in arguments(node, method=method) if p not in named]
    if _is_record(node):
        fields = [n for n in node.body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name) and "ClassVar" not in ast.dump(n)]
        return [f.target.id for f in fields if not f.target.id.startswith("_") and f.target.id not in named
                and "#" not in lines[f.end_lineno - 1] and not lines[f.lineno - 2].strip().startswith("#")]
    init = next((m for m in node.body if isinstance(m, FUNCTION) and m.name == "__init__"), None)
    if init:
        named |= documented(sections(ast.get_docstring(init) or "").get("Parameters", ""))
    return [p for p in (arguments(init, method=True) if init else []) if p not in named]


def _is_record(node):
    return any("dataclass" in ast.dump(d) for d in node.decorator_list) or any("NamedTuple" in ast.dump(b) for b in node.bases)


def _needs_returns(node, method):
    """What returns an array (shape, dtype and unit must be said), and functions of two parameters or more.

    A method or a small function says in its first line what it returns.
    """
    if not isinstance(node, FUNCTION) or node.returns is None:
        return False
    if isinstance(node.returns, ast.Constant) and node.returns.value is None:
        return False
    size = len(arguments(node, method=method))
    return size >= 2 and not method or size >= 1 and "ndarray" in ast.unparse(node.returns)


def _needs_example(node):
    """Functions and classes that do something; not records, protocols, or classes that are only a name and a docstring."""
    if isinstance(node, FUNCTION):
        return True
    bases = {ast.unparse(b).split("[")[0].split(".")[-1] for b in node.bases}
    methods = [m for m in node.body if isinstance(m, FUNCTION)]
    if "Protocol" in bases or not methods:
        return False
    return any(not m.name.startswith("_") or m.name == "__init__" for m in methods)


# ---- links ---------------------------------------------------------------------------------------------------------------------
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(\s*<?([^)\s>]+)>?(?:\s+\"[^\"]*\")?\s*\)(?:\{[^}]*\})?")


def plain_markdown(text):
    """Markdown without code, where brackets are no links."""
    text = re.sub(r"^(`{3,}|~{3,}).*?^\1[`~]*\s*$", "", text, flags=re.M | re.S)
    return re.sub(r"(`+)(?:(?!\1).)+?\1", lambda m: re.sub(r"[\[\]()]", " ", m[0]), text)


def heading_id(heading):
    """The id that pandoc (`auto_identifiers`) gives a heading."""
    text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", heading)
    text = re.sub(r"[*`]|(?<!\w)_|_(?!\w)", "", text).strip().lower()
    text = re.sub(r"[^\w\s.-]", "", text)
    text = re.sub(r"\s+", "-", text)
    return re.sub(r"^[^a-z\u00aa-\uffff]+", "", text) or "section"


def anchors(text):
    """The ids that a page of markdown will have: headings, `{#id}`, `<a id=…>`."""
    found, seen = set(re.findall(r"\{[^}\n]*#([\w.:-]+)[^}\n]*\}", text)) | set(re.findall(r"<\w+[^>]*\b(?:id|name)=[\"']([^\"']+)", text)), {}
    bare = re.sub(r"^(`{3,}|~{3,}).*?^\1[`~]*\s*$", "", text, flags=re.M | re.S)
    for heading in re.findall(r"^ {0,3}#{1,6}[ \t]+(.+?)[ \t]*#*$", bare, re.M):
        if re.search(r"\{[^}]*#[\w.:-]+[^}]*\}\s*$", heading):
            continue
        base = heading_id(re.sub(r"\{[^}]*\}\s*$", "", heading))
        found.add(f"{base}-{seen[base]}" if base in seen else base)
        seen[base] = seen.get(base, 0) + 1
    return found


def page_text(path):
    """The markdown of a page as the site shows it: a notebook goes through the filter (its anchors are made there)."""
    if path.suffix != ".ipynb":
        return path.read_text(encoding="utf-8")
    page = quarto_filter.transform(nbtool.read(path))
    return "\n\n".join("".join(c["source"]) for c in page["cells"] if c["cell_type"] == "markdown")


def bad_links(text, path, root=ROOT):
    """Links and images of a page whose file or anchor does not exist, and links without text."""
    complaints = []
    for image, label, target in LINK.findall(plain_markdown(text)):
        if not label.strip() and not image:
            complaints.append(f"a link to {target} has no text")
        if image and not label.strip():
            complaints.append(f"the image {target} has no alternative text")
        if re.match(r"[a-z][a-z0-9+.-]*:", target):
            continue
        name, _, anchor = target.partition("#")
        file = (path.parent / name).resolve() if name else path
        if not file.exists() or not file.is_relative_to(root):
            complaints.append(f"{target}: no such file")
        elif anchor and file.suffix in (".ipynb", ".md", ".qmd") and anchor not in anchors(text if file == path else page_text(file)):
            complaints.append(f"{target}: the page has no #{anchor}")
    return complaints
