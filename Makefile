# One command each. `make` alone says which; a machine with Python 3.11, pip and a compiler is enough.

PYTHON ?= python3
WORKERS ?= 2
VENV := .venv
RIVALS := .venv-rivals
MERGEKIT := .venv-mergekit
BIN := $(VENV)/bin
export PIP_DISABLE_PIP_VERSION_CHECK := 1

# Each worker is one process with one thread: two workers with two threads each only fight over two cores, and
# tests of bit-identity at several thread counts set their own. A file's tests stay in one worker (loadfile),
# so that a browser or a comparison of real checkpoints is made once a file.
PYTEST := OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN)/python -m pytest \
	-n $(WORKERS) --dist loadfile --durations=10

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:
.PHONY: help demo test test-slow bench notebooks fuzz lint types format clean

help: ## say what each command does
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(VENV)/.ready ## fetch a real model and its fine-tune (167 MB), leave the report on them in demo/
	@base=$$($(BIN)/python -m spectra.examples minilm) && \
	tuned=$$($(BIN)/python -m spectra.examples minilm-sre) && \
	$(BIN)/python -m spectra.report "$$base" "$$tuned" --out demo && \
	echo "Open $(CURDIR)/demo/report.html"

test: lint types $(VENV)/.ready-dev ## lint, types, floors, then every test that is neither slow nor a timing
	$(PYTEST)

test-slow: $(VENV)/.ready-dev ## the tests that take minutes
	$(PYTEST) -m slow

bench: $(VENV)/.ready-dev $(RIVALS)/.ready $(MERGEKIT)/.ready ## timings against named rivals, each beside its accuracy (15 minutes, 7 GB of disk)
	$(BIN)/python -m tests.benchmarks

notebooks: $(VENV)/.ready-dev ## run every notebook from its text, and write it without its outputs
	$(BIN)/jupytext --to ipynb notebooks/*.py
	$(BIN)/python -m pytest tests/test_notebooks.py -q

fuzz: $(VENV)/.ready-dev ## 200 000 mangled file headers, 50 000 mangled indexes
	PYTHONPATH=. $(BIN)/python tests/checkpoints/test_headers_fuzz.py 200000 50000

lint: $(VENV)/.ready-dev ## ruff, and the floors of the house (import-linter)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

types: $(VENV)/.ready-dev ## mypy, strict
	$(BIN)/mypy

format: $(VENV)/.ready-dev ## let ruff mend what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## delete reports, builds and caches; the environment stays
	rm -rf demo out build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +

# Set-up. The stamps are newer than what they were made from, so a second call does nothing.

$(VENV)/.ready: pyproject.toml constraints.txt
	$(environment)
	$(BIN)/python -m pip install --quiet --editable . --constraint constraints.txt
	@touch $@

$(VENV)/.ready-dev: pyproject.toml constraints.txt
	$(environment)
	$(BIN)/python -m pip install --quiet --editable '.[dev]' --constraint constraints.txt
	@touch $(VENV)/.ready $@

# Rivals pin what we do not, so they live apart.
$(RIVALS)/.ready: constraints.txt
	$(PYTHON) -m venv --clear $(RIVALS)
	$(RIVALS)/bin/python -m pip install --quiet weightwatcher==0.7.7 transformers torch --constraint constraints.txt
	@touch $@

$(MERGEKIT)/.ready: constraints.txt
	$(PYTHON) -m venv --clear $(MERGEKIT)
	$(MERGEKIT)/bin/python -m pip install --quiet mergekit==0.1.5 torch --constraint constraints.txt
	@touch $@

# A set-up that was interrupted leaves an environment without pip: it is made anew.
define environment
@$(BIN)/python -m pip --version >/dev/null 2>&1 || { \
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "constraints.txt pins releases for Python 3.11 or newer; try make PYTHON=python3.11 $(MAKECMDGOALS)" >&2; \
		exit 1; }; \
	echo "Setting up $(VENV): a few minutes, once"; \
	$(PYTHON) -m venv --clear $(VENV); }
endef
