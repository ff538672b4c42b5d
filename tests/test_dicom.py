"""The DICOM reader on real files, on files made here, and on broken ones; checked against pydicom, SimpleITK and dcm2niix's values."""
import hashlib
import json
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom.data import get_testdata_file
from pydicom.uid import generate_uid

from medimg.data.dicom import apply_voi, read, read_header, read_pixels, scan, stack_geometry
from medimg.errors import DicomError, GeometryError, NotDicom, UnsupportedTransferSyntax

AXIAL = (1, 0, 0, 0, 1, 0)


def write_series(folder, places, *, change=None, uid="1.2.3", shape=(8, 10)):
    """CT slices at the given z places (mm); `change(dataset, k)` may alter each before it is saved."""
    folder.mkdir(parents=True, exist_ok=True)
    base = pydicom.dcmread(get_testdata_file("CT_small.dcm"))
    for k, z in enumerate(places):
        base.Rows, base.Columns = shape
        base.PixelData = np.full(shape, 1024 + k, "int16").tobytes()
        base.RescaleIntercept, base.RescaleSlope = -1024, 1
        base.ImagePositionPatient, base.ImageOrientationPatient, base.PixelSpacing = [-5, -4, z], list(AXIAL), [0.5, 0.5]
        base.SeriesInstanceUID, base.InstanceNumber = uid, k + 1
        base.SOPInstanceUID = base.file_meta.MediaStorageSOPInstanceUID = generate_uid()
        if change:
            change(base, k)
        base.save_as(folder / f"{k:03d}.dcm")
    return folder


def test_thorax_ct_equals_the_reference(data_root):
    reference = json.loads((data_root / "reference.json").read_text())["thorax_ct"]
    table = scan(data_root / "thorax_ct", progress=False)
    assert [s.modality for s in table] == ["CT", "RTSTRUCT"]
    ct, structures = table
    assert ct.findings == () and ct.shape == tuple(reference["shape_zyx"]) and structures.references == (ct.series_uid,)
    volume = read(ct)
    assert np.allclose(volume.spacing_mm, reference["spacing_mm_zyx"]) and np.allclose(volume.origin_mm, reference["first_position_mm"])
    assert hashlib.sha256(volume.array.astype("float32").tobytes()).hexdigest() == reference["hu_sha256_float32_zyx"]
    assert volume.array.mean() == pytest.approx(reference["hu_mean"], abs=1e-3)


def test_tilted_uneven_head_ct(data_root):
    reference = json.loads((data_root / "reference.json").read_text())["dicom_qa_ct/GE"]
    series = scan(data_root / "dicom_qa_ct" / "GE", progress=False).images[0]
    assert {"tilt", "uneven"} == {f.code for f in series.findings}
    volume = read(series)
    assert volume.tilt_deg == pytest.approx(reference["tilt_deg"], abs=0.01)
    assert np.allclose(np.diff(volume.slice_positions_mm), reference["gaps_mm_along_z"], atol=1e-3)
    assert (volume.array.min(), volume.array.max()) == (reference["dcm2niix_1.0.20260724"]["min"], reference["dcm2niix_1.0.20260724"]["max"])
    with pytest.raises(GeometryError, match="apart"):
        volume.affine  # noqa: B018


@settings(max_examples=30, deadline=None)
@given(st.permutations(range(9)), st.integers(0, 1000))
def test_order_is_that_of_the_places_whatever_the_files(order, seed):
    q, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(3, 3)))
    normal = np.cross(q[0], q[1])
    places = np.array(order) * 2.5
    g = stack_geometry(np.outer(places, normal) + [3, -7, 11], [*q[0], *q[1]], (1, 1))
    assert places[list(g.order)].tolist() == sorted(places) and g.regular and not g.findings
    assert np.allclose(g.affine[:3, 0], normal * 2.5)


def test_read_equals_simpleitk_on_an_oblique_series(tmp_path):
    q = np.array([[0.8, 0.6, 0], [0, 0, -1.0]])
    normal = np.cross(q[0], q[1])

    def oblique(ds, k):
        ds.ImageOrientationPatient = [*q[0], *q[1]]
        ds.ImagePositionPatient = [float(v) for v in normal * 2 * k]
        ds.PixelSpacing = [0.5, 0.75]
    volume = read(write_series(tmp_path / "s", range(5), change=oblique))
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames([str(tmp_path / "s" / f"{k:03d}.dcm") for k in range(5)])
    image = reader.Execute()
    assert np.array_equal(sitk.GetArrayFromImage(image), volume.array)
    assert np.allclose(image.TransformIndexToPhysicalPoint((7, 3, 2)), volume.world((2, 3, 7)), atol=1e-4)


