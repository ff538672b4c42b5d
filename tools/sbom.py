"""Write a software bill of materials (CycloneDX) of what a deployed service runs: the base and the extra `serve`, as locked.

    python tools/sbom.py                       # -> artefacts/sbom.cdx.json, offline
    python tools/sbom.py --output FILE.json
    python tools/sbom.py --requirements FILE   # the same packages as a pip requirements file with hashes: what the container installs

The packages are the closure of the requirements in settings.ini over the installed packages' metadata, for every system and Python that the lock is
for; versions and hashes are those of locks/dev.txt. cyclonedx-py makes and validates the document; licences and the graph of dependencies are added
from the metadata. No time and no random serial number: equal locks give equal bytes.
"""
import argparse
import importlib.metadata as metadata
import itertools
import json
import re
import subprocess
import sys
import tempfile
import uuid
from pathlib import Path

from packaging.requirements import Requirement

sys.path.insert(0, str(Path(__file__).resolve().parent))
import locks  # noqa: E402

GROUPS = ("", "serve")
SYSTEMS = [{"sys_platform": p, "platform_system": s, "os_name": "posix", "python_version": v, "python_full_version": f"{v}.0",
            "implementation_name": "cpython", "platform_python_implementation": "CPython", "platform_machine": m}
           for (p, s), v, m in itertools.product((("linux", "Linux"), ("darwin", "Darwin")), ("3.11", "3.12", "3.13"), ("x86_64", "aarch64", "arm64"))]


def wanted(requirement: Requirement, extra: str) -> bool:
    """Whether a requirement holds on any of the systems that the lock is for."""
    return requirement.marker is None or any(requirement.marker.evaluate({**system, "extra": extra}) for system in SYSTEMS)


def closure(requirements) -> dict[str, set[str]]:
    """Canonical name -> names it needs, of everything that the requirements need and that the lock pins."""
    pins = locks.locked((locks.ROOT / "locks/dev.txt").read_text(encoding="utf-8"))
    graph, queue, done = {}, [(Requirement(r), "") for r in requirements], set()
    while queue:
        requirement, _ = queue.pop()
        name = locks.canonical(requirement.name)
        graph.setdefault(name, set())
        for extra in {"", *requirement.extras} - {e for n, e in done if n == name}:
            done.add((name, extra))
            for child in map(Requirement, requires(name)):
                if wanted(child, extra) and locks.canonical(child.name) in pins:
                    graph[name].add(locks.canonical(child.name))
                    queue.append((child, extra))
    return graph


def requires(name):
    """What an installed package needs; one that this system does not need is not installed and is a leaf."""
    try:
        return metadata.requires(name) or []
    except metadata.PackageNotFoundError:
        return []


def lock_lines(names) -> str:
    """The blocks of locks/dev.txt for these packages."""
    blocks = re.findall(r"^[A-Za-z0-9][^\n]*(?:\n    [^\n]*)*", (locks.ROOT / "locks/dev.txt").read_text(encoding="utf-8"), flags=re.M)
    return "\n".join(b for b in blocks if locks.canonical(b.split("==")[0]) in names) + "\n"


def licence(name) -> dict | None:
    """An SPDX expression where the package gives one, else the words of its classifiers."""
    try:
        meta = metadata.metadata(name)
    except metadata.PackageNotFoundError:
        return None
    if expression := meta.get("License-Expression"):
        return {"expression": expression}
    classes = sorted({c.split(" :: ")[-1] for c in meta.get_all("Classifier") or [] if c.startswith("License ::")})
    text = "; ".join(classes) or (meta.get("License") or "").strip().partition("\n")[0][:80]
    return {"license": {"name": text}} if text else None


def document() -> dict:
    """The bill of materials as a dict."""
    graph = closure(locks.requirements(GROUPS))
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        file.write(lock_lines(graph))
        file.flush()
        made = subprocess.run([sys.executable, "-m", "cyclonedx_py", "requirements", file.name, "--output-reproducible", "--short-PURLs", "--of", "JSON"],
                              capture_output=True, text=True, check=True)
    bom, cfg = json.loads(made.stdout), locks.settings()
    return finish(bom, graph, cfg)


def finish(bom, graph, cfg):
    """Names, licences, graph and root, all in a fixed order."""
    references = {}
    for component in bom["components"]:
        name = locks.canonical(component["name"])
        component["bom-ref"] = references[name] = component.get("purl") or f"pkg:pypi/{name}@{component['version']}"
        component.pop("description", None)
        if found := licence(name):
            component["licenses"] = [found]
        for link in component.get("externalReferences", []):
            link["hashes"] = sorted(link.get("hashes", []), key=lambda h: h["content"])
    root = f"pkg:pypi/{cfg['lib_name']}@{cfg['version']}"
    bom["metadata"] = {**bom.get("metadata", {}), "component": {"type": "application", "name": cfg["lib_name"], "version": cfg["version"], "bom-ref": root, "purl": root,
                                                                "licenses": [{"license": {"id": "Apache-2.0"}}]}}
    bom["metadata"].pop("timestamp", None)
    bom["components"].sort(key=lambda c: c["bom-ref"])
    direct = {locks.parse(r)[0] for r in locks.requirements(GROUPS)}
    bom["dependencies"] = [{"ref": root, "dependsOn": sorted(references[n] for n in direct)}] + sorted(
        ({"ref": references[n], "dependsOn": sorted(references[c] for c in needs)} for n, needs in graph.items()), key=lambda d: d["ref"])
    text = json.dumps({k: v for k, v in bom.items() if k != "serialNumber"}, sort_keys=True)
    return {**bom, "serialNumber": f"urn:uuid:{uuid.uuid5(uuid.NAMESPACE_URL, text)}"}


def main():
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=locks.ROOT / "artefacts" / "sbom.cdx.json")
    parser.add_argument("--requirements", type=Path)
    options = parser.parse_args()
    if options.requirements:
        names = {*closure(locks.requirements(GROUPS)), *(locks.parse(r)[0] for r in locks.build_requires())}
        options.requirements.parent.mkdir(parents=True, exist_ok=True)
        options.requirements.write_text(lock_lines(names), encoding="utf-8")
        print(f"{options.requirements.name}: {len(names)} packages")
        return
    bom = document()
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(bom, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    print(f"{options.output.name}: {len(bom['components'])} components, CycloneDX {bom['specVersion']}")


if __name__ == "__main__":
    main()
