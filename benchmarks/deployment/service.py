"""What the running service answers a second, beside bare ONNX Runtime with the same threads: 28 and 224 pixels, 1, 8 and 64 clients, raw body, form and DICOM; two workers; overload; memory.

    python benchmarks/deployment/service.py --json results/benchmarks/deployment_service.json [--seconds 3] [--audit before] [--quick]

wrk (Debian) is the client of the throughput rows, on loopback, on the same processors. The service is started as `serve` starts it, in a process of its own. Each row also says what the service's
processes used of the processor for one request, which depends less on what else the machine does; the load average at the time stands in the file. The 28-px bundle is the shipped `pneumonia`, the
224-px ones are the registry's `resnet` with random weights: as it is by default, and twice as wide, as in `int8.py`. `share` is requests a second over pictures a second of ONNX Runtime alone
with as many threads, one picture at a time or eight, whichever is faster. Overload is ten times the rate that 16 clients get, asked by 160 clients of a service that admits 16; there a client of our own counts, for wrk's
percentiles mix accepted and refused (`p99_ratio`: p99 of the accepted over that of normal load, the mean of before and after). `client_alone` says what that client measures of a server that does nothing. A full run takes under six minutes, --quick under 90 seconds.
"""
import argparse
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "benchmarks")]

import numpy as np  # noqa: E402
from asker import Idle, ask  # noqa: E402
from running import Running  # noqa: E402

from medimg.config import write_atomic  # noqa: E402
from medimg.deployment.bundle import Bundle, build_bundle, toy_images  # noqa: E402
from medimg.deployment.engine import Engine, export_onnx  # noqa: E402
from medimg.plots import png_bytes  # noqa: E402


def bundle_224(folder, width):
    """A bundle of 224 pixels around the registry's small ResNet with random weights."""
    from medimg.config import set_seed
    from medimg.data.preprocess import Preprocessor
    from medimg.deployment.manifest import example_manifest
    from medimg.deployment.reference import fit_reference, fit_temperature
    from medimg.models.networks import build_model
    from medimg.models.resnet import inference_model
    set_seed(0)
    images, labels = toy_images(240, side=224)
    pre = Preprocessor([("resize", {"height": 224, "width": 224}), ("scale", {"low": 0, "high": 255})])
    model = export_onnx(inference_model(build_model("resnet", (224, 224, 1), 2, width=width)), folder / f"resnet-{width}.onnx")
    found, known = Engine(model).run(pre.batch(images)), example_manifest()
    facts = {k: known[k] for k in ("version", "classes", "task", "input", "population", "thresholds", "training", "metrics", "licence")}
    facts["input"] = {k: v for k, v in facts["input"].items() if k != "shape"}
    return build_bundle(folder / f"b{width}", model=model.read_bytes(), preprocessor=pre, training_ids=["0" * 16], name=f"resnet-224-{width}", **facts,
                        calibration=fit_temperature(found["logits"][160:], labels[160:], task="binary"), reference=fit_reference(found["features"][:160], found["features"][160:], quantile=1.0)).path


def picture(side):
    """One that the bundle answers: a radiograph of PneumoniaMNIST, or one like those that the 224-px bundle was made with."""
    if side == 224:
        return toy_images(2, seed=5, side=side)[0][1]
    from medimg.data.datasets import load_dataset
    return np.ascontiguousarray(np.squeeze(load_dataset("pneumoniamnist", quiet=True).split("val").images[0]))


