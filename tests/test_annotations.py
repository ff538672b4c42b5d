"""Contours, structure sets, segmentations and boxes: against independent fills, published volumes, highdicom, and round trips."""
import json

import numpy as np
import pydicom
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medimg.data.annotations import Structure, read_rtstruct, structure_mask, write_rtstruct
from medimg.data.boxes import Box, box_iou, box_mask, box_of, read_boxes
from medimg.data.contours import mask_contours, polygon_cover, slice_cover
from medimg.data.dicom import read, scan
from medimg.data.phantom import LABELS, thorax_phantom
from medimg.data.phantom_dicom import write_ct
from medimg.data.segmentations import read_seg, write_seg
from medimg.data.volume import Volume, make_affine
from medimg.errors import ConfigError, DatasetError, DicomError, GeometryError, MedimgError


def star(seed, n=9, size=20.0, center=12.0):
    """A polygon without self-crossings."""
    rng = np.random.default_rng(seed)
    angle = np.sort(rng.uniform(0, 2 * np.pi, n))
    radius = rng.uniform(0.2, 0.55, n) * size
    return center + np.column_stack([radius * np.sin(angle), radius * np.cos(angle)])


def shoelace(p):
    q = np.roll(p, -1, axis=0)
    return abs(np.sum(p[:, 0] * q[:, 1] - p[:, 1] * q[:, 0])) / 2


def dice(a, b):
    return 2 * (a & b).sum() / max(a.sum() + b.sum(), 1)


# ---- contours ------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("seed", range(6))
def test_cover_equals_a_fine_fill_by_skimage(seed):
    from skimage.draw import polygon2mask
    points, fine = star(seed), 40
    samples = polygon2mask((26 * fine, 26 * fine), (points + 0.5) * fine - 0.5).reshape(26, fine, 26, fine).mean((1, 3))
    cover = polygon_cover(points, (26, 26))
    assert np.abs(cover - samples).max() < 0.03 and np.isclose(cover.sum(), shoelace(points), atol=1e-9)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000), dy=st.floats(-30, 30), dx=st.floats(-30, 30), reverse=st.booleans())
def test_cover_is_local_and_blind_to_direction(seed, dy, dx, reverse):
    """A polygon that leaves the image is cut at its border: the cover equals that on a larger image, cropped."""
    points = star(seed) + (dy, dx)
    small = polygon_cover(points[::-1] if reverse else points, (24, 20))
    large = polygon_cover(points + 100, (230, 230))[100:124, 100:120]
    assert np.allclose(small, large, atol=1e-9) and 0 <= small.min() and small.max() <= 1


def test_tiny_and_huge_polygons():
    assert np.isclose(polygon_cover([(0, 0), (0, 1e-3), (1e-3, 0)], (3, 3)).sum(), 5e-7)
    assert np.allclose(polygon_cover([(-1e6, -1e6), (-1e6, 1e6), (1e6, 1e6), (1e6, -1e6)], (5, 4)), 1)
    for bad in ([(0, 0), (1, 1)], [(0, 0), (0, np.nan), (1, 1)], [(0, 0), (0, 1e12), (1, 1)]):
        with pytest.raises(GeometryError):
            polygon_cover(bad, (4, 4))


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_mask_to_contour_to_mask(seed):
    from scipy.ndimage import binary_closing, gaussian_filter
    mask = binary_closing(gaussian_filter(np.random.default_rng(seed).normal(size=(28, 31)), 1.6) > 0.05)
    assert np.array_equal(slice_cover(mask_contours(mask), mask.shape) > 0.499, mask)


