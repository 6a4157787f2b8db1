#!/usr/bin/env bash
# Train with Slurm: slurm_train.sh PARTITION JOB_NAME CONFIG WORK_DIR [ARGUMENTS OF train.py]
# GPUS (4), GPUS_PER_NODE (4), CPUS_PER_TASK (5) and SRUN_ARGS may be set.
set -eu
[ $# -ge 4 ] || { sed -n '2,/^set/{/^#/s/^# *//p}' "$0" >&2; exit 2; }
partition=$1 job=$2 config=$3 work_dir=$4
shift 4
exec "$(dirname "$0")/launch.sh" slurm "$partition" "$job" train.py "$config" --work-dir "$work_dir" "$@"
