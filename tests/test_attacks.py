"""What a penetration tester with a clinician's key tried, and what must hold against it."""
import os
import re
import socket
import subprocess
import threading
import time
from pathlib import Path

import httpx
import pytest
from pydicom.data import get_testdata_file
from running import Running

from medimg.deployment.bundle import toy_bundle, toy_images
from medimg.deployment.sessions import Users
from medimg.plots import png_bytes

PNG = png_bytes(toy_images(2, seed=5)[0][1])
CT = Path(get_testdata_file("CT_small.dcm")).read_bytes()
FORM = {"content-type": 'multipart/related; type="application/dicom"; boundary=b'}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return toy_bundle(tmp_path_factory.mktemp("bundle") / "toy")


def memory_mb(process):
    """Resident memory of a process."""
    return int(Path(f"/proc/{process.pid}/status").read_text().split("VmRSS:")[1].split()[0]) >> 10


def part(data):
    return b"--b\r\nContent-Type: application/dicom\r\n\r\n" + data + b"\r\n--b--\r\n"


def with_items(n):
    """The CT with a sequence of so many empty items, which a reader in Python walks one by one."""
    k = CT.index(b"\x10\x00\x10\x00PN")
    return CT[:k] + b"\x08\x00\x15\x11SQ\x00\x00\xff\xff\xff\xff" + b"\xfe\xff\x00\xe0\0\0\0\0" * n + b"\xfe\xff\xdd\xe0\0\0\0\0" + CT[k:]


def test_bodies_of_unstated_length_count_too(bundle, tmp_path):
    """Sixteen bodies of 30 MB in chunks, never ended, where 64 MB may be in memory: most are told to wait, and memory stays where it should."""
    running = Running(tmp_path, bundle=bundle.path, max_body_mb=32, max_memory_mb=64, body_s=20.0)
    head = f"POST /v1/predict HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {running.key}\r\nTransfer-Encoding: chunked\r\n\r\n".encode()
    piece, refused, sockets = b"%x\r\n" % (1 << 20) + bytes(1 << 20) + b"\r\n", 0, []
    try:
        for _ in range(16):
            s = socket.create_connection(("127.0.0.1", running.port), timeout=5)
            sockets.append(s)
            try:
                s.sendall(head)
                for _ in range(30):
                    s.sendall(piece)
                s.settimeout(0.2)
                refused += b" 429 " in s.recv(100)
            except TimeoutError:
                pass
            except OSError:
                refused += 1
        assert refused >= 13 and memory_mb(running.process) < 700
        for s in sockets:
            s.close()
        time.sleep(0.5)
        assert running.alive(PNG)
        with running.client() as client:
            assert client.post("/v1/predict", content=iter([PNG[:100], PNG[100:]])).status_code == 200          # a small one in chunks
    finally:
        assert running.stop() == 0


def test_slow_headers_brought_by_stow_keep_nobody_waiting(bundle, tmp_path):
    """Twelve instances at once, whose headers take seconds each, while others ask for answers."""
    running = Running(tmp_path, bundle=bundle.path)
    data, slowest = with_items(60_000), []

    def bring():
        with running.client() as client:
            client.post("/dicom-web/studies", content=part(data), headers=FORM, timeout=120)
    senders = [threading.Thread(target=bring) for _ in range(12)]
    try:
        for sender in senders:
            sender.start()
        time.sleep(1)
        with running.client() as client:
            for _ in range(5):
                start = time.monotonic()
                assert client.post("/v1/predict", content=PNG).status_code == 200
                slowest.append(time.monotonic() - start)
        assert any(sender.is_alive() for sender in senders), "the bodies were too quick to show anything"
        assert max(slowest) < 4
    finally:
        for sender in senders:
            sender.join()
        assert running.stop() == 0