def test_a_hole_in_a_hole():
    y, x = np.mgrid[0:40, 0:40]
    rings = (np.hypot(y - 20, x - 20).astype(int) // 4) % 2 == 0
    assert np.array_equal(slice_cover(mask_contours(rings), rings.shape) > 0.499, rings)


# ---- structure sets ------------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def case():
    return thorax_phantom(5, shape=(20, 96, 96), spacing_mm=(12.0, 3.6, 3.6), nodules=2)


@pytest.fixture(scope="module")
def series(case, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ct")
    write_ct(case.volume, folder, seed=5)
    return scan(folder, progress=False).images[0]


@pytest.fixture(scope="module")
def truth(case):
    return {"lung_right": case.labels == LABELS["lung_right"], "lung_left": case.labels == LABELS["lung_left"], "nodule 1": case.nodule_mask(0)}


def test_real_structures_have_the_reference_volumes(data_root):
    reference = json.loads((data_root / "reference.json").read_text())["thorax_ct"]["rois"]
    ct = read(data_root / "thorax_ct" / "dicom")
    structures = read_rtstruct(next((data_root / "thorax_ct" / "rtstruct").glob("*.dcm")))
    assert structures.names == list(reference) and structures.series_uid == ct.meta["series_uid"]
    for s in structures:
        assert len(s.contours) == reference[s.name]["contours"]
        assert ct.volume_ml(structure_mask(s, ct)) == pytest.approx(reference[s.name]["planar_volume_ml"], rel=0.01)


def test_round_trip_on_the_real_ct(data_root, tmp_path):
    """Mask, RTSTRUCT, mask at 3 mm slices: Dice at least 0.98 for each real structure."""
    files = scan(data_root / "thorax_ct" / "dicom", progress=False).images[0]
    ct = read(files)
    masks = {s.name: structure_mask(s, ct) >= 0.5 for s in read_rtstruct(next((data_root / "thorax_ct" / "rtstruct").glob("*.dcm")))}
    again = read_rtstruct(write_rtstruct(masks, files, tmp_path / "rs.dcm"))
    for s in again:
        assert dice(structure_mask(s, ct) >= 0.5, masks[s.name]) >= 0.98, s.name


def test_round_trip_of_structures_with_parts_and_holes(series, truth, tmp_path):
    ct = read(series)
    again = read_rtstruct(write_rtstruct(truth, series, tmp_path / "rs.dcm", kinds={"nodule 1": "GTV"}))
    assert again.names == list(truth) and again["nodule 1"].kind == "GTV" and again.series_uid == series.series_uid
    for s in again:
        mask = structure_mask(s, ct) >= 0.5
        assert dice(mask, truth[s.name]) > 0.995, s.name
    raw = pydicom.dcmread(tmp_path / "rs.dcm")
    sop = {pydicom.dcmread(f, stop_before_pixels=True).SOPInstanceUID for f in series.files}
    named = {c.ContourImageSequence[0].ReferencedSOPInstanceUID for r in raw.ROIContourSequence for c in r.ContourSequence}
    assert named <= sop
    write_rtstruct(truth, series, tmp_path / "again.dcm", kinds={"nodule 1": "GTV"})
    assert (tmp_path / "rs.dcm").read_bytes() == (tmp_path / "again.dcm").read_bytes()


@pytest.mark.parametrize("tilt, uneven", [(0.0, True), (18.5, False), (18.5, True)])
def test_contours_on_tilted_and_uneven_slices(tilt, uneven):
    """A box drawn slice by slice in the patient covers the same rows and columns whatever the slices do."""
    affine = make_affine((1.0 if uneven else 4.0, 0.5, 0.8), (-10, -20, 5))
    affine[:3, 0] += (0, np.tan(np.radians(tilt)) * affine[2, 0], 0)
    where = np.array([0, 4.2, 8.4, 9.5, 16.9]) if uneven else None
    if uneven:
        affine[:3, 0] /= np.linalg.norm(affine[:3, 0])
    grid = Volume(np.zeros((5, 60, 40)), affine, slice_positions_mm=where)
    corners = np.array([(10.25, 7.5), (10.25, 20.5), (30.5, 20.5), (30.5, 7.5)])
    contours = [np.column_stack([np.full(4, where[k] if uneven else k), corners]) @ affine[:3, :3].T + affine[:3, 3] for k in range(1, 4)]
    mask = structure_mask(Structure("box", tuple(contours)), grid)
    assert np.allclose(mask.sum((1, 2)), [0, *[20.25 * 13] * 3, 0], atol=0.01)
    assert np.isclose(mask[2, 10, 10], 0.25, atol=1e-3) and np.isclose(mask[2, 30, 10], 1.0, atol=1e-3)


@pytest.mark.parametrize("seed", range(3))
def test_volume_does_not_depend_on_the_grid(seed):
    from scipy.spatial.transform import Rotation
    turn = np.linspace(0, 2 * np.pi, 90, endpoint=False)
    contours = tuple(np.column_stack([r * np.cos(turn), r * np.sin(turn), np.full(90, z)])
                     for z in np.arange(-15, 16, 3.0) for r in (np.sqrt(18**2 - z**2),))
    ml = sum(shoelace(c[:, :2]) for c in contours) * 3 / 1000
    grid_affine = make_affine((2.2, 2.0, 1.7), direction=Rotation.random(random_state=seed).as_matrix())
    grid_affine[:3, 3] = -grid_affine[:3, :3] @ (14, 15, 18)
    grid = Volume(np.zeros((29, 31, 37), bool), grid_affine)
    assert grid.volume_ml(structure_mask(Structure("ball", contours), grid)) == pytest.approx(ml, rel=0.01)


def test_what_cannot_be_filled_says_so(tmp_path):
    grid, line = Volume(np.zeros((3, 9, 9))), np.array([(0, 0, 0), (1, 0, 0), (2, 2, 0.0)])
    with pytest.raises(GeometryError, match="not outlines"):
        structure_mask(Structure("line", (line,), is_closed=False), grid)
    with pytest.raises(GeometryError, match="outside the image"):
        structure_mask(Structure("far", (line + 500,)), grid)
    with pytest.raises(GeometryError, match="flat"):
        structure_mask(Structure("bent", (np.array([(0, 0, 0), (4, 0, 2), (4, 4, 0), (0, 4, 2.0)]),)), grid)
    assert structure_mask(Structure("empty", ()), grid).sum() == 0


def damaged(tmp_path, source, change):
    ds = pydicom.dcmread(source)
    change(ds)
    ds.save_as(tmp_path / "bad.dcm")
    return tmp_path / "bad.dcm"


@pytest.mark.parametrize("change", [
    lambda ds: setattr(ds.ROIContourSequence[0].ContourSequence[0], "ContourData", ["1", "2"]),
    lambda ds: setattr(ds.ROIContourSequence[0].ContourSequence[0], "ContourData", ["1e30", "2", "3"] * 3),
    lambda ds: delattr(ds.StructureSetROISequence[0], "ROINumber"),
    lambda ds: setattr(ds, "Modality", "CT") or delattr(ds, "ROIContourSequence"),
], ids=["two numbers", "far away", "no number", "a CT"])
def test_damaged_structure_sets_are_typed_errors(series, truth, tmp_path, change):
    good = write_rtstruct(truth, series, tmp_path / "rs.dcm")
    with pytest.raises(DicomError) as error:
        read_rtstruct(damaged(tmp_path, good, change))
    assert "bad.dcm" in str(error.value)


def test_a_structure_without_contours_stays(series, truth, tmp_path):
    good = write_rtstruct({**truth, "nothing": np.zeros_like(truth["nodule 1"])}, series, tmp_path / "rs.dcm")
    assert read_rtstruct(good)["nothing"].contours == ()
    with pytest.raises(ConfigError, match="lung_right"):
        read_rtstruct(good)["Heart"]


# ---- segmentations -------------------------------------------------------------------------------------------------------------
def test_seg_read_by_highdicom_is_what_we_wrote(series, truth, tmp_path):
    import highdicom as hd
    seg = hd.seg.segread(write_seg(truth, series, tmp_path / "seg.dcm", algorithm=("phantom truth", "1")))
    uids = [pydicom.dcmread(f, stop_before_pixels=True).SOPInstanceUID for f in series.files]
    pixels = seg.get_pixels_by_source_instance(uids, ignore_spatial_locations=True, assert_missing_frames_are_empty=True)
    assert np.array_equal(pixels.astype(bool), np.stack(list(truth.values()), -1))
    assert [seg.get_segment_description(n).segment_label for n in seg.segment_numbers] == list(truth)


def test_seg_written_by_highdicom_is_read(series, truth, tmp_path):
    ours = read_seg(write_seg(truth, series, tmp_path / "seg.dcm"), read(series))
    alone = read_seg(tmp_path / "seg.dcm")
    for name, mask in truth.items():
        assert np.array_equal(ours[name].array, mask)
        own = alone[name]          # only the slices that are not empty, at their own places
        at = np.round(read(series).index(own.world((0, 0, 0)))).astype(int)
        assert np.array_equal(own.array, mask[at[0]:at[0] + len(own.array)]) and own.array.sum() == mask.sum()


def test_seg_on_a_tilted_uneven_series(data_root, tmp_path):
    """The GE head CT: the masks come back on its own slices, where a resampled volume would be wrong."""
    series = max(scan(data_root / "dicom_qa_ct" / "GE", progress=False).images, key=lambda s: len(s.files))
    ct = read(series)
    assert not ct.is_regular
    mask = ct.array > 300
    back = read_seg(write_seg({"tissue": mask}, series, tmp_path / "seg.dcm"), ct)["tissue"]
    assert np.array_equal(back.array, mask) and np.allclose(back.slice_positions_mm, ct.slice_positions_mm)
    again = structure_mask(read_rtstruct(write_rtstruct({"bone": mask}, series, tmp_path / "rs.dcm"))["bone"], ct)
    assert dice(again > 0.499, mask) > 0.98


def test_seg_refusals(series, truth, tmp_path):
    with pytest.raises(GeometryError, match="shape"):
        write_seg({"lung": np.ones((2, 3, 4), bool)}, series, tmp_path / "a.dcm")
    with pytest.raises(DicomError, match="empty"):
        write_seg({"lung": np.zeros_like(truth["nodule 1"])}, series, tmp_path / "a.dcm")
    with pytest.raises(ConfigError, match="code"):
        write_seg({"thing": truth["nodule 1"]}, series, tmp_path / "a.dcm")
    assert not (tmp_path / "a.dcm").exists()
    good = write_seg(truth, series, tmp_path / "seg.dcm").read_bytes()
    for k, length in enumerate((0, 140, 2000, len(good) // 2)):
        (tmp_path / "cut.dcm").write_bytes(good[:length])
        with pytest.raises(MedimgError, match="cut.dcm"):
            read_seg(tmp_path / "cut.dcm")
    with pytest.raises(DicomError, match="not a segmentation"):
        read_seg(series.files[0])


# ---- boxes ---------------------------------------------------------------------------------------------------------------------
@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 20), st.integers(0, 20), st.integers(1, 12), st.integers(1, 12)), min_size=2, max_size=2))
def test_iou_equals_the_overlap_of_masks(pair):
    boxes = [Box(y, x, y + h, x + w) for y, x, h, w in pair]
    a, b = (box_mask(box, (40, 40)) > 0.5 for box in boxes)
    assert np.isclose(box_iou(boxes[:1], boxes[1:])[0, 0], (a & b).sum() / (a | b).sum())
    assert np.array_equal(box_of(a).edges, boxes[0].edges)


