# make demo: the training example. make test: the tests. Both from a fresh clone, both repeatable.
PYTHON ?= python3
VERSION := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')
ifneq ($(filter 3.0 3.1 3.2 3.3 3.4 3.5 3.6 3.7 3.8 3.9 3.10,$(VERSION)),)
$(error jax_bce needs Python 3.11 or newer, and $(PYTHON) is $(VERSION): for example, PYTHON=python3.12 make)
endif
VENV := .venv-$(VERSION)
RUN := $(VENV)/bin/python
SOURCES := pyproject.toml CMakeLists.txt cuda.cmake sbom.cdx.json.in $(wildcard csrc/* src/jax_bce/*)
# The date of what a wheel contains, so that the same commit gives the same bytes.
export SOURCE_DATE_EPOCH ?= $(or $(shell git log -1 --format=%ct 2>/dev/null),315532800)

# Pairs of a Python and a JAX: the oldest supported, one in between, and the newest.
floor := 3.11 jax==0.8.0 jaxlib==0.8.0
between := 3.12 jax==0.11.2 jaxlib==0.11.2
newest := 3.13 jax jaxlib

# The files of tests/verification whose full form has a target, such as verify-handlers.
verified := digest exactness handlers life memory supply
verify := $(addprefix verify-,$(verified))

.PHONY: demo pictures docs test test-all test-floor test-between test-newest lint exhaustive bench gpu-check clean
.PHONY: $(verify) verify-mutation verification
.SECONDARY:
.SECONDEXPANSION:

demo: ready-demo
	$(RUN) examples/train_digits.py --plot train_digits.png

# Those of the README, and the tables of the newest record of `make bench`. The tests compare what
# they show with what the scripts draw.
pictures: $(VENV)/.torch
	$(RUN) examples/train_digits.py --plot docs/train_digits.png --dark docs/train_digits-dark.png
	$(RUN) examples/precision.py --plot docs/precision.png --dark docs/precision-dark.png
	$(RUN) examples/many_labels.py --plot docs/many_labels.png --dark docs/many_labels-dark.png
	$(RUN) examples/speed.py --plot docs/speed.png --dark docs/speed-dark.png \
	  --pages README.md docs/benchmarks.md

# The documentation's site, in build/docs/index.html.
docs: $(VENV)/.docs
	$(VENV)/bin/sphinx-build --fail-on-warning --keep-going --fresh-env docs build/docs

# pytest on all cores: a process that has nothing left takes over what others have.
pytest = JAX_BCE_REQUIRE=$(or $(JAX_BCE_REQUIRE),cpu) $(1)/bin/pytest -n auto --dist worksteal

# Every test, with a sample of its cases.
test: ready-test
	$(call pytest,$(VENV)) -m "not second"

# Every case, also against PyTorch, and with XLA's compiler for GPUs.
test-all: ready-test $(VENV)/.cuda_plugin $(if $(filter 3.11,$(VERSION)),$(VENV)/.torch)
	$(call pytest,$(VENV)) --all

# The tests that depend on the version of JAX. One Python's wheel, which is built once, serves every JAX.
test-floor test-between test-newest: test-%:
	$(call side_by_side,.venv-$*/.versions)
	$(call pytest,.venv-$*) -m "not any_jax"

