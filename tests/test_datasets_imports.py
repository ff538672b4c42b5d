"""Imports: Pillow, tifffile and pydicom write what we read; every fault is named at once; labels against tables made by hand."""
import io
import os
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from medimg.data import imports
from medimg.data.datasets import ImageDataset
from medimg.data.imports import import_dicom, import_folder, import_rsna, letterbox, read_table
from medimg.data.labels import harmonise, merge
from medimg.data.pictures import is_whole, picture_size, read_picture, to_uint8
from medimg.errors import DatasetError, MedimgError


def saved(array, form="png", **options):
    file = io.BytesIO()
    Image.fromarray(array).save(file, form, **options)
    return file.getvalue()


def textured(k, size=(40, 48)):
    import cv2
    noise = np.random.default_rng(k).normal(size=size)
    return (128 + 60 * cv2.GaussianBlur(noise, (0, 0), 1.5) / 0.2).clip(0, 255).astype(np.uint8)


def make_tree(root, n=30, folds=None, form="png", size=(40, 48)):
    for k in range(n):
        folder = root / ((folds[k % len(folds)] + "/") if folds else "") / ("sick" if k % 3 == 0 else "well")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{k:03d}.{form}").write_bytes(saved(textured(k, size), {"jpg": "jpeg", "tif": "tiff"}.get(form, form)))
    return root


# ---- pictures ------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("form", ["png", "jpeg", "tiff", "bmp"])
@settings(max_examples=15, deadline=None)
@given(y=st.integers(1, 90), x=st.integers(1, 90), colour=st.booleans(), cut=st.floats(0.05, 0.95))
def test_size_and_wholeness_against_pillow(form, y, x, colour, cut):
    rng = np.random.default_rng(y * 100 + x)
    data = saved(rng.integers(0, 256, (y, x, 3) if colour else (y, x), dtype=np.uint8), form)
    assert picture_size(data) == (y, x) and is_whole(data)
    if form != "tiff" or y * x > 64:      # Pillow puts the directory of a TIFF first: nearly all its bytes must be missing to matter
        assert not is_whole(data[: int(len(data) * cut)])


@pytest.mark.parametrize("form", ["png", "tiff", "bmp"])
@pytest.mark.parametrize("colour", [False, True])
def test_values_are_exact(form, colour):
    array = np.random.default_rng(0).integers(0, 256, (21, 34, 3) if colour else (21, 34), dtype=np.uint8)
    image, notes = read_picture(saved(array, form))
    assert image.dtype == np.uint8 and (image == array).all() and notes == ()


def test_sixteen_bits_are_kept_and_stretched_as_the_service_does():
    from medimg.deployment.intake import decode_picture
    tifffile = pytest.importorskip("tifffile", reason="tifffile writes the reference; pip install tifffile")
    array = np.random.default_rng(0).integers(300, 4096, (20, 30), dtype=np.uint16)
    tiff, zero = io.BytesIO(), io.BytesIO()
    tifffile.imwrite(tiff, array)
    tifffile.imwrite(zero, array, photometric="miniswhite")
    assert (read_picture(saved(array))[0] == array).all() and (read_picture(tiff.getvalue())[0] == array).all()
    inverted, notes = read_picture(zero.getvalue())
    assert (inverted == 65535 - array).all() and "inverted" in notes[0]
    assert (to_uint8(array)[0] == decode_picture(saved(array))[0]).all()


@pytest.mark.parametrize("turn", range(1, 9))
def test_exif_orientation_against_pillow(turn):
    from PIL import ImageOps
    exif = Image.Exif()
    exif[274] = turn
    data = saved(np.tile(np.linspace(0, 255, 40), (24, 1)).astype(np.uint8) // np.array([[1]] * 12 + [[2]] * 12, np.uint8), "jpeg", exif=exif, quality=95)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))))
    image, _ = read_picture(data)
    assert image.shape == expected.shape and np.abs(image.astype(int) - expected).max() <= 2


def test_grey_in_colour_clothes_is_grey_and_palettes_are_resolved():
    grey = textured(0)
    assert read_picture(saved(np.stack([grey] * 3, -1), "jpeg"))[0].ndim == 2
    indexed = io.BytesIO()
    Image.fromarray(grey).convert("P").save(indexed, "png")
    assert (read_picture(indexed.getvalue())[0] == grey).all()


def test_transparency():
    glass = np.full((6, 6, 4), 255, np.uint8)
    glass[..., :3] = 90
    assert read_picture(saved(glass))[0].tolist() == [[90] * 6] * 6
    glass[2, 3, 3] = 254
    with pytest.raises(DatasetError, match="transparent"):
        read_picture(saved(glass))


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(["png", "jpeg", "tiff", "bmp"]), st.data())
def test_damaged_pictures_give_an_image_or_a_typed_error(form, data):
    content = bytearray(saved(textured(1), form))
    for _ in range(data.draw(st.integers(1, 6))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    content = bytes(content[: data.draw(st.integers(1, len(content)))])
    try:
        image, _ = read_picture(content)
        assert image.dtype in (np.uint8, np.uint16) and image.size <= 100_000_000
    except DatasetError as error:
        assert len(str(error)) < 300


def test_bombs_pipes_and_folders_are_refused(tmp_path):
    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 60000, 60000, 8, 0, 0, 0, 0)) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")
    with pytest.raises(DatasetError, match="60000 × 60000"):
        read_picture(bomb)
    pipe = tmp_path / "pipe.png"
    os.mkfifo(pipe)
    for path in (pipe, tmp_path, tmp_path / "absent.png"):
        with pytest.raises(DatasetError) as error:
            read_picture(path)
        assert str(path) in str(error.value)


# ---- tables --------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("mark", [",", ";", "\t"])
def test_tables_of_every_spreadsheet(tmp_path, mark):
    path = tmp_path / "t.csv"
    path.write_bytes(b"\xef\xbb\xbf" + f'file{mark}label\r\n"a{mark}b.png"{mark}1\r\n\r\nc.png{mark} 2 \r\n'.encode())
    assert read_table(path) == [{"file": f"a{mark}b.png", "label": "1", "": 2}, {"file": "c.png", "label": "2", "": 4}]


@pytest.mark.parametrize("text, words", [("", "0 rows"), ("a,b\n", "1 rows"), ("a,a\n1,2\n", "twice"), ("a,b\n1\n", "line 2"), ("a,b\n\xff\n", "cannot be read")])
def test_bad_tables(tmp_path, text, words):
    path = tmp_path / "t.csv"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(DatasetError, match=words):
        read_table(path)


# ---- folders -------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("form", ["png", "tif", "bmp"])
def test_folder_tree(tmp_path, form):
    d = import_folder(make_tree(tmp_path / "set", form=form), patients={f"{'sick' if k % 3 == 0 else 'well'}/{k:03d}.{form}": f"p{k // 2}" for k in range(30)})
    assert (len(d), d.classes, d.task, d.name) == (30, ("sick", "well"), "binary", "set")
    for file, image, label, patient in zip(d.meta["files"], d.images, d.labels, d.patient_ids):
        k = int(file.split("/")[1][:3])
        assert (image == textured(k)).all() and d.classes[label] == file.split("/")[0] and patient == f"p{k // 2}"
    assert all(len(set(d.splits[d.patient_ids == p])) == 1 for p in set(d.patient_ids))


def test_folders_train_and_test_are_followed(tmp_path):
    d = import_folder(make_tree(tmp_path, folds=["train", "valid", "test"], n=18))
    assert sorted(zip(d.meta["files"].tolist(), d.splits.tolist()))[0][1] == "test" and (d.splits == "val").sum() == 6
    assert d.patient_ids is None and "folds as given by the source" in d.meta["notes"]


def test_without_patients_copies_stay_together(tmp_path):
    make_tree(tmp_path, 40)
    for k in range(40):
        image, folder = textured(k), tmp_path / ("sick" if k % 3 == 0 else "well")
        (folder / f"copy{k}.jpg").write_bytes(saved(image, "jpeg", quality=85))
    d = import_folder(tmp_path)
    fold = dict(zip(d.meta["files"].tolist(), d.splits.tolist()))
    for k in range(40):
        folder = "sick" if k % 3 == 0 else "well"
        assert fold[f"{folder}/{k:03d}.png"] == fold[f"{folder}/copy{k}.jpg"]
    assert d.patient_ids is None and any("near-copies" in note for note in d.meta["notes"])


