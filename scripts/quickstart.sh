#!/usr/bin/env bash
# usage: scripts/quickstart.sh [key=value ...]      the main job on a task that is made here: two-digit addition
set -euo pipefail
cd "$(dirname "$0")/.."

task=runs/arithmetic
if [ ! -e "$task/eval.jsonl" ]; then
  echo "[quickstart] writing the task and its tokenizer to $task"
  "${VENV:-.venv}/bin/python" -m mtrl.data.arithmetic --out "$task" --seed 1
fi
echo "[quickstart] starting configs/quickstart.yaml${*:+ with $*}"
# A second quickstart moves the first one's folder aside; nothing is deleted.
exec scripts/launch.sh configs/quickstart.yaml if_exists=replace "$@"
