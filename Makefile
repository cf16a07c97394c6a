# One command from a fresh clone: `make demo` or `make test`. Needed: Python >= 3.11, git, make, a package registry.
#
# The first call makes .venv with the tested versions of constraints.txt; later ones start at once. ARGS goes to the
# program: make demo ARGS="--num_experts 8", make test ARGS="-k router".

SHELL := /bin/bash
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

# The first of these that is new enough; `make PYTHON=/path/to/python` names another.
PYTHON ?= $(shell for python in python3 python3.11 python3.12 python3.13 python3.14; do \
	"$$python" -c '$(NEW_ENOUGH)' 2>/dev/null && echo "$$python" && break; done)
NEW_ENOUGH := import sys; sys.exit(sys.version_info < (3, 11))

VENV := .venv
VENV_PYTHON := $(VENV)/bin/python
PIP := $(VENV_PYTHON) -m pip --disable-pip-version-check
# Named exactly, so that pip takes the CPU build where the user's settings offer one.
TORCH = $(shell sed -n 's/^torch==//p' constraints.txt)
# Each is touched when its step is done.
INSTALLED := $(VENV)/.installed
DATA := $(VENV)/.data-fetched
TOOLS := $(VENV)/.tools-installed
UPSTREAM := $(VENV)/.upstream-installed

