"""Eight bits: size, error within the ruler's step, named outputs, what cannot be quantised."""
import numpy as np
import onnx
import pytest

from medimg.deployment.engine import Engine, toy_network
from medimg.deployment.int8 import quantise
from medimg.errors import ConfigError

IMAGES = np.random.default_rng(0).random((64, 16, 16, 1), dtype=np.float32)


def test_outputs_keep_names_shapes_and_nearly_their_values():
    before, after = (Engine(g).run(IMAGES) for g in (toy_network(), quantise(toy_network(), IMAGES)))
    assert list(before) == list(after)
    for name in before:
        spread = np.ptp(before[name])
        assert after[name].shape == before[name].shape and np.abs(after[name] - before[name]).max() < 0.05 * spread


def test_shipped_network_computes_in_whole_numbers_and_is_a_third_of_the_size():
    from medimg.deployment.bundle import Bundle
    bundle = Bundle.load("phantom-cxr")
    graph = (bundle.path / "model.onnx").read_bytes()
    small = quantise(graph, np.random.default_rng(1).random((16, *bundle.engine.input_shape), dtype=np.float32))
    kinds = [node.op_type for node in onnx.load_from_string(small).graph.node]
    assert "QLinearConv" in kinds and "Conv" not in kinds and len(small) < len(graph) / 2.5


@pytest.mark.parametrize("graph, batch, why", [(b"no graph", IMAGES, "cannot be quantised"), (toy_network(), IMAGES[:0], "no images"), (toy_network(), IMAGES[:, :3], "cannot be quantised")])
def test_what_cannot_be_quantised_says_so(graph, batch, why):
    with pytest.raises(ConfigError, match=why):
        quantise(graph, batch)
