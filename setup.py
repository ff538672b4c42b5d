"""Build script: every fact about the distribution comes from settings.ini, the one source of truth."""
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

config = ConfigParser(delimiters=["="])
config.read(Path(__file__).with_name("settings.ini"), encoding="utf-8")
cfg = config["DEFAULT"]
extras = {key.removesuffix("_requirements").replace("_", "-"): value.split()
          for key, value in cfg.items() if key.endswith("_requirements")}

setup(
    name=cfg["lib_name"], version=cfg["version"], description=cfg["description"], keywords=cfg["keywords"],
    author=cfg["author"], author_email=cfg["author_email"], url=cfg["git_url"], license="Apache-2.0",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown", python_requires=f">={cfg['min_python']}",
    packages=find_packages(include=["medimg", "medimg.*"]), include_package_data=True,
    install_requires=cfg["requirements"].split(), extras_require=extras,
    entry_points={"console_scripts": cfg["console_scripts"].split(), "nbdev": [f"{cfg['lib_name']}={cfg['lib_name']}._modidx:d"]},
    classifiers=["Development Status :: 3 - Alpha", "Intended Audience :: Science/Research", "Natural Language :: English",
                 "Topic :: Scientific/Engineering :: Medical Science Apps.", "Programming Language :: Python :: 3"],
    zip_safe=False,
)
