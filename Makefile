# `make quickstart` and `make test` need this checkout, a network and about 6.5 GB of disk.
VENV ?= .venv
# Files of tests that run at a time: most tests are one process.
JOBS ?= 2
PYTHON312 := $(VENV)/bin/python
export VENV

.DEFAULT_GOAL := help
.PHONY: help setup setup-launch setup-te setup-bridge setup-serve quickstart quickstart-chat
.PHONY: test test-launch test-te test-serve lint typecheck pytest clean gpu-check

help:  ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) \
		| sed -E 's/^([a-z-]+):.*## */  make \1\t/' | expand -t 20

setup:  ## find Python 3.12, make .venv and install everything (quick when up to date)
	@scripts/setup.sh

setup-launch: setup  ## add NeMo-Run to .venv, for `mellum2 launch`
	@scripts/setup_launch.sh

setup-te: setup  ## build Transformer Engine into .venv, no GPU needed (12 minutes once)
	@scripts/setup_te.sh

setup-bridge: setup-te  ## add Megatron-Bridge to .venv, for conversion.bridge
	@scripts/setup_bridge.sh

setup-serve: setup  ## vLLM in .venv-serve, an environment of its own, for `mellum2 serve` (6 GB)
	@scripts/setup_serve.sh

quickstart: setup  ## train, convert, verify and run a small Mellum 2, no GPU needed
	@$(VENV)/bin/mellum2 quickstart

quickstart-chat: setup  ## from the quickstart's model (made if missing) to a chat model, no GPU
	@$(VENV)/bin/mellum2 quickstart --chat

gpu-check: setup-te  ## check a GPU machine; GPU_CHECK_ARGS="--minutes 10", "--device cpu" to rehearse
	@$(VENV)/bin/mellum2 gpu-check $(GPU_CHECK_ARGS)

test: setup lint typecheck pytest  ## set-up, linter, type checker and the CPU test suite

lint: setup  ## ruff, check and format
	$(PYTHON312) -m ruff check .
	$(PYTHON312) -m ruff format --check .

typecheck: setup  ## mypy
	$(PYTHON312) -m mypy

# One thread per process: the tests start several processes, and gloo slows down a lot when there
# are more threads than cores.
pytest: setup  ## the CPU test suite; PYTEST_ARGS="tests/config", MARKS="not slow" for a part
	OMP_NUM_THREADS=1 $(PYTHON312) -m pytest -n $(JOBS) --dist loadfile --durations=40 \
		-m "not gpu and not te and not launch and not slurm and not serve$(if $(MARKS), and ($(MARKS)))" $(PYTEST_ARGS)

test-launch: setup-launch  ## install NeMo-Run and Slurm (as root), run the launch tests
	@scripts/setup_slurm.sh
	OMP_NUM_THREADS=1 MELLUM2_REQUIRE_SLURM=1 $(PYTHON312) -m pytest \
		-m "launch or slurm" $(PYTEST_ARGS)

test-te: setup-bridge  ## build Transformer Engine, add Megatron-Bridge, run their tests (no GPU)
	OMP_NUM_THREADS=1 MELLUM2_REQUIRE_BRIDGE=1 $(PYTHON312) -m pytest -n $(JOBS) --dist loadfile \
		--durations=20 -m te $(PYTEST_ARGS)

test-serve: setup-serve  ## install vLLM beside .venv, compare it with transformers (no GPU)
	OMP_NUM_THREADS=1 $(PYTHON312) -m pytest -m serve $(PYTEST_ARGS)

clean:  ## remove caches and build outputs; runs/, data/ and .venv stay
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -exec rm -rf {} +
