"""The review page: by an HTTP client (who may, what is refused, what stays text) and in a real browser (read, scroll, mark, disagree), with axe and pictures."""
import json
import os
import re
import shutil
import subprocess
import threading
import time
from contextlib import closing, contextmanager
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pydicom
import pytest
from pydicom.data import get_testdata_file

import nbchecks as checks
from medimg.data.phantom import thorax_phantom
from medimg.deployment.page_auth import LocalAuth, SessionAuth
from medimg.deployment.prediction import STUDY_FIELDS, Finding, Prediction
from medimg.deployment.review import create_review_app, router
from medimg.deployment.showcase import fill_store
from medimg.deployment.slices import SliceCache, picture_pixels, pixels_of, place_of, stored_values
from medimg.deployment.store import Store
from medimg.deployment.upkeep import export_labels
from medimg.deployment.worklist import _catalogue, band, order, rows_of
from medimg.errors import MedimgError

TOKEN, SHOTS = "once" * 10, checks.ROOT / "artefacts" / "review"
SMALL = {"shape": (36, 80, 80), "spacing_mm": (8.0, 4.5, 4.5)}


def client_of(app):
    import warnings
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from starlette.testclient import TestClient
    return TestClient(app, base_url="http://127.0.0.1")


@pytest.fixture(scope="module")
def filled(tmp_path_factory):
    store = Store(tmp_path_factory.mktemp("review") / "kept")
    return SimpleNamespace(store=store, ids=fill_store(store, **SMALL))


@pytest.fixture
def signed_in(filled):
    client = client_of(create_review_app(filled.store, auth=LocalAuth(TOKEN)))
    assert client.get(f"/review/?token={TOKEN}").status_code == 200
    return client


def csrf_of(text):
    return re.search(r'name="csrf" value="([^"]+)"', text)[1]


# ---- who may ---------------------------------------------------------------------------------------------------------------------
PRIVATE = ["/review/result/1", "/review/study/1.2", "/review/pixels/result/1", "/review/overlay/1/mask", "/review/thumb/1.png", "/review/shot/1/0.png",
           "/review/result/1/print", "/review/pixels/series/1.2/1.3"]


@pytest.mark.parametrize("path", PRIVATE)
def test_nothing_without_a_session(filled, path):
    client = client_of(create_review_app(filled.store))
    answer = client.get(path, follow_redirects=False)
    assert answer.status_code in (303, 401) and "Okafor" not in answer.text
    client.cookies.set("medimg_review", "guess")
    assert client.get(path, follow_redirects=False).status_code in (303, 401)


def test_every_route_is_guarded(filled):
    """Of all routes only the sign-in, the front door and static files answer a stranger."""
    open_paths = set()
    client = client_of(create_review_app(filled.store))
    for route in router(filled.store, auth=LocalAuth()).routes:
        path = re.sub(r"\{name\}", "review.css", re.sub(r"\{(result_id|n)\}", "1", re.sub(r"\{\w+_uid\}", "1.2", route.path)))
        for method in route.methods - {"HEAD"}:
            answer = client.request(method, path, follow_redirects=False, headers={"content-type": "application/x-www-form-urlencoded"})
            if answer.status_code == 200:
                open_paths.add(route.path)
    assert open_paths == {"/review/login", "/review/static/{name}"}


def test_token_works_once_and_leaves_the_address(filled):
    app = create_review_app(filled.store, auth=LocalAuth(TOKEN))
    client, other = client_of(app), client_of(app)
    answer = client.get(f"/review/?token={TOKEN}", follow_redirects=False)
    assert answer.headers["location"] == "/review/" and "httponly" in answer.headers["set-cookie"].lower() and "samesite=strict" in answer.headers["set-cookie"].lower()
    assert client.get("/review/").status_code == 200 and other.get(f"/review/?token={TOKEN}").url.path == "/review/login"
    page = client.get("/review/").text
    assert TOKEN not in page and client.post("/review/logout", data={"csrf": csrf_of(page)}).url.path == "/review/login"
    assert client.get("/review/", follow_redirects=False).status_code == 303


def test_login_form(filled):
    client = client_of(create_review_app(filled.store, auth=LocalAuth(TOKEN)))
    assert client.post("/review/login", data={"secret": "wrong"}).status_code == 401
    answer = client.post("/review/login", data={"secret": TOKEN, "next": "/review/result/1"}, follow_redirects=False)
    assert answer.status_code == 303 and answer.headers["location"] == "/review/result/1"


