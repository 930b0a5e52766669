# `make demo` and `make test` do all the set-up. Nothing but make and Python 3.11 or newer is needed.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check
STEPS ?=
# on Linux, allocate memory in huge pages: allocation in small pages takes a tenth of the time of a train step on a CPU
# (docs/benchmarks.md)
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

# train the sample recipe and evaluate it on held-out scenes: a table, and pictures and eval.json in runs/demo
demo: .venv/.demo data/records/.sample
	$(BIN)/python -m mqformer_jax.main --config=configs/coco_ref.py:sample --workdir=runs/demo $(if $(STEPS),--config.steps=$(STEPS))

# fine-tune on your own COCO JSON, and write a table and pictures:
# make finetune NAME=balloon IMAGES=photos JSON=annotations.json
# [VAL=val.json, or else a fifth of the images is held out] [FROM=runs/other: the checkpoint to start from]
# [LONG=1: the larger model, 50 minutes instead of twelve on two cores]
NAME ?= mine
finetune: .venv/.demo
	$(PIP) --editable '.[text]'
	$(if $(FROM),,test -d pretrained/lite/checkpoints/0 || $(BIN)/mqformer convert --from lite --output pretrained/lite)
	$(BIN)/mqformer prepare instances --name $(NAME) --split train --images $(IMAGES) --json $(JSON) $(if $(VAL),,--val_fraction 0.2)
	$(if $(VAL),$(BIN)/mqformer prepare instances --name $(NAME) --split val --images $(IMAGES) --json $(VAL))
	$(BIN)/mqformer train --config=finetune:$(NAME)$(COMMA)$(or $(FROM),$(if $(LONG),,quick)) --workdir=runs/$(NAME) $(if $(STEPS),--config.steps=$(STEPS))
COMMA := ,

# ---- Tests (CONTRIBUTING.md) ----
# TESTS: files, folders or options of pytest, e.g. make test TESTS=tests/losses or make test TESTS="-k matcher"
TESTS ?=
PYTEST = env -u GLIBC_TUNABLES $(BIN)/python -m pytest --numprocesses 2 --dist loadscope --no-loadscope-reorder
FAST := not slow and not parity and not process and not tpu_compiler and not browser

.venv/.test: .venv/.demo
	$(PIP) --editable '.[test]'
	touch $@

# dependencies of all tests: torch, transformers and other originals to compare with, the TPU compiler,
# tensorflow-datasets, the web page
.venv/.test-all: .venv/.test
	$(PIP) --editable '.[test,full]'
	touch $@ .venv/.dev

# the fast tests, for each change
test: .venv/.test
	$(PYTEST) -m "$(FAST)" $(TESTS)

# all tests, and lint. Two runs, since pytest's workers keep memory until they end; status 5: TESTS selects none of a run
test-all: .venv/.test-all lint
	failed=0; for group in "$(FAST)" "not ($(FAST))"; do \
	  $(PYTEST) -m "$$group" $(TESTS) || test $$? = 5 || failed=1; done; exit $$failed

# format, style and types of the code; `make lint && .venv/bin/pre-commit install` has git check them at each commit
.venv/.dev: .venv/.demo
	$(PIP) --editable '.[dev]'
	touch $@

lint: .venv/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/python tests/type_check.py

# the documentation as a site in site/; `.venv/bin/mkdocs serve` shows it while you write
docs: .venv/.demo
	$(PIP) --editable '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

clean:
	rm -rf .venv site runs/demo data/records/.sample data/records/sample_*
