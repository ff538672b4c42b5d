"""Breaks files on purpose and looks for a parser that does anything but give a result or a typed one-line error.

    python tools/fuzz.py --mutants 5000            # what the tests run (about as many seconds as `--seconds` would allow)
    python tools/fuzz.py --seconds 600             # make fuzz: as many as fit
    python tools/fuzz.py --mutants 1 --start 4711  # one mutant again; add --keep to write it into --out

Mutant number i of a seed is always the same bytes. Each is read in a child process with a limit on its address space; the parent watches the
clock, so a hang or a crash of a native decoder names the mutant and the hunt goes on with the next. What breaks a parser is kept in `--out`.
"""
import argparse
import collections
import io
import json
import os
import random
import shutil
import struct
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
import zlib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CPU_S, WALL_S, SLACK_MB, ADDRESS_MB, MESSAGE = 2.0, 30.0, 64, 6144, 400
VRS = b"AE AS AT CS DA DS DT FD FL IS LO LT OB OD OF OL OV OW PN SH SL SQ SS ST SV TM UC UI UL UN UR US UT UV ZZ \0\0".split(b" ")
SYNTAXES = ["1.2.840.10008.1.2", "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.1.99", "1.2.840.10008.1.2.2", "1.2.840.10008.1.2.5", "1.2.3",
            *(f"1.2.840.10008.1.2.4.{n}" for n in (50, 51, 57, 70, 80, 81, 90, 91, 102, 201, 203)), "", "x" * 200, "1.2.840.10008.1.1"]
NASTY = [0, 1, -1, 2, 7, 255, 256, 32768, 65535, 65536, 2**31 - 1, 2**31, 2**32 - 1, 2**63, "", " ", "nan", "inf", "-1e400", "1e9", "1A", "é" * 40,
         "\\".join("123456789"), "A" * 20_000, "../../../etc/passwd", "\x1b[31m\u202e", "%s%n{0}", [0, 0], [1, -1, 1e30], ["a", "b"], [1] * 300, None]
KEYWORDS = ("Rows Columns BitsAllocated BitsStored HighBit PixelRepresentation SamplesPerPixel NumberOfFrames PlanarConfiguration RescaleSlope RescaleIntercept "
            "PhotometricInterpretation ImagePositionPatient ImageOrientationPatient PixelSpacing SliceThickness SpacingBetweenSlices WindowCenter WindowWidth "
            "VOILUTFunction PixelPaddingValue PixelPaddingRangeLimit InstanceNumber AcquisitionNumber EchoTime TemporalPositionIdentifier ImageType Modality "
            "SOPClassUID SeriesInstanceUID StudyInstanceUID PatientID PatientAge PatientWeight SeriesTime AcquisitionTime SpecificCharacterSet Units "
            "DecayCorrection RescaleType ModalityLUTSequence PerFrameFunctionalGroupsSequence SharedFunctionalGroupsSequence DimensionIndexSequence").split()


# ---- seeds ---------------------------------------------------------------------------------------------------------------------
def seeds(folder: Path) -> dict:
    """name -> (kind, bytes) of good files: pydicom's own, those that our writers make, and one of each other format."""
    from pydicom.data import get_testdata_file
    names = ("CT_small MR_small MR_small_bigendian MR_small_implicit MR_small_RLE MR_small_jp2klossless MR_small_jpeg_ls_lossless JPEG2000 JPEG-lossy "
             "SC_rgb_rle_2frame SC_rgb_jpeg_gdcm SC_rgb_dcmtk_+eb+cy+np SC_rgb_small_odd_jpeg rtdose rtdose_rle_1frame image_dfl rtplan reportsi "
             "SC_ybr_full_422_uncompressed liver_1frame nested_priv_SQ UN_sequence").split()
    found = {n: ("dicom", Path(get_testdata_file(f"{n}.dcm")).read_bytes()) for n in names if get_testdata_file(f"{n}.dcm")}
    for maker in (_dicom_seeds, _other_seeds, _json_seeds, _bombs):
        found |= maker(folder)
    return found


