#!/usr/bin/env bash
# Test on the GPUs of this node: dist_test.sh CONFIG CHECKPOINT GPUS [ARGUMENTS OF test.py]
# GPUS is the number of processes, which run on the CPU where there is no GPU. They meet at a free port, or at PORT.
# On several nodes, run it on each with NNODES, NODE_RANK, MASTER_ADDR and, for a port other than 29500, PORT set.
. "$(dirname "$0")/launch.sh"
needs 3 "$@"
config=$1 checkpoint=$2 gpus=$3
shift 3
with_torchrun "$gpus" test.py "$config" "$checkpoint" "$@"
