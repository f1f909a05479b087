# make demo      the whole line on generated data, in a few minutes
# make test      the tests, with the real services that are installed
# make check     formatting, lint, types, layers
# make test-all  the long suites too
# make fuzz      ten minutes of damaged input for what reads tars, indexes and images
#
# PYTHON               the interpreter for .venv (3.10 or newer)
# PRETRAIN_TORCH       pip's requirement for torch, for example a CPU build
# PRETRAIN_PIP_ARGS    further arguments for pip, for example --index-url or --find-links
PYTHON ?= python3
PRETRAIN_TORCH ?= torch==2.13.0
PRETRAIN_PIP_ARGS ?=

BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check $(PRETRAIN_PIP_ARGS) -c constraints.txt

.PHONY: demo test test-all fuzz check format clean

demo: .venv/installed
	$(BIN)/pretrain demo

test: .venv/installed
	$(BIN)/python -m pytest -m "not slow and not gpu"

test-all: .venv/installed
	$(BIN)/python -m pytest

fuzz: .venv/installed
	$(PIP) -e ".[dev,fuzz]"
	PYTHONPATH=.:tests $(BIN)/python -m fuzz --minutes 10

check: .venv/installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: .venv/installed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# torch first and alone: whatever is installed next would otherwise choose its own build.
.venv/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
	  || { echo "Python 3.10 or newer is needed; set PYTHON=, for example make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv .venv \
	  || { echo "the venv module is missing; on Debian and Ubuntu: apt-get install python3-venv"; exit 1; }
	$(PIP) "$(PRETRAIN_TORCH)"
	$(PIP) -e ".[dev,peers]"
	@touch $@

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
