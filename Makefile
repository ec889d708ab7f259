# `make demo` shows the methods on a real network, `make test` checks everything. Both need Python >= 3.10 and make;
# whatever else they use is installed into .venv, once, and again only after pyproject.toml has changed.

PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/installed.stamp
SPHINX := $(BIN)/python -m sphinx -E -W -n --keep-going -q

export MPLBACKEND := Agg
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help install demo test lint types docs docs-examples unit clean
.DELETE_ON_ERROR:

help:
	@echo "make demo   prune a LeNet on real digits by every method, with and without re-fitting; pictures in build/demo"
	@echo "make test   ruff, mypy, documentation and its examples, pytest with doctests"
	@echo "make docs   build the documentation into build/docs"
	@echo "make clean  remove what was built; .venv stays (delete it to install afresh)"

install: $(INSTALLED)

$(INSTALLED): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "Python 3.10 or newer is needed. Name one, for example: make PYTHON=python3.12"; exit 1; }
	@echo "== install into .venv: the package, what it needs, and the test tools (PyTorch is large: minutes)"
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet "pip>=22"
	$(BIN)/python -m pip install --editable ".[test]"
	@touch $@

demo: $(INSTALLED)
	@echo "== demo: the first steps: prune by one budget, train what is left, make it permanent"
	$(BIN)/python examples/first_steps.py
	@echo "== demo: prune a LeNet on real digits by every method"
	$(BIN)/python examples/prune_digits.py --out build/demo
	@echo "== demo: the same network pruned without training, its survivors re-fitted (2 minutes)"
	$(BIN)/python examples/compensate_mnist.py

test: lint types docs docs-examples unit

lint: $(INSTALLED)
	@echo "== ruff: style, docstrings, formatting"
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .

types: $(INSTALLED)
	@echo "== mypy: types"
	$(BIN)/python -m mypy

docs: $(INSTALLED)
	@echo "== sphinx: documentation, warnings are errors"
	$(SPHINX) -b html docs build/docs
	@echo "Open build/docs/index.html"

docs-examples: export TQDM_DISABLE := 1
docs-examples: $(INSTALLED)
	@echo "== the examples of the documentation and of the README do what they say"
	$(SPHINX) -b doctest docs build/docs-examples
	sed -n '/^```python/,/^```/p' README.md | grep -v '^```' | $(BIN)/python -W error -

unit: $(INSTALLED)
	@echo "== pytest: tests and doctests"
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

clean:
	rm -rf build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find torchprune_ext tests examples docs -name __pycache__ -type d -prune -exec rm -rf {} +
