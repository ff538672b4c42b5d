"""Shared fixtures. What a machine lacks leaves its tests out, with the reason and the remedy; with MEDIMG_REQUIRE_ALL=1 (CI) it fails them."""
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ["MEDIMG_TRUST"] = os.path.join(tempfile.mkdtemp(prefix="medimg-trust-"), "none")      # no key and no trust list of whoever runs the tests
for _name in ("MEDIMG_ALLOW_UNSIGNED", "MEDIMG_BUNDLE_KEY", "MEDIMG_BUNDLE_KEY_FILE"):
    os.environ.pop(_name, None)

import pytest  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
#: command -> the Debian package that brings it
PACKAGES = {"dciodvfy": "dicom3tools", "dcmdump": "dcmtk", "dcmdjpeg": "dcmtk", "storescu": "dcmtk", "dcm2niix": "dcm2niix",
            "chromium": "chromium", "chromedriver": "chromium-driver", "pdftoppm": "poppler-utils", "Orthanc": "orthanc"}


def require_all() -> bool:
    """True where nothing may be skipped."""
    return os.environ.get("MEDIMG_REQUIRE_ALL", "") not in ("", "0")


def leave_out(reason: str, remedy: str):
    """Skip the test that asks (or fail it where nothing may be skipped), saying why and what helps."""
    pytest.skip(f"{reason}; remedy: {remedy}")


def pytest_report_header(config):
    """Say at the top what decides which tests run."""
    return [f"MEDIMG_DATA: {os.environ.get('MEDIMG_DATA') or 'not set, tests on real data are left out'}",
            f"MEDIMG_REQUIRE_ALL: {'set, a test that would be skipped fails' if require_all() else 'not set, a missing tool skips its tests'}"]


def _fail_instead(report):
    """Turn a skip into a failure with the same words; expected failures (xfail) stay what they are."""
    if report.skipped and require_all() and not hasattr(report, "wasxfail"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        report.outcome, report.longrepr = "failed", f"MEDIMG_REQUIRE_ALL is set, and this test would be left out. {reason}"
    return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """Where nothing may be skipped, no test is."""
    return _fail_instead((yield))


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector):
    """The same for a module that skips itself while it is imported."""
    return _fail_instead((yield))


@pytest.fixture(scope="session")
def data_root() -> Path:
    """The first existing folder of MEDIMG_DATA: the real data sets."""
    for folder in os.environ.get("MEDIMG_DATA", "").split(os.pathsep):
        if folder and Path(folder).is_dir():
            return Path(folder).resolve()
    leave_out("no real data: MEDIMG_DATA names no existing folder", "export MEDIMG_DATA=/absolute/path/of/the/data/folder")


@pytest.fixture(scope="session")
def tool():
    """`tool("dciodvfy")` is the path of an outside program; a missing one leaves the test out."""
    def find(name: str, package: str | None = None) -> str:
        if found := shutil.which(name):
            return found
        leave_out(f"{name} is not installed", f"apt-get install {package or PACKAGES.get(name, name)}")
    return find


@pytest.fixture(scope="session")
def orthanc(tool, tmp_path_factory):
    """A PACS of its own for the tests: Orthanc on a loopback port, empty, gone afterwards. `orthanc(path)` stores a file and gives its tags."""
    program, folder = tool("Orthanc"), tmp_path_factory.mktemp("orthanc")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = {"StorageDirectory": str(folder), "IndexDirectory": str(folder), "HttpPort": port, "RemoteAccessAllowed": False,
                "AuthenticationEnabled": False, "DicomServerEnabled": False, "HttpBindAddresses": ["127.0.0.1"]}
    (folder / "orthanc.json").write_text(json.dumps(settings))
    with open(folder / "log", "w") as log:
        server = subprocess.Popen([program, str(folder / "orthanc.json")], stdout=log, stderr=log, env={**os.environ, "TCP_NODELAY": "1"})
    address = f"http://127.0.0.1:{port}"

    def ask(path, body=None):
        request = urllib.request.Request(address + path, data=body)
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.read()

    def store(path):
        """Store one DICOM file; the tags that Orthanc indexed, with the size of the picture that it draws of an image (None for others)."""
        said = json.loads(ask("/instances", Path(path).read_bytes()))
        tags = json.loads(ask(f"/instances/{said['ID']}/simplified-tags"))
        picture = ask(f"/instances/{said['ID']}/preview") if "Rows" in tags else b""
        return tags, len(picture)

    for _ in range(100):
        try:
            ask("/system")
            break
        except OSError:
            time.sleep(0.1)
    else:
        raise AssertionError("Orthanc did not start:\n" + (folder / "log").read_text()[-2000:])
    yield store
    server.terminate()
    server.wait(20)


@pytest.fixture(scope="session")
def artefacts() -> Path:
    """The folder for what a person may want to look at after the tests: artefacts/ in the repo, ignored by git."""
    folder = ROOT / "artefacts"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def source(tmp_path_factory) -> Path:
    """A copy of what a distribution is built from, so that a build leaves nothing in the repo."""
    folder = tmp_path_factory.mktemp("source")
    for name in ("settings.ini", "setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "CHANGELOG.md", "CITATION.cff"):
        shutil.copy(ROOT / name, folder / name)
    shutil.copytree(ROOT / "medimg", folder / "medimg", ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints"))
    (folder / "nbs").mkdir()
    (folder / "nbs" / "index.ipynb").write_text("{}")       # must not get into the distributions
    (folder / "tests").mkdir()
    (folder / "tests" / "test_nothing.py").write_text("")
    return folder


@pytest.fixture(scope="session")
def dist(source, tmp_path_factory) -> dict[str, Path]:
    """{"wheel": path, "sdist": path}: the sdist of the source and the wheel built from that sdist, without network."""
    out = tmp_path_factory.mktemp("dist")
    done = subprocess.run([sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(source)],
                          capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return {"wheel": next(out.glob("*.whl")), "sdist": next(out.glob("*.tar.gz"))}
