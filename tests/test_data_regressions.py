"""Faults of the data part that reviews found, each once: what was returned silently, or lost, or kept."""
import io
import tarfile
import zipfile

import nibabel as nib
import numpy as np
import pydicom
import pytest
from pydicom.data import get_testdata_file
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, generate_uid

from medimg.data import dicom, dicom_pixels
from medimg.data.augment import Compose, Crop, Flip, Sample
from medimg.data.contours import slice_cover
from medimg.data.datasets import ImageDataset
from medimg.data.deid_bytes import Element, encode, parse
from medimg.data.deid_profile import Pseudonyms, clean_text, make_policy
from medimg.data.deid_rewrite import rewrite, sealed
from medimg.data.deidentify import deidentify_folder
from medimg.data.downloads import extract
from medimg.data.flow import Flow
from medimg.data.imports import import_dicom
from medimg.data.labels import merge
from medimg.data.segmentations import read_seg, write_seg
from medimg.data.sources import ArraySource, SliceSource
from medimg.data.splits import make_splits
from medimg.data.volume import Volume
from medimg.errors import ConfigError, DatasetError, DicomError, GeometryError

STUDY, SERIES, FRAME = generate_uid(), generate_uid(), generate_uid()


def slice_of(z=0.0, modality="CT", pixels=None, **fields):
    """A small, valid slice; a field given as None is left out."""
    ds, pixels = Dataset(), np.full((4, 4), 1000 + int(z), "uint16") if pixels is None else pixels
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.file_meta.MediaStorageSOPClassUID = ds.SOPClassUID = f"1.2.840.10008.5.1.4.1.1.{2 if modality == 'CT' else 4}"
    facts = {"SOPInstanceUID": generate_uid(), "SeriesInstanceUID": SERIES, "StudyInstanceUID": STUDY, "FrameOfReferenceUID": FRAME, "Modality": modality,
             "ImageType": ["ORIGINAL", "PRIMARY", "AXIAL"], "ImagePositionPatient": [0, 0, z], "ImageOrientationPatient": [1, 0, 0, 0, 1, 0], "PixelSpacing": [1, 1],
             "SliceThickness": 3, "SamplesPerPixel": 1, "PhotometricInterpretation": "MONOCHROME2", "BitsAllocated": 16, "BitsStored": 16, "HighBit": 15,
             "PixelRepresentation": 0, "Rows": pixels.shape[-2], "Columns": pixels.shape[-1], **({"RescaleSlope": 1, "RescaleIntercept": -1024} if modality == "CT" else {}), **fields}
    for keyword, value in facts.items():
        if value is not None:
            setattr(ds, keyword, value)
    ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID
    ds.add_new(0x7FE00010, "OW", pixels.tobytes())
    return ds


def written(folder, *slices):
    for k, ds in enumerate(slices):
        pydicom.dcmwrite(folder / f"{k:03d}.dcm", ds, enforce_file_format=True)
    return folder


# ---- reader --------------------------------------------------------------------------------------------------------------------
def test_a_slice_without_rescale_among_others_is_refused(tmp_path):
    written(tmp_path, slice_of(0), slice_of(3, RescaleSlope=None, RescaleIntercept=None), slice_of(6))
    assert "some-rescale" in [f.code for f in dicom.scan(tmp_path, progress=False)[0].findings]
    with pytest.raises(GeometryError, match="modality LUT"):
        dicom.read(tmp_path)


def test_stacks_beside_each_other_are_not_moments(tmp_path):
    written(tmp_path, *(slice_of(3 * i, "MR", AcquisitionNumber=n, ImagePositionPatient=[50 * n, 0, 3 * i]) for n in (1, 2) for i in range(3)))
    table = dicom.scan(tmp_path, progress=False)
    assert [s.times for s in table] == [1, 1] and sorted(dicom.read(s).origin_mm[0] for s in table) == [50, 100]


