"""Console lines, records, sinks and throughput."""

from __future__ import annotations

import errno
import importlib.util
import json
import math
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_hc import cli, log, log_sinks
from megatron_hc.config import TrainConfig
from megatron_hc.mesh import Mesh

BASE = (
    "--num-layers 2 --hidden-size 64 --num-attention-heads 4 --seq-length 32 --lr 1e-3 --micro-batch-size 2 "
    "--train-iters 10 --mock-data --tokenizer-type ByteTokenizer"
)


class Clock:
    """Time that passes only when told."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def config_of(flags: str = "") -> TrainConfig:
    return cli.parse(f"{BASE} {flags}".split()).config


def make(flags: str = "", **kwargs: Any) -> tuple[log.Logger, Clock]:
    clock = Clock()
    return log.Logger(config_of(flags), Mesh(), 257, total_iterations=10, clock=clock, **kwargs), clock


def run(logger: log.Logger, clock: Clock, iterations: range, seconds: float = 0.25) -> None:
    for iteration in iterations:
        clock.now += seconds
        logger.step(
            iteration=iteration,
            consumed_samples=8 * iteration,
            batch_size=8,
            loss=1.0 / iteration,
            learning_rate=1e-3 / iteration,
            grad_norm=0.5,
        )


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# Console


def test_console_line_is_megatrons(capsys: pytest.CaptureFixture[str]) -> None:
    logger, clock = make("--log-interval 5 --log-throughput --peak-tflops 0.01")
    with logger:
        for iteration in range(1, 6):
            clock.now += 0.2
            logger.step(
                iteration=iteration,
                consumed_samples=8 * iteration,
                batch_size=8,
                loss=torch.tensor(float(iteration)),
                learning_rate=2.5e-4,
                grad_norm=1.23456,
                num_zeros=7,
                params_norm=lambda: 99.5,
            )
    line = capsys.readouterr().out
    tflops = log.flops_per_token(config_of().model, 257) * 32 * 8 / 0.2 / 1e12
    assert re.fullmatch(
        r" \[\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{6}\] iteration        5/      10 \| consumed samples:           40 \| "
        r"elapsed time per iteration \(ms\): 200\.0 \| throughput per GPU \(TFLOP/s/GPU\): 0\.0 \| "
        r"learning rate: 2\.500000E-04 \| global batch size:     8 \| lm loss: 3\.000000E\+00 \| loss scale: 1\.0 \| "
        r"grad norm: 1\.235 \| num zeros: 7 \| params norm: 99\.500 \| number of skipped iterations:   0 \| "
        r"number of nan iterations:   0 \| tokens per second: 1280 \| mfu: (0\.\d{3}) \| memory \(GiB\): \d+\.\d\d \| "
        r"eta: 0:00:01 \|\n",
        line,
    )
    assert float(re.search(r"mfu: (\S+)", line)[1]) == pytest.approx(tflops / 0.01, abs=1e-3)


def test_optional_fields_are_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    logger, clock = make("--log-interval 1")
    with logger:
        run(logger, clock, range(1, 2))
    line = capsys.readouterr().out
    for name in ("throughput", "num zeros", "params norm", "mfu"):
        assert name not in line
    assert "grad norm: 0.500 |" in line


def test_lines_at_the_interval_and_at_the_end_only(capsys: pytest.CaptureFixture[str]) -> None:
    logger, clock = make("--log-interval 4")

    def never() -> float:
        raise AssertionError("read at an iteration without a line")

    with logger:
        run(logger, clock, range(1, 9))
        clock.now += 1
        logger.step(iteration=9, consumed_samples=72, batch_size=8, loss=1.0, learning_rate=1e-3, params_norm=never)
        run(logger, clock, range(10, 11))
    found = re.findall(r"iteration +(\d+)/", capsys.readouterr().out)
    assert found == ["4", "8", "10"]


def test_speed_of_a_batch_that_grows(tmp_path: Path) -> None:
    logger, clock = make(f"--log-interval 4 --metrics-jsonl {tmp_path / 'm.jsonl'}")
    with logger:
        for iteration, batch_size in enumerate((2, 2, 2, 10), 1):
            clock.now += 0.5
            logger.step(iteration=iteration, consumed_samples=0, batch_size=batch_size, loss=1.0, learning_rate=1e-3)
    record = json.loads((tmp_path / "m.jsonl").read_text())
    assert record["tokens_per_second"] == 16 * 32 / 2.0 and record["global_batch_size"] == 10
    assert record["tflops"] == pytest.approx(log.flops_per_token(config_of().model, 257) * 16 * 32 / 2.0 / 1e12)


def test_validation_line(capsys: pytest.CaptureFixture[str]) -> None:
    logger, _ = make()
    with logger:
        logger.evaluation("validation", 500, 4000, 2.0)
        logger.evaluation("test", 500, 4000, 30.0)
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == " validation loss at iteration 500 | lm loss value: 2.000000E+00 | lm loss PPL: 7.389056E+00 | "
    assert set(lines[0]) == set(lines[2]) == {"-"} and len(lines[0]) == len(lines[1]) + 1
    assert lines[4].startswith(" validation loss at iteration 500 on test set | lm loss value: 3.000000E+01 | ")
    assert "lm loss PPL: 4.851652E+08" in lines[4]  # exp of at most 20


def test_residual_stats(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By name and place in the sinks, the extremes in a line."""
    file = tmp_path / "m.jsonl"
    logger, _ = make(f"--metrics-jsonl {file}")
    stats = {"grad_norm": [0.5, 2.0], "stream_rank": [1.5, 1.25, 3.0], "value_first": [None, 0.25]}
    with logger:
        logger.residual(4, 32, stats)
    (record,) = records(file)
    assert record["residual/grad_norm_1"] == 2.0 and record["residual/value_first_1"] == 0.25
    assert "residual/value_first_0" not in record and (record["iteration"], record["consumed_samples"]) == (4, 32)
    tags = log_sinks.tags_of(record)
    assert len(tags) == 6 and tags["residual/stream_rank_2"] == "residual/stream_rank_2"
    out = capsys.readouterr().out
    assert "iteration 4 | largest grad_norm: 2 at 1 | smallest stream_rank: 1.25 at 1 |" in out
    logger.residual(5, 40, {"grad_norm": [0.5, math.nan, 2.0], "stream_rank": [1.5, math.nan]})
    assert "| largest grad_norm: nan at 1 | smallest stream_rank: nan at 1 |" in capsys.readouterr().out


