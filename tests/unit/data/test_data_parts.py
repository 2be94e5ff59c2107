"""Groups of records, and the part that they are written to: what is noted, what is cut off, what is joined."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_hc.data.encode import Column, Encoded, Group, groups
from megatron_hc.data.indexed import IndexedDataset
from megatron_hc.data.parts import EXAMPLES, Part, Progress, join, only_one, piece
from megatron_hc.data.readers import Record
from megatron_hc.data.streams import Unreadable

INT = np.dtype(np.uint16)


class Read:
    """A reader of records with given sizes, ten bytes of file each."""

    def __init__(self, *sizes: int, problem: str | None = None) -> None:
        self.sizes, self.problem, self.position, self.size = sizes, problem, 0, 10 * len(sizes)

    def records(self) -> Any:
        for number, size in enumerate(self.sizes, 1):
            self.position = 10 * number
            yield Record(number, b"", size)
        if self.problem:
            raise Unreadable(self.problem)


def shown(found: Any) -> list[tuple[int, list[int], int, int, str | None]]:
    return [(g.reader, [r.number for r in g.records], g.consumed, g.position, g.problem) for g in found]


def test_groups() -> None:
    """At most 512 documents, and no more once they have 2^18 bytes; the last group of a reader may be empty."""
    half = 2**17
    readers: list[Any] = [Read(half, half, half), Read(*[1] * 600), Read(half, half), Read(5, 5, problem="torn")]
    first = [(0, [1, 2], 2, 20, None), (0, [3], 3, 30, None)]
    many = [(1, [*range(1, 513)], 512, 30 + 5120, None), (1, [*range(513, 601)], 600, 6030, None)]
    rest = [(2, [1, 2], 2, 6050, None), (2, [], 2, 6050, None), (3, [1, 2], 2, 6070, "torn")]
    assert shown(groups(readers)) == [*first, *many, *rest]
    assert shown(groups([Read(half, half - 1, 1)])) == [(0, [1, 2, 3], 3, 30, None), (0, [], 3, 30, None)]  # type: ignore[list-item]
    # Where an interrupted run goes on: within one reader, with all of the next ones.
    assert shown(groups(readers, 1, 590)) == [(1, [*range(591, 601)], 600, 6030, None), *rest]
    assert shown(groups(readers, 2, 0)) == rest


def column(*documents: list[int]) -> Column:
    """Of documents of one sequence each; an empty one has none."""
    tokens = [np.array(tokens, INT) for tokens in documents if tokens]
    lengths = np.array([len(each) for each in tokens], np.int32)
    ends = np.cumsum([bool(tokens) for tokens in documents], dtype=np.int64)
    return Column(np.concatenate(tokens), lengths, ends)


FIRST = {"a": column([1, 2], [3]), "b": column([], [4, 5, 6])}
SECOND = {"a": column([7], []), "b": column([8], [9, 10])}
KEYS = ("a", "b")


def write(folder: Path) -> Part:
    with Part(folder, KEYS, INT) as part:
        part.add(Group(0, [], 5, 0), Encoded(FIRST, 1, ["one", "two"]))
        part.add(Group(1, [], 7, 0, "torn"), Encoded(SECOND, 2, ["three"]))
        part.commit()
    return part


def read(part: Part, key: str) -> tuple[list[int], list[int], list[int]]:
    found = piece(part, key)
    return np.fromfile(found.bin, INT).tolist(), found.lengths.tolist(), found.ends.tolist()


A = ([1, 2, 3, 7], [2, 1, 1], [1, 2, 3, 3])
B = ([4, 5, 6, 8, 9, 10], [3, 1, 2], [0, 1, 2, 3])
NOTED = Progress(
    reader=1, records=7, num_empty=3, num_bad=3, examples=["one", "two", "three"], unreadable=["torn"],
    tokens={"a": 4, "b": 6}, sequences={"a": 3, "b": 3}, num_documents=4,
)  # fmt: skip


def test_what_a_part_holds_and_notes(tmp_path: Path) -> None:
    part = write(tmp_path / "part")
    assert part.progress == NOTED
    assert (read(part, "a"), read(part, "b")) == (A, B)


@pytest.mark.parametrize("kind", ["bin", "lengths", "ends"])
def test_what_was_written_after_the_last_note_is_cut_off(kind: str, tmp_path: Path) -> None:
    path = write(tmp_path / "part").path("b", kind)
    with path.open("ab") as file:
        file.write(b"12345")
    again = Part(tmp_path / "part", KEYS, INT)
    assert again.progress == NOTED and (read(again, "a"), read(again, "b")) == (A, B)
    with again:
        again.add(Group(2, [], 1, 0), Encoded(SECOND, 0, []))
        again.finish()
    once_more = Part(tmp_path / "part", KEYS, INT)
    assert once_more.progress.is_done and once_more.progress.num_documents == 6
    assert read(once_more, "b") == (B[0] + [8, 9, 10], B[1] + [1, 2], B[2] + [4, 5])


@pytest.mark.parametrize("kind", ["bin", "lengths", "ends"])
def test_a_part_that_is_not_whole_begins_anew(kind: str, tmp_path: Path) -> None:
    path = write(tmp_path / "part").path("b", kind)
    path.write_bytes(path.read_bytes()[:-1])
    again = Part(tmp_path / "part", KEYS, INT)
    assert again.progress == Progress(tokens={"a": 0, "b": 0}, sequences={"a": 0, "b": 0})
    assert not list((tmp_path / "part").iterdir())


def test_an_interruption_notes_what_there_is(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), Part(tmp_path / "part", KEYS, INT) as part:
        part.add(Group(0, [], 5, 0), Encoded(FIRST, 1, []))
        raise KeyboardInterrupt
    assert Part(tmp_path / "part", KEYS, INT).progress == part.progress
    assert part.progress.records == 5 and not part.progress.is_done


def test_time_to_note(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Every few seconds: what came after is lost to a kill."""
    now = [100.0]
    monkeypatch.setattr("megatron_hc.data.parts.time.monotonic", lambda: now[0])
    noted = tmp_path / "part" / "progress.json"
    with Part(tmp_path / "part", KEYS, INT) as part:
        for records, seconds, expected in ((1, 4, None), (2, 2, 2), (3, 4, 2), (4, 2, 4)):
            now[0] += seconds
            part.add(Group(0, [], records, 0), Encoded(FIRST, 0, []))
            assert (json.loads(noted.read_text())["records"] if noted.exists() else None) == expected
            if expected == records:
                assert part.path("b", "bin").stat().st_size == records * 3 * 2


