# make run     how fast this machine runs DeepSeek-V3's core, and what tokens would cost here and on other chips
# make test    every op against its NumPy definition, laws, bad input, native kernels under sanitizers
# make test-long   the large cases too       make bench   all bench rows      make lint   ruff       make coverage
# make gpu     all GPU kernels: values, then times, with the machine's own Python; DRY=1 compiles and lists them without one
# Each sets up all it needs: a virtual environment, torch, the native build.

VENV ?= .venv
PYTHON ?= python3
BIN = $(VENV)/bin
# $$ per hour of this machine: an assumption, give your own
DOLLARS ?= this=0.10
# where make gpu writes <chip>.jsonl
RESULTS ?= bench/results
SOURCES = CMakeLists.txt pyproject.toml $(shell find csrc -type f)
NATIVE = $(SOURCES) $(shell find tests/native -type f)

.PHONY: run test test-long coverage bench lint build native gpu triton-table cuda-table
.DELETE_ON_ERROR:

run: build
	$(BIN)/kernomics bench --quick
	$(BIN)/kernomics price --records out/bench.jsonl --plot out/roofline.png --dollars-per-hour $(DOLLARS)
	@echo 'The price of this machine, $(DOLLARS) $$/h, is an assumption: make run DOLLARS=this=<$$/h>'

bench: build
	$(BIN)/kernomics bench

test: build lint native
	$(BIN)/python -m pytest
	TRITON_INTERPRET=1 $(BIN)/python -m pytest tests/test_triton.py
	for kind in asan tsan; do $(BIN)/ctest --test-dir build/$$kind -j 2 -LE long --output-on-failure || exit 1; done

# Lines of Python that no test of `make test` runs; tracing makes the tests half as slow again.
coverage: build
	$(BIN)/python -m pytest --cov=python/kernomics --cov-report=term:skip-covered

# The definition's float64 arrays of 100s of MB are cheaper from a heap that is kept than from fresh pages. Triton's compiler,
# one thread, runs beside for half of the chips, and for the others when the rest is done; with an older Triton for sm90 alone.
test-long: build build/asan/.built build/older/.ready
	set -e; compile="$(BIN)/python -m pytest --long -m long tests/test_triton_compile.py"; \
	$$compile -k "not sm80 and not gfx" > build/compile.log 2>&1 & beside=$$!; \
	MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=30000000000 $(BIN)/python -m pytest --long -m long --ignore tests/test_triton_compile.py; \
	TRITON_INTERPRET=1 $(BIN)/python -m pytest --long -m long tests/test_triton.py; \
	$(BIN)/ctest --test-dir build/asan -j 2 -L long --output-on-failure; \
	PYTHONPATH=build/older $(BIN)/python -m pytest tests/test_triton_compile.py; \
	$$compile -k "sm80 or gfx"; \
	wait $$beside && cat build/compile.log || { cat build/compile.log; exit 1; }

# Without the network, and without a change to the Python that runs it. A wrong value does not stop the bench, which judges what
# it times. The heap is kept as above: judging takes half the time.
gpu:
ifdef DRY
	$(MAKE) build
	$(BIN)/python -m pytest tests/test_triton_compile.py
	$(BIN)/kernomics bench --gpu --dry
else
	PATH="$$PATH:/usr/local/cuda/bin" $(PYTHON) -m pip install -q --no-index --no-build-isolation --no-deps --upgrade --target build/gpu .
	failed=0; export PYTHONPATH="build/gpu$${PYTHONPATH:+:$$PYTHONPATH}"; \
	export KERNOMICS_COMMIT="$${KERNOMICS_COMMIT:-$$(git describe --always --dirty --exclude '*' 2> /dev/null)}"; \
	OPENBLAS_NUM_THREADS=2 OMP_NUM_THREADS=2 $(PYTHON) -m pytest -p no:cacheprovider \
	    $$($(PYTHON) -c "import xdist; print('-n 8')" 2> /dev/null) \
	    $$($(PYTHON) -c "import pytest_timeout; print('--timeout 120 --timeout-method thread')" 2> /dev/null) tests/test_triton.py || failed=1; \
	MALLOC_ARENA_MAX=1 MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=30000000000 $(PYTHON) -m kernomics.bench.gpu --results $(RESULTS) || failed=1; \
	exit $$failed
endif

# docs/triton_kernels.md: registers, shared memory and matrix instructions of each kernel on each chip
triton-table: build
	$(BIN)/python tests/ahead_of_time.py

# docs/cuda_kernels.md: the same of the CUDA kernels
cuda-table: build
	$(BIN)/python tests/cuda_resources.py

lint: build
	$(BIN)/ruff check python bench tests triton_kernels

build: $(VENV)/.built

native: build/asan/.built build/tsan/.built

$(VENV)/.ready: Makefile
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -U pip
	$(BIN)/python -m pip install -q torch==2.13.0 triton==3.9.0 numpy ml_dtypes typer rich pydantic scipy matplotlib plotly pyarrow pytest pytest-cov hypothesis ruff pybind11 \
	    "scikit-build-core>=0.11" "nanobind>=2.4" ninja "cmake>=3.26"
	-$(BIN)/python -m pip install -q --no-deps aiconfigurator-core==0.12.0  # kernel tables alone; tests skip without them
	touch $@

$(VENV)/.built: $(VENV)/.ready $(SOURCES)
	$(BIN)/python -m pip install -q --no-build-isolation --no-deps -e .
	touch $@

# make gpu must do with the Triton that a CUDA machine has
build/older/.ready: $(VENV)/.ready
	$(BIN)/python -m pip install -q --no-deps --target $(@D) triton==3.6.0
	touch $@

build/asan/.built: $(VENV)/.ready $(NATIVE)
build/asan/.built: SANITIZE = address,undefined
build/tsan/.built: $(VENV)/.ready $(NATIVE)
build/tsan/.built: SANITIZE = thread
build/asan/.built build/tsan/.built:
	$(BIN)/cmake -G Ninja -S . -B $(@D) -DKERNOMICS_SANITIZE=$(SANITIZE) -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN)/ninja) \
	    -DPython_EXECUTABLE=$(abspath $(BIN)/python) -Dpybind11_DIR=$$($(BIN)/python -m pybind11 --cmakedir) > /dev/null
	$(BIN)/cmake --build $(@D) > $(@D)/build.log 2>&1 || { tail -60 $(@D)/build.log; exit 1; }
	touch $@
