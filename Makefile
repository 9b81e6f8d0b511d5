# Every word makes what it needs first: the virtual environment, torch, the build. The second time it is quick.
PYTHON ?= python3
VENV ?= .venv
# What `pip install` is given, so another build or index can be named:
#   make test TORCH="torch --index-url https://download.pytorch.org/whl/cpu"
TORCH ?= torch==2.13.0
# Further arguments for the program behind a word: make test ARGS="-k layouts"
ARGS ?=

PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check
# Inside the environment, because a build fits only the Python and the torch that it was configured with.
BUILD := $(VENV)/build
STAMPS := $(VENV)/stamps
CUDA_HOST := $(VENV)/cuda_host
CPP := $(shell find csrc tests/cuda_host -name '*.h' -o -name '*.cpp' -o -name '*.cu')
BUILD_INPUTS := $(shell find csrc cmake -type f) CMakeLists.txt pyproject.toml

.DEFAULT_GOAL := help
.PHONY: help demo test versions lint cuda cuda-host sanitize gpu bench build format clean

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-9s %s\n", $$1, $$2 }' Makefile

demo: build  ## train a small segmentation network on scenes that the program draws; results in build/demo
	$(PY) examples/train_segmentation.py --output build/demo $(ARGS)

test: build cuda-host  ## run the tests and the examples in the docstrings
	$(PY) -m pytest --numprocesses auto --dist worksteal $(ARGS)

versions: build  ## run a part of the tests with the same binary under the oldest torch; ARGS="2.11.0 newest" for others
	$(PY) tools/check_torch_versions.py $(or $(ARGS),2.10.0 --quick)

lint: build  ## check style, types, the rule of the rooms, and the symbols of the binary
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(VENV)/bin/clang-format --dry-run -Werror $(CPP)
	$(PY) -m mypy
	$(PY) tools/check_rooms.py
	$(PY) tools/check_symbols.py $(BUILD)

cuda: build  ## compile the CUDA kernels for several architectures, without a GPU; nothing where nvcc is missing
	$(PY) tools/check_cuda.py

cuda-host: build  ## compile the CUDA kernels for the CPU, where the tests run them thread by thread
	$(call BUILD_CUDA_HOST,$(CUDA_HOST),OFF)

# In a folder of its own: sanitized code is three times slower, which is too long for every change.
SANITIZED := $(VENV)/cuda_host_sanitized
sanitize: build  ## run those tests under AddressSanitizer and UBSan
	$(call BUILD_CUDA_HOST,$(SANITIZED),ON)
	FUSEDLOSS_CUDA_HOST_LIBRARY=$(SANITIZED)/_C_cuda_host.so FUSEDLOSS_TEST_SEEDS=40 ASAN_OPTIONS=detect_leaks=0 \
	  FUSEDLOSS_CUDA_HOST_PRELOAD="$$(gcc -print-file-name=libasan.so):$$(gcc -print-file-name=libstdc++.so)" \
	  $(PY) -m pytest --numprocesses auto --dist worksteal tests/test_cuda_host_promises.py $(ARGS)

# $(1): the build folder. $(2): under the sanitizers?
define BUILD_CUDA_HOST
	@FORCE_CUDA=0 $(VENV)/bin/cmake -S . -B $(1) -G Ninja -DCMAKE_BUILD_TYPE=Release -DFUSEDLOSS_SANITIZE=$(2) \
	  -DFUSEDLOSS_CUDA_HOST=ON -DPython_EXECUTABLE=$(abspath $(PY)) -DCMAKE_MAKE_PROGRAM=$(abspath $(VENV)/bin/ninja) \
	  -Dpybind11_DIR=$$($(PY) -m pybind11 --cmakedir) > /dev/null
	FORCE_CUDA=0 $(VENV)/bin/cmake --build $(1) --target _C_cuda_host
endef

gpu:  ## on a machine with an NVIDIA GPU, without a network: build, test, sanitize, measure; ARGS="tests" for a part
	PYTHON=$(PYTHON) tools/gpu.sh $(ARGS)

bench: build  ## time the losses against eager PyTorch, torch.compile and the memory's own speed
	$(PY) -m benchmarks $(ARGS)

build: $(STAMPS)/built  ## compile, and install so that edits of Python files count at once

format: build  ## rewrite the sources in the project's style
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
	$(VENV)/bin/clang-format -i $(CPP)

clean:  ## remove everything that was built (the environment keeps its packages)
	rm -rf build dist $(BUILD) $(CUDA_HOST) $(SANITIZED) $(STAMPS)/built .mypy_cache .pytest_cache .ruff_cache .hypothesis

# Debian splits ensurepip from Python; then the pip that is there installs one into the environment.
$(PY):
	$(PYTHON) -m venv $(VENV) || { $(PYTHON) -m venv --clear --without-pip $(VENV) && \
	  $(PYTHON) -m pip --python $(PY) install --quiet pip; }

# Rewritten only when TORCH differs from the last time, so that a new TORCH means a new installation and a new build.
$(STAMPS)/torch-wanted: $(PY) FORCE
	@mkdir -p $(STAMPS)
	@echo '$(TORCH)' | cmp --silent - $@ || echo '$(TORCH)' > $@

$(STAMPS)/torch: $(STAMPS)/torch-wanted
	$(PIP) install --quiet $(TORCH)
	@touch $@

# The build tools stand in the environment, because the build is not isolated: it has to see torch.
$(STAMPS)/built: $(STAMPS)/torch $(BUILD_INPUTS)
	$(PIP) install --quiet "scikit-build-core>=0.11" "pybind11>=2.13" cmake ninja
	$(PIP) install --quiet --no-build-isolation --config-settings=build-dir=$(BUILD) --editable '.[test,dev,bench,examples]'
	@touch $@

FORCE:
