# Everything runs in a virtual environment of its own, set up on first use.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: setup test lint demo clean

setup: .venv/native

# Two stamps: a change of the dependencies installs anew, a change of the C++ sources alone only
# rebuilds the extension.
.venv/installed: pyproject.toml setup.py constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -c constraints.txt -e '.[dev,demo]'
	touch $@

.venv/native: .venv/installed CMakeLists.txt $(shell find csrc -type f)
	$(BIN)/python setup.py --quiet build_ext --inplace
	touch $@

test: lint
	$(BIN)/pytest -q

lint: setup
	$(BIN)/ruff check
	$(BIN)/mypy

demo: setup
	$(BIN)/mvar demo

clean:
	rm -rf .venv build dist *.egg-info mvar_kernels/_native*.so
