"""tools/estimate.py: what it prints, what it refuses; the search; the roofline where it can be done by hand."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest

from megatron_hc import checkpoint
from megatron_hc.cli import dump, parse
from megatron_hc.estimate.estimate import estimate
from megatron_hc.estimate.hardware import HARDWARE
from megatron_hc.estimate.report import launch_command
from megatron_hc.estimate.search import _SmallTraces, changed, choices, search
from megatron_hc.estimate.simulate import simulate
from megatron_hc.estimate.trace import Pass, StageTrace
from megatron_hc.mesh import Mesh
from megatron_hc.pipeline_layout import PipelineLayout, bounds_of, even_split

ROOT = Path(__file__).parents[3]
MODEL = (
    "--num-layers 4 --hidden-size 64 --num-attention-heads 4 --seq-length 32 --position-embedding-type rope "
    "--normalization RMSNorm --swiglu --disable-bias-linear --bf16 --micro-batch-size 1 --global-batch-size 8 "
    "--train-iters 10 --lr 1e-4 --mock-data --tokenizer-type NullTokenizer --vocab-size 127"
)


def run_tool(monkeypatch: pytest.MonkeyPatch, *words: str) -> None:
    monkeypatch.setattr(sys, "argv", ["tools/estimate.py", *MODEL.split(), *words])
    runpy.run_path(str(ROOT / "tools/estimate.py"), run_name="__main__")


def test_output(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    numbers, picture = tmp_path / "estimate.json", tmp_path / "estimate.png"
    words = ("--num-gpus", "2", "--tokens", "1e9", "--price-per-gpu-hour", "2", "--json", str(numbers))
    run_tool(monkeypatch, *words, "--output", str(picture), "--pipeline-model-parallel-size", "2")
    found = json.loads(numbers.read_text())
    assert next(iter(found)) == "total_parameters"
    assert found["total_parameters"] == sum(found["parameters"].values())
    assert len(found["ranks"]) == 2 and found["days"] > 0 and found["cost"] == pytest.approx(found["days"] * 24 * 2 * 2)
    assert sum(found["seconds"].values()) == pytest.approx(found["step_seconds"])
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert f"parameters: {found['total_parameters']:,}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--num-gpus", "0"), "--num-gpus must be positive, not 0"),
        (("--num-gpus", "3", "--tensor-model-parallel-size", "2"), "must divide the number of processes (3)"),
        (("--num-gpus", "8", "--tensor-model-parallel-size", "8"), "num-attention-heads (4)"),
        (("--memory-gb", "-1"), "--memory-gb must be positive, not -1"),
        (("--matmul-efficiency", "2"), "--matmul-efficiency is a share of at most 1"),
        (("--price-per-gpu-hour", "2"), "--price-per-gpu-hour needs --tokens"),
        (("--hiden-size", "2"), "--hidden-size"),
        (
            ("--fp8-format", "e4m3", "--transformer-impl", "transformer_engine"),
            "--fp8-format e4m3 is not estimated: leave it out",
        ),
        (
            ("--num-gpus", "3", "--search", "--global-batch-size", "8"),
            "no layout of 3 GPUs can train this; without tensor and pipeline parallelism: --global-batch-size (8) must "
            "be divisible by --micro-batch-size (1) times the data-parallel size (3)",
        ),
        (("--num-gpus", "2", "--search", "--min-lr", "1"), "--min-lr (1.0) must be between 0 and --lr"),
        (("--tokens", "nan"), "--tokens must be positive, not nan"),
        (("--memory-gb", "inf"), "--memory-gb must be positive, not inf"),
        (("--json", "{here}/file/x"), "/file/x cannot be written: "),
        (("--output", "{here}/file/x.png"), "/file/x.png cannot be written: "),
        (("--output", "x.foo"), "--output x.foo: a picture's name ends in .png, .svg or .pdf"),
    ],
)
def test_refusals(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: tuple[str, ...],
    message: str,
    tmp_path: Path,
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit) as ended:
        run_tool(monkeypatch, *(word.format(here=tmp_path) for word in words))
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_search(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first layout is the fastest that fits, each other one has a reason, and the command gives the same run."""
    monkeypatch.setattr("megatron_hc.estimate.search.MICRO_BATCHES", (1, 2))
    config = parse(MODEL.split()).config
    hardware = HARDWARE["h100"]
    results = search(config, hardware, 4, 128, count=4)
    times = [float(f"{result.estimate.step_seconds:.4g}") for result in results]
    assert times == sorted(times) and all(result.estimate.fits for result in results)
    assert not results[0].reason and all(result.reason for result in results[1:])
    best = results[0].estimate.config
    command = launch_command(best, 4, 8)
    assert "--device" not in command
    again = parse(command.split("pretrain_gpt.py ")[1].split()).config
    assert again == best and "--device" not in command


