"""Answers, refusals and errors: each for its own reason, in words, and none of them stops the others."""
import json
import zlib
from dataclasses import replace
from types import SimpleNamespace

import cv2
import numpy as np
import pytest

from medimg.data.phantom import phantom_cxr
from medimg.data.preprocess import Preprocessor
from medimg.data.volume import Volume
from medimg.deployment.bundle import Bundle, build_bundle
from medimg.deployment.engine import Engine, toy_network
from medimg.data.pictures import picture_size
from medimg.deployment.intake import Study, decode_picture, find_studies
from medimg.deployment.manifest import example_manifest
from medimg.deployment.predict import answer, cam_shift, check_scope, exit_code, heat_map, hottest_region, predict
from medimg.deployment.prediction import Prediction, from_json, prediction_schema
from medimg.deployment.reference import fit_reference, fit_temperature
from medimg.errors import BundleError, DatasetError, MedimgError
from medimg.plots import png_bytes

FACTS = {k: v for k, v in example_manifest().items() if k in ("name", "version", "classes", "task", "input", "population", "thresholds", "training",
                                                              "metrics", "licence")}


def pictures(n, seed=0, side=32):
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % 2
    images = rng.normal(90, 25, (n, side, side))
    images[:, side // 4:-side // 4, side // 4:-side // 4] += (60 * labels + rng.normal(0, 18, n))[:, None, None]
    return np.clip(images, 0, 255).astype("uint8"), labels


@pytest.fixture(scope="session")
def bundle(tmp_path_factory):
    images, labels = pictures(400)
    pre = Preprocessor([("resize", {"height": 16, "width": 16}), ("scale", {"low": 0, "high": 255})])
    out = Engine(toy_network()).run(pre.batch(images))
    facts = {**FACTS, "population": {**FACTS["population"], "age_years": [1, 5], "sex": "F"},
             "input": {**FACTS["input"], "modality": ["DX", "CR"], "body_part": "CHEST", "view": ["AP", "PA"]}}
    return build_bundle(tmp_path_factory.mktemp("b") / "toy", model=toy_network(), preprocessor=pre, training_ids=[],
                        calibration=fit_temperature(out["logits"][200:], labels[200:], task="binary"),
                        reference=fit_reference(out["features"][:200], out["features"][200:]), **facts)


def build_at(bundle, thresholds):
    """The bundle with other thresholds, in memory only."""
    import copy
    other = copy.copy(bundle)
    other.manifest = {**bundle.manifest, "thresholds": thresholds}
    return other


GOOD = {"modality": "DX", "body_part": "CHEST", "view": "AP", "patient_age_years": 3.0, "patient_sex": "F"}


def study(**facts):
    return Study("a.dcm", pictures(2, seed=5)[0][1], {**GOOD, **facts})


def test_answered(bundle):
    p = answer(bundle, study())
    assert p.status == "answered" and p.label == "bright" and set(p.probability) == {"dark", "bright"}
    assert p.probability["bright"] == pytest.approx(bundle.predict(p.picture[None])[0, 1]) and sum(p.probability.values()) == pytest.approx(1)
    raw = bundle.run(p.picture[None])["logits"].item()
    assert p.score == {"bright": pytest.approx(raw)} and p.threshold == {"bright": 0.5} and p.prediction_set is None
    assert p.heat_map.shape == p.picture.shape and p.heat_map.max() <= 1 and p.findings[0].type == "evidence-region"
    assert p.model["digest"] == bundle.digest and "unsigned" in p.warnings[-1] and len(p.warnings) == 1
    assert "calibrated" in p.uncertainty["note"] and p.created.endswith("+00:00")


@pytest.mark.parametrize("facts, words", [
    ({"modality": "CT"}, "modality CT"), ({"body_part": "KNEE"}, "body part KNEE"), ({"view": "LL"}, "view LL"), ({"patient_sex": "M"}, "sex M"),
    ({"patient_age_years": 60.0}, "60 years"), ({"patient_age_years": 0.5}, "years"), ({"patient_age_years": 6.0}, "6 years")])
def test_refused_for_scope(bundle, facts, words):
    p = answer(bundle, study(**facts))
    assert p.status == "refused" and words in p.reasons[0]
    assert p.label is None and p.probability is None and p.heat_map is None and not p.findings and p.ood


def test_edges_of_scope(bundle):
    for facts in ({"patient_age_years": 1.0}, {"patient_age_years": 5.9}, {"body_part": "Chest"}, {"view": "pa"}, {"modality": "CR"}):
        assert answer(bundle, study(**facts)).status == "answered"
    reasons, warnings = check_scope(Study("a.png", pictures(2)[0][0]), bundle.manifest)
    assert not reasons and all(w in warnings[0] for w in ("modality", "body part", "view", "sex", "age"))


def test_refused_for_looks(bundle):
    noise = np.random.default_rng(0).integers(0, 256, (32, 32), dtype="uint8")
    p = answer(bundle, replace(study(), image=noise))
    assert p.status == "refused" and "unlike the training images" in p.reasons[0] and p.ood["score"] > p.ood["threshold"]
    assert "contrast" in " ".join(answer(bundle, replace(study(), image=np.full((32, 32), 90, "uint8"))).reasons)
    assert "strip" in answer(bundle, replace(study(), image=np.tile(pictures(1)[0][0], (1, 4)))).reasons[0]
    inverted = answer(bundle, replace(study(), image=255 - study().image))
    assert inverted.status == "refused"


def test_hard_misfits(bundle):
    with pytest.raises(BundleError, match=r"15 × 32 pixels"):
        answer(bundle, replace(study(), image=study().image[:15]))
    with pytest.raises(BundleError, match="3 channels"):
        answer(bundle, replace(study(), image=np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype="uint8")))
    assert answer(bundle, replace(study(modality="CT"), image=study().image[:8])).status == "refused"      # refused already: a reason more


