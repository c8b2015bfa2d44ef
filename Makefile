# demo, test, check, docs: each does all its own set-up in $(VENV).
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install -q -c constraints.txt

SEEDS ?= 0
OUT ?= demo

.PHONY: demo test check lint types docs clean

demo: $(VENV)/.run  ## train both models, compare them, open demo/report.html
	$(BIN)/nextlat demo --out $(OUT) --seeds $(SEEDS)

test: $(VENV)/.dev  ## install and test
	$(BIN)/python -m pytest -n auto

check: test lint types  ## test, and also lint and types

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.dev
	$(BIN)/mypy

docs: $(VENV)/.docs  ## build the documentation: open site/index.html
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

# One resolution with the constraints in force, so that torch is chosen once; the stamp is newer than what it depends on.
$(VENV)/.run: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) -e .
	touch $@

$(VENV)/.dev: $(VENV)/.run
	$(PIP) -e ".[dev,osm,text,lm-eval]"
	touch $@

$(VENV)/.docs: $(VENV)/.run
	$(PIP) -e ".[docs]"
	touch $@

clean:
	rm -rf $(VENV) site .pytest_cache .mypy_cache .ruff_cache .hypothesis build src/*.egg-info
