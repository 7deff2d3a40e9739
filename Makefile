# Two commands matter: `make demo` and `make test`. Each sets up what it needs in .venv, in either order.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt
COMPILE = @echo "Compiling the planner, once ..." && $(BIN)/python -m stagewright.planner.compiling
PYTEST := $(BIN)/python -m pytest
export OMP_NUM_THREADS ?= 1

.PHONY: demo test lint docs bench soak serve clean

demo: $(VENV)/.demo
	$(BIN)/stagewright demo

test: $(VENV)/.test
	$(PYTEST) -m "not soak and not ranks" -n 2 --dist worksteal
	$(PYTEST) -m "ranks and not soak" -n 2 --dist loadgroup

lint: $(VENV)/.lint
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: $(VENV)/.test
	$(BIN)/python docs/generate.py

bench: $(VENV)/.test
	$(BIN)/python benchmarks/run.py

soak: $(VENV)/.test
	$(BIN)/python benchmarks/soak.py

serve: $(VENV)/.test
	$(BIN)/stagewright serve

clean:
	rm -rf out dist .pytest_cache .mypy_cache .ruff_cache

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed; name one with: make PYTHON=python3.12 ..."; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: $(VENV)/bin/python pyproject.toml constraints.txt
	@echo "Installing Stagewright with torch into $(VENV) ..."
	$(PIP) --editable '.[torch]'
	$(COMPILE)
	@touch $@

$(VENV)/.test: $(VENV)/bin/python pyproject.toml constraints.txt
	@echo "Installing Stagewright with what its tests need into $(VENV) ..."
	$(PIP) --editable '.[test]'
	$(COMPILE)
	@touch $@ $(VENV)/.demo

$(VENV)/.lint: $(VENV)/.test
	$(PIP) --editable '.[test,lint]'
	@touch $@