def test_other_ranks_are_silent(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    mesh = Mesh(sizes={"pp": 1, "dp": 2, "cp": 1, "tp": 1}, ranks={"pp": 0, "dp": 1, "cp": 0, "tp": 0})
    file = tmp_path / "m.jsonl"
    config = config_of(f"--log-interval 1 --metrics-jsonl {file}")
    called = []
    with log.Logger(config, mesh, 257, total_iterations=10) as logger:
        logger.say("hello")
        logger.step(
            iteration=1,
            consumed_samples=8,
            batch_size=8,
            loss=1.0,
            learning_rate=1.0,
            params_norm=lambda: called.append(1) or 0.0,
        )
        logger.evaluation("validation", 1, 8, 1.0)
    assert capsys.readouterr().out == "" and not file.exists()
    assert called == [1]  # a norm over ranks is a collective: every rank has to take part


# Records


def test_jsonl_holds_every_number_at_full_precision(tmp_path: Path) -> None:
    file = tmp_path / "folder" / "m.jsonl"
    logger, clock = make(f"--log-interval 2 --peak-tflops 2 --metrics-jsonl {file}")
    with logger:
        run(logger, clock, range(1, 3))
        logger.evaluation("validation", 2, 16, 2.0)
    first, second = records(file)
    assert (first["iteration"], first["consumed_samples"], first["consumed_tokens"]) == (2, 16, 512)
    assert first["lm_loss"] == (1.0 + 0.5) / 2 and first["learning_rate"] == 1e-3 / 2
    assert first["seconds_per_iteration"] == pytest.approx(0.25) and first["eta_seconds"] == pytest.approx(2.0)
    assert first["tokens_per_second"] == pytest.approx(8 * 32 / 0.25)
    assert first["tflops"] == pytest.approx(log.flops_per_token(config_of().model, 257) * 8 * 32 / 0.25 / 1e12)
    assert first["mfu"] == pytest.approx(first["tflops"] / 2)
    assert first["memory_bytes"] > 10 * 2**20 and first["world_size"] == 1
    assert first["grad_norm"] == 0.5 and first["num_zeros"] is None and first["nan_iterations"] == 0
    assert second["lm_loss_validation"] == 2.0 and second["lm_loss_validation_ppl"] == math.exp(2.0)
    assert "lm_loss" not in second


def test_losses_that_are_not_finite(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "m.jsonl"
    logger, clock = make(f"--log-interval 2 --metrics-jsonl {file}")
    with logger:
        for iteration, loss in ((1, math.nan), (2, 1.0)):
            logger.step(iteration=iteration, consumed_samples=8, batch_size=8, loss=loss, learning_rate=1.0)
        logger.evaluation("validation", 2, 16, math.inf)
    first, second = records(file)
    assert first["lm_loss"] is None and first["nan_iterations"] == 1 and second["lm_loss_validation"] is None
    assert "lm loss: NAN" in (text := capsys.readouterr().out) and "number of nan iterations:   1" in text


def test_mfu_is_unknown_on_a_cpu(tmp_path: Path) -> None:
    logger, clock = make(f"--log-interval 1 --bf16 --metrics-jsonl {tmp_path / 'm'}")
    with logger:
        run(logger, clock, range(1, 2))
    assert records(tmp_path / "m")[0]["mfu"] is None


def test_paused_time_does_not_count(tmp_path: Path) -> None:
    logger, clock = make(f"--log-interval 2 --metrics-jsonl {tmp_path / 'm'}")
    with logger:
        run(logger, clock, range(1, 2))
        with logger.pause():
            clock.now += 1000
        run(logger, clock, range(2, 3))
        with logger.pause():
            clock.now += 1000
        run(logger, clock, range(3, 5))
    assert [record["seconds_per_iteration"] for record in records(tmp_path / "m")] == pytest.approx([0.25, 0.25])


# Resume


def test_a_resumed_run_writes_the_file_of_an_unbroken_one(tmp_path: Path) -> None:
    def losses(path: Path) -> list[tuple]:
        return [(r["iteration"], r.get("lm_loss"), r.get("lm_loss_validation")) for r in records(path)]

    def until(path: Path, iterations: range, start: int = 0, state: Any = None, save_at: int = 0) -> Any:
        logger, clock = make(f"--log-interval 3 --metrics-jsonl {path}", start_iteration=start)
        saved = None
        with logger:
            if state is not None:
                logger.restore(json.loads(json.dumps(state)))
            for iteration in iterations:
                run(logger, clock, range(iteration, iteration + 1))
                if iteration % 4 == 0:
                    logger.evaluation("validation", iteration, 8 * iteration, 1.0 / iteration)
                if iteration == save_at:
                    saved = logger.state()
        return saved

    whole, broken = tmp_path / "whole.jsonl", tmp_path / "broken.jsonl"
    until(whole, range(1, 11))
    state = until(broken, range(1, 10), save_at=5)
    assert len(state["losses"]) == 2  # iterations 4 and 5
    with broken.open("a") as file:
        file.write('{"iteration": 10, "lm_lo')  # killed while writing
    until(broken, range(6, 11), start=5, state=state)
    assert losses(broken) == losses(whole) and len(losses(whole)) == 6
    assert not list(tmp_path.glob("*.tmp"))


def test_iterations_skipped_before_a_save_are_counted_after_it(tmp_path: Path) -> None:
    def logged(*parts: range) -> list[int]:
        """Iterations 1 .. 6 of which 3 is skipped, in runs that hand over."""
        path, state = tmp_path / f"{len(parts)}.jsonl", None
        for part in parts:
            logger, clock = make(f"--log-interval 2 --metrics-jsonl {path}", start_iteration=part.start - 1)
            with logger:
                logger.restore(json.loads(json.dumps(state))) if state else None
                for iteration in part:
                    if iteration == 3:
                        logger.skipped(iteration)
                    else:
                        run(logger, clock, range(iteration, iteration + 1))
                state = logger.state()
        return [record["skipped_iterations"] for record in records(path)]

    assert logged(range(1, 4), range(4, 7)) == logged(range(1, 7)) == [0, 1, 0]


def test_a_file_that_stays_as_it_is_needs_no_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that is resumed on a full disk."""
    file = tmp_path / "m.jsonl"
    with make(f"--log-interval 1 --metrics-jsonl {file}")[0] as logger:
        logger.evaluation("test", 1, 8, 2.0)

    def full(*arguments: object, **options: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")  # of a write; it names no file

    monkeypatch.setattr(Path, "write_text", full)
    logger, clock = make(f"--log-interval 1 --metrics-jsonl {file}", start_iteration=1)
    with logger:
        run(logger, clock, range(2, 3))
    assert [record["iteration"] for record in records(file)] == [1, 2]
    with pytest.raises(ValueError, match=f"^--metrics-jsonl {file} cannot be written: No space left"):
        make(f"--metrics-jsonl {file}", start_iteration=1)[0].__enter__()


def test_a_new_run_starts_its_file_anew_and_only_once_it_runs(tmp_path: Path) -> None:
    file = tmp_path / "m.jsonl"
    file.write_text('{"iteration": 3}\n')
    logger, clock = make(f"--log-interval 1 --metrics-jsonl {file}")
    assert file.read_text() == '{"iteration": 3}\n'
    with logger:
        run(logger, clock, range(1, 2))
    assert [record["iteration"] for record in records(file)] == [1]


@pytest.mark.parametrize(
    "content",
    [
        *(b"some notes\n", b"[1]\n", b'{"iteration": 1}\nnotes\n{"iteration": 2}\n', b"\xff"),
        b'{"iteration": null}\n{"iteration": 1}\n',
    ],
)
def test_a_file_of_something_else_is_refused_and_kept(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "notes.txt"
    file.write_bytes(content)
    with pytest.raises(ValueError, match="--metrics-jsonl .*notes.txt.*: name another file"):
        make(f"--metrics-jsonl {file}")
    assert file.read_bytes() == content
    with pytest.raises(ValueError, match="cannot be read"):
        make(f"--metrics-jsonl {tmp_path}")


# TensorBoard, W&B, progress bar


def test_tensorboard(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    logger, clock = make(f"--log-interval 5 --tensorboard-dir {tmp_path}")
    with logger:
        run(logger, clock, range(1, 11))
        logger.evaluation("validation", 10, 80, 2.0)
    events = accumulator.EventAccumulator(str(tmp_path)).Reload()
    tags = set(events.Tags()["scalars"])
    assert {tag for tag in tags if f"{tag} vs samples" in tags} == {
        *("lm loss", "learning-rate", "batch-size", "loss-scale", "grad-norm", "iteration-time", "throughput"),
        *("world-size", "mem-max-allocated-bytes", "tokens-per-second", "lm loss validation", "lm loss validation ppl"),
    }
    assert len(tags) == 24
    assert [(e.step, e.value) for e in events.Scalars("learning-rate")] == [
        (5, pytest.approx(2e-4)),
        (10, pytest.approx(1e-4)),
    ]
    assert [e.step for e in events.Scalars("lm loss vs samples")] == [40, 80]
    assert events.Scalars("lm loss validation")[0].value == 2.0


class FakeWandb:
    """Records what is sent; stands for the wandb module."""

    class Error(Exception):
        pass

    def __init__(self, fails: bool = False) -> None:
        self.fails, self.logged, self.settings, self.finished = fails, [], {}, False

    def init(self, **settings: Any) -> FakeWandb:
        if self.fails:
            raise self.Error("no API key")
        self.settings = settings
        return self

    def log(self, values: dict, step: int) -> None:
        self.logged.append((step, values))

    def finish(self) -> None:
        self.finished = True


def test_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    folder = tmp_path / "w"
    logger, clock = make(f"--log-interval 5 --wandb-project p --wandb-exp-name n --wandb-save-dir {folder}")
    assert not folder.exists()
    with logger:
        run(logger, clock, range(1, 6))
        logger.evaluation("validation", 5, 40, 2.0)
    assert fake.settings["project"] == "p" and fake.settings["name"] == "n" and folder.is_dir()
    assert fake.settings["config"]["model"]["hidden_size"] == 64
    (step, values), (_, validation) = fake.logged
    assert step == 5 and values["lm loss"] == pytest.approx(sum(1 / i for i in range(1, 6)) / 5)
    assert values["consumed-samples"] == 40 and "num-zeros" not in values
    assert validation["lm loss validation"] == 2.0 and fake.finished


def test_wandb_that_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", FakeWandb(fails=True))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    logger, _ = make("--wandb-project p")
    with pytest.raises(ValueError, match="--wandb-project: no API key; WANDB_MODE=offline needs no account"):
        logger.__enter__()


@pytest.mark.parametrize("flags, name", [("--tensorboard-dir x", "tensorboard"), ("--wandb-project p", "wandb")])
def test_a_missing_library_names_the_extra(monkeypatch: pytest.MonkeyPatch, flags: str, name: str) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=rf"needs the {name} package: pip install 'megatron_hc\[log\]'"):
        make(flags)


def test_progress_bar_only_on_a_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    logger, clock = make("--log-interval 5")
    with logger:
        run(logger, clock, range(1, 11))
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    logger, clock = make("--log-interval 5", start_iteration=4)
    with logger:
        run(logger, clock, range(5, 11))
    out, err = capsys.readouterr()
    assert "10/10" in err and "loss 0.1" in err
    assert len(out.splitlines()) == 2 and "\r" not in out


# Throughput


def test_flops_per_token_of_known_models() -> None:
    """Llama-3-8B at 8,192 tokens: 6 x 7.5e9 matrix parameters (no embedding) + 6 x 32 x 4,096 x 8,192 for attention."""
    llama = cli.parse(
        "--num-layers 32 --hidden-size 4096 --num-attention-heads 32 --group-query-attention --num-query-groups 8 "
        "--ffn-hidden-size 14336 --swiglu --seq-length 8192 --lr 1 --micro-batch-size 1".split()
    ).config.model
    matrices = 32 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336) + 4096 * 128256
    assert matrices == 8_030_261_248 - 4096 * 128256 - 65 * 4096  # all parameters but embedding and norms
    assert log.flops_per_token(llama, 128256) == 6 * matrices + 6 * 32 * 4096 * 8192
    gpt = config_of().model
    assert log.flops_per_token(gpt, 257) == 6 * (2 * (12 * 64 * 64 + 64 * 32) + 64 * 384)


@pytest.mark.parametrize(
    "name, peak",
    [
        ("NVIDIA H100 80GB HBM3", 989.0),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA H200", 989.0),
        ("NVIDIA GB200", 2500.0),
        ("NVIDIA T4", None),
    ],
)
def test_peak_of_known_devices(monkeypatch: pytest.MonkeyPatch, name: str, peak: float | None) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)

    def peak_of(flags: str) -> float | None:
        return log.Logger(config_of(flags), Mesh(device="cuda:0"), 257, total_iterations=1).peak_tflops

    assert peak_of("--bf16") == peak
    assert peak_of("") is None  # the table is of bf16
    assert peak_of("--peak-tflops 5") == 5.0


def test_losses_of_routers_are_means_over_a_line_and_a_restart(tmp_path: Path) -> None:
    """Of layers 1 and 2 at iterations 1 .. 6; no line counts the samples of the one before."""
    for parts in ((range(1, 7),), (range(1, 5), range(5, 7))):
        path, state = tmp_path / f"{len(parts)}.jsonl", None
        for part in parts:
            flags = f"--log-interval 3 --moe-per-layer-logging --metrics-jsonl {path}"
            logger, clock = make(flags, start_iteration=part.start - 1)
            with logger:
                logger.restore(json.loads(json.dumps(state))) if state else None
                for iteration in part:
                    clock.now += 0.25
                    losses = {"load_balancing_loss": [None, iteration, 3.0 * iteration]}
                    common = {"consumed_samples": 0, "batch_size": 8, "loss": 1.0, "learning_rate": 1.0}
                    logger.step(iteration=iteration, router_losses=losses, **common)
                state = logger.state()
        found = records(path)
        assert [record["load_balancing_loss"] for record in found] == [4, 10]
        assert [record["moe/load_balancing_loss_layer_1"] for record in found] == [2, 5]
        assert len({record["tokens_per_second"] for record in found}) == 1


def test_operations_of_experts_and_of_one_of_four_processes(tmp_path: Path) -> None:
    """Layer 1 has two of four experts per token, and a shared one, each with three matrices."""
    swiglu = "--swiglu --ffn-hidden-size 96"
    experts = "--num-experts 4 --moe-router-topk 2 --moe-ffn-hidden-size 48 --moe-shared-expert-intermediate-size 24"
    dense, sparse = (config_of(flags).model for flags in (swiglu, f"{swiglu} {experts} --moe-layer-freq 2"))
    with_experts = sum(sparse.moe.has_experts(sparse.num_layers))
    more = 6 * with_experts * 3 * dense.hidden_size * (2 * 48 + 24 - 96)
    assert with_experts and log.flops_per_token(sparse, 257) - log.flops_per_token(dense, 257) == more
    rates = []
    for world_size in (1, 4):
        layout: Any = SimpleNamespace(world_size=world_size, is_first=True, device="cpu")
        clock = Clock()
        logger = log.Logger(
            config_of(f"--log-interval 1 --metrics-jsonl {tmp_path / str(world_size)}"),
            *(layout, 257), total_iterations=10, clock=clock,
        )  # fmt: skip
        with logger:
            run(logger, clock, range(1, 2))
        rates.append(records(tmp_path / str(world_size))[0]["tflops"])
    assert rates[0] == pytest.approx(4 * rates[1], rel=1e-12)
