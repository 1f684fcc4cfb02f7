BIN := .venv/bin

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/:[^#]*## */\t/' | expand -t 12

install: .venv/installed  ## make .venv and install the package into it
.venv/installed: pyproject.toml .ci/constraints.txt
	python3 -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint .ci/constraints.txt --editable .
	touch $@

.venv/plots: .venv/installed
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint .ci/constraints.txt --editable '.[plots]'
	touch $@

.venv/dev: .venv/installed
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint .ci/constraints.txt --editable '.[dev]'
	touch $@

train: .venv/installed  ## train the laptop's GPT on whatever this machine has
	$(BIN)/lightning-gpt fit --config configs/laptop.yaml

generate: .venv/installed  ## write text from the newest best checkpoint, or from the one that comes with the package
	$(BIN)/lightning-gpt generate

HOST := 127.0.0.1
PORT := 6006
CARD = %7B%22plugin%22:%22scalars%22,%22tag%22:%22$(1)%2Floss%22%7D
board: .venv/installed  ## look at the runs: TensorBoard on http://127.0.0.1:6006 (make board HOST=... PORT=...)
	@echo 'losses first:  http://$(HOST):$(PORT)/?pinnedCards=%5B$(call CARD,train),$(call CARD,val)%5D#timeseries'
	@echo 'in one chart:  http://$(HOST):$(PORT)/#custom_scalars'
	$(BIN)/tensorboard --logdir checkpoints --host $(HOST) --port $(PORT) --samples_per_plugin text=1000,images=1000

report: .venv/plots  ## make a page about the newest run: curves, samples, attention
	$(BIN)/lightning-gpt report

test: .venv/dev  ## pass the tests, in six minutes
	$(BIN)/pytest -m "not slow" --numprocesses 2 --dist worksteal

test-all: .venv/dev  ## pass the slow tests too
	$(BIN)/pytest

bench: .venv/installed  ## how fast the laptop's config trains here, and how fast text is written
	$(BIN)/python -m lightning_gpt.benchmarks.training --config configs/laptop.yaml
	$(BIN)/python -m lightning_gpt.benchmarks.generation

.venv/align: .venv/installed
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint .ci/constraints.txt --editable '.[align]'
	touch $@

align: .venv/align  ## fine-tune, learn a reward, optimize it (DPO, GRPO): what each stage buys, in 15 minutes
	$(BIN)/python -m lightning_gpt.benchmarks.alignment

lint: .venv/dev  ## check style and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

clean:  ## remove what can be rebuilt; runs below checkpoints/ stay
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache

.DEFAULT_GOAL := help
.PHONY: help install train generate board report test test-all bench align lint clean
