"""What Quarto would let pass silently: pages, sidebar, links, anchors, fences; and the filter that prepares each page."""
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbchecks as checks
import pytest
import yaml

ROOT, CHAPTERS = checks.ROOT, checks.nbtool.chapters()
QUARTO = yaml.safe_load((ROOT / "_quarto.yml").read_text(encoding="utf-8"))
REPO = QUARTO["website"]["repo-url"]
WRITTEN = [p for p in (ROOT / n for n in ["reference.qmd", "glossary.qmd", "README.md", "CONTRIBUTING.md", "CHANGELOG.md"]) if p.is_file()]
PAGES = CHAPTERS + WRITTEN


def label(path):
    return path.relative_to(ROOT).as_posix()


each_chapter = pytest.mark.parametrize("path", CHAPTERS, ids=label)


def same(complaints):
    assert not complaints, "\n" + "\n".join(complaints)


def named(node):
    """Every file named anywhere in a part of _quarto.yml."""
    if isinstance(node, dict):
        return [x for v in node.values() for x in named(v)]
    if isinstance(node, list):
        return [x for v in node for x in named(v)]
    return [node] if isinstance(node, str) and re.search(r"\.(?:ipynb|qmd|md|py|scss|css)$", node) and "://" not in node else []


# ---- _quarto.yml ---------------------------------------------------------------------------------------------------------------
def test_every_named_file_exists():
    files = [n for n in named(QUARTO) if "*" not in n]
    assert len(files) > 10
    same([f"_quarto.yml names {n}, which does not exist" for n in files if not (ROOT / n).is_file()])


def test_sidebar_and_render_list_agree():
    """A page that is rendered but not in the sidebar cannot be found; one in the sidebar but not rendered is a dead link."""
    rendered = {label(p) for pattern in QUARTO["project"]["render"] for p in ROOT.glob(pattern) if ".ipynb_checkpoints" not in p.parts}
    sidebar = named(QUARTO["website"]["sidebar"])
    assert {label(p) for p in CHAPTERS} <= rendered, "a notebook lies outside the render list"
    assert len(sidebar) == len(set(sidebar)), "a page is in the sidebar twice"
    same([f"{p} is rendered, but not in the sidebar of _quarto.yml" for p in sorted(rendered - set(sidebar))]
         + [f"{p} is in the sidebar, but not rendered" for p in sorted(set(sidebar) - rendered)])


def test_site_settings():
    """No execution, our filter, no maths from outside, and one repository named everywhere."""
    assert QUARTO["execute"] == {"enabled": False, "freeze": False}
    assert QUARTO["ipynb-filters"] == ["tools/quarto_filter.py"]
    assert QUARTO["format"]["html"]["html-math-method"] == "mathml"
    assert "$web-font-path: false;" in (ROOT / "theme.scss").read_text(encoding="utf-8")
    assert checks.quarto_filter.repo_url() == f"{REPO}/blob/{QUARTO['website']['repo-branch']}"


def needed(page):
    """The chapters that a chapter's head says you need."""
    prose = "\n".join(c.source for c in checks.nbtool.read(ROOT / page).cells if c.cell_type == "markdown")
    head = re.search(r"^\| You need \|.*\n\|[-|]+\|\n\| (.*?) \|", prose, re.M)
    return [label((ROOT / page).parent.joinpath(link).resolve()) for link in re.findall(r"\(([^)#]*\.ipynb)", head[1])] if head else []


def test_sidebar_follows_the_reading_order():
    """Numbers rise; of the pages of one number, which are one chapter, each comes after those that it needs. (`01a` may come before `01`.)"""
    pages = [n for n in named(QUARTO["website"]["sidebar"]) if re.search(r"/\d\d[a-z]?_", n)]
    place = {(page.rsplit("/", 1)[0], int(page.rsplit("/", 1)[1][:2])): [] for page in pages}
    for page in pages:
        place[page.rsplit("/", 1)[0], int(page.rsplit("/", 1)[1][:2])].append(page)
    assert [page for chapter in place.values() for page in chapter] == pages and list(place) == sorted(place, key=lambda k: ([f for f, _ in place].index(k[0]), k[1]))
    same([f"{page} is listed before {other}, which it needs" for chapter in place.values() for k, page in enumerate(chapter) for other in needed(page) if other in chapter[k + 1:]])


# ---- links ---------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("path", PAGES, ids=label)
def test_links_resolve(path):
    """File and anchor of every relative link and image, in prose and in stored markdown outputs."""
    text = checks.page_text(path)
    if path.suffix == ".ipynb":
        outputs = [checks.quarto_filter.text_of(o["data"]["text/markdown"]) for c in checks.code_cells(checks.nbtool.read(path))
                   for o in c.outputs if "text/markdown" in o.get("data", {})]
        text = "\n\n".join([text, *outputs])
    same(checks.bad_links(text, path))


@pytest.mark.parametrize("path", PAGES, ids=label)
def test_links_into_the_repository_exist(path):
    """Links to our own files on the host, except those that the filter makes (they follow from the module)."""
    text = path.read_text(encoding="utf-8")
    names = re.findall(re.escape(f"{REPO}/blob/{QUARTO['website']['repo-branch']}/") + r"([\w./-]+)", text)
    same([f"{n}: no such file in the repository" for n in names if not (ROOT / n.rstrip(".")).exists()])


