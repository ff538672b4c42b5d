"""The command line as its user meets it: real processes, exit codes, one-line errors, JSON, whole files or none."""
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from pydicom.data import get_testdata_file

CT = get_testdata_file("CT_small.dcm")


def medimg(*arguments, cwd=None, env=None, check=None):
    done = subprocess.run([sys.executable, "-m", "medimg.cli", *map(str, arguments)], capture_output=True, text=True, cwd=cwd, timeout=600,
                          env={**os.environ, **(env or {})})
    if check is not None:
        assert done.returncode == check, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def mistake(*arguments, cwd=None, words=(), env=None):
    """A user's mistake: exit code 2, one line on stderr, no traceback, nothing on stdout."""
    done = medimg(*arguments, cwd=cwd, check=2, env=env)
    assert "Traceback" not in done.stderr and done.stdout == ""
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    for word in words:
        assert word in done.stderr, done.stderr
    return done.stderr


def test_every_command_has_help():
    top = medimg("--help", check=0).stdout
    for verb in ("scan", "read", "data", "train", "tune", "runs", "update", "evaluate", "reproduce", "bundle", "trust", "predict", "report", "demo", "doctor", "deidentify", "store", "review"):
        assert verb in top
        assert "--help" in medimg(verb, "--help", check=0).stdout


def test_scan_of_the_real_thorax_ct(data_root):
    series = json.loads(medimg("scan", data_root / "thorax_ct", "--json", check=0).stdout)["series"]
    ct, structures = series
    assert (ct["modality"], ct["shape"], ct["spacing_mm"], ct["findings"]) == ("CT", [99, 512, 512], [3.0, 0.9766, 0.9766], [])
    assert structures["modality"] == "RTSTRUCT" and structures["references"] == [ct["series_uid"]]