def bodies(side):
    """A picture as PNG, NumPy, form and DICOM: (content type, bytes)."""
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian, generate_uid
    image = picture(side)
    png, out, film = png_bytes(image), io.BytesIO(), io.BytesIO()
    np.save(out, image)
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID, ds.SOPClassUID, ds.SOPInstanceUID = ExplicitVRLittleEndian, "1.2.840.10008.5.1.4.1.1.1.1", generate_uid()
    ds.file_meta.MediaStorageSOPClassUID, ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPClassUID, ds.SOPInstanceUID
    ds.StudyInstanceUID, ds.SeriesInstanceUID, ds.Modality, ds.PatientID, ds.Rows, ds.Columns = generate_uid(), generate_uid(), "DX", "1", side, side
    ds.SamplesPerPixel, ds.PhotometricInterpretation, ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 1, "MONOCHROME2", 8, 8, 7, 0
    ds.PixelData = image.tobytes()
    ds.save_as(film, enforce_file_format=True)
    form = b'--b\r\nContent-Disposition: form-data; name="file"; filename="a.png"\r\n\r\n' + png + b"\r\n--b--\r\n"
    return {"png": ("image/png", png), "npy": ("application/x-npy", out.getvalue()), "form": ("multipart/form-data; boundary=b", form), "dicom": ("application/dicom", film.getvalue())}


def tree(pid):
    """Processes of a service: pid -> processor seconds."""
    found, todo = {}, [pid]
    while todo:
        one = todo.pop()
        try:
            todo += [int(c) for t in os.listdir(f"/proc/{one}/task") for c in Path(f"/proc/{one}/task/{t}/children").read_text().split()]
            stat = Path(f"/proc/{one}/stat").read_text().rpartition(")")[2].split()
            found[one] = (int(stat[11]) + int(stat[12])) / os.sysconf("SC_CLK_TCK")
        except OSError:
            continue
    return found


