#!/usr/bin/env bash
# The whole path on a CPU, with nothing downloaded: draw a data set, train the small Faster R-CNN with CBN on it,
# evaluate it, draw its detections. `make quickstart` runs it in .venv.
set -eu
cd "$(dirname "$0")/.."
config=configs/small/r18_shapes.py
work_dir=work_dirs/quickstart
rm -rf "$work_dir"

step() { printf '\n== %s (%d s since the start)\n' "$1" $SECONDS; }

step 'Drawing shapes'
python tools/make_shapes.py data/shapes
step 'Training'
python tools/train.py "$config" --work-dir "$work_dir"
step 'Testing, with pictures'
python tools/test.py "$config" "$(cat "$work_dir/last_checkpoint")" --work-dir "$work_dir/test" --show-dir detections
step 'Done'
echo "The COCO table is above; mAP_50 is AP50 on the val split. Pictures with the truth (left) and the detections:"
ls -d "$work_dir"/test/*/detections
