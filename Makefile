# `make demo` and `make test` start from a bare machine with Python 3.11 or newer; they make .venv first if it is not there.
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
DEMO ?= demo
BIN = $(VENV)/bin

.PHONY: demo test test-real lint clean

$(VENV)/installed: pyproject.toml setup.py
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet "$(TORCH)" -e ".[dev]"
	touch $@

test: $(VENV)/installed
	OMP_NUM_THREADS=1 $(BIN)/pytest -n auto  # a worker a core: threads of their own would wait for each other

test-real: $(VENV)/installed
	$(BIN)/pytest -m real

lint: $(VENV)/installed
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

# The real model, converted by a short LoLCATs run on the CPU, measured beside the base and beside an untrained conversion.
demo: $(VENV)/installed
	$(BIN)/kit convert smollm2 --recipe lolcats-demo --output $(DEMO)/untrained --overwrite --quiet \
		--set transfer.steps=0 --set lora.steps=0 --eval-tokens 0
	$(BIN)/kit convert smollm2 --recipe lolcats-demo --output $(DEMO)/converted --overwrite --eval-tokens 0
	$(BIN)/kit eval $(DEMO)/converted $(DEMO)/untrained --base smollm2 --num-tokens 4096 --ablations
	$(BIN)/kit chat $(DEMO)/converted --prompt "What is the capital of France?" --max-new-tokens 64

clean:
	rm -rf $(VENV) $(DEMO) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