def test_all_faults_at_once(tmp_path):
    make_tree(tmp_path)
    for k in range(1, 8):
        file = tmp_path / ("sick" if k % 3 == 0 else "well") / f"{k:03d}.png"
        file.write_bytes(file.read_bytes()[:300])
    (tmp_path / "sick" / "again.png").write_bytes((tmp_path / "well" / "010.png").read_bytes())
    with pytest.raises(DatasetError) as error:
        import_folder(tmp_path)
    assert "8 of 31 cannot be used" in str(error.value) and "and 3 more" in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(DatasetError, match="31 of 31 .* no patient"):
        import_folder(tmp_path, patients={"x": "y"})


def test_sizes_and_the_letterbox(tmp_path):
    make_tree(tmp_path, 20)
    (tmp_path / "well" / "tall.png").write_bytes(saved(np.full((100, 50), 200, np.uint8)))
    with pytest.raises(DatasetError, match="different sizes.*size="):
        import_folder(tmp_path)
    d = import_folder(tmp_path, size=(32, 32))
    tall = d.images[d.meta["files"] == "well/tall.png"][0]
    assert d.images.shape == (21, 32, 32) and (tall[:, 8:24] == 200).all() and not tall[:, :8].any() and not tall[:, 24:].any()


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 70), st.integers(1, 70), st.integers(4, 50), st.integers(4, 50))
def test_letterbox_keeps_proportions(y, x, height, width):
    image, scale, (top, left) = letterbox(np.full((y, x), 255, np.uint8), (height, width))
    rows, columns = np.flatnonzero(image.any(axis=1)), np.flatnonzero(image.any(axis=0))
    assert image.shape == (height, width) and rows[0] == top and columns[0] == left
    assert abs(len(rows) - y * scale) <= 1 and abs(len(columns) - x * scale) <= 1 and (len(rows) == height or len(columns) == width)


def test_limits_and_what_is_left_out(tmp_path, monkeypatch):
    make_tree(tmp_path, 20)
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "well" / ".hidden.png").write_text("x")
    outside = tmp_path.parent / "outside.png"
    outside.write_bytes(saved(textured(99)))
    (tmp_path / "well" / "link.png").symlink_to(outside)
    os.mkfifo(tmp_path / "well" / "pipe.png")
    d = import_folder(tmp_path)
    assert len(d) == 20 and d.meta["ignored"] == 1
    monkeypatch.setattr(imports, "MAX_FILES", 10)
    with pytest.raises(DatasetError, match="more than 10 files"):
        import_folder(tmp_path)
    monkeypatch.setattr(imports, "MAX_FILES", 10_000)
    monkeypatch.setattr(imports, "MAX_IMPORT_BYTES", 20_000)
    with pytest.raises(DatasetError, match="gigapixels"):
        import_folder(tmp_path)
    with pytest.raises(DatasetError, match="no such folder"):
        import_folder(tmp_path / "absent")


def test_alike_images_without_patients_are_refused(tmp_path):
    for k in range(24):
        (tmp_path / "ab"[k % 2]).mkdir(exist_ok=True)
        image = textured(0).copy()
        image[k, k] ^= 255
        (tmp_path / "ab"[k % 2] / f"{k}.png").write_bytes(saved(image))
    with pytest.raises(DatasetError, match="too alike.*give the patients"):
        import_folder(tmp_path)


# ---- DICOM ---------------------------------------------------------------------------------------------------------------------
def write_dicom(path, pixels, patient, **tags):
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian, generate_uid
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID, ds.file_meta.MediaStorageSOPClassUID = ExplicitVRLittleEndian, "1.2.840.10008.5.1.4.1.1.1"
    ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID = generate_uid(entropy_srcs=[path.name])
    ds.SOPClassUID, ds.Modality, ds.PatientID = "1.2.840.10008.5.1.4.1.1.1", "CR", patient
    ds.StudyInstanceUID, ds.SeriesInstanceUID = generate_uid(entropy_srcs=[patient, "study"]), generate_uid(entropy_srcs=[path.name, "series"])
    ds.Rows, ds.Columns = pixels.shape
    ds.BitsAllocated = ds.BitsStored = 8
    ds.HighBit, ds.PixelRepresentation, ds.SamplesPerPixel, ds.PhotometricInterpretation = 7, 0, 1, "MONOCHROME2"
    ds.WindowCenter, ds.WindowWidth, ds.PixelSpacing = 128, 256, [0.2, 0.2]
    ds.PixelData = pixels.tobytes()
    for name, value in tags.items():
        setattr(ds, name, value)
    ds.save_as(path, enforce_file_format=True)
    return ds


