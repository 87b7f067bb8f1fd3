# Start with `make demo` and `make test`. Each makes .venv from the files here, once.
PYTHON ?= python3
PIP := .venv/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

PROVED := .pytest_cache/proved
QUICK := tests/test_architecture.py tests/test_discover.py tests/schemes tests/layouts tests/containers tests/families tests/kernels

.PHONY: demo test quick check docs wheel clean

demo: .venv/.runtime
	.venv/bin/mezzotint demo

test: .venv/.dev check
	rm -rf $(PROVED)
	.venv/bin/python -m pytest --numprocesses auto --maxprocesses 8 --dist worksteal --proved $(PROVED) --ignore tests/documentation/test_readme.py
	.venv/bin/python -m pytest --proved $(PROVED) tests/documentation/test_readme.py

# The developer's loop: no generation with a pipeline, no fuzzing, no documentation, no interpreted kernels.
quick: .venv/.dev
	.venv/bin/python -m pytest --numprocesses auto --maxprocesses 8 --dist worksteal $(QUICK) --ignore tests/kernels/test_triton_ops.py --ignore tests/kernels/test_dequantize.py

check: .venv/.dev
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/.runtime: pyproject.toml constraints.txt | .venv/bin/python
	$(PIP) --editable .
	touch $@

.venv/.dev: .venv/.runtime
	$(PIP) --editable '.[dev]'
	touch $@

docs: .venv/.docs
	.venv/bin/sphinx-build --fail-on-warning --keep-going --builder html docs docs/_build/html

wheel: .venv/bin/python
	.venv/bin/python -m pip wheel --quiet --no-deps --wheel-dir dist . ./demo_model

.venv/.docs: .venv/.runtime
	$(PIP) --editable '.[docs]'
	touch $@

clean:
	rm -rf .venv docs/_build dist