def test_json_round_trip_and_schema(bundle):
    import jsonschema
    jsonschema.Draft202012Validator.check_schema(prediction_schema())
    validator = jsonschema.Draft202012Validator(prediction_schema())
    for p in (answer(bundle, study()), answer(bundle, study(modality="CT")), Prediction("error", "x", error={"type": "E", "what": "w", "remedy": None})):
        record = json.loads(p.to_json())
        validator.validate(record)
        assert set(record) == set(prediction_schema()["properties"]) == set(prediction_schema()["required"])
        assert from_json(p.to_json()).to_json() == p.to_json() and from_json(p.to_json()) == replace(p, picture=None, heat_map=None)
        assert record["research_use"] == "research use, not a medical device"
    for bad in ("", "[]", "{}", p.to_json().replace('"error"', '"x"', 1), p.to_json()[:-5]):
        with pytest.raises(BundleError):
            from_json(bad)


def test_no_identity_in_the_record(bundle, tmp_path, monkeypatch):
    picture = pictures(2, seed=5)[0][1]
    volume = Volume(picture[None], modality="DX", meta={"patient_id": "SECRET-4711", "patient_age_years": 3.0, "study_uid": "1.2.3"})
    from medimg.deployment.intake import study_of
    assert "SECRET" not in answer(bundle, study_of(volume, "a.dcm")).to_json()
    monkeypatch.setenv("MEDIMG_PSEUDONYM_KEY", "k")
    keyed = answer(bundle, study_of(volume, "a.dcm"))
    assert len(keyed.study["patient_key"]) == 16 and "SECRET" not in keyed.to_json()


