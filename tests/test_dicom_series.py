"""From a folder to volumes: real enhanced files and mosaics against NIfTI by dcm2niix, splits, hostile folders, the fast paths against pydicom."""
import os
import struct
import subprocess
import sys
import tempfile
import tracemalloc
import zipfile
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom.data import get_testdata_file
from pydicom.dataset import Dataset
from pydicom.uid import ExplicitVRLittleEndian, RLELossless, generate_uid

from medimg.data import dicom
from medimg.data.dicom import find_files, read, scan
from medimg.data.dicom_frames import csa_header
from medimg.data.dicom_load import load, plain_dtype
from medimg.data.dicom_peek import KEPT, Header, peek
from medimg.errors import DicomError, GeometryError, MedimgError

OWN = Path(pydicom.data.__file__).parent / "test_files"


def codes(series):
    return [f.code for f in series.findings]


def against_nifti(volume, path, time=None):
    """Voxels equal and every corner in the same place (nibabel reads the file; RAS, (x, y, z), rows turned round by dcm2niix)."""
    image = nib.load(path)
    voxels = np.asarray(image.dataobj)
    voxels = voxels if time is None else voxels[..., time]
    assert np.array_equal(volume.array, voxels[:, ::-1].T)
    nx, ny, nz = voxels.shape
    for x, y, z in ((0, 0, 0), (nx - 1, 0, 0), (0, ny - 1, 0), (0, 0, nz - 1), (nx - 1, ny - 1, nz - 1)):
        ras = image.affine @ (x, ny - 1 - y, z, 1)
        assert np.allclose(volume.world((z, y, x)) * (-1, -1, 1), ras[:3], atol=1e-3)
    ours = np.diag([-1.0, -1, 1, 1]) @ volume.affine @ np.eye(4)[[2, 1, 0, 3]]
    ours[:3, 3] += ours[:3, 1] * (ny - 1)
    ours[:3, 1] *= -1
    return np.abs(ours - image.affine).max()


# ---- real files ----------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("number", range(1, 10))
def test_a_mosaic_in_every_transfer_syntax_equals_its_nifti(data_root, number):
    volume = read(data_root / "dicom_qa_ts" / "In" / f"{number}.dcm")
    assert against_nifti(volume, data_root / "dicom_qa_ts" / "Ref" / f"{number}.nii") < 1e-4


def test_enhanced_mr_is_four_times_of_six_slices(data_root):
    table = scan(data_root / "dicom_qa_enh" / "In", progress=False)
    assert len(table) == 1 and table[0].times == 4 and table[0].shape == (6, 64, 64)
    volumes = read(table[0])
    for t, volume in enumerate(volumes):
        assert against_nifti(volume, next((data_root / "dicom_qa_enh" / "Ref").glob("*.nii")), t) < 1e-4
        assert volume.meta["time"] == t


def test_enhanced_geometry_equals_highdicom(data_root):
    import highdicom
    path = sorted((data_root / "dicom_qa_enh" / "In").rglob("*_1.dcm"))[0]
    theirs, ours = highdicom.imread(path).get_volume(), read(path)
    grid = theirs.get_affine("LPS") if hasattr(theirs, "get_affine") else theirs.affine
    corner = grid @ (0, 0, 0, 1)
    index = tuple(int(round(v)) for v in ours.index(corner[:3]))
    assert theirs.array.shape == ours.shape
    assert ours.array[index] == theirs.array[0, 0, 0] and np.allclose(ours.world(index), corner[:3], atol=1e-3)
    far = grid @ (*(n - 1 for n in theirs.array.shape), 1)
    assert np.allclose(ours.index(far[:3]) + np.array(index), np.array(ours.shape) - 1, atol=1e-3)


def test_the_tilted_ct_keeps_each_slice_where_its_file_says(data_root):
    series = scan(data_root / "dicom_qa_ct" / "GE", progress=False).images[0]
    volume = read(series)
    line = volume._affine[:3, 0]
    for k, file in enumerate(series.files):
        theirs = pydicom.dcmread(file)
        assert np.allclose(volume.origin_mm + line * volume.slice_positions_mm[k], [float(v) for v in theirs.ImagePositionPatient], atol=1e-4)
        assert np.array_equal(volume.array[k], theirs.pixel_array * float(theirs.RescaleSlope) + float(theirs.RescaleIntercept))
    with pytest.raises(GeometryError):
        volume.affine  # noqa: B018


