# `make demo` and `make test` need nothing but Python 3.10 to 3.13: the first call builds .venv.

PYTHON ?= python3
WORKERS ?= 2
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: help install demo test lint format bench clean

help:
	@echo "make demo    train and sample a small model on digits"
	@echo "make test    run the tests (WORKERS=$(WORKERS) processes of one thread)"
	@echo "make lint    ruff and mypy"
	@echo "make format  let ruff rewrite the files"
	@echo "make bench   time the layer against softmax attention on the CPU"
	@echo "make clean   remove .venv, caches and build output"

install: $(INSTALLED)

demo: $(INSTALLED)
	$(BIN)/python -m examples.dydi_lit.demo

# One thread in each worker: two pools of threads on the same cores slow each other down.
test: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS)

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(INSTALLED)
	$(BIN)/python -m benchmarks.layer --device cpu

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis

# The pinned versions go in first, and bind the second call too, which adds the package itself.
$(INSTALLED): pyproject.toml setup.py requirements-dev.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; (3, 10) <= v <= (3, 13) or sys.exit( \
	  "Python 3.10 to 3.13 is needed, $(PYTHON) is %d.%d: try make PYTHON=python3.12" % v)'
	$(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-build-isolation \
	  -c requirements-dev.txt -e '.[dev,examples,benchmarks]'
	@touch $@
