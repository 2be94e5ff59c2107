"""Writing a checkpoint: every rank stages its slices in CPU memory, then all write; at once or in the background."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from megatron_hc.checkpoint_folder import (
    FORMAT,
    MANIFEST,
    FileRecord,
    all_or_nothing,
    beside,
    checksum,
    flush,
    folder_name,
    latest_iteration,
    manifest_text,
    prepare,
    publish,
    remove,
    retain,
    write_text,
    write_tracker,
)
from megatron_hc.checkpoint_ranks import all_ranks, dtype_of, gather, key_of, stored_of
from megatron_hc.launch import SAVE_FAILED, SAVED_TO_RESUME
from megatron_hc.mesh import Mesh
from megatron_hc.stored import Stored


@dataclass(frozen=True)
class Staged:
    """What this rank will write: the first half of a save. CPU tensors are shared, not copied, unless asked for."""

    files: Mapping[str, dict[str, Tensor]]
    """This rank's slices on the CPU: file name -> tensor name -> slice."""
    index: dict[str, dict[str, Any]]
    """Every tensor of every rank: name -> dtype, whole shape, chunks [[file, offset, shape], ...]."""
    total_bytes: int
    """Bytes of all slices of all ranks."""


def save(
    root: str | Path,
    iteration: int,
    tensors: Mapping[str, Tensor | Stored],
    state: Mapping[str, Any],
    arguments: Mapping[str, Any],
    *,
    mesh: Mesh,
    retain_interval: int | None = None,
) -> Path:
    """Write ``root/iter_NNNNNNN`` and make it the latest; all ranks call it together.

    tensors: name -> plain tensor, DTensor or Stored; the ranks together must hold every tensor whole.
    state, arguments: JSON-able; rank 0's are written. arguments: name -> {"value": ..., "origin": ...}.
    retain_interval: afterwards delete older checkpoints whose iteration it does not divide.
    Raises ValueError in one sentence, on all ranks, if the folder cannot be written or the disk is too small; what was
    there before is then untouched.
    """
    texts = _texts(state, arguments)
    return _finish(Path(root), iteration, stage(tensors, mesh), texts, mesh, retain_interval)


def _texts(state: Mapping[str, Any], arguments: Mapping[str, Any]) -> dict[str, str]:
    return {"state.json": json.dumps(dict(state), indent=1), "arguments.json": json.dumps(dict(arguments), indent=1)}


def _finish(
    root: Path, iteration: int, staged: Staged, texts: Mapping[str, str], mesh: Mesh, retain_interval: int | None
) -> Path:
    """The second half of a save: files, manifest, name, tracker."""
    final = root / folder_name(iteration)
    partial = final.with_name(final.name + ".tmp")
    with all_ranks(mesh):
        if mesh.is_first:
            prepare(root, partial, staged.total_bytes)
    written: dict[str, FileRecord] = {}
    with all_ranks(mesh):
        written = write(staged, partial)
    for other in gather(written, mesh):
        written = written | other
    with all_ranks(mesh):
        if mesh.is_first:
            for name, text in texts.items():
                written[name] = write_text(partial / name, text)
            manifest = {
                "format": FORMAT,
                "iteration": iteration,
                "files": {name: record.size for name, record in written.items()},
                "crc32": {name: record.crc32 for name, record in written.items()},
                "tensors": staged.index,
            }
            write_text(partial / MANIFEST, manifest_text(manifest))
            publish(partial, final)
            write_tracker(root, iteration)
            remove(beside(final, ".old"))
            if retain_interval is not None:
                retain(root, iteration, retain_interval)
    return final