def _dicom_seeds(folder):
    import numpy as np
    import pydicom
    from pydicom.data import get_testdata_file
    from pydicom.dataset import Dataset
    from pydicom.sequence import Sequence

    from medimg.data.phantom import thorax_phantom
    from medimg.data.phantom_dicom import write_ct
    made = {}

    def keep(name, ds, kind="dicom"):
        ds.save_as(folder / name)
        made[name] = kind, (folder / name).read_bytes()
    small = pydicom.dcmread(get_testdata_file("MR_small.dcm"))
    small.PhotometricInterpretation, small.BitsAllocated, small.BitsStored, small.HighBit, small.PixelRepresentation = "PALETTE COLOR", 8, 8, 7, 0
    small.PixelData = small.PixelData[:64 * 64]
    for k in range(3):
        small.add_new(0x00281101 + k, "US", [256, 0, 16])
        small.add_new(0x00281221 + k, "OW", np.array([0, 2, 5, 10, 1, 253, 65535, 2, 1, 0, 0], "<u2").tobytes())
    keep("palette.dcm", small)
    pet, given = pydicom.dcmread(get_testdata_file("CT_small.dcm")), Dataset()
    pet.Modality, pet.Units, pet.PatientWeight, pet.DecayCorrection, pet.CorrectedImage = "PT", "BQML", 70, "START", ["ATTN", "DECY"]
    pet.SeriesDate = pet.AcquisitionDate = "20240102"
    pet.SeriesTime = pet.AcquisitionTime = "110000"
    given.RadiopharmaceuticalStartTime, given.RadionuclideTotalDose, given.RadionuclideHalfLife = "100000", 370e6, 6586.2
    pet.RadiopharmaceuticalInformationSequence = Sequence([given])
    pet.Rows, pet.PixelData = 8, pet.PixelData[:8 * 128 * 2]
    keep("pet.dcm", pet)
    multi = pydicom.dcmread(get_testdata_file("MR_small.dcm"))
    multi.SOPClassUID = multi.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.4.1"
    multi.NumberOfFrames, multi.Rows, multi.Columns, groups = 4, 32, 32, []
    for k in range(4):
        frame, place, content = Dataset(), Dataset(), Dataset()
        place.ImagePositionPatient, content.DimensionIndexValues, content.StackID, content.InStackPositionNumber = [0, 0, 3 * k], [1, k + 1], "1", k + 1
        frame.PlanePositionSequence, frame.FrameContentSequence = Sequence([place]), Sequence([content])
        groups.append(frame)
    shared, measures, turn, line = Dataset(), Dataset(), Dataset(), Dataset()
    measures.PixelSpacing, measures.SliceThickness, turn.ImageOrientationPatient = [1, 1], 3, [1, 0, 0, 0, 1, 0]
    line.RescaleSlope, line.RescaleIntercept, line.RescaleType = 2, 1, "US"
    shared.PixelMeasuresSequence, shared.PlaneOrientationSequence, shared.PixelValueTransformationSequence = Sequence([measures]), Sequence([turn]), Sequence([line])
    multi.PerFrameFunctionalGroupsSequence, multi.SharedFunctionalGroupsSequence = Sequence(groups), Sequence([shared])
    keep("enhanced.dcm", multi)
    case = thorax_phantom(0, shape=(8, 16, 16), spacing_mm=(30, 20, 20), nodules=0)
    pages = write_ct(case.volume, folder / "ct")
    made["ct_0001.dcm"] = "dicom", pages[0].read_bytes()
    return made | _annotation_seeds(folder, pages, case)


