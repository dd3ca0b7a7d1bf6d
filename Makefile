# Set-up happens once; its stamp makes the next call instant. TORCH=2.11.0 (say) overrides the pinned torch.
PYTHON ?= python3
TORCH ?=
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# An environment with DeepSpeed beside all the rest: the ordinary tests are of one without it.
ZERO := .zero
# Two workers of one thread each: threads that fight for the same cores make every test many times slower.
TEST := OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(BIN)/python -m pytest -q -n 2

.PHONY: help setup demo test slow soak lint keys bench-cpu clean
.DEFAULT_GOAL := help

help:
	@echo "make demo   set up, then from nothing to a talking model"
	@echo "make test   set up, then the tests"
	@echo "make slow   the long tests: more fuzzing, real input"
	@echo "make soak   a hundred kills, and two machines of network namespaces cut apart (root), and DeepSpeed"
	@echo "make lint   ruff, import contract, pyright"
	@echo "make keys   write the tables of recipe keys into the guides"
	@echo "make bench-cpu   our trainer against TRL and LLaMA-Factory (BENCH=\"--quick\" passes words on)"

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed, found " + sys.version.split()[0] if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	@if [ -n "$(TORCH)" ]; then sed 's/^torch==.*/torch==$(TORCH)/' constraints.txt > $(VENV)/constraints.txt; \
	else cp constraints.txt $(VENV)/constraints.txt; fi
	$(BIN)/python -m pip install --quiet --constraint $(VENV)/constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint $(VENV)/constraints.txt --editable '.[dev]'
	@touch $@

setup: $(STAMP)

demo: $(STAMP)
	$(BIN)/graftlm run recipes/demo.yaml --out runs/demo

test: $(STAMP)
	$(TEST) -m 'not slow and not soak'

slow: $(STAMP)
	$(TEST) -m slow

$(ZERO)/.installed: $(STAMP)
	$(BIN)/python -m venv $(ZERO)
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
		> "$$($(ZERO)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/beside.pth"
	$(ZERO)/bin/python -m pip install --quiet --constraint $(VENV)/constraints.txt setuptools wheel ninja
	DS_BUILD_OPS=0 DS_ACCELERATOR=cpu $(ZERO)/bin/python -m pip install --quiet --no-build-isolation \
		--constraint $(VENV)/constraints.txt 'deepspeed>=0.19.8,<0.20'
	@# What it compiles at its first start, compiled here: no test should wait for that.
	PATH=$(CURDIR)/$(ZERO)/bin:$$PATH DS_ACCELERATOR=cpu \
		$(ZERO)/bin/python -c 'from deepspeed.comm.torch import build_shm_op; build_shm_op()'
	@touch $@

soak: $(STAMP) $(ZERO)/.installed
	$(TEST) -m soak
	PATH=$(CURDIR)/$(ZERO)/bin:$$PATH PYTHONPATH=src OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false \
		$(ZERO)/bin/python -m pytest -q tests/training/test_zero.py

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/pyright

keys: $(STAMP)
	$(BIN)/python docs/recipe_keys.py

bench-cpu: $(STAMP)
	$(BIN)/python bench/cpu.py $(BENCH)

clean:
	rm -rf $(VENV) $(ZERO)
