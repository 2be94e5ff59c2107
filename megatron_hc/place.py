"""This process among the processes of the run: what torchrun, Slurm or nobody says. Loads no torch."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import NamedTuple

MEND = "start the processes with torchrun or with Slurm's srun, or unset it for one process"


class Place(NamedTuple):
    """This process among the processes of the run."""

    rank: int
    world_size: int
    local_rank: int | None
    """Among those of this machine; None where nothing says it."""
    launcher: str = "nothing"
    """What said so: 'torchrun', 'the environment' (torchrun's variables, set by something else), 'Slurm', 'nothing'."""
    master: tuple[str, int] | None = None
    """Address and port at which the processes meet; None for one process."""

    @property
    def init_method(self) -> str:
        """For ``torch.distributed.init_process_group``, beside rank and world size."""
        assert self.master is not None
        if self.launcher != "Slurm":
            return "env://"  # torchrun's own store, which outlives a restart of the processes
        host, port = self.master
        return f"tcp://{f'[{host}]' if ':' in host else host}:{port}"


def place_of(environment: Mapping[str, str] = os.environ) -> Place:
    """What torchrun's variables say, else those of a Slurm step (srun); one process where there are neither.

    Raises ``ValueError`` for variables that contradict each other: with half of them each process would train alone.
    """
    numbers = {name: _number(environment, name) for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_PORT")}
    step = _slurm_step(environment)
    if step is not None and step.world_size > 1 and not environment.get("TORCHELASTIC_RUN_ID"):
        if numbers["RANK"] is None:
            return _of_slurm(step, numbers, environment)
        _check_against(step, numbers)
    world_size, rank = numbers["WORLD_SIZE"], numbers["RANK"]
    launcher = "torchrun" if environment.get("TORCHELASTIC_RUN_ID") else "the environment"
    if world_size is None and rank is None:
        _check_no_mpi(environment)
    if (world_size is None or world_size == 1) and not rank:
        return Place(0, 1, numbers["LOCAL_RANK"], launcher if world_size == 1 else "nothing")
    present = f"WORLD_SIZE={world_size}" if world_size is not None else f"RANK={rank}"
    missing = [name for name in ("WORLD_SIZE", "RANK", "MASTER_ADDR", "MASTER_PORT") if not environment.get(name)]
    if missing:
        raise ValueError(f"{present} is set without {', '.join(missing)}: {MEND}")
    assert world_size is not None and rank is not None and numbers["MASTER_PORT"] is not None
    if numbers["MASTER_PORT"] == 0:
        raise ValueError("MASTER_PORT=0 is no port: give torchrun --standalone, or a --master-port that is free")
    if rank >= world_size:
        raise ValueError(f"RANK={rank} must be below WORLD_SIZE={world_size}: {MEND}")
    master = environment["MASTER_ADDR"], numbers["MASTER_PORT"]
    return Place(rank, world_size, numbers["LOCAL_RANK"], launcher, master)


def _check_no_mpi(environment: Mapping[str, str]) -> None:
    """Refuse processes of mpirun that nothing has told who they are: each would train alone."""
    for name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE"):
        size = _number(environment, name)
        if size is not None and size > 1:
            own = f"{name.removesuffix('SIZE')}RANK"
            raise ValueError(
                f"{name}={size} says that mpirun started {size} processes, but RANK, WORLD_SIZE, MASTER_ADDR and "
                f"MASTER_PORT are not set: set RANK to {own} and WORLD_SIZE to {name} in each, or {MEND}"
            )


def explain(place: Place, environment: Mapping[str, str] = os.environ) -> str:
    """One line for the log: which processes there are, and what said so."""
    if place.world_size > 1:
        assert place.master is not None
        where = ""
        if environment.get("SLURM_JOB_ID"):
            where = f", Slurm job {environment['SLURM_JOB_ID']} on {environment.get('SLURM_JOB_NODELIST', '?')}"
        restarts = [environment.get(name, "0") for name in ("SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT")]
        again = (
            f", started again {' and '.join(text for text in restarts if text != '0')} times"
            if any(text != "0" for text in restarts)
            else ""
        )
        host, port = place.master
        return f"{place.world_size} processes by {place.launcher}, meeting at {host}:{port}{where}{again}"
    tasks = environment.get("SLURM_NTASKS", "1")
    if place.launcher == "nothing" and tasks != "1" and not environment.get("SLURM_STEP_ID"):
        return f"one process, though the Slurm job has room for {tasks}: srun or torchrun starts them"
    return "one process" + ("" if place.launcher == "nothing" else f" by {place.launcher}")


def _number(environment: Mapping[str, str], name: str) -> int | None:
    text = environment.get(name)
    if not text:
        return None
    if not re.fullmatch(r"[0-9]+", text) or name == "WORLD_SIZE" and int(text) == 0:
        raise ValueError(f"{name}={text} must be a whole number: {MEND}")
    return int(text)


def _slurm_step(environment: Mapping[str, str]) -> Place | None:
    """This process as a task of srun. The batch script itself, which is task 0 of no step, is none."""
    if not environment.get("SLURM_STEP_ID"):
        return None
    names = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")
    rank, size, local_rank = (_number(environment, name) for name in names)
    if rank is None or size is None:
        return None
    return Place(rank, size, local_rank, "Slurm")


def _of_slurm(step: Place, numbers: Mapping[str, int | None], environment: Mapping[str, str]) -> Place:
    world_size = numbers["WORLD_SIZE"]
    if world_size is not None and world_size != step.world_size:
        raise ValueError(
            f"WORLD_SIZE={world_size} is set, but srun has started {step.world_size} tasks (SLURM_STEP_NUM_TASKS): "
            "unset WORLD_SIZE, or start torchrun with srun, one task per node"
        )
    host = environment.get("MASTER_ADDR") or first_host(environment.get("SLURM_STEP_NODELIST", ""))
    if not host:
        raise ValueError("SLURM_STEP_NODELIST names no node: set MASTER_ADDR to the first node's address")
    return step._replace(master=(host, numbers["MASTER_PORT"] or _port(environment)))


def _check_against(step: Place, numbers: Mapping[str, int | None]) -> None:
    """torchrun's variables inside an srun step: its tasks must be those processes, or launch equal parts of them."""
    world_size, rank = numbers["WORLD_SIZE"], numbers["RANK"]
    if world_size is None or rank is None:
        return  # refused as incomplete
    per_task = world_size // step.world_size
    if world_size % step.world_size or not 0 <= rank - step.rank * per_task < per_task:
        raise ValueError(
            f"WORLD_SIZE={world_size} and RANK={rank} are set, but srun says task {step.rank} of {step.world_size} "
            "(SLURM_PROCID, SLURM_STEP_NUM_TASKS): unset RANK, WORLD_SIZE and LOCAL_RANK to use Slurm's, or start "
            "torchrun with srun, one task per node"
        )


def _port(environment: Mapping[str, str]) -> int:
    """The same for all tasks of a step, different for jobs that share a node, below the range of outgoing ports."""
    job, step = (_number(environment, name) or 0 for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
    return 10000 + (job * 31 + step) % 20000


def first_host(nodelist: str) -> str:
    """Of Slurm's short form: 'node[03-07,9],other' -> 'node03'."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])*", nodelist)
    return re.sub(r"\[([^\],-]*)[^\]]*\]", r"\1", first[0] if first else "")
