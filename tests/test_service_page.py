"""A running service with its review page: a CT comes by DICOMweb, a bundle answers it, a doctor signs in and disagrees; who may not is refused; all of it is in the log."""
import json
import re
import shutil
import time
from types import SimpleNamespace

import httpx
import pydicom
import pytest
from dicomweb_client.api import DICOMwebClient
from running import Running

from medimg.deployment.audit import verify
from medimg.deployment.sessions import Users
from medimg.deployment.store import Store
from medimg.deployment.study import write_visit

PASSWORD = "drei Rehe am Waldrand"
KEY = "ab" * 32


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A service with three users, and a study in it that phantom-nodules has answered; the audit key and the head lie elsewhere."""
    from medimg.data.phantom_cohort import phantom_cohort
    folder = tmp_path_factory.mktemp("page")
    users = Users(folder / "users.json")
    for name, role in (("dr.wu", "clinician"), ("guest", "viewer"), ("boss", "admin")):
        users.add(name, PASSWORD, role)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MEDIMG_AUDIT_KEY", KEY)
        running = Running(folder, bundle="phantom-nodules", decoders=1, decode_s=20.0, users=str(folder / "users.json"), audit_head=str(folder / "elsewhere.head"))
    client = DICOMwebClient(f"{running.base}/dicom-web", headers={"Authorization": f"Bearer {running.key}"})
    patient = next(p for p in phantom_cohort(5) if p.nodules)
    datasets = {}
    for visit, day in enumerate(("2025-01-05", "2026-01-05")):
        datasets[visit] = [pydicom.dcmread(f) for f in write_visit(patient, folder / f"ct{visit}", day=day, acquisition="thick", visit=visit)]
        client.store_instances(datasets[visit])
    uid, prior = (datasets[visit][0].StudyInstanceUID for visit in (1, 0))
    with running.client() as asked:
        answer = asked.post(f"/v1/studies/{uid}/predict?bundle=phantom-nodules&prior={prior}", json={"screening": True}, timeout=60)
    assert answer.status_code == 200, answer.text
    result = answer.json()["results"][0]
    yield SimpleNamespace(running=running, base=running.base, outside=client, uid=uid, prior=prior, result=result, n=len(datasets[1]), folder=folder, store=Store(folder / "store"))
    assert running.stop() == 0
    assert "Traceback" not in "".join(running.log)


def signed_in(site, name, password=PASSWORD):
    client = httpx.Client(base_url=site.base, follow_redirects=True, timeout=30)
    answer = client.post("/review/login", data={"name": name, "secret": password})
    assert answer.url.path == "/review/", answer.text
    return client


def csrf_of(text):
    return re.search(r'name="csrf" value="([^"]+)"', text)[1]


def events(site):
    """What the service wrote into the log, without the log's own records."""
    return [e for line in (site.folder / "store" / "audit.jsonl").read_text().splitlines() if "outcome" in (e := json.loads(line)["e"])]


def test_a_kept_study_is_answered_and_given_back_as_dicom(site):
    record, kept = site.result["record"], site.result
    assert record["status"] == "answered" and record["findings"] and record["recommendations"] and kept["dicom_problem"] is None
    assert {f["growth"]["relation"] for f in record["findings"]} == {"matched"} and {f["growth"]["interval_days"] for f in record["findings"]} == {365}
    found = {s["00080060"]["Value"][0] for s in site.outside.search_for_series(site.uid)}
    assert {"CT", "SR", "SEG"} <= found and len(kept["dicom"]) == 3
    for series in site.outside.search_for_series(site.uid):
        if series["00080060"]["Value"][0] in ("SR", "SEG"):
            ds = site.outside.retrieve_series(site.uid, series["0020000E"]["Value"][0])[0]
            assert ds.SOPInstanceUID in kept["dicom"] and ds.PatientID == pydicom.dcmread(next((site.folder / "ct1").iterdir())).PatientID
            assert ds.Modality == "SEG" or len(ds.ContentSequence) > 2
    with site.running.client() as client:
        job = client.post(f"/v1/jobs?study_uid={site.uid}&bundle=phantom-nodules").headers["location"]
        end = time.monotonic() + 40
        while (row := client.get(job).json())["state"] in ("queued", "running") and time.monotonic() < end:
            time.sleep(0.2)
        assert row["state"] == "done" and len(row["predictions"]) == 1               # our own report and picture are not images of it
        assert [f["volume_mm3"] for f in row["predictions"][0]["findings"]] == [f["volume_mm3"] for f in record["findings"]]


