"""A real browser: a chapter in JupyterLab ("Restart Kernel and Run All Cells"), and the demo's report, without outside requests."""
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import nbchecks as checks
import pytest

ROOT, SHOTS = checks.ROOT, checks.ROOT / "artefacts" / "browser"
ARGS = ["--no-sandbox", "--use-gl=angle", "--use-angle=swiftshader", "--enable-unsafe-swiftshader", "--disable-background-networking",
        "--disable-dev-shm-usage"]
CHAPTER = next(p for p in (ROOT / "nbs" / n for n in ("data/02_dicom.ipynb", "foundations/config.ipynb")) if p.is_file())
pytestmark = pytest.mark.slow


def chromium():
    """The browser's path; without one the test is left out and says how to get it (conftest makes that a failure in CI)."""
    found = next((p for p in map(shutil.which, ("chromium", "chromium-browser", "google-chrome")) if p), None)
    return found or pytest.skip("no chromium found; remedy: apt-get install chromium (or your system's package), then run again")


@pytest.fixture(scope="module")
def browser():
    path = chromium()
    from playwright.sync_api import sync_playwright
    with sync_playwright() as playwright:
        chrome = playwright.chromium.launch(executable_path=path, args=ARGS)
        yield chrome
        chrome.close()


@contextmanager
def watched_page(browser, **options):
    """A page that notes console errors and each request that leaves this machine (which is refused)."""
    context = browser.new_context(**options)
    page, page_errors, outside = context.new_page(), [], []

    def guard(route):
        if route.request.url.startswith(("http://127.0.0.1", "file:", "data:", "blob:", "ws://127.0.0.1")):
            return route.continue_()
        outside.append(route.request.url)
        return route.abort()
    context.route("**/*", guard)
    page.on("console", lambda m: page_errors.append(m.text) if m.type == "error" else None)
    page.on("pageerror", lambda e: page_errors.append(str(e)))
    page.errors, page.outside = page_errors, outside
    yield page
    context.close()


def page_screenshot(browser, source, out, *, width=1280, scheme="light"):
    """Open a file or URL, store a picture of the whole page, and return (text, console errors, outside requests)."""
    url = source if str(source).startswith("http") else Path(source).resolve().as_uri()
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    with watched_page(browser, viewport={"width": width, "height": 900}, color_scheme=scheme) as page:
        page.goto(url, wait_until="load")
        page.screenshot(path=out, full_page=True)
        wide = page.evaluate("document.documentElement.scrollWidth")
        return page.inner_text("body"), page.errors, page.outside, wide


