# `make demo` and `make test` do all the set-up. Nothing but make and Python 3.11 or newer is needed.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check
STEPS ?=
# on Linux, memory in huge pages: a tenth of the time of a step on a CPU goes with asking for it page by page (docs/performance.md)
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1

.PHONY: demo test test-all lint finetune clean

.venv/.demo: setup.cfg
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11")'
	$(PYTHON) -m venv .venv
	$(PIP) --editable .
	touch $@

data/records/.sample: data/sample.py data/sample_render.py | .venv/.demo
	$(BIN)/mqformer prepare sample --out data/records
	touch $@

# train the sample recipe, evaluate it on held-out scenes, leave pictures, a table and runs/demo/eval.json
demo: .venv/.demo data/records/.sample
	$(BIN)/python -m mqformer_jax.main --config=configs/coco_ref.py:sample --workdir=runs/demo $(if $(STEPS),--config.steps=$(STEPS))

# one's own COCO json to a table and pictures: make finetune NAME=balloon IMAGES=photos JSON=train.json VAL=val.json [FROM=runs/other]
NAME ?= mine
finetune: .venv/.demo
	$(PIP) --editable '.[text]'
	$(if $(FROM),,test -d pretrained/lite || $(BIN)/mqformer convert --from lite --output pretrained/lite)
	$(BIN)/mqformer prepare instances --name $(NAME) --split train --images $(IMAGES) --json $(JSON)
	$(if $(VAL),$(BIN)/mqformer prepare instances --name $(NAME) --split val --images $(IMAGES) --json $(VAL))
	$(BIN)/python -m mqformer_jax.main --config=configs/finetune.py:$(NAME)$(if $(FROM),$(COMMA)$(FROM)) --workdir=runs/$(NAME) $(if $(STEPS),--config.steps=$(STEPS))
COMMA := ,

# ---- Tests (CONTRIBUTING.md) ----
# TESTS: files, folders or options of pytest, e.g. make test TESTS=tests/losses or make test TESTS="-k matcher"
TESTS ?=
PYTEST = env -u GLIBC_TUNABLES $(BIN)/python -m pytest --numprocesses 2 --dist loadscope --no-loadscope-reorder
FAST := not slow and not parity and not process and not tpu_compiler and not browser

.venv/.test: .venv/.demo
	$(PIP) --editable '.[test]'
	touch $@

# torch, transformers and other originals to compare with, the compiler for TPUs, tensorflow-datasets, the web page
.venv/.test-all: .venv/.test
	$(PIP) --editable '.[test,full]'
	touch $@ .venv/.dev

# what a contributor needs at each change
test: .venv/.test
	$(PYTEST) -m "$(FAST)" $(TESTS)

# everything
test-all: .venv/.test-all lint
	$(PYTEST) $(TESTS)

# format, style and types of the code; `make lint && .venv/bin/pre-commit install` has git check them at each commit
.venv/.dev: .venv/.demo
	$(PIP) --editable '.[dev]'
	touch $@

lint: .venv/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/python tests/type_check.py

clean:
	rm -rf .venv runs/demo data/records/.sample data/records/sample_*
