# `make demo` trains the embedded default and shows its result, `make test` runs the quick tests, `make test-all` all but those of hours.
PYTHON ?= python3
VENV ?= .venv
# Huge pages, and one heap that keeps what a step frees: the next step needs it again.
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1:glibc.malloc.arena_max=1:glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=68719476736
export PIP_DISABLE_PIP_VERSION_CHECK = 1
BIN := $(VENV)/bin
PYTEST := $(BIN)/python -m pytest tests -n 2 --dist loadgroup --no-loadscope-reorder

.PHONY: demo test test-all reference lint docs clean

demo: $(VENV)/ready
	$(BIN)/python launch.py train --config=configs/simclr.py --workdir=runs/simclr

test: $(VENV)/tested
	$(PYTEST) -m "not full and not slow"

test-all: test
	$(PYTEST) -m "full and not slow"

lint: $(VENV)/tested
	$(BIN)/ruff check .
	$(BIN)/lint-imports

# Tables from docs/results/*.csv and reference pages from the code, then the site, in site/.
docs: $(VENV)/ready requirements-docs.txt
	$(BIN)/pip install --quiet -r requirements-docs.txt
	JAX_PLATFORMS=cpu $(BIN)/python docs/render.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

# The PyTorch references of the parity tests, which skip without them.
reference: $(VENV)/tested
	$(BIN)/pip install --quiet -r requirements-reference.txt
	$(BIN)/pip install --quiet --no-deps torchvision==0.28.0 timm==1.0.31 lightly==1.6.0 lightly_utils pytorch_lightning torch-fidelity==0.4.0

$(VENV)/ready: requirements.txt requirements-cpu.txt
	@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "ssl_jax needs Python 3.11 or later: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -r requirements.txt -r requirements-cpu.txt
	@touch $@

$(VENV)/tested: $(VENV)/ready requirements-test.txt
	$(BIN)/pip install --quiet -r requirements-test.txt
	@touch $@

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .import_linter_cache
