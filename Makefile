# medimg: `make` lists what there is. Portable make (GNU 3.81 and later), no root, no network once set up.
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

VENV ?= .venv
PY := $(VENV)/bin/python
UV := $(shell command -v uv 2>/dev/null)
# The first Python of the supported versions; `make PYTHON=/path/to/python3.12 setup` names another.
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null && { echo $$p; exit; }; done; echo python3)

NAME ?= phantom-cxr pneumonia phantom-lungs phantom-nodules
NOTEBOOKS ?=
SUBJECT ?= *
FUZZ_SECONDS ?= 600
PYTEST_ARGS ?=
DEMO_ARGS ?=
CONTAINER_ARGS ?=
FACTS := settings.ini setup.py pyproject.toml
DEMO := $(VENV)/.medimg-demo
DEV := $(VENV)/.medimg-dev

# Both installers take exactly the locked files, checked by their hashes; the lock is complete, so nothing is resolved.
ifneq ($(UV),)
INSTALL := $(UV) pip install --quiet --python $(PY) --compile-bytecode --no-deps
else
INSTALL := $(PY) -m pip install --quiet --disable-pip-version-check --no-deps
endif

.PHONY: help setup demo test lab course docs reproduce bench bench-peers fuzz soak lint sbom container locks sizes clean

help:  ## this list
	@echo "medimg, research use, not a medical device. Start with: make demo, make test"
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

setup: $(DEV)  ## install everything that chapters and tests use into .venv (about 6 GB)

demo: $(DEMO)  ## set up the part without TensorFlow, then screen an invented patient's CT and read a radiograph (offline)
	@$(VENV)/bin/medimg demo $(DEMO_ARGS)

test: $(DEV)  ## everything that CI runs; what needs a missing tool or data set is left out by name (PYTEST_ARGS="-k dicom")
	@mkdir -p artefacts
	@$(PY) -m pytest --durations=15 --junitxml=artefacts/junit.xml $(PYTEST_ARGS)

lab: $(DEV)  ## open the course in JupyterLab
	@$(PY) -m jupyter lab nbs/index.ipynb

course: $(DEV)  ## run the chapters in profile "course" and store their outputs (NOTEBOOKS="nbs/data/02_dicom.ipynb"; all that are stale)
	@$(PY) tools/nb.py run $(if $(NOTEBOOKS),$(NOTEBOOKS),--stale)

docs:  ## render the site into _site with Quarto
	@command -v quarto >/dev/null 2>&1 || { \
	  echo "docs: quarto is not installed. Remedy: conda env create -f environment.yml, or the installer from quarto.org (1.7 or newer)."; exit 1; }
	@mkdir -p artefacts; quarto render > artefacts/quarto.log 2>&1; status=$$?; cat artefacts/quarto.log; \
	  if [ $$status -ne 0 ]; then exit $$status; fi; \
	  if grep -n WARN artefacts/quarto.log > /dev/null; then \
	    echo "docs: Quarto warned (a page or a link that is broken):"; grep -n WARN artefacts/quarto.log; exit 1; fi

reproduce: $(DEV)  ## make shipped bundles and results again (NAME=pneumonia for one)
	@for name in $(NAME); do $(VENV)/bin/medimg reproduce "$$name" || exit; done

