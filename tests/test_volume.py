"""Volume: geometry stays true, checked against SimpleITK and nibabel and by properties."""
import pickle

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from hypothesis import given, settings
from hypothesis import strategies as st

from medimg.data.volume import Volume, make_affine, orientation_of
from medimg.errors import ConfigError, GeometryError, MedimgError

CODES = [a + b + c for a in "SI" for b in "PA" for c in "LR"] + ["ASL", "LPS", "RSA", "PIR"]


def volume(shape=(6, 7, 8), spacing=(3.0, 0.8, 1.1), seed=0, origin=(-12.0, 30.0, -5.0), direction=None):
    array = np.random.default_rng(seed).normal(size=shape).astype("float32")
    return Volume(array, make_affine(spacing, origin, direction), modality="CT", units="HU")


def rotation(seed):
    q, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(3, 3)))
    return q if np.linalg.det(q) < 0 else -q      # (z, y, x) columns of a right-handed (x, y, z) frame have determinant -1


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(CODES), st.integers(0, 10**6))
def test_reorient_keeps_every_voxel_at_its_place(code, seed):
    before = volume(seed=seed)
    after = before.reorient(code)
    assert after.orientation == code
    index = np.random.default_rng(seed).integers(0, before.shape)
    moved = np.round(after.index(before.world(index))).astype(int)
    assert after.array[tuple(moved)] == before.array[tuple(index)]
    assert np.array_equal(after.reorient(before.orientation).array, before.array)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("new", [(1.5, 1.5, 1.5), (2.0, 0.8, 3.3)])
def test_resample_equals_simpleitk_on_the_same_grid(seed, new):
    source = volume(direction=rotation(seed), seed=seed)
    ours = source.resample(new)
    grid = sitk.Image(*map(int, ours.shape[::-1]), sitk.sitkFloat32)
    grid.SetSpacing(ours.spacing_mm[::-1])
    grid.SetOrigin(ours.origin_mm)
    grid.SetDirection(ours.direction[:, ::-1].ravel().tolist())
    theirs = sitk.GetArrayFromImage(sitk.Resample(source.to_sitk(), grid, sitk.Transform(), sitk.sitkLinear, 1e9))
    inside = theirs < 1e8                          # ITK has no value outside the voxel centres' box; we extend the edge
    assert inside.mean() > 0.3
    assert np.allclose(ours.array[inside], theirs[inside], atol=1e-4)


def test_sitk_and_nifti_agree_about_a_rotated_voxel(tmp_path):
    v = volume(direction=rotation(5))
    z, y, x = 4, 2, 6
    assert np.allclose(v.to_sitk().TransformIndexToPhysicalPoint((x, y, z)), v.world((z, y, x)))
    image = nib.load(v.to_nifti(tmp_path / "v.nii.gz"))
    assert np.allclose((image.affine @ (x, y, z, 1))[:3] * (-1, -1, 1), v.world((z, y, x)), atol=1e-4)
    back = Volume.from_nifti(tmp_path / "v.nii.gz")
    assert np.array_equal(back.array, v.array) and np.allclose(back.affine, v.affine, atol=1e-4)
    again = Volume.from_sitk(v.to_sitk())
    assert np.array_equal(again.array, v.array) and np.allclose(again.affine, v.affine)
    assert [p.name for p in tmp_path.iterdir()] == ["v.nii.gz"]


def test_sitk_reads_our_nifti_in_the_same_place(tmp_path):
    v = volume()
    theirs = sitk.ReadImage(str(v.to_nifti(tmp_path / "v.nii")))
    assert np.allclose(theirs.GetOrigin(), v.origin_mm) and np.allclose(theirs.GetSpacing(), v.spacing_mm[::-1])
    assert np.array_equal(sitk.GetArrayFromImage(theirs), v.array)


def test_crop_of_uneven_slices_keeps_places():
    v = Volume(np.arange(5.0).reshape(5, 1, 1), make_affine((1, 1, 1), (0, 0, 100)), slice_positions_mm=[0, 4, 8, 15, 19])
    part = v.crop(z=slice(2, 5))
    assert part.slice_positions_mm.tolist() == [0, 7, 11] and part.origin_mm == (0, 0, 108)


def test_regularize_recovers_a_linear_ramp():
    places = np.array([0, 1.5, 4, 7.25, 8])
    v = Volume((2 * places + 3).reshape(-1, 1, 1), slice_positions_mm=places)
    even = v.regularize(0.5)
    assert np.allclose(even.array.ravel(), 2 * np.arange(0, 8.01, 0.5) + 3, atol=1e-5)
    assert np.allclose(even.spacing_mm, (0.5, 1, 1)) and even.is_regular and v.regularize(0.5).regularize() is not v


