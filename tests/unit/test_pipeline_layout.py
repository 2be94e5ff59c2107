"""Which layers a stage holds, and what is refused before any process talks to another."""

from __future__ import annotations

import re

import pytest

from megatron_hc.config import (
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    TrainConfig,
    TrainingConfig,
)
from megatron_hc.pipeline_layout import PipelineLayout, even_split, parse_layout


def layout_of(num_layers: int, size: int, **options: object) -> PipelineLayout:
    config = ParallelConfig(pipeline_model_parallel_size=size, **options)  # type: ignore[arg-type]
    config.validate(model_of(num_layers))
    return config.pipeline_layout(num_layers)


def model_of(num_layers: int) -> ModelConfig:
    return ModelConfig(num_layers=num_layers, hidden_size=16, num_attention_heads=4, seq_length=8)


def sizes_of(layout: PipelineLayout) -> list[int]:
    return [end - first for first, end in layout.bounds]


@pytest.mark.parametrize(
    ("num_layers", "size", "options", "sizes"),
    [
        (30, 4, {}, [8, 8, 7, 7]),
        (5, 2, {}, [3, 2]),
        (30, 4, {"account_for_embedding_in_pipeline_split": True}, [7, 8, 8, 7]),
        (30, 4, {"account_for_loss_in_pipeline_split": True}, [8, 8, 8, 6]),
        (
            30,
            4,
            {"account_for_embedding_in_pipeline_split": True, "account_for_loss_in_pipeline_split": True},
            [7, 8, 8, 7],
        ),
        (30, 4, {"decoder_first_pipeline_num_layers": 6}, [6, 8, 8, 8]),
        (30, 4, {"decoder_first_pipeline_num_layers": 6, "decoder_last_pipeline_num_layers": 4}, [6, 10, 10, 4]),
        (16, 2, {"num_layers_per_virtual_pipeline_stage": 2}, [2] * 8),
        (10, 2, {"num_virtual_stages_per_pipeline_rank": 2}, [3, 3, 2, 2]),
        (12, 2, {"decoder_first_pipeline_num_layers": 4, "num_virtual_stages_per_pipeline_rank": 2}, [2, 4, 2, 4]),
        (12, 2, {"decoder_first_pipeline_num_layers": 4, "pipeline_schedule": "zbv"}, [2, 4, 4, 2]),
        (8, 4, {"pipeline_model_parallel_layout": "Et*3|(tt|)*2,tL"}, [3, 2, 2, 1]),
        (7, 2, {"pipeline_model_parallel_layout": "E|t*4|tt|tL"}, [0, 4, 2, 1]),
    ],
)
def test_splits(num_layers: int, size: int, options: dict, sizes: list[int]) -> None:
    layout = layout_of(num_layers, size, **options)
    assert sizes_of(layout) == sizes
    held = sorted(layer for rank in range(size) for layer in layout.layers_of(rank))
    assert held == list(range(num_layers)), "every layer is somewhere, once"


def test_places() -> None:
    loop = layout_of(8, 2, num_virtual_stages_per_pipeline_rank=2)
    assert (loop.schedule, [loop.rank_of(stage) for stage in range(4)]) == ("interleaved", [0, 1, 0, 1])
    turn = layout_of(8, 2, pipeline_schedule="dualpipev")
    assert [turn.rank_of(stage) for stage in range(4)] == [0, 1, 1, 0]
    assert turn.layers_of(0) == [0, 1, 6, 7]
    assert loop.is_tied_apart and not turn.is_tied_apart and not PipelineLayout().is_tied_apart
    assert layout_of(4, 2).schedule == "1f1b"
    written = layout_of(4, 2, pipeline_model_parallel_layout="Et|t|t|tL")
    assert written.schedule == "interleaved"