@pytest.mark.parametrize("to", ["//evil.example", "https://evil.example/", "/\\evil.example", "/review/..//evil", "/review/../../x", "javascript:alert(1)", "/review/\\x", "/elsewhere"])
def test_no_open_redirect(filled, to):
    client = client_of(create_review_app(filled.store, auth=LocalAuth(TOKEN)))
    answer = client.post("/review/login", data={"secret": TOKEN, "next": to}, follow_redirects=False)
    assert answer.status_code == 303 and answer.headers["location"] == "/review/"


def test_another_host_name_is_refused(filled):
    """DNS rebinding: a page of another name that resolves to the loopback."""
    assert client_of(create_review_app(filled.store)).get("/review/login", headers={"host": "evil.example"}).status_code == 400


@pytest.mark.parametrize("form, headers, status", [
    ({"verdict": "agree"}, {}, 403), ({"verdict": "agree", "csrf": "guess"}, {}, 403), ({"verdict": "agree", "csrf": ""}, {}, 403),
    ({"verdict": "agree", "csrf": None}, {"origin": "https://evil.example"}, 403), ({"verdict": "agree", "csrf": None}, {"sec-fetch-site": "cross-site"}, 403),
    ({"verdict": "agree", "csrf": None}, {"origin": "null"}, 403), ({"verdict": "agree", "csrf": None}, {"origin": "null", "sec-fetch-site": "cross-site"}, 403),
    ({"verdict": "maybe", "csrf": None}, {}, 400), ({"verdict": "disagree", "label": "cat", "csrf": None}, {}, 400), ({"verdict": "edit", "added": "{", "csrf": None}, {}, 400),
    ({"verdict": "edit", "added": "[" * 5000, "csrf": None}, {}, 400), ({"verdict": "edit", "added": '[{"slice": -1, "y": 0, "x": 0}]', "csrf": None}, {}, 400),
    ({"verdict": "edit", "t1": "x", "csrf": None}, {}, 400), ({"verdict": "agree", "comment": "x" * 5000, "csrf": None}, {}, 400),
    ({"verdict": "agree", "comment": "x" * 600_000, "csrf": None}, {}, 413)])
def test_forged_and_broken_forms(signed_in, filled, form, headers, status):
    page = signed_in.get(f"/review/result/{filled.ids['ct']}").text
    form = {k: csrf_of(page) if v is None else v for k, v in form.items()}
    before = len(filled.store.labels())
    assert signed_in.post(f"/review/result/{filled.ids['ct']}/label", data=form, headers=headers).status_code == status
    assert len(filled.store.labels()) == before


def test_other_content_type(signed_in, filled):
    assert signed_in.post(f"/review/result/{filled.ids['ct']}/label", json={"verdict": "agree"}).status_code == 415


@pytest.mark.parametrize("path, status", [
    ("/review/result/999", 404), ("/review/result/abc", 404), ("/review/result/-1", 404), ("/review/result/" + "9" * 40, 404), ("/review/result/٣", 404), ("/review/study/9.9", 404),
    ("/review/study/..%2f..%2fetc", 404), ("/review/static/..%2freview.json", 404), ("/review/static/review.json", 404), ("/review/static/report.css", 404),
    ("/review/overlay/1/picture", 404), ("/review/overlay/1/..", 404), ("/review/pixels/result/1?a=5&b=1", 400), ("/review/pixels/result/1?a=-1", 400),
    ("/review/pixels/result/1?b=999", 400), ("/review/pixels/result/1?a=x", 400), ("/review/pixels/series/1.2/1.3", 404), ("/review/thumb/0.png", 404)])
def test_what_is_not_there(signed_in, path, status):
    answer = signed_in.get(path)
    assert answer.status_code == status and "Traceback" not in answer.text


def test_roles_and_users(filled, tmp_path):
    """The service's own users: a viewer looks, a clinician judges, a wrong password does neither; each is told to the log."""
    from fastapi import FastAPI

    from medimg.deployment.sessions import LoginThrottle, Sessions, Users
    users, events = Users(tmp_path / "users.json"), []
    for name, role in (("dr.wu", "clinician"), ("guest", "viewer")):
        users.add(name, "drei Rehe am Waldrand", role)
    app = FastAPI()
    app.include_router(router(filled.store, auth=SessionAuth(users, Sessions(tls=False, users=users), throttle=LoginThrottle(), log=events.append)))
    viewer, doctor = client_of(app), client_of(app)
    assert viewer.post("/review/login", data={"name": "guest", "secret": "wrong"}).status_code == 401
    for client, name in ((viewer, "guest"), (doctor, "dr.wu")):
        assert client.post("/review/login", data={"name": name, "secret": "drei Rehe am Waldrand"}).url.path == "/review/"
    path, count = f"/review/result/{filled.ids['clear']}", len(filled.store.labels())
    page = viewer.get(path).text
    assert "<textarea" not in page and "may look, not judge" in page
    assert viewer.post(f"{path}/label", data={"verdict": "agree", "csrf": csrf_of(page)}).status_code == 403 and len(filled.store.labels()) == count
    page = doctor.get(path).text
    assert doctor.post(f"{path}/label", data={"verdict": "agree", "csrf": csrf_of(page)}).status_code == 200 and filled.store.labels()[-1]["user"] == "dr.wu"
    assert {"login", "study:read", "label:write"} <= {e["action"] for e in events} and "drei Rehe" not in str(events) and csrf_of(page) not in str(events)


