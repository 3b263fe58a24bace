# Every target makes its own environment in .venv first, with PYTHON (3.10 to 3.13).
# A torch >= 2.11 that PYTHON has already is used as it is.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python

.PHONY: quickstart test check bench clean

quickstart: $(VENV)/ready-demo
	$(RUN) -m glora quickstart

test: check
	$(RUN) -m pytest

check: $(VENV)/ready-test
	$(RUN) -m ruff format --check .
	$(RUN) -m ruff check .
	$(RUN) -m mypy

bench: $(VENV)/ready-bench
	$(RUN) -m bench.cpu_ratios

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; assert (3, 10) <= sys.version_info < (3, 14), f"PYTHON: expected Python 3.10 to 3.13, got {sys.version}"'
	if $(PYTHON) -c 'import torch; assert tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 11)' 2>/dev/null; \
	then $(PYTHON) -m venv --system-site-packages $(VENV); else $(PYTHON) -m venv $(VENV); fi

$(VENV)/ready-%: $(VENV)/bin/python pyproject.toml setup.py
	$(RUN) -m pip install --quiet --editable '.[$*]'
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
