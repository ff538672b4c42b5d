"""Ask a service from many connections, at once again or at a rate, and time accepted and refused answers apart: shared by the scripts below deployment/.

wrk's percentiles mix all statuses. This client is one process with one event loop (uvloop) and raw sockets; a request is timed from before its first byte is handed to the socket until the last byte of
its answer was read. It shares the machine with the service, and its own delay counts as the service's: `idle` is a server that does nothing, to see how much that is.
"""
import asyncio
import json
import multiprocessing
import os
import re
import time

import uvloop

_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)\r\n", re.I)


class _Reader(asyncio.Protocol):
    """Cuts a stream into messages with a stated length."""

    data = b""

    def data_received(self, data):
        self.data += data
        while (end := self.data.find(b"\r\n\r\n")) >= 0:
            stated = _LENGTH.search(self.data, 0, end + 2)
            size = end + 4 + (int(stated[1]) if stated else 0)
            if len(self.data) < size:
                return
            message, self.data = self.data[:size], self.data[size:]
            self.whole(message)


class _Asker(_Reader):
    """One connection: asks, notes (status, begun, took), asks again when it is due."""

    def __init__(self, request, every, due, found):
        self.request, self.every, self.due, self.found, self.begun, self.stopped = request, every, due, found, None, False

    def connection_made(self, transport):
        self.transport, self.loop, self.data = transport, asyncio.get_running_loop(), b""
        self.loop.call_at(self.due, self.ask)

    def ask(self):
        if not self.stopped and not self.transport.is_closing():
            self.begun = time.perf_counter()
            self.transport.write(self.request)

    def whole(self, message):
        self.found.append((int(message[9:12]), self.begun, time.perf_counter() - self.begun))
        self.begun, self.due = None, max(self.due + self.every, self.loop.time())
        if not self.stopped:
            self.loop.call_at(self.due, self.ask) if self.every else self.ask()

    def connection_lost(self, _):
        if self.stopped:
            return
        if self.begun is not None:
            self.found.append((0, self.begun, 0.0))
        self.begun, self.due = None, self.loop.time()
        self.again = asyncio.ensure_future(self.loop.create_connection(lambda: self, *self.transport.get_extra_info("peername")[:2]))


async def _asked(port, request, clients, seconds, rate):
    loop, found = asyncio.get_running_loop(), []
    every, start = clients / rate if rate else 0.0, asyncio.get_running_loop().time() + 0.2
    askers = [_Asker(request, every, start + i * every / clients, found) for i in range(clients)]
    await asyncio.gather(*(loop.create_connection(lambda a=a: a, "127.0.0.1", port) for a in askers))
    await asyncio.sleep(start - loop.time() + 0.5 + seconds)
    for asker in askers:
        asker.stopped = True
    for _ in range(100):        # what was asked is still answered
        if all(a.begun is None for a in askers):
            break
        await asyncio.sleep(0.1)
    found += [(0, a.begun, 0.0) for a in askers if a.begun is not None]
    for asker in askers:
        asker.transport.close()
    return found


def percentile(values, share):
    """The smallest value that at least this share of the values does not exceed."""
    return sorted(values)[max(0, -int(-share * len(values) // 1) - 1)] if values else None


def summary(found, seconds):
    """Answers a second and percentiles in ms, accepted (200) and refused (429) apart; a status 0 is a connection that was lost."""
    rows = {"asked_per_s": round(len(found) / seconds), "statuses": {str(s): sum(f[0] == s for f in found) for s in sorted({f[0] for f in found})}}
    for name, status in (("accepted", 200), ("refused", 429)):
        ms = [1000 * took for s, _, took in found if s == status]
        rows[name] = {"n": len(ms), "per_s": round(len(ms) / seconds)} | ({"p50_ms": round(percentile(ms, 0.5), 2), "p99_ms": round(percentile(ms, 0.99), 2)} if ms else {})
    return rows


def _work(pipe, port, request, clients, seconds, rate):
    used = time.process_time()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        found = runner.run(_asked(port, request, clients, seconds, rate))
    used, first = time.process_time() - used, min((f[1] for f in found), default=0) + 0.5
    counted = [f for f in found if f[1] > first]
    pipe.send({"clients": clients, "rate": rate and round(rate), **summary(counted, seconds), "client_cpu_us_per_request": round(used / max(1, len(found)) * 1e6)})


def ask(port, body, *, kind, key="", path="/v1/predict", clients=16, seconds=3, rate=None):
    """A process of its own asks for `seconds` (after half a second that does not count): at once again after each answer, or all clients together `rate` times a second."""
    request = f"POST {path} HTTP/1.1\r\nhost: 127.0.0.1\r\nauthorization: Bearer {key}\r\ncontent-type: {kind}\r\ncontent-length: {len(body)}\r\n\r\n".encode() + body
    context = multiprocessing.get_context("spawn")
    mine, theirs = context.Pipe()
    process = context.Process(target=_work, args=(theirs, port, request, clients, seconds, rate), daemon=True)
    process.start()
    theirs.close()
    try:
        return {**mine.recv(), "load": round(os.getloadavg()[0], 1)}
    finally:
        process.join(10)


class _Idle(_Reader):
    def connection_made(self, transport):
        self.transport = transport

    def whole(self, message):
        self.transport.write(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}")


async def _idle(pipe):
    server = await asyncio.get_running_loop().create_server(_Idle, "127.0.0.1", 0)
    pipe.send(server.sockets[0].getsockname()[1])
    await server.serve_forever()


def _idle_process(pipe):
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_idle(pipe))


class Idle:
    """A server in a process of its own that answers every request with 200 and two bytes: `with Idle() as port`."""

    def __enter__(self):
        context = multiprocessing.get_context("spawn")
        mine, theirs = context.Pipe()
        self.process = context.Process(target=_idle_process, args=(theirs,), daemon=True)
        self.process.start()
        return mine.recv()

    def __exit__(self, *_):
        self.process.terminate()
        self.process.join(10)


if __name__ == "__main__":
    with Idle() as idle:
        print(json.dumps(ask(idle, b"x" * 1000, kind="image/png", seconds=1)))
