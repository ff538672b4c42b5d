"""RSNA pneumonia challenge (boxes on 26,684 chest films): read the files that you downloaded after accepting the terms; print the data sheet.

    python data_scripts/rsna_pneumonia.py FOLDER

FOLDER holds stage_2_train_images/ and stage_2_train_labels.csv. The logic is in `medimg.data.imports` (chapter nbs/data/04c_imports.ipynb).
"""
import sys

from medimg.data.datasheets import datasheet
from medimg.data.imports import import_rsna
from medimg.data.registry import dataset_info
from medimg.errors import MedimgError


def main(argv=None) -> int:
    """Return 0, or 2 after one line that says what is wrong."""
    argv = sys.argv[1:] if argv is None else argv
    if len(argv) != 1:
        print(__doc__, dataset_info("rsna-pneumonia").how, sep="\n", file=sys.stderr)
        return 2
    try:
        print(datasheet(import_rsna(argv[0])).markdown())
    except MedimgError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
