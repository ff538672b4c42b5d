"""Augmentation against SciPy, Fourier transforms and properties: geometry, truth that follows, replay, and the twins in Keras and tf.data."""
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage, stats

from medimg.data import augment, augment3d
from medimg.data import augment_grey as grey
from medimg.data.augment import Affine, Compose, Crop, Elastic, Flip, Mixup, Sample, Warp, apply_steps, generator, replay
from medimg.data.volume import Volume, make_affine
from medimg.errors import ConfigError, DatasetError

FLAT, DEEP = (40, 52), (12, 30, 26)
MM = {2: (0.8, 1.3), 3: (3.0, 1.2, 0.9)}


def smooth(shape, seed=0):
    image = ndimage.gaussian_filter(np.random.default_rng(seed).standard_normal(shape), 2)
    return (image / image.std()).astype(np.float32)


def turn(angles, shape, *, scale=1.0, shift=0.0, fill="edge", spacing=None):
    params = {"rotate_deg": list(angles), "scale": scale, "translate_mm": [shift] * len(shape), "fill": fill, "min_visible": 0.3}
    return {"name": "Affine", "params": params}, Affine.warp(params, shape, spacing or (1.0,) * len(shape))


# ---- geometry against SciPy ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("shape,angles", [(FLAT, [17.0]), (DEEP, [12.0, -9.0, 20.0]), (DEEP, [25.0, 0.0, 0.0])])
@pytest.mark.parametrize("fill", ["edge", -3.0])
def test_affine_is_scipys(shape, angles, fill):
    step, warp = turn(angles, shape, scale=1.1, shift=1.7, fill=fill, spacing=MM[len(shape)])
    sample = Sample(smooth(shape), MM[len(shape)], mask=(smooth(shape) > 0.5).astype(np.uint8))
    out, d = apply_steps(sample, [step]), len(shape)
    mode = {"mode": "nearest"} if fill == "edge" else {"mode": "grid-constant" if d == 2 else "constant", "cval": fill}
    expected = ndimage.affine_transform(sample.image, warp.matrix[:d, :d], warp.matrix[:d, d], order=1, **mode)
    apart = abs(out.image - expected)
    if fill == "edge":
        assert apart.max() < 1e-3
    else:       # a voxel exactly on the edge may fall to either side
        assert (apart > 1e-3).mean() < 3e-3
    labels = ndimage.affine_transform(sample.mask, warp.matrix[:d, :d], warp.matrix[:d, d], order=0, mode=mode["mode"])
    assert (out.mask != labels).mean() < 3e-3


@pytest.mark.parametrize("shape", [FLAT, DEEP])
@pytest.mark.parametrize("tilt", [0.0, 11.0])
def test_elastic_is_scipys(shape, tilt):
    d = len(shape)
    step, first = turn([tilt] * (1 if d == 2 else 3), shape, spacing=MM[d])
    bend = {"name": "Elastic", "params": Elastic(control_mm=12, max_mm=4).draw(generator(3), shape, MM[d])}
    out = apply_steps(Sample(smooth(shape), MM[d], mask=(smooth(shape) > 0.5).astype(np.int16)), [step, bend])
    field = Elastic.warp(bend["params"], shape, MM[d]).field
    points = np.stack(np.meshgrid(*[np.arange(n, dtype=float) for n in shape], indexing="ij"), -1).reshape(-1, d)
    bent = points + field.at(points)
    source = bent @ first.matrix[:d, :d].T + first.matrix[:d, d]
    expected = ndimage.map_coordinates(smooth(shape), source.T, order=1, mode="nearest").reshape(shape)
    assert abs(out.image - expected).max() < 1e-3 and abs(field.at(points)).max() > 1
    labels = ndimage.map_coordinates((smooth(shape) > 0.5).astype(np.int16), source.T, order=0, mode="nearest").reshape(shape)
    assert (out.mask != labels).mean() < 0.002 and out.mask.dtype == np.int16


