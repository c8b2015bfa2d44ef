# demo, test, check, docs: each does all its own set-up in $(VENV).
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install -q -c constraints.txt

VLLM_VENV ?= .venv-vllm
# Given up rather than waited for: a registry that does not answer is a failure, with its name.
VLLM_PIP = timeout 600 $(VLLM_VENV)/bin/python -m pip install -q --timeout 30 --retries 2

SEEDS ?= 0
OUT ?= demo

.PHONY: demo test quick serve-test check lint types docs clean

demo: $(VENV)/.run  ## train both models, compare them, open demo/report.html
	$(BIN)/nextlat demo --out $(OUT) --seeds $(SEEDS)

test: $(VENV)/.dev  ## install and test
	$(BIN)/python -m pytest -n auto

quick: $(VENV)/.dev  ## the tests of everything that is quick to test
	$(BIN)/python -m pytest -n auto -m "not slow"

# vLLM wants an older transformers than the rest is tested with, hence an environment of its own.
serve-test: $(VLLM_VENV)/.installed  ## the same in vLLM and llama.cpp, on a CPU
	$(VLLM_VENV)/bin/python -m pytest tests/serving

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

# torch alone with what it needs (a GPU build has libraries of its own), the rest as it is listed.
$(VLLM_VENV)/.installed: pyproject.toml constraints-vllm.txt
	@rm -rf $(VLLM_VENV) && $(PYTHON) -m venv $(VLLM_VENV) \
	&& $(VLLM_PIP) -c constraints-vllm.txt torch \
	&& $(VLLM_PIP) --no-deps -r constraints-vllm.txt \
	&& $(VLLM_PIP) --no-deps -e . \
	&& VLLM_LOGGING_LEVEL=ERROR timeout 300 $(VLLM_VENV)/bin/python -c "import vllm" \
	|| { echo "serve-test: vLLM could not be installed into $(VLLM_VENV) from constraints-vllm.txt:" \
	     "what pip or Python wrote above says why."; exit 1; }
	@touch $@

$(VENV)/.docs: $(VENV)/.run
	$(PIP) -e ".[docs]"
	touch $@

clean:
	rm -rf $(VENV) $(VLLM_VENV) site .pytest_cache .mypy_cache .ruff_cache .hypothesis build src/*.egg-info