def memory_mb(pid):
    """Resident memory of all processes of a service."""
    return sum(int(re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{p}/status").read_text())[1]) for p in tree(pid)) / 1024


def wrk(service, body, clients, seconds, folder):
    """One run of wrk: requests a second, percentiles in ms, statuses, processor time for one request."""
    kind, data = body
    (folder / "body").write_bytes(data)
    (folder / "w.lua").write_text(f'local f = io.open("{folder}/body", "rb"); wrk.body = f:read("*a"); f:close()\nwrk.method = "POST"\n'
                                  f'wrk.headers["Authorization"] = "Bearer {service.key}"; wrk.headers["Content-Type"] = "{kind}"\n')
    before = tree(service.process.pid)
    out = subprocess.run(["wrk", "-t1", f"-c{clients}", f"-d{seconds}s", "--timeout", "20s", "--latency", "-s", str(folder / "w.lua"), f"{service.base}/v1/predict"], capture_output=True, text=True).stdout
    after = tree(service.process.pid)
    n = int(re.search(r"(\d+) requests in", out)[1])
    ms = {p: float(v) * {"us": 1e-3, "ms": 1, "s": 1e3}[u] for p, v, u in re.findall(r"(50|99)%\s+([\d.]+)(us|ms|s)\b", out)}
    bad, broken = re.search(r"Non-2xx or 3xx responses: (\d+)", out), re.search(r"Socket errors: connect (\d+), read (\d+), write (\d+), timeout (\d+)", out)
    used = sum(after[p] - before.get(p, 0) for p in after)
    return {"clients": clients, "requests": n, "per_s": round(float(re.search(r"Requests/sec:\s+([\d.]+)", out)[1])), "p50_ms": ms.get("50"), "p99_ms": ms.get("99"),
            "not_2xx": int(bad[1]) if bad else 0, "broken": sum(map(int, broken.groups())) if broken else 0, "cpu_us_per_request": round(used / max(n, 1) * 1e6), "load": round(os.getloadavg()[0], 1)}


def bare(path, seconds, *, most=2):
    """Images a second of ONNX Runtime alone in one process, for each number of threads at batch 1, 8 and 64."""
    bundle, rows = Bundle.load(path, allow_unsigned=True), {}
    for threads in range(1, most + 1):
        engine, rows[threads] = Engine(bundle._files["model.onnx"], threads=threads), {}
        for n in (1, 8, 64):
            batch = np.random.default_rng(0).random((n, *engine.input_shape), np.float32)
            engine.run(batch)
            count, start, used = 0, time.perf_counter(), time.process_time()
            while time.perf_counter() - start < seconds / 3:
                engine.run(batch)
                count += n
            rows[threads][n] = {"per_s": round(count / (time.perf_counter() - start)), "cpu_us_per_image": round((time.process_time() - used) / count * 1e6)}
    return rows


def shared(rows, alone, threads):
    """The rows with `share`: of what ONNX Runtime alone does with as many threads, at batch 1 or 8."""
    best = max(alone[threads][n]["per_s"] for n in (1, 8))
    return [{**row, "threads": threads, "share": round(row["per_s"] / best, 3)} for row in rows]


def overload(path, side, folder, seconds, **settings):
    """Normal load, 16 clients of a service that admits 16, and ten times that rate asked by 160; then what the client measures of a server that does nothing at the same rate."""
    folder.mkdir()
    service, (kind, data) = Running(folder, bundle=path, queue=16, **settings), bodies(side)["png"]
    try:
        first_answer(service, (kind, data))
        normal = ask(service.port, data, kind=kind, key=service.key, clients=16, seconds=seconds)
        over = ask(service.port, data, kind=kind, key=service.key, clients=160, seconds=seconds, rate=10 * normal["accepted"]["per_s"])
        again = ask(service.port, data, kind=kind, key=service.key, clients=16, seconds=seconds)
        counted_ = counted(service)
    finally:
        service.stop()
    with Idle() as port:
        alone = {"16 clients": ask(port, data, kind=kind, clients=16, seconds=1), "160 clients": ask(port, data, kind=kind, clients=160, seconds=1, rate=max(1, over["asked_per_s"]))}
    usual = (normal["accepted"]["p99_ms"] + again["accepted"]["p99_ms"]) / 2
    return {"queue": 16, "16 clients": normal, "160 clients, ten times the rate": over, "16 clients, afterwards": again, "client_alone": alone, "statuses": counted_,
            "offered": round(over["asked_per_s"] / normal["accepted"]["per_s"], 1), "p99_ratio": round(over["accepted"]["p99_ms"] / usual, 2),
            "only_200_and_429": set(counted_) <= {"200", "429"}}


def first_answer(service, body):
    """The status in the first answer; another than `answered` would make the rest meaningless."""
    with service.client() as client:
        record = client.post("/v1/predict", content=body[1], headers={"content-type": body[0]}).raise_for_status().json()
    if record["status"] != "answered":
        raise SystemExit(f"the service did not answer but said {record['status']}: {record.get('reasons')}")
    return record["status"]


def counted(service):
    """Statuses of /v1/predict as the service counted them."""
    with service.client() as client:
        return {s: int(float(n)) for s, n in re.findall(r'route="predict",status="(\d+)"\} (\S+)', client.get("/metrics").text)}


def endure(service, data, folder, *, first=2_000, total=10_000, bound_s=60):
    """Resident memory before and after many requests, in a bounded time; the first ones, which fill pools and caches, come before."""
    start, rows, n = time.monotonic(), [], 0
    while n < first and time.monotonic() - start < bound_s / 3:
        n += wrk(service, data, 16, 2, folder)["requests"]
    warm, n = n, 0
    rows.append(round(memory_mb(service.process.pid), 2))
    while n < total and time.monotonic() - start < bound_s:
        n += wrk(service, data, 16, 3, folder)["requests"]
        rows.append(round(memory_mb(service.process.pid), 2))
    return {"before": warm, "requests": n, "memory_mb": rows, "growth_mb": round(rows[-1] - rows[0], 2)}


def one_bundle(name, path, side, folder, given):
    """All rows of one bundle: bare, one worker with each kind of body, two workers, memory."""
    alone, kinds = bare(path, given.seconds), bodies(side)
    row, few = {"bare": alone}, given.quick
    service = Running(_new(folder / f"{name}-1"), bundle=path, threads=1, audit=given.audit)
    try:
        first_answer(service, kinds["png"])
        for kind in kinds:
            some = (1, 8, 64) if kind == "png" or not few else (8,)
            row[kind] = shared([wrk(service, kinds[kind], c, given.seconds, folder) for c in some], alone, 1)
        if side == 28:
            row["memory"] = endure(service, kinds["png"], folder, bound_s=20 if few else 60)
        row["statuses"] = counted(service)
    finally:
        service.stop()
    row["png, 2 workers"] = two_workers(_new(folder / f"{name}-2"), path, kinds["png"], alone, (8,) if few else (1, 8, 64), given.seconds, given.audit)
    if side == 28 and not few:
        row["png, 2 workers, log after the answer"] = two_workers(_new(folder / f"{name}-after"), path, kinds["png"], alone, (8, 64), given.seconds, "after")
    return row


def two_workers(folder, path, body, alone, clients, seconds, audit):
    """Rows of a service of two worker processes, one thread each."""
    service = Running(folder, bundle=path, threads=1, audit=audit, workers=2)
    try:
        first_answer(service, body)
        wrk(service, body, 8, 1, folder)
        return shared([wrk(service, body, c, seconds, folder) for c in clients], alone, 2)
    finally:
        service.stop()


def disk(folder, n=200):
    """Milliseconds until a line is on the disk (write and fsync): nothing that is logged before it is answered can be faster."""
    took = []
    with open(folder / "line", "ab", buffering=0) as file:
        for _ in range(n):
            start = time.perf_counter()
            file.write(b"x" * 400)
            os.fsync(file.fileno())
            took.append(1000 * (time.perf_counter() - start))
    return {"p50_ms": round(float(np.percentile(took, 50)), 2), "p99_ms": round(float(np.percentile(took, 99)), 2)}


def _new(folder):
    folder.mkdir()
    return folder


def arguments(argv=None):
    """What was asked for."""
    ask_ = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask_.add_argument("--json", type=Path, help="write everything here")
    ask_.add_argument("--seconds", type=int, help="of each row (3; with --quick 1)")
    ask_.add_argument("--audit", default="before", choices=("before", "after", "off"))
    ask_.add_argument("--quick", action="store_true", help="fewer rows, one 224-px network")
    given = ask_.parse_args(argv)
    given.seconds = given.seconds or (1 if given.quick else 3)
    return given


def main(argv=None):
    """Measure, print, write."""
    given = arguments(argv)
    if not shutil.which("wrk"):
        raise SystemExit("wrk is not installed. Remedy: apt-get install wrk")
    found = {"machine": {"cores": os.cpu_count(), "load": os.getloadavg()}, "settings": {"audit": given.audit, "decoders": 2, "seconds": given.seconds, "threads": "1 for each worker"},
             "client": "wrk, 1 thread, loopback, same processors; overload: benchmarks/asker.py", "bundles": {}, "overload": {}}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        found["machine"]["write and fsync of a line"] = disk(folder)
        todo = {"28 px (pneumonia)": ("pneumonia", 28)} | {f"224 px (ResNet, width {w})": (bundle_224(folder, w), 224) for w in ((16,) if given.quick else (16, 32))}
        for k, (name, (path, side)) in enumerate(todo.items()):
            found["bundles"][name] = row = one_bundle(str(k), path, side, folder, given)
            print(name, json.dumps(row, indent=1), flush=True)
        for k, (name, (path, side)) in enumerate([*todo.items()][:2]):
            found["overload"][name] = row = overload(path, side, folder / f"over-{k}", given.seconds, audit=given.audit, threads=1)
            print(name, json.dumps(row, indent=1), flush=True)
    found["machine"]["load_after"] = os.getloadavg()
    if given.json:
        write_atomic(given.json, json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
