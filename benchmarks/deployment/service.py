"""What the running service answers a second, beside bare ONNX Runtime with one thread: 28 and 224 pixels, 1, 8 and 64 clients, raw body, form and DICOM; overload; memory.

    python benchmarks/deployment/service.py --json results/benchmarks/deployment_service.json [--seconds 3] [--workers 2] [--audit before]

wrk (Debian) is the client, on loopback, on the same processors. The service is started as `serve` starts it, in a process of its own. Each row also says what the service's processes used of the
processor for one request, which depends less on what else the machine does; the load average at the time stands in the file. The 28-px bundle is the shipped `pneumonia` (a ResNet), the 224-px one a toy graph.
"""
import argparse
import io
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import httpx  # noqa: E402
import numpy as np  # noqa: E402
from running import Running  # noqa: E402

from medimg.config import write_atomic  # noqa: E402
from medimg.deployment.bundle import Bundle, build_bundle, toy_images  # noqa: E402
from medimg.deployment.engine import Engine, toy_network  # noqa: E402
from medimg.plots import png_bytes  # noqa: E402


def bundle_224(folder):
    """A toy bundle of 224 pixels."""
    from medimg.data.preprocess import Preprocessor
    from medimg.deployment.manifest import example_manifest
    from medimg.deployment.reference import fit_reference, fit_temperature
    (images, labels), model = toy_images(60, side=224), toy_network(size=224)
    pre = Preprocessor([("resize", {"height": 224, "width": 224}), ("scale", {"low": 0, "high": 255})])
    found, known = Engine(model).run(pre.batch(images)), example_manifest()
    facts = {k: known[k] for k in ("version", "classes", "task", "input", "population", "thresholds", "training", "metrics", "licence")}
    facts["input"] = {k: v for k, v in facts["input"].items() if k != "shape"}
    return build_bundle(folder, model=model, preprocessor=pre, training_ids=["0" * 16], name="toy-224", **facts,
                        calibration=fit_temperature(found["logits"][30:], labels[30:], task="binary"), reference=fit_reference(found["features"][:30], found["features"][30:])).path


def bodies(side):
    """A picture as PNG, NumPy, form and DICOM: (content type, bytes)."""
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian, generate_uid
    image = toy_images(2, seed=5, side=side)[0][1]
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
    bad = re.search(r"Non-2xx or 3xx responses: (\d+)", out)
    used = sum(after[p] - before.get(p, 0) for p in after)
    return {"clients": clients, "requests": n, "per_s": round(float(re.search(r"Requests/sec:\s+([\d.]+)", out)[1])), "p50_ms": ms.get("50"), "p99_ms": ms.get("99"),
            "not_2xx": int(bad[1]) if bad else 0, "cpu_us_per_request": round(used / max(n, 1) * 1e6), "load": round(os.getloadavg()[0], 1)}


def bare(path, seconds):
    """Images a second of ONNX Runtime alone, one thread, one process, at batch 1, 8 and 64."""
    bundle, rows = Bundle.load(path, allow_unsigned=True), {}
    engine = Engine(bundle._files["model.onnx"], threads=1)
    for n in (1, 8, 64):
        batch, count, start, used = np.zeros((n, *engine.input_shape), np.float32), 0, time.perf_counter(), time.process_time()
        while time.perf_counter() - start < seconds / 3:
            engine.run(batch)
            count += n
        rows[n] = {"per_s": round(count / (time.perf_counter() - start)), "cpu_us_per_image": round((time.process_time() - used) / count * 1e6)}
    return rows


def overload(bundle, folder, seconds, **settings):
    """Accepted and refused at the queue's length and at ten times as many clients."""
    (folder / "over").mkdir()
    service, data = Running(folder / "over", bundle=bundle, queue=16, **settings), bodies(28)["png"]
    try:
        return {"queue": 16, "16 clients": wrk(service, data, 16, seconds, folder), "160 clients": wrk(service, data, 160, seconds, folder), "statuses": counted(service)}
    finally:
        service.stop()


def counted(service):
    """Statuses of /v1/predict as the service counted them."""
    with service.client() as client:
        return {s: int(float(n)) for s, n in re.findall(r'route="predict",status="(\d+)"\} (\S+)', client.get("/metrics").text)}


def endure(service, data, folder, total=10_000, bound_s=45):
    """Memory before and after many requests, in a bounded time."""
    start, n, before = time.monotonic(), 0, memory_mb(service.process.pid)
    rows = [round(before)]
    while n < total and time.monotonic() - start < bound_s:
        n += wrk(service, data, 16, 4, folder)["requests"]
        rows.append(round(memory_mb(service.process.pid)))
    return {"requests": n, "memory_mb": rows}


def main():
    """Measure, print, write."""
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("--json")
    ask.add_argument("--seconds", type=int, default=3)
    ask.add_argument("--workers", type=int, default=1)
    ask.add_argument("--audit", default="before")
    ask.add_argument("--quick", action="store_true", help="fewer rows")
    given = ask.parse_args()
    settings = {"workers": given.workers, "audit": given.audit, "decoders": 2}
    found = {"machine": {"cores": os.cpu_count(), "load": os.getloadavg()}, "settings": {**settings, "seconds": given.seconds}, "client": "wrk, 1 thread, loopback, same processors", "bundles": {}}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for name, path, side in (("28 px (pneumonia)", "pneumonia", 28), ("224 px (toy)", bundle_224(folder / "b224"), 224)):
            (folder / str(side)).mkdir()
            found["bundles"][name] = row = {"bare": bare(path, given.seconds)}
            service, kinds = Running(folder / str(side), bundle=path, **settings), bodies(side)
            try:
                httpx.post(f"{service.base}/v1/predict", content=kinds["png"][1], headers={"authorization": f"Bearer {service.key}"}).raise_for_status()
                row["png"] = [wrk(service, kinds["png"], c, given.seconds, folder) for c in (1, 8, 64)]
                for kind in ("npy", "form", "dicom"):
                    row[kind] = [wrk(service, kinds[kind], c, given.seconds, folder) for c in ((8,) if given.quick else (1, 8, 64))]
                row["memory"] = endure(service, kinds["png"], folder, bound_s=10 if given.quick else 60) if side == 28 else None
            finally:
                service.stop()
            print(json.dumps(row, indent=1), flush=True)
        found["overload"] = overload("pneumonia", folder, given.seconds, workers=given.workers, audit=given.audit)
    print(json.dumps(found["overload"], indent=1))
    if given.json:
        write_atomic(given.json, json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
