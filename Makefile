# make demo: the training example. make test: the tests. Both from a fresh clone, both repeatable.
PYTHON ?= python3
VENV := .venv-$(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')
RUN := $(VENV)/bin/python
SOURCES := pyproject.toml CMakeLists.txt cuda.cmake $(wildcard csrc/* src/jax_bce/*)

.PHONY: demo test lint exhaustive bench gpu-check clean

demo: $(VENV)/.demo
	$(RUN) examples/train_digits.py --plot train_digits.png

test: $(VENV)/.test $(VENV)/.cuda_plugin
	JAX_BCE_REQUIRE=$(or $(JAX_BCE_REQUIRE),cpu) $(VENV)/bin/pytest -n auto

lint: $(VENV)/.lint
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy
	$(VENV)/bin/clang-format --dry-run --Werror csrc/*.h csrc/*.cc csrc/*.cu $(wildcard tests/cuda_kernel/*.* tests/cuda_kernel/on_host/*)

# Every float32 logit and every 16-bit one: about three minutes on two cores.
exhaustive: $(VENV)/.test
	$(RUN) tests/exhaustive.py

# Writes benchmarks/results/; BENCH="--sizes 10 18 25" narrows it.
bench: $(VENV)/.bench
	$(RUN) benchmarks/bench.py $(BENCH)

# On a machine with an NVIDIA GPU, with the packages of $(PYTHON) and no network: builds, runs every
# test, the exhaustive run and the benchmark, and leaves a record in benchmarks/results/.
# GPU_CHECK="--steps build,tests" narrows it.
gpu-check:
	$(PYTHON) tests/gpu_check.py $(GPU_CHECK)

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# One stamp per set of extras: an install is repeated only when a source is newer.
$(VENV)/.demo: EXTRAS := examples
$(VENV)/.test: EXTRAS := test
$(VENV)/.lint: EXTRAS := test,lint
$(VENV)/.%: $(VENV)/bin/python $(SOURCES)
	$(RUN) -m pip install --quiet --disable-pip-version-check '.[$(EXTRAS)]'
	touch $@

# XLA's compiler for GPUs, which tests use without one. Not among the installed packages: there,
# where there is no CUDA, it would make every start of JAX complain.
$(VENV)/.cuda_plugin: $(VENV)/.test
	version=$$($(RUN) -c 'import jaxlib; print(jaxlib.__version__)') && \
	$(RUN) -m pip install --quiet --disable-pip-version-check --upgrade --no-deps \
	  --target $(VENV)/cuda_plugin jax-cuda13-plugin==$$version jax-cuda13-pjrt==$$version
	touch $@

# A peer of the benchmark alone: its wheel may bring CUDA libraries of several GB. TORCH= leaves it out.
TORCH ?= torch==2.13.0
$(VENV)/.bench: $(VENV)/.test
	$(if $(TORCH),$(RUN) -m pip install --quiet --disable-pip-version-check $(TORCH))
	touch $@

clean:
	rm -rf build .venv-*
