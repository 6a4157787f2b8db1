# The commands of the README. They run in .venv, which `make env` builds, except test-onedl and test-torch21.
PYTHON ?= python3.11
# One process a core, with one thread each.
ONE_THREAD := OMP_NUM_THREADS=1
PARALLEL ?= -n auto --dist worksteal

.PHONY: env env-onedl env-torch21 quickstart test test-all test-onedl test-torch21 lint clean

env:
	@PYTHON=$(PYTHON) tools/setup_env.sh

env-onedl:
	@PYTHON=$(PYTHON) tools/setup_env.sh onedl

env-torch21:
	@PYTHON=$(PYTHON) tools/setup_env.sh torch21

quickstart: env
	@PATH="$(CURDIR)/.venv/bin:$$PATH" tools/quickstart.sh

test: env
	$(ONE_THREAD) .venv/bin/python -m pytest tests $(PARALLEL) -m 'not slow and not rows'

# Also the slow tests, and rows of the paper's tables, trained and evaluated at full size on one image.
test-all: env
	$(ONE_THREAD) .venv/bin/python -m pytest tests $(PARALLEL) -m 'not rows'
	$(ONE_THREAD) .venv/bin/python -m pytest tests -n auto --dist loadgroup -m rows

# All but the rows with the maintained forks of mmcv, mmengine and mmdet.
test-onedl: env-onedl
	$(ONE_THREAD) .venv-onedl/bin/python -m pytest tests $(PARALLEL) -m 'not rows'

# All but the rows with the oldest torch that is supported.
test-torch21: env-torch21
	$(ONE_THREAD) .venv-torch21/bin/python -m pytest tests $(PARALLEL) -m 'not rows'

lint: env
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

clean:
	rm -rf .venv .venv-onedl .venv-torch21 build mmdet_cbn.egg-info .hypothesis .mypy_cache .ruff_cache .pytest_cache
