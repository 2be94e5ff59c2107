"""Which checkpoint a run begins from, and that no other job writes where it writes: decided once for all ranks."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_hc.checkpoint_folder import (
    find,
    find_if_any,
    is_changed,
    iterations_before,
    latest_iteration,
    read_manifest,
)
from megatron_hc.checkpoint_foreign import check_not_megatrons
from megatron_hc.checkpoint_ranks import all_ranks, gather
from megatron_hc.config.training import CheckpointConfig
from megatron_hc.mesh import Mesh
from megatron_hc.save_lock import SaveLock, check_lock, job_and_attempt

BEGINNING = ("load", "save", "ckpt_step", "finetune", "moe_use_upcycling", "load_optim", "load_rng")
"""Flags that say where a run begins."""


def going_on(options: CheckpointConfig, mesh: Mesh) -> CheckpointConfig:
    """The flags themselves; where Slurm or torchrun has started this job again, those that go on with what it saved.

    --load of another folder, --finetune or --ckpt-step say where the first attempt began: with them every further one
    would throw away, and train again, what the one before had done. What is not saved is loaded as the flags say; what
    begins with weights alone says nothing of the optimizer.
    """
    takes_weights_only = options.finetune or options.moe_use_upcycling
    resumed = dataclasses.replace(
        options,
        load=options.save,
        ckpt_step=None,
        finetune=False,
        moe_use_upcycling=False,
        load_optim=options.save_optim or (options.load_optim and not takes_weights_only),
        load_rng=options.load_rng or options.save_rng,
    )
    is_own = False
    with all_ranks(mesh):
        if mesh.is_first and resumed != options:
            is_own = _is_of_this_job(options)
    return resumed if gather(is_own, mesh)[0] else options


def _is_of_this_job(options: CheckpointConfig) -> bool:
    """Whether an earlier attempt of this job, given the same flags, wrote the newest checkpoint under --save."""
    job, attempt = job_and_attempt()
    if options.save is None or job is None or not any(attempt):
        return False
    newest = find_if_any(options.save)
    if newest is None:
        return False
    try:
        state = json.loads((newest / "state.json").read_text(encoding="utf-8"))
        arguments = json.loads((newest / "arguments.json").read_text(encoding="utf-8"))
        flags = {name: arguments[name]["value"] for name in BEGINNING}
        return bool(state.get("job") == job and flags == {name: getattr(options, name) for name in BEGINNING})
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False  # of another version, or damaged: the load reports it


def choose(options: CheckpointConfig, mesh: Mesh) -> Path | None:
    """The folder to load, the same for all ranks; None where nothing was saved yet and that is allowed.

    With --verify-checkpoint a checkpoint whose files have changed is passed over for the one before, with a warning; if
    --ckpt-step names it, or if there is none before, ValueError.
    """
    if options.load is None:
        return None
    found: Path | None = None
    with all_ranks(mesh):
        if mesh.is_first:
            found = find(options.load, options.ckpt_step) if options.must_load else find_if_any(options.load)
    found = gather(found, mesh)[0]
    if found is None or not options.verify_checkpoint:
        return found
    return _verified(found, options, mesh)


def _verified(newest: Path, options: CheckpointConfig, mesh: Mesh) -> Path:
    """The checkpoint itself, or the newest before it whose checksums are right."""
    assert options.load is not None
    candidates = [newest]
    if options.ckpt_step is None:
        candidates += gather(iterations_before(options.load, newest) if mesh.is_first else [], mesh)[0]
    damaged = []
    for folder in candidates:
        reason = changed_file(folder, mesh)
        if reason is None:
            return folder
        damaged.append(reason)
        if mesh.is_first and folder != candidates[-1]:
            logging.getLogger(__name__).warning("%s: NOT USING THIS CHECKPOINT, trying the one before", reason)
    raise ValueError(
        f"--verify-checkpoint: {'; '.join(damaged)}: "
        + ("choose another --ckpt-step" if options.ckpt_step is not None else "no checkpoint before it is whole")
    )


def changed_file(folder: Path, mesh: Mesh) -> str | None:
    """A file of a whole checkpoint that is not what was written, in words; the ranks share the reading."""
    found: str | None = None
    with all_ranks(mesh):
        manifest = read_manifest(folder)
        if "crc32" not in manifest and mesh.is_first:
            logging.getLogger(__name__).warning("%s was saved without checksums: it cannot be verified", folder)
        for name in sorted(manifest["files"])[mesh.world_rank :: mesh.world_size]:
            try:
                if is_changed(folder, name, manifest):
                    found = f"{folder / name} is not what was written (its checksum differs)"
                    break
            except OSError as error:  # a disk's way to say that it has lost what was there
                found = f"{folder / name} cannot be read ({error.strerror})"
                break
    return next((reason for reason in gather(found, mesh) if reason is not None), None)


def newer_checkpoint(save: str | None, iteration: int) -> int | None:
    """The newest whole checkpoint under --save, if it is beyond the iteration that a run begins at.

    Without --load, with --finetune or an earlier --ckpt-step a run begins behind what an earlier one has saved.
    """
    newest = latest_iteration(save) if save is not None else None
    return newest if newest is not None and newest > iteration else None


def check_not_taken(save: str, mesh: Mesh) -> None:
    """Refuse a --save that Megatron-LM has written to or another job is writing to, before anything is built."""
    with all_ranks(mesh):
        if mesh.is_first:
            check_not_megatrons(save)
            check_lock(save)


@contextmanager
def locked(save: str | None, mesh: Mesh) -> Iterator[Callable[[], None]]:
    """While the context lasts no other job may write to --save.

    Gives what all ranks call together before they write there: ``ValueError`` where another job holds the lock by now.
    """
    lock = SaveLock(save) if save is not None and mesh.is_first else None
    with all_ranks(mesh):
        if lock is not None:
            lock.__enter__()

    def check() -> None:
        with all_ranks(mesh):
            if lock is not None:
                lock.check()

    try:
        yield check
    finally:
        if lock is not None:
            lock.__exit__()
