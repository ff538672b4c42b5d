"""Volumes as tall images: the answers of Keras and of the plain graph for every kind of 3-D network, and nothing touched that has no flat form."""
import numpy as np
import pytest

onnx = pytest.importorskip("onnx", reason="onnx is part of medimg[train]; remedy: pip install 'medimg[train]'")

from onnx import TensorProto, helper, numpy_helper  # noqa: E402

from medimg.deployment.engine import Engine, export_onnx, parity  # noqa: E402
from medimg.deployment.volume_graph import stack_slices  # noqa: E402


def graph(nodes, shape, weights, out=None):
    """`images` (n, z, y, x, 1) as a volume `x`, the nodes, `y` as `logits`."""
    nodes = [helper.make_node("Transpose", ["images"], ["x"], perm=[0, 4, 1, 2, 3]), *nodes,
             helper.make_node("Transpose", ["y"], ["logits"], perm=[0, 2, 3, 4, 1])]
    ends = [helper.make_tensor_value_info("images", TensorProto.FLOAT, ["n", *shape]),
            helper.make_tensor_value_info("logits", TensorProto.FLOAT, out or ["n", None, None, None, None])]
    made = helper.make_graph(nodes, "g", ends[:1], ends[1:], [numpy_helper.from_array(v, k) for k, v in weights.items()])
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def kernel_ranks(proto):
    tables = {t.name: len(t.dims) - 2 for t in proto.graph.initializer}
    return sorted({tables[n.input[1]] for n in proto.graph.node if n.op_type == "Conv"})


def answer(proto, x):
    return Engine(proto.SerializeToString(), threads=1).run(x)["logits"]


def shaken(model, seed=0):
    """Statistics as after training, scales of both signs: a gap that is not black would show."""
    import keras
    rng = np.random.default_rng(seed)
    for layer in model.layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            c = layer.gamma.shape
            layer.set_weights([rng.uniform(-1.5, 1.5, c), rng.normal(0, 0.3, c), rng.normal(0, 0.3, c), rng.uniform(0.5, 1.5, c)])
    return model


@pytest.mark.parametrize("shape", [(5, 6, 7), (1, 4, 4), (4, 1, 3), (8, 9, 2)])
@pytest.mark.parametrize("size, steps", [((3, 3, 3), (1, 1, 1)), ((1, 3, 3), (1, 1, 1)), ((3, 1, 1), (1, 1, 1)), ((5, 3, 7), (1, 1, 1)), ((3, 5, 3), (1, 1, 1)),
                                         ((2, 2, 2), (1, 1, 1)), ((3, 3, 3), (2, 2, 2)), ((3, 3, 3), (1, 2, 2)), ((2, 2, 2), (2, 2, 2)), ((1, 1, 1), (2, 2, 2))])
