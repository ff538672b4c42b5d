"""Where the processor's time of the loaded service goes, as a flame graph and as shares by stage.

    python benchmarks/deployment/flame.py --svg artefacts/flame.svg [--json results/benchmarks/deployment_flame.json] [--side 28] [--clients 8] [--seconds 10]

py-spy samples the service and its decoders a hundred times a second while wrk asks; samples of threads that only wait do not count. A sample belongs to the stage of the innermost frame that the table
below knows; what runs in C (ONNX Runtime, OpenCV, zlib) belongs to the Python frame that called it. `threads` is the pool of threads handing over work. py-spy stops a process for each sample, so the service is somewhat slower than without it.
"""
import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks" / "deployment")]

#: Stage -> what one of its frames looks like; the innermost frame that fits any of them decides.
STAGES = {
    "audit": r"deployment/(audit|chain)\.py|[( /]hmac\.py|Auditor\S* \(medimg/deployment/guard\.py",
    "graph": r"deployment/(engine|int8)\.py|[( /]onnxruntime/",
    "preprocess": r"data/preprocess\.py",
    "decode": r"deployment/(decoders|intake|plain)\.py|medimg/data/|[( /](pydicom|PIL|cv2|pylibjpeg|openjpeg)/|numpy/lib/\w*format|medimg/files\.py",
    "answer": r"medimg/deployment/(?!service|front|guard|metrics|security|settings|jobs|audit|chain|engine)|medimg/(evaluation|models)/",
    "HTTP": r"medimg/deployment/(service|front|guard|metrics|security|settings|jobs)\.py",
}
#: The same for what carries the work of others, asked only when no frame fits above: a sample with nothing else on its stack is the loop itself, or a thread taking its turn.
CARRIERS = {"threads": r"concurrent/futures/|[( /](threading|queue)\.py", "HTTP": r"[( /](uvicorn|fastapi|starlette|httptools|uvloop|h11|asyncio|anyio|multiprocessing)/"}
_TABLES = [{name: re.compile(pattern) for name, pattern in table.items()} for table in (STAGES, CARRIERS)]


def stage_of(frames):
    """The stage of one sample, outermost frame first: of the innermost frame that belongs to any."""
    for table in _TABLES:
        for frame in reversed(frames):
            for name, known in table.items():
                if known.search(frame):
                    return name
    return "other"


def shares(collapsed):
    """Stage -> its share of the samples in py-spy's raw format, `frame;frame;frame count` a line, the largest first."""
    found = Counter()
    for line in collapsed.splitlines():
        stack, _, count = line.rpartition(" ")
        if stack and count.isdigit():
            found[stage_of([f for f in stack.split(";") if not f.startswith(("process ", "thread "))])] += int(count)
    total = sum(found.values())
    return {"samples": total, "shares": {name: round(found[name] / total, 3) for name in sorted([*STAGES, "threads", "other"], key=lambda n: -found[n])} if total else {}}


def recorder():
    """The program py-spy; SystemExit with the line that installs it when there is none."""
    beside = [str(Path(sys.executable).parent), str(ROOT / ".venv-bench" / "bin")]
    found = shutil.which("py-spy") or shutil.which("py-spy", path=os.pathsep.join(beside))
    if not found:
        raise SystemExit("py-spy is not installed. Remedy: make bench-peers, or: python -m pip install py-spy==0.4.3")
    return found


def record(pid, seconds, out, kind):
    """One recording of a process and its children."""
    done = subprocess.run([recorder(), "record", "--pid", str(pid), "--subprocesses", "--duration", str(seconds), "--rate", "100", "--format", kind, "--output", str(out), "--function"],
                          capture_output=True, text=True)
    if done.returncode or not Path(out).is_file():
        raise SystemExit(f"py-spy: {done.stderr.strip()[-400:]}\nRemedy: it needs leave to trace another process: run as root, or in a container with --cap-add SYS_PTRACE")


def titled(svg, title):
    """A title that says what was measured, in place of py-spy's command line; no paths of this machine."""
    text = re.sub(r'(<text id="title"[^>]*>)[^<]*', lambda m: m[1] + title, svg.read_text(encoding="utf-8"))
    svg.write_text(re.sub(r"(process \d+:&quot;)\S*/(?=python)|(?<=python )/\S*/(?=start.py)", r"\1", text), encoding="utf-8")


def arguments(argv=None):
    """What was asked for."""
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("--svg", type=Path, help="write the flame graph here")
    ask.add_argument("--json", type=Path, help="write the shares here")
    ask.add_argument("--side", type=int, default=28, choices=(28, 224))
    ask.add_argument("--kind", default="png", choices=("png", "npy", "form", "dicom"))
    ask.add_argument("--clients", type=int, default=8)
    ask.add_argument("--seconds", type=int, default=10, help="of each of the two recordings: picture, shares")
    return ask.parse_args(argv)


def main(argv=None):
    """Load, record, print, write."""
    given = arguments(argv)
    recorder()
    from service import Running, bodies, bundle_224, first_answer
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        service, body = Running(folder, bundle=bundle_224(folder, 16) if given.side == 224 else "pneumonia"), bodies(given.side)[given.kind]
        try:
            first_answer(service, body)
            for kind, out in (("raw", folder / "raw.txt"), ("flamegraph", given.svg)):
                if out:
                    loaded(service, body, given, out, kind, folder)
        finally:
            service.stop()
        if given.svg:
            titled(given.svg, f"medimg service, {given.side} px, {given.kind}, {given.clients} clients")
        found = {"side": given.side, "kind": given.kind, "clients": given.clients, "machine": {"cores": os.cpu_count(), "load": round(os.getloadavg()[0], 1)}, **shares((folder / "raw.txt").read_text())}
    for name, share in found["shares"].items():
        print(f"{name:<12} {share:6.1%}")
    if given.json:
        from medimg.config import write_atomic
        write_atomic(given.json, json.dumps(found, indent=1) + "\n")


def loaded(service, body, given, out, kind, folder):
    """Record while wrk asks for a little longer than the recording takes."""
    from concurrent.futures import ThreadPoolExecutor

    from service import wrk
    with ThreadPoolExecutor(1) as pool:
        load = pool.submit(wrk, service, body, given.clients, given.seconds + 2, folder)
        record(service.process.pid, given.seconds, out, kind)
        print(f"{kind}: {load.result()['per_s']} answers a second while py-spy looked on", flush=True)


if __name__ == "__main__":
    main()