def head_ml(array, voxel_mm3):
    return float((array > -300).sum() * voxel_mm3 / 1000)


def test_the_untilted_head_is_as_large_as_dcm2niix_makes_it(data_root, tool, tmp_path):
    done = subprocess.run([tool("dcm2niix"), "-z", "n", "-f", "head", "-o", str(tmp_path), str(data_root / "dicom_qa_ct" / "GE")], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout
    theirs = nib.load(next(tmp_path.glob("*Tilt*.nii")))
    ours = read(data_root / "dicom_qa_ct" / "GE", untilt=True, resample=True)
    assert ours.tilt_deg < 0.01 and ours.is_regular
    extent = np.abs(theirs.affine[:3, 2]) * (theirs.shape[2] - 1)
    assert abs(np.linalg.norm(extent) - ours.spacing_mm[0] * (ours.shape[0] - 1)) <= 15
    a, b = head_ml(ours.array, np.prod(ours.spacing_mm)), head_ml(np.asarray(theirs.dataobj), abs(np.linalg.det(theirs.affine[:3, :3])))
    print(f"head above -300 HU: {a:.0f} ml, dcm2niix {b:.0f} ml")
    assert a == pytest.approx(b, rel=0.05)


def test_dcm2niix_agrees_on_the_phantom(tool, tmp_path):
    from medimg.data import phantom, phantom_dicom
    volume = phantom.thorax_phantom(4, shape=(12, 40, 48), spacing_mm=(5.0, 8.0, 7.0), nodules=1, dose=None)
    volume = volume if hasattr(volume, "affine") else volume.volume
    phantom_dicom.write_ct(volume, tmp_path / "ct")
    (tmp_path / "out").mkdir()
    done = subprocess.run([tool("dcm2niix"), "-z", "n", "-b", "n", "-f", "p", "-o", str(tmp_path / "out"), str(tmp_path / "ct")], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout
    assert against_nifti(read(tmp_path / "ct"), next((tmp_path / "out").glob("*.nii"))) < 1e-4


# ---- pydicom's own files -------------------------------------------------------------------------------------------------------
def pydicom_pipeline(ds):
    """Values by pydicom alone: decode, then colour or modality LUT."""
    from pydicom.pixels import apply_color_lut, apply_modality_lut
    array = ds.pixel_array
    if ds.PhotometricInterpretation == "PALETTE COLOR":
        array = apply_color_lut(array, ds)
        return array >> 8 if array.dtype == np.uint16 else array
    if ds.SamplesPerPixel == 3:
        return array >> (ds.BitsStored - 8)
    return array * ds.DoseGridScaling if ds.get("Modality") == "RTDOSE" else apply_modality_lut(array, ds)


def test_every_image_of_pydicom_equals_its_pipeline_or_is_a_typed_error():
    equal = refused = 0
    for path in sorted(OWN.glob("*.dcm")):
        try:
            found = read(path)
        except MedimgError as error:
            assert "\n" not in str(error)
            refused += 1
            continue
        ours = np.concatenate([v.array for v in (found if isinstance(found, list) else [found])])
        if path.name in ("JPEG-lossy.dcm",):                # pydicom alone does not decode it here
            continue
        theirs = np.asarray(pydicom_pipeline(pydicom.dcmread(path)))
        theirs = theirs if theirs.ndim == ours.ndim else theirs[None]
        assert theirs.shape == ours.shape, path.name
        assert np.allclose(ours, theirs, rtol=1e-6, atol=path.name == "JPGExtended.dcm"), path.name     # two inverse DCTs round differently
        equal += 1
    print(f"{equal} equal, {refused} refused")
    assert equal >= 55


def test_peek_gives_the_values_of_pydicom():
    compared = 0
    for path in sorted(OWN.glob("*.dcm")):
        try:
            mine, theirs = peek(path), pydicom.dcmread(path, stop_before_pixels=True)
        except (DicomError, pydicom.errors.InvalidDicomError):
            continue
        for keyword, vr in KEPT.items():
            assert (keyword in mine) == (keyword in theirs), (path.name, keyword)
            if vr == "SQ":
                assert mine.get(keyword) == theirs.get(keyword)
            elif keyword in theirs and path.name != "badVR.dcm":
                a, b = mine.get(keyword), theirs.get(keyword)
                b = tuple(v.strip() if isinstance(v, str) else v for v in b) if isinstance(b, pydicom.multival.MultiValue) else b
                a = tuple(a) if isinstance(a, pydicom.multival.MultiValue) else a
                a = tuple(v.strip() if isinstance(v, str) else v for v in a) if isinstance(a, tuple) else a
                assert a == b or (a in (None, "") and b in (None, "")), (path.name, keyword)
                compared += 1
    assert compared > 1500


PLAIN = [p.read_bytes() for p in (OWN / "MR_small_implicit.dcm", OWN / "examples_overlay.dcm")]


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_the_fast_parser_is_never_wrong_only_slow(data):
    """On damaged headers: where the fast path has an opinion and pydicom reads the file, the values are pydicom's."""
    raw = bytearray(data.draw(st.sampled_from(PLAIN))[:4000])
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.integers(132, 1500))] = data.draw(st.integers(0, 255))
    with tempfile.NamedTemporaryFile(suffix=".dcm") as file:
        file.write(raw)
        file.flush()
        try:
            mine = peek(file.name)
        except MedimgError:
            return
        if type(mine) is not Header:
            return
        try:
            theirs = pydicom.dcmread(file.name, stop_before_pixels=True)
        except Exception:
            return
        for keyword in ("Rows", "Columns", "Modality", "SeriesInstanceUID", "BitsAllocated", "PixelRepresentation"):
            if keyword not in theirs and keyword not in mine:
                continue
            try:
                a, b = mine.get(keyword), theirs.get(keyword)
            except Exception:
                continue
            assert str(a or "").strip() == str(b or "").strip().rstrip("\0") or "\\" in str(a) or isinstance(a, tuple), keyword


