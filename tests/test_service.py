"""The running service, knocked at by clients that know nothing of it: answers, refusals, attackers, overload, the end."""
import asyncio
import contextlib
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path

import httpx
import numpy as np
import pytest
from pydicom.data import get_testdata_file
from running import Running

from medimg.config import RESEARCH_USE
from medimg.deployment.bundle import toy_bundle, toy_images
from medimg.deployment.predict import predict
from medimg.deployment.prediction import from_json
from medimg.errors import ConfigError
from medimg.plots import png_bytes

PNG = png_bytes(toy_images(2, seed=5)[0][1])
CT = Path(get_testdata_file("CT_small.dcm"))


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return toy_bundle(tmp_path_factory.mktemp("bundle") / "toy")


@pytest.fixture(scope="module")
def service(bundle, tmp_path_factory):
    running = Running(tmp_path_factory.mktemp("service"), bundle=bundle.path, header_s=1.5, body_s=1.5, max_body_mb=32)
    yield running
    assert running.stop() == 0
    assert "Traceback" not in "".join(running.log)


@pytest.fixture
def client(service):
    with service.client() as client:
        yield client


def is_problem(answer, status=None):
    body = answer.json()
    assert answer.headers["content-type"] == "application/problem+json" and body["status"] == answer.status_code, body
    assert {"type", "title", "status", "detail", "request_id"} <= body.keys() and body["request_id"] == answer.headers["x-request-id"]
    return status is None or answer.status_code == status


def essence(record):
    return {k: v for k, v in record.items() if k not in ("created", "duration_ms")}


def dicom(**changes):
    """A DICOM file of the picture, with other facts."""
    import pydicom
    ds = pydicom.dcmread(CT)
    for name, value in changes.items():
        setattr(ds, name, value)
    out = io.BytesIO()
    ds.save_as(out)
    return out.getvalue()


# ---- answers -------------------------------------------------------------------------------------------------------------------
def npy(array):
    out = io.BytesIO()
    np.save(out, array)
    return out.getvalue()


BODIES = {"a.png": PNG, "a.npy": npy(toy_images(2, seed=5)[0][1]), "ct.dcm": CT.read_bytes(), "rle.dcm": Path(get_testdata_file("MR_small_RLE.dcm")).read_bytes()}


@pytest.mark.parametrize("name", BODIES)
def test_the_answer_is_that_of_the_command_line(client, bundle, tmp_path, name):
    (tmp_path / name).write_bytes(BODIES[name])
    expected = [p.to_dict() for p in predict(bundle, tmp_path / name, progress=False)]
    answer = client.post(f"/v1/predict?name={name}", content=BODIES[name])
    assert answer.status_code == 200 and essence(answer.json()) == essence(expected[0])
    assert from_json(answer.text).to_dict() == answer.json() and answer.json()["research_use"] == RESEARCH_USE
    form = client.post("/v1/predict", files=[("file", (name, BODIES[name]))] * 2).json()["predictions"]
    assert [essence(p) for p in form] == [essence(expected[0])] * 2


def test_an_archive_gives_a_list_and_one_bad_file_a_record(client):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.write(CT, "d/1.dcm")
        archive.writestr("d/2.dcm", dicom(SOPInstanceUID="1.2.3.4", SeriesInstanceUID="1.2.3.5")[:3000])
    found = client.post("/v1/predict?name=x.zip", content=out.getvalue()).json()["predictions"]
    assert {p["source"]: p["status"] for p in found}["x.zip!d/1.dcm"] == "refused" and len(found) >= 1


def test_wrong_modality_and_body_part_are_refused_with_the_reason(service, tmp_path_factory):
    shipped = Running(tmp_path_factory.mktemp("shipped"), bundle="pneumonia", decoders=1)
    try:
        with shipped.client() as client:
            knee = client.post("/v1/predict", content=dicom(Modality="DX", BodyPartExamined="KNEE"), headers={"content-type": "application/dicom"}).json()
            ct = client.post("/v1/predict", content=CT.read_bytes()).json()
            assert knee["status"] == ct["status"] == "refused" and knee["probability"] is None
            assert any("body part KNEE" in r for r in knee["reasons"]) and any("modality CT" in r for r in ct["reasons"])
            assert client.get("/v1/bundles").json()["bundles"][0]["name"] == "pneumonia"
    finally:
        assert shipped.stop() == 0


