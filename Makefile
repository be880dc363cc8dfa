# make demo   samples digits with the packaged model
# make bench  measures speed and writes its report to BENCH_OUT; again, and it goes on where it ended
# make test   lint, types, and the whole test suite; TORCH=2.11.0 runs it on that version of torch
# make soak   tries every promise of reliability as often as it says, half an hour; the table goes to benchmarks/results
PYTHON ?= python3
TORCH ?=
VENV := .venv$(if $(TORCH),-torch$(TORCH))
BIN := $(VENV)/bin
TORCH_PIN := $(if $(TORCH),torch==$(TORCH))
DEMO_OUT ?= digits.png
BENCH_OUT ?= bench-report
# such as BENCH_FLAGS="--quick --device cpu"
BENCH_FLAGS ?=
# such as SOAK_FLAGS="--only nan" or SOAK_FLAGS=--missing
SOAK_FLAGS ?=
# Each worker takes whole files and one thread.
WORKERS ?= 2
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

.DEFAULT_GOAL := help
.PHONY: help demo bench soak test lint types pytest clean

help:
	@echo "make demo    install into $(VENV) and sample digits with the packaged model"
	@echo "make bench   measure speed into $(BENCH_OUT), minutes at a time: run it again until nothing is open"
	@echo "make soak    kill, damage and starve it for half an hour; what was tried and survived goes to benchmarks/results"
	@echo "make test    lint, types and all tests (TORCH=2.11.0 for the oldest supported torch)"
	@echo "make clean   remove environments and caches"

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip

# A stamp an extra, renewed when the requirements change.
$(VENV)/.installed: $(BIN)/python pyproject.toml setup.py
	@echo "installing fastdiff into $(VENV) (torch brings about 5 GB of CUDA libraries; they also run without a GPU)"
	$(BIN)/python -m pip install --quiet --editable . $(TORCH_PIN)
	@touch $@

$(VENV)/.installed-test: $(BIN)/python pyproject.toml setup.py
	@echo "installing fastdiff[test] into $(VENV) (torch brings about 5 GB of CUDA libraries; they also run without a GPU)"
	$(BIN)/python -m pip install --quiet --editable ".[test]" $(TORCH_PIN)
	@touch $@ $(VENV)/.installed

$(VENV)/.installed-bench: $(BIN)/python pyproject.toml setup.py
	@echo "installing fastdiff[bench] into $(VENV) (torch brings about 5 GB of CUDA libraries; they also run without a GPU)"
	$(BIN)/python -m pip install --quiet --editable ".[bench]" $(TORCH_PIN)
	@touch $@ $(VENV)/.installed

demo: $(VENV)/.installed
	$(BIN)/fastdiff sample --out $(DEMO_OUT)

bench: $(VENV)/.installed-bench
	$(BIN)/python -m benchmarks all --out $(BENCH_OUT) $(BENCH_FLAGS)

soak: $(VENV)/.installed-test
	OMP_NUM_THREADS=1 $(BIN)/python -m soak $(SOAK_FLAGS)

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# Type checkers do not read setup.py's mapping of kernels/ to fastdiff.kernels: show them a folder of links that has it.
types: $(VENV)/.installed-test
	@rm -rf .typecheck && mkdir -p .typecheck/fastdiff
	@for entry in fastdiff/*; do ln -s ../../$$entry .typecheck/fastdiff/; done; ln -s ../../kernels .typecheck/fastdiff/kernels
	cd .typecheck && ../$(BIN)/python -m mypy --config-file ../pyproject.toml -p fastdiff

# Once with the kernels in Triton's interpreter (on a GPU: on the GPU), once the kernel tests on the plain CPU path.
pytest: $(VENV)/.installed-test
	$(PYTEST) --durations 10
	TRITON_INTERPRET=0 CUDA_VISIBLE_DEVICES= $(PYTEST) tests/kernels --ignore tests/kernels/test_static.py

test: lint types pytest

clean:
	rm -rf .venv* .typecheck .pytest_cache .ruff_cache .mypy_cache build *.egg-info
