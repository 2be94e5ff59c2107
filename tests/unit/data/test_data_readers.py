"""Every kind of input: compressed files, parquet, folders, the datasets library, and damaged ones of each."""

from __future__ import annotations

import gzip
import json
import os
import random
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from data_corpus import files_of, load_tool, texts_of

from megatron_hc.data import IndexedDataset, streams
from megatron_hc.data.readers import open_reader

zstandard = pytest.importorskip("zstandard")
pa = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")

FLAGS = ["--tokenizer-type", "ByteTokenizer"]
ROWS = ["one\nline", "", "zwei é", "\U0001f389", "five"]
LINES = "".join(json.dumps({"text": row}) + "\n" for row in ROWS).encode()


@pytest.fixture(scope="module")
def preprocess() -> ModuleType:
    return load_tool("preprocess_data")


def zst(content: bytes) -> bytes:
    return zstandard.ZstdCompressor(write_checksum=True).compress(content)


def table(path: Path, rows: list[Any], **options: Any) -> None:
    parquet.write_table(pa.table({"text": rows, "other": list(range(len(rows)))}), path, **options)


def run(tool: ModuleType, tmp_path: Path, *flags: str) -> int:
    return tool.main(["--output-prefix", str(tmp_path / "out"), *FLAGS, *flags])


def found(tmp_path: Path) -> list[str]:
    return texts_of(tmp_path / "out_text_document")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("c.jsonl", LINES),
        ("c.jsonl.gz", gzip.compress(LINES)),
        ("c.json.gz", gzip.compress(LINES[:30]) + gzip.compress(LINES[30:]) + b"\0" * 40),
        ("c.jsonl.zst", zst(LINES)),
        ("c.ndjson.zst", zst(LINES[:30]) + b"\x50\x2a\x4d\x18\x03\0\0\0abc" + zst(LINES[30:])),
    ],
    ids=["one", "gzip", "two-gzips-and-zeros", "zstd", "two-zstds-and-a-skipped-frame"],  # gzip writes the time
)
def test_compressed_files(preprocess, tmp_path, name, content) -> None:
    (tmp_path / name).write_bytes(content)
    assert run(preprocess, tmp_path, "--input", str(tmp_path / name), "--workers", "2") == 0
    assert found(tmp_path) == [row for row in ROWS if row]
    assert len(IndexedDataset(str(tmp_path / "out_text_document")).document_indices) == len(ROWS) + 1


@pytest.mark.parametrize("name", ["c.txt.gz", "c.gz", "c.zst"])
def test_compressed_plain_text(preprocess, tmp_path, name) -> None:
    content = "a\r\nb\n".encode("utf-8-sig")
    (tmp_path / name).write_bytes(zst(content) if name.endswith("zst") else gzip.compress(content))
    assert run(preprocess, tmp_path, "--input", str(tmp_path / name)) == 0
    assert found(tmp_path) == ["a", "b"]


@pytest.mark.parametrize("name", ["c.txt", "c.txt.gz"])
def test_paragraphs_of_a_file_with_carriage_returns(preprocess, tmp_path, name) -> None:
    content = b"one\r\nmore\r\n\r\ntwo\r\n\r\nthree"
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    for partitions in ("1", "2"):
        flags = ["--document-separator", "\\n\\n", "--partitions", partitions]
        assert run(preprocess, tmp_path, "--input", str(tmp_path / name), *flags) == 0
        assert found(tmp_path) == ["one\r\nmore", "two", "three"]


def test_a_separator_that_is_there_is_taken_as_it_is(preprocess, tmp_path) -> None:
    (tmp_path / "c.txt").write_bytes(b"one\r\n\r\nmore\n\ntwo")
    assert run(preprocess, tmp_path, "--input", str(tmp_path / "c.txt"), "--document-separator", "\\n\\n") == 0
    assert found(tmp_path) == ["one\r\n\r\nmore", "two"]