@pytest.fixture
def films(tmp_path):
    folder = tmp_path / "films"
    (folder / "sub").mkdir(parents=True)
    return folder, [write_dicom(folder / ("sub" if k % 2 else "") / f"{k:02d}.dcm", textured(k), f"P{k // 2:02d}") for k in range(24)]


@pytest.mark.parametrize("key", ["PatientID", "StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID", "file"])
def test_dicom_with_labels_by_any_key(films, tmp_path, key):
    folder, headers = films
    value = {k: str(h.get(key, "")) if key != "file" else f"{'sub/' if k % 2 else ''}{k:02d}.dcm" for k, h in enumerate(headers)}
    table = tmp_path / "labels.csv"
    rows = {v: k // 2 % 3 for k, v in value.items()}
    table.write_text(f"{key},label\n" + "".join(f"{v},{label}\n" for v, label in rows.items()))
    d = import_dicom(folder, table)
    assert d.task == "multiclass" and d.classes == ("0", "1", "2") and len(d) == 24
    for file, label, patient, image in zip(d.meta["files"], d.labels, d.patient_ids, d.images):
        k = int(file[-6:-4])
        assert label == k // 2 % 3 and patient == f"P{k // 2:02d}" and np.abs(image.astype(int) - textured(k)).max() <= 1
    assert all(len(set(d.splits[d.patient_ids == p])) == 1 for p in set(d.patient_ids))


def test_dicom_findings_keep_the_unknown(films, tmp_path):
    table = tmp_path / "labels.csv"
    table.write_text("PatientID,effusion,nodule,split\n" + "".join(f"P{k:02d},{k % 2},{['', '1', '0'][k % 3]},{['train', 'val', 'test'][k % 3]}\n" for k in range(12)))
    d = import_dicom(films[0], table, size=(20, 20))
    for patient, row, fold in zip(d.patient_ids, d.labels, d.splits):
        k = int(patient[1:])
        assert row[0] == k % 2 and np.array_equal(row[1], [np.nan, 1, 0][k % 3], equal_nan=True) and fold == ["train", "val", "test"][k % 3]
    assert d.task == "multilabel" and d.images.shape == (24, 20, 20)


def test_dicom_faults_name_no_patient(films, tmp_path):
    table = tmp_path / "labels.csv"
    table.write_text("PatientID,label\n" + "".join(f"P{k:02d},{k % 2}\n" for k in range(10)) + "P00,1\nSECRET,1\n")
    with pytest.raises(DatasetError) as error:
        import_dicom(films[0], table)
    text = str(error.value)
    assert "6 of 24 cannot be used" in text and "line 12: contradicts line 2" in text and "SECRET" not in text and "P10" not in text
    table.write_text("PatientID,label\nP00,\n")
    (films[0] / "broken.dcm").write_bytes(b"x" * 200)
    with pytest.raises(DatasetError, match="broken.dcm"):
        import_dicom(films[0], table)


def test_rsna_form(tmp_path):
    (tmp_path / "stage_2_train_images").mkdir()
    for k in range(24):
        write_dicom(tmp_path / "stage_2_train_images" / f"id{k:02d}.dcm", textured(k, (64, 64)), f"id{k:02d}")
    good = "patientId,x,y,width,height,Target\n" + "".join(f"id{k:02d},4,8,20,10,1\nid{k:02d},40.5,2,10,30,1\n" if k % 3 == 0 else f"id{k:02d},,,,,0\n" for k in range(24))
    (tmp_path / "stage_2_train_labels.csv").write_text(good)
    d = import_rsna(tmp_path, size=(32, 32))
    assert d.task == "detection" and d.patient_ids is None and (d.labels == (~np.isnan(d.boxes[:, 0, 0]))).all() and d.labels.sum() == 8
    assert d.boxes[d.labels == 1][0].tolist() == [[4, 2, 9, 12], [1, 20.25, 16, 25.25]]
    (tmp_path / "stage_2_train_labels.csv").write_text(good + "id00,60,60,20,20,1\n")
    with pytest.raises(DatasetError, match="a box leaves the image"):
        import_rsna(tmp_path, size=(32, 32))
    (tmp_path / "stage_2_train_labels.csv").write_text(good + "id01,1,1,2,2,1\nid77,,,,,0\n")
    with pytest.raises(DatasetError, match="2 of 25.*contradicts.*no such .dcm"):
        import_rsna(tmp_path, size=(32, 32))


# ---- labels --------------------------------------------------------------------------------------------------------------------
N = float("nan")


def a_set(labels, classes, task="multilabel", name="a", start=0, patients=None):
    images = np.random.default_rng(start).integers(0, 255, (len(labels), 6, 6), dtype=np.uint8)
    return ImageDataset(name, images, labels, ["train"] * len(labels), task, classes, patients, meta={"k": np.arange(len(labels))})


def rows_of(d):
    return d.labels[np.argsort(d.meta["k"])]


def test_harmonise_by_hand():
    nih = a_set(np.array([[1, 0, 0], [0, 1, 0], [0, 0, 0], [0, 0, 1]], np.float32), ("Pneumonia", "Pleural_Thickening", "Hernia"))
    got = harmonise(nih, ["pleural thickening", "Lung Opacity", "Pneumonia", "Fracture"], implies={"Pneumonia": ("Lung Opacity",)})
    assert np.array_equal(rows_of(got), [[0, 1, 1, N], [1, N, 0, N], [0, N, 0, N], [0, N, 0, N]], equal_nan=True) and got.meta["left_out"] == ("Hernia",)
    binary = a_set(np.array([0, 1, 1]), ("normal", "pneumonia"), "binary")
    got = harmonise(binary, ["Pneumonia", "No Finding", "Nodule"], mapping={"normal": "No Finding"})
    assert np.array_equal(rows_of(got), [[0, 1, N], [1, 0, N], [1, 0, N]], equal_nan=True)
    assert (rows_of(harmonise(binary, ["Pneumonia"], mapping={"normal": None}))[:, 0] == [0, 1, 1]).all()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(*[st.sampled_from([0.0, 1.0, N])] * 3), min_size=1, max_size=12))
