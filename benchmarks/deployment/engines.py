"""What each shipped bundle costs to run: cold load, first answer, warm answers with one and two threads, one picture and eight, memory, size of the file; Keras beside it.

    python benchmarks/deployment/engines.py --json results/benchmarks/deployment_engines.json [--repeats 3] [--quick]

Every row is the median over new processes, in which the packages are imported and nothing else. `load` is `Bundle.load` (digests, manifest) and the engine on its graph. An answer is one run of the network on a
prepared picture: preprocessing, explanation and report are not in it. Memory is what the process holds in addition after load and first answer, and after eight at a time (`process_mb`: everything). Volumes go through one by one,
eight of them after one another. Keras runs the same network, with random weights, as a compiled function on the same number of threads; `parity` is the largest difference between Keras and the graph
that was found when the bundle was built.
"""
import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT)]

#: What the network of a bundle that takes any size is measured on; the pictures of the others have one size.
VOLUME = (64, 128, 128)
#: Bundle, and which of its graphs.
GRAPHS = (("pneumonia", "model.onnx"), ("phantom-cxr", "model.onnx"), ("phantom-lungs", "model.onnx"), ("phantom-nodules", "model.onnx"), ("phantom-nodules", "second.onnx"))


def memory_mb():
    """Resident memory of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def timed(call, *, most, seconds):
    """Milliseconds of a call, repeated for a time: median and 99th percentile."""
    import numpy as np
    times, end = [], time.perf_counter() + seconds
    while len(times) < most and (time.perf_counter() < end or len(times) < 3):
        start = time.perf_counter()
        call()
        times.append(1000 * (time.perf_counter() - start))
    return {"median_ms": round(float(np.median(times)), 3), "p99_ms": round(float(np.percentile(times, 99)), 3), "n": len(times)}


def one(name, graph, threads, seconds):
    """One process: load a bundle, answer."""
    import numpy as np
    import onnxruntime  # noqa: F401  (its import is not part of the load)

    from medimg.deployment.bundle import Bundle
    from medimg.deployment.engine import Engine
    before, start = memory_mb(), time.perf_counter()
    data = Bundle.load(name)._files[graph]
    engine = Engine(data, threads=threads)
    load = time.perf_counter() - start
    shape = tuple(s or v for s, v in zip(engine.input_shape, (*VOLUME, 1)))
    batch = {n: np.random.default_rng(0).random((n, *shape), dtype=np.float32) for n in (1, 8)}
    prepared, start = memory_mb(), time.perf_counter()
    engine.run(batch[1])
    found = {"load_ms": round(1000 * load, 1), "first_ms": round(1000 * (time.perf_counter() - start), 2), "memory_mb": round(memory_mb() - before - sum(b.nbytes for b in batch.values()) / 1e6, 1)}
    for n in batch:
        found[f"batch {n}"] = timed(lambda n=n: engine.run(batch[n]), most=2000, seconds=seconds)
    return {**found, "memory_8_mb": round(memory_mb() - prepared + found["memory_mb"], 1), "process_mb": round(memory_mb(), 1), "shape": list(shape), "bytes": len(data)}


def keras(name, threads, seconds):
    """One process: the same network in Keras."""
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
    import numpy as np
    import tensorflow as tf

    from medimg.deployment.bundle import Bundle
    from medimg.models.networks import build_model
    from medimg.models.resnet import inference_model
    from medimg.training.recipes import RECIPES
    tf.config.threading.set_intra_op_parallelism_threads(threads)
    tf.config.threading.set_inter_op_parallelism_threads(1)
    bundle, recipe, before, start = Bundle.load(name), RECIPES[name], memory_mb(), time.perf_counter()
    model = inference_model(build_model(recipe.model, tuple(bundle.manifest["input"]["shape"]), len(bundle.classes), task=bundle.task, **recipe.model_options))
    call, load = tf.function(lambda x: model(x, training=False), jit_compile=False), time.perf_counter() - start
    batch = {n: tf.constant(np.random.default_rng(0).random((n, *bundle.manifest["input"]["shape"]), dtype=np.float32)) for n in (1, 8)}
    start = time.perf_counter()
    call(batch[1])
    found = {"load_ms": round(1000 * load, 1), "first_ms": round(1000 * (time.perf_counter() - start), 2), "memory_mb": round(memory_mb() - before, 1)}
    call(batch[8])
    found |= {f"batch {n}": timed(lambda n=n: call(batch[n])["logits"].numpy(), most=2000, seconds=seconds) for n in batch}
    return {**found, "process_mb": round(memory_mb(), 1)}


def process(*what):
    """What a new process found."""
    done = subprocess.run([sys.executable, __file__, "--one", json.dumps(what)], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    return json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else sys.exit(done.stderr[-2000:])


def median(runs):
    """The median of each number over several runs."""
    first = runs[0]
    if isinstance(first, dict):
        return {k: median([r[k] for r in runs]) for k in first}
    return round(statistics.median(runs), 3) if isinstance(first, float) else first


def table(repeats, seconds):
    """A row for each graph and number of threads, with Keras where the bundle has a recipe."""
    from medimg.deployment.bundle import Bundle
    from medimg.training.recipes import RECIPES
    for name, graph in GRAPHS:
        for threads in (1, 2):
            row = {"bundle": name, "graph": graph, "threads": threads, **median([process("one", name, graph, threads, seconds) for _ in range(repeats)]),
                   "parity": Bundle.load(name).manifest["parity"]["max_abs_difference"] if graph == "model.onnx" else None}
            if name in RECIPES:
                row["keras"] = process("keras", name, threads, seconds)
            yield row
            print(line(row), flush=True)


def line(row):
    """One row to read."""
    size = " × ".join(map(str, row["shape"][:-1]))
    said = (f"{row['bundle']:<16} {row['graph']:<12} {size:<15} {row['threads']} threads  load {row['load_ms']:7.1f}  first {row['first_ms']:7.2f}  "
            + "  ".join(f"{n}: {row[n]['median_ms']:8.3f} (p99 {row[n]['p99_ms']:8.3f})" for n in ("batch 1", "batch 8"))
            + f" ms  +{row['memory_mb']:.0f} / +{row['memory_8_mb']:.0f} MB  {row['bytes'] / 1e3:.0f} kB")
    return said + (f"  Keras {row['keras']['batch 1']['median_ms']:.3f}, {row['keras']['batch 8']['median_ms']:.3f} ms, {row['keras']['process_mb']:.0f} MB against {row['process_mb']:.0f}" if "keras" in row else "")


def arguments(argv=None):
    """What was asked for."""
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("--json", type=Path, help="write the rows here")
    ask.add_argument("--repeats", type=int, help="processes for each row (3; with --quick 1)")
    ask.add_argument("--quick", action="store_true", help="one process a row, half a second each")
    ask.add_argument("--one", help=argparse.SUPPRESS)
    given = ask.parse_args(argv)
    given.repeats = given.repeats or (1 if given.quick else 3)
    return given


def main(argv=None):
    """Measure, print, write."""
    given = arguments(argv)
    if given.one:
        kind, *rest = json.loads(given.one)
        return print(json.dumps({"one": one, "keras": keras}[kind](*rest)))
    from medimg.config import write_atomic
    rows = list(table(given.repeats, 0.3 if given.quick else 1.5))
    if given.json:
        write_atomic(given.json, json.dumps({"machine": {"cores": os.cpu_count(), "load": os.getloadavg()}, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
