"""Which scans phantom-nodules refuses as unlike its training scans: ordinary phantoms, other scanners, spoilt scans, and a real one.

    python benchmarks/deployment/strange_scans.py [ORDINARY] [EACH]      # about 10 min of one core for 40 and 3

Not a timing. The ordinary scans are of patients in no fold (cohort 91), in the four ways of the training; of `EACH` more patients (cohort 92) every row below is made. The real CT (TCIA 4D-Lung,
Hugo 2016, CC BY 3.0) is read from thorax_ct/dicom below MEDIMG_DATA; without it its stored row is kept.
"""
import json
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
STORED = ROOT / "results" / "benchmarks" / "deployment_strange_scans.json"


def ordinary(n):
    """Scans like those of the training, of other patients."""
    from medimg.data.phantom_cohort import phantom_cohort
    from medimg.data.scans import ACQUISITIONS
    names = list(ACQUISITIONS)
    return ((f"as trained, {names[k % 4]}", one.case(**ACQUISITIONS[names[k % 4]].grid).volume) for k, one in enumerate(phantom_cohort(n, seed=91)))


def elsewhere(patient):
    """The same patient by other doses, grids, filters; nothing is wrong with these scans."""
    from medimg.data.phantom_scanner import scan_ct
    from medimg.data.scans import ACQUISITIONS, Acquisition
    routine = ACQUISITIONS["routine"].grid
    yield "field of 358 mm, slices of 3 mm", patient.case().volume
    for dose in (0.1, 2.0):
        yield f"dose {dose:g}", patient.case(**{**routine, "dose": dose}).volume
    for z, x in ((1.0, 0.8), (2.5, 0.7), (3.3, 1.6)):
        yield f"voxels {z:g} × {x:g} × {x:g} mm", patient.case(**Acquisition(z, x, 1.0).grid).volume
    still = patient.case(**{**routine, "dose": None})
    yield "no noise at all", still.volume
    for kernel in ("soft", "sharp"):
        yield f"kernel {kernel}", scan_ct(still, kernel=kernel).volume
    yield "breathing, 8 mm", scan_ct(still, motion_mm=8).volume
    yield "two steel rods", scan_ct(patient.case(dose=None), metal=True).volume      # slices as wide as deep


def spoilt(scan, rng):
    """The scan with wrong numbers, wrong geometry, missing parts or disease."""
    from scipy import ndimage

    from medimg.data.lungs import segment_lungs
    from medimg.data.volume import Volume, make_affine
    hu, lungs, n = scan.array.astype(np.float32), segment_lungs(scan), len(scan.array)
    new = lambda array: scan.with_array(np.clip(np.rint(array), -1024, 3071).astype(np.int16))
    inside = lambda where, value: new(np.where(where, value, hu))
    low = int(np.flatnonzero(lungs.any((1, 2)))[0] + 30 / scan.spacing_mm[0])
    base = (lungs == 1) & (np.arange(n) < n // 2)[:, None, None]
    yield from ((f"HU {step:+d}", new(hu + step)) for step in (-300, -100, -50, 50, 100, 200))
    yield from (("rescale missing (+1024)", new(hu + 1024)), ("slope doubled", new(hu * 2)), ("inverted", new(-hu)), ("grey values as HU", new((hu + 1350) / 1500 * 255)))
    for k in ((2, 2, 2), (0.5, 0.5, 0.5), (1.5, 1, 1), (1, 1, 1.5), (1.1, 1.1, 1.1)):
        spacing, start = np.multiply(scan.spacing_mm, k), np.multiply(scan.origin_mm, k[::-1])
        yield f"spacing times {' × '.join(f'{v:g}' for v in k)}", Volume(scan.array, make_affine(tuple(spacing), list(start)), modality="CT", units="HU")
    yield from (("upside down", new(hu[::-1])), ("front to back", new(hu[:, ::-1])), ("right and left swapped", new(hu[:, :, ::-1])),
                ("lying on the side", Volume(np.rot90(scan.array, 1, (1, 2)).copy(), scan.affine, modality="CT", units="HU")))
    yield from (("upper half only", scan.crop(z=slice(n // 2, n))), ("lower half only", scan.crop(z=slice(0, n // 2))), ("lowest 30 mm of lung missing", scan.crop(z=slice(low, n))))
    yield from (("no lungs (tissue)", inside(lungs > 0, 40)), ("left lung solid", inside(lungs == 2, 40)), ("right base solid", inside(base, 20)), ("lungs denser by 150 HU", new(hu + 150 * (lungs > 0))))
    yield from ((f"noise of {sd} HU more", new(hu + rng.normal(0, sd, hu.shape))) for sd in (50, 150, 300))
    yield from (("blurred by 3 mm", new(ndimage.gaussian_filter(hu, 3 / np.array(scan.spacing_mm)))), ("noise only", new(rng.normal(-300, 400, hu.shape))))


def gathered(bundle, many, each):
    """(group, name, facts or None where no lungs are found) of every scan."""
    from medimg.config import find_data
    from medimg.data.dicom import read
    from medimg.data.phantom_cohort import phantom_cohort
    from medimg.data.scans import ACQUISITIONS
    for name, volume in ordinary(many):
        yield "ordinary", name, facts_of(bundle, volume)
    for k, patient in enumerate(phantom_cohort(each, seed=92)):
        scan = patient.case(**ACQUISITIONS[list(ACQUISITIONS)[k % 4]].grid).volume
        for group, rows in (("elsewhere", elsewhere(patient)), ("spoilt", spoilt(scan, np.random.default_rng(k)))):
            for name, volume in rows:
                yield group, name, facts_of(bundle, volume)
    if folder := find_data("thorax_ct"):
        yield "real", "a patient (TCIA 4D-Lung)", facts_of(bundle, read(folder / "dicom"))


def facts_of(bundle, volume):
    """Facts of a scan on the bundle's grid, None without lungs."""
    from medimg.deployment.located import ground_of
    from medimg.deployment.reference import scan_facts
    from medimg.errors import DatasetError
    try:
        return scan_facts(*ground_of(bundle, volume))
    except DatasetError:
        return None


def judged(bundle, rows):
    """Scans, how many are refused, how many of these for want of lungs, and the distances, by group and name."""
    table = {}
    for group, name, facts in rows:
        row = table.setdefault(group, {}).setdefault(name, {"scans": 0, "refused": 0, "no_lungs": 0, "distances": []})
        far = None if facts is None else float(bundle.reference.score(facts[None])[0])
        row["scans"] += 1
        row["no_lungs"] += far is None
        row["refused"] += far is None or far > bundle.reference.threshold
        row["distances"] += [] if far is None else [round(far, 1)]
    return {"threshold": round(bundle.reference.threshold, 1), "digest": bundle.digest, "groups": table}


def store(table):
    """Print the table and keep it."""
    if "real" not in table["groups"] and STORED.is_file():
        table["groups"]["real"] = json.loads(STORED.read_text(encoding="utf-8"))["groups"].get("real", {})
    for group, rows in table["groups"].items():
        for name, row in rows.items():
            print(f"{group:10} {name:32} {row['refused']} of {row['scans']} refused, {row['no_lungs']} without lungs; distance {row['distances'][:6]}")
    STORED.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")


def main(many=40, each=3):
    """Gather, judge, store."""
    from medimg.deployment.bundle import Bundle
    bundle = Bundle.load("phantom-nodules")
    store(judged(bundle, gathered(bundle, int(many), int(each))))


if __name__ == "__main__":
    main(*sys.argv[1:])
