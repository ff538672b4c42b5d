"""Pictures that are read without a process of their own: the same values as by Pillow, and nothing else is read."""
import io
import json
import re
import time
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from running import Running

from medimg.deployment.decoders import load_bytes, plain_study


def by_pillow(image, **options):
    out = io.BytesIO()
    Image.fromarray(image).save(out, "PNG", **options)
    return out.getvalue()


def part(kind, body):
    return len(body).to_bytes(4, "big") + kind + body + zlib.crc32(kind + body).to_bytes(4, "big")


def png(x, y, rows, *, head=b"\x08\0\0\0\0", more=b"", packed=None, tail=b""):
    """A PNG of any rows, told as whatever we like."""
    packed = zlib.compress(rows) if packed is None else packed
    return b"\x89PNG\r\n\x1a\n" + part(b"IHDR", x.to_bytes(4, "big") + y.to_bytes(4, "big") + head) + more + part(b"IDAT", packed) + part(b"IEND", b"") + tail


def read(data, kind=".png"):
    found = plain_study(data, kind, "a")
    return None if found is None else found.image


@given(st.integers(0, 2 ** 32), st.integers(1, 40), st.integers(1, 40))
@settings(max_examples=300, deadline=None)
def test_any_rows_are_read_as_pillow_reads_them(seed, x, y):
    rows = np.random.default_rng(seed).integers(0, 256, (y, x + 1), dtype="uint8")
    rows[:, 0] %= 5                                     # the five kinds of PNG rows, at random
    data = png(x, y, rows.tobytes())
    assert np.array_equal(read(data), np.asarray(Image.open(io.BytesIO(data))))


@given(st.data())
@settings(max_examples=300, deadline=None)
def test_mutants_are_read_as_pillow_and_the_worker_read_them_or_not_at_all(tmp_path_factory, data):
    image = np.random.default_rng(data.draw(st.integers(0, 50))).integers(0, 256, (9, 11), dtype="uint8")
    body = bytearray(by_pillow(image))
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(body) - 1))
        body[at:at + data.draw(st.integers(0, 2))] = data.draw(st.binary(max_size=3))
    found = plain_study(bytes(body), ".png", "a")
    if found is not None:
        there = load_bytes(bytes(body), ".png", "a", tmp_path_factory.getbasetemp())[0][1]
        assert np.array_equal(found.image, np.asarray(Image.open(io.BytesIO(bytes(body))))) and np.array_equal(found.image, there.image) and found.warnings == there.warnings


ROWS = bytes(5 * 4)
BOMB = zlib.compress(bytes(1 << 25))
HOSTILE = {"16 bits": png(4, 4, bytes(36), head=b"\x10\0\0\0\0"), "colour": png(4, 4, bytes(52), head=b"\x08\2\0\0\0"), "palette": png(4, 4, ROWS, head=b"\x08\3\0\0\0"),
           "interlaced": png(4, 4, ROWS, head=b"\x08\0\0\0\1"), "too wide": png(1 << 31, 1, ROWS), "too large": png(65537, 1, bytes(65538)), "no pixels": png(0, 4, b""),
           "bomb": png(4, 4, ROWS, packed=BOMB), "row too few": png(4, 4, ROWS[:-5]), "byte too many": png(4, 4, ROWS + b"x"), "unknown rows": png(4, 4, b"\5" + ROWS[1:]),
           "garbage after the rows": png(4, 4, ROWS, packed=zlib.compress(ROWS) + b"x"), "cut stream": png(4, 4, ROWS, packed=zlib.compress(ROWS)[:-1]), "text": png(4, 4, ROWS, more=part(b"tEXt", b"a\0b")),
           "transparent": png(4, 4, ROWS, more=part(b"tRNS", b"\0\0")), "after the end": png(4, 4, ROWS, tail=b"x"), "two headers": png(4, 4, ROWS, more=part(b"IHDR", bytes(13))),
           "a part without end": png(4, 4, ROWS, more=b"\xff\xff\xff\xffIDAT"), "large": png(250, 250, np.random.default_rng(0).bytes(251 * 250)), "nothing": b"", "mark": b"\x89PNG\r\n\x1a\n"}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_is_not_plain_is_left_to_a_worker(name):
    assert read(png(4, 4, ROWS)) is not None and read(HOSTILE[name]) is None


def npy(array):
    out = io.BytesIO()
    np.save(out, array)
    return out.getvalue()


@given(st.integers(0, 2 ** 32), st.integers(1, 60), st.integers(1, 60))
@settings(max_examples=100, deadline=None)
def test_arrays_are_read_as_numpy_reads_them(tmp_path_factory, seed, y, x):
    data = npy(np.random.default_rng(seed).integers(0, 256, (y, x), dtype="uint8"))
    there = load_bytes(data, ".npy", "a", tmp_path_factory.mktemp("npy"))[0][1]
    here = plain_study(data, ".npy", "a")
    assert np.array_equal(here.image, there.image) and here.reasons == there.reasons


