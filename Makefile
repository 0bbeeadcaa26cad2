# make demo | make test | make test-hf | make test-aot: each sets up its environment first and
# reuses it afterwards; make test-gpu installs nothing
PYTHON       ?= python3
TORCH        ?= torch==2.13.0
TRANSFORMERS ?= transformers
TRITON       ?= triton; sys_platform == 'linux'
VENV         ?= .venv
BIN          := $(VENV)/bin

.DEFAULT_GOAL := help
.PHONY: help demo test test-gpu test-hf test-hf-oldest test-aot test-aot-oldest cuda lint

help:
	@echo "make demo            set up $(VENV) and run 'lowbit demo'"
	@echo "make test            set up $(VENV) and run the test suite"
	@echo "make test-gpu        the tests that use a GPU, with the packages that PYTHON has"
	@echo "make test-hf         the tests of the transformers models alone"
	@echo "make test-hf-oldest  the same with the oldest supported transformers, in .venv-hf-oldest"
	@echo "make test-aot        compile every kernel for every supported GPU (none needs to be present)"
	@echo "make test-aot-oldest the same with the oldest supported Triton, in .venv-triton-oldest"
	@echo "make cuda            build the optional CUDA C++ kernel with nvcc (no GPU needs to be present)"
	@echo "make lint            ruff and mypy"

# torch comes first and alone, so that no other requirement can choose its build
$(VENV)/installed-%: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1"
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet "$(TORCH)" "$(TRANSFORMERS)" "$(TRITON)" -e ".[$*]"
	touch $@

demo: $(VENV)/installed-hf,audio
	$(BIN)/lowbit demo

test: $(VENV)/installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto

test-gpu:
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest -n 8 --gpu

test-hf: $(VENV)/installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto tests/families tests/test_huggingface*.py

test-hf-oldest:
	$(MAKE) test-hf TRANSFORMERS="transformers==5.8.*" VENV=.venv-hf-oldest

test-aot: $(VENV)/installed-dev
	$(BIN)/python -m pytest tests/aot --aot-all

test-aot-oldest:
	$(MAKE) test-aot TRITON="triton==3.6.*" VENV=.venv-triton-oldest

lint: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

cuda: $(VENV)/installed-dev
	$(BIN)/python setup_cuda.py
