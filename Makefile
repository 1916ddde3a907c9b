PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: setup test test-slow lint types quickstart gpu bench docs clean

setup: $(STAMP)

# torch comes first and alone: pinned exactly, pip takes whichever build of that version is at hand
# (a CPU wheel on disk, say) and nothing asked for later can replace it by another.
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install $(shell grep '^torch==' constraints.txt)
	$(BIN)/pip install -c constraints.txt -e ".[test,dev,docs,examples]"
	touch $@

test: setup lint types
	$(BIN)/pytest -n 2 --dist loadfile -m "not slow"

test-slow: setup
	$(BIN)/pytest -m slow

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup
	$(BIN)/mypy

quickstart: setup
	$(BIN)/python examples/quickstart.py

gpu: setup
	PYTHON=$(BIN)/python benchmarks/on_gpu.sh

docs: setup
	$(BIN)/mkdocs build --strict

bench: setup
	$(BIN)/python -m benchmarks run

clean:
	rm -rf .venv build dist site *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
