#!/usr/bin/env bash
# Builds .venv with everything that training, testing and developing need, at the versions of requirements.txt and
# requirements-openmmlab.txt. With the argument onedl it builds .venv-onedl, which has the maintained forks of
# requirements-onedl.txt instead of OpenMMLab's own packages. With the argument torch21 it builds .venv-torch21, which has
# the oldest torch that is supported, of requirements-torch21.txt.
# Idempotent: a finished environment is recognised at once, a broken-off one is continued.
#
#   PYTHON           the interpreter to build it with (default python3.11)
#   TORCH_INDEX_URL  where to take torch from, if not from pip's own index: the URL that PyTorch's install page gives
#                    for a CPU-only build or for another CUDA version
#   FORCE_CUDA=1     compile mmcv's operators for the GPU where torch sees none
set -eu
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-python3.11}
STACK=${1:-openmmlab}
case $STACK in
    openmmlab) TARGET=env VENV=.venv MMCV=mmcv ;;
    onedl) TARGET=env-onedl VENV=.venv-onedl MMCV=onedl-mmcv ;;
    torch21) TARGET=env-torch21 VENV=.venv-torch21 MMCV=mmcv ;;
    *) echo "usage: $0 [openmmlab|onedl|torch21]" >&2 && exit 2 ;;
esac
PINS=(requirements.txt "requirements-$STACK.txt")
LOG=$VENV/mmcv-build.log
STAMP=$VENV/finished
inputs=$(cat "${PINS[@]}" setup.py tools/setup_env.sh | sha256sum)

if [ "$(cat "$STAMP" 2>/dev/null)" = "$inputs" ]; then
    exit 0
fi

fail() {
    echo "make $TARGET: $*" >&2
    exit 1
}

pinned() { # the pins of the named packages
    for name in "$@"; do
        grep -ohE "^$name==[^ ]+" "${PINS[@]}" || fail "$name is not pinned in ${PINS[*]}"
    done
}

command -v "$PYTHON" >/dev/null || fail "no $PYTHON here; name an interpreter, as in: make $TARGET PYTHON=python3"
"$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    fail "$PYTHON is older than 3.11, the oldest Python that the pinned packages have"
[ $STACK != torch21 ] || "$PYTHON" -c 'import sys; sys.exit(sys.version_info >= (3, 12))' ||
    fail "$PYTHON is newer than 3.11, the newest Python that torch 2.1 has. The pinned packages have none older, so it is
3.11 that is needed, as in: make $TARGET PYTHON=python3.11"
"$PYTHON" -c 'import ensurepip, venv' 2>/dev/null ||
    fail "$PYTHON cannot make virtual environments; on Debian and Ubuntu: apt-get install $(basename "$PYTHON")-venv"

if [ ! -x $VENV/bin/pip ]; then
    echo "make $TARGET: creating $VENV"
    "$PYTHON" -m venv --clear $VENV
fi
export PATH="$PWD/$VENV/bin:$PATH" # where the build of mmcv finds ninja
pip() { $VENV/bin/python -m pip --disable-pip-version-check "$@"; }

# torchvision's operators load only beside a torch of the same build. === keeps pip from taking torch's local version,
# as 2.13.0+cpu, out of a folder of wheels, and torchvision from its own index.
echo "make $TARGET: installing torch and torchvision"
if [ -n "${TORCH_INDEX_URL:-}" ]; then
    pip install --quiet $(pinned torch torchvision) --index-url "$TORCH_INDEX_URL"
else
    pip install --quiet $(pinned torch torchvision | sed s/==/===/)
fi
$VENV/bin/python -c 'import torchvision' || fail "torchvision does not load beside this torch, see above. Take both from
one index: make clean, then TORCH_INDEX_URL=... make $TARGET"
pip install --quiet $(pinned setuptools wheel ninja psutil)

# mmcv has no wheel for this torch, and without its operators no detector runs: build them here, against the torch
# just installed (hence no build isolation).
has_operators() { $VENV/bin/python -c 'import mmcv.ops' 2>/dev/null; }
build_mmcv() {
    : >"$LOG"
    MMCV_WITH_OPS=1 pip install --verbose --no-build-isolation "${PINS[@]/#/--constraint=}" "$@" $(pinned $MMCV) >"$LOG" 2>&1 &
    local build=$!
    tail --pid=$build -n +1 -f "$LOG" | grep --line-buffered -oE '^ *\[[0-9]+/[0-9]+\]' | while read -r step; do
        printf '\rmake %s: compiling %s %s ' "$TARGET" "$MMCV" "$step"
    done
    echo
    wait $build || fail "$MMCV did not build. Its log is $LOG, and it ends:
$(tail -n 25 "$LOG")
A C++ compiler and Python's headers are needed; on Debian and Ubuntu:
    apt-get install g++ $(basename "$PYTHON")-dev libgl1 libglib2.0-0"
}
if ! has_operators; then
    echo "make $TARGET: installing $MMCV (10 to 20 minutes on two cores where it has to be compiled; log: $LOG)"
    # Said now, not by the first operator that a training on a GPU calls.
    only_wheel=
    $VENV/bin/python tools/mmcv_operators.py "$TARGET" || only_wheel="--only-binary $MMCV"
    build_mmcv $only_wheel
    $VENV/bin/python -c 'import cv2' || fail "OpenCV does not load; on Debian and Ubuntu: apt-get install libgl1 libglib2.0-0"
    # pip may have kept a wheel that was once built without operators, or against another torch.
    has_operators || [ -n "$only_wheel" ] || build_mmcv --no-cache-dir --no-binary $MMCV --force-reinstall --no-deps
fi

echo "make $TARGET: installing mmdet and the rest"
pip install --quiet "${PINS[@]/#/--requirement=}"
pip install --quiet --no-build-isolation --no-deps --editable .

$VENV/bin/python -c 'import mmcv.ops, mmdet_cbn' || fail "the finished environment does not load, see above"
echo "$inputs" >"$STAMP"
echo "make $TARGET: $VENV is ready"
