# Set-up happens once; its stamp makes the next call instant. TORCH=2.11.0 (say) overrides the pinned torch.
PYTHON ?= python3
TORCH ?=
VENV := .venv
STAMP := $(VENV)/.installed

.PHONY: demo test slow lint clean
.DEFAULT_GOAL := help

help:
	@echo "make demo   set up, then from nothing to a talking model"
	@echo "make test   set up, then the tests"
	@echo "make slow   the long tests: more fuzzing, real input"
	@echo "make lint   ruff, pyright, import contracts"

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed, found " + sys.version.split()[0] if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	@if [ -n "$(TORCH)" ]; then sed 's/^torch==.*/torch==$(TORCH)/' constraints.txt > $(VENV)/constraints.txt; \
	else cp constraints.txt $(VENV)/constraints.txt; fi
	$(VENV)/bin/python -m pip install --quiet --constraint $(VENV)/constraints.txt torch
	$(VENV)/bin/python -m pip install --quiet --constraint $(VENV)/constraints.txt --editable '.[dev]'
	@touch $@

demo: $(STAMP)
	$(VENV)/bin/graftlm run recipes/demo.yaml --out runs/demo

test: $(STAMP)
	$(VENV)/bin/python -m pytest -q -n 2 -m 'not slow'

slow: $(STAMP)
	$(VENV)/bin/python -m pytest -q -n 2 -m slow

lint: $(STAMP)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/lint-imports

clean:
	rm -rf $(VENV)