def test_unknown_is_never_zero(rows):
    got = rows_of(harmonise(a_set(np.array(rows, np.float32), ("a", "b", "c")), ["wide", "other"], mapping={"a": "wide", "b": "wide", "c": None}))
    for (a, b, _), (wide, other) in zip(rows, got):
        expected = 1 if 1 in (a, b) else 0 if (a, b) == (0, 0) else N
        assert np.array_equal(wide, expected, equal_nan=True) and np.isnan(other)


@pytest.mark.parametrize("settings_, words", [({"classes": ["x"]}, "none of"), ({"classes": ["a"], "mapping": {"q": "a"}}, "mapping names 'q'"),
                                              ({"classes": ["a"], "mapping": {"b": "zz"}}, "mapping names 'zz'"), ({"classes": ["a", "a"]}, "twice"),
                                              ({"classes": ["a"], "implies": {"a": ("w",)}}, "implies names 'w'")])
def test_harmonise_refuses(settings_, words):
    with pytest.raises(DatasetError, match=words):
        harmonise(a_set(np.zeros((2, 2), np.float32), ("a", "b")), **settings_)


def test_merge_keeps_patients_apart():
    a, b = a_set(np.array([[1.0, N]], np.float32), ("x", "y"), patients=["17"]), a_set(np.array([[N, 0.0]], np.float32), ("x", "y"), name="b", start=1, patients=["17"])
    both = merge([a, b])
    assert sorted(both.patient_ids.tolist()) == ["a/17", "b/17"] and np.isnan(both.labels).sum() == 2
    assert {o: p.split("/")[0] for o, p in zip(both.meta["origin"], both.patient_ids)} == {"a": "a", "b": "b"}
    for wrong in ([a, a], [a, harmonise(b, ["x"])]):
        with pytest.raises(MedimgError):
            merge(wrong)