def test_a_job_from_receipt_to_end(service, client):
    receipt = client.post("/v1/jobs", content=PNG)
    assert receipt.status_code == 202
    with client.stream("GET", receipt.headers["location"] + "/events") as stream:
        assert stream.headers["content-type"].startswith("text/event-stream")
        blocks = "".join(stream.iter_text()).strip().split("\n\n")
    assert blocks[-1].startswith("event: done") and json.loads(blocks[-1].split("data: ")[1])["done"] == 1
    job = client.get(receipt.headers["location"]).json()
    assert job["predictions"][0]["label"] == "bright" and client.get("/v1/results").json()["results"][0]["record"]["label"] == "bright"
    with service.client(service.new_key("clinician")) as other:
        assert is_problem(other.get(receipt.headers["location"]), 404) and other.get("/v1/jobs").json()["jobs"] == []
    assert client.delete(receipt.headers["location"]).json()["state"] == "done"
    assert is_problem(client.get("/v1/jobs/nothing"), 404)


def test_health_readiness_metrics_description(service, client):
    assert httpx.get(f"{service.base}/healthz").json() == {"status": "alive"} and httpx.get(f"{service.base}/readyz").status_code == 200
    text = client.get("/metrics").text
    assert re.search(r'^medimg_requests_total\{route="predict",status="200"\} [1-9]', text, re.M)
    for path, methods in client.get("/openapi.json").json()["paths"].items():
        assert all(m["security"] or path in ("/healthz", "/readyz") for m in methods.values())


# ---- refusals ------------------------------------------------------------------------------------------------------------------
def test_the_malformed_corpus_gives_no_5xx(service, client, data_root):
    seen = {}
    for path in sorted((data_root / "dicom_odd" / "fuzz").glob("*/*.dcm")):
        answer = client.post("/v1/predict", content=path.read_bytes(), headers={"content-type": "application/dicom"})
        seen[answer.status_code] = seen.get(answer.status_code, 0) + 1
        assert answer.status_code == 200 and answer.json()["status"] in ("answered", "refused") or 400 <= answer.status_code < 500 and is_problem(answer), path.name
    print(seen)
    assert sum(seen.values()) == 206 and sum(n for code, n in seen.items() if code != 200) > 50 and service.alive(PNG)


def bomb():
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.dcm", bytes(200 << 20))
    return out.getvalue()


def huge_png():
    data = bytearray(PNG)
    data[16:24] = (60_000).to_bytes(4, "big") * 2
    return bytes(data)


@pytest.mark.parametrize("body, kind, status", [
    (b"", "image/png", 400), (b"hello", "", 415), (PNG, "text/html", 415), (PNG, "application/dicom", 415), (PNG[:60], "", 422), (huge_png(), "", 422), (bomb(), "", 422),
    (PNG, "multipart/form-data", 400), (b"--b--", "multipart/form-data; boundary=b", 400), (b"\x1f\x8b" + bytes(99), "", 422), (b"PK\x03\x04" + bytes(99), "", 422)])
def test_bodies_that_are_none(service, client, body, kind, status):
    answer = client.post("/v1/predict", content=body, headers={"content-type": kind} if kind else {})
    assert is_problem(answer, status), answer.text
    assert service.alive(PNG)


@pytest.mark.parametrize("query, status", [("bundle=../../etc", 404), ("bundel=toy", 400), ("bundle=a&bundle=b", 400), ("store=perhaps", 400), ("bundle=%ff", 400)])
def test_queries_that_are_none(client, query, status):
    assert is_problem(client.post(f"/v1/predict?{query}", content=PNG), status)


