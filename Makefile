# make demo · test · check · docs · faults · fuzz · bench-smoke · bench-NAME · pt|sft|dpo|merge|quantize|evaluate [CONFIG=configs/x.yaml]
CONFIG ?= configs/tiny.yaml
SAVES ?= saves
PYTHON ?= python3
BIN := .venv/bin
STAGES := pt sft dpo merge quantize evaluate
FAULTS ?= pt,sft,dpo,merge,quantize,add_tokens,reward,select,kto,evaluate,sft+rows,rehearsal

.PHONY: demo test test-fast test-train faults fuzz check docs format clean bench-smoke $(STAGES)

demo: .venv/ready  ## the whole chain on a new tiny model
	$(BIN)/pipeline run configs/tiny.yaml --saves $(SAVES)

$(STAGES): .venv/ready  ## every stage up to this one
	$(BIN)/pipeline run $(CONFIG) --saves $(SAVES) --until $@

test: test-fast test-train

test-fast: .venv/ready  ## no torch, seconds
	$(BIN)/python -m pytest -q -m "not train" -n 2

test-train: .venv/ready  ## trains, merges and quantizes tiny models, in two processes of one thread
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m train -n 2 --dist loadfile --no-loadscope-reorder

faults: .venv/ready  ## kills the run at every change of a file, stage by stage, and stops each kind of training at each step; several hours
	$(BIN)/python -m tests.faults.harness --stages $(FAULTS)
	EVERY_STOP=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m train -k "a_stop_at_any_step or a_stop_leaves" tests/training

fuzz: .venv/ready  ## reads a hundred thousand broken data files, minutes
	$(BIN)/python tests/data/fuzz_rows.py 100000

bench-smoke: .venv/ready  ## the benchmarks on a tiny model, a minute; part of `make test`
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q tests/test_benchmarks.py

bench-%: .venv/ready  ## one table of docs/performance.md, as `make bench-chain ARGS="--rounds 1"`
	PYTHONPATH=. $(BIN)/python benchmarks/$*.py $(ARGS)

check: .venv/ready
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

docs: build/docs-env/ready  ## the documentation as a site, in build/site
	build/docs-env/bin/mkdocs build --strict

build/docs-env/ready: docs/requirements.txt
	$(PYTHON) -m venv build/docs-env
	build/docs-env/bin/pip install --quiet --requirement docs/requirements.txt
	@touch $@

format: .venv/ready
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

.venv/ready: pyproject.toml constraints.txt install.sh
	./install.sh $(PYTHON)
	@touch $@

clean:  ## removes what was built; outputs in saves/ stay
	rm -rf .venv build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache
