# `make train` and `make test` are all the set-up there is: each builds .venv first if it is not there.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: train test lint types unit ray bench clean

train: $(INSTALLED)  ## train the digits preset data-parallel on two Ray workers
	$(BIN)/vae-ray train digits --workers.num 2

test: lint types unit ray  ## everything that must hold before a commit

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(INSTALLED)
	$(BIN)/mypy

unit: $(INSTALLED)  ## no Ray, about a minute
	$(BIN)/pytest -m "not ray"

ray: $(INSTALLED)  ## real Ray workers
	$(BIN)/pytest -m ray

bench: $(INSTALLED)  ## the README's numbers; wants an idle machine and MNIST in ../shared/data
	$(BIN)/python -m benchmarks.throughput
	$(BIN)/python -m benchmarks.gradient_sum
	$(BIN)/python -m benchmarks.time_to_quality

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
