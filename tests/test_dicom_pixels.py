"""Pixels and units against pydicom, gdcm, hand values and the standard; workers that survive crashes; disks that are full."""
import base64
import errno
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pydicom
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom.data import get_testdata_file
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.pixels import apply_modality_lut as pydicom_lut
from pydicom.pixels import apply_voi, apply_windowing
from pydicom.sequence import Sequence

from medimg.data import dicom_pixels, dicom_units, untrusted
from medimg.data.dicom_pixels import apply_palette, codestream_size, decode, expand_segments, padding_mask, read_header, read_pixels
from medimg.data.dicom_units import apply_modality_lut, look_up, suv_factor, to_display, units_of, window_of, windows_of
from medimg.errors import ConfigError, DicomError, MedimgError, UnsupportedTransferSyntax

#: 16 × 24 values (37 · (row + column)) mod 4096 as High-Throughput JPEG 2000, made with OpenJPH 0.26.3 (imagecodecs.htj2k_encode).
HTJ2K = ("/0//UQApQAAAAAAYAAAAEAAAAAAAAAAAAAAAGAAAABAAAAAAAAAAAAABDwEB/1AACAACAAAACv9SAAwAAgABAAUEBEAB/1wAEyCIkJCQkJCQkJCQkJCQiIiI/2QAFwABT3BlbkpQSCBW"
         "ZXIgMC4yNi4zLv+QAAoAAAAAAJgAAf+TwAAmR/wFB3QAwAATAPL8Aod0AMAAEsAAE4DpAAd0AKKK+gCCNADAABPAABVAUKH+gYt0AFChoP4ACEB3VgDAABUwAAVwJBKJ9NpxAnUApCQS"
         "iUT64BD2IQHsuADAACugABbICIIgCIIg8/p6enCCeABIBEEQBEEQBEH+/xABCB79hCB79hCB7L8A/9k=")


def opened(name):
    return read_header(get_testdata_file(f"{name}.dcm"), pixels=True)


def image(array, syntax="1.2.840.10008.1.2.1", **facts):
    """A data set around an array (frames, rows, columns) or encoded bytes."""
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = syntax
    ds.SamplesPerPixel, ds.PhotometricInterpretation, ds.PixelRepresentation = 1, "MONOCHROME2", 0
    if isinstance(array, np.ndarray):
        ds.NumberOfFrames, ds.Rows, ds.Columns = (1, *array.shape)[-3:]
        ds.BitsAllocated = ds.BitsStored = 8 * array.dtype.itemsize
        ds.PixelRepresentation = int(array.dtype.kind == "i")
        ds.PixelData = array.tobytes()
    ds.HighBit = ds.get("BitsStored", 16) - 1
    for keyword, value in facts.items():
        setattr(ds, keyword, value)
    ds["PixelData"].VR = "OW"
    return ds


# ---- transfer syntaxes -----------------------------------------------------------------------------------------------------------
def transcode(path, kind, target):
    """`path` in another transfer syntax, by gdcm."""
    import gdcm
    reader, change, writer = gdcm.ImageReader(), gdcm.ImageChangeTransferSyntax(), gdcm.ImageWriter()
    reader.SetFileName(str(path))
    assert reader.Read()
    change.SetTransferSyntax(gdcm.TransferSyntax(getattr(gdcm.TransferSyntax, kind)))
    change.SetInput(reader.GetImage())
    assert change.Change()
    writer.SetFile(reader.GetFile())
    writer.SetImage(change.GetOutput())
    writer.SetFileName(str(target))
    assert writer.Write()
    return target


LOSSLESS = ["ImplicitVRLittleEndian", "ExplicitVRLittleEndian", "ExplicitVRBigEndian", "DeflatedExplicitVRLittleEndian", "RLELossless",
            "JPEGLosslessProcess14", "JPEGLosslessProcess14_1", "JPEGLSLossless", "JPEG2000Lossless"]


@pytest.mark.parametrize("name", ["CT_small", "MR_small", "examples_palette"])
@pytest.mark.parametrize("kind", LOSSLESS)
def test_every_lossless_syntax_that_gdcm_writes_gives_the_same_numbers(kind, name, tmp_path):
    source = get_testdata_file(f"{name}.dcm")
    expected = pydicom.dcmread(source).pixel_array
    again = decode(read_header(transcode(source, kind, tmp_path / "x.dcm"), pixels=True))
    assert np.array_equal(again[0], expected) and again.ndim == 3