QUEUE := peft/pyproject.toml peft/upstream.toml peft/patches $(wildcard peft/patches/*.patch)
PYTEST := $(VENV_PYTHON) -m pytest
# Two workers of one thread each (conftest.py); the one that is done first takes tests from the other.
IN_TWO := -n 2 --dist worksteal
ARGS ?=

.PHONY: help
help:
	@echo "make TARGET, where TARGET is one of:"
	@sed -n 's/^\([a-z0-9-]*\):.*## /  \1\t/p' Makefile | expand -t 18

.PHONY: demo
demo: $(DATA) ## train a first mixture on the committed base and print how it compares (about five minutes)
	@echo "== training a mixture of four experts, and what it is compared with"
	$(VENV_PYTHON) train.py --config configs/demo.yaml $(ARGS)

.PHONY: test
test: lint $(DATA) ## check the style and run all tests but the slow ones
	@echo "== running the tests, all but the slow ones"
	$(PYTEST) $(IN_TWO) -m "not slow" $(ARGS)

.PHONY: test-all
test-all: lint $(DATA) ## run all tests, and PEFT's own
	@echo "== running all tests"
	$(PYTEST) $(IN_TWO) $(ARGS)
	@$(MAKE) --no-print-directory test-upstream

.PHONY: test-upstream
test-upstream: $(UPSTREAM) ## run PEFT's own LoRA tests on its release and on the fork; the same must pass
	@echo "== running PEFT's own LoRA tests on its release and on the fork"
	$(VENV_PYTHON) peft/fork.py test

.PHONY: bench
bench: $(TOOLS) $(DATA) ## run the benchmarks: ratios, each measured in one process
	@echo "== running the benchmarks"
	$(PYTEST) benchmarks $(ARGS)

.PHONY: validate
validate: $(INSTALLED) ## check that routed LoRA computes what it says, on the committed base
	@echo "== checking that routed LoRA computes what it says"
	$(VENV_PYTHON) validate_moe_modifications.py $(ARGS)

.PHONY: smollm2
smollm2: $(INSTALLED) ## fetch SmolLM2-135M-Instruct into the cache, for --model_name smollm2-135m
	@echo "== fetching SmolLM2-135M-Instruct"
	$(VENV_PYTHON) -m moe_common.models.smollm2

.PHONY: continual
continual: $(DATA) ## let prose, code and math arrive one after another; the mixture grows
	@echo "== training a mixture that grows with its skills, and what it is compared with"
	$(VENV_PYTHON) train.py --continual prose code math $(ARGS)

.PHONY: router-study
router-study: $(TOOLS) $(DATA) ## study the routers of the small mixture, and renew the report in docs/router_study
	@echo "== studying the routers of the small mixture"
	rm -rf runs/router_study
	$(VENV_PYTHON) -m moe_ext.router_study run --out runs/router_study $(ARGS)
	cp runs/router_study/report.html runs/router_study/findings.md runs/router_study/pictures/overview.png \
		docs/router_study/

.PHONY: docs
docs: $(TOOLS) ## build the site of the documentation into build/site; a broken link fails
	@echo "== building the site"
	NO_MKDOCS_2_WARNING=1 $(VENV_PYTHON) -m mkdocs build --strict $(ARGS)
	@echo "The site is build/site/index.html; its search needs a server: $(VENV_PYTHON) -m http.server -d build/site"

.PHONY: lint
lint: $(TOOLS) ## check the style of the code and that the fork's queue and tree agree
	@echo "== checking the style"
	$(VENV_PYTHON) -m ruff check .
	$(VENV_PYTHON) -m ruff format --check .
	@echo "== checking that the fork's patches, modules and built tree agree"
	$(VENV_PYTHON) peft/fork.py check

.PHONY: format
format: $(TOOLS) ## bring the code into that style
	@echo "== formatting"
	$(VENV_PYTHON) -m ruff check --fix .
	$(VENV_PYTHON) -m ruff format .

.PHONY: clean
clean: ## remove .venv and what the tools leave; keeps runs, the fetched data and the fork's built tree
	@echo "== removing $(VENV) and the caches of the tools"
	rm -rf $(VENV) build dist *.egg-info .coverage htmlcov
	find . -type d \( -name __pycache__ -o -name .pytest_cache -o -name .ruff_cache -o -name .hypothesis \
		-o -name .benchmarks \) -prune -exec rm -rf {} +

# Steps of the installation, in order. pip's own settings (its index, its cache) are the user's.

$(VENV_PYTHON):
	@python="$(PYTHON)"; \
	if [ -z "$$python" ]; then \
		echo "make: no Python of version 3.11 or newer was found (python3 is $$(python3 --version 2>&1 || true))." >&2; \
		echo "Install one, or name it: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)" >&2; exit 1; \
	elif ! "$$python" -c '$(NEW_ENOUGH)'; then \
		echo "make: PYTHON is $$python, which is $$("$$python" --version 2>&1 || true), but must be 3.11 or newer." >&2; \
		exit 1; \
	fi; \
	echo "== creating $(VENV) with $$("$$python" --version)"; \
	"$$python" -m venv $(VENV) || { rm -rf $(VENV); echo "make: $$python -m venv failed, see above." >&2; exit 1; }

$(INSTALLED): pyproject.toml constraints.txt $(QUEUE) | $(VENV_PYTHON)
	@echo "== installing PyTorch (the largest download)"
	$(PIP) install -c constraints.txt torch==$(TORCH) setuptools wheel
	@echo "== installing the fork: fetching the pinned release of PEFT, patching it"
	$(PIP) install -c constraints.txt --no-build-isolation -e ./peft
	@echo "== installing dylo_moe and moe_ext"
	$(PIP) install -c constraints.txt --no-build-isolation -e ".[demo]"
	@touch $@

$(TOOLS): $(INSTALLED)
	@echo "== installing the tools' packages, and what tests and documentation need"
	$(PIP) install -c constraints.txt --no-build-isolation -e ".[demo,dev,docs,moqe,quant,study]"
	$(PIP) check
	@touch $@

$(DATA): $(INSTALLED)
	@echo "== fetching the text of the three domains into the cache"
	$(VENV_PYTHON) -m moe_common.text.documents
	@touch $@

$(UPSTREAM): $(TOOLS)
	@echo "== installing what PEFT's own tests need"
	$(PIP) install -c constraints.txt --no-build-isolation -e ".[upstream]"
	@touch $@
