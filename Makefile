# The entry point for developers and CI. `make help` lists the targets.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
VLLM_VENV ?= .venv-vllm
BENCH_VENV ?= .venv-bench
CLIENTS_VENV ?= .venv-clients
AUDIT_VENV ?= .venv-audit

# Length of the long runs, bench-soak and bench-chaos.
MINUTES ?= 60

# Tests run in one process per processor, at most 8; all tests of a file share a process. Use
# `make test PARALLEL=` for a single process.
PARALLEL ?= -n auto --maxprocesses 8 --dist loadfile

# uv installs the large environments: several times faster than pip, and without a cache of 7 GB left behind.
UV_INSTALL := $(BIN)/uv pip install --quiet --no-cache --require-hashes
COMPILE := $(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-emit-index-url \
	--custom-compile-command "make lock" --upgrade
EXTRAS := --extra gpu --extra otel

.DEFAULT_GOAL := help
.PHONY: run test check fix test-vllm test-clients prepare bench-cost bench-saturation bench-client-apis bench-admission bench-overload bench-sick bench-switch bench-guard bench-affinity bench-affinity-vllm bench-redis bench-replicas bench-instructions bench-soak bench-chaos bench-scenarios bench-parity fuzz lock sbom audit help

run: $(VENV)/runtime  ## Serve on this machine, with its Ollama and vLLM or with stand-ins
	@$(BIN)/python -m gateway demo

test: $(VENV)/dev  ## Run the tests without a real engine
	@$(BIN)/python -m pytest -m "not vllm" $(PARALLEL)

check: $(VENV)/dev  ## Check style, types and import contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

fix: $(VENV)/dev  ## Apply automatic fixes
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

test-vllm: $(VENV)/dev $(VLLM_VENV)/ready  ## Run the tests on a real vLLM (installed on first use: 7 GB, some minutes)
	TEST_VLLM_VENV=$(VLLM_VENV) $(BIN)/python -m pytest -m vllm

test-clients: $(CLIENTS_VENV)/ready  ## Run all client programs, also those that `make test` lacks (LlamaIndex, anthropic, ollama, LiteLLM, agents)
	$(CLIENTS_VENV)/bin/python -m pytest -m "not vllm" tests/e2e/test_clients.py tests/e2e/test_embeddings.py

prepare: $(CLIENTS_VENV)/ready $(VLLM_VENV)/ready  ## Install what test-clients and test-vllm need

bench-cost: $(VENV)/dev $(BENCH_VENV)/ready  ## Measure the CPU cost of a request and a token, next to vllm-router
	BENCH_VENV=$(BENCH_VENV) $(BIN)/python -m benchmarks.cost

bench-saturation: $(VENV)/dev $(BENCH_VENV)/ready  ## Measure a saturated core, next to vllm-router, SMG and nginx (needs wrk; skips what is not installed)
	BENCH_VENV=$(BENCH_VENV) $(BIN)/python -m benchmarks.saturation

bench-client-apis: $(VENV)/dev  ## Measure the CPU cost of each client API
	$(BIN)/python -m benchmarks.client_apis

bench-admission: $(VENV)/dev  ## Measure the queue: cost of a step, and load on an Ollama with and without it
	$(BIN)/python -m benchmarks.admission

bench-overload: $(VENV)/dev  ## Measure overload: four times the capacity, and 10,000 requests of which 60 % disconnect
	@$(BIN)/python -m benchmarks.overload

bench-sick: $(VENV)/dev  ## Count the requests lost to a server that answers its probes and fails its requests
	@$(BIN)/python -m benchmarks.sick_servers

bench-switch: $(VENV)/dev  ## Measure switching under load: how long a call takes, and what clients see
	@$(BIN)/python -m benchmarks.switch

bench-guard: $(VENV)/dev  ## Run the guard on simulated canaries: which ones it rolls back, and when
	@$(BIN)/python -m benchmarks.guard

bench-affinity: $(VENV)/dev  ## Compare the choice among several servers with other routers', on a model of prefix caches
	@$(BIN)/python -m benchmarks.affinity

bench-affinity-vllm: $(VENV)/dev $(VLLM_VENV)/ready $(BENCH_VENV)/ready  ## Compare them on two real vLLMs with prefix caches, by their own hit counters
	@TEST_VLLM_VENV=$(VLLM_VENV) BENCH_VENV=$(BENCH_VENV) $(BIN)/python -m benchmarks.affinity_vllm

bench-redis: $(VENV)/dev  ## Show what a backend sees of three gateways that share its limits through Redis
	@$(BIN)/python -m benchmarks.redis_replicas

bench-replicas: $(VENV)/dev  ## Measure throughput and CPU cost of one, two and more processes on one port
	@$(BIN)/python -m benchmarks.replicas

bench-instructions: $(VENV)/dev  ## Count CPU instructions of a request and a token (valgrind)
	@$(BIN)/python -m benchmarks.instructions

bench-soak: $(VENV)/dev  ## Watch the memory for an hour in which half of all clients leave (MINUTES=60)
	@$(BIN)/python -m benchmarks.soak --minutes $(MINUTES)

bench-chaos: $(VENV)/dev $(VLLM_VENV)/ready  ## Kill, stop and restart a real vLLM for an hour, and account for every request (MINUTES=60)
	@TEST_VLLM_VENV=$(VLLM_VENV) $(BIN)/python -m benchmarks.chaos --minutes $(MINUTES)

bench-scenarios: $(VENV)/dev  ## Measure the systems that users have reported, as stand-ins, with and without the gateway
	@$(BIN)/python -m benchmarks.scenarios

bench-parity: $(VENV)/dev $(VLLM_VENV)/ready  ## Compare `gateway bench load` with `vllm bench serve` on the same real vLLM
	@TEST_VLLM_VENV=$(VLLM_VENV) $(BIN)/python -m benchmarks.vllm_serve

fuzz: $(VENV)/dev  ## Search for the slowest input for a minute: schemas, patterns, bodies, requests, images, answers
	@$(BIN)/python -m benchmarks.fuzz

lock: $(VENV)/dev  ## Update requirements/ from pyproject.toml
	$(COMPILE) -o requirements/runtime.txt pyproject.toml
	$(COMPILE) -c requirements/runtime.txt $(EXTRAS) -o requirements/image.txt pyproject.toml
	$(COMPILE) -c requirements/runtime.txt --group dev $(EXTRAS) -o requirements/dev.txt pyproject.toml
	$(COMPILE) -c requirements/runtime.txt --group dev $(EXTRAS) -o requirements/clients.txt pyproject.toml requirements/clients.in
	$(COMPILE) -o requirements/bench.txt requirements/bench.in
	$(COMPILE) -o requirements/audit.txt requirements/audit.in

sbom: $(AUDIT_VENV)/ready  ## Write sbom.json, the packages of the image in CycloneDX
	$(AUDIT_VENV)/bin/cyclonedx-py requirements --pyproject pyproject.toml --output-reproducible -o sbom.json requirements/image.txt

audit: $(AUDIT_VENV)/ready  ## Look for known vulnerabilities in the packages of the image
	$(AUDIT_VENV)/bin/pip-audit --strict --require-hashes --disable-pip --progress-spinner off -r requirements/image.txt

help:  ## List the targets
	@awk -F':.*## ' '/^[a-z-]+:.*## / { printf "  make %-18s %s\n", $$1, $$2 }' Makefile

$(VENV)/runtime: requirements/runtime.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is required; try: make PYTHON=python3.12 ...")'
	@echo "Installing the packages of requirements/runtime.txt into $(VENV) (first run only) ..."
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements/runtime.txt
	@touch $@

$(VENV)/dev: $(VENV)/runtime requirements/dev.txt
	@echo "Installing the packages of requirements/dev.txt (first run only) ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements/dev.txt
	@touch $@

$(VLLM_VENV)/ready: tests/real_engines/install_vllm.py | $(VENV)/dev
	$(BIN)/python tests/real_engines/install_vllm.py $(VLLM_VENV)
	@touch $@

$(BENCH_VENV)/ready: requirements/bench.txt | $(VENV)/dev
	@test -x $(BENCH_VENV)/bin/python || $(PYTHON) -m venv --without-pip $(BENCH_VENV)
	@$(UV_INSTALL) --python $(BENCH_VENV)/bin/python -r requirements/bench.txt
	@touch $@

$(CLIENTS_VENV)/ready: requirements/clients.txt | $(VENV)/dev
	@test -x $(CLIENTS_VENV)/bin/python || $(PYTHON) -m venv --without-pip $(CLIENTS_VENV)
	@$(UV_INSTALL) --python $(CLIENTS_VENV)/bin/python -r requirements/clients.txt
	@touch $@

$(AUDIT_VENV)/ready: requirements/audit.txt | $(VENV)/dev
	@test -x $(AUDIT_VENV)/bin/python || $(PYTHON) -m venv --without-pip $(AUDIT_VENV)
	@$(UV_INSTALL) --python $(AUDIT_VENV)/bin/python -r requirements/audit.txt
	@touch $@
