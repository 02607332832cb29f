# `make test` and `make demo` need python3.11, git and pip; the rest they install in .venv, once.
#   make PYTHON=/path/to/python3.11      another interpreter
#   make DEVICE=cpu | cuda               overrides the look for an NVIDIA GPU
#   make TORCHREC=1.9 test               another torchrec that is supported, in .venv-torchrec1.9
PYTHON ?= python3.11
DEVICE ?= $(shell nvidia-smi -L >/dev/null 2>&1 && echo cuda || echo cpu)
DEFAULT_TORCHREC := $(if $(filter cuda,$(DEVICE)),1.9,1.8)
TORCHREC ?= $(DEFAULT_TORCHREC)

SUPPORTED := 1.8 1.9

ifeq ($(filter $(SUPPORTED),$(TORCHREC)),)
$(error TORCHREC=$(TORCHREC) is not 1.8 or 1.9)
endif
VENV := .venv$(if $(filter-out $(DEFAULT_TORCHREC),$(TORCHREC)),-torchrec$(TORCHREC))
EXTRA := $(DEVICE)-torchrec$(subst .,,$(TORCHREC))
COMPLETE := $(VENV)/.complete
# $(VENV)/bin comes first on PATH so that torchx finds this environment's torchrun and python.
IN_VENV := PATH="$(CURDIR)/$(VENV)/bin:$$PATH"
PYTHON_IN_VENV := $(IN_VENV) $(VENV)/bin/python
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check

# Of mypy in tests, which give wrong types on purpose and read values of any type from JSON and option lists.
UNCHECKED := arg-type assignment func-returns-value index list-item misc operator union-attr

.PHONY: help venv demo test test-slow test-other coverage lint docs clean

help:
	@echo "make test        the tests (python -m pytest)"
	@echo "make test-slow   the slow tests (python -m pytest -m slow)"
	@echo "make test-other  the tests, with the other torchrec that is supported"
	@echo "make coverage    the tests, and which lines of the library none of them runs"
	@echo "make demo        full and LMA tables compared on MovieLens-100K through torchx, one served (examples/dlrm/demo.py)"
	@echo "make lint        ruff and mypy"
	@echo "make docs        the documentation as a site, with the API reference, in build/site"
	@echo "make clean       remove the environments, build products and caches; runs/ stays"
	@echo "Any of them with TORCHREC=1.8 or 1.9: with that torchrec; without, with $(DEFAULT_TORCHREC)"

venv: $(COMPLETE)

# The stamp is written last. An environment without it is from an install that was cut short, in which pip can take a
# half-unpacked package for an installed one: start anew. One with an old stamp is brought up to date in place.
#
# torchrec comes --no-deps, last: its wheel requires fbgemm-gpu (CUDA) and this machine may have fbgemm-gpu-cpu; its
# other needs are in setup.cfg. On a CPU machine `pip check` therefore says that torchrec lacks fbgemm-gpu, and so does
# an update in place: expected.
#
# Which torch build comes is up to pip's own configuration (index, find-links, constraints). With none of it, a Linux
# machine without a GPU may get the CUDA build: it works as well, it is only large.
$(COMPLETE): setup.cfg pyproject.toml Makefile
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) not found: install python 3.11, or make PYTHON=..." >&2; exit 1; }
	@echo "Setting up $(VENV) for $(DEVICE): a minute or two, longer if torch is not in pip's cache"
	if [ ! -e $@ ]; then rm -rf $(VENV) && $(PYTHON) -m venv $(VENV); fi
	rm -f $@
	$(PIP) install --quiet -e '.[$(EXTRA),torchx,serve,plot,docs,test]'
	$(PIP) install --quiet --no-deps 'torchrec==$(TORCHREC).*'
	$(VENV)/bin/python -W ignore -c 'import torchrec, torchx'
	touch $@

demo: venv
	$(PYTHON_IN_VENV) examples/dlrm/demo.py

test: venv
	$(PYTHON_IN_VENV) -m pytest

test-slow: venv
	$(PYTHON_IN_VENV) -m pytest -m slow

test-other:
	$(MAKE) TORCHREC=$(filter-out $(DEFAULT_TORCHREC),$(SUPPORTED)) test

coverage: venv
	$(PYTHON_IN_VENV) -m pytest --cov=torchrec_lma --cov-report=term-missing:skip-covered

lint: venv
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	MYPYPATH=examples/dlrm $(VENV)/bin/mypy examples/quickstart.py examples/dlrm examples/benchmarks
	MYPYPATH=examples/dlrm:examples/benchmarks $(VENV)/bin/mypy $(UNCHECKED:%=--disable-error-code=%) tests

docs: venv
	NO_MKDOCS_2_WARNING=1 $(IN_VENV) $(VENV)/bin/mkdocs build --strict --quiet

clean:
	rm -rf .venv .venv-torchrec* build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
