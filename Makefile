# make demo      the whole line on generated data, in a few minutes
# make test      the tests, with the real services that are installed
# make check     formatting, lint, types, layers
# make test-all  the slow tests too, every row of the fault matrix among them
# make streams   one stream over ranks, workers, kills and a store that fails, 18 ways; requests counted at the server
# make fuzz      ten minutes of damaged input for what reads tars, indexes and images
# make faults    every row of the fault matrix, and its table, tests/faults/README.md
# make faults-deepspeed  the same signals under plain `deepspeed`, for that page
# make soak      half an hour of training with a fault every 30 to 60 seconds, then the proof that nothing was lost;
#                for that page as well
#
# PYTHON                     the interpreter for .venv (3.10 or newer)
# PRETRAIN_TORCH             pip's requirement for torch, for example a CPU build
# PRETRAIN_PIP_ARGS          further arguments for pip, for example --index-url or --find-links
# PRETRAIN_TEST_PROCESSES    how many `make test` runs at once; 0 is one after another, in pytest's own process
PYTHON ?= python3
PRETRAIN_TORCH ?= torch==2.13.0
PRETRAIN_PIP_ARGS ?=
PRETRAIN_TEST_PROCESSES ?= 2

BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check $(PRETRAIN_PIP_ARGS) -c constraints.txt

.PHONY: demo test test-all streams fuzz faults faults-deepspeed soak check format clean

demo: .venv/installed
	$(BIN)/pretrain demo

# Two processes, for much of the tests is waiting; a file's tests stay together, as they share what they set up.
# The long suites have the machine to themselves: some of them measure.
test: .venv/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(PRETRAIN_TEST_PROCESSES) --dist loadfile -m "not slow and not gpu"

STREAMS := tests/faults/test_one_stream.py tests/data/test_requests.py
# These look at the whole machine, or hold times against bounds: one after another.
ALONE := $(wildcard tests/faults/test_matrix*.py) tests/watch

test-all: test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(PRETRAIN_TEST_PROCESSES) --dist loadfile -m "slow or gpu" $(STREAMS:%=--ignore=%) $(ALONE:%=--ignore=%)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "slow or gpu" $(ALONE)

streams: .venv/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "" $(STREAMS)

fuzz: .venv/installed
	$(PIP) -e ".[dev,fuzz]"
	PYTHONPATH=.:tests $(BIN)/python -m fuzz --minutes 10

faults: .venv/installed
	OMP_NUM_THREADS=1 PYTHONPATH=.:tests $(BIN)/python -m faults.matrix

faults-deepspeed: .venv/installed
	OMP_NUM_THREADS=1 PYTHONPATH=.:tests $(BIN)/python -m faults.matrix --plain-deepspeed

soak: .venv/installed
	MATRIX_MEASURE=1 OMP_NUM_THREADS=1 PYTHONPATH=.:tests $(BIN)/python -m faults.matrix.soak --minutes 30

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
