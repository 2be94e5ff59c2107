"""--deepspeed and its file: what contradicts the flags is refused with both values; flat runs as boxes. No process."""

from __future__ import annotations

import json
from importlib import metadata
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_hc import cli
from megatron_hc.config import TrainConfig
from megatron_hc.estimate.estimate import estimate
from megatron_hc.estimate.hardware import HARDWARE
from megatron_hc.estimate.search import search
from megatron_hc.inference.decoder import check_can_write
from megatron_hc.mesh import Mesh
from megatron_hc.parallel import deepspeed as engine
from megatron_hc.parallel.deepspeed_config import Settings, settings_of
from megatron_hc.parallel.slots import boxes_of

EXAMPLES = Path(__file__).parents[2] / "examples" / "deepspeed"
GOOD = (
    "--num-layers 4 --hidden-size 64 --num-attention-heads 4 --seq-length 32 --lr 1e-3 --micro-batch-size 2 "
    "--global-batch-size 16 --train-iters 10 --mock-data --tokenizer-type ByteTokenizer --deepspeed"
)


def config_of(extra: str = "") -> TrainConfig:
    return cli.parse(f"{GOOD} {extra}".split()).config


def settings(tmp_path: Path, content: Any, extra: str = "") -> Settings:
    pytest.importorskip("hjson", reason="comes with DeepSpeed: pip install 'megatron_hc[deepspeed]'")
    file = tmp_path / "config.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    return settings_of(config_of(f"--deepspeed_config {file} {extra}"), 2)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--no-deepspeed --zero-stage 2", "--zero-stage 2 needs --deepspeed"),
        ("--no-deepspeed --deepspeed-config x.json", "--deepspeed-config x.json needs --deepspeed"),
        ("--zero-stage 0", r"--zero-stage \(0\) must be 1, 2 or 3"),
        ("--pipeline-model-parallel-size 2", r"and --pipeline-model-parallel-size \(2\) exclude each other"),
        ("--fp64", "--deepspeed and --fp64 exclude each other"),
        (
            "--data-parallel-sharding-strategy optim_grads_params",
            "--deepspeed and --data-parallel-sharding-strategy optim_grads_params exclude each other",
        ),
        ("--num-distributed-optimizer-instances 2", r"--num-distributed-optimizer-instances \(2\) exclude each other"),
        ("--overlap-grad-reduce", "--deepspeed and --overlap-grad-reduce exclude each other"),
        ("--overlap-param-gather", "--deepspeed and --overlap-param-gather exclude each other"),
        (
            "--num-experts 4 --expert-model-parallel-size 2 --moe-router-topk 2",
            "--deepspeed needs --expert-model-parallel-size 1, not 2",
        ),
        ("--no-check-for-nan-in-loss-and-grad", "--no-check-for-nan-in-loss-and-grad exclude each other"),
    ],
)
def test_flags_that_exclude_each_other(flags: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config_of(flags).validate(4)


CONTRADICTIONS: list[tuple[Any, str]] = [
    ({"train_batch_size": 8}, "train_batch_size is 8 in --deepspeed-config .*, and --global-batch-size is 16"),
    ({"train_micro_batch_size_per_gpu": 4}, "per_gpu is 4 .*, and --micro-batch-size is 2"),
    ({"gradient_accumulation_steps": 2}, r"gradient_accumulation_steps is 2 .* \(16\) makes 4 micro-batches"),
    ({"bf16": {"enabled": True}}, "bf16.enabled is true .*, and --bf16 is not given"),
    ({"fp16": {"enabled": True}}, "fp16.enabled is true .*, and there is no fp16 here"),
    ({"gradient_clipping": 0.5}, "gradient_clipping is 0.5 .*, and --clip-grad is 1.0"),
    ({"optimizer": {"type": "Lion"}}, "optimizer.type is Lion .*, and the optimizer here is AdamW"),
    ({"optimizer": {"type": "Adam", "params": {"lr": 0.1}}}, "optimizer.params.lr is 0.1 .*, and --lr is 0.001"),
    ({"optimizer": {"params": {"betas": [0.9, 0.95]}}}, r"betas is \[0.9, 0.95\] .* are 0.9 and 0.999"),
    ({"optimizer": {"params": {"adam_w_mode": False}}}, "adam_w_mode is false"),
    ({"optimizer": {"params": {"torch_adam": False}}}, "torch_adam is false .*not offloaded"),
    ({"scheduler": {"type": "WarmupLR"}}, "scheduler.type is WarmupLR .* --lr-decay-style is linear"),
    ({"data_types": {"grad_accum_dtype": "bf16"}}, "grad_accum_dtype is bf16 .* always summed in fp32"),
    ({"communication_data_type": "bf16"}, "communication_data_type is bf16"),
    ({"zero_optimization": {"stage": 0}}, "zero_optimization.stage is 0 .* must be 1, 2 or 3"),
    ({"zero_optimization": {"offload_param": {"device": "cpu"}}}, "offload_param .* needs stage 3, not 1"),
    ({"zero_optimization": {"offload_optimizer": {"device": "nvme"}}}, "device is nvme .* must be cpu or none"),
    ({"zero_optimization": {"offload_optimizer": {"pin_memory": True}}}, "offload_optimizer .* names no device"),
    ({"zero_optimization": {"zero_quantized_weights": True}}, "zero_optimization.zero_quantized_weights .* not taken"),
    ({"zero_optimization": {"round_robin_gradients": True}}, "round_robin_gradients .* not taken"),
    ({"curriculum_learning": {"enabled": True}}, "curriculum_learning .* not taken"),
    ({"log_level": "loud"}, "log_level is loud .* must be one of debug, info"),
    ({"zero_optimization": 3}, "zero_optimization .* must be an object, not 3"),
    ("[1]", "must be an object"),
    ("{", "cannot be read"),
    ('{"steps_per_print": 1, "steps_per_print": 2}', "steps_per_print is given twice"),
]


@pytest.mark.parametrize(("content", "message"), CONTRADICTIONS, ids=[message for _, message in CONTRADICTIONS])
def test_a_file_that_contradicts_the_flags(tmp_path: Path, content: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        settings(tmp_path, content)


def test_stages_and_offloading_that_contradict_each_other(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="zero_optimization.stage is 2 .*, and --zero-stage is 3"):
        settings(tmp_path, {"zero_optimization": {"stage": 2}}, "--zero-stage 3")
    none = {"zero_optimization": {"offload_optimizer": {"device": "none"}}}
    with pytest.raises(ValueError, match="device is none .*, and --optimizer-cpu-offload is given"):
        settings(tmp_path, none, "--optimizer-cpu-offload")


def test_a_missing_file(tmp_path: Path) -> None:
    pytest.importorskip("hjson", reason="comes with DeepSpeed: pip install 'megatron_hc[deepspeed]'")
    with pytest.raises(ValueError, match="--deepspeed-config .*nowhere.json cannot be read: No such file"):
        settings_of(config_of(f"--deepspeed-config {tmp_path / 'nowhere.json'}"), 2)


def test_a_file_that_agrees(tmp_path: Path) -> None:
    """The same values, "auto", and what only the file can say."""
    content = """{
        // a comment, as DeepSpeed takes them
        "train_batch_size": "auto", "train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 4,
        "gradient_clipping": 1, "bf16": {"enabled": "auto"}, "fp16": {"enabled": false, "loss_scale": 0},
        "optimizer": {"type": "AdamW", "params": {"lr": 0.001, "betas": [0.9, 0.999], "eps": "auto"}},
        "zero_optimization": {"stage": 2, "reduce_bucket_size": 1000, "allgather_bucket_size": "auto",
                              "offload_optimizer": {"device": "cpu", "pin_memory": false}},
        "steps_per_print": 7
    }"""
    found = settings(tmp_path, content)
    assert (found.stage, found.is_offloaded, found.takes_torch_adam) == (2, True, False)
    assert (found.engine["steps_per_print"], found.engine["log_level"]) == (7, "info")
    # DeepSpeed neither clips nor divides.
    assert found.engine["gradient_clipping"] == 0.0 and found.engine["gradient_accumulation_steps"] == 1
    assert found.engine["train_batch_size"] == 4
    assert found.engine["zero_optimization"] == {
        "stage": 2, "reduce_bucket_size": 1000, "offload_optimizer": {"device": "cpu", "pin_memory": False},
    }  # fmt: skip


@pytest.mark.parametrize("file", sorted(EXAMPLES.glob("*.json")), ids=lambda file: file.stem)
@pytest.mark.parametrize("precision", ["", "--bf16"])
def test_the_examples(tmp_path: Path, file: Path, precision: str) -> None:
    found = settings(tmp_path, file.read_text(), precision)
    assert (f"zero{found.stage}", found.is_offloaded) == (file.stem[:5], "offload" in file.stem)


def test_what_does_not_go_with_it_elsewhere() -> None:
    """Text is written from whole parameters, and the estimator knows our own sharding only."""
    check_can_write(config_of("--zero-stage 2"), Mesh())
    with pytest.raises(ValueError, match="text cannot be generated with --deepspeed at ZeRO stage 3"):
        check_can_write(config_of("--zero-stage 3"), Mesh())
    with pytest.raises(ValueError, match="--deepspeed is not estimated"):
        estimate(config_of(), next(iter(HARDWARE.values())), 8, 256)
    with pytest.raises(ValueError, match="--deepspeed is not estimated"):
        search(config_of(), next(iter(HARDWARE.values())), 8, 256)


def test_without_a_file() -> None:
    assert settings_of(config_of(), 2).stage == 1
    assert settings_of(config_of(), 2).engine["log_level"] == "warning"
    assert settings_of(config_of("--zero-stage 3"), 2).stage == 3
    assert settings_of(config_of("--optimizer-cpu-offload"), 2).is_offloaded


def test_a_missing_or_old_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(engine, "version", missing)
    with pytest.raises(ValueError, match=r"not installed: pip install 'megatron_hc\[deepspeed\]'"):
        engine.check_deepspeed(config_of(), 1)
    monkeypatch.setattr(engine, "version", lambda name: "0.18.2")
    with pytest.raises(ValueError, match="needs DeepSpeed 0.19, and 0.18.2 is installed"):
        engine.check_deepspeed(config_of(), 1)
    monkeypatch.setattr(engine, "version", lambda name: "0.19.8")
    engine.check_deepspeed(config_of(), 1)
    with pytest.raises(ValueError, match="--compile and --deepspeed at ZeRO stage 3 exclude each other"):
        engine.check_deepspeed(config_of("--zero-stage 3 --compile"), 1)


def test_a_missing_compiler_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    adam = pytest.importorskip("deepspeed.ops.adam", reason="needs DeepSpeed: pip install 'megatron_hc[deepspeed]'")

    def fails(*arguments: Any, **options: Any) -> None:
        raise RuntimeError("DeepSpeedCPUAdam requires the cpu_adam op") from RuntimeError("g++: not found")

    monkeypatch.setattr(adam, "DeepSpeedCPUAdam", fails)
    with pytest.raises(ValueError, match=r"install a C\+\+ compiler \(g\+\+\) and ninja, .*\(g\+\+: not found\)"):
        engine._cpu_adam([], (0.9, 0.999))


def test_the_launcher_adds_local_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert cli.parse(f"--local_rank=3 {GOOD}".split()).config.zero.deepspeed
    with pytest.raises(cli.UsageError, match="--local_rank"):
        cli.parse(f"--local_rank=2 {GOOD}".split())


@pytest.mark.parametrize("shape", [(7,), (3, 4), (2, 3, 4), (5, 1)])
def test_a_run_of_elements_as_boxes(shape: tuple[int, ...]) -> None:
    """Every run of every length: the boxes are views that hold it, each element once."""
    size = torch.Size(shape).numel()
    whole = torch.arange(float(size))
    for start, end in product(range(size + 1), repeat=2):
        if start <= end:
            found, run = torch.full(shape, -1.0), whole[start:end].clone()
            for offset, values in boxes_of(run, start, shape):
                place = tuple(slice(o, o + n) for o, n in zip(offset, values.shape, strict=True))
                assert (found[place] == -1).all()
                found[place] = values
                values.add_(100)
            expected = torch.full((size,), -1.0)
            expected[start:end] = whole[start:end]
            assert torch.equal(found, expected.view(shape))
            assert torch.equal(run, whole[start:end] + 100)
