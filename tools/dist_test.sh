#!/usr/bin/env bash
# Test on the GPUs of this node: dist_test.sh CONFIG CHECKPOINT GPUS [ARGUMENTS OF test.py]
# On several nodes, run it on each with NNODES, NODE_RANK, MASTER_ADDR and, for a port other than 29500, PORT set.
set -eu
[ $# -ge 3 ] || { sed -n '2,/^set/{/^#/s/^# *//p}' "$0" >&2; exit 2; }
config=$1 checkpoint=$2 gpus=$3
shift 3
exec "$(dirname "$0")/launch.sh" pytorch "$gpus" test.py "$config" "$checkpoint" "$@"