def test_the_bspline_is_scipys():
    """A field along one axis against SciPy's own B-splines (an independent implementation of the basis)."""
    from scipy.interpolate import BSpline
    control = np.random.default_rng(0).standard_normal(9)
    at = np.linspace(0, 6, 50)
    assert np.allclose(augment3d.bspline_rows(at, 9) @ control, BSpline(np.arange(-3, 10), control, 3)(at), atol=1e-12)


def test_patches_of_a_slice_join(monkeypatch):
    """A volume too tall for OpenCV's 16 bits is sampled in parts, with the same result."""
    sample, steps = Sample(smooth(DEEP), MM[3]), [turn([5.0, 40.0, 70.0], DEEP, spacing=MM[3])[0]]
    whole = apply_steps(sample, steps).image
    monkeypatch.setattr(augment3d, "_LONGEST", 4 * DEEP[1])
    assert abs(apply_steps(sample, steps).image - whole).max() < 1e-3


@pytest.mark.parametrize("shape,axes", [((30, 30), (0, 1)), ((9, 30, 30), (1, 2))])
def test_quarter_turns_are_exact(shape, axes):
    image = np.random.default_rng(0).random(shape).astype(np.float32)
    for quarter in (1, 2, 3):
        out = apply_steps(Sample(image, (1.0,) * len(shape)), [turn([90.0 * quarter] + [0.0] * (len(shape) - 2) * 2, shape)[0]])
        assert (out.image == np.rot90(image, quarter, axes)).all()


@settings(max_examples=40, deadline=None)
@given(st.sampled_from([(7, 9), (7, 9, 3), (4, 7, 9)]), st.lists(st.integers(0, 2), max_size=3, unique=True), st.integers(0, 3))
def test_flips_are_exact(shape, axes, start):
    d = 2 if shape[-1] == 3 else len(shape)
    axes = [a for a in axes if a < d]
    image, mask = np.random.default_rng(1).random(shape).astype(np.float32), np.random.default_rng(2).integers(0, 5, shape[:d]).astype("uint8")
    steps = [{"name": "Flip", "params": {"axes": axes, "swap": [], "follow": False}},
             {"name": "Crop", "params": {"start": [start] * d, "shape": [3] * (d - 1) + [4]}}]
    if d == 3 and start > 1:
        steps[1]["params"]["start"][0] = 1
    out = apply_steps(Sample(image, (1.0,) * d, mask=mask), steps)
    cut = tuple(slice(s, s + n) for s, n in zip(steps[1]["params"]["start"], steps[1]["params"]["shape"]))
    assert (out.image == np.flip(image, axes)[cut]).all() and (out.mask == np.flip(mask, axes)[cut]).all()


def test_a_chain_is_one_interpolation():
    """Turning forth and back in one chain gives the image itself; in two goes it is blurred."""
    forth, back = turn([20.0], FLAT)[0], turn([-20.0], FLAT)[0]
    image = np.random.default_rng(0).random(FLAT).astype(np.float32)
    once, twice = apply_steps(Sample(image), [forth, back]), replay(Sample(image), [[forth], [back]])
    inner = (slice(12, -12),) * 2
    assert abs(once.image - image)[inner].max() < 1e-3 < 0.1 < abs(twice.image - image)[inner].max()


