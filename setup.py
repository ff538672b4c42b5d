"""Build script: every fact about the distribution comes from settings.ini, the one source of truth."""
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
config = ConfigParser(delimiters=["="])
config.read(HERE / "settings.ini", encoding="utf-8")
cfg = config["DEFAULT"]
extras = {key.removesuffix("_requirements").replace("_", "-"): value.split()
          for key, value in cfg.items() if key.endswith("_requirements")}
# Bundles, templates and schemas travel with the package; nothing else does.
kinds = ["json", "npz", "onnx", "txt", "md", "html", "jinja", "j2", "css", "js", "svg", "png", "xml"]
low, high = (tuple(map(int, v.split("."))) for v in (cfg["min_python"], cfg["max_python"]))
pythons = [f"{low[0]}.{minor}" for minor in range(low[1], high[1] + 1)]

setup(
    name=cfg["lib_name"], version=cfg["version"], description=cfg["description"], keywords=cfg["keywords"],
    author=cfg["author"], author_email=cfg["author_email"], url=cfg["git_url"],
    project_urls={"Documentation": cfg["doc_host"] + cfg["doc_baseurl"], "Changelog": cfg["git_url"] + "/blob/main/CHANGELOG.md"},
    license_expression="Apache-2.0", license_files=["LICENSE"],
    long_description=(HERE / "README.md").read_text(encoding="utf-8"), long_description_content_type="text/markdown",
    python_requires=f">={cfg['min_python']}", install_requires=cfg["requirements"].split(), extras_require=extras,
    packages=find_packages(include=["medimg", "medimg.*"]), include_package_data=False,
    package_data={"medimg": [f"**/*.{kind}" for kind in kinds]},
    entry_points={"console_scripts": cfg["console_scripts"].split(), "nbdev": [f"{cfg['lib_name']}={cfg['lib_path']}._modidx:d"]},
    classifiers=["Development Status :: 3 - Alpha", "Intended Audience :: Science/Research", "Intended Audience :: Education",
                 "Natural Language :: English", "Operating System :: POSIX :: Linux", "Operating System :: MacOS",
                 "Topic :: Scientific/Engineering :: Medical Science Apps.", "Framework :: Jupyter",
                 *(f"Programming Language :: Python :: {v}" for v in pythons)],
    zip_safe=False,
)
