# Needs Python >= 3.11, make and gcc; everything else goes into .venv.
#   make demo   train two adapters and stream four requests on the embedded model
#   make test       the quick part of the test suite; make test-slow the rest, make test-all both
#   make test-gpu   what needs a GPU, or shows something there too; with an interpreter of one's own: BIN=/usr/bin
#   make fuzz       10,000 mutated inputs of each kind; FUZZ="--count 500 --kind chats" for others
#   make lint   ruff
# Another interpreter: make demo PYTHON=python3.12. Another accelerator: make demo ACCELERATOR=cpu.

PYTHON ?= python3
VENV ?= .venv
# Groups of tests that share compiled functions (tests/conftest.py), in their order: the longest ones first.
PYTEST_ARGS ?= -n 2 --dist loadgroup --no-loadscope-reorder
GPU_ARGS ?= -n 12 --dist worksteal
TESTS ?= tests
FUZZ ?= --out benchmarks/results
BIN := $(VENV)/bin

# cuda13, cuda12 or cpu, by the major version of the NVIDIA driver.
ACCELERATOR ?= $(shell \
	driver=$$(nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null | head -n 1 | cut -d. -f1); \
	if [ "$$driver" -ge 580 ] 2>/dev/null; then echo cuda13; \
	elif [ "$$driver" -ge 525 ] 2>/dev/null; then echo cuda12; \
	else echo cpu; fi)
comma := ,
RUNTIME_EXTRA := $(if $(filter cpu,$(ACCELERATOR)),,[$(ACCELERATOR)])
DEV_EXTRA := [dev$(if $(filter cpu,$(ACCELERATOR)),,$(comma)$(ACCELERATOR))]

.PHONY: demo test test-slow test-all test-gpu fuzz lint clean
.DELETE_ON_ERROR:

demo: $(VENV)/.runtime-$(ACCELERATOR)
	$(BIN)/loquetier demo

test: $(VENV)/.dev-$(ACCELERATOR)
	$(BIN)/python -m pytest $(PYTEST_ARGS) -m "not slow and not mutation" $(TESTS)

test-slow: $(VENV)/.dev-$(ACCELERATOR)
	$(BIN)/python -m pytest $(PYTEST_ARGS) -m "slow or mutation" $(TESTS)

test-all: $(VENV)/.dev-$(ACCELERATOR)
	$(BIN)/python -m pytest $(PYTEST_ARGS) $(TESTS)

# Compiling is work for many cores, and trying out GEMMs by many processes at once takes a GPU ten times as long; the
# models are tiny, so one GPU serves all.
test-gpu: $(if $(filter $(VENV)/bin,$(BIN)),$(VENV)/.dev-$(ACCELERATOR))
	XLA_FLAGS="--xla_gpu_autotune_level=0 $(XLA_FLAGS)" XLA_PYTHON_CLIENT_PREALLOCATE=false $(BIN)/python3 -m pytest $(GPU_ARGS) -m gpu $(TESTS)

fuzz: $(VENV)/.dev-$(ACCELERATOR)
	$(BIN)/python -m tests.fuzz $(FUZZ)

lint: $(VENV)/.lint
	$(BIN)/ruff check .

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache dist

# Each stamp says what the virtual environment holds; an edit of pyproject.toml renews it.
$(VENV)/.created:
	@$(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 11) or sys.exit(f"loquetier_jax needs Python >= 3.11, $(PYTHON) is {v.major}.{v.minor}: make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	touch $@

$(VENV)/.runtime-$(ACCELERATOR): pyproject.toml | $(VENV)/.created
	$(BIN)/python -m pip install -q -e '.$(RUNTIME_EXTRA)'
	touch $@

$(VENV)/.dev-$(ACCELERATOR): pyproject.toml | $(VENV)/.created
	$(BIN)/python -m pip install -q -e '.$(DEV_EXTRA)'
	touch $@ $(VENV)/.runtime-$(ACCELERATOR) $(VENV)/.lint

# ruff alone: linting waits for no wheel of jax. Its version is the one of the dev extra.
$(VENV)/.lint: pyproject.toml | $(VENV)/.created
	$(BIN)/python -m pip install -q "$$(sed -n 's/^ *"\(ruff[^"]*\)",$$/\1/p' pyproject.toml)"
	touch $@