@pytest.mark.parametrize("order", ["bend first", "bend last"])
def test_a_chain_equals_its_steps(order):
    """Fused and step by step agree on where a landmark goes, also when a second interpolation is unavoidable."""
    steps = [turn([10.0, 5.0, -8.0], DEEP, scale=1.1, spacing=MM[3])[0],
             {"name": "Elastic", "params": Elastic(control_mm=14, max_mm=3).draw(generator(1), DEEP, MM[3])},
             {"name": "Flip", "params": {"axes": [0, 2], "swap": [], "follow": False}},
             {"name": "Crop", "params": {"start": [2, 3, 4], "shape": [8, 20, 18]}}]
    steps = [steps[1], steps[0], *steps[2:]] if order == "bend first" else steps
    points = np.array([[5.0, 14, 12], [6.5, 10, 15]])
    sample = Sample(smooth(DEEP), MM[3], points=points)
    fused, apart = apply_steps(sample, steps), replay(sample, [[s] for s in steps])
    assert np.allclose(fused.points, apart.points, atol=1e-3)
    assert np.corrcoef(fused.image.ravel(), apart.image.ravel())[0, 1] > 0.98


# ---- truth follows -------------------------------------------------------------------------------------------------------------
def blob(shape, centre, spacing, radius_mm=3.0):
    axes = np.meshgrid(*[(np.arange(n) - c) * mm for n, c, mm in zip(shape, centre, spacing)], indexing="ij")
    return np.exp(-sum(a**2 for a in axes) / (2 * radius_mm**2)).astype(np.float32)


CHAINS = [[Affine(rotate_deg=25, scale=0.15, translate_mm=3)], [Elastic(control_mm=14, max_mm=4)],
          [Flip(x=1, y=1, laterality="free"), Affine(rotate_deg=15), Elastic(control_mm=16, max_mm=4)], [Affine(rotate_deg=30), Flip(y=1)]]


@pytest.mark.parametrize("chain", CHAINS)
@pytest.mark.parametrize("shape,centre", [((60, 60), (31.0, 27.0)), ((20, 40, 40), (10.0, 21.0, 18.0))])
def test_a_landmark_follows_its_blob(chain, shape, centre):
    for seed in range(3):
        spacing = MM[len(shape)]
        sample = Sample(blob(shape, centre, spacing), spacing, points=[centre])
        out = Compose(chain)(sample, generator(seed))
        weights = np.where(out.image > 0.3, out.image, 0)
        found = ndimage.center_of_mass(weights)
        assert (abs(np.subtract(found, out.points[0])) * spacing < 0.8).all()


@pytest.mark.parametrize("chain", CHAINS)
def test_a_box_holds_its_mask(chain):
    for seed in range(6):
        mask = np.zeros((80, 90), np.uint8)
        mask[30:44, 40:60] = 1
        out = Compose(chain)(Sample(mask, MM[2], mask=mask, boxes=[[30, 40, 44, 60]], box_labels=["a"]), generator(seed))
        rows, columns = np.nonzero(out.mask)
        found = np.array([rows.min(), columns.min(), rows.max() + 1, columns.max() + 1])
        assert (out.boxes[0][:2] <= found[:2] + 0.75).all() and (out.boxes[0][2:] >= found[2:] - 0.75).all(), "the box misses a part"
        turned = np.prod(out.boxes[0][2:] - out.boxes[0][:2]) / np.prod(found[2:] - found[:2])
        assert turned < 1.35 and list(out.box_labels) == ["a"]


def test_boxes_are_clipped_and_dropped():
    boxes, labels = [[0, 0, 10, 10], [0, 12, 10, 20], [2, 7, 4, 17]], ["cut", "gone", "part"]
    out = apply_steps(Sample(np.zeros((20, 20)), boxes=boxes, box_labels=labels), [{"name": "Crop", "params": {"start": [0, 4], "shape": [20, 8]}}])
    assert out.boxes.tolist() == [[0, 0, 10, 6], [2, 3, 4, 8]] and list(out.box_labels) == ["cut", "part"]
    none = apply_steps(Sample(np.zeros((20, 20)), boxes=np.zeros((0, 4))), [turn([5.0], (20, 20))[0]])
    assert none.boxes.shape == (0, 4)


