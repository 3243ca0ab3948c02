# make demo and make test work on a machine with Python >= 3.10 and make; nothing else is assumed.
#   DEMO    more words for `tinyclip demo`, such as DEMO="--seeds 3"
#   PYTHON  the interpreter that makes .venv (python3); `make gpu PYTHON=...` runs with it
#   TORCH   a requirement to hold torch at, such as TORCH="torch==2.13.0"
#   JOBS    parallel test processes (2)
DEMO ?=
PYTHON ?= python3
TORCH ?=
JOBS ?= 2

BIN := .venv/bin
SOURCES := $(shell find csrc -type f)
TRITON_TESTS := $(wildcard tests/triton/test_*.py)
# Without a .venv, as on a GPU machine that is offline, the machine's own Python runs the proof.
GPU_PYTHON := $(if $(filter file,$(origin PYTHON)),$(or $(wildcard $(BIN)/python),$(PYTHON)),$(PYTHON))

# Compiling CUDA code takes minutes, and without a driver nothing runs it.
DEMO_CUDA := $(if $(wildcard /proc/driver/nvidia/version),auto,0)

.PHONY: help demo test lint format bench soak gpu clean FORCE

help:
	@echo "make demo    install, train a CLIP, distill a small one, write runs/demo/report.html"
	@echo "make test    build, then every test that takes seconds"
	@echo "make soak    the tests that take minutes, the install cases included"
	@echo "make lint    ruff and clang-format, changing nothing; make format changes"
	@echo "make bench   the benchmarks at CPU sizes"
	@echo "make gpu     build, GPU tests and benchmarks in one command, offline; GPU_BUDGET_S=540"
	@echo "make clean   remove what was built, not .venv"

# Where the tests' environment is there already, it has all that the demo needs.
demo: $(or $(wildcard .venv/built),.venv/demo)
	$(BIN)/tinyclip demo $(DEMO)

# The interpreter tier is a process of its own: TRITON_INTERPRET is read when a kernel is defined.
# One OpenMP thread a worker: two workers with all threads each would fight over the processors.
test: .venv/built
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --ignore=tests/triton
ifneq ($(TRITON_TESTS),)
	OMP_NUM_THREADS=1 TRITON_INTERPRET=1 $(BIN)/python -m pytest -n $(JOBS) tests/triton
endif

soak: .venv/built
	$(BIN)/python -m pytest -m soak

bench: .venv/built
	$(BIN)/python -m bench

gpu:
	$(GPU_PYTHON) -m bench gpu

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	find csrc -type f | xargs $(BIN)/clang-format --dry-run -Werror

format: .venv/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	find csrc -type f | xargs $(BIN)/clang-format -i

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .benchmarks
	rm -f tinyclip/_build_info.json tinyclip/_C*.so .venv/built .venv/demo
	find . -name __pycache__ -type d -not -path './.venv/*' -prune -exec rm -rf {} +

.venv/bin/python:
	$(PYTHON) -c 'import sys; v = sys.version.split()[0]; sys.exit(sys.version_info < (3, 10) and f"Python {v} is too old: TinyCLIP needs 3.10 or newer; choose one with make PYTHON=...")'
	$(PYTHON) -m venv .venv

# Holds the torch that was asked for, and changes only when that does.
.venv/torch.txt: .venv/bin/python FORCE
	@echo '$(TORCH)' | cmp -s - $@ || echo '$(TORCH)' > $@

.venv/demo: setup.py pyproject.toml $(SOURCES) .venv/torch.txt
	TINYCLIP_CUDA=$(DEMO_CUDA) $(BIN)/python -m pip install $(if $(TORCH),'$(TORCH)') -e '.[demo]'
	touch $@

# Its own build of the extension is for lint and the like; .venv/built brings the whole one.
.venv/installed: pyproject.toml .venv/torch.txt
	TINYCLIP_CUDA=0 $(BIN)/python -m pip install $(if $(TORCH),'$(TORCH)') -e '.[dev]'
	touch $@

# Builds in the environment, not in pip's isolation, so that ninja compiles only what has changed.
.venv/built: setup.py $(SOURCES) .venv/installed
	$(BIN)/python -m pip install --quiet --no-build-isolation --no-deps -e .
	touch $@