def test_immutable_and_picklable():
    v = volume()
    with pytest.raises(AttributeError, match="immutable"):
        v.units = "raw"
    with pytest.raises(ValueError):
        v.array[0] = 1
    copy = pickle.loads(pickle.dumps(v))
    assert np.array_equal(copy.array, v.array) and np.array_equal(copy.affine, v.affine) and copy.units == "HU"


def test_the_caller_keeps_a_writable_array():
    array = np.zeros((2, 2, 2))
    Volume(array)
    array[0, 0, 0] = 1
    assert array[0, 0, 0] == 1


@pytest.mark.parametrize("bad", [np.zeros((4, 4)), np.full((4, 4), np.nan), np.eye(3)])
def test_unusable_affine_is_refused(bad):
    with pytest.raises(GeometryError, match="affine"):
        Volume(np.zeros((2, 2, 2)), bad)


@pytest.mark.parametrize("call, kind, word", [
    (lambda v: v.reorient("SPP"), ConfigError, "SPP"), (lambda v: v.reorient("XYZ"), ConfigError, "XYZ"),
    (lambda v: v.resample(0), ConfigError, "0"), (lambda v: v.window("lungs"), ConfigError, "lungs"),
    (lambda v: v.window(40, 0), ConfigError, "width"), (lambda v: v.crop(z=slice(9, 9)), GeometryError, "nothing"),
    (lambda v: v.with_array(np.zeros((1, 1, 1))), GeometryError, "(1, 1, 1)"), (lambda v: v.to_nifti("x.img"), ConfigError, "x.img")])
def test_bad_arguments_name_what_is_wrong(call, kind, word):
    with pytest.raises(kind) as caught:
        call(volume())
    assert word in str(caught.value)


def test_a_broken_nifti_is_a_typed_error(tmp_path):
    (tmp_path / "x.nii.gz").write_bytes(b"nothing")
    with pytest.raises(MedimgError, match="x.nii.gz"):
        Volume.from_nifti(tmp_path / "x.nii.gz")
    with pytest.raises(MedimgError, match="absent"):
        Volume.from_nifti(tmp_path / "absent.nii")


def test_orientation_of_oblique_axes_uses_each_world_axis_once():
    oblique = np.column_stack([(0.6, 0.0, 0.8), (0, 1, 0), (0.8, 0, -0.6)])
    assert sorted("LR".find(c) >= 0 for c in orientation_of(oblique)) == [False, False, True]


def test_display_uses_the_window_of_the_file():
    v = Volume(np.array([[[-1000, 40, 240]]]), meta={"window": (40, 400)})
    assert v.display().tolist() == [[[0, 128, 255]]]


