"""What is built and locked follows from settings.ini; the base installation carries permissive licences only."""
import importlib.metadata as metadata
import re
import subprocess
import sys
import tarfile
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tools"))
import locks  # noqa: E402

EXTRAS = {"radiomics", "train", "course", "serve", "signing", "dicomnet", "ray", "ocr", "pdf", "codecs-gpl", "dev", "radiomics"}
COPYLEFT = re.compile(r"\b[AL]?GPL|GNU |Affero|SSPL|EUPL|CeCILL|CC[- ]BY[- ](NC|SA|ND)|non-?commercial|proprietary", re.I)
#: Weak copyleft that the base knowingly carries, and why.
ACCEPTED = {}
#: Libraries inside wheels under a licence of their own: file prefix -> (what, licence).
BUNDLED = {r"libav(codec|format|util|filter|device)|libsw(scale|resample)": ("FFmpeg", "LGPL-2.1-or-later"),
           r"libgfortran": ("GCC runtime", "GPL-3.0-or-later WITH GCC-exception-3.1"),
           r"libgcc_s|libstdc\+\+|libgomp": ("GCC runtime", "GPL-3.0-or-later WITH GCC-exception-3.1"),
           r"libquadmath": ("GCC libquadmath", "LGPL-2.1-or-later"),
           r"libx26[45]|libpostproc": ("x264/x265", "GPL-2.0-or-later")}
#: ... of which these are known. Each is a separate shared library that a user may replace, which is what the LGPL asks for.
KNOWN = {("numpy", "GCC runtime"), ("numpy", "GCC libquadmath"), ("scipy", "GCC runtime"), ("scipy", "GCC libquadmath"),
         ("opencv-python-headless", "GCC runtime"), ("opencv-python-headless", "GCC libquadmath"), ("opencv-python-headless", "FFmpeg")}


def closure(requirements) -> dict[str, metadata.Distribution]:
    """Name -> installed distribution of everything that the requirements need here, themselves included."""
    found, queue = {}, [(Requirement(r), "") for r in requirements]
    while queue:
        req, extra = queue.pop()
        if req.marker and not req.marker.evaluate({"extra": extra}):
            continue
        name = locks.canonical(req.name)
        dist = found.get(name) or metadata.distribution(req.name)
        news = [""] * (name not in found) + sorted(req.extras)
        found[name] = dist
        queue += [(Requirement(r), e) for e in news for r in dist.requires or []]
    return found


def licence(dist) -> str:
    """What a distribution says of its licence: expression, else classifiers, else the first line of its text."""
    meta = dist.metadata
    classes = [c.split(" :: ")[-1] for c in meta.get_all("Classifier") or [] if c.startswith("License ::")]
    return meta.get("License-Expression") or "; ".join(classes) or (meta.get("License") or "").strip().partition("\n")[0]


def bundled(dist) -> set[tuple[str, str]]:
    """(what, licence) of the libraries with a licence of their own inside a distribution."""
    names = {Path(str(f)).name for f in dist.files or [] if re.search(r"\.(so|dylib)(\.|$)", str(f))}
    return {what for pattern, what in BUNDLED.items() for n in names if re.match(pattern, n)}


@pytest.fixture(scope="module")
def wheel_metadata(dist):
    with zipfile.ZipFile(dist["wheel"]) as wheel:
        return Parser().parsestr(wheel.read(next(n for n in wheel.namelist() if n.endswith(".dist-info/METADATA"))).decode())


def test_wheel_metadata_equals_settings(wheel_metadata):
    cfg = locks.settings()
    assert (wheel_metadata["Name"], wheel_metadata["Version"]) == (cfg["lib_name"], cfg["version"])
    assert wheel_metadata["Summary"] == cfg["description"]
    assert wheel_metadata["Requires-Python"] == f">={cfg['min_python']}"
    assert wheel_metadata["License-Expression"] == "Apache-2.0" and wheel_metadata["License-File"] == "LICENSE"
    assert set(wheel_metadata.get_all("Provides-Extra")) == EXTRAS
    have = {(str(r.marker or ""), locks.canonical(r.name), frozenset(r.extras), r.specifier)
            for r in map(Requirement, wheel_metadata.get_all("Requires-Dist"))}
    want = set()
    for key, value in cfg.items():
        if key == "requirements" or key.endswith("_requirements"):
            extra = key.removesuffix("requirements").rstrip("_").replace("_", "-")
            want |= {(f'extra == "{extra}"' if extra else "", locks.canonical(r.name), frozenset(r.extras), r.specifier)
                     for r in map(Requirement, value.split())}
    assert have == want