# ---- what stays text -------------------------------------------------------------------------------------------------------------
EVIL = '<script>alert(1)</script>"\'><img src=x onerror=alert(2)>{{7*7}}</script>'


def test_hostile_text_stays_text(tmp_path):
    store = Store(tmp_path / "kept")
    ds, out = pydicom.dcmread(get_testdata_file("CT_small.dcm")), BytesIO()
    ds.PatientName, ds.StudyDescription, ds.PatientID, ds.SeriesDescription = EVIL.replace("=", "&#61;"), EVIL[:64], EVIL[:60], EVIL[:64]
    ds.save_as(out)
    kept = store.add_instance(out.getvalue())
    facts = {**dict.fromkeys(STUDY_FIELDS), "study_uid": kept["study_uid"], "series_uid": kept["series_uid"]}
    evil = Prediction("answered", EVIL, task="detection", findings=(Finding(EVIL, EVIL, slice=0, note=EVIL, lobe=EVIL, side=EVIL),), study=facts, warnings=(EVIL,),
                      model={"name": EVIL, "version": EVIL, "digest": EVIL, "origin": EVIL, "signature": None},
                      recommendations=({k: EVIL for k in ("guideline", "edition", "rule", "source", "category", "text", "reason")} | {"status": "applies", "finding": None, "note": "for the clinician's decision",
                                                                                                                            "inputs_used": {EVIL: EVIL}, "inputs_missing": [EVIL]},))
    number = store.add_result(evil)
    store.add_result(Prediction("answered", EVIL, task="multiclass", classes=(EVIL, "b"), label=EVIL, probability={EVIL: 0.6, "b": 0.4}, threshold={EVIL: 0.5}, prediction_set=(EVIL, "b"),
                                picture=np.zeros((8, 8), "uint8")))
    store.add_label(number, user=EVIL[:60], verdict="disagree", comment=EVIL)
    client = client_of(create_review_app(store, auth=LocalAuth(TOKEN)))
    client.get(f"/review/?token={TOKEN}")
    for path in ("/review/?state=all", f"/review/result/{number}", f"/review/result/{number}?lang=zh", f"/review/result/{number}/print", f"/review/study/{kept['study_uid']}",
                 f"/review/result/{number + 1}", "/review/result/" + EVIL.replace("/", "")):
        answer = client.get(path)
        text = answer.text
        for markup in ("<script>alert", "<img src=x", "alert(2)&gt;49"):
            assert markup not in text, (path, markup, text[max(0, text.find(markup) - 200):][:400])
        assert not re.search(r"<(?!script type=|script>)script", text.replace('<script type="module"', "").replace('<script type="application/json"', ""))
        assert not re.search(r"\sstyle=|\son\w+=\"", text) and "unsafe" not in answer.headers["content-security-policy"]
        assert text.count("</script>") == text.count("<script"), path


@pytest.mark.parametrize("path", ["/review/", "/review/login", "/review/result/1", "/review/pixels/result/1", "/review/static/review.css", "/review/result/999"])
def test_headers(signed_in, path):
    headers = signed_in.get(path).headers
    policy = headers["content-security-policy"]
    assert "default-src 'none'" in policy and "frame-ancestors 'none'" in policy and "unsafe" not in policy and headers["x-content-type-options"] == "nosniff"
    assert "no-store" in headers["cache-control"] or "static" in path


def test_both_languages_say_the_same():
    for key, (english, chinese) in _catalogue()["words"].items():
        assert sorted(re.findall(r"\{(\w+)\}", english)) == sorted(re.findall(r"\{(\w+)\}", chinese)), key
    used = {k for p in (checks.ROOT / "medimg/deployment/web").glob("review_*.j2") for k in re.findall(r'say\("(\w[\w ]*)"', p.read_text())}
    used |= set(re.findall(r'say\("(\w+)"', "".join((checks.ROOT / f"medimg/deployment/{name}.py").read_text() for name in ("review", "page_view", "worklist"))))
    assert used <= {*_catalogue()["words"], "outline", "band_", "v_", "order_", "fact_", "job_"} and not any(ord(c) > 0x2E80 for english, _ in _catalogue()["words"].values() for c in english.replace("中文", ""))