def test_the_brake_knows_who_is_behind_the_proxy(bundle, tmp_path):
    """Somebody guesses passwords through the proxy; a colleague behind the same proxy signs in at once. Without named proxies the header is not believed."""
    Users(tmp_path / "users.json").add("dr.wu", "drei Rehe am Waldrand", "clinician")
    for folder, proxies, blocked in (("named", ("127.0.0.1",), False), ("unnamed", (), True)):
        (tmp_path / folder).mkdir()
        running = Running(tmp_path / folder, bundle=bundle.path, users=str(tmp_path / "users.json"), behind_proxy=True, proxies=proxies)
        try:
            def login(name, password, address):
                return httpx.post(f"{running.base}/review/login", data={"name": name, "secret": password}, headers={"x-forwarded-for": address}, timeout=30).status_code
            for i in range(21):
                login(f"guess{i}", "wrong password, long", f"1.1.1.{i}, 10.0.0.66")         # what the guesser wrote, then what the proxy saw
            assert (login("dr.wu", "drei Rehe am Waldrand", "10.0.0.7") == 401) is blocked
            assert login("dr.wu", "drei Rehe am Waldrand", "9.9.9.9, 10.0.0.66") == 401    # the guesser's address waits, whatever it writes before it
        finally:
            assert running.stop() == 0
        assert ("name it in proxies" in "".join(running.log)) is blocked


def cpu_s(process):
    """Seconds of processor time that a process has used."""
    row = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(row[11]) + int(row[12])) / os.sysconf("SC_CLK_TCK")


@pytest.mark.skipif(not Path("/proc").exists(), reason="needs /proc")
def test_a_header_brought_by_stow_can_kill_a_decoder_and_nothing_else(bundle, tmp_path):
    """Between two good instances one whose header takes longer than a decoder is given: it is refused with a reason, they are kept, and the service itself has read none of them."""
    import io

    import pydicom
    other = pydicom.dcmread(io.BytesIO(CT))
    other.SOPInstanceUID = other.file_meta.MediaStorageSOPInstanceUID = "1.2.3"
    other.save_as(out := io.BytesIO())
    running = Running(tmp_path, bundle=bundle.path, decode_s=1.5)
    body = b"".join(b"--b\r\nContent-Type: application/dicom\r\n\r\n" + data + b"\r\n" for data in (CT, with_items(400_000), out.getvalue())) + b"--b--\r\n"
    try:
        before = cpu_s(running.process)
        with running.client() as client:
            answer = client.post("/dicom-web/studies", content=body, headers=FORM, timeout=60)
            said = answer.json()
            assert answer.status_code == 202 and len(said["00081199"]["Value"]) == 2
            assert [item["00081197"]["Value"] for item in said["0008119A"]["Value"]] == [[0x0110]] and "00081198" not in said
            assert cpu_s(running.process) - before < 1 and len(client.get("/dicom-web/instances").json()) == 2
            again = client.post("/dicom-web/studies/9.9", content=body, headers=FORM, timeout=60).json()       # what can be named is named
            assert [[item["00081155"]["Value"][0], item["00081197"]["Value"][0]] for item in again["00081198"]["Value"]] == [[str(pydicom.dcmread(io.BytesIO(CT)).SOPInstanceUID), 0xA900], ["1.2.3", 0xA900]]
        assert running.alive(PNG)
    finally:
        assert running.stop() == 0


PASSWORD = "drei Rehe am Waldrand"


def form_of(text):
    return {"csrf": text.split('name="csrf" value="')[1].split('"')[0]}


@pytest.mark.parametrize(("settings", "own", "secure"), [({"behind_proxy": True, "public_url": "https://pacs.example/"}, "https://pacs.example", True),
                                                         ({"public_url": "http://pacs.example:8080"}, "http://pacs.example:8080", False)])
