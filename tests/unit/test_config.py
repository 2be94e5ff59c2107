"""Every sentence of ``TrainConfig.validate``: what is refused, and that the message names flags and values."""

from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path

import pytest

from megatron_hc import cli
from megatron_hc.config import ModelConfig, TrainConfig, leaf_fields

TOOL = Path(__file__).parents[2] / "tools" / "write_configuration.py"
GOOD = (
    "--num-layers 4 --hidden-size 64 --num-attention-heads 4 --seq-length 32 --lr 1e-3 --micro-batch-size 2 "
    "--train-iters 10 --mock-data --tokenizer-type ByteTokenizer"
)


def config_of(extra: str, without: str = "") -> TrainConfig:
    base = GOOD
    for part in filter(None, without.split("|")):
        assert part in base
        base = base.replace(part, "")
    return cli.parse(f"{base} {extra}".split()).config


def test_the_good_configuration_is_good() -> None:
    config_of("").validate()


REFUSED = [
    # model and residual
    ("--residual-streams 0", "", "--residual-streams must be positive, not 0"),
    (
        "--residual-connection frac --residual-streams 5",
        "",
        "--residual-streams (5) must divide --hidden-size (64) with --residual-connection frac",
    ),
    *(
        (
            f"--residual-connection {method} --residual-streams 9 --fused-residual-backend cpp --hidden-size 72",
            "--hidden-size 64",
            "--fused-residual-backend cpp takes 1 to 8 streams, not --residual-streams 9: use torch or auto",
        )
        for method in ("hyper", "frac", "mhc")
    ),
    (
        "--residual-connection hyper --fused-residual-backend torch --fp64",
        "",
        "--fused-residual-backend torch would do nothing with --fp64, which takes the plain form: use auto",
    ),
    (
        "--residual-connection hyper --fused-residual-backend cpp --compile",
        "",
        "--fused-residual-backend cpp and --compile exclude each other",
    ),
    ("--num-layers 0", "", "--num-layers (0) must be given and positive"),
    ("--hidden-size -1", "", "--hidden-size (-1) must be given and positive"),
    ("--num-attention-heads 0", "", "--num-attention-heads (0) must be given and positive"),
    ("--seq-length 0", "", "--seq-length (0) must be given and positive"),
    ("--ffn-hidden-size 0", "", "--ffn-hidden-size must be positive, not 0"),
    ("--kv-channels 0", "", "--kv-channels must be positive, not 0"),
    ("--make-vocab-size-divisible-by 0", "", "--make-vocab-size-divisible-by must be positive, not 0"),
    ("--num-attention-heads 5", "", "--num-attention-heads (5) must divide --hidden-size (64), or give --kv-channels"),
    (
        "--hidden-size 16 --swiglu",
        "",
        "--hidden-size (16) is too small for --swiglu: set --ffn-hidden-size",
    ),
    ("--num-query-groups 2", "", "--num-query-groups (2) needs --group-query-attention"),
    (
        "--group-query-attention --num-query-groups 3",
        "",
        "--num-query-groups (3) must divide --num-attention-heads (4)",
    ),
    ("--max-position-embeddings 16", "", "--max-position-embeddings (16) must be at least --seq-length (32)"),
    ("--swiglu --squared-relu", "", "--swiglu and --squared-relu exclude each other"),
    ("--attention-dropout 1", "", "--attention-dropout must be in [0, 1), not 1.0"),
    ("--hidden-dropout -0.1", "", "--hidden-dropout must be in [0, 1), not -0.1"),
    ("--position-embedding-type rope --rotary-percent 0", "", "--rotary-percent (0.0) of a head of 16 channels must"),
    ("--position-embedding-type rope --rotary-percent 0.2", "", "positive number of channels, not 3"),
    ("--position-embedding-type rope --kv-channels 15", "", "must be an even, positive number of channels, not 15"),
    ("--rotary-base 0", "", "--rotary-base must be positive, not 0.0"),
    ("--rope-scaling-factor 0", "", "--rope-scaling-factor must be positive, not 0.0"),
    ("--init-method-std 0", "", "--init-method-std must be positive, not 0.0"),
    ("--norm-epsilon -1", "", "--norm-epsilon must not be negative, not -1.0"),
    (
        "--normalization RMSNorm --disable-bias-layernorm",
        "",
        "--disable-bias-layernorm needs --normalization LayerNorm, not RMSNorm, which has no bias",
    ),
    # parallel
    ("--tensor-model-parallel-size 4", "", "--tensor-model-parallel-size (4) must divide the number of processes (2)"),
    (
        "--tensor-model-parallel-size 3 --hidden-size 96",
        "",
        "--tensor-model-parallel-size (3) must divide --num-attention-heads (4)",
    ),
    (
        "--tensor-model-parallel-size 2 --ffn-hidden-size 33",
        "",
        "--tensor-model-parallel-size (2) must divide --ffn-hidden-size (33)",
    ),
    ("--sequence-parallel", "", "--sequence-parallel needs --tensor-model-parallel-size above 1"),
    (
        "--residual-recompute-interval 2",
        "",
        "--residual-recompute-interval (2) needs --recompute-granularity selective or full",
    ),
    (
        "--recompute-modules attn",
        "",
        "--recompute-modules (attn) must be any of core_attn, mlp, moe, layernorm, residual",
    ),
    (
        "--recompute-modules mlp residual",
        "",
        "--recompute-modules (mlp residual) needs --recompute-granularity selective, or full for residual",
    ),
    (
        "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1 --recompute-modules residual "
        "layernorm mlp",
        "",
        "--recompute-modules (layernorm mlp) needs --recompute-granularity selective: full recomputes whole layers",
    ),
    ("--moe-token-dispatcher-type alltoall", "", "--moe-token-dispatcher-type (alltoall) needs --num-experts"),
    (
        "--num-experts 4 --moe-router-load-balancing-type sinkhorn --moe-router-topk-scaling-factor 2.5",
        "",
        "--moe-router-load-balancing-type sinkhorn has weights of its own: leave out",
    ),
    (
        "--num-experts 4 --moe-router-load-balancing-type sinkhorn --moe-router-score-function sigmoid",
        "",
        "leave out --moe-router-score-function (sigmoid)",
    ),
    ("--rotary-base 500000", "", "--rotary-base (500000.0) needs --position-embedding-type rope, not learned_absolute"),
    ("--rotary-percent 0.5", "", "--rotary-percent (0.5) needs --position-embedding-type rope"),
    ("--use-rope-scaling", "", "--use-rope-scaling (True) needs --position-embedding-type rope"),
    (
        "--position-embedding-type rope --rope-scaling-factor 4",
        "",
        "--rope-scaling-factor (4.0) needs --use-rope-scaling",
    ),
    (
        "--recompute-granularity full",
        "",
        "--recompute-granularity full needs --recompute-method and --recompute-num-layers",
    ),
    (
        "--recompute-granularity full --recompute-method block --recompute-num-layers 5",
        "",
        "--recompute-num-layers (5) must be in 1 .. --num-layers (4)",
    ),
    (
        "--recompute-method block",
        "",
        "--recompute-method and --recompute-num-layers need --recompute-granularity full",
    ),
    # data
    ("", "--mock-data", "no data: give --data-path PREFIX, --train-data-path PREFIX or --mock-data"),
    ("--data-path a", "", "--data-path and --mock-data exclude each other: give one"),
    ("--valid-data-path a", "--mock-data", "--valid-data-path/--test-data-path need --train-data-path"),
    ("--train-data-path a --split 1,0,0", "--mock-data", "--split belongs to --data-path: separate paths are not"),
    ("--num-workers -1", "", "--num-workers must not be negative, not -1"),
    ("--mid-level-dataset-surplus -1", "", "--mid-level-dataset-surplus must not be negative, not -1.0"),
    ("", "--tokenizer-type ByteTokenizer", "--tokenizer-type must be given"),
    ("--tokenizer-type NullTokenizer", "", "--tokenizer-type NullTokenizer needs --vocab-size"),
    ("--tokenizer-type SentencePieceTokenizer", "", "--tokenizer-type SentencePieceTokenizer needs --tokenizer-model"),
    ("--tokenizer-type NullTokenizer --vocab-size 0", "", "--vocab-size must be positive, not 0"),
    # training
    ("--micro-batch-size 0", "", "--micro-batch-size (0) must be given and positive"),
    ("--train-iters 0", "", "--train-iters must be positive, not 0"),
    ("--exit-interval 0", "", "--exit-interval must be positive, not 0"),
    ("--exit-duration-in-mins 0", "", "--exit-duration-in-mins must be positive, not 0.0"),
    ("", "--train-iters 10", "give the length of the run as one of --train-iters and --train-samples"),
    ("--train-samples 5", "", "give the length of the run as one of --train-iters and --train-samples"),
    ("--eval-interval -1", "", "--eval-interval must not be negative, not -1"),
    ("--eval-iters -1", "", "--eval-iters must not be negative, not -1"),
    ("--seed -1", "", "--seed must be in 0 .. 4294967295, not -1"),
    ("--bf16 --fp64", "", "--bf16 and --fp64 exclude each other"),
    (
        "--global-batch-size 6",
        "",
        "--global-batch-size (6) must be divisible by --micro-batch-size (2) times the data-parallel size (2)",
    ),
    ("--rampup-batch-size 2 2", "", "--rampup-batch-size takes START INCREMENT SAMPLES, not 2 numbers"),
    ("--rampup-batch-size 4 4 9 --global-batch-size 8", "", "--rampup-batch-size needs --train-samples"),
    (
        "--rampup-batch-size 4 4 99 --global-batch-size 8 --train-samples 98",
        "--train-iters 10",
        "SAMPLES (99) of --rampup-batch-size must be at most --train-samples (98)",
    ),
    (
        "--rampup-batch-size 4 8 9 --global-batch-size 8 --train-samples 98",
        "--train-iters 10",
        "--rampup-batch-size (4 8 9) must grow from START to --global-batch-size (8) in whole steps of INCREMENT",
    ),
    (
        "--rampup-batch-size 4 2 9 --global-batch-size 8 --train-samples 98",
        "--train-iters 10",
        "START (4) and INCREMENT (2) of --rampup-batch-size must be divisible by --micro-batch-size times the data-",
    ),
    # optimizer
    ("--lr 0", "", "--lr (0.0) must be given and positive"),
    ("--min-lr 1", "", "--min-lr (1.0) must be between 0 and --lr (0.001)"),
    ("--lr-warmup-init 1", "", "--lr-warmup-init (1.0) must be between 0 and --lr (0.001)"),
    ("--lr-warmup-init 1e-4", "", "--lr-warmup-init (0.0001) needs a warm-up: give --lr-warmup-iters or --lr-warmup-"),
    (
        "--lr-wsd-decay-style linear",
        "",
        "--lr-wsd-decay-style linear needs --lr-decay-style WSD, not linear: leave it out",
    ),
    ("--exit-signal SIGINT", "", "--exit-signal (SIGINT) needs --exit-signal-handler"),
    (
        "--tiktoken-num-special-tokens 2000",
        "",
        "--tiktoken-num-special-tokens (2000) needs --tokenizer-type TikTokenizer, not ",
    ),
    ("--tokenizer-model spm.model", "", "--tokenizer-model (spm.model) is not read with --tokenizer-type "),
    ("--lr-decay-iters 0", "", "--lr-decay-iters must be positive, not 0"),
    ("--lr-warmup-iters -1", "", "--lr-warmup-iters must not be negative, not -1"),
    ("--weight-decay -1", "", "--weight-decay must not be negative, not -1.0"),
    ("--clip-grad -1", "", "--clip-grad must not be negative, not -1.0"),
    ("--adam-eps -1", "", "--adam-eps must not be negative, not -1.0"),
    ("--adam-beta1 1", "", "--adam-beta1 must be in [0, 1), not 1.0"),
    ("--adam-beta2 -1", "", "--adam-beta2 must be in [0, 1), not -1.0"),
    (
        "--lr-warmup-samples 4",
        "",
        "--lr-warmup-samples does not go with --train-iters: use --lr-warmup-iters",
    ),
    (
        "--lr-decay-iters 4 --train-samples 40",
        "--train-iters 10",
        "--lr-decay-iters does not go with --train-samples: use --lr-decay-samples",
    ),
    ("--lr-warmup-fraction 1", "", "--lr-warmup-fraction must be in [0, 1), not 1.0"),
    (
        "--lr-warmup-fraction 0.1 --lr-warmup-iters 2",
        "",
        "--lr-warmup-fraction and --lr-warmup-iters exclude each other",
    ),
    ("--lr-warmup-iters 10", "", "--lr-warmup-iters (10) must be less than --train-iters (10)"),
    ("--lr-warmup-iters 5 --lr-decay-iters 5", "", "--lr-warmup-iters (5) must be less than --lr-decay-iters (5)"),
    ("--lr-decay-style WSD", "", "--lr-decay-style WSD needs --lr-wsd-decay-iters"),
    (
        "--lr-decay-style WSD --lr-wsd-decay-iters 11",
        "",
        "--lr-wsd-decay-iters (11) must be at most --train-iters (10)",
    ),
    ("--lr-wsd-decay-iters 5", "", "--lr-wsd-decay-iters needs --lr-decay-style WSD, not linear"),
    ("--lr-decay-style WSD --lr-wsd-decay-iters -1", "", "--lr-wsd-decay-iters must not be negative, not -1"),
    ("--start-weight-decay 0.1", "", "--start-weight-decay (0.1) and --end-weight-decay (None) need --weight-decay-in"),
    (
        "--weight-decay-incr-style cosine --start-weight-decay 0.2 --end-weight-decay 0.1",
        "",
        "--weight-decay-incr-style cosine needs --start-weight-decay (0.2) and a --end-weight-decay (0.1) that is not",
    ),
    ("--weight-decay-incr-style linear", "", "--weight-decay-incr-style linear needs --start-weight-decay (None)"),
    # checkpoint
    ("--save-interval 0 --save x", "", "--save-interval must be positive, not 0"),
    ("--save-interval 5", "", "--save-interval needs --save"),
    ("--save x --save-retain-interval 5", "", "--save-retain-interval needs --save-interval"),
    (
        "--save x --save-interval 4 --save-retain-interval 6",
        "",
        "--save-retain-interval (6) must be a multiple of --save-interval (4)",
    ),
    ("--ckpt-step -3", "", "--ckpt-step must not be negative, not -3"),
    ("--ckpt-step 3", "", "--ckpt-step needs --load"),
    ("--finetune", "", "--finetune needs --load"),
    ("--use-checkpoint-args", "", "--use-checkpoint-args needs --load"),
    ("--exit-on-missing-checkpoint", "", "--exit-on-missing-checkpoint needs --load"),
    ("--train-samples 3 --global-batch-size 4", "--train-iters 10", "--train-samples (3) is less than the first"),
    (
        "--rampup-batch-size 8 4 7 --global-batch-size 12 --train-samples 7",
        "--train-iters 10",
        "--train-samples (7) is less than the first global batch (8)",
    ),
    # logging
    ("--log-interval 0", "", "--log-interval must be positive, not 0"),
    ("--peak-tflops 0", "", "--peak-tflops must be positive, not 0.0"),
    ("--profile --use-pytorch-profiler --profile-ranks 0 2", "", "--profile-ranks (2) must be below the number of"),
    ("--profile-step-start 3", "", "--profile-step-start needs --profile"),
    ("--wandb-exp-name x", "", "--wandb-exp-name needs --wandb-project"),
    ("--wandb-save-dir x", "", "--wandb-save-dir needs --wandb-project"),
    # numbers that must be positive
    *(
        (f"{others} {name} 0", "", f"{name} must be positive, not 0")
        for others, names in (
            ("", "--tensor-model-parallel-size --pipeline-model-parallel-size --distributed-timeout-minutes"),
            ("", "--num-distributed-optimizer-instances --global-batch-size --log-residual-stats"),
            ("--group-query-attention", "--num-query-groups"),
            ("--residual-connection virtual-width", "--virtual-width-fractions"),
            ("--residual-connection denseformer", "--denseformer-dilation"),
            ("--residual-connection laurel", "--laurel-rank"),
            ("--residual-connection mhc", "--mhc-init-gating-factor"),
            ("--residual-scale completep", "--base-num-layers"),
            ("--eval-harness-tasks x", "--eval-harness-interval --eval-harness-batch-size"),
            ("--check-for-spiky-loss", "--spiky-loss-factor"),
            ("--save x --save-interval 2", "--save-retain-interval"),
            ("--profile --profile-step-start 0", "--profile-step-end"),
            ("", "--num-experts"),
            ("--num-experts 4", "--expert-model-parallel-size --expert-tensor-parallel-size --moe-layer-freq"),
            ("--num-experts 4", "--moe-ffn-hidden-size --moe-router-topk --moe-router-topk-scaling-factor"),
            ("--num-experts 4", "--moe-expert-capacity-factor --moe-shared-expert-intermediate-size"),
            ("--num-experts 4 --moe-router-group-topk 1", "--moe-router-num-groups"),
            ("--num-experts 4 --moe-router-num-groups 2", "--moe-router-group-topk"),
        )
        for name in names.split()
    ),
    ("--train-samples 0", "--train-iters 10", "--train-samples must be positive, not 0"),
    ("--train-samples 8 --lr-decay-samples 0", "--train-iters 10", "--lr-decay-samples must be positive, not 0"),
    # what does not go together
    *((f"--openai-gelu {other}", "", "--openai-gelu is about GELU") for other in ("--swiglu", "--squared-relu")),
    ("--rmsnorm-bias", "", "--rmsnorm-bias needs --normalization RMSNorm, not LayerNorm"),
    (
        "--normalization RMSNorm --rmsnorm-bias --residual-connection muddformer",
        "",
        "--residual-connection muddformer norms its reads itself, without the bias of --rmsnorm-bias: leave it out",
    ),
    ("--num-experts 4 --norm-placement normformer", "", "--norm-placement normformer and --num-experts exclude each"),
    (
        "--attention-backend flash --attention-softmax-in-fp32",
        "",
        "--attention-backend flash and --attention-softmax-in-fp32 exclude each other",
    ),
    ("--qk-layernorm-across-heads", "", "--qk-layernorm-across-heads needs --qk-layernorm"),
    (
        "--residual-connection gated --hidden-size 4 --kv-channels 2",
        "--hidden-size 64",
        "--hidden-size (4) is too small for gates of rank d / 8: set --gated-residual-rank",
    ),
    (
        "--no-fused-residual --fused-residual-backend torch",
        "",
        "--fused-residual-backend torch and --no-fused-residual exclude each other",
    ),
    (
        "--tensor-model-parallel-size 2 --num-attention-heads 6 --hidden-size 96 --group-query-attention "
        "--num-query-groups 3",
        "",
        "--tensor-model-parallel-size (2) must divide --num-query-groups (3) or be a multiple of it",
    ),
    (
        "--tensor-model-parallel-size 2 --group-query-attention --qk-layernorm --qk-layernorm-across-heads",
        "",
        "--tensor-model-parallel-size (2) must divide --num-query-groups (1) with --qk-layernorm-across-heads",
    ),
    (
        "--tensor-model-parallel-size 2 --sequence-parallel --seq-length 33",
        "",
        "--tensor-model-parallel-size (2) must divide --seq-length (33) with --sequence-parallel",
    ),
    ("--tiktoken-pattern v2", "", "--tiktoken-pattern needs --tokenizer-type TikTokenizer, not ByteTokenizer"),
    (
        "--tokenizer-type TikTokenizer --tokenizer-model x --tiktoken-num-special-tokens 6",
        "",
        "--tiktoken-num-special-tokens (6) must be at least 7",
    ),
    ("--eval-harness-tasks x --eval-harness-num-fewshot -1", "", "--eval-harness-num-fewshot must not be negative"),
    ("--exit-signal-handler", "", "--exit-signal-handler needs --save"),
    ("--spiky-loss-factor 3", "", "--spiky-loss-factor needs --check-for-spiky-loss"),
    ("--iterations-to-skip 3 0", "", "--iterations-to-skip (3 0) counts iterations from 1"),
    ("--async-save", "", "--async-save needs --save"),
    (
        "--profile --profile-step-start 3 --profile-step-end 3",
        "",
        "--profile-step-start (3) must be less than --profile-step-end (3), and not negative",
    ),
    ("--profile --profile-step-start -1", "", "--profile-step-start (-1) must be less than --profile-step-end (12)"),
    ("--profile --profile-dir x", "", "--profile-dir needs --use-pytorch-profiler"),
    # experts
    *((f"--num-experts 4 --moe-input-jitter-eps {eps}", "", "must be between 0 and 1, not") for eps in (0, 1)),
    *(
        (
            f"--num-experts 4 --moe-router-pre-softmax {other}",
            "",
            "--moe-router-pre-softmax needs --moe-router-score-function softmax and no sinkhorn balancing",
        )
        for other in ("--moe-router-score-function sigmoid", "--moe-router-load-balancing-type sinkhorn")
    ),
    (
        "--num-experts 4 --moe-router-bias-update-rate 0.1",
        "",
        "--moe-router-bias-update-rate (0.1) needs --moe-router-enable-expert-bias",
    ),
    *(
        (f"--num-experts 4 --moe-router-num-groups 2 --moe-router-group-topk {topk} --moe-router-topk 3", "", message)
        for topk, message in (
            (3, "--moe-router-group-topk (3) must be at most --moe-router-num-groups (2) and divide"),
            (2, "--moe-router-group-topk (2) must be at most --moe-router-num-groups (2) and divide"),
            (1, "--moe-router-topk (3) from --moe-router-group-topk (1) groups is more than their 2 experts each"),
        )
    ),
    (
        "--num-experts 4 --moe-router-load-balancing-type sinkhorn --moe-router-num-groups 2 --moe-router-group-topk 1",
        "",
        "--moe-router-num-groups does not go with sinkhorn balancing",
    ),
    *(
        (
            f"--num-experts 4 --moe-router-load-balancing-type {kinds} --moe-aux-loss-coeff 0 0.1",
            "",
            f"--moe-router-load-balancing-type ({kinds}) must be several different losses, or one word",
        )
        for kinds in ("aux_loss aux_loss", "none aux_loss", "sinkhorn aux_loss")
    ),
    *(
        (f"--num-experts 4 {option} -1", "", "coefficients and rates of the router must not be negative, not -1.0")
        for option in (
            "--moe-aux-loss-coeff",
            "--moe-z-loss-coeff",
            "--moe-router-score-function sigmoid --moe-router-enable-expert-bias --moe-router-bias-update-rate",
        )
    ),
    *(
        (f"--num-experts 4 {option}", "", "need --moe-expert-capacity-factor")
        for option in ("--moe-pad-expert-input-to-capacity", "--moe-token-drop-policy position")
    ),
    (
        "--num-experts 4 --moe-shared-expert-gate",
        "",
        "--moe-shared-expert-gate needs --moe-shared-expert-intermediate-size",
    ),
    ("--num-experts 4 --moe-router-topk 1", "", "--moe-router-topk 1 with a softmax over that one expert is always 1"),
    # back ends
    *(
        (
            f"{option} --pipeline-model-parallel-size 2 --pipeline-schedule zbv --bf16 --device cuda",
            "",
            f"{option.split(' --fp8-recipe')[0].removeprefix('--fp8-format e4m3 ')} and --pipeline-schedule zbv "
            "exclude each other",
        )
        for option in (
            "--transformer-impl transformer_engine",
            "--gradient-accumulation-fusion",
            "--fp8-format e4m3 --fp8-backend torchao --fp8-recipe tensorwise",
        )
    ),
    (
        "--transformer-impl transformer_engine --device cuda --context-parallel-size 2",
        "",
        "--transformer-impl transformer_engine and --context-parallel-size (2) exclude each other",
    ),
    (
        "--gradient-accumulation-fusion --bf16 --device cuda --data-parallel-sharding-strategy optim_grads_params",
        "",
        "--gradient-accumulation-fusion and --data-parallel-sharding-strategy optim_grads_params exclude each other",
    ),
    *(
        (f"--norm-impl apex --device cuda {flags}", "", message)
        for flags, message in (
            ("--normalization RMSNorm --rmsnorm-bias", "--norm-impl apex has no --rmsnorm-bias"),
            ("--disable-bias-layernorm", "--norm-impl apex has no --disable-bias-layernorm"),
            (
                "--norm-placement normformer --tensor-model-parallel-size 2",
                "--norm-impl apex cannot share a norm among --tensor-model-parallel-size (2) processes, as "
                "--norm-placement normformer would",
            ),
            (
                "--qk-layernorm --qk-layernorm-across-heads --tensor-model-parallel-size 2",
                "processes, as --qk-layernorm-across-heads would",
            ),
        )
    ),
]


