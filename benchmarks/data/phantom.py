"""How long the phantom takes: a noisy CT of 256 × 256 × 64 voxels (budget 3 s), one without noise, a radiograph.

    python benchmarks/data/phantom.py
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import sidebyside  # noqa: E402

from medimg.data.phantom import draw_anatomy, radiograph, thorax_phantom  # noqa: E402

GRID = {"shape": (64, 256, 256), "spacing_mm": (3.0, 1.4, 1.4)}


def measure(repeats):
    """There is no peer: the parts stand beside the whole, in one run."""
    return sidebyside.compare("phantom CT 256 x 256 x 64, noise", lambda: thorax_phantom(0, **GRID),
                              {"the same without noise": lambda: thorax_phantom(0, dose=None, **GRID),
                               "radiograph of 512 x 512": lambda: radiograph(draw_anatomy(0), size=512)}, repeats=repeats)


if __name__ == "__main__":
    sidebyside.main(measure, __doc__.splitlines()[0])