def test_wheel_holds_the_package_and_its_data_and_nothing_else(dist):
    with zipfile.ZipFile(dist["wheel"]) as wheel:
        names = {n for n in wheel.namelist() if ".dist-info/" not in n}
        points = wheel.read(next(n for n in wheel.namelist() if n.endswith("entry_points.txt"))).decode()
    want = {p.relative_to(ROOT).as_posix() for p in (ROOT / "medimg").rglob("*") if p.is_file()
            and "__pycache__" not in p.parts and ".ipynb_checkpoints" not in p.parts and not p.name.startswith(".")}
    assert names == want, f"missing: {sorted(want - names)}; unwanted: {sorted(names - want)}"
    assert f"medimg = {locks.settings()['console_scripts'].partition('=')[2]}" in points
    print(f"wheel {dist['wheel'].stat().st_size / 1e6:.2f} MB, {len(names)} files")


def test_sdist_can_be_built_from_and_holds_no_notebook(dist):
    with tarfile.open(dist["sdist"]) as sdist:
        names = {n.partition("/")[2] for n in sdist.getnames()}
    assert {"settings.ini", "setup.py", "pyproject.toml", "LICENSE", "README.md", "CHANGELOG.md", "CITATION.cff", "medimg/errors.py"} <= names
    assert not [n for n in names if n.startswith(("nbs", "tests"))]


def test_base_licences_are_permissive(artefacts):
    """Every distribution of the base closure with its licence; the table is printed and kept."""
    rows, bad = [], []
    for name, dist in sorted(closure(locks.requirements([""])).items()):
        text, inside = licence(dist), bundled(dist)
        rows.append(f"{name:24} {dist.version:12} {text}" + "".join(f"  [carries {w}: {lic}]" for w, lic in sorted(inside)))
        if not text or COPYLEFT.search(text) or ("MPL" in text or "Mozilla" in text) and name not in ACCEPTED:
            bad.append(rows[-1])
        bad += [f"{name} carries {w} ({lic}), which is new" for w, lic in inside if (name, w) not in KNOWN]
    table = "\n".join([*rows, "", "Accepted weak copyleft: " + ("; ".join(f"{n}: {why}" for n, why in ACCEPTED.items()) or "none"),
                       "Carried inside wheels as shared libraries that can be replaced: FFmpeg (LGPL, opencv-python-headless; medimg decodes no video),",
                       "the GCC runtime (GPL with the runtime exception) and libquadmath (LGPL) of numpy, scipy and OpenCV."])
    print(table)
    (artefacts / "base_licences.txt").write_text(table + "\n", encoding="utf-8")
    assert len(rows) > 15 and not bad, "\n".join(bad)


def test_licence_check_refuses_a_copyleft_codec():
    assert COPYLEFT.search(licence(metadata.distribution("pylibjpeg-libjpeg")))
    assert "pylibjpeg-libjpeg" not in closure(locks.requirements([""]))


def test_base_needs_no_heavy_or_development_package():
    names = set(closure(locks.requirements([""])))
    assert not names & {"tensorflow", "keras", "matplotlib", "pandas", "nbdev", "fastcore", "jupyterlab", "torch", "scikit-learn", "ipython"}


def test_locks_and_environment_follow_from_settings():
    assert locks.problems() == []


@pytest.mark.parametrize("name", sorted(locks.LOCKS))
def test_every_pin_has_hashes_and_no_address(name):
    text = (ROOT / "locks" / f"{name}.txt").read_text(encoding="utf-8")
    blocks = re.split(r"\n(?=[A-Za-z0-9])", text.partition("\n")[2].rstrip("\n"))
    assert len(blocks) == len(locks.locked(text)) >= 25
    for block in blocks:
        first, *hashes = block.split("\n")
        assert re.fullmatch(r"[\w.-]+==[\w.+!]+( ; [^\\]+)? \\", first.strip()), first
        assert hashes and all(re.fullmatch(r" {4}--hash=sha256:[0-9a-f]{64}( \\)?", h) for h in hashes), block[:200]


