"""A running service with its review page: a CT comes by DICOMweb, a bundle answers it, a doctor signs in and disagrees; who may not is refused; all of it is in the log."""
import contextlib
import json
import os
import re
import shutil
import time
from pathlib import Path
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
        answer = asked.post(f"/v1/studies/{uid}/predict?bundle=phantom-nodules&prior={prior}", json={"screening": True}, timeout=240)
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
        end = time.monotonic() + 120
        while (row := client.get(job).json())["state"] in ("queued", "running") and time.monotonic() < end:
            time.sleep(0.2)
        assert row["state"] == "done" and len(row["predictions"]) == 1               # our own report and picture are not images of it
        assert [f["volume_mm3"] for f in row["predictions"][0]["findings"]] == [f["volume_mm3"] for f in record["findings"]]


def finished_job(client, place, seconds=240):
    """The row of a job at its end."""
    end = time.monotonic() + seconds
    while (row := client.get(place).json())["state"] in ("queued", "running") and time.monotonic() < end:
        time.sleep(0.2)
    return row


FACTS = {"age_years": 61, "screening": True, "smoker": True, "prior_category": "3"}


@pytest.fixture(scope="module")
def here(site):
    """What `medimg predict phantom-nodules ct1 --prior ct0 --context facts.json` says of the same files."""
    from medimg.deployment.study import assess
    return assess("phantom-nodules", site.folder / "ct1", prior=site.folder / "ct0", context=FACTS, progress=False)[0].to_dict()


@pytest.mark.parametrize("prior", ["latest", "named"])
def test_a_job_takes_facts_and_an_earlier_study_as_the_command_line_does(site, here, prior):
    facts = FACTS
    with site.running.client() as client:
        sent = client.post(f"/v1/jobs?study_uid={site.uid}&bundle=phantom-nodules&prior={site.prior if prior == 'named' else prior}", json=facts)
        assert sent.status_code == 202, sent.text
        row = finished_job(client, sent.headers["location"])
    record = row["predictions"][0]
    assert row["state"] == "done" and {f["growth"]["interval_days"] for f in record["findings"]} == {365} and here["findings"]
    assert [f["growth"]["volume_doubling_days"] for f in record["findings"]] == [f["growth"]["volume_doubling_days"] for f in here["findings"]]
    assert [(r["guideline"], r["status"], r["category"], r["rule"]) for r in record["recommendations"]] == [(r["guideline"], r["status"], r["category"], r["rule"]) for r in here["recommendations"]]
    assert any(r["status"] == "applies" and r["category"] for r in record["recommendations"])


@pytest.mark.parametrize("query, body, status, words", [
    ("study_uid=UID", b'{"age_years": "old"}', 400, "age_years"), ("study_uid=UID", b'{"shoe_size": 42}', 400, "shoe_size"), ("study_uid=UID", b"{", 400, "no JSON"), ("study_uid=UID", b"[1]", 400, "by name"),
    ("study_uid=UID", b'{"sex": ["F"]}', 400, "sex"), ("study_uid=UID&prior=1.2.3", b"", 404, "earlier study"), ("study_uid=UID&prior=UID", b"", 404, "earlier study"), ("study_uid=1.2.3", b"", 404, "no such study"),
    ("prior=latest", b"x", 400, "earlier study"), ("study_uid=UID&bundle=none", b"", 404, "none")])
def test_a_job_says_which_fact_is_wrong(site, query, body, status, words):
    with site.running.client() as client:
        before = len(client.get("/v1/jobs").json()["jobs"])
        answer = client.post(f"/v1/jobs?{query.replace('UID', site.uid)}", content=body)
        assert answer.status_code == status and answer.headers["content-type"] == "application/problem+json" and words in answer.text, answer.text
        assert len(client.get("/v1/jobs").json()["jobs"]) == before


def test_a_form_carries_facts_beside_its_file(site):
    archive = shutil.make_archive(str(site.folder / "sent"), "zip", site.folder / "ct1")
    with site.running.client() as client, open(archive, "rb") as file:
        data = file.read()
        bad = client.post("/v1/jobs", files={"context": (None, '{"risk": "some"}'), "file": ("ct.zip", data, "application/zip")})
        assert bad.status_code == 400 and "risk cannot be 'some'" in bad.text
        sent = client.post("/v1/jobs", files={"context": (None, '{"screening": true, "age_years": 61}'), "file": ("ct.zip", data, "application/zip")})
        row = finished_job(client, sent.headers["location"])
    used = [r["inputs_used"] for r in row["predictions"][0]["recommendations"]]
    assert row["state"] == "done" and any(u.get("screening") is True for u in used), row


