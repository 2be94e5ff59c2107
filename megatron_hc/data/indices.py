"""Which tokens make sample i: the document, sample and shuffle indices of a GPT dataset, and their cache on disk.

The arrays equal those of ``megatron.core.datasets`` 0.16.1 element for element: the same draws of one
``numpy.random.RandomState`` in the same order (documents, then samples), so a Megatron user's data order is kept.
This module needs no torch.
"""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

LAST_EPOCH_THRESHOLD = 0.80


class Indices(NamedTuple):
    """The three arrays of one dataset."""

    document: np.ndarray
    """i32[epochs * sequences]: sequence numbers in the order in which their tokens are joined."""
    sample: np.ndarray
    """i32[samples + 1, 2]: where each sample starts: position in ``document``, token offset in that sequence."""
    shuffle: np.ndarray
    """u32[samples]: the order of the samples."""


def build_indices(
    lengths: np.ndarray, first: int, stop: int, num_samples: int | None, seq_length: int, seed: int
) -> Indices:
    """Indices over the sequences ``first .. stop - 1``, whose lengths are in ``lengths`` (i32, of all sequences).

    There are as many epochs as ``num_samples`` samples of ``seq_length`` + 1 tokens need (None: one epoch), one token
    shared between neighbours. An epoch of which less than 80 % is needed at the end is kept apart from the others'
    shuffle, so that no document of it is seen before the epochs before it are over.
    """
    epoch_tokens = int(lengths[first:stop].sum(dtype=np.int64))
    assert epoch_tokens > seq_length
    epochs = 1
    if num_samples is not None:
        epochs = max(1, -(-(num_samples * seq_length + 1) // epoch_tokens))
    apart = False
    before_last = ((epochs - 1) * epoch_tokens - 1) // seq_length
    if epochs > 1:
        assert num_samples is not None
        per_epoch = (epoch_tokens - 1) // seq_length
        apart = num_samples - before_last < int(LAST_EPOCH_THRESHOLD * per_epoch)

    random = np.random.RandomState(seed)
    document = _document_index(first, stop, epochs, apart, random)
    sample = _sample_index(lengths, document, seq_length)
    shuffle = _shuffle_index(before_last if apart else len(sample) - 1, len(sample) - 1, random)
    return Indices(document, sample, shuffle)


def _document_index(first: int, stop: int, epochs: int, apart: bool, random: np.random.RandomState) -> np.ndarray:
    if apart:
        head = _document_index(first, stop, epochs - 1, False, random)
        return np.concatenate((head, _document_index(first, stop, 1, False, random)))
    index = np.tile(np.arange(first, stop, dtype=np.int32), epochs)
    random.shuffle(index)
    return index


def _sample_index(lengths: np.ndarray, document: np.ndarray, seq_length: int) -> np.ndarray:
    # Sample k starts at token k * seq_length of the joined sequences, in the sequence that holds this token. The search
    # from the right skips empty sequences, except in front of the very first token, where sample 0 is said to start.
    ends = np.cumsum(lengths[document], dtype=np.int64)
    dtype = np.int32 if len(document) <= np.iinfo(np.int32).max else np.int64
    starts = np.arange((int(ends[-1]) - 1) // seq_length + 1, dtype=np.int64) * seq_length
    position = np.searchsorted(ends, starts, side="right")
    position[0] = 0
    index = np.empty((len(starts), 2), dtype=dtype)
    index[:, 0] = position
    index[:, 1] = starts - np.where(position > 0, ends[position - 1], 0)
    return index


def _shuffle_index(first_part: int, total: int, random: np.random.RandomState) -> np.ndarray:
    dtype = np.uint32 if total < np.iinfo(np.uint32).max - 1 else np.int64
    parts = [np.arange(first_part, dtype=dtype)]
    if first_part < total:
        parts.append(np.arange(first_part, total, dtype=dtype))
    for part in parts:
        random.shuffle(part)
    return np.concatenate(parts)


def lengths_digest(lengths: np.ndarray) -> str:
    """A digest of up to 65,536 of the lengths, spread evenly, so that a rewritten dataset does not hit an old cache."""
    return hashlib.md5(lengths[:: max(1, len(lengths) // 65536)].tobytes(), usedforsecurity=False).hexdigest()


def cached_arrays(
    folder: Path | None,
    kind: str,
    description: Mapping[str, Any],
    names: tuple[str, ...],
    build: Callable[[], tuple[np.ndarray, ...]],
) -> tuple[np.ndarray, ...]:
    """The arrays ``names`` of ``build()``, from ``folder`` if they are there, else built and written there.

    Files are ``<md5 of the description>-<kind>-<name>.npy``, as Megatron-LM names them, and ``-description.txt``. Each
    is written beside and renamed, the description last, which makes it safe that many processes build the same at once.
    ``folder`` None: no cache. Raises ``ValueError`` where the folder cannot be written.
    """
    if folder is None:
        return build()
    text = json.dumps(description, indent=4)
    base = f"{hashlib.md5(text.encode(), usedforsecurity=False).hexdigest()}-{kind}"
    paths = [folder / f"{base}-{name}.npy" for name in names]
    description_path = folder / f"{base}-description.txt"
    found = _load(paths) if os.path.isfile(description_path) else None  # False too where it may not be looked at
    if found is not None:
        return found
    arrays = build()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path, values in zip(paths, arrays, strict=True):
            _replace(path, partial(np.save, arr=values, allow_pickle=False))
        _replace(description_path, lambda file: file.write(text.encode()))
    except OSError as error:
        raise ValueError(
            f"cannot write the index cache in {folder} ({error.strerror or error}): give --data-cache-path a folder "
            "that can be written"
        ) from error
    return _load(paths) or arrays  # mapped, so that the memory is shared between processes


def _load(paths: list[Path]) -> tuple[np.ndarray, ...] | None:
    try:
        # Plain arrays over the maps: every access through a memmap object costs microseconds more.
        return tuple(np.load(path, mmap_mode="r", allow_pickle=False).view(np.ndarray) for path in paths)
    except (OSError, ValueError, EOFError):
        return None  # incomplete (a copy that was cut short): build again


def _replace(path: Path, write: Callable[[Any], Any]) -> None:
    unfinished = path.with_name(f"{path.name}.{os.getpid()}-{uuid.uuid4().hex[:8]}.partial")
    try:
        with unfinished.open("wb") as file:
            write(file)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