# For each Python that is here, a wheel for other machines, in dist/. Its manylinux tag says which.
# Each is tried on the oldest and the newest JAX.
.PHONY: wheels
wheels: $$(foreach version,3.11 3.12 3.13 3.14 3.15,$$(if $$(call find,$$(version)),dist/.tried-$$(version)))
	ls -sh dist/*.whl

# How long a processor takes to compile a release's modules, and their sizes: without what pip installs
# and needs itself. Needs cmake and nvcc.
.PHONY: compile-time
compile-time: $(VENV)/.test
	$(RUN) -m pip install --quiet --disable-pip-version-check 'pybind11>=3.0,<4'
	rm -rf build/timed
	cmake -S . -B build/timed -D JAX_BCE_CUDA=ON -D Python_EXECUTABLE=$(abspath $(RUN)) \
	  -D pybind11_DIR="$$($(RUN) -m pybind11 --cmakedir)"
	bash -c 'time cmake --build build/timed'
	ls -l build/timed/*.so

lint: $(VENV)/.lint
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy
	$(VENV)/bin/mypy tests/typed_program.py
	$(VENV)/bin/clang-format --dry-run --Werror csrc/*.h csrc/*.cc csrc/*.cu csrc/*.cuh $(wildcard tests/cuda_kernel/*.* tests/cuda_kernel/on_host/* tests/known_answer/* tests/out_of_memory/* tests/*.h tests/verification/*/*.h tests/verification/*/*.cc tests/verification/handlers/stub/pybind11/*)
	$(VENV)/bin/actionlint .github/workflows/*.yml
	$(VENV)/bin/check-jsonschema --builtin-schema vendor.dependabot .github/dependabot.yml
	$(VENV)/bin/check-jsonschema --builtin-schema vendor.github-issue-forms .github/ISSUE_TEMPLATE/*.yml
	$(VENV)/bin/check-jsonschema --builtin-schema vendor.citation-file-format CITATION.cff

# Whether every build requirement has a wheel for each Python that JAX supports.
.PHONY: pins
pins: $(VENV)/.test
	$(RUN) tests/pins.py

# Every float32 logit and every 16-bit one: about three minutes on two cores.
exhaustive: $(VENV)/.test
	$(RUN) tests/exhaustive.py

# What docs/verification.md promises, in full; the tests run a short form of each. `make verification`
# writes the page from the record.
records := tests/verification/results.jsonl
verify-supply: $(VENV)/.wheels
$(verify): verify-%: $(VENV)/.test
	JAX_BCE_REQUIRE=cpu $(RUN) -m pytest tests/verification/test_$*.py --all --record $(records)

# Hours, unless MUTATION="--only WORDS" narrows it. It goes on where it was stopped.
verify-mutation: $(VENV)/.test
	$(RUN) -m pip install --quiet --disable-pip-version-check 'pybind11>=3.0,<4'
	$(RUN) tests/verification/mutation.py --record $(records) $(MUTATION)

verification: $(VENV)/.test
	$(RUN) tests/verification/report.py

# Writes benchmarks/results/; BENCH="--sizes 10 18 25" narrows it.
bench: $(VENV)/.torch
	$(RUN) benchmarks/bench.py $(BENCH)
	$(RUN) benchmarks/calls.py

# On a machine with an NVIDIA GPU, with the packages of $(PYTHON) and no network: builds, runs every
# test, the exhaustive run and the benchmark, and leaves a record in benchmarks/results/.
# GPU_CHECK="--steps build,tests" narrows it.
gpu-check:
	$(PYTHON) tests/gpu_check.py $(GPU_CHECK)

# $(PYTHON), or one of the PATH's or pyenv's, if it has that version.
find = $(shell for python in $(PYTHON) python$(1) "$$(pyenv root)"/versions/$(1).*/bin/python3; do \
  "$$python" -c 'import sys; "%d.%d" % sys.version_info[:2] == "$(1)" or sys.exit(1)' && \
  echo "$$python" && break; done 2>/dev/null)