@pytest.mark.parametrize(
    "column",
    [
        pa.array(ROWS),
        pa.array(ROWS, pa.large_string()),
        pa.array(ROWS).dictionary_encode(),
        pa.array([row.encode() for row in ROWS], pa.binary()),
        pa.array([[row] for row in ROWS]),
    ],
)
def test_parquet(preprocess, tmp_path, column) -> None:
    parquet.write_table(pa.table({"id": list(range(5)), "text": column}), tmp_path / "c.parquet", row_group_size=2)
    for partitions in ("1", "2", "7"):
        flags = ["--input", str(tmp_path / "c.parquet"), "--partitions", partitions]
        assert run(preprocess, tmp_path, *flags) == 0
        assert found(tmp_path) == [row for row in ROWS if row]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (["a", None, "b"], r"c.parquet, row 2 has no text under --json-keys text"),
        ([1, 2], r"c.parquet: the column 'text' holds int64, not text"),
    ],
)
def test_parquet_without_text(preprocess, tmp_path, capfd, rows, message) -> None:
    table(tmp_path / "c.parquet", rows)
    assert run(preprocess, tmp_path, "--input", str(tmp_path / "c.parquet")) == 2
    assert message in capfd.readouterr().err
    assert run(preprocess, tmp_path, "--input", str(tmp_path / "c.parquet"), "--json-keys", "content") == 2
    assert "c.parquet has no text under --json-keys content (its keys: 'text', 'other')" in capfd.readouterr().err


def test_parquet_with_bytes_that_are_not_text(preprocess, tmp_path, capfd) -> None:
    column = pa.array([b"fine", b"\xff", b"good"], pa.binary()).view(pa.string())
    parquet.write_table(pa.table({"text": column}), tmp_path / "c.parquet")
    flags = ["--input", str(tmp_path / "c.parquet")]
    assert run(preprocess, tmp_path, *flags) == 2
    assert "c.parquet, row 2: byte 0 is not UTF-8" in capfd.readouterr().err
    assert run(preprocess, tmp_path, *flags, "--on-bad-line", "skip") == 0
    assert found(tmp_path) == ["fine", "good"]


def test_folder(preprocess, tmp_path, capfd) -> None:
    folder = tmp_path / "texts"
    (folder / "b").mkdir(parents=True)
    (folder / ".hidden").mkdir()
    (folder / "b" / "2.txt").write_text("second\n")
    (folder / "a.jsonl").write_text('{"text": "first"}\n')
    (folder / "c.txt.gz").write_bytes(gzip.compress(b"third\n"))
    table(folder / "d.parquet", ["fourth"])
    (folder / "README.md").write_text("not text\n")
    (folder / ".hidden" / "x.txt").write_text("hidden\n")
    assert run(preprocess, tmp_path, "--input", str(folder)) == 0
    assert found(tmp_path) == ["first", "second", "third", "fourth"]
    assert "4 files are read, 1 are not (.md)" in capfd.readouterr().err
    assert run(preprocess, tmp_path, "--input", str(folder), "--input-pattern", "*.md") == 0
    assert found(tmp_path) == ["not text"]
    assert run(preprocess, tmp_path, "--input", str(folder), "--input-pattern", "*.py") == 2
    assert "the folder has no file to read that matches --input-pattern *.py" in capfd.readouterr().err


def test_links_to_folders_are_followed_once(preprocess, tmp_path) -> None:
    folder, elsewhere = tmp_path / "texts", tmp_path / "elsewhere"
    for place, text in ((folder, "first"), (elsewhere, "second")):
        place.mkdir()
        (place / "a.txt").write_text(f"{text}\n")
    (folder / "z").symlink_to(elsewhere)
    (folder / "loop").symlink_to(folder)
    assert run(preprocess, tmp_path, "--input", str(folder)) == 0
    assert found(tmp_path) == ["first", "second"]


# --- bad lines ----------------------------------------------------------------------------------------------------


