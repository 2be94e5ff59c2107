#!/usr/bin/env bash
# GPT-3 345M as one would launch it with Megatron-LM, flag for flag. Here it is refused once, before anything runs, with
# the list of what is not needed and the command line without it: see docs/from-megatron.md.
set -eu
cd "$(dirname "$0")/../.."

DISTRIBUTED_ARGS=(
  --nproc_per_node "${GPUS_PER_NODE:-8}"
  --nnodes "${NUM_NODES:-1}"
  --node_rank "${NODE_RANK:-0}"
  --master_addr "${MASTER_ADDR:-localhost}"
  --master_port "${MASTER_PORT:-6000}"
)

MODEL_ARGS=(
  --use-mcore-models
  --transformer-impl transformer_engine
  --attention-backend auto
  --num-layers 24
  --hidden-size 1024
  --ffn-hidden-size 4096
  --num-attention-heads 16
  --kv-channels 64
  --seq-length 2048
  --max-position-embeddings 2048
  --position-embedding-type learned_absolute
  --normalization LayerNorm
  --norm-epsilon 1e-5
  --init-method-std 0.006
  --make-vocab-size-divisible-by 128
  --attention-dropout 0.1
  --hidden-dropout 0.1
  --attention-softmax-in-fp32
  --no-persist-layer-norm
  --no-masked-softmax-fusion
  --no-bias-gelu-fusion
  --cross-entropy-loss-fusion
)

TRAINING_ARGS=(
  --bf16
  --accumulate-allreduce-grads-in-fp32
  --no-gradient-accumulation-fusion
  --micro-batch-size 4
  --global-batch-size 256
  --rampup-batch-size 32 32 1953125
  --train-samples 25600000
  --optimizer adam
  --lr 3.0e-4
  --min-lr 3.0e-5
  --lr-decay-style cosine
  --lr-decay-samples 25000000
  --lr-warmup-samples 320000
  --weight-decay 0.1
  --adam-beta1 0.9
  --adam-beta2 0.95
  --adam-eps 1e-8
  --clip-grad 1.0
  --seed 1234
  --manual-gc
  --manual-gc-interval 100
  --exit-duration-in-mins 230
)

PARALLEL_ARGS=(
  --tensor-model-parallel-size 2
  --pipeline-model-parallel-size 2
  --context-parallel-size 1
  --sequence-parallel
  --use-distributed-optimizer
  --overlap-grad-reduce
  --overlap-param-gather
  --distributed-backend nccl
  --distributed-timeout-minutes 30
  --recompute-activations
)

DATA_ARGS=(
  --data-path data/pile_text_document
  --data-cache-path data/cache
  --split 949,50,1
  --tokenizer-type HuggingFaceTokenizer
  --tokenizer-model data/gpt2
  --dataloader-type single
  --no-mmap-bin-files
  --num-workers 2
  --eod-mask-loss
)

LOGGING_ARGS=(
  --log-interval 10
  --log-throughput
  --log-timers-to-tensorboard
  --log-validation-ppl-to-tensorboard
  --log-memory-to-tensorboard
  --timing-log-level 0
  --tensorboard-dir runs/gpt3/tensorboard
  --tensorboard-queue-size 1
  --eval-interval 1000
  --eval-iters 10
  --save runs/gpt3
  --load runs/gpt3
  --save-interval 1000
  --ckpt-format torch_dist
  --async-save
  --no-load-rng
)

torchrun "${DISTRIBUTED_ARGS[@]}" pretrain_gpt.py \
  "${MODEL_ARGS[@]}" "${TRAINING_ARGS[@]}" "${PARALLEL_ARGS[@]}" "${DATA_ARGS[@]}" "${LOGGING_ARGS[@]}"