def test_a_browser_signs_in_through_nginx_as_it_comes(bundle, tmp_path, settings, own, secure):
    """`proxy_pass` and no further line: Host is the address behind the proxy, HTTP 1.0, the connection ends; all else is the browser's. Only the stated address may send forms."""
    Users(tmp_path / "users.json").add("dr.wu", PASSWORD, "clinician")
    running = Running(tmp_path, bundle=bundle.path, decoders=1, users=str(tmp_path / "users.json"), **settings)
    nginx = {"host": f"127.0.0.1:{running.port}", "connection": "close", "origin": own, "sec-fetch-site": "same-origin"}
    try:
        def post(path, data, **headers):
            return httpx.post(running.base + path, data=data, headers={**nginx, **headers}, timeout=30)
        form = {"name": "dr.wu", "secret": PASSWORD}
        for foreign in ({"origin": "https://evil.example"}, {"origin": own.replace("pacs", "evil.pacs")}, {"sec-fetch-site": "cross-site"}, {"origin": "null", "sec-fetch-site": "cross-site"}):
            assert post("/review/login", form, **foreign).status_code == 403, foreign
        answer = post("/review/login", form)
        cookie = answer.headers["set-cookie"]
        assert answer.status_code == 303 and answer.headers["location"] == "/review/" and ("; Secure" in cookie) is cookie.startswith("__Host-medimg=") is secure
        assert ("strict-transport-security" in answer.headers) is secure
        sent = {"cookie": cookie.partition(";")[0]}
        page = httpx.get(f"{running.base}/review/", headers={**nginx, **sent})
        assert post("/review/logout", form_of(page.text), **sent, origin="https://evil.example").status_code == 403
        assert post("/review/logout", form_of(page.text), **sent).status_code == 303
        planted = {"cookie": f"{sent['cookie']}; {sent['cookie'].partition('=')[0]}={'A' * 43}"}
        assert httpx.get(f"{running.base}/review/", headers={**nginx, **planted}).status_code == 303        # two of one name: one was planted
        old = running.knock(f"GET /dicom-web/studies HTTP/1.0\r\nHost: 127.0.0.1:{running.port}\r\nConnection: close\r\nAuthorization: Bearer {running.key}\r\n\r\n".encode())
        assert old.startswith(b"HTTP/1.1 204")
    finally:
        assert running.stop() == 0


def test_browsers_come_back_over_tls_only_where_there_is_tls(bundle, tmp_path):
    """HSTS on every answer of a service with a certificate, on the quick way and on refusals too, and never over plain HTTP."""
    old = os.umask(0o077)
    subprocess.run(["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2", "-subj", "/CN=127.0.0.1", "-keyout", tmp_path / "k.pem", "-out",
                    tmp_path / "c.pem"], check=True, capture_output=True)
    os.umask(old)
    for folder, settings, told in (("tls", {"tls_cert": str(tmp_path / "c.pem"), "tls_key": str(tmp_path / "k.pem")}, "max-age=31536000"), ("plain", {}, None), ("proxy", {"behind_proxy": True}, None)):
        (tmp_path / folder).mkdir()
        running = Running(tmp_path / folder, bundle=bundle.path, decoders=1, **settings)
        try:
            with running.client() as client:
                answers = [client.post("/v1/predict", content=PNG), client.post("/v1/predict?name=a.png", content=PNG), client.get("/review/login"), client.get("/nowhere"), client.get("/v1/results/1"),
                           client.get("/healthz", headers={"authorization": ""})]
            assert [a.headers.get("strict-transport-security") for a in answers] == [told] * 6
        finally:
            assert running.stop() == 0


def test_broken_uploads_leave_nothing_in_memory(bundle, tmp_path):
    """Sixty senders leave after 20 MB: their bodies are let go at once."""
    running = Running(tmp_path, bundle=bundle.path, max_body_mb=64)
    head = f"POST /v1/predict HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {running.key}\r\nContent-Length: {30 << 20}\r\n\r\n".encode()
    try:
        for _ in range(60):
            with socket.create_connection(("127.0.0.1", running.port), timeout=5) as s:
                s.sendall(head)
                s.sendall(bytes(20 << 20))
            time.sleep(0.02)
        time.sleep(0.5)
        assert memory_mb(running.process) < 500
    finally:
        assert running.stop() == 0


