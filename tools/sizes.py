"""Measure what an installation takes on the disk: the base, and what each extra adds to it. Writes results/install_sizes.json.

    python tools/sizes.py          # about ten minutes, some GB below the temporary folder, needs uv and a package index
"""
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from locks import ROOT, requirements, settings


def size_mb(folder: Path) -> float:
    """Bytes of all files below a folder, in MB (1e6), hard links once."""
    seen = {(s.st_dev, s.st_ino): s.st_size for p in folder.rglob("*") if p.is_file() and not p.is_symlink() for s in [p.stat()]}
    return sum(seen.values()) / 1e6


def install(tool: list[str], groups, *, seed: bool = False) -> tuple[float, float]:
    """(MB of site-packages, seconds) of the requirements of some groups in a new environment that is removed again."""
    with tempfile.TemporaryDirectory(prefix="medimg-size-") as folder:
        start = time.perf_counter()
        maker = [sys.executable, "-m", "venv", folder] if seed else ["uv", "venv", "--quiet", "--clear", "--python", sys.executable, folder]
        subprocess.run(maker, check=True)
        subprocess.run([a.format(folder=folder) for a in tool] + requirements(groups), check=True, stdout=subprocess.DEVNULL)
        seconds = time.perf_counter() - start
        return size_mb(next(Path(folder).glob("lib/python*/site-packages"))), seconds


def main() -> None:
    """Measure one after the other and write the table."""
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    if not shutil.which("uv"):
        raise SystemExit("sizes: uv is not installed; remedy: make setup")
    uv = ["uv", "pip", "install", "--quiet", "--compile-bytecode", "--python", "{folder}"]
    pip = ["{folder}/bin/python", "-m", "pip", "install", "--quiet", "--no-cache-dir"]
    base, uv_s = install(uv, [""])
    _, pip_s = install(pip, [""], seed=True)
    rows = {}
    for key in settings():
        if key.endswith("_requirements"):
            group = key.removesuffix("_requirements")
            rows[group.replace("_", "-")] = round(install(uv, ["", group])[0] - base)
            print(f"{group:12} +{rows[group.replace('_', '-')]} MB", flush=True)
    table = {"command": "python tools/sizes.py", "unit": "MB (1e6 bytes) in site-packages, bytecode included", "base_mb": round(base),
             "extra_adds_mb": rows, "base_setup_s": {"pip, empty cache": round(pip_s), "uv, packages in its cache": round(uv_s)}, "python": platform.python_version(),
             "system": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores", "measured": time.strftime("%Y-%m-%d")}
    out = ROOT / "results" / "install_sizes.json"
    out.parent.mkdir(exist_ok=True)
    out.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    print(out.read_text())


if __name__ == "__main__":
    main()