def test_names_of_senders_are_only_names(client, service):
    for name in ("../../../etc/passwd", "..\\x.png", "a\nERROR forged\x1b[31m.png", "\u202egnp.exe", "x" * 2000, "..", "n"):
        sources = [p["source"] for p in client.post("/v1/predict", files={"file": (name, PNG, "image/png")}).json()["predictions"]]
        assert "/" not in sources[0] and "\\" not in sources[0] and sources[0].isprintable() and 0 < len(sources[0]) <= 100
    forged = client.get("/v1/jobs/x%0aERROR%20forged")
    assert forged.status_code == 404 and not any("forged" in line for line in service.log)


def test_no_patient_in_log_metrics_or_audit(service, client):
    secret = dicom(PatientName="GEHEIM^NAME", PatientID="GEHEIM-7", StudyInstanceUID="1.2.777777")
    client.post("/v1/predict?name=GEHEIM.dcm", content=secret)
    client.post("/v1/predict?name=GEHEIM.dcm", content=secret[:2000])
    client.get("/dicom-web/studies?PatientName=GEHEIM")
    stow = b"--b\r\nContent-Type: application/dicom\r\n\r\n" + secret + b"\r\n--b--\r\n"
    kept = client.post("/dicom-web/studies", content=stow, headers={"content-type": 'multipart/related; type="application/dicom"; boundary=b'})
    assert kept.status_code == 200 and client.get("/dicom-web/studies?PatientName=GEHEIM*").status_code == 200        # it is here, and found
    client.get("/dicom-web/studies/1.2.777777/metadata")
    client.post("/v1/jobs?name=GEHEIM.dcm", content=secret)
    client.get("/v1/GEHEIM")
    httpx.post(f"{service.base}/review/login", data={"name": "GEHEIM", "secret": "GEHEIM^NAME 777777"})
    audit = Path(service.settings.store, "audit.jsonl").read_text()
    for text in (client.get("/metrics").text, "".join(service.log), audit):
        assert "GEHEIM" not in text and "777777" not in text
    assert '"predict:run"' in audit


# ---- attackers -----------------------------------------------------------------------------------------------------------------
def test_keys_roles_and_expiry(service):
    cases = {"": 401, "Bearer wrong": 401, "Basic YTpi": 401, f"Bearer {service.key[:-1]}": 401, "Bearer " + "x" * 9000: 401}
    for value, status in cases.items():
        assert is_problem(httpx.post(f"{service.base}/v1/predict", content=PNG, headers={"authorization": value} if value else {}), status)
    with service.client(service.new_key("viewer")) as viewer:
        assert is_problem(viewer.post("/v1/predict", content=PNG), 403) and is_problem(viewer.get("/metrics"), 403) and viewer.get("/v1/bundles").status_code == 200
    short = service.new_key("clinician", days=1.0 / 86400)
    with service.client(short) as client:
        assert client.post("/v1/predict", content=PNG).status_code == 200
        time.sleep(1.1)
        assert is_problem(client.post("/v1/predict", content=PNG), 401)


def test_every_route_asks_for_a_key(service, client):
    paths = client.get("/openapi.json").json()["paths"]
    got = [(path, method) for path, methods in paths.items() for method in methods if httpx.request(method, service.base + re.sub(r"\{\w+\}", "1", path)).status_code not in (401, 429)]
    assert sorted(path for path, _ in got) == ["/healthz", "/readyz"]


HEAD = b"POST /v1/predict HTTP/1.1\r\nhost: x\r\nauthorization: Bearer %s\r\n"


def test_ten_gigabytes_are_refused_before_they_come(service):
    start = time.monotonic()
    said = service.knock(HEAD % service.key.encode() + b"content-length: 10000000000\r\n\r\n")
    assert said.startswith(b"HTTP/1.1 413") and time.monotonic() - start < 2
    endless = service.knock(HEAD % service.key.encode() + b"transfer-encoding: chunked\r\n\r\n", *[b"100000\r\n" + bytes(1 << 20) + b"\r\n"] * 40)
    assert endless.startswith(b"HTTP/1.1 413") or endless == b""
    assert service.alive(PNG)


