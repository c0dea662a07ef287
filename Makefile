# `make` or `make help` lists the targets.
SCRIPTS := deployment/scripts
VENV ?= .venv
ENV ?= dev
UV ?= uv

COMPILE := $(UV) pip compile pyproject.toml --universal --python-version 3.11 --generate-hashes --quiet \
	--no-emit-index-url --no-emit-find-links --custom-compile-command "make lock"

.DEFAULT_GOAL := help
.PHONY: help setup start stop restart status logs migrate test fire torture ci lint format bench bench-peers lock

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: ## make .venv for development and get a consul program
	@$(SCRIPTS)/run_tests.sh --setup-only

start: ## start everything and wait until it is healthy (ENV=dev)
	@$(SCRIPTS)/start_user_service.sh -e $(ENV) start

stop: ## stop everything
	@$(SCRIPTS)/start_user_service.sh -e $(ENV) stop

restart: ## stop and start everything
	@$(SCRIPTS)/start_user_service.sh -e $(ENV) restart

status: ## show what runs
	@$(SCRIPTS)/start_user_service.sh -e $(ENV) status

logs: ## follow the logs
	@$(SCRIPTS)/start_user_service.sh -e $(ENV) logs -f

migrate: ## bring the database up to date
	@$(SCRIPTS)/start_user_service.sh -e $(ENV) migrate

test: ## run all tests
	@$(SCRIPTS)/run_tests.sh

fire: setup ## break things and see what holds; ARGS="kill --kills 60 --seed 1", ARGS=--help
	@$(VENV)/bin/python -m tests.fire $(ARGS)

torture: setup ## the same in about five minutes, side by side; ARGS="--minutes N --seed S"
	@$(VENV)/bin/python -m tests.fire --minutes 5 $(ARGS)

ci: ## run everything that must pass: checks and tests
	@.ci/run

lint: setup ## check style, types and import rules
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/ruff format --check .
	@$(VENV)/bin/mypy
	@$(VENV)/bin/lint-imports
	@$(VENV)/bin/python $(SCRIPTS)/lib/check_locks.py

format: setup ## format the code and repair what can be repaired by itself
	@$(VENV)/bin/ruff format .
	@$(VENV)/bin/ruff check --fix .

bench: ## measure the real stack, about 5 minutes (BENCH=--quick: 1; BENCH=--help)
	@$(SCRIPTS)/run_benchmarks.sh $(BENCH)

bench-peers: ## the same work done by others, each in an environment of its own (BENCH=--quick)
	@$(SCRIPTS)/run_benchmarks.sh peers $(BENCH)

# The shared packages get the same versions in all files; the note that says so is left out.
lock: ## write the lock files anew from pyproject.toml (needs uv; newest versions: make lock UPGRADE=--upgrade)
	$(COMPILE) $(UPGRADE) --extra embedded --extra dev -o requirements-dev.lock
	$(COMPILE) --extra embedded -c requirements-dev.lock -o requirements.lock
	$(COMPILE) --extra embedded --extra dev --extra bench -c requirements-dev.lock -o requirements-bench.lock
	@sed -i '/# *-c requirements-dev.lock$$/d' requirements.lock requirements-bench.lock
