PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo demo-port test lint docs docs-links soak clean

demo: .venv/train  ## trains a small Res2Net on digits and shows what it learned; offline, no torch
	$(BIN)/python -m train.demo

demo-port: .venv/test  ## ports a PyTorch release file, certifies it and classifies two photographs; offline
	$(BIN)/python examples/port_and_classify.py

test: .venv/test
	$(BIN)/python -m pytest -m "not soak" -n 2 --dist loadfile --no-loadscope-reorder --durations 15

lint: .venv/test
	$(BIN)/ruff check
	$(BIN)/ruff format --check

docs: .venv/docs  ## builds the site; a warning or a link within it that leads nowhere is an error
	$(BIN)/sphinx-build -W --keep-going -q -b html docs build/site
	@echo "Open build/site/index.html"

docs-links: .venv/docs  ## follows the links that lead out of the site; needs a network
	$(BIN)/sphinx-build -q -b linkcheck docs build/links

soak: .venv/test  ## the long checks: random kills, twenty of each kind
	$(BIN)/python -m pytest -m soak

clean:
	rm -rf .venv demo build *.egg-info

# Also where the interpreter that it was made with is gone.
$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed: make PYTHON=python3.11 $(MAKECMDGOALS)")'
	$(PYTHON) -m venv --clear .venv

# A stamp per extra, made anew when the requirements change.
.venv/%: pyproject.toml $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[$*]'
	touch $@

.NOTPARALLEL:  # two of pip in one environment
