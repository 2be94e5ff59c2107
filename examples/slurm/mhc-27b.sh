#!/usr/bin/env bash
# mHC, 27B mixture: 4 nodes of 8 x 80 GB, expert parallel 8, pipeline 2.
# Data, tokenizer and --save follow: mhc-27b.sh --data-path PREFIX --tokenizer-type ... --save runs/mhc-27b
exec "$(dirname "$0")/submit.sh" mhc-27b 4 sizes/mhc-27b.yaml --expert-model-parallel-size 8 --moe-token-dispatcher-type alltoall \
  --pipeline-model-parallel-size 2 "$@"
