# Two commands: `make demo` trains the embedded default and shows its result, `make test` runs the tests.
PYTHON ?= python3
VENV ?= .venv
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1
BIN := $(VENV)/bin

.PHONY: demo test reference lint docs clean

demo: $(VENV)/ready
	$(BIN)/python launch.py train --config=configs/simclr.py --workdir=runs/simclr

test: $(VENV)/tested
	$(BIN)/python -m pytest tests -n 2 --dist loadgroup

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

$(VENV)/ready: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -r requirements.txt
	touch $@

$(VENV)/tested: $(VENV)/ready requirements-test.txt
	$(BIN)/pip install --quiet -r requirements-test.txt
	touch $@

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .import_linter_cache
