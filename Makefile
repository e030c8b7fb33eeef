# The two commands: `make demo` and `make test`. Each makes the environment it needs first, in .venv.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test fast-test fuzz lint types constraints clean

demo: $(VENV)/installed
	$(BIN)/python -m raysv.tune search_spaces/demo.yaml

test: $(VENV)/installed-test
	$(BIN)/pytest

fast-test: $(VENV)/installed-test  # everything that does not start Ray
	$(BIN)/pytest -m "not slow"

fuzz: $(VENV)/installed-test  # every parser for a minute
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[fuzz]"
	$(BIN)/python tests/fuzz.py

lint: $(VENV)/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/installed-test
	$(BIN)/mypy
	MYPYPATH=benchmarks $(BIN)/mypy --explicit-package-bases benchmarks

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "raysv needs Python 3.11 or later; name one with: make PYTHON=python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo "No environment could be made: install python3-venv."; exit 1; }

$(VENV)/installed: pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing into $(VENV): about 6 GB, PyTorch with its GPU libraries. This takes some minutes."
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable .
	@touch $@

$(VENV)/installed-test: pyproject.toml constraints.txt $(VENV)/installed
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[test]"
	@touch $@

constraints: $(VENV)/installed-test  # pin what is installed now
	@head -1 constraints.txt > constraints.new
	@$(BIN)/pip freeze --exclude-editable >> constraints.new
	@mv constraints.new constraints.txt

clean:
	rm -rf $(VENV) build *.egg-info
