"""The store: what was acknowledged survives kill -9, hostile files and names change nothing, many writers at once, labels are never lost."""
import hashlib
import json
import multiprocessing
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO

import numpy as np
import pydicom
import pytest
from pydicom.data import get_testdata_file

from medimg.data.imports import import_folder
from medimg.deployment.prediction import STUDY_FIELDS, Prediction
from medimg.deployment.store import Conflict, Store, StoreFull, check_uid
from medimg.deployment.upkeep import export_labels, faults, verdicts, verify
from medimg.errors import ConfigError, DicomError, MedimgError, ServiceError


def dicom(**changes):
    """Bytes of pydicom's small CT with other elements."""
    ds = pydicom.dcmread(get_testdata_file("CT_small.dcm"))
    for keyword, value in changes.items():
        if value is None:
            delattr(ds, keyword)
        else:
            setattr(ds, keyword, value)
    out = BytesIO()
    ds.save_as(out)
    return out.getvalue()


def answered(**changes):
    fields = {"task": "binary", "classes": ("normal", "ill"), "label": "ill", "probability": {"normal": 0.1, "ill": 0.9}, "picture": np.zeros((8, 8), "uint8")}
    return Prediction("answered", "a.png", **{**fields, **changes})


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "kept")


# ---- instances -----------------------------------------------------------------------------------------------------------------
def test_twice_is_once(store):
    first, again = store.add_instance(dicom()), store.add_instance(dicom())
    assert (first["new"], again["new"]) == (True, False) and first["path"] == again["path"]
    assert len(list(store.folder.rglob("*.dcm"))) == 1 and store.studies()[0]["instances"] == 1
    assert pydicom.dcmread(store.path(first["sop_uid"])).SOPInstanceUID == first["sop_uid"]


def test_other_bytes_are_refused_and_the_first_stay(store):
    first = store.add_instance(dicom())
    with pytest.raises(Conflict, match="another content"):
        store.add_instance(dicom(InstanceNumber=99))
    assert store.path(first["sop_uid"]).read_bytes() == dicom() and verify(store)["orphans"] == []


@pytest.mark.parametrize("changes, why", [({"PatientID": "SOMEBODY"}, "another patient"), ({"StudyInstanceUID": "1.2.9"}, "another study")])
def test_a_uid_of_somebody_else_is_refused(store, changes, why):
    store.add_instance(dicom())
    with pytest.raises(Conflict, match=why):
        store.add_instance(dicom(SOPInstanceUID="1.2.3.4", **changes))
    assert verify(store) == {"checked": 1, "missing": [], "damaged": [], "orphans": [], "results": [], "index": []} and len(store.studies()) == 1