def test_spect_lies_where_simpleitk_puts_it(tmp_path):
    import SimpleITK as sitk
    ds = slice_of(0, "NM", np.stack([np.full((4, 4), i, "uint16") for i in range(5)]), NumberOfFrames=5, ImageType=["ORIGINAL", "PRIMARY", "RECON TOMO", "EMISSION"],
                  SpacingBetweenSlices=3, ImagePositionPatient=None, ImageOrientationPatient=None, PixelSpacing=[4, 4], SliceVector=[1, 2, 3, 4, 5], NumberOfSlices=5)
    ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.20"
    detector = Dataset()
    detector.ImagePositionPatient, detector.ImageOrientationPatient = [-100, -90, 50], [1, 0, 0, 0, 1, 0]
    ds.DetectorInformationSequence = [detector]
    volume, image = dicom.read(written(tmp_path, ds)), sitk.ReadImage(str(tmp_path / "000.dcm"))
    assert volume.shape == image.GetSize()[::-1] == (5, 4, 4)
    assert np.allclose(volume.spacing_mm, image.GetSpacing()[::-1]) and np.allclose(volume.origin_mm, image.GetOrigin())


def test_a_dose_grid_needs_its_scale(tmp_path):
    ds = pydicom.dcmread(get_testdata_file("rtdose.dcm"))
    ds.DoseUnits = "GY"
    expected = ds.pixel_array * float(ds.DoseGridScaling)
    assert np.allclose(dicom.read(written(tmp_path, ds)).array, expected) and np.allclose(dicom.read_pixels(tmp_path / "000.dcm")[0], expected)
    del ds.DoseGridScaling
    with pytest.raises(DicomError):
        dicom.read(written(tmp_path, ds))


def test_suv_does_not_depend_on_the_direction_of_the_scan(tmp_path):
    def pet(z, at, seconds):
        ds = slice_of(z, "PT", Units="BQML", PatientWeight=70, SeriesDate="20240102", SeriesTime="111500", AcquisitionDate="20240102", AcquisitionTime=at,
                      DecayCorrection="START", CorrectedImage=["ATTN", "DECY"], RescaleSlope=1, RescaleIntercept=0, FrameReferenceTime=seconds * 1000, ActualFrameDuration=1000)
        drug = Dataset()
        drug.RadiopharmaceuticalStartTime, drug.RadionuclideTotalDose, drug.RadionuclideHalfLife = "100000", 370e6, 6586.2
        ds.RadiopharmaceuticalInformationSequence = [drug]
        return ds
    factors = []
    for name, (first, second) in {"up": (("110000", 0), ("112500", 1500)), "down": (("112500", 1500), ("110000", 0))}.items():
        (tmp_path / name).mkdir()
        factors.append(dicom.read(written(tmp_path / name, pet(0, *first), pet(3, *second))).meta["suv_factor"])
    assert factors[0] == factors[1] == pytest.approx(70e3 / (370e6 * 2 ** (-3600 / 6586.2)), rel=1e-4)


def test_slices_with_one_uid_are_not_copies(tmp_path):
    """A bad anonymiser wrote one SOP Instance UID everywhere: nothing is thrown away."""
    assert dicom.read(written(tmp_path, *(slice_of(3 * i, SOPInstanceUID="1.2.3") for i in range(4)))).shape[0] == 4


@pytest.mark.parametrize("field, values", [("PixelSpacing", (["0.703125"] * 2, ["0.7031251"] * 2)),
                                           ("ImageOrientationPatient", ([1, "0.000499", 0, "-0.000499", 1, 0], [1, "0.000501", 0, "-0.000501", 1, 0]))])
def test_rounding_does_not_split_a_series(tmp_path, field, values):
    (row,) = dicom.scan(written(tmp_path, *(slice_of(3 * i, **{field: values[i % 2]}) for i in range(4))), progress=False)
    assert row.shape[0] == 4 and row.spacing_mm[0] == pytest.approx(3, abs=0.01)


def test_a_long_file_meta_hides_no_bomb(tmp_path, monkeypatch):
    monkeypatch.setattr(dicom_pixels, "MAX_DEFLATED_BYTES", 1 << 20)
    ds = slice_of(0, pixels=np.zeros((1500, 1500), "uint16"))
    ds.file_meta.TransferSyntaxUID = "1.2.840.10008.1.2.1.99"
    written(tmp_path, ds)
    raw = (tmp_path / "000.dcm").read_bytes()
    at = raw.find(b"\x02\x00\x01\x00OB")
    length, group = int.from_bytes(raw[at + 8:at + 12], "little"), int.from_bytes(raw[140:144], "little")
    longer = raw[:140] + (group + 1500).to_bytes(4, "little") + raw[144:at + 8] + (length + 1500).to_bytes(4, "little") + raw[at + 12:at + 12 + length] + bytes(1500) + raw[at + 12 + length:]
    (tmp_path / "long.dcm").write_bytes(longer)
    for name in ("000.dcm", "long.dcm"):
        with pytest.raises(DicomError):
            dicom_pixels.read_header(tmp_path / name)