def test_the_layout_is_printed() -> None:
    assert layout_of(5, 2).describe().splitlines() == [
        "pipeline of 2 processes, 2 stages, schedule 1f1b:",
        "  process 0: stage 0: embedding, 3 layers (0..2)",
        "  process 1: stage 1: 2 layers (3..4), output and loss",
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("Et*3|tL", "has 4 layers, but --num-layers is 5"),
        ("t*5L", "must be E, then t and |, then L"),
        ("Et*5", "must be E, then t and |, then L"),
        ("Et*5LL", "it reads 'EtttttLL'"),
        ("Ettttx|tL", "must be E"),
        ("Et*4|tmL", "multi-token prediction layer (m)"),
        ("Et(|tt*2L", "it reads 'Et(|tttL'"),  # of what is it twice?
        ("Ett|)*2L", "must be E"),
        ("Et*99999999999L", "repeats t 99999999999 times"),
    ],
)
def test_bad_layouts(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        parse_layout(text, 5)


@pytest.mark.parametrize(
    ("num_layers", "size", "options", "message"),
    [
        (3, 4, {}, "--num-layers (3) is too small for 4 pipeline stages"),
        (4, 1, {"pipeline_schedule": "gpipe"}, "--pipeline-schedule needs --pipeline-model-parallel-size above 1"),
        (6, 2, {"num_layers_per_virtual_pipeline_stage": 2}, "--num-layers (6) must be a multiple of"),
        (
            4,
            2,
            {"pipeline_model_parallel_layout": "Et|tt|tL"},
            "3 stages, which --pipeline-model-parallel-size (2)",
        ),
        (
            4,
            4,
            {"pipeline_model_parallel_layout": "Ett||t|tL"},
            "--pipeline-model-parallel-layout (Ett||t|tL) leaves process 1 of the pipeline without a layer",
        ),
        (
            8,
            2,
            {"num_virtual_stages_per_pipeline_rank": 3, "pipeline_schedule": "zbv"},
            "zbv has 2 stages per process, not 3",
        ),
        (
            8,
            2,
            {"num_virtual_stages_per_pipeline_rank": 2, "pipeline_schedule": "1f1b"},
            "1f1b has one stage per process, not 2",
        ),
        (
            8,
            2,
            {"num_virtual_stages_per_pipeline_rank": 2, "num_layers_per_virtual_pipeline_stage": 2},
            "exclude each other: give one",
        ),
        (
            8,
            2,
            {"pipeline_model_parallel_layout": "Et*4|t*4L", "account_for_loss_in_pipeline_split": True},
            "leave out --account-for-loss-in-pipeline-split",
        ),
        (
            8,
            2,
            {"decoder_first_pipeline_num_layers": 2, "account_for_loss_in_pipeline_split": True},
            "exclude each other",
        ),
        (8, 2, {"decoder_first_pipeline_num_layers": 8}, "leave 0 of --num-layers (8) for the other 1"),
        (
            9,
            2,
            {"decoder_first_pipeline_num_layers": 4, "num_virtual_stages_per_pipeline_rank": 2},
            "a process would have 5 layers, which its 2 virtual stages cannot share evenly",
        ),
        (8, 2, {"data_parallel_sharding_strategy": "optim_grads_params", "pipeline_schedule": "zbv"}, "optim"),
    ],
)
def test_refused_splits(num_layers: int, size: int, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        layout_of(num_layers, size, **options)


def test_an_empty_model_is_not_split() -> None:
    with pytest.raises(ValueError, match="too small"):
        even_split(1, 2)


def run_of(schedule: str, micro_batches: int, rampup: tuple[int, ...] = (), **options: object) -> TrainConfig:
    samples = {"train_samples": 100} if rampup else {"train_iters": 1}
    parallel = ParallelConfig(pipeline_model_parallel_size=2, pipeline_schedule=schedule, **options)  # type: ignore[arg-type]
    training = TrainingConfig(
        micro_batch_size=2, global_batch_size=2 * micro_batches, rampup_batch_size=rampup, **samples
    )
    return TrainConfig(
        model=model_of(8),
        parallel=parallel,
        data=DataConfig(mock_data=True, tokenizer_type="NullTokenizer", vocab_size=20),
        optimizer=OptimizerConfig(lr=1e-3),
        training=training,
    )


def test_too_few_micro_batches() -> None:
    run_of("dualpipev", 4).validate(2)
    with pytest.raises(ValueError, match="dualpipev needs at least 4 micro-batches per step .* not 3"):
        run_of("dualpipev", 3).validate(2)
    run_of("1f1b", 1).validate(2)
    run_of("interleaved", 4, num_virtual_stages_per_pipeline_rank=2).validate(2)
    with pytest.raises(ValueError, match=r"that 2 divides, not 5: change --global-batch-size"):
        run_of("interleaved", 5, num_virtual_stages_per_pipeline_rank=2).validate(2)
    with pytest.raises(ValueError, match="at least 4 micro-batches per step .* not 2"):
        run_of("dualpipev", 6, rampup=(4, 4, 20)).validate(2)


def test_the_number_of_processes() -> None:
    with pytest.raises(ValueError, match=r"^--pipeline-model-parallel-size \(2\) must divide the number of processes"):
        run_of("1f1b", 4).validate(3)
