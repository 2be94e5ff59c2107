"""What a run does about signals, spikes, damaged checkpoints, full disks and other jobs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from train_runs import ROOT, command, losses, records, tiny, untimed

from megatron_hc import checkpoint, train
from megatron_hc.checkpoint_folder import TRACKER, latest_iteration
from megatron_hc.save_lock import SaveLock

Flags = Callable[..., list[str]]


@pytest.fixture
def flags(licence: str, tmp_path: Path) -> Flags:
    def make(*extra: object, folder: Path = tmp_path) -> list[str]:
        save = ["--save", folder / "run", "--load", folder / "run", "--eval-interval", 0]
        return tiny(licence, folder, "--train-iters", 8, "--save-interval", 2, *save, *extra)

    return make


@pytest.fixture
def whole(flags: Flags, tmp_path: Path) -> list[dict[str, Any]]:
    """Records of a run that nothing disturbs."""
    assert command(flags(folder=tmp_path / "whole")) == 0
    return untimed(tmp_path / "whole")


def at_iteration(monkeypatch: pytest.MonkeyPatch, iteration: int, action: Callable[[], object]) -> None:
    """Do something before an iteration is trained."""
    real = train.train_step

    def step(run: train.Run, loader: object) -> None:
        if run.progress.iteration + 1 == iteration:
            action()
        real(run, loader)  # type: ignore[arg-type]

    monkeypatch.setattr(train, "train_step", step)


# ---- signals ----


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_saves_and_ends_with_85(
    number: int, flags: Flags, whole: list, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    before = signal.getsignal(number)
    at_iteration(monkeypatch, 3, lambda: os.kill(os.getpid(), number))
    assert command(flags("--exit-signal-handler")) == 85
    assert f"{signal.Signals(number).name}: saving and exiting the program at iteration 3" in capsys.readouterr().out
    assert latest_iteration(tmp_path / "run") == 3 and signal.getsignal(number) is before
    monkeypatch.undo()
    assert command(flags("--exit-signal-handler")) == 0
    assert untimed(tmp_path) == whole


def test_ctrl_c_ends_with_a_sentence(flags: Flags, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # tests in the background of a shell ignore it
    at_iteration(monkeypatch, 3, lambda: os.kill(os.getpid(), signal.SIGINT))
    try:
        assert command(flags()) == 130
    finally:
        signal.signal(signal.SIGINT, before)
    assert capsys.readouterr().err.splitlines()[-1] == "pretrain_gpt.py: interrupted at iteration 3"


def test_a_signal_in_the_last_iteration_is_too_late(flags: Flags, monkeypatch: pytest.MonkeyPatch) -> None:
    at_iteration(monkeypatch, 8, lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert command(flags("--exit-signal-handler")) == 0, "a finished run must not be started again"


def test_only_the_signals_asked_for(flags: Flags, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    try:
        at_iteration(monkeypatch, 3, lambda: os.kill(os.getpid(), signal.SIGUSR1))
        assert command(flags("--exit-signal-handler", "--exit-signal", "SIGUSR2")) == 0
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_a_job_whose_lock_another_has_taken_over_writes_nothing_more(
    flags: Flags, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    lock = tmp_path / "run" / "lock.json"
    theirs = json.dumps({"host": "n7", "pid": 12, "time": "later"})
    at_iteration(monkeypatch, 3, lambda: lock.write_text(theirs))
    assert command(flags("--save-interval", 2)) == 2
    error = capsys.readouterr().err
    assert "process 12 on n7, started later has taken lock.json over" in error and "Traceback" not in error
    assert latest_iteration(tmp_path / "run") == 2 and lock.read_text() == theirs
    assert sorted(path.name for path in (tmp_path / "run").glob("iter_*")) == ["iter_0000002"]


# ---- spikes and iterations to skip ----


def test_spikes_are_named_with_their_samples(flags: Flags, tmp_path: Path, capsys: Any) -> None:
    argv = ["--check-for-spiky-loss", "--spiky-loss-factor", 1.01, "--train-iters", 30, "--lr", 1.0, "--clip-grad", 0]
    assert command(flags(*argv, "--exit-interval", 12)) == 0
    assert command(flags(*argv)) == 0  # resumed, it knows the iterations before
    lines = [line for line in capsys.readouterr().out.splitlines() if "WARNING: spike" in line]
    found, past = [], []
    for record in records(tmp_path):
        if len(past) >= 10 and record["grad_norm"] > 1.01 * max(past):
            found.append(record["iteration"])
        else:
            past.append(record["grad_norm"])
    assert any(12 < iteration < 22 for iteration in found), "the learning rate is meant to be too large"
    named = [line for line in lines if "gradient norm" in line]
    assert [int(line.split("iteration ")[1].split(":")[0]) for line in named] == found
    assert f"samples {4 * (found[0] - 1)} .. {4 * found[0] - 1}." in named[0]


def test_skipped_iterations_change_nothing_but_the_data_position(flags: Flags, tmp_path: Path, whole: list) -> None:
    assert command(flags("--iterations-to-skip", 3, 4)) == 0
    found = records(tmp_path)
    assert [record["iteration"] for record in found] == [1, 2, 5, 6, 7, 8]
    assert [record["skipped_iterations"] for record in found] == [0, 0, 2, 0, 0, 0]
    assert [record["consumed_samples"] for record in found] == [4, 8, 20, 24, 28, 32]
    assert losses(tmp_path)[:2] == [record["lm_loss"] for record in whole[:2]]
    assert losses(tmp_path)[2] != whole[4]["lm_loss"], "two steps of the optimizer are missing"
    # The weights at iteration 5 are those after 2: their loss on its samples.
    state = json.loads((tmp_path / "run" / "iter_0000008" / "state.json").read_text())
    assert state["optimizer_steps"] == 6
    for record in found:
        assert record["learning_rate"] == whole[record["iteration"] - 1]["learning_rate"]


def test_the_last_line_of_a_run_whose_batch_has_grown(licence: str, tmp_path: Path, capsys: Any) -> None:
    """Its iterations are those done plus those left, not those of a run with today's batch from the start."""
    saved = ["--save", tmp_path / "run", "--load", tmp_path / "run", "--eval-interval", 0, "--log-interval", 3]
    argv = tiny(licence, tmp_path, "--train-samples", 32, *saved)
    assert command([*argv, "--exit-interval", "2"]) == 0
    assert command([*argv, "--global-batch-size", "8"]) == 0
    found = [(line["iteration"], line["consumed_samples"], line["eta_seconds"] > 0) for line in records(tmp_path)]
    assert found == [(3, 16, True), (5, 32, False)]
    assert " iteration        5/       5 |" in capsys.readouterr().out