def stage(tensors: Mapping[str, Tensor | Stored], mesh: Mesh, copy: bool = False) -> Staged:
    """Agree with the other ranks on who writes what, and bring this rank's part to the CPU.

    With ``copy`` also what is there already, so that the tensors may change while the slices are being written.
    """
    held = {name: stored_of(tensor) for name, tensor in tensors.items()}
    slices = {(name, offset): local for name, part in held.items() for offset, local in part.slices}
    records = [
        (name, str(part.dtype).removeprefix("torch."), part.shape, offset, tuple(local.shape))
        for name, part in held.items()
        for offset, local in part.slices
        if local.numel() > 0 or math.prod(part.shape) == 0
    ]
    index: dict[str, dict[str, Any]] = {}
    holders: dict[tuple[str, tuple[int, ...], tuple[int, ...]], list[int]] = {}
    for rank, theirs in enumerate(gather(records, mesh)):
        for name, dtype, whole, offset, shape in theirs:
            entry = index.setdefault(name, {"dtype": dtype, "shape": list(whole), "chunks": []})
            if (entry["dtype"], entry["shape"]) != (dtype, list(whole)):
                raise ValueError(
                    f"{name} cannot be saved: it is {entry['dtype']} {entry['shape']} on one rank and "
                    f"{dtype} {list(whole)} on rank {rank}"
                )
            holders.setdefault((name, offset, shape), []).append(rank)
    files: dict[str, dict[str, Tensor]] = {}
    written = [0] * mesh.world_size  # bytes per rank so far: of several ranks with the same slice the idlest writes it
    for (name, offset, shape), ranks in sorted(holders.items()):
        writer = min(ranks, key=lambda rank: (written[rank], rank))
        written[writer] += math.prod(shape) * dtype_of(index[name]["dtype"]).itemsize
        group = re.sub(r"[^\w-]", "_", name.split(".")[0])
        file = f"{group}_{writer:05d}.safetensors"
        index[name]["chunks"].append([file, list(offset), list(shape)])
        if writer == mesh.world_rank:
            key = key_of(name, offset, shape, index[name]["shape"])
            files.setdefault(file, {})[key] = slices[name, offset].to("cpu", copy=copy).contiguous()
    for name, entry in index.items():
        covered = sum(math.prod(shape) for _, _, shape in entry["chunks"])
        if covered != math.prod(entry["shape"]):
            raise ValueError(
                f"{name} cannot be saved: the ranks hold {covered} of the {math.prod(entry['shape'])} elements of its "
                f"shape {entry['shape']}"
            )
    return Staged(files, index, sum(written))


def write(staged: Staged, folder: Path) -> dict[str, FileRecord]:
    """Write this rank's files and flush them to the disk: by name, size and checksum. Talks to no other rank."""
    written = {}
    for file, slices in staged.files.items():
        seen: set[int] = set()
        for name, tensor in slices.items():  # safetensors refuses two names for one memory
            if tensor.data_ptr() in seen:
                slices = slices | {name: tensor.clone()}
            seen.add(tensor.data_ptr())
        try:
            save_file(slices, folder / file, metadata={"format": "pt"})
        except SafetensorError as error:  # what the library makes of an OSError
            raise OSError(f"{folder / file} could not be written: {error}") from error
        open_to_readers(folder / file)
        flush(folder / file)
        written[file] = FileRecord((folder / file).stat().st_size, checksum(folder / file))
    return written


def open_to_readers(file: Path) -> None:
    """Let whoever may read the folder read the file: safetensors leaves it to its owner alone."""
    file.chmod(file.parent.stat().st_mode & 0o666)


class _ReadLater(Mapping[str, dict[str, Tensor]]):
    """Files whose tensors are read when they are asked for, and not kept."""

    def __init__(self, names: dict[str, list[str]], read: Callable[[str], Tensor]) -> None:
        self._names, self._read = names, read

    def __getitem__(self, file: str) -> dict[str, Tensor]:
        return {name: self._read(name).contiguous() for name in self._names[file]}

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def save_one_by_one(
    root: str | Path,
    iteration: int,
    shapes: Mapping[str, tuple[tuple[int, ...], torch.dtype]],
    read: Callable[[str], Tensor],
    state: Mapping[str, Any],
    arguments: Mapping[str, Any],
    *,
    file_bytes: int = 1 << 30,
) -> Path:
    """``save`` in one process of tensors that are made in their turn: ``read(name)``, as ``shapes`` (and dtypes) says.

    Only the tensors of one or two files are in memory at a time: about ``file_bytes`` each, or one larger tensor. Where
    it fails, nothing is left of it.
    """
    names: dict[str, list[str]] = {}
    sizes: dict[str, int] = {}
    numbers: dict[str, int] = {}
    index: dict[str, dict[str, Any]] = {}
    for name, (shape, dtype) in sorted(shapes.items()):
        group, size = re.sub(r"[^\w-]", "_", name.split(".")[0]), math.prod(shape) * dtype.itemsize
        file = f"{group}_{numbers.setdefault(group, 0):05d}.safetensors"
        if file in sizes and sizes[file] + size > file_bytes:
            numbers[group] += 1
            file = f"{group}_{numbers[group]:05d}.safetensors"
        sizes[file] = sizes.get(file, 0) + size
        names.setdefault(file, []).append(name)
        chunk = [file, [0] * len(shape), list(shape)]
        index[name] = {"dtype": str(dtype).removeprefix("torch."), "shape": list(shape), "chunks": [chunk]}
    staged = Staged(_ReadLater(names, read), index, sum(sizes.values()))
    with all_or_nothing(Path(root), iteration):
        return _finish(Path(root), iteration, staged, _texts(state, arguments), Mesh(), None)


