# Two commands do all the set-up: `make demo` and `make test`. Nothing but make and Python 3.11 or newer is needed.
PYTHON ?= python3
BIN := .venv/bin
STEPS ?=
# on Linux, memory in huge pages: a tenth of the time of a step on a CPU goes with asking for it page by page (docs/performance.md)
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1

.PHONY: demo test finetune clean

.venv/.demo: setup.cfg
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --editable .
	touch $@

# parity: torch and transformers, to compare with; without them (TESTS=test) those tests skip and say so. TESTS=test,parity,tfds
# adds the builders of tensorflow-datasets, whose installation takes a minute
TESTS ?= test,parity
.venv/.test: .venv/.demo
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[$(TESTS)]'
	touch $@

data/records/.sample: data/sample.py data/sample_render.py | .venv/.demo
	$(BIN)/python data/prepare.py sample --out data/records
	touch $@

# train the sample recipe, evaluate it on held-out scenes, leave pictures, a table and runs/demo/eval.json
demo: .venv/.demo data/records/.sample
	$(BIN)/python -m mqformer_jax.main --config=configs/coco_ref.py:sample --workdir=runs/demo $(if $(STEPS),--config.steps=$(STEPS))

# one's own COCO json to a table and pictures: make finetune NAME=balloon IMAGES=photos JSON=train.json VAL=val.json [FROM=runs/other]
NAME ?= mine
finetune: .venv/.demo
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[text]'
	$(if $(FROM),,test -d pretrained/lite || $(BIN)/python -m mqformer_jax.convert --from lite --output pretrained/lite)
	$(BIN)/python data/prepare.py instances --name $(NAME) --split train --images $(IMAGES) --json $(JSON)
	$(if $(VAL),$(BIN)/python data/prepare.py instances --name $(NAME) --split val --images $(IMAGES) --json $(VAL))
	$(BIN)/python -m mqformer_jax.main --config=configs/finetune.py:$(NAME)$(if $(FROM),$(COMMA)$(FROM)) --workdir=runs/$(NAME) $(if $(STEPS),--config.steps=$(STEPS))
COMMA := ,

test: .venv/.test
	$(BIN)/python -m pytest

clean:
	rm -rf .venv runs/demo data/records/.sample data/records/sample_*
