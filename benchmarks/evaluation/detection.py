"""Average precision and FROC beside MONAI's: python benchmarks/evaluation/detection.py

Not a timing. Both sides get the boxes, points and scores that tests/test_detection_metrics.py makes from seeds; printed are MONAI's numbers, which that test holds, and ours.
MONAI's FROC leaves the lowest score of all out of its curve (as CAMELYON16's program does), so the last mark never counts there: it is given one more false alarm below all others.
"""
import json
import subprocess
import sys
from pathlib import Path

import numpy as np

sys.path[:0] = [str(Path(__file__).resolve().parents[k]) for k in (1, 2)] + [str(Path(__file__).resolve().parents[2] / "tests")]
import sidebyside  # noqa: E402

PEER = """
import json, sys
import numpy as np
from monai.apps.detection.metrics.coco import COCOMetric
from monai.apps.detection.metrics.matching import matching_batch
from monai.data.box_utils import box_iou
from monai.metrics import compute_froc_curve_data, compute_froc_score
asked = json.loads(sys.stdin.read())
out = {}
for name, images in asked["boxes"].items():
    metric = COCOMetric(classes=["lesion"], iou_list=[0.3, 0.5], max_detection=[100])
    columns = [[np.array(image[k], float).reshape(-1, 4) if k != 1 else np.array(image[k], float) for image in images] for k in (0, 1, 2)]
    ignore = [np.array(image[3]) for image in images]
    result = matching_batch(box_iou, metric.iou_thresholds, pred_boxes=columns[0], pred_classes=[np.zeros(len(s), int) for s in columns[1]], pred_scores=columns[1],
                            gt_boxes=columns[2], gt_classes=[np.zeros(len(b), int) for b in columns[2]], gt_ignore=ignore, max_detections=100)
    scores = metric(result)[0]
    out[name] = [scores["AP_IoU_0.30_MaxDet_100"], scores["AP_IoU_0.50_MaxDet_100"]]
for name, (hits, alarms, lesions, scans) in asked["froc"].items():
    curve = compute_froc_curve_data(np.array(alarms), np.array(hits), lesions, scans)
    out[name] = float(compute_froc_score(*curve, eval_thresholds=(0.125, 0.25, 0.5, 1, 2, 4, 8)))
print(json.dumps(out))
"""


def main():
    """Ask MONAI and print both."""
    if sidebyside.peer_python() is None:
        raise SystemExit("MONAI is not installed. Remedy: make bench-peers, or MEDIMG_BENCH_PYTHON=/path/to/python")
    import test_detection_metrics as tests

    from medimg.evaluation.detection import sensitivities
    from medimg.evaluation.precision import average_precision, match_boxes
    boxes, scans = tests.box_cases(), tests.froc_cases()
    froc = {}
    for name, parts in scans.items():
        hits, alarms = (np.concatenate([np.asarray(part[k], float) for part in parts]) for k in (0, 1))
        froc[name] = [hits[np.isfinite(hits)].tolist(), [*alarms.tolist(), -99.0], len(hits), len(parts)]
    asked = {"boxes": {name: [[np.asarray(v).tolist() for v in image] for image in images] for name, images in boxes.items()}, "froc": froc}
    done = subprocess.run([sidebyside.peer_python(), "-W", "ignore", "-c", PEER], input=json.dumps(asked), capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    theirs = json.loads(done.stdout)
    ours = {name: [average_precision([match_boxes(b, s, t, least_iou=x, counted=~np.asarray(i)) for b, s, t, i in images], rule="coco") for x in (0.3, 0.5)]
            for name, images in boxes.items()} | {name: float(sensitivities(parts, interpolate=True).mean()) for name, parts in scans.items()}
    for name in theirs:
        print(f'    "{name}": {theirs[name]},      # ours {ours[name]}')


if __name__ == "__main__":
    main()
