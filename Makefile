# Every door to brie. `make help` lists them; each installs what it needs into .venv first.

PYTHON ?= python3
BIN := .venv/bin
RUN ?= runs/brie
LAST = $(shell ls -d $(RUN)/checkpoint-* 2>/dev/null | sed "s/.*-//" | sort -n | tail -1)
CHECKPOINT ?= $(if $(LAST),$(RUN)/checkpoint-$(LAST))
PROMPT ?= What is it like to wait for a letter that will not come?

# macOS has Metal in mlx itself; Linux takes CUDA where a card answers, else the CPU build.
ifeq ($(shell uname -s),Linux)
DEVICE := $(if $(shell command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L 2>/dev/null),cuda,cpu)
endif
comma := ,

# what the extra parity is checked with; torch itself is named in pyproject.toml
PEFT := 0.21.2
ACCELERATE := 1.15.0

.PHONY: help setup demo nano train generate chat convert test check bench constraints clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: .venv/.run  ## install brie into .venv

demo: .venv/.run  ## walk the whole road on the embedded model: a few minutes, no download
	@BIN=$(BIN) bash demo.sh

models/nano: | .venv/.run
	$(BIN)/brie nano $@

nano: models/nano  ## make the embedded model

train: .venv/.run  ## train Qwen2.5-0.5B-Instruct on data/ by the card's recipe (RUN=runs/NAME)
	$(BIN)/brie train --out $(RUN)

generate: .venv/.run  ## ask the newest checkpoint of RUN (PROMPT='...')
	$(BIN)/brie generate $(if $(CHECKPOINT),--adapter $(CHECKPOINT)) --prompt "$(PROMPT)"

chat: .venv/.run  ## talk with the newest checkpoint of RUN
	$(BIN)/brie chat $(if $(CHECKPOINT),--adapter $(CHECKPOINT))

convert: .venv/.run  ## write the newest checkpoint of RUN as a PEFT folder (OUT=exports/NAME)
	$(BIN)/python convert/to_peft.py $(CHECKPOINT) $(or $(OUT),exports/$(notdir $(RUN)))

test: .venv/.dev  ## run the tests
	$(BIN)/python -m pytest

check: .venv/.parity  ## format, lint, types, tests with parity, and the wheel in a clean environment
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(MAKE) test
	PYTHON=$(PYTHON) BIN=$(BIN) DEVICE=$(DEVICE) bash tests/wheel.sh

bench: .venv/.dev  ## measure this machine: training and decoding beside mlx-lm (half an hour or more)
	$(BIN)/python bench/training.py
	$(BIN)/python bench/growth.py
	$(BIN)/python bench/decoding.py

constraints: .venv/.dev  ## renew constraints.txt from pyproject.toml
	$(BIN)/pip install -q uv
	$(BIN)/uv pip compile --universal --python-version 3.11 --no-header --no-annotate --no-emit-index-url \
	  --extra cpu --extra cuda --extra dev pyproject.toml | grep -v ^nvidia- > constraints.txt  # torch pins its own
	printf '%s\n' '# the extra parity' peft==$(PEFT) accelerate==$(ACCELERATE) >> constraints.txt

clean:  ## remove what tools leave; runs/, models/ and exports/ stay
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis dist build

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "brie needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) --version 2>&1 || echo missing)."; \
	  echo "  try: make PYTHON=python3.12 $(or $(MAKECMDGOALS),setup)"; exit 1; }
	$(PYTHON) -m venv .venv

.venv/.run: .venv/bin/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install -q -c constraints.txt -e '.$(if $(DEVICE),[$(DEVICE)])'
	@touch $@

.venv/.dev: .venv/bin/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[$(if $(DEVICE),$(DEVICE)$(comma))dev]'
	@touch $@ .venv/.run

.venv/.parity: .venv/.dev
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[$(if $(DEVICE),$(DEVICE)$(comma))dev,parity]'
	@touch $@
