#!/usr/bin/env bash
# ResFormer-82M: 1 node of 8 GPUs, data parallel.
# Data, tokenizer and --save follow: resformer-82m.sh --data-path PREFIX --tokenizer-type ... --save runs/resformer-82m
exec "$(dirname "$0")/submit.sh" resformer-82m 1 sizes/resformer-82m.yaml "$@"
