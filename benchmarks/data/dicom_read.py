"""A CT series from a folder to an array in HU: medimg beside the readers people use, on the same files, in turn.

The real 99-slice thorax CT is used where MEDIMG_DATA has it, else a phantom; compressed copies of it are made in a temporary folder.
Every reader starts from the folder: finding, ordering and checking the files is part of the work. Files are warm.
"""
import os
import sys
import tempfile
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from sidebyside import Peer, compare, main, peer_python  # noqa: E402

LOOP = """
import glob, numpy as np, pydicom
def run(folder):
    slices = sorted((pydicom.dcmread(f) for f in glob.glob(folder + "/*")), key=lambda d: float(d.ImagePositionPatient[2]))
    np.stack([d.pixel_array * float(d.RescaleSlope) + float(d.RescaleIntercept) for d in slices])
"""
SITK = """
import SimpleITK as sitk
def run(folder):
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(folder))
    sitk.GetArrayFromImage(reader.Execute())
"""
MONAI = """
from monai.transforms import LoadImage
load = LoadImage(image_only=True)
def run(folder):
    load(folder)
"""
SYNTAXES = {"RLE": "1.2.840.10008.1.2.5", "JPEG lossless": "1.2.840.10008.1.2.4.70", "JPEG 2000": "1.2.840.10008.1.2.4.90"}


def series():
    """(folder, what it is): the real CT, or a phantom written into a temporary folder."""
    from medimg.config import find_data
    if found := find_data("thorax_ct"):
        return found / "dicom", "real CT, 99 slices"
    from medimg.data import phantom, phantom_dicom
    folder = Path(tempfile.mkdtemp())
    made = phantom.thorax_phantom(1, shape=(99, 256, 256), spacing_mm=(3.0, 1.6, 1.6))
    phantom_dicom.write_ct(getattr(made, "volume", made), folder)
    print("no thorax_ct below MEDIMG_DATA: a phantom of 99 slices of 256 × 256 stands in")
    return folder, "phantom CT, 99 slices"


def compressed(folder, syntax, out):
    """Copies of every file in another transfer syntax (SimpleITK writes JPEG, pydicom RLE)."""
    import gdcm
    import pydicom
    for path in sorted(Path(folder).iterdir()):
        if syntax == SYNTAXES["RLE"]:
            ds = pydicom.dcmread(path)
            ds.compress(syntax)
            ds.save_as(out / path.name)
            continue
        reader, change, writer = gdcm.ImageReader(), gdcm.ImageChangeTransferSyntax(), gdcm.ImageWriter()
        reader.SetFileName(str(path))
        reader.Read()
        kind = gdcm.TransferSyntax.JPEGLosslessProcess14_1 if "70" in syntax else gdcm.TransferSyntax.JPEG2000Lossless
        change.SetTransferSyntax(gdcm.TransferSyntax(kind))
        change.SetInput(reader.GetImage())
        if not change.Change():
            raise RuntimeError(f"gdcm cannot make {syntax}")
        writer.SetFileName(str(out / path.name))
        writer.SetFile(reader.GetFile())
        writer.SetImage(change.GetOutput())
        writer.Write()


def measure(repeats):
    """Rows of `compare` for the plain series and three compressed ones."""
    from medimg.data.dicom import read
    folder, what = series()
    plain, rows = read(folder).array, []
    peers = {"pydicom loop": Peer(LOOP), "SimpleITK series": Peer(SITK), "MONAI LoadImage": Peer(MONAI)} if peer_python() else {"pydicom loop": Peer(LOOP)}

    def ours(folder):
        read(folder)
    rows += compare(what, ours, peers, repeats=repeats, folder=str(folder))
    with tempfile.TemporaryDirectory() as place:
        for name, syntax in SYNTAXES.items():
            copy = Path(place) / name.replace(" ", "")
            copy.mkdir()
            compressed(folder, syntax, copy)
            if not np.array_equal(read(copy).array, plain):
                raise SystemExit(f"{name}: other voxels")
            some = {k: p for k, p in peers.items() if k != "MONAI LoadImage"}
            rows += compare(f"the same in {name}", ours, some, repeats=max(3, repeats // 2), folder=str(copy))
    for peer in peers.values():
        peer.close()
    return rows


if __name__ == "__main__":
    os.environ.setdefault("MEDIMG_DATA", "")
    main(measure, __doc__)
