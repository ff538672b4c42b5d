"""Weights that are taken over, frozen and trained gently: against Keras' own convolution, preprocess_input and optimiser, and by property."""
import os

import numpy as np
import pytest

from medimg.errors import ConfigError, MedimgError
from medimg.models.networks import build_model
from medimg.models.resnet import inference_model
from medimg.models.transfer import BACKBONES, Transfer, backbone, freeze, layer_groups, learning_rate_scales, transfer_weights, unfreeze
from medimg.training.record import TrainConfig
from medimg.training.trainer import TrainState, make_loss

keras = pytest.importorskip("keras", reason="TensorFlow and Keras are not installed; remedy: pip install 'medimg[train]'")


def resnet(channels=1, classes=2, seed=0, **options):
    return build_model("resnet", (32, 32, channels), classes, seed=seed, width=8, blocks=(1, 1), **options)


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).random((6, 32, 32, 1), dtype=np.float32)


def features(net, x):
    return np.asarray(inference_model(net)(x)["features"])


def weights_of(net):
    return {w.path: w.numpy() for w in net.weights}


# ---- transfer_weights ------------------------------------------------------------------------------------------------------------
def test_taken_layers_are_equal_and_the_head_is_not(images):
    source, target = resnet(classes=5, seed=1), resnet(seed=2)
    head = target.get_layer("logits").get_weights()
    report = transfer_weights(target, source)
    assert np.array_equal(features(source, images), features(target, images))
    assert all(np.array_equal(a, b) for a, b in zip(head, target.get_layer("logits").get_weights()))
    assert [row[0] for row in report.skipped] == ["logits"]
    assert sum(row[2] for row in (*report.taken, *report.skipped)) == target.count_params()
    assert report.share == pytest.approx(1 - target.get_layer("logits").count_params() / target.count_params())


@pytest.mark.parametrize("there, here", [(3, 1), (1, 3)])
def test_grey_and_colour_answer_grey_images_alike(there, here, images):
    source, target = resnet(there, seed=1), resnet(here, seed=2)
    report = transfer_weights(target, source, skip=())
    assert {row[1] for row in report.taken if row[0] == "stem_conv"} == {"summed over channels" if here == 1 else "spread over channels"}
    logits = [np.asarray(net(np.repeat(images, c, axis=-1), training=False)) for net, c in ((source, there), (target, here))]
    np.testing.assert_allclose(*logits, atol=2e-5)


def test_a_kernel_for_slices_answers_equal_slices_as_before():
    slice_net = keras.Sequential([keras.Input((16, 16, 1)), keras.layers.Conv2D(4, 3, padding="same", name="c1"), keras.layers.Conv2D(2, 5, padding="same", name="c2")])
    volume_net = keras.Sequential([keras.Input((13, 16, 16, 1)), keras.layers.Conv3D(4, 3, padding="same", name="c1"), keras.layers.Conv3D(2, 5, padding="same", name="c2")])
    transfer_weights(volume_net, slice_net)
    image = np.random.default_rng(1).random((2, 16, 16, 1), dtype=np.float32)
    deep = np.asarray(volume_net(np.repeat(image[:, None], 13, axis=1)))
    np.testing.assert_allclose(deep[:, 6], slice_net(image), atol=1e-5)      # far from the ends of z, where padding speaks


def test_the_residual_network_goes_from_images_to_volumes():
    source, target = resnet(seed=1), build_model("resnet", (16, 16, 16, 1), 2, seed=2, width=8, blocks=(1, 1))
    report = transfer_weights(target, source)
    kernel, deep = (net.get_layer("s1b1a_conv").get_weights()[0] for net in (source, target))
    np.testing.assert_allclose(deep.sum(axis=0), kernel, atol=1e-6)
    assert [row[0] for row in report.skipped] == ["logits"] and dict(row[:2] for row in report.taken)["s1b1a_conv"] == "repeated along z"


