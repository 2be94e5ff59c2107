#!/usr/bin/env bash
# Shared by the launch scripts of this folder: submit.sh NAME NODES YAML-BELOW-EXAMPLES FLAGS...
# Settings from the environment: NODES, GPUS_PER_NODE (8), LAUNCHER (torchrun), and DRY_RUN=1 to print and check only.
set -eu
examples=$(cd "$(dirname "$0")/.." && pwd)
name=$1 nodes=${NODES:-$2} yaml=$3
shift 3
exec "${PYTHON:-python}" "$examples/../tools/launch.py" ${DRY_RUN:+--dry-run} --job-name "$name" --nodes "$nodes" \
  --gpus-per-node "${GPUS_PER_NODE:-8}" --launcher "${LAUNCHER:-torchrun}" -- --yaml-cfg "$examples/$yaml" "$@"
