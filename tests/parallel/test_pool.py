"""The pool itself: what a failing rank shows, and that nothing stays behind."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from cells import TP2
from order import Call, hang
from parity import TOLERANCES as TOLERANCE
from parity import Cell, assembled, differences, run_cell
from pool import Pool, RankFailed, mesh

from megatron_hc import train
from megatron_hc.cli import parse


@pytest.fixture(scope="module")
def own_pool() -> Iterator[Pool]:
    found = Pool(size=2)
    yield found
    found.close()


def total(number: float) -> float:
    x = torch.tensor(number + dist.get_rank())
    dist.all_reduce(x)
    return float(x)


def fail_on(rank: int) -> None:
    """The other rank waits for this one."""
    if dist.get_rank() == rank:
        raise ValueError(f"the number {rank} is wrong")
    total(0)


def die_on(rank: int) -> None:
    if dist.get_rank() == rank:
        os.kill(os.getpid(), signal.SIGKILL)
    total(0)


def sleep_on(rank: int) -> None:
    if dist.get_rank() == rank:
        time.sleep(60)
    total(0)


def test_results_come_by_rank(own_pool: Pool) -> None:
    assert own_pool.run(total, 1.0) == [3.0, 3.0]
    assert own_pool.run(os.getpid) == [process.pid for process in own_pool.processes]


@pytest.mark.parametrize("rank", [0, 1])
def test_the_failing_rank_is_shown(own_pool: Pool, rank: int) -> None:
    with pytest.raises(RankFailed, match=f"rank {rank} failed:(?s:.*)fail_on(?s:.*)the number {rank} is wrong"):
        own_pool.run(fail_on, rank)
    assert own_pool.run(total, 1.0) == [3.0, 3.0]


def test_a_rank_that_dies(own_pool: Pool) -> None:
    with pytest.raises(RankFailed, match="rank 1 ended with exit code -9"):
        own_pool.run(die_on, 1)


def test_a_rank_that_hangs(own_pool: Pool) -> None:
    own_pool.run(total, 1.0)
    with pytest.raises(RankFailed, match=r"ranks \[0, 1\] did not finish in time(?s:.*)rank 1:(?s:.*)in sleep_on"):
        own_pool.run(sleep_on, 1, timeout_s=1.0)


def test_nothing_is_left(own_pool: Pool) -> None:
    ranks, folder = own_pool.run(os.getpid), own_pool.folder
    assert folder is not None and folder.exists()
    own_pool.close()
    assert not folder.exists()
    for rank in ranks:
        with pytest.raises(ProcessLookupError):
            os.kill(rank, 0)


def start_and_be_killed(pipe: Connection) -> None:
    """A test process that cannot tidy up."""
    pool = Pool(size=2)
    pipe.send((pool.run(os.getpid), pool.folder))
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_test_process_leaves_nothing() -> None:
    here, there = multiprocessing.Pipe()
    victim = multiprocessing.get_context("spawn").Process(target=start_and_be_killed, args=(there,))
    victim.start()
    ranks, folder = here.recv()
    victim.join()
    for _ in range(600):
        if not folder.exists() and not any(Path(f"/proc/{rank}/stat").exists() for rank in ranks):
            return
        time.sleep(0.05)
    raise AssertionError(f"{folder} or one of {ranks} is still there")


def both_send_first() -> None:
    other = 1 - dist.get_rank()
    sent = dist.isend(torch.zeros(3), group_dst=other)
    dist.recv(torch.empty(3), group_src=other)
    sent.wait()


def cross() -> None:
    """Two communicators, which the ranks use in different orders."""
    calls = [(torch.zeros(3), dist.new_group([0, 1])), (torch.zeros(5), dist.group.WORLD)]
    works = [dist.all_reduce(x, group=group, async_op=True) for x, group in calls[:: 1 - 2 * dist.get_rank()]]
    for work in works:
        work.wait()


@pytest.mark.parametrize("function, call", [(both_send_first, "message"), (cross, "all_reduce")])
def test_what_only_gloo_can_do_fails(own_pool: Pool, function: Callable[[], None], call: str) -> None:
    with pytest.raises(RankFailed, match=rf"(?s)rank 0 waits in its call 0, Call\(kind='{call}'.*rank 1 waits"):
        own_pool.run(function)
    assert own_pool.run(total, 1.0) == [3.0, 3.0]


def test_calls_of_several_groups_can_take_turns() -> None:
    """Two pairs, one of a rank of each, and a message; every two ranks may agree and all four still go in a circle."""
    low, high, middle = (Call("all_reduce", ranks, 1) for ranks in ((0, 1), (2, 3), (1, 2)))
    message = Call("message", (3, 0), 4)
    assert hang([[low, message, low], [low, middle, low], [high, middle], [high, message]]) == ""
    circle = hang([[low, message, low], [middle, low, low], [high, middle], [message, high]])
    assert [line.split(", Call")[0] for line in circle.split("\n")] == [
        f"rank {r} waits in its call 0" for r in range(4)
    ]
    for other in ([low._replace(size=2)], [low._replace(dtype=torch.bfloat16)], [low._replace(kind="broadcast")], []):
        assert "rank 1 waits in its call 1" in hang([[low, *other], [low, low]])


def groups_of(cell: Cell) -> list[int] | None:
    own = mesh(parse(cell.flags).config, cell.world_size)
    return None if own is None else [id(own.group("tp")), dist.get_world_size(own.group("tp"))]


def test_groups_are_made_once(pool: Pool) -> None:
    first, second = (pool.run(groups_of, Cell(layout=TP2, world_size=2)) for _ in range(2))
    assert first == second and first[0] is not None and first[0][1] == 2 and first[2:] == [None, None]


def off_by(run: train.Run) -> None:
    """One parameter's gradient is wrong by a ten-millionth."""
    reduce = run.optimizer.reduce_gradients

    def wrong() -> None:
        reduce()
        for slot in run.optimizer.slots:
            if slot.name == "final_norm.weight":
                assert slot.grad is not None
                slot.grad *= 1 + 1e-7

    run.optimizer.reduce_gradients = wrong  # type: ignore[method-assign]


def test_a_small_error_is_seen(pool: Pool) -> None:
    cell = Cell(num_steps=1)
    good, bad = (assembled([pool.run(run_cell, cell, change)[0]]) for change in (None, off_by))
    (found,) = (line for line in differences(bad, good, TOLERANCE["fp64"]) if "gradient of" in line)
    assert "final_norm.weight" in found
