"""NSCLC-Radiomics or LIDC-IDRI from The Cancer Imaging Archive: series by series, each file checked against its published MD5.

    python data_scripts/tcia.py nsclc-radiomics FOLDER [--patients N] [--modality CT]

Licences: NSCLC-Radiomics CC BY-NC 3.0, LIDC-IDRI CC BY 3.0. The logic is in `medimg.data.tcia` (chapter nbs/data/04i_tcia.ipynb).
"""
import argparse
import sys

from medimg.data.registry import dataset_info
from medimg.data.tcia import fetch_collection
from medimg.errors import MedimgError


def main(argv=None) -> int:
    """Return 0, or 2 after one line that says what is wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=["nsclc-radiomics", "lidc-idri"])
    parser.add_argument("folder")
    parser.add_argument("--patients", type=int, help="only the first N, in the order of their ids")
    parser.add_argument("--modality", help="for example CT")
    args = parser.parse_args(argv)
    try:
        info = dataset_info(args.name)
        fetch_collection(info, args.folder, patients=args.patients, modality=args.modality)
        print(f"{info.name}: {info.licence}; cite {info.citation}")
    except MedimgError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
