#!/usr/bin/env bash
# usage: scripts/launch.sh CONFIG [key=value ...]      mtrl/train.py on NPROC processes of this machine (2)
#
# All sockets are asked for on the loopback interface, and the cores are shared out among the processes.
set -euo pipefail
cd "$(dirname "$0")/.."

bin=${VENV:-.venv}/bin
case "$(uname)" in Darwin) loopback=lo0 ;; *) loopback=lo ;; esac
num_processes=${NPROC:-2}
overrides=()
num_gpus=$(nvidia-smi -L 2> /dev/null | grep -c '^GPU' || true)
if [ -z "${NPROC:-}" ] && [ "$num_gpus" = 1 ]; then
  # Two processes cannot share one GPU over NCCL.
  num_processes=1
  overrides=(actor.backend=megatron:d1 rollout.backend=vllm:d1)
fi
num_cores=$("$bin/python" -c 'import os; print(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())')
threads=$((num_cores / num_processes))

export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}
export GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-$loopback} NCCL_SOCKET_IFNAME=${NCCL_SOCKET_IFNAME:-$loopback}
export VLLM_HOST_IP=${VLLM_HOST_IP:-127.0.0.1}
# Nothing is reported to anyone, and nothing is fetched: models and data are folders.
export VLLM_NO_USAGE_STATS=1 DO_NOT_TRACK=1 HF_HUB_OFFLINE=${HF_HUB_OFFLINE:-1}
export TOKENIZERS_PARALLELISM=false
exec "$bin/python" scripts/torchrun.py --standalone --local-addr 127.0.0.1 --nproc-per-node "$num_processes" \
  mtrl/train.py "$@" ${overrides[@]+"${overrides[@]}"}