def test_world_positions():
    """A crop keeps every voxel at its place in the patient; a rotation turns the patient by that angle, in millimetres."""
    affine = make_affine((4, 1, 1), (-20.0, -30.0, 100.0))
    volume = Volume(blob((16, 50, 50), (7, 30, 20), (4, 1, 1)), affine, modality="CT", units="HU")
    sample = Sample.of(volume, points=[(7, 30, 20)])
    cut = apply_steps(sample, [{"name": "Crop", "params": {"start": [3, 11, 5], "shape": [10, 32, 30]}}])
    assert np.allclose(cut.volume(volume).world(cut.points[0]), volume.world((7, 30, 20)))
    assert np.unravel_index(cut.image.argmax(), cut.shape) == (4, 19, 15) and cut.volume(volume).units == "HU"
    turned = apply_steps(sample, [turn([90.0, 0, 0], volume.shape, spacing=(4, 1, 1))[0]])
    centre = volume.world((np.array(volume.shape) - 1) / 2)
    before, after = volume.world((7, 30, 20)) - centre, turned.volume(volume).world(turned.points[0]) - centre
    assert np.allclose(after, [before[1], -before[0], before[2]]) and np.isclose(np.linalg.norm(after), np.linalg.norm(before))
    tipped = apply_steps(sample, [turn([0, 0, 40.0], volume.shape, spacing=(4, 1, 1))[0]])
    assert np.isclose(np.linalg.norm(volume.world(tipped.points[0]) - centre), np.linalg.norm(before))
    assert np.allclose(tipped.affine, affine)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32 - 1), st.floats(0, 0.4))
def test_nothing_folds(seed, share):
    """The Jacobian determinant stays positive up to the largest displacement that is allowed."""
    field = augment3d.draw_field((10, 24, 24), (3, 1.5, 1.5), control_mm=10, max_mm=10 * share, seed=seed)
    points = np.stack(np.meshgrid(*[np.arange(n, dtype=float) for n in (10, 24, 24)], indexing="ij"), -1)
    source = points + field.at(points.reshape(-1, 3)).reshape(points.shape)
    assert np.linalg.det(np.moveaxis(np.array([np.gradient(source[..., i]) for i in range(3)]), (0, 1), (-2, -1))).min() > 0
    with pytest.raises(ConfigError, match="fold"):
        augment3d.draw_field((10, 24, 24), (3, 1.5, 1.5), control_mm=10, max_mm=4.1, seed=seed)


# ---- laterality ----------------------------------------------------------------------------------------------------------------
def test_left_and_right():
    image, mask = np.random.default_rng(0).random((6, 8)), np.repeat([[1, 1, 1, 0, 0, 2, 2, 3]], 6, 0).astype(np.uint8)
    with pytest.raises(ConfigError, match="left and right"):
        Flip(x=0.01)(Sample(image, side="left"), generator(0))
    out = Flip(x=1, laterality="swap", swap=((1, 2),))(Sample(image, mask=mask, side="left"), generator(0))
    assert out.side == "right" and out.mask[0].tolist() == [3, 1, 1, 0, 0, 2, 2, 2]
    assert Flip(x=1, laterality="free")(Sample(image, side="left"), generator(0)).side == "left"
    assert Flip(y=1)(Sample(image, side="left"), generator(0)).side == "left"
    twice = replay(Sample(image, mask=mask, side="left"), [*out.history, *out.history])
    assert twice.side == "left" and (twice.mask == mask).all()


def test_the_affine_knows_where_left_is():
    sagittal = Volume(np.zeros((4, 5, 6)), make_affine((1, 1, 1))).reorient("LSA")
    with pytest.raises(ConfigError, match="along z"):
        Flip(z=1)(Sample.of(sagittal), generator(0))
    assert Flip(x=1)(Sample.of(sagittal), generator(0)).shape == sagittal.shape
    with pytest.raises(ConfigError, match="reorient"):
        Flip(z=1, laterality="swap")(Sample.of(sagittal), generator(0))