# ---- made here -----------------------------------------------------------------------------------------------------------------
def slice_file(path, value=0, *, z=0.0, **elements):
    """An MR slice of 6 × 8 whose first pixel is `value` and whose pixels end the file."""
    ds = pydicom.dcmread(get_testdata_file("MR_small.dcm"))
    del ds[0xFFFCFFFC]
    ds.Rows, ds.Columns, ds.PixelData = 6, 8, (np.arange(48, dtype="<i2") + value).tobytes()
    ds.ImagePositionPatient, ds.ImageOrientationPatient, ds.PixelSpacing, ds.SeriesInstanceUID = [0, 0, z], [1, 0, 0, 0, 1, 0], [2, 3], "1.2.9"
    for keyword in ("ContentTime", "AcquisitionTime", "EchoTime", "EchoNumbers", "AcquisitionNumber"):
        if keyword in ds:
            delattr(ds, keyword)
    for keyword, content in elements.items():
        setattr(ds, keyword, content)
    ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = generate_uid()
    path.parent.mkdir(parents=True, exist_ok=True)
    ds.save_as(path)
    return path


def several(folder, combinations):
    """One file for each dict of elements, at three places each."""
    k = 0
    for elements in combinations:
        for z in (5.0, 0.0, 10.0):
            slice_file(folder / f"{k:03d}.dcm", 100 * k, z=z, **elements)
            k += 1
    return folder


def test_two_echoes_are_two_rows(tmp_path):
    table = scan(several(tmp_path, [{"EchoTime": 10}, {"EchoTime": 80}]), progress=False)
    assert [s.shape for s in table] == [(3, 6, 8)] * 2 and all("split" in codes(s) for s in table)
    assert "EchoTime 10" in repr(table) and "EchoTime 80" in repr(table)
    assert read(table[0]).array[0, 0, 0] == 100 and read(table[1]).array[0, 0, 0] == 400


