"""Text files to documents, for the data tools. This module needs no torch.

Reading is in two halves, so that only the cheap one happens in the main process: ``records`` cuts a file into raw
records, ``texts`` turns a record into text, in a worker. A new kind of file is a class with the methods of ``Reader``
and a line in ``open_reader``. Tables and the datasets library are in ``tables.py``.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from megatron_hc.data.streams import (
    BYTE_ORDER_MARK,
    COMPRESSIONS,
    LONGEST_PIECE,
    Stream,
    Unreadable,
    can_be_cut,
    count,
    cuts,
    import_zstandard,
    pieces,
)

Texts = dict[str, list[str]]
"""For each key, the parts of one document; each becomes one sequence."""

JSON_SUFFIXES = (".jsonl", ".json", ".ndjson")
TEXT_SUFFIXES = (".txt", ".text")


class Record(NamedTuple):
    """One document as it stands in its file."""

    number: int
    """Which line, document or row of its reader, from 1."""
    content: Any
    """Bytes, or for tables what stands under each key. None: longer than ``LONGEST_PIECE``."""
    size: int
    """Bytes of text, about."""


class Reader(Protocol):
    """One input file, or a part of one. Small enough to be sent to a worker with every group of records."""

    name: str
    size: int
    """Bytes of the file (0: not known)."""

    @property
    def position(self) -> int:
        """Bytes of the file that ``records`` has read."""

    def records(self) -> Iterator[Record]:
        """All documents in order. Raises ``Unreadable`` where the rest of the file cannot be read."""

    def texts(self, record: Record) -> Texts:
        """The text of a record; ``ValueError`` that names its place where there is none."""

    def place(self, record: Record) -> str:
        """File and line, for messages."""

    def divided(self, parts: int) -> Sequence[Reader]:
        """Readers that give the same documents in the same order, up to ``parts`` of about equal size."""


class _Text:
    """What plain text and JSON lines share: pieces of a stream."""

    unit = "line"

    def __init__(self, path: str, separator: str, start: int = 0, stop: int | None = None) -> None:
        self.name = path
        self.separator = separator.encode()
        self.start = start
        self.stop = stop
        self.size = (os.path.getsize(path) if stop is None else stop) - start
        self._stream: Stream | None = None

    @property
    def position(self) -> int:
        return self._stream.position - self.start if self._stream else 0

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_stream": None}

    def _pieces(self) -> Iterator[tuple[int, bytes | None]]:
        """Every piece with its number; blank ones are the caller's to leave out."""
        self._stream = Stream(self.name, self.start, self.stop)
        for number, piece in enumerate(pieces(self._stream.blocks(), self.separator), 1):
            if number == 1 and self.start == 0 and piece is not None:
                piece = piece.removeprefix(BYTE_ORDER_MARK)
            yield number, piece

    def place(self, record: Record) -> str:
        before = count(self.name, self.separator, self.start) if self.start else 0
        return f"{self.name}, {self.unit} {before + record.number}"

    def _decode(self, record: Record) -> str:
        if record.content is None:
            raise ValueError(f"{self.place(record)} is longer than {LONGEST_PIECE >> 20} MiB")
        try:
            return record.content.decode()
        except UnicodeDecodeError as error:
            raise ValueError(f"{self.place(record)}: byte {error.start} is not UTF-8 ({error.reason})") from error

    def _ranges(self, parts: int) -> list[tuple[int, int]]:
        whole = Path(self.name).suffix not in COMPRESSIONS and self.start == 0 and self.stop is None
        bounds = [0, self.size]
        if whole and can_be_cut(self.separator) and parts > 1 and self.size:
            bounds[1:1] = cuts(self.name, self.separator, parts)
        return list(zip(bounds, bounds[1:], strict=False))


class PlainText(_Text):
    """Plain text: documents are what stands between separators; '' makes the whole file one document.

    Empty documents are left out; lines may end with CR LF.
    """

    def __init__(self, path: str, separator: str, key: str, start: int = 0, stop: int | None = None) -> None:
        super().__init__(path, separator, start, stop)
        self.key = key
        self.unit = "line" if separator == "\n" else "document"

    def records(self) -> Iterator[Record]:
        lines = self.separator == b"\n"
        for number, piece in self._pieces():
            content = piece.removesuffix(b"\r") if lines and piece else piece
            if content != b"":
                yield Record(number, content, len(content or b""))

    def texts(self, record: Record) -> Texts:
        return {self.key: [self._decode(record)]}

    def place(self, record: Record) -> str:
        return super().place(record) if self.separator else self.name

    def divided(self, parts: int) -> Sequence[Reader]:
        ranges = self._ranges(parts)
        if len(ranges) == 1:
            return [self]
        return [PlainText(self.name, self.separator.decode(), self.key, *range) for range in ranges]