# ---- what is shown ---------------------------------------------------------------------------------------------------------------
def test_values_come_back_as_the_scanner_sent_them(signed_in, filled):
    """Chunks of the wire against pydicom's own reading of each file."""
    result = filled.store.result(filled.ids["ct"])
    files = sorted((pydicom.dcmread(row["path"]) for row in filled.store.instances(result["study_uid"], result["series_uid"])), key=lambda d: float(d.ImagePositionPatient[2]))
    truth = np.stack([d.pixel_array * float(d.RescaleSlope) + float(d.RescaleIntercept) for d in files])
    wire = b"".join(signed_in.get(f"/review/pixels/result/{filled.ids['ct']}?a={a}&b={min(a + 10, 36)}").content for a in range(0, 36, 10))
    assert np.array_equal(np.frombuffer(wire, "<i2").reshape(truth.shape), truth)
    mask = np.frombuffer(signed_in.get(f"/review/overlay/{filled.ids['ct']}/mask").content, np.uint8).reshape(truth.shape)
    assert np.array_equal(mask, filled.store.arrays(filled.ids["ct"])["mask"]) and mask.max() == 3


def test_findings_lie_where_they_were_planted(filled):
    case, result = thorax_phantom(7, **SMALL), filled.store.result(filled.ids["ct"])
    pixels, layers, misfit = pixels_of(filled.store, SliceCache(filled.store), result)
    assert not misfit
    for k, finding in enumerate(result["record"]["findings"]):
        place, middle = place_of(pixels, finding), np.argwhere(case.nodule_mask(k)).mean(axis=0)
        assert np.abs(middle - [place["z"], place["y"], place["x"]]).max() < 1 and layers["mask"][place["z"], round(place["y"]), round(place["x"])] == k + 1


def test_an_overlay_of_another_grid_is_left_out(tmp_path):
    store = Store(tmp_path / "kept")
    number = store.add_result(Prediction("answered", "a", picture=np.zeros((8, 8), "uint8")), mask=np.ones((9, 9)))
    pixels, layers, misfit = pixels_of(store, SliceCache(store), store.result(number))
    assert pixels.array.shape == (1, 8, 8) and layers == {} and misfit


def test_place_outside_is_no_place():
    pixels = picture_pixels(np.zeros((8, 8), "uint8"))
    for finding in ({"slice": 1}, {"slice": -1}, {"box_yx": [7, 7, 30, 30]}, {}, {"slice": None, "centroid_mm": [0, 0, 0]}):
        assert place_of(pixels, finding) is None


@pytest.mark.parametrize("array", [np.array([-32768, 32767], "int16"), np.array([0, 65535], "uint16"), np.array([7], "uint8"), np.array([-2**31, 2**31 - 1], "int64"),
                                   np.array([np.nan, np.inf, 1.0]), np.zeros(3), np.array([1e-12, 2e-12])])
def test_stored_values(array):
    stored, slope, intercept = stored_values(array)
    good = np.nan_to_num(array.astype(float), nan=0.0, posinf=0.0, neginf=0.0)
    assert stored.dtype == np.int16 and np.abs(stored * slope + intercept - good).max() <= max(np.ptp(good) / 65535, 1e-300) * 0.51


def test_order_is_total_and_no_refusal_is_lost(filled):
    rows = rows_of(filled.store)
    assert rows == sorted(rows, key=order) and [r["band"] for r in rows] == sorted(r["band"] for r in rows)
    states = {r["status"]: r["band"] for r in rows if not r["labels"]}
    assert states["refused"] == states["unasked"] == 2 and band(None)[0] == 2


def test_a_superseded_answer_is_one_row(tmp_path):
    store = Store(tmp_path / "kept")
    for p in (0.2, 0.9):
        store.add_result(Prediction("answered", "a.png", task="binary", classes=("normal", "ill"), label="ill" if p > 0.5 else "normal", probability={"normal": 1 - p, "ill": p}))
    (row,) = rows_of(store)
    assert row["head"] == "ill" and row["band"] == 1


def test_reading_by_many_at_once(filled):
    """A series asked for by eight threads is read once."""
    import medimg.deployment.slices as module
    result, calls, real = filled.store.result(filled.ids["ct"]), [], module._read
    cache = SliceCache(filled.store)
    def counted(rows):
        calls.append(1)
        time.sleep(0.2)
        return real(rows)
    module._read = counted
    try:
        threads = [threading.Thread(target=cache.get, args=(result["study_uid"], result["series_uid"])) for _ in range(8)]
        [t.start() for t in threads]
        [t.join() for t in threads]
    finally:
        module._read = real
    assert len(calls) == 1


