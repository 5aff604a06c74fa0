# Everything a contributor types. Needs only make and Python 3.11 or later; each target builds what it needs in .venv.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
TORCH  ?= torch==2.13.0
JOBS   ?= 2

VENV := .venv
BIN  := $(VENV)/bin
PIP  := $(BIN)/python -m pip install --quiet

.DEFAULT_GOAL := help
.PHONY: help demo test test-all lint format docs bench bench-methods clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1|/' | awk -F'|' '{printf "  make %-13s %s\n", $$1, $$2}'

# One stamp per set of packages, so that a second run installs nothing.
$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "No python3 found. Install Python 3.11 or later, or run: make PYTHON=/path/to/python" >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "$(PYTHON) is older than Python 3.11. Run: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@echo "Creating $(VENV)"
	@"$(PYTHON)" -m venv $(VENV)

$(VENV)/.stamp-base: pyproject.toml | $(BIN)/python
	@echo "Installing diffedit (the first time takes a few minutes)"
	@$(PIP) --upgrade pip
	@$(PIP) "$(TORCH)"
	@$(PIP) -e .
	@touch $@

$(VENV)/.stamp-dev: $(VENV)/.stamp-base
	@echo "Installing what the tests and linters need"
	@$(PIP) -e '.[dev,eval]'
	@touch $@

$(VENV)/.stamp-docs: $(VENV)/.stamp-base
	@echo "Installing what the documentation needs"
	@$(PIP) -e '.[docs]'
	@touch $@

demo: $(VENV)/.stamp-base ## edit the bundled model and show pictures from before and after
	@$(BIN)/python examples/demo.py

# One thread per worker: torch's own threads would fight over the cores.
test: $(VENV)/.stamp-dev ## run the tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS)

test-all: $(VENV)/.stamp-dev ## run the tests, the slow ones too
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) -m ""

lint: $(VENV)/.stamp-dev ## check style, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.stamp-dev ## rewrite the code in the house format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/.stamp-docs ## build the documentation into site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "Open site/index.html"

# Shortest first; each by itself: python -m benchmarks.NAME. benchmarks/README.md says what each one measures.
BENCHMARKS := edit_speed planning loading scale training_step closed_forms other_names finetune tracing ablation

bench: $(VENV)/.stamp-dev ## run every benchmark (many hours; the long ones go on where they were stopped)
	@for name in $(BENCHMARKS); do echo "== $$name"; $(BIN)/python -m benchmarks.$$name || exit 1; done
	@for share in half none; do $(BIN)/python -m benchmarks.ablation --preserve $$share || exit 1; done

bench-methods: $(VENV)/.stamp-dev ## compare all methods by pictures (hours; goes on where it was stopped)
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.methods --workers $(JOBS)

clean: ## remove what the targets made (the virtual environment too)
	rm -rf $(VENV) site demo dist build .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
