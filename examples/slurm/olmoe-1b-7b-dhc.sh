#!/usr/bin/env bash
# OLMoE-1B-7B, DHC x4: 1 node of 8 x 80 GB and more, expert parallel 8.
# Data, tokenizer and --save follow: olmoe-1b-7b-dhc.sh --data-path PREFIX --tokenizer-type ... --save runs/olmoe-1b-7b-dhc
exec "$(dirname "$0")/submit.sh" olmoe-1b-7b-dhc 1 moe/olmoe-1b-7b-hyper.yaml --expert-model-parallel-size 8 --moe-token-dispatcher-type alltoall "$@"
