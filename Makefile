# `make` lists what there is. Everything is installed into .venv; nothing outside this folder changes.
VENV := .venv
PY := $(VENV)/bin/python
.DEFAULT_GOAL := help
.PHONY: help env quickstart quickstart-control test parity torture push-matrix lint format types tests clean-env

help:  ## list the targets
	@grep -hE '^[a-z-]+: .*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1|\2/' \
	  | awk -F'|' '{printf "%-26s %s\n", $$1, $$2}'

env:  ## make .venv with exact versions, CPU or CUDA parts as the machine has (PYTHON=... chooses the Python)
	@scripts/setup_env.sh $(VENV)

quickstart: env  ## from nothing to a model that learned: SFT, then GRPO, on two processes; results in runs/quickstart
	@scripts/quickstart.sh

quickstart-control: env  ## the same with shuffled rewards, which must not learn; results in runs/quickstart-control
	@scripts/quickstart.sh reward.name=shuffled:exact_match output_dir=runs/quickstart-control

test: env  ## everything CI runs: lint, types, all tests, the quickstart, the second Megatron-Core
	@scripts/check.sh

lint: env  ## ruff: rules and format
	@scripts/check.sh lint

types: env  ## mypy --strict
	@scripts/check.sh types

tests: env  ## all tests of the main environment, without lint, types, the quickstart and the second environment
	@scripts/check.sh unit distributed engine

parity: env  ## compare every legal layout with transformers, at length (an hour or two); writes docs/parity.md
	@OMP_NUM_THREADS=1 $(PY) -m tests.distributed.run_parity

torture: env  ## kill, starve and damage runs at every point, at length (two hours or so); writes docs/torture.md
	@OMP_NUM_THREADS=1 $(PY) -m tests.torture.run_torture

push-matrix: env  ## push between all layouts of a table, every family, up to eight ranks; writes docs/push_matrix.md
	@OMP_NUM_THREADS=1 $(PY) -m tests.rollout.run_push_matrix

format: env  ## let ruff put the files into format
	@$(PY) -m ruff check --fix --quiet . ; $(PY) -m ruff format .

clean-env:  ## remove .venv and the second environment that `make test` makes
	@rm -rf $(VENV) .venv-second
	@echo "removed $(VENV) and .venv-second"