@pytest.mark.parametrize("path, body, status", [
    ("1.2.3/predict", None, 404), ("1.2..3/predict", None, 400), ("UID/predict?bundle=nothing", None, 404), ("UID/predict?prior=1.2.3", None, 404), ("UID/predict?wrong=1", None, 400),
    ("UID/predict", b"{", 400), ("UID/predict", b"[1]", 400), ("UID/predict", b'{"shoe_size": 42}', 400), ("UID/predict", b" " * 70_000, 413), ("UID", None, 405)])
def test_questions_that_are_none(site, path, body, status):
    with site.running.client() as client:
        answer = client.post(f"/v1/studies/{path.replace('UID', site.uid)}", content=body)
    assert answer.status_code == status or status == 405 and answer.status_code == 404, answer.text
    assert answer.headers["content-type"] == "application/problem+json"


def test_only_who_may_asks_for_an_answer(site):
    assert httpx.post(f"{site.base}/v1/studies/{site.uid}/predict").status_code == 401
    with site.running.client(site.running.new_key("viewer")) as viewer:
        assert viewer.post(f"/v1/studies/{site.uid}/predict").status_code == 403


def test_the_page_asks_for_a_session(site):
    number = site.result["id"]
    for path in ("", f"result/{number}", f"study/{site.uid}", f"result/{number}/print"):
        answer = httpx.get(f"{site.base}/review/{path}")
        assert answer.status_code == 303 and answer.headers["location"].startswith("/review/login"), path
    for path in (f"pixels/result/{number}", f"overlay/{number}/mask", f"thumb/{number}.png", f"shot/{number}/1.png"):
        assert httpx.get(f"{site.base}/review/{path}").status_code == 401, path
    assert httpx.get(f"{site.base}/review/", headers={"authorization": f"Bearer {site.running.key}"}).status_code == 303      # a key is no session
    assert httpx.post(f"{site.base}/review/login", data={"name": "dr.wu", "secret": "wrong"}).status_code == 401
    assert httpx.post(f"{site.base}/review/result/{number}/label", data={"verdict": "agree"}).status_code == 401
    policy = httpx.get(f"{site.base}/review/login").headers
    assert policy.get_list("content-security-policy") == [policy["content-security-policy"]] and "script-src 'self';" in policy["content-security-policy"] and "unsafe" not in str(policy)


def test_a_session_replayed_after_logout_is_refused_by_the_service(site):
    client = signed_in(site, "dr.wu")
    page, cookie = client.get("/review/").text, dict(client.cookies)
    assert "Phantom" in page and httpx.get(f"{site.base}/review/", cookies=cookie).status_code == 200
    assert client.post("/review/logout", data={"csrf": csrf_of(client.get("/review/").text)}).url.path == "/review/login"
    again = httpx.get(f"{site.base}/review/", cookies=cookie)
    assert again.status_code == 303 and "Phantom" not in again.text
    assert httpx.get(f"{site.base}/review/pixels/result/{site.result['id']}", cookies=cookie).status_code == 401


def test_a_viewer_looks_and_cannot_label(site):
    viewer, before = signed_in(site, "guest"), len(site.store.labels())
    page = viewer.get(f"/review/result/{site.result['id']}").text
    assert "Phantom" in page and "<textarea" not in page
    assert viewer.post(f"/review/result/{site.result['id']}/label", data={"verdict": "agree", "csrf": csrf_of(page)}).status_code == 403 and len(site.store.labels()) == before


def test_forged_forms_change_nothing(site):
    doctor, before = signed_in(site, "dr.wu"), len(site.store.labels())
    path = f"/review/result/{site.result['id']}/label"
    good = csrf_of(doctor.get(f"/review/result/{site.result['id']}").text)
    other = csrf_of(signed_in(site, "dr.wu").get(f"/review/result/{site.result['id']}").text)
    for form, headers in (({}, {}), ({"csrf": ""}, {}), ({"csrf": other}, {}), ({"csrf": good}, {"origin": "https://evil.example"}), ({"csrf": good}, {"sec-fetch-site": "cross-site"})):
        assert doctor.post(path, data={"verdict": "agree", **form}, headers=headers).status_code == 403, (form, headers)
    assert doctor.post(path, data={"verdict": "agree", "csrf": good, "comment": "x" * 600_000}).status_code == 413
    assert len(site.store.labels()) == before
    assert doctor.post(path, data={"verdict": "agree", "csrf": good}).status_code == 200 and len(site.store.labels()) == before + 1


def test_guessing_a_password_is_slow(site):
    said = [httpx.post(f"{site.base}/review/login", data={"name": "boss", "secret": f"wrong {k}"}).status_code for k in range(8)]
    assert said == [401] * 8 and "boss" not in {e.get("actor") for e in events(site) if e.get("outcome") == "ok"}
    assert {e["reason"] for e in events(site) if e["action"] == "login" and e["outcome"] == "refused"} >= {"password", "rate"}


