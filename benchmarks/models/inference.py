"""Inference of the default networks through ONNX Runtime beside eager PyTorch: the same weights and batch, one thread, CPU seconds.

    make bench SUBJECT=inference
    python benchmarks/models/inference.py --json results/benchmarks/models_inference.json

PyTorch runs the graph as Keras wrote it, node by node with torch.nn.functional, batch normalisation already folded, in inference mode, once in the plain and once in the
channels-last memory layout; the ratio is against the quicker of the two. Ours is `Engine.run` as a bundle uses it: 3-D convolutions laid flat on export, a
batch of volumes one volume at a time. Outputs are compared before anything is timed.
"""
import json
import os
import sys
import tempfile
from pathlib import Path

THREADS = 1
os.environ.update({name: str(THREADS) for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")})

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import numpy as np  # noqa: E402
from sidebyside import Peer, compare, main, peer_python  # noqa: E402

#: What is timed: name, network, input shape, options, batch size.
CASES = [("ResNet 28 px, batch 64", "resnet", (28, 28, 1), 2, {}, 64), ("ResNet 224 px, batch 8", "resnet", (224, 224, 3), 2, {}, 8),
         ("3-D ResNet 32 voxels, batch 8", "resnet", (32, 32, 32, 1), 2, {}, 8), ("U-Net 256 px, batch 4", "unet", (256, 256, 1), 2, {}, 4),
         ("3-D U-Net 64 voxels, batch 1", "unet", (64, 64, 64, 1), 2, {}, 1), ("3-D detector 32 voxels, batch 8", "detector", (32, 32, 32, 1), 3, {}, 8)]

TORCH = """
import json, numpy as np, torch, torch.nn.functional as F
torch.set_num_threads(THREADS)

def pads(a, n):
    p = a.get("pads") or [0] * (2 * n)
    return [v for i in reversed(range(n)) for v in (p[i], p[n + i])]

def run_node(op, v, a):
    if op == "Conv":
        n = v[1].dim() - 2
        p = pads(a, n)
        even = all(p[2 * i] == p[2 * i + 1] for i in range(n))
        x = v[0] if even else F.pad(v[0], p)
        conv = (F.conv2d, F.conv3d)[n - 2]
        return conv(x, v[1], v[2] if len(v) > 2 else None, tuple(a.get("strides", [1] * n)), tuple(reversed(p[::2])) if even else 0,
                    tuple(a.get("dilations", [1] * n)), a.get("group", 1))
    if op == "ConvTranspose":
        n = v[1].dim() - 2
        return (F.conv_transpose2d, F.conv_transpose3d)[n - 2](v[0], v[1], v[2] if len(v) > 2 else None, tuple(a["strides"]))
    if op in ("MaxPool", "AveragePool"):
        k = a["kernel_shape"]
        n = len(k)
        p = pads(a, n)
        x = F.pad(v[0], p, value=float("-inf") if op == "MaxPool" else 0.0) if any(p) else v[0]
        f = {"MaxPool": (F.max_pool2d, F.max_pool3d), "AveragePool": (F.avg_pool2d, F.avg_pool3d)}[op][n - 2]
        return f(x, tuple(k), tuple(a["strides"]))
    if op == "Resize":
        size = tuple(int(s) for s in v[3][2:]) if len(v) > 3 and v[3] is not None and v[3].numel() else None
        scale = None if size else tuple(float(s) for s in v[2][2:])
        return F.interpolate(v[0], size=size, scale_factor=scale, mode="nearest" if a.get("mode", b"nearest") in ("nearest", b"nearest") else {4: "bilinear", 5: "trilinear"}[v[0].dim()])
    if op == "Transpose": return v[0].permute(*a["perm"])
    if op == "Reshape": return v[0].reshape([v[0].shape[i] if s == 0 else int(s) for i, s in enumerate(v[1].tolist())])
    if op == "Shape": return torch.tensor(v[0].shape)
    if op == "Gather": return torch.index_select(v[0], a.get("axis", 0), v[1].reshape(-1).long()).reshape(*v[0].shape[:a.get("axis", 0)], *v[1].shape, *v[0].shape[a.get("axis", 0) + 1:])
    if op == "Cast": return v[0].to({1: torch.float32, 6: torch.int32, 7: torch.int64}[a["to"]])
    if op == "ReduceProd": return v[0].prod() if not a.get("keepdims", 1) else v[0].prod().reshape(1)
    if op == "Slice":
        at = [slice(None)] * v[0].dim()
        for begin, end, axis in zip(v[1].tolist(), v[2].tolist(), v[3].tolist() if len(v) > 3 else range(v[0].dim())): at[axis] = slice(begin, end)
        return v[0][tuple(at)]
    if op == "Tile": return v[0].repeat(*v[1].tolist())
    if op == "Pad": return F.pad(v[0], pads({"pads": v[1].tolist()}, v[0].dim()))
    if op == "LeakyRelu": return F.leaky_relu(v[0], a.get("alpha", 0.01))
    if op == "Concat": return torch.cat(v, a["axis"])
    if op == "GlobalAveragePool": return v[0].mean(tuple(range(2, v[0].dim())), keepdim=True)
    if op == "ReduceMean": return v[0].mean(tuple(a["axes"] if "axes" in a else v[1].tolist()), keepdim=bool(a.get("keepdims", 1)))
    if op == "Squeeze": return v[0].squeeze(tuple(a["axes"] if "axes" in a else v[1].tolist()))
    if op == "Unsqueeze":
        for i in sorted(a["axes"] if "axes" in a else v[1].tolist()): v[0] = v[0].unsqueeze(i)
        return v[0]
    if op == "Gemm": return F.linear(v[0], v[1] if a.get("transB") else v[1].T, v[2] if len(v) > 2 else None)
    simple = {"Relu": F.relu, "Mul": torch.mul, "Add": torch.add, "Sub": torch.sub, "MatMul": torch.matmul, "Sigmoid": torch.sigmoid, "Tanh": torch.tanh,
              "Identity": lambda x: x, "Div": torch.div, "Max": torch.maximum}
    return simple[op](*v)

def forward(graph, images):
    values = dict(graph["weights"], images=images)
    for op, inputs, outputs, a in graph["nodes"]:
        values[outputs[0]] = run_node(op, [values.get(i) for i in inputs], a)
    return values["logits"]

def load(path, last):
    kept = np.load(path + ".npz")
    weights = {k: torch.from_numpy(kept[k]) for k in kept.files}
    graph = {"nodes": json.load(open(path + ".json")), "weights": weights}
    form = {4: torch.channels_last, 5: torch.channels_last_3d}
    if last:
        kernels = {i[1] for op, i, o, a in graph["nodes"] if op in ("Conv", "ConvTranspose")}
        graph["weights"] = {k: w.contiguous(memory_format=form[w.dim()]) if k in kernels else w for k, w in weights.items()}
    return graph

graphs = {}
def run(path, save=None):
    if path not in graphs:
        graphs[path] = load(path, LAST), torch.from_numpy(np.load(path + ".images.npy"))
    graph, x = graphs[path]
    with torch.inference_mode():
        y = forward(graph, x)
    if save:
        np.save(save, y.numpy())
""".replace("THREADS", str(THREADS))


def exported(name, shape, classes, options, folder):
    """The network as ONNX, and the nodes and weights that Keras wrote for the peer."""
    import onnx

    from medimg.deployment.engine import export_onnx
    from medimg.models.networks import build_model
    model, path = build_model(name, shape, classes, seed=0, **options), Path(folder) / f"{name}{len(shape)}{shape[0]}.onnx"
    graph = onnx.load(export_onnx(model, path, stack=False)).graph
    weights = {w.name: onnx.numpy_helper.to_array(w) for w in graph.initializer}
    nodes = []
    for node in graph.node:
        a = {x.name: onnx.helper.get_attribute_value(x) for x in node.attribute}
        if node.op_type == "Constant":
            weights[node.output[0]] = onnx.numpy_helper.to_array(a["value"])
            continue
        nodes.append([node.op_type, list(node.input), list(node.output), {k: v.decode() if isinstance(v, bytes) else v for k, v in a.items()}])
    Path(f"{path}.json").write_text(json.dumps(nodes))
    np.savez(f"{path}.npz", **weights)
    return export_onnx(model, path)


def measure(repeats):
    """One row a network: ours through ONNX Runtime, the peer in its better layout."""
    from medimg.deployment.engine import Engine
    made = []
    with tempfile.TemporaryDirectory() as folder:
        for what, name, shape, classes, options, batch in CASES if peer_python() else ():
            path = exported(name, shape, classes, options, folder)
            images = np.random.default_rng(0).random((batch, *shape), dtype=np.float32)
            np.save(f"{path}.images.npy", images)
            engine = Engine(path, threads=THREADS)
            ours = engine.run(images)["logits"]
            peers = {f"PyTorch eager, {layout}": Peer(f"LAST = {layout != 'plain'}\n{TORCH}") for layout in ("plain", "channels last")}
            for label, peer in peers.items():
                peer(path=str(path), save=f"{path}.out.npy")
                gap = float(np.abs(np.load(f"{path}.out.npy") - ours).max())
                assert gap < 1e-3, f"{what}: {label} differs by {gap}"
            timed = compare(what, lambda engine=engine, images=images, **_: engine.run(images), peers, repeats=repeats, cpu=True, path=str(path))
            best = min(timed, key=lambda row: row["peer_s"])
            made.append({**best, "images_per_s": batch / best["ours_s"], "other_layout_s": max(t["peer_s"] for t in timed), "threads": THREADS, "max_difference": gap})
            for peer in peers.values():
                peer.close()
    return made


if __name__ == "__main__":
    main(measure, __doc__.splitlines()[0])
