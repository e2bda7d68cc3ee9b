# Each target installs what it needs into .venv, from the versions in constraints.txt, which were tested together.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INPUTS := setup.py pyproject.toml constraints.txt

.PHONY: help demo test fuzz lint bench instructions gpu-check compat endurance lmms vllm serve-demo kernel-table hub-kernel docs clean

# `make bench` and `make gpu-check` measure what is there: where $(PYTHON) has torch and sees a GPU, that is used as it is,
# nothing is installed and no network is needed. Elsewhere they use .venv. $(1): arguments of Python, $(2): the extra.
define where_the_gpu_is
@if $(PYTHON) -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; \
then $(PYTHON) $(1); \
else $(MAKE) --no-print-directory $(VENV)/.installed-$(2) && $(BIN)/python $(1); fi
endef

help:
	@echo "make demo   prune the embedded model, with and without GAP: table, pictures and JSON in demo-output/"
	@echo "make test   all tests that need no GPU, on all cores (ARGS=... for pytest)"
	@echo "make fuzz   100,000 random calls, right and wrong, of all operators and strategies (about 10 minutes)"
	@echo "make lint   ruff and mypy"
	@echo "make bench  microbenchmarks against PyTorch, sdpa and FastV's way; rows in bench/results/ (ARGS=... for pytest)"
	@echo "make instructions  what the hooks add to a prefill and a decode step, in instructions counted by valgrind (6 minutes)"
	@echo "make gpu-check  everything that needs a GPU: results, races, graphs, whole models, times, goals; in two parts of nine minutes"
	@echo "            if asked: ARGS='--part 1', then ARGS='--part 2' (ARGS=--help)"
	@echo "make compat  kernel tests on an older and the newest torch and Triton, core tests on three versions of transformers"
	@echo "make compat-newest  the wheel and whatever is newest today, in a new environment: a short core of the tests"
	@echo "make endurance  1,500 generations in one process, after which nothing may have grown (2 minutes)"
	@echo "make lmms   the plug-in for lmms-eval, through its own evaluator, in an environment of its own (5 minutes)"
	@echo "make kernel-table  what the kernels need on five GPUs, and what is in series; into docs/kernels.md; needs none (about 5 minutes)"
	@echo "make docs   the documents as a site in build/site/, strictly, with the API reference; and run the notebook"
	@echo "make hub-kernel  the operators as a kernel of the Hugging Face Hub, in build/hub-kernel/, loaded once by the library kernels"
	@echo "make vllm   the same tokens from vLLM as from transformers; first installs vLLM into .venv-vllm (7 minutes, 3.5 GB)"
	@echo "make serve-demo  a server of vLLM with the embedded model, asked the demo's questions through the OpenAI API"
	@echo "make clean  remove .venv, .venv-vllm, .venv-compat-*, .venv-lmms and what was built"

demo: $(VENV)/.installed-demo
	$(BIN)/gap-triton demo

test: $(VENV)/.installed-test
	$(BIN)/python -m pytest --numprocesses logical --dist loadfile --no-loadscope-reorder $(ARGS)

fuzz: $(VENV)/.installed-test
	FUZZ_CALLS=100000 $(BIN)/python -m pytest -q tests/ops/test_fuzz.py

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench:
	$(call where_the_gpu_is,-m pytest -q bench $(ARGS),bench)

instructions: $(VENV)/.installed-test
	$(BIN)/python -m bench.instructions $(ARGS)

gpu-check:
	$(call where_the_gpu_is,-m bench.gpu_check $(ARGS),test)

# `make compat-NAME` runs one combination; the names are in tests/scripts/compat.py. ARGS=--record writes docs/compatibility.md.
compat:
	$(PYTHON) tests/scripts/compat.py $(ARGS)

compat-%:
	$(PYTHON) tests/scripts/compat.py $* $(ARGS)

endurance: $(VENV)/.installed-test
	$(BIN)/python tests/scripts/endurance.py $(ARGS)

# Lmms-eval itself without what it asks for: forty packages, among them torchvision, whose build must match that of torch, and
# the index has only the one for CUDA. What its RefCOCO tasks and llava_hf import is in tests/scripts/lmms.txt.
lmms:
	test -d .venv-lmms || $(PYTHON) -m venv .venv-lmms
	.venv-lmms/bin/python -m pip install --quiet --disable-pip-version-check --editable ".[test]" \
		--requirement tests/scripts/lmms.txt
	.venv-lmms/bin/python -m pip install --quiet --disable-pip-version-check --no-deps lmms-eval==0.7.3
	.venv-lmms/bin/python -m pytest -q tests/evaluation/test_lmms.py $(ARGS)

kernel-table: $(VENV)/.installed-test
	$(BIN)/python tests/scripts/kernels_aot.py
	PYTHONPATH=tests:. $(BIN)/python -m scripts.critical_path
	$(BIN)/python docs/tables.py

docs: $(VENV)/.installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	$(BIN)/python tests/scripts/notebook.py

hub-kernel: $(VENV)/.installed-hub
	$(BIN)/python kernels/hub_kernel.py --check $(ARGS)

# vLLM pins its own torch and transformers, so it has an environment of its own. RECORD_SERVING=1 writes docs/results/serving.json.
VLLM := .venv-vllm

$(VLLM)/.installed-vllm: tests/scripts/vllm_environment.py
	$(PYTHON) tests/scripts/vllm_environment.py $(VLLM)

vllm: $(VLLM)/.installed-vllm
	$(VLLM)/bin/python -m pytest -p no:cacheprovider -o python_files='engine_*.py' tests/engine $(ARGS)

serve-demo: $(VLLM)/.installed-vllm
	$(VLLM)/bin/python tests/scripts/serve_demo.py $(ARGS)

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed-%: $(VENV)/bin/python $(INPUTS)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[$*]"
	touch $@

clean:
	rm -rf $(VENV) $(VLLM) .venv-compat-* .venv-lmms build demo-output *.egg-info