def test_what_does_not_fit_keeps_its_own_and_is_told():
    source, target = resnet(seed=1), build_model("resnet", (32, 32, 1), 2, seed=2, width=16, blocks=(1, 1))
    before = weights_of(target)
    with pytest.raises(ConfigError, match="no layer of resnet fits resnet: stem_conv: .*there"):
        transfer_weights(target, source)
    assert all(np.array_equal(before[k], v) for k, v in weights_of(target).items())
    deeper = build_model("resnet", (32, 32, 1), 2, seed=3, width=8, blocks=(2, 1))
    report = transfer_weights(deeper, source)
    assert {"s1b2a_conv", "s1b2b_conv"} <= {row[0] for row in report.skipped} and "stem_conv" in {row[0] for row in report.taken}
    assert "left   s1b2a_conv" in repr(report) and "no layer of this name" in repr(report)


def test_patterns_leave_layers_alone():
    source, target = resnet(seed=1), resnet(seed=2)
    before = weights_of(target)
    report = transfer_weights(target, source, skip=("s2*", "logits"))
    left = {row[0] for row in report.skipped}
    assert left == {layer.name for layer in target.layers if layer.weights and (layer.name.startswith("s2") or layer.name == "logits")}
    assert all(np.array_equal(before[w.path], w.numpy()) for name in left for w in target.get_layer(name).weights)
    with pytest.raises(ConfigError, match="no layer is called 'logist'; did you mean logits"):
        transfer_weights(target, source, skip=("logist",))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_an_unsound_source_changes_nothing(bad):
    source, target = resnet(seed=1), resnet(seed=2)
    kernel = source.get_layer("last_norm").get_weights()
    kernel[0][3] = bad
    source.get_layer("last_norm").set_weights(kernel)
    before = weights_of(target)
    with pytest.raises(MedimgError, match="1 numbers in layer last_norm of resnet are NaN or infinite"):
        transfer_weights(target, source)
    assert all(np.array_equal(before[k], v) for k, v in weights_of(target).items())


def test_from_a_file(tmp_path, images):
    source, target = resnet(seed=1), resnet(seed=2)
    source.save(tmp_path / "source.keras")
    transfer_weights(target, str(tmp_path / "source.keras"))
    assert np.array_equal(features(source, images), features(target, images))
    with pytest.raises(ConfigError, match="no such file"):
        transfer_weights(target, tmp_path / "absent.keras")
    (tmp_path / "rubbish.keras").write_bytes(b"PK not a zip")
    with pytest.raises(ConfigError, match="not a whole .keras file"):
        transfer_weights(target, tmp_path / "rubbish.keras")


def test_the_report_counts():
    assert Transfer((), (("a", "why", 3),)).share == 0 and Transfer((), ()).share == 0
    assert repr(Transfer((("a", "as it was", 1),), ())).startswith("1 layer with 1 numbers taken, 0 with 0 left")


# ---- groups and rates ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name, shape", [("resnet", (28, 28, 1)), ("resnet", (64, 64, 3)), ("article-cnn", (32, 32, 3)), ("mlp-28", (28,)), ("lung-ct-cnn", (64, 64, 1))])
def test_every_layer_is_in_one_group_and_maps_of_a_group_have_one_size(name, shape):
    net = build_model(name, shape, 3)
    groups = layer_groups(net)
    members = [m for names in groups.values() for m in names]
    assert sorted(members) == sorted(layer.name for layer in net.layers if layer.weights) and groups["logits"] == ("logits",) and list(groups)[-1] == "logits"
    for names in groups.values():
        assert len({net.get_layer(m).output.shape[1:-1] for m in names}) == 1


def test_a_size_that_comes_back_gets_a_number():
    layers = keras.layers
    x = images = keras.Input((16, 16, 1))
    x = layers.Conv2D(2, 3, padding="same", name="down")(x)
    x = layers.Conv2D(2, 3, 2, padding="same", name="low")(x)
    x = layers.Conv2DTranspose(2, 2, 2, name="up")(x)
    net = keras.Model(images, layers.Conv2D(1, 1, name="logits")(x))
    assert layer_groups(net) == {"16x16": ("down",), "8x8": ("low",), "16x16 (2)": ("up",), "logits": ("logits",)}
    with pytest.raises(ConfigError, match="no layer with weights"):
        layer_groups(keras.Sequential([keras.Input((4,)), keras.layers.ReLU()]))


