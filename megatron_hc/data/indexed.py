"""Token files in Megatron-LM's ``.bin/.idx`` format, byte for byte: a memory-mapped reader and a writer.

``PREFIX.bin`` holds the tokens of all sequences one after another, without a header. ``PREFIX.idx``, little endian:

    9 bytes  "MMIDIDX\\0\\0"        u64  version, 1        u8  code of the token dtype (DTYPE_CODES)
    u64      S, number of sequences                        u64 D, number of document boundaries = documents + 1
    i32[S]   tokens per sequence    i64[S]  byte offset of each sequence    i64[D]  first sequence of each document

A document is one sequence or several; ``document_indices`` starts with 0 and ends with S. This module needs no torch.
"""

from __future__ import annotations

import os
import struct
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER_BYTES = 34
CHECKED_SEQUENCES = 2**22  # an index of up to this many sequences is checked entry by entry when it is opened
DTYPE_CODES: dict[int, type[np.number[Any]]] = {
    1: np.uint8,
    2: np.int8,
    3: np.int16,
    4: np.int32,
    5: np.int64,
    6: np.float64,
    7: np.float32,
    8: np.uint16,
}

Tokens = Sequence[int] | np.ndarray


def bin_path(prefix: str) -> Path:
    """The file of the tokens."""
    return Path(f"{prefix}.bin")


def idx_path(prefix: str) -> Path:
    """The file of lengths, offsets and document boundaries."""
    return Path(f"{prefix}.idx")


def optimal_dtype(vocab_size: int | None) -> type[np.number[Any]]:
    """The dtype Megatron-LM's preprocessing writes for a vocabulary: u16 below 65,500 tokens, else i32."""
    return np.uint16 if vocab_size is not None and vocab_size < 65500 else np.int32