class Saver:
    """The saves of a run, one after the other; ``in_background``: each goes on while the run does.

    Then ``save`` returns once the tensors are copied to CPU memory, and a thread writes them. The thread talks to the
    other ranks' threads over the mesh's group "writer", so that nothing gets between the collectives of the training.
    The next ``save``, and ``join``, first wait for it. ``say`` is called, in the thread too, with what there is to
    tell.

    A save that the disk refuses does not end the run: it is said, what was saved before is untouched, and ``failed``
    lists its iteration. What ``check_folder``, which is called before each save, raises does.
    """

    def __init__(self, mesh: Mesh, in_background: bool, say: Callable[[str], None]) -> None:
        group = mesh.group("writer" if in_background else "world")
        self.mesh = dataclasses.replace(mesh, groups={**mesh.groups, "world": group})
        self.failed: list[int] = []
        self.check_folder: Callable[[], None] = lambda: None
        self._in_background, self._say = in_background, say
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def save(
        self,
        root: str | Path,
        iteration: int,
        tensors: Mapping[str, Tensor | Stored],
        state: Mapping[str, Any],
        arguments: Mapping[str, Any],
        *,
        retain_interval: int | None = None,
    ) -> None:
        """Like the function ``save``; all ranks call together."""
        self.wait()
        self.check_folder()
        started, texts = time.monotonic(), _texts(state, arguments)
        staged = stage(tensors, self.mesh, copy=self._in_background)

        def finish() -> None:
            try:
                folder = _finish(Path(root), iteration, staged, texts, self.mesh, retain_interval)
            except ValueError as error:
                self._note_failure(Path(root), iteration, error)
            else:
                self._say(f"saved {folder} in {time.monotonic() - started:.1f} s")

        if not self._in_background:
            finish()
            return
        self._say(f"saving iteration {iteration} in the background after {time.monotonic() - started:.1f} s")

        def in_background() -> None:
            try:
                finish()
            except BaseException as error:
                self._error = error
                self._say(f"the save of iteration {iteration} failed: {error}")

        self._thread = threading.Thread(target=in_background, name="checkpoint writer", daemon=True)
        self._thread.start()

    def _note_failure(self, root: Path, iteration: int, error: ValueError) -> None:
        """The disk is full, gone or read-only, which may pass: give back what the save has taken of it."""
        self.failed.append(iteration)
        last = None
        if self.mesh.is_first:
            shutil.rmtree(beside(root / folder_name(iteration), ".tmp"), ignore_errors=True)
            last = latest_iteration(root)
        self._say(
            f"WARNING: the save of iteration {iteration} failed: {error}. Training goes on; "
            + (f"the newest checkpoint is iteration {last}" if last is not None else "there is no checkpoint yet")
        )

    def exit_code(self, iteration: int, code: int) -> int:
        """What the process should end with at an iteration, where ``code`` if all saves had been written."""
        if not self.failed:
            return code
        goes_on = code == SAVED_TO_RESUME and iteration not in self.failed
        code = code if goes_on else SAVE_FAILED
        self._say(f"WARNING: not saved: iterations {', '.join(map(str, self.failed))}; exit code {code}")
        return code

    def join(self) -> None:
        """Until the last save has ended, well or badly."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def wait(self) -> None:
        """Until the last save has ended; raises what went wrong in it, a failing disk aside."""
        self.join()
        if self._error is not None:
            error, self._error = self._error, None
            raise error