def test_one_convolution_beside_scipy(size, steps, shape):
    """Every channel pair by scipy.ndimage.correlate; conv, ReLU, conv, so that a gap that is not black leaks into the second."""
    from scipy.ndimage import correlate
    rng, c = np.random.default_rng(0), 16
    first = rng.normal(size=(c, 1, 3, 3, 3)).astype(np.float32)
    second, bias = rng.normal(size=(2, c, *size)).astype(np.float32), rng.normal(size=2).astype(np.float32)
    before, after = [(s - 1) // 2 for s in size], [s // 2 for s in size]
    nodes = [helper.make_node("Conv", ["x", "a"], ["p"], pads=[1] * 6), helper.make_node("Relu", ["p"], ["q"]),
             helper.make_node("Conv", ["q", "b", "c"], ["y"], pads=[*before, *after], strides=steps)]
    proto = graph(nodes, (*shape, 1), {"a": first, "b": second, "c": bias})
    x = rng.normal(size=(2, *shape, 1)).astype(np.float32)

    def convolved(maps, kernels, at):
        return np.stack([sum(correlate(m, k, mode="constant", origin=at) for m, k in zip(maps, one)) for one in kernels])

    at = [-1 if s % 2 == 0 else 0 for s in size]
    truth = np.stack([convolved(np.maximum(convolved(v[None, ..., 0].astype(float), first.astype(float), 0), 0), second.astype(float), at) for v in x])
    truth = np.moveaxis(truth[:, :, ::steps[0], ::steps[1], ::steps[2]], 1, -1) + bias
    assert np.allclose(answer(proto, x), truth, atol=1e-3)
    made = stack_slices(proto)
    assert made is not proto and kernel_ranks(made)[0] == 2
    assert np.allclose(answer(made, x), truth, atol=1e-3)


def test_a_grey_gap_is_seen():
    """The negative: without the dark start of the sums one slice leaks into the next, and only at the slices' edges."""
    rng = np.random.default_rng(1)
    weights = {name: rng.normal(size=(16, c, 3, 3, 3)).astype(np.float32) for name, c in (("a", 1), ("b", 16))}
    weights["c"] = np.full(16, 2, np.float32)
    nodes = [helper.make_node("Conv", ["x", "a", "c"], ["p"], pads=[1] * 6), helper.make_node("Relu", ["p"], ["q"]),
             helper.make_node("Conv", ["q", "b"], ["y"], pads=[1] * 6)]
    proto, x = graph(nodes, (4, 6, 5, 1), weights), rng.normal(size=(1, 4, 6, 5, 1)).astype(np.float32)
    made, truth = stack_slices(proto), answer(proto, x)
    assert np.allclose(answer(made, x), truth, atol=1e-3)
    for table in made.graph.initializer:
        values = numpy_helper.to_array(table)
        if values.dtype == np.float32 and values.max() < -1e29:
            table.CopyFrom(numpy_helper.from_array(np.zeros_like(values), table.name))
    wrong = np.abs(answer(made, x) - truth).max((0, 1, 3, 4))
    assert wrong[[0, -1]].min() > 0.1 and wrong[1:-1].max() < 1e-3


@pytest.mark.parametrize("why, attributes", [("dilated", {"pads": [2] * 6, "dilations": [2] * 3}), ("valid", {"pads": [0] * 6})])
def test_what_has_no_flat_form_is_left(why, attributes):
    rng = np.random.default_rng(2)
    w = rng.normal(size=(16, 1, 3, 3, 3)).astype(np.float32)
    proto = graph([helper.make_node("Conv", ["x", "w"], ["y"], **attributes)], (6, 7, 8, 1), {"w": w})
    x = rng.normal(size=(2, 6, 7, 8, 1)).astype(np.float32)
    assert kernel_ranks(stack_slices(proto)) == [3]
    assert np.array_equal(answer(stack_slices(proto), x), answer(proto, x))


def test_free_sides_and_images_come_back_as_they_are():
    from medimg.deployment.engine import toy_network
    w = np.ones((1, 1, 3, 3, 3), np.float32)
    free = graph([helper.make_node("Conv", ["x", "w"], ["y"], pads=[1] * 6)], ("z", "y", "x", 1), {"w": w})
    toy = onnx.load_from_string(toy_network())
    assert stack_slices(free) is free and stack_slices(toy) is toy


NETWORKS = [("resnet", (32, 32, 32, 1), {}), ("resnet", (29, 27, 31, 2), {}), ("resnet", (20, 33, 28, 1), {"norm": "none", "squeeze": 8}),
            ("resnet", (28, 28, 28, 1), {"norm": "group", "pool": "blur"}), ("resnet", (48, 20, 24, 1), {"skip": False, "width": 24}),
            ("unet", (16, 24, 32, 1), {}), ("unet", (16, 32, 24, 1), {"norm": "instance", "attention": True}), ("unet", (16, 32, 48, 2), {"stem": 2}),
            ("unet", (8, 16, 8, 1), {"residual": False, "skip": False, "width": 8}), ("detector", (32, 32, 32, 1), {}),
            ("detector", (16, 24, 40, 2), {"box": True, "norm": "instance", "width": 8})]


@pytest.mark.slow
@pytest.mark.parametrize("name, shape, options", NETWORKS, ids=[f"{n}-{'x'.join(map(str, s))}{'-' + '-'.join(o) if o else ''}" for n, s, o in NETWORKS])
def test_networks_answer_as_keras(name, shape, options, tmp_path):
    from medimg.models.networks import build_model
    model = shaken(build_model(name, shape, 3, seed=0, **options))
    path = export_onnx(model, tmp_path / "m.onnx")
    assert 2 in kernel_ranks(onnx.load(path))
    x = np.random.default_rng(0).normal(size=(3, *shape)).astype(np.float32)
    scale = max(1.0, float(np.abs(np.asarray(model(x, training=False))).max()))
    assert parity(lambda b: model(b, training=False), Engine(path, threads=1), x) <= 1e-5 * max(10.0, scale)
    together = Engine(path, threads=1).run(x, chunk=3)["logits"]
    assert np.allclose(together, Engine(path, threads=2).run(x)["logits"], atol=1e-5 * scale), "a batch and one by one differ"
    assert export_onnx(model, tmp_path / "again.onnx").read_bytes() == path.read_bytes()
    assert path.stat().st_size < 1.05 * export_onnx(model, tmp_path / "plain.onnx", stack=False).stat().st_size + 50_000


@pytest.mark.slow
def test_three_outputs_stay_named(tmp_path):
    from medimg.models.networks import build_model
    from medimg.models.resnet import inference_model
    model = inference_model(shaken(build_model("resnet", (28, 28, 28, 1), 2, seed=0)))
    engine = Engine(export_onnx(model, tmp_path / "m.onnx"))
    x = np.random.default_rng(0).random((7, 28, 28, 28, 1), dtype=np.float32)
    assert engine.outputs == ("logits", "features", "cam") and engine.input_shape == (28, 28, 28, 1)
    assert parity(lambda b: model(b, training=False), engine, x) <= 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(None, None, None, 1), (None, None, 1)])
def test_free_sides_take_any_multiple(shape, tmp_path):
    """A detector made for no size in particular is exported as Keras wrote it, and answers for each."""
    from medimg.models.detector import centre_detector
    model = shaken(centre_detector(shape, 2))
    engine = Engine(export_onnx(model, tmp_path / "m.onnx"), threads=1)
    assert engine.input_shape == shape
    for sides in ((16, 24, 32), (8, 8, 40)):
        x = np.random.default_rng(0).normal(size=(2, *sides[:len(shape) - 1], 1)).astype(np.float32)
        truth = np.asarray(model(x, training=False))
        assert np.allclose(engine.run(x)["logits"], truth, atol=1e-5 * max(10, np.abs(truth).max()))
