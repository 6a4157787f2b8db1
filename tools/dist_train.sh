#!/usr/bin/env bash
# Train on the GPUs of this node: dist_train.sh CONFIG GPUS [ARGUMENTS OF train.py]
# GPUS is the number of processes, which run on the CPU where there is no GPU. They meet at a free port, or at PORT.
# On several nodes, run it on each with NNODES, NODE_RANK, MASTER_ADDR and, for a port other than 29500, PORT set.
. "$(dirname "$0")/launch.sh"
needs 2 "$@"
config=$1 gpus=$2
shift 2
with_torchrun "$gpus" train.py "$config" "$@"
