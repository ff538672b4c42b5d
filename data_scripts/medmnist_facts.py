"""Facts about the 18 MedMNIST sets in all sizes, from the `medmnist` package's own info.py into medimg/data/medmnist.json.

    python -m pip download medmnist==3.0.2 --no-deps && python data_scripts/medmnist_facts.py medmnist-3.0.2-py3-none-any.whl

Only the table `INFO` is read, as a literal: nothing of the wheel is run or installed, and medimg does not depend on it.
"""
import ast
import json
import sys
import zipfile
from pathlib import Path

OUT = Path(__file__).resolve().parents[1] / "medimg" / "data" / "medmnist.json"
TASKS = {"multi-class": "multiclass", "binary-class": "binary", "multi-label, binary-class": "multilabel", "ordinal-regression": "ordinal"}


def table(wheel) -> tuple[str, dict]:
    """Version and `INFO` of the package in a wheel."""
    with zipfile.ZipFile(wheel) as archive:
        tree = ast.parse(archive.read("medmnist/info.py").decode())
    values = {n.targets[0].id: n.value for n in tree.body if isinstance(n, ast.Assign) and isinstance(n.targets[0], ast.Name)}
    return ast.literal_eval(values["__version__"]), ast.literal_eval(values["INFO"])


def row(name, facts) -> dict:
    """What the registry needs of one set."""
    sizes = {"28": facts["MD5"], **{key[4:]: value for key, value in facts.items() if key.startswith("MD5_")}}
    return {"name": name, "task": TASKS[facts["task"]], "classes": list(facts["label"].values()), "channels": facts["n_channels"],
            "volumetric": name.endswith("3d"), "counts": [facts["n_samples"][s] for s in ("train", "val", "test")],
            "licence": facts["license"], "md5": sizes}


def main(argv=None) -> int:
    """Write the table; 0, or 2 without a wheel."""
    argv = sys.argv[1:] if argv is None else argv
    if len(argv) != 1 or not Path(argv[0]).is_file():
        print(__doc__, file=sys.stderr)
        return 2
    version, info = table(argv[0])
    rows = ",\n".join("  " + json.dumps(row(name, facts)) for name, facts in sorted(info.items()))
    OUT.write_text(f'{{\n "source": "medmnist {version}, info.py (Apache-2.0), https://github.com/MedMNIST/MedMNIST",\n "sets": [\n{rows}\n ]\n}}\n',
                   encoding="utf-8")
    print(f"{len(info)} sets, {sum(len(row(n, f)['md5']) for n, f in info.items())} files")
    return 0


if __name__ == "__main__":
    sys.exit(main())