def test_bad_lines_are_skipped_and_counted(preprocess, tmp_path, capfd) -> None:
    lines = [
        b'{"text": "a"}',
        b"{",
        b'{"text": "\xff"}',
        b'{"body": "x"}',
        b"",
        b'{"text": ""}',
        b'{"text": "b"}',
        b"3",
    ]
    (tmp_path / "c.jsonl").write_bytes(b"\n".join(lines))
    for workers in ("1", "2"):
        flags = ["--input", str(tmp_path / "c.jsonl"), "--on-bad-line", "skip", "--workers", workers]
        assert run(preprocess, tmp_path, *flags) == 0
        assert found(tmp_path) == ["a", "b"]
        out, err = capfd.readouterr()
        assert "3 documents, 1 of them empty, 4 more skipped, 2 tokens" in out
        assert [f"c.jsonl, line {number}" in err for number in range(1, 9)] == [False, *[True] * 3, *[False] * 3, True]
    record = json.loads((tmp_path / "out_text_document.json").read_text())
    assert (record["documents"], record["empty_documents"], record["skipped_documents"]) == (3, 1, 4)


def test_numbers_beside_a_text_are_not_looked_at(preprocess, tmp_path, capfd) -> None:
    """Python does not convert one of more than 4,300 digits to an integer."""
    digits = b"9" * 5000
    (tmp_path / "c.jsonl").write_bytes(b'{"text": "a"}\n{"text": "b", "number": ' + digits + b"}\n")
    assert run(preprocess, tmp_path, "--input", str(tmp_path / "c.jsonl")) == 0
    assert found(tmp_path) == ["a", "b"]
    (tmp_path / "c.jsonl").write_bytes(b'{"text": "a"}\n{"text": ' + digits + b"}\n")
    assert run(preprocess, tmp_path, "--input", str(tmp_path / "c.jsonl")) == 2
    assert "c.jsonl, line 2 has no text under --json-keys text" in capfd.readouterr().err


def test_nothing_but_bad_lines(preprocess, tmp_path, capfd) -> None:
    (tmp_path / "c.jsonl").write_bytes(b"{\n" * 3)
    assert run(preprocess, tmp_path, "--input", str(tmp_path / "c.jsonl"), "--on-bad-line", "skip") == 2
    assert "there is no text (key text) in 0 documents, and 3 skipped: " in capfd.readouterr().err
    assert os.listdir(tmp_path) == ["c.jsonl"]


def test_words_a_tokenizer_refuses_are_skipped(preprocess, tmp_path) -> None:
    (tmp_path / "c.txt").write_text("1 2\n3 70\n5\n")
    flags = ["--input", str(tmp_path / "c.txt"), "--tokenizer-type", "NullTokenizer", "--vocab-size", "70"]
    assert run(preprocess, tmp_path, *flags, "--on-bad-line", "skip") == 0
    dataset = IndexedDataset(str(tmp_path / "out_text_document"))
    assert [dataset.get(i).tolist() for i in range(len(dataset))] == [[1, 2], [5]]


# --- damaged files ------------------------------------------------------------------------------------------------

MANY = [f"document {i} " + "words and more words " * (i % 7) for i in range(4000)]


def damaged(kind: str, tmp_path: Path) -> bytes:
    lines = "".join(json.dumps({"text": row}) + "\n" for row in MANY).encode()
    if kind == "gz":
        return gzip.compress(lines)
    if kind == "zst":
        return zst(lines)
    table(tmp_path / "whole.parquet", MANY, row_group_size=500, write_page_checksum=True)
    content = (tmp_path / "whole.parquet").read_bytes()
    (tmp_path / "whole.parquet").unlink()
    return content


