# Each target installs what it needs into .venv, from the versions in constraints.txt, which were tested together.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INPUTS := setup.py pyproject.toml constraints.txt

.PHONY: help demo test lint clean

help:
	@echo "make demo   prune the embedded model, with and without GAP: table, pictures and JSON in demo-output/"
	@echo "make test   all tests that need no GPU"
	@echo "make lint   ruff and mypy"
	@echo "make clean  remove .venv and what was built"

demo: $(VENV)/.installed-demo
	$(BIN)/gap-triton demo

test: $(VENV)/.installed-test
	$(BIN)/python -m pytest

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed-%: $(VENV)/bin/python $(INPUTS)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[$*]"
	touch $@

clean:
	rm -rf $(VENV) build demo-output *.egg-info
