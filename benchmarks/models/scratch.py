"""The convolution by hand (im2col in NumPy) beside Keras on TensorFlow, one thread each, forwards and forwards + backwards.

Seconds are CPU seconds of this process, so that other programs on the machine do not count.

python benchmarks/models/scratch.py [--json results/benchmarks/models_scratch.json]
"""
import os
import sys
import time
from pathlib import Path

for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "TF_NUM_INTRAOP_THREADS", "TF_NUM_INTEROP_THREADS"):
    os.environ[name] = "1"      # before NumPy and TensorFlow are loaded
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np  # noqa: E402
import sidebyside  # noqa: E402
from sidebyside import compare, main  # noqa: E402

#: Name, images (n, y, x, c), kernel side, channels out: the layers of the NumPy network and of the small ResNet.
LAYERS = (("first layer, 5 x 5, 1 to 8", (64, 28, 28, 1), 5, 8), ("second layer, 3 x 3, 8 to 16", (64, 14, 14, 8), 3, 16),
          ("3 x 3, 16 to 16, 28 px", (64, 28, 28, 16), 3, 16), ("3 x 3, 32 to 64, 14 px", (64, 14, 14, 32), 3, 64), ("3 x 3, 64 to 64, 7 px", (64, 7, 7, 64), 3, 64))


def cpu_seconds(function, calls=5, **arguments):
    """CPU seconds of one call, from several."""
    start = time.process_time()
    for _ in range(calls):
        function(**arguments)
    return (time.process_time() - start) / calls


sidebyside.seconds = cpu_seconds


def keras_layer(x, w, b, pull):
    """Two functions of no argument, compiled: the layer's output, and its output with all three gradients."""
    import keras
    import tensorflow as tf
    layer = keras.layers.Conv2D(w.shape[3], w.shape[0], padding="same")
    layer.build(x.shape)
    layer.set_weights([w, b])
    forward = tf.function(lambda v: layer(v))

    @tf.function
    def both(v):
        with tf.GradientTape() as tape:
            tape.watch(v)
            y = layer(v)
        return (y, *tape.gradient(y, [v, layer.kernel.value, layer.bias.value], output_gradients=pull))
    x, pull = tf.constant(x), tf.constant(pull)
    return lambda: forward(x).numpy(), lambda: [part.numpy() for part in both(x)]


def measure(repeats):
    """Rows for every layer and both directions, after the two have agreed on all numbers."""
    from medimg.models.scratch import conv2d, conv2d_gradient, relative_difference
    rng, rows = np.random.default_rng(0), []
    for name, shape, side, filters in LAYERS:
        x, b = rng.normal(size=shape).astype("f4"), np.zeros(filters, "f4")
        w = (rng.normal(size=(side, side, shape[3], filters)) / np.sqrt(side * side * shape[3])).astype("f4")
        pull = rng.normal(size=(*shape[:3], filters)).astype("f4")
        ours = lambda x=x, w=w, b=b: conv2d(x, w, b)
        both = lambda x=x, w=w, b=b, pull=pull: (conv2d(x, w, b), *conv2d_gradient(x, w, pull))
        forward, backward = keras_layer(x, w, b, pull)
        assert max(relative_difference(a, c) for a, c in zip(both(), backward())) < 1e-4
        rows += compare(f"{name}, forwards", ours, {"Keras on TensorFlow": forward}, repeats=repeats)
        rows += compare(f"{name}, and backwards", both, {"Keras on TensorFlow": backward}, repeats=repeats)
    print(f"least ratio {min(r['ratio'] for r in rows):.2f} (target 0.2)")
    return rows


if __name__ == "__main__":
    main(measure, __doc__.splitlines()[0])