# ---- seeds and replay ----------------------------------------------------------------------------------------------------------
EVERYTHING = [Flip(y=0.5), Affine(rotate_deg=10, scale=0.1, translate_mm=2, p=0.8), Elastic(control_mm=16, max_mm=4), grey.Noise((0.1, 0.2)),
              grey.Blur((0.5, 1.5)), grey.Gamma(), grey.Contrast(p=0.5), grey.LowResolution((2, 4)), grey.BiasField(), grey.Ghosting(), grey.Spike(),
              grey.Cutout(2, (3, 9)), Crop((24, 24))]


@pytest.mark.parametrize("shape", [(30, 32), (30, 32, 3), (10, 30, 32), (6, 30, 32, 2)])
def test_replay_is_bit_equal(shape):
    d = 2 if len(shape) == 2 or shape[-1] == 3 and len(shape) == 3 else 3
    steps = [*EVERYTHING[:-1], Crop((24, 24) if d == 2 else (5, 24, 24))]
    sample = Sample(np.random.default_rng(0).random(shape), MM[d], mask=np.zeros(shape[:d], np.uint8), points=[[3.0] * d], boxes=[[2.0] * d + [9.0] * d])
    for seed in range(4):
        out = Compose(steps)(sample, generator(seed))
        again = replay(sample, json.loads(json.dumps(out.history)))
        assert (again.image == out.image).all() and (again.mask == out.mask).all() and (again.points == out.points).all()
        assert (again.boxes == out.boxes).all() and out.image.dtype == np.float32 and np.isfinite(out.image).all()
        assert out.image.shape[d:] == shape[d:]


def test_seeds_do_not_depend_on_order():
    chain, images = Compose(EVERYTHING), {k: np.random.default_rng(ord(k)).random((30, 32)) for k in "abcd"}
    one = {k: chain(Sample(images[k]), generator(9, 2, k)).image for k in "abcd"}
    other = {k: chain(Sample(images[k]), generator(9, 2, k)).image for k in "dbca"}
    assert all((one[k] == other[k]).all() for k in "abcd")
    assert (chain(Sample(images["a"]), generator(9, 3, "a")).image != one["a"]).any()


def test_the_chance_of_one_step_does_not_change_the_next():
    sample = Sample(np.random.default_rng(0).random((30, 32)))
    drawn = [{s["name"]: s["params"] for s in Compose([Affine(rotate_deg=9, p=p), grey.Gamma()]).draw(generator(1), sample.shape, (1, 1))} for p in (0.0, 1.0)]
    assert "Affine" not in drawn[0] and drawn[0]["Gamma"] == drawn[1]["Gamma"]


def test_settings_survive_json():
    chain = Compose([Flip(x=0.5, laterality="swap", swap=((1, 2),)), *EVERYTHING, grey.Dose()])
    again = Compose(json.loads(json.dumps(chain.to_list())))
    assert again.steps == chain.steps
    for wrong, word in (([{"name": "Elastik"}], "Elastic"), ([{"name": "Affine", "rotate": 3}], "rotate_deg"), ([{}], "unknown")):
        with pytest.raises(ConfigError, match=word):
            Compose(wrong)


def test_a_dict_goes_in_and_out():
    out = Compose([Crop((4, 4))])({"image": np.zeros((8, 8)), "mask": np.ones((8, 8), np.uint8), "label": 3}, generator(0))
    assert out["label"] == 3 and out["image"].shape == out["mask"].shape == (4, 4) and len(out["history"]) == 1