def test_two_acquisitions_of_a_ct_are_two_rows_and_of_an_mr_two_times(tmp_path):
    table = scan(several(tmp_path / "ct", [{"AcquisitionNumber": n, "Modality": "CT"} for n in (1, 2)]), progress=False)
    assert [(s.times, s.shape[0]) for s in table] == [(1, 3), (1, 3)]
    table = scan(several(tmp_path / "mr", [{"AcquisitionNumber": n} for n in (1, 2)]), progress=False)
    assert [(s.times, s.shape[0]) for s in table] == [(2, 3)]


@pytest.mark.parametrize("keyword", ["TemporalPositionIdentifier", "TriggerTime", "AcquisitionTime"])
def test_times_are_a_list_in_order(tmp_path, keyword):
    series = scan(several(tmp_path, [{keyword: v} for v in ("30", "10", "20")]), progress=False)[0]
    volumes = read(series)
    assert series.times == 3 and [int(v.array[0, 0, 0]) for v in volumes] == [400, 700, 100]
    assert all(np.allclose(v.spacing_mm, (5, 2, 3)) for v in volumes)


def test_times_that_cover_different_places_are_rows(tmp_path):
    several(tmp_path, [{"TemporalPositionIdentifier": 1}, {"TemporalPositionIdentifier": 2}])
    slice_file(tmp_path / "more.dcm", z=15.0, TemporalPositionIdentifier=2)
    assert sorted((s.times, s.shape[0]) for s in scan(tmp_path, progress=False)) == [(1, 3), (1, 4)]


def test_two_frames_of_reference_never_share_a_volume(tmp_path):
    several(tmp_path / "a", [{"FrameOfReferenceUID": "1.5"}])
    slice_file(tmp_path / "b.dcm", z=15.0, FrameOfReferenceUID="1.6")
    assert sorted(s.shape[0] for s in scan(tmp_path, progress=False)) == [1, 3]


def test_a_copied_file_counts_once(tmp_path):
    several(tmp_path, [{}])
    (tmp_path / "copy.dcm").write_bytes((tmp_path / "000.dcm").read_bytes())
    series = scan(tmp_path, progress=False)[0]
    assert series.shape[0] == 3 and "copy" in codes(series) and read(series).is_regular


def test_one_bad_file_does_not_spoil_its_series(tmp_path):
    several(tmp_path, [{}])
    bad = slice_file(tmp_path / "bad.dcm", z=15.0)
    raw = bad.read_bytes()
    bad.write_bytes(raw.replace(b"15.0", b"15.x", 1) if b"15.0" in raw else raw.replace(b"\\15", b"\\1x", 1))
    table = scan(tmp_path, progress=False)
    assert table[0].shape[0] == 3 and [(Path(f).name, "cannot be decoded" in why) for f, why in table.skipped] == [("bad.dcm", True)]


# ---- enhanced, film, dose ------------------------------------------------------------------------------------------------------
def item(**elements):
    ds = Dataset()
    for keyword, value in elements.items():
        setattr(ds, keyword, value)
    return ds


