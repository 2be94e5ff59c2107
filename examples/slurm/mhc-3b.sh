#!/usr/bin/env bash
# mHC, 3B mixture: 1 node of 8 x 80 GB, expert parallel 8.
# Data, tokenizer and --save follow: mhc-3b.sh --data-path PREFIX --tokenizer-type ... --save runs/mhc-3b
exec "$(dirname "$0")/submit.sh" mhc-3b 1 sizes/mhc-3b.yaml --expert-model-parallel-size 8 --moe-token-dispatcher-type alltoall "$@"
