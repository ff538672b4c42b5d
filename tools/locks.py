"""Make locks/*.txt and environment.yml from settings.ini, or check that they still follow from it.

    python tools/locks.py                 # make them; pins that still fit are kept (needs uv and a package index)
    python tools/locks.py --upgrade       # the same with the newest versions
    python tools/locks.py --check         # offline: say what does not agree, exit 1

`locks/base.txt` is `pip install medimg`; `locks/demo.txt` adds what `make demo` shows: reports as PDF, DICOM out, the service; `locks/dev.txt` adds everything that the chapters and the tests use. All hold
for Linux and macOS on Python 3.11 to 3.13 and name hashes, but neither an index nor a folder of the machine they were made on.
"""
import argparse
import os
import re
import shutil
import subprocess
import sys
import tomllib
from configparser import ConfigParser
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LOCKS = {"base": ("",), "demo": ("", "dicomnet", "serve", "signing", "pdf"), "dev": ("", "train", "course", "dicomnet", "serve", "signing", "pdf", "ocr", "codecs_gpl", "ray", "dev")}
ENVIRONMENT = ("", "train", "course", "dev")

#: conda-forge's name where it is another than PyPI's.
CONDA_NAMES = {"opencv-python-headless": "opencv", "simpleitk": "simpleitk", "build": "python-build"}
#: What is taken from PyPI inside the conda environment: codecs whose wheels bring their own C library, and tools that
#: conda-forge lacks or holds back.
FROM_PYPI = {"pylibjpeg-rle", "pyjpegls", "python-gdcm", "tf2onnx", "playwright", "execnb", "ghapi", "nbdev", "fastcore"}

HEADER = "# {name}: made by tools/locks.py from settings.ini; do not edit. Linux and macOS, Python 3.11-3.13.\n"
BOTH = re.compile(r"\((?P<a>[^()]*) and sys_platform == 'darwin'\) or \((?P<b>[^()]*) and sys_platform == 'linux'\)")
NAME = re.compile(r"^\s*([A-Za-z0-9][A-Za-z0-9._-]*)\s*(\[[^\]]*\])?\s*(.*)$")


def settings(root: Path = ROOT):
    """The DEFAULT section of settings.ini as a mapping of strings."""
    config = ConfigParser(delimiters=["="])
    config.read(root / "settings.ini", encoding="utf-8")
    return config["DEFAULT"]


def canonical(name: str) -> str:
    """A distribution's name as PEP 503 compares it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def build_requires(root: Path = ROOT) -> list[str]:
    """What pyproject.toml needs to build: it is locked too, so that the project installs without build isolation."""
    return tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["build-system"]["requires"]


def requirements(groups, root: Path = ROOT) -> list[str]:
    """The requirement strings of settings.ini for the groups ("" is the base), each once, in order."""
    cfg = settings(root)
    lines = [line for g in groups for line in cfg[f"{g}_requirements" if g else "requirements"].split()]
    return list(dict.fromkeys(lines))


def parse(requirement: str) -> tuple[str, str, str]:
    """(canonical name, extras as "[a,b]" or "", specifier) of one requirement string."""
    name, extras, spec = NAME.match(requirement).groups()
    return canonical(name), extras or "", spec.strip()


def locked(text: str) -> dict[str, str]:
    """Name -> version of every pin in a lock; a name that is pinned twice raises ValueError."""
    pins = {}
    for name, version in re.findall(r"^([A-Za-z0-9][\w.-]*)==([^\s;\\]+)", text, flags=re.M):
        if pins.setdefault(canonical(name), version) != version:
            raise ValueError(f"{name} is pinned twice: {pins[canonical(name)]} and {version}")
    return pins


def tidy(text: str) -> str:
    """Shorten uv's markers: both systems and Python below 3.14 are what the whole lock is for."""
    text = BOTH.sub(lambda m: m["a"] if m["a"] == m["b"] else m[0], text)
    text = re.sub(r"(; )python_full_version < '3\.14' and ", r"\1", text)
    text = text.replace("(python_full_version < '3.14' and ", "(")
    return re.sub(r" ; python_full_version < '3\.14'(?= \\$)", "", text, flags=re.M)