@pytest.mark.parametrize(
    ("world_size", "words"),
    [
        (4, "--nproc-per-node 4"),
        (16, "--nproc-per-node 8 --nnodes 2"),
        (12, "--nproc-per-node 6 --nnodes 2"),
        (11, "--nproc-per-node 1 --nnodes 11"),
    ],
)
def test_command_starts_all_processes(world_size: int, words: str) -> None:
    assert launch_command(parse(MODEL.split()).config, world_size, 8).startswith(f"torchrun {words} ")


def test_the_arguments_of_a_checkpoint(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    run_tool(monkeypatch, "--json", "-")
    expected, saved = capsys.readouterr().out, parse(MODEL.split())
    checkpoint.save(tmp_path, 0, {}, {}, dump(saved.config, saved.origins), mesh=Mesh())
    rest = "--bf16 --micro-batch-size 1 --global-batch-size 8 --train-iters 10 --lr 1e-4 --mock-data"
    words = [*rest.split(), "--json", "-", "--load", str(tmp_path), "--use-checkpoint-args"]
    monkeypatch.setattr(sys, "argv", ["tools/estimate.py", *words])
    runpy.run_path(str(ROOT / "tools/estimate.py"), run_name="__main__")
    assert json.loads(capsys.readouterr().out) == json.loads(expected)


def test_flags_of_gpus(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """What a run on a CPU refuses is estimated, whatever this machine has."""
    run_tool(monkeypatch, "--json", "-")
    plain = json.loads(capsys.readouterr().out)["ranks"][0]
    run_tool(monkeypatch, "--json", "-", "--optimizer-cpu-offload", "--device", "cuda")
    offloaded = json.loads(capsys.readouterr().out)["ranks"][0]
    assert offloaded["optimizer_bytes"] == 0 < plain["optimizer_bytes"]
    assert offloaded["weight_bytes"] == plain["weight_bytes"]
    run_tool(monkeypatch, "--transformer-impl", "transformer_engine", "--gradient-accumulation-fusion")
    assert "MFU" in capsys.readouterr().out


def test_search_without_sharding(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is gathered there, and --overlap-param-gather would have every layout refused."""
    monkeypatch.setattr("megatron_hc.estimate.search.MICRO_BATCHES", (1,))
    config = parse([*MODEL.split(), "--data-parallel-sharding-strategy", "no_shard"]).config
    best = search(config, HARDWARE["h100"], 2, 128, count=1)[0].estimate.config.parallel
    assert best.data_parallel_sharding_strategy == "no_shard" and not best.overlap_param_gather


def test_what_another_layout_needs_is_left_out() -> None:
    """Flags of the layout that was given would have all others refused, and the search would not say so."""
    given = (
        "--recompute-granularity selective --recompute-modules residual --residual-recompute-interval 3",
        "--pipeline-model-parallel-size 2 --decoder-first-pipeline-num-layers 1",
        "--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1",
        "--pipeline-model-parallel-size 2 --account-for-embedding-in-pipeline-split",
        "--pipeline-model-parallel-size 2 --pipeline-model-parallel-layout Et|tttL",
    )
    plain = parse(MODEL.split()).config
    found = list(choices(plain, HARDWARE["h100"], 2))
    for words in given:
        config = parse([*MODEL.split(), *words.split()]).config
        assert [changed(config, choice).parallel for choice in found] == [
            changed(plain, choice).parallel for choice in found
        ]


def test_search_against_every_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    """With memory for half of the layouts: the first one is the best of those that fit, each estimated by itself."""
    monkeypatch.setattr("megatron_hc.estimate.search.MICRO_BATCHES", (2,))
    config = parse(MODEL.split()).config
    found = []
    for choice in choices(config, HARDWARE["h100"], 2):
        candidate = changed(config, choice)
        candidate.validate(2)
        found.append(estimate(candidate, HARDWARE["h100"], 2, 128))
    limit = sorted(result.peak_bytes for result in found)[len(found) // 2]
    best = min(result.step_seconds for result in found if result.peak_bytes <= limit)
    assert best > min(result.step_seconds for result in found)
    hardware = HARDWARE["h100"].with_changes(memory_gb=limit / 1e9, reserved_gb=0.0)
    first = search(config, hardware, 2, 128, count=1)[0].estimate
    assert first.fits and first.step_seconds == pytest.approx(best, rel=1e-3)


@pytest.mark.parametrize("model", ["", pytest.param("--num-experts 4", marks=pytest.mark.slow)])
def test_search_with_context_parallelism(monkeypatch: pytest.MonkeyPatch, model: str) -> None:
    """Layouts of all sizes stay in the search, and what it makes of models of a few layers is what they take."""
    monkeypatch.setattr("megatron_hc.estimate.search.MICRO_BATCHES", (2,))
    config = parse([*MODEL.split(), *model.split(), "--context-parallel-size", "2"]).config
    hardware, small = HARDWARE["h100"], _SmallTraces(128)
    results = search(config, hardware, 4, 128, count=100)
    assert {(result.choice.tp, result.choice.pp) for result in results} == {(1, 1), (1, 2), (2, 1)}
    for result in results:
        if result.choice.pp == 1:  # of stages the ends are not like the middle
            rough, exact = small.estimate(result.estimate.config, hardware, 4), result.estimate
            assert rough.step_seconds == pytest.approx(exact.step_seconds, rel=1e-2), result.choice
            assert rough.peak_bytes == pytest.approx(exact.peak_bytes, rel=1e-2), result.choice
            assert rough.sent.get("cp") == pytest.approx(exact.sent["cp"], rel=1e-2), result.choice


def test_one_forward_one_backward_by_hand() -> None:
    """4 processes, 8 micro-batches, passes of 1 and 2: (p - 1 + m) * 3, and p - r micro-batches under way."""
    layout = PipelineLayout(4, "1f1b", bounds_of(even_split(8, 4)))
    traces = [StageTrace(10, Pass(peak_bytes=12), Pass(peak_bytes=3)) for _ in range(4)]
    played = simulate(layout, 8, lambda kind, stage: 1.0 if kind == "forward" else 2.0, [0.0] * 4, traces)
    assert played.seconds == 33 and played.bubble == pytest.approx(3 / 11)
    assert played.peak_micro_batches == [4, 3, 2, 1]
    assert played.peak_bytes == [43, 33, 23, 13]


def test_many_micro_batches_go_on_as_they_began() -> None:
    """The middle of a long step is not played, and gives the same."""
    layout = PipelineLayout(4, "1f1b", bounds_of(even_split(8, 4)))
    traces = [StageTrace(10, Pass(), Pass()) for _ in range(4)]
    times = [1.0, 1.3, 0.7, 1.1]
    played = simulate(layout, 400, lambda kind, stage: times[stage] * (1 + (kind != "forward")), [0.1] * 4, traces)
    # The slowest stage decides; the others add the filling and draining of the pipeline once.
    assert played.busy == pytest.approx([400 * 3 * time for time in times])
    assert 400 * 3 * 1.3 < played.seconds < 400 * 3 * 1.3 + 3 * sum(times) + 2
