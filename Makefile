# Everything runs in .venv, made from constraints.txt. `make run` and `make test` are all a newcomer needs.

PYTHON ?= python3
# The index that torch comes from; see the README for CPU-only and CUDA builds.
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
DIR ?=

.PHONY: run test install lint proto bench clean

# A run with one silent corruption and one killed worker; under a minute once installed.
run: $(VENV)/run.stamp
	$(BIN)/assay run --preset tiny --nodes 2 --spares 1 --steps 40 --seed 7 \
	    --drill sdc@12:rank=1 --drill kill@25:rank=0 $(if $(DIR),--dir $(DIR))

test: $(VENV)/dev.stamp lint
	$(BIN)/python -m pytest

lint: $(VENV)/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

install: $(VENV)/dev.stamp

proto: $(VENV)/dev.stamp
	$(BIN)/python -m grpc_tools.protoc -Iproto --python_out=. --pyi_out=. --grpc_python_out=. proto/assay/v1/*.proto

bench: $(VENV)/dev.stamp
	for name in $$(ls benchmarks/*.py | xargs -n1 basename | grep -v '^_' | sed 's/\.py$$//'); do \
	    $(BIN)/python -m benchmarks.$$name --quick --json || exit 1; done

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/run.stamp: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/pip install -q -c constraints.txt $(TORCH)
	$(BIN)/pip install -q -c constraints.txt -e .
	touch $@

$(VENV)/dev.stamp: $(VENV)/run.stamp
	$(BIN)/pip install -q -c constraints.txt -e '.[dev]'
	touch $@
