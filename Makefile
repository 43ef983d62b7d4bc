# Everything runs in .venv, made from requirements.txt; torch is pinned and installed first.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: setup demo test test-slurm lint bench bench-gpu
setup: .venv/installed

.venv/installed: requirements.txt
	$(PYTHON) -m venv .venv || (echo "needs Python 3.11 or newer with venv (Debian: apt install python3-venv)"; exit 1)
	$(BIN)/pip install $$(grep '^torch==' requirements.txt)
	$(BIN)/pip install -r requirements.txt
	touch $@

demo: setup
	$(BIN)/python -m train.demo

# A file's tests share what they train, so they stay together; each process more imports torch once more.
test: setup
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile

# On a real Slurm of their own, installed from Debian's packages where that is possible, skipped elsewhere.
test-slurm: setup
	bash tests/slurm/run.sh

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# What a CPU can measure, compared with bench/results/cpu.jsonl; fails if a figure is more than 10 % worse.
bench: setup
	$(BIN)/python -m bench.regressions

bench-gpu: setup
	bash bench/gpu.sh
