"""Eight bits against thirty-two on one thread, and what that costs in AUC: python benchmarks/deployment/int8.py

28 px: the shipped pneumonia bundle, AUC on validation images. 224 px: a residual network with random weights; its speed does not depend on them. Each round runs both, one after the
other; the ratio of a round is float32 time over int8 time; printed are the median and the 10th and 90th percentile of the rounds.
"""
import json
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]


def networks():
    """(name, graph, images to find ranges on, images to time) of each network."""
    from medimg.data.datasets import load_dataset
    from medimg.deployment.bundle import Bundle
    from medimg.deployment.engine import export_onnx
    from medimg.models.networks import build_model
    from medimg.models.resnet import inference_model
    bundle = Bundle.load("pneumonia")
    images = load_dataset("pneumoniamnist", quiet=True)
    val = images.split("val")
    yield "pneumonia, 28 px", (bundle.path / "model.onnx").read_bytes(), bundle.preprocessor.batch(images.split("train").images[:256]), bundle.preprocessor.batch(val.images), val.labels
    with tempfile.TemporaryDirectory() as folder:
        path = export_onnx(inference_model(build_model("resnet", (224, 224, 1), 2, width=32)), Path(folder) / "a.onnx")
        x = np.random.default_rng(0).random((32, 224, 224, 1), dtype=np.float32)
        yield "ResNet, 224 px", path.read_bytes(), x, x, None


def main():
    """Measure, print, store."""
    from medimg.deployment.engine import Engine
    from medimg.deployment.int8 import quantise
    from medimg.evaluation.metrics import auc
    rows, facts = [], {}
    for name, graph, ranges, x, y in networks():
        small = quantise(graph, ranges)
        engines = [Engine(g, threads=1) for g in (graph, small)]
        facts[name] = {"bytes": [len(graph), len(small)]}
        if y is not None:
            facts[name]["auc"] = [round(float(auc(y, e.run(x)["logits"][:, 0])), 5) for e in engines]
        for batch in (1, 16):
            times = np.array([[_once(e, x[:batch]) for e in engines] for _ in range(200 if batch == 1 else 40)][5:])
            ratio = times[:, 0] / times[:, 1]
            low, mid, high = np.percentile(ratio, [10, 50, 90])
            ms = np.round(1000 * np.median(times, 0), 3).tolist()
            rows.append({"what": f"eight bits, {name}, batch {batch}", "peer": "the same graph in float32", "ours_s": ms[1] / 1000, "peer_s": ms[0] / 1000, "ratio_min": round(float(low), 3),
                         "ratio_max": round(float(high), 3), "network": name, "batch": batch, "ratio": round(float(mid), 3), "low": round(float(low), 3), "high": round(float(high), 3), "ms": ms})
            print(f"{name:18} batch {batch:2}: int8 {mid:.2f} times as fast [{low:.2f}, {high:.2f}], ms {rows[-1]['ms']}")
    print(json.dumps(facts))
    out = ROOT / "results" / "benchmarks" / "deployment_int8.json"
    out.write_text(json.dumps({"rows": rows, "facts": facts}, indent=1) + "\n", encoding="utf-8")


def _once(engine, batch):
    start = time.perf_counter()
    engine.run(batch)
    return time.perf_counter() - start


if __name__ == "__main__":
    sys.exit(main())
