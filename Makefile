# `make demo` and `make test` need nothing but Python 3.10 to 3.13: the first call builds .venv.

PYTHON ?= python3
WORKERS ?= 2
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

# The oldest Triton that the kernels are for, and the newest; `make test` takes the one that requirements-dev.txt pins.
TRITONS := 3.6.0 3.9.0
VERSIONS := $(TRITONS:%=test-triton-%)

# What kernels are compiled for and emulated on.
EMULATED := sm_80 sm_90 sm_120

.PHONY: help install demo test versions emulate offline lint format docs packages bench gpu-smoke wheels clean $(VERSIONS) $(EMULATED:%=emulate-%)

help:
	@echo "make demo      train and sample a small model on digits"
	@echo "make test      run the tests (WORKERS=$(WORKERS) processes of one thread)"
	@echo "make versions  run the short tests of the kernels with Triton $(TRITONS)"
	@echo "make emulate   run every form of the layer on emulated GPUs: $(EMULATED)"
	@echo "make offline   compile the kernels for GPUs that need not be there; writes benchmarks/results/offline.csv"
	@echo "make lint      ruff and mypy"
	@echo "make format    let ruff rewrite the files"
	@echo "make docs      run the tutorial and build the documentation into build/docs"
	@echo "make packages  build wheel and sdist into dist/, install the wheel in new environments and try it"
	@echo "make bench     time the layer against softmax attention and Sana's on the CPU"
	@echo "make gpu-smoke tries on the CPU, in tiny sizes, the one command that measures a GPU"
	@echo "make wheels    downloads into build/wheels what a GPU machine without network needs for the benchmarks"
	@echo "make clean     remove .venv, caches and build output"

install: $(INSTALLED)

demo: $(INSTALLED)
	$(BIN)/python -m examples.dydi_lit.demo

# One thread in each worker: two pools of threads on the same cores slow each other down.
test: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS)

versions: $(VERSIONS)

# In front of the Triton of the environment, which stays as it is.
$(VERSIONS): test-triton-%: build/triton-%/.installed
	PYTHONPATH=$(abspath $(<D)) $(BIN)/python -c 'import triton; assert triton.__version__ == "$*", triton.__file__'
	PYTHONPATH=$(abspath $(<D)) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) -m 'not slow' tests/ops

build/triton-%/.installed: $(INSTALLED)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target $(@D) triton==$*
	@touch $@

emulate: $(EMULATED:%=emulate-%)

$(EMULATED:%=emulate-%): emulate-%: $(INSTALLED)
	$(BIN)/python -m tools.ptx.selftest $*
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --emulate $* tests/ops/test_configurations.py

offline: $(INSTALLED)
	$(BIN)/python -m benchmarks.offline

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(INSTALLED)
	$(BIN)/sphinx-build -W --keep-going -b html docs build/docs

packages: $(INSTALLED)
	$(BIN)/python tools/check_packages.py

bench: $(INSTALLED)
	$(BIN)/python -m benchmarks.layer --device cpu
	$(BIN)/python -m benchmarks.plot benchmarks/results/cpu/layer.jsonl
	$(BIN)/python -m benchmarks.readme

gpu-smoke: $(INSTALLED)
	$(BIN)/python -m benchmarks.gpu_run --device cpu --smoke --out build/gpu-smoke

# Of Python WHEELS_FOR, beside torch, triton, einops, pytest, hypothesis, accelerate, scikit-learn and matplotlib with all
# that those need; the second line is for training and models alone.
WHEELS_FOR := 3.12
WHEELS := docstring-parser execnet pytest-xdist tabulate tqdm typeguard tyro \
  absl-py certifi charset-normalizer diffusers grpcio importlib-metadata lightning-utilities markdown protobuf regex \
  requests tensorboard tensorboard-data-server torchmetrics urllib3 werkzeug zipp

wheels: $(INSTALLED)
	$(BIN)/python -m pip download --quiet --disable-pip-version-check --no-deps --only-binary :all: -c requirements-dev.txt \
	  --python-version $(WHEELS_FOR) --dest build/wheels $(WHEELS)

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis

# The pinned versions go in first, and bind the second call too, which adds the package itself.
$(INSTALLED): pyproject.toml setup.py requirements-dev.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; (3, 10) <= v <= (3, 13) or sys.exit( \
	  "Python 3.10 to 3.13 is needed, $(PYTHON) is %d.%d: try make PYTHON=python3.12" % v)'
	$(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-build-isolation \
	  -c requirements-dev.txt -e '.[dev,docs,examples,benchmarks]'
	@touch $@
