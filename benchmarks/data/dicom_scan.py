"""Ten thousand files to a table of series: `scan` beside SimpleITK's GDCM and dicom2nifti, on the same folder, in turn.

The files are slices written by the phantom, in 100 series of 100. Memory is the largest resident set of a process that does nothing else.
"""
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from sidebyside import Peer, compare, main, peer_python  # noqa: E402

FILES, EACH = 10_000, 100
SITK = """
import SimpleITK as sitk
def run(folder):
    for uid in sitk.ImageSeriesReader.GetGDCMSeriesIDs(folder):
        sitk.ImageSeriesReader.GetGDCMSeriesFileNames(folder, uid)
"""
D2N = """
import os, dicom2nifti.common as common
from pydicom import dcmread
def run(folder):          # the first half of dicom2nifti.convert_directory: read headers, group by series
    series = {}
    for root, _, files in os.walk(folder):
        for name in files:
            path = os.path.join(root, name)
            if common.is_dicom_file(path):
                header = dcmread(path, defer_size="1 KB", force=False)
                if header.SeriesInstanceUID not in series:
                    series[header.SeriesInstanceUID] = []
                series[header.SeriesInstanceUID].append(header)
"""
MEMORY = """
import resource, sys
from medimg.data.dicom import scan
table = scan(sys.argv[1], progress=False)
print(len(table), sum(len(s.files) for s in table), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


def make(folder):
    """100 series of 100 small slices, by changing UIDs and places in the bytes of one phantom series."""
    import numpy as np
    import pydicom
    from pydicom.uid import generate_uid

    from medimg.data import phantom, phantom_dicom
    made = phantom.thorax_phantom(1, shape=(8, 32, 32), spacing_mm=(3.0, 12.0, 12.0), nodules=0, dose=None)
    with tempfile.TemporaryDirectory() as place:
        ds = pydicom.dcmread(phantom_dicom.write_ct(getattr(made, "volume", made), place)[0])
    ds.PixelData = np.zeros(ds.Rows * ds.Columns, "int16").tobytes()
    for s in range(FILES // EACH):
        ds.SeriesInstanceUID = generate_uid(entropy_srcs=["scan", str(s)])
        for k in range(EACH):
            ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = f"{ds.SeriesInstanceUID[:50]}.{s}.{k}"
            ds.InstanceNumber, ds.ImagePositionPatient = k + 1, [*ds.ImagePositionPatient[:2], 3.0 * k]
            ds.save_as(folder / f"{s:03d}-{k:03d}.dcm")


def measure(repeats):
    """Rows of `compare`, and one with the memory."""
    from medimg.data.dicom import scan
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        make(folder)
        peers = {"SimpleITK GDCM": Peer(SITK), "dicom2nifti": Peer(D2N)} if peer_python() else {}
        rows = compare(f"scan of {FILES} files", lambda folder: scan(folder, progress=False), peers, repeats=repeats, folder=place) if peers else []
        for peer in peers.values():
            peer.close()
        done = subprocess.run([sys.executable, "-c", MEMORY, place], capture_output=True, text=True, check=True)
        series, files, mb = map(int, done.stdout.split())
        print(f"{series} series, {files} files, at most {mb} MB resident")
        return [*rows, {"what": "resident memory of scan", "files": files, "series": series, "mb": mb}]


if __name__ == "__main__":
    main(measure, __doc__)
