"""RetinaMNIST (fundus photographs, 28 x 28 x 3): find or fetch the official file, check it, print its facts and licence.

    python data_scripts/retinamnist.py [--folder FOLDER]

The logic is in `medimg.data.datasets` (chapter nbs/data/04_datasets.ipynb), so `medimg data` does the same from the wheel.
"""
import argparse
import os
import sys

from medimg.data.datasets import facts, fetch, load_dataset
from medimg.errors import MedimgError

NAME = "retinamnist"


def main(argv=None) -> int:
    """Return 0, or 2 after one line that says what is wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", help="download the official file into this folder, even if a copy is found elsewhere")
    args = parser.parse_args(argv)
    try:
        if args.folder:
            os.environ["MEDIMG_DATA"] = str(fetch(NAME, folder=args.folder).parent)
        print(facts(load_dataset(NAME, data="real", quiet=True)))
    except MedimgError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