@pytest.mark.parametrize("places, code", [([0, 3, 6, 12, 15], "missing"), ([0, 3, 6, 6, 9], "duplicate"), ([0, 3, 7, 9, 14.2], "uneven")])
def test_findings_name_the_fault(tmp_path, places, code):
    series = scan(write_series(tmp_path / "s", places), progress=False).images[0]
    assert code in [f.code for f in series.findings]
    if code == "duplicate":
        with pytest.raises(GeometryError, match="another"):
            read(series)
    else:
        assert not read(series).is_regular


def test_slope_is_applied_slice_by_slice(tmp_path):
    def pet(ds, k):
        ds.RescaleSlope, ds.RescaleIntercept = k + 0.5, 0
    values = read(write_series(tmp_path / "s", range(4), change=pet)).array
    assert np.allclose(values[:, 0, 0], [(1024 + k) * (k + 0.5) for k in range(4)])


def test_mixed_series_are_split_and_read_asks_which(tmp_path):
    write_series(tmp_path / "a", [0, 3, 6])
    write_series(tmp_path / "b", [0, 3], shape=(6, 6))                    # the same series UID, another matrix
    table = scan(tmp_path, progress=False)
    assert len(table.images) == 2 and all("mixed" in [f.code for f in s.findings] for s in table)
    with pytest.raises(DicomError, match="2 image series"):
        read(tmp_path)


def test_choosing_by_the_end_of_a_series_uid(tmp_path):
    write_series(tmp_path / "a", [0, 3, 6], uid="1.2.77")
    write_series(tmp_path / "b", [0, 3], uid="1.2.88")
    assert read(tmp_path, series_uid="88").shape[0] == 2


def test_zip_equals_folder_and_bad_zip_is_refused(tmp_path):
    folder = write_series(tmp_path / "s", [0, 3, 6])
    with zipfile.ZipFile(tmp_path / "s.zip", "w") as archive:
        for f in folder.iterdir():
            archive.write(f, f"../../{f.name}")
    assert np.array_equal(read(tmp_path / "s.zip").array, read(folder).array)
    assert not (tmp_path.parent.parent / "000.dcm").exists()
    (tmp_path / "bad.zip").write_bytes(b"PK\x03\x04 no")
    with pytest.raises(DicomError, match="bad.zip"):
        scan(tmp_path / "bad.zip")


@pytest.mark.parametrize("plain, packed", [("MR_small.dcm", "MR_small_RLE.dcm"), ("MR_small.dcm", "MR_small_jp2klossless.dcm"),
                                           ("MR_small.dcm", "MR_small_bigendian.dcm"), ("MR_small.dcm", "MR_small_jpeg_ls_lossless.dcm")])
def test_transfer_syntaxes_decode_to_the_same_voxels(plain, packed):
    assert np.array_equal(read_pixels(get_testdata_file(plain))[0], read_pixels(get_testdata_file(packed))[0])


@pytest.mark.parametrize("center, width, bits", [(40, 400, 16), (0, 1, 8), (-600.5, 1500, 16), (2, 2, 12)])
def test_voi_equals_pydicom(center, width, bits):
    from pydicom.pixels import apply_voi_lut
    ds = pydicom.Dataset()
    ds.WindowCenter, ds.WindowWidth, ds.BitsStored, ds.PixelRepresentation = center, width, bits, 1
    ds.PhotometricInterpretation = "MONOCHROME2"
    values = np.arange(-(1 << bits - 1), 1 << bits - 1, 1 << max(0, bits - 12)).astype("int32")
    theirs = apply_voi_lut(values, ds)
    low, high = -(1 << bits - 1), (1 << bits - 1) - 1
    assert np.allclose(apply_voi(values, center, width), (theirs - low) / (high - low), atol=1e-5)


def test_monochrome1_comes_out_dense_is_bright(tmp_path):
    ds = pydicom.dcmread(get_testdata_file("CT_small.dcm"))
    straight = read(get_testdata_file("CT_small.dcm"))
    ds.Modality, ds.PhotometricInterpretation, ds.PixelData = "CR", "MONOCHROME1", (-1 - ds.pixel_array.astype("int32")).astype("int16").tobytes()
    ds.save_as(tmp_path / "m1.dcm")
    turned = read(tmp_path / "m1.dcm").array.astype(int)
    assert np.array_equal(turned - turned.min(), straight.array.astype(int) - straight.array.min())