def test_a_damaged_file_is_a_message(tmp_path):
    store = Store(tmp_path / "kept")
    kept = store.add_instance(Path(get_testdata_file("JPEG2000.dcm")).read_bytes())
    kept["path"].write_bytes(kept["path"].read_bytes()[:-9000])
    client = client_of(create_review_app(store, auth=LocalAuth(TOKEN)))
    client.get(f"/review/?token={TOKEN}")
    answer = client.get(f"/review/study/{kept['study_uid']}")
    assert answer.status_code == 200 and "<canvas" not in answer.text and "Traceback" not in answer.text
    with pytest.raises(MedimgError):
        SliceCache(store).get(kept["study_uid"], kept["series_uid"])


# ---- in a browser ----------------------------------------------------------------------------------------------------------------
def axe_source(folder):
    """axe-core's script: from MEDIMG_AXE, from an earlier fetch in the user's cache, or by npm (its own client, pinned); none is a reason to leave out, which CI makes a failure."""
    from medimg.config import cache_dir
    kept = Path(os.environ.get("MEDIMG_AXE") or cache_dir() / "axe-core-4.10.3" / "axe.min.js")
    if not kept.is_file():
        if not shutil.which("npm"):
            pytest.skip("axe-core is not here; remedy: apt-get install npm, or set MEDIMG_AXE to an axe.min.js")
        done = subprocess.run(["npm", "install", "--no-save", "--ignore-scripts", "--no-audit", "--no-fund", "--prefix", folder, "axe-core@4.10.3"], capture_output=True, text=True, timeout=120)
        if done.returncode:
            pytest.skip(f"npm could not fetch axe-core ({done.stderr.strip()[-120:]}); remedy: connect to a registry, or set MEDIMG_AXE to an axe.min.js")
        kept.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(folder / "node_modules" / "axe-core" / "axe.min.js", kept)
    return kept.read_text(encoding="utf-8")


