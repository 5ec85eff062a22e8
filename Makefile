# `make train` and `make test` are all the set-up there is: each builds .venv first if it is not there.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
TWO := --numprocesses=2 --dist=worksteal

.PHONY: train sweep test lint types unit ray test-ray test-system test-cluster faults faults-short soak audit bench clean

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

# Collecting all tests takes 25 s of a core: each target reads those directories alone in which its tests may be
# (tests/test_architecture.py holds that they are there).
unit: $(INSTALLED)  ## no Ray; six minutes on two cores
	$(BIN)/pytest $(TWO) --ignore=tests/faults --ignore=tests/system -m "not ray and not cluster"

CORE_RAY := tests/distributed/test_workers.py tests/distributed/test_readme.py
ray: $(INSTALLED)  ## real Ray workers: training, the pages' examples
	$(BIN)/pytest -m ray $(CORE_RAY)

test-ray: $(INSTALLED)  ## the other tests with Ray: sweeps, drivers that end, jobs, object stores, nodes
	$(BIN)/pytest -m ray tests/distributed tests/parallel $(addprefix --ignore=,$(CORE_RAY))

test-system: $(INSTALLED)  ## the HTML report in a real browser: needs Debian's chromium
	$(BIN)/pytest tests/system

faults: $(INSTALLED)  ## every fault, with real kills and real Ray workers; prints the table and fails on a gap
	VAE_RAY_FAULTS=full $(BIN)/pytest tests/faults

faults-short: $(INSTALLED)  ## the same without Ray, and a sample of the kills: under five minutes on two cores
	VAE_RAY_FAULTS=short $(BIN)/pytest $(TWO) -m "not ray" tests/faults

MINUTES ?= 10
soak: $(INSTALLED)  ## random kills for MINUTES minutes; `make soak MINUTES=60 SOAK=--ray` on Ray workers too
	$(BIN)/python -m tests.faults.soak --minutes $(MINUTES) $(SOAK)

audit: $(INSTALLED)  ## known vulnerabilities of the pinned dependencies; needs a network that reaches a vulnerability service
	$(BIN)/python -m pip install --quiet --constraint constraints.txt pip-audit
	$(BIN)/python -m tests.faults.audit

test-cluster: $(INSTALLED)  ## Ray on hosts that are network namespaces: needs root, iproute2, openssh-server, rsync
	$(BIN)/pytest --numprocesses=2 --dist=loadfile -m cluster tests/cluster

bench: $(INSTALLED)  ## what docs/performance.md compares; wants an idle machine and MNIST in ../shared/data
	$(BIN)/python -m benchmarks.throughput
	$(BIN)/python -m benchmarks.gradient_sum
	$(BIN)/python -m benchmarks.time_to_quality
	$(BIN)/python -m benchmarks.sweep_trials
	$(BIN)/python -m benchmarks.input_pipeline

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