@pytest.mark.parametrize("uid", ["../../../tmp/evil", "..", "/etc/passwd", "1.2/../../3", "1.2\\3", "1" * 65, "1..2", "1.2.", "abc", "1.2;rm", "%2e%2e", "", None])
@pytest.mark.parametrize("keyword", ["SOPInstanceUID", "SeriesInstanceUID", "StudyInstanceUID"])
def test_hostile_uids(store, keyword, uid):
    before = sorted(str(p) for p in store.folder.parent.rglob("*"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")              # pydicom's, about writing such a value
        data = dicom(**{keyword: uid})
    with pytest.raises(DicomError):
        store.add_instance(data)
    assert sorted(str(p) for p in store.folder.parent.rglob("*")) == before and not store.studies()


def test_what_is_no_dicom(store):
    whole = dicom()
    for data in (b"", b"DICM", os.urandom(4096), whole[:200], whole[:-100][:700], b"\0" * 128 + b"DICM" + b"\xff" * 64):
        with pytest.raises(DicomError):
            store.add_instance(data)
    small = Store(store.folder.parent / "small", max_instance_bytes=1000)
    with pytest.raises(DicomError, match="at most 1000"):
        small.add_instance(whole)
    assert not list(store.folder.rglob("*.dcm")) and not list((store.folder / "incoming").iterdir())


def test_any_flipped_byte_is_a_typed_error_or_kept(store):
    whole = dicom()
    for k in range(128, 1500, 7):
        data = bytearray(whole)
        data[k] ^= 0xFF
        try:
            store.add_instance(bytes(data))
        except MedimgError:
            pass
    assert verify(store)["orphans"] == verify(store)["missing"] == verify(store)["damaged"] == []


def test_texts_are_cleaned(store):
    store.add_instance(dicom(PatientName="<script>alert(1)</script>^X\u202e\x1b[31m", SpecificCharacterSet="ISO_IR 192", InstanceNumber=None))
    study = store.studies()[0]
    assert study["patient_name"] == "<script>alert(1)</script>^X[31m" and store.instances(study["study_uid"])[0]["number"] is None


def test_what_a_decoder_says_is_checked(store):
    """A file may have taken over the process that read it: whatever that says, only names, texts and numbers of the tables come through."""
    uids = {"study_uid": "1.2", "series_uid": "1.3", "sop_uid": "1.4", "sop_class": "1.5"}
    for lie in (None, [], "x", {}, {"uids": None}, {"uids": []}, {"uids": {**uids, "sop_uid": "../../x"}, "series": {}, "instance": {}}, {"uids": {**uids, "study_uid": 7}, "series": {}, "instance": {}},
                {"uids": uids, "series": 3, "instance": {}}, {"uids": uids, "series": {}}):
        with pytest.raises(DicomError):
            store.add_instance(dicom(), read=lambda path, whole=False, lie=lie: lie)
    assert store.studies() == [] and not list((store.folder / "instances").rglob("*.dcm"))
    lie = {"uids": {**uids, "x": "y"}, "series": {"modality": "CT" * 99, "number": "1", "created=1, x": "y"}, "study": {"patient_name": "A\x1b[31m\n" + "B" * 999, "patient_id": ["x"], "study_date": {}},
           "instance": {"rows": 1 << 40, "columns": 2.5, "frames": True, "number": 3, "syntax": "1" * 99, "path": "/etc/passwd", "sha256": "0"}}
    kept = store.add_instance(dicom(), read=lambda path, whole=False: lie)
    series, instance, study = store.series("1.2")[0], store.instances("1.2")[0], store.studies()[0]
    assert len(series["modality"]) == 16 and series["number"] is None and len(study["patient_name"]) <= 256 and "\x1b" not in study["patient_name"]
    assert study["patient_id"] is study["study_date"] is None
    assert [instance[k] for k in ("rows", "columns", "frames", "number")] == [None, None, None, 3] and len(instance["syntax"]) == 64
    assert instance["path"] == kept["path"] and kept["path"].read_bytes() == dicom() and verify(store)["damaged"] == []


def test_a_full_disk_is_said(store, monkeypatch):
    import medimg.deployment.store as module
    with pytest.raises(StoreFull):
        Store(store.folder, min_free_bytes=1 << 60).add_instance(dicom())
    monkeypatch.setattr(module.os, "replace", lambda *a: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(StoreFull, match="No space"):
        store.add_instance(dicom())
    monkeypatch.undo()
    assert not store.studies() and store.add_instance(dicom())["new"]


def test_filters(store):
    for k, (name, day) in enumerate([("DOE^JANE", "20240105"), ("ROE^RICHARD", "20240301"), ("O'NEIL^50%_", "20250101")]):
        store.add_instance(dicom(PatientName=name, StudyDate=day, PatientID=f"P{k}", StudyInstanceUID=f"1.2.{k}", SeriesInstanceUID=f"1.3.{k}", SOPInstanceUID=f"1.4.{k}"))
    def found(**filters):
        return [s["patient_id"] for s in store.studies(**filters)]
    assert found() == ["P2", "P1", "P0"] and found(limit=1, offset=1) == ["P1"]
    assert found(patient_name="*oe*") == ["P1", "P0"] and found(patient_name="*%*") == ["P2"] and found(patient_name="O'NEIL*") == ["P2"]
    assert found(study_date="20240101-20240401") == ["P1", "P0"] and found(study_date="-20240201") == ["P0"] and found(study_date="20250101") == ["P2"]
    assert found(modality="CT", patient_id="P?") == ["P2", "P1", "P0"] and found(modality="MR") == [] and found(patient_id="' OR 1=1 --") == []
    with pytest.raises(ConfigError, match="no filter"):
        store.studies(**{"1=1; --": "x"})


# ---- death and company ---------------------------------------------------------------------------------------------------------
DIE = """
import os, signal, sys
import medimg.deployment.store as m
store, data, where = m.Store(sys.argv[1]), open(sys.argv[2], 'rb').read(), sys.argv[3]
die = lambda *a, **k: os.kill(os.getpid(), signal.SIGKILL)
if where == 'before rename': m.os.replace = die
if where == 'after rename': m.Store._insert = die
if where == 'in transaction':
    put = m._put
    m._put = lambda db, table, values: die() if table == 'instances' else put(db, table, values)
store.add_instance(data)
print('acknowledged')
"""


@pytest.mark.parametrize("where", ["before rename", "after rename", "in transaction", "never"])
def test_killed_between_file_and_row(tmp_path, where):
    """Killed at each step: nothing half is visible, and the same instance can be sent again."""
    (tmp_path / "a.dcm").write_bytes(dicom())
    done = subprocess.run([sys.executable, "-c", DIE, tmp_path / "kept", tmp_path / "a.dcm", where], capture_output=True, text=True)
    assert done.returncode == (0 if where == "never" else -signal.SIGKILL), done.stderr
    store = Store(tmp_path / "kept")
    assert len(store.studies()) == (where == "never")
    assert len(verify(store)["orphans"]) == (where in ("after rename", "in transaction"))
    again = store.add_instance(dicom())
    assert again["new"] == (where != "never") and verify(store) == {"checked": 1, "missing": [], "damaged": [], "orphans": [], "results": [], "index": []}


def test_killed_at_any_moment_loses_nothing_acknowledged(tmp_path):
    (tmp_path / "a.dcm").write_bytes(dicom())
    code = ("import sys\nfrom medimg.deployment.store import Store\nstore, data = Store(sys.argv[1]), open(sys.argv[2], 'rb').read()\n"
            "uid = store.add_instance(data)['sop_uid'].encode()\n"
            "for k in range(100, 999):\n    print(store.add_instance(data.replace(uid, uid[:-4] + b'.' + str(k).encode()))['sop_uid'], flush=True)")
    told = []
    for delay in (0.02, 0.11, 0.25):
        child = subprocess.Popen([sys.executable, "-c", code, tmp_path / "kept", tmp_path / "a.dcm"], stdout=subprocess.PIPE, text=True)
        told.append(child.stdout.readline())
        time.sleep(delay)
        child.send_signal(signal.SIGKILL)
        told += [line for line in child.stdout.read().splitlines(keepends=True) if line.endswith("\n")]
        child.wait()
    store = Store(tmp_path / "kept")
    assert told and all(store.path(uid.strip()).stat().st_size == len(dicom()) for uid in told)
    assert verify(store)["missing"] == verify(store)["damaged"] == []


def _send(folder, base):
    store = Store(folder)
    return [store.add_instance(dicom(SOPInstanceUID=f"1.2.3.{k}", InstanceNumber=k))["new"] for k in range(base, base + 20)]


def test_processes_at_once(tmp_path):
    """Four processes that open a new store at once and send overlapping instances: each is new exactly once."""
    with multiprocessing.get_context("spawn").Pool(4) as pool:
        news = pool.starmap(_send, [(tmp_path / "kept", base) for base in (0, 10, 20, 30)])
    assert sum(map(sum, news)) == 50 == Store(tmp_path / "kept").studies()[0]["instances"]
    assert verify(Store(tmp_path / "kept"))["orphans"] == []


def test_threads_at_once(store):
    """One of eight different contents wins, the others are told so; labels of all threads are kept."""
    def send(k):
        try:
            return store.add_instance(dicom(InstanceNumber=k))["new"]
        except Conflict:
            return None
    with ThreadPoolExecutor(8) as pool:
        out = list(pool.map(send, range(8)))
    assert out.count(True) == 1 and out.count(None) == 7
    assert verify(store) == {"checked": 1, "missing": [], "damaged": [], "orphans": [], "results": [], "index": []}
    answer = store.add_result(answered())
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda k: store.add_label(answer, user=f"u{k}", verdict="agree"), range(40)))
    assert len(store.labels(answer)) == 40


def test_forked_child_uses_its_own_connection(store):
    store.add_instance(dicom())
    if (pid := os.fork()) == 0:
        ok = False
        try:
            store.add_instance(dicom(SOPInstanceUID="1.2.3"))
            ok = len(store.instances(store.studies()[0]["study_uid"])) == 2
        finally:
            os._exit(0 if ok else 1)
    assert os.waitpid(pid, 0)[1] == 0 and store.studies()[0]["instances"] == 2


def test_damage_is_found(store):
    kept = [store.add_instance(dicom(SOPInstanceUID=f"1.2.{k}")) for k in range(3)]
    kept[0]["path"].write_bytes(b"\0" + kept[0]["path"].read_bytes()[1:])
    kept[1]["path"].unlink()
    (orphan := kept[2]["path"].with_name("1.2.9-000000000000.dcm")).write_bytes(b"x")
    found = verify(store, sweep=True)
    assert found["damaged"] == ["1.2.0"] and found["missing"] == ["1.2.1"] and len(found["orphans"]) == 1 and orphan.exists()
    os.utime(orphan, (1, 1))
    assert verify(store, sweep=True)["orphans"] and not orphan.exists()
    with pytest.raises(ServiceError, match="gone"):
        store.path("1.2.1")
    assert store.add_instance(dicom(SOPInstanceUID="1.2.1"))["sop_uid"] == "1.2.1" and store.path("1.2.1").is_file()


def test_versions_and_modes(store, tmp_path):
    assert store.folder.stat().st_mode & 0o077 == 0 and (store.folder / "store.sqlite3").stat().st_mode & 0o077 == 0
    db = sqlite3.connect(store.folder / "store.sqlite3")
    assert db.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    db.execute("PRAGMA user_version=99")
    with pytest.raises(ServiceError, match="version 99"):
        Store(store.folder)
    (tmp_path / "other").mkdir()
    sqlite3.connect(tmp_path / "other" / "store.sqlite3").execute("CREATE TABLE x(y)")
    with pytest.raises(ServiceError):
        Store(tmp_path / "other")
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "store.sqlite3").write_bytes(b"no database at all" * 100)
    with pytest.raises(ServiceError, match="no store"):
        Store(tmp_path / "text")


