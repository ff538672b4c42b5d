"""BUSI at 128 x 128 (`busi-128`) from its official source: fetch or unpack Dataset_BUSI.zip, convert, write, compare, print the data sheet.

    python data_scripts/busi.py [FOLDER_OF_THE_FULL_SET] [--out FOLDER]

Not reproducible outside to the byte: the filter that shrank the images of the file used here was not recorded. This script averages
areas (OpenCV INTER_AREA), joins the masks of one image and cuts them at half; `--out` must be a folder that MEDIMG_DATA names.
The logic is in `medimg.data.derived` (chapter nbs/data/04d_derived.ipynb).
"""
import sys

from medimg.data.derived import main_of

if __name__ == "__main__":
    sys.exit(main_of("busi-128"))
