"""Several processes that are told to stop, or that torchrun starts again."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from processes import ROOT, TINY, Processes

SHARED = f"{TINY} --tensor-model-parallel-size 2 --train-iters 12 --save-interval 4 --save {{0}}/run --load {{0}}/run"


def slows_down(rank: int) -> None:
    """Time for a signal to come between two iterations."""
    import time

    from megatron_hc import train

    real = train.train_step

    def step(run: Any, loader: Any) -> None:
        time.sleep(0.05)
        real(run, loader)

    train.train_step = step  # type: ignore[assignment]


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["lm_loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_signal_to_one_rank_stops_all_at_the_same_step(tmp_path: Path) -> None:
    argv = f"{SHARED.format(tmp_path)} --exit-signal-handler --metrics-jsonl {tmp_path}/metrics.jsonl"
    with Processes(2, argv, tmp_path / "first", fault=slows_down) as run:
        run.wait_for("] iteration        2/")
        os.kill(run.processes[1].pid, signal.SIGUSR1)
        assert run.wait() == [85, 85], run.output()
        assert "SIGUSR1: saving and exiting the program at iteration" in run.output()
    stopped = len(losses(tmp_path))
    assert 2 <= stopped < 12 and (tmp_path / "run" / f"iter_{stopped:07d}").is_dir()
    assert not (tmp_path / "run" / "lock.json").exists()
    with Processes(2, argv, tmp_path / "second") as run:
        assert run.wait() == [0, 0], run.output()
    whole = tmp_path / "whole"
    with Processes(2, f"{SHARED.format(whole)} --metrics-jsonl {whole}/metrics.jsonl", whole) as run:
        assert run.wait() == [0, 0], run.output()
    assert losses(tmp_path) == losses(whole)


DIES_ONCE = """
import os, signal, sys
sys.path.insert(0, {root!r})
import pretrain_gpt
from megatron_hc import train
real = train.train_step
def step(run, loader):
    if run.progress.iteration == 6 and os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        os.kill(os.getpid(), signal.SIGKILL)
    real(run, loader)
train.train_step = step
sys.exit(pretrain_gpt.main(sys.argv[1:]))
"""


def test_torchrun_starts_a_run_again_from_its_last_checkpoint(tmp_path: Path) -> None:
    script = tmp_path / "dies_once.py"
    script.write_text(DIES_ONCE.format(root=str(ROOT)))
    argv = f"{SHARED.format(tmp_path)} --metrics-jsonl {tmp_path}/metrics.jsonl".split()
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    run = subprocess.run(
        [*command, "--max-restarts", "1", str(script), *argv],
        capture_output=True,
        text=True,
        timeout=150,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert "2 processes by torchrun, meeting at " in run.stdout and "started again 1 times" in run.stdout
    assert f"loaded {tmp_path / 'run' / 'iter_0000004'}" in run.stdout
    assert "is stale (its process has ended)" in run.stderr + run.stdout or "is stale" not in run.stderr
    whole = tmp_path / "whole"
    with Processes(2, f"{SHARED.format(whole)} --metrics-jsonl {whole}/metrics.jsonl", whole) as undisturbed:
        assert undisturbed.wait() == [0, 0], undisturbed.output()
    assert losses(tmp_path) == losses(whole)


SLOW_RANK, SLEEP_S = 3, 0.05


def one_rank_is_slow(rank: int) -> None:
    """Every layer of one rank takes longer by ``SLEEP_S``."""
    import time

    from megatron_hc.model.layer import TransformerLayer

    if rank != SLOW_RANK:
        return
    real = TransformerLayer.forward

    def forward(self: TransformerLayer, *args: Any, **kwargs: Any) -> Any:
        time.sleep(SLEEP_S)
        return real(self, *args, **kwargs)

    TransformerLayer.forward = forward  # type: ignore[method-assign]


def test_log_straggler_names_the_slow_rank_of_its_stage_only(tmp_path: Path) -> None:
    argv = f"{TINY} --pipeline-model-parallel-size 2 --train-iters 4 --log-straggler"
    with Processes(4, argv, tmp_path, fault=one_rank_is_slow) as run:
        assert run.wait() == [0, 0, 0, 0], run.output()
    reports = re.findall(r"stage 0: rank (\d) ([0-9.]+) ms .* stage 1: rank (\d) ([0-9.]+) ms", run.output())
    assert len(reports) == 4, run.output()
    # Two micro-batches of one layer an iteration. The other stage waits for the slow rank, and must not look slow.
    least = 2 * SLEEP_S * 1000
    assert all(int(slowest) == SLOW_RANK and float(ms) >= least for _, _, slowest, ms in reports), reports
    assert min(float(ms) for _, ms, _, _ in reports) < least, reports