# ---- results and labels --------------------------------------------------------------------------------------------------------
def test_results_come_back_as_they_were(store):
    heat, mask = np.linspace(0, 1, 64, dtype="float32").reshape(8, 8), (np.arange(64).reshape(8, 8) > 40).astype("uint8")
    one = store.add_result(answered(), mask=mask, heat_map=heat)
    two = store.add_result(Prediction("refused", "b", reasons=("a CT",)))
    arrays = store.arrays(one)
    assert np.array_equal(arrays["mask"], mask) and np.abs(arrays["heat_map"] - heat).max() < 1e-3 and store.arrays(two) == {}
    assert [r["id"] for r in store.results()] == [two, one] and store.results("1.2.3") == []
    assert Prediction.from_json(json.dumps(store.result(one)["record"])).label == "ill"
    file = next((store.folder / "results").glob("*.npz"))
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(ServiceError, match="changed"):
        store.arrays(one)
    for wrong in (0, 99, 1 << 70):
        with pytest.raises(ServiceError, match="no result"):
            store.result(wrong)


@pytest.mark.parametrize("mask", [np.array([["a"]]), np.zeros((2, 2, 2, 2)), np.full((2, 2), 300), np.full((2, 2), -1), np.array([[object()]]), np.zeros((0, 2))])
def test_no_picture_no_array(store, mask):
    with pytest.raises(ConfigError):
        store.add_result(answered(), mask=mask)
    assert not store.results() and not list((store.folder / "results").iterdir())


