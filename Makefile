# `make demo` and `make test` need Python 3.11 or newer and nothing else: both build .venv first.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test test-all fuzz notebooks lint style types imports docs benchmark clean

demo: $(VENV)/installed
	$(BIN)/python -m pyro_bmr demo

# Compiling in the process itself: workers that each import torch cost more than they bring.
PYTEST := OMP_NUM_THREADS=1 TORCHINDUCTOR_COMPILE_THREADS=1 $(BIN)/python -m pytest
AT_ONCE := -n auto --dist loadfile --no-loadscope-reorder

test: $(VENV)/installed
	$(PYTEST) $(AT_ONCE) -m "not rare"

# Also what is slow and rarely fails alone; before a release.
test-all: $(VENV)/installed
	$(PYTEST) $(AT_ONCE)

# 56 times as many cases as `make test` tries of them; Pyro itself refuses one in ten of the models.
fuzz: $(VENV)/installed
	FUZZ=56 $(PYTEST) tests/fuzz

# Executes them in place, so that what they show comes from this command.
notebooks: $(VENV)/installed
	OMP_NUM_THREADS=1 $(BIN)/python notebooks/execute.py

lint: style types imports

style: $(VENV)/installed
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: $(VENV)/installed
	$(BIN)/mypy

imports: $(VENV)/installed
	$(BIN)/lint-imports

# Warnings are errors; the site is in build/docs, its notebooks are shown as they are.
docs: $(VENV)/installed
	$(BIN)/python -m sphinx -W --keep-going -n -q -d build/doctrees -c docs . build/docs

benchmark: $(VENV)/installed
	$(BIN)/python -m pytest benchmarks/test_reduce.py --benchmark-only -s

# torch goes first and by its exact version; anything else may pull another build of it.
$(VENV)/installed: pyproject.toml constraints.txt tests/moments/without-dependencies.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --no-compile --quiet --disable-pip-version-check $(shell grep '^torch==' constraints.txt)
	$(BIN)/python -m pip install --no-compile --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	$(BIN)/python -m pip install --no-compile --quiet --disable-pip-version-check --no-deps -r tests/moments/without-dependencies.txt
	touch $@

clean:
	rm -rf $(VENV)
