"""Figures of the lung chapter on cases that nothing was chosen on: python benchmarks/data/lungs.py [--update]

Phantoms of seeds 20 to 22 with six nodules each on the lungs' surface, at three doses; the real thorax CT; the chest box on fold 3 (the test fold)
of the radiographs with lung masks. --update writes results/lungs.json; each read of the test fold is counted in it.
"""
import ast
import datetime
import hashlib
import json
import re
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
OUT = ROOT / "results" / "lungs.json"


def chapter():
    """`wall_nodules` and `dice` as the chapter defines them: one definition, in the notebook."""
    from medimg.data import lungs, phantom, phantom_anatomy
    names = {"np": np, "LABELS": phantom.LABELS, "lung_distance": phantom_anatomy.lung_distance, **vars(lungs)}
    for cell in json.loads((ROOT / "nbs/data/06b_lungs.ipynb").read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "code" and re.search(r"^def (wall_nodules|dice)", source, re.M):
            wanted = [n for n in ast.parse(source).body if isinstance(n, ast.FunctionDef)]
            exec(compile(ast.Module(wanted, []), "06b_lungs.ipynb", "exec"), names)  # noqa: S102  our own notebook
    return names


def on_phantoms(seeds, doses=(1.0, 0.25, 0.1)):
    """Dice of both lungs and the share of the wall nodules' voxels inside, per seed and dose."""
    from medimg.data.lungs import segment_lungs
    from medimg.data.phantom import ct_noise, thorax_phantom
    tools, rows = chapter(), []
    for seed in seeds:
        case = thorax_phantom(seed, nodules=2, dose=None)
        hu, truth, masks = tools["wall_nodules"](case, seed=seed)
        for dose in doses:
            noise = ct_noise(hu, case.volume.spacing_mm, dose=dose, seed=seed)
            lungs = segment_lungs(case.volume.with_array(np.rint(hu + noise).astype(np.int16)))
            right, left = (round(float(tools["dice"](lungs == k, truth == k)), 4) for k in (1, 2))
            inside, total = int(sum((lungs > 0)[m].sum() for m in masks)), int(sum(m.sum() for m in masks))
            rows.append({"seed": seed, "dose": dose, "dice_right": right, "dice_left": left, "wall_nodule_voxels_inside": inside, "wall_nodule_voxels": total})
            print(rows[-1], flush=True)
    return rows


def on_real_ct():
    """Litres of both lungs and the share of the tumour inside; None without the data."""
    from medimg import config
    from medimg.data import dicom
    from medimg.data.annotations import read_rtstruct, structure_mask
    from medimg.data.lungs import segment_lungs
    folder = config.find_data("thorax_ct")
    if folder is None:
        return None
    volume = dicom.read(folder / "dicom")
    lungs = segment_lungs(volume)
    tumour = structure_mask(next(s for s in read_rtstruct(next((folder / "rtstruct").glob("*.dcm"))) if s.name.startswith("Tumor")), volume)
    litre = float(np.prod(volume.spacing_mm)) / 1e6
    return {"source": "TCIA 4D-Lung, patient 113_HM10395, CC BY 3.0 (Hugo 2016)", "right_l": round(float((lungs == 1).sum() * litre), 3),
            "left_l": round(float((lungs == 2).sum() * litre), 3), "tumour_share_inside": round(float(tumour[lungs > 0].sum() / tumour.sum()), 3)}


def on_radiographs(fold=3):
    """Share of the lungs' pixels that the chest box keeps, and its share of the image; None without the data."""
    from medimg import config
    from medimg.data.lungs import chest_box
    archive = config.find_data("cxr_lungs_256.npz")
    if archive is None:
        return None
    with np.load(archive, allow_pickle=False) as file:
        rows = np.flatnonzero(file["fold"] == fold)
        images, masks = file["images"][rows], file["masks"][rows] > 0

    def figures(boxes):
        kept, area = np.array([(m[b].sum() / m.sum(), m[b].size / m.size) for m, b in zip(masks, boxes)]).T
        return {"lung_pixels_kept": round(float(kept.mean()), 4), "worst": round(float(kept.min()), 4),
                "images_losing_over_2_percent": int((kept < 0.98).sum()), "area": round(float(area.mean()), 4)}
    return {"fold": fold, "images": len(rows), "chest_box": figures(map(chest_box, images)),
            "fixed_box": figures([(slice(12, 242), slice(16, 235))] * len(masks))}


if __name__ == "__main__":
    before = json.loads(OUT.read_text(encoding="utf-8")) if OUT.exists() else {}
    result = {"command": "python benchmarks/data/lungs.py --update", "date": datetime.date.today().isoformat(), "use": "research use, not a medical device",
              "module_sha256": hashlib.sha256((ROOT / "medimg/data/lungs.py").read_bytes()).hexdigest()[:16],
              "phantoms": on_phantoms((20, 21, 22)), "real_ct": on_real_ct(), "radiographs": on_radiographs(),
              "test_fold_reads": before.get("test_fold_reads", 0) + 1}
    print(json.dumps({k: v for k, v in result.items() if k != "phantoms"}, indent=1))
    if "--update" in sys.argv[1:]:
        from medimg.config import write_atomic
        write_atomic(OUT, json.dumps(result, indent=1) + "\n")
