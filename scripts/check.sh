#!/usr/bin/env bash
# usage: scripts/check.sh [STEP ...]        all steps when none is named; what `make test` and CI run
#
# Every step runs even when an earlier one failed; a table at the end says how each went and how long it took.
set -uo pipefail
cd "$(dirname "$0")/.."

py=.venv/bin/python
second=.venv-second
all_steps=(lint types unit distributed engine quickstart second ledger)
steps=("$@")
if [ ${#steps[@]} = 0 ]; then steps=("${all_steps[@]}"); fi

MTRL_LEDGER=$(mktemp -d)
trap 'rm -rf "$MTRL_LEDGER"' EXIT
# The tests start many small processes; one thread each is fastest, and nothing may reach the network.
export MTRL_LEDGER OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1 DO_NOT_TRACK=1 TOKENIZERS_PARALLELISM=false

run_pytest() { "$1" -m pytest --durations=5 -q "${@:2}"; }
# Two at a time, each file as a whole: its tests share what they start. In order, so that the longest come first.
by_two=(-n 2 --dist loadfile --no-loadscope-reorder)

step_lint() { "$py" -m ruff check . && "$py" -m ruff format --check .; }
step_types() { "$py" -m mypy -p mtrl; }
step_unit() { run_pytest "$py" "${by_two[@]}" tests --ignore=tests/distributed -m "not vllm and not slow"; }
step_distributed() { run_pytest "$py" "${by_two[@]}" tests/distributed -m "not vllm and not slow"; }
has_vllm() {
  "$py" -c 'import importlib.util as u, sys; sys.exit(u.find_spec("vllm") is None)' \
    || { note="not run: this environment has no vLLM (make env says why)"; return 1; }
}
step_engine() {
  has_vllm || return 0
  run_pytest "$py" tests -m "vllm and not slow"
}
step_quickstart() {
  has_vllm || return 0
  scripts/quickstart.sh output_dir=runs/check-quickstart \
    && "$py" scripts/check_quickstart.py runs/check-quickstart/summary.json
}
step_ledger() { "$py" -m tests.ledger check "$MTRL_LEDGER"; }

# Megatron-Core 0.16.1 is the last for Python 3.11, 0.19 needs 3.12: one environment can hold only one of them.
other_python() {
  local candidates=(python3.12 python3.13) root name found
  if [ "$("$py" -c 'import sys; print(sys.version_info >= (3, 12))')" = True ]; then candidates=(python3.11); fi
  root=$(pyenv root 2> /dev/null)
  for name in "${candidates[@]}"; do
    for found in "$name" "${root:-/nonexistent}"/versions/"${name#python}"*/bin/python; do
      if "$found" -c 'import venv, ensurepip' > /dev/null 2>&1; then printf '%s' "$found"; return; fi
    done
  done
}

step_second() {
  local python
  python=$(other_python)
  if [ -z "$python" ]; then
    note="not run: no other Python (3.11 and 3.12 are tested) was found"
    return
  fi
  if ! PYTHON=$python timeout "${SECOND_ENV_TIMEOUT_S:-300}" scripts/setup_env.sh "$second"; then
    note="not run: its environment could not be installed (see above)"
    return
  fi
  note=$("$second/bin/python" -c 'import sys, importlib.metadata as m
print(f"Python {sys.version_info[0]}.{sys.version_info[1]}, megatron-core", m.version("megatron-core"))')
  # What meets Megatron-Core or the device; the other unit tests run on the first environment only.
  run_pytest "$second/bin/python" "${by_two[@]}" tests/distributed tests/unit/test_host.py tests/unit/test_device.py \
    tests/unit/test_quiet.py tests/unit/test_packed.py \
    -m "not vllm and not slow and not one_stack"
}

summary=() failed=0
for step in "${steps[@]}"; do
  if ! declare -F "step_$step" > /dev/null; then
    echo "no step '$step'; there are: ${all_steps[*]}" >&2
    exit 2
  fi
  printf '\n== %s\n' "$step"
  note="" started=$SECONDS
  if "step_$step"; then outcome=passed; else outcome=FAILED failed=1; fi
  case "$note" in "not run"*) outcome="-" ;; esac
  summary+=("$(printf '%-12s %-7s %5s s  %s' "$step" "$outcome" $((SECONDS - started)) "$note")")
done

printf '\n== summary\n'
printf '%s\n' "${summary[@]}"
printf '%-12s %-7s %5s s\n' total "$([ "$failed" = 0 ] && echo passed || echo FAILED)" "$SECONDS"
exit "$failed"
