# make run: the main job. make test: the tests. Both set up .venv by themselves.
PYTHON ?= $(firstword $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' 2>/dev/null && echo $$p; done))
BIN := .venv/bin

.PHONY: run test test-slow theory faults check format bench docs clean

run: .venv/.run
	$(BIN)/lora-lab train $(ARGS)

# Bytecode is kept even where the environment says not to: tests start hundreds of processes.
test: .venv/.test
	PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses auto --maxprocesses 8 $(ARGS)

theory: .venv/.test
	$(BIN)/python -m tests.theory $(ARGS)

# ARGS="--only kills --seed 1": one kind of fault, and the moments of its kills.
faults: .venv/.test
	$(BIN)/python -m tests.faults $(ARGS)

test-slow: .venv/.test
	$(BIN)/pytest -m slow $(ARGS)

check: .venv/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports

format: .venv/.test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The pages as HTML in site/: open site/index.html. ARGS="--site-dir DIR": elsewhere.
docs: .venv/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict $(ARGS)

bench: .venv/.test
	$(BIN)/python -m tests.benchmarks $(ARGS)
	$(BIN)/python -m tests.benchmarks.adapters
	$(BIN)/python -m tests.benchmarks.experts
	$(BIN)/python -m tests.benchmarks.inits
	$(BIN)/python -m tests.benchmarks.spectra
	$(BIN)/python -m tests.benchmarks.multirun
	$(BIN)/python -m tests.benchmarks.overhead
	$(BIN)/python -m tests.benchmarks.report
	$(BIN)/python -m tests.benchmarks.packing
	$(BIN)/python -m tests.benchmarks.pretrained
	$(BIN)/python -m tests.benchmarks.memory
	$(BIN)/python -m tests.benchmarks.files

clean:
	rm -rf .venv build dist site *.egg-info

.venv/bin/python:
	@test -n "$(PYTHON)" || { echo "lora_lab needs Python 3.11, 3.12 or 3.13 (make PYTHON=/path/to/python)"; exit 1; }
	$(PYTHON) -m venv .venv

.venv/.run: .venv/bin/python pyproject.toml constraints.txt
	$(BIN)/pip install --quiet --constraint constraints.txt --editable .
	touch $@

.venv/.test: .venv/.run
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[test]'
	@# Apart from the rest: tests/vision.py says why, and makes them importable.
	$(BIN)/pip install --quiet --no-deps --constraint constraints.txt --upgrade --target .venv/vision torchvision timm
	@# Likewise tests/quantized.py.
	$(BIN)/pip install --quiet --no-deps --constraint constraints.txt --upgrade --target .venv/quantized bitsandbytes torchao
	touch $@

.venv/.docs: .venv/.run
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[docs]'
	touch $@
