"""The built wheel alone, far from the repo: with exactly the base's packages, and in a really empty environment."""
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
from conftest import leave_out
from test_packaging import closure, locks

ROOT = Path(__file__).resolve().parents[1]
HEAVY = ("tensorflow", "keras", "matplotlib", "pandas", "scipy", "cv2", "onnxruntime", "pydicom")
IMPORT_S, DEMO_S = 0.1, 20
#: Put in front of a program: every file of the repo (but the interpreter's own folder) that it opens is an error.
NO_REPO = """
import sys
def _watch(event, args, root={root!r}, own={own!r}):
    if event == "open" and isinstance(args[0], str) and args[0].startswith(root) and not args[0].startswith(own):
        raise PermissionError("a file of the repo was opened: " + args[0])
sys.addaudithook(_watch)
"""
PROBE = f"""
import sys, time
start = time.perf_counter(); import medimg; print(time.perf_counter() - start)
print([m for m in {HEAVY!r} if m in sys.modules]); print(medimg.__file__)
"""


class Installation:
    """A way to run Python and `medimg` of one installation from an empty folder, without the repo's or the user's data."""

    def __init__(self, home, place, python, *, env=(), cli=None):
        self.home, self.place, self.python_command, self.cli_command = home, Path(place).resolve(), python, cli
        keep = {k: v for k, v in os.environ.items() if not k.startswith(("MEDIMG_", "PYTHON"))}
        self.env = keep | {"MEDIMG_CACHE": str(home / "cache"), "PYTHONDONTWRITEBYTECODE": "1", "NO_COLOR": "1", **dict(env)}

    def _run(self, command):
        done = subprocess.run(command, cwd=self.home, env=self.env, capture_output=True, text=True, timeout=300, stdin=subprocess.DEVNULL)
        assert done.returncode == 0, f"{command[-3:]} ended with {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
        return done.stdout

    def python(self, code):
        return self._run([*self.python_command, "-c", code])

    def medimg(self, *args):
        if self.cli_command:
            return self._run([*self.cli_command, *args])
        code = NO_REPO.format(root=f"{ROOT}{os.sep}", own=sys.prefix) + "sys.argv[0] = 'medimg'\nfrom medimg.cli import main\nsys.exit(main())"
        return self._run([*self.python_command, "-c", code, *args])


def check_import(installation):
    """`import medimg` takes at most 0.1 s at its best, loads nothing heavy, and comes from the installation."""
    seconds, heavy, place = [], "", ""
    for _ in range(9):
        took, heavy, place = installation.python(PROBE).split("\n")[:3]
        seconds.append(float(took))
        assert heavy == "[]", f"import medimg loads {heavy}"
    assert Path(place).resolve().is_relative_to(installation.place), place
    print(f"import medimg: best of {len(seconds)} {min(seconds) * 1e3:.0f} ms")
    assert min(seconds) <= IMPORT_S


def check_help(installation):
    """`medimg --help` names the verbs."""
    text = installation.medimg("--help")
    assert all(verb in text for verb in ("scan", "read", "predict", "report", "demo", "doctor"))


def check_predict(installation):
    """`medimg predict pneumonia FILE --json` answers (or refuses) an image, as JSON that carries the notice."""
    from medimg.config import RESEARCH_USE
    y, x = np.mgrid[:64, :64]
    grey = np.clip(40 + 120 * np.hypot((y - 32) / 40, (x - 32) / 28) + np.random.default_rng(0).normal(0, 6, (64, 64)), 0, 255)
    cv2.imwrite(str(installation.home / "chest.png"), grey.astype("uint8"))
    text = installation.medimg("predict", "pneumonia", "chest.png", "--json")
    answer = json.loads(text)
    assert RESEARCH_USE in text and '"status"' in text
    assert answer


def check_demo(installation, limit=3 * DEMO_S):
    """`medimg demo` leaves a report that a person can read; on a machine busy with other tests it may take three times its budget."""
    start = time.perf_counter()
    text = installation.medimg("demo", "--out", "shown")
    seconds = time.perf_counter() - start
    print(f"medimg demo: {seconds:.1f} s (budget {DEMO_S} s)")
    pages = list((installation.home / "shown").rglob("*.html"))
    assert pages and pages[0].stat().st_size > 10_000 and "research use" in pages[0].read_text(encoding="utf-8").lower()
    assert pages[0].name in text.replace("\n", ""), "the path of the report is not printed"
    assert list((installation.home / "shown").rglob("*.dcm"))
    assert seconds <= limit


CHECKS = [check_import, check_help, check_predict, check_demo]


@pytest.fixture(scope="module")
def base_only(dist, tmp_path_factory):
    """The wheel in a folder of its own, beside links to exactly the distributions of the base closure; site-packages is off the path."""
    target, base, home = (tmp_path_factory.mktemp(n) for n in ("target", "base", "home"))
    installer = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-index", "--no-deps"]
    subprocess.run([*installer, "--target", str(target), str(dist["wheel"])], check=True)
    for package in closure(locks.requirements([""])).values():
        for top in {file.parts[0] for file in package.files} - {"..", "__pycache__"}:
            if not (base / top).exists():
                (base / top).symlink_to(package.locate_file(top))
    return Installation(home, target, [sys.executable, "-S"], env={"PYTHONPATH": f"{target}{os.pathsep}{base}"})


@pytest.fixture(scope="module")
def empty_venv(dist, tmp_path_factory):
    """A new environment with `pip install dist/*.whl` and nothing else, for which pip needs its index."""
    folder, home = tmp_path_factory.mktemp("venv"), tmp_path_factory.mktemp("home")
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    python, pip = folder / "bin" / "python", ["-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    probe = subprocess.run([str(python), *pip, "--no-deps", "--no-cache-dir", "--timeout=10", "--retries=0", "--target", str(home / "probe"),
                            "flatbuffers"], capture_output=True, text=True)
    if probe.returncode:
        leave_out("pip reaches no package index", "run this test with a network, or set pip's index to a mirror")
    start = time.perf_counter()
    done = subprocess.run([str(python), *pip, str(dist["wheel"])], capture_output=True, text=True, timeout=900)
    if done.returncode and re.search("NewConnectionError|ConnectTimeout|Failed to establish a new connection", done.stderr):
        leave_out("pip reaches no package index", "run this test with a network, or set pip's index to a mirror")
    assert done.returncode == 0, done.stderr[-3000:]
    print(f"pip install of the wheel with its base: {time.perf_counter() - start:.0f} s")
    return Installation(home, folder, [str(python)], cli=[str(folder / "bin" / "medimg")])


@pytest.mark.parametrize("check", CHECKS, ids=lambda c: c.__name__)
def test_wheel_with_exactly_the_base(base_only, check):
    check(base_only)


def test_base_only_really_is(base_only):
    """The harness itself: what is not of the base cannot be imported there, and a look into the repo is caught."""
    code = "import importlib.util as u; print([m for m in ('tensorflow', 'matplotlib', 'pandas', 'pytest', 'nbdev') if u.find_spec(m)])"
    assert base_only.python(code).strip() == "[]"
    peek = NO_REPO.format(root=f"{ROOT}{os.sep}", own=sys.prefix) + f"open({str(ROOT / 'settings.ini')!r})"
    with pytest.raises(AssertionError, match="a file of the repo was opened"):
        base_only.python(peek)


@pytest.mark.slow
@pytest.mark.parametrize("check", CHECKS, ids=lambda c: c.__name__)
def test_wheel_in_an_empty_environment(empty_venv, check):
    check(empty_venv)