def test_formats_agree(bundle, tmp_path):
    picture = pictures(2, seed=5)[0][1]
    (tmp_path / "a.png").write_bytes(png_bytes(picture))
    cv2.imwrite(str(tmp_path / "rgb.png"), np.repeat(picture[..., None], 3, 2))
    cv2.imwrite(str(tmp_path / "alpha.png"), np.dstack([picture] * 3 + [np.full_like(picture, 255)]))
    np.save(tmp_path / "a.npy", picture)
    np.save(tmp_path / "f.npy", picture.astype("float64"))
    Volume(picture[None]).to_nifti(tmp_path / "a.nii.gz")
    records = {p.source.removeprefix(f"{tmp_path.name}/"): p for p in predict(bundle, tmp_path, progress=False)}
    assert len(records) == 6
    for name in ("a.png", "rgb.png", "alpha.png", "a.npy", "f.npy"):
        assert records[name].input_sha256 == records["a.png"].input_sha256, name
    assert predict(bundle, picture)[0].score == records["a.png"].score
    cv2.imwrite(str(tmp_path / "b.jpg"), picture, [cv2.IMWRITE_JPEG_QUALITY, 95])
    jpg = predict(bundle, tmp_path / "b.jpg")[0]
    assert jpg.score["bright"] == pytest.approx(records["a.png"].score["bright"], abs=0.05)


