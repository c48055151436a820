# `make demo` and `make test` need Python 3.11 or newer and nothing else: both build .venv first.
# An environment that VENV= names is used as it is; `make install VENV=...` installs into it.
PYTHON ?= python3
NEWEST ?= python3.13
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
EXTRA ?= dev
BIN := $(VENV)/bin
READY := $(if $(filter .venv,$(VENV)),.venv/installed,named)

.PHONY: help demo test test-all test-lowest test-newest fuzz notebooks lint style types imports docs dist benchmark install named clean

help: ## list these targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 14

demo: $(READY) ## train a network, reduce it, compare
	$(BIN)/python -m pyro_bmr demo

# Compiling in the process itself: workers that each import torch cost more than they bring.
PYTEST := OMP_NUM_THREADS=1 TORCHINDUCTOR_COMPILE_THREADS=1 $(BIN)/python -m pytest
AT_ONCE := -n auto --dist loadfile --no-loadscope-reorder

test: $(READY) ## what CI runs: all tests but those marked rare
	$(PYTEST) $(AT_ONCE) -m "not rare"

test-all: $(READY) ## also those: before a release
	$(PYTEST) $(AT_ONCE)

# The versions that pyproject.toml allows at least, and those of the day, in environments of their own.
test-lowest: ## `make test` with constraints-lowest.txt
	$(MAKE) install VENV=.venv-lowest CONSTRAINTS=constraints-lowest.txt EXTRA=test
	$(MAKE) test VENV=.venv-lowest

test-newest: ## `make test` with constraints-newest.txt, on Python 3.12 or newer
	$(MAKE) install VENV=.venv-newest CONSTRAINTS=constraints-newest.txt EXTRA=test PYTHON=$(NEWEST)
	$(MAKE) test VENV=.venv-newest

# 56 times as many cases as `make test` tries of them; Pyro itself refuses one in ten of the models.
fuzz: $(READY) ## many more cases of tests/fuzz
	FUZZ=56 $(PYTEST) tests/fuzz

# Executes them in place, so that what they show comes from this command.
notebooks: $(READY) ## execute the notebooks in place
	OMP_NUM_THREADS=1 $(BIN)/python notebooks/execute.py

lint: style types imports ## these three

style: $(READY) ## ruff
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: $(READY) ## mypy
	$(BIN)/mypy

imports: $(READY) ## the import contracts
	$(BIN)/lint-imports

# Warnings are errors; the site is in build/docs, its notebooks are shown as they are.
docs: $(READY) ## the site, in build/docs
	$(BIN)/python -m sphinx -W --keep-going -n -q -d build/doctrees -c docs . build/docs

benchmark: $(READY) ## measure reduce
	$(BIN)/python -m pytest benchmarks/test_reduce.py --benchmark-only -s

# Into build/dist.
dist: $(READY) ## build wheel and sdist, and check them
	rm -rf build/dist
	$(BIN)/python -m build --no-isolation --outdir build/dist >/dev/null
	$(BIN)/twine check --strict build/dist/*
	$(BIN)/check-wheel-contents build/dist/*.whl
	$(BIN)/pyroma --min 10 --skip-tests AuthorEmail build/dist/*.tar.gz

install: $(VENV)/installed ## make the environment that VENV names (.venv), or install into it

# torch goes first and by its exact version; anything else may pull another build of it.
PIP := $(BIN)/python -m pip install --no-compile --quiet --disable-pip-version-check
$(VENV)/installed: pyproject.toml $(CONSTRAINTS) tests/moments/without-dependencies.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) $(shell grep '^torch==' $(CONSTRAINTS))
	$(PIP) -c $(CONSTRAINTS) -e '.[$(EXTRA)]'
	$(PIP) --no-deps -r tests/moments/without-dependencies.txt
	touch $@

named:
	@$(BIN)/python -P -c 'import importlib.util as i, sys; sys.exit(not i.find_spec("pyro_bmr"))' 2>/dev/null \
		|| { echo 'VENV=$(VENV) has no pyro_bmr: `make install VENV=$(VENV)` installs it, with its tools'; exit 1; }

clean: ## remove .venv and what was built
	rm -rf .venv .venv-lowest .venv-newest build
