# Two commands for a newcomer: `make demo` and `make test`. Each makes .venv from the files here, once.
PYTHON ?= python3
PIP := .venv/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

PROVED := .pytest_cache/proved

.PHONY: demo test check gpu-test clean

demo: .venv/.runtime
	.venv/bin/mezzotint demo

test: .venv/.dev check
	rm -rf $(PROVED)
	.venv/bin/python -m pytest --numprocesses auto --maxprocesses 8 --dist worksteal --proved $(PROVED) --ignore tests/test_readme.py
	.venv/bin/python -m pytest --proved $(PROVED) tests/test_readme.py

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

clean:
	rm -rf .venv