def test_dicom(bundle, tmp_path):
    from medimg.data.phantom import radiograph, thorax_phantom
    from medimg.data.phantom_dicom import write_radiograph
    volume, _ = radiograph(thorax_phantom(1, shape=(24, 64, 64), spacing_mm=(12, 6, 6)), size=128)
    write_radiograph(volume, tmp_path / "a.dcm", seed=1)
    (p,) = predict(bundle, tmp_path, progress=False)
    assert p.status == "refused" and p.study["modality"] == "DX" and p.study["study_uid"] and p.picture.shape == (128, 128)
    whole = (tmp_path / "a.dcm").read_bytes()
    (tmp_path / "cut.dcm").write_bytes(whole[:len(whole) // 2])
    (tmp_path / "no.dcm").write_bytes(b"hello" * 100)
    records = {r.source: r for r in predict(bundle, [tmp_path / "a.dcm", tmp_path / "cut.dcm", tmp_path / "no.dcm"], progress=False)}
    assert records["a.dcm"].status == "refused" and records["cut.dcm"].status == records["no.dcm"].status == "error"
    assert exit_code(list(records.values())) == 2
    with pytest.raises(MedimgError, match=r"no\.dcm"):
        predict(bundle, tmp_path / "no.dcm")


def test_stack_is_refused(bundle, tmp_path):
    from pydicom.data import get_testdata_file
    ct = predict(bundle, get_testdata_file("CT_small.dcm"))[0]
    assert ct.status == "refused" and "modality CT" in ct.reasons[0] and ct.picture.shape == (128, 128)
    Volume(np.random.default_rng(0).random((5, 40, 40)).astype("float32")).to_nifti(tmp_path / "v.nii")
    assert "stack of 5 slices" in " ".join(predict(bundle, tmp_path / "v.nii")[0].reasons)


def test_one_bad_file_does_not_stop_the_rest(bundle, tmp_path):
    (tmp_path / "good.png").write_bytes(png_bytes(pictures(2, seed=5)[0][1]))
    (tmp_path / "cut.png").write_bytes(png_bytes(pictures(2)[0][1])[:200])
    (tmp_path / "small.png").write_bytes(png_bytes(pictures(1)[0][0][:9, :9].copy()))
    (tmp_path / "empty.jpg").write_bytes(b"")
    np.save(tmp_path / "object.npy", np.array([{}], dtype=object), allow_pickle=True)
    np.save(tmp_path / "unit.npy", pictures(1)[0][0] / 255)
    records = {p.source.removeprefix(f"{tmp_path.name}/"): p for p in predict(bundle, tmp_path, progress=False)}
    status = {k: v.status for k, v in records.items()}
    assert status == {"good.png": "answered", "cut.png": "error", "small.png": "error", "empty.jpg": "error", "object.npy": "error", "unit.npy": "refused"}
    assert "0 to 255 are expected" in " ".join(records["unit.npy"].reasons) and exit_code(list(records.values())) == 2
    with pytest.raises(MedimgError, match="small.png"):
        predict(bundle, tmp_path / "small.png")
    with pytest.raises(DatasetError, match="no such file"):
        predict(bundle, tmp_path / "absent.png")
    with pytest.raises(MedimgError):
        predict(bundle, [])


def test_pictures_from_strangers():
    good = png_bytes(pictures(1)[0][0])
    jpeg = cv2.imencode(".jpg", pictures(1)[0][0])[1].tobytes()
    assert picture_size(good) == picture_size(jpeg) == (32, 32)
    rng = np.random.default_rng(0)
    for whole in (good, jpeg):
        for cut in range(0, len(whole) - 2, 37):
            with pytest.raises(DatasetError):
                decode_picture(whole[:cut])
        for _ in range(60):
            data = bytearray(whole)
            data[rng.integers(len(data))] = rng.integers(256)
            try:
                decode_picture(bytes(data))
            except DatasetError:
                pass
    bomb = bytearray(good)
    bomb[16:24] = (60_000).to_bytes(4, "big") * 2
    with pytest.raises(DatasetError, match="60000 × 60000"):
        decode_picture(bytes(bomb))


def test_sixteen_bit_png(tmp_path):
    deep = (pictures(1)[0][0].astype("uint16") * 16)
    image, warnings = decode_picture(cv2.imencode(".png", deep)[1].tobytes())
    assert image.dtype == np.uint8 and image.max() == 255 and "16-bit" in warnings[0]


def test_heat_map_lies_where_the_pixels_came_from():
    cam = np.zeros((4, 4))
    cam[0, 0] = 1
    tall = heat_map(cam, (80, 40), [("center_square", ())])
    assert not tall[:20].any() and not tall[60:].any() and np.unravel_index(tall.argmax(), tall.shape)[0] < 30
    assert heat_map(cam, (80, 40), [("resize", ())])[:10].any()
    full = heat_map(cam, (80, 80))
    assert hottest_region(full).box_yx[0] == 0 and heat_map(-cam, (8, 8)) is None


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_how_far_beside_its_cells_a_padded_network_looks(layers):
    """Means of 3 x 3 pixels at stride 2, padded below and to the right: the middle of a cell's field lies (2^layers - 1) / 2 pixels from the middle of the cell."""
    def run(x):
        maps = np.asarray(x, float)[..., 0]
        for _ in range(layers):
            padded = np.pad(maps, ((0, 0), (0, 1), (0, 1)))
            windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(1, 2))[:, ::2, ::2]
            maps = windows.mean(axis=(3, 4))
        return {"cam": maps[..., None]}
    strange = SimpleNamespace(digest=f"padded {layers}", engine=SimpleNamespace(run=run, input_shape=(64, 64, 1)))
    assert np.allclose(cam_shift(strange), (2**layers - 1) / 2 / 64, atol=0.01)


def test_the_peak_lies_on_the_opacity_more_often_than_on_the_unmoved_map():
    """The pointing game on new phantom films that the model calls; by chance a point lies on the opacity in 2 of 100."""
    shipped, cohort = Bundle.load("phantom-cxr"), phantom_cxr(40, seed=7041, positive=1.0)
    out = shipped.run(cohort["images"])
    called = [k for k, logit in enumerate(out["logits"][:, 0]) if logit > 0]
    hits = {name: sum(bool(cohort["masks"][k].flat[heat_map(out["cam"][k, ..., 0], (64, 64), shift=shift).argmax()]) for k in called)
            for name, shift in (("moved", cam_shift(shipped)), ("as it is", (0.0, 0.0)))}
    assert len(called) >= 30 and hits["moved"] > 1.2 * hits["as it is"], hits


def test_multiclass(tmp_path):
    import onnx
    from onnx import helper, numpy_helper
    model = onnx.load_from_string(toy_network())
    weights = np.random.default_rng(0).normal(size=(16, 3)).astype("float32")
    for tensor in model.graph.initializer:
        if tensor.name == "w":
            tensor.CopyFrom(numpy_helper.from_array(weights, "w"))
        if tensor.name == "b":
            tensor.CopyFrom(numpy_helper.from_array(np.zeros(3, "float32"), "b"))
        if tensor.name == "w_map":
            tensor.CopyFrom(numpy_helper.from_array(16 * weights.reshape(4, 4, 3), "w_map"))
    for value, shape in ((model.graph.output[0], ["n", 3]), (model.graph.output[2], ["n", 4, 4, 3])):
        value.CopyFrom(helper.make_tensor_value_info(value.name, 1, shape))
    images, _ = pictures(200)
    pre = Preprocessor([("resize", {"height": 16, "width": 16}), ("scale", {"low": 0, "high": 255})])
    out = Engine(model.SerializeToString()).run(pre.batch(images))
    b = build_bundle(tmp_path / "m", model=model.SerializeToString(), preprocessor=pre, training_ids=[],
                     calibration=fit_temperature(out["logits"], np.arange(200) % 3, task="multiclass"),
                     reference=fit_reference(out["features"], out["features"], quantile=1.0),
                     **{**FACTS, "classes": ["a", "b", "c"], "task": "multiclass", "thresholds": {}})
    p = answer(b, Study("x", images[0], {"modality": "DX"}))
    assert p.label == max(p.probability, key=p.probability.get) and set(p.score) == {"a", "b", "c"} and p.threshold is None
    assert p.explanation["class"] == p.label


def test_find_studies_orders_and_names(tmp_path):
    (tmp_path / "sub").mkdir()
    for name in ("b.png", "a.png", "sub/c.png"):
        (tmp_path / name).write_bytes(png_bytes(pictures(1)[0][0]))
    top = tmp_path.name
    assert [name for name, _ in find_studies(tmp_path)] == [f"{top}/a.png", f"{top}/b.png", f"{top}/sub/c.png"]


def test_sources_tell_files_apart(tmp_path, monkeypatch):
    for name in ("a/img.png", "b/img.png", "a/x/1.png", "b/x/1.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(png_bytes(pictures(1)[0][0]))
    names = lambda *paths: [name for name, _ in find_studies([*paths])]
    monkeypatch.chdir(tmp_path)
    assert names("a/img.png") == names(tmp_path / "a/img.png") == ["img.png"]
    assert names("a/img.png", "b/img.png", "c/no.png") == ["a/img.png", "b/img.png", "no.png"]
    assert names("a", "b") == ["a/img.png", "a/x/1.png", "b/img.png", "b/x/1.png"] and names("a/x", "b/x") == ["a/x/1.png", "b/x/1.png"]
    assert names("a/img.png", "a/img.png") == ["img.png"] * 2 and names(".")[0] == f"{tmp_path.name}/a/img.png"
    assert all(load().source == name for name, load in find_studies(["a", "b/img.png"]))


def test_sources_of_dicom(bundle, tmp_path):
    import zipfile

    from pydicom.data import get_testdata_file

    from medimg.data.phantom import thorax_phantom
    from medimg.data.phantom_dicom import write_ct
    ct = tmp_path / "study" / "ct"
    files = write_ct(thorax_phantom(1, shape=(24, 56, 56), spacing_mm=(12, 6.4, 6.4), nodules=1).volume, ct, seed=1)
    (tmp_path / "study" / "one.dcm").write_bytes(open(get_testdata_file("CT_small.dcm"), "rb").read())
    (tmp_path / "study" / "bad.dcm").write_bytes(b"no DICOM" * 40)
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as archive:
        archive.write(tmp_path / "study" / "one.dcm", "/deep/one.dcm")
        archive.writestr("README.txt", "hello")
        for file in files:
            archive.write(file, f"ct/{file.name}")
    records = predict(bundle, [tmp_path / "study", tmp_path / "all.zip"], progress=False)
    assert sorted(p.source for p in records) == ["all.zip!ct", "all.zip!deep/one.dcm", "study/bad.dcm", "study/ct", "study/one.dcm"]
    assert str(tmp_path) not in "".join(p.to_json() for p in records)
    bad = [tmp_path / "study" / "bad.dcm", tmp_path / "note.txt"]
    bad[1].write_bytes(b"hello")
    assert sorted(name for name, _ in find_studies([*bad, tmp_path / "study" / "one.dcm"])) == ["bad.dcm", "note.txt", "one.dcm"]
    (tmp_path / "hollow.dcm").write_bytes(b"\0" * 128 + b"DICM" + b"\xff" * 40)          # a marker and nothing behind it
    assert [name for name, _ in find_studies([tmp_path / "hollow.dcm"])] == ["hollow.dcm"]
    assert sorted(name for name, _ in find_studies(bad)) == ["bad.dcm", "note.txt"]


@pytest.mark.parametrize("fault", [zlib.error("x"), MemoryError(), ValueError("x"), RecursionError(), KeyError("x")])
def test_any_fault_of_a_reader_is_one_error(bundle, tmp_path, monkeypatch, fault):
    from medimg.deployment import intake
    (tmp_path / "good.png").write_bytes(png_bytes(pictures(2, seed=5)[0][1]))
    (tmp_path / "bad.npy").write_bytes(b"x")
    (tmp_path / "bad.dcm").write_bytes(b"x")

    def broken(*_, **__):
        raise fault
    monkeypatch.setitem(intake._LOADERS, "array", broken)
    monkeypatch.setattr("medimg.data.dicom.scan", broken)
    records = {p.source: p for p in predict(bundle, [tmp_path / n for n in ("good.png", "bad.npy", "bad.dcm")], progress=False)}
    assert records["good.png"].status == "answered"
    for name in ("bad.npy", "bad.dcm"):
        assert records[name].error["what"] == f"cannot be read ({type(fault).__name__})"


def test_odd_nifti(bundle, tmp_path):
    import nibabel as nib
    rng = np.random.default_rng(0)
    flat = rng.random((32, 32, 1)).astype("float32")
    rgb = np.zeros((32, 32, 1), np.dtype([("R", "u1"), ("G", "u1"), ("B", "u1")]))
    odd = {"nan": np.where(flat > 0.5, np.nan, flat), "inf": np.where(flat > 0.5, np.inf, flat), "complex": flat.astype("complex64"),
           "rgb": rgb, "four": rng.random((32, 32, 1, 5)).astype("float32"), "empty": np.zeros((0, 4, 1), "float32")}
    for name, array in odd.items():
        nib.save(nib.Nifti1Image(array, np.eye(4)), tmp_path / f"{name}.nii")
    nib.save(nib.Nifti1Image(flat, np.eye(4)), tmp_path / "cut.nii.gz")
    whole = (tmp_path / "cut.nii.gz").read_bytes()
    (tmp_path / "cut.nii.gz").write_bytes(whole[:400] + b"\xff" * 40 + whole[440:-200])
    (tmp_path / "good.png").write_bytes(png_bytes(pictures(2, seed=5)[0][1]))
    records = {p.source.removeprefix(f"{tmp_path.name}/"): p for p in predict(bundle, tmp_path, progress=False)}
    assert records.pop("good.png").status == "answered" and len(records) == 7
    assert {name: p.status for name, p in records.items()} == dict.fromkeys(records, "error")
    assert "four axes" in records["four.nii"].error["what"]


def test_threshold_zero_is_a_threshold(bundle):
    never, always = (build_at(bundle, {"bright": cut}) for cut in (1.0, 0.0))
    assert answer(never, study()).label == "dark"
    p = answer(always, study())
    assert p.label == "bright" and p.threshold == {"bright": 0.0}


@pytest.mark.parametrize("name", ["pneumonia", "phantom-cxr"])
def test_shipped_bundles_verify(name):
    from medimg.deployment.bundle import shipped, verify
    if name not in shipped():
        pytest.skip(f"bundle {name} is not built; remedy: medimg reproduce {name}")
    assert verify(name)["origin"] == "shipped" and Bundle.load(name).warnings == ()
