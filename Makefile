# Requirements: python3 (3.11 or newer), make and a package index. No docker, no compiler, no root.
.DEFAULT_GOAL := help
.PHONY: help setup check test demo bench generate protos lock sbom

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
ARGS ?=
export UV_PYTHON_DOWNLOADS := never
# Tests wait for servers half of the time, so they run on one process more than there are cores, and at most on 4.
JOBS ?= $(shell n=$$(getconf _NPROCESSORS_ONLN); [ $$n -lt 4 ] && echo $$((n + 1)) || echo 4)

help: ## list the targets
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/'

setup: $(VENV)/.ready-dev ## install everything for development into .venv

$(VENV)/.ready: requirements.lock pyproject.toml
	@sh tests/setup.sh "$(PYTHON)" "$(VENV)" requirements.lock
	@touch $@

$(VENV)/.ready-dev: requirements-dev.lock $(VENV)/.ready
	@sh tests/setup.sh "$(PYTHON)" "$(VENV)" requirements-dev.lock
	@touch $@

check: setup ## format, lint, types, layers, English, protos
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python tests/doc_examples.py .mypy_cache/examples && $(BIN)/mypy .mypy_cache/examples
	$(BIN)/lint-imports
	$(BIN)/python tests/prose.py
	cd protos && ../$(BIN)/buf lint

test: setup ## all tests, or those that ARGS selects: make test ARGS="-k verdict"
	$(BIN)/pytest -n $(JOBS) --dist loadgroup $(ARGS)
	$(if $(ARGS),,@sh tests/other_servers.sh $(BIN) $(JOBS))

demo: $(VENV)/.ready ## run a shop in two versions behind Envoy, and print the differences
	@$(BIN)/abreast demo $(ARGS)

bench: setup ## run the benchmarks, and write bench/results.json
	$(BIN)/python bench/run.py $(ARGS)

generate: protos ## generate code: protos, and the synchronous psycopg integration
	$(BIN)/python middleware/generate_sync.py

protos: setup ## generate code from protos/ only
	$(BIN)/python protos/generate.py

# The dev group pins the versions that the generated code needs, so its lock constrains the other.
LOCK = $(BIN)/uv pip compile --upgrade --universal --python-version 3.11.0 --generate-hashes \
	--no-emit-index-url --no-header --quiet --all-extras pyproject.toml

lock: setup ## resolve both lock files
	$(LOCK) --group dev -o requirements-dev.lock
	$(LOCK) --group build --constraint requirements-dev.lock -o requirements.lock

sbom: setup ## write sbom.json: the locked packages and their hashes (CycloneDX)
	$(BIN)/uv tool run --from cyclonedx-bom==7.5.0 cyclonedx-py requirements requirements.lock \
		--pyproject pyproject.toml --output-reproducible --output-format JSON --output-file sbom.json
