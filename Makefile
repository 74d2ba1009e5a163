# Everything runs in a virtual environment of its own, set up on first use.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: setup test lint demo bench clean

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

# The allocator settings keep torch's eager side from giving its memory back and faulting it in again.
bench: setup
	MALLOC_MMAP_THRESHOLD_=4294967296 MALLOC_TRIM_THRESHOLD_=68719476736 MALLOC_TOP_PAD_=268435456 \
	sh -c '$(BIN)/python -m benchmarks.ops && $(BIN)/python -m benchmarks.generate'
	$(BIN)/python -m benchmarks.report

clean:
	rm -rf .venv build demo dist *.egg-info mvar_kernels/_native*.so