def serious(page, axe):
    """Findings of axe-core that are serious or critical, as `rule: element`."""
    page.evaluate(axe)
    found = page.evaluate("axe.run(document, {resultTypes: ['violations']})")["violations"]
    return [f"{v['id']} ({v['impact']}): {v['nodes'][0]['html'][:120]}" for v in found if v["impact"] in ("serious", "critical")]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The page on a loopback port, with a full-size showcase."""
    import socket

    import uvicorn
    store = Store(tmp_path_factory.mktemp("site") / "kept")
    ids, auth = fill_store(store, shape=(100, 192, 192), spacing_mm=(3.0, 1.9, 1.9)), LocalAuth(TOKEN, name="dr.test")
    with closing(socket.socket()) as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    server = uvicorn.Server(uvicorn.Config(create_review_app(store, auth=auth), host="127.0.0.1", port=port, log_level="warning"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.05)
    yield SimpleNamespace(url=f"http://127.0.0.1:{port}/review", store=store, ids=ids, auth=auth)
    server.should_exit = True
    thread.join(10)


@pytest.fixture(scope="module")
def chrome():
    path = next((p for p in map(shutil.which, ("chromium", "chromium-browser", "google-chrome")) if p), None)
    if path is None:
        pytest.skip("no chromium found; remedy: apt-get install chromium")
    from playwright.sync_api import sync_playwright
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-dev-shm-usage"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def axe(tmp_path_factory):
    return axe_source(tmp_path_factory.mktemp("axe"))


@contextmanager
def opened(chrome, site, **options):
    """A signed-in page that notes console errors and lets no request leave this machine."""
    context = chrome.new_context(**{"viewport": {"width": 1440, "height": 900}, "color_scheme": "dark", **options})
    errors, outside = [], []

    def guard(route):
        if route.request.url.startswith(("http://127.0.0.1", "data:", "blob:")):
            return route.continue_()
        outside.append(route.request.url)
        return route.abort()
    context.route("**/*", guard)
    page = context.new_page()
    page.on("console", lambda m: errors.append(m.text) if m.type in ("error", "warning") and "getImageData" not in m.text else None)
    page.on("pageerror", lambda e: errors.append(str(e)))
    session = "s" * 43
    site.auth._sessions[session] = "c" * 43
    context.add_cookies([{"name": site.auth.cookie, "value": session, "url": site.url}])
    page.errors = errors
    yield page
    context.close()
    assert errors == [] and outside == []


def until(page, expression, seconds=20):
    """Wait for an expression to be true; playwright's own waiting needs eval, which the page's policy forbids."""
    end = time.monotonic() + seconds
    while not page.evaluate(expression):
        assert time.monotonic() < end, f"not within {seconds} s: {expression}"
        page.wait_for_timeout(30)


def pane_is(page, name, value):
    until(page, f"document.querySelector('.pane').dataset.{name} === '{value}'")


def shown(page, name):
    return page.eval_on_selector(".pane", "(e, name) => e.dataset[name]", name)


def loaded(page, url):
    page.goto(url)
    page.wait_for_selector(".pane[data-loaded=all]", timeout=60_000)
    until(page, "document.querySelector('.pane').dataset.z !== undefined")


def picture(page, name, **options):
    SHOTS.mkdir(parents=True, exist_ok=True)
    page.wait_for_timeout(300)
    page.screenshot(path=SHOTS / f"{name}.png", **options)


def canvas(page):
    """The mean grey value of the drawn viewport."""
    return page.eval_on_selector(".pane canvas", "c => { const d = c.getContext('2d').getImageData(0, 0, c.width, c.height).data; let s = 0; for (let i = 0; i < d.length; i += 4) s += d[i]; return s / (d.length / 4); }")


@pytest.mark.slow
def test_a_doctor_reads_and_disagrees(chrome, site, axe):
    """Log in with the token, open the CT, scroll, window, overlay, findings, mark a missed one, disagree; the label arrives."""
    context = chrome.new_context(viewport={"width": 1440, "height": 900}, color_scheme="dark")
    page, errors = context.new_page(), []
    page.on("console", lambda m: errors.append(m.text) if m.type in ("error", "warning") and "getImageData" not in m.text else None)
    page.on("pageerror", lambda e: errors.append(str(e)))
    page.goto(f"{site.url}/")
    assert page.url.endswith("/login") and serious(page, axe) == []
    picture(page, "login")
    page.fill("[name=secret]", TOKEN)
    page.keyboard.press("Enter")
    page.wait_for_selector("#work")
    assert serious(page, axe) == []
    picture(page, "worklist")
    first = page.eval_on_selector_all("#work tbody th a", "links => links.map(a => a.textContent)")
    assert set(first[:2]) == {"Okafor, Daniel", "Berg, Anna"}
    page.keyboard.press("/")
    page.keyboard.type("berg")
    assert page.locator("#work tbody tr:visible").count() == 1
    page.keyboard.press("Enter")
    page.wait_for_selector(".pane[data-loaded=all]", timeout=60_000)
    assert "Research use" in page.inner_text(".banner") and page.locator(".banner").is_visible()

    start = int(shown(page, "z"))                                     # the first finding's slice
    page.locator(".pane canvas").focus()
    page.keyboard.press("ArrowUp")
    page.keyboard.press("ArrowUp")
    pane_is(page, "z", f"{start + 2}")
    page.mouse.move(500, 400)
    page.mouse.wheel(0, 200)
    until(page, f"Number(document.querySelector('.pane').dataset.z) < {start + 2}")
    page.locator("#slice").fill("11")
    pane_is(page, "z", "10")

    page.click("[data-go='3']")
    finding = json.loads(page.eval_on_selector("#view", "e => e.textContent"))["panes"][0]["findings"][2]
    until(page, f"document.querySelector('.pane').dataset.z === '{finding['z']}'")
    assert shown(page, "selected") == "3"
    page.keyboard.press("p")
    pane_is(page, "selected", "2")

    lung = canvas(page)
    page.keyboard.press("2")
    pane_is(page, "window", "40 400")
    assert canvas(page) < lung - 5 and page.get_attribute("[data-preset='1']", "aria-pressed") == "true"
    box = page.locator(".pane canvas").bounding_box()
    page.mouse.move(box["x"] + 300, box["y"] + 300)
    page.mouse.down()
    page.mouse.move(box["x"] + 380, box["y"] + 340, steps=4)
    page.mouse.up()
    until(page, "document.querySelector('.pane').dataset.window !== '40 400'")
    page.keyboard.press("1")

    page.keyboard.press("n")
    pane_is(page, "selected", "3")
    page.wait_for_timeout(150)
    overlaid = canvas(page)
    page.keyboard.press("o")
    pane_is(page, "overlay", "false")
    page.wait_for_timeout(150)
    assert canvas(page) != overlaid and page.get_attribute("#overlay", "aria-pressed") == "false"
    page.keyboard.press("o")
    page.keyboard.press("[")
    pane_is(page, "opacity", "0.5")
    page.keyboard.press("+")
    until(page, "Number(document.querySelector('.pane').dataset.zoom) > 1.2")
    page.keyboard.press("0")
    page.keyboard.press("?")
    assert page.locator("#keys").is_visible() and serious(page, axe) == []
    picture(page, "keys")
    page.keyboard.press("Escape")
    page.click("[data-go='1']")
    assert serious(page, axe) == []
    picture(page, "ct")

    page.click("text=Edit the findings")
    page.locator(".fix").nth(1).locator("text=not real").click()
    page.locator("[name=t3]").select_option("solid")
    page.click("#mark")
    assert page.evaluate("document.scrollingElement.scrollTop") == 0 and page.locator(".pane canvas").bounding_box() == box      # only the panel scrolls
    page.mouse.click(box["x"] + box["width"] / 2 + 60, box["y"] + box["height"] / 2)
    page.wait_for_selector("#marks li")
    page.fill("[name=comment]", "2 is a vessel; one missed near the hilum")
    assert serious(page, axe) == []
    picture(page, "edit")
    page.click("text=Save verdict")
    page.wait_for_selector(".saved")
    label = site.store.labels()[-1]
    assert (label["result_id"], label["user"], label["verdict"], label["comment"]) == (site.ids["ct"], "dr.test", "edit", "2 is a vessel; one missed near the hilum")
    assert [f.get("verdict") for f in label["findings"]] == ["agree", "disagree", "agree", None] and label["findings"][2]["type"] == "solid"
    assert label["findings"][3]["added"] and label["findings"][3]["slice"] == start
    context.close()
    assert errors == []


@pytest.mark.slow
def test_a_radiograph_is_called_wrong(chrome, site, axe, tmp_path):
    """Disagree with the class; the label is the other class, and the exported folder holds the picture under it."""
    with opened(chrome, site) as page:
        loaded(page, f"{site.url}/result/{site.ids['opacity']}")
        assert serious(page, axe) == []
        picture(page, "radiograph")
        page.get_by_text("Disagree", exact=True).click()
        page.locator("[name=label]").select_option("clear")
        page.fill("[name=comment]", "overlapping ribs")
        page.click("text=Save verdict")
        page.wait_for_selector(".saved")
    label = site.store.labels(site.ids["opacity"])[-1]
    assert (label["verdict"], label["label"], label["comment"]) == ("disagree", "clear", "overlapping ribs")
    export_labels(site.store, tmp_path / "out")
    assert (tmp_path / "out" / "clear" / f"{site.ids['opacity']:08d}.png").is_file()


@pytest.mark.slow
def test_prior_beside_it(chrome, site, axe):
    """Two scans scroll together by millimetres; unlinked, one moves alone; linked again, the shift stays."""
    with opened(chrome, site) as page:
        loaded(page, f"{site.url}/result/{site.ids['ct']}")
        page.click("text=Compare with prior")
        until(page, "document.querySelectorAll('.pane[data-loaded=all]').length === 2", 60)
        both = "[...document.querySelectorAll('.pane')].map(p => Number(p.dataset.z))"
        page.locator("#slice").fill("50")
        until(page, f"{both}.join() === '49,49'")
        assert serious(page, axe) == []
        page.keyboard.press("Escape")
        page.click("[data-go='1']")
        picture(page, "compare")
        page.locator("#link").uncheck()
        page.locator("#slice").fill("60")
        until(page, f"{both}[0] === 59")
        other = page.evaluate(both)[1]
        assert other != 59
        page.locator("#link").check()
        page.locator("#slice").fill("65")
        until(page, f"{both}.join() === '64,{other + 5}'")


@pytest.mark.slow
def test_scrolling_is_fluent(chrome, site):
    """100 slices drawn one after another, without a request: the median of a frame's work is below 16 ms."""
    with opened(chrome, site) as page:
        loaded(page, f"{site.url}/result/{site.ids['ct']}")
        requests = []
        page.on("request", lambda r: requests.append(r.url))
        took = page.evaluate("""async () => { const slider = document.getElementById('slice'), pane = document.querySelector('.pane'), times = [];
            for (let k = 1; k <= 100; k++) { const t = performance.now(); slider.value = k; slider.dispatchEvent(new Event('input'));
              while (pane.dataset.z !== String(k - 1)) await new Promise(requestAnimationFrame); times.push(performance.now() - t); } return times; }""")
        print(f"slice to slice: median {np.median(took):.1f} ms, 95 % {np.percentile(took, 95):.1f} ms, {len(requests)} requests")
        assert requests == [] and np.median(took) < 50