@pytest.mark.parametrize("pieces", [[b"POST /v1/pre", b"d"], [b""], [b"GET / HTTP/1.1\r\n", b"a: b\r\n", b"c: d\r\n"]])
def test_slow_headers_end_in_time(service, pieces):
    start = time.monotonic()
    said = service.knock(*pieces, pause=0.3)
    assert said.startswith(b"HTTP/1.1 408") and time.monotonic() - start < 5


def test_slow_bodies_end_in_time(service):
    start = time.monotonic()
    said = service.knock(HEAD % service.key.encode() + b"content-length: 1000\r\n\r\n", b"a", b"b", pause=0.3)
    assert said.startswith(b"HTTP/1.1 408") and time.monotonic() - start < 6


def test_fifty_slow_connections_hinder_nobody(service):
    import socket
    held = [socket.create_connection(("127.0.0.1", service.port)) for _ in range(50)]
    for s in held:
        s.sendall(b"POST /v1/predict HT")
    assert service.alive(PNG)
    for s in held:
        s.close()


def test_headers_without_end(service):
    said = service.knock(b"GET /healthz HTTP/1.1\r\nhost: x\r\n", *[b"a: " + b"x" * 1000 + b"\r\n"] * 100)
    assert said.startswith(b"HTTP/1.1 431") or said == b""
    for raw in (b"\x16\x03\x01\x02\x00\x01\x00", b"GET / HTTP/9.9\r\n\r\n", b"\r\n" * 50, b"GET /%ZZ%00 HTTP/1.1\r\nhost: x\r\n\r\n"):
        service.knock(raw)
    assert service.alive(PNG)


TWO_WAYS = {"two lengths": (b"content-length: 3\r\ncontent-length: 5\r\n", b"abcde"), "length and chunks": (b"content-length: 4\r\ntransfer-encoding: chunked\r\n", b"0\r\n\r\n"),
            "chunks and length": (b"transfer-encoding: chunked\r\ncontent-length: 4\r\n", b"0\r\n\r\n"), "unknown coding": (b"transfer-encoding: xchunked\r\n", b"0\r\n\r\n"),
            "space before the colon": (b"transfer-encoding : chunked\r\n", b"0\r\n\r\n"), "a sign": (b"content-length: +5\r\n", b"abcde"),
            "a folded line": (b"x-a: b\r\n content-length: 0\r\n", b""), "a chunk beyond 64 bits": (b"transfer-encoding: chunked\r\n", b"f" * 18 + b"\r\nabc\r\n0\r\n\r\n")}


@pytest.mark.parametrize("what", TWO_WAYS)
def test_a_request_is_read_in_one_way_or_not_at_all(service, what):
    """Each could end at two places; a second request is hidden behind it, which must never be answered."""
    fields, body = TWO_WAYS[what]
    hidden = b"GET /metrics HTTP/1.1\r\nhost: x\r\nauthorization: Bearer " + service.key.encode() + b"\r\n\r\n"
    said = service.knock(HEAD % service.key.encode() + fields + b"\r\n" + body + hidden, pause=0.2)
    assert re.match(rb"HTTP/1.1 4\d\d ", said) and b"medimg_requests" not in said and said.count(b"HTTP/1.1 ") == 1, said[:300]
    bare = service.knock((b"GET /metrics HTTP/1.1\r\nhost: x\r\nauthorization: Bearer " + service.key.encode() + b"\r\n\r\n").replace(b"\r\n", b"\n"))
    assert b"medimg_requests" not in bare and service.alive(PNG)


@pytest.mark.parametrize("path", ["/../../etc/passwd", "/v1/%2e%2e/%2e%2e/etc/passwd", "/dicom-web/studies/..%2f..%2fetc", "/dicom-web/studies/1.2/../../..", "//etc/passwd", "/v1/results/..%2f1"])
def test_paths_lead_nowhere(service, path):
    said = service.knock(b"GET " + path.encode() + b" HTTP/1.1\r\nhost: x\r\nconnection: close\r\nauthorization: Bearer " + service.key.encode() + b"\r\n\r\n")
    assert re.match(rb"HTTP/1.1 (400|404|405|422) ", said) and b"root:" not in said


