"""The engine answers as Keras does, alone or in company, and refuses what it cannot run."""
import numpy as np
import pytest

from medimg.deployment.engine import OUTPUTS, Engine, export_onnx, parity, toy_network
from medimg.errors import BundleError, ConfigError, MedimgError


def batch(n=9, shape=(16, 16, 1), seed=0):
    return np.random.default_rng(seed).random((n, *shape), dtype=np.float32)


def test_toy_by_hand():
    x = batch()
    out = Engine(toy_network()).run(x)
    tiles = x.reshape(9, 4, 4, 4, 4).mean((2, 4))
    weights = np.full((4, 4), 0.1)
    weights[1:3, 1:3] = 1
    assert np.allclose(out["features"], tiles.reshape(9, 16), atol=1e-6)
    assert np.allclose(out["logits"][:, 0], (tiles * weights).sum((1, 2)) - 2, atol=1e-5)
    assert np.allclose(out["cam"].mean((1, 2, 3)), out["logits"][:, 0] + 2, atol=1e-5)


@pytest.mark.parametrize("size", [1, 2, 7, 256, 257, 600])
def test_batch_size_and_chunks_change_nothing(size):
    engine, x = Engine(toy_network(), threads=1), batch(600)
    whole = engine.run(x)
    part = engine.run(x[:size], chunk=100)
    for name in OUTPUTS:
        assert np.allclose(part[name], whole[name][:size], atol=1e-6)


def test_refusals(tmp_path):
    engine, good = Engine(toy_network()), toy_network()
    for bad in (np.zeros((16, 16, 1)), np.zeros((1, 16, 16, 3)), np.zeros((1, 8, 16, 1)), np.zeros((0, 16, 16, 1)), np.full((1, 16, 16, 1), np.inf)):
        with pytest.raises(BundleError):
            engine.run(bad)
    for raw in (b"", b"x" * 100, good[:-40], good[:300]):
        with pytest.raises(BundleError):
            Engine(raw)
    with pytest.raises(BundleError, match="no such file"):
        Engine(tmp_path / "absent.onnx")
    for threads in (0, -1, 5000):
        with pytest.raises(ConfigError):
            Engine(good, threads=threads)


def test_any_flipped_byte_is_a_typed_error_or_runs():
    good, rng = toy_network(), np.random.default_rng(0)
    for _ in range(150):
        data = bytearray(good)
        data[rng.integers(len(data))] = rng.integers(256)
        try:
            Engine(bytes(data), threads=1)
        except MedimgError:
            pass


def test_weights_in_other_files_are_refused(tmp_path):
    import onnx
    from onnx.external_data_helper import convert_model_to_external_data
    model = onnx.load_from_string(toy_network())
    convert_model_to_external_data(model, all_tensors_to_one_file=True, location="weights.bin", size_threshold=0)
    onnx.save(model, tmp_path / "m.onnx")
    with pytest.raises(BundleError, match="other files"):
        Engine(tmp_path / "m.onnx")


def test_wrong_names_are_refused():
    import onnx
    model = onnx.load_from_string(toy_network())
    model.graph.output[0].name, model.graph.node[4].output[0] = "answer", "answer"
    with pytest.raises(BundleError, match="logits"):
        Engine(model.SerializeToString())


@pytest.mark.slow
@pytest.mark.parametrize("shape, classes", [((28, 28, 1), 2), ((32, 48, 3), 5)])
def test_parity_with_keras(tmp_path, shape, classes):
    from medimg.config import set_seed
    from medimg.models.networks import build_model
    from medimg.models.resnet import inference_model
    set_seed(0)
    model = inference_model(build_model("resnet", shape, classes))
    path = export_onnx(model, tmp_path / "sub" / "model.onnx")
    engine, x = Engine(path), batch(12, shape)
    assert [p.name for p in path.parent.iterdir()] == ["model.onnx"]
    assert engine.outputs == OUTPUTS and engine.input_shape == shape
    assert parity(lambda b: model(b, training=False), engine, x) <= 1e-4
    whole = engine.run(x)
    for n in (1, 7):
        assert np.allclose(engine.run(x[:n])["logits"], whole["logits"][:n], atol=1e-5)
    again = Engine(export_onnx(model, tmp_path / "again.onnx")).run(x)
    assert all(np.array_equal(again[name], whole[name]) for name in OUTPUTS)
    import keras
    odd = keras.Sequential([keras.Input(shape), keras.layers.Flatten(), keras.layers.Dense(3, name="logits")])
    assert Engine(export_onnx(odd, tmp_path / "odd.onnx")).outputs == ("logits",)


def test_parity_sees_a_difference():
    engine = Engine(toy_network())
    other = Engine(toy_network(bias=-1.5))
    assert parity(other.run, engine, batch()) == pytest.approx(0.5, abs=1e-5)


def test_relative_parity_forgives_no_small_output_for_a_large_one():
    """Each output is judged by its own size: features of 1000 do not hide a difference in the logits."""
    class Fixed:
        def run(self, x):
            return {"logits": np.full((len(x), 1), 40.002), "features": np.full((len(x), 2), 1000.0)}
    keras_like = lambda x: {"logits": np.full((len(x), 1), 40.0), "features": np.full((len(x), 2), 1000.0)}     # noqa: E731
    assert parity(keras_like, Fixed(), batch()) == pytest.approx(0.002) and parity(keras_like, Fixed(), batch(), relative=True) == pytest.approx(0.002 / 40)
    small = lambda x: {"logits": np.full((len(x), 1), 0.3), "features": np.full((len(x), 2), 1000.0)}     # noqa: E731
    assert parity(small, Fixed(), batch(), relative=True) == pytest.approx(39.702)
