"""A persistent pool of gloo processes, for tests that compare shards with the whole.

``Pool.run(function, *arguments)`` calls an importable function on every rank and returns the results in rank order. The
ranks stay alive from call to call: starting them costs seconds, a call milliseconds. After a failure they are ended,
and the next call starts new ones. What ran on gloo but could hang on NCCL is a failure too (``order.py``).

In the function ``mesh(config, world_size)`` is the mesh of a layout that takes the first ``world_size`` ranks.
"""

from __future__ import annotations

import atexit
import faulthandler
import functools
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from order import Call, Recorder, hang

SIZE = 4
TIMEOUT_S = 60.0


class RankFailed(AssertionError):
    """A rank raised, died or hung; the message has the first one's traceback."""


class Pool:
    """``size`` processes in one process group."""

    def __init__(self, size: int = SIZE, timeout_s: float = TIMEOUT_S) -> None:
        self.size, self.timeout_s = size, timeout_s
        self.processes: list[Any] = []
        self.pipes: list[Connection] = []
        self.folder: Path | None = None
        atexit.register(self.close)

    def run(self, function: Callable[..., Any], *arguments: Any, timeout_s: float | None = None) -> list[Any]:
        """Results of ``function(*arguments)`` by rank; ``RankFailed`` where a rank fails."""
        if not self.processes:
            self._start()
        for pipe in self.pipes:
            pipe.send((function, arguments))
        try:
            results = self._collect(time.monotonic() + (timeout_s or self.timeout_s))
        except BaseException:
            self.close()
            raise
        if waiting := hang([calls for _, calls in results]):
            raise RankFailed(f"gloo has done what NCCL would hang in:\n{waiting}")
        return [value for value, _ in results]

    def _start(self) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch", "torch.distributed", "megatron_hc.train"])
        self.folder = Path(tempfile.mkdtemp(prefix="megatron_hc_pool"))
        for rank in range(self.size):
            here, there = context.Pipe()
            process = context.Process(
                target=_serve, args=(rank, self.size, self.folder, there), daemon=True, name=f"rank {rank}"
            )
            process.start()
            there.close()
            self.processes.append(process)
            self.pipes.append(here)

    def _collect(self, deadline: float) -> list[tuple[Any, list[Call]]]:
        """Of every rank what the function returned, and the calls that it made."""
        results: dict[int, tuple[Any, list[Call]]] = {}
        while len(results) < self.size:
            missing = {self.pipes[rank]: rank for rank in range(self.size) if rank not in results}
            ends = {process.sentinel: rank for rank, process in enumerate(self.processes)}
            ready = wait([*missing, *ends], timeout=max(deadline - time.monotonic(), 0))
            if not ready:
                raise RankFailed(f"ranks {sorted(missing.values())} did not finish in time\n{self._stacks()}")
            # A rank that died first: what the others then report is only that the connection broke.
            for rank in (ends[end] for end in ready if end in ends):
                self.processes[rank].join()
                raise RankFailed(f"rank {rank} ended with exit code {self.processes[rank].exitcode}")
            for pipe in ready:
                rank = missing[pipe]  # type: ignore[index]
                try:
                    is_result, value = pipe.recv()  # type: ignore[union-attr]
                except EOFError:
                    self.processes[rank].join()
                    raise RankFailed(f"rank {rank} ended with exit code {self.processes[rank].exitcode}") from None
                if not is_result:
                    raise RankFailed(f"rank {rank} failed:\n{value}")
                results[rank] = value
        return [results[rank] for rank in range(self.size)]

    def _stacks(self) -> str:
        """Where every rank stands."""
        assert self.folder is not None
        for process in self.processes:
            os.kill(process.pid, signal.SIGUSR1)
        time.sleep(0.5)
        return "\n".join(f"rank {rank}: {_stack_file(self.folder, rank).read_text()}" for rank in range(self.size))

    def close(self) -> None:
        """End all ranks and remove what they wrote."""
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()
        for pipe in self.pipes:
            pipe.close()
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)
        self.processes, self.pipes, self.folder = [], [], None


def mesh(config: Any, world_size: int) -> Any:
    """In a rank: its mesh in a layout of the first ``world_size`` ranks, None for the others. All ranks call it."""
    import torch.distributed as dist

    from megatron_hc.mesh import Mesh, mesh_of

    config.validate(world_size)
    rank = dist.get_rank()
    found = mesh_of(rank, world_size, config, "cpu") if world_size > 1 else Mesh()
    return found if rank < world_size else None


def _stack_file(folder: Path, rank: int) -> Path:
    return folder / f"stack-{rank}"


def _serve(rank: int, size: int, folder: Path, pipe: Connection) -> None:
    """What a rank does until its pipe is closed."""
    import torch
    import torch.distributed as dist

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C: pytest ends, and closes the pipe
    sys.stdout = open(os.devnull, "w")
    stacks = _stack_file(folder, rank).open("w")
    faulthandler.register(signal.SIGUSR1, stacks, all_threads=False)
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", f"file://{folder / 'store'}", rank=rank, world_size=size, timeout=timedelta(minutes=10)
    )
    dist.new_group = _once_per_ranks(dist.new_group)
    recorder = Recorder()
    try:
        while True:
            function, arguments = pipe.recv()
            recorder.take()
            try:
                answer = True, (function(*arguments), recorder.take())
            except BaseException:
                answer = False, traceback.format_exc()
            pipe.send(answer)
    except (EOFError, OSError):
        # The test process is gone, perhaps killed. Destroying process groups would wait for the other ranks.
        shutil.rmtree(folder, ignore_errors=True)
        os._exit(0)


def _once_per_ranks(new_group: Callable[..., Any]) -> Callable[..., Any]:
    """Sub-groups are made once for all layouts: it takes every rank, and sockets that nothing would free."""
    made: dict[Any, Any] = {}

    @functools.wraps(new_group)
    def cached(ranks: Any = None, *arguments: Any, **options: Any) -> Any:
        key = None if ranks is None else tuple(ranks)
        if arguments or options.keys() - {"timeout"}:  # the pool has its own
            return new_group(ranks, *arguments, **options)
        if key not in made:
            made[key] = new_group(ranks)
        return made[key]

    return cached
