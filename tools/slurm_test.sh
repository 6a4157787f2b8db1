#!/usr/bin/env bash
# Test with Slurm: slurm_test.sh PARTITION JOB_NAME CONFIG CHECKPOINT [ARGUMENTS OF test.py]
# GPUS (4), GPUS_PER_NODE (4), CPUS_PER_TASK (5) and SRUN_ARGS may be set.
. "$(dirname "$0")/launch.sh"
needs 4 "$@"
partition=$1 job=$2 config=$3 checkpoint=$4
shift 4
with_srun "$partition" "$job" test.py "$config" "$checkpoint" "$@"