def test_a_job_started_again_goes_on_with_what_it_saved(
    flags: Flags, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """--finetune and --load of another folder are for its first attempt; for another job's, its own."""
    assert command(flags("--exit-interval", 2)) == 0

    def tune(name: str, job: str, attempt: int, *extra: object) -> str:
        for variable, value in (("RUN_ID", job), ("RESTART_COUNT", str(attempt))):
            monkeypatch.setenv(f"TORCHELASTIC_{variable}", value)
        saved = ["--save", tmp_path / name, "--metrics-jsonl", tmp_path / name / "metrics.jsonl"]
        assert command(flags("--finetune", *saved, *extra)) == 0
        return capsys.readouterr().out

    tune("whole", "one", 0)
    tune("tuned", "two", 0, "--exit-interval", 4)
    line = f"started again: going on from {tmp_path / 'tuned' / 'iter_0000004'}, not from "
    assert line in tune("tuned", "two", 1, "--exit-interval", 6)
    assert line.replace("iter_0000004", "iter_0000006") in tune("tuned", "two", 2)
    assert untimed(tmp_path / "tuned") == untimed(tmp_path / "whole")
    for job, attempt, extra in (("two", 0, ()), ("three", 1, ()), ("three", 2, ("--no-load-rng",))):
        assert "started again" not in tune("tuned", job, attempt, *extra)


@pytest.mark.parametrize("rest", [("--no-load-optim", "--no-save-rng", "--no-load-rng"), ("--finetune",)])
def test_a_job_started_again_does_not_ask_for_what_it_does_not_save(
    rest: tuple[str, ...], flags: Flags, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    assert command(flags("--exit-interval", 2)) == 0
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "one")
    for attempt in range(2):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(attempt))
        assert "moments begin at zero" not in capsys.readouterr().out
        parts = ["--save", tmp_path / "other", "--no-save-optim", *rest]
        assert command(flags(*parts, "--exit-interval", 3)) == 0
    again = capsys.readouterr().out
    assert "WARNING: --no-save-optim: the optimizer's moments begin at zero" in again
    assert f"started again: going on from {tmp_path / 'other' / 'iter_0000003'}, not from " in again
    assert f"loaded {tmp_path / 'other' / 'iter_0000003'}" in again


# ---- damaged checkpoints ----


def flip(file: Path, position: int) -> None:
    content = bytearray(file.read_bytes())
    content[position] ^= 1
    file.write_bytes(content)


def test_a_flipped_bit_is_found_and_the_checkpoint_before_used(
    flags: Flags, whole: list, tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: Any
) -> None:
    assert command(flags("--exit-interval", 6)) == 0
    tensors = tmp_path / "run" / "iter_0000006" / "model_00000.safetensors"
    flip(tensors, tensors.stat().st_size - 5)
    assert command(flags("--verify-checkpoint", "--ckpt-step", 6)) == 2
    assert "iter_0000006/model_00000.safetensors is not what was written" in capsys.readouterr().err
    assert command(flags("--verify-checkpoint")) == 0
    assert "NOT USING THIS CHECKPOINT, trying the one before" in caplog.text
    assert f"loaded {tmp_path / 'run' / 'iter_0000004'}" in capsys.readouterr().out
    assert untimed(tmp_path) == whole


def test_damage_of_every_checkpoint_is_refused(flags: Flags, tmp_path: Path, capsys: Any) -> None:
    assert command(flags("--exit-interval", 4)) == 0
    for file in (tmp_path / "run").glob("iter_*/optimizer_00000.safetensors"):
        flip(file, file.stat().st_size - 5)
    assert command(flags("--verify-checkpoint")) == 2
    error = capsys.readouterr().err
    assert "iter_0000004" in error and "iter_0000002" in error and "no checkpoint before it is whole" in error


def test_a_run_that_begins_says_so(flags: Flags, tmp_path: Path, capsys: Any) -> None:
    assert command(flags("--train-iters", 1)) == 0
    assert f"--load {tmp_path / 'run'} holds no checkpoint yet: the run begins anew" in capsys.readouterr().out
    assert command(flags("--train-iters", 1)) == 0
    again = capsys.readouterr().out
    assert "anew" not in again and "WARNING" not in again
    assert command([*flags("--train-iters", 1), "--finetune"]) == 0
    told = f"WARNING: --save {tmp_path / 'run'} holds a checkpoint of iteration 1, and this run begins at 0"
    assert told in capsys.readouterr().out


@pytest.mark.parametrize("name", ["state.json", "arguments.json", "checkpoint.json"])
def test_damaged_json_is_found_without_being_asked_for(name: str, flags: Flags, whole: list, tmp_path: Path) -> None:
    assert command(flags("--exit-interval", 4)) == 0
    file = tmp_path / "run" / "iter_0000004" / name
    text = file.read_text()
    digit = max(index for index, letter in enumerate(text) if letter.isdecimal())
    flip(file, digit)  # the number next to it: still JSON
    assert command(flags()) == 0
    assert untimed(tmp_path) == whole


# ---- disks ----


FULL = """
import resource, sys
sys.path.insert(0, {root!r})
resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))  # more than a line of metrics, less than the tensors
import pretrain_gpt
sys.exit(pretrain_gpt.main(sys.argv[1:]))
"""


def test_a_disk_that_is_full_does_not_end_the_run(flags: Flags, whole: list, tmp_path: Path) -> None:
    assert command(flags("--exit-interval", 2)) == 0
    run = subprocess.run(
        [sys.executable, "-c", FULL.format(root=str(ROOT)), *flags()],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        timeout=120,
    )
    assert run.returncode == 74, run.stdout + run.stderr
    for iteration in (4, 6, 8):
        assert f"WARNING: the save of iteration {iteration} failed: " in run.stdout
    assert run.stdout.count("the newest checkpoint is iteration 2") == 3
    assert "WARNING: not saved: iterations 4, 6, 8; exit code 74" in run.stdout
    assert untimed(tmp_path) == whole, "it trained to the end"
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["iter_0000002", TRACKER]


def test_a_trace_that_cannot_be_written_does_not_end_the_run(
    flags: Flags, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    at_iteration(monkeypatch, 2, lambda: (tmp_path / "trace").write_text("in its place"))
    argv = ["--profile", "--use-pytorch-profiler", "--profile-step-start", 1, "--profile-step-end", 2]
    assert command(flags("--train-iters", 3, *argv, "--profile-dir", tmp_path / "trace")) == 0
    assert f"{tmp_path / 'trace' / 'rank_0.json'} cannot be written" in caplog.text and len(losses(tmp_path)) == 3


# ---- other jobs, and watchers ----


def test_a_second_job_on_the_same_folder_is_refused(flags: Flags, tmp_path: Path) -> None:
    with SaveLock(tmp_path / "run"):
        second = subprocess.run(
            [sys.executable, str(ROOT / "pretrain_gpt.py"), *flags()],
            capture_output=True,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            timeout=120,
        )
    assert second.returncode == 2 and second.stdout == ""
    assert f"--save {tmp_path / 'run'} is being written by process {os.getpid()} on " in second.stderr
    assert not (tmp_path / "metrics.jsonl").exists()
    assert command(flags()) == 0


def test_files_for_watchers(flags: Flags, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    files = ["--heartbeat-file", tmp_path / "heartbeat.json", "--prometheus-file", tmp_path / "run.prom"]
    real, states = checkpoint.Saver.wait, list[str]()

    def heart() -> dict[str, Any]:
        return json.loads((tmp_path / "heartbeat.json").read_text())

    def wait(saver: checkpoint.Saver) -> None:
        states.append(heart()["state"])
        real(saver)

    monkeypatch.setattr(checkpoint.Saver, "wait", wait)
    assert command(flags(*files, "--log-straggler", "--async-save")) == 0
    assert states == 5 * ["saving"], "a run has not ended before its last checkpoint is there"
    assert heart()["iteration"] == 8 and heart()["state"] == "ended"
    assert "\nmegatron_hc_iteration 8.0\n" in (tmp_path / "run.prom").read_text()
    said = capsys.readouterr().out
    assert said.count("slowest rank over 1 iterations | stage 0: rank 0 ") == 8 and "ranks by host: " in said
    assert command(flags("--heartbeat-file", tmp_path)) == 2
    assert f"--heartbeat-file {tmp_path} is a folder" in capsys.readouterr().err