def _annotation_seeds(folder, pages, case):
    """RTSTRUCT and SEG from our own writers, where they exist."""
    import numpy as np
    made = {}
    try:
        from medimg.data.annotations import write_rtstruct
        from medimg.data.dicom import scan
        from medimg.data.segmentations import write_seg
        series = scan(folder / "ct", progress=False).images[0]
        mask = np.zeros(case.volume.shape, bool)
        mask[1:3, 4:12, 4:12] = True
        masks = {"lung": mask}
        for kind, writer in (("rtstruct", write_rtstruct), ("seg", write_seg)):
            writer(masks, series, folder / f"{kind}.dcm")
            made[f"{kind}.dcm"] = kind, (folder / f"{kind}.dcm").read_bytes()
    except ImportError as error:
        print(f"left out: {error}", file=sys.stderr)
    return made


def _other_seeds(folder):
    import cv2
    import numpy as np

    from medimg.data.volume import Volume
    grey, made = (np.indices((24, 32)).sum(0) * 4).astype("uint8"), {}
    for suffix in (".png", ".jpg"):
        made[f"picture{suffix}"] = "picture", cv2.imencode(suffix, grey)[1].tobytes()
    volume = Volume(np.arange(4 * 8 * 8, dtype="int16").reshape(4, 8, 8))
    for suffix in (".nii", ".nii.gz"):
        volume.to_nifti(folder / f"v{suffix}")
        made[f"v{suffix}"] = "nifti", (folder / f"v{suffix}").read_bytes()
    buffer = io.BytesIO()
    np.save(buffer, grey)
    made["grey.npy"] = "npy", buffer.getvalue()
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **{f"{s}_{k}": np.zeros((2, 4, 4) if k == "images" else (2, 1), "uint8") for s in ("train", "val", "test") for k in ("images", "labels")})
    made["set.npz"] = "npz", buffer.getvalue()
    made["boxes.csv"] = "csv", b"image,x,y,width,height,label\na.png,3,2,4,5,mass\nb.png,,,,,\n"
    made["series.zip"] = "zip", _zip({p.name: p.read_bytes() for p in sorted((folder / "ct").iterdir())})
    return made


def _json_seeds(folder):
    from medimg.data.preprocess import Preprocessor
    from medimg.deployment.bundle import toy_bundle
    from medimg.deployment.encryption import Key, encrypt
    from medimg.deployment.manifest import encode, example_manifest
    pre = Preprocessor([("resize", {"height": 16, "width": 16}), ("scale", {"low": 0, "high": 255})])
    toy_bundle(folder / "toy")
    return {"preprocess.json": ("preprocess", pre.to_json().encode()), "manifest.json": ("manifest", encode(example_manifest())),
            "toy.medimg": ("bundle", packed := _zip({p.name: p.read_bytes() for p in sorted((folder / "toy").iterdir())})),
            "toy.medimg.enc": ("encrypted", encrypt(packed, Key(bytes(range(32))), chunk=256))}


def _zip(files):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def _bombs(folder):
    """Small files that promise or unfold to very large ones."""
    from pydicom.data import get_testdata_file
    squeeze = zlib.compressobj(9, wbits=-15)
    zeros = b"".join(squeeze.compress(bytes(1 << 20)) for _ in range(64)) + squeeze.flush()
    deflated = Path(get_testdata_file("image_dfl.dcm")).read_bytes()
    plain = Path(get_testdata_file("CT_small.dcm")).read_bytes()
    deep = struct.pack("<HH2sHIHHI", 0x0008, 0x1140, b"SQ", 0, 0xFFFFFFFF, 0xFFFE, 0xE000, 0xFFFFFFFF)
    return {"deflate_bomb.dcm": ("dicom", deflated[:400] + zeros), "nested.dcm": ("dicom", plain[:1200] + deep * 3000),
            "nested_wide.dcm": ("dicom", _insert(plain, deep * 60)), "zip_bomb.zip": ("zip", _zip({"a.dcm": bytes(64 << 20)})),
            "names.zip": ("zip", _zip({"../../up.dcm": plain, "/etc/abs.dcm": plain, "C:\\x.dcm": plain, "a" * 300 + ".dcm": plain})),
            "many.zip": ("zip", _zip({f"{k}.dcm": b"DICM" for k in range(100)})), "deep.json": ("preprocess", b"[" * 20_000),
            "numbers.json": ("manifest", b'{"a": ' + b"9" * 10_000 + b"}")}