def test_high_throughput_jpeg_2000():
    expected = np.add.outer(np.arange(16), np.arange(24)) * 37 % 4096
    for syntax in ("1.2.840.10008.1.2.4.201", "1.2.840.10008.1.2.4.202", "1.2.840.10008.1.2.4.203"):
        ds = image(None, syntax, Rows=16, Columns=24, BitsAllocated=16, BitsStored=16, PixelData=encapsulate([base64.b64decode(HTJ2K)]))
        assert np.array_equal(decode(ds)[0], expected)


def test_twelve_bit_jpeg_needs_no_gpl_decoder():
    """Against libjpeg, where it is installed for development; two decoders may round differently by 1."""
    from pydicom.pixels import get_decoder
    header = opened("JPGExtended")
    theirs, _ = get_decoder(header.file_meta.TransferSyntaxUID).as_array(header, decoding_plugin="pylibjpeg")
    ours = decode(header)[0]
    assert ours.max() == theirs.max() > 255 and abs(ours.astype(int) - theirs).max() <= 1
    assert np.array_equal(decode(opened("JPEG-lossy"))[0], ours)          # the same picture with a slip in its header, which libjpeg refuses


NO_GPL = """
import warnings; warnings.simplefilter("ignore")
from pathlib import Path
import pydicom.data
from pydicom.pixels import get_decoder
for n in (50, 51, 57, 70, 80, 81):                  # pylibjpeg decodes these with the GPL package
    get_decoder(f"1.2.840.10008.1.2.4.{n}").remove_plugin("pylibjpeg")
from medimg.data.dicom_pixels import decode, read_header
from medimg.errors import DicomError, UnsupportedTransferSyntax
done = 0
for path in sorted((Path(pydicom.data.__file__).parent / "test_files").glob("*.dcm")):
    try:
        done += decode(read_header(path, pixels=True), path).size > 0
    except UnsupportedTransferSyntax as error:
        assert "missing" in str(error), error
    except DicomError:
        pass
print(done)
"""


def test_no_encoding_needs_the_gpl_package():
    done = subprocess.run([sys.executable, "-c", NO_GPL], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout) >= 57


def test_the_extra_is_named_where_it_would_help(monkeypatch):
    from pydicom.pixels.decoders.base import Decoder
    monkeypatch.setattr(Decoder, "is_available", property(lambda self: False))
    with pytest.raises(UnsupportedTransferSyntax, match=r"codecs-gpl"):
        decode(opened("SC_rgb_jpeg_gdcm"), "x.dcm")
    with pytest.raises(UnsupportedTransferSyntax, match="x.dcm: no decoder for RLE Lossless; export uncompressed"):
        decode(opened("MR_small_RLE"), "x.dcm")


def test_every_syntax_of_the_real_mosaic(data_root):
    files = sorted((data_root / "dicom_qa_ts" / "In").glob("*.dcm"))
    arrays = [decode(read_header(f, pixels=True)) for f in files]
    assert len(arrays) == 9 and all(np.array_equal(a, arrays[0]) for a in arrays) and arrays[0].max() > 1000


def test_frames_come_in_order_and_excess_ones_are_left_out():
    two = opened("SC_rgb_rle_2frame")
    frames = decode(two)
    assert frames.shape == (2, 100, 100, 3) and np.array_equal(frames, two.pixel_array)
    two.NumberOfFrames = 1
    assert np.array_equal(decode(two)[0], frames[0])
    two.NumberOfFrames = 3
    with pytest.raises(DicomError, match="pixel data"):
        decode(two, "x.dcm")


# ---- bits ------------------------------------------------------------------------------------------------------------------------
@settings(max_examples=60, deadline=None)
@given(st.integers(1, 16), st.data())
def test_bits_outside_the_pixel_never_reach_the_result(used, data):
    high = data.draw(st.integers(used - 1, 15))
    signed = data.draw(st.booleans()) and used > 1
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    low, top = (-(1 << used - 1), 1 << used - 1) if signed else (0, 1 << used)
    true = rng.integers(low, top, (3, 5))
    junk = rng.integers(0, 1 << 16, (3, 5)) & ~(((1 << used) - 1) << (high + 1 - used))
    words = ((true & ((1 << used) - 1)) << (high + 1 - used) | junk) & 0xFFFF
    ds = image(words.astype("<u2"), BitsStored=used, HighBit=high, PixelRepresentation=int(signed))
    assert np.array_equal(decode(ds)[0], true)