def test_views_labels_and_logins_are_in_the_log(site):
    doctor = signed_in(site, "dr.wu")
    page = doctor.get(f"/review/result/{site.result['id']}").text
    doctor.post(f"/review/result/{site.result['id']}/label", data={"verdict": "disagree", "csrf": csrf_of(page)})
    httpx.get(f"{site.base}/review/result/{site.result['id']}")
    log = events(site)
    pick = {(e["action"], e["outcome"], e.get("actor")) for e in log}
    assert {("login", "ok", "dr.wu"), ("worklist:read", "ok", "dr.wu"), ("study:read", "ok", "dr.wu"), ("label:write", "ok", "dr.wu"), ("study:read", "refused", None), ("predict:run", "ok", "local")} <= pick
    label = [e for e in log if e["action"] == "label:write" and e["outcome"] == "ok"][-1]
    assert label["verdict"] == "disagree" and label["result"] == str(site.result["id"]) and label["via"] == "session"
    asked = next(e for e in log if e["action"] == "predict:run")
    assert asked["bundle"] == "phantom-nodules" and asked["study"] == label["study"] and site.uid not in json.dumps(log) and PASSWORD not in json.dumps(log)


def test_who_owns_the_folder_cannot_forge_the_log(site):
    """Neither the key nor the head lies with the log: a changed and a cut log are found, and no other key verifies it."""
    log, head = site.folder / "store" / "audit.jsonl", site.folder / "elsewhere.head"
    assert not any((site.folder / "store" / name).exists() for name in ("audit.key", "audit.head")) and verify(log, KEY, head).ok
    copy = site.folder / "forged.jsonl"
    lines = log.read_text().splitlines(keepends=True)
    for text, key in (("".join(lines[:-1]), KEY), ("".join(lines).replace("dr.wu", "guest"), KEY), ("".join(lines), "cd" * 32)):
        copy.write_text(text)
        copy.chmod(0o600)
        assert not verify(copy, key, head).ok
    assert "lies beside" not in "".join(site.running.log)


def test_what_is_left_at_its_default_is_said_at_the_start(tmp_path):
    quiet = Running(tmp_path, bundle="phantom-cxr", decoders=1, review=False)
    try:
        assert httpx.get(f"{quiet.base}/review/").status_code == 404
        said = "".join(quiet.log)
        assert "the audit key lies beside the log" in said and "the head of the audit log lies beside it" in said
    finally:
        assert quiet.stop() == 0


@pytest.mark.slow
def test_a_doctor_disagrees_in_a_browser(site):
    path = next((p for p in map(shutil.which, ("chromium", "chromium-browser", "google-chrome")) if p), None)
    if path is None:
        pytest.skip("no chromium found; remedy: apt-get install chromium")
    from playwright.sync_api import sync_playwright
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-dev-shm-usage"])
        page, errors = browser.new_page(viewport={"width": 1440, "height": 900}, color_scheme="dark"), []
        page.on("console", lambda m: errors.append(m.text) if m.type in ("error", "warning") and "getImageData" not in m.text else None)
        page.on("pageerror", lambda e: errors.append(str(e)))
        page.on("request", lambda r: None if r.url.startswith((site.base, "data:", "blob:")) else errors.append(r.url))
        page.goto(f"{site.base}/review")
        page.fill("[name=name]", "dr.wu")
        page.fill("[name=secret]", PASSWORD)
        page.keyboard.press("Enter")
        page.wait_for_selector("#work")
        page.goto(f"{site.base}/review/?state=all")
        page.locator("#work th a[href*='/result/']", has_text="Phantom").first.click()
        page.wait_for_selector(".pane[data-loaded=all]", timeout=30_000)
        assert page.locator("#overlay").count() == 1 and page.locator("[data-go]").count() == len(site.result["record"]["findings"])
        from test_browser import SHOTS
        SHOTS.mkdir(parents=True, exist_ok=True)
        page.screenshot(path=SHOTS / "service-page.png")
        before = len(site.store.labels())
        page.locator("[name=verdict][value=disagree]").check(force=True)
        page.fill("[name=comment]", "a vessel")
        page.click("text=Save verdict")
        page.wait_for_selector(".saved")
        label = site.store.labels()[-1]
        assert len(site.store.labels()) == before + 1 and (label["user"], label["verdict"], label["comment"]) == ("dr.wu", "disagree", "a vessel")
        browser.close()
    assert errors == []
