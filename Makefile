# `make test` and `make demo` need python3.11, git and pip; the rest they install in .venv, once.
#   make PYTHON=/path/to/python3.11      another interpreter
#   make DEVICE=cpu | cuda               overrides the look for an NVIDIA GPU
PYTHON ?= python3.11
DEVICE ?= $(shell nvidia-smi -L >/dev/null 2>&1 && echo cuda || echo cpu)

VENV := .venv
COMPLETE := $(VENV)/.complete
# .venv/bin comes first on PATH so that torchx finds this environment's torchrun and python.
IN_VENV := PATH="$(CURDIR)/$(VENV)/bin:$$PATH"
PYTHON_IN_VENV := $(IN_VENV) $(VENV)/bin/python

.PHONY: help venv demo test test-slow lint clean

help:
	@echo "make test        the tests (python -m pytest)"
	@echo "make test-slow   the slow tests (python -m pytest -m slow)"
	@echo "make demo        full and LMA tables compared on MovieLens-100K through torchx, one served (examples/dlrm/demo.py)"
	@echo "make lint        ruff and mypy"
	@echo "make clean       remove .venv, build products and caches; runs/ stays"

venv: $(COMPLETE)

# The stamp is written last. A .venv without it is from an install that was cut short, in which pip can take a
# half-unpacked package for an installed one: start anew. A .venv with an old stamp is brought up to date in place.
#
# torchrec comes --no-deps, last: its wheel requires fbgemm-gpu (CUDA) and this machine may have fbgemm-gpu-cpu; its
# other needs are in setup.cfg. On a CPU machine `pip check` therefore says that torchrec lacks fbgemm-gpu, and so does
# an update in place: expected. The version is the same as in setup.cfg.
#
# Which torch build comes is up to pip's own configuration (index, find-links, constraints). With none of it, a Linux
# machine without a GPU may get the CUDA build: it works as well, it is only large.
$(COMPLETE): setup.cfg pyproject.toml Makefile
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) not found: install python 3.11, or make PYTHON=..." >&2; exit 1; }
	@echo "Setting up $(VENV) for $(DEVICE): a minute or two, longer if torch is not in pip's cache"
	if [ ! -e $@ ]; then rm -rf $(VENV) && $(PYTHON) -m venv $(VENV); fi
	rm -f $@
	$(VENV)/bin/python -m pip install --disable-pip-version-check --quiet -e '.[$(DEVICE),torchx,serve,plot,test]'
	$(VENV)/bin/python -m pip install --disable-pip-version-check --quiet --no-deps torchrec==1.8.0
	$(VENV)/bin/python -W ignore -c 'import torchrec, torchx'
	touch $@

demo: venv
	$(PYTHON_IN_VENV) examples/dlrm/demo.py

test: venv
	$(PYTHON_IN_VENV) -m pytest

test-slow: venv
	$(PYTHON_IN_VENV) -m pytest -m slow

lint: venv
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
