#!/usr/bin/env bash
# OLMoE-1B-7B, DFC x4: 1 node of 8 x 80 GB and more, expert parallel 8.
# Data, tokenizer and --save follow: olmoe-1b-7b-dfc.sh --data-path PREFIX --tokenizer-type ... --save runs/olmoe-1b-7b-dfc
exec "$(dirname "$0")/submit.sh" olmoe-1b-7b-dfc 1 moe/olmoe-1b-7b-frac.yaml --expert-model-parallel-size 8 --moe-token-dispatcher-type alltoall "$@"
