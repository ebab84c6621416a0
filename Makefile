# make test     everything that has to hold: lint, format, types, tests (installs what it needs)
# make load     many clients, and what they cost (LOAD="--short" for a short run)
# make soak     a day's requests in minutes, and nothing of them stays (SOAK="--minutes 1" for a short run)
# make crash    the server killed, its power cut, its resources gone (CRASH="--minutes 1" for a short run)
# make fuzz     millions of bad inputs (FUZZ="--inputs 200000" for a short run)
# make bench    side by side with the peers that are installed (BENCH="--quick" for a short run)
# make bench-plots  how cost grows, measured and drawn into docs/plots (PLOTS="--quick" for a short run)

PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
WORKERS ?= 2
TESTS ?= tests
CRASH ?= --minutes 20
CONNECTIONS ?= 2000

.PHONY: all test check pytest bench bench-plots crash fuzz load soak peers peers-next venv clean

all: test

test: check pytest

check: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

pytest: venv peers-next
	$(BIN)/python -m pytest -n $(WORKERS) $(TESTS)

bench: venv peers
	$(BIN)/python benchmarks/bench.py $(BENCH)

bench-plots: venv peers
	$(BIN)/python -m pip install -qq --disable-pip-version-check -e ".[plots]"
	$(BIN)/python benchmarks/plots.py $(PLOTS)

load: venv peers
	$(BIN)/python campaigns/load.py $(LOAD)

soak: venv peers
	$(BIN)/python campaigns/soak.py $(SOAK)

crash: venv peers
	$(BIN)/python campaigns/crash.py $(CRASH)
	$(BIN)/python campaigns/crash.py --mutants
	$(BIN)/python campaigns/faults.py

fuzz: venv peers
	$(BIN)/python -m pip install -qq --disable-pip-version-check -e ".[fuzz]"
	$(BIN)/python campaigns/fuzz.py $(FUZZ)
	$(BIN)/python campaigns/fuzz.py --mutants
	CONNECTIONS=$(CONNECTIONS) $(BIN)/python -m pytest --timeout 1800 tests/server/test_connection_machine.py

venv: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml setup.py src/pynbdkit/native/symbols.c
	PYTHON="$(PYTHON)" VENV="$(VENV)" scripts/venv
	touch $@

peers:
	scripts/peers

peers-next: peers
	scripts/peers-next

clean:
	rm -rf $(VENV) .peers build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +
