"""A run killed at any moment and resumed gives, bit for bit, the numbers of one that was never killed."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch
from train_runs import ROOT, command, losses, start, tiny, untimed

STEPS = 24
CASES = {
    "dropout": "--hidden-dropout 0.2 --attention-dropout 0.1 --residual-connection hyper --num-workers 0",
    "worker": "--residual-connection hyper --num-workers 1 --rampup-batch-size 2 2 30 --train-samples 84",
    "bf16": "--bf16 --residual-connection plain --calculate-per-token-loss --num-workers 0",
}


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def flags(licence: str, folder: Path, case: str) -> list[str]:
    length = [] if "--train-samples" in CASES[case] else ["--train-iters", STEPS]
    return tiny(licence, folder, *CASES[case].split(), *length, "--save", folder / "run", "--load", folder / "run")


def wait_for_saving(process: BaseProcess, run: Path) -> None:
    """Until a checkpoint is being written (not what an earlier kill left of one)."""
    left = {path.stat().st_mtime_ns for path in run.glob("*.tmp")}
    while process.is_alive():
        with contextlib.suppress(FileNotFoundError):
            if {path.stat().st_mtime_ns for path in run.glob("*.tmp")} - left:
                return
        time.sleep(0.0005)


def kill_until_done(argv: list[str], folder: Path, waits: list[Callable[[BaseProcess], None]]) -> int:
    """Start the run, wait, kill, and so on; then let it end. Returns how often it was alive to be killed."""
    kills = 0
    for wait in [*waits, None]:
        process = start(argv, folder / "log.txt")
        if wait is None:
            process.join(120)
        else:
            wait(process)
            if process.is_alive():
                assert process.pid is not None
                os.kill(process.pid, signal.SIGKILL)
                kills += 1
            process.join(60)
        assert process.exitcode in (0, -signal.SIGKILL), (folder / "log.txt").read_text()
    assert process.exitcode == 0
    return kills


def delays(count: int, seconds: float, seed: int) -> list[Callable[[BaseProcess], None]]:
    generator = random.Random(seed)

    def wait(process: BaseProcess) -> None:
        process.join(generator.uniform(0, seconds))

    return [wait] * count


def check_kills(licence: str, tmp_path: Path, case: str, interval: int, num_random: int, num_saving: int) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    saves = ["--save-interval", str(interval)]
    began = time.monotonic()
    assert kill_until_done([*flags(licence, whole, case), *saves], tmp_path, []) == 0
    length = time.monotonic() - began
    waits = delays(num_random, length, num_random)
    # First: a late random moment may find the run at its end, with nothing left to kill.
    waits[:0] = [lambda process: wait_for_saving(process, killed / "run")] * num_saving
    assert kill_until_done([*flags(licence, killed, case), *saves], tmp_path, waits) >= num_saving
    assert untimed(killed) == untimed(whole)
    numbers = [record["iteration"] for record in untimed(killed) if "lm_loss" in record]
    assert numbers == list(range(1, len(numbers) + 1)) and len(numbers) >= STEPS
    assert not list((killed / "run").glob("*.tmp")), "the last save clears away what killed saves left"


@pytest.mark.parametrize("case", CASES)
def test_killed_at_random_moments_and_while_saving(case: str, licence: str, tmp_path: Path) -> None:
    check_kills(licence, tmp_path, case, interval=3, num_random=2, num_saving=2)


@pytest.mark.slow
@pytest.mark.parametrize("interval", [1, 7])
@pytest.mark.parametrize("case", CASES)
def test_killed_many_times(case: str, interval: int, licence: str, tmp_path: Path) -> None:
    check_kills(licence, tmp_path, case, interval, num_random=20, num_saving=10)


def test_the_command_itself_is_killed_and_resumes(licence: str, tmp_path: Path) -> None:
    """pretrain_gpt.py as a child process, killed with its reader of data at work; the reader ends too."""
    argv = [*flags(licence, tmp_path / "killed", "worker"), "--save-interval", "5"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    line = [sys.executable, "pretrain_gpt.py", *argv]
    child = subprocess.Popen(line, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)
    metrics = tmp_path / "killed" / "metrics.jsonl"
    while not metrics.exists() or metrics.read_text().count("\n") < 12:
        assert child.poll() is None
        time.sleep(0.005)
    child.kill()
    assert child.wait() == -signal.SIGKILL
    done = subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "loaded" in done.stdout
    assert command(flags(licence, tmp_path / "whole", "worker")) == 0
    assert untimed(tmp_path / "killed") == untimed(tmp_path / "whole")


def test_a_run_that_is_done_stays_as_it_is(licence: str, tmp_path: Path) -> None:
    """Started again it validates again, trains nothing, and writes every record once."""
    argv = tiny(licence, tmp_path, "--train-iters", 6, "--save", tmp_path / "run", "--load", tmp_path / "run")
    assert command(argv) == 0
    before = untimed(tmp_path)
    assert sum("lm_loss_test" in record for record in before) == 1
    assert command(argv) == 0
    assert untimed(tmp_path) == before


def test_a_smaller_batch_that_would_run_out_of_data_is_refused(
    licence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its --train-iters steps have fewer samples than the checkpoint has used up and the rest needs."""

    def flags(*length: object) -> list[str]:
        argv = tiny(licence, tmp_path, "--save", tmp_path / "run", "--load", tmp_path / "run", "--eval-interval", 0)
        place = argv.index("--data-path")  # --data-path, --data-cache-path and --split
        return [*argv[:place], *argv[place + 6 :], "--mock-data", *map(str, length)]

    assert command(flags("--train-iters", 3, "--global-batch-size", 8)) == 0
    capsys.readouterr()
    assert command(flags("--train-iters", 8)) == 2
    assert "consumed 24 in 3 iterations and 5 are left: give the checkpoint's" in capsys.readouterr().err
    assert len(losses(tmp_path)) == 3
    assert command(flags("--train-samples", 44)) == 0
    assert len(losses(tmp_path)) == 8


def test_a_longer_run_goes_on_from_the_end_of_a_short_one(licence: str, tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for folder, lengths in ((whole, [12]), (parts, [5, 8, 12])):
        for length in lengths:
            save = ["--save", folder / "run", "--load", folder / "run", "--eval-interval", 0]
            assert command(tiny(licence, folder, "--train-iters", length, *save)) == 0
    assert len(losses(whole)) == 12
    assert losses(parts) == losses(whole)
