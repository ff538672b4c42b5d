"""Lungs against the phantom's truth at three doses and a real CT; the airway; the chest box against masks drawn by hand."""
import numpy as np
import pytest
from scipy import ndimage

from medimg.data import dicom
from medimg.data.lungs import LUNG_LABELS, _within, airway_mask, chest_box, segment_lungs
from medimg.data.phantom import LABELS, ct_noise, radiograph, thorax_phantom
from medimg.data.phantom_anatomy import draw_anatomy, lung_distance
from medimg.data.volume import Volume
from medimg.errors import DatasetError, GeometryError

SPACING = (4.0, 2.5, 2.5)


def dice(a, b):
    return 2 * (a & b).sum() / (a.sum() + b.sum())


@pytest.fixture(scope="module")
def person():
    """A phantom without noise whose wall carries six solid nodules, 7 to 20 mm: HU, truth (1 right, 2 left), nodules' parts inside the lung."""
    case = thorax_phantom(7, shape=(75, 144, 144), spacing_mm=SPACING, nodules=0, dose=None)
    v = case.volume
    z, y, x = np.ogrid[tuple(slice(n) for n in v.shape)]
    z, y, x = (o + k * s for o, k, s in zip(v.origin_mm[::-1], (z, y, x), SPACING))
    surface = lung_distance(case.anatomy, z, y, x)
    hu, masks, rng = v.array.astype(np.float32), [], np.random.default_rng(7)
    # on ribs and back, mediastinum, in front and above the diaphragm: directions from the middle of each lung
    for size, lung, way in ((20, -70, (0, 0.2, -1)), (17, 70, (0, 0.3, 1)), (14, -70, (0, 1, -0.2)), (12, 70, (0, -1, 0.3)), (9, -70, (1, 0.3, -0.5)), (7, 70, (0.4, 1, 0.2))):
        line = np.array([[20.0, 0.0, lung]]) + np.linspace(0, 150, 601)[:, None] * np.array(way) / np.linalg.norm(way)
        depth = size * rng.uniform(0.1, 0.4)
        centre = line[np.flatnonzero(lung_distance(case.anatomy, *line.T) < -depth)[-1]]
        r = np.sqrt((z - centre[0])**2 + (y - centre[1])**2 + (x - centre[2])**2)
        hu += np.clip(0.5 - (r - size / 2) / 2, 0, 1) * (35 - hu) * (surface < 1)
        masks.append((r < size / 2) & (surface < 0))
    inside = (surface < 0) & ~np.isin(case.labels, [LABELS[k] for k in ("airway", "bone", "heart")])
    return case, hu, np.where(inside, np.where(x < 0, 1, 2), 0), masks


@pytest.mark.parametrize("dose", [1.0, 0.25, 0.1])
def test_lungs_of_the_phantom(person, dose):
    case, hu, truth, masks = person
    scan = case.volume.with_array(np.rint(hu + ct_noise(hu, SPACING, dose=dose, seed=7)).astype(np.int16))
    lungs = segment_lungs(scan)
    scores = [dice(lungs == k, truth == k) for k in (1, 2)]
    inside = sum((lungs > 0)[m].sum() for m in masks) / sum(m.sum() for m in masks)
    print(f"dose {dose}: Dice {scores[0]:.4f} right, {scores[1]:.4f} left; wall nodules {inside:.1%} inside")
    assert min(scores) >= 0.97 and inside >= 0.95
    assert (lungs > 0)[airway_mask(scan)].mean() == 0
    if dose == 0.1:
        without = segment_lungs(scan, closing_mm=0)
        assert sum((without > 0)[m].sum() for m in masks) < 0.1 * sum(m.sum() for m in masks)       # the closing is what keeps them


@pytest.mark.parametrize("step", [(1.5, 1.5, 1.5), (3.0, 1.4, 1.4), (0.6, 1.2, 1.9)])
@pytest.mark.parametrize("shape", [(40, 33, 57), (3, 1, 9)])
def test_ball_is_that_of_the_distances(step, shape):
    """Grown by any radius as scipy's exact distances say, also where the ball is larger than the array."""
    dots = np.random.default_rng(0).random(shape) > 0.95
    dots.flat[0] = True
    for radius in (0.3, 1.5, 3.0, 4.9, 22.0):
        assert np.array_equal(_within(dots, step, radius), ndimage.distance_transform_edt(~dots, sampling=step) <= radius)


@pytest.fixture(scope="module")
def small():
    return thorax_phantom(4, shape=(50, 112, 112), spacing_mm=(6, 3.2, 3.2), nodules=0)


def test_sides_follow_the_affine(small):
    lungs = segment_lungs(small.volume)
    for code in ("IPL", "SAR", "ASL"):
        turned = small.volume.reorient(code)
        assert np.array_equal(small.volume.with_array(lungs).reorient(code).array, segment_lungs(turned))
    middle = [np.argwhere(lungs == k).mean(0) for k in (LUNG_LABELS["lung_right"], LUNG_LABELS["lung_left"])]
    assert small.volume.world(middle[0])[0] < -30 and small.volume.world(middle[1])[0] > 30