def test_monochrome1_of_16_bits_does_not_overflow(tmp_path):
    ds = pydicom.dcmread(get_testdata_file("MR_small.dcm"))
    ds.PhotometricInterpretation, ds.PixelRepresentation, ds.BitsStored, ds.HighBit = "MONOCHROME1", 0, 16, 15
    for keyword in ("SmallestImagePixelValue", "LargestImagePixelValue", "WindowCenter", "WindowWidth", "PixelPaddingValue"):
        if keyword in ds:
            del ds[keyword]
    stored = np.linspace(128, 2191, 64 * 64).reshape(64, 64).astype("uint16")
    ds.PixelData, ds.WindowCenter, ds.WindowWidth = stored.tobytes(), 1000, 1500
    ds.save_as(tmp_path / "m.dcm")
    volume = read(tmp_path / "m.dcm")
    assert np.array_equal(volume.array[0], 65535.0 - stored)
    assert np.ptp(volume.display()) > 200 and volume.display()[0, 0, 0] > volume.display()[0, -1, -1]


def test_monochrome1_ct_keeps_its_hu(tmp_path):
    ds = pydicom.dcmread(get_testdata_file("CT_small.dcm"))
    ds.PhotometricInterpretation = "MONOCHROME1"
    ds.save_as(tmp_path / "ct.dcm")
    assert np.array_equal(read(tmp_path / "ct.dcm").array, read(get_testdata_file("CT_small.dcm")).array)


def test_a_ct_without_rescale_is_not_called_hu(tmp_path):
    ds = pydicom.dcmread(get_testdata_file("CT_small.dcm"))
    del ds.RescaleIntercept, ds.RescaleSlope
    ds.save_as(tmp_path / "ct.dcm")
    assert read(tmp_path / "ct.dcm").units == "raw"
    assert "no-rescale" in [f.code for f in scan(tmp_path, progress=False)[0].findings]


def test_16_bit_colour_keeps_its_brightness(tmp_path):
    ds = pydicom.dcmread(get_testdata_file("SC_rgb_rle_16bit.dcm"))
    ds.decompress()
    ds.PixelData = np.full((ds.Rows, ds.Columns, 3), 0x8001, "<u2").tobytes()
    ds.PlanarConfiguration = 0
    ds.save_as(tmp_path / "c.dcm")
    assert (read(tmp_path / "c.dcm").array == 0x80).all()


def test_a_deflated_bomb_is_refused_early(tmp_path, monkeypatch):
    from medimg.data import dicom_pixels
    ds = pydicom.dcmread(get_testdata_file("image_dfl.dcm"))
    assert read(get_testdata_file("image_dfl.dcm")).shape == (1, ds.Rows, ds.Columns)
    monkeypatch.setattr(dicom_pixels, "MAX_DEFLATED_BYTES", 10_000)
    with pytest.raises(DicomError, match="unfolds"):
        read_header(get_testdata_file("image_dfl.dcm"))


@pytest.mark.parametrize("name, keep", [("JPEG2000.dcm", 0.95), ("JPEG-lossy.dcm", 0.9), ("MR_small_RLE.dcm", 0.6)])
def test_truncated_compressed_pixels_say_so(tmp_path, name, keep):
    raw = Path(get_testdata_file(name)).read_bytes()
    (tmp_path / name).write_bytes(raw[:int(len(raw) * keep)])
    with pytest.raises(DicomError, match="truncated|decoded|cannot be read") as caught:
        read(tmp_path / name)
    assert "give an image file" not in str(caught.value)


def test_subsampled_colour_is_whole():
    assert read(get_testdata_file("SC_ybr_full_422_uncompressed.dcm")).array.shape[-1] == 3


def test_localizer_and_stack_with_one_uid_can_be_told_apart(tmp_path):
    def scout(ds, k):
        ds.ImageType = ["ORIGINAL", "PRIMARY", "LOCALIZER"] if k == 3 else ["ORIGINAL", "PRIMARY", "AXIAL"]
    write_series(tmp_path / "s", [0, 3, 6, 40], change=scout)
    table = scan(tmp_path, progress=False)
    assert [s.shape[0] for s in table] in ([3, 1], [1, 3]) and "#2" in repr(table)
    with pytest.raises(DicomError, match="#1"):
        read(tmp_path)
    assert {read(tmp_path, series_uid="#1").shape[0], read(tmp_path, series_uid="#2").shape[0]} == {3, 1}


def test_nearly_double_slices_are_uneven_not_missing(tmp_path):
    codes = [f.code for f in scan(write_series(tmp_path / "s", [0, 1, 2, 2.05, 3]), progress=False)[0].findings]
    assert codes == ["uneven"]


def test_a_missing_slice_is_found_at_any_scale(tmp_path):
    codes = [f.code for f in scan(write_series(tmp_path / "s", [0, 0.04, 0.08, 0.16, 0.2]), progress=False)[0].findings]
    assert codes == ["missing"]


