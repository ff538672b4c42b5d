"""De-identification of 99 CT slices (0.5 MB each, MEDIMG_DATA/thorax_ct; else a phantom series): files a second, without the search for burnt-in text.

    python benchmarks/data/deidentify.py [--json FILE] [--repeats 7]

The peer is the usual pydicom loop, which does far less: it reads a file, removes private tags, blanks names, dates and UIDs with a callback, and saves it.
Budget: at least 200 files a second on 2 cores, files warm, output on disk.
"""
import shutil
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from sidebyside import Peer, compare, main  # noqa: E402

LOOP = """
import pydicom, pathlib, shutil, tempfile
def blank(ds, element):
    if element.VR in ("PN", "DA", "TM", "DT", "LO", "SH"):
        element.value = ""
    elif element.VR == "UI" and not str(element.value).startswith("1.2.840.10008"):
        element.value = pydicom.uid.generate_uid(entropy_srcs=[str(element.value)])
def run(source):
    target = tempfile.mkdtemp()
    for path in sorted(pathlib.Path(source).glob("*.dcm")):
        ds = pydicom.dcmread(path)
        ds.remove_private_tags()
        ds.walk(blank)
        ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID
        ds.save_as(pathlib.Path(target) / path.name)
    shutil.rmtree(target)
"""


def slices():
    """The folder of slices."""
    from medimg.config import find_data
    from medimg.data.phantom import thorax_phantom
    from medimg.data.phantom_dicom import write_ct
    if found := find_data("thorax_ct"):
        return found / "dicom"
    folder = Path(tempfile.mkdtemp())
    write_ct(thorax_phantom(1, shape=(99, 512, 512), spacing_mm=(3, 0.7, 0.7)).volume, folder)
    return folder


def ours(source):
    """One run into an empty folder, which is removed again."""
    from medimg.data.deid_profile import Pseudonyms
    from medimg.data.deidentify import deidentify_folder
    target = Path(tempfile.mkdtemp())
    deidentify_folder(source, target / "out", key=Pseudonyms(b"a key for the benchmark, 32 b..."), progress=False)
    shutil.rmtree(target)


def measure(repeats):
    """One row: ours against the loop, in seconds for all files."""
    source = slices()
    count = len(list(Path(source).glob("*.dcm")))
    peer = Peer(LOOP, python=sys.executable)
    rows = compare(f"de-identify {count} CT slices", ours, {"pydicom loop (blanks, no profile)": peer}, repeats=repeats, source=str(source))
    peer.close()
    start = time.process_time()
    ours(str(source))
    busy = time.process_time() - start
    print(f"{count / rows[0]['ours_s']:.0f} files a second; the loop {count / rows[0]['peer_s']:.0f}; {count / busy:.0f} files for a second of processor time")
    return [{**row, "files_per_s": count / row["ours_s"], "files_per_cpu_s": count / busy} for row in rows]


if __name__ == "__main__":
    main(measure, __doc__.splitlines()[0])
