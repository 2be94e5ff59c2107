"""Seeded disturbances of a short run of four processes (tensor parallel 2 x data parallel 2), and what becomes of it.

    OMP_NUM_THREADS=1 python tests/parallel/chaos.py --runs 200 --table /tmp/chaos.tsv

Every disturbance is drawn from its number: what happens, at which iteration and where in it, to which rank. The run is
disturbed, then started again until it ends. It has survived if its losses are, bit for bit, those of the run that
nothing disturbs, or if the start was refused in one sentence and the losses are the same once that is mended; and if it
went on from the last save that had finished (the one before where that was damaged). The outcome is appended to the
table; started again, the tool goes on after the last line.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from processes import TINY, Processes  # noqa: E402

RANKS, ITERATIONS, INTERVAL = 4, 12, 3
FLAGS = f"""{TINY} --tensor-model-parallel-size 2 --train-iters {ITERATIONS} --save-interval {INTERVAL}
    --verify-checkpoint --exit-signal-handler --hidden-dropout 0.1"""
KINDS = (
    *(
        "kill one rank",
        "kill all ranks",
        "kill while saving",
        "SIGTERM",
        "SIGUSR1",
        "truncate",
        "flip a byte",
        "delete a file",
    ),
    *("file size limit", "failing write", "delete the tracker", "garbage in the tracker"),
    *("lock of a dead job elsewhere", "young lock of elsewhere", "edited lock time"),
)
WRITES = ("save_file", "flush", "write_text", "publish", "write_tracker")
"""Functions of a save, in order: where a rank is killed, or finds the disk full."""


@dataclasses.dataclass(frozen=True)
class Disturbance:
    """What happens in one run, all of it drawn from a number."""

    number: int
    kind: str
    iteration: int
    """It happens while this iteration is trained, or in the first save after it has begun."""
    ranks: tuple[int, ...]
    place: str
    """Function of a save, or "step"."""
    delay_s: float
    """Into the step, for a kill there."""
    draw: float
    """In 0 .. 1, for the place in a file and the like."""


def disturbance(number: int) -> Disturbance:
    generator = random.Random(f"chaos {number}")
    kind = KINDS[number % len(KINDS)] if number < len(KINDS) else generator.choice(KINDS)
    everyone = (
        kind in ("kill all ranks", "truncate", "flip a byte", "delete a file") or "lock" in kind or "tracker" in kind
    )
    return Disturbance(
        number=number,
        kind=kind,
        iteration=generator.randint(1, ITERATIONS),
        ranks=tuple(range(RANKS)) if everyone else (generator.randrange(RANKS),),
        place=generator.choice(WRITES) if kind in ("kill while saving", "failing write") else "step",
        delay_s=generator.uniform(0, 0.01),
        draw=generator.random(),
    )


# ---- in the processes of the run ----


def disturb(plan: Disturbance, rank: int) -> None:
    """Put the disturbance in its place; called in every process before the run."""
    from megatron_hc import checkpoint_save, train

    if rank not in plan.ranks and plan.place == "step":
        return
    if plan.place != "step":  # publish and write_tracker are called by rank 0 only
        if rank == (0 if plan.place in ("write_text", "publish", "write_tracker") else plan.ranks[0]):
            _in_a_save(plan, checkpoint_save, train)
        return
    real = train.train_step

    def step(run: Any, loader: Any) -> None:
        if run.progress.iteration + 1 == plan.iteration:
            _strike(plan)
        real(run, loader)

    train.train_step = step  # type: ignore[assignment]


def _strike(plan: Disturbance) -> None:
    if plan.kind in ("SIGTERM", "SIGUSR1"):
        os.kill(os.getpid(), getattr(signal, plan.kind))
    elif plan.kind == "file size limit":
        limit = 500 + int(10000 * plan.draw)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    else:
        threading.Timer(plan.delay_s, os.kill, (os.getpid(), signal.SIGKILL)).start()


def _in_a_save(plan: Disturbance, checkpoint_save: Any, train: Any) -> None:
    """Kill, or find the disk full, in the first save at or after the iteration; once."""
    real, struck = getattr(checkpoint_save, plan.place), False
    iteration = 0
    real_save = train.save

    def save(run: Any) -> None:
        nonlocal iteration
        iteration = run.progress.iteration
        real_save(run)

    def place(*arguments: Any, **options: Any) -> Any:
        nonlocal struck
        if iteration >= plan.iteration and not struck:
            struck = True
            if plan.kind == "kill while saving":
                os.kill(os.getpid(), signal.SIGKILL)
            raise OSError(28, "No space left on device")
        return real(*arguments, **options)

    train.save = save
    setattr(checkpoint_save, plan.place, place)


# ---- on the disk, between two starts ----


def damage(plan: Disturbance, root: Path) -> str:
    """What has happened to the folder meanwhile, in words."""
    checkpoints = sorted(path for path in root.glob("iter_???????") if path.is_dir())
    lock, tracker = root / "lock.json", root / "latest_checkpointed_iteration.txt"
    if plan.kind in ("truncate", "flip a byte", "delete a file") and checkpoints:
        files = sorted(checkpoints[-1].iterdir())
        file = files[int(plan.draw * len(files))]
        content = bytearray(file.read_bytes())
        position = int(plan.draw * 7919 * len(content)) % len(content)
        if plan.kind == "delete a file":
            file.unlink()
        elif plan.kind == "truncate":
            file.write_bytes(content[:position])
        else:
            content[position] ^= 1 << int(plan.draw * 8)
            file.write_bytes(content)
        return f"{checkpoints[-1].name}/{file.name} at byte {position}"
    if "tracker" in plan.kind and tracker.exists():
        if plan.kind == "delete the tracker":
            tracker.unlink()
        else:
            tracker.write_text(random.Random(plan.number).choice(["", "x", "-3", "99999", "3 3", "\0\0"]))
    if "lock" in plan.kind:
        root.mkdir(parents=True, exist_ok=True)
        if plan.kind != "edited lock time":
            held = {
                "host": "elsewhere",
                "boot": "another",
                "pid": 1,
                "job": "9 of Slurm",
                "attempt": [0, 0],
                "time": "?",
            }
            lock.write_text(json.dumps(held))
        elif lock.exists():
            lock.write_text(lock.read_text().replace('"time": "2', '"time": "1'))
        age = {"lock of a dead job elsewhere": 200, "young lock of elsewhere": 1}.get(
            plan.kind, 7200 * (plan.draw - 0.5)
        )
        if lock.exists():
            os.utime(lock, (time.time() - age,) * 2)
    return ""


# ---- one disturbance ----


def losses(folder: Path) -> list[float | None]:
    """By iteration; None where one is missing or written twice."""
    file = folder / "metrics.jsonl"
    found = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    by_iteration = {record["iteration"]: record["lm_loss"] for record in found}
    return (
        [by_iteration.get(iteration) for iteration in range(1, ITERATIONS + 1)] if len(found) == ITERATIONS else [None]
    )


def start(
    folder: Path, name: str, fault: Callable[[int], None] | None = None, timeout_s: float = 600.0
) -> tuple[list[int], str]:
    """(exit codes, output) of one start of the run."""
    argv = f"{FLAGS} --save {folder}/run --load {folder}/run --metrics-jsonl {folder}/metrics.jsonl"
    with Processes(RANKS, argv, folder / name, fault=fault) as run:
        return run.wait(timeout_s), run.output()


def survive(plan: Disturbance, folder: Path, expected: list[float | None]) -> dict[str, Any]:
    """Disturb a run and start it again until it ends: a row of the table."""
    began = time.monotonic()
    root = folder / "run"
    first, output = start(folder, "disturbed", functools.partial(disturb, plan))
    finished = [int(number) for number in re.findall(r"saved \S+/iter_(\d+) in", output)]
    what = damage(plan, root)
    allowed = finished[:-1] if what else finished
    codes, output = start(folder, "again")
    outcome = "resumed"
    if set(codes) != {0}:
        sentence = re.search(r"pretrain_gpt.py: error: (.*)", output)
        if codes.count(2) == 0 or sentence is None:
            outcome = f"FAILED: {codes} {output[-300:]!r}"
        else:
            outcome = f"refused ({sentence[1].replace(str(folder), '')[:90]}...), mended, resumed"
            (root / "lock.json").unlink(missing_ok=True)
            if what and not allowed:  # the only checkpoint was damaged: the run has to begin anew
                shutil.rmtree(root)
            codes, output = start(folder, "mended")
    loaded = [int(number) for number in re.findall(r"loaded \S+/iter_(\d+)", output)]
    if set(codes) != {0} and not outcome.startswith("FAILED"):
        outcome = f"FAILED: {codes} {output[-300:]!r}"
    elif max(loaded, default=0) < max(allowed, default=0):
        outcome = f"LOST: went on from {loaded}, {finished} had been saved"
    elif losses(folder) != expected:
        outcome = f"WRONG: {losses(folder)} for {expected}"
    if plan.kind in ("SIGTERM", "SIGUSR1") and plan.iteration < ITERATIONS and first != [85] * RANKS:
        outcome = f"WRONG: exit codes {first} for 85"
    return {
        "number": plan.number,
        "kind": plan.kind,
        "where": what or f"iteration {plan.iteration}, {plan.place}, rank {' '.join(map(str, plan.ranks))}",
        "exit codes": " ".join(map(str, first)),
        "saved": max(finished, default=0),
        "resumed from": max(loaded, default=0),
        "outcome": outcome,
        "seconds": f"{time.monotonic() - began:.1f}",
    }


def is_good(row: dict[str, Any]) -> bool:
    return row["outcome"].startswith(("resumed", "refused"))


def undisturbed(folder: Path) -> list[float | None]:
    codes, output = start(folder, "undisturbed")
    assert codes == [0] * RANKS, output
    return losses(folder)


def reference(table: Path) -> list[float | None]:
    """The losses of the undisturbed run, kept beside the table."""
    file = table.with_suffix(".undisturbed.json")
    if not file.exists():
        with tempfile.TemporaryDirectory(prefix="chaos-") as name:
            file.write_text(json.dumps(undisturbed(Path(name))))
    return json.loads(file.read_text())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--table", type=Path, required=True, help="tab-separated, appended to")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start no disturbance after this time")
    options = parser.parse_args()
    lines = options.table.read_text().splitlines() if options.table.exists() else []
    done = {int(line.split("\t")[0]) for line in lines[1:]}
    began, failed = time.monotonic(), 0
    expected = reference(options.table)
    with tempfile.TemporaryDirectory(prefix="chaos-") as name:
        for number in sorted(set(range(options.runs)) - done):
            if time.monotonic() - began > options.seconds:
                break
            folder = Path(name) / str(number)
            row = survive(disturbance(number), folder, expected)
            with options.table.open("a") as table:
                if table.tell() == 0:
                    table.write("\t".join(row) + "\n")
                table.write(
                    "\t".join(str(value).replace("\t", " ").replace("\n", " ") for value in row.values()) + "\n"
                )
            failed += not is_good(row)
            print(row, flush=True)
            if is_good(row):
                shutil.rmtree(folder)
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main())