def test_lock_check_sees_what_is_wrong(tmp_path, monkeypatch):
    """A requirement that the lock does not hold, a pin without hash, an index address and a changed environment are all named."""
    for name in ("settings.ini", "pyproject.toml", "environment.yml", "locks/base.txt", "locks/demo.txt", "locks/dev.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text((ROOT / name).read_text(encoding="utf-8"), encoding="utf-8")
    base = tmp_path / "locks" / "base.txt"
    base.write_text(re.sub(r"^numpy==\S+", "numpy==1.0", base.read_text(), flags=re.M) + "six==1.16.0\n--index-url https://example.org\n")
    (tmp_path / "environment.yml").write_text("name: other\n")
    monkeypatch.setattr(locks, "ROOT", tmp_path)
    found = "\n".join(locks.problems())
    for words in ("wants numpy>=2, the lock has 1.0", "no hash for six==1.16.0", "address or path", "numpy is 1.0 in base", "environment.yml"):
        assert words in found


def test_environment_yml_equals_settings():
    """Independent of the tool that writes it: names mapped back, the same specifiers, conda-forge only."""
    text = (ROOT / "environment.yml").read_text(encoding="utf-8")
    entries = re.findall(r"^ {2,6}- ([A-Za-z0-9][^:\n]*)$", text.partition("dependencies:")[2], flags=re.M)
    back = {conda: pypi for pypi, conda in locks.CONDA_NAMES.items()}
    have = {}
    for entry in entries:
        name, spec = re.fullmatch(r"([A-Za-z0-9._-]+(?:\[[^\]]*\])?)(.*)", entry).groups()
        have[back.get(name, locks.canonical(name))] = SpecifierSet(spec)
    beside = {n: have.pop(n) for n in ("python", "make", "pip", "quarto", "setuptools")}
    want = {}
    for key in ("requirements", "train_requirements", "course_requirements", "dev_requirements"):
        want |= {locks.canonical(r.name): r.specifier for r in map(Requirement, locks.settings()[key].split())}
    assert have == want
    assert beside["python"] == SpecifierSet(">=3.11,<3.14")
    assert re.findall(r"channels:\n((?:  - .*\n)+)", text) == ["  - conda-forge\n  - nodefaults\n"]


def test_installed_versions_satisfy_the_metadata():
    """The locks are installed without resolving: every requirement of every distribution must hold all the same."""
    dists = closure(locks.requirements(("", "train", "course", "dicomnet", "codecs_gpl", "dev")))
    wrong = [f"{name} wants {req}" for name, dist in dists.items() for req in map(Requirement, dist.requires or [])
             if (not req.marker or req.marker.evaluate({"extra": ""}))
             and not req.specifier.contains(dists[locks.canonical(req.name)].version, prereleases=True)]
    assert not wrong


def test_version_is_one():
    version = locks.settings()["version"]
    assert re.search(rf"^version: {re.escape(version)}$", (ROOT / "CITATION.cff").read_text(encoding="utf-8"), flags=re.M)
    assert re.search(rf"^## \[{re.escape(version)}\]", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), flags=re.M)
    assert metadata.version("medimg") == version, "the installed package is another version: make setup"


def test_workflows_pin_their_actions_and_systems():
    for path in (ROOT / ".github" / "workflows").glob("*.yml"):
        text = path.read_text(encoding="utf-8")
        assert all(re.search(r"@v\d", use) for use in re.findall(r"uses: (\S+)", text)), path
        assert "-latest" not in text and "@main" not in text, path


def test_licence_text_is_apache():
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert "Apache License" in text[:200] and "END OF TERMS AND CONDITIONS" in text and len(text) > 11_000


def test_tables_travel_with_the_package(dist):
    """Every JSON table beside the modules (published checksums, the standard's tables) is in the wheel, byte for byte."""
    tables = sorted(p for p in (ROOT / "medimg" / "data").glob("*.json"))
    assert "medmnist.json" in [p.name for p in tables]
    with zipfile.ZipFile(dist["wheel"]) as wheel:
        assert all(wheel.read(f"medimg/data/{p.name}") == p.read_bytes() for p in tables)


def test_ruff_finds_nothing():
    """What `make lint` asks first; here too, so that it cannot be forgotten."""
    done = subprocess.run([sys.executable, "-m", "ruff", "check", "."], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