class IndexedDataset:
    """Sequences of tokens, read through a memory map.

    ``prefix`` is the path without ``.bin``/``.idx``. Raises ``ValueError`` where a file is missing, is not an index, is
    cut short, or where the two do not belong together.
    """

    def __init__(self, prefix: str) -> None:
        self.prefix = str(prefix)
        for path in (idx_path(self.prefix), bin_path(self.prefix)):
            try:
                with path.open("rb"):
                    pass
            except (FileNotFoundError, NotADirectoryError):
                raise ValueError(
                    f"dataset {self.prefix}: {path} does not exist; a prefix needs both .bin and .idx"
                ) from None
            except OSError as error:
                raise ValueError(f"dataset {self.prefix}: {path} cannot be read: {error.strerror}") from error
        code, num_sequences, num_boundaries = self._read_header()
        self.dtype = np.dtype(DTYPE_CODES[code])
        # One map of the whole index; the three arrays are views into it.
        index = np.memmap(idx_path(self.prefix), mode="r", dtype=np.uint8)
        position = HEADER_BYTES

        def take(dtype: type[np.number[Any]], count: int) -> np.ndarray:
            nonlocal position
            start, position = position, position + count * np.dtype(dtype).itemsize
            return np.frombuffer(index, dtype=np.dtype(dtype).newbyteorder("<"), count=count, offset=start)

        self.lengths: np.ndarray = take(np.int32, num_sequences)
        """i32[S]: tokens per sequence."""
        self.offsets: np.ndarray = take(np.int64, num_sequences)
        """i64[S]: byte offset of each sequence in the .bin file."""
        self.document_indices: np.ndarray = take(np.int64, num_boundaries)
        """i64[documents + 1]: first sequence of each document, then S."""
        self._check_sizes()
        self._tokens = np.empty(0, self.dtype)  # numpy cannot map an empty file
        if self.num_tokens:
            # A plain array over the map: every slice of a memmap object costs microseconds more.
            self._tokens = np.memmap(bin_path(self.prefix), mode="r", dtype=self.dtype).view(np.ndarray)

    def _read_header(self) -> tuple[int, int, int]:
        """Dtype code, S and D, checked against the size of the file."""
        path = idx_path(self.prefix)
        with path.open("rb") as file:
            header = file.read(HEADER_BYTES)
            size = os.fstat(file.fileno()).st_size
        if header[: len(MAGIC)] != MAGIC:
            raise ValueError(
                f"{path} is not a dataset index: it starts with {header[: len(MAGIC)]!r} instead of {MAGIC!r}"
            )
        if len(header) < HEADER_BYTES:
            raise ValueError(f"{path} is truncated: {size} bytes, and the header alone takes {HEADER_BYTES}")
        version, code, num_sequences, num_boundaries = struct.unpack_from("<QBQQ", header, len(MAGIC))
        if version != VERSION:
            raise ValueError(f"{path} has version {version} of the index format, and only version {VERSION} is known")
        if code not in DTYPE_CODES:
            raise ValueError(
                f"{path} has the dtype code {code}, and only {min(DTYPE_CODES)} .. {max(DTYPE_CODES)} exist"
            )
        expected = HEADER_BYTES + 12 * num_sequences + 8 * num_boundaries
        # Multimodal datasets end with one more byte per sequence, which a reader of tokens does not need.
        if size not in (expected, expected + num_sequences):
            raise ValueError(
                f"{path} is {'truncated' if size < expected else 'damaged'}: {size} bytes, but its header "
                f"({num_sequences} sequences, {num_boundaries} document boundaries) asks for {expected}"
            )
        return code, num_sequences, num_boundaries

    def _check_sizes(self) -> None:
        sequences = len(self.lengths)
        if len(self.document_indices) == 0 or self.document_indices[-1] != sequences:
            raise ValueError(
                f"{idx_path(self.prefix)} is damaged: its last document boundary is not its {sequences} sequences"
            )
        expected = int(self.offsets[-1]) + int(self.lengths[-1]) * self.dtype.itemsize if sequences else 0
        size = bin_path(self.prefix).stat().st_size
        if size != expected:
            raise ValueError(
                f"{bin_path(self.prefix)} does not match its index: {size} bytes, but {idx_path(self.prefix)} "
                f"describes {expected} bytes ({sequences} sequences of {self.dtype.name}); copy or preprocess it again"
            )
        if sequences <= CHECKED_SEQUENCES:
            self._check_contents()
        self.num_tokens = expected // self.dtype.itemsize

    def _check_contents(self) -> None:
        ends = np.cumsum(self.lengths, dtype=np.int64) * self.dtype.itemsize
        starts = np.concatenate((np.zeros(1, np.int64), ends[:-1]))[: len(ends)]
        boundaries = np.concatenate((np.zeros(1, np.int64), self.document_indices))
        if (self.lengths < 0).any() or (self.offsets != starts).any() or (np.diff(boundaries) < 0).any():
            raise ValueError(
                f"{idx_path(self.prefix)} is damaged: its lengths, offsets and document boundaries do not agree"
            )

    def __len__(self) -> int:
        """Number of sequences."""
        return len(self.lengths)

    def get(self, index: int, offset: int = 0, length: int | None = None) -> np.ndarray:
        """``length`` tokens (None: all that follow) of sequence ``index`` from its token ``offset`` on, read-only."""
        start = int(self.offsets[index]) // self.dtype.itemsize + offset
        count = int(self.lengths[index]) - offset if length is None else length
        return self._tokens[start : start + count]

    def __getitem__(self, index: int) -> np.ndarray:
        return self.get(index)

    def tokens(self, start: int, stop: int) -> np.ndarray:
        """Tokens ``start`` to ``stop`` of the file, whatever sequence they belong to, read-only."""
        return self._tokens[start:stop]

    def __reduce__(self) -> tuple[type[IndexedDataset], tuple[str]]:
        return IndexedDataset, (self.prefix,)  # a worker process maps the files itself