@pytest.mark.slow
@pytest.mark.parametrize("name, path, options", [
    ("chinese", "/result/{ct}?lang=zh", {}), ("chinese_list", "/?lang=zh&state=all", {}), ("light", "/result/{ct}", {"color_scheme": "light"}), ("light_list", "/?state=all", {"color_scheme": "light"}),
    ("phone_list", "/", {"viewport": {"width": 390, "height": 844}, "device_scale_factor": 2, "is_mobile": True, "has_touch": True}),
    ("phone", "/result/{opacity}", {"viewport": {"width": 390, "height": 844}, "device_scale_factor": 2, "is_mobile": True, "has_touch": True}),
    ("refused", "/result/{refused}", {}), ("outlines", "/result/{lungs}", {}), ("print", "/result/{ct}/print", {}), ("error", "/result/99999", {})])
def test_pages_in_every_dress(chrome, site, axe, name, path, options):
    """No serious accessibility finding, nothing wider than the screen, the warning always there; a picture of each is kept."""
    with opened(chrome, site, **options) as page:
        page.goto(site.url + path.format(**site.ids))
        if name == "error":
            assert "404" in page.errors.pop()
        if page.locator(".pane").count():
            page.wait_for_selector(".pane[data-loaded=all]", timeout=60_000)
        assert serious(page, axe) == []
        assert page.evaluate("document.documentElement.scrollWidth") <= page.viewport_size["width"]
        assert page.locator(".banner").is_visible() and page.evaluate("document.documentElement.lang") == ("zh-CN" if "chinese" in name else "en")
        picture(page, name, full_page=name in ("print", "phone", "phone_list"))
        if name == "print":
            page.pdf(path=SHOTS / "print.pdf", prefer_css_page_size=True, print_background=True)
            assert (SHOTS / "print.pdf").read_bytes()[:5] == b"%PDF-"


