"""Any of the sixty MedMNIST files: find or fetch the official file, check it, print its data sheet.

    python data_scripts/medmnist.py NAME [--folder FOLDER]        # for example octmnist-64, nodulemnist3d

The logic is in `medimg.data.downloads` and `medimg.data.datasheets`, so `medimg data` does the same from the wheel.
"""
import argparse
import os
import sys

from medimg.data.datasheets import datasheet
from medimg.data.downloads import fetch
from medimg.errors import MedimgError


def main(argv=None) -> int:
    """Return 0, or 2 after one line that says what is wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", help="as in `medimg data list`")
    parser.add_argument("--folder", help="download the official file into this folder, even if a copy is found elsewhere")
    args = parser.parse_args(argv)
    try:
        if args.folder:
            os.environ["MEDIMG_DATA"] = str(fetch(args.name, folder=args.folder).parent)
        print(datasheet(args.name, data="real").markdown())
    except MedimgError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
