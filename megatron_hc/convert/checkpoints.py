"""Our checkpoint folders, read and written tensor by tensor, by one process without groups."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from megatron_hc import checkpoint
from megatron_hc.checkpoint_folder import (
    FORMAT,
    MANIFEST,
    beside,
    flush,
    folder_name,
    prepare,
    problem,
    publish,
    remove,
    write_text,
    write_tracker,
)
from megatron_hc.checkpoint_ranks import key_of
from megatron_hc.convert.shards import ShardWriter, Spec


class Folder:
    """A checkpoint of any layout; ``root``: an iter_N folder, or what --save wrote them to."""

    def __init__(self, root: str, step: int | None = None) -> None:
        path = Path(root)
        self.path = path if (path / MANIFEST).exists() else checkpoint.find(root, step)
        reason = problem(self.path)
        if reason is not None:
            raise ValueError(f"{self.path} is not a whole checkpoint: {reason}")
        shapes = checkpoint.load_tensor_shapes(self.path)
        self.specs = {name: Spec(shape, dtype) for name, (shape, dtype) in shapes.items()}
        self.arguments = checkpoint.read_arguments(self.path)
        self.origins: dict[str, Any] = json.loads((self.path / "arguments.json").read_text(encoding="utf-8"))
        self.state = checkpoint.read_state(self.path)
        self._index = json.loads((self.path / MANIFEST).read_text(encoding="utf-8"))["tensors"]

    def read(self, name: str) -> Tensor:
        """A whole tensor, put together of its slices."""
        spec, chunks = self.specs[name], self._index[name]["chunks"]
        if len(chunks) == 1 and list(chunks[0][2]) == list(spec.shape):
            with safe_open(self.path / chunks[0][0], framework="pt") as file:
                return file.get_tensor(name)
        whole, filled = torch.empty(spec.shape, dtype=spec.dtype), 0
        for file_name, offset, shape in chunks:
            with safe_open(self.path / file_name, framework="pt") as file:
                part = file.get_tensor(key_of(name, offset, shape, spec.shape))
            whole[tuple(slice(at, at + size) for at, size in zip(offset, shape, strict=True))] = part
            filled += part.numel()
        if filled != math.prod(spec.shape):
            raise ValueError(f"{self.path} is damaged: its index covers {filled} elements of {name}")
        return whole


class FolderWriter:
    """Writes ``root/iter_N`` under another name, then renames it and makes it the latest."""

    def __init__(self, root: str, iteration: int, groups: Sequence[Mapping[str, Spec]], max_bytes: int) -> None:
        self.root, self.iteration = Path(root), iteration
        self.final = self.root / folder_name(iteration)
        self.partial = beside(self.final, ".tmp")
        self._specs = {name: spec for group in groups for name, spec in group.items()}
        prepare(self.root, self.partial, sum(spec.num_bytes for spec in self._specs.values()))
        self._writer = ShardWriter(self.partial, groups, max_bytes, lambda number, _: f"model_{number:05d}.safetensors")

    def write(self, name: str, tensor: Tensor) -> None:
        self._writer.write(name, tensor)

    def finish(self, arguments: Mapping[str, Any], state: Mapping[str, Any]) -> Path:
        """The JSON files and the name; returns the folder."""
        sizes = {}
        for file in self._writer.names:
            flush(self.partial / file)
            sizes[file] = (self.partial / file).stat().st_size
        for file, content in (("state.json", state), ("arguments.json", arguments)):
            sizes[file] = write_text(self.partial / file, json.dumps(dict(content), indent=1))
        index = {
            name: {
                "dtype": str(spec.dtype).removeprefix("torch."),
                "shape": list(spec.shape),
                "chunks": [[self._writer.files[name], [0] * len(spec.shape), list(spec.shape)]],
            }
            for name, spec in self._specs.items()
        }
        manifest = {"format": FORMAT, "iteration": self.iteration, "files": sizes, "tensors": index}
        write_text(self.partial / MANIFEST, json.dumps(manifest))
        publish(self.partial, self.final)
        write_tracker(self.root, self.iteration)
        remove(beside(self.final, ".old"))
        return self.final

    def abandon(self) -> None:
        if self.partial.exists():
            shutil.rmtree(self.partial)


def new_folder(path: Path) -> Path:
    """A folder to write in beside ``path``, which must not hold anything."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(f"--save {path} exists and is not an empty folder: choose another")
    partial = path.with_name(path.name + ".tmp")
    try:
        if partial.exists():
            shutil.rmtree(partial)
        partial.mkdir(parents=True)
    except OSError as error:
        raise ValueError(f"--save {path} cannot be written ({error.strerror}): choose another folder") from error
    return partial


def take_place(partial: Path, path: Path) -> None:
    """Give a finished folder its name."""
    if path.exists():
        path.rmdir()
    os.replace(partial, path)
