# `make train` and `make test` are all the set-up there is: each builds .venv first if it is not there.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: train sweep test lint types unit ray test-system test-cluster bench clean

train: $(INSTALLED)  ## train the digits preset data-parallel on two Ray workers
	$(BIN)/vae-ray train digits --workers.num 2

sweep: $(INSTALLED)  ## a small sweep of the digits preset: 8 trials, a leaderboard and an HTML report
	$(BIN)/vae-ray sweep digits --num-trials 8 --training.epochs 20

test: lint types unit ray  ## everything that must hold before a commit

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(INSTALLED)
	$(BIN)/mypy

unit: $(INSTALLED)  ## no Ray, about a minute
	$(BIN)/pytest -m "not ray and not system and not faults and not cluster"

ray: $(INSTALLED)  ## real Ray workers
	$(BIN)/pytest -m ray

test-system: $(INSTALLED)  ## the HTML report in a real browser: needs Debian's chromium
	$(BIN)/pytest -m system

test-cluster: $(INSTALLED)  ## Ray on hosts that are network namespaces: needs root, iproute2, openssh-server, rsync
	$(BIN)/pytest -m cluster

bench: $(INSTALLED)  ## the README's numbers; wants an idle machine and MNIST in ../shared/data
	$(BIN)/python -m benchmarks.throughput
	$(BIN)/python -m benchmarks.gradient_sum
	$(BIN)/python -m benchmarks.time_to_quality
	$(BIN)/python -m benchmarks.sweep_trials

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
