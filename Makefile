PYTHON ?= python3
BIN = .venv/bin

.PHONY: demo docs test small-model

.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet -e '.[dev,small-model]'
	touch $@

demo: .venv/installed
	$(BIN)/glad demo --out demo-output

test: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest

small-model: .venv/installed
	$(BIN)/python -m pipelines.small_model

docs: .venv/installed ## docs/settings.md, from the code
	$(BIN)/python docs/settings.py