def test_a_refusal_that_cannot_be_logged_is_no_fault(bundle, tmp_path):
    """The disk of the log is full while FastAPI refuses something: 503, as for everything else then, and no fault of ours."""
    from starlette.testclient import TestClient

    from medimg.deployment.audit import AuditError
    from medimg.deployment.service import create_app
    from medimg.deployment.settings import ServiceSettings
    settings = ServiceSettings(store=str(tmp_path / "store"), bundles=(str(bundle.path),), allow_unsigned=True, decoders=1)
    app = create_app(settings)
    key = {"authorization": "Bearer " + app.state.guard.ring.create("a", "admin")}
    with TestClient(app, client=("127.0.0.1", 1)) as client:
        assert client.get("/v1/results/no-number", headers=key).status_code == 400

        async def full(event):
            raise AuditError("the audit log cannot be written: No space left on device")
        app.state.auditor.record = full
        for path in ("/v1/results/no-number", "/v1/results", "/v1/jobs/none"):
            assert client.get(path, headers=key).status_code == 503, path


# ---- connections ---------------------------------------------------------------------------------------------------------------
def ended(s, seconds=0.05):
    """Whether the other side has closed the connection, or does within so many seconds."""
    s.settimeout(seconds)
    try:
        while s.recv(65536):
            pass
        return True
    except TimeoutError:
        return False
    except OSError:
        return True


def test_silent_connections_shut_nobody_out(bundle, tmp_path):
    """Sixty connections that say nothing where twenty may be: the latest stay, and an honest client is answered at once; connections at work are never closed for a newcomer."""
    running = Running(tmp_path, bundle=bundle.path, decoders=1, connections=20, header_s=20.0, body_s=30.0)
    silent = []
    try:
        with running.client() as old:
            assert old.post("/v1/predict", content=PNG).status_code == 200          # stays open, and idle
            for _ in range(60):
                silent.append(socket.create_connection(("127.0.0.1", running.port), timeout=5))
            start = time.monotonic()
            assert running.alive(PNG) and time.monotonic() - start < 3
            assert old.post("/v1/predict", content=PNG).status_code == 200          # its connection made room, so it took another
        time.sleep(0.2)
        assert 20 <= sum(not ended(s) for s in silent) + 2 <= 22
        for s in silent:
            s.close()
        head = f"POST /v1/predict HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {running.key}\r\nContent-Length: {len(PNG)}\r\n\r\n".encode()
        at_work = []
        for _ in range(20):
            at_work.append(socket.create_connection(("127.0.0.1", running.port), timeout=5))
            at_work[-1].sendall(head + PNG[:10])
        time.sleep(0.3)
        with socket.create_connection(("127.0.0.1", running.port), timeout=5) as s:
            assert ended(s, 2)                                                      # all are at work
        for s in at_work:
            s.sendall(PNG[10:])
            assert s.recv(100).startswith(b"HTTP/1.1 200")
        assert running.alive(PNG)
    finally:
        assert running.stop() == 0