def test_a_damaged_lzma_archive_is_a_typed_error(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_LZMA) as archive:
        archive.writestr("a", b"ab" * 4000)
    raw = bytearray((tmp_path / "a.zip").read_bytes())
    raw[35] = 0xFF
    (tmp_path / "a.zip").write_bytes(bytes(raw))
    with pytest.raises(DicomError, match="zip"):
        dicom.scan(tmp_path / "a.zip", progress=False)


# ---- de-identification ---------------------------------------------------------------------------------------------------------
NAMES = Pseudonyms(b"k" * 32)


def with_values(*values):
    """CT_small in explicit little endian with elements replaced or added."""
    raw = open(get_testdata_file("CT_small.dcm"), "rb").read()
    elements = {e.tag: e for e in parse(raw).elements if not e.tag >> 16 & 1} | {tag: Element(tag, vr, value) for tag, vr, value in values}
    start = 132 + 12 + int.from_bytes(raw[140:144], "little")
    return raw[:start] + b"".join(bytes(part) for part in encode(elements[t] for t in sorted(elements)))


@pytest.mark.parametrize("values, needle, options", [
    ([(0x00080020, "DA", b"20240301DOE^JANE")], b"DOE", ["retain-modified-dates"]),
    ([(0x00080020, "DA", b"20240301-20240305 ")], b"20240305", ["retain-modified-dates"]),
    ([(0x0008002A, "DT", b"20240301 DOE^JANE ")], b"DOE", ["retain-modified-dates"]),
    ([(0x00189087, "OB", b"DOE^JANE 19610305 MRN4711 ")], b"DOE", []),
    ([(0x00189087, "UN", b"DOE^JANE 19610305 MRN4711 ")], b"DOE", []),
    ([(0x00280106, "US", b"DOE^JANE")], b"DOE", []),
    ([(0x00200242, "LO", b"1.2.3.4711.99 ")], b"4711", []),
    ([(0x00100033, "LO", b"19610305")], b"19610305", []),
    ([(0x00401007, "SH", b"ORD-DOE ")], b"DOE", []),
    ([(0x0040A160, "UT", b"DOE^JANE")], b"DOE", []),
    ([(0x00081190, "UR", b"http://pacs/?patientID=DOE")], b"DOE", []),
    ([(0x70530010, "LO", b"Philips PET Private Group\0DOE^JANE "), (0x70531000, "DS", b"1 ")], b"DOE", ["retain-safe-private"]),
])
def test_a_name_in_an_unexpected_place_does_not_survive(values, needle, options):
    made = rewrite(with_values(*values), NAMES, make_policy(options=options)).data
    assert needle in with_values(*values) and needle not in made and pydicom.dcmread(io.BytesIO(made)).PixelData


def test_pixel_data_spelt_as_a_sequence_is_refused():
    name = [Element(0x00100010, "PN", b"DOE^JANE")]
    small = [(tag, "US", bytes([n, 0])) for tag, n in ((0x00280010, 1), (0x00280011, 1), (0x00280100, 8), (0x00280101, 8), (0x00280102, 7))]
    with pytest.raises(DicomError):
        rewrite(with_values(*small, (0x7FE00010, "SQ", [name])), NAMES, make_policy())


@pytest.mark.parametrize("text", ["MRN 123-456-789", "born 05/03/61", "Tel 06 12 34 56 78"])
def test_numbers_without_a_unit_are_cleaned_from_descriptions(text):
    assert not any(c.isdigit() for c in clean_text(text)) and clean_text("CT Thorax 1.0 mm") == "CT Thorax 1.0 mm"


def test_a_forged_seal_is_refused_and_a_true_one_tells_its_policy():
    from medimg.data.deid_rewrite import _MARK
    assert sealed(rewrite(with_values(), NAMES, make_policy()).data, NAMES).startswith("basic")
    with pytest.raises(DicomError, match="seal"):
        rewrite(with_values((0x00282000, "OB", _MARK + bytes(32) + b"II\x02\x10LT\x14\x00basic; clean-pixels ")), NAMES, make_policy())


