# `make test` and `make demo` set up what they need in .venv by themselves.

PYTHON ?= python3
# A release without CUDA libraries where there is no GPU; any release that pyproject.toml admits will do.
TORCH ?= torch==2.13.0

.PHONY: test demo lint clean

test: .venv/ready lint
	.venv/bin/python -m pytest --numprocesses 2 --dist worksteal

demo: .venv/ready
	.venv/bin/python examples/train.py

lint: .venv/ready
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

.venv/ready: pyproject.toml
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet --upgrade pip
	.venv/bin/pip install --quiet "$(TORCH)"
	.venv/bin/pip install --quiet --editable ".[test]"
	touch $@

clean:
	rm -rf .venv runs
