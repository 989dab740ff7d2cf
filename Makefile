# Needs python 3.11 or later; everything else is installed below this folder.

PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
UV ?= $(shell command -v uv || echo .uv/bin/uv)
PACKAGES := kernelforge-core kernelforge-cpu kernelforge-metal kernelforge-llm
SYNCED := .venv/.synced

define PROMPT
import numpy as np

def softmax(x):
    """Return
endef
export PROMPT

.DEFAULT_GOAL := help
.PHONY: help demo test lint types fmt bench bench-gpu docs clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{ printf "  make %-9s %s\n", $$1, $$2 }'

demo: $(SYNCED) ## generate text with the model that comes with the package
	@printf '\n%s' "$$PROMPT"
	@.venv/bin/kernelforge llm-inference --prompt "$$PROMPT" --max-tokens 100 --temperature 0.6 --seed 3

test: $(SYNCED) ## run all tests
	.venv/bin/pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

lint: $(SYNCED) ## check style and format
	.venv/bin/ruff check
	.venv/bin/ruff format --check

types: $(SYNCED) ## check types
	@for package in $(PACKAGES) $(wildcard plugins-example/*) tests docs benchmarks; do \
		echo "mypy $$package"; .venv/bin/mypy $$package || exit 1; done

fmt: $(SYNCED) ## format, and fix what can be fixed
	.venv/bin/ruff check --fix
	.venv/bin/ruff format

bench-gpu: $(SYNCED) ## time the first GPU: reports/gpu.json
	.venv/bin/python benchmarks/gpu.py

bench: $(SYNCED) ## compare with the peers that are here: reports/index.html
	.venv/bin/python benchmarks/run.py

docs: $(SYNCED) ## check the documentation and render it into build/docs
	.venv/bin/python docs/build.py

clean: ## remove the environment and what was built
	rm -rf .venv .uv uv.lock build dist reports .mypy_cache .pytest_cache .ruff_cache

$(SYNCED): pyproject.toml $(wildcard */pyproject.toml plugins-example/*/pyproject.toml) | $(UV)
	@echo "Installing the packages into .venv"
	UV_COMPILE_BYTECODE=1 $(UV) sync --all-packages $(if $(PYTHON),--python $(PYTHON))
	@touch $@

.uv/bin/uv:
	@test -n "$(PYTHON)" || { echo "error: no python 3.11 or later found; set PYTHON=/path/to/python"; exit 1; }
	@echo "Installing uv into .uv"
	$(PYTHON) -m venv .uv
	.uv/bin/python -m pip install --quiet "uv>=0.5,<1"
