"""The .bin/.idx files: identical with megatron-core's in both directions; damaged files are refused by name."""

from __future__ import annotations

import errno
import os
import pickle
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_hc.data.indexed import DTYPE_CODES, IndexedDataset, IndexedDatasetWriter, optimal_dtype

# A document is a list of sequences; empty documents and empty sequences occur.
DOCUMENTS = st.lists(st.lists(st.lists(st.integers(0, 127), max_size=9), max_size=4), max_size=12)


def write_ours(prefix: str, documents: list, dtype: type) -> None:
    with IndexedDatasetWriter(prefix, dtype) as writer:
        for number, document in enumerate(documents):
            if number % 2:
                for sequence in document:
                    writer.add_item(sequence)
                writer.end_document()
            else:
                writer.add_document([token for part in document for token in part], [len(part) for part in document])


def write_theirs(prefix: str, documents: list, dtype: type) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for document in documents:
        builder.add_document([token for part in document for token in part], [len(part) for part in document])
    builder.finalize(f"{prefix}.idx")


@settings(max_examples=60, deadline=None)
@given(DOCUMENTS, st.sampled_from(sorted(DTYPE_CODES)))
def test_same_bytes_as_megatron_and_each_reads_the_other(documents: list, code: int) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDataset as Theirs

    dtype = DTYPE_CODES[code]
    with tempfile.TemporaryDirectory() as folder:
        ours, theirs = os.path.join(folder, "ours"), os.path.join(folder, "theirs")
        write_ours(ours, documents, dtype)
        write_theirs(theirs, documents, dtype)
        for suffix in (".bin", ".idx"):
            assert Path(ours + suffix).read_bytes() == Path(theirs + suffix).read_bytes()
        assert sorted(os.listdir(folder)) == ["ours.bin", "ours.idx", "theirs.bin", "theirs.idx"]
        sequences = [sequence for document in documents for sequence in document]
        read = IndexedDataset(theirs)
        assert read.dtype == dtype and len(read) == len(sequences)
        assert [read.get(i).tolist() for i in range(len(read))] == sequences
        assert read.lengths.tolist() == [len(sequence) for sequence in sequences]
        assert read.document_indices.tolist() == np.cumsum([0] + [len(document) for document in documents]).tolist()
        if sum(map(len, sequences)):  # Megatron's reader cannot map an empty file
            other = Theirs(ours)
            assert [other.get(i).tolist() for i in range(len(other))] == sequences
            assert other.document_indices.tolist() == read.document_indices.tolist()


def test_document_without_lengths_is_one_sequence_and_an_empty_one_has_none(tmp_path: Path) -> None:
    prefix = str(tmp_path / "d")
    with IndexedDatasetWriter(prefix, np.uint16) as writer:
        writer.add_document([1, 2, 3])
        writer.add_document([])
        writer.add_document(np.array([4, 5]))
    dataset = IndexedDataset(prefix)
    assert dataset.lengths.tolist() == [3, 2]
    assert dataset.document_indices.tolist() == [0, 1, 1, 2]
    assert dataset.get(0, 1).tolist() == [2, 3] and dataset.get(0, 1, 1).tolist() == [2]
    again = pickle.loads(pickle.dumps(dataset))
    assert again.get(1).tolist() == [4, 5]


def test_interrupted_writer_leaves_what_was_there(tmp_path: Path) -> None:
    prefix = str(tmp_path / "d")
    with pytest.raises(KeyboardInterrupt):
        with IndexedDatasetWriter(prefix, np.uint16) as writer:
            writer.add_document([1])
            raise KeyboardInterrupt
    assert os.listdir(tmp_path) == []
    with IndexedDatasetWriter(prefix, np.uint16) as writer:
        writer.add_document([1, 2])
    killed = IndexedDatasetWriter(prefix, np.uint16)  # never finalised, as after SIGKILL
    killed.add_document([7, 7, 7])
    assert IndexedDataset(prefix).get(0).tolist() == [1, 2]