def test_scales_fall_from_head_to_input():
    net = resnet()
    scales, groups = learning_rate_scales(net, 0.25), list(layer_groups(net).values())
    assert scales.keys() == {v.path for v in net.trainable_variables}
    for g, names in enumerate(reversed(groups)):
        assert {scales[v.path] for m in names for v in net.get_layer(m).trainable_variables} == {0.25**g}
    assert set(learning_rate_scales(net, 1.0).values()) == {1.0}
    freeze(net, "stem_conv")
    assert "stem_conv/kernel" not in learning_rate_scales(net)
    for decay in (0, -1, 1.5, float("nan")):
        with pytest.raises(ConfigError, match="decay is"):
            learning_rate_scales(net, decay)


def test_the_step_is_scaled_not_the_gradient(images):
    """One step of AdamW by Keras itself: each variable moves by its scale times what it moves without scales."""
    moves = []
    for decay in (1.0, 0.5):
        net = resnet(dropout=0.0)
        before = weights_of(net)
        state = TrainState(net, TrainConfig(weight_decay=0.0, clip_norm=0.0), make_loss("binary"), learning_rate_scales(net, decay))
        state.step(images, np.array([0, 1] * 3, np.int32), 0, 1e-3)
        moves.append({v.path: v.numpy() - before[v.path] for v in net.trainable_variables})
    scales = learning_rate_scales(resnet(), 0.5)
    assert min(scales.values()) < 1
    for path, move in moves[0].items():
        np.testing.assert_allclose(moves[1][path], scales[path] * move, atol=2e-7)