def test_security_headers_on_every_answer(service, client):
    for answer in (client.post("/v1/predict", content=PNG), client.get("/v1/bundles"), client.get("/nowhere"), httpx.get(f"{service.base}/v1/jobs")):
        assert answer.headers["x-content-type-options"] == "nosniff" and "default-src 'none'" in answer.headers["content-security-policy"]
        assert answer.headers["cache-control"] == "no-store" and "server" not in answer.headers


def test_a_forged_address_is_not_believed(bundle, tmp_path):
    far = Running(tmp_path, bundle=bundle.path, decoders=1, peers=("127.0.0.1",))
    try:
        with far.client() as client:
            assert client.post("/v1/predict", content=PNG, headers={"x-forwarded-for": "192.0.2.1"}).status_code == 200
        assert httpx.get(far.base + "/healthz", headers={"x-forwarded-for": "192.0.2.1"}).status_code == 200
    finally:
        far.stop()


@pytest.mark.parametrize("settings", [{"host": "0.0.0.0"}, {"host": "::", "expose": True}, {"host": "0.0.0.0", "expose": True, "behind_proxy": True}])
def test_it_does_not_open_itself_to_others(settings, tmp_path):
    from medimg.deployment.service import serve
    from medimg.deployment.settings import ServiceSettings
    with pytest.raises(ConfigError):
        serve(ServiceSettings(store=str(tmp_path), **settings))


def test_schemathesis_finds_no_fault(service):
    done = subprocess.run([Path(sys.executable).with_name("schemathesis"), "run", f"{service.base}/openapi.json", "-H", f"Authorization: Bearer {service.key}", "--seed", "1", "-n", "12",
                           "--checks", "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance,ignored_auth",
                           "--exclude-path", "/v1/jobs/{number}/events", "--exclude-operation-id-regex", "^store_",      # it cannot write multipart/related
                           "--request-timeout", "20", "--no-color", "--generation-database", "none"],
                          capture_output=True, text=True, timeout=240, env={**os.environ, "PYTHONWARNINGS": "ignore"})
    assert done.returncode == 0, done.stdout[-6000:]
    assert service.alive(PNG)


# ---- overload and end ----------------------------------------------------------------------------------------------------------
async def flood(base, key, clients, each, body):
    async with httpx.AsyncClient(base_url=base, headers={"authorization": f"Bearer {key}"}, timeout=60, limits=httpx.Limits(max_connections=clients)) as client:
        async def one():
            return [(await client.post("/v1/predict", content=body)).status_code for _ in range(each)]
        rows = await asyncio.gather(*(one() for _ in range(clients)))
    return [status for row in rows for status in row]


def test_under_overload_only_200_and_429(bundle, tmp_path):
    small = Running(tmp_path, bundle=bundle.path, queue=8, decoders=1)
    try:
        statuses = asyncio.run(flood(small.base, small.key, 80, 5, PNG))
        assert set(statuses) == {200, 429} and statuses.count(200) >= 8
        with small.client() as client:
            assert 'medimg_requests_in_flight 0' in client.get("/metrics").text and small.alive(PNG)
        lines = refusals(small)                     # those of one moment share one
        assert sum(e["count"] for e in lines) == statuses.count(429) > len(lines)
    finally:
        assert small.stop() == 0


