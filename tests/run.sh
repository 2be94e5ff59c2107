#!/usr/bin/env bash
# Everything for the tests, and the tests: bash tests/run.sh [--slow] [pytest arguments ...]
set -eu
cd "$(dirname "$0")/.."
. tools/setup_env.sh
set_up_environment "[dev]"

marker="not slow"
if [ "${1:-}" = "--slow" ]; then
  marker=""
  shift
fi
# One thread per process: the tests are many small models, and results then do not depend on the machine's cores.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
# WANDB and friends never reach for the network in tests.
export WANDB_MODE=offline HF_HUB_OFFLINE=1

# Files side by side: on two cores one process leaves a core idle in half of the tests. Each process has ranks of its own.
workers="$(python -c 'import os; print(min(4, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 2))')"

ruff check .
mypy
exec python -m pytest -n "$workers" --dist loadfile -m "$marker" "$@"