def test_planar_colour_and_ybr():
    rng = np.random.default_rng(0)
    rgb = rng.integers(0, 256, (6, 8, 3)).astype("uint8")
    planar = image(np.moveaxis(rgb, -1, 0).copy(), SamplesPerPixel=3, NumberOfFrames=1, PlanarConfiguration=1, PhotometricInterpretation="RGB")
    assert np.array_equal(decode(planar)[0], rgb)
    grey = image(np.full((4, 4, 3), 128, "uint8"), SamplesPerPixel=3, NumberOfFrames=1, Rows=4, Columns=4, PlanarConfiguration=0, PhotometricInterpretation="YBR_FULL")
    assert np.array_equal(decode(grey)[0], np.full((4, 4, 3), 128))       # luminance 128, no colour


def test_floats_and_one_bit():
    ds = image(np.zeros((4, 4), "u4"))
    del ds.PixelData
    ds.BitsAllocated, ds.FloatPixelData = 32, np.arange(16, dtype="<f4").tobytes()
    assert np.array_equal(decode(ds)[0], np.arange(16).reshape(4, 4))
    assert np.array_equal(decode(opened("liver_1frame"))[0], opened("liver_1frame").pixel_array)


# ---- what a file claims -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["JPEG-lossy", "MR_small_jp2klossless", "MR_small_jpeg_ls_lossless", "SC_rgb_jpeg_gdcm"])
@pytest.mark.parametrize("keyword", ["Rows", "Columns"])
def test_a_frame_larger_than_the_header_is_refused_before_it_is_decoded(name, keyword, monkeypatch):
    header = opened(name)
    setattr(header, keyword, header[keyword].value - 1)
    monkeypatch.setattr(dicom_pixels, "_packed", lambda *a: pytest.fail("a decoder was asked"))
    monkeypatch.setattr(dicom_pixels, "_twelve_bit", lambda *a: pytest.fail("a decoder was asked"))
    with pytest.raises(DicomError, match="but the header says"):
        decode(header, "x.dcm")


def test_codestream_sizes_are_those_that_the_encoders_were_given():
    import cv2
    from openjpeg.utils import encode_array
    for rows, columns in ((64, 80), (300, 70)):
        grey = np.zeros((rows, columns), "uint8")
        assert codestream_size(cv2.imencode(".jpg", grey)[1].tobytes()) == (rows, columns)
        assert codestream_size(bytes(encode_array(grey, photometric_interpretation=2))) == (rows, columns)
    assert codestream_size(b"") is None and codestream_size(b"\xff\xd8\xff") is None


@pytest.mark.parametrize("change", [{"Rows": 65535, "Columns": 65535, "NumberOfFrames": 100}, {"BitsAllocated": 12}, {"SamplesPerPixel": 4}, {"NumberOfFrames": -1}])
def test_impossible_headers(change):
    ds = image(np.zeros((8, 8), "u2"), **change)
    with pytest.raises(DicomError) as caught:
        decode(ds, "x.dcm")
    assert str(caught.value).startswith("x.dcm: ") and len(str(caught.value)) < 200


FILM = """
import pydicom, sys
from pydicom.data import get_testdata_file
ds = pydicom.dcmread(get_testdata_file("MR_small.dcm"))
ds.BitsAllocated = ds.BitsStored = 8; ds.HighBit = 7; ds.PixelRepresentation = 0; ds.NumberOfFrames, ds.Rows, ds.Columns = 192, 512, 512
for tag in (0x00280106, 0x00280107, 0x00280120):
    ds.pop(tag, None)
ds.PixelData = bytes(48 << 20)
for kind in ("MONOCHROME2", "MONOCHROME1"):
    ds.PhotometricInterpretation = kind
    ds.save_as(f"{sys.argv[1]}/{kind}.dcm")
"""
PEAK = """
import resource, sys
from pathlib import Path
from pydicom.data import get_testdata_file
from medimg.data.dicom_pixels import read_pixels
def peak():        # ru_maxrss would also count what the parent of this process had
    status = Path("/proc/self/status")
    return int(status.read_text().split("VmHWM:")[1].split()[0]) / 1024 if status.exists() else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
read_pixels(get_testdata_file("MR_small.dcm"))
before = peak()
assert read_pixels(sys.argv[1])[0].shape == (192, 512, 512)
print(peak() - before)
"""


