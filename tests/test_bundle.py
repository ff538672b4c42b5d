"""Bundles: what is changed, missing, extra or hostile is refused before it is opened; what is built can be trusted to be whole."""
import json
import os
import shutil
import struct
import zipfile

import numpy as np
import pytest

from medimg.data.preprocess import Preprocessor
from medimg.deployment import bundle as b
from medimg.deployment.bundle import Bundle, build_bundle, pack, read_files, update_index
from medimg.deployment.engine import Engine, toy_network
from medimg.deployment.manifest import check_manifest, check_schema, decode, encode, example_manifest, manifest_schema, model_card, seal
from medimg.deployment.reference import fit_reference, fit_temperature, log_loss, probabilities, read_reference
from medimg.evaluation.out_of_distribution import shrunk_covariance
from medimg.errors import BundleError, ConfigError, SignatureError


def load(path):
    """What these tests break is unsigned: they ask for it, so that only what they broke is refused."""
    return Bundle.load(path, allow_unsigned=True)


def verify(path):
    return b.verify(path, allow_unsigned=True)


def toy_facts():
    names = ("name", "version", "classes", "task", "input", "population", "thresholds", "training", "metrics", "licence")
    return {k: v for k, v in example_manifest().items() if k in names}


def toy_parts(seed=0):
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (120, 32, 32), dtype="uint8")
    pre = Preprocessor([("resize", {"height": 16, "width": 16}), ("scale", {"low": 0, "high": 255})])
    out = Engine(toy_network()).run(pre.batch(images))
    return {"preprocessor": pre, "calibration": fit_temperature(out["logits"], np.arange(120) % 2, task="binary"),
            "reference": fit_reference(out["features"][:60], out["features"][60:]), "training_ids": ["ab" * 8, "00" * 8]}


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    return build_bundle(tmp_path_factory.mktemp("made") / "toy", model=toy_network(), **toy_parts(), **toy_facts()).path


@pytest.fixture
def folder(made, tmp_path):
    return shutil.copytree(made, tmp_path / "toy")


def test_load_and_use(made):
    bundle = load(made)
    images = np.random.default_rng(1).integers(0, 256, (5, 40, 50), dtype="uint8")
    p = bundle.predict(images)
    assert p.shape == (5, 2) and np.allclose(p.sum(1), 1)
    assert bundle.features(images).shape == (5, 16) and bundle.cam(images).shape == (5, 4, 4, 1) and bundle.ood_score(images).shape == (5,)
    assert bundle.origin == "unsigned" and "not proven" in bundle.warnings[0] and bundle.training_ids == {"ab" * 8, "00" * 8}
    assert "Do not use it for a patient" in bundle.card and "toy" not in repr(bundle)
    assert verify(made)["files"] == len(b.REQUIRED)


def test_is_a_predictor(made):
    from medimg.models.networks import Predictor
    assert isinstance(load(made), Predictor)


@pytest.mark.parametrize("name", b.REQUIRED)
@pytest.mark.parametrize("where", ["first", "middle", "last"])
def test_one_flipped_bit(folder, name, where):
    data = bytearray((folder / name).read_bytes())
    at = {"first": 0, "middle": len(data) // 2, "last": len(data) - 1}[where]
    data[at] ^= 1
    (folder / name).write_bytes(data)
    with pytest.raises(SignatureError, match=name):
        load(folder)


def test_every_byte_of_the_manifest(folder):
    good = (folder / "manifest.json").read_bytes()
    for at in range(0, len(good), 7):
        (folder / "manifest.json").write_bytes(good[:at] + bytes([good[at] ^ 0x20]) + good[at + 1:])
        with pytest.raises(SignatureError, match="manifest.json"):
            load(folder)


@pytest.mark.parametrize("name", b.REQUIRED)
def test_missing_and_truncated(folder, name):
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data[:-1])
    with pytest.raises(SignatureError, match=name):
        load(folder)
    (folder / name).unlink()
    with pytest.raises(SignatureError, match=name):
        load(folder)


def test_extra_file_folder_link_and_pipe(folder, tmp_path):
    (folder / "evil.py").write_text("x")
    with pytest.raises(SignatureError, match="evil.py"):
        load(folder)
    (folder / "evil.py").unlink()
    (folder / "model.keras").write_bytes(b"unannounced")
    with pytest.raises(SignatureError, match=r"model\.keras"):
        load(folder)
    (folder / "model.keras").unlink()
    real = tmp_path / "card.md"
    (folder / "MODEL_CARD.md").rename(real)
    (folder / "MODEL_CARD.md").symlink_to(real)         # same content, still refused
    with pytest.raises(SignatureError, match="MODEL_CARD"):
        load(folder)
    (folder / "MODEL_CARD.md").unlink()
    (folder / "MODEL_CARD.md").mkdir()
    with pytest.raises(SignatureError, match="MODEL_CARD"):
        load(folder)
    (folder / "MODEL_CARD.md").rmdir()
    os.mkfifo(folder / "MODEL_CARD.md")
    with pytest.raises(SignatureError, match="MODEL_CARD"):
        load(folder)