# ---- a chapter in JupyterLab -----------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """JupyterLab on loopback with a token, serving a copy of nbs/; no news, no announcements, no user settings."""
    chromium()
    home = tmp_path_factory.mktemp("lab")
    shutil.copytree(ROOT / "nbs", home / "repo" / "nbs", ignore=shutil.ignore_patterns("*.py", ".ipynb_checkpoints"))
    (home / "repo" / "results").symlink_to(ROOT / "results")
    news = home / "settings" / "@jupyterlab" / "apputils-extension" / "notification.jupyterlab-settings"
    news.parent.mkdir(parents=True)
    news.write_text('{"fetchNews": "false", "checkForUpdates": false}')
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    token = secrets.token_hex(16)
    env = {**os.environ, "JUPYTER_CONFIG_DIR": str(home / "config"), "JUPYTER_DATA_DIR": str(home / "data"), "JUPYTER_TOKEN": token,
           "JUPYTER_RUNTIME_DIR": str(home / "runtime"), "JUPYTERLAB_SETTINGS_DIR": str(home / "settings"), "TF_CPP_MIN_LOG_LEVEL": "3",
           "JUPYTERLAB_WORKSPACES_DIR": str(home / "workspaces"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--ip=127.0.0.1", f"--port={port}", "--ServerApp.port_retries=0",
               "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate", "--allow-root", f"--notebook-dir={home / 'repo'}"]
    log = open(home / "lab.log", "w")
    with subprocess.Popen(command, env=env, stdout=log, stderr=subprocess.STDOUT, start_new_session=True) as server:
        try:
            wait_for(f"http://127.0.0.1:{port}/api/status?token={token}", server, home / "lab.log")
            yield home / "repo", f"http://127.0.0.1:{port}", token
        finally:
            os.killpg(server.pid, signal.SIGTERM)
            try:
                server.wait(15)
            except subprocess.TimeoutExpired:
                os.killpg(server.pid, signal.SIGKILL)
    log.close()


def wait_for(url, server, log, seconds=60):
    """Until the server answers; its log when it does not."""
    for _ in range(seconds * 4):
        if server.poll() is not None:
            break
        try:
            with urllib.request.urlopen(url, timeout=2):
                return
        except OSError:
            time.sleep(0.25)
    raise AssertionError(f"JupyterLab did not start:\n{log.read_text()[-3000:]}")


def saved_cells(path):
    """The code cells with text, as JupyterLab last saved them."""
    try:
        nb = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError:      # caught in the middle of a save
        return []
    return [c for c in nb["cells"] if c["cell_type"] == "code" and "".join(c["source"]).strip()]


def run_all(page, path, seconds=240):
    """Kernel ▸ Restart Kernel and Run All Cells…, confirm, and save until each cell has run or one has failed."""
    page.locator(".lm-MenuBar-item", has_text="Kernel").first.click()
    page.locator(".lm-Menu-item", has_text="Restart Kernel and Run All Cells").first.click()
    page.locator(".jp-Dialog .jp-mod-accept").click()
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        page.wait_for_timeout(1500)
        page.keyboard.press("Control+s")
        page.wait_for_timeout(500)
        cells = saved_cells(path)
        if cells and (all(c["execution_count"] for c in cells) or any(o["output_type"] == "error" for c in cells for o in c["outputs"])):
            break
    return saved_cells(path)


def test_chapter_runs_in_jupyterlab(lab, browser):
    repo, url, token = lab
    path = repo / CHAPTER.relative_to(ROOT)
    expected = len(saved_cells(path))
    SHOTS.mkdir(parents=True, exist_ok=True)
    with watched_page(browser, viewport={"width": 1400, "height": 1000}) as page:
        page.goto(f"{url}/lab/tree/{CHAPTER.relative_to(ROOT).as_posix()}?token={token}&reset")
        try:
            page.wait_for_selector(".jp-NotebookPanel:not(.lm-mod-hidden) .jp-Notebook h1", timeout=60_000)
            page.wait_for_selector('.jp-Notebook-ExecutionIndicator[data-status="idle"]', timeout=60_000)
            title = page.locator(".jp-Notebook h1").first.inner_text().rstrip("¶").strip()
            cells = run_all(page, path)
            shown_errors = page.locator('.jp-RenderedText[data-mime-type="application/vnd.jupyter.error"]').count()
        finally:
            page.screenshot(path=SHOTS / "jupyterlab.png")
    errors = [f"{''.join(c['source'])}\n{o['ename']}: {o['evalue']}" for c in cells for o in c["outputs"] if o["output_type"] == "error"]
    assert not errors and not shown_errors, "\n".join(errors)
    ran = [c for c in cells if c["execution_count"]]
    assert len(ran) == expected, f"{len(ran)} of {expected} cells ran"
    assert [c["execution_count"] for c in ran] == list(range(1, expected + 1)), "the cells did not run once each, in order"
    assert title == checks.nbtool.read(CHAPTER).cells[0].source.splitlines()[0].removeprefix("# ")
    assert not page.outside, f"the page asked other hosts: {page.outside}"


# ---- the report of the demo ------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """The page that `medimg demo` writes, made in an empty folder without any data set."""
    chromium()
    folder = tmp_path_factory.mktemp("demo")
    env = {k: v for k, v in os.environ.items() if k != "MEDIMG_DATA"} | {"MEDIMG_CACHE": str(folder / "cache")}
    done = subprocess.run([sys.executable, "-c", "from medimg.cli import main; main()", "demo", "--out", folder / "out"],
                          cwd=folder, capture_output=True, text=True, env=env, timeout=180)
    assert done.returncode == 0, done.stderr[-3000:]
    pages = sorted((folder / "out").rglob("*.html"))
    assert pages, f"the demo wrote no page; it said:\n{done.stdout[-2000:]}"
    return pages[0]


@pytest.mark.parametrize("scheme,width", [("light", 1280), ("dark", 1280), ("light", 390)])
def test_report_is_self_contained(report, browser, scheme, width):
    text, errors, outside, wide = page_screenshot(browser, report, SHOTS / f"report-{scheme}-{width}.png", width=width, scheme=scheme)
    assert not outside, f"the report asks other hosts: {outside}"
    assert not errors, errors
    assert "research use, not a medical device" in text.lower()
    assert wide <= width + 1, f"the page is {wide} px wide on a screen of {width} px"


def test_the_guard_notices(tmp_path, browser):
    """A page that loads a picture from elsewhere and throws: both are seen, so the tests above can fail."""
    bad = tmp_path / "bad.html"
    bad.write_text('<body>x<img src="https://example.com/x.png"><script>throw new Error("boom")</script>')
    text, errors, outside, _ = page_screenshot(browser, bad, tmp_path / "bad.png")
    assert text.strip() == "x" and outside == ["https://example.com/x.png"] and any("boom" in e for e in errors)