# ---- freezing --------------------------------------------------------------------------------------------------------------------
def train(net, x, steps=3, scales=None):
    state = TrainState(net, TrainConfig(ema=0.0), make_loss("binary"), scales)
    for number in range(steps):
        state.step(x, np.array([0, 1] * (len(x) // 2), np.int32), number, 1e-2)


def test_frozen_layers_stand_still_with_their_statistics(images):
    net = resnet()
    still = freeze(net)
    before = weights_of(net)
    train(net, 0.2 * images)
    after = weights_of(net)
    assert {path.split("/")[0] for path in after if not np.array_equal(before[path], after[path])} == {"logits"}
    assert set(still) == {layer.name for layer in net.layers if layer.weights} - {"logits"}


def test_rate_zero_is_no_freezing(images):
    """The fault of the chapter: kernels stand still, the averages of batch normalisation walk."""
    net = resnet()
    before = weights_of(net)
    train(net, 0.2 * images, scales={v.path: 0.0 for v in net.trainable_variables if not v.path.startswith("logits")})
    moved = {path for path, w in weights_of(net).items() if not np.array_equal(before[path], w)}
    assert {p for p in moved if "moving" in p} and not {p for p in moved if "moving" not in p and not p.startswith("logits")}


def test_frozen_batch_norm_is_in_inference_mode_during_training(images):
    net = resnet(dropout=0.0)
    assert not np.allclose(net(images, training=True), net(images, training=False), atol=1e-4)
    freeze(net)
    np.testing.assert_array_equal(net(images, training=True), net(images, training=False))


def test_freeze_until_and_unfreeze_since():
    net = resnet()
    groups = layer_groups(net)
    first, second = list(groups)[:2]
    assert set(freeze(net, first)) == set(groups[first])
    assert set(unfreeze(net)) == {m for names in groups.values() for m in names} and all(layer.trainable for layer in net.layers)
    freeze(net)
    assert set(unfreeze(net, second)) == {m for name in list(groups)[1:] for m in groups[name]}
    assert not any(net.get_layer(m).trainable for m in groups[first])
    with pytest.raises(ConfigError, match="no layer or group 'stem_cnv'; did you mean stem_conv"):
        freeze(net, "stem_cnv")
    with pytest.raises(ConfigError, match="nothing would be left to train"):
        freeze(net, "logits")


# ---- backbones -------------------------------------------------------------------------------------------------------------------
MODULES = {"mobilenet-v2": "mobilenet_v2", "resnet50-v2": "resnet_v2", "densenet121": "densenet"}


@pytest.mark.parametrize("name", ["mobilenet-v2", "densenet121"])
def test_the_range_is_that_of_keras(name):
    raw = np.random.default_rng(2).integers(0, 256, (2, 32, 32, 3)).astype("float32")
    net = backbone(name, (32, 32, 3), 2)
    ours = keras.Model(net.inputs[0], net.get_layer("range").output)(raw / 255)
    np.testing.assert_allclose(ours, getattr(keras.applications, MODULES[name]).preprocess_input(raw.copy()), atol=2e-5)


def test_names_head_and_grey_images():
    net = backbone("mobilenet-v2", (64, 64, 1), 5, dropout=0.0)
    assert net.input.name == "images" and net.output_shape == (None, 5)
    out = inference_model(net)(np.random.default_rng(3).random((2, 64, 64, 1), dtype=np.float32))
    assert out["features"].shape == (2, 1280) and out["cam"].shape == (2, 2, 2, 5)
    assert all(layer.momentum == 0.9 for layer in net.layers if isinstance(layer, keras.layers.BatchNormalization))
    colour = backbone("mobilenet-v2", (64, 64, 3), 5, dropout=0.0)
    transfer_weights(colour, net, skip=())
    x = np.random.default_rng(4).random((2, 64, 64, 1), dtype=np.float32)
    np.testing.assert_allclose(net(x, training=False), colour(np.repeat(x, 3, axis=-1), training=False), atol=1e-5)


def test_weights_come_from_files_only(tmp_path, monkeypatch):
    """A missing file is an error, at once and without a socket; a fitting one is loaded, wherever it lies."""
    import socket
    monkeypatch.setattr(socket, "create_connection", lambda *a, **k: pytest.fail("asked the network"))
    monkeypatch.setattr(socket.socket, "connect", lambda *a, **k: pytest.fail("asked the network"))
    monkeypatch.setenv("KERAS_HOME", str(tmp_path))
    monkeypatch.setenv("MEDIMG_DATA", "")
    for weights, message in (("local", BACKBONES["mobilenet-v2"][2]), (tmp_path / "absent.h5", "no such file")):
        with pytest.raises(ConfigError, match=message):
            backbone("mobilenet-v2", (32, 32, 1), 2, weights=weights)
    official = keras.applications.MobileNetV2(include_top=False, weights=None, input_shape=(32, 32, 3))
    os.makedirs(tmp_path / "models")
    official.save_weights(tmp_path / "own.weights.h5")
    _legacy_h5(official, tmp_path / "models" / BACKBONES["mobilenet-v2"][2])
    for weights in ("local", tmp_path / "own.weights.h5"):
        net = backbone("mobilenet-v2", (32, 32, 1), 2, weights=weights)
        for layer in official.layers:
            assert all(np.array_equal(a, b) for a, b in zip(layer.get_weights(), net.get_layer(layer.name).get_weights() if layer.weights else []))
    with pytest.raises(ConfigError, match="no weights of mobilenet-v3-small"):
        backbone("mobilenet-v3-small", (32, 32, 1), 2, weights=tmp_path / "own.weights.h5")
    official.get_layer("Conv_1_bn").set_weights([np.full(1280, np.nan)] * 4)
    official.save_weights(tmp_path / "own.weights.h5")
    with pytest.raises(ConfigError, match="Conv_1_bn/.* and 3 others are not in it, or not finite"):
        backbone("mobilenet-v2", (32, 32, 1), 2, weights=tmp_path / "own.weights.h5")


def _legacy_h5(model, path):
    """The layout of Keras' published files: one group a layer, weights by number."""
    import h5py
    with h5py.File(path, "w") as file:
        file.attrs["layer_names"] = [layer.name.encode() for layer in model.layers]
        file.attrs["backend"], file.attrs["keras_version"] = b"tensorflow", b"2.2.4"
        for layer in model.layers:
            group = file.create_group(layer.name)
            names = [f"{layer.name}/w{i}:0" for i in range(len(layer.weights))]
            group.attrs["weight_names"] = [n.encode() for n in names]
            for n, w in zip(names, layer.weights):
                group.create_dataset(n, data=w.numpy())


@pytest.mark.parametrize("arguments, message", [
    (("mobilenet", (64, 64, 1), 2), "unknown backbone 'mobilenet'; did you mean mobilenet-v2"), (("mobilenet-v2", (16, 16, 1), 2), "at least 32 x 32"),
    (("mobilenet-v2", (64, 64, 2), 2), "1 or 3 channels, not 2"), (("mobilenet-v2", (64, 64), 2), "cannot take the input shape"), (("mobilenet-v2", (64, 64, 1), 1), "classes is 1")])
def test_bad_backbones(arguments, message):
    with pytest.raises(ConfigError, match=message):
        backbone(*arguments)


def test_a_backbone_goes_through_a_file_and_onnx(tmp_path):
    pytest.importorskip("onnxruntime", reason="ONNX Runtime is not installed; remedy: pip install medimg")
    from medimg.deployment.engine import Engine, export_onnx
    net = backbone("mobilenet-v2", (32, 32, 1), 3)
    x = np.random.default_rng(5).random((3, 32, 32, 1), dtype=np.float32)
    net.save(tmp_path / "net.keras")
    again = keras.saving.load_model(tmp_path / "net.keras")
    np.testing.assert_array_equal(net(x, training=False), again(x, training=False))
    export_onnx(net, tmp_path / "net.onnx")
    np.testing.assert_allclose(Engine(tmp_path / "net.onnx").run(x)["logits"], net(x, training=False), atol=1e-4)


# ---- the experiments' parts --------------------------------------------------------------------------------------------------------
def test_ranks_within_a_quarter_against_scipy():
    stats = pytest.importorskip("scipy.stats", reason="SciPy is not installed; remedy: pip install 'medimg[course]'")
    from medimg.experiments.transfer import within_ranks
    p = np.random.default_rng(6).integers(0, 9, 50) / 9
    np.testing.assert_allclose(within_ranks(p), (stats.rankdata(p) - 0.5) / 50)


def test_subsets_are_nested_and_keep_the_classes():
    from medimg.experiments.transfer import nested_rows
    y = np.random.default_rng(7).permutation(np.repeat([0, 1], [70, 30]))
    for seed in range(3):
        parts = [set(nested_rows(y, share, seed).tolist()) for share in (0.1, 0.25, 0.5, 1.0)]
        assert all(a < b for a, b in zip(parts, parts[1:])) and len(parts[-1]) == 100 and y[sorted(parts[0])].sum() == 3
    assert set(nested_rows(y, 0.1, 0).tolist()) != set(nested_rows(y, 0.1, 1).tolist())


def test_no_patient_is_answered_by_a_network_that_has_seen_it(tmp_path, monkeypatch):
    """The quarters of tb-sites: who is in the test is in no training set of the network that answers; Shenzhen's fold 3 is in none at all."""
    from medimg.experiments import transfer
    from medimg.experiments.protocol import Run
    seen, asked = {}, []
    n = np.arange(120)
    films = transfer.Films(np.zeros((120, 2, 2, 1), "float32"), n % 2, n.astype(str), n.astype(str), np.where(n % 3, "CHNCXR", "MCUCXR"), n // 6 % 4, ("toy", "00"))
    monkeypatch.setattr(transfer, "_student", lambda way, teacher, seed: (object(), None))
    monkeypatch.setattr(transfer, "train_on", lambda net, part, **k: seen.setdefault(id(net), (net, set(part.patients.tolist())))[0])
    monkeypatch.setattr(transfer, "_answers", lambda net, part: asked.append((net, set(part.patients.tolist()))) or np.linspace(0, 1, len(part.y)))
    nets = transfer._site_networks(Run("toy", tmp_path, "ci", progress=False), films, 0)
    away, test = films.part(films.site == "MCUCXR"), films.part((films.site == "CHNCXR") & (films.fold == 3))
    for kind in nets:
        asked.clear()
        transfer._out_of_fold(nets[kind], away, transfer.Plan.of("ci").quarters)
        assert set.union(*(patients for _, patients in asked)) == set(away.patients.tolist())
        for net, patients in asked:
            assert not patients & seen[id(net)][1]
    assert not any(set(test.patients.tolist()) & patients for _, patients in seen.values())