def test_one_damaged_rle_file_does_not_end_the_folder(tmp_path):
    (tmp_path / "in").mkdir()
    raw = bytearray(open(get_testdata_file("MR_small_RLE.dcm"), "rb").read())
    item = raw.find(b"\xfe\xff\x00\xe0", raw.find(b"\xfe\xff\x00\xe0") + 4)
    raw[item + 8 + 64] = 0x81
    (tmp_path / "in" / "bad.dcm").write_bytes(bytes(raw))
    for k in range(5):
        pydicom.dcmwrite(tmp_path / "in" / f"{k}.dcm", slice_of(k, PatientID=str(k)), enforce_file_format=True)
    report = deidentify_folder(tmp_path / "in", tmp_path / "out", key=NAMES, progress=False)
    assert report.written == 5 and len(report.failed) == 1 and (tmp_path / "out" / "deidentification_report.json").exists()


def test_contradicting_bits_are_refused():
    with pytest.raises(DicomError, match="bits stored"):
        rewrite(with_values((0x00280101, "US", b"\x0c\x00"), (0x00280102, "US", b"\x05\x00")), NAMES, make_policy())


# ---- data sets -----------------------------------------------------------------------------------------------------------------
def test_prepared_samples_are_those_of_their_content(tmp_path):
    for name, value in (("p1", 1), ("p2", 2)):
        (tmp_path / name).mkdir()
        nib.save(nib.Nifti1Image(np.full((4, 4, 3), value, "int16"), np.eye(4)), tmp_path / name / "ct.nii.gz")
    means = [next(iter(Flow(SliceSource([tmp_path / p / "ct.nii.gz"], [0]), cache=tmp_path / "c", shuffle=False).batches()))[0].mean() for p in ("p1", "p2")]
    assert means == [1, 2]
    images = np.zeros((4, 8, 8), "uint8")
    sums = [next(iter(Flow(ArraySource(images, [0, 1, 0, 1], masks=np.full((4, 8, 8), m), ids=list("abcd")), target="mask", cache=tmp_path / "c", batch_size=4).batches()))[1].sum()
            for m in (0, 1)]
    assert sums == [0, 256]


def test_a_volume_that_nobody_annotated_is_not_negative(tmp_path):
    volumes, mask = [Volume(np.zeros((2, 4, 4)) + k) for k in range(2)], np.ones((2, 4, 4), bool)
    with pytest.raises(DatasetError, match="mask"):
        SliceSource(volumes, masks=[mask, None])
    for cache in (tmp_path, "memory"):
        with pytest.raises(ConfigError):
            list(Flow(SliceSource(volumes, [1, 0], masks=[mask, None]), target="mask", cache=cache).batches())


def test_an_augmentation_in_place_leaves_the_cache_alone():
    def brighter(sample, rng):
        image = np.array(sample["image"])
        image += 1
        return {**sample, "image": image}
    flow = Flow(ArraySource(np.full((4, 8, 8), 7, "uint8"), [0, 1, 0, 1], ids=list("abcd")), cache="memory", augment=brighter, batch_size=4)
    assert [next(iter(flow.batches(epoch)))[0].mean() for epoch in range(3)] == [8, 8, 8]
    with pytest.raises(ValueError, match="read-only"):
        flow._kept["image"][0] = 0


def test_one_missing_patient_id_separates_nobody_else(tmp_path):
    rng, rows = np.random.default_rng(0), ["file,label"]
    for k in range(48):
        noise = (rng.normal(size=(8, 8)).repeat(4, 0).repeat(4, 1) * 8000 + 30000).astype("uint16")
        pydicom.dcmwrite(tmp_path / f"{k}.dcm", slice_of(0, "CR", noise, SeriesInstanceUID=generate_uid(), PatientID="" if k == 47 else f"P{k // 4}"), enforce_file_format=True)
        rows.append(f"{k}.dcm,{k % 2}")
    (tmp_path / "labels.csv").write_text("\n".join(rows))
    made = import_dicom(tmp_path, tmp_path / "labels.csv")
    fold = dict(zip(made.meta["files"].tolist(), made.splits.tolist()))
    assert len(made) == 48 and not [p for p in range(11) if len({fold[f"{4 * p + j}.dcm"] for j in range(4)}) > 1]


