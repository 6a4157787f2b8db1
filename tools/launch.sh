#!/usr/bin/env bash
# What the scripts beside it share: run train.py or test.py of this folder on several GPUs.
#
#   launch.sh pytorch GPUS TOOL ARGUMENTS...                    torchrun on this node
#   launch.sh slurm PARTITION JOB_NAME TOOL ARGUMENTS...        srun
set -eu
launcher=$1
here=$(dirname "$0")

case $launcher in
pytorch)
    gpus=$2 tool=$3
    shift 3
    exec python -m torch.distributed.run \
        --nnodes="${NNODES:-1}" --node_rank="${NODE_RANK:-0}" --nproc_per_node="$gpus" \
        --master_addr="${MASTER_ADDR:-127.0.0.1}" --master_port="${PORT:-29500}" \
        "$here/$tool" "$@" --launcher pytorch
    ;;
slurm)
    partition=$2 job=$3 tool=$4
    shift 4
    # SRUN_ARGS is a list of words, hence without quotes.
    exec srun --partition="$partition" --job-name="$job" \
        --gres="gpu:${GPUS_PER_NODE:-4}" --ntasks="${GPUS:-4}" --ntasks-per-node="${GPUS_PER_NODE:-4}" \
        --cpus-per-task="${CPUS_PER_TASK:-5}" --kill-on-bad-exit=1 ${SRUN_ARGS:-} \
        python -u "$here/$tool" "$@" --launcher slurm
    ;;
esac