@pytest.mark.parametrize("kind", ["gz", "zst", "parquet"])
@pytest.mark.parametrize("where", [0, 0.5, 0.99])
def test_truncated_file(preprocess, tmp_path, capfd, kind, where) -> None:
    content = damaged(kind, tmp_path)
    path = tmp_path / ("c.parquet" if kind == "parquet" else f"c.jsonl.{kind}")
    path.write_bytes(content[: int(len(content) * where)])
    other = tmp_path / "d.txt"
    other.write_text("the next file\n")
    flags = ["--input", str(path), str(other)]
    assert run(preprocess, tmp_path, *flags) == 2
    out, err = capfd.readouterr()
    assert len(err.splitlines()) == 1 and path.name in err and out == ""
    assert sorted(os.listdir(tmp_path)) == [path.name, other.name]
    # Skipping takes what came before, says that the rest is missing, and remembers it beside the dataset.
    assert run(preprocess, tmp_path, *flags, "--on-bad-line", "skip") == 0
    out, err = capfd.readouterr()
    assert "1 files not read to the end" in out and f"the rest is missing: {path}" in err
    *taken, last = found(tmp_path)
    assert last == "the next file" and taken == MANY[: len(taken)] and len(taken) < len(MANY)
    assert path.name in json.loads((tmp_path / "out_text_document.json").read_text())["unreadable_files"][0]


def flipped(content: bytes, chooser: random.Random) -> bytes:
    """One to four bytes changed, cut out or put in, or an end cut off."""
    changed = bytearray(content)
    for _ in range(chooser.randint(1, 4)):
        place = chooser.randrange(len(changed) + 1)
        how = chooser.randrange(4)
        if how == 0 and place < len(changed):
            changed[place] ^= 1 << chooser.randrange(8)
        elif how == 1:
            del changed[place : place + chooser.randint(1, 20)]
        elif how == 2:
            changed[place:place] = chooser.randbytes(chooser.randint(1, 20))
        elif chooser.random() < 0.3:
            del changed[place:]
    return bytes(changed)


def check_damaged_files(tool: ModuleType, tmp_path: Path, capfd: Any, count: int, seed: int) -> None:
    """Each ends in one line of error, or in the whole dataset, or under skip says what is missing."""
    chooser = random.Random(seed)
    rows = [f"document {i}" for i in range(50)]
    lines = "".join(json.dumps({"text": row}) + "\n" for row in rows).encode()
    table(tmp_path / "w", rows, row_group_size=20, write_page_checksum=True, compression="zstd")
    contents = {
        "c.jsonl.gz": gzip.compress(lines),
        "c.jsonl.zst": zst(lines),
        "c.parquet": (tmp_path / "w").read_bytes(),
    }
    for number in range(count):
        name, content = chooser.choice(list(contents.items()))
        changed = flipped(content, chooser)
        (tmp_path / name).write_bytes(changed)
        skip = bool(chooser.randrange(2))
        code = run(tool, tmp_path, "--input", str(tmp_path / name), "--on-bad-line", "skip" if skip else "fail")
        out, err = capfd.readouterr()
        assert code in (0, 2) and "Traceback" not in err, (name, number, err)
        if code == 2:
            assert len(err.splitlines()) == (1 if not skip else len(err.splitlines())) and name in err
            assert not list(tmp_path.glob("out*")), (name, number)
            continue
        record = json.loads((tmp_path / "out_text_document.json").read_text())
        is_whole = not record["skipped_documents"] and not record["unreadable_files"]
        assert not is_whole or name == "c.parquet" or found(tmp_path) == rows, (name, number)
        assert is_whole or (skip and err), (name, number)
        for path in tmp_path.glob("out*"):
            path.unlink()


def test_damaged_files(preprocess, tmp_path, capfd) -> None:
    check_damaged_files(preprocess, tmp_path, capfd, 150, 1)


@pytest.mark.slow
def test_very_many_damaged_files(preprocess, tmp_path, capfd) -> None:
    check_damaged_files(preprocess, tmp_path, capfd, 20_000, 2)


