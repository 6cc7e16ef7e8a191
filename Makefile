# Everything a contributor or CI does. `make` alone lists it.
#
# PYTHON=/path/to/python uses an environment of yours, which `make` then leaves as it is.
# TORCH_INDEX=URL takes torch from another index, for example one of CPU builds.
# WORKERS=N sets the number of test processes (0: in this one).

SYSTEM_PYTHON ?= python3
WORKERS ?= 2
TORCH_INDEX ?=

ifdef PYTHON
READY :=
else
PYTHON := .venv/bin/python
READY := .venv/.ready
endif

BIN := $(dir $(PYTHON))
PYTEST := OMP_NUM_THREADS=1 $(PYTHON) -m pytest
OFFLINE := sh tests/offline.sh
HOMESPUN := $(PYTHON) homespun.py

# Budget of each tier in seconds, on 2 cores. A tier that takes longer fails.
SECONDS_TEST := 1500
SECONDS_SLOW := 2700
SECONDS_FLOWER := 900
SECONDS_FLEET := 3000
SECONDS_FLEET_SHORT := 1200
SECONDS_BROWSER := 300
SECONDS_INSTALL := 1200
SECONDS_GPU := 600

# $(call tier,SECONDS,MARKER EXPRESSION,LAUNCHER,OPTIONS); pytest exits 5 where a tier has no test yet.
limit = $(if $(shell command -v timeout),timeout --signal=INT --kill-after=20 $(1))
define tier
	$(call limit,$(1)) $(3) env $(PYTEST) -m "$(2)" $(4) || { code=$$?; test $$code -eq 5 || { \
	test $$code -ne 124 || echo "over the budget of $(1) seconds" >&2; exit $$code; }; }
endef

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-slow test-flower test-fleet test-fleet-short test-browser test-install test-gpu bench bench-rivals check fmt bundle wheel proto constraints clean clean-setup

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-16s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(READY) ## the virtual environment .venv with everything but the project itself

# The folders are used in place: the dependencies are installed, the project is not (docs/decisions/0001).
# torch first and alone: a range asked for by another package may choose another build of it.
.venv/.ready: pyproject.toml constraints.txt
	@$(SYSTEM_PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed: make setup SYSTEM_PYTHON=..." if sys.version_info < (3, 11) else 0)'
	$(SYSTEM_PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet --upgrade 'pip>=26.3'
	.venv/bin/python -m pip install --quiet $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) -c constraints.txt 'torch==2.13.0'
	.venv/bin/python -m pip install --quiet -c constraints.txt --only-deps '.[sim,ray]'
	.venv/bin/python -m pip install --quiet -c constraints.txt --group dev
	.venv/bin/python -m pip check
	@touch $@

demo: $(READY) ## personalize a population on the built-in world, end to end
	$(HOMESPUN) demo

test: $(READY) ## the default tier: about seven minutes on 2 cores, network cut off
	$(call tier,$(SECONDS_TEST),not slow and not gpu and not flower and not browser and not install,$(OFFLINE),-n $(WORKERS) --dist loadfile --doctest-modules tests common)

test-slow: $(READY) ## minutes each: claims over many seeds, crashes, large populations
	$(call tier,$(SECONDS_SLOW),slow and not gpu and not flower and not browser and not install,$(OFFLINE),)

test-flower: $(READY) ## a real SuperLink with SuperNodes, and Flower's engine on Ray
	$(call tier,$(SECONDS_FLOWER),flower and not fleet,$(OFFLINE),)

test-fleet: $(READY) ## federations of five devices: TLS, enrolment, kills, secure sums
	$(call tier,$(SECONDS_FLEET),fleet,$(OFFLINE),)

test-fleet-short: $(READY) ## one of them: a run whose SuperNode and vault are killed
	$(call tier,$(SECONDS_FLEET_SHORT),fleet,$(OFFLINE),tests/flower/test_fleet.py)

test-browser: $(READY) ## the report in headless Chromium
	$(call tier,$(SECONDS_BROWSER),browser,$(OFFLINE),)

test-install: $(READY) ## each extra alone in an empty environment; needs the network
	$(call tier,$(SECONDS_INSTALL),install,,)

test-gpu: $(READY) ## what needs a CUDA device
	$(call tier,$(SECONDS_GPU),gpu,$(OFFLINE),)

bench: $(READY) ## what the engine costs beside its rivals, docs/bench.json; a quarter of an hour on a quiet machine
	OMP_NUM_THREADS=1 $(HOMESPUN) sim bench --compiled --out docs/bench.json

# pfl-research pins versions that ours are beyond, so it gets an environment of its own, with the same torch.
bench-rivals: .venv-rivals/.ready ## the environment of pfl-research 0.6, which `make bench` then runs beside ours

.venv-rivals/.ready: Makefile
	$(SYSTEM_PYTHON) -m venv .venv-rivals
	.venv-rivals/bin/python -m pip install --quiet $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) 'torch==2.13.0'
	.venv-rivals/bin/python -m pip install --quiet 'pfl[pytorch]==0.6.0' 'transformers==5.23.0' 'peft==0.21.2'
	@touch $@

check: $(READY) ## format, lint, types, import rules
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m ruff check .
	$(PYTHON) -m pyright --pythonpath $(PYTHON)
	$(BIN)lint-imports

fmt: $(READY) ## format, and repair what lint can repair
	$(PYTHON) -m ruff check --fix --exit-zero .
	$(PYTHON) -m ruff format .

bundle: $(READY) ## the Flower bundle, which a server pushes to devices
	FLWR_TELEMETRY_ENABLED=0 FLWR_DISABLE_UPDATE_CHECK=1 $(BIN)flwr build

wheel: $(READY) ## dist/homespun-*.whl, which owners, servers and auditors install
	$(PYTHON) -m build --no-isolation --wheel

proto: $(READY) ## the generated code beside client/vault.proto
	$(PYTHON) -m grpc_tools.protoc -I . --python_out=. --pyi_out=. --grpc_python_out=. client/vault.proto

constraints: $(READY) ## constraints.txt from what is installed now
	$(PYTHON) -m pip freeze --exclude homespun | sed 's/+cpu$$//' > constraints.txt

clean: ## what tools left behind; not .venv, not runs/
	rm -rf build dist *.fab .pytest_cache .ruff_cache .import_linter_cache .hypothesis .coverage
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +

clean-setup: ## the virtual environment
	rm -rf .venv .venv-rivals
