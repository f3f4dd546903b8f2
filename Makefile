# make demo and make test need Python 3.11+, make and a C compiler; everything else comes by pip into .venv.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test lint docs benchmarks clean

demo: $(VENV)/.installed
	$(BIN)/downres demo --out demo

# Two workers with a thread each: on two cores half the time of one worker with two threads. What loads OpenVINO and NNCF has
# processes of its own: a worker that had run them among a thousand other tests ended without a word, twice, a quarter of an
# hour later.
APART := tests/engines/test_engines.py tests/searching/test_bits.py tests/searching/test_doctor.py tests/test_embed.py
test: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile $(addprefix --ignore=,$(APART))
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile $(APART)

lint: $(VENV)/.installed
	$(BIN)/ruff check src tests benchmarks
	$(BIN)/ruff format --check src tests benchmarks
	$(BIN)/mypy src

docs: $(VENV)/.installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

benchmarks: $(VENV)/.installed
	$(BIN)/python benchmarks/curve.py
	$(BIN)/python benchmarks/reduce.py

$(VENV)/.installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "downres needs Python 3.11 or newer: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[demo,test]'
	touch $@

clean:
	rm -rf $(VENV) demo site
