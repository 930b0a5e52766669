# Each target first installs what it needs in .venv. You only need make and Python 3.11 or newer.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check
STEPS ?=
# On Linux, allocate memory in huge pages. With small pages, allocation takes a tenth of the time of a train step on a
# CPU (docs/benchmarks.md).
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1

.PHONY: demo test test-all lint docs finetune clean

.venv/.demo: setup.cfg
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11")'
	$(PYTHON) -m venv .venv
	$(PIP) --editable .
	touch $@

data/records/.sample: mqformer_jax/prepare/cli.py $(wildcard mqformer_jax/prepare/sample/*.py) | .venv/.demo
	$(BIN)/mqformer prepare sample --output data/records
	touch $@

# Train the sample recipe and evaluate it on held-out scenes. Prints a table; pictures and eval.json go to runs/demo.
demo: .venv/.demo data/records/.sample
	$(BIN)/python -m mqformer_jax.main --config=configs/coco_ref.py:sample --workdir=runs/demo $(if $(STEPS),--config.steps=$(STEPS))

# Fine-tune on your own COCO JSON file. Prints a table; writes pictures and checkpoints to runs/NAME. Example:
#   make finetune NAME=balloon IMAGES=photos JSON=annotations.json
# Optional: VAL=val.json: annotations of held-out images (default: a fifth of the images is held out).
#   FROM=runs/other: start from this checkpoint. STEPS=200: number of steps.
#   LONG=1: train the larger model, which takes 50 minutes instead of 10 to 15 on two cores.
NAME ?= mine
finetune: .venv/.demo
	$(PIP) --editable '.[text]'
	$(if $(FROM),,test -d pretrained/lite/checkpoints/0 || $(BIN)/mqformer convert --from lite --output pretrained/lite)
	$(BIN)/mqformer prepare instances --name $(NAME) --split train --images $(IMAGES) --json $(JSON) $(if $(VAL),,--val_fraction 0.2)
	$(if $(VAL),$(BIN)/mqformer prepare instances --name $(NAME) --split val --images $(IMAGES) --json $(VAL))
	$(BIN)/mqformer train --config=finetune:$(NAME)$(COMMA)$(or $(FROM),$(if $(LONG),,quick)) --workdir=runs/$(NAME) $(if $(STEPS),--config.steps=$(STEPS))
COMMA := ,

# ---- Tests (CONTRIBUTING.md) ----
# TESTS: files, folders or options for pytest, e.g. make test TESTS=tests/losses or make test TESTS="-k matcher".
TESTS ?=
PYTEST = env -u GLIBC_TUNABLES $(BIN)/python -m pytest --numprocesses 2 --dist loadscope --no-loadscope-reorder
FAST := not slow and not parity and not process and not tpu_compiler and not browser

.venv/.test: .venv/.demo
	$(PIP) --editable '.[test]'
	touch $@

# Install the dependencies of all tests: torch, transformers and other originals to compare with, the TPU compiler,
# tensorflow-datasets, and packages for the web page and the documentation.
.venv/.test-all: .venv/.test
	$(PIP) --editable '.[test,full]'
	touch $@ .venv/.dev

# Run the fast tests. Use this for each change.
test: .venv/.test
	$(PYTEST) -m "$(FAST)" $(TESTS)

# Run all tests and lint. There are two runs of pytest, because its workers keep memory until they end. A run may exit
# with status 5, which means that TESTS selects none of its tests.
test-all: .venv/.test-all lint
	failed=0; for group in "$(FAST)" "not ($(FAST))"; do \
	  $(PYTEST) -m "$$group" $(TESTS) || test $$? = 5 || failed=1; done; exit $$failed

# Check format, style and types of the code. `make lint && .venv/bin/pre-commit install` makes git check them at each
# commit.
.venv/.dev: .venv/.demo
	$(PIP) --editable '.[dev]'
	touch $@

lint: .venv/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/python tests/type_check.py

# Build the documentation as a site in site/. `.venv/bin/mkdocs serve` shows it while you write.
docs: .venv/.demo
	$(PIP) --editable '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

clean:
	rm -rf .venv site runs/demo data/records/.sample data/records/sample_*
