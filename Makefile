# Every target makes its own environment in .venv first, with PYTHON (3.10 to 3.13).
# A torch >= 2.11 that PYTHON has already is used as it is.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python

# Both ends of the range of Triton that is supported; `make aot-matrix` compiles the kernels with each.
TRITONS := 3.6.0 3.9.0

.PHONY: quickstart miniature test exhaustive coverage check interpreter aot aot-matrix cpu cuda gpu-cache gpu-rehearsal mutants bench clean

quickstart: $(VENV)/ready-demo
	$(RUN) -m glora quickstart

# VTAB-1K's protocol on generated images: train, search, merge, test, report.
miniature: $(VENV)/ready-test
	$(RUN) -m tests.miniature runs/miniature

# All that a change can break, and all there is (docs/testing.md); WORKERS=1 for one process at a time.
test: $(VENV)/ready-test
	$(RUN) -m tests.run short $(if $(WORKERS),--workers $(WORKERS))

exhaustive: $(VENV)/ready-test
	$(RUN) -m tests.run exhaustive $(if $(WORKERS),--workers $(WORKERS))

# The lines that each tier runs, and what the short one loses.
coverage: $(VENV)/ready-test
	$(RUN) -m tests.run short --only tests compiled interpreter --coverage build/coverage-short.json
	$(RUN) -m tests.run exhaustive --only tests compiled interpreter --coverage build/coverage-exhaustive.json
	$(RUN) -m tests.coverage_loss build/coverage-short.json build/coverage-exhaustive.json

# Parts of them alone.
check: $(VENV)/ready-test
	$(RUN) -m tests.run --only check

interpreter: $(VENV)/ready-test
	$(RUN) -m tests.run --only interpreter

aot: $(VENV)/ready-test
	$(RUN) -m glora_kernels.aot

aot-matrix: $(foreach version,$(TRITONS),$(VENV)/triton-$(version))
	for version in $(TRITONS); do \
	PYTHONPATH=$(VENV)/triton-$$version $(RUN) -m glora_kernels.aot --json $(VENV)/aot-$$version.json || exit 1; done

$(VENV)/triton-%: $(VENV)/ready-test
	$(RUN) -m pip install --quiet --no-deps --target $@ triton==$*

# The optional passes for CPUs (csrc/cpu.cpp), into the source tree; they need GCC on x86-64.
cpu: $(VENV)/ready-test
	GLORA_BUILD_CPU=1 GLORA_BUILD_CUDA=0 $(RUN) -m pip install --no-build-isolation --no-deps --editable .

# The optional CUDA extension (csrc/), into the source tree; needs nvcc, and no GPU.
cuda: $(VENV)/ready-test
	GLORA_BUILD_CUDA=1 $(RUN) -m pip install --no-build-isolation --no-deps --editable .

# A day with a GPU (docs/gpu-day.md): its kernels compiled here, by the PyTorch and Triton that are there; and a rehearsal.
GPU_PYTHON ?= python3.12
GPU_TORCH ?= 2.11.0
GPU_TRITON ?= 3.6.0

gpu-cache: $(VENV)/gpu/ready
	$(VENV)/gpu/bin/python -m bench.gpu.cache

gpu-rehearsal: $(VENV)/gpu/ready
	rm -rf build/gpu-rehearsal
	for call in 1 2; do PYTHON=$(VENV)/gpu/bin/python bench/gpu.sh --rehearse $$call build/gpu-rehearsal/$$call \
	--limits 10 --seconds 1800 || exit 1; done

$(VENV)/gpu/ready: $(VENV)/bin/python pyproject.toml
	$(GPU_PYTHON) -m venv $(VENV)/gpu
	$(VENV)/gpu/bin/python -m pip install --quiet torch==$(GPU_TORCH) triton==$(GPU_TRITON) '.[bench]' hypothesis psutil pytest-xdist
	$(VENV)/gpu/bin/python -m pip uninstall --quiet --yes glora
	touch $@

mutants: $(VENV)/ready-test
	$(RUN) -m tests.mutants

bench: $(VENV)/ready-bench
	$(RUN) -m glora bench

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; assert (3, 10) <= sys.version_info < (3, 14), f"PYTHON: expected Python 3.10 to 3.13, got {sys.version}"'
	if $(PYTHON) -c 'import torch; assert tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 11)' 2>/dev/null; \
	then $(PYTHON) -m venv --system-site-packages $(VENV); else $(PYTHON) -m venv $(VENV); fi

$(VENV)/ready-%: $(VENV)/bin/python pyproject.toml setup.py
	$(RUN) -m pip install --quiet --editable '.[$*]'
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
