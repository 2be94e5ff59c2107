"""Checkpoints that any layout can resume: safetensors files of local slices, JSON beside them, no pickle.

::

    ROOT/latest_checkpointed_iteration.txt    the newest iteration as text (Megatron-LM's file)
    ROOT/iter_0000100/
        model_00000.safetensors               rank 0's slices; one file per rank and first part of the names
        optimizer_00000.safetensors           ... (one process: whole tensors under their own names)
        state.json arguments.json             iteration, consumed samples, ...; the resolved arguments and their origins
        checkpoint.json                       written last: sizes of all files; shape, dtype and place of every tensor

A folder is a checkpoint if every file that its ``checkpoint.json`` lists is there in full. Everything is written to
``iter_N.tmp``, flushed to disk and renamed, so a kill at any moment leaves what was there before. Names say nothing
about the layout (global layer indices). A value is a plain tensor (all ranks that have it hold the same numbers) or a
DTensor (a local slice of a whole); what differs from rank to rank, such as the state of a generator, gets a name per
rank (``rng.0.cpu``).

Why not ``torch.distributed.checkpoint``: its safetensors storage reshards right, but builds each file in memory before
it writes it (1.6 GB of tensors took 3.1 GB more; here: nothing more), and records neither file sizes nor whole shapes
to check before a load.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_hc.checkpoint_folder import check_save_folder, find, latest_iteration, problem, read_manifest
from megatron_hc.checkpoint_foreign import check_not_megatrons
from megatron_hc.checkpoint_ranks import all_ranks, dtype_of, gather, key_of, stored_of
from megatron_hc.checkpoint_save import Saver, Staged, save, save_one_by_one, stage, write
from megatron_hc.mesh import Mesh
from megatron_hc.stored import Stored

_SAFETENSORS_NAMES = {
    **{torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.bool: "BOOL"},
    **{torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8"},
    **{torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2"},
}

__all__ = [
    "Reader",
    "Saver",
    "Staged",
    "check",
    "check_not_megatrons",
    "check_save_folder",
    "find",
    "latest_iteration",
    "load",
    "load_tensor_shapes",
    "read_arguments",
    "read_origins",
    "read_state",
    "save",
    "save_one_by_one",
    "stage",
    "write",
]


def load(
    path: str | Path,
    tensors: Mapping[str, Tensor | Stored],
    *,
    prefixes: Sequence[str] | None = None,
    mesh: Mesh | None = None,
) -> None:
    """Fill the given tensors in place, bit for bit, from a checkpoint of any layout.

    tensors: name -> plain tensor, DTensor or Stored (what it holds here is filled), on any device.
    prefixes: the checkpoint may hold no other names under these than the ranks ask for; None: the first parts of the
        names asked for (``model.``, ``optimizer.``), so that weights can be loaded without the optimizer; (): no check.
    mesh: with one, all ranks call together, each with its own names; None: this process alone.
    Floating-point tensors of another dtype are cast (fp32 weights into a bf16 model round to nearest); other
    differences of dtype, shape or names raise ValueError before anything is read.
    """
    folder, mesh = Path(path), mesh or Mesh()
    with all_ranks(mesh):
        reason = problem(folder)
        if reason is not None:
            raise ValueError(f"{folder} is not a whole checkpoint: {reason}")
        index = read_manifest(folder)["tensors"]
    asked = set().union(*gather(set(tensors), mesh))
    if prefixes is None:
        prefixes = sorted({name.split(".")[0] + "." for name in asked})
    with all_ranks(mesh):
        _check_names(folder, index, asked, tuple(prefixes))
        for name, tensor in tensors.items():
            _check_tensor(folder, name, tensor, index[name])
    with all_ranks(mesh), ExitStack() as stack, torch.no_grad():
        opened: dict[str, Any] = {}
        for name, tensor in tensors.items():
            for file, _, _ in index[name]["chunks"]:
                if file not in opened:
                    opened[file] = stack.enter_context(safe_open(folder / file, framework="pt"))
            for offset, local in stored_of(tensor).slices:
                _fill(name, offset, local, index[name], opened)


def check(path: str | Path, tensors: Mapping[str, Tensor | Stored]) -> None:
    """Refuse a checkpoint that ``load`` would refuse for the names or shapes of ``tensors``, which may be on meta.

    Talks to no other rank and looks at the given names only: parts of a model that are on other ranks are not missed.
    """
    folder = Path(path)
    index = read_manifest(folder)["tensors"]
    _check_names(folder, index, set(tensors), tuple(tensors))
    for name, tensor in tensors.items():
        _check_tensor(folder, name, tensor, index[name])


def load_tensor_shapes(path: str | Path) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Name -> (whole shape, dtype) of every tensor of a checkpoint."""
    index = read_manifest(Path(path))["tensors"]
    return {name: (tuple(entry["shape"]), dtype_of(entry["dtype"])) for name, entry in index.items()}