def test_optimal_dtype_is_megatrons() -> None:
    from megatron.core.datasets.indexed_dataset import DType

    for vocab_size in (None, 1, 257, 65499, 65500, 65536, 128000):
        assert optimal_dtype(vocab_size) == DType.optimal_dtype(vocab_size)


def test_token_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    for wrong in (70000, -1):
        with pytest.raises(ValueError, match=f"token {wrong} does not fit in uint16"):
            with IndexedDatasetWriter(str(tmp_path / "d"), np.uint16) as writer:
                writer.add_document([1, wrong])


@pytest.fixture
def prefix(tmp_path: Path) -> str:
    with IndexedDatasetWriter(str(tmp_path / "d"), np.uint16) as writer:
        for length in (3, 5, 2):
            writer.add_document(list(range(length)))
    return str(tmp_path / "d")


def damage(path: str, change) -> None:
    Path(path).write_bytes(change(bytearray(Path(path).read_bytes())))


@pytest.mark.parametrize(
    ("suffix", "change", "message"),
    [
        (".idx", lambda data: b"PARQUET\0\0" + data[9:], r"d\.idx is not a dataset index: it starts with b'PARQUET"),
        (".idx", lambda data: b"", r"d\.idx is not a dataset index"),
        (".idx", lambda data: data[:20], r"d\.idx is truncated: 20 bytes, and the header alone takes 34"),
        (".idx", lambda data: data[:-3], r"d\.idx is truncated: 99 bytes, but its header .* asks for 102"),
        (".idx", lambda data: data + b"12345", r"d\.idx is damaged: 107 bytes, but its header .* asks for 102"),
        (".idx", lambda data: data[:9] + b"\2" + data[10:], r"d\.idx has version 2"),
        (".idx", lambda data: data[:17] + b"\11" + data[18:], r"d\.idx has the dtype code 9"),
        (".idx", lambda data: data[:-8] + b"\7" + data[-7:], r"d\.idx is damaged: its last document boundary"),
        (".bin", lambda data: data[:-2], r"d\.bin does not match its index: 18 bytes, but .*d\.idx describes 20 bytes"),
        (
            ".bin",
            lambda data: data + b"x",
            r"d\.bin does not match its index: 21 bytes, but .*d\.idx describes 20 bytes",
        ),
    ],
)
def test_damaged_files_are_refused(prefix: str, suffix: str, change, message: str) -> None:
    damage(prefix + suffix, change)
    with pytest.raises(ValueError, match=message):
        IndexedDataset(prefix)


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_missing_file_is_refused(prefix: str, suffix: str) -> None:
    os.unlink(prefix + suffix)
    with pytest.raises(ValueError, match=rf"d\{suffix} does not exist"):
        IndexedDataset(prefix)


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_a_file_closed_to_this_user_is_refused(prefix: str, suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Path.open

    def closed(path: Path, *arguments: object, **options: object) -> object:
        if path.suffix == suffix:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real(path, *arguments, **options)  # type: ignore[call-overload]

    monkeypatch.setattr(Path, "open", closed)
    with pytest.raises(ValueError, match=rf"^dataset {prefix}: {prefix}\{suffix} cannot be read: Permission denied$"):
        IndexedDataset(prefix)


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 101), st.integers(0, 255))
def test_any_changed_byte_of_the_index_is_read_or_refused(position: int, value: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        prefix = os.path.join(folder, "d")
        write_ours(prefix, [[[1, 2, 3]], [[4, 5]], [[6]]], np.uint16)

        def change(data: bytearray) -> bytes:
            data[position % len(data)] = value
            return bytes(data)

        damage(prefix + ".idx", change)
        try:
            dataset = IndexedDataset(prefix)
        except ValueError:
            return
        assert [dataset.get(i).tolist() for i in range(len(dataset))] == [[1, 2, 3], [4, 5], [6]]
