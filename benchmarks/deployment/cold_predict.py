"""What one answer costs from nothing: a new process, one radiograph in DICOM, the JSON on its standard output.

    make bench SUBJECT=cold_predict
    python benchmarks/deployment/cold_predict.py --json results/benchmarks/deployment_cold_predict.json

Four processes take turns, each timed from its start to its end, files warm: `medimg predict` with a shipped bundle, with the same network in a bundle of one's own that is signed and must be
verified (which imports model-signing), with that one encrypted as well, and a plain script in which TensorFlow loads the same network as `.keras`, pydicom the radiograph, OpenCV resizes and JSON
is printed: less than ours does. The budgets of DESIGN are 1.0 s, 2.5 s and a ratio of 5; they are printed beside what was found. The last rows say where the time goes: a process of Python alone, and
the cumulative import times of the larger packages from one run of `python -X importtime`.
"""
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from sidebyside import main  # noqa: E402

BUNDLE = "phantom-cxr"
BUDGETS = {"shipped": 1.0, "signed": 2.5, "signed and encrypted": 2.5}
TENSORFLOW = """
import json, sys
import cv2, keras, numpy as np, pydicom
network = keras.saving.load_model(sys.argv[1])
ds = pydicom.dcmread(sys.argv[2])
image = cv2.resize(ds.pixel_array.astype("float32"), tuple(network.input_shape[2:0:-1]), interpolation=cv2.INTER_AREA)
logits = network.predict(image[None, ..., None] / image.max(), verbose=0)
print(json.dumps({"logits": np.asarray(logits).ravel().tolist()}))
"""
PACKAGES = ("numpy", "onnxruntime", "pydicom", "cv2", "PIL", "rich", "typer", "scipy", "jinja2", "cryptography", "model_signing", "sigstore", "medimg.cli", "medimg.deployment.predict")


def prepare(folder):
    """Radiograph, signed and encrypted bundle, the same network for Keras, and the environment with the keys: everything the processes need."""
    os.environ["MEDIMG_TRUST"], os.environ["MEDIMG_BUNDLE_KEY_FILE"] = str(folder / "trust"), str(folder / "bundle.key")
    from medimg.data.phantom import radiograph, thorax_phantom
    from medimg.data.phantom_dicom import write_radiograph
    from medimg.deployment import trust
    from medimg.deployment.bundle import Bundle, bundles_dir, encode, read_files, seal
    from medimg.deployment.encryption import make_key
    from medimg.deployment.exchange import encrypt_bundle, sign_bundle
    from medimg.models.networks import build_model
    from medimg.training.recipes import RECIPES
    write_radiograph(radiograph(thorax_phantom(7))[0], folder / "cxr.dcm", seed=7)
    trust.init("bench")
    make_key(folder / "bundle.key")
    files = read_files(bundles_dir() / BUNDLE)
    files["manifest.json"] = encode(seal({**json.loads(files["manifest.json"]), "version": "99"}))       # no longer one that the package's index knows
    for name, data in files.items():
        (folder / "own").mkdir(exist_ok=True)
        (folder / "own" / name).write_bytes(data)
    sign_bundle(folder / "own")
    encrypt_bundle(folder / "own", folder / "own.medimg.enc")
    recipe, bundle = RECIPES[BUNDLE], Bundle.load(BUNDLE)
    build_model(recipe.model, tuple(bundle.manifest["input"]["shape"]), len(bundle.classes), task=bundle.task, **recipe.model_options).save(folder / "twin.keras")


def command(kind, folder):
    """The process of one kind."""
    if kind == "TensorFlow":
        return [sys.executable, "-c", TENSORFLOW, str(folder / "twin.keras"), str(folder / "cxr.dcm")]
    bundle = {"shipped": BUNDLE, "signed": str(folder / "own"), "signed and encrypted": str(folder / "own.medimg.enc")}[kind]
    return [sys.executable, "-m", "medimg.cli", "predict", bundle, str(folder / "cxr.dcm"), "--json"]


def run(kind, folder):
    """Wall seconds of one process; its answer is looked at."""
    start = time.perf_counter()
    done = subprocess.run(command(kind, folder), capture_output=True, text=True, cwd=folder, env={**os.environ, "PYTHONPATH": str(ROOT), "TF_CPP_MIN_LOG_LEVEL": "3"})
    took = time.perf_counter() - start
    answer = json.loads(done.stdout) if done.returncode == 0 else sys.exit(done.stderr)
    if kind != "TensorFlow":
        origin = {"shipped": "shipped"}.get(kind, "signed by bench")
        assert answer[0]["status"] == "answered" and answer[0]["model"]["origin"] == origin, answer[0]
    return took


def imports(kind, folder):
    """Cumulative milliseconds of the larger packages in one process."""
    line = command(kind, folder)
    done = subprocess.run([line[0], "-X", "importtime", *line[1:]], capture_output=True, text=True, cwd=folder, env={**os.environ, "PYTHONPATH": str(ROOT)})
    found = re.findall(r"import time:\s+\d+ \|\s+(\d+) \|\s+(\S+)", done.stderr)
    return {name: round(int(us) / 1000) for us, name in found if name in PACKAGES and int(us) > 5000}


def measure(repeats):
    """All rows; see the text above."""
    kinds = (*BUDGETS, "TensorFlow")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder)
        for kind in kinds:
            run(kind, folder)
        rounds = [{kind: run(kind, folder) for kind in kinds} for _ in range(max(5, repeats))]
        bare = [_bare() for _ in range(5)]
        rows = [_row(kind, rounds) for kind in kinds]
        rows.append({"what": "Python alone", "median_s": statistics.median(bare), "repeats": len(bare)})
        rows += [{"what": f"imports, {kind}", "milliseconds": imports(kind, folder)} for kind in ("shipped", "signed")]
    for r in rows[len(kinds):]:
        print(r["what"], r.get("milliseconds") or f"{r['median_s']:.3f} s")
    return rows


def _bare():
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", ""])
    return time.perf_counter() - start


def _row(kind, rounds):
    times, ratios = [r[kind] for r in rounds], [r["TensorFlow"] / r[kind] for r in rounds]
    row = {"what": kind, "median_s": statistics.median(times), "min_s": min(times), "max_s": max(times), "repeats": len(times)}
    if kind in BUDGETS:
        row |= {"budget_s": BUDGETS[kind], "within": row["median_s"] <= BUDGETS[kind], "ratio": statistics.median(ratios), "ratio_min": min(ratios), "ratio_max": max(ratios),
                "what": f"first answer of a process, {kind} bundle", "peer": "the same model in TensorFlow", "ours_s": row["median_s"]}
    said = f"budget {row['budget_s']} s: {'kept' if row['within'] else 'MISSED'}; TensorFlow takes {row['ratio']:.1f} times as long ({row['ratio_min']:.1f} to {row['ratio_max']:.1f})" if kind in BUDGETS else ""
    print(f"{kind:<22} {row['median_s']:6.3f} s ({row['min_s']:.3f} to {row['max_s']:.3f})   {said}", flush=True)
    return row


if __name__ == "__main__":
    main(measure, "one cold answer, process start to JSON")
