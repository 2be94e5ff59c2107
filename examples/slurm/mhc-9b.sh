#!/usr/bin/env bash
# mHC, 9B mixture: 2 nodes of 8 x 80 GB, expert parallel 8.
# Data, tokenizer and --save follow: mhc-9b.sh --data-path PREFIX --tokenizer-type ... --save runs/mhc-9b
exec "$(dirname "$0")/submit.sh" mhc-9b 2 sizes/mhc-9b.yaml --expert-model-parallel-size 8 --moe-token-dispatcher-type alltoall "$@"
