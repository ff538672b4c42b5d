"""Two workers against one process on the same cores: python benchmarks/training/distributed.py [--json FILE] [--rounds N]

The small ResNet on 28 × 28 images, joint batch 64, drawing and augmentation included. One process with two threads and two processes of one thread each take turns; a round gives
a ratio of their images a second (median step), printed is the median over rounds with its range, for group normalisation, for none, and for batch normalisation with statistics that are
synchronised and not. `cpu` is the processor time of a joint step, of both workers together, against that of one process: what the ratio would be at best if nobody ever waited. The largest
difference between the two loss curves is printed beside it, and the bytes counted by the sockets against 4 bytes for each number of the gradient and for the loss.
At the end the points of the scaling figure: one worker of one thread, and two.
"""
import json
import os
import statistics
import sys
from pathlib import Path

import numpy as np

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parents[2])]
from medimg.training.distributed import launch  # noqa: E402
from medimg.training.record import environment  # noqa: E402

PLANS = {"group": {"norm": "group"}, "none": {"norm": "none"}, "batch, synchronised": {"norm": "batch"}, "batch, not synchronised": {"norm": "batch", "synchronise": False}}


def run(workers, threads, alone, steps):
    """{plan: what `rehearse` gives} of one start."""
    plans = [{**plan, "alone": alone} for plan in PLANS.values()]
    rows = launch("medimg.training.distributed:rehearse", {"plans": plans, "steps": steps, "batch": 64, "side": 28}, workers=workers, threads=threads)
    return dict(zip(PLANS, rows))


def middle(values):
    """Median, smallest and largest."""
    return [round(f(values), 4) for f in (statistics.median, min, max)]


def main(out=None, rounds=3, steps=100):
    pairs = []
    for _ in range(rounds):
        pairs.append((run(1, 2, True, steps), run(2, 1, False, steps)))
    single = run(1, 1, True, steps)
    rows = {}
    print(f"load {os.getloadavg()[0]:.1f} on {len(os.sched_getaffinity(0))} cores; {rounds} rounds of {steps} steps\n{'':26}{'one, ms':>9}{'two, ms':>9}{'ratio':>8}{'range':>16}{'cpu':>7}{'curves differ by':>18}{'bytes / computed':>18}")
    for name in PLANS:
        ratios = [float(np.median(one[name]["seconds"]) / np.median(two[name]["seconds"])) for one, two in pairs]
        row = {"one_ms": middle([1000 * float(np.median(one[name]["seconds"])) for one, _ in pairs]), "two_ms": middle([1000 * float(np.median(two[name]["seconds"])) for _, two in pairs]),
               "ratio": middle(ratios), "cpu_ratio": middle([one[name]["cpu_s"] / (2 * two[name]["cpu_s"]) for one, two in pairs]),
               "curves_differ_by": max(float(np.abs(np.subtract(one[name]["losses"], two[name]["losses"])).max()) for one, two in pairs),
               "bytes": round(pairs[0][1][name]["bytes"]), "bytes_computed": 4 * (pairs[0][1][name]["parameters"] + 1),
               "one_thread_ms": round(1000 * float(np.median(single[name]["seconds"])), 2)}
        rows[name] = row
        print(f"{name:26}{row['one_ms'][0]:9.1f}{row['two_ms'][0]:9.1f}{row['ratio'][0]:8.2f}{row['ratio'][1]:8.2f} …{row['ratio'][2]:5.2f} {row['cpu_ratio'][0]:7.2f}"
              f"{row['curves_differ_by']:18.1e}{row['bytes'] / row['bytes_computed']:18.3f}")
    if out:
        here = environment()
        Path(out).write_text(json.dumps({"norms": rows, "rounds": rounds, "steps": steps, "load": round(os.getloadavg()[0], 1), "versions": here["versions"], "machine": here["machine"]}, indent=1) + "\n",
                             encoding="utf-8")


if __name__ == "__main__":
    options = dict(zip(sys.argv[1::2], sys.argv[2::2]))
    main(options.get("--json"), int(options.get("--rounds", 3)))
