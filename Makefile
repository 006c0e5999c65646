# `make` lists the targets. PYTHON names the interpreter that .venv is made from; where one is given that has torch
# already (PYTHON=python3 make test), its packages are used as they are and nothing is downloaded.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

PYTHON_GIVEN := $(filter command environment,$(origin PYTHON))
PYTHON ?= python3
PY := .venv/bin/python
INSTALLED := .venv/installed
# What an installation depends on; other Python files are used in place.
INSTALL_INPUTS := pyproject.toml setup.py constraints.txt constraints-cpu.txt CMakeLists.txt \
                  $(wildcard $(addprefix kernels/projection/*., cpp h) $(addprefix kernels/projection/cuda/*., cu cuh))

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(INSTALLED) ## train a small network, stock and fused, and compare them
	@$(PY) -m fastres train --demo

test: $(INSTALLED) ## run the tests
	@$(PY) -m pytest tests

lint: $(INSTALLED) ## run ruff
	@$(PY) -m ruff check .

bench: $(INSTALLED) ## run the benchmarks
	@$(PY) -m pytest benchmarks

static: $(INSTALLED) ## judge every Triton and CUDA kernel for every part and dtype; make test leaves some out
	@$(PY) -m pytest tests/static tests/kernels --all-parts

mutants: $(INSTALLED) ## plant every known kind of fault in the CUDA kernels; make test plants six
	@$(PY) -m pytest tests/emulation --all-mutants

# A GPU machine has its own torch, built for its driver.
gpu: ## on a GPU machine: test and measure; GPU_BUDGET seconds, OUT folder, GPU_ONLY=kernels,models
	@$(MAKE) --no-print-directory $(INSTALLED) PYTHON=$(PYTHON)
	@$(PY) benchmarks/gpu.py $(if $(GPU_BUDGET),--budget $(GPU_BUDGET)) $(if $(OUT),--out $(OUT)) \
	    $(if $(GPU_ONLY),--only $(GPU_ONLY))

clean: ## remove what was built; .venv stays
	@rm -rf build dist fastres.egg-info .pytest_cache .ruff_cache $(INSTALLED)
	@rm -f kernels/projection/libfastres_projection.* kernels/projection/_build.json

# The packages of PYTHON come by a .pth file: --system-site-packages would give those of the Python that PYTHON's own
# virtual environment was made from. pip is among them; one put into .venv would bring an old setuptools with it.
$(INSTALLED): $(INSTALL_INPUTS)
	@if [ -n "$(PYTHON_GIVEN)" ] && $(PYTHON) -c "import torch" 2>/dev/null; then \
	    echo "fastres: using the packages of $(PYTHON), downloading nothing"; \
	    [ -x $(PY) ] || $(PYTHON) -m venv --without-pip .venv; \
	    $(PYTHON) -c 'import site; [print(f"import site; site.addsitedir({p!r})") for p in site.getsitepackages()]' \
	        >"$$($(PY) -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/packages_of_python.pth"; \
	    PATH="$$($(PYTHON) -c 'import pathlib, sys; print(pathlib.Path(sys.executable).parent)'):$$PATH" \
	        $(PY) -m pip install --quiet --no-deps --no-build-isolation --no-index -e .; \
	else \
	    echo "fastres: installing into .venv, which downloads torch the first time"; \
	    [ -x $(PY) ] || $(PYTHON) -m venv .venv; \
	    $(PY) -m pip install --quiet -c constraints.txt setuptools cmake ninja numpy torch; \
	    if $(PY) -c "import sys, torch; sys.exit(torch.version.cuda is not None)"; \
	    then suffix=-cpu extras=lint,test,train,triton; \
	    else suffix= extras=lint,test,train; fi; \
	    $(PY) -m pip install --quiet -c constraints$$suffix.txt --no-build-isolation -e ".[$$extras]"; \
	fi
	@$(PY) -c "from fastres.kernels import projection as p; print('fastres: extension', p.available() or 'built', \
	    'without CUDA kernels: ' + p.build_outcome()['cuda'] if p.build_outcome().get('cuda') else '')"
	@touch $@

.PHONY: help demo test lint bench static mutants gpu clean
