# Everything runs in a virtual environment of its own, set up on first use.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: setup test test-fast test-avx2 test-avx512 test-sanitizers lint docs demo bench gpu-precompile gpu-check gpu-bench gpu-tune clean

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

# A worker for each core, a thread for each worker (tests/conftest.py).
PYTEST := $(BIN)/pytest -q -n auto --dist worksteal

test: lint
	$(PYTEST)

# Without what takes long: CUDA kernels on the CPU, Triton's in the interpreter but for one case each, whole runs of
# commands.
test-fast: lint
	$(PYTEST) -m "not slow"

# The C++ kernels on a processor without AVX-512; needs qemu-x86_64 (Debian: qemu-user). Threads must not spin here.
test-avx2: setup
	OMP_WAIT_POLICY=passive qemu-x86_64 -cpu Haswell $(BIN)/python -m pytest -q tests/kernels/test_contract.py -k "agrees and cpu and not cuda"

# The C++ kernels of every instruction set that this machine has, built with AddressSanitizer and
# UndefinedBehaviorSanitizer (GCC's libasan and libubsan), over the specs' cases.
test-sanitizers: setup
	$(BIN)/python -m tests.helpers.sanitizers

# The C++ kernels for AVX-512 on a processor that has AVX2 alone: each of their instructions is emulated.
test-avx512: setup
	$(BIN)/python -m pytest -q -p tests.helpers.avx512_on_avx2 tests/kernels/test_contract.py -k "agrees and cpu and not cuda"

lint: setup
	$(BIN)/ruff check
	$(BIN)/mypy

# The documentation, into build/site; a broken link is an error.
docs: .venv/docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

.venv/docs: .venv/installed
	$(BIN)/pip install -c constraints.txt mkdocs-material
	touch $@

demo: setup
	$(BIN)/mvar demo

BENCHMARKS := ops generation data_loading accelerate training_step training_run quality editing

bench: setup
	for name in $(BENCHMARKS); do $(BIN)/python -m benchmarks.bench_$$name || exit 1; done
	-$(BIN)/python tests/kernels/compile_ahead.py --write benchmarks/results/kernels.json > /dev/null
	-$(BIN)/python tests/kernels/cuda_resources.py --write benchmarks/results/cuda_kernels.json > /dev/null
	-$(BIN)/python -m benchmarks.count_instructions --write benchmarks/results/instructions.json > /dev/null
	$(BIN)/python -m benchmarks.report

# What needs a GPU, in three stages, without a build and without network, in any Python with torch for CUDA, Triton and
# mvar's dependencies: which kernels are correct (100 s), how fast they are (150 s), their tiles (60 s). Each stops in
# time and keeps what it found. Before them, on a machine with network: download third-party kernels as baselines and
# compile all kernels, with a PYTHON of the GPU machine's version and its version of Triton; copy build/precompiled there.
gpu-precompile: setup
	$(BIN)/python -m benchmarks.fetch_third_party
	$(PYTHON) -m benchmarks.precompile

gpu-check:
	$(PYTHON) -m benchmarks.gpu_check

gpu-bench:
	$(PYTHON) -m benchmarks.gpu_bench

gpu-tune:
	$(PYTHON) -m benchmarks.tune_triton --seconds 60

clean:
	rm -rf .venv build demo dist *.egg-info mvar_kernels/_native*.so