class JsonLines(_Text):
    """One JSON object per line; under each of ``keys`` a text, or a list of texts. Blank lines are left out."""

    def __init__(self, path: str, keys: Sequence[str], start: int = 0, stop: int | None = None) -> None:
        super().__init__(path, "\n", start, stop)
        self.keys = tuple(keys)

    def records(self) -> Iterator[Record]:
        for number, line in self._pieces():
            if line is None or line.strip():
                yield Record(number, line, len(line or b""))

    def texts(self, record: Record) -> Texts:
        try:
            # No number is a text; Python would refuse to convert one of more than 4,300 digits to an integer.
            value = json.loads(self._decode(record), parse_int=float)
        except (json.JSONDecodeError, RecursionError) as error:
            hint = " (one object per line is needed)" if record.content.lstrip()[:1] == b"[" else ""
            raise ValueError(f"{self.place(record)} is not JSON: {error}{hint}") from error
        if not isinstance(value, dict):
            raise ValueError(f"{self.place(record)} holds a JSON {type(value).__name__} instead of an object")
        found: Texts = {}
        for key in self.keys:
            text: Any = value.get(key)
            found[key] = text if isinstance(text, list) else [text]
            if not all(isinstance(part, str) for part in found[key]):
                raise ValueError(missing_text(self.place(record), key, list(value)))
        return found

    def divided(self, parts: int) -> Sequence[Reader]:
        ranges = self._ranges(parts)
        return [self] if len(ranges) == 1 else [JsonLines(self.name, self.keys, *range) for range in ranges]


def missing_text(place: str, key: str, keys: Sequence[str]) -> str:
    """The message for a document without text under ``key``."""
    shown = ", ".join(repr(name)[:60] for name in keys[:20]) or "none"
    return f"{place} has no text under --json-keys {key} (its keys: {shown})"


def kind_of(path: str) -> str:
    """The suffix that says how to read a file: that of ``a.jsonl.gz`` is .jsonl."""
    name = Path(path)
    return Path(name.stem).suffix if name.suffix in COMPRESSIONS else name.suffix


def open_reader(path: str, keys: Sequence[str], separator: str) -> Reader:
    """The reader for a file: JSON lines for .jsonl and .json, a table for .parquet, else plain text.

    Each may be compressed (.gz, .zst). ``ValueError`` where it cannot be read or does not fit.
    """
    try:
        with open(path, "rb"):
            pass
    except OSError as error:
        raise ValueError(f"--input {path} cannot be read: {error.strerror}") from error
    if Path(path).suffix == ".zst":
        import_zstandard(path)
    if kind_of(path) in JSON_SUFFIXES:
        return JsonLines(path, keys)
    if Path(path).suffix == ".parquet":
        from megatron_hc.data.tables import Parquet

        return Parquet(path, keys)
    if len(keys) != 1:
        raise ValueError(
            f"--json-keys {' '.join(keys)}: {path} is plain text and has one text per document, not several"
        )
    return PlainText(path, _spelled_in(path, separator), keys[0])


def _spelled_in(path: str, separator: str) -> str:
    """The separator as it stands in a file whose lines end with CR LF: between paragraphs '\\r\\n\\r\\n' for '\\n\\n'.

    A lone line break needs no care: ``PlainText`` removes the CR.
    """
    other = separator.replace("\n", "\r\n")
    if separator in ("\n", other) or "\r" in separator:
        return separator
    try:
        start = next(Stream(path).blocks(), b"")
    except Unreadable:
        return separator  # the reading reports it
    return other if other.encode() in start and separator.encode() not in start else separator


def _below(path: str) -> Iterator[Path]:
    """Everything below a folder, through links too; of a folder that is reached twice the first way counts."""
    seen: set[str] = set()
    for folder, folders, names in os.walk(path, followlinks=True):
        folders.sort()
        if (real := os.path.realpath(folder)) in seen:
            folders.clear()  # a link to a folder above would never end
            continue
        seen.add(real)
        yield from (Path(folder) / name for name in names)


def files_of(path: str, pattern: str | None) -> tuple[list[str], list[str]]:
    """The files to read below a folder in order of their names, and those left out.

    Without a ``pattern`` (as in a shell: '*.py') these are the files of the known kinds. Hidden files and folders do
    not count.
    """
    taken: list[str] = []
    left_out: list[str] = []
    for found in sorted(_below(path)):
        if any(part.startswith(".") for part in found.relative_to(path).parts) or not found.is_file():
            continue
        known = kind_of(str(found)) in (*JSON_SUFFIXES, *TEXT_SUFFIXES, ".parquet")
        (taken if (found.match(pattern) if pattern else known) else left_out).append(str(found))
    return taken, left_out