def test_odd_nifti_files_are_typed_errors(tmp_path):
    import gzip
    good = volume().to_nifti(tmp_path / "good.nii")
    raw = bytearray(good.read_bytes())
    huge, kind, packed = bytearray(raw), bytearray(raw), bytearray(gzip.compress(bytes(raw)))
    huge[42:48] = (32767).to_bytes(2, "little") * 3                    # dim[1..3]
    kind[70:72] = (9999).to_bytes(2, "little")                         # datatype
    packed = packed[:len(packed) // 2]
    nan = volume().with_array(np.full((6, 7, 8), np.nan, "float32")).to_nifti(tmp_path / "nan.nii")
    nib.save(nib.Nifti1Image(np.zeros((3, 3, 3), "complex64"), np.eye(4)), tmp_path / "complex.nii")
    for name, data in (("huge.nii", huge), ("kind.nii", kind), ("packed.nii.gz", packed)):
        (tmp_path / name).write_bytes(data)
    for path in (nan, *(tmp_path / n for n in ("huge.nii", "kind.nii", "packed.nii.gz", "complex.nii"))):
        with pytest.raises(MedimgError) as caught:
            Volume.from_nifti(path)
        assert path.name in str(caught.value) and "\n" not in str(caught.value)


# ---- untilt, pad, another grid, planes and measures -----------------------------------------------------------------------------
def smooth(points):
    """A scalar field that is known everywhere in the world."""
    x, y, z = np.moveaxis(np.asarray(points), -1, 0)
    return np.sin(x / 17) + np.cos(y / 23) + z / 40


def grid_of(volume):
    return volume.world(np.moveaxis(np.indices(volume.shape[:3]), 0, -1).reshape(-1, 3)).reshape(*volume.shape[:3], 3)


@pytest.mark.parametrize("tilt", [-18.5, 12.0])
def test_untilt_keeps_the_field_in_its_place(tilt):
    affine = make_affine((3.0, 0.8, 0.8), (-5.0, 8.0, 20.0), rotation(1))
    affine[:3, 0] += affine[:3, 1] / 0.8 * np.tan(np.radians(tilt)) * 3.0
    leaning = Volume(np.zeros((12, 40, 30)), affine)
    leaning = leaning.with_array(smooth(grid_of(leaning)))
    upright = leaning.untilt(value=np.nan)
    assert abs(leaning.tilt_deg - abs(tilt)) < 1e-6 and upright.tilt_deg < 1e-6
    assert np.isclose(upright.spacing_mm[0], 3.0) and len(upright.array) == 12
    known = np.isfinite(upright.array)
    assert known.mean() > 0.6 and np.abs(upright.array - smooth(grid_of(upright)))[known].max() < 0.01
    assert abs(known.sum() - leaning.array.size) < 0.08 * leaning.array.size          # nothing but rims is lost
    assert np.allclose(upright.to_sitk().GetSpacing()[::-1], upright.spacing_mm)       # ITK takes it now


def test_untilt_of_uneven_slices_measures_along_the_normal():
    affine = make_affine((1.0, 1.0, 1.0))
    affine[:3, 0] = (0, np.sin(np.radians(20)), np.cos(np.radians(20)))
    v = Volume(np.zeros((4, 9, 9)), affine, slice_positions_mm=[0, 4, 8, 15]).untilt()
    assert np.allclose(v.slice_positions_mm, np.array([0, 4, 8, 15]) * np.cos(np.radians(20))) and v.tilt_deg < 1e-6


def test_untilt_leaves_an_upright_volume_alone():
    v = volume()
    assert v.untilt() is v


@pytest.mark.parametrize("seed", range(3))
def test_resample_to_equals_simpleitk(seed):
    sitk = pytest.importorskip("SimpleITK")
    moving, fixed = volume(seed=seed), volume((5, 9, 6), (2.0, 1.3, 0.9), origin=(-11.0, 31.5, -4.0), direction=rotation(seed))
    ours = moving.with_array(moving.array.astype("float64")).resample_to(fixed, value=-7)
    theirs = sitk.GetArrayFromImage(sitk.Resample(moving.to_sitk(), fixed.to_sitk(), sitk.Transform(), sitk.sitkLinear, -7.0, sitk.sitkFloat64))
    inside = np.all((moving.index(grid_of(fixed).reshape(-1, 3)) >= 0) & (moving.index(grid_of(fixed).reshape(-1, 3)) <= np.array(moving.shape) - 1), axis=1)
    assert inside.any() and np.allclose(ours.array.reshape(-1)[inside], theirs.reshape(-1)[inside], atol=1e-4)


def test_pad_keeps_places_and_crop_undoes_it():
    v = volume()
    padded = v.pad(z=(2, 1), y=3, x=(0, 4), value=5)
    assert np.allclose(padded.world((2, 3, 0)), v.world((0, 0, 0))) and padded.array[0, 0, 0] == 5
    back = padded.crop(slice(2, -1), slice(3, -3), slice(0, -4))
    assert np.array_equal(back.array, v.array) and np.allclose(back.affine, v.affine)
    with pytest.raises(GeometryError):
        v.pad(z=-1)


def test_an_oblique_plane_shows_the_field():
    v = Volume(np.zeros((30, 40, 40)), make_affine((2.0, 1.5, 1.5), (-30, -30, -30), rotation(2)))
    v = v.with_array(smooth(grid_of(v)))
    plane = v.reslice(v.world((15, 20, 20)), down=(0.2, 0.1, -1), right=(1, 0.5, 0), size_mm=(20, 24), spacing_mm=0.8)
    assert plane.shape == (1, 25, 30) and np.allclose(plane.spacing_mm, 0.8)
    assert np.abs(plane.array - smooth(grid_of(plane))).max() < 0.01
    with pytest.raises(GeometryError):
        v.reslice((0, 0, 0), (0, 0, 1), (0, 0, 2), size_mm=(5, 5))


def test_mip_lies_in_the_middle_of_the_slab():
    v = volume()
    for axis in range(3):
        m = v.mip(axis)
        assert np.array_equal(m.array, v.array.max(axis, keepdims=True))
        middle = (np.array(v.shape) - 1) / 2
        assert np.allclose(m.world((np.array(m.shape) - 1) / 2), v.world(middle))
        assert np.isclose(np.prod(m.spacing_mm) * m.array.size, np.prod(v.spacing_mm) * v.array.size)


def test_volume_in_ml_is_that_of_the_sheared_cell():
    affine = make_affine((3.0, 1.0, 1.0))
    affine[1, 0] = 1.0
    assert np.isclose(Volume(np.ones((10, 10, 10)), affine).volume_ml(), 3.0)
    with pytest.raises(GeometryError):
        volume().volume_ml(np.ones((2, 2, 2)))
