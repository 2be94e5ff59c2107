"""Tensors of a folder of ``torch.distributed.checkpoint``, read one at a time and by layers, without a process group.

The library loads whole tensors, and Megatron-LM stacks a matrix of all layers into one: here only the chunks that a
layer needs are read. The folder's metadata is a pickle.
"""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_hc.convert.shards import Spec


class TorchDistFolder:
    """``specs``: name -> whole shape and dtype; entries that are no tensors are left out."""

    def __init__(self, folder: Path) -> None:
        from torch.distributed.checkpoint import FileSystemReader
        from torch.distributed.checkpoint.metadata import TensorStorageMetadata

        self.folder = folder
        try:
            metadata = FileSystemReader(folder).read_metadata()
        except Exception as error:  # a pickle can fail in any way
            raise ValueError(
                f"{folder / '.metadata'} cannot be read ({error}): this is no torch_dist folder"
            ) from error
        self._entries = {
            name: entry
            for name, entry in metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }
        self.specs = {name: Spec(tuple(e.size), e.properties.dtype) for name, e in self._entries.items()}
        self._places = {
            (index.fqn, tuple(index.offset or ())): place for index, place in (metadata.storage_data or {}).items()
        }

    def read(self, name: str, layer: int | None = None) -> Tensor:
        """A tensor, or with ``layer`` its slice at that index of dim 0 (which is then gone)."""
        spec, entry = self.specs[name], self._entries[name]
        first, last = (0, spec.shape[0] if spec.shape else 1) if layer is None else (layer, layer + 1)
        whole = torch.empty((last - first, *spec.shape[1:]) if spec.shape else (), dtype=spec.dtype)
        filled = 0
        for chunk in entry.chunks:
            offset, size = tuple(chunk.offsets), tuple(chunk.sizes)
            low, high = (max(first, offset[0]), min(last, offset[0] + size[0])) if offset else (0, 1)
            if low >= high:
                continue
            part = self._chunk(name, offset)
            if tuple(part.shape) != size:
                raise ValueError(
                    f"{self.folder}: {name} has a chunk of shape {list(part.shape)} instead of {list(size)}"
                )
            if not offset:
                return part
            rest = tuple(slice(at, at + length) for at, length in zip(offset[1:], size[1:], strict=True))
            whole[(slice(low - first, high - first), *rest)] = part[low - offset[0] : high - offset[0]]
            filled += part[low - offset[0] : high - offset[0]].numel()
        if filled != whole.numel():
            raise ValueError(f"{self.folder} is damaged: it has {filled} of {whole.numel()} elements of {name}")
        return whole if layer is None else whole[0]

    def _chunk(self, name: str, offset: tuple[int, ...]) -> Tensor:
        place = self._places.get((name, offset))
        if place is None or Path(place.relative_path).name != place.relative_path:
            raise ValueError(f"{self.folder / '.metadata'} has no file of this folder for a part of {name}")
        try:
            with (self.folder / place.relative_path).open("rb") as file:
                file.seek(place.offset)
                return torch.load(io.BytesIO(file.read(place.length)), weights_only=True, map_location="cpu")
        except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
            raise ValueError(f"{self.folder / place.relative_path}: {name} cannot be read ({error})") from error


class _Missing:
    """Stands for an object of a library that is not here."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


class _Unpickler(pickle.Unpickler):
    """Takes what it cannot import for nothing: Megatron-LM's arguments name its own enums."""

    def find_class(self, module: str, name: str) -> Any:
        try:
            return super().find_class(module, name)
        except (ImportError, AttributeError):
            return _Missing


class _PickleModule:
    """What ``torch.load`` asks of a pickle module."""

    Unpickler = _Unpickler
    load = staticmethod(pickle.load)
    __name__ = "pickle"


def read_common(folder: Path) -> dict[str, Any]:
    """common.pt: what Megatron-LM saves beside tensors. Runs whatever code the file holds."""
    file = folder / "common.pt"
    try:
        found = torch.load(file, map_location="cpu", weights_only=False, pickle_module=_PickleModule)
    except Exception as error:  # a pickle can fail in any way
        raise ValueError(f"{file} cannot be read ({error})") from error
    if not isinstance(found, dict) or not hasattr(found.get("args"), "__dict__"):
        raise ValueError(f"{file} holds no arguments of a run: nothing says what the model is")
    return found
