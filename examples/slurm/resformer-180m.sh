#!/usr/bin/env bash
# ResFormer-180M: 1 node of 8 GPUs, data parallel.
# Data, tokenizer and --save follow: resformer-180m.sh --data-path PREFIX --tokenizer-type ... --save runs/resformer-180m
exec "$(dirname "$0")/submit.sh" resformer-180m 1 sizes/resformer-180m.yaml "$@"
