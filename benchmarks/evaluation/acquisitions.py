"""A detector of one scanner and one of four, on validation scans of each acquisition.

    medimg reproduce nodule-detection --seeds 0 --profile full      # trains the first, in runs/reproduce/nodule-detection
    python benchmarks/evaluation/acquisitions.py [RUN] [SCANS]      # the second is the shipped bundle phantom-nodules

Not a timing. Scans are those of the fold `val` of `phantom-nodules`; each is read as a series would be, through the bundle's step `resample`. The first detector learnt from cubes of
1.5 mm, and its own validation scans chose the score of a call (0.5) as the bundle's own did.
"""
import json
import sys
import tempfile
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]


def plain_bundle(run, folder):
    """The experiment's detector in the form of the bundle."""
    from medimg.data.preprocess import Preprocessor
    from medimg.deployment.bundle import Bundle, build_bundle
    from medimg.deployment.engine import export_onnx
    from medimg.experiments import detection as d
    from medimg.experiments.protocol import Run
    plan, shipped = d.PLANS["full"], Bundle.load("phantom-nodules").manifest
    run = Run("nodule-detection", Path(run), "full", (0,), progress=False)
    pair = d.train_pair(run, plan, 0, d._scans(run, "train", plan), d._scans(run, "validation", plan))
    graphs = [export_onnx(model, Path(folder) / f"{k}.onnx").read_bytes() for k, model in enumerate(pair["models"])]
    facts = {k: shipped[k] for k in ("version", "classes", "task", "population", "thresholds", "licence")}
    return build_bundle(Path(folder) / "bundle", model=graphs[0], second=graphs[1], preprocessor=Preprocessor([("resample", {"spacing_mm": [plan.spacing_mm] * 3})]), reference=None,
                        calibration={"method": "none", "temperature": 1.0, "n": 0, "fitted_on": "nothing"}, training_ids=["0" * 16], name="one-scanner", metrics={},
                        answer={**shipped["answer"], "weight": pair["weight"], "call": 0.5}, training={"dataset": "phantom-v1-cohort-10"},
                        input={"modality": ["CT"], "units": "HU", "range": [-1024, 3071], "spacing_mm": [plan.spacing_mm] * 3}, **facts)


def main(run="runs/reproduce/nodule-detection", scans=24):
    """Print and store sensitivity and false alarms a scan of both."""
    from medimg.data.scans import ACQUISITIONS, phantom_scans
    from medimg.deployment.bundle import Bundle
    from medimg.deployment.located import marks_of
    from medimg.evaluation.detection import match_points
    part, table = phantom_scans().split("val"), {}
    with tempfile.TemporaryDirectory() as folder:
        for bundle in (plain_bundle(run, folder), Bundle.load("phantom-nodules")):
            call, rows = bundle.manifest["answer"]["call"], {name: [] for name in ACQUISITIONS}
            for volume, lesions, how in list(zip(part.images, part.meta["lesions"], part.meta["acquisition"]))[:int(scans)]:
                found = marks_of(bundle, volume).detections
                rows[how].append(match_points(np.reshape([one.centroid_mm for one in found], (-1, 3)), [one.score for one in found],
                                              np.reshape([one["centroid_mm"] for one in lesions], (-1, 3)), [max(one["diameter_mm"] / 2, 3.0) for one in lesions],
                                              counted=np.array([one["relevant"] for one in lesions], bool))[:2])
            table[bundle.name] = {how: figures(parts, call) for how, parts in rows.items() if parts}
    for name, by in table.items():
        for how, row in by.items():
            print(f"{name:16} {how:9}", *(f"{k} {v}" for k, v in row.items()))
    (ROOT / "results" / "benchmarks" / "evaluation_acquisitions.json").write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")


def figures(parts, call):
    """Sensitivity and false alarms a scan from the score of a call on."""
    hits, alarms = (np.concatenate([np.asarray(part[k], float) for part in parts]) for k in (0, 1))
    return {"scans": len(parts), "nodules": len(hits), "sensitivity": round(float((hits >= call).mean()), 3) if len(hits) else None, "alarms_per_scan": round(float((alarms >= call).sum() / len(parts)), 2)}


if __name__ == "__main__":
    main(*sys.argv[1:])