def compile_lock(uv: str, name: str, *, upgrade: bool, constraint: Path | None = None) -> str:
    """The text of one lock, resolved by uv in an environment free of index, find-links and configuration."""
    old = ROOT / "locks" / f"{name}.txt"
    command = [uv, "pip", "compile", "-", "--universal", "--generate-hashes", "--python-version", "3.11", "--quiet",
               "--fork-strategy", "fewest", "--no-header", "--no-annotate", "--no-emit-index-url"]
    command += ["--constraint", str(constraint)] if constraint else []
    command += ["--upgrade"] if upgrade else []
    env = {k: v for k, v in os.environ.items() if not k.startswith(("UV_FIND", "UV_EXTRA", "PIP_"))}
    wanted = "\n".join(requirements(LOCKS[name]) + build_requires())
    if old.exists() and not upgrade:         # the pins of before are preferences; --output-file makes uv read them
        command += ["--output-file", str(old)]
    done = subprocess.run(command, input=wanted, text=True, capture_output=True, cwd=ROOT, env=env)
    if done.returncode:
        raise SystemExit(f"locks: {name} does not resolve\n{done.stderr}")
    text = old.read_text(encoding="utf-8") if "--output-file" in command else done.stdout
    return HEADER.format(name=f"locks/{name}.txt") + tidy(text[text.index("\n") + 1:] if text.startswith("# locks") else text)


def environment_text() -> str:
    """environment.yml: the same requirements with conda-forge's names."""
    cfg = settings()
    wanted = [parse(r) for r in requirements(ENVIRONMENT)]
    conda = [f"{CONDA_NAMES.get(n, n)}{spec}" for n, _, spec in wanted if n not in FROM_PYPI]
    pypi = [f"{n}{extras}{spec}" for n, extras, spec in wanted if n in FROM_PYPI]
    lines = ["# Made by tools/locks.py from settings.ini; do not edit. After `conda env create -f environment.yml`:",
             "#   conda activate medimg && pip install --no-deps -e .", f"name: {cfg['lib_name']}", "channels:", "  - conda-forge",
             "  - nodefaults", "dependencies:", f"  - python>={cfg['min_python']},<3.14", "  - make", "  - pip", "  - quarto>=1.7",
             "  - " + build_requires()[0]]
    lines += [f"  - {line}" for line in sorted(conda)] + ["  - pip:"] + [f"      - {line}" for line in sorted(pypi)]
    return "\n".join(lines) + "\n"


def problems() -> list[str]:
    """What in the locks and environment.yml does not follow from settings.ini, found without a network."""
    from packaging.requirements import Requirement
    found, pins = [], {}
    for name, groups in LOCKS.items():
        text = (ROOT / "locks" / f"{name}.txt").read_text(encoding="utf-8")
        pins[name] = locked(text)
        for want in map(Requirement, requirements(groups) + build_requires()):
            have = pins[name].get(canonical(want.name))
            if have is None or not want.specifier.contains(have, prereleases=True):
                found.append(f"locks/{name}.txt: settings.ini wants {want}, the lock has {have}")
        for block in re.split(r"\n(?=[^\s#])", text)[1:]:
            if "--hash=sha256:" not in block:
                found.append(f"locks/{name}.txt: no hash for {block.split()[0]}")
        found += [f"locks/{name}.txt: address or path in {line!r}" for line in text.splitlines()
                  if re.search(r"://|file:|--(extra-)?index|find-links|(^|\s)[/~]\w|@ ", line)]
    found += [f"locks: {n} is {v} in {name}, {pins['dev'].get(n)} in dev" for name in ("base", "demo") for n, v in pins[name].items() if pins["dev"].get(n) != v]
    if (ROOT / "environment.yml").read_text(encoding="utf-8") != environment_text():
        found.append("environment.yml is not what tools/locks.py makes from settings.ini")
    return found


def main(argv=None) -> int:
    """Make or check; see the module's text."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--upgrade", action="store_true", help="newest versions instead of keeping the pins")
    parser.add_argument("--check", action="store_true", help="only compare, offline")
    args = parser.parse_args(argv)
    if not args.check:
        uv = shutil.which("uv") or shutil.which("uv", path=str(Path(sys.executable).parent))
        if not uv:
            raise SystemExit("locks: uv is not installed; remedy: make setup (it is among the dev requirements)")
        (ROOT / "locks").mkdir(exist_ok=True)
        dev = ROOT / "locks" / "dev.txt"                 # the largest first: the others take its pins
        dev.write_text(compile_lock(uv, "dev", upgrade=args.upgrade), encoding="utf-8")
        for name in ("base", "demo"):
            (ROOT / "locks" / f"{name}.txt").write_text(compile_lock(uv, name, upgrade=args.upgrade, constraint=dev), encoding="utf-8")
        (ROOT / "environment.yml").write_text(environment_text(), encoding="utf-8")
    found = problems()
    print("\n".join(found) or "locks and environment.yml follow from settings.ini")
    return bool(found)


if __name__ == "__main__":
    raise SystemExit(main())
