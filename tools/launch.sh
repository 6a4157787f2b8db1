# What the scripts beside it share, to be sourced: running train.py or test.py of this folder on several GPUs.
set -eu
here=$(dirname "$0")

# needs COUNT "$@": fewer arguments than that are answered with the script's own first lines.
needs() {
    [ $(($# - 1)) -ge "$1" ] || { sed -n '2,/^[^#]/{/^#/s/^# *//p}' "$0" >&2; exit 2; }
}

# with_torchrun GPUS TOOL ARGUMENTS...
with_torchrun() {
    local gpus=$1 tool=$2 meet
    shift 2
    if [ "${NNODES:-1}" = 1 ] && [ -z "${PORT:-}" ]; then
        meet=(--standalone --local_addr=127.0.0.1) # at a free port, so that several trainings fit on one machine
    else
        meet=(--nnodes="${NNODES:-1}" --node_rank="${NODE_RANK:-0}"
            --master_addr="${MASTER_ADDR:-127.0.0.1}" --master_port="${PORT:-29500}")
    fi
    exec python -m torch.distributed.run "${meet[@]}" --nproc_per_node="$gpus" "$here/$tool" "$@" --launcher pytorch
}

# with_srun PARTITION JOB_NAME TOOL ARGUMENTS...
with_srun() {
    local partition=$1 job=$2 tool=$3
    shift 3
    # SRUN_ARGS is a list of words, hence without quotes.
    exec srun --partition="$partition" --job-name="$job" \
        --gres="gpu:${GPUS_PER_NODE:-4}" --ntasks="${GPUS:-4}" --ntasks-per-node="${GPUS_PER_NODE:-4}" \
        --cpus-per-task="${CPUS_PER_TASK:-5}" --kill-on-bad-exit=1 ${SRUN_ARGS:-} \
        python -u "$here/$tool" "$@" --launcher slurm
}
