PYTHON ?= python3
BIN := .venv/bin

.PHONY: help demo test test-fast test-lowest check bench-label bench-train docs dist clean

help: ## List the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

# torch and torchvision must be a matching pair: both come from the ordinary index in one call.
.venv/installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

demo: .venv/installed ## Run the loop on real handwritten digits: runs/demo
	$(BIN)/sela run --data digits --out runs/demo --force

test: .venv/installed ## Run the whole test suite
	$(BIN)/python -m pytest -n auto --dist worksteal

test-fast: .venv/installed ## The tests that take less than ten seconds each
	$(BIN)/python -m pytest -m "not slow"

test-lowest: ## The same with the lowest versions that are allowed: .venv-lowest
	$(PYTHON) -m venv .venv-lowest
	.venv-lowest/bin/python -m pip install --quiet --editable '.[dev]' --constraint tests/lowest.txt
	PATH="$(CURDIR)/.venv-lowest/bin:$$PATH" .venv-lowest/bin/python -m pytest -m "not slow"

check: .venv/installed ## Lint, formatting, types and import walls
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_walls.py

bench-train: .venv/installed ## Measure embedding and training: docs/benchmarks-train.md
	$(BIN)/python benchmarks/train.py

docs: .venv/installed ## Write docs/cli.md and docs/sela.1 from the help
	$(BIN)/python docs/make_cli.py

bench-label: .venv/installed ## Measure the label solve beside its peers: docs/benchmarks.md
	$(BIN)/python -m pip install --quiet --editable '.[bench]'
	$(BIN)/python benchmarks/label.py

dist: .venv/installed ## Build the wheel and the source archive, and check them: dist
	$(BIN)/python -m pip install --quiet build twine
	rm -rf dist
	$(BIN)/python -m build
	$(BIN)/python -m twine check --strict dist/*

clean: ## Remove the virtual environment and what runs wrote
	rm -rf .venv .venv-lowest runs dist