def enhanced_ct(path, *, times=2, slices=3, slope=lambda t, z: 1.0, syntax=ExplicitVRLittleEndian):
    """An enhanced CT whose frames are shuffled; frame values say time and slice."""
    ds = pydicom.dcmread(get_testdata_file("CT_small.dcm"))
    for element in ("RescaleSlope", "RescaleIntercept", "ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "DataSetTrailingPadding", "PixelPaddingValue"):
        if element in ds:
            delattr(ds, element)
    frames = [(t, z) for t in range(times) for z in range(slices)]
    frames = [frames[i] for i in np.random.default_rng(0).permutation(len(frames))]
    shared = item(PlaneOrientationSequence=[item(ImageOrientationPatient=[1, 0, 0, 0, 1, 0])], PixelMeasuresSequence=[item(PixelSpacing=[0.5, 0.75], SliceThickness=2)])
    ds.SharedFunctionalGroupsSequence = [shared]
    ds.PerFrameFunctionalGroupsSequence = [
        item(PlanePositionSequence=[item(ImagePositionPatient=[0, 0, 2.5 * z])], FrameContentSequence=[item(TemporalPositionIndex=t + 1, StackID="1")],
             PixelValueTransformationSequence=[item(RescaleSlope=slope(t, z), RescaleIntercept=-1000, RescaleType="HU")]) for t, z in frames]
    ds.NumberOfFrames, ds.Rows, ds.Columns = len(frames), 6, 8
    ds.PixelRepresentation, ds.BitsStored, ds.HighBit = 0, 16, 15
    ds.PixelData = np.stack([np.full((6, 8), 10 * t + z, "<u2") for t, z in frames]).tobytes()
    if syntax == RLELossless:
        ds.compress(RLELossless)
    ds.save_as(path)
    return path


@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, RLELossless])
def test_enhanced_frames_find_their_time_place_and_slope(tmp_path, syntax):
    path = enhanced_ct(tmp_path / "e.dcm", slope=lambda t, z: 1.0 + z, syntax=syntax)
    assert (plain_dtype(peek(path)) is None) == (syntax == RLELossless)
    volumes = read(path)
    assert len(volumes) == 2 and volumes[0].units == "HU" and np.allclose(volumes[0].spacing_mm, (2.5, 0.5, 0.75))
    for t, volume in enumerate(volumes):
        assert [int(v) for v in volume.array[:, 0, 0]] == [(10 * t + z) * (1 + z) - 1000 for z in range(3)]


def test_fractional_slopes_of_frames_make_floats(tmp_path):
    volume = read(enhanced_ct(tmp_path / "e.dcm", times=1, slope=lambda t, z: 0.1))
    assert volume.array.dtype == np.float32 and np.allclose(volume.array[:, 0, 0], [-1000, -999.9, -999.8])


def test_missing_functional_groups_are_a_typed_error(tmp_path):
    ds = pydicom.dcmread(enhanced_ct(tmp_path / "e.dcm"))
    ds.PerFrameFunctionalGroupsSequence = ds.PerFrameFunctionalGroupsSequence[:2]
    ds.save_as(tmp_path / "e.dcm")
    with pytest.raises(DicomError, match="2 functional groups for 6 frames"):
        read(tmp_path / "e.dcm")


def test_a_film_is_a_list_of_pictures():
    film = read(get_testdata_file("examples_ybr_color.dcm"))
    assert len(film) == 30 and film[3].shape == (1, 240, 320, 3)
    assert "film" in codes(scan(get_testdata_file("examples_ybr_color.dcm"))[0])


def test_a_dose_has_places_and_is_scaled():
    path = get_testdata_file("rtdose.dcm")
    theirs, ours = pydicom.dcmread(path), read(path)
    assert ours.units == "raw" and theirs.DoseUnits == "RELATIVE" and np.allclose(ours.array, theirs.pixel_array * float(theirs.DoseGridScaling), rtol=1e-6)
    assert ours.spacing_mm[0] == pytest.approx(np.diff([float(v) for v in theirs.GridFrameOffsetVector])[0])


@pytest.mark.parametrize("raw", [b"", b"SV10", b"SV10\4\3\2\1" + struct.pack("<II", 5000, 77), b"SV10\4\3\2\1" + struct.pack("<II", 2, 77) + b"\0" * 90])
def test_damaged_csa_headers_are_typed_errors(raw):
    with pytest.raises(DicomError):
        csa_header(raw)


def test_csa_header_equals_nibabel(data_root):
    from nibabel.nicom import csareader
    ds = pydicom.dcmread(data_root / "dicom_qa_ts" / "In" / "1.dcm", stop_before_pixels=True)
    block = bytes(ds.private_block(0x0029, "SIEMENS CSA HEADER")[0x10].value)
    ours, theirs = csa_header(block), csareader.read(block)["tags"]
    for name, values in ours.items():
        assert [v for v in values if not v.startswith("\x00")] == [str(v).strip() for v in _text(block, name, theirs)], name
    assert len(ours) > 20


def _text(block, name, theirs):
    """nibabel's items as the text of the block: numbers are compared after conversion both ways."""
    items = [i for i in theirs[name]["items"] if i not in ("", None)]
    mine = csa_header(block)[name]
    return [m if isinstance(i, (int, float)) and float(m) == float(i) else i for m, i in zip(mine, items)] if len(mine) == len(items) else ["differs"]


