"""Time our function and other programs alternately, in one run, and print ratios: shared by the scripts beside this file.

A peer runs in its own process and environment (`.venv-bench`, made by `make bench-peers`, or the Python named by
MEDIMG_BENCH_PYTHON), imports once, is called once to warm up, and times itself, so that neither start-up nor transfer is counted.
"""
import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LOOP = """
import json, sys, time
space = {}
out, sys.stdout = sys.stdout, sys.stderr
exec(compile(json.loads(sys.stdin.readline()), "<peer>", "exec"), space)
print(json.dumps("ready"), file=out, flush=True)
for line in sys.stdin:
    start, cpu = time.perf_counter(), time.process_time()
    space["run"](**json.loads(line))
    print(json.dumps([time.perf_counter() - start, time.process_time() - cpu]), file=out, flush=True)
"""


def peer_python() -> str | None:
    """The Python that has the peers, or None."""
    named = os.environ.get("MEDIMG_BENCH_PYTHON", str(ROOT / ".venv-bench" / "bin" / "python"))
    return named if Path(named).exists() else None


class Peer:
    """Another program: source that defines `run(**arguments)`, in a process of its own; call it to get the seconds that it took; `cpu` has its CPU seconds."""

    def __init__(self, source: str, *, python: str | None = None, env: dict | None = None):
        self.process = subprocess.Popen([python or peer_python() or sys.executable, "-c", LOOP], text=True, stdin=subprocess.PIPE,
                                        stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, **(env or {})})
        self._send(source)

    def _send(self, value):
        self.process.stdin.write(json.dumps(value) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise RuntimeError("the peer stopped: " + "".join(self.process.stderr.readlines()[-3:]).strip())
        return json.loads(answer)

    def __call__(self, **arguments) -> float:
        wall, self.cpu = self._send(arguments)
        return wall

    def close(self):
        self.process.kill()
        self.process.wait()


def seconds(function, *, timer=time.perf_counter, **arguments) -> float:
    """How long one call of ours takes."""
    start = timer()
    function(**arguments)
    return timer() - start


def _clock(peer, cpu, pause):
    """A callable that gives the seconds of a call, after a pause: on the wall, or those that the processor spent on it."""
    def called(**arguments):
        time.sleep(pause)
        if not isinstance(peer, Peer):
            return seconds(peer, timer=timer, **arguments)
        wall = peer(**arguments)
        return peer.cpu if cpu else wall
    timer = time.process_time if cpu else time.perf_counter
    return called


def compare(what: str, ours, peers: dict, *, repeats: int = 7, cpu: bool = False, pause: float = 0, **arguments) -> list[dict]:
    """Call ours and each peer in turn `repeats` times after one warm-up each; one row a peer: medians, and the ratio of each round.

    `ours` is a callable that is timed here; a peer is a `Peer`, or a callable that is timed here as well. `cpu` counts CPU seconds, which a busy machine hardly
    distorts; with one thread, for waiting threads count as working. `pause` seconds pass before each call: the threads of OpenMP spin for a fifth of a second after their
    work and would take a processor from whoever comes next.
    """
    clock = {name: _clock(p, cpu, pause) for name, p in {"medimg": ours, **peers}.items()}
    for call in clock.values():
        call(**arguments)
    rounds = [{name: call(**arguments) for name, call in clock.items()} for _ in range(repeats)]
    mine = statistics.median(r["medimg"] for r in rounds)
    rows = [{"what": what, "peer": name, "ours_s": mine, "peer_s": statistics.median(r[name] for r in rounds),
             "ratio": statistics.median(r[name] / r["medimg"] for r in rounds), "ratio_min": min(r[name] / r["medimg"] for r in rounds),
             "ratio_max": max(r[name] / r["medimg"] for r in rounds), "repeats": repeats} for name in peers]
    for r in rows:
        print(f"{what:<34} medimg {r['ours_s']:8.4f} s   {r['peer']:<28} {r['peer_s']:8.4f} s   ratio {r['ratio']:6.2f} ({r['ratio_min']:.2f} to {r['ratio_max']:.2f})",
              flush=True)
    return rows


def main(measure, description: str, argv=None) -> None:
    """The command line of a script: run `measure(repeats)`, which gives rows, and write them where --json says."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--json", type=Path, help="write the rows here as well")
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args(argv)
    if peer_python() is None:
        print("No peers are installed, so they are left out. Remedy: make bench-peers, or MEDIMG_BENCH_PYTHON=/path/to/python")
    rows = measure(args.repeats)
    if args.json:
        machine = {"cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(), "machine": platform.machine(),
                   "python": platform.python_version()}
        args.json.write_text(json.dumps({"rows": rows, "machine": machine}, indent=1, sort_keys=True) + "\n", encoding="utf-8")
