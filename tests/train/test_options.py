"""What single flags of a run do, seen in its records and its folder."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path

import pytest
import torch
from train_runs import command, losses, records, tiny, untimed

from megatron_hc.cli import parse
from megatron_hc.parallel.data import DataParallelOptimizer, StepStats
from megatron_hc.run import set_up
from megatron_hc.train import TrainingStopped, train

INFINITE = ["--adam-eps", 0, "--clip-grad", 0, "--lr", 1e30]
"""Weights of 1e30 after one step: the second one's loss is not finite."""


def iterations(folder: Path) -> list[int]:
    return [record["iteration"] for record in records(folder) if "lm_loss" in record]


def saved(folder: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in (folder / "run").glob("iter_*"))


def save(folder: Path) -> list[object]:
    return ["--save", folder / "run", "--load", folder / "run"]


@pytest.fixture
def half(licence: str, tmp_path: Path) -> tuple[list[str], list[float]]:
    """(flags of a run of 8 iterations whose first 4 are done and saved, all 8 losses of one that was not stopped)."""
    whole = tmp_path / "whole"
    dropout = ["--hidden-dropout", 0.2, "--eval-interval", 0, "--train-iters", 8]
    assert command(tiny(licence, whole, *dropout)) == 0
    flags = tiny(licence, tmp_path, *dropout, *save(tmp_path))
    assert command([*flags, "--exit-interval", "4"]) == 0
    assert iterations(tmp_path) == [1, 2, 3, 4] and saved(tmp_path) == [4]
    return flags, losses(whole)


def test_exit_interval_saves_and_the_next_start_goes_on(half: tuple, tmp_path: Path) -> None:
    flags, whole = half
    assert losses(tmp_path) == whole[:4]
    assert command([*flags, "--exit-interval", "6"]) == 0
    assert saved(tmp_path) == [4, 6]
    assert command(flags) == 0
    assert losses(tmp_path) == whole and saved(tmp_path) == [4, 6, 8]


def test_a_line_over_a_restart_is_that_of_one_run(half: tuple, tmp_path: Path) -> None:
    """The losses since the last line are saved: iteration 4 is in the mean of 4, 5 and 6."""
    flags, whole = half
    flags = [*flags, "--log-interval", "3", "--save", str(tmp_path / "other"), "--load", str(tmp_path / "other")]
    assert command([*flags, "--exit-interval", "4"]) == 0
    assert command(flags) == 0
    lines = losses(tmp_path)
    assert lines == pytest.approx([sum(part) / len(part) for part in (whole[:3], whole[3:6], whole[6:])], rel=1e-12)


def test_exit_duration(licence: str, tmp_path: Path) -> None:
    began = time.monotonic()
    assert (
        command(tiny(licence, tmp_path, "--train-iters", 10**6, "--exit-duration-in-mins", 0.01, *save(tmp_path))) == 0
    )
    assert time.monotonic() - began > 0.6, "0.01 minutes are 0.6 s"
    assert saved(tmp_path) == [iterations(tmp_path)[-1]]


def test_finetune_takes_the_weights_only(half: tuple, tmp_path: Path) -> None:
    flags, whole = half
    fresh = tmp_path / "tuned.jsonl"
    assert command([*flags, "--finetune", "--metrics-jsonl", str(fresh), "--save", str(tmp_path / "tuned")]) == 0
    tuned = [json.loads(line) for line in fresh.read_text().splitlines()]
    assert [record["iteration"] for record in tuned] == list(range(1, 9))
    assert tuned[0]["consumed_samples"] == 4
    assert tuned[0]["lm_loss"] < whole[0] - 0.1, "starts from trained weights, on the first samples"
    set_up(parse([*flags, "--finetune"]))
    begun = torch.get_rng_state()
    assert torch.equal(begun, torch.manual_seed(1234).get_state()), "dropout as at iteration 0"


