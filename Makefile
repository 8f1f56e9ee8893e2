# Each target is one line of `python -m course`; `make setup` makes .venv once and again only when the pins change.
ROOT := $(if $(wildcard course/install.py),$(CURDIR),$(patsubst %/,%,$(dir $(abspath $(lastword $(MAKEFILE_LIST))))))
PYTHON ?= python3
PROFILE ?=
ARGS ?=
TOO_OLD = this course needs Python 3.11, 3.12 or 3.13; name one of them, for example: make setup PYTHON=/usr/bin/python3.13
IN_ROOT = cd "$(ROOT)" &&
COURSE = $(IN_ROOT) .venv/bin/python -m course

.PHONY: help setup course test lab build doctor clean

help:
	@echo "make course   run all chapters and write a report; PROFILE=smoke|cpu|t4|gpu (default: what fits this machine)"
	@echo "make test     all tests; ARGS='-k build' for a part"
	@echo "make lab      open chapters and workbooks in JupyterLab"
	@echo "make build    make the notebooks and the package from chapters/src"
	@echo "make doctor   what this machine is and which profile fits"
	@echo "make setup    make .venv with the pinned versions (the others do this first); PYTHON=python3.12 chooses the Python"
	@echo "make clean    remove caches; .venv, runs and student stay"

setup:
	@"$(PYTHON)" -c "import sys; sys.version_info >= (3, 8) or sys.exit('$(TOO_OLD)')"
	@$(IN_ROOT) "$(PYTHON)" -m course.install

course: setup
	@$(COURSE) run $(if $(PROFILE),--profile $(PROFILE)) $(ARGS)

test: setup
	@$(IN_ROOT) .venv/bin/python -m pytest $(ARGS)

lab: setup
	@$(IN_ROOT) .venv/bin/python -m jupyter lab --ServerApp.root_dir=. --LabApp.default_url=/lab/tree/chapters/00_start_here.ipynb $(ARGS)

build: setup
	@$(COURSE) build $(ARGS)

doctor: setup
	@$(COURSE) doctor $(ARGS)

clean:
	@$(IN_ROOT) rm -rf build .pytest_cache .ruff_cache .hypothesis *.egg-info
	@$(IN_ROOT) find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} + ; find . -name .ipynb_checkpoints -not -path './.venv/*' -prune -exec rm -rf {} +
