# make demo | make test | make test-aot: each sets up .venv first and reuses it afterwards
PYTHON ?= python3
TORCH  ?= torch==2.13.0
VENV   ?= .venv
BIN    := $(VENV)/bin

.DEFAULT_GOAL := help
.PHONY: help demo test test-aot lint

help:
	@echo "make demo      set up $(VENV) and run 'lowbit demo'"
	@echo "make test      set up $(VENV) and run the test suite"
	@echo "make test-aot  compile every kernel for every supported GPU (none needs to be present)"
	@echo "make lint      ruff and mypy"

# torch comes first and alone, so that no other requirement can choose its build
$(VENV)/installed-%: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1"
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet "$(TORCH)" -e ".[$*]"
	touch $@

demo: $(VENV)/installed-hf,audio
	$(BIN)/lowbit demo

test: $(VENV)/installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto

test-aot: $(VENV)/installed-dev
	$(BIN)/python -m pytest tests/aot --aot-all

lint: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
