# Everything runs in .venv, made on first use. `make help` lists the targets.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# pyenv runs a Python that is not its default only when it is told to.
OLDEST_PYTHON ?= env PYENV_VERSION=3.12 python3.12
OLDEST_VENV ?= .venv-oldest

SOURCES := setup.py $(wildcard csrc/*.cpp csrc/*/*.h csrc/*/*.cpp csrc/*/*.cu csrc/*/*.cuh)

# A .built names the compiled core that it is of, or says "none" where there is no compiler: a core
# that is gone is built again, or the reference would run in its place without a word.
EXT_SUFFIX := -c 'import sysconfig; print(sysconfig.get_config_var("EXT_SUFFIX"))'
name-core = core=picnn_fast/_C$$($(@D)/bin/python $(EXT_SUFFIX)); [ -e $$core ] || core=none; echo $$core >$@
lost-core = $(if $(wildcard $1),$(if $(filter none $(wildcard picnn_fast/_C*),$(shell cat $1)),,again))

# A process a core, with one thread each. Each begins with a stretch of the files, in which costly
# fixtures are made once, and takes from another's when it is done with its own.
PYTEST := -m pytest -n logical --maxprocesses 4 --dist worksteal

lint test: export PICNN_FAST_WERROR ?= 1
test test-oldest test-oldest-quick: export OMP_NUM_THREADS ?= 1

.PHONY: help demo test lint docs bench gpu gpu-parity gpu-bench gpu-bench-more clean build
help: ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*##/ —/'

demo: $(VENV)/.built ## train an ordinary network and a PICNN on digits; figures and pictures in runs/demo
	$(BIN)/picnn-fast demo

test: $(VENV)/.built ## the whole test suite
	$(BIN)/python $(PYTEST)

lint: $(VENV)/.built ## ruff, mypy, imports, clang-format; compiler warnings are errors in every build made here
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cu' 'csrc/*.cuh' 'tests/*.h' 'tests/*.cu')

docs: $(VENV)/.built ## the documentation, in build/docs
	$(BIN)/mkdocs build --strict

bench: $(VENV)/.built ## measure, and write benchmarks/results and benchmarks/README.md
	$(BIN)/python -m benchmarks.overhead
	$(BIN)/python -m benchmarks.calls
	$(BIN)/python -m benchmarks.masking
	$(BIN)/python -m benchmarks.mutual_information
	$(BIN)/python -m benchmarks.bias
	$(BIN)/python -m benchmarks.filter_loss
	$(BIN)/python -m benchmarks.correlation
	$(BIN)/python -m benchmarks.compare
	$(BIN)/python -m benchmarks.parts
	$(BIN)/python -m benchmarks.explainer
	$(BIN)/python -m benchmarks.evaluation
	$(BIN)/python -m benchmarks.report

gpu: ## with PYTHON's own packages (torch, pytest …): gpu-parity, gpu-bench, gpu-bench-more
	@failed=0; for part in gpu-parity gpu-bench gpu-bench-more; do \
		$(MAKE) $$part || failed=1; done; exit $$failed

# Each is a command of under 10 minutes; the time limit counts from here, so the build is in it.
gpu-parity: ## build, and parity of all backends on a GPU
gpu-bench: ## build, and benchmarks of masking and part templates on a GPU
gpu-bench-more: ## build, and benchmarks of mutual information and correlation on a GPU
# Without a compiled core Triton and the reference still run, and the script says what is missing:
# an older core of this Python must not stand in for one that does not build.
INSTALL := -m pip install --quiet --no-deps --no-build-isolation -e .
SUFFIX = $(shell $(PYTHON) $(EXT_SUFFIX))
gpu-parity gpu-bench gpu-bench-more:
	started=$$(date +%s); rm -f picnn_fast/_C$(SUFFIX); \
	PICNN_FAST_CUDA=1 timeout 240 $(PYTHON) setup.py build_ext --inplace && \
		PICNN_FAST_CUDA=1 $(PYTHON) $(INSTALL) || { echo "$@: no compiled core: it does not" \
		"build, or not in 240 s; Triton and the reference run" >&2; CXX=none $(PYTHON) $(INSTALL); }; \
	$(PYTHON) -m benchmarks.gpu $(@:gpu-%=%) --started $$started

clean: ## remove what was built, the environment included
	rm -rf $(VENV) $(OLDEST_VENV) build dist picnn_fast.egg-info picnn_fast/_C*.so

build: $(VENV)/.built ## the environment and the compiled core

$(VENV)/.packages: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	@echo "Installing PyTorch (about 5 GB unpacked) …"
	$(BIN)/python -m pip install -c constraints.txt torch torchvision setuptools ninja pybind11 numpy
	@touch $@

.PHONY: again
again:

$(VENV)/.built: $(VENV)/.packages $(SOURCES) $(call lost-core,$(VENV)/.built)
	$(BIN)/python setup.py build_ext --inplace
	$(BIN)/python -m pip install -c constraints.txt --no-build-isolation -e '.[dev]'
	@$(name-core)

# The same for the oldest versions. A build in place is one Python's, so theirs is another Python.
.PHONY: test-oldest test-oldest-quick oldest-python
test-oldest test-oldest-quick: export PICNN_FAST_WERROR ?= 1

test-oldest: $(OLDEST_VENV)/.built ## the whole test suite with the oldest versions that are claimed
	$(OLDEST_VENV)/bin/python $(PYTEST)

# Without parity: that hangs on our kernels more than on the version, and takes longest by far.
test-oldest-quick: $(OLDEST_VENV)/.built ## of these the operators, models and command line, without parity
	$(OLDEST_VENV)/bin/python $(PYTEST) tests/ops tests/backbones tests/models tests/test_cli.py \
		--ignore-glob='tests/ops/*_parity.py' -k 'not results_and_gradients_are_the_references'

TAG := -c 'import sys; print(sys.implementation.cache_tag)'
oldest-python:
	@tag=$$($(OLDEST_PYTHON) $(TAG) 2>/dev/null) || { echo "OLDEST_PYTHON: '$(OLDEST_PYTHON)'" \
		"does not run; want python3.12 on PATH or the variable set" >&2; exit 1; }; \
	[ "$$tag" != "$$($(PYTHON) $(TAG))" ] || { echo "OLDEST_PYTHON: got $$tag, which PYTHON is" \
		"too; want another, or both would build the same file" >&2; exit 1; }

$(OLDEST_VENV)/.packages: pyproject.toml constraints-oldest.txt | oldest-python
	$(OLDEST_PYTHON) -m venv $(OLDEST_VENV)
	@echo "Installing the oldest versions of PyTorch and the rest (about 5 GB unpacked) …"
	$(OLDEST_VENV)/bin/python -m pip install -c constraints-oldest.txt \
		torch torchvision setuptools ninja pybind11 numpy
	@touch $@

$(OLDEST_VENV)/.built: $(OLDEST_VENV)/.packages $(SOURCES) $(call lost-core,$(OLDEST_VENV)/.built)
	$(OLDEST_VENV)/bin/python setup.py build_ext --inplace
	$(OLDEST_VENV)/bin/python -m pip install -c constraints-oldest.txt --no-build-isolation -e '.[dev]'
	@$(name-core)
