# Everything a person types. `make demo` from a clean clone needs only Python 3.11 and make.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
READY := .venv/.ready

.PHONY: help setup demo test test-gpu fuzz test-extras check format bench bench-sweep bench-gpu clean

help:  ## show this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' Makefile | expand -t 14

setup: $(READY)  ## make .venv with everything in it

# Runs again only when what is to be installed has changed.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --no-compile -e '.[dev]' -c constraints.txt
	@touch $@

demo: $(READY)  ## Bayesian sweep of the digits experiment: 12 trials, leaderboard, where to look
	$(BIN)/stagesweep -m search=bayes experiment=digits search.n_trials=12 stage.figures.umap=false

# One thread a process: the tests run in parallel themselves. Neighbouring tests stay in one process,
# which makes what they share once; a process that has finished takes half of another's rest.
test: $(READY)  ## run the tests (real data: set STAGESWEEP_TEST_DATA)
	OMP_NUM_THREADS=1 $(BIN)/pytest -n auto --dist worksteal

test-gpu: $(READY)  ## run the tests that need a GPU, one by one: they share its memory
	OMP_NUM_THREADS=1 $(BIN)/pytest -m gpu

# Again with the same inputs: make fuzz SEED=1 (the seed that was printed).
SECONDS ?= 60
fuzz: $(READY)  ## try random and damaged inputs: make fuzz SECONDS=600
	PYTHONPATH=tests OMP_NUM_THREADS=1 $(BIN)/python -m fuzz --seconds $(SECONDS) $(if $(SEED),--seed $(SEED))

# In an environment of its own: what is optional must not be needed by the other tests. Of Ray only
# what runs tasks: what its dashboard wants does not go with the other pins.
test-extras: .venv-extras/.ready  ## test PostgreSQL, joblib, submitit and Ray for real
	OMP_NUM_THREADS=1 .venv-extras/bin/pytest tests/sweep/test_servers.py tests/sweep/engine/test_backends.py

.venv-extras/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-extras
	.venv-extras/bin/python -m pip install --quiet -e '.[dev,postgres,joblib,submitit]' ray -c constraints.txt
	.venv-extras/bin/python -m pip install --quiet --no-deps hydra-ray-launcher -c constraints.txt
	@touch $@

check: $(READY)  ## lint, format, types, import rules
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

format: $(READY)  ## put the code in its normal form
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

bench: $(READY)  ## the fit loop against a bare loop and against Lightning
	$(BIN)/python -m pip install --quiet -e '.[bench]' -c constraints.txt
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.fit_loop

# One by itself, or a smoke run: python -m benchmarks.sweep overhead --small
bench-sweep: $(READY)  ## the sweep engine against the stock sweeper, reuse, pruning, kills
	$(BIN)/python -m pip install --quiet -e '.[bench]' -c constraints.txt
	status=0; for name in overhead kills busy duplicates reuse asha; do echo "== $$name"; \
		OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.sweep $$name || status=1; done; exit $$status

# A file that an experiment reads: make bench-gpu DATA='--data audiogram=mice.csv'
bench-gpu: $(READY)  ## throughput, memory and a real shortage of it on a GPU
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.gpu $(DATA)
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.memory --device cuda
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.processes

clean:  ## remove .venv and caches; results stay
	rm -rf .venv .venv-extras .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis build dist