def test_lungs_that_touch_are_parted(small):
    """A bridge of air in front of the heart ties both lungs into one piece."""
    array = small.volume.array.copy()
    apart = segment_lungs(small.volume)
    z = 30
    rows = np.flatnonzero((apart[z] == 1).any(1) & (apart[z] == 2).any(1))
    y = rows[len(rows) // 3]
    right, left = np.flatnonzero(apart[z, y] == 1).max(), np.flatnonzero(apart[z, y] == 2).min()
    array[z - 1:z + 2, y - 1:y + 2, min(right, left) - 2:max(right, left) + 3] = -850
    joined = small.volume.with_array(array)
    pieces, _ = ndimage.label(array < -400)
    assert pieces[z, y, min(right, left)] == pieces[z, y, max(right, left)] > 0
    lungs = segment_lungs(joined)
    assert all(dice(lungs == k, apart == k) > 0.97 for k in (1, 2))


def test_one_lung_alone(small):
    """The left lung filled with fluid: the right one is found on the right side, and nothing is called left."""
    array = small.volume.array.copy()
    array[segment_lungs(small.volume) == 2] = 20
    lungs = segment_lungs(small.volume.with_array(array))
    assert (lungs == 1).sum() > 10_000 and (lungs == 2).sum() < 0.02 * (lungs == 1).sum()


def test_airway_is_in_the_truth():
    case = thorax_phantom(3, shape=(75, 144, 144), spacing_mm=SPACING, nodules=0, dose=0.25)
    airway = airway_mask(case.volume)
    lung = np.isin(case.labels, [LABELS["lung_right"], LABELS["lung_left"]])
    assert airway.sum() > 0.4 * (case.labels == LABELS["airway"]).sum() and (airway & lung).sum() < 0.2 * airway.sum()
    below = case.volume.crop(z=slice(0, 34))                             # cut below the carina: no windpipe, a bubble in the stomach
    assert not airway_mask(below).any() and dice(segment_lungs(below) > 0, segment_lungs(case.volume)[:34] > 0) > 0.93


def test_refusals(small):
    with pytest.raises(DatasetError, match="HU"):
        segment_lungs(small.volume.with_array(small.volume.array, units="raw"))
    for array in (np.zeros(small.volume.shape, np.int16), np.full(small.volume.shape, -1000, np.int16)):
        with pytest.raises(DatasetError, match="no lungs"):
            segment_lungs(small.volume.with_array(array))
    uneven = Volume(np.zeros((3, 40, 40)), units="HU", slice_positions_mm=[0, 3, 7])
    with pytest.raises(GeometryError):
        segment_lungs(uneven)


def test_lungs_of_a_real_ct(data_root):
    """TCIA 4D-Lung: both lungs, apart, two to seven litres together."""
    v = dicom.read(data_root / "thorax_ct" / "dicom")
    lungs = segment_lungs(v)
    litres = [(lungs == k).sum() * np.prod(v.spacing_mm) / 1e6 for k in (1, 2)]
    print("litres:", np.round(litres, 3))
    assert 2 < sum(litres) < 7 and min(litres) > 0.5
    assert (ndimage.binary_dilation(lungs == 1) & (lungs == 2)).sum() < 1e-3 * (lungs > 0).sum()
    assert all(ndimage.label(lungs == k)[1] < 60 for k in (1, 2))
    assert v.world(np.argwhere(lungs == 1).mean(0))[0] < v.world(np.argwhere(lungs == 2).mean(0))[0]


# ---- radiographs ---------------------------------------------------------------------------------------------------------------
def test_chest_box_on_hand_drawn_masks(data_root):
    """Montgomery and Shenzhen, every third image of folds 0 to 2 (the figures for fold 3 are in results/lungs.json)."""
    with np.load(data_root / "cxr_lungs" / "cxr_lungs_256.npz", allow_pickle=False) as file:
        rows = np.flatnonzero(file["fold"] < 3)[::3]
        images, masks = file["images"][rows], file["masks"][rows] > 0
    kept, area = np.array([(m[b].sum() / m.sum(), m[b].size / m.size) for m, b in zip(masks, map(chest_box, images))]).T
    print(f"{len(rows)} images: {kept.mean():.4f} of the lungs in {area.mean():.3f} of the image")
    assert kept.mean() > 0.99 and area.mean() < 0.72 and (kept < 0.95).mean() < 0.03


def test_chest_box_scales_with_the_image():
    image = radiograph(draw_anatomy(3), size=256)[0].array[0]
    boxes = [chest_box(image[::k, ::k]) for k in (1, 2, 4)]
    for box, k in zip(boxes, (1, 2, 4)):
        assert all(abs(a.start - b.start * k) < 8 and abs(a.stop - b.stop * k) < 8 for a, b in zip(boxes[0], box))


@pytest.mark.parametrize("image", [np.zeros((64, 64)), np.random.default_rng(0).normal(size=(64, 40)), np.tile(np.arange(64.0), (64, 1))])
def test_chest_box_of_anything_is_inside(image):
    y, x = chest_box(image)
    assert 0 <= y.start < y.stop <= image.shape[0] and 0 <= x.start < x.stop <= image.shape[1] and image[y, x].size > 0.25 * image.size


def test_chest_box_refuses():
    for image in (np.zeros((8, 8)), np.zeros((64, 64, 3))):
        with pytest.raises(DatasetError, match="radiograph"):
            chest_box(image)
