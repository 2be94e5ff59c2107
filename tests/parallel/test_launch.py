"""Errors of several processes are for people: the right one, once, and every process ends."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from processes import ROOT, TINY, Processes

from megatron_hc import launch, run, train
from megatron_hc.config import ParallelConfig
from megatron_hc.launch import describe_frames
from megatron_hc.mesh import Mesh
from megatron_hc.place import Place, explain, first_host, place_of
from megatron_hc.watchdog import Watchdog

# ---- the environment ----

COMPLETE = {"WORLD_SIZE": "4", "RANK": "3", "LOCAL_RANK": "1", "MASTER_ADDR": "host", "MASTER_PORT": "29500"}


def test_the_place_in_the_environment() -> None:
    assert place_of({}) == Place(0, 1, None)
    assert place_of({"WORLD_SIZE": "1"}) == Place(0, 1, None, "the environment")
    assert place_of({"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0"}) == Place(0, 1, 0, "the environment")
    assert place_of(COMPLETE) == Place(3, 4, 1, "the environment", ("host", 29500))
    assert place_of(COMPLETE | {"LOCAL_RANK": ""}) == Place(3, 4, None, "the environment", ("host", 29500))
    assert place_of(COMPLETE | {"TORCHELASTIC_RUN_ID": "none"}).launcher == "torchrun"


@pytest.mark.parametrize("kind", ["OMPI_COMM_WORLD_", "PMI_"])
def test_processes_of_mpirun_do_not_train_alone(kind: str) -> None:
    mpirun = {f"{kind}SIZE": "4", f"{kind}RANK": "3"}
    with pytest.raises(ValueError, match=rf"^{kind}SIZE=4 says .* started 4 processes, .*: set RANK to {kind}RANK and"):
        place_of(mpirun)
    assert place_of(mpirun | COMPLETE) == place_of(COMPLETE)
    assert place_of({f"{kind}SIZE": "1", f"{kind}RANK": "0"}) == Place(0, 1, None)


SLURM = {
    **{"SLURM_JOB_ID": "77", "SLURM_JOB_NODELIST": "n[03-05]", "SLURM_NTASKS": "6", "SLURM_PROCID": "5"},
    **{"SLURM_STEP_ID": "2", "SLURM_STEP_NUM_TASKS": "6", "SLURM_LOCALID": "1", "SLURM_STEP_NODELIST": "n[03-05]"},
}
"""Of task 5 of `srun --nodes 3 --ntasks-per-node 2`, as Slurm 22.05 sets them."""


def test_the_place_in_a_step_of_slurm() -> None:
    place = place_of(SLURM)
    assert place == Place(5, 6, 1, "Slurm", ("n03", 10000 + 77 * 31 + 2))
    assert place.init_method == "tcp://n03:12389"
    assert explain(place, SLURM) == "6 processes by Slurm, meeting at n03:12389, Slurm job 77 on n[03-05]"
    assert place_of(SLURM | {"MASTER_ADDR": "fe80::1", "MASTER_PORT": "29400"}).init_method == "tcp://[fe80::1]:29400"
    assert place_of(SLURM | {"WORLD_SIZE": "6"}) == place, "what many batch scripts export"
    assert place_of(SLURM | COMPLETE | {"RANK": "5", "WORLD_SIZE": "6"}).launcher == "the environment"
    restarted = explain(place, SLURM | {"SLURM_RESTART_COUNT": "2"})
    assert restarted.endswith("Slurm job 77 on n[03-05], started again 2 times")


def test_what_is_no_step_of_slurm() -> None:
    torchrun = SLURM | COMPLETE | {"TORCHELASTIC_RUN_ID": "77", "RANK": "0"}
    assert place_of(torchrun) == Place(0, 4, 1, "torchrun", ("host", 29500)), "torchrun by srun, one task per node"
    batch = {name: text for name, text in SLURM.items() if "STEP" not in name} | {"SLURM_PROCID": "0"}
    assert place_of(batch) == Place(0, 1, None)
    assert "has room for 6" in explain(place_of(batch), batch)
    assert place_of(SLURM | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}) == Place(0, 1, None)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"WORLD_SIZE": "8"}, r"WORLD_SIZE=8 is set, but srun has started 6 tasks \(SLURM_STEP_NUM_TASKS\): unset"),
        (
            COMPLETE,
            r"WORLD_SIZE=4 and RANK=3 are set, but srun says task 5 of 6 \(SLURM_PROCID, ",
        ),
        (COMPLETE | {"WORLD_SIZE": "12", "RANK": "9"}, "WORLD_SIZE=12 and RANK=9 are set, but srun says task 5 of 6"),
        ({"SLURM_STEP_NODELIST": ""}, "SLURM_STEP_NODELIST names no node: set MASTER_ADDR"),
        ({"SLURM_PROCID": "x"}, "SLURM_PROCID=x must be a whole number"),
    ],
)
def test_slurm_and_other_variables_that_contradict_each_other(change: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        place_of(SLURM | change)


def test_the_first_host_of_a_list() -> None:
    for text, host in {
        **{"n1": "n1", "n[3-5]": "n3", "n[03,07-9],m": "n03", "a,b": "a", "127.0.0.[1-3]": "127.0.0.1"},
        **{"r[1-2]n[05-06].x": "r1n05.x", "": ""},
    }.items():
        assert first_host(text) == host


@pytest.mark.parametrize(
    "change, message",
    [
        ({"RANK": ""}, "WORLD_SIZE=4 is set without RANK:"),
        ({"RANK": "", "MASTER_ADDR": "", "MASTER_PORT": ""}, "without RANK, MASTER_ADDR, MASTER_PORT: .* torchrun"),
        ({"MASTER_ADDR": ""}, "WORLD_SIZE=4 is set without MASTER_ADDR"),
        ({"WORLD_SIZE": ""}, "RANK=3 is set without WORLD_SIZE"),
        ({"MASTER_PORT": "0"}, "MASTER_PORT=0 is no port"),
        ({"RANK": "4"}, "RANK=4 must be below WORLD_SIZE=4"),
        ({"WORLD_SIZE": "1"}, "RANK=3 must be below WORLD_SIZE=1"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE=0 must be"),
        ({"RANK": "-1"}, "RANK=-1 must be a whole number"),
        ({"WORLD_SIZE": "four"}, "WORLD_SIZE=four must be a whole number"),
    ],
)
def test_a_contradictory_environment_is_refused(change: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        place_of(COMPLETE | change)


# ---- before there are process groups ----


def test_torchrun_shows_one_sentence_for_a_layout_that_cannot_work() -> None:
    argv = f"{TINY} --train-iters 1 --tensor-model-parallel-size 3".split()
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "3", "--standalone"]
    found = subprocess.run(
        [*command, str(ROOT / "pretrain_gpt.py"), *argv],
        capture_output=True,
        text=True,
        timeout=60,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    sentence = "--tensor-model-parallel-size (3) must divide --num-attention-heads (4)"
    assert found.returncode != 0 and found.stdout == ""
    lines = [line for line in found.stderr.splitlines() if sentence in line]
    # Ours, and torchrun's summary in place of "<N/A>".
    assert [line.strip().removeprefix("traceback : ") for line in lines] == [f"pretrain_gpt.py: error: {sentence}"] * 2
    assert lines[0].startswith("pretrain_gpt.py")
    # -15: torchrun's SIGTERM came while that process was still loading Python.
    assert set(re.findall(r"exitcode +: (-?\d+)", found.stderr)) <= {"2", "-15"}
    assert re.search(r"Root Cause.*exitcode +: 2 ", found.stderr, re.DOTALL)


def test_an_error_of_one_rank_alone_is_shown(tmp_path: Path) -> None:
    with Processes(2, f"{TINY} --train-iters 1", tmp_path, fault=lacks_a_device) as run:
        run.processes[1].join(30)
        assert run.processes[1].exitcode == 2
        assert run.output() == "[rank 1] pretrain_gpt.py: error: --device: rank 1 has none\n"


def lacks_a_device(rank: int) -> None:
    launch.PATIENCE_S = 0.5  # type: ignore[misc]

    def build_mesh(config: object) -> None:
        if rank == 1:
            raise ValueError("--device: rank 1 has none")
        time.sleep(60)

    run.build_mesh = build_mesh  # type: ignore[assignment]


# ---- in a run ----


def at_second_step(action: Callable[[], None], failing_rank: int = 1) -> Callable[[int], None]:
    def fault(rank: int) -> None:
        real = train.weighted

        def weighted(*arguments: object) -> object:
            nonlocal calls
            calls += 1
            if calls == 2 and rank == failing_rank:
                action()
            return real(*arguments)  # type: ignore[arg-type]

        calls = 0
        train.weighted = weighted  # type: ignore[assignment]

    return fault


def bug(rank: int) -> None:
    def fail() -> None:
        raise ZeroDivisionError("a bug of this rank")

    at_second_step(fail)(rank)


def bad_data(rank: int) -> None:
    def fail() -> None:
        raise ValueError("tokens.bin: token 99 is not in the vocabulary")

    at_second_step(fail)(rank)


def dies(rank: int) -> None:
    at_second_step(lambda: os.kill(os.getpid(), 9))(rank)


def hangs(rank: int) -> None:
    at_second_step(lambda: time.sleep(100))(rank)


def everyone_at_once(rank: int) -> None:
    def fail() -> None:
        raise train.TrainingStopped("nothing is finite")

    at_second_step(fail, failing_rank=rank)(rank)


def errors(run: Processes) -> list[str]:
    """What the ranks printed besides the log of the run."""
    return [line for line in run.output().splitlines() if "pretrain_gpt.py" in line or line.startswith("[rank")]


@pytest.mark.parametrize("flags", ["", "--tensor-model-parallel-size 2", "--async-save --save-interval 1 --save {}"])
def test_the_first_failing_rank_is_heard_and_all_end(tmp_path: Path, flags: str) -> None:
    flags = flags.format(tmp_path / "save")
    with Processes(2, f"{TINY} --train-iters 9 {flags}", tmp_path, fault=bug) as run:
        assert run.wait() == [1, 1]
        found = errors(run)
        assert found[0] == "[rank 1] Traceback (most recent call last):"
        assert all(line.startswith("[rank 1]") for line in found[:-1]), found
        assert re.fullmatch(
            r"pretrain_gpt.py: failed: rank 1 at iteration 2 in .*train.py:\d+ train_step: "
            "ZeroDivisionError: a bug of this rank",
            found[-1],
        )
        assert "gloo" not in run.output()


def test_what_the_user_can_mend_is_one_sentence(tmp_path: Path) -> None:
    with Processes(2, f"{TINY} --train-iters 9", tmp_path, fault=bad_data) as run:
        assert run.wait()[1] == 2
        assert errors(run) == ["pretrain_gpt.py: error: tokens.bin: token 99 is not in the vocabulary"]


def test_the_same_error_of_all_ranks_is_printed_once(tmp_path: Path) -> None:
    with Processes(2, f"{TINY} --train-iters 9", tmp_path, fault=everyone_at_once) as run:
        assert run.wait() == [1, 1]
        assert errors(run) == ["pretrain_gpt.py: stopped: nothing is finite"]


def test_a_process_that_ended_without_a_word(tmp_path: Path) -> None:
    with Processes(2, f"{TINY} --train-iters 9", tmp_path, fault=dies) as run:
        assert run.wait() == [1, -9]
        (line,) = errors(run)
        start = "pretrain_gpt.py: stopped: rank 0 lost another process, which ended without a word, at iteration 2 in "
        assert line.startswith(start) and "collectives.py" in line


def test_a_hang_ends_with_rank_iteration_and_place(tmp_path: Path) -> None:
    flags = "--train-iters 9 --distributed-timeout-minutes 0.03"
    with Processes(2, f"{TINY} {flags}", tmp_path, fault=hangs) as run:
        run.processes[0].join(40)
        assert run.processes[0].exitcode == 1
        (line,) = errors(run)
        assert re.fullmatch(
            "pretrain_gpt.py: stopped: rank 0 waited longer than --distributed-timeout-minutes for the other "
            r"processes, at iteration 2 in .*train_step > .*parallel/collectives.py:\d+ start_all_reduce",
            line,
        )


# ---- the watchdog, which is there for GPUs ----


def hangs_under_watch(rank: int) -> None:
    """The collective itself would wait for ten minutes: as on a GPU, only the watchdog ends it."""
    hangs(rank)

    def watched(config: object, mesh: Mesh, iteration: Callable[[], int]) -> Watchdog:
        return cuda_watched(ParallelConfig(distributed_timeout_minutes=0.03), mesh.on("cuda:0"), iteration)  # type: ignore[return-value]

    cuda_watched, train.watched = train.watched, watched  # type: ignore[assignment]


def test_the_watchdog_ends_a_hang_with_rank_iteration_and_place(tmp_path: Path) -> None:
    with Processes(2, f"{TINY} --train-iters 9", tmp_path, fault=hangs_under_watch) as run:
        run.processes[0].join(40)
        assert run.processes[0].exitcode == 1
        (line,) = [line for line in run.output().splitlines() if "stopped:" in line]
        assert re.search(
            r"stopped: rank 0 waited longer than .*, at iteration 2 in .*train_step > parallel/collectives.py:\d+ all_",
            line,
        )


def test_the_watchdog_sees_a_thread_that_stands_still() -> None:
    found: list[str] = []
    stopped = threading.Event()

    def hang(where: str) -> None:
        found.append(where)
        stopped.set()

    with Watchdog(0.2, lambda: 7, hang):
        launch._wait(NeverSet(stopped), "key")
    assert found and found[0].endswith("code outside the package")


class NeverSet:
    """A store in which nothing is ever set; ``check`` is called in a loop until the watchdog has spoken."""

    def __init__(self, stopped: threading.Event) -> None:
        self.stopped = stopped

    def check(self, keys: list[str]) -> bool:
        return self.stopped.is_set()


def test_frames_are_described_within_the_package() -> None:
    package = Path(launch.PACKAGE)
    frames = [("pretrain_gpt.py", 1, "main"), (str(package / "train.py"), 20, "train_step")]
    frames += [(str(package / "parallel" / "data.py"), 30, "grad_norm"), ("/torch/x.py", 5, "all_reduce")]
    assert describe_frames(frames) == "train.py:20 train_step > parallel/data.py:30 grad_norm"
