# The one door, for people and CI. `make help` lists the targets.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
VLLM_VENV ?= .venv-vllm
BENCH_VENV ?= .venv-bench
CLIENTS_VENV ?= .venv-clients

# A process of tests for each processor, 8 at most; the tests of a file stay together. In one process: make test PARALLEL=
PARALLEL ?= -n auto --maxprocesses 8 --dist loadfile

.DEFAULT_GOAL := help
.PHONY: run test check fix test-vllm test-clients bench-cost bench-admission bench-overload bench-switch bench-guard bench-instructions lock help

run: $(VENV)/runtime  ## Serve on this machine, in front of an Ollama and a vLLM or stand-ins for them
	@$(BIN)/python -m gateway demo

test: $(VENV)/dev  ## Run the tests, without a real engine
	@$(BIN)/python -m pytest -m "not vllm" $(PARALLEL)

check: $(VENV)/dev  ## Lint, types, layers
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

fix: $(VENV)/dev  ## Put right what a program can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

test-vllm: $(VENV)/dev $(VLLM_VENV)/ready  ## Run the tests on a real vLLM (the first time installs it: 7 GB, some minutes)
	TEST_VLLM_VENV=$(VLLM_VENV) $(BIN)/python -m pytest -m vllm

test-clients: $(CLIENTS_VENV)/ready  ## Run the programs of clients that want an older openai (LlamaIndex)
	$(CLIENTS_VENV)/bin/python -m pytest -m "not vllm" tests/e2e/test_clients.py

bench-cost: $(VENV)/dev $(BENCH_VENV)/ready  ## CPU cost of a request and a token, beside vllm-router
	BENCH_VENV=$(BENCH_VENV) $(BIN)/python -m benchmarks.cost

bench-admission: $(VENV)/dev  ## The waiting line: cost of a step, and crowds before an Ollama with and without it
	$(BIN)/python -m benchmarks.admission

bench-overload: $(VENV)/dev  ## Four times what the backend serves, and 10,000 requests of which 60 % leave
	@$(BIN)/python -m benchmarks.overload

bench-switch: $(VENV)/dev  ## Switch to and fro under load: how long a call takes, and what the clients see
	@$(BIN)/python -m benchmarks.switch

bench-guard: $(VENV)/dev  ## The guard before simulated canaries: which it takes back, and when
	@$(BIN)/python -m benchmarks.guard

bench-instructions: $(VENV)/dev  ## CPU instructions of a request and a token, counted by valgrind
	@$(BIN)/python -m benchmarks.instructions

lock: $(VENV)/dev  ## Renew requirements/ from pyproject.toml
	$(BIN)/pip install --quiet uv
	$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-emit-index-url --custom-compile-command "make lock" --upgrade -o requirements/runtime.txt pyproject.toml
	$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-emit-index-url --custom-compile-command "make lock" --upgrade -c requirements/runtime.txt --group dev -o requirements/dev.txt pyproject.toml
	$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-emit-index-url --custom-compile-command "make lock" --upgrade -c requirements/runtime.txt --group dev -o requirements/clients.txt pyproject.toml requirements/clients.in
	$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-emit-index-url --custom-compile-command "make lock" --upgrade -o requirements/bench.txt requirements/bench.in

help:  ## List the targets
	@awk -F':.*## ' '/^[a-z-]+:.*## / { printf "  make %-18s %s\n", $$1, $$2 }' Makefile

$(VENV)/runtime: requirements/runtime.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; try: make PYTHON=python3.12 ...")'
	@echo "Installing what requirements/runtime.txt locks into $(VENV), this once ..."
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements/runtime.txt
	@touch $@

$(VENV)/dev: $(VENV)/runtime requirements/dev.txt
	@echo "Installing what requirements/dev.txt locks, this once ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements/dev.txt
	@touch $@

$(VLLM_VENV)/ready: tests/real_engines/install_vllm.py
	$(PYTHON) tests/real_engines/install_vllm.py $(VLLM_VENV)
	@touch $@

$(BENCH_VENV)/ready: requirements/bench.txt
	@test -x $(BENCH_VENV)/bin/python || $(PYTHON) -m venv $(BENCH_VENV)
	@$(BENCH_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements/bench.txt
	@touch $@

$(CLIENTS_VENV)/ready: requirements/clients.txt
	@test -x $(CLIENTS_VENV)/bin/python || $(PYTHON) -m venv $(CLIENTS_VENV)
	@$(CLIENTS_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements/clients.txt
	@touch $@