@pytest.fixture
def bare():
    """uvicorn with our protocol and the smallest application; limits are set back afterwards."""
    import uvicorn

    from medimg.deployment import front

    async def hello(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
        await send({"type": "http.response.body", "body": b"ok"})
    before = dict(front.LIMITS)
    server = uvicorn.Server(uvicorn.Config(hello, port=0, http=front.Protocol, log_level="critical", lifespan="off"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.02)
    yield front.LIMITS, server.servers[0].sockets[0].getsockname()[1]
    server.should_exit = True
    thread.join(10)
    front.LIMITS.update(before)


def test_one_address_takes_no_more_than_its_share(bare):
    """127.0.0.2 opens forty where five are allowed; its newcomers are answered, and 127.0.0.1, a proxy of ours, has no limit."""
    from medimg.deployment.gate import Peers
    limits, port = bare
    limits.update(per_peer=5, exempt=Peers(["127.0.0.1"]))

    def open_from(address):
        s = socket.create_connection(("127.0.0.1", port), timeout=5, source_address=(address, 0))
        time.sleep(0.005)
        return s
    many, near, other = [open_from("127.0.0.2") for _ in range(40)], [open_from("127.0.0.1") for _ in range(40)], open_from("127.0.0.3")
    time.sleep(0.2)
    assert [ended(s, 0.01) for s in many] == [True] * 35 + [False] * 5
    assert not any(ended(s, 0.01) for s in (*near, other))
    for s in (open_from("127.0.0.2"), many[-1], other, near[0]):
        s.sendall(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
        s.settimeout(5)
        assert s.recv(100).startswith(b"HTTP/1.1 200")
    for s in (*many, *near, other):
        s.close()


@pytest.mark.parametrize("rest", [[], [b"x"], [b"x"] * 3, [b"x" * 1000]])
def test_the_body_of_a_refused_request_is_not_waited_for(bundle, tmp_path, rest):
    """Without a key the answer is 401 before the body is here. Whether the rest comes never, in drops or whole: the connection does not stay."""
    running = Running(tmp_path, bundle=bundle.path, decoders=1, header_s=1.0)
    try:
        with socket.create_connection(("127.0.0.1", running.port), timeout=5) as s:
            s.sendall(b"POST /v1/predict HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n")
            assert s.recv(100).startswith(b"HTTP/1.1 401")
            for piece in rest:
                time.sleep(0.2)
                s.sendall(piece)
            start = time.monotonic()
            assert ended(s, 5) and time.monotonic() - start < 3
    finally:
        assert running.stop() == 0


# ---- event streams -------------------------------------------------------------------------------------------------------------
@pytest.mark.skipif(not Path("/proc").exists(), reason="needs /proc")
def test_two_hundred_streams_hinder_nobody_and_end_with_their_job(bundle, tmp_path):
    """A job in the queue of another process, watched two hundred times by one key: the next stream is refused, answers come as before, and with the job all streams end and their places are free."""
    from medimg.deployment.jobs import Jobs
    running = Running(tmp_path, bundle=bundle.path, decoders=1, streams=200)
    jobs, streams = Jobs(tmp_path / "store" / "jobs"), []
    number = jobs.submit(b"x", owner="local", bundle="toy")
    try:
        while jobs.get(number)["state"] in ("queued", "running"):
            time.sleep(0.05)
        jobs._run("UPDATE jobs SET state='running', pid=? WHERE id=?", os.getpid(), number)         # as if this process worked on it
        with running.client() as client:
            before = memory_mb(running.process)
            for _ in range(200):
                streams.append(socket.create_connection(("127.0.0.1", running.port), timeout=20))
                streams[-1].sendall(f"GET /v1/jobs/{number}/events HTTP/1.1\r\nHost: x\r\nConnection: close\r\nAuthorization: Bearer {running.key}\r\n\r\n".encode())
            heads = [s.recv(65536) for s in streams]
            assert all(head.startswith(b"HTTP/1.1 200") for head in heads)
            refused = client.get(f"/v1/jobs/{number}/events")
            assert refused.status_code == 429 and refused.json()["status"] == 429 and "retry-after" in refused.headers
            with running.client(running.new_key("admin")) as other, other.stream("GET", f"/v1/jobs/{number}/events") as stream:
                assert stream.status_code == 200                        # another key has places of its own
            slowest = 0.0
            for query in ("", "?name=a.png") * 5:
                start = time.monotonic()
                assert client.post(f"/v1/predict{query}", content=PNG).status_code == 200
                slowest = max(slowest, time.monotonic() - start)
            assert slowest < 2 and memory_mb(running.process) - before < 150
            jobs.finish(number, "done", records=[])
            for s in streams:
                said = b""
                while piece := s.recv(65536):
                    said += piece
                assert b"event: done" in said
            assert client.get(f"/v1/jobs/{number}/events").text.startswith("event: done")
    finally:
        assert running.stop() == 0


# ---- two readers of one stream -------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def service(bundle, tmp_path_factory):
    running = Running(tmp_path_factory.mktemp("service"), bundle=bundle.path, decoders=1, header_s=3.0, body_s=3.0)
    yield running
    assert running.stop() == 0
    assert "Traceback" not in "".join(running.log)


def said(running, *pieces, pause=0.1, quiet=0.7):
    """The statuses of all answers to some bytes sent as they are, whether a count of requests was told, and whether the connection ended."""
    with socket.create_connection(("127.0.0.1", running.port), timeout=5) as s:
        out = b""
        try:
            for piece in pieces:
                s.sendall(piece)
                time.sleep(pause)
            s.settimeout(quiet)
            while piece := s.recv(65536):
                out += piece
            closed = True
        except TimeoutError:
            closed = False
        except OSError:
            closed = True
    return [int(code) for code in re.findall(rb"HTTP/1\.1 (\d{3}) ", out)], b"medimg_requests_total" in out, closed


POST, CHUNKS = b"POST /v1/predict HTTP/1.1\r\nhost: x\r\n", b"transfer-encoding: chunked\r\n\r\n"
#: bytes before a hidden `GET /metrics` with a good key (`KEY` stands for the key's line) -> statuses of what comes before it, and whether the hidden one may be answered
STREAMS = {
    "two lengths": (POST + b"KEYcontent-length: 5\r\ncontent-length: 6\r\n\r\nabcde", [400], False),
    "the same length twice": (POST + b"KEYcontent-length: 5\r\ncontent-length: 5\r\n\r\nabcde", [400], False),
    "a list of lengths": (POST + b"KEYcontent-length: 5, 5\r\n\r\nabcde", [400], False),
    "a length of nothing": (POST + b"KEYcontent-length: \r\n\r\n", [400], False),
    "length and chunks": (POST + b"KEYcontent-length: 5\r\n" + CHUNKS + b"0\r\n\r\n", [400], False),
    "chunks and length": (POST + b"KEYtransfer-encoding: chunked\r\ncontent-length: 5\r\n\r\n0\r\n\r\n", [400], False),
    "chunks before another coding": (POST + b"KEYtransfer-encoding: chunked, identity\r\n\r\n0\r\n\r\n", [400], False),
    "a coding twice": (POST + b"KEYtransfer-encoding: chunked\r\ntransfer-encoding: identity\r\n\r\n0\r\n\r\n", [400], False),
    "a length behind the body": (POST + b"KEY" + CHUNKS + b"5\r\nabcde\r\n0\r\ncontent-length: 100\r\n\r\n", [400], False),
    "chunks with bare ends": (POST + b"KEY" + CHUNKS + b"5\nabcde\n0\n\n", [400], False),
    "a chunk longer than stated": (POST + b"KEY" + CHUNKS + b"5\r\nabcdeXX0\r\n\r\n", [400], False),
    "chunks in HTTP 1.0": (POST.replace(b"1.1", b"1.0") + b"KEY" + CHUNKS + b"5\r\nabcde\r\n0\r\n\r\n", [415], False),
    "a folded line": (b"GET /healthz HTTP/1.1\r\nhost: x\r\na: b\r\n c\r\n\r\n", [400], False),
    "a folded first line": (b"GET /healthz HTTP/1.1\r\n host: x\r\n\r\n", [400], False),
    "a bare line feed": (b"GET /healthz HTTP/1.1\r\nhost: x\na: b\r\n\r\n", [400], False),
    "a bare line feed at the end": (b"GET /healthz HTTP/1.1\r\nhost: x\r\n\n", [400], False),
    "a bare carriage return": (b"GET /healthz HTTP/1.1\r\nhost: x\r\na: b\rc: d\r\n\r\n", [400], False),
    "a zero byte": (b"GET /healthz HTTP/1.1\r\nhost: x\r\na: b\0c\r\n\r\n", [400], False),
    "no host": (b"GET /healthz HTTP/1.1\r\n\r\n", [400], False),
    "two hosts": (b"GET /healthz HTTP/1.1\r\nhost: x\r\nhost: y\r\n\r\n", [400], False),
    "a header of 100 kB": (b"GET /healthz HTTP/1.1\r\nhost: x\r\na: " + b"x" * 100_000 + b"\r\n\r\n", [431], False),
    "an address of 100 kB": (b"GET /healthz?" + b"x" * 100_000 + b" HTTP/1.1\r\nhost: x\r\n\r\n", [431], False),
    "a change of protocol": (b"GET /healthz HTTP/1.1\r\nhost: x\r\nconnection: upgrade\r\nupgrade: h2c\r\n\r\n", [200], False),
    "a change of protocol with a body": (POST + b"connection: upgrade\r\nupgrade: x\r\ncontent-length: 5\r\n\r\nabcde", [401], False),
    "a tunnel": (b"CONNECT x:80 HTTP/1.1\r\nhost: x\r\n\r\n", [400], False),
    "a request without a key": (b"GET /metrics HTTP/1.1\r\nhost: x\r\n\r\n", [401], True),
    "a body without a key": (POST + b"content-length: 5\r\n\r\nabcde", [401], True),
    "chunks without a key": (POST + CHUNKS + b"5\r\nabcde\r\n0\r\n\r\n", [401], True),
    "a body nobody reads": (b"GET /nowhere HTTP/1.1\r\nhost: x\r\nKEYcontent-length: 5\r\n\r\nabcde", [404], True),
    "a good one": (b"GET /healthz HTTP/1.1\r\nhost: x\r\n\r\n", [200], True)}


@pytest.mark.parametrize("what", STREAMS)
def test_what_stands_behind_a_request_is_read_as_one_reader_would(service, what):
    """RFC 9112: what could end at two places is refused with the whole connection; what is refused for another reason ends where it says, and the next request is judged for itself."""
    first, statuses, goes_on = STREAMS[what]
    key = b"authorization: Bearer " + service.key.encode() + b"\r\n"
    codes, told, closed = said(service, first.replace(b"KEY", key) + b"GET /metrics HTTP/1.1\r\nhost: x\r\n" + key + b"\r\n")
    assert codes == statuses + [200] * goes_on and told is goes_on and closed is not goes_on
    behind = b"GET /metrics HTTP/1.1\r\nhost: x\r\n\r\n"                                         # a refused stranger behind a good request stays one
    assert said(service, b"GET /metrics HTTP/1.1\r\nhost: x\r\n" + key + b"\r\n" + behind)[0] == [200, 401]


@pytest.mark.parametrize("path", ["/v1/predict", "/v1/predict?name=a.png"])
def test_a_field_behind_the_body_is_no_header(service, tmp_path, bundle, path):
    """A proxy sets the headers, and the guard reads them; a key or an address behind the body must count for nothing."""
    body = b"%x\r\n" % len(PNG) + PNG + b"\r\n0\r\n"
    key = b"authorization: Bearer " + service.key.encode() + b"\r\n"
    head = POST.replace(b"/v1/predict", path.encode())
    assert said(service, head + CHUNKS + body + key + b"\r\n")[0] == [401]
    assert said(service, head + key + CHUNKS + body + b"a: b\r\n\r\n")[0] == [200]
    proxied = Running(tmp_path, bundle=bundle.path, decoders=1, proxies=("127.0.0.1",), peers=("10.0.0.7", "127.0.0.1"))
    try:
        key = b"authorization: Bearer " + proxied.key.encode() + b"\r\nx-forwarded-for: 10.0.0.%d\r\n"
        assert said(proxied, head + key % 7 + CHUNKS + body + b"\r\n")[0] == [200]
        assert said(proxied, head + key % 8 + CHUNKS + body + b"x-forwarded-for: 10.0.0.7\r\n\r\n")[0] == [403]
    finally:
        assert proxied.stop() == 0


@pytest.mark.parametrize("key", [True, False])
@pytest.mark.parametrize("piece", [b"t: " + b"x" * 60_000 + b"\r\n", b"x" * 60_000])
def test_what_is_no_body_has_an_end(service, key, piece):
    """Fields without end behind a body, or one field without end: 40 MB of them do not stay in memory, nor does the connection."""
    head = POST + (b"authorization: Bearer " + service.key.encode() + b"\r\n" if key else b"") + CHUNKS + b"5\r\nabcde\r\n0\r\n" + (b"" if piece[:1] == b"t" else b"t: ")
    before = memory_mb(service.process)
    codes, _, closed = said(service, head, *[piece] * 700, pause=0.001)
    assert closed and codes in ([], [401], [431], [401, 431], [415, 431]) and memory_mb(service.process) - before < 15
    assert service.alive(PNG)
