"""Parquet files in parts, by row groups; cells of all kinds."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from megatron_hc.data import tables
from megatron_hc.data.readers import Reader
from megatron_hc.data.streams import Unreadable
from megatron_hc.data.tables import Parquet

pa = pytest.importorskip("pyarrow")
TEXTS = [f"text {number} é" for number in range(10)]


def written(path: Path, columns: dict[str, Any], rows_of_a_group: int = 3) -> str:
    import pyarrow.parquet as parquet

    parquet.write_table(pa.table(columns), path, row_group_size=rows_of_a_group)
    return str(path)


def read(readers: Iterable[Reader]) -> list[tuple[dict[str, list[str]], str]]:
    """(texts, place) of every row."""
    return [(reader.texts(record), reader.place(record)) for reader in readers for record in reader.records()]


@pytest.mark.parametrize(
    ("parts", "expected"), [(1, [10]), (2, [6, 4]), (3, [3, 3, 4]), (4, [3, 3, 3, 1]), (9, [3, 3, 3, 1])]
)
def test_parts_are_the_whole(parts: int, expected: list[int], tmp_path: Path) -> None:
    """Row groups of 3, 3, 3 and 1; rows are counted from the start of the file."""
    path = written(tmp_path / "a.parquet", {"text": TEXTS, "other": list(range(10))})
    readers = Parquet(path, ["text"]).divided(parts)
    assert [len(list(reader.records())) for reader in readers] == expected
    assert read(readers) == [({"text": [text]}, f"{path}, row {i}") for i, text in enumerate(TEXTS, 1)]
    whole = Path(path).stat().st_size
    assert whole - len(readers) < sum(reader.size for reader in readers) <= whole
    for reader in readers:
        assert reader.position == reader.size  # all of it is read
        if len(readers) > 1:
            assert reader.divided(2) == [reader]


def test_progress_within_a_part(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tables, "ROWS", 2)
    reader = Parquet(written(tmp_path / "a.parquet", {"text": TEXTS}, 10), ["text"])
    reader.size = 1000
    positions = [reader.position for _ in reader.records()]
    assert positions == [0, 0, 200, 200, 400, 400, 600, 600, 800, 800] and reader.position == 1000


def test_cells(tmp_path: Path) -> None:
    columns = {
        "plain": ["a", "b"],
        "large": pa.array(["c", "d"], pa.large_string()),
        "bytes": pa.array([b"e", "é".encode()], pa.binary()),
        "few": pa.array(["f", "f"]).dictionary_encode(),
        "list": [["g", "h"], []],
        "large_list": pa.array([["i"], ["j", "k"]], pa.large_list(pa.string())),
    }
    found = read([Parquet(written(tmp_path / "a.parquet", columns), list(columns))])
    assert [texts for texts, _ in found] == [
        {"plain": ["a"], "large": ["c"], "bytes": ["e"], "few": ["f"], "list": ["g", "h"], "large_list": ["i"]},
        {"plain": ["b"], "large": ["d"], "bytes": ["é"], "few": ["f"], "list": [], "large_list": ["j", "k"]},
    ]


def test_rows_without_a_text(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    columns = {
        "text": pa.array([b"ok", None, b"\xff", b"longer"], pa.binary()),
        "list": [["x"], ["x"], ["x", None], []],
    }
    path = written(tmp_path / "a.parquet", columns, 1)
    monkeypatch.setattr(tables, "LONGEST_PIECE", 2)  # as long as the first row
    for reader in (Parquet(path, ["text"]), *Parquet(path, ["text"]).divided(2)):
        for record in reader.records():
            number = reader.first_row + record.number
            assert record.size == (2, 0, 1, 6)[number - 1]
            if number == 1:
                assert reader.texts(record) == {"text": ["ok"]}
                continue
            wrong = ("has no text under --json-keys text", ": byte 0 is not UTF-8", "is longer than 0 MiB")[number - 2]
            with pytest.raises(ValueError, match=f"a.parquet, row {number}:? ?.*{wrong}"):
                reader.texts(record)
    (_, _, third, _) = (reader := Parquet(path, ["list"])).records()
    with pytest.raises(ValueError, match="row 3 has no text under --json-keys list"):
        reader.texts(third)


def test_columns_that_are_none(tmp_path: Path) -> None:
    path = written(tmp_path / "a.parquet", {"text": TEXTS, "number": list(range(10)), "numbers": [[1]] * 10})
    for key, message in (
        ("missing", r"has no text under --json-keys missing \(its keys: 'text', 'number', 'numbers'\)"),
        ("number", "the column 'number' holds int64, not text"),
        ("numbers", "the column 'numbers' holds list<.*int64>, not text"),
    ):
        with pytest.raises(Unreadable, match=message):
            list(Parquet(path, [key]).records())
