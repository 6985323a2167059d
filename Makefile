# make help lists the targets. All work happens in .venv; PYTHON chooses the interpreter it is made from (3.11 to 3.13).

PYTHON ?= python3
VENV ?= .venv
PY := $(VENV)/bin/python
READY := $(VENV)/.installed
PIP := $(PY) -m pip -qq --disable-pip-version-check --no-input

.DEFAULT_GOAL := help
.PHONY: help setup book test lab execute records clean distclean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-9s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(READY)  ## .venv with everything pinned in requirements.txt, and bdlib itself

$(READY): requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(0 if (3, 11) <= sys.version_info[:2] <= (3, 13) else "setup: Python 3.11 to 3.13 is needed, $(PYTHON) is " + sys.version.split()[0] + "; name another with make PYTHON=...")'
	@echo "setup: making $(VENV) from requirements.txt (the download of torch takes most of the time)"
	@test -x $(PY) || $(PYTHON) -m venv $(VENV)
	@$(PIP) install -r requirements.txt
	@$(PIP) install --no-build-isolation --no-deps -e .
	@$(PIP) check || $(PY) -m pip check
	@touch $@

book: $(READY)  ## build the book into _build/html and say where to open it
	@echo "book: fetching the vendored JavaScript if needed, building if something changed"
	@$(PY) book/tools/build.py

test: $(READY)  ## format, lint, types, unit tests, book, browser, notebooks; all run even if one fails
	@echo "test: every check, on an empty temporary store"
	@$(PY) book/tools/check.py

lab: $(READY)  ## open the chapters in JupyterLab
	@echo "lab: JupyterLab on notebooks/, stop it with Ctrl-C"
	@$(PY) -m jupyterlab notebooks

execute: $(READY)  ## run all chapters in place, in order, and stamp them
	@echo "execute: running the chapters in the book's order"
	@$(PY) book/tools/execute.py

records: $(READY)  ## make the small-scale records that the chapters quote (resumes where it stopped)
	@echo "records: writing book/results/small, resumable"
	@$(PY) book/tools/pinned.py -m bdlib bench records
	@$(PY) book/tools/pinned.py -m bdlib bench gallery

clean:  ## remove what was built, keep .venv and the vendored files
	@echo "clean: removing _build and the tools' caches"
	@rm -rf _build build dist .pytest_cache .ruff_cache .mypy_cache .hypothesis
	@find bdlib book notebooks tests \( -name __pycache__ -o -name .ipynb_checkpoints \) -prune -exec rm -rf {} +

distclean: clean  ## as clean, and .venv and the vendored files too
	@echo "distclean: removing $(VENV) and book/_static/vendor"
	@rm -rf $(VENV) bdlib.egg-info book/_static/vendor