@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd", "a/b", "..", "", "a\\b", "x\n", "con:aux", "a" * 101])
def test_path_in_manifest(folder, name):
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"][name] = "0" * 64
    (folder / "manifest.json").write_bytes(encode(seal(manifest)))
    with pytest.raises(BundleError):
        load(folder)


@pytest.mark.parametrize("raw", [b"", b"{}", b"[]", b"null", b"[" * 200_000, b"\xff\xfe", b'{"a":1,"a":1}', b'{"x": NaN}', b" " * 5_000_000])
def test_hostile_manifest(folder, raw):
    (folder / "manifest.json").write_bytes(raw)
    with pytest.raises(BundleError):
        load(folder)


def test_nothing_is_parsed_before_digests(folder, monkeypatch):
    (folder / "monitoring_reference.npz").write_bytes(b"not an npz")
    monkeypatch.setattr(b, "read_reference", lambda data: pytest.fail("parsed"))
    monkeypatch.setattr(b, "_open_engine", lambda data: pytest.fail("parsed"))
    with pytest.raises(SignatureError, match="monitoring_reference"):
        verify(folder)


def test_shipped_index_is_the_root_of_trust(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(b, "bundles_dir", lambda: tmp_path)
    index = update_index(tmp_path)
    assert set(index) == {"toy"} and index["toy"]["version"] == "1.0" and "manifest.json" in index["toy"]["files"]
    assert Bundle.load("toy").origin == "shipped" and Bundle.load("toy").warnings == () and Bundle.load(folder).origin == "shipped"
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_bytes(encode(seal({**manifest, "version": "9.0"})))      # sealed, but not in the index
    with pytest.raises(SignatureError, match="manifest.json"):
        Bundle.load("toy")
    with pytest.raises(BundleError, match="toy"):
        Bundle.load("toi")


def test_verify_false_warns(folder):
    (folder / "MODEL_CARD.md").write_text("changed")
    bundle = Bundle.load(folder, verify=False)
    assert bundle.origin == "unverified" and "without verification" in bundle.warnings[0]


def test_pack(made, tmp_path):
    one, two = pack(made, tmp_path / "a.medimg"), pack(made, tmp_path / "b.medimg")
    assert one.read_bytes() == two.read_bytes() and load(one).digest == load(made).digest
    images = np.random.default_rng(1).integers(0, 256, (2, 40, 40), dtype="uint8")
    assert np.array_equal(load(one).predict(images), load(made).predict(images))
    with pytest.raises(BundleError, match="medimg"):
        pack(made, tmp_path / "a.zip")
    assert not (tmp_path / "a.zip").exists()


def write_zip(path, rows):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in rows:
            archive.writestr(name, data)
    return path


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_hostile_archives(tmp_path, monkeypatch):
    path = tmp_path / "x.medimg"
    for rows in ([("../model.onnx", b"x")], [("sub/model.onnx", b"x")], [("model.onnx", b"x")] * 2, [("model.onnx", bytes(50_000_000))]):
        with pytest.raises(BundleError):
            read_files(write_zip(path, rows))
    data = bytearray(write_zip(path, [("model.onnx", np.random.default_rng(0).bytes(1000))]).read_bytes())
    at = data.rindex(b"PK\x01\x02")
    data[at + 24:at + 28] = struct.pack("<I", 10)          # claims less than it holds
    path.write_bytes(data)
    with pytest.raises(BundleError):
        load(path)
    for size in range(0, len(data), 97):
        path.write_bytes(data[:size])
        with pytest.raises(BundleError):
            load(path)
    monkeypatch.setattr(b, "MAX_TOTAL_BYTES", 1000)
    with pytest.raises(BundleError, match="larger"):
        read_files(write_zip(path, [("model.onnx", b"x" * 600), ("model.keras", b"x" * 600)]))


def test_folder_limits(folder, monkeypatch):
    monkeypatch.setattr(b, "MAX_FILE_BYTES", 100)
    with pytest.raises(BundleError, match="larger"):
        load(folder)


def test_build_is_atomic_and_strict(tmp_path, monkeypatch):
    with pytest.raises(BundleError, match="lack"):
        build_bundle(tmp_path / "x", model=toy_network(), **toy_parts(), name="x")
    with pytest.raises(BundleError, match="did you mean"):
        build_bundle(tmp_path / "x", model=toy_network(), **toy_parts(), **toy_facts(), note="x")
    with pytest.raises(BundleError):
        build_bundle(tmp_path / "x", model=b"not a graph", **toy_parts(), **toy_facts())
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.doc").write_text("do not delete")
    with pytest.raises(BundleError, match="no bundle"):
        build_bundle(tmp_path / "full", model=toy_network(), **toy_parts(), **toy_facts())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["full"] and (tmp_path / "full" / "thesis.doc").exists()
    first = build_bundle(tmp_path / "y", model=toy_network(), **toy_parts(), **toy_facts())
    second = build_bundle(tmp_path / "y", model=toy_network(bias=1.0), **toy_parts(), **toy_facts())
    assert first.digest != second.digest and load(tmp_path / "y").digest == second.digest
    monkeypatch.setattr(b, "write_atomic", lambda *a: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError):
        build_bundle(tmp_path / "y", model=toy_network(), **toy_parts(), **toy_facts())
    monkeypatch.undo()
    assert load(tmp_path / "y").digest == second.digest and sorted(p.name for p in tmp_path.iterdir()) == ["full", "y"]


def test_equal_parts_give_equal_bundles(tmp_path):
    one, two = (build_bundle(tmp_path / n, model=toy_network(), **toy_parts(), **toy_facts(), created="2026-01-01") for n in "ab")
    assert one.digest == two.digest


def test_manifest_schema_agrees_with_jsonschema(made):
    jsonschema = pytest.importorskip("jsonschema", reason="pip install jsonschema")
    jsonschema.Draft202012Validator.check_schema(manifest_schema())
    validator = jsonschema.Draft202012Validator(manifest_schema())
    manifest = load(made).manifest
    validator.validate(manifest)
    rng = np.random.default_rng(0)
    values = [None, 1, -1, 0.5, True, "x", "", [], [1, 2], {}, {"a": "b"}, "0" * 64]
    for _ in range(600):
        bad = json.loads(json.dumps(manifest))
        spot = bad
        while True:
            key = list(spot)[rng.integers(len(spot))]
            if isinstance(spot[key], dict) and spot[key] and rng.random() < 0.7:
                spot = spot[key]
                continue
            break
        if rng.random() < 0.2:
            del spot[key]
        else:
            spot[key] = values[rng.integers(len(values))]
        try:
            check_schema(bad, manifest_schema())
            ours = True
        except BundleError:
            ours = False
        assert ours == validator.is_valid(bad), (key, spot)


def test_check_manifest():
    for change in ({"classes": ["a", "a"]}, {"classes": ["a", "b", "c"]}, {"thresholds": {"x": 0.1}}, {"research_use": "approved"}, {"schema_version": "2"}):
        with pytest.raises(BundleError):
            check_manifest(example_manifest(**change))
    assert decode(encode(example_manifest())) == example_manifest()
    text = model_card(example_manifest(metrics={"auc": {"value": 0.9, "low": 0.8, "high": 1.0}, "n": 3, "note": "x"}))
    assert "0.900 [0.800, 1.000]" in text and "| n | 3 |" in text


def test_model_card_says_what_is_undefined_and_how_far_to_trust_it():
    hole = {"value": None, "low": None, "high": None, "n": 9}
    metrics = {"split": "test", "interval": "image-level: no patient ids, so too narrow", "n": 624, "auc": hole, "f1": {**hole, "value": 0.5}, "share": 0.25}
    text = model_card(example_manifest(metrics=metrics, training={**example_manifest()["training"], "run": "run.json"}))
    assert "| n | 624 |" in text and "| auc | not defined |" in text and "| f1 | 0.500 [not defined, not defined] |" in text and "| share | 0.250 |" in text
    assert text.index("too narrow") < text.index("| metric |") and "Split: test." in text
    assert "random pictures; age: not stated; sex: any; source: computed." in text
    assert "probability ≥ 0.500 (chosen on validation images and augmented copies of them)" in text
    assert "augmented" not in model_card(example_manifest()) and "the most probable class." in model_card(example_manifest(thresholds={}))


def test_damaged_deflate_in_a_reference_is_a_plain_error():
    import io
    import zipfile
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in ("mean", "precision", "validation", "facts"):
            archive.writestr(f"{name}.npy", bytes(1000))
    raw = bytearray(data.getvalue())
    raw[30 + len("mean.npy"):30 + len("mean.npy") + 4] = b"\xff" * 4          # behind the local header: the deflate stream itself
    with pytest.raises(BundleError, match="not a reference"):
        read_reference(bytes(raw))


def test_temperature_is_the_minimum():
    from scipy.optimize import minimize_scalar
    rng = np.random.default_rng(0)
    for task, k in (("binary", 1), ("multiclass", 4), ("multilabel", 3)):
        truth = rng.normal(size=(500, k))
        y = {"binary": (rng.random(500) < probabilities(truth, task="binary")[:, 1] if k == 1 else None),
             "multiclass": np.array([rng.choice(k, p=p) for p in probabilities(truth, task="multiclass")]) if k > 1 else None,
             "multilabel": rng.random((500, k)) < 1 / (1 + np.exp(-truth))}[task]
        y = np.asarray(y).astype(int)
        fit = fit_temperature(2.5 * truth, y, task=task)
        oracle = minimize_scalar(lambda t: log_loss(2.5 * truth, y, task=task, temperature=t), bounds=(0.05, 20), method="bounded", options={"xatol": 1e-9})
        assert fit["temperature"] == pytest.approx(oracle.x, rel=1e-4) and fit["log_loss_after"] <= oracle.fun + 1e-9


def test_log_loss_against_sklearn():
    from sklearn.metrics import log_loss as oracle
    rng = np.random.default_rng(0)
    z, y = rng.normal(size=(200, 4)), rng.integers(0, 4, 200)
    assert log_loss(z, y, task="multiclass", temperature=2) == pytest.approx(oracle(y, probabilities(z, task="multiclass", temperature=2)))
    assert log_loss(z[:, :1], y > 1, task="binary") == pytest.approx(oracle(y > 1, probabilities(z[:, :1], task="binary")))
    with pytest.raises(ConfigError):
        fit_temperature(z, np.zeros(200), task="multiclass")


def test_distance_against_scipy_and_sklearn():
    from scipy.spatial.distance import mahalanobis
    from sklearn.covariance import LedoitWolf
    rng = np.random.default_rng(0)
    x = rng.normal(size=(150, 8)) @ rng.normal(size=(8, 8))
    oracle = LedoitWolf().fit(x)
    covariance, share = shrunk_covariance(x)
    assert share == pytest.approx(oracle.shrinkage_) and np.allclose(covariance, oracle.covariance_)
    home, new = fit_reference(x, x[:50]), rng.normal(size=(20, 8))
    assert np.allclose(home.score(new), [mahalanobis(v, home.mean, home.precision) ** 2 for v in new], rtol=1e-5)
    assert np.allclose(home.score(new), oracle.mahalanobis(new), rtol=1e-2)
    flat = np.concatenate([x, np.zeros((150, 3))], axis=1)           # features that are always zero
    assert np.isfinite(fit_reference(flat, flat).score(flat)).all()
    assert np.isfinite(fit_reference(np.zeros((5, 2)), np.zeros((5, 2))).score(np.zeros((1, 2)))).all()


def test_scaled_distances_do_not_depend_on_units_and_a_margin_moves_only_the_border():
    rng = np.random.default_rng(1)
    x, y, units = rng.normal(size=(80, 6)) @ rng.normal(size=(6, 6)), rng.normal(size=(30, 6)), np.geomspace(1e-3, 1e3, 6)
    one, two, wide = fit_reference(x, y, scaled=True), fit_reference(x * units, y * units, scaled=True), fit_reference(x, y, scaled=True, margin=2.0)
    assert np.allclose(one.score(y), two.score(y * units), rtol=1e-3) and not np.allclose(fit_reference(x, y).score(y), fit_reference(x * units, y * units).score(y * units), rtol=1e-3)
    assert wide.threshold == 2 * one.threshold and np.array_equal(wide.score(y), one.score(y)) and (one.score(y) <= one.threshold).mean() > 0.95
    assert np.isfinite(fit_reference(np.ones((5, 2)), np.ones((5, 2)), scaled=True).score(np.ones((1, 2)))).all()


def test_reference_survives_any_bytes():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(40, 4))
    good = fit_reference(x, x).to_bytes()
    assert np.array_equal(read_reference(good).score(x), fit_reference(x, x).score(x))
    for _ in range(300):
        data = bytearray(good)
        for at in rng.integers(0, len(data), 3):
            data[at] = rng.integers(256)
        try:
            read_reference(bytes(data))
        except BundleError:
            pass
    import io
    out = io.BytesIO()
    np.savez(out, mean=np.array([{}], dtype=object), precision=np.eye(1), validation=np.zeros(101), facts=np.zeros(3))
    with pytest.raises(BundleError):
        read_reference(out.getvalue())