def test_memory_stays_within_four_times_the_image(tmp_path):
    """An 8-bit film of 48 MB: peak above what a fresh process has after reading a small file."""
    subprocess.run([sys.executable, "-W", "ignore", "-c", FILM, str(tmp_path)], check=True)
    for kind in ("MONOCHROME2", "MONOCHROME1"):
        done = subprocess.run([sys.executable, "-W", "ignore", "-c", PEAK, str(tmp_path / f"{kind}.dcm")], capture_output=True, text=True, check=True)
        print(f"{kind}: {float(done.stdout):.0f} MB for 48 MB of pixels")
        assert 48 < float(done.stdout) <= 4 * 48 + 64


# ---- palettes and padding ---------------------------------------------------------------------------------------------------------
@settings(max_examples=50, deadline=None)
@given(st.lists(st.one_of(st.tuples(st.just(0), st.lists(st.integers(0, 65535), min_size=1, max_size=9)), st.tuples(st.just(1), st.tuples(st.integers(1, 60), st.integers(0, 65535)))),
                min_size=1, max_size=12))
def test_segmented_palettes_equal_pydicom(segments):
    from pydicom.pixels.processing import _expand_segmented_lut
    words = [0, 2, 7, 300]
    for kind, values in segments:
        words += [0, len(values), *values] if kind == 0 else [1, *values]
    theirs = _expand_segmented_lut(tuple(words), "<H")
    assert expand_segments(np.array(words, "uint16"), len(theirs)).tolist() == theirs


def test_indirect_segments_by_hand():
    """PS3.3 C.7.9.2.3: repeat 1 segment from byte 0, which is the discrete one."""
    assert expand_segments(np.array([0, 2, 5, 9, 2, 1, 0, 0], "uint16"), 4).tolist() == [5, 9, 5, 9]
    assert expand_segments(np.array([0, 2, 5, 9, 2, 1, 0, 0, 0, 0], "uint8"), 4).tolist() == [5, 9, 5, 9]


def test_palettes_equal_pydicom_or_are_refused():
    from pydicom.pixels import apply_color_lut
    header = opened("examples_palette")
    theirs = apply_color_lut(header.pixel_array, header)
    assert np.array_equal(apply_palette(decode(header), header)[0], (theirs >> 8 if theirs.dtype == np.uint16 else theirs).astype("uint8"))
    header.RedPaletteColorLookupTableDescriptor = [300, 0, 16]
    with pytest.raises(DicomError, match="256 of 300|palette"):
        apply_palette(decode(header), header)


@pytest.mark.parametrize("value, limit, signed, expected", [(63536, None, 1, [True, False, False]), (-2000, -1000, 1, [True, True, False]), (0, 5, 0, [False, False, True]),
                                                            (b"\x30\xf8", None, 1, [True, False, False]), (-1000, -2000, 1, [True, True, False])])
def test_padding_value_and_range(value, limit, signed, expected):
    stored = np.array([-2000, -1000, 3] if signed else [9, 6, 5], "int16" if signed else "uint16")
    facts = {"PixelPaddingValue": value, "BitsAllocated": 16, "PixelRepresentation": signed, "PixelPaddingRangeLimit": limit}
    assert padding_mask(stored, facts).tolist() == expected


def test_padding_is_replaced_only_on_request(tmp_path):
    ds = pydicom.dcmread(get_testdata_file("CT_small.dcm"))
    array = ds.pixel_array.copy()
    array[:9] = -2000
    ds.PixelData = array.tobytes()
    ds.add_new("PixelPaddingValue", "SS", -2000)
    ds.save_as(tmp_path / "x.dcm")
    assert (read_pixels(tmp_path / "x.dcm")[0][:9] == -3024).all()
    filled, header = read_pixels(tmp_path / "x.dcm", padding=-1000)
    assert (filled[:9] == -1000).all() and np.array_equal(filled[9:], array[9:] - 1024)
    black = to_display(filled, header, padding=padding_mask(array, header))
    assert (black[:9] == 0).all() and black[9:].max() > 0
    assert np.isnan(read_pixels(tmp_path / "x.dcm", padding=float("nan"))[0][:9]).all()