class Reader:
    """A checkpoint of any layout, from which whole tensors are read one at a time; its files stay open in the context.

    Raises ``ValueError`` for a folder that is no whole checkpoint, and for a file that turns out damaged.
    """

    def __init__(self, path: str | Path) -> None:
        self.folder = Path(path)
        reason = problem(self.folder)
        if reason is not None:
            raise ValueError(f"{self.folder} is not a whole checkpoint: {reason}")
        self._index = read_manifest(self.folder)["tensors"]
        self._opened: dict[str, Any] = {}
        self._stack = ExitStack()
        self.shapes = {name: (tuple(entry["shape"]), dtype_of(entry["dtype"])) for name, entry in self._index.items()}
        """Name -> (whole shape, dtype)."""

    def __enter__(self) -> Reader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._opened.clear()
        self._stack.close()

    def read(self, name: str) -> Tensor:
        entry, (shape, dtype) = self._index[name], self.shapes[name]
        whole = torch.empty(shape, dtype=dtype)
        try:
            for file, _, _ in entry["chunks"]:
                if file not in self._opened:
                    self._opened[file] = self._stack.enter_context(safe_open(self.folder / file, framework="pt"))
            _fill(name, (0,) * len(shape), whole, entry, self._opened)
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{self.folder} is damaged, {name} cannot be read ({error}): choose another") from error
        return whole


def read_state(path: str | Path) -> dict[str, Any]:
    """The ``state`` that was given to `save`."""
    return _read_json(Path(path) / "state.json")


def read_arguments(path: str | Path) -> dict[str, Any]:
    """Argument name -> value of the run that saved; ``arguments.json`` also has each value's origin."""
    return {name: entry["value"] for name, entry in read_origins(path).items()}


def read_origins(path: str | Path) -> dict[str, Any]:
    """The ``arguments`` that were given to `save`: name -> {"value": ..., "origin": ...}."""
    file = Path(path) / "arguments.json"
    entries = _read_json(file)
    if not all(isinstance(entry, dict) and "value" in entry for entry in entries.values()):
        raise ValueError(f"{file} holds no arguments: the checkpoint is damaged, choose another")
    return entries


def _read_json(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError("it is no object of JSON")
        return found
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{file} cannot be read ({error}): the checkpoint is damaged, choose another") from None


def _check_names(folder: Path, index: Mapping[str, Any], asked: set[str], prefixes: tuple[str, ...]) -> None:
    missing = sorted(asked - index.keys())
    extra = sorted(name for name in index.keys() - asked if name.startswith(prefixes))
    has_optimizer = any(name.startswith("optimizer.") for name in index)
    if missing and not has_optimizer and all(name.startswith("optimizer.") for name in missing):
        raise ValueError(
            f"the checkpoint {folder} holds no state of the optimizer: --no-load-optim goes on from its iteration with "
            "a fresh one, --finetune begins at iteration 0 with its weights"
        )
    parts = [
        f"{what} {', '.join(names[:3])}" + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        for what, names in (("it lacks", missing), ("it alone has", extra))
        if names
    ]
    if parts:
        raise ValueError(
            f"the checkpoint {folder} is of another model: {' and '.join(parts)}: load it with the flags it was saved "
            "with (--use-checkpoint-args takes them over)"
        )


def _check_tensor(folder: Path, name: str, tensor: Tensor | Stored, entry: Mapping[str, Any]) -> None:
    if list(tensor.shape) != entry["shape"]:
        raise ValueError(
            f"the checkpoint {folder} is of another shape: {name} is {entry['shape']} there and "
            f"{list(tensor.shape)} here: load it with the flags it was saved with (--use-checkpoint-args takes them "
            "over)"
        )
    saved = dtype_of(entry["dtype"])
    if saved != tensor.dtype and not (saved.is_floating_point and tensor.dtype.is_floating_point):
        raise ValueError(f"the checkpoint {folder} holds {name} as {saved}, which cannot be loaded as {tensor.dtype}")


def _fill(
    name: str, offset: tuple[int, ...], local: Tensor, entry: Mapping[str, Any], opened: Mapping[str, Any]
) -> None:
    """Copy the parts of the saved chunks that overlap a slice of this rank."""
    filled = 0
    for file, start, shape in entry["chunks"]:
        key = key_of(name, start, shape, entry["shape"])
        low = [max(ours, theirs) for ours, theirs in zip(offset, start, strict=True)]
        high = [
            min(ours + size, theirs + length)
            for ours, size, theirs, length in zip(offset, local.shape, start, shape, strict=True)
        ]
        if any(first >= end for first, end in zip(low, high, strict=True)):
            continue
        found = opened[file].get_slice(key)
        if list(found.get_shape()) != shape or found.get_dtype() != _SAFETENSORS_NAMES.get(dtype_of(entry["dtype"])):
            raise ValueError(
                f"the checkpoint is damaged: {file} holds {key} as {found.get_dtype()} {found.get_shape()}, its index "
                f"has {entry['dtype']} {shape}"
            )
        here = tuple(slice(first - at, end - at) for first, end, at in zip(low, high, offset, strict=True))
        if [end - first for first, end in zip(low, high, strict=True)] == shape:
            part = opened[file].get_tensor(key)
        else:
            there = tuple(slice(first - at, end - at) for first, end, at in zip(low, high, start, strict=True))
            part = found[there]
        local[here].copy_(part)
        filled += part.numel()
    if filled != local.numel():
        raise ValueError(f"the checkpoint is damaged: its index covers {filled} of {local.numel()} elements of {name}")