def test_blanks_make_no_new_patient():
    images = np.arange(8, dtype="uint8")[:, None, None] * np.ones((1, 4, 4), "uint8")
    made = ImageDataset("a", images, [0, 1] * 4, ["train"] * 8, classes=("x", "y"), patient_ids=["1", "1 ", " 2", "2", "3", "3", "4", "4 "])
    assert sorted(set(made.patient_ids.tolist())) == ["1", "2", "3", "4"]


def test_merged_sets_without_patients_say_so():
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 250, (30, 8, 8)).repeat(4, 1).repeat(4, 2).astype("uint8")
    twice = np.concatenate([pictures, pictures + (np.indices((32, 32)).sum(0) == 5).astype("uint8")])
    sets = [ImageDataset(name, twice if name == "a" else 255 - twice, [0, 1] * 30, ["train"] * 60, classes=("x", "y")) for name in "ab"]
    made = make_splits(merge(sets), quiet=True)
    place = {made.images[i].tobytes(): made.splits[i] for i in range(len(made))}
    assert made.meta["interval"] == "image-level" and all(place[a.tobytes()] == place[b.tobytes()] for a, b in zip(twice[:30], twice[30:]))


@pytest.mark.parametrize("turn", range(4))
def test_outlines_that_touch_overlap_or_repeat(turn):
    a, b, c = (np.array(p, float) for p in ([(0, 0), (0, 4), (4, 4), (4, 0)], [(2, 2), (2, 6), (6, 6), (6, 2)], [(0, 4), (0, 8), (4, 8), (4, 4)]))
    assert np.isclose(slice_cover([a, np.roll(c, turn, axis=0)], (9, 9)).sum(), 32)
    assert np.isclose(slice_cover([a, np.roll(b, turn, axis=0)], (9, 9)).sum(), 28, atol=0.6)        # clipped sums, exact but for border pixels
    assert np.isclose(slice_cover([a, np.roll(a, turn, axis=0)], (9, 9)).sum(), 16)


def test_segments_of_one_label_and_objects_of_one_mask(tmp_path):
    folder = tmp_path / "ct"
    folder.mkdir()
    written(folder, *(slice_of(3 * i, InstanceNumber=i + 1, PatientPosition="HFS", PositionReferenceIndicator="") for i in range(3)))
    one, two = np.zeros((3, 4, 4), bool), np.zeros((3, 4, 4), bool)
    one[0, 0, 0], two[1:, 1:3, 1:3] = True, True
    path = write_seg({"nodule 1": one, "nodule 2": two}, folder, tmp_path / "a.dcm")
    ds = pydicom.dcmread(path)
    for item in ds.SegmentSequence:
        item.SegmentLabel = "Nodule"
    ds.save_as(tmp_path / "same.dcm")
    assert [int(v.array.sum()) for v in read_seg(tmp_path / "same.dcm").values()] == [1, 8]
    uids = {pydicom.dcmread(write_seg({name: one}, folder, tmp_path / "b.dcm")).SOPInstanceUID for name in ("lung", "nodule")}
    assert len(uids) == 2


def test_a_tar_that_ends_in_a_zip_is_a_tar(tmp_path):
    inner = io.BytesIO()
    with zipfile.ZipFile(inner, "w") as archive:
        archive.writestr("inner.txt", "x")
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for name, data in (("data.txt", b"truth"), ("sub.zip", inner.getvalue())):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    extract(tmp_path / "a.tar", tmp_path / "out")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["data.txt", "sub.zip"]


# ---- augmentation --------------------------------------------------------------------------------------------------------------
def test_large_label_numbers_survive_a_turn():
    from medimg.data.augment import Affine
    mask = np.zeros((16, 16), np.int32)
    mask[4:12, 4:12] = 40000
    turned = Compose([Affine(rotate_deg=30, p=1.0)])(Sample(np.zeros((16, 16), np.float32), mask=mask), np.random.default_rng(0))
    assert set(np.unique(turned.mask)) == {0, 40000}


def test_a_flip_drops_no_box_that_a_crop_keeps():
    sample = Sample(np.zeros((20, 20), np.float32), boxes=np.array([[0.0, 0, 10, 10]]))
    for k in range(20):
        rng = lambda: np.random.default_rng(k)
        alone = Compose([Crop((12, 12), min_visible=0.0)])(sample, rng()).boxes
        both = Compose([Flip(y=1.0), Crop((12, 12), min_visible=0.0)])(sample, rng()).boxes
        assert len(alone) and len(both)
