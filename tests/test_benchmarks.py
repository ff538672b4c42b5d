"""The service's benchmarks: what they ask for, how samples become stages, and a client that times accepted and refused answers apart."""
import asyncio
import importlib.util
import multiprocessing
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "benchmarks"))

import asker  # noqa: E402


def script(name):
    """A script of benchmarks/deployment as a module, without running it."""
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", ROOT / "benchmarks" / "deployment" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name, line, wanted", [
    ("service", [], {"seconds": 3, "audit": "before", "quick": False, "json": None}), ("service", ["--quick"], {"seconds": 1}), ("service", ["--quick", "--seconds", "2", "--json", "a.json"], {"seconds": 2, "json": Path("a.json")}),
    ("flame", [], {"svg": None, "side": 28, "clients": 8}), ("flame", ["--svg", "f.svg", "--side", "224"], {"svg": Path("f.svg"), "side": 224}),
    ("engines", [], {"repeats": 3}), ("engines", ["--quick"], {"repeats": 1})])
def test_arguments(name, line, wanted):
    given = vars(script(name).arguments(line))
    assert {key: given[key] for key in wanted} == wanted


@pytest.mark.parametrize("name, line", [("service", ["--audit", "never"]), ("flame", ["--side", "64"]), ("engines", ["--repeats", "two"])])
def test_wrong_arguments_end_the_script(name, line, capsys):
    with pytest.raises(SystemExit):
        script(name).arguments(line)
    assert "error" in capsys.readouterr().err


def test_shares_belong_to_the_innermost_frame_that_is_known():
    top = "process 1:\"python start.py\";serve (medimg/deployment/service.py:1);Runner.run (asyncio/runners.py:86)"
    lines = [f"{top};answer (medimg/deployment/predict.py:9);run_engine (medimg/deployment/engine.py:9);Session.run (onnxruntime/capi/x.py:1) 40",
             f"{top};answer (medimg/deployment/predict.py:9);_resize (medimg/data/preprocess.py:1);resize (numpy/x.py:3) 10",
             f"{top};Auditor._write (medimg/deployment/guard.py:9);submit (concurrent/futures/thread.py:1) 10", f"{top} 20",
             "process 2:\"python\";_worker (concurrent/futures/thread.py:69) 5", "main (elsewhere.py:1) 5", "work (medimg/deployment/decoders.py:2);read (medimg/data/pictures.py:1) 10", ""]
    found = script("flame").shares("\n".join(lines))
    assert found["samples"] == 100
    assert found["shares"] == {"graph": 0.4, "HTTP": 0.2, "audit": 0.1, "decode": 0.1, "preprocess": 0.1, "threads": 0.05, "other": 0.05, "answer": 0.0}


def test_no_py_spy_says_how_to_get_it(monkeypatch):
    flame = script("flame")
    monkeypatch.setattr(flame.shutil, "which", lambda *_, **__: None)
    with pytest.raises(SystemExit, match="pip install py-spy"):
        flame.recorder()


def test_percentiles_by_hand():
    assert [asker.percentile(list(range(100, 0, -1)), p) for p in (0.5, 0.99, 1)] == [50, 99, 100]
    found = [(200, 0, 0.010)] * 99 + [(200, 0, 0.5)] + [(429, 0, 0.001)] * 300 + [(0, 0, 0.0)]
    rows = asker.summary(found, 2)
    assert rows["statuses"] == {"0": 1, "200": 100, "429": 300} and rows["accepted"] == {"n": 100, "per_s": 50, "p50_ms": 10, "p99_ms": 10} and rows["refused"]["p99_ms"] == 1


class _Slow(asker._Reader):
    """Every third request is accepted after 30 ms, the others are refused at once, the tenth loses its connection."""

    count = 0

    def connection_made(self, transport):
        self.transport = transport

    def whole(self, message):
        _Slow.count += 1
        if _Slow.count == 10:
            self.transport.close()
        elif _Slow.count % 3:
            self.transport.write(b"HTTP/1.1 429 Too Many Requests\r\nContent-Length: 4\r\n\r\nbusy")
        else:
            answer = b"HTTP/1.1 200 OK\r\ncontent-length: 7\r\n\r\n"
            self.transport.write(answer)                # the head alone is no answer yet
            asyncio.get_running_loop().call_later(0.03, self.transport.write, b"correct")


async def _listen(pipe):
    server = await asyncio.get_running_loop().create_server(_Slow, "127.0.0.1", 0)
    pipe.send(server.sockets[0].getsockname()[1])
    await server.serve_forever()


def _server(pipe):
    asyncio.run(_listen(pipe))


def test_client_times_accepted_apart_and_keeps_its_rate():
    mine, theirs = multiprocessing.get_context("spawn").Pipe()
    server = multiprocessing.get_context("spawn").Process(target=_server, args=(theirs,), daemon=True)
    server.start()
    try:
        start, port = time.monotonic(), mine.recv()
        found = asker.ask(port, b"picture", kind="image/png", clients=4, seconds=1, rate=60)
    finally:
        server.kill()
        server.join()
    assert set(found["statuses"]) <= {"0", "200", "429"} and found["asked_per_s"] <= 75 and time.monotonic() - start < 60
    assert found["accepted"]["n"] > 3 and found["accepted"]["p50_ms"] >= 29 and found["refused"]["n"] > found["accepted"]["n"] and found["refused"]["p50_ms"] < found["accepted"]["p50_ms"]
