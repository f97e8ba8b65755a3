# make pipelines   the main job: train and sample on data in the repository; 12 to 20 minutes on two cores
# make test        the tests; make test-all also runs the slow ones
# PYTHON=python3.12 make ...   picks the interpreter that the virtual environment is made with

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PEERS := .venv-bench
PINS := -c constraints.txt -c tests/bench/constraints.txt
BENCH ?= -o out/bench.md

TOOLS := DALLE=$(CURDIR)/$(BIN)/dalle PY=$(CURDIR)/$(BIN)/python
JOBS := $(shell $(PYTHON) -c "import os; print(min(3, os.cpu_count() or 1))")
SHARE := $(shell $(PYTHON) -c "import os; print(max(1, (os.cpu_count() or 1) // 3))")

.PHONY: pipelines pipeline-shapes pipeline-emoji test test-all lint types bench docs clean

# Up to three stages run side by side, no more than there are cores: models this small use more threads badly.
pipelines: $(READY)
	OMP_NUM_THREADS=$(SHARE) $(MAKE) --no-print-directory -j$(JOBS) pipeline-shapes pipeline-emoji
	@echo && cat recipes/shapes/build/unclip-small/accuracy.txt
	@echo "Look at recipes/shapes/build/grid.png, recipes/shapes/build/unclip-small/grid.png, recipes/emoji/build/small/grid.png"

pipeline-shapes: $(READY)
	$(MAKE) --no-print-directory -C recipes/shapes $(TOOLS) small

pipeline-emoji: $(READY)
	$(MAKE) --no-print-directory -C recipes/emoji $(TOOLS) small

# A process for each core, up to three: models this small use more threads badly.
test: $(VENV)/.ready-dev
	OMP_NUM_THREADS=$(SHARE) $(BIN)/python -m pytest -m "not slow" -n $(JOBS) --dist loadfile

test-all: $(VENV)/.ready-dev
	$(BIN)/python -m pytest

lint: $(VENV)/.ready-dev
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

types: $(VENV)/.ready-dev
	$(BIN)/mypy

docs: $(VENV)/.ready-dev
	$(BIN)/python docs/make_cli.py > docs/cli.md

# Wants an idle machine. BENCH="--quick -o out/quick.md" make bench checks that it works.
bench: $(PEERS)/.ready
	$(PEERS)/bin/python tests/bench $(BENCH)

# The pins are for machines that install from nothing; on another torch, remove the line from constraints.txt.
$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt -e .
	touch $@

$(VENV)/.ready-dev: $(READY)
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev,oracles]'
	$(BIN)/python -m pip install -q -c constraints.txt --no-deps DALL-E torch-fidelity \
		rudalle taming-transformers crfm-helm omegaconf
	touch $@

# The packages that bench compares with, in an environment of their own.
$(PEERS)/.ready: pyproject.toml constraints.txt tests/bench/constraints.txt
	test -x $(PEERS)/bin/python || $(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python -m pip install -q $(PINS) -e . transformers diffusers matplotlib setuptools \
		attrs requests emoji einops axial-positional-embedding rotary-embedding-torch torchmetrics
	$(PEERS)/bin/python -m pip install -q $(PINS) --no-deps DALLE-pytorch DALL-E dalle2-pytorch torch-fidelity min-dalle
	touch $@

clean:
	rm -rf $(VENV) $(PEERS) recipes/*/build