.venv-%/bin/python:
	$(foreach version,$(or $(firstword $($*)),$*),$(or $(call find,$(version)),$(error \
	  There is no Python $(version), neither on the PATH nor among pyenv's)) -m venv .venv-$*)

# A wheel serves until the sources change, or these variables ask for another. The environment
# that pip builds it in is used once, so compiling its modules to bytecode would only take time.
asked := JAX_BCE_CUDA=$(JAX_BCE_CUDA) CUDAARCHS=$(CUDAARCHS) JAX_BCE_WERROR=$(JAX_BCE_WERROR)
another = $(if $(JAX_BCE_CUDA)$(CUDAARCHS)$(JAX_BCE_WERROR),$(if $(subst =$(file <$(1)),,=$(asked)),FORCE))
.PHONY: FORCE
build/wheel-%/.built: .venv-%/bin/python $(SOURCES) $$(call another,build/wheel-$$*/.built)
	rm -rf $(@D)
	PIP_COMPILE=0 $< -m pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir $(@D) .
	echo '$(asked)' >$@

dist/.repaired-%: $(VENV)/.wheels build/wheel-%/.built
	mkdir -p dist
	rm -f dist/*-cp$(subst .,,$*)-*.whl
	PATH="$(abspath $(VENV)/bin):$$PATH" $(VENV)/bin/auditwheel repair --wheel-dir dist build/wheel-$*/*.whl
	$(VENV)/bin/auditwheel show dist/*-cp$(subst .,,$*)-*.whl
	$(RUN) -m zipfile --list dist/*-cp$(subst .,,$*)-*.whl
	touch $@

# Python 3.15 came after the oldest JAX of the others.
floor-3.15 := 3.15 jax==0.11.1 jaxlib==0.11.1
dist/.tried-%: dist/.repaired-% tests/smoke.py
	for jax in "$(wordlist 2,3,$(or $(floor-$*),$(floor)))" "$(wordlist 2,3,$(newest))"; do \
	  rm -rf build/try-$* && $(call find,$*) -m venv build/try-$* && \
	  build/try-$*/bin/python -m pip install --quiet --disable-pip-version-check $$jax dist/*-cp$(subst .,,$*)-*.whl && \
	  build/try-$*/bin/python -W error -P tests/smoke.py || exit; \
	done
	rm -rf build/try-$*
	touch $@

# What extras need is installed while the wheel is built, which takes as long. Nothing else here may run
# side by side.
ifndef SIDE_BY_SIDE
.NOTPARALLEL:
endif
side_by_side = @+$(MAKE) --no-print-directory --jobs=2 SIDE_BY_SIDE=yes $(1)
.PHONY: ready-demo ready-test
ready-demo ready-test: ready-%:
	$(call side_by_side,$(VENV)/.$*)

pip_install = $< -m pip install --quiet --disable-pip-version-check
needed = $< tests/requirements.py $(EXTRAS) >$@.txt && $(pip_install) --requirement $@.txt $(1)
# The wheel of the last prerequisite. pip would leave an older one of the same version in place.
install = $(pip_install) --no-deps --force-reinstall $(dir $(lastword $^))*.whl

# One stamp per set of extras: an install is repeated only when a source is newer.
$(VENV)/.demo: EXTRAS := examples
$(VENV)/.test: EXTRAS := test
$(VENV)/.lint: EXTRAS := test lint
$(VENV)/.docs: EXTRAS := docs
$(VENV)/.wheels: EXTRAS := wheels
$(VENV)/.needs-%: $(VENV)/bin/python pyproject.toml
	$(needed)
	touch $@
$(VENV)/.%: $(VENV)/bin/python $(VENV)/.needs-% build/wheel-$(VERSION)/.built
	$(install)
	touch $@

.venv-%/.needs: EXTRAS := test
.venv-%/.needs: .venv-%/bin/python pyproject.toml
	$(call needed,$(wordlist 2,3,$($*)))
	touch $@
.venv-%/.versions: .venv-%/bin/python .venv-%/.needs build/wheel-$$(firstword $$($$*))/.built
	$(install)
	touch $@

# XLA's compiler for GPUs, which tests use without one. Not among the installed packages: there,
# where there is no CUDA, it would make every start of JAX complain.
$(VENV)/.cuda_plugin: $(VENV)/.test
	version=$$($(RUN) -c 'import jaxlib; print(jaxlib.__version__)') && \
	$(RUN) -m pip install --quiet --disable-pip-version-check --upgrade --no-deps \
	  --target $(VENV)/cuda_plugin jax-cuda13-plugin==$$version jax-cuda13-pjrt==$$version
	touch $@

# A peer of the benchmark and of tests/conformance alone: its wheel may bring CUDA libraries of several
# GB. TORCH= leaves it out.
TORCH ?= torch==2.13.0
$(VENV)/.torch: $(VENV)/.test
	$(if $(TORCH),$(RUN) -m pip install --quiet --disable-pip-version-check $(TORCH))
	touch $@

clean:
	rm -rf build dist .venv-*
