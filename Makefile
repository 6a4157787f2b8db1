# The commands of the README. Everything runs in .venv, which `make env` builds.
PYTHON ?= python3.11

.PHONY: env quickstart test lint clean

env:
	@PYTHON=$(PYTHON) tools/setup_env.sh

quickstart: env
	@PATH="$(CURDIR)/.venv/bin:$$PATH" tools/quickstart.sh

test: env
	.venv/bin/python -m pytest tests

lint: env
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

clean:
	rm -rf .venv build mmdet_cbn.egg-info .mypy_cache .ruff_cache .pytest_cache