@pytest.mark.parametrize("header, row", [("image,x,y,width,height,label", "a.png,3,2,4,5,mass"), ("image,x1,y1,x2,y2,label", "a.png,3,2,7,7,mass"),
                                         ("file,xmin,ymin,xmax,ymax,class", "a.png,3,2,7,7,mass"), ("image,x0,y0,x1,y1,label", "a.png,3,2,7,7,mass"),
                                         ("Image Index,Finding Label,Bbox [x,y,w,h]", "a.png,mass,3,2,4,5"), ("patientId,x,y,width,height,Target", "a.png,3,2,4,5,mass")])
def test_known_tables(tmp_path, header, row):
    (tmp_path / "b.csv").write_text(f"{header}\n{row}\n")
    (box,) = read_boxes(tmp_path / "b.csv", size=(10, 12))["a.png"]
    assert box.edges.tolist() == [2, 3, 7, 7] and box.label == "mass" and box.size == (10, 12)


def test_the_nih_table(data_root):
    boxes = read_boxes(data_root / "nih_cxr" / "BBox_List_2017.csv", size=(1024, 1024))
    assert len(boxes) == 880 and sum(map(len, boxes.values())) == 984          # as published (Wang 2017)


def test_bad_tables_name_the_lines(tmp_path):
    path = tmp_path / "b.csv"
    path.write_text("image,x,y,width,height\na.png,1,2,3,4\nb.png,1,2,-3,4\n,1,2,3,4\nc.png,1,two,3,4\n")
    with pytest.raises(DatasetError, match="3 rows.*line 3.*line 4.*line 5"):
        read_boxes(path)
    path.write_text("name,left\n")
    with pytest.raises(DatasetError, match="no column for"):
        read_boxes(path)
    for content in (b"", b"\xff\xfe\x00"):
        path.write_bytes(content)
        with pytest.raises(DatasetError):
            read_boxes(path)