# ---- mutations -----------------------------------------------------------------------------------------------------------------
def elements(data: bytes) -> list:
    """(start, place of the length, bytes of the length, end) of the top-level elements of an explicit little-endian file, as far as they can be followed."""
    at, found = 132, []
    while at + 8 <= len(data) and len(found) < 400:
        vr = data[at + 4:at + 6]
        long = vr in (b"OB", b"OD", b"OF", b"OL", b"OV", b"OW", b"SQ", b"SV", b"UC", b"UN", b"UR", b"UT", b"UV")
        if not (vr.isalpha() and vr.isupper()) or long and at + 12 > len(data):
            break
        size = struct.unpack_from("<I", data, at + 8)[0] if long else struct.unpack_from("<H", data, at + 6)[0]
        value = at + (12 if long else 8)
        end = min(value + size, len(data))
        found.append((at, at + (8 if long else 6), 4 if long else 2, end))
        at = end
    return found


def _insert(data, extra):
    chosen = elements(data)
    return data[:chosen[len(chosen) // 3][0]] + extra + data[chosen[len(chosen) // 3][0]:] if chosen else data + extra


def flip(rng, data):
    """Some bytes anywhere, more often near the beginning."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4, 16))):
        out[int(len(out) * rng.random() ** rng.choice((1, 3)))] = rng.randrange(256)
    return bytes(out)


def truncate(rng, data):
    """The beginning of the file."""
    return data[:int(len(data) * rng.random())]


def grow(rng, data):
    """A piece repeated, or random bytes in the middle."""
    at, size = rng.randrange(len(data)), rng.choice((1, 2, 8, 64, 1024, 65536))
    return data[:at] + (data[at:at + size] if rng.random() < 0.5 else rng.randbytes(size)) + data[at:]


def cut(rng, data):
    """A piece taken out."""
    at = rng.randrange(len(data))
    return data[:at] + data[at + rng.choice((1, 2, 4, 16, 256)):]


def number_bomb(rng, data):
    """A 16- or 32-bit field somewhere becomes extreme."""
    at, form = rng.randrange(len(data)), rng.choice(("<H", "<I", ">H", ">I"))
    value = rng.choice((0, 1, 0x7FFF, 0x8000, 0xFFFE, 0xFFFF) if form[1] == "H" else (0, 1, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFE, 0xFFFFFFFF, 0x10000))
    return data[:at] + struct.pack(form, value) + data[at + struct.calcsize(form):]


def length_bomb(rng, data):
    """An element claims another length."""
    if not (chosen := elements(data)):
        return number_bomb(rng, data)
    _, at, width, _ = rng.choice(chosen)
    value = rng.choice((0, 1, 3, 0x7FFF, 0xFFFE, 0xFFFF) if width == 2 else (0, 1, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFE, 0xFFFFFFFF, 0x01000000))
    return data[:at] + struct.pack("<H" if width == 2 else "<I", value) + data[at + width:]


def vr_swap(rng, data):
    """An element gets another value representation."""
    if not (chosen := elements(data)):
        return flip(rng, data)
    at = rng.choice(chosen)[0]
    return data[:at + 4] + rng.choice(VRS).ljust(2)[:2] + data[at + 6:]


def tag_swap(rng, data):
    """Two elements exchange tags, or places."""
    chosen = elements(data)
    if len(chosen) < 2:
        return flip(rng, data)
    (a, *_, end_a), (b, *_, end_b) = sorted(rng.sample(chosen, 2))
    if rng.random() < 0.5:
        return data[:a] + data[b:b + 4] + data[a + 4:b] + data[a:a + 4] + data[b + 4:]
    return data[:a] + data[b:end_b] + data[end_a:b] + data[a:end_a] + data[end_b:]


def nest(rng, data):
    """Sequences in sequences, without an end."""
    piece = struct.pack("<HH2sHIHHI", rng.choice((0x0008, 0x0040, 0x5200)), 0x1140, b"SQ", 0, 0xFFFFFFFF, 0xFFFE, 0xE000, rng.choice((0xFFFFFFFF, 20, 0)))
    return _insert(data, piece * rng.choice((1, 10, 100, 1000)))


def syntax_lie(rng, data):
    """The file claims another transfer syntax."""
    at = data.find(b"\x02\x00\x10\x00UI")
    if at < 0:
        return flip(rng, data)
    size, uid = struct.unpack_from("<H", data, at + 6)[0], rng.choice(SYNTAXES).encode()
    uid += b"\0" * (len(uid) % 2)
    if rng.random() < 0.5:
        uid = uid[:size].ljust(size, b"\0")
    return data[:at + 6] + struct.pack("<H", len(uid)) + uid + data[at + 8 + size:]


def header_lie(rng, data):
    """One to three elements that decide on size, meaning or place get a nasty value (through pydicom)."""
    import pydicom
    from pydicom import config
    try:
        config.settings.writing_validation_mode = config.IGNORE
        ds = pydicom.dcmread(io.BytesIO(data), force=True)
        for _ in range(rng.choice((1, 1, 2, 3))):
            keyword, value = rng.choice(KEYWORDS), rng.choice(NASTY)
            if value is None:
                ds.pop(keyword, None)
            else:
                setattr(ds, keyword, value)
        out = io.BytesIO()
        ds.save_as(out)
        return out.getvalue()
    except Exception:               # a value that cannot even be written
        return length_bomb(rng, data)


def number_in_text(rng, data):
    """A number, word or bracket in JSON or CSV becomes something else."""
    import re
    places = list(re.finditer(rb"-?\d+(?:\.\d+)?|\"[^\"]*\"|true|false|null|[\[\]{},:]", data))
    if not places:
        return flip(rng, data)
    place = rng.choice(places)
    new = rng.choice((b"1e999", b"-1", b"NaN", b"0", b"99999999999999999999", b'"x"', b"null", b"[]", b"{}", b"[[[[[[", b'"\\ud800"', b"true", b"", b'"' + b"A" * 5000 + b'"'))
    return data[:place.start()] + new + data[place.end():]


BYTES = (flip, flip, truncate, grow, cut, number_bomb)
OPERATORS = {"dicom": (*BYTES, length_bomb, length_bomb, vr_swap, tag_swap, nest, syntax_lie, header_lie, header_lie, header_lie),
             "preprocess": (flip, truncate, grow, cut, *(number_in_text,) * 5), "csv": (flip, truncate, grow, cut, *(number_in_text,) * 5)}
OPERATORS |= {"seg": OPERATORS["dicom"], "rtstruct": OPERATORS["dicom"], "manifest": OPERATORS["preprocess"]}


def mutant(number: int, seed: int, files: dict) -> tuple:
    """(name of the seed file, its kind, names of the operators, bytes) of mutant `number`: always the same."""
    rng = random.Random(f"{seed}:{number}")
    weighted = sorted(files) + [n for n in sorted(files) if files[n][0] in ("dicom", "seg", "rtstruct")]
    name = rng.choice(weighted)
    kind, data = files[name]
    done = []
    for _ in range(rng.choice((0, 1, 1, 1, 2, 3)) if "bomb" in name or "nested" in name else rng.choice((1, 1, 1, 2, 3))):
        operator = rng.choice(OPERATORS.get(kind, BYTES))
        data, done = operator(rng, data) if data else data, [*done, operator.__name__]
    return name, kind, done, data


# ---- parsers -------------------------------------------------------------------------------------------------------------------
def parsers() -> dict:
    """kind -> [(name, function of a path)]: everything in medimg that reads bytes from outside."""
    import functools

    from medimg.data import dicom, dicom_pixels, dicom_units, volume
    from medimg.data.boxes import read_boxes
    from medimg.data.downloads import read_npz
    from medimg.data.preprocess import Preprocessor
    from medimg.data.registry import DatasetInfo
    from medimg.deployment import bundle, intake, manifest
    quiet = functools.partial(dicom.scan, progress=False)

    def units(path):
        header = dicom_pixels.read_header(path)
        dicom_units.units_of(header), dicom_units.windows_of(header), dicom_units.rescale_of(header)
        if header.get("Modality") == "PT":
            dicom_units.suv_factor(header)

    def show(path):
        pixels, header = dicom_pixels.read_pixels(path, padding=0)
        return dicom_units.to_display(pixels, header) if pixels.ndim == 2 else None
    found = {"dicom": [("read", dicom.read), ("read", dicom.read), ("scan", quiet), ("read_pixels", dicom_pixels.read_pixels), ("display", show), ("units", units)],
             "picture": [("decode_picture", lambda p: intake.decode_picture(p.read_bytes())), ("find_studies", lambda p: list(intake.find_studies([p])))],
             "nifti": [("from_nifti", volume.from_nifti)], "npy": [("find_studies", lambda p: list(intake.find_studies([p])))],
             "npz": [("read_npz", lambda p: read_npz(p, DatasetInfo("toy", "binary", ("no", "yes"), (4, 4))))], "csv": [("read_boxes", read_boxes)],
             "zip": [("scan zip", quiet), ("find_studies", lambda p: list(intake.find_studies([p])))], "preprocess": [("Preprocessor", Preprocessor.load)],
             "manifest": [("manifest", lambda p: manifest.check_manifest(manifest.decode(p.read_bytes())))],
             "bundle": [("open_files", lambda p: bundle.open_files(p, verify=False)), ("Bundle", lambda p: bundle.inspect(p))]}
    for kind, extra in _late_parsers().items():
        found.setdefault(kind, []).extend(extra)
    return found


def _late_parsers():
    """Parsers of modules that may be absent in an older checkout."""
    found = {}

    def add(kind, name, make):
        try:
            found.setdefault(kind, []).append((name, make()))
        except (ImportError, AttributeError) as error:
            print(f"left out: {name} ({error})", file=sys.stderr)

    def encrypted():
        from medimg.deployment.bundle import open_files
        from medimg.deployment.encryption import Key
        return lambda p: open_files(p, key=Key(bytes(range(32))), allow_unsigned=True)

    def peek():
        from medimg.data.dicom_peek import peek as reader
        return lambda p: [reader(p).get(k) for k in ("Rows", "SeriesInstanceUID", "ImagePositionPatient", "PixelSpacing")]

    def rewrite():
        from medimg.data.deid_profile import make_policy, new_key, read_key
        from medimg.data.deid_rewrite import rewrite as writer
        names, policy = read_key(new_key(Path(tempfile.mkdtemp()) / "key")), make_policy()
        return lambda p: writer(p.read_bytes(), names, policy)

    def rtstruct():
        from medimg.data.annotations import read_rtstruct
        return read_rtstruct

    def seg():
        from medimg.data.segmentations import read_seg
        return read_seg
    add("encrypted", "encrypted bundle", encrypted)
    add("dicom", "peek", peek)
    add("dicom", "deidentify", rewrite)
    add("rtstruct", "read_rtstruct", rtstruct)
    add("seg", "read_seg", seg)
    for kind in ("rtstruct", "seg"):
        found.setdefault(kind, []).append(("scan", lambda p: __import__("medimg.data.dicom", fromlist=["scan"]).scan(p, progress=False)))
    return found


def declared_bytes(path) -> int:
    """What the header of a DICOM file promises, or 0."""
    import math

    from medimg.data.dicom_pixels import MAX_IMAGE_BYTES, read_header
    try:
        header = read_header(path)
        sizes = [int(header.get(k) or 1) for k in ("Rows", "Columns", "NumberOfFrames", "SamplesPerPixel")]
        return min(MAX_IMAGE_BYTES, math.prod(sizes) * int(header.get("BitsAllocated") or 8) // 8)
    except Exception:
        return 0


def judge(function, path) -> tuple:
    """("read" | "refused" | a fault, what was said) of one parser on one file."""
    from medimg.errors import MedimgError, printable
    try:
        function(path)
        return "read", ""
    except MedimgError as error:
        said = str(error)
        if len(said) > MESSAGE or len(said.splitlines()) != 1 or printable(said) != said:
            return "message", f"{len(said)} characters in {len(said.splitlines())} lines: {said[:300]!r}"
        return "refused", said
    except Exception as error:
        import traceback
        where = traceback.extract_tb(error.__traceback__)[-1]
        return "untyped", f"{type(error).__name__}: {str(error)[:200]} at {Path(where.filename).name}:{where.lineno} (message of an untyped error)"


# ---- the child -----------------------------------------------------------------------------------------------------------------
def child(options) -> None:
    """Judge mutants one after the other; a line `# number parser` before each, `+ parser: verdict` after, `! {json}` for a fault, `= {json}` at the end."""
    import warnings
    say, nothing = os.fdopen(os.dup(1), "w", buffering=1), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 1)
    warnings.simplefilter("ignore")
    scratch = Path(tempfile.mkdtemp(dir=options.folder))
    files, readers = seeds(scratch), parsers()
    os.dup2(nothing, 2)
    for name, (kind, data) in sorted(files.items()):        # imports and caches are paid for before the limits
        (path := scratch / Path(name).name).write_bytes(data)
        if "bomb" not in name and "nested" not in name:
            for _, function in readers[kind]:
                judge(function, path)
    _limit_memory()
    slowest = (0.0, "")
    start, number = time.monotonic(), options.start
    while number < options.start + options.mutants and time.monotonic() - start < options.seconds:
        name, kind, done, data = mutant(number, options.seed, files)
        reader, function = random.Random(number).choice(readers[kind])
        say.write(f"# {number} {reader}\n")
        path = scratch / f"m{''.join(Path(name).suffixes[-2:]) if name.endswith('.gz') else Path(name).suffix or '.dcm'}"
        path.write_bytes(data)
        _peak_mb(fresh=True)
        peak, cpu = _peak_mb(), time.process_time()
        verdict, said = judge(function, path)
        cpu, new = time.process_time() - cpu, _peak_mb()
        if verdict in ("read", "refused") and cpu > CPU_S:
            verdict, said = "slow", f"{cpu:.1f} s"
        if verdict in ("read", "refused") and new > peak + SLACK_MB and new > peak + SLACK_MB + 4 * max(len(data), declared_bytes(path)) / 2**20:
            verdict, said = "memory", f"{new - peak:.0f} MB more for a file of {len(data)} bytes"
        say.write(f"+ {reader}: {verdict}\n")
        slowest = max(slowest, (cpu, f"mutant {number} of {name} by {reader}"))
        if verdict not in ("read", "refused") or options.keep:
            say.write("! " + json.dumps({"number": number, "file": name, "parser": reader, "operators": done, "fault": verdict, "said": said}) + "\n")
            _keep(options.out, number, path)
        number += 1
    say.write("= " + json.dumps({"slowest": slowest, "next": number}) + "\n")


def _limit_memory():
    """RLIMIT_AS above what is used now."""
    try:
        import resource
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + (ADDRESS_MB << 20),) * 2)
    except (ImportError, OSError, ValueError):
        pass


def _peak_mb(fresh=False):
    """Largest resident memory in MB, since the last call with `fresh` where Linux allows it (ru_maxrss also counts what the parent had)."""
    try:
        status = Path("/proc/self/status").read_text()
        if fresh:
            Path("/proc/self/clear_refs").write_text("5")
        return int(status.split("VmHWM:")[1].split()[0]) / 1024
    except (OSError, IndexError):
        pass
    try:
        import resource
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024 if sys.platform != "darwin" else 2**20)
    except ImportError:
        return 0


def _keep(out, number, path):
    if out:
        Path(out).mkdir(parents=True, exist_ok=True)
        shutil.copy(path, Path(out) / f"{number}{path.name[1:]}")


# ---- the parent ----------------------------------------------------------------------------------------------------------------
def hunt(*, mutants: int = 5000, seconds: float = 1e9, seed: int = 0, start: int = 0, out=None, keep: bool = False) -> dict:
    """Run mutants in child processes until done: {"counts", "faults", "slowest", "mutants"}; a hang or crash of a child is a fault of its mutant."""
    counts, faults, slowest, number, begun = collections.Counter(), [], (0.0, ""), start, time.monotonic()
    while number < start + mutants and time.monotonic() - begun < seconds:
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, __file__, "--child", "--folder", folder, "--seed", str(seed), "--start", str(number), "--mutants", str(start + mutants - number),
                       "--seconds", str(seconds - (time.monotonic() - begun)), *(["--out", str(out)] if out else []), *(["--keep"] if keep else [])]
            env = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "MEDIMG_CACHE": folder}
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env, cwd=folder)
            last, ended, hung = _follow(process, counts, faults)
            if ended:
                slowest, number = max(slowest, tuple(ended["slowest"])), ended["next"]
                continue
            said = process.stderr.read()[-2000:]
            if last is None:
                raise RuntimeError(f"the fuzzer's child did not start:\n{said}")
            number, reader = int(last[0]) + 1, " ".join(last[1:])
            faults.append({"number": number - 1, "parser": reader, "fault": "hang" if hung else "crash", "said": f"return code {process.returncode}"})
            counts[f"{reader}: {faults[-1]['fault']}"] += 1
    return {"counts": dict(sorted(counts.items())), "faults": faults, "slowest": slowest, "mutants": number - start, "seconds": round(time.monotonic() - begun, 1)}


def _follow(process, counts, faults):
    """Read the child's lines under a watchdog: (last mutant begun, its closing words or None, whether it hung)."""
    last, ended, hung, clock = None, None, threading.Event(), None

    def late():
        hung.set()
        process.kill()
    try:
        clock = threading.Timer(120, late)
        clock.start()
        for line in process.stdout:
            clock.cancel()
            clock = threading.Timer(WALL_S, late)
            clock.daemon = True
            clock.start()
            if line.startswith("# "):
                last = line[2:].split()
            elif line.startswith("! "):
                faults.append(json.loads(line[2:]))
            elif line.startswith("= "):
                ended = json.loads(line[2:])
            elif line.startswith("+ "):
                counts[line[2:].strip()] += 1
    finally:
        clock.cancel()
        process.wait()
    return last, ended, hung.is_set()


def main() -> int:
    """Command line; exit code 1 when something broke."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mutants", type=int, default=10**9)
    parser.add_argument("--seconds", type=float, default=1e9)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--start", type=int, default=0, help="number of the first mutant")
    parser.add_argument("--out", default="artefacts/fuzz", help="folder for what breaks a parser")
    parser.add_argument("--keep", action="store_true", help="keep every mutant")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.out = options.out and str(Path(options.out).resolve())
    if options.child:
        child(options)
        return 0
    if options.mutants == 10**9 and options.seconds == 1e9:
        parser.error("say how long: --mutants N or --seconds N")
    result = hunt(mutants=options.mutants, seconds=options.seconds, seed=options.seed, start=options.start, out=options.out, keep=options.keep)
    for name, count in result["counts"].items():
        print(f"{count:>8}  {name}")
    for fault in result["faults"]:
        print("FAULT", json.dumps(fault))
    print(f"{result['mutants']} mutants in {result['seconds']} s, {len(result['faults'])} faults; slowest {result['slowest'][0]:.2f} s of CPU ({result['slowest'][1]})")
    return bool(result["faults"])


if __name__ == "__main__":
    sys.exit(main())
