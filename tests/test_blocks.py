"""The blocks: against SciPy, NumPy and dense convolutions; saved, loaded in safe mode and exported; what they refuse."""
import subprocess
import sys

import numpy as np
import pytest
from scipy import ndimage

from medimg.errors import ConfigError
from medimg.models import blocks as b

FLAT, DEEP = (7, 10, 3), (5, 6, 7, 3)
each_rank = pytest.mark.parametrize("shape", [FLAT, DEEP], ids=["2-D", "3-D"])


def model_of(shape, make):
    import keras
    x = keras.Input(shape, name="images")
    return keras.Model(x, make(x))


def noise(shape, n=2, seed=0):
    return np.random.default_rng(seed).normal(size=(n, *shape)).astype("float32")


def everything(x):
    """All blocks in one network, 2-D or 3-D."""
    x = b.conv_block(x, 8, norm="group", activation="gelu", name="a")
    fine = x = b.residual_block(x, 8, norm="instance", squeeze=4, name="r")
    x = b.residual_block(x, 8, stride=2, pool="blur", name="s")
    x = b.bottleneck_block(x, 12, pool="max", name="t")
    x = b.depthwise_block(x, 8, norm="none", activation=None, name="d")
    gated = b.attention_gate(fine, x, 4, name="g")
    x = b.upsample(x, 2, kind="linear", name="u") + b.upsample(b.max_pool(gated, name="m"), 2, name="v")
    x = b.gated_pooling(6, strides=2, activation="sigmoid", name="w")(x)
    return b.global_average(x, name="logits")


# --- numbers

