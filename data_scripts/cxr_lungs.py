"""Chest films with lung masks at 256 x 256 (`cxr-lungs-256`) from Montgomery, Shenzhen and the masks of Stirenko et al.

    python data_scripts/cxr_lungs.py MONTGOMERY SHENZHEN MASKS [--out FOLDER] [--names FILE]

The first two are fetched by `medimg data fetch montgomery` and `... shenzhen`; the Shenzhen masks (CC BY-NC-SA 4.0) by hand.
Not reproducible outside to the byte: the file's films went through a 512 x 512 squeeze at its source, and its four folds and choice of
films follow no recorded rule. The logic is in `medimg.data.derived` (chapter nbs/data/04d_derived.ipynb).
"""
import sys

from medimg.data.derived import main_of

if __name__ == "__main__":
    sys.exit(main_of("cxr-lungs-256"))