bench: $(DEV)  ## measure beside other programs (SUBJECT=dicom_read for one), never part of the tests; peers live in .venv-bench
	@for script in benchmarks/*/$(SUBJECT).py; do echo "== $$script"; $(PY) "$$script" || exit; done

bench-peers: $(DEV)  ## install the programs that benchmarks compare with into .venv-bench (network, about 3 GB)
	@$(if $(UV),$(UV) venv --quiet --allow-existing --python $(PY) .venv-bench,$(PY) -m venv .venv-bench)
	@$(if $(UV),$(UV) pip install --quiet --python .venv-bench/bin/python,.venv-bench/bin/python -m pip install --quiet) -r benchmarks/peers.txt

fuzz: $(DEV)  ## mutate files for as long as FUZZ_SECONDS says (600) and keep what breaks a parser in artefacts/fuzz
	@mkdir -p artefacts; $(PY) tools/fuzz.py --seconds $(FUZZ_SECONDS)

soak: $(DEV)  ## kill -9 at ten random moments of a training, a search and a training on two workers; each must end as if left alone
	@mkdir -p artefacts; MEDIMG_SOAK=1 $(PY) -m pytest -v -k kill tests/test_trainer.py tests/test_tuning.py tests/test_distributed.py

lint: $(DEV)  ## ruff, the locks against settings.ini, and known vulnerabilities of the locked packages (network)
	@$(PY) -m ruff check .
	@$(PY) tools/locks.py --check
	@mkdir -p artefacts; $(PY) -m pip_audit --requirement locks/dev.txt --require-hashes --disable-pip --progress-spinner off \
	  > artefacts/pip-audit.txt 2>&1; status=$$?; head -n 30 artefacts/pip-audit.txt; \
	  if grep -qE "could not be audited|ConnectionError|ServiceError|ConnectTimeout|Could not connect|Max retries|HTTPError" artefacts/pip-audit.txt; then \
	    echo "lint: pip-audit could not ask the vulnerability service about these packages: they were NOT audited."; \
	    echo "Remedy: make lint with a network and an index that answers for vulnerabilities (PyPI itself; a mirror may not)."; \
	    if grep -qE "Found [1-9][0-9]* known vulnerabilit" artefacts/pip-audit.txt; then exit 1; fi; \
	  else exit $$status; fi

sbom: $(DEV)  ## the bill of materials (CycloneDX) of a deployed service into artefacts/sbom.cdx.json (offline)
	@$(PY) tools/sbom.py

container: $(DEV)  ## build the container of the service from the lock (needs podman, docker or buildah, and a network)
	@$(PY) tools/sbom.py --requirements artefacts/serve.txt
	@engine=$$(command -v podman || command -v docker || command -v buildah) || { \
	  echo "container: neither podman, docker nor buildah is installed. Remedy: install one of them; container/README.md says how to run the result."; exit 1; }; \
	  case $$engine in *docker) ;; *) format="--format docker";; esac; \
	  "$$engine" build $$format --file Containerfile --tag medimg $(CONTAINER_ARGS) .

locks: $(DEV)  ## make locks/ and environment.yml again after a change of settings.ini (network)
	@$(PY) tools/locks.py

sizes: $(DEV)  ## measure the installed size of every extra into results/install_sizes.json (network, ten minutes)
	@$(PY) tools/sizes.py

clean:  ## remove what can be made again; .venv and runs/ stay
	@rm -rf artefacts build dist demo _site _proc .quarto .pytest_cache .ruff_cache .hypothesis *.egg-info
	@find medimg nbs tests tools -name __pycache__ -prune -exec rm -rf {} + ; find nbs -name .ipynb_checkpoints -prune -exec rm -rf {} +
	@rm -f $(DEMO) $(DEV)

# --- the environment -------------------------------------------------------------------------------------------------
$(VENV)/pyvenv.cfg:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null || { \
	  echo "medimg needs Python 3.11, 3.12 or 3.13, but $(PYTHON) is $$($(PYTHON) --version 2>&1 | head -n 1)."; \
	  echo "Remedy: install one of them and say: make PYTHON=/path/to/python3.12 $(MAKECMDGOALS)"; exit 1; }
ifneq ($(UV),)
	@$(UV) venv --quiet --python "$$($(PYTHON) -c 'import sys; print(sys.executable)')" $(VENV)
else
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { \
	  echo "$(PYTHON) cannot make virtual environments (venv or ensurepip is missing)."; \
	  echo "Remedy: apt-get install python3-venv (Debian, Ubuntu), or install uv, then make again."; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }
endif

# An environment that uv made has no pip: it is put in when uv is gone.
define install
	@start=$$(date +%s); echo "Setting up $(VENV) from locks/$(1).txt ($(2)) with $(if $(UV),uv,pip) ..."; \
	  $(if $(UV),:,{ $(PY) -m pip --version >/dev/null 2>&1 || $(PY) -m ensurepip >/dev/null; }) \
	  && $(INSTALL) --require-hashes -r locks/$(1).txt \
	  && $(INSTALL) --no-build-isolation -e . \
	  && echo "Set up in $$(( $$(date +%s) - start )) s."
endef

$(DEMO): locks/demo.txt $(FACTS) | $(VENV)/pyvenv.cfg
	$(call install,demo,about 0.8 GB)
	@touch $@

$(DEV): locks/dev.txt $(FACTS) | $(VENV)/pyvenv.cfg
	$(call install,dev,about 6 GB)
	@touch $(DEMO) $@