def test_colour_and_palette():
    assert read(get_testdata_file("examples_rgb_color.dcm")).array.shape[-1] == 3
    palette = read(get_testdata_file("examples_palette.dcm"))
    assert palette.array.dtype == np.uint8 and palette.array.shape[-1] == 3


def damage(tmp_path, keyword, value):
    ds = pydicom.dcmread(get_testdata_file("CT_small.dcm"))
    setattr(ds, keyword, value)
    ds.save_as(tmp_path / "x.dcm")
    return tmp_path / "x.dcm"


def test_bad_files_are_named(tmp_path):
    (tmp_path / "text.dcm").write_text("no DICOM at all, but long enough" * 20)
    (tmp_path / "empty.dcm").write_bytes(b"")
    whole = Path(get_testdata_file("CT_small.dcm")).read_bytes()
    (tmp_path / "cut.dcm").write_bytes(whole[:-5000])
    for name, kind, word in (("text.dcm", NotDicom, "DICM"), ("empty.dcm", NotDicom, "empty"), ("cut.dcm", DicomError, "of"),
                             ("gone.dcm", DicomError, "no such file")):
        with pytest.raises(kind) as caught:
            read_pixels(tmp_path / name)
        assert name in str(caught.value) and word in str(caught.value) and caught.value.remedy and "\n" not in str(caught.value)


def test_unknown_transfer_syntax_is_its_own_error(tmp_path):
    ds = pydicom.dcmread(get_testdata_file("MR_small_jp2klossless.dcm"))
    ds.file_meta.TransferSyntaxUID = "1.2.840.10008.1.2.4.103"             # MPEG-4: an encoding without a decoder here
    ds.save_as(tmp_path / "x.dcm")
    with pytest.raises(UnsupportedTransferSyntax, match="x.dcm"):
        read_pixels(tmp_path / "x.dcm")


def test_a_header_that_claims_too_much_is_refused_before_memory_is_taken(tmp_path):
    path = damage(tmp_path, "NumberOfFrames", 4_000_000)
    with pytest.raises(DicomError, match="GiB"):
        read_pixels(path)


def test_empty_folder(tmp_path):
    with pytest.raises(DicomError, match="no DICOM among 0 files"):
        scan(tmp_path)


def test_structure_set_holds_no_image(data_root):
    with pytest.raises(DicomError, match="no image"):
        read_pixels(next((data_root / "thorax_ct" / "rtstruct").glob("*.dcm")))


def test_scan_skips_nothing_in_silence(tmp_path):
    folder = write_series(tmp_path / "s", [0, 3])
    (folder / "readme.txt").write_text("hello")
    table = scan(folder, progress=False)
    assert [(f.name, why) for f, why in table.skipped] == [("readme.txt", "not a DICOM file (no DICM marker)")]
    assert "1 files skipped" in repr(table)


FUZZ = """
import collections, glob, resource, sys
resource.setrlimit(resource.RLIMIT_AS, (6 << 30, 6 << 30))
from medimg.data.dicom import read
from medimg.errors import MedimgError
count = collections.Counter()
for path in sorted(glob.glob(sys.argv[1] + "/*/*.dcm")):
    try:
        read(path)
        count["read"] += 1
    except MedimgError as error:
        assert "\\n" not in str(error)
        count["refused"] += 1
print(count["read"], count["refused"])
"""


def test_206_malformed_files_give_an_image_or_a_typed_error(data_root):
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", FUZZ, str(data_root / "dicom_odd" / "fuzz")],
                          capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    read_, refused = map(int, done.stdout.split())
    assert read_ + refused == 206 and refused > 50


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_any_flipped_bytes_give_an_image_or_a_typed_error(data):
    raw = bytearray(Path(get_testdata_file("CT_small.dcm")).read_bytes()[:9000])
    for _ in range(data.draw(st.integers(1, 6))):
        raw[data.draw(st.integers(0, 3000))] = data.draw(st.integers(0, 255))
    import tempfile
    with tempfile.NamedTemporaryFile(suffix=".dcm") as file:
        file.write(raw)
        file.flush()
        try:
            read(file.name)
        except DicomError as error:
            assert "\n" not in str(error)


def test_pydicom_own_files_all_read_or_are_refused_by_type():
    outcome = {}
    for path in sorted((Path(pydicom.data.__file__).parent / "test_files").glob("*.dcm")):
        name = path.name
        try:
            found = read(path)
            outcome[name] = (found[0] if isinstance(found, list) else found).shape
        except DicomError as error:
            outcome[name] = type(error).__name__
    assert len(outcome) >= 60 and sum(isinstance(v, tuple) for v in outcome.values()) >= 30, outcome


def test_header_reading_does_not_touch_pixels():
    assert "PixelData" not in read_header(get_testdata_file("CT_small.dcm"))