@each_rank
@pytest.mark.parametrize("stride", [1, 2])
def test_conv_equals_scipy(shape, stride):
    net, x = model_of(shape, lambda x: b.conv(x, 4, stride=stride, name="c")), noise(shape)
    kernel = net.get_layer("c").kernel.numpy()
    full = np.stack([sum(ndimage.correlate(x[0, ..., i], kernel[..., i, o], mode="constant") for i in range(3)) for o in range(4)], axis=-1)
    before = [max((-(-n // stride) - 1) * stride + 3 - n, 0) // 2 for n in shape[:-1]]
    expected = full[tuple(slice(1 - p, None, stride) for p in before)]
    assert np.abs(np.asarray(net(x))[0] - expected).max() < 1e-5


@pytest.mark.parametrize("shape", [(6, 6, 12), (4, 4, 4, 12)], ids=["2-D", "3-D"])
@pytest.mark.parametrize("kind, groups", [("batch", None), ("group", 4), ("instance", 12)])
def test_norms_equal_numpy(shape, kind, groups):
    x = 3 + 2 * noise(shape, 4)
    got = np.asarray(model_of(shape, lambda x: b.norm(x, kind))(x, training=True))
    parts = x.reshape(*x.shape[:-1], groups, 12 // groups) if groups else x
    axes = tuple(range(1, x.ndim - 1)) + ((x.ndim,) if groups else ()) if groups else tuple(range(x.ndim - 1))
    expected = (parts - parts.mean(axes, keepdims=True)) / np.sqrt(parts.var(axes, keepdims=True) + 1e-3)
    assert np.abs(got - expected.reshape(x.shape)).max() < 1e-4
    untouched = model_of(shape, lambda x: b.norm(x, "none"))
    assert np.array_equal(untouched(x), x)


@each_rank
@pytest.mark.parametrize("stride", [2, 3])
def test_blur_pool_is_a_triangle(shape, stride):
    x = noise(shape, 1)
    got = np.asarray(model_of(shape, lambda x: b.blur_pool(x, stride, name="b"))(x))[0]
    if stride == 2:
        expected = np.pad(x[0], [(0, n % 2) for n in shape[:-1]] + [(0, 0)], mode="edge")
        for axis in range(len(shape) - 1):
            expected = ndimage.correlate1d(expected, [0.25, 0.5, 0.25], axis=axis, mode="nearest")
            expected = np.take(expected, np.arange(1, expected.shape[axis], 2), axis=axis)
        assert np.abs(got - expected).max() < 1e-6
    assert got.shape[:-1] == tuple(-(-n // stride) for n in shape[:-1])
    assert np.allclose(model_of(shape, lambda x: b.blur_pool(x, stride, name="b"))(np.ones_like(x)), 1, atol=1e-6)


def test_blur_pool_moves_with_the_image():
    """The sum of a spot that is pooled 4 times does not depend on where it lies; max-pooling's does."""
    y, x = np.mgrid[:32, :32]
    spots = np.stack([np.clip(2 - np.hypot(y - 13, x - 9 - s), 0, 1) for s in range(8)]).astype("float32")[..., None]
    blurred = model_of((32, 32, 1), lambda x: b.blur_pool(b.blur_pool(x, name="p"), name="q"))(spots)
    pooled = model_of((32, 32, 1), lambda x: b.max_pool(b.max_pool(x)))(spots)
    assert np.ptp(np.asarray(blurred).sum(axis=(1, 2, 3))) < 1e-4 < 0.5 < np.ptp(np.asarray(pooled).sum(axis=(1, 2, 3)))


@each_rank
@pytest.mark.parametrize("factor", [2, 3])
def test_upsample_equals_scipy_and_repeat(shape, factor):
    x = noise(shape, 1)
    linear = np.asarray(model_of(shape, lambda x: b.upsample(x, factor, kind="linear", name="u"))(x))[0]
    expected = ndimage.zoom(x[0].astype(float), (factor,) * (len(shape) - 1) + (1,), order=1, mode="nearest", grid_mode=True)
    assert np.abs(linear - expected).max() < 1e-5
    repeated = x[0]
    for axis in range(len(shape) - 1):
        repeated = repeated.repeat(factor, axis=axis)
    assert np.array_equal(model_of(shape, lambda x: b.upsample(x, factor, name="u"))(x)[0], repeated)


@each_rank
def test_squeeze_and_attention_by_formula(shape):
    import keras

    def sigmoid(a):
        return 1 / (1 + np.exp(-a))
    x, net = noise((*shape[:-1], 8)), model_of((*shape[:-1], 8), lambda x: b.squeeze_excite(x, 2, name="s"))
    w1, b1, w2, b2 = net.get_weights()
    factor = sigmoid(np.maximum(x.mean(axis=tuple(range(1, x.ndim - 1))) @ w1 + b1, 0) @ w2 + b2)
    assert np.allclose(net(x), x * factor.reshape(2, *[1] * (x.ndim - 2), 8), atol=1e-5)
    skip, gate = keras.Input((*shape[:-1], 3)), keras.Input((*shape[:-1], 5))
    net = keras.Model([skip, gate], b.attention_gate(skip, gate, 4, name="g"))
    (w_x,), (w_g, bias), (psi, b_psi) = (net.get_layer(f"g_{part}").get_weights() for part in ("skip", "gate", "psi"))
    x, g, one = noise((*shape[:-1], 3)), noise((*shape[:-1], 5), seed=1), (0,) * (len(shape) - 1)
    alpha = sigmoid(np.maximum(x @ w_x[one] + g @ w_g[one] + bias, 0) @ psi[one] + b_psi)
    assert np.allclose(net([x, g]), x * alpha, atol=1e-5) and 0 < alpha.min() < alpha.max() < 1


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("shape", [(5, 6, 7, 3), (6, 7, 8, 3)], ids=["odd", "even"])
def test_depthwise_in_3d_is_a_dense_convolution(shape, stride):
    """Plane and line together are one 3 x 3 x 3 kernel with zeros between channels; strides fall on the same voxels."""
    import keras
    net, x = model_of(shape, lambda x: b._depthwise(x, 3, stride, True, "d")), noise(shape)
    plane, line, bias = net.get_weights()
    dense = keras.layers.Conv3D(3, 3, stride, padding="same")
    dense.build((None, *shape))
    kernel = np.zeros((3, 3, 3, 3, 3), "float32")
    for c in range(3):
        kernel[..., c, c] = line[:, 0, c, 0][:, None, None] * plane[None, :, :, c, 0]
    dense.set_weights([kernel, bias])
    assert net(x).shape == dense(x).shape and np.abs(np.asarray(net(x)) - np.asarray(dense(x))).max() < 1e-5


@each_rank
@pytest.mark.parametrize("make", [b.residual_block, b.bottleneck_block])
def test_a_silent_block_is_the_identity(shape, make):
    shape = (*shape[:-1], 8)
    net, x = model_of(shape, lambda x: make(x, 8, squeeze=2, name="r")), noise(shape)
    for layer in net.layers:
        if layer.name.endswith("_conv"):
            layer.set_weights([np.zeros_like(w) for w in layer.get_weights()])
    assert np.array_equal(net(x), x)
    silent = model_of(shape, lambda x: make(x, 8, skip=False, name="r"))
    assert "r_add" not in [layer.name for layer in silent.layers]


@each_rank
def test_parameters_by_hand(shape):
    k = 3 ** (len(shape) - 1)
    counts = {k * 3 * 16 + 16: lambda x: b.conv(x, 16), k * 3 * 16 + 64: lambda x: b.conv_block(x, 16, name="a"),
              4 * 3 + k * 3 * 16 + 4 * 16 + k * 16 * 16 + 3 * 16: lambda x: b.residual_block(x, 16, stride=2, name="a"),
              3 * 4 + 4 + k * 4 * 4 + 4 + 4 * 16 + 16 + 3 * 16: lambda x: b.bottleneck_block(x, 16, norm="none", name="a"),
              (9 if k == 9 else 12) * 3 + 12 + 3 * 16 + 64: lambda x: b.depthwise_block(x, 16, name="a")}
    for count, make in counts.items():
        assert model_of(shape, make).count_params() == count


# --- gated pooling

def test_gated_pooling_in_3d_equals_numpy():
    x, layer = noise((4, 5, 6, 2), 1), b.gated_pooling(2, kernel_size=1, activation="sigmoid")
    out = np.asarray(layer(x))[0]
    kernel, bias = layer.conv.get_weights()
    y = 1 / (1 + np.exp(-(x[0].astype(float) @ kernel[0, 0, 0] + bias)))
    p = np.stack([[[[y[i // 2 * 2:i // 2 * 2 + 2, j // 2 * 2:j // 2 * 2 + 2, k // 2 * 2:k // 2 * 2 + 2, c].max() for k in range(6)] for j in range(5)]
                   for i in range(4)] for c in range(2)], axis=-1)
    assert np.abs(out - 2 * (y * (1 - p) + p)).max() < 1e-6


def test_gated_pooling_of_older_files_is_still_known():
    """Its place and its configuration as version 0.1 wrote them."""
    import keras
    config = {"name": "gated_0", "trainable": True, "dtype": "float32", "filters": 4, "kernel_size": [3, 3], "strides": [2, 2], "activation": "linear"}
    old = {"module": "medimg.models.networks", "class_name": "GatedPooling", "config": config, "registered_name": "medimg>GatedPooling",
           "build_config": {"input_shape": [None, 8, 8, 2]}}
    b.GatedPooling
    layer = keras.saving.deserialize_keras_object(old)
    assert layer.compute_output_shape((None, 7, 9, 2)) == (None, 4, 5, 4) and tuple(layer(noise((7, 9, 2))).shape) == (2, 4, 5, 4)
    from medimg.models import networks
    assert networks.GatedPooling is b.GatedPooling and networks.gated_pooling is b.gated_pooling


# --- as a network

@pytest.mark.parametrize("shape", [(16, 12, 2), (8, 12, 16, 2)], ids=["2-D", "3-D"])
def test_saved_loaded_exported(shape, tmp_path):
    import keras
    import onnxruntime

    from medimg.deployment.engine import export_onnx
    net, x = model_of(shape, everything), noise(shape, 3)
    net.save(tmp_path / "all.keras")
    assert np.array_equal(keras.saving.load_model(tmp_path / "all.keras", safe_mode=True)(x), net(x))
    session = onnxruntime.InferenceSession(export_onnx(net, tmp_path / "all.onnx"))
    for n in (1, 3):
        assert np.abs(session.run(None, {"images": x[:n]})[0] - np.asarray(net(x[:n], training=False))).max() <= 1e-4


def test_only_gated_pooling_is_a_class_of_ours():
    kinds = {type(layer).__module__.split(".")[0] for layer in model_of((16, 12, 2), everything).layers if type(layer).__name__ != "GatedPooling"}
    assert kinds == {"keras"}


@pytest.mark.parametrize("shape, make, said", [
    ((28, 1), lambda x: b.conv(x, 4), "no image and no volume"), ((2, 2, 2, 2, 1), lambda x: b.max_pool(x), "no volume"),
    ((8, 8, 4), lambda x: b.norm(x, "bach"), "batch"), ((3, 9, 1), lambda x: b.conv(x, 4, stride=4), "shrunk 4 times"),
    ((8, 8, 1), lambda x: b.conv(x, 4, stride=0), "stride is 0"), ((8, 8, 1), lambda x: b.blur_pool(x, 2.0, name="b"), "stride is 2.0"),
    ((8, 8, 1), lambda x: b.conv_block(x, 4, activation="relo", name="a"), "unknown activation"), ((8, 8, 1), lambda x: b.upsample(x, kind="cubic", name="u"), "cubic"),
    ((8, 8, 4), lambda x: b.residual_block(x, 4, stride=2, pool="averag", name="r"), "average"), ((8, 8, 4), lambda x: b.squeeze_excite(x, 0, name="s"), "ratio is 0"),
    ((8, 8, 4), lambda x: b.attention_gate(x, b.max_pool(x, 3), 2, name="g"), "does not divide"), ((1, 1, 4), lambda x: b.max_pool(x), "1 x 1")])
def test_refusals(shape, make, said):
    with pytest.raises(ConfigError, match=said) as error:
        model_of(shape, make)
    assert "\n" not in str(error.value) and error.value.remedy


def test_importing_loads_no_keras():
    code = "import sys, medimg.models.blocks, medimg.models.costs; assert not {'keras', 'tensorflow'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