# ---- units -----------------------------------------------------------------------------------------------------------------------
@settings(max_examples=100, deadline=None)
@given(st.integers(-40, 40), st.integers(-70000, 70000), st.sampled_from(["uint8", "int16", "uint16", "int32", "uint32"]), st.integers(0, 99))
def test_modality_lut_equals_pydicom(slope, intercept, kind, seed):
    info, ds = np.iinfo(kind), Dataset()
    ds.RescaleSlope, ds.RescaleIntercept = slope or 1, intercept
    stored = np.random.default_rng(seed).integers(max(info.min, -40000), min(info.max, 70000), 50).astype(kind)
    ours, theirs = apply_modality_lut(stored, ds), pydicom_lut(stored, ds)
    assert ours.dtype in (np.int16, np.float32) and np.allclose(ours, theirs, rtol=1e-6, atol=0.01)
    assert ours.dtype == np.float32 or np.array_equal(ours, theirs)
    assert (ours.dtype == np.int16) == (-32768 <= theirs.min() and theirs.max() <= 32767)


def test_tables_equal_pydicom():
    header = opened("mlut_18") if get_testdata_file("mlut_18.dcm") else None
    if header is not None:
        assert np.array_equal(apply_modality_lut(decode(header)[0], header), pydicom_lut(header.pixel_array, header))
    ds, item = Dataset(), Dataset()
    item.LUTDescriptor, item.LUTData = [256, -128, 16], list(range(0, 51200, 200))
    ds.ModalityLUTSequence = Sequence([item])
    values = np.arange(-300, 300, dtype="int16")
    assert np.array_equal(apply_modality_lut(values, ds), pydicom_lut(values, ds))
    item.LUTDescriptor, item.LUTData = [0, 0, 16], np.arange(65536, dtype="<u2").tobytes()      # 0 means 65,536 entries
    assert np.array_equal(look_up(np.array([0, 40000, 65535]), item), [0, 40000, 65535])


@pytest.mark.parametrize("function", ["LINEAR", "LINEAR_EXACT", "SIGMOID"])
@settings(max_examples=40, deadline=None)
@given(center=st.floats(-2000, 2000), width=st.floats(20, 4000))
def test_windows_equal_pydicom(function, center, width):
    ds = Dataset()
    ds.WindowCenter, ds.WindowWidth, ds.BitsStored, ds.PixelRepresentation, ds.PhotometricInterpretation = f"{center:.4g}", f"{width:.4g}", 16, 1, "MONOCHROME2"
    ds.VOILUTFunction = function
    values = np.arange(-3000, 3000, 7, dtype="int16")
    theirs = (apply_windowing(values, ds) + 32768) / 65535
    assert np.allclose(to_display(values, ds), theirs, atol=1e-4)


def test_voi_table_equals_pydicom():
    ds, item = Dataset(), Dataset()
    item.LUTDescriptor, item.LUTData = [200, -100, 8], [min(255, int(1.28 * k)) for k in range(200)]
    ds.VOILUTSequence, ds.Modality, ds.PhotometricInterpretation = Sequence([item]), "MR", "MONOCHROME2"
    values = np.arange(-150, 150, dtype="int16")
    assert np.allclose(to_display(values, ds) * 255, apply_voi(values, ds), atol=1e-3)


@settings(max_examples=40, deadline=None)
@given(st.floats(0, 4000), st.floats(20, 4000), st.sampled_from(["LINEAR", "LINEAR_EXACT", "SIGMOID"]), st.sampled_from(["DX", "CT"]))
def test_negatives_are_shown_in_the_order_of_the_standard(center, width, function, modality):
    """PS3.4 N.2: window first, then MONOCHROME1 inverts; whether the array was turned before or not."""
    ds = Dataset()
    ds.Modality, ds.PhotometricInterpretation, ds.BitsStored, ds.PixelRepresentation = modality, "MONOCHROME1", 12, 0
    ds.WindowCenter, ds.WindowWidth, ds.VOILUTFunction = f"{center:.5g}", f"{width:.5g}", function
    stored = np.arange(0, 4096, 5)
    expected = 1 - dicom_units.apply_voi(stored, float(ds.WindowCenter), float(ds.WindowWidth), function=function)
    array = dicom_pixels.to_unit(stored.astype("uint16")[None], ds)[0]
    assert np.allclose(to_display(array, ds), expected, atol=1e-4)