@pytest.mark.parametrize("extra, without, message", REFUSED, ids=[extra or without for extra, without, _ in REFUSED])
def test_refused_in_one_sentence(extra: str, without: str, message: str) -> None:
    config = config_of(extra, without)
    with pytest.raises(ValueError) as caught:
        config.validate(world_size=2)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value) and not str(caught.value).endswith(".")


@pytest.mark.parametrize(
    "extra, without",
    [
        ("--residual-connection frac --residual-streams 8", ""),
        ("--residual-connection hyper --residual-streams 1 --static-residual --residual-readout sum", ""),
        ("--hidden-size 65 --kv-channels 16", ""),
        ("--group-query-attention --num-query-groups 2", ""),
        ("--position-embedding-type rope --rotary-percent 0.5 --max-position-embeddings 64", ""),
        ("--recompute-granularity full --recompute-method uniform --recompute-num-layers 4", ""),
        ("--recompute-granularity selective --recompute-modules mlp residual", ""),
        ("--recompute-granularity selective --recompute-modules residual --compile --fused-residual-backend cpp", ""),
        ("--train-data-path a --valid-data-path b", "--mock-data"),
        ("--global-batch-size 12", ""),
        ("--rampup-batch-size 4 4 40 --global-batch-size 12 --train-samples 98", "--train-iters 10"),
        ("--lr-decay-style WSD --lr-wsd-decay-iters 10 --lr-warmup-iters 9 --lr-decay-iters 20", ""),
        ("--lr-decay-style WSD --lr-wsd-decay-iters 0", ""),
        ("--weight-decay-incr-style linear --start-weight-decay 0 --end-weight-decay 0.1", ""),
        ("--save x --save-interval 4 --save-retain-interval 8 --load x --ckpt-step 0", ""),
        ("--eval-iters 0 --eval-interval 0 --clip-grad 0", ""),
        # at the bounds
        ("--train-samples 4", "--train-iters 10"),
        ("--seed 4294967295 --norm-epsilon 0 --attention-dropout 0 --hidden-dropout 0.99", ""),
        ("--min-lr 1e-3 --weight-decay 0 --adam-beta1 0 --lr-warmup-init 1e-3 --lr-warmup-iters 9", ""),
        ("--profile --profile-step-start 0 --profile-step-end 1 --profile-ranks 0 1", ""),
        ("--eval-harness-tasks x --eval-harness-num-fewshot 0", ""),
        ("--tokenizer-type TikTokenizer --tokenizer-model x --tiktoken-num-special-tokens 7", ""),
        ("--recompute-granularity selective --recompute-modules residual --residual-recompute-interval 8", ""),
        ("--recompute-granularity selective --recompute-modules residual --residual-recompute-interval 1", ""),
        ("--value-residual sparse --value-residual-layers 3", ""),
        ("--residual-connection laurel --laurel-rank 64", ""),
        ("--residual-connection laurel --laurel-form pa --laurel-previous 1", ""),
        ("--residual-connection mhc --residual-streams 2 --mhc-init-gating-factor 2", ""),
        ("--residual-connection mhc-lite --residual-streams 5", ""),
        ("--residual-connection virtual-width --residual-streams 2", ""),
        ("--residual-connection gated --hidden-size 8 --kv-channels 2", ""),
        ("--residual-connection denseformer --denseformer-period 4", ""),
        ("--residual-connection hyper --residual-streams 8 --fused-residual-backend cpp", ""),
        ("--residual-connection plain --residual-streams 4 --fused-residual-backend cpp", ""),
        ("--num-experts 4 --moe-router-topk 4 --moe-router-load-balancing-type none", ""),
        ("--num-experts 4 --moe-router-topk 4 --moe-router-num-groups 2 --moe-router-group-topk 2", ""),
        ("--num-experts 4 --moe-router-topk 1 --moe-router-score-function sigmoid", ""),
        ("--num-experts 4 --moe-router-topk 1 --moe-router-load-balancing-type sinkhorn", ""),
        ("--norm-impl apex --device cuda --norm-placement normformer", ""),
        ("--bf16 --device cuda --num-experts 2 --transformer-impl transformer_engine", ""),
    ],
)
def test_accepted(extra: str, without: str) -> None:
    config_of(extra, without).validate(world_size=2)


def test_derived_sizes() -> None:
    model = ModelConfig(num_layers=1, hidden_size=192, num_attention_heads=6, seq_length=8)
    assert (model.head_size, model.num_kv_heads, model.ffn_size, model.max_positions) == (32, 6, 768, 8)
    swiglu = dataclasses.replace(model, swiglu=True, group_query_attention=True, num_query_groups=2, kv_channels=48)
    assert (swiglu.head_size, swiglu.num_kv_heads, swiglu.ffn_size) == (48, 2, 512)
    assert dataclasses.replace(swiglu, ffn_hidden_size=7).ffn_size == 7


def test_no_two_groups_share_a_name() -> None:
    names = [path[-1] for path, _ in leaf_fields(TrainConfig)]
    assert len(names) == len(set(names))


def test_the_page_of_all_flags_is_up_to_date() -> None:
    spec = importlib.util.spec_from_file_location("write_configuration", TOOL)
    assert spec is not None and spec.loader is not None
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    assert tool.OUTPUT.read_text(encoding="utf-8") == tool.page(), "run python tools/write_configuration.py"