def test_the_page_asks_a_model(site):
    doctor = signed_in(site, "dr.wu")
    page = doctor.get(f"/review/study/{site.prior}").text
    assert 'name="bundle"' in page and "phantom-nodules" in page and "无" not in page and "请模型分析" in doctor.get(f"/review/study/{site.prior}?lang=zh").text
    doctor.get("/review/?lang=en")
    form = {"csrf": csrf_of(page), "bundle": "phantom-nodules", "prior": "latest", "fact_age_years": "61", "fact_screening": "yes"}
    bad = doctor.post(f"/review/study/{site.prior}/ask", data={**form, "fact_age_years": "old"})
    assert bad.status_code == 400 and "age_years cannot be" in bad.text
    assert doctor.post(f"/review/study/{site.prior}/ask", data={**form, "bundle": "nothing"}).status_code == 404
    assert doctor.post("/review/study/1.2.3/ask", data=form).status_code == 404
    for wrong, headers in (({"csrf": ""}, {}), ({}, {"origin": "https://evil.example"})):
        assert doctor.post(f"/review/study/{site.prior}/ask", data={**form, **wrong}, headers=headers).status_code == 403
    before = len(site.store.results(site.prior))
    work = doctor.post(f"/review/study/{site.prior}/ask", data=form)
    assert work.status_code == 200 and work.url.path.startswith("/review/job/")
    seen = {}
    with doctor.stream("GET", f"{work.url.path}/events") as stream:
        assert stream.headers["content-type"].startswith("text/event-stream")
        for line in stream.iter_lines():
            seen[line.partition(" ")[2]] = 1
    assert "event: done".partition(" ")[2] in seen
    answer = doctor.get(work.url.path)
    kept = site.store.results(site.prior)
    assert answer.url.path == f"/review/result/{kept[0]['id']}" and len(kept) == before + 1
    record = kept[0]["record"]
    assert record["status"] == "answered" and any((r["inputs_used"] or {}).get("screening") is True for r in record["recommendations"])
    later, earlier = doctor.get(f"/review/study/{site.uid}"), doctor.get(f"/review/study/{site.prior}")
    assert later.url.path.startswith("/review/result/") and f"?prior={site.prior}" in later.text              # a study with an answer opens with it
    assert earlier.url.path == answer.url.path and f"?prior={site.uid}" not in earlier.text                   # what is later is no prior
    other = signed_in(site, "guest")
    assert other.get(work.url.path).status_code == 404 and 'name="bundle"' not in other.get(f"/review/study/{site.prior}").text
    assert other.post(f"/review/study/{site.prior}/ask", data={**form, "csrf": csrf_of(other.get("/review/").text)}).status_code == 403
    assert httpx.get(f"{site.base}{work.url.path}").status_code == 303 and httpx.get(f"{site.base}{work.url.path}/events").status_code == 401
    log = [e for e in events(site) if e["action"] == "predict:run" and e.get("via") == "session"]
    assert {(e["actor"], e["outcome"]) for e in log} >= {("dr.wu", "ok"), ("dr.wu", "refused"), ("guest", "refused")} and any(e.get("bundle") == "phantom-nodules" and e.get("study") for e in log)


def test_a_login_from_this_page_only(site):
    """What browsers send with the form: our origin, or null where a policy hides it; a form on another site is refused."""
    form = {"name": "dr.wu", "secret": PASSWORD}
    assert httpx.get(f"{site.base}/review/login").headers.get_list("referrer-policy") == ["same-origin"]
    for headers, status in (({"origin": site.base, "referer": f"{site.base}/review/login", "sec-fetch-site": "same-origin"}, 303), ({"origin": "null", "sec-fetch-site": "same-origin"}, 303), ({}, 303),
                            ({"origin": "https://evil.example", "sec-fetch-site": "cross-site"}, 403), ({"origin": "https://evil.example"}, 403), ({"origin": "null", "sec-fetch-site": "cross-site"}, 403)):
        answer = httpx.post(f"{site.base}/review/login", data=form, headers=headers)
        assert answer.status_code == status and bool(answer.cookies) == (status == 303), headers


def test_a_job_of_the_page_is_stopped(site):
    doctor = signed_in(site, "dr.wu")
    token = csrf_of(doctor.get(f"/review/study/{site.uid}").text)
    work = [doctor.post(f"/review/study/{site.uid}/ask", data={"csrf": token, "bundle": "phantom-nodules", "prior": ""}).url.path for _ in range(3)]
    assert doctor.post(f"{work[-1]}/stop", data={"csrf": "x"}).status_code == 403
    end = doctor.post(f"{work[-1]}/stop", data={"csrf": token})
    assert end.url.path == work[-1] and "Stopped" in end.text and "EventSource" not in end.text
    while any(doctor.get(place).url.path == place for place in work[:-1]):
        time.sleep(0.2)


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


