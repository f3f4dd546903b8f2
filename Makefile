# make demo and make test need Python 3.11+, make and a C compiler; everything else comes by pip into .venv.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test lint benchmarks clean

demo: $(VENV)/.installed
	$(BIN)/downres demo --out demo

test: $(VENV)/.installed
	$(BIN)/python -m pytest

lint: $(VENV)/.installed
	$(BIN)/ruff check src tests benchmarks
	$(BIN)/ruff format --check src tests benchmarks
	$(BIN)/mypy src

benchmarks: $(VENV)/.installed
	$(BIN)/python benchmarks/curve.py
	$(BIN)/python benchmarks/reduce.py

$(VENV)/.installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "downres needs Python 3.11 or newer: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[demo,test]'
	touch $@

clean:
	rm -rf $(VENV) demo