@pytest.mark.parametrize("wrong", [{"verdict": "maybe"}, {"user": " \n"}, {"verdict": "agree", "label": "normal"}, {"verdict": "disagree", "label": "ill"},
                                   {"verdict": "disagree", "label": "cat"}, {"comment": "x" * 5000}, {"findings": [{"x": "y" * 300_000}]}])
def test_labels_that_are_refused(store, wrong):
    answer = store.add_result(answered())
    with pytest.raises(ConfigError):
        store.add_label(answer, **{"user": "u", "verdict": "agree", **wrong})
    assert store.labels() == []


def test_labels_are_append_only(store):
    answer = store.add_result(answered())
    store.add_label(answer, user="a\x1b[1m", verdict="disagree", label="normal", comment="one\ntwo\u202e", findings=[{"index": 0, "verdict": "disagree"}])
    store.add_label(answer, user="a", verdict="agree")
    first, second = store.labels()
    assert (first["user"], first["comment"], first["findings"][0]["verdict"]) == ("a[1m", "one\ntwo", "disagree") and second["label"] == "ill"
    assert first["created"] <= second["created"] and first["created"].endswith("+00:00")
    for sql in ("DELETE FROM labels", "UPDATE labels SET verdict='agree'", "DELETE FROM results", "UPDATE results SET record='{}'"):
        with pytest.raises(sqlite3.IntegrityError, match="append-only"):
            sqlite3.connect(store.folder / "store.sqlite3", isolation_level=None).execute(sql)


