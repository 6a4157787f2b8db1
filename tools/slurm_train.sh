#!/usr/bin/env bash
# Train with Slurm: slurm_train.sh PARTITION JOB_NAME CONFIG WORK_DIR [ARGUMENTS OF train.py]
# GPUS (4), GPUS_PER_NODE (4), CPUS_PER_TASK (5) and SRUN_ARGS may be set.
. "$(dirname "$0")/launch.sh"
needs 4 "$@"
partition=$1 job=$2 config=$3 work_dir=$4
shift 4
with_srun "$partition" "$job" train.py "$config" --work-dir "$work_dir" "$@"
