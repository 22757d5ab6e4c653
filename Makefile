PYTHON ?= python3
BIN = .venv/bin
# quality.py is not among them: it needs a dataset.
BENCHMARKS = calibration chaos cluster demo_figures export inference_memory listing metrics pipeline report resume retrain s3_requests search simulate throughput tiles training training_memory writers

.PHONY: help demo lint check test bench lock docs audit small-model
.NOTPARALLEL:

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 20

# setuptools warns of every editable installation.
.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip
	@echo "a few GB are fetched and installed: minutes"
	PYTHONWARNINGS=ignore::UserWarning $(BIN)/pip install -e '.[dev,export,small-model]'
	touch $@

demo: .venv/installed ## find the defects of drawn circuit boards: demo-output/report.html
	$(BIN)/glad demo --out demo-output

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

check: lint ## lint, format and types
	$(BIN)/mypy

test: lint ## lint, format, types and every test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

bench: $(BENCHMARKS:%=bench-output/%.json) ## every benchmark, hours; one: make bench BENCHMARKS=report

bench-output/%.json: .venv/installed FORCE
	@mkdir -p bench-output
	$(BIN)/python benchmarks/$*.py --json > bench-output/$*.log
	@tail -n 1 bench-output/$*.log | tee $@

FORCE:

small-model: .venv/installed ## train the bundled model from nothing, hours on 2 cores
	$(BIN)/python -m pipelines.small_model

lock: .venv/installed ## requirements.lock: the versions of a cluster's machines; LOCK=--upgrade for newer ones
	$(BIN)/uv pip compile --quiet --no-config --extra aws --python-version 3.11 --python-platform x86_64-manylinux_2_28 \
		--custom-compile-command "make lock" --no-annotate $(LOCK) --output-file requirements.lock pyproject.toml

docs: .venv/installed .venv-docs/installed ## docs/settings.md from the code, then the site: site/; a dead link fails it
	$(BIN)/python docs/settings.py
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build --strict  # with --quiet it would count no warnings

.venv-docs/installed: pyproject.toml
	$(PYTHON) -m venv .venv-docs
	.venv-docs/bin/pip install --quiet --upgrade pip
	.venv-docs/bin/pip install --quiet --group docs
	touch $@

audit: .venv/installed ## known vulnerabilities of what is installed; asks pypi.org
	$(BIN)/pip install --quiet pip-audit
	$(BIN)/pip-audit --strict --skip-editable