def mutated(chooser: random.Random, number: int) -> bytes:
    """A line that may or may not hold a document; never a line break."""
    good = json.dumps({"text": f"document {number} é", "id": number}, ensure_ascii=chooser.random() < 0.5).encode()
    how = chooser.randrange(10)
    if how < 4:
        return flipped(good, chooser).replace(b"\n", b" ")
    other: list[Any] = [
        b"",
        b'{"text": ""}',
        b'{"id": 1}',
        b'{"text": null}',
        b'{"text": "' + b"x" * chooser.randrange(5000) + b'"}',
        b"[" * chooser.randrange(3000),
        b'{"text": "\\ud800"}',
        b'{"text": ["a", "", "b", 3]}' if chooser.random() < 0.5 else b'{"text": ["a", "b"]}',
        b'{"text": "\xff\xfe"}',
        b'{"text": "a", "text": "b"}',
        b"\x00" * 10,
        b"NaN",
    ]
    return chooser.choice(other) if how < 8 else good


def expected(line: bytes) -> list[str] | None:
    """The sequences of a line's document by another route; None where it is bad."""
    try:
        text = json.loads(line.decode())["text"]
    except (ValueError, RecursionError, KeyError, TypeError):
        return None
    parts = text if isinstance(text, list) else [text]
    if not all(isinstance(part, str) for part in parts):
        return None
    return [part.encode("utf-16", "surrogatepass").decode("utf-16", "replace") for part in parts if part]


def check_mutated_lines(tool: ModuleType, tmp_path: Path, capfd: Any, count: int, seed: int) -> None:
    chooser = random.Random(seed)
    lines = [mutated(chooser, number) for number in range(count)]
    (tmp_path / "c.jsonl").write_bytes(b"\n".join(lines))
    wanted = [expected(line) for line in lines if line.strip()]
    kept = [document for document in wanted if document is not None]
    flags = ["--input", str(tmp_path / "c.jsonl"), "--on-bad-line", "skip", "--workers", "2", "--partitions", "2"]
    assert run(tool, tmp_path, *flags) == 0
    assert "Traceback" not in capfd.readouterr().err
    dataset = IndexedDataset(str(tmp_path / "out_text_document"))
    assert found(tmp_path) == [part for document in kept for part in document]
    ends = [0]
    for document in kept:
        ends.append(ends[-1] + len(document))
    assert dataset.document_indices.tolist() == ends
    record = json.loads((tmp_path / "out_text_document.json").read_text())
    assert record["documents"] == len(kept) and record["skipped_documents"] == len(wanted) - len(kept) > count // 10
    assert record["empty_documents"] == sum(not document for document in kept) > 0


def test_mutated_lines(preprocess, tmp_path, capfd) -> None:
    check_mutated_lines(preprocess, tmp_path, capfd, 5000, 1)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10, 20))
def test_a_million_mutated_lines(preprocess, tmp_path, capfd, seed) -> None:
    check_mutated_lines(preprocess, tmp_path, capfd, 100_000, seed)


# --- the datasets library -----------------------------------------------------------------------------------------


def test_datasets_library(preprocess, tmp_path, capfd, monkeypatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rows = datasets.Dataset.from_dict({"text": ["a", "", "b\nc"], "other": [1, 2, 3]})
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "train.jsonl").write_text('{"text": "a", "other": 1}\n{"text": ""}\n{"text": "b\\nc"}\n')
    rows.save_to_disk(str(tmp_path / "saved"))
    datasets.DatasetDict({"train": rows, "more": rows}).save_to_disk(str(tmp_path / "many"))
    capfd.readouterr()
    for name in ("folder", "saved", "many"):
        for workers in ("1", "2"):
            assert run(preprocess, tmp_path, "--dataset", str(tmp_path / name), "--workers", workers) == 0
            assert found(tmp_path) == ["a", "b\nc"]
            assert "3 documents, 1 of them empty, 4 tokens" in capfd.readouterr().out
    for flags, message in (
        (["--dataset-split", "none"], "--dataset-split none cannot be loaded: it has the splits train, more"),
        (["--json-keys", "body"], "has no text under --json-keys body (its keys: 'text', 'other')"),
        (["--json-keys", "other"], "row 1 has no text under --json-keys other"),
    ):
        assert run(preprocess, tmp_path, "--dataset", str(tmp_path / "many"), *flags) == 2
        err = capfd.readouterr().err
        assert message in err and len(err.splitlines()) == 1
    assert run(preprocess, tmp_path, "--dataset", str(tmp_path / "nowhere")) == 2
    err = capfd.readouterr().err
    assert "nowhere" in err and "cannot be loaded" in err and len(err.splitlines()) == 1