def write_index(path: Path, dtype: np.dtype[Any], lengths: np.ndarray, document_indices: np.ndarray) -> None:
    """Write the index of sequences of ``lengths`` (i32[S]) that stand one after another in the .bin file."""
    code = {np.dtype(known): code for code, known in DTYPE_CODES.items()}[dtype]
    offsets = np.zeros(len(lengths), dtype=np.int64)
    np.cumsum(lengths[:-1], dtype=np.int64, out=offsets[1:])
    offsets *= dtype.itemsize
    with path.open("wb") as file:
        file.write(MAGIC)
        file.write(struct.pack("<QBQQ", VERSION, code, len(lengths), len(document_indices)))
        for values in (lengths, offsets, document_indices):
            file.write(values.astype(values.dtype.newbyteorder("<"), copy=False).tobytes())


class IndexedDatasetWriter:
    """Writes ``PREFIX.bin`` and ``PREFIX.idx``; a context manager.

    Both are written beside as ``.partial`` and renamed when everything is there, the index last, so that an
    interruption leaves the dataset that was there before or none, but no half one.
    """

    def __init__(self, prefix: str, dtype: type[np.number[Any]] = np.int32) -> None:
        self.prefix = str(prefix)
        self.dtype = np.dtype(dtype)
        assert self.dtype.type in DTYPE_CODES.values()
        self._lengths = array("i")
        self._documents = array("q", [0])
        self._file = self._partial(bin_path(self.prefix)).open("wb")

    @staticmethod
    def _partial(path: Path) -> Path:
        return path.with_name(path.name + ".partial")

    @property
    def num_documents(self) -> int:
        return len(self._documents) - 1

    def _write(self, tokens: Tokens) -> int:
        values = np.asarray(tokens)
        if values.size and values.dtype != self.dtype and self.dtype.kind in "iu":
            limits = np.iinfo(self.dtype)
            low, high = values.min(), values.max()
            if low < limits.min or high > limits.max:
                wrong = int(low if low < limits.min else high)
                raise ValueError(
                    f"token {wrong} does not fit in {self.dtype.name}, the dtype of {bin_path(self.prefix)}"
                )
        self._file.write(values.astype(self.dtype, copy=False).tobytes())
        return int(values.size)

    def add_item(self, tokens: Tokens) -> None:
        """Append one sequence to the document being written; ``end_document`` closes it."""
        self._lengths.append(self._write(tokens))

    def end_document(self) -> None:
        """Close the document made of the sequences added since the last one."""
        self._documents.append(len(self._lengths))

    def add_document(self, tokens: Tokens, lengths: Sequence[int] | None = None) -> None:
        """Append a whole document: one sequence, or sequences of the given lengths.

        A document without tokens has no sequence, as in Megatron-LM's preprocessing.
        """
        count = self._write(tokens)
        parts = ([count] if count else []) if lengths is None else list(lengths)
        assert sum(parts) == count, "lengths must add up to the number of tokens"
        self._lengths.extend(parts)
        self.end_document()

    def finalize(self) -> None:
        """Write the index and give both files their names."""
        self._file.close()
        lengths = np.frombuffer(self._lengths, dtype=np.int32) if self._lengths else np.empty(0, np.int32)
        partial = self._partial(idx_path(self.prefix))
        write_index(partial, self.dtype, lengths, np.frombuffer(self._documents, dtype=np.int64))
        # Without an index there is no dataset: an old index must not stand beside new tokens, not even for a moment.
        idx_path(self.prefix).unlink(missing_ok=True)
        os.replace(self._partial(bin_path(self.prefix)), bin_path(self.prefix))
        os.replace(partial, idx_path(self.prefix))

    def abort(self) -> None:
        """Throw away what was written."""
        self._file.close()
        for path in (bin_path(self.prefix), idx_path(self.prefix)):
            self._partial(path).unlink(missing_ok=True)

    def __enter__(self) -> IndexedDatasetWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, traceback: object) -> None:
        if kind is None:
            self.finalize()
        else:
            self.abort()
