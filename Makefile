# make demo    the main job on the embedded default, in a virtual environment that is made when missing
# make test    linters, then every test
# make test-transformers5  the tests again in an environment with transformers 5, its result in docs/transformers.md
# make test-oldest  the tests again under the oldest releases that setup.cfg allows (PYTHON=python3.10 for the oldest Python too)
# make site    the documentation, into site/
# make figures every page of docs/ and the README's table, by their own commands, in an environment of their own, whose packages ask
#              for an older numpy (hours; FIGURES="exact speed" for some)
#
# VENV may name an existing environment, PYTHON the interpreter that makes a new one, PYTEST_ARGS other options than those
# for all cores.
VENV ?= .venv
PYTHON ?= python3
# Files in their order: by their number of tests the longest would come last, and one processor would wait.
PYTEST_ARGS ?= --numprocesses auto --dist loadfile --no-loadscope-reorder
VENV5 ?= .venv-transformers5
VENVO ?= .venv-oldest
VENVF ?= .venv-figures

# Modules are compiled when they are imported: pip would compile all of them, a minute of one core.
PIP_ARGS := --quiet --disable-pip-version-check --no-compile
BIN := $(VENV)/bin
# Written after an install that succeeded, older than setup.cfg when the dependencies may have changed.
INSTALLED := $(VENV)/.fusion_bench_didi-installed
INSTALLED_TEST := $(VENV)/.fusion_bench_didi-installed-test
INSTALLED_DOCS := $(VENV)/.fusion_bench_didi-installed-docs

.PHONY: demo test test-transformers5 test-oldest lint format figures site clean

demo: $(INSTALLED)
	$(BIN)/python -m fusion_bench_didi.demo

# One thread: the matrices of the tests are small, and threads that compete made a small SVD 400 times slower.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PYTEST_ARGS)

lint: $(INSTALLED_TEST)
	$(BIN)/python -m black --check . || { echo "run 'make format'" >&2; exit 1; }
	$(BIN)/python -m isort --check . || { echo "run 'make format'" >&2; exit 1; }
	$(BIN)/lint-imports --no-logo --no-cache || { echo "see the contracts of the rooms in pyproject.toml" >&2; exit 1; }

test-transformers5:
	test -x $(VENV5)/bin/python || $(PYTHON) -m venv $(VENV5)
	$(VENV5)/bin/python -m pip install $(PIP_ARGS) --editable '.[test]'
	$(VENV5)/bin/python -m pip install $(PIP_ARGS) --upgrade 'transformers>=5'
	PYTEST_ARGS="$(PYTEST_ARGS)" $(VENV5)/bin/python -m benchmarks.transformers_page

# Slow tests and those of the installation itself are about this machine.
test-oldest:
	test -x $(VENVO)/bin/python || $(PYTHON) -m venv $(VENVO)
	$(VENVO)/bin/python -m pip install $(PIP_ARGS) --constraint tests/oldest.txt --editable '.[test]'
	OMP_NUM_THREADS=1 $(VENVO)/bin/python -m pytest $(PYTEST_ARGS) -m 'not slow' --ignore tests/test_install.py

site: $(INSTALLED_DOCS)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --site-dir site

figures:
	test -x $(VENVF)/bin/python || $(PYTHON) -m venv $(VENVF)
	$(VENVF)/bin/python -m pip install $(PIP_ARGS) --editable '.[test,figures]'
	$(VENVF)/bin/python -m benchmarks.figures $(FIGURES)

format: $(INSTALLED_TEST)
	$(BIN)/python -m isort --quiet .
	$(BIN)/python -m black --quiet .

# An existing environment is never removed here: `rm -r .venv` starts from nothing.
clean:
	rm -rf build dist site *.egg-info .pytest_cache outputs
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# Editable, so what runs is what the sources say; tests/test_install.py is about the wheel and the sdist.
# The interpreter is an order-only prerequisite: its date says nothing about our dependencies.
$(INSTALLED): setup.cfg pyproject.toml | $(BIN)/python
	@echo "Installing into $(VENV): a few minutes the first time, mostly for torch."
	$(BIN)/python -m pip install $(PIP_ARGS) --editable .
	@touch $@

$(INSTALLED_TEST): setup.cfg pyproject.toml | $(BIN)/python
	@echo "Installing into $(VENV): a few minutes the first time, mostly for torch."
	$(BIN)/python -m pip install $(PIP_ARGS) --editable '.[test]'
	@touch $(INSTALLED) $@

$(INSTALLED_DOCS): setup.cfg pyproject.toml | $(BIN)/python
	@echo "Installing into $(VENV): a few minutes the first time, mostly for torch."
	$(BIN)/python -m pip install $(PIP_ARGS) --editable '.[docs]'
	@touch $(INSTALLED) $@
