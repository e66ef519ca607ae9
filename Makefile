# `make quickstart` and `make test` are all that a fresh machine needs; both do the set-up first.
SHELL := /bin/bash
VENV := .venv
STAMP := $(VENV)/.installed
PYTHON ?=
ARGS ?=

.PHONY: help quickstart test lint benchmarks-gpu setup clean

help:
	@echo "make quickstart   train a small GLM on text of this machine and let it fill blanks (CPU or GPU)"
	@echo "make test         run every test that this machine can run"
	@echo "make lint         check the style of the sources"
	@echo "make benchmarks-gpu   run the benchmarks that need a GPU, see benchmarks/README.md"
	@echo "make setup        only make $(VENV); the four above do it themselves"
	@echo "make clean        remove $(VENV) and quickstart_run"
	@echo
	@echo "PYTHON=/path/to/python3.12 names the Python; ARGS='...' is handed to the command."

quickstart: $(STAMP)
	@PATH="$(CURDIR)/$(VENV)/bin:$$PATH" examples/quickstart.sh $(ARGS)

test: $(STAMP)
	@$(VENV)/bin/python -m pytest -n auto --dist worksteal $(ARGS)

lint: $(STAMP)
	@$(VENV)/bin/python -m ruff check $(ARGS) .

benchmarks-gpu: $(STAMP)
	@$(VENV)/bin/python -m benchmarks.run_all $(ARGS)

setup: $(STAMP)

$(STAMP): constraints.txt pyproject.toml setup.py tools/set_up.sh
	@PYTHON="$(PYTHON)" tools/set_up.sh $(VENV) $(STAMP)

clean:
	rm -rf $(VENV) quickstart_run