@each_chapter
def test_site_links_lead_to_rendered_pages(path):
    """On the site a link to a repository file that is no page is dead; such links go to the host (STYLE: full address)."""
    pages = {p.resolve() for pattern in QUARTO["project"]["render"] for p in ROOT.glob(pattern)}
    targets = [t.partition("#")[0] for image, _, t in checks.LINK.findall(checks.plain_markdown(checks.page_text(path))) if not image]
    local = [t for t in targets if t and not re.match(r"[a-z][a-z0-9+.-]*:", t)]
    same([f"{t} is not a page of the site; link to {REPO}/blob/main/…" for t in local if (path.parent / t).resolve() not in pages])


def test_glossary_terms():
    """Each term has its own id and one sentence."""
    text = (ROOT / "glossary.qmd").read_text(encoding="utf-8")
    terms = re.findall(r"^\[([^\]]+)\]\{#([\w-]+)\}\n:   (\S.*)$", text, re.M)
    assert 25 <= len(terms) <= 160 and len(terms) == text.count("]{#")
    assert len({i for _, i, _ in terms}) == len(terms) and not {i for _, i, _ in terms} & {checks.heading_id(h) for h in re.findall(r"^## (.+)$", text, re.M)}
    same([f"{term}: the sentence does not end with a full stop" for term, _, s in terms if not s.endswith(".")])


def test_reference_is_in_sync():
    done = subprocess.run([sys.executable, ROOT / "tools/reference.py", "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    text = (ROOT / "reference.qmd").read_text(encoding="utf-8")
    for source in (p.read_text(encoding="utf-8") for p in checks.modules().values()):
        same([f"reference.qmd does not list {name}" for name, _, _ in checks.public_nodes(source) if "." not in name and f"{name}`](" not in text])


# ---- the pages as Quarto will see them -------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def filtered(request):
    """Chapter → the filter's answer, run as Quarto runs it: another python3, standard library only."""
    def run(path):
        done = subprocess.run([sys.executable, "-I", "-S", ROOT / "tools/quarto_filter.py"], stdin=path.open("rb"), capture_output=True, cwd=ROOT)
        assert done.returncode == 0, done.stderr.decode()
        return json.loads(done.stdout)
    return run


@each_chapter
def test_filtered_page(path, filtered):
    """Front matter, sources as lists of lines, nothing hidden, no directive, an anchor for each export, no widget, no bare HTML."""
    import nbformat
    page, nb = filtered(path), checks.nbtool.read(path)
    nbformat.validate(nbformat.from_dict(page))
    cells = page["cells"]
    assert all(isinstance(c["source"], list) and all(isinstance(s, str) for s in c["source"]) for c in cells)
    assert cells[0]["cell_type"] == "raw"
    front = yaml.safe_load("".join(cells[0]["source"]).strip().strip("-"))
    title = nb.cells[0].source.splitlines()[0].removeprefix("# ").strip()
    assert front["title"] == title and front["description"].strip()
    text = "".join(s for c in cells if c["cell_type"] == "code" for s in c["source"])
    assert not re.search(r"^#\|\s*(?:export|hide|default_exp)", text, re.M)
    hidden = [c.source for c in checks.code_cells(nb) if re.match(r"#\|\s*(?:hide|default_exp)\b", c.source)]
    visible = [c for c in checks.code_cells(nb) if c.source not in hidden]
    assert sum(c["cell_type"] == "code" for c in cells) == len(visible)
    assert text.count("#| code-fold: true") == sum(bool(c.metadata.get("jupyter", {}).get("source_hidden")) for c in visible)
    mimes = {m for c in cells for o in c.get("outputs", []) for m in o.get("data", {})}
    assert not [m for m in mimes if "widget" in m or m == "text/html"]
    prose = "".join(s for c in cells if c["cell_type"] == "markdown" for s in c["source"])
    exported = [n.name for c in checks.code_cells(nb) if "export" in checks.quarto_filter.directives(c.source)
                for n in checks.quarto_filter.definitions(c.source)]
    same([f"no anchor #api-{name}" for name in exported if f"{{#api-{name} " not in prose])
    assert not re.search(r"^# \S", re.sub(r"^(```+).*?^\1", "", prose, flags=re.M | re.S), re.M), "a second first-level heading"


@each_chapter
def test_nothing_from_outside(path):
    same(checks.outside_requests(checks.nbtool.read(path)))


@each_chapter
def test_fences_and_references(path):
    nb = checks.nbtool.read(path)
    same(checks.bad_fences(nb) + checks.bad_figures(nb))


@pytest.mark.parametrize("path", WRITTEN, ids=label)
def test_fences_of_written_pages(path):
    same(checks.fences(path.read_text(encoding="utf-8")))


if shutil.which("quarto"):      # no Python package: where it is missing the checks above stand in, and the publishing workflow renders
    def test_site_renders(tmp_path):
        shutil.copytree(ROOT, tmp_path / "site", ignore=shutil.ignore_patterns(".venv*", ".git", "artefacts", "runs", "_site", ".quarto"))
        done = subprocess.run(["quarto", "render", "--no-execute"], cwd=tmp_path / "site", capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr
        assert "WARN" not in done.stderr, done.stderr
        pages = {Path(label(p)).with_suffix(".html") for p in CHAPTERS}
        assert all((tmp_path / "site" / "_site" / p).is_file() for p in pages)