def test_several_windows_are_presets():
    ds = Dataset()
    ds.WindowCenter, ds.WindowWidth, ds.WindowCenterWidthExplanation = [40, -600, "", 3], [400, 1500, 5, 0], ["A", "B"]
    assert [(w.name, w.center) for w in windows_of(ds)] == [("A", 40), ("B", -600)] and window_of(ds) == (40, 400)
    assert np.allclose(to_display(np.array([-600.0]), ds, preset=1), 0.5, atol=0.001)
    with pytest.raises(DicomError, match="presets"):
        to_display(np.array([0.0]), ds, preset=2)


@pytest.mark.parametrize("facts, unit", [
    ({"Modality": "CT", "RescaleIntercept": 0, "RescaleType": "HU"}, "HU"), ({"Modality": "CT", "RescaleIntercept": "-1024", "ImageType": ["DERIVED", "SECONDARY", "AXIAL"]}, "HU"),
    ({"Modality": "CT", "RescaleIntercept": -1024, "ImageType": ["ORIGINAL", "PRIMARY", "LOCALIZER"]}, "raw"), ({"Modality": "CT"}, "raw"),
    ({"Modality": "CT", "RescaleIntercept": 0, "RescaleType": "US"}, "raw"), ({"Modality": "CT", "RescaleIntercept": 0, "RescaleType": "MGML"}, "mg/ml"),
    ({"Modality": "CT", "RescaleIntercept": 0, "MultienergyCTAcquisition": "YES"}, "raw"), ({"Modality": "PT", "Units": "BQML"}, "Bq/ml"),
    ({"Modality": "PT", "Units": "GML"}, "SUV"), ({"Modality": "PT", "Units": "GML", "SUVType": "LBM"}, "g/ml"), ({"Modality": "PT"}, "raw"),
    ({"Modality": "MR", "RescaleIntercept": 0}, "raw"), ({"Modality": "RTDOSE", "DoseUnits": "GY"}, "Gy")])
def test_units(facts, unit):
    assert units_of(facts) == unit


def test_the_real_ct_is_in_hu(data_root):
    path = next(p for p in sorted((data_root / "thorax_ct").rglob("*.dcm")) if read_header(p).get("Modality") == "CT")
    assert units_of(read_header(path)) == "HU"


# ---- SUV -------------------------------------------------------------------------------------------------------------------------
def pet(**changes):
    ds, given_ = Dataset(), Dataset()
    facts = {"Modality": "PT", "Units": "BQML", "PatientWeight": 70, "DecayCorrection": "START", "CorrectedImage": ["ATTN", "DECY"], "SeriesDate": "20240102",
             "SeriesTime": "110000.5", "AcquisitionDate": "20240102", "AcquisitionTime": "110000.500000"}
    dose = {"RadiopharmaceuticalStartTime": "100000.5", "RadionuclideTotalDose": 370e6, "RadionuclideHalfLife": 6586.2}
    for keyword, value in {**facts, **dose, **changes}.items():
        if value is not None:
            setattr(given_ if keyword.startswith("Radi") else ds, keyword, value)
    ds.RadiopharmaceuticalInformationSequence = Sequence([given_])
    return ds


HOUR = 70_000 / (370e6 * 2 ** (-3600 / 6586.2))         # by hand: 2.76337e-04 g/ml for each Bq/ml


@pytest.mark.parametrize("changes, expected", [
    ({}, HOUR), ({"DecayCorrection": "ADMIN"}, 70_000 / 370e6), ({"PatientWeight": 35}, HOUR / 2),
    ({"SeriesTime": "003000", "AcquisitionTime": "003000", "RadiopharmaceuticalStartTime": "233000"}, HOUR),                                          # over midnight, no date
    ({"SeriesTime": "003000", "AcquisitionTime": "003000", "RadiopharmaceuticalStartTime": None, "RadiopharmaceuticalStartDateTime": "20240101233000"}, HOUR),
    ({"AcquisitionTime": "113000"}, HOUR),                                                                                                           # a later bed: the series time counts
    ({"SeriesTime": "140000", "FrameReferenceTime": 0, "ActualFrameDuration": 1}, HOUR),                                                              # post-processed: acquisition + frame's own times
    ({"Units": "GML"}, 1.0)])
def test_suv_by_hand(changes, expected):
    assert suv_factor(pet(**changes)) == pytest.approx(expected, rel=1e-4)