@pytest.mark.parametrize("wrong", [
    lambda: Affine(rotate_deg=200), lambda: Affine(scale=1), lambda: Affine(fill="black"), lambda: Elastic(8, 4), lambda: Flip(x=2), lambda: Flip(laterality="no"),
    lambda: Affine(p=True), lambda: grey.Noise(sd=(0, "a")), lambda: grey.Cutout(fill="black"), lambda: grey.LowResolution(axes="t"), lambda: grey.Ghosting(axis="t"),
    lambda: grey.Dose((0, 1)), lambda: Mixup(0), lambda: Crop((9, 9))(Sample(np.zeros((8, 8))), generator(0)), lambda: Crop((2, 2))(Sample(np.zeros((5, 5, 5))), generator(0)),
    lambda: Flip(z=1)(Sample(np.zeros((8, 8))), generator(0)), lambda: grey.Dose()(Sample(np.zeros((8, 8))), generator(0)),
    lambda: augment3d.draw_field((900, 900), (1, 1), control_mm=0.2, max_mm=0)])
def test_wrong_settings_are_refused(wrong):
    with pytest.raises(ConfigError) as caught:
        wrong()
    assert caught.value.remedy


@pytest.mark.parametrize("parts", [{"mask": np.zeros((3, 3), np.uint8)}, {"spacing_mm": (1, 0)}, {"spacing_mm": (1,)}, {"box_labels": ["a"]}])
def test_parts_that_do_not_fit(parts):
    with pytest.raises(DatasetError):
        Sample(np.zeros((4, 4)), **parts)


# ---- grey values ---------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("shape,sigma", [(FLAT, (1.2, 0.7)), (DEEP, (0.6, 1.5, 2.0)), (DEEP, (0.0, 1.0, 1.0))])
def test_blur_is_scipys(shape, sigma):
    image = np.random.default_rng(0).random(shape).astype(np.float32)
    assert abs(grey.gaussian(image, sigma) - ndimage.gaussian_filter(image, sigma, mode="nearest")).max() < 1e-5
    coloured = np.stack([image, 1 - image], -1)
    assert abs(grey.gaussian(coloured, sigma)[..., 1] - ndimage.gaussian_filter(1 - image, sigma, mode="nearest")).max() < 1e-5


def test_noise_is_normal_and_white():
    fields = [grey.normal_noise((200, 300), seed).ravel() for seed in (0, 1, 2, 2**32 - 1)]
    for field in fields:
        assert stats.kstest(field, "norm").pvalue > 1e-3 and abs(field[1:] @ field[:-1]) / len(field) < 4 / np.sqrt(len(field))
    assert abs(np.corrcoef(fields) - np.eye(4)).max() < 4 / np.sqrt(fields[0].size)


def test_ghosts_are_lines_of_k_space():
    image = np.random.default_rng(0).random((48, 20))
    for period in (2, 3, 4, 6):
        lines = np.fft.fft(image, axis=0) * (1 + 0.4 * np.cos(2 * np.pi * np.arange(48) / period))[:, None]
        out = grey.Ghosting.apply(Sample(image), {"period": period, "strength": 0.4, "axis": "y"}).image
        assert abs(out - np.fft.ifft(lines, axis=0).real).max() < 1e-5


def test_a_spike_is_one_point_of_k_space():
    image = smooth(FLAT)
    out = grey.Spike.apply(Sample(image), {"amplitude": 0.5, "cycles": [5, -7], "phase": 1.0}).image
    power = abs(np.fft.fft2(out - image))
    found = {tuple(int(i) for i in p) for p in np.argwhere(power > power.max() / 100)}
    assert found == {(5, FLAT[1] - 7), (FLAT[0] - 5, 7)} and np.isclose((out - image).max(), 0.5 * image.std(), rtol=0.02)


def test_bias_field_is_its_polynomial():
    rng, shape = generator(4), (20, 30, 25)
    params = grey.BiasField(0.5).draw(rng, shape, (1, 1, 1))
    out = grey.BiasField.apply(Sample(np.ones(shape), (1, 1, 1)), params).image
    axes = np.meshgrid(*[np.linspace(-1, 1, n) for n in shape], indexing="ij")
    exact = np.exp(sum(c * axes[0]**p[0] * axes[1]**p[1] * axes[2]**p[2] for c, p in zip(params["coefficients"], params["powers"])))
    assert abs(out / exact - 1).max() < 0.05 and exact.max() / exact.min() > 1.2


