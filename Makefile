# Every target sets up .venv by itself if it is missing. PYTHON=... uses that interpreter as it is instead.
VENV := .venv
ifeq ($(origin PYTHON),command line)
  READY :=
  RUN := PYTHONPATH=$(CURDIR) $(PYTHON)
else
  READY := $(VENV)/.ready
  RUN := $(VENV)/bin/python
endif
PYTEST := $(RUN) -m pytest -q
# Tests in parallel, a file at a time; a real GPU is for one of them alone.
WORKERS ?= 2
PARALLEL := -n $(WORKERS) --dist loadfile
# All that carries the mark (a test looks): importing the others takes a while, and what they need may be missing on a
# lent machine. And those of it that make virtual GPUs for processes of their own, and leave a real one alone.
GPU_TESTS := tests/gpu tests/conformance tests/unit/test_device_cuda.py tests/unit/test_device_local.py
TWIN_TESTS := $(wildcard tests/gpu/test_virtual_*.py tests/gpu/test_driver_[!t]*.py tests/gpu/test_*_ranks.py)
# Those that look at a GPU as a whole have a real one to themselves; the others share it.
WHOLE_TESTS := $(filter-out tests/gpu,$(GPU_TESTS)) tests/gpu/test_values_nvml.py
SHARING_TESTS := $(filter-out $(TWIN_TESTS) $(WHOLE_TESTS),$(wildcard tests/gpu/test_*.py))
SHARERS ?= 3
# Threads that wait for one another leave the cores to the other worker instead of spinning.
export OMP_WAIT_POLICY := passive

.PHONY: demo check test slow fix gpu bench clean

demo: $(READY)  ## the main job on a real model: the largest batch of GPT-2 on an A100 that is not there
	$(RUN) -m autobatch probe hf:gpt2 --seq-len 1024 --device a100-40gb --no-cache

check: $(READY)  ## format, lint, types
	$(RUN) -m ruff format --check .
	$(RUN) -m ruff check .
	$(RUN) -m mypy

test: $(READY)  ## all tests but the slow ones
	$(PYTEST) $(PARALLEL) -m "not gpu and not gpu_values and not slow"
	$(PYTEST) $(PARALLEL) -m "gpu and not slow" $(GPU_TESTS)

slow: $(READY)
	$(PYTEST) -m "slow and not gpu and not gpu_values"
	$(PYTEST) -m "slow and gpu" $(GPU_TESTS)

fix: $(READY)
	$(RUN) -m ruff format .
	$(RUN) -m ruff check --fix .

# What tells bytes outside the allocator, or seconds, has the GPU to itself; what counts inside it shares one of 80 GB.
gpu: $(READY)  ## on a machine with a GPU: what looks at computed values runs too, and fails without one
	@failed=0; begun=$$(date +%s); took() { echo "-- $$1: done after $$(($$(date +%s) - begun)) s"; }; \
	trap 'kill $$twins 2>/dev/null' EXIT; trap 'exit 130' INT TERM; \
	$(PYTEST) -n auto -m "gpu and not slow" $(TWIN_TESTS) & twins=$$!; \
	export AUTOBATCH_REQUIRE_GPU=1; real="(gpu or gpu_values) and not slow"; \
	$(PYTEST) -m "$$real" $(WHOLE_TESTS) || failed=1; \
	$(PYTEST) -n $(SHARERS) --dist loadfile -m "$$real" $(SHARING_TESTS) || failed=1; \
	wait $$twins || failed=1; took tests; \
	for part in record_device outside; do $(RUN) -m benchmarks.$$part || failed=1; took "$$part"; done; \
	$(RUN) -m benchmarks.twins & twins=$$!; \
	$(RUN) -m benchmarks.largest --quick || failed=1; \
	wait $$twins || failed=1; took "twins and largest"; \
	for part in "gpu --quick" throughput; do $(RUN) -m benchmarks.$$part || failed=1; took "$$part"; done; \
	exit $$failed

bench: $(READY)  ## autobatch and its peers, on virtual cards and host memory, into benchmarks/results
	$(RUN) -m benchmarks

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis

# The C compiler is for the virtual GPU's driver; ziglang brings one where there is none.
$(VENV)/.ready: setup.cfg pyproject.toml constraints.txt
	python3 -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	command -v cc >/dev/null || $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check ziglang
	touch $@