def test_who_finds_no_place_is_told_so_before_the_body_is_here_and_found_in_the_log(bundle, tmp_path):
    small = Running(tmp_path, bundle=bundle.path, queue=4, decoders=1)
    try:
        with contextlib.ExitStack() as stack:
            for _ in range(4):          # four who were let in and do not go on
                slow = stack.enter_context(socket.create_connection(("127.0.0.1", small.port), timeout=10))
                slow.sendall(asked(small.key, PNG)[:-10])
            wait_for(lambda: "medimg_requests_in_flight 4" in httpx.get(small.base + "/metrics", headers={"authorization": f"Bearer {small.key}"}).text)
            crowd = [stack.enter_context(socket.create_connection(("127.0.0.1", small.port), timeout=10)) for _ in range(40)]
            for k, one in enumerate(crowd):
                one.sendall(asked(small.key, PNG)[:-5 if k == 0 else None])       # the first is refused before its body is here
            said = [whole(one) for one in crowd]
            crowd[0].sendall(PNG[-5:] + asked(small.key, b"no picture"))            # what was still to come is not taken for a request
            assert whole(crowd[0])[0] == 429
        assert {status for status, *_ in said} == {429} and {headers["retry-after"] for _, headers, _ in said} == {"1"}
        assert all(json.loads(body)["request_id"] == headers["x-request-id"] for _, headers, body in said)
        refused = refusals(small)
        assert sum(e["count"] for e in refused) == 41 and all(e["reason"] == "overloaded" and e["actor"] == "local" for e in refused)
        assert {e["request"] for e in refused} >= {headers["x-request-id"] for _, headers, _ in said}
        wait_for(lambda: small.alive(PNG))
    finally:
        assert small.stop() == 0


def refusals(running):
    lines = [{"count": 1} | json.loads(line)["e"] for line in (running.settings.folder / "audit.jsonl").read_text().splitlines()]
    return [e for e in lines if e.get("status") == 429]


def asked(key, body):
    return f"POST /v1/predict HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {key}\r\ncontent-length: {len(body)}\r\n\r\n".encode() + body


def whole(connection):
    """One answer from a connection: status, headers, body."""
    data = b""
    while b"\r\n\r\n" not in data:
        data += connection.recv(65536)
    head, _, body = data.partition(b"\r\n\r\n")
    first, *rows = head.decode().split("\r\n")
    headers = dict(row.lower().split(": ", 1) for row in rows)
    while len(body) < int(headers["content-length"]):
        body += connection.recv(65536)
    return int(first.split()[1]), headers, body


def wait_for(true, seconds=10):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "not in time"
        time.sleep(0.05)


def test_what_was_accepted_is_answered_after_sigterm(bundle, tmp_path):
    running, found = Running(tmp_path, bundle=bundle.path, decoders=1), {}
    files = [("file", (f"{i}.png", PNG)) for i in range(400)]

    def ask():
        with running.client() as client:
            found["answer"] = client.post("/v1/predict", files=files)
    thread = threading.Thread(target=ask)
    thread.start()
    deadline = time.monotonic() + 20
    with running.client() as watcher:
        while "medimg_requests_in_flight 1" not in watcher.get("/metrics").text and time.monotonic() < deadline:
            pass
    running.process.send_signal(signal.SIGTERM)
    thread.join()
    assert found["answer"].status_code == 200 and len(found["answer"].json()["predictions"]) == 400
    assert running.process.wait(20) == 0
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{running.base}/healthz")


def children(pid):
    return [int(c) for task in os.listdir(f"/proc/{pid}/task") for c in Path(f"/proc/{pid}/task/{task}/children").read_text().split()]


@pytest.mark.skipif(not Path("/proc").exists(), reason="needs /proc")
def test_killed_decoders_are_replaced(service, client):
    before = children(service.process.pid)
    for pid in before:
        os.kill(pid, signal.SIGKILL)
    answers = [client.post("/v1/predict", content=PNG) for _ in range(8)]
    assert {a.status_code for a in answers} <= {200, 422} and [a.status_code for a in answers].count(422) <= len(before)
    assert service.alive(PNG) and set(children(service.process.pid)).isdisjoint(before)


def test_two_workers_count_together_and_a_dead_one_is_replaced(bundle, tmp_path):
    pair = Running(tmp_path, bundle=bundle.path, workers=2, decoders=1)
    try:
        statuses = asyncio.run(flood(pair.base, pair.key, 8, 5, PNG))
        with pair.client() as client:
            assert statuses == [200] * 40 and re.search(r'route="predict",status="200"\} 40\b', client.get("/metrics").text)
        workers = [pid for pid in children(pair.process.pid) if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]
        os.kill(workers[0], signal.SIGKILL)
        time.sleep(0.2)
        assert pair.alive(PNG)
    finally:
        assert pair.stop() == 0
