# The commands of the README. They run in .venv, which `make env` builds, except test-onedl.
PYTHON ?= python3.11

.PHONY: env env-onedl quickstart test test-rows test-onedl lint clean

env:
	@PYTHON=$(PYTHON) tools/setup_env.sh

env-onedl:
	@PYTHON=$(PYTHON) tools/setup_env.sh onedl

quickstart: env
	@PATH="$(CURDIR)/.venv/bin:$$PATH" tools/quickstart.sh

test: env
	.venv/bin/python -m pytest tests

# Rows of the paper's tables, trained and evaluated at full size on a few images.
test-rows: env
	.venv/bin/python -m pytest tests -m rows

# The same suite as test with the maintained forks of mmcv, mmengine and mmdet.
test-onedl: env-onedl
	.venv-onedl/bin/python -m pytest tests

lint: env
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

clean:
	rm -rf .venv .venv-onedl build mmdet_cbn.egg-info .hypothesis .mypy_cache .ruff_cache .pytest_cache