def test_suv_of_a_reference_body():
    """Activity spread evenly over the body is SUV 1 at any time: 370 MBq in 70 kg, decayed with the scan."""
    for waited_s in (0, 1800, 7200):
        stamp = time.strftime("%H%M%S", time.gmtime(36000 + waited_s))
        ds = pet(SeriesTime=stamp, AcquisitionTime=stamp, RadiopharmaceuticalStartTime="100000")
        assert 370e6 * 2 ** (-waited_s / 6586.2) / 70_000 * suv_factor(ds) == pytest.approx(1, rel=1e-9)


def test_suv_of_vendors():
    philips = pet(Units="CNTS")
    philips.private_block(0x7053, "Philips PET Private Group", create=True).add_new(0x00, "DS", "0.00125")
    assert suv_factor(philips) == 0.00125
    counts = pet(Units="CNTS")
    counts.private_block(0x7053, "Philips PET Private Group", create=True).add_new(0x09, "DS", "2.5")
    assert suv_factor(counts) == pytest.approx(2.5 * HOUR)
    ge = pet(SeriesTime="150000")
    ge.private_block(0x0009, "GEMS_PETD_01", create=True).add_new(0x0D, "DT", "20240102110000.50")
    assert suv_factor(ge) == pytest.approx(HOUR, rel=1e-6)


@pytest.mark.parametrize("keyword, value", [("PatientWeight", None), ("PatientWeight", 0), ("RadionuclideTotalDose", None), ("RadionuclideHalfLife", None), ("SeriesTime", None),
                                            ("RadiopharmaceuticalStartTime", None), ("DecayCorrection", "NONE"), ("CorrectedImage", ["ATTN"]), ("AcquisitionTime", "2561"),
                                            ("RadiopharmaceuticalStartDateTime", "20240105100000")])
def test_suv_names_what_is_missing(keyword, value):
    with pytest.raises(DicomError, match=keyword):
        suv_factor(pet(**{keyword: value}))
    with pytest.raises(DicomError, match="Units"):
        suv_factor(pet(Units="CM2"))


# ---- workers ---------------------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def warm():
    """Workers of this module end with it."""
    yield untrusted.isolated
    untrusted.close_workers()


def test_isolated_equals_direct(warm):
    for name in ("JPEG2000", "MR_small_RLE", "SC_rgb_jpeg_gdcm", "CT_small"):
        assert np.array_equal(untrusted.decode_isolated(get_testdata_file(f"{name}.dcm")), decode(opened(name)))
    pixels, header = untrusted.read_isolated(get_testdata_file("examples_palette.dcm"))
    assert np.array_equal(pixels, read_pixels(get_testdata_file("examples_palette.dcm"))[0]) and header.Modality == "US"
    from medimg.data.dicom import read
    theirs, ours = read(get_testdata_file("CT_small.dcm")), warm("medimg.data.dicom.read", Path(get_testdata_file("CT_small.dcm")))
    assert np.array_equal(theirs.array, ours.array) and np.array_equal(theirs.affine, ours.affine) and theirs.units == ours.units and theirs.meta["window"] == ours.meta["window"]


@pytest.mark.parametrize("how, limits, word", [("crash", {}, "SIGSEGV"), ("hang", {"limit_s": 0.5}, "0.5 s"), ("memory", {"memory_mb": 200}, "200 MB")])
def test_mishaps_end_as_typed_errors_and_the_next_file_is_read(warm, how, limits, word):
    with pytest.raises(DicomError, match=word) as caught:
        warm("medimg.data.untrusted.rehearse", Path("bad.dcm"), options={"how": how}, **limits)
    assert caught.value.path.endswith("bad.dcm") and len(str(caught.value).splitlines()) == 1
    assert untrusted.decode_isolated(get_testdata_file("MR_small.dcm")).shape == (1, 64, 64)


def test_typed_errors_come_back_as_they_were(warm, tmp_path):
    (tmp_path / "x.dcm").write_bytes(b"no")
    direct = pytest.raises(MedimgError, read_pixels, tmp_path / "x.dcm").value
    behind = pytest.raises(MedimgError, warm, "medimg.data.dicom_pixels.read_pixels", tmp_path / "x.dcm").value
    assert type(behind) is type(direct) and str(behind) == str(direct)