def test_only_the_plainest_arrays():
    plain = np.arange(64, dtype="uint8").reshape(8, 8)
    others = {"dark": npy(np.zeros((8, 8), "uint8")), "float": npy(plain.astype("f4")), "columns first": npy(np.asfortranarray(plain)), "colour": npy(np.zeros((4, 4, 3), "uint8")), "line": npy(plain.ravel()),
              "none": npy(np.zeros((0, 8), "uint8")), "cut": npy(plain)[:-1], "longer": npy(plain) + b"x", "larger than told": npy(plain).replace(b"(8, 8)", b"(8, 9)"),
              "programs": npy(np.array([{}], object)), "code": npy(plain).replace(b"'|u1'", b"exit( ")}
    assert read(npy(plain), ".npy") is not None and plain_study(others.pop("dark"), ".npy", "a").reasons
    assert [name for name, data in others.items() if read(data, ".npy") is not None] == []


# ---- the quick way of the service -----------------------------------------------------------------------------------------------
def exchange(service, *, headers="", body=b"", pieces=1):
    """Head and body of the answer to a request that is written by hand."""
    import socket
    head = f"POST /v1/predict HTTP/1.1\r\nHost: a\r\nContent-Length: {len(body)}\r\n{headers}\r\n".encode()
    with socket.create_connection(("127.0.0.1", service.port), timeout=20) as s:
        for piece in (head + body,) if pieces == 1 else (head, body):
            s.sendall(piece)
            time.sleep(0.05)
        got = b""
        while b"\r\n\r\n" not in got or len(got.partition(b"\r\n\r\n")[2]) < int(re.search(rb"content-length: (\d+)", got)[1]):
            got += s.recv(65536)
    return got.partition(b"\r\n\r\n")[::2]


def plainly(head, body):
    """An answer without what differs from request to request."""
    return re.sub(rb"(date|x-request-id): [^\r]*|content-length: \d+", b"", head), {k: v for k, v in json.loads(body).items() if k not in ("created", "duration_ms", "request_id")}


@pytest.fixture(scope="module")
def service(tmp_path_factory):
    running = Running(tmp_path_factory.mktemp("quick"), bundle="pneumonia", decoders=1)
    yield running
    assert running.stop() == 0 and "Traceback" not in "".join(running.log)


PICTURE = by_pillow(np.random.default_rng(3).integers(0, 256, (28, 28), dtype="uint8"))


@pytest.mark.parametrize("body", [PICTURE, PICTURE[:-1], b"", b"text", by_pillow(np.full((8, 8), 9, "uint8"))], ids=["picture", "cut", "nothing", "text", "small"])
def test_both_ways_say_the_same(service, body):
    key = f"Authorization: Bearer {service.key}\r\n"
    for headers in (key, key + "Content-Type: image/png\r\n", key + "Content-Type: image/jpeg\r\n", key + "Connection: close\r\n", "", "Authorization: Bearer wrong\r\n"):
        quick, usual = (plainly(*exchange(service, headers=headers, body=body, pieces=n)) for n in (1, 2))
        assert quick == usual, headers


def test_one_line_of_the_log_for_each_answer_and_before_it(service):
    key, seen = f"Authorization: Bearer {service.key}\r\n", []
    for pieces in (1, 2):
        head, _ = exchange(service, headers=key, body=PICTURE, pieces=pieces)
        request = re.search(rb"x-request-id: (\w+)", head)[1].decode()
        lines = [json.loads(line)["e"] for line in (service.settings.folder / "audit.jsonl").read_text().splitlines() if request in line]
        assert len(lines) == 1
        seen.append({k: v for k, v in lines[0].items() if k not in ("ms", "request")})
    assert seen[0] == seen[1] and seen[0]["outcome"] == "ok" and seen[0]["bundle"] == "pneumonia"


def test_requests_that_come_at_once_on_one_connection_are_answered_in_order(service):
    import socket
    one = f"POST /v1/predict HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {service.key}\r\nContent-Length: {len(PICTURE)}\r\n\r\n".encode() + PICTURE
    bad = f"POST /v1/predict HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {service.key}\r\nContent-Length: 1\r\n\r\nx".encode()
    with socket.create_connection(("127.0.0.1", service.port), timeout=20) as s:
        s.sendall(one + bad + one + bad.replace(b"Host: a", b"Host: a\r\nConnection: close"))
        got = b""
        while piece := s.recv(65536):
            got += piece
    assert re.findall(rb"HTTP/1.1 (\d+)", got) == [b"200", b"415", b"200", b"415"]


def test_nothing_stays_in_work(service):
    with service.client() as client:
        text = client.get("/metrics").text
    assert re.search(r"^medimg_requests_in_flight 0$", text, re.M) and re.search(r"^medimg_bytes_in_flight 0$", text, re.M)
