"""How much of the text planted into images is removed: ≥ 500 strings of 12-32 px, rotated and JPEG-compressed ones among them.

    python benchmarks/data/deid_ocr.py --json results/deid_ocr.json          # about three minutes on 2 cores

Backgrounds: thorax CT (TCIA 4D-Lung, CC BY 3.0) where MEDIMG_DATA has it, pydicom's ultrasound and colour test files (MIT), the phantom's
radiograph, plain grey. A string counts as removed when at least 95 % of its ink lies under the black boxes. tests/test_deid_pixels.py runs a part of it.
"""
import argparse
import json
import math
from pathlib import Path

import numpy as np

SIZES, TURNS = (12, 32), (0, 1, 2, 3)
NAMES = ("DOE^JANE", "Roe, Richard", "MUELLER ANNA", "Smith J. 1961", "PATEL^R", "Garcia M", "Nguyen T. V.", "OKAFOR", "Ivanova A", "Sato Yuki")


def backgrounds(rng, film=None):
    """(name, image) pairs without end: stored values of real and made images, 2-D grey or RGB."""
    from pydicom import dcmread
    from pydicom.data import get_testdata_file
    from pydicom.pixels import pixel_array

    from medimg.config import find_data
    from medimg.data.phantom import radiograph, thorax_phantom
    folder = find_data("thorax_ct")
    slices = [pixel_array(dcmread(p)) for p in sorted(folder.glob("dicom/*.dcm"))[5:95:9]] if folder else []
    colour = [pixel_array(dcmread(get_testdata_file(f))) for f in ("examples_ybr_color.dcm", "examples_rgb_color.dcm", "SC_rgb_jpeg_gdcm.dcm")]
    colour = [a[0] if a.ndim == 4 else a for a in colour]
    colour = [a for a in colour if min(a.shape[:2]) >= 200]
    if film is None:
        film = radiograph(thorax_phantom(5, shape=(96, 160, 160), spacing_mm=(3.4, 2.2, 2.2)), size=768)[0].array[0]
    k = 0
    while True:
        kinds = [("flat", None), ("phantom radiograph", film)] + ([("thorax CT", slices[k % len(slices)])] * 2 if slices else []) \
            + ([("ultrasound and colour", colour[k % len(colour)])] if colour else [])
        name, image = kinds[k % len(kinds)]
        if image is None:
            level = rng.uniform(0, 4095)
            image = np.clip(rng.normal(level, rng.uniform(5, 120), (512, 512)), 0, 4095).astype("uint16")
        yield name, np.ascontiguousarray(image)
        k += 1


def drawn(text, size, rng):
    """The ink of a string, 0..1, in one of several fonts; `size` is the font's size in pixels (capitals are 0.72 of it)."""
    import cv2
    from matplotlib import get_data_path
    from PIL import Image, ImageDraw, ImageFont
    kind = int(rng.integers(6))
    if kind < 3:
        face = (cv2.FONT_HERSHEY_SIMPLEX, cv2.FONT_HERSHEY_DUPLEX, cv2.FONT_HERSHEY_COMPLEX)[kind]
        scale, thick = 0.72 * size / 21.0, 1 if size < 20 else 2
        (w, h), base = cv2.getTextSize(text, face, scale, thick)
        ink = np.zeros((h + base + 4, w + 4), "u1")
        cv2.putText(ink, text, (2, h + 2), face, scale, 255, thick, cv2.LINE_AA if rng.random() < 0.5 else cv2.LINE_8)
        return ink / 255.0
    face = ("DejaVuSans.ttf", "DejaVuSans-Bold.ttf", "DejaVuSansMono.ttf")[kind - 3]
    font = ImageFont.truetype(str(Path(get_data_path()) / "fonts" / "ttf" / face), size)
    left, top, right, bottom = font.getbbox(text)
    page = Image.new("L", (right - left + 4, bottom - top + 4))
    ImageDraw.Draw(page).text((2 - left, 2 - top), text, 255, font=font)
    return np.asarray(page) / 255.0


