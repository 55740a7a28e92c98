# The same verbs for people and for CI. PYTHON may name another interpreter (3.11 or newer); VENV another place.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
DATA ?= phantom
TASK ?=
OUT ?= artifacts
ROUNDS ?= 10
SECONDS ?= 300
CODE := defense services training zo_gateway benchmarks tests

# PyTorch from an index of its builds (cpu, cu126, ...) instead of PyPI; an installed one is replaced after `make clean`.
TORCH ?=
INDEX := $(if $(TORCH),--extra-index-url https://download.pytorch.org/whl/$(TORCH))
# The contract tests start MLServer from here: it needs an older FastAPI than this project's.
MLSERVER := .venv-mlserver
# A module's tests stay in one process, which makes its fixtures once; every process imports PyTorch.
PYTEST := $(BIN)/pytest --numprocesses logical --maxprocesses 4 --dist loadfile

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help install demo test test-slow test-all chaos fuzz load bench reference audit lint format compose-check clean

help: ## List the targets.
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 16

# Each extra has a stamp, which makes a target cheap once its extra is there and follows changes of pyproject.toml.
$(BIN)/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed; name one with: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed-%: pyproject.toml | $(BIN)/pip
	$(BIN)/pip install --quiet $(INDEX) --editable '.[$*]'
	@touch $@

$(MLSERVER)/.installed:
	$(PYTHON) -m venv $(MLSERVER)
	$(MLSERVER)/bin/pip install --quiet 'mlserver>=1.7; python_version < "3.13"'
	@touch $@

install: $(VENV)/.installed-dev ## Make the virtual environment and install everything into it.

demo: $(VENV)/.installed-training ## The main job end to end on DATA (phantom, or a folder), into OUT; TASK=segmentation, TORCH=cpu.
	$(BIN)/python -m training.demo --data $(DATA) $(if $(TASK),--task $(TASK)) --out $(OUT)

test: $(VENV)/.installed-test ## The fast tests: minutes.
	$(PYTEST) -m 'not slow'

test-slow: install $(MLSERVER)/.installed ## The others: real processes, faults, a browser, other servers, benchmarks.
	$(PYTEST) -m slow tests

test-all: test test-slow ## All tests.

chaos: install ## Faults on purpose, for many rounds: victims, gateway and trainer killed, hung, lied to, out of disk.
	CHAOS_ROUNDS=$(ROUNDS) $(BIN)/pytest tests/e2e/test_faults.py tests/e2e/test_zo_fit_over_http.py

fuzz: install ## Coverage-guided fuzzing of all that reads foreign bytes, SECONDS for each target.
	@mkdir -p $(OUT)/fuzz
	for target in oip image dicom inflate artifact; do \
		PYTHONPATH=$(CURDIR) $(BIN)/python tests/fuzz/targets.py $$target $(OUT)/fuzz/$$target \
			-max_total_time=$(SECONDS) -artifact_prefix=$(OUT)/fuzz/ || exit 1; \
	done

load: install ## The gateway at twice its capacity, after make demo: goodput, latencies, memory.
	$(BIN)/python -m benchmarks.load --victim $(OUT)/phantom/victim --artifact $(OUT)/phantom/zo-ds --seconds $(SECONDS)

bench: install ## Ratios, after make demo: gateway and model against alternatives, its modes, runtimes, HTTP in zo_fit.
	$(BIN)/python -m benchmarks.runtimes --artifact $(OUT)/phantom/zo-ds
	$(BIN)/python -m benchmarks.latency --victim $(OUT)/phantom/victim --artifact $(OUT)/phantom/zo-ds
	$(BIN)/python -m benchmarks.throughput --victim $(OUT)/phantom/victim --artifact $(OUT)/phantom/zo-ds
	$(BIN)/python -m benchmarks.gateway_modes --victim $(OUT)/phantom/victim --artifact $(OUT)/phantom/zo-ds
	$(BIN)/python -m benchmarks.zo_throughput --model $(OUT)/phantom/victim --artifact $(OUT)/phantom/pretrained/denoiser
	$(BIN)/python -m benchmarks.scaling --victim $(OUT)/phantom/victim --pretrained $(OUT)/phantom/pretrained

reference: install ## The API reference, from the docstrings, as HTML below OUT/reference.
	$(BIN)/python -W error::UserWarning -m pdoc --docformat google --output-directory $(OUT)/reference defense services training

audit: install ## Look the installed packages up in the database of known vulnerabilities.
	$(BIN)/pip-audit --skip-editable

lint: install ## Check style and types.
	$(BIN)/ruff check $(CODE)
	$(BIN)/ruff format --check $(CODE)
	$(BIN)/mypy

format: install ## Rewrite the code in the project's style.
	$(BIN)/ruff check --fix $(CODE)
	$(BIN)/ruff format $(CODE)

compose-check: ## Check docker-compose.yml for real, where a container engine is there; NO_BUILD=1 takes images as they are.
	deploy/compose-check.sh

clean: ## Remove what install and the tools made (not the artifacts).
	rm -rf $(VENV) $(MLSERVER) build *.egg-info .mypy_cache .pytest_cache .ruff_cache