def test_isolated_decoding_gives_the_same_voxels():
    path = get_testdata_file("MR_small_jp2klossless.dcm")
    assert np.array_equal(read(path, isolate=True).array, read(path).array)


def test_helper_processes_give_the_same_voxels_and_errors(tmp_path, monkeypatch):
    from medimg.data import dicom_load
    for k in range(26):
        ds = pydicom.dcmread(get_testdata_file("MR_small_jp2klossless.dcm"))
        ds.ImagePositionPatient, ds.SOPInstanceUID = [*ds.ImagePositionPatient[:2], 3.0 * k], generate_uid()
        ds.save_as(tmp_path / f"{k:02d}.dcm")
    headers = [peek(f) for f in sorted(tmp_path.iterdir())]
    assert dicom_load._helpers(headers, 2) == 2 and dicom_load._helpers(headers[:5], 2) == 0
    helped = load(headers, threads=2)
    monkeypatch.setattr(dicom_load, "_helpers", lambda headers, threads: 0)
    assert np.array_equal(helped, load(headers, threads=1)) and helped.shape == (26, 64, 64)
    monkeypatch.undo()
    raw = (tmp_path / "07.dcm").read_bytes()
    (tmp_path / "07.dcm").write_bytes(raw[:len(raw) - 3000])
    with pytest.raises(DicomError, match="07.dcm"):
        load(headers, threads=2)


# ---- fast and careful loading --------------------------------------------------------------------------------------------------
@settings(max_examples=40, deadline=None)
@given(st.sampled_from(["int16", "uint16", "uint8", "int8"]), st.sampled_from([1, 2, -1, 0.5, 40, 1.25]), st.sampled_from([0, -1024, 0.5, 30000]), st.integers(0, 99))
def test_plain_loading_equals_the_formula(kind, slope, intercept, seed):
    rng = np.random.default_rng(seed)
    info = np.iinfo(kind)
    stored = rng.integers(info.min, info.max + 1, (6, 8)).astype(kind)
    with tempfile.TemporaryDirectory() as folder:
        bits = 8 * stored.dtype.itemsize
        path = slice_file(Path(folder) / "a.dcm", BitsAllocated=bits, BitsStored=bits, HighBit=bits - 1, PixelRepresentation=int(kind[0] == "i"),
                          RescaleSlope=slope, RescaleIntercept=intercept)
        raw = path.read_bytes()
        path.write_bytes(raw[:-108] + raw[-108:-100] + struct.pack("<L", stored.nbytes) + stored.tobytes() if bits == 8 else raw[:-96] + stored.tobytes())
        header = peek(path)
        assert plain_dtype(header) == stored.dtype
        out = load([header])[0]
    exact = stored.astype(float) * slope + intercept
    assert np.allclose(out, exact, rtol=1e-6, atol=1e-3)
    fits = slope == int(slope) and intercept == int(intercept) and -32768 <= exact.min() and exact.max() <= 32767
    assert out.dtype == (np.int16 if fits else np.float32)


def test_bits_outside_bits_stored_take_the_careful_way():
    path = get_testdata_file("examples_overlay.dcm")
    stored = pydicom.dcmread(path)
    assert np.array_equal(read(path).array[0], stored.pixel_array & ((1 << stored.BitsStored) - 1))


def test_a_file_that_shrinks_between_scan_and_read_is_refused(tmp_path):
    path = slice_file(tmp_path / "a.dcm")
    series = scan(path)[0]
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(DicomError, match="changed"):
        read(series)


