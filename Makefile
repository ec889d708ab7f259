# `make demo` shows the methods on a real network, `make test` checks everything. Both need Python >= 3.10 and make;
# whatever else they use is installed into .venv, once, and again only after pyproject.toml has changed.

PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/installed.stamp
OLDEST := .venv-oldest
PYTHON_OLDEST ?= $(shell for p in python3.10 python3.11 python3.12; do $$p -c pass 2>/dev/null && echo $$p && break; done)
SPHINX := $(BIN)/python -m sphinx -W -n --keep-going -q

export MPLBACKEND := Agg
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.NOTPARALLEL:  # pytest uses two cores, and docs-examples what docs-check has read
.PHONY: help install demo test lint types docs docs-check docs-examples unit test-oldest clean
.DELETE_ON_ERROR:

help:
	@echo "make demo         prune a LeNet on real digits by every method, with and without re-fitting; pictures in build/demo"
	@echo "make test         ruff, mypy, documentation and its examples, pytest with doctests"
	@echo "make test-oldest  pytest with doctests, with Python 3.10 and the oldest PyTorch that the package promises"
	@echo "make docs         build the documentation into build/docs and run its gallery (minutes)"
	@echo "make clean        remove what was built; .venv and .venv-oldest stay (delete them to install afresh)"

install: $(INSTALLED)

$(INSTALLED): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "Python 3.10 or newer is needed. Name one, for example: make PYTHON=python3.12"; exit 1; }
	@echo "== install into .venv: the package, what it needs, and the test tools (PyTorch is large: minutes)"
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet "pip>=22"
	$(BIN)/python -m pip install --editable ".[test,onnx]"
	@touch $@

demo: $(INSTALLED)
	@echo "== demo: the first steps: prune by one budget, train what is left, make it permanent"
	$(BIN)/python examples/first_steps.py
	@echo "== demo: prune a LeNet on real digits by every method"
	$(BIN)/python examples/prune_digits.py --out build/demo
	@echo "== demo: the same network pruned without training, its survivors re-fitted (2 minutes)"
	$(BIN)/python examples/compensate_mnist.py
	@echo "== demo: whole units pruned without training, and cut out: a smaller network that gives the same"
	$(BIN)/python examples/compact_models.py --only lenet --batches 1 64

test: lint types docs-check docs-examples unit

lint: $(INSTALLED)
	@echo "== ruff: style, docstrings, formatting"
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .

types: $(INSTALLED)
	@echo "== mypy: types"
	$(BIN)/python -m mypy

docs: $(INSTALLED)
	@echo "== sphinx: documentation with every script of the gallery run, warnings are errors"
	rm -rf build/docs docs/auto_gallery
	$(SPHINX) -E -b html docs build/docs
	$(BIN)/python docs/check_site.py build/docs --gallery
	@echo "Open build/docs/index.html"

docs-check: $(INSTALLED)
	@echo "== sphinx: documentation without running the gallery, warnings are errors"
	rm -rf build/docs-check
	$(SPHINX) -E -D plot_gallery=0 -d build/doctrees -b html docs build/docs-check
	$(BIN)/python docs/check_site.py build/docs-check

# Reads anew only what has changed since docs-check, whose pages are the same.
docs-examples: export TQDM_DISABLE := 1
docs-examples: export OMP_NUM_THREADS := 1
docs-examples: $(INSTALLED)
	@echo "== the examples of the documentation and of the README do what they say"
	$(SPHINX) -D plot_gallery=0 -d build/doctrees -b doctest docs build/docs-examples
	mkdir -p build/readme  # where the examples write
	sed -n '/^```python/,/^```/p' README.md | grep -v '^```' | (cd build/readme && ../../$(BIN)/python -W error -)

unit: $(INSTALLED)
	@echo "== pytest: tests and doctests"
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

# The environment is .venv, with the oldest releases in place of the newest: tests/oldest.txt names them.
$(OLDEST)/installed.stamp: pyproject.toml tests/oldest.txt
	@test -n "$(PYTHON_OLDEST)" || { \
		echo "Python 3.10 is needed, the oldest that the package promises: the oldest PyTorch has none after 3.12."; \
		echo "Name one, for example: make test-oldest PYTHON_OLDEST=/opt/python3.10/bin/python3"; exit 1; }
	@$(PYTHON_OLDEST) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' || { \
		echo "PYTHON_OLDEST=$(PYTHON_OLDEST) is not Python 3.10, 3.11 or 3.12: the oldest PyTorch has no others."; exit 1; }
	@$(PYTHON_OLDEST) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 10))' || \
		echo "note: $(PYTHON_OLDEST) is not Python 3.10; this tests the oldest PyTorch, not the oldest Python"
	@echo "== install into $(OLDEST): the package, the oldest releases that it promises, and the test tools (minutes)"
	$(PYTHON_OLDEST) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet "pip>=22"
	$(OLDEST)/bin/python -m pip install --constraint tests/oldest.txt --editable ".[test]"
	@touch $@

test-oldest: $(OLDEST)/installed.stamp
	@echo "== pytest: tests and doctests with the oldest releases that pyproject.toml promises"
	@$(OLDEST)/bin/python -c 'import platform, torch; print("Python", platform.python_version(), "torch", torch.__version__)'
	OMP_NUM_THREADS=1 $(OLDEST)/bin/python -m pytest -n 2 -rs

clean:
	rm -rf build docs/auto_gallery *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find torchprune_ext tests examples docs -name __pycache__ -type d -prune -exec rm -rf {} +