@pytest.mark.slow
def test_hostile_name_in_a_browser(chrome, tmp_path):
    """No dialog opens, nothing runs, the name is there as text."""
    import uvicorn
    store, out, ds = Store(tmp_path / "kept"), BytesIO(), pydicom.dcmread(get_testdata_file("CT_small.dcm"))
    ds.PatientName = "<img src=x onerror=alert(1)>^<script>alert(2)</script>".replace("=", "&#61;")
    ds.save_as(out)
    kept, auth = store.add_instance(out.getvalue()), LocalAuth(TOKEN)
    server = uvicorn.Server(uvicorn.Config(create_review_app(store, auth=auth), host="127.0.0.1", port=0, log_level="warning"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.05)
    port = server.servers[0].sockets[0].getsockname()[1]
    page, dialogs = chrome.new_page(), []
    page.on("dialog", lambda d: (dialogs.append(d.message), d.dismiss()))
    page.goto(f"http://127.0.0.1:{port}/review/?token={TOKEN}")
    assert "<script>alert(2)</script>" in page.inner_text("#work")
    page.goto(f"http://127.0.0.1:{port}/review/study/{kept['study_uid']}")
    page.wait_for_selector(".pane[data-loaded=all]")
    assert dialogs == [] and "<script>alert(2)</script>" in page.inner_text("h1")
    page.close()
    server.should_exit = True
    thread.join(10)


@pytest.mark.parametrize("kept, level, group, english, column, chinese", [
    (["pneumonia"], 0.9, 1, "Prediction set: pneumonia. Everything else is excluded at 90 %.", "far from the threshold", "在 90 % 的水平上，其余均可排除"),
    (["normal", "pneumonia"], 0.9, 1, "Prediction set: cannot tell normal from pneumonia at 90 %. Read the answer as “one of these”.", "cannot tell normal from pneumonia at 90 %", "在 90 % 的水平上无法区分"),
    (["normal", "pneumonia"], None, 1, "cannot tell normal from pneumonia at the stated level", "cannot tell normal from pneumonia at the stated level", "在所声明的水平上无法区分"),
    ([], 0.95, 1, "Prediction set: empty, unlike both normal and pneumonia at 95 %.", "unlike both normal and pneumonia", "均不相符"),
    (None, None, 1, "No prediction set is stated", "far from the threshold", "未给出预测集合")])
def test_what_a_prediction_set_says(kept, level, group, english, column, chinese):
    from medimg.deployment.worklist import certainty, in_words
    record = {"status": "answered", "task": "binary", "classes": ["normal", "pneumonia"], "label": "pneumonia", "probability": {"normal": 0.2, "pneumonia": 0.8}, "threshold": {"pneumonia": 0.5}, "findings": [],
              "recommendations": [], "prediction_set": kept, "uncertainty": {"entropy_bits": 0.7, "note": "", **({"level": level} if level else {})}, "ood": None}
    assert english in " ".join(in_words(record)) and chinese in " ".join(in_words(record, "zh")) and certainty(record) == column
    assert band({"record": record})[0] == group
    quiet = {**record, "label": "normal", "probability": {"normal": 0.9, "pneumonia": 0.1}}                # not urgent: the set decides between unsure and routine
    assert band({"record": quiet})[:2] == {None: (4, "why_rest"), 0: (3, "why_empty"), 1: (3, "why_set"), 2: (3, "why_set")}[None if kept is None else len(kept)]
    assert band({"record": {**quiet, "prediction_set": ["normal"]}})[:2] == (4, "why_rest")
