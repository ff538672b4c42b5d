"""1,000 ChestX-ray14 films at 128 x 128 (`nih-cxr-1000`) from the official source: fetch the twelve archives, convert, write, compare.

    python data_scripts/nih_cxr.py [FOLDER_OF_THE_FULL_SET] [--out FOLDER] [--names FILE]

The folder must also hold Data_Entry_2017_v2020.csv and BBox_List_2017.csv, which are fetched by hand from the set's page.
Not reproducible outside to the byte: the file's thousand images were chosen by no recorded rule, and its filter is not known. `--names`
takes a list of file names, one a line (the file's own list is `image_name` in it); without it 500 + 500 films are chosen by a hash of
their names. Labels, boxes and patient folds follow exactly. The logic is in `medimg.data.derived` (chapter nbs/data/04d_derived.ipynb).
"""
import sys

from medimg.data.derived import main_of

if __name__ == "__main__":
    sys.exit(main_of("nih-cxr-1000"))