def test_a_few_bad_documents_are_shown(tmp_path: Path) -> None:
    with Part(tmp_path / "part", KEYS, INT) as part:
        for number in range(4):
            part.add(Group(0, [], number, 0), Encoded(FIRST, 0, [f"{number}x", f"{number}y"]))
    assert part.progress.num_bad == 8
    assert part.progress.examples == ["0x", "0y", "1x", "1y", "2x"] and EXAMPLES == 5


@pytest.mark.parametrize("move", [True, False])
@pytest.mark.parametrize("count", [1, 3])
def test_pieces_joined(count: int, move: bool, tmp_path: Path) -> None:
    prefix = str(tmp_path / "set")
    for suffix in ("bin", "idx", "json"):
        Path(f"{prefix}.{suffix}").write_text("old")
    parts = [write(tmp_path / f"part{number}") for number in range(count)]
    work = tmp_path / "work"
    work.mkdir()
    join([piece(part, "b") for part in parts], prefix, INT, {"is": "new"}, work, move=move)
    found = IndexedDataset(prefix)
    sequences = [[4, 5, 6], [8], [9, 10]] * count
    assert [found.get(i).tolist() for i in range(len(sequences))] == sequences
    ends = [0] + [3 * number + end for number in range(count) for end in B[2]]
    assert found.document_indices.tolist() == ends
    assert json.loads(Path(f"{prefix}.json").read_text()) == {"is": "new"}
    assert [part.path("b", "bin").exists() for part in parts] == [not (move and count == 1)] * count
    join([piece(part, "a") for part in parts], prefix, INT, None, work, move=False)
    assert not Path(f"{prefix}.json").exists(), "an old record speaks for new tokens"
    assert IndexedDataset(prefix).get(0).tolist() == [1, 2]


def test_an_old_index_never_stands_beside_new_tokens(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    prefix, part, work = str(tmp_path / "set"), write(tmp_path / "part"), tmp_path / "work"
    work.mkdir()
    join([piece(part, "a")], prefix, INT, None, work, move=False)
    replace, steps = os.replace, []

    def watched(source: Path, target: Path) -> None:
        steps.append((Path(target).suffix, Path(f"{prefix}.idx").exists()))
        replace(source, target)

    monkeypatch.setattr("megatron_hc.data.parts.os.replace", watched)
    join([piece(part, "b")], prefix, INT, {}, work, move=False)
    assert steps == [(".bin", False), (".json", False), (".idx", False)]


def test_a_note_follows_what_it_is_about_to_the_disk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    synced: list[bool] = []
    noted = tmp_path / "part" / "progress.json"
    monkeypatch.setattr("megatron_hc.data.parts.os.fsync", lambda number: synced.append(noted.exists()))
    write(tmp_path / "part")
    assert synced == [False] * 6, "three files under each of two keys, before the note"


def test_one_run_at_a_time(tmp_path: Path) -> None:
    with only_one(tmp_path / "work", "set"):
        with pytest.raises(ValueError, match="set: another run is writing it"), only_one(tmp_path / "work", "set"):
            pass
        with only_one(tmp_path / "other", "set"):
            pass
    with only_one(tmp_path / "work", "set"):
        pass
