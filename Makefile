# `make` or `make help` lists the commands. Everything happens in .venv and runs/.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Two tests at a time, one thread each, is faster on two cores than one test with two threads.
WORKERS ?= 2
QUIET := OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1
NBMAKE = LORA_KIT_PARAMS=smoke LORA_KIT_FIGURES=$(CURDIR)/runs/nbmake/figures $(QUIET) \
	$(BIN)/python -m pytest --nbmake --nbmake-timeout=600 -n $(WORKERS)

.DEFAULT_GOAL := help
.PHONY: help install demo test unit papermill solutions nbmake model lab notebooks lint clean

help:  ## List the commands
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# The stamp is newer than what it was made from, or the environment is brought up to date.
$(VENV)/.installed: requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit("lora_kit needs Python 3.11 or newer; set PYTHON=python3.11" if sys.version_info < (3, 11) else 0)'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt -e .
	@touch $@

install: $(VENV)/.installed  ## Create .venv with the pinned packages

demo: install  ## Run notebooks 00-05 on this machine and write runs/demo/index.html
	$(BIN)/lora-kit demo -o runs/demo

test: unit papermill solutions  ## Run everything: the three below, in this order

unit: install model  ## Run style checks and unit tests
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
	$(QUIET) $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m "not notebook" tests

papermill: install model  ## Run every notebook with small parameters through lora-kit run
	$(QUIET) $(BIN)/python -m pytest -n $(WORKERS) -m notebook tests

# `papermill` has run the course's notebooks with the same small parameters: `test` does not again.
solutions: install model  ## Run every solution with small parameters under nbmake
	$(NBMAKE) notebooks/solutions

nbmake: install model  ## The same for every notebook and every solution
	$(NBMAKE) notebooks

model: install  ## Bring the default model into the cache
	$(BIN)/lora-kit fetch smollm2-135m-instruct

lab: install  ## Open JupyterLab on the notebooks
	$(BIN)/jupyter lab --notebook-dir notebooks

notebooks: install  ## Execute the notebooks as committed (default parameters, in place)
	for n in $(sort $(wildcard notebooks/*.ipynb)) $(sort $(wildcard notebooks/solutions/*.ipynb)); do \
	  $(BIN)/lora-kit run $$n --in-place || exit 1; done

lint:  ## Mend what ruff can mend
	$(BIN)/ruff check --fix . && $(BIN)/ruff format .

clean:  ## Remove .venv, runs and caches (the model cache in LORA_KIT_HOME stays)
	rm -rf $(VENV) runs build *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
