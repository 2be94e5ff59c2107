#!/usr/bin/env bash
# OLMo-1B, DHC x4: 1 node of 8 x 80 GB, data parallel.
# Data, tokenizer and --save follow: olmo-1b-dhc.sh --data-path PREFIX --tokenizer-type ... --save runs/olmo-1b-dhc
exec "$(dirname "$0")/submit.sh" olmo-1b-dhc 1 sizes/olmo-1b-dhc.yaml "$@"