def test_gamma_contrast_cutout_low_resolution():
    image = np.linspace(-3, 5, 60).reshape(6, 10)
    out = grey.Gamma.apply(Sample(image), {"gamma": 1.7}).image
    assert np.allclose(out, -3 + 8 * ((image + 3) / 8) ** 1.7, atol=1e-5) and np.isclose(out.min(), -3) and np.isclose(out.max(), 5)
    assert (grey.Gamma.apply(Sample(np.ones((3, 3))), {"gamma": 2.0}).image == 1).all()
    out = grey.Contrast.apply(Sample(image), {"gain": 1.3, "lift": 0.5}).image
    assert np.allclose(out, image.mean() + 1.3 * (image - image.mean()) + 0.5 * image.std(), atol=1e-5)
    out = grey.Cutout.apply(Sample(image), {"boxes": [[[1, 2], [3, 5]]], "fill": 9.0}).image
    assert (out[1:3, 2:5] == 9).all() and (out == 9).sum() == 6
    thick = grey.LowResolution((6, 6), axes="z").draw(generator(0), (12, 8, 8), (2, 1, 1))
    assert thick == {"coarse": [4, 8, 8]}
    volume = np.random.default_rng(0).random((12, 8, 8)).astype(np.float32)
    out = grey.LowResolution.apply(Sample(volume, (2, 1, 1)), thick).image
    assert np.allclose(out[[1, 4, 7, 10]], volume.reshape(4, 3, 8, 8).mean(1), atol=1e-5)     # the middle of each thick slice is its mean


def test_dose_follows_the_phantoms_scanner():
    """SD by region against the phantom's ray-by-ray noise, calibrated to the same water; coloured like it; twice the noise at a quarter of the dose."""
    from medimg.data.phantom import ct_noise, thorax_phantom
    y, x = np.mgrid[-180:180:3, -180:180:3]
    water = np.where(y**2 + x**2 < 150**2, 0, -1000).astype(np.float32)[None]
    reference = float(ct_noise(water, (3, 3, 3), dose=1, seed=1)[0, 50:70, 50:70].std())
    ours = grey.Dose.apply(Sample(water, (3, 3, 3)), {"dose": 0.5, "seed": 2, "reference_sd_hu": reference}).image - water
    assert 0.8 < ours[0, 50:70, 50:70].std() / reference < 1.25
    case = thorax_phantom(5, shape=(10, 120, 120), spacing_mm=(3, 3, 3), nodules=0, dose=None, table=False)
    hu = case.volume.array.astype(np.float32)
    theirs = ct_noise(hu, (3, 3, 3), dose=1, seed=3)
    ours = grey.Dose.apply(Sample(hu, (3, 3, 3)), {"dose": 0.5, "seed": 4, "reference_sd_hu": reference}).image - hu
    for region in ((hu < -700) & (hu > -950), (hu > -150) & (hu < 150)):
        assert 0.7 < ours[region].std() / theirs[region].std() < 1.4
    spectra = [abs(np.fft.fft2(n)).mean(0) for n in (theirs, ours)]
    assert all(s[1:4, 1:4].mean() < 0.6 * s[12:20, 12:20].mean() for s in spectra)      # both lack low frequencies
    quarter = grey.Dose.apply(Sample(hu, (3, 3, 3)), {"dose": 0.2, "seed": 4, "reference_sd_hu": reference}).image - hu
    assert np.allclose(quarter, 2 * ours, atol=0.05)


