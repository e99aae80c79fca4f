# Every command a reader may need. `make` alone lists them.
# Everything is installed in .venv, beside this file; nothing outside the folder is changed.

PYTHON ?= python3
PORT ?= 8000
# Where torch comes from. On Linux without a GPU this saves a gigabyte:
#   make book TORCH_INDEX=https://download.pytorch.org/whl/cpu
TORCH_INDEX ?=

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
READY := $(VENV)/.ready

unexport PYTHONPATH PYTHONHOME PIP_USER PIP_TARGET PIP_PREFIX
export PYTHONNOUSERSITE := 1
export IPYTHONDIR := $(CURDIR)/$(VENV)/var/ipython
export JUPYTER_CONFIG_DIR := $(CURDIR)/$(VENV)/var/jupyter
export MPLCONFIGDIR := $(CURDIR)/$(VENV)/var/matplotlib

.PHONY: help book serve test sync run bench lint clean
.DEFAULT_GOAL := help

help:  ## list the commands
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):[^#]*## (.*)/  make \1\t\2/' | expand -t 16

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	    echo "Python 3.11 or newer is needed; '$(PYTHON)' is not. Try: make book PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)

# torch first and alone, so that the pin in requirements.txt finds it installed, whatever its build.
$(READY): requirements.txt pyproject.toml | $(BIN)/python
	$(PIP) install --quiet $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) "$$(sed -nE 's/^(torch==[^ ]+).*/\1/p' requirements.txt)"
	$(PIP) install --quiet -r requirements.txt
	$(PIP) install --quiet --no-deps --no-build-isolation -e .
	@mkdir -p $(IPYTHONDIR) $(JUPYTER_CONFIG_DIR) $(MPLCONFIGDIR)
	@$(BIN)/python -c 'import matplotlib.font_manager' 2>/dev/null
	@touch $@

book: $(READY)  ## build the book into _build/html
	@$(BIN)/python tools/build.py

serve: book  ## build the book and serve it on 127.0.0.1 (PORT=8000)
	@$(BIN)/python tools/serve.py --port $(PORT)

test: $(READY)  ## check everything: code, notebooks, book, browser
	@$(BIN)/python tools/test.py

sync: $(READY)  ## bring notebooks and modules together after an edit of either
	@$(BIN)/python tools/sync.py

run: $(READY)  ## execute a chapter and store its outputs (CHAPTER=paper/attention)
	@test -n "$(CHAPTER)" || { echo "Which one? For example: make run CHAPTER=paper/attention"; exit 2; }
	@$(BIN)/python tools/run.py $(CHAPTER)

$(VENV)/.bench: requirements-bench.txt $(READY)
	$(PIP) install --quiet -r requirements.txt -r requirements-bench.txt
	@touch $@

# On a machine that does nothing else. BENCH="training --size small --rounds 3" measures less.
bench: $(VENV)/.bench  ## measure speed against other libraries, into book/results (minutes)
	@$(BIN)/python tools/bench.py $(BENCH)

lint: $(READY)  ## ruff and mypy
	@$(BIN)/ruff check . && $(BIN)/mypy

clean:  ## delete what was built (not .venv)
	rm -rf _build build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find book transformer_annotated tests tools -name __pycache__ -type d -prune -exec rm -rf {} +