def test_a_worker_is_reused_and_keeps_nothing(warm):
    untrusted.close_workers()
    for _ in range(3):
        untrusted.decode_isolated(get_testdata_file("MR_small.dcm"))
    (worker,) = untrusted._pool
    assert worker.jobs == 3 and not list(worker.folder.iterdir())
    untrusted.close_workers()
    assert not worker.folder.exists() and not worker.alive()


def test_threads_get_workers_of_their_own(warm):
    names, found = ["CT_small", "MR_small", "JPEG2000"] * 2, {}

    def one(k):
        found[k] = untrusted.decode_isolated(get_testdata_file(f"{names[k]}.dcm")).shape
    threads = [threading.Thread(target=one, args=(k,)) for k in range(len(names))]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert [found[k] for k in range(len(names))] == [decode(opened(n)).shape for n in names]


def test_nothing_that_a_worker_sends_is_run(monkeypatch, tmp_path):
    """Pickles in a .npy, unknown kinds and nonsense are refused; the caller's secrets are not in the worker's environment."""
    np.save(tmp_path / "0.npy", np.array([os.system], object), allow_pickle=True)
    with pytest.raises(ValueError, match="pickle"):
        untrusted.unpack({"is": "array", "of": 0}, tmp_path)
    monkeypatch.setenv("MEDIMG_SECRET", "key")
    worker = untrusted.Worker()
    try:
        environment = Path(f"/proc/{worker.process.pid}/environ")
        assert not environment.exists() or b"MEDIMG_SECRET" not in environment.read_bytes()
        monkeypatch.setattr(untrusted, "_line", lambda process, limit_s: (b'{"value": {"is": "array"}}\n', False))
        with pytest.raises(DicomError, match="nonsense"):
            worker.ask({"function": "medimg.errors.printable", "path": "x", "limit_s": 5, "memory_mb": 100, "options": {}})
        assert not worker.alive()
    finally:
        worker.close()


@pytest.mark.parametrize("name", ["os.system", "medimg", "medimg.", "medimgx.a", "medimg.data.untrusted.rehearse; import os", "builtins.exec"])
def test_only_functions_of_medimg_can_be_asked(name):
    with pytest.raises(ConfigError, match="no function of medimg"):
        untrusted.isolated(name, "x")


# ---- a full disk -----------------------------------------------------------------------------------------------------------------
FULL = """
import json, resource, signal, sys
from pathlib import Path
import numpy as np
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
from medimg.config import write_atomic
from medimg.data.phantom import thorax_phantom
from medimg.data.phantom_dicom import write_ct
from medimg.data.volume import Volume
from medimg.errors import MedimgError
case = thorax_phantom(0, shape=(8, 16, 16), spacing_mm=(30, 20, 20), nodules=0)
noise = Volume(np.random.default_rng(0).integers(-1000, 1000, (16, 32, 32)).astype("int16"))
folder = Path(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
for name, write in {"text": lambda p: write_atomic(p / "a.txt", "x" * 5000), "ct": lambda p: write_ct(case.volume, p), "nifti": lambda p: noise.to_nifti(p / "v.nii.gz")}.items():
    (folder / name).mkdir()
    try:
        write(folder / name)
        said = "written"
    except MedimgError as error:
        said = str(error)
    except OSError as error:
        said = f"OSError {error.errno}"
    print(json.dumps([name, said, sorted(p.name for p in (folder / name).iterdir())]))
"""


def test_a_file_that_does_not_fit_is_refused_and_leaves_nothing(tmp_path):
    """A limit on the size of files stands for a full disk: the kernel stops the write in the middle (EFBIG in place of ENOSPC)."""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", FULL, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [r[0] for r in rows] == ["text", "ct", "nifti"]
    for name, said, left in rows:
        assert left == [], f"{name} left {left}"
        assert said != "written" and not said.startswith("OSError"), f"{name}: {said}"


def test_no_space_at_the_last_moment(tmp_path, monkeypatch):
    """ENOSPC may come as late as fsync (delayed allocation)."""
    from medimg.config import write_atomic

    def full(handle):
        raise OSError(errno.ENOSPC, "No space left on device")
    (tmp_path / "a.txt").write_text("old")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ConfigError, match=r"a\.txt"):
        write_atomic(tmp_path / "a.txt", "new")
    assert (tmp_path / "a.txt").read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["a.txt"]