@settings(max_examples=20, deadline=None)
@given(st.integers(2, 9), st.floats(0.05, 2), st.integers(0, 10**6))
def test_mixup_blends_labels_as_images(n, alpha, seed):
    x, y = np.random.default_rng(seed).random((n, 4, 4, 1)), np.eye(n)
    params = Mixup(alpha).draw(generator(seed), n)
    mixed, labels = Mixup.apply(x, y, json.loads(json.dumps(params)))
    assert np.allclose(labels.sum(1), 1, atol=1e-6) and labels[np.arange(n), np.arange(n)].min() >= 0.5 - 1e-6
    assert np.allclose(mixed, np.tensordot(labels, x, 1), atol=1e-5)


# ---- Keras and tf.data ---------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def batch():
    x = np.random.default_rng(0).random((5, 24, 24, 1)).astype(np.float32)
    return x, (x[..., 0] > 0.5).astype(np.uint8)


def test_tf_map_is_the_numpy_chain(batch):
    import tensorflow as tf

    from medimg.data.augment_layers import augment_dataset
    x, mask = batch
    chain, names = Compose([Affine(rotate_deg=20), grey.Noise((0.1, 0.1)), Crop((16, 16))]), np.array(list("abcde"))
    rows = tf.data.Dataset.from_tensor_slices({"image": x, "mask": mask, "id": names, "label": np.arange(5)})
    flow = augment_dataset(rows, chain, seed=4, epochs=2)
    assert flow.element_spec["image"].shape == (16, 16, 1) and flow.element_spec["mask"].shape == (16, 16) and len(flow) == 10
    for k, element in enumerate(flow):
        i, epoch = k % 5, k // 5
        out = chain(Sample(x[i], (1, 1), mask=mask[i]), generator(4, epoch, names[i]))
        assert (element["image"].numpy() == out.image).all() and (element["mask"].numpy() == out.mask).all() and element["label"] == i
    pairs = augment_dataset(tf.data.Dataset.from_tensor_slices((x, np.arange(5))), chain, seed=4)
    image, label = next(iter(pairs))
    assert label == 0 and (image.numpy() == chain(Sample(x[0], (1, 1)), generator(4, 0, 0)).image).all()
    with pytest.raises(ConfigError, match="two shapes"):
        augment_dataset(rows, [Crop((16, 16), p=0.5)])


def test_keras_layer(batch, tmp_path):
    import keras

    from medimg.data.augment_layers import augment_layer
    x, mask = batch
    layer = augment_layer([Affine(rotate_deg=20), Crop((16, 16))], seed=2)
    moved, labels = layer((x, mask), training=True)
    assert moved.shape == (5, 16, 16, 1) and labels.shape == (5, 16, 16) and labels.dtype == "uint8"
    expected = Compose(layer.chain.to_list())(Sample(x[3], (1, 1), mask=mask[3]), generator(2, 1, 3))
    assert (moved[3].numpy() == expected.image).all() and (labels[3].numpy() == expected.mask).all()
    model = keras.Sequential([keras.Input((24, 24, 1)), augment_layer([Affine(rotate_deg=20)], seed=1), keras.layers.Flatten(), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    model.fit(x, np.ones(5), epochs=2, verbose=0)
    assert int(model.layers[0].calls) == 2
    model.save(tmp_path / "m.keras")
    again = keras.models.load_model(tmp_path / "m.keras")
    assert again.layers[0].get_config()["chain"] == model.layers[0].get_config()["chain"]
    assert np.allclose(again.predict(x, verbose=0), model.predict(x, verbose=0)) and (model.layers[0](x).numpy() == x).all()


def test_warps_can_be_made_by_hand():
    """The public `Warp` alone: a shear by one row a column, on voxels."""
    image = np.arange(12.0).reshape(3, 4)
    sheared = Warp(np.array([[1, 1, 0], [0, 1, 0], [0, 0, 1.0]]), (3, 4)).apply(Sample(image)).image
    assert np.allclose(sheared[0], [0, 5, 10, 11])
    assert augment.move_boxes(np.zeros((0, 4)), Warp(np.eye(3), (3, 4)))[0].shape == (0, 4)