def plant(image, rng, *, strings=4, turn=0):
    """`image` with strings drawn into it, and for each its ink: (image, [{"ink": bool (y, x), "size", "turn"}])."""
    image, planted = image.copy(), []
    low, high = (float(v) for v in np.percentile(image, (1, 99)))
    high = max(high, low + 20)
    taken = np.zeros(image.shape[:2], bool)
    for _ in range(40 * strings):
        if len(planted) == strings:
            break
        size = int(rng.integers(SIZES[0], SIZES[1] + 1))
        ink = np.rot90(drawn(str(rng.choice(NAMES)) + (f" {rng.integers(1e4, 1e5)}" if rng.random() < 0.5 else ""), size, rng), turn)
        room = np.subtract(image.shape[:2], ink.shape)
        if (room < 1).any():
            continue
        y, x = (int(rng.integers(n)) for n in room)
        spot = np.s_[y:y + ink.shape[0], x:x + ink.shape[1]]
        if taken[max(0, y - 12):y + ink.shape[0] + 12, max(0, x - 12):x + ink.shape[1] + 12].any():
            continue
        local = image[spot].astype(float)
        info = (0, 255) if image.dtype == np.uint8 else (np.iinfo(image.dtype).min, np.iinfo(image.dtype).max)
        contrast, bright, dark = rng.uniform(0.3, 1.0) * (high - low), *np.percentile(local, (95, 5))      # over or under all around it
        value = bright + contrast if bright + contrast <= max(high + 0.3 * (high - low), info[1] if image.dtype == np.uint8 else 0) else dark - contrast
        if not info[0] <= value <= info[1]:
            continue                                    # no ink would show
        weight = ink if image.ndim == 2 else ink[..., None]
        image[spot] = np.clip(local * (1 - weight) + weight * value, *info).astype(image.dtype)
        taken[spot] = True
        mask = np.zeros(image.shape[:2], bool)
        mask[spot] = ink > 0.5
        planted.append({"ink": mask, "size": size, "turn": turn})
    return image, planted


def compressed(image, quality):
    """The image as JPEG leaves it, on a grey scale of 8 bits."""
    import cv2
    low, high = np.percentile(image, (0.05, 99.95))
    eight = image if image.dtype == np.uint8 else np.clip((image - low) / max(high - low, 1) * 255, 0, 255).astype("u1")
    return cv2.imdecode(cv2.imencode(".jpg", eight, [cv2.IMWRITE_JPEG_QUALITY, quality])[1], cv2.IMREAD_UNCHANGED)


def wilson(hits, n, z=1.959964):
    """The Wilson interval (95 %) of a share."""
    if not n:
        return [0.0, 1.0]
    p, d = hits / n, 1 + z * z / n
    middle, half = (p + z * z / (2 * n)) / d, z / d * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return [max(0.0, middle - half), min(1.0, middle + half)]


def measure(images=160, strings=4, seed=9, show=False, film=None):
    """Plant, clean, count: shares with intervals by group, and the area that images without text lose."""
    from medimg.data.deid_pixels import find_text, text_mask
    rng, rows, lost = np.random.default_rng(seed), [], []
    source = backgrounds(rng, film)
    for k in range(images):
        kind, image = next(source)
        jpeg, turn = k % 3 == 2, (0, 0, 0, 1, 0, 2, 0, 3)[k // 2 % 8]
        if k % 8 < 2 and kind in ("flat", "phantom radiograph", "thorax CT"):       # the colour files carry text of their own
            lost.append(float(text_mask(find_text(image), image.shape[:2]).mean()))
        marked, planted = plant(image, rng, strings=strings, turn=turn)
        marked = compressed(marked, int(rng.integers(50, 91))) if jpeg else marked
        gone = text_mask(find_text(marked), marked.shape[:2])
        for p in planted:
            share = float(gone[p["ink"]].mean())
            rows.append({"kind": kind, "jpeg": jpeg, "turned": p["turn"] > 0, "size": p["size"], "share": share, "removed": share >= 0.95})
            if show and share < 0.95:
                print(k, kind, "jpeg" if jpeg else "", "turn", p["turn"], "size", p["size"], f"{share:.2f}", flush=True)
    return summary(rows, lost, images, seed)


def summary(rows, lost, images, seed):
    """The rows as shares by group."""
    def group(chosen):
        hits = sum(r["removed"] for r in chosen)
        return {"removed": hits, "planted": len(chosen), "share": round(hits / max(1, len(chosen)), 4), "ci95": [round(v, 4) for v in wilson(hits, len(chosen))]}
    groups = {"all": rows, "rotated": [r for r in rows if r["turned"]], "jpeg": [r for r in rows if r["jpeg"]], "12-17 px": [r for r in rows if r["size"] < 18]}
    groups |= {kind: [r for r in rows if r["kind"] == kind] for kind in sorted({r["kind"] for r in rows})}
    return {"what": "planted strings of 12-32 px (font size) with at least 95 % of their ink under the boxes; 95 % Wilson interval", "images": images, "seed": seed,
            "groups": {name: group(chosen) for name, chosen in groups.items()}, "area_lost_without_text_mean": round(float(np.mean(lost)), 4),
            "images_without_text": len(lost)}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the result here as well")
    parser.add_argument("--images", type=int, default=160)
    parser.add_argument("--show", action="store_true", help="print each string that was missed")
    args = parser.parse_args()
    result = measure(args.images, show=args.show)
    print(json.dumps(result, indent=1))
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
