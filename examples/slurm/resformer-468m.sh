#!/usr/bin/env bash
# ResFormer-468M: 1 node of 8 GPUs, data parallel.
# Data, tokenizer and --save follow: resformer-468m.sh --data-path PREFIX --tokenizer-type ... --save runs/resformer-468m
exec "$(dirname "$0")/submit.sh" resformer-468m 1 sizes/resformer-468m.yaml "$@"
