"""Every DICOM file that the package writes: dciodvfy finds no error, Orthanc stores and draws it, SimpleITK and highdicom open it."""
import subprocess

import numpy as np
import pydicom
import pytest

from medimg.data.annotations import write_rtstruct
from medimg.data.phantom import LABELS, radiograph, thorax_phantom
from medimg.data.phantom_dicom import write_ct, write_radiograph
from medimg.data.segmentations import write_seg


def check_file(path, tool, orthanc):
    """dciodvfy says no error, and Orthanc stores the file with the same identity and draws its picture."""
    said = subprocess.run([tool("dciodvfy"), str(path)], capture_output=True, text=True, timeout=60)
    errors = [line for line in (said.stdout + said.stderr).splitlines() if line.startswith("Error")]
    assert not errors, f"{path.name}: " + "\n".join(errors)
    tags, picture = orthanc(path)
    header = pydicom.dcmread(path, stop_before_pixels=True)
    assert tags["SOPInstanceUID"] == header.SOPInstanceUID and tags["SeriesInstanceUID"] == header.SeriesInstanceUID
    assert picture > (100 if header.Modality == "SEG" else 500) or "Rows" not in header, f"{path.name}: Orthanc draws nothing"
    return header


@pytest.fixture(scope="module")
def case():
    return thorax_phantom(3, shape=(12, 96, 96), spacing_mm=(20.0, 3.6, 3.6), nodules=2)


def test_ct(case, tool, orthanc, tmp_path):
    import SimpleITK as sitk
    files = write_ct(case.volume, tmp_path, seed=3)
    for path in files[::4]:
        assert check_file(path, tool, orthanc).Modality == "CT"
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(tmp_path)))
    image = reader.Execute()
    assert np.array_equal(sitk.GetArrayFromImage(image), np.round(case.volume.array))
    assert np.allclose(image.GetSpacing()[::-1], case.volume.spacing_mm, atol=1e-4)


def test_radiograph(case, tool, orthanc, tmp_path):
    image, _ = radiograph(case, size=256)
    assert check_file(write_radiograph(image, tmp_path / "dx.dcm", seed=3), tool, orthanc).Modality == "DX"


@pytest.fixture(scope="module")
def truth(case):
    return {"lung_right": case.labels == LABELS["lung_right"], "nodule 1": case.nodule_mask(0), "nodule 2": case.nodule_mask(1)}


def test_structure_set(case, truth, tool, orthanc, tmp_path):
    write_ct(case.volume, tmp_path / "ct", seed=3)
    assert check_file(write_rtstruct(truth, tmp_path / "ct", tmp_path / "rs.dcm"), tool, orthanc).Modality == "RTSTRUCT"


@pytest.mark.parametrize("shares", [False, True], ids=["binary", "fractional"])
def test_segmentation(case, truth, tool, orthanc, tmp_path, shares):
    """SimpleITK shows the frames of one segment where we put them."""
    import SimpleITK as sitk
    write_ct(case.volume, tmp_path / "ct", seed=3)
    masks = {"lung_right": truth["lung_right"].astype("float32" if shares else bool)}
    path = write_seg(masks, tmp_path / "ct", tmp_path / "seg.dcm", algorithm=("phantom truth", "1"))
    assert check_file(path, tool, orthanc).Modality == "SEG"
    pixels = sitk.GetArrayFromImage(sitk.ReadImage(str(path)))
    kept = truth["lung_right"].any((1, 2))
    assert np.array_equal(pixels > 0, truth["lung_right"][kept]) or np.array_equal(pixels > 0, truth["lung_right"][kept][::-1])
