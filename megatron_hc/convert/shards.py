"""Safetensors, read and written one tensor at a time, so that memory holds one tensor and not a model.

The library's own writer wants all tensors of a file at once; the format makes that unnecessary: eight bytes that give
the header's length, the header (JSON: name -> dtype, shape, place), and the numbers one after the other.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
CODES = {dtype: code for code, dtype in DTYPES.items()}
NameOf = Callable[[int, int], str]


class Spec(NamedTuple):
    """A tensor that is not there yet."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class ShardedFolder:
    """The tensors of a Hugging Face folder: model.safetensors, or the files that its index names. One file is open."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files = _files_of(folder)
        self._open: tuple[str, Any] | None = None
        self.specs = self._read_specs()

    def read(self, name: str) -> Tensor:
        """A tensor. A copy: a view would keep in memory what has been read of its file."""
        return self._file(self.files[name]).get_tensor(name).clone()

    def _file(self, file: str) -> Any:
        if self._open is None or self._open[0] != file:
            self._open = None  # unmap the one before
            self._open = (file, _opened(self.folder / file))
        return self._open[1]

    def _read_specs(self) -> dict[str, Spec]:
        specs: dict[str, Spec] = {}
        for file in sorted(set(self.files.values())):
            opened = self._file(file)
            held = set(opened.keys())
            for name in sorted(name for name, at in self.files.items() if at == file):
                if name not in held:
                    raise ValueError(f"{self.folder / INDEX} says that {name} is in {file}, which does not have it")
                part = opened.get_slice(name)
                code = part.get_dtype()
                if code not in DTYPES:
                    raise ValueError(f"{name} in {self.folder / file} has dtype {code}, which is not read here")
                specs[name] = Spec(tuple(part.get_shape()), DTYPES[code])
        return specs


def _opened(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} cannot be read as safetensors ({error}): it is damaged, copy it again") from error


def _files_of(folder: Path) -> dict[str, str]:
    """Tensor name -> file name."""
    index, single = folder / INDEX, folder / SINGLE
    if not index.exists():
        if not single.exists():
            raise ValueError(f"{folder} holds neither {SINGLE} nor {INDEX}: name a folder of save_pretrained")
        return dict.fromkeys(_opened(single).keys(), SINGLE)
    found = read_json(index).get("weight_map")
    if not isinstance(found, dict) or not found or not all(isinstance(file, str) for file in found.values()):
        raise ValueError(f"{index} has no weight_map of tensor names and files")
    for name, file in found.items():
        if Path(file).name != file or file in ("", ".", ".."):
            raise ValueError(f"{index} says that {name} is in {file!r}, which is not a file of that folder")
        if not (folder / file).is_file():
            raise ValueError(f"{index} says that {name} is in {file}, which is missing")
    return found


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; ``ValueError`` in one sentence for anything else."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read ({error})") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} must hold a JSON object, not {type(found).__name__}")
    return found


class FileWriter:
    """One safetensors file whose tensors are known beforehand and come in that order."""

    def __init__(self, path: Path, specs: Mapping[str, Spec]) -> None:
        self.path = path
        # Wide dtypes first, as the library does it: every tensor then begins at a multiple of its item size.
        self._left = sorted(specs.items(), key=lambda item: -item[1].dtype.itemsize)
        assert [name for name, _ in self._left] == list(specs), "give wide dtypes first"
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name, spec in self._left:
            begin, end = end, end + spec.num_bytes
            header[name] = {"dtype": CODES[spec.dtype], "shape": list(spec.shape), "data_offsets": [begin, end]}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._file = path.open("wb")
        self._file.write(struct.pack("<Q", len(text)) + text)

    @property
    def is_full(self) -> bool:
        return not self._left

    def write(self, name: str, tensor: Tensor) -> None:
        expected, spec = self._left.pop(0)
        assert (name, tuple(tensor.shape)) == (expected, spec.shape), f"{name} {tuple(tensor.shape)} for {expected}"
        flat = tensor.to(spec.dtype).contiguous().view(-1)
        self._file.write(flat.view(torch.uint8).numpy().data if flat.numel() else b"")

    def close(self) -> None:
        assert self.is_full, f"{self.path} lacks {self._left[0][0]}"
        self._file.close()


class ShardWriter:
    """Several safetensors files, each of at most ``max_bytes`` (one tensor may be more); tensors come in order.

    ``groups``: tensors in order, wide dtypes first; those of one group stay in one file.
    ``name_of(number, count)`` names the files, counted from 0.
    """

    def __init__(
        self, folder: Path, groups: Iterable[Mapping[str, Spec]], max_bytes: int, name_of: NameOf | None = None
    ) -> None:
        self.folder = folder
        shards: list[dict[str, Spec]] = [{}]
        size = 0
        for group in groups:
            needed = sum(spec.num_bytes for spec in group.values())
            if shards[-1] and size + needed > max_bytes:
                shards.append({})
                size = 0
            shards[-1].update(group)
            size += needed
        self._shards = shards
        namer = name_of or hf_name
        self.names = [namer(number, len(shards)) for number in range(len(shards))]
        self.files = {name: file for file, shard in zip(self.names, shards, strict=True) for name in shard}
        self.total_bytes = sum(spec.num_bytes for shard in shards for spec in shard.values())
        self._next = 0
        self._writer: FileWriter | None = None

    def write(self, name: str, tensor: Tensor) -> None:
        if self._writer is None:
            self._writer = FileWriter(self.folder / self.names[self._next], self._shards[self._next])
            self._next += 1
        self._writer.write(name, tensor)
        if self._writer.is_full:
            self._writer.close()
            self._writer = None

    def write_index(self) -> None:
        """Hugging Face's index, where there are several files."""
        if len(self.names) > 1:
            content = {"metadata": {"total_size": self.total_bytes}, "weight_map": dict(sorted(self.files.items()))}
            (self.folder / INDEX).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            assert self._writer is None and self._next == len(self.names), "tensors are missing"
        elif self._writer is not None:
            self._writer._file.close()


def hf_name(number: int, count: int) -> str:
    return SINGLE if count == 1 else f"model-{number + 1:05d}-of-{count:05d}.safetensors"
