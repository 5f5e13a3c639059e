# `make train` and `make test` are all it takes on a machine with Python 3.11 or newer and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.DEFAULT_GOAL := help
.PHONY: help setup train test stack-up stack-down stack-status bench lint format docs constraints clean

help:  ## Show what there is.
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 14

setup: $(READY)  ## Fill .venv with everything, pinned by constraints.txt.

# Compiling at installation is what makes every later start quick: importing torch, timm and Ray from
# source text takes more than twice as long, in the driver and in each process that Ray starts.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "amint_ray needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) --version 2>&1). Set PYTHON=..."; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt uv
	$(BIN)/uv pip install --quiet --python $(BIN)/python --compile-bytecode --constraint constraints.txt --editable '.[dev]'
	@touch $(READY)

train: $(READY)  ## Train the embedded default: digits, on Ray, into MLflow.
	$(BIN)/amint train digits

test: $(READY)  ## Lint and run every test.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

stack-up: $(READY)  ## Start Ray with three raylets, S3, PostgreSQL and MLflow on this machine.
	@$(BIN)/python -m infra.local up

stack-down: $(READY)  ## End them; buckets and database stay in .stack.
	@$(BIN)/python -m infra.local down

stack-status: $(READY)  ## Tell what runs and where.
	@$(BIN)/python -m infra.local status || true

bench: $(READY)  ## Measure the joint step against the audited-only step; takes half an hour.
	$(BIN)/python -m benchmarks.step_time

lint: $(READY)  ## ruff and mypy alone.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY)  ## Let ruff rewrite what it can.
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(READY)  ## Write docs/config.md and the *_keys.md beside it from the docstrings.
	$(BIN)/python -m amint_ray.config.reference > docs/config.md
	$(BIN)/python -m amint_ray.config.reference search > docs/search_keys.md
	$(BIN)/python -m amint_ray.config.reference attack > docs/attack_keys.md
	$(BIN)/python -m amint_ray.config.reference audit > docs/audit_keys.md

constraints: $(READY)  ## Resolve the newest versions that pyproject.toml allows.
	$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --all-extras --upgrade \
		--no-header --no-annotate --no-emit-index-url --no-emit-find-links pyproject.toml --output-file constraints.txt

clean:  ## Remove the environment and the caches; runs, models and mlflow.db stay.
	rm -rf $(VENV) build *.egg-info .mypy_cache .ruff_cache .pytest_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
