#!/usr/bin/env bash
# OLMo-7B, DHC x4: 1 node of 8 x 80 GB and more, tensor parallel 2.
# Data, tokenizer and --save follow: olmo-7b-dhc.sh --data-path PREFIX --tokenizer-type ... --save runs/olmo-7b-dhc
exec "$(dirname "$0")/submit.sh" olmo-7b-dhc 1 sizes/olmo-7b-dhc.yaml --tensor-model-parallel-size 2 --sequence-parallel "$@"