def test_a_login_at_one_worker_is_valid_at_the_other(tmp_path):
    """Two workers; each request on a connection of its own lands at either. Session, form token, brake and logout hold at both."""
    Users(tmp_path / "users.json").add("dr.wu", PASSWORD, "clinician")
    pair = Running(tmp_path, bundle="phantom-cxr", decoders=1, workers=2, users=str(tmp_path / "users.json"))
    try:
        said = httpx.post(f"{pair.base}/review/login", data={"name": "dr.wu", "secret": PASSWORD}, headers={"connection": "close"})
        assert said.status_code == 303, said.text
        cookies = dict(said.cookies)
        pages = [httpx.get(f"{pair.base}/review/", cookies=cookies, headers={"connection": "close"}) for _ in range(40)]
        assert {p.status_code for p in pages} == {200} and len({csrf_of(p.text) for p in pages}) == 1
        assert set(served_by(pair)) == set(workers_of(pair)) and len(workers_of(pair)) == 2
        wrong = [httpx.post(f"{pair.base}/review/login", data={"name": "dr.wu", "secret": f"wrong {k}"}, headers={"connection": "close"}).status_code for k in range(14)]
        log = [json.loads(line)["e"] for line in (tmp_path / "store" / "audit.jsonl").read_text().splitlines()]
        assert wrong == [401] * 14 and sum(e.get("reason") == "password" for e in log if e.get("action") == "login") <= 8      # five, and one after each wait; not five for each worker
        assert httpx.post(f"{pair.base}/review/logout", data={"csrf": csrf_of(pages[0].text)}, cookies=cookies).status_code == 303
        assert {httpx.get(f"{pair.base}/review/", cookies=cookies, headers={"connection": "close"}).status_code for _ in range(20)} == {303}
    finally:
        assert pair.stop() == 0


def workers_of(running):
    """Process ids of the workers, as the kernel lists them."""
    from test_service import children
    return sorted(pid for pid in children(running.process.pid) if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes())


def served_by(running, tries=60):
    """Which workers accept connections: each open connection is found among the sockets of one of them."""
    import socket
    held, found = [socket.create_connection(("127.0.0.1", running.port)) for _ in range(tries)], set()
    time.sleep(0.5)
    inodes = {line.split()[9] for line in Path("/proc/net/tcp").read_text().splitlines()[1:] if line.split()[3] == "01" and line.split()[1].endswith(f":{running.port:04X}")}
    for pid in workers_of(running):
        for link in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                if (name := os.readlink(link)).startswith("socket:") and name[8:-1] in inodes:
                    found.add(pid)
    [s.close() for s in held]
    return sorted(found)


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
        page.wait_for_url("**/review/result/*")
        page.goto(f"{site.base}/review/result/{site.result['id']}")         # other tests may have asked other models about this study since
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


@pytest.mark.slow
@pytest.mark.parametrize("scripts", [True, False])
def test_a_reader_asks_a_model_by_keyboard(site, scripts, tmp_path_factory):
    """Tab to the form, type, Enter; progress; the answer opens by itself, with scripts and without. Nothing serious for axe."""
    path = next((p for p in map(shutil.which, ("chromium", "chromium-browser", "google-chrome")) if p), None)
    if path is None:
        pytest.skip("no chromium found; remedy: apt-get install chromium")
    from playwright.sync_api import sync_playwright
    from test_browser import SHOTS
    from test_review import axe_source, serious
    SHOTS.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-dev-shm-usage"])
        page = browser.new_context(viewport={"width": 1440, "height": 900}, color_scheme="dark" if scripts else "light", java_script_enabled=scripts).new_page()
        errors, origins = [], []
        page.on("console", lambda m: errors.append(m.text) if m.type in ("error", "warning") and "getImageData" not in m.text else None)
        page.on("request", lambda r: origins.append(r.headers.get("origin")) if r.method == "POST" else None)
        page.goto(f"{site.base}/review/login")
        page.fill("[name=name]", "dr.wu")
        page.fill("[name=secret]", PASSWORD)
        page.keyboard.press("Enter")
        page.wait_for_url("**/review/")
        page.goto(f"{site.base}/review/study/{site.prior}{'' if scripts else '?lang=zh'}")
        page.wait_for_selector(".pane[data-loaded=all]" if scripts else ".ask", timeout=60_000)
        page.locator(".ask [name=bundle]").focus()
        page.keyboard.press("Tab")
        assert page.locator(".ask [name=prior]:focus").count() == 1
        page.keyboard.press("Tab")
        page.keyboard.press("Enter")                                # opens the facts
        page.keyboard.press("Tab")
        page.keyboard.type("61")
        assert page.locator("[name=fact_age_years]").input_value() == "61"
        page.screenshot(path=SHOTS / f"ask-{scripts}.png")
        axe = axe_source(tmp_path_factory.mktemp("axe")) if scripts else None
        assert not scripts or serious(page, axe) == []
        before = len(site.store.results(site.prior))
        page.keyboard.press("Enter")
        page.wait_for_url("**/review/job/*")
        page.screenshot(path=SHOTS / f"job-{scripts}.png")
        assert page.locator("[role=status]").inner_text() and page.locator("progress").count() == 1
        assert not scripts or serious(page, axe) == []
        page.wait_for_url("**/review/result/*", timeout=120_000)
        assert len(site.store.results(site.prior)) == before + 1 and set(origins) == {site.base}
        assert site.store.results(site.prior)[0]["record"]["status"] == "answered"
        page.screenshot(path=SHOTS / f"answer-{scripts}.png")
        browser.close()
    assert errors == []
