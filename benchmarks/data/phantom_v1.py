"""Measure version 1 of the phantom: realism against the real CT, the LoG yardstick on a cohort that it was not tuned on, fingerprints.

    python benchmarks/data/phantom_v1.py                 # prints, with 10 patients
    python benchmarks/data/phantom_v1.py --patients 24 --cohort 0                      # the cohort that the detector's rule was chosen on
    python benchmarks/data/phantom_v1.py --patients 100 --update                       # writes results/phantom_v1.json; 5 minutes of one core

The real CT (TCIA 4D-Lung, Hugo 2016, CC BY 3.0) is read from thorax_ct/dicom below MEDIMG_DATA; without it its stored numbers are kept.
"""
import argparse
import hashlib
import json
import os
import platform
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np

from medimg.data.phantom import NODULE_HU, PHANTOM_VERSION, thorax_phantom
from medimg.data.phantom_cohort import phantom_cohort
from medimg.data.phantom_realism import BANDS, blob_candidates, froc_cpm, hu_overlap, realism

OUT = Path(__file__).resolve().parents[2] / "results" / "phantom_v1.json"
SEARCH = {"shape": (140, 110, 140), "spacing_mm": (2.0, 2.0, 2.0)}
FINE = {"shape": (64, 368, 368), "spacing_mm": (3.0, 0.977, 0.977)}
VOXELS = {"shape": (40, 96, 96), "spacing_mm": (7.5, 3.7, 3.7), "nodules": ["solid", "part-solid", "ground-glass"]}


def real_ct():
    """`realism` of the real CT, or what was stored of it."""
    for folder in os.environ.get("MEDIMG_DATA", "").split(os.pathsep):
        if folder and (Path(folder) / "thorax_ct" / "dicom").is_dir():
            from medimg.data.dicom import read
            return realism(read(Path(folder) / "thorax_ct" / "dicom"))
    return json.loads(OUT.read_text())["real"]


def search(patient):
    """Candidates and truth of one patient."""
    return (*blob_candidates(patient.case(**SEARCH).volume), patient.nodules)


def detector(cohort, patients):
    """FROC of the yardstick, of all nodules and of each kind."""
    with ProcessPoolExecutor(2) as pool:
        scans = list(pool.map(search, phantom_cohort(patients, seed=cohort)))
    result = {"cohort_seed": cohort, **froc_cpm(scans), "search": {k: list(v) for k, v in SEARCH.items()}}
    result["by_kind"] = {}
    for kind in NODULE_HU:      # other nodules are neither found nor false alarms
        part = []
        for points, scores, nodules in scans:
            free = np.ones(len(scores), bool)
            for o in nodules:
                if o.kind != kind:
                    free &= np.linalg.norm(points - o.centroid_mm, axis=1) >= max(o.diameter_mm / 2, 3.0)
            part.append((points[free], scores[free], [o for o in nodules if o.kind == kind]))
        result["by_kind"][kind] = froc_cpm(part)["sensitivity"]
    return result


def fingerprints():
    """What must not change: truth exactly, voxels within 1 HU."""
    cohort = [p.truth() for p in phantom_cohort(40, seed=0)]
    case = thorax_phantom(0, **VOXELS)
    array = case.volume.array.astype(int)
    voxels = {"seed": 0, **{k: list(v) for k, v in VOXELS.items()}, "truth_sha256": case.truth_sha256, "mean_hu": round(float(array.mean()), 2),
              "sd_hu": round(float(array.std()), 2), "slice": 20, "row": 48, "sample": array[20, 48].tolist(),
              "voxels_per_label": np.bincount(case.labels.ravel()).tolist(),
              "sha256_here": hashlib.sha256(case.volume.array.astype("<i2").tobytes()).hexdigest(), "machine": platform.machine()}
    return {"cohort_truth": {"seed": 0, "patients": 40, "sha256": hashlib.sha256(json.dumps(cohort, sort_keys=True).encode()).hexdigest()}, "voxels": voxels}


def main():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--patients", type=int, default=10)
    parser.add_argument("--cohort", type=int, default=1)
    parser.add_argument("--update", action="store_true", help="write results/phantom_v1.json")
    args = parser.parse_args()
    real, phantoms = real_ct(), {}
    for seed in range(4):
        facts = realism(thorax_phantom(seed, **FINE).volume)
        facts["hu_overlap"] = round(hu_overlap(facts.pop("histogram"), real["histogram"]), 4)
        phantoms[str(seed)] = facts
        print("phantom", seed, facts, flush=True)
    result = {"version": PHANTOM_VERSION, "what": "thorax phantom v1, research use, not a medical device", "tuned_to": "one real CT and cohort 0",
              "bands": {k: list(v) for k, v in BANDS.items()}, "real": real, "phantom": phantoms, **fingerprints()}
    result["detector"] = detector(args.cohort, args.patients)
    print({k: v for k, v in result["real"].items() if k != "histogram"}, result["detector"], sep="\n")
    if args.update:
        OUT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