def test_skipping_gives_the_same_dataset_where_nothing_is_bad(preprocess, tmp_path) -> None:
    (tmp_path / "c.jsonl").write_bytes(LINES)
    assert run(preprocess, tmp_path, "--input", str(tmp_path / "c.jsonl")) == 0
    strict = files_of(tmp_path / "out_text_document")
    assert run(preprocess, tmp_path, "--input", str(tmp_path / "c.jsonl"), "--on-bad-line", "skip") == 0
    assert files_of(tmp_path / "out_text_document") == strict


def test_one_source_must_be_given(preprocess, tmp_path) -> None:
    for flags in ([], ["--input", "x", "--dataset", "y"]):
        with pytest.raises(SystemExit):
            run(preprocess, tmp_path, *flags)


def test_a_key_that_cannot_be_in_a_name_is_refused_before_the_work(preprocess, tmp_path, capfd) -> None:
    (tmp_path / "c.jsonl").write_text('{"a/b": "x"}\n')
    with pytest.raises(SystemExit) as ended:
        run(preprocess, tmp_path, "--input", str(tmp_path / "c.jsonl"), "--json-keys", "a/b")
    assert ended.value.code == 2 and "--json-keys a/b is part of the dataset's name" in capfd.readouterr().err
    assert os.listdir(tmp_path) == ["c.jsonl"]


@pytest.mark.parametrize(("name", "package"), [("c.txt.zst", "zstandard"), ("c.parquet", "pyarrow")])
def test_missing_library_names_the_extra(preprocess, tmp_path, capfd, monkeypatch, name, package) -> None:
    import sys

    (tmp_path / name).write_bytes(b"x")
    for module in (package, "pyarrow.parquet"):
        monkeypatch.setitem(sys.modules, module, None)
    assert run(preprocess, tmp_path, "--input", str(tmp_path / name)) == 2
    assert f"needs the {package} package: pip install 'megatron_hc[data]'" in capfd.readouterr().err


def test_parts_of_a_file_say_where_in_the_file_a_line_is(tmp_path: Path) -> None:
    """A byte order mark is one at the file's beginning only."""
    path = tmp_path / "a.txt"
    path.write_text("".join(f"\ufeffline {number}\n" for number in range(50)), encoding="utf-8")
    whole = open_reader(str(path), ["text"], "\n")
    parts = whole.divided(3)
    assert len(parts) == 3
    of_whole, of_parts = (
        [(one.place(record), one.texts(record)) for one in readers for record in one.records()]
        for readers in ([whole], parts)
    )
    assert of_whole == of_parts and of_whole[-1][0] == f"{path}, line 50"
    assert [texts for _, texts in of_whole[:2]] == [{"text": ["line 0"]}, {"text": ["\ufeffline 1"]}]


def test_separators_lie_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Across blocks, around pieces that are too long, at the ends of parts."""
    text, separator = b"ab<->c<-><->de<->a long piece<->f<->another long one<->g", b"<->"
    monkeypatch.setattr(streams, "LONGEST_PIECE", 8)
    expected = [piece if len(piece) <= 8 else None for piece in text.split(separator)]
    for size in range(1, len(text) + 1):
        blocks = [text[first : first + size] for first in range(0, len(text), size)]
        assert list(streams.pieces(iter(blocks), separator)) == expected, size
        path = tmp_path / "text"
        path.write_bytes(text + separator)
        monkeypatch.setattr(streams, "BLOCK_BYTES", size)
        if size >= len(separator):
            assert streams.count(str(path), separator, len(text)) == text.count(separator)
        # Behind the first separator from each twentieth on; the last one ends the file and cuts nothing.
        assert streams.cuts(str(path), separator, 20) == [5, 9, 17, 32, 36, 55], size
