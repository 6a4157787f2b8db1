#!/usr/bin/env bash
# Builds .venv with everything that training, testing and developing need, at the versions of requirements.txt.
# Idempotent: a finished environment is recognised at once, a broken-off one is continued.
#
#   PYTHON           the interpreter to build it with (default python3.11)
#   TORCH_INDEX_URL  where to take torch from, if not from pip's own index: the URL that PyTorch's install page gives
#                    for a CPU-only build or for another CUDA version
set -eu
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-python3.11}
LOG=.venv/mmcv-build.log
STAMP=.venv/finished
inputs=$(cat requirements.txt setup.py tools/setup_env.sh | sha256sum)

if [ "$(cat "$STAMP" 2>/dev/null)" = "$inputs" ]; then
    exit 0
fi

fail() {
    echo "make env: $*" >&2
    exit 1
}

pinned() { # the pins of the named packages
    for name in "$@"; do
        grep -oE "^$name==[^ ]+" requirements.txt || fail "requirements.txt does not pin $name"
    done
}

command -v "$PYTHON" >/dev/null || fail "no $PYTHON here; name an interpreter, as in: make env PYTHON=python3"
"$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    fail "$PYTHON is older than 3.11, the oldest Python that the pinned packages have"
"$PYTHON" -c 'import ensurepip, venv' 2>/dev/null ||
    fail "$PYTHON cannot make virtual environments; on Debian and Ubuntu: apt-get install $(basename "$PYTHON")-venv"

if [ ! -x .venv/bin/pip ]; then
    echo "make env: creating .venv"
    "$PYTHON" -m venv --clear .venv
fi
export PATH="$PWD/.venv/bin:$PATH" # where the build of mmcv finds ninja
pip() { .venv/bin/python -m pip --disable-pip-version-check "$@"; }

echo "make env: installing torch"
pip install --quiet $(pinned torch) ${TORCH_INDEX_URL:+--index-url "$TORCH_INDEX_URL"}
pip install --quiet $(pinned setuptools wheel ninja psutil)

# mmcv has no wheel for this torch, and without its operators no detector runs: build them here, against the torch
# just installed (hence no build isolation).
has_operators() { .venv/bin/python -c 'import mmcv.ops' 2>/dev/null; }
build_mmcv() {
    : >"$LOG"
    MMCV_WITH_OPS=1 pip install --verbose --no-build-isolation -c requirements.txt "$@" $(pinned mmcv) >"$LOG" 2>&1 &
    local build=$!
    tail --pid=$build -n +1 -f "$LOG" | grep --line-buffered -oE '^ *\[[0-9]+/[0-9]+\]' | while read -r step; do
        printf '\rmake env: compiling mmcv %s ' "$step"
    done
    echo
    wait $build || fail "mmcv did not build. Its log is $LOG, and it ends:
$(tail -n 25 "$LOG")
A C++ compiler and Python's headers are needed; on Debian and Ubuntu:
    apt-get install g++ $(basename "$PYTHON")-dev libgl1 libglib2.0-0"
}
if ! has_operators; then
    echo "make env: installing mmcv (10 to 20 minutes on two cores where it has to be compiled; log: $LOG)"
    build_mmcv
    .venv/bin/python -c 'import cv2' || fail "OpenCV does not load; on Debian and Ubuntu: apt-get install libgl1 libglib2.0-0"
    # pip may have kept a wheel that was once built without operators, or against another torch.
    has_operators || build_mmcv --no-cache-dir --no-binary mmcv --force-reinstall --no-deps
fi

echo "make env: installing mmdet and the rest"
pip install --quiet -r requirements.txt
pip install --quiet --no-build-isolation --no-deps --editable .

.venv/bin/python -c 'import mmcv.ops, mmdet_cbn' || fail "the finished environment does not load, see above"
echo "$inputs" >"$STAMP"
echo "make env: .venv is ready"
