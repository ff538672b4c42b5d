"""Where the time of one CT goes: python benchmarks/deployment/ct_stages.py

A phantom series of 99 slices (3 mm, 1.6 mm pixels) written as DICOM, answered by the shipped detector; the median of five runs by stage, in seconds, is printed and stored.
"""
import json
import statistics
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def main():
    """Measure, print, store."""
    from medimg.data.lungs import segment_lungs
    from medimg.data.phantom import thorax_phantom
    from medimg.data.phantom_dicom import write_ct
    from medimg.deployment.bundle import Bundle
    from medimg.deployment.intake import find_studies
    from medimg.deployment.located import marks_of
    from medimg.deployment.study import assess
    bundle, rows = Bundle.load("phantom-nodules"), []
    with tempfile.TemporaryDirectory() as folder:
        case = thorax_phantom(7, nodules=["solid", "part-solid", "ground-glass"], shape=(99, 192, 224), spacing_mm=(3.0, 1.6, 1.6))
        write_ct(case.volume, folder, seed=7)
        for _ in range(6):
            times = [time.perf_counter()]
            [(_, load)] = find_studies(folder, stacks=True)
            volume = load().volume
            times.append(time.perf_counter())
            grid = bundle.preprocessor(volume)
            times.append(time.perf_counter())
            segment_lungs(grid)
            times.append(time.perf_counter())
            marks_of(bundle, volume)
            times.append(time.perf_counter())
            assess(bundle, folder, progress=False)
            times.append(time.perf_counter())
            read, resample, lungs, search, whole = (b - a for a, b in zip(times, times[1:]))
            networks = search - resample - lungs
            rows.append({"read": read, "resample": resample, "lungs": lungs, "two networks": networks, "measure, recommend, write": whole - read - search, "whole": whole})
    found = {name: round(statistics.median(row[name] for row in rows[1:]), 3) for name in rows[0]}
    print(json.dumps(found))
    (ROOT / "results" / "benchmarks" / "deployment_ct_stages.json").write_text(json.dumps({"slices": 99, "seconds": found}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