@pytest.mark.parametrize("make", ["plain", "rle"])
def test_memory_of_reading_is_bounded(tmp_path, make):
    ds = pydicom.dcmread(enhanced_ct(tmp_path / "e.dcm", times=1, slices=2, slope=lambda t, z: 0.5))
    ds.Rows, ds.Columns = 2048, 2048
    ds.PixelData = np.tile(np.arange(2048, dtype="<u2"), (2, 2048, 1)).tobytes()
    if make == "rle":
        ds.compress(RLELossless)
    ds.save_as(tmp_path / "big.dcm")
    declared = 2 * 2048 * 2048 * 2
    read(tmp_path / "e.dcm")                                    # imports are not counted
    tracemalloc.start()
    try:
        read(tmp_path / "big.dcm")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    print(f"{make}: {peak / declared:.1f} times the declared bytes")
    assert peak <= 4 * max(declared, (tmp_path / "big.dcm").stat().st_size) + (64 << 20)


# ---- hostile folders -----------------------------------------------------------------------------------------------------------
def test_a_pipe_and_links_do_not_stop_a_scan(tmp_path):
    several(tmp_path / "s", [{}])
    os.mkfifo(tmp_path / "s" / "pipe.dcm")
    (tmp_path / "s" / "loop").symlink_to(tmp_path, target_is_directory=True)
    (tmp_path / "s" / "dead.dcm").symlink_to(tmp_path / "nothing")
    table = scan(tmp_path, progress=False)
    assert table[0].shape[0] == 3
    assert {Path(f).name: why for f, why in table.skipped} == {"pipe.dcm": "not a regular file", "loop": "a link to a folder, or to nothing",
                                                              "dead.dcm": "a link to a folder, or to nothing"}
    with pytest.raises(DicomError, match="not a regular file"):
        read(tmp_path / "s" / "pipe.dcm")


NOBODY = """
import os, sys
import medimg.data.dicom, medimg.data.dicom_pixels, pydicom
if os.geteuid() == 0:
    os.setgid(65534); os.setuid(65534)
table = medimg.data.dicom.scan(sys.argv[1], progress=False)
print(table[0].shape[0], sorted((os.path.basename(f), why) for f, why in table.skipped))
"""


def test_without_permission_a_file_or_folder_is_named():
    with tempfile.TemporaryDirectory() as place:              # not tmp_path, whose parents only their owner may enter
        folder = several(Path(place) / "s", [{}])
        Path(place).chmod(0o755)
        (folder / "locked").mkdir()
        (folder / "secret.dcm").write_bytes(b"x")
        (folder / "locked").chmod(0)
        (folder / "secret.dcm").chmod(0)
        done = subprocess.run([sys.executable, "-c", NOBODY, str(folder)], capture_output=True, text=True, timeout=60, cwd=Path(__file__).parents[1])
        (folder / "locked").chmod(0o755)
    assert done.returncode == 0, done.stderr[-1500:]
    assert done.stdout.startswith("3 ") and "folder cannot be opened (Permission denied)" in done.stdout and "cannot be opened (Permission denied)')" in done.stdout


def test_too_many_files_are_refused_with_a_remedy(tmp_path):
    for k in range(30):
        (tmp_path / f"{k}").write_bytes(b"")
    with pytest.raises(DicomError, match="more than 20 files; scan its sub-folders"):
        find_files(tmp_path, limit=20)
    assert dicom.MAX_FILES < 1_000_000


def test_archives_that_lie_are_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "bomb.zip", "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        archive.writestr("a.dcm", b"\0" * (64 << 20))
    with pytest.raises(DicomError, match="more than is unpacked"):
        scan(tmp_path / "bomb.zip")
    with zipfile.ZipFile(tmp_path / "locked.zip", "w") as archive:
        archive.writestr("a.dcm", b"x" * 100)
    locked = bytearray((tmp_path / "locked.zip").read_bytes())
    for mark, place in ((b"PK\3\4", 6), (b"PK\1\2", 8)):
        locked[locked.index(mark) + place] |= 1                   # says that it is encrypted
    (tmp_path / "locked.zip").write_bytes(locked)
    with pytest.raises(DicomError, match="not a readable zip archive"):
        scan(tmp_path / "locked.zip")


def test_a_structure_set_names_its_images(data_root):
    table = scan(data_root / "thorax_ct", progress=False)
    structures = next(s for s in table if s.modality == "RTSTRUCT")
    assert not structures.is_image and structures.references == (table.images[0].series_uid,)
    with pytest.raises(DicomError, match="no image"):
        read(structures)