def test_export_is_a_data_set(store, tmp_path):
    """Read back by the importer; one patient's films stay together; disputed, unlabelled and twice-labelled pictures are left out."""
    store.add_instance(dicom())
    study = store.studies()[0]["study_uid"]
    facts = dict.fromkeys(STUDY_FIELDS)
    rng = np.random.default_rng(0)
    for k in range(60):      # so many that no fold is empty, whatever the store's own key makes of their ids
        own = answered(picture=rng.integers(0, 255, (12, 12), "uint8"), study={**facts, "study_uid": study if k < 4 else f"1.9.{k}"})
        store.add_label(store.add_result(own), user="a", verdict="disagree" if k % 2 else "agree", label="normal" if k % 2 else None)
    ids = [r["id"] for r in store.results()]
    store.add_label(ids[0], user="b", verdict="agree")
    store.add_label(ids[1], user="a", verdict="disagree", label=None)
    store.add_label(copy := store.add_result(answered(picture=store.arrays(ids[2])["picture"])), user="a", verdict="agree")
    done = export_labels(store, tmp_path / "out")
    assert done["images"] == {"ill": 29, "normal": 29} and set(done["left_out"]) == {ids[0], ids[1], copy}
    data = import_folder(tmp_path / "out", patients=tmp_path / "out" / "patients.csv")
    assert data.classes == ("ill", "normal") and len(data) == 58 and len(set(data.patient_ids)) == 55
    assert not any("1CT1" in p or "1.9" in p for p in data.patient_ids)
    assert len((tmp_path / "out" / "labels.jsonl").read_text().splitlines()) == len(store.labels())
    with pytest.raises(ConfigError, match="not empty"):
        export_labels(store, tmp_path / "out")


def test_verdicts_stand_beside_their_answers(store):
    """In the order in which they were given, also of answers between others and of answers without a model."""
    model = {"version": "2", "digest": "0" * 64, "origin": "unsigned", "signature": None}
    ids = [store.add_result(answered(model={"name": f"m{k}", **model} if k else None)) for k in range(3)]
    for k in (2, 0, 2):
        store.add_label(ids[k], user="a", verdict="disagree", label="normal", comment=str(k))
    assert [(r["label_id"], r["result_id"], r["model"], r["version"], r["answer"], r["label"], r["comment"]) for r in verdicts(store)] == [
        (1, ids[2], "m2", "2", "ill", "normal", "2"), (2, ids[0], None, None, "ill", "normal", "0"), (3, ids[2], "m2", "2", "ill", "normal", "2")]
    assert verdicts(Store(store.folder.parent / "empty")) == []


@pytest.mark.parametrize("name", ["../up", "/abs", ".hidden", "a\nb", "a\\b"])
def test_a_class_cannot_leave_the_folder(store, tmp_path, name):
    answer = store.add_result(answered(classes=("x", name), label=name, probability=None))
    store.add_label(answer, user="a", verdict="agree")
    with pytest.raises(ConfigError, match="cannot name a folder"):
        export_labels(store, tmp_path / "deep" / "out")
    assert not [p for p in tmp_path.rglob("*.png")]


def test_every_fault_of_a_store_has_its_line(store):
    """Planted by hand: a changed byte, a lost file, a stray file, a lost array, a row moved to another patient's study."""
    kept = [store.add_instance(dicom(SOPInstanceUID=f"1.2.{k}")) for k in range(3)]
    other = store.add_instance(dicom(SOPInstanceUID="1.2.9", StudyInstanceUID="1.9", SeriesInstanceUID="1.9.1", PatientID="other"))
    answer = store.add_result(answered())
    assert faults(verify(store)) == []
    data = bytearray(kept[0]["path"].read_bytes())
    data[-1] ^= 1
    kept[0]["path"].write_bytes(data)
    kept[1]["path"].unlink()
    (store.folder / "instances" / "stray.dcm").write_bytes(b"x")
    next((store.folder / "results").iterdir()).unlink()
    with sqlite3.connect(store.folder / "store.sqlite3") as db:
        db.execute("UPDATE series SET study_uid=? WHERE series_uid=?", (kept[2]["study_uid"], other["series_uid"]))
    assert faults(verify(store)) == ["missing: instance 1.2.1", "damaged: instance 1.2.0", "orphan: instances/stray.dcm", f"damaged: arrays of result {answer}",
                                     "index: instance 1.2.9 does not lie in its study and series"]


def test_uids():
    assert check_uid("1.2.840.0010") and check_uid("1" * 64)
    for bad in ("1.2\n", "\u0661.2", "1.2\0", b"1.2", 1.2):
        with pytest.raises(DicomError):
            check_uid(bad)


def test_reader_during_writes(store):
    """A reader beside a writer never waits and never sees a row without its file."""
    stop, seen = threading.Event(), []
    def read():
        while not stop.is_set():
            for study in store.studies():
                seen.extend(hashlib.sha256(row["path"].read_bytes()).hexdigest() == row["sha256"] for row in store.instances(study["study_uid"]))
    reader = threading.Thread(target=read)
    reader.start()
    try:
        _send(store.folder, 0)
    finally:
        stop.set()
        reader.join()
    assert seen and all(seen)