@pytest.mark.parametrize("flag", ["--no-load-optim", "--no-load-rng"])
def test_parts_of_a_checkpoint_can_be_left_out(flag: str, half: tuple, tmp_path: Path) -> None:
    """The first loss after the start needs the weights (and, with dropout, the random state), the next the moments."""
    flags, whole = half
    assert command([*flags, flag]) == 0
    rest = losses(tmp_path)[4:]
    assert len(rest) == 4
    assert (rest[0] == whole[4]) == (flag == "--no-load-optim")
    assert rest[1] != whole[5]
    state = json.loads((tmp_path / "run" / "iter_0000008" / "state.json").read_text())
    assert state["optimizer_steps"] == (4 if flag == "--no-load-optim" else 8), "a count of other moments"


def test_parts_that_were_not_saved_are_named(licence: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    flags = tiny(licence, tmp_path, "--train-iters", 2, "--hidden-dropout", 0.1, *save(tmp_path))
    assert command([*flags, "--no-save-optim", "--no-save-rng", "--exit-interval", "1"]) == 0
    assert command(flags) == 2
    assert re.search(r"iter_0000001 holds no state of the optimizer: --no-load-optim ", capsys.readouterr().err)
    assert command([*flags, "--no-load-optim"]) == 0
    assert re.search(r"WARNING: \S+iter_0000001 holds no state of the random generators", capsys.readouterr().out)


def test_ckpt_step_goes_back(half: tuple, tmp_path: Path) -> None:
    flags, whole = half
    assert command([*flags, "--save-interval", "2"]) == 0
    assert saved(tmp_path) == [4, 6, 8]
    assert command([*flags, "--ckpt-step", "6"]) == 0
    assert losses(tmp_path) == whole
    assert (tmp_path / "run" / "latest_checkpointed_iteration.txt").read_text() == "8\n"


def test_use_checkpoint_args(half: tuple, licence: str, tmp_path: Path) -> None:
    """Only what belongs to the run is given again; the model's shape comes from the checkpoint."""
    flags, whole = half
    own = f"""--use-checkpoint-args --load {tmp_path / "run"} --data-path {licence} --split 90,8,2 --micro-batch-size 2
        --global-batch-size 4 --train-iters 8 --lr 1e-2 --lr-decay-style constant --eval-interval 0 --num-workers 0
        --data-cache-path {tmp_path / "cache"} --log-interval 1 --metrics-jsonl {tmp_path / "metrics.jsonl"}
        --device cpu"""
    assert command(own.split()) == 0
    assert losses(tmp_path) == whole


def test_exit_on_missing_checkpoint(licence: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    flags = tiny(licence, tmp_path, "--train-iters", 2, *save(tmp_path))
    assert command([*flags, "--exit-on-missing-checkpoint"]) == 2
    assert re.search(r"--load \S+run is not a folder", capsys.readouterr().err)
    assert command(flags) == 0
    assert command([*flags, "--exit-on-missing-checkpoint", "--train-iters", "3"]) == 0
    assert iterations(tmp_path) == [1, 2, 3]


def test_save_retain_interval(licence: str, tmp_path: Path) -> None:
    flags = tiny(licence, tmp_path, "--train-iters", 10, *save(tmp_path), "--save-interval", 2)
    assert command([*flags, "--save-retain-interval", "4"]) == 0
    assert saved(tmp_path) == [4, 8, 10]


def test_a_loss_that_is_not_finite_stops(licence: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    flags = tiny(licence, tmp_path, "--train-iters", 6, *save(tmp_path), "--save-interval", 1)
    assert command([*flags, *map(str, INFINITE)]) == 1
    message = capsys.readouterr().err
    assert re.search(r"stopped: loss \S+ and gradient norm \S+ at iteration 2 are not both finite", message)
    assert "samples 4, 5, 6, 7 of rank 0" in message
    assert f"the last good checkpoint is iteration 1 in {tmp_path / 'run'}" in message
    assert iterations(tmp_path) == [1] and saved(tmp_path) == [1]


def test_without_a_checkpoint_the_message_says_so(licence: str, tmp_path: Path) -> None:
    flags = tiny(licence, tmp_path, "--train-iters", 6)
    with pytest.raises(TrainingStopped, match="at iteration 2 .* there is no checkpoint$"):
        train(parse([*flags, *map(str, INFINITE)]))


def test_the_check_can_be_turned_off(licence: str, tmp_path: Path) -> None:
    flags = tiny(licence, tmp_path, "--train-iters", 6, "--eval-interval", 0)
    assert command([*flags, *map(str, INFINITE), "--no-check-for-nan-in-loss-and-grad"]) == 0
    assert iterations(tmp_path) == [1, 2, 3, 4, 5, 6]
    assert records(tmp_path)[-1]["nan_iterations"] == 1


def test_rampup_and_train_samples(licence: str, tmp_path: Path) -> None:
    """From 2 to 6 in steps of 2 over 12 samples: 2 2 2, 4 4, then 6; the last 2 of 34 samples are left out."""
    length = ["--train-samples", 34, "--global-batch-size", 6, "--rampup-batch-size", 2, 2, 12, "--eval-interval", 0]
    assert command(tiny(licence, tmp_path, *length)) == 0
    sizes = [record["global_batch_size"] for record in records(tmp_path)]
    assert sizes == [2, 2, 2, 4, 4, 6, 6, 6]
    assert records(tmp_path)[-1]["consumed_samples"] == sum(sizes)


def test_a_step_takes_the_rate_and_the_decay_of_the_samples_before_it(
    licence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    used: list[tuple[float, float]] = []
    step = DataParallelOptimizer.step

    def noted(self: DataParallelOptimizer, norm: float, rate: float, decay: float, **options: bool) -> StepStats:
        used.append((rate, decay))
        return step(self, norm, rate, decay, **options)

    monkeypatch.setattr(DataParallelOptimizer, "step", noted)
    growing = ["--weight-decay-incr-style", "linear", "--start-weight-decay", 0, "--end-weight-decay", 0.4]
    flags = ["--train-iters", 4, "--lr-decay-style", "linear", *growing, "--eval-interval", 0, "--log-params-norm"]
    assert command(tiny(licence, tmp_path, *flags)) == 0
    rates = [1e-2, 7.5e-3, 5e-3, 2.5e-3, 0]
    assert [rate for rate, _ in used] == pytest.approx(rates[:-1])
    assert [decay for _, decay in used] == pytest.approx([0, 0.1, 0.2, 0.3])
    assert [record["learning_rate"] for record in records(tmp_path)] == pytest.approx(rates[1:])  # the next step's
    assert all(record["params_norm"] > 0 for record in records(tmp_path))


def test_gradient_accumulation_is_one_batch(licence: str, tmp_path: Path) -> None:
    """1 micro-batch of 4, or 4 of 1, per-token or mean of means: the same loss where no token is masked."""
    found = []
    for name, *more in (
        ["whole", "--micro-batch-size", 4],
        ["parts", "--micro-batch-size", 1],
        ["tokens", "--calculate-per-token-loss"],
    ):
        assert command(tiny(licence, tmp_path / name, "--train-iters", 5, "--fp64", *more)) == 0
        found.append(losses(tmp_path / name))
    assert found[1] == pytest.approx(found[0], rel=1e-10) and found[2] == pytest.approx(found[0], rel=1e-10)


def test_per_token_loss_weighs_tokens_not_micro_batches(licence: str, tmp_path: Path) -> None:
    """With masked tokens the two differ, and per-token does not depend on the micro-batches."""
    found = {}
    for name, *more in (
        ["mean-1"],
        ["mean-2"],
        ["token-1", "--calculate-per-token-loss"],
        ["token-2", "--calculate-per-token-loss"],
    ):
        flags = ["--eod-mask-loss", "--train-iters", 12, "--fp64", "--micro-batch-size", name[-1], *more]
        assert command(tiny(licence, tmp_path / name, *flags)) == 0
        found[name] = losses(tmp_path / name)
    assert found["token-1"] == pytest.approx(found["token-2"], rel=1e-10)
    assert found["mean-1"] != pytest.approx(found["mean-2"], rel=1e-6)


@pytest.mark.parametrize("residual, more", [("plain", []), ("hyper", ["--fp32-residual-connection"])])
def test_bf16_learns_what_fp32_learns(residual: str, more: list[str], licence: str, tmp_path: Path) -> None:
    found = []
    for name, precision in (("fp32", []), ("bf16", ["--bf16", *more])):
        flags = tiny(licence, tmp_path / name, "--train-iters", 30, "--residual-connection", residual, *precision)
        assert command(flags) == 0
        found.append(losses(tmp_path / name))
    fp32, bf16 = found
    assert bf16 != fp32
    assert bf16[-1] < bf16[0] - 1.5
    assert bf16[:10] == pytest.approx(fp32[:10], abs=0.03)


def test_fp32_residual_connection_changes_bf16(licence: str, tmp_path: Path) -> None:
    for name, more in (("narrow", []), ("wide", ["--fp32-residual-connection"])):
        assert command(tiny(licence, tmp_path / name, "--train-iters", 3, "--bf16", *more)) == 0
    assert losses(tmp_path / "narrow") != losses(tmp_path / "wide")


@pytest.mark.parametrize(("iterations", "validated"), [(10, [4, 8, 10]), (8, [4, 8])])
def test_validation_and_test_at_their_times(
    iterations: int, validated: list[int], licence: str, tmp_path: Path
) -> None:
    assert command(tiny(licence, tmp_path, "--train-iters", iterations, "--eval-interval", 4)) == 0
    found = untimed(tmp_path)
    assert [r["iteration"] for r in found if "lm_loss_validation" in r] == validated
    assert [r["iteration"] for r in found if "lm_loss_test" in r] == [iterations]
    assert torch.is_grad_enabled()


def test_training_goes_on_in_training_mode_after_a_validation(licence: str, tmp_path: Path) -> None:
    """With dropout, which a validation turns off, the same losses with and without it."""
    found = []
    for interval in (0, 1):
        folder = tmp_path / str(interval)
        folder.mkdir()
        flags = ["--train-iters", 3, "--hidden-dropout", 0.5, "--eval-interval", interval, "--eval-iters", 1]
        assert command(tiny(licence, folder, *flags)) == 0
        found.append(losses(folder))
    assert found[0] == found[1] and len(found[0]) == 3


def test_attention_backends_agree(licence: str, tmp_path: Path) -> None:
    found = {}
    for backend in ("auto", "flash", "unfused"):
        assert command(tiny(licence, tmp_path / backend, "--train-iters", 4, "--attention-backend", backend)) == 0
        found[backend] = losses(tmp_path / backend)
    for backend in ("flash", "unfused"):
        assert found[backend] == pytest.approx(found["auto"], rel=1e-4)


def test_kernels_that_a_cpu_does_not_have(licence: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for flags, message in (
        (["--attention-backend", "fused"], "--attention-backend fused is cuDNN's and needs --device cuda, not cpu"),
        (
            ["--attention-backend", "flash", "--attention-dropout", 0.1],
            "--attention-backend flash has no kernel on cpu for heads of 8 channels in float32, --attention-dropout",
        ),
        (["--fused-residual-backend", "triton"], "--fused-residual-backend triton needs"),
    ):
        assert command(tiny(licence, tmp_path, "--train-iters", 4, "--residual-connection", "hyper", *flags)) != 0
        assert message in capfd.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("method", ["plain", "hyper", "frac", "mhc"])
def test_compiled_layers_learn_the_same(licence: str, tmp_path: Path, method: str) -> None:
    found = []
    for flags in ([], ["--compile"]):
        folder = tmp_path / "-".join(["run", *flags])
        assert command(tiny(licence, folder, "--train-iters", 4, "--residual-connection", method, *flags)) == 0
        found.append(losses(folder))
    assert found[1] == pytest.approx(found[0], rel=1e-4)