def test_read_of_the_real_thorax_ct_equals_the_reference(data_root, tmp_path):
    reference = json.loads((data_root / "reference.json").read_text())["thorax_ct"]
    facts = json.loads(medimg("read", data_root / "thorax_ct", "--out", tmp_path, "--json", check=0).stdout)
    assert (facts["min"], facts["max"]) == (reference["hu_min"], reference["hu_max"]) and facts["mean"] == pytest.approx(reference["hu_mean"], abs=1e-3)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["thorax_ct.nii.gz", "thorax_ct.png"]
    image = nib.load(tmp_path / "thorax_ct.nii.gz")
    assert image.shape == (512, 512, 99) and np.allclose(image.header.get_zooms(), (0.9766, 0.9766, 3))
    assert np.asarray(image.dataobj).mean() == pytest.approx(reference["hu_mean"], abs=1e-3)
    assert (tmp_path / "thorax_ct.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_nifti_written_by_read_can_be_read_again(tmp_path):
    medimg("read", CT, "--out", tmp_path, check=0)
    [nifti] = tmp_path.glob("*.nii.gz")
    assert json.loads(medimg("read", nifti, "--no-write", "--json", check=0).stdout)["shape"] == [1, 128, 128]


def test_read_never_overwrites_its_input(tmp_path):
    medimg("read", CT, "--out", tmp_path, check=0)
    [nifti] = tmp_path.glob("*.nii.gz")
    before = nifti.read_bytes()
    for picture in tmp_path.glob("*.png"):
        picture.unlink()
    mistake("read", nifti.name, cwd=tmp_path, words=["is the input", "--out"])
    (tmp_path / "link").symlink_to(tmp_path)
    mistake("read", nifti, "--out", tmp_path / "link", words=["is the input"])
    assert nifti.read_bytes() == before and not list(tmp_path.glob("*.png"))
    medimg("read", nifti, "--out", tmp_path / "elsewhere", check=0)


def test_bad_files_are_one_line_and_leave_nothing(tmp_path):
    out = tmp_path / "out"
    (tmp_path / "text.dcm").write_text("hello " * 100)
    (tmp_path / "cut.dcm").write_bytes(Path(CT).read_bytes()[:-9000])
    (tmp_path / "empty").mkdir()
    for name, words in (("absent.dcm", ["absent.dcm", "check the path"]), ("text.dcm", ["text.dcm", "DICM"]), ("cut.dcm", ["cut.dcm", "truncated"]), ("empty", ["empty", "no DICOM"])):
        mistake("read", tmp_path / name, "--out", out, words=words)
    assert not out.exists()


def test_unknown_transfer_syntax_and_mixed_series(tmp_path):
    import pydicom
    ds = pydicom.dcmread(get_testdata_file("MR_small_jp2klossless.dcm"))
    ds.file_meta.TransferSyntaxUID = "1.2.840.10008.1.2.4.103"
    ds.save_as(tmp_path / "video.dcm")
    mistake("read", tmp_path / "video.dcm", words=["video.dcm", "no decoder"], cwd=tmp_path)
    two = tmp_path / "two"
    two.mkdir()
    for name in ("CT_small.dcm", "MR_small.dcm"):
        (two / name).write_bytes(Path(get_testdata_file(name)).read_bytes())
    assert "2 image series" in mistake("read", two, cwd=tmp_path, words=["series_uid"])


def test_a_tilted_uneven_series_is_made_upright_on_request(data_root, tmp_path):
    source = data_root / "dicom_qa_ct" / "GE"
    plain = json.loads(medimg("read", source, "--no-write", "--json", check=0).stdout)
    assert plain["spacing_mm"] is None and plain["tilt_deg"] == pytest.approx(18.5, abs=0.01)
    upright = json.loads(medimg("read", source, "--untilt", "--resample", "--out", tmp_path, "--json", check=0).stdout)
    assert upright["tilt_deg"] < 0.01 and upright["spacing_mm"][0] > 1
    image = nib.load(tmp_path / "GE.nii.gz")
    steps = image.affine[:3, :3] / np.linalg.norm(image.affine[:3, :3], axis=0)
    assert np.allclose(steps.T @ steps, np.eye(3), atol=1e-3)


def test_a_time_series_is_written_moment_by_moment(data_root, tmp_path):
    facts = json.loads(medimg("read", data_root / "dicom_qa_enh" / "In", "--out", tmp_path, "--json", check=0).stdout)
    assert len(facts) == 4 and all(f["shape"] == [6, 64, 64] for f in facts)
    reference = nib.load(next((data_root / "dicom_qa_enh" / "Ref").glob("*.nii*"))).get_fdata()
    moments = [nib.load(p).get_fdata() for p in sorted(tmp_path.glob("*-t00?.nii.gz"))]
    assert len(moments) == 4 and {m.mean().round(6) for m in moments} == {reference[..., k].mean().round(6) for k in range(4)}


def test_scan_draws_a_quality_report(tmp_path):
    seen = json.loads(medimg("scan", CT, "--pictures", tmp_path / "qa", "--json", check=0).stdout)
    (quality,) = seen["quality"]
    assert quality["result"] in ("ok", "not checked", "info") and {c["name"] for c in quality["checks"]} >= {"placed", "unit"}
    assert (tmp_path / "qa" / "series_001.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_untrusted_files_can_be_decoded_apart():
    facts = [json.loads(medimg("read", get_testdata_file("JPEG2000.dcm"), "--no-write", "--json", *more, check=0).stdout) for more in ([], ["--isolate"])]
    assert facts[0] == facts[1]
    mistake("read", "a.nii.gz", "--isolate", words=["DICOM"])


def test_data_sheet_and_leaks(data_root, tmp_path):
    sheet = json.loads(medimg("data", "sheet", "pneumoniamnist", "--picture", tmp_path / "p.png", "--json", check=0).stdout)
    assert np.sum(sheet["counts"]) == 4708 + 524 + 624 and (tmp_path / "p.png").exists()
    leaks = json.loads(medimg("data", "leaks", "pneumoniamnist", "--json", check=1).stdout)
    assert leaks["exact_groups_across"] == 8 and not leaks["clean"]          # as the data's own notes say


def test_deidentify_releases_resumes_and_recognises(tmp_path):
    import shutil
    (tmp_path / "in").mkdir()
    for name in ("CT_small.dcm", "MR_small.dcm"):
        shutil.copy(get_testdata_file(name), tmp_path / "in")
    command = ("deidentify", tmp_path / "in", tmp_path / "out", "--key", tmp_path / "key")
    mistake(*command, words=["key"])
    assert not (tmp_path / "out").exists()
    first = json.loads(medimg(*command, "--new-key", "--json", check=0).stdout)
    assert first["written"] == 2 and "not a medical device" in first["disclaimer"]
    released = sorted((tmp_path / "out").rglob("*.dcm"))
    assert len(released) == 2 and not any(b"CompressedSamples" in f.read_bytes() for f in released)
    assert json.loads(medimg(*command, "--json", check=0).stdout)["resumed"] == 2
    again = json.loads(medimg("deidentify", tmp_path / "out", tmp_path / "twice", "--key", tmp_path / "key", "--json", check=0).stdout)
    assert again["recognised"] == 2
    (tmp_path / "in" / "cut.dcm").write_bytes((tmp_path / "in" / "CT_small.dcm").read_bytes()[:3000])
    done = medimg(*command, check=2)
    assert "cut.dcm" in done.stdout and "Traceback" not in done.stderr
    mistake("deidentify", tmp_path / "in", tmp_path / "x", "--key", tmp_path / "key", "--option", "everything", words=["retain-uids"])


def test_data_mistakes_name_the_nearest(tmp_path):
    mistake("data", "info", "pneumonia-mnist", words=["pneumoniamnist"])
    mistake("train", "retinamist", "--out", tmp_path / "r", words=["retinamnist"])
    assert not (tmp_path / "r").exists()


def test_a_wrong_checksum_is_refused(tmp_path):
    np.savez(tmp_path / "pneumoniamnist.npz", train_images=np.zeros((2, 28, 28), "uint8"))
    mistake("data", "check", "pneumoniamnist", words=["pneumoniamnist.npz"], env={"MEDIMG_DATA": str(tmp_path), "MEDIMG_CACHE": str(tmp_path / "cache")})


def test_one_changed_byte_in_a_bundle(tmp_path):
    import shutil

    from medimg.deployment.bundle import bundles_dir
    bundle = shutil.copytree(bundles_dir() / "pneumonia", tmp_path / "b")
    raw = bytearray((bundle / "model.onnx").read_bytes())
    raw[1000] ^= 1
    (bundle / "model.onnx").write_bytes(raw)
    mistake("predict", bundle, CT, words=["model.onnx"])
    mistake("bundle", "verify", bundle, words=["model.onnx"])
    mistake("bundle", "inspect", "pneumnia", words=["pneumonia"])


def test_predict_refuses_a_ct_and_answers_a_phantom(tmp_path):
    from medimg.demo import make_patient
    patient = make_patient(tmp_path, seed=11)
    [ct] = json.loads(medimg("predict", "pneumonia", CT, "--json", check=0).stdout)
    assert ct["status"] == "refused" and ct["probability"] is None and any("CT" in r for r in ct["reasons"])
    [cxr] = json.loads(medimg("predict", "phantom-cxr", patient["cxr"], "--json", check=0).stdout)
    assert cxr["status"] == "answered" and sum(cxr["probability"].values()) == pytest.approx(1, abs=1e-6)
    assert "research use" in json.dumps(cxr)


def test_an_image_too_small_for_the_bundle_is_a_mistake(tmp_path):
    import cv2
    cv2.imwrite(str(tmp_path / "tiny.png"), np.random.default_rng(0).integers(0, 256, (3, 3), dtype="uint8"))
    mistake("predict", "pneumonia", tmp_path / "tiny.png", words=["tiny.png"])


def test_one_bad_file_does_not_stop_the_rest(tmp_path):
    from medimg.demo import make_patient
    patient = make_patient(tmp_path / "p", seed=11)
    (tmp_path / "bad.dcm").write_bytes(b"\0" * 128 + b"DICM" + b"\xff" * 40)
    done = medimg("predict", "phantom-cxr", patient["cxr"], tmp_path / "bad.dcm", "--json", check=2)
    assert [a["status"] for a in json.loads(done.stdout)] == ["answered", "error"]


def test_report_ends_with_the_exit_code_of_predict(tmp_path):
    np.save(tmp_path / "noise.npy", np.random.default_rng(0).integers(0, 255, (64, 64), dtype="uint8"))
    done = medimg("report", "phantom-cxr", tmp_path / "noise.npy", tmp_path / "absent.png", "--out", tmp_path / "r.html", "--json", check=2)
    assert Path(json.loads(done.stdout)["report"]).is_file()
    medimg("report", "phantom-cxr", tmp_path / "noise.npy", "--out", tmp_path / "r.html", check=0)


def test_doctor_says_what_is_missing():
    facts = json.loads(medimg("doctor", "--json", check=0).stdout)
    assert facts["python"].startswith("3.") and all(p["state"] != "missing" or p["remedy"] for p in facts["parts"])


def test_doctor_names_folders_that_do_not_exist(tmp_path):
    facts = json.loads(medimg("doctor", "--json", check=0, env={"MEDIMG_DATA": str(tmp_path / "nowhere")}).stdout)
    assert facts["data_dirs_missing"] == [str(tmp_path / "nowhere")] and facts["datasets"] == {}
    text = medimg("doctor", check=0, env={"MEDIMG_DATA": str(tmp_path / "nowhere")}).stdout
    assert "does not exist" in text


def test_doctor_says_where_data_sets_are(data_root):
    assert json.loads(medimg("doctor", "--json", check=0).stdout)["datasets"]["retinamnist"] == "$MEDIMG_DATA/medmnist/retinamnist.npz"


def test_prediction_needs_no_tensorflow(tmp_path):
    code = ("import sys; from medimg.cli import app; "
            f"app(['predict', 'pneumonia', {CT!r}], standalone_mode=False); "
            "bad = {'tensorflow', 'keras', 'matplotlib', 'pandas'} & set(sys.modules); print(bad); sys.exit(bool(bad))")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr


def test_train_killed_and_resumed_equals_uninterrupted(tmp_path):
    line = ("train", "phantom-cxr", "--profile", "ci", "--n", "60", "--data", "phantom", "--epochs", "4")
    medimg(*line, "--out", tmp_path / "whole", check=0)
    process = subprocess.Popen([sys.executable, "-m", "medimg.cli", *line, "--out", str(tmp_path / "cut")], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.time() + 240
    while not (tmp_path / "cut" / "checkpoint.npz").exists() and process.poll() is None and time.time() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    medimg(*line, "--out", tmp_path / "cut", check=0)
    runs = [json.loads((tmp_path / name / "run.json").read_text()) for name in ("whole", "cut")]
    assert runs[1]["resumed"] == 1, "the process ended before it could be killed"
    keep = [{k: v for k, v in row.items() if not k.endswith("_s") and k != "seconds"} for row in runs[0]["history"]], [{k: v for k, v in row.items() if not k.endswith("_s") and k != "seconds"} for row in runs[1]["history"]]
    assert keep[0] == keep[1] and runs[0]["threshold"] == runs[1]["threshold"]
    other = mistake(*line[:-1], "3", "--seed", "5", "--quiet", "--out", tmp_path / "cut")
    assert "--out" in other or "--fresh" in other
    result = json.loads(medimg("evaluate", tmp_path / "cut", "--split", "val", "--data", "phantom", "--n-boot", "100", "--json", check=0).stdout)
    assert result["metrics"]["auc"]["low"] <= result["metrics"]["auc"]["value"] <= result["metrics"]["auc"]["high"]


def test_demo_is_complete_and_quick_enough_to_love(tmp_path):
    done = medimg("demo", "--out", tmp_path / "demo", check=0, cwd=tmp_path)
    assert "report" in done.stdout and "refused" in done.stdout and "answered" in done.stdout
    summary = json.loads((tmp_path / "demo" / "summary.json").read_text())
    by = {(a["model"]["name"], a["status"]) for a in summary["answers"]}
    assert ("phantom-cxr", "answered") in by and ("pneumonia", "refused") in by
    first = next(a for a in summary["answers"] if a["model"]["name"] == "phantom-cxr")
    assert first["label"] == first["classes"][1], "the planted opacity was not called"
    assert sum(bool(row["planted"] and row["found"] and row["planted"][0] == row["found"][0]) for row in summary["screening"]) >= 2, "planted nodules were not found and typed"
    lung_rads = [r for a in summary["answers"] for r in a["recommendations"] if r["guideline"] == "ACR Lung-RADS"]
    assert lung_rads[0]["status"] == "applies" and lung_rads[0]["category"].startswith("4")
    for path in summary["archive"]:
        if path.endswith(".dcm"):
            assert "Error" not in subprocess.run(["dciodvfy", "-new", path], capture_output=True, text=True).stderr
    assert summary["heat_map"]["share_inside"] > summary["heat_map"]["lesion_share"], "the heat map points no better than chance"
    assert "research use" in (tmp_path / "demo" / "report.html").read_text().lower()


@pytest.fixture
def kept(tmp_path):
    """A store with a scan and two answers, one of which two readers judged."""
    from medimg.deployment.prediction import Prediction
    from medimg.deployment.store import Store
    store = Store(tmp_path / "kept")
    store.add_instance(Path(CT).read_bytes())
    for k in range(2):
        store.add_result(Prediction("answered", f"{k}.png", task="binary", classes=("normal", "ill"), label="ill", probability={"normal": 0.1, "ill": 0.9}, picture=np.full((8, 8), k, "uint8")))
    store.add_label(1, user="dr.wu", verdict="disagree", label="normal", comment="=1+1, a \"rib\",\nno more")
    store.add_label(2, user="dr.wu", verdict="agree")
    return store


def test_a_store_is_verified(kept):
    done = medimg("store", "verify", kept.folder, check=0)
    assert done.stdout.splitlines() == ["1 instances, 0 faults"] and json.loads(medimg("store", "verify", kept.folder, "--json", check=0).stdout)["ok"] is True
    file = next((kept.folder / "instances").rglob("*.dcm"))
    file.write_bytes(file.read_bytes() + b"x")
    done = medimg("store", "verify", kept.folder, check=1)
    assert done.stdout.splitlines()[0].startswith("damaged: instance 1.3.6.1.4.1.5962") and "1 faults" in done.stdout and not done.stderr
    (kept.folder / "store.sqlite3").write_bytes(b"no database" * 1000)
    for rest in ("-wal", "-shm"):
        (kept.folder / f"store.sqlite3{rest}").unlink(missing_ok=True)
    mistake("store", "verify", kept.folder, words=["no store"])


def test_no_verb_makes_a_store(tmp_path):
    for arguments in (("store", "verify", tmp_path), ("store", "labels", tmp_path, "--out", tmp_path / "x"), ("review", tmp_path)):
        mistake(*arguments, words=["there is no store here"])
    assert list(tmp_path.iterdir()) == []


def test_verdicts_leave_as_table_and_as_pictures(kept, tmp_path):
    import csv
    medimg("store", "labels", kept.folder, "--out", tmp_path / "labels.csv", check=0)
    medimg("store", "labels", kept.folder, "--out", tmp_path / "labels.json", check=0)
    with open(tmp_path / "labels.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [(r["result_id"], r["verdict"], r["label"], r["answer"], r["user"]) for r in rows] == [("1", "disagree", "normal", "ill", "dr.wu"), ("2", "agree", "ill", "ill", "dr.wu")]
    assert rows[0]["comment"] == "'=1+1, a \"rib\",\nno more" and json.loads((tmp_path / "labels.json").read_text())[0]["comment"].startswith("=1+1")
    done = medimg("store", "labels", kept.folder, "--out", tmp_path / "new", check=0)
    assert "medimg update" in done.stdout and {p.parent.name for p in (tmp_path / "new").rglob("*.png")} == {"normal", "ill"}
    mistake("store", "labels", kept.folder, "--out", tmp_path / "new", words=["not empty"])


def test_review_opens_the_page_on_a_store(kept):
    import socket
    import urllib.request
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen([sys.executable, "-m", "medimg.cli", "review", str(kept.folder), "--port", str(port), "--bundle", "phantom-cxr"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        end = time.monotonic() + 60
        while time.monotonic() < end and process.poll() is None:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/review/", timeout=5) as page:
                    assert page.url.endswith("/review/login") and b'name="secret"' in page.read()
                break
            except OSError:
                time.sleep(0.2)
    finally:
        process.send_signal(signal.SIGTERM)
        said = process.communicate(timeout=30)[1]
    assert process.returncode == 0 and f"http://127.0.0.1:{port}/review/" in said and f"medimg user add NAME --role clinician --store {kept.folder}" in said, said
