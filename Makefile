# Everything needs python3 (3.11 or newer), make and a package index: no docker, no compiler, no root.
.DEFAULT_GOAL := help
.PHONY: help setup check test demo bench generate protos lock

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
ARGS ?=
export UV_PYTHON_DOWNLOADS := never
# Half of their time the tests wait for the servers that they start: two at a time for each core, four at most.
JOBS ?= $(shell [ $$(getconf _NPROCESSORS_ONLN) -gt 1 ] && echo 4 || echo 2)

help: ## list the targets
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/'

setup: $(VENV)/.ready-dev ## install everything for development into .venv

$(VENV)/.ready: requirements.lock pyproject.toml
	@sh tests/setup.sh "$(PYTHON)" "$(VENV)" requirements.lock
	@touch $@

$(VENV)/.ready-dev: requirements-dev.lock $(VENV)/.ready
	@sh tests/setup.sh "$(PYTHON)" "$(VENV)" requirements-dev.lock
	@touch $@

check: setup ## lint, types, architecture, protos
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python tests/doc_examples.py .mypy_cache/examples && $(BIN)/mypy .mypy_cache/examples
	$(BIN)/lint-imports
	cd protos && ../$(BIN)/buf lint

test: setup ## all tests, on servers they start themselves
	$(BIN)/pytest -n $(JOBS) $(ARGS)
	@sh tests/other_servers.sh $(BIN) $(JOBS)

demo: $(VENV)/.ready ## a shop in two versions behind Envoy, and what differs
	@$(BIN)/abreast demo $(ARGS)

bench: setup ## measure; writes bench/results.json
	$(BIN)/python bench/run.py $(ARGS)

generate: protos ## generate code: protos, and the synchronous psycopg integration
	$(BIN)/python middleware/generate_sync.py

protos: setup ## generate code from protos/ only
	$(BIN)/python protos/generate.py

# The dev group pins what the generated code needs, so that lock comes first and constrains the other.
LOCK = $(BIN)/uv pip compile --upgrade --universal --python-version 3.11.0 --generate-hashes \
	--no-emit-index-url --no-header --quiet --all-extras pyproject.toml

lock: setup ## resolve both locks again
	$(LOCK) --group dev -o requirements-dev.lock
	$(LOCK) --group build --constraint requirements-dev.lock -o requirements.lock
