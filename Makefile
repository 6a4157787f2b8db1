# The commands of the README. They run in .venv, which `make env` builds, except test-onedl and test-torch21.
PYTHON ?= python3.11

.PHONY: env env-onedl env-torch21 quickstart test test-rows test-onedl test-torch21 lint clean

env:
	@PYTHON=$(PYTHON) tools/setup_env.sh

env-onedl:
	@PYTHON=$(PYTHON) tools/setup_env.sh onedl

env-torch21:
	@PYTHON=$(PYTHON) tools/setup_env.sh torch21

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

# The same suite with the oldest torch that is supported.
test-torch21: env-torch21
	.venv-torch21/bin/python -m pytest tests

lint: env
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

clean:
	rm -rf .venv .venv-onedl .venv-torch21 build mmdet_cbn.egg-info .hypothesis .mypy_cache .ruff_cache .pytest_cache
