"""tools/preprocess_data.py: partitions, interruptions, and going on after them."""

from __future__ import annotations

import gzip
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest
from data_corpus import ENVIRONMENT, ROOT, files_of, gone, load_tool, texts_of
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_hc.data import parts
from megatron_hc.data.streams import count, cuts, pieces

FLAGS = ["--tokenizer-type", "ByteTokenizer", "--append-eod"]


@pytest.fixture(scope="module")
def preprocess() -> ModuleType:
    return load_tool("preprocess_data")


def dataset_names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.suffix in (".bin", ".idx", ".json"))


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.lists(st.text("ab|é\r", max_size=12), max_size=12), min_size=1, max_size=3),
    st.sampled_from(["\n", "|", "||", "é|"]),
    st.integers(2, 5),
)
def test_partitions_change_nothing(tmp_path_factory, contents, separator, partitions) -> None:
    tool = load_tool("preprocess_data")
    folder = tmp_path_factory.mktemp("p")
    inputs = []
    for number, documents in enumerate(contents):
        inputs.append(str(folder / f"{number}.txt"))
        Path(inputs[-1]).write_text(separator.join(documents), encoding="utf-8", newline="")
    options = ["--input", *inputs, "--document-separator", separator, "--output-prefix", str(folder / "out"), *FLAGS]
    parsed = tool.parse_arguments([*options, "--partitions", str(partitions)])
    whole = [r for reader in tool.open_inputs(parsed) for r in reader.records()]
    plan = tool.partitioned(tool.open_inputs(parsed), partitions)
    found = [(reader, record) for group in plan for reader in group for record in reader.records()]
    assert [record.content for _, record in found] == [record.content for record in whole]
    # Messages give the number in the whole file, though the reader began in the middle.
    readers = [(reader, record) for reader in tool.open_inputs(parsed) for record in reader.records()]
    assert [a.place(b) for a, b in found] == [a.place(b) for a, b in readers]


def test_partitions_write_the_same_dataset(preprocess: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("".join(f'{{"text": "document {i}"}}\n' for i in range(3000)))
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(b'{"text": ["x", "yz"]}\n{"text": ""}\n' * 500))
    inputs = ["--input", str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl.gz")]
    for name, flags in (("1", []), ("3", ["--partitions", "3", "--workers", "2"])):
        assert preprocess.main([*inputs, "--output-prefix", str(tmp_path / name), *FLAGS, *flags]) == 0
    assert files_of(tmp_path / "1_text_document") == files_of(tmp_path / "3_text_document")
    assert len(texts_of(tmp_path / "3_text_document")) == 4000
    assert not list(tmp_path.glob("*partial*"))


def test_cut_and_count(tmp_path: Path) -> None:
    path = tmp_path / "c"
    path.write_bytes(b"aa\nbbbb\nc\n")
    assert cuts(str(path), b"\n", 3) == [8] and cuts(str(path), b"x", 3) == []
    assert count(str(path), b"\n", 8) == 2


def test_a_bad_line_in_a_partition_is_named_by_its_line_in_the_file(preprocess, tmp_path, capfd) -> None:
    lines = [b'{"text": "fine"}'] * 1000
    lines[900] = b"bad"
    (tmp_path / "c.jsonl").write_bytes(b"\n".join(lines))
    flags = ["--input", str(tmp_path / "c.jsonl"), "--output-prefix", str(tmp_path / "out"), *FLAGS]
    assert preprocess.main([*flags, "--partitions", "3"]) == 2
    errors = capfd.readouterr().err
    assert "c.jsonl, line 901 is not JSON" in errors and len(errors.splitlines()) == 1
    assert os.listdir(tmp_path) == ["c.jsonl"]


def run_with_interruption(tool: ModuleType, patch: pytest.MonkeyPatch, flags: list[str], at: int) -> bool:
    """Run with Ctrl-C at the ``at``-th of everything that changes files; whether it came to that."""
    calls = 0

    def interrupting(original):
        def called(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls == at:
                raise KeyboardInterrupt
            return original(*args, **kwargs)

        return called

    with patch.context() as inner:
        inner.setattr(parts, "COMMIT_SECONDS", 0.0)
        inner.setattr(tool.Encoder, "encode", interrupting(tool.Encoder.encode))
        inner.setattr(parts.Part, "commit", interrupting(parts.Part.commit))
        inner.setattr(parts, "write_index", interrupting(parts.write_index))
        inner.setattr(os, "replace", interrupting(os.replace))
        code = tool.main(flags)
    assert code == (130 if calls >= at else 0)
    return calls >= at


def test_interrupted_anywhere_and_run_again(preprocess, tmp_path, monkeypatch, capfd) -> None:
    (tmp_path / "a.txt").write_text("".join(f"line {i}\n" for i in range(1500)))
    (tmp_path / "b.txt").write_text("last\n")
    inputs = ["--input", str(tmp_path / "a.txt"), str(tmp_path / "b.txt")]
    assert preprocess.main([*inputs, "--output-prefix", str(tmp_path / "whole"), *FLAGS]) == 0
    whole = files_of(tmp_path / "whole_text_document")
    at = 1
    went_on = 0
    while True:
        (tmp_path / "o").mkdir()
        flags = [*inputs, "--output-prefix", str(tmp_path / "o" / "out"), *FLAGS]
        if not run_with_interruption(preprocess, monkeypatch, flags, at):
            break
        has_index = (tmp_path / "o" / "out_text_document.idx").exists()
        assert not has_index or files_of(tmp_path / "o" / "out_text_document") == whole
        capfd.readouterr()
        assert preprocess.main(flags) == 0
        went_on += "going on after" in capfd.readouterr().err
        assert files_of(tmp_path / "o" / "out_text_document") == whole
        assert dataset_names(tmp_path / "o") == [f"out_text_document.{end}" for end in ("bin", "idx", "json")]
        assert not list((tmp_path / "o").glob("*partial*"))
        for path in (tmp_path / "o").iterdir():
            path.unlink()
        (tmp_path / "o").rmdir()
        at += 1
    assert at > 12 and went_on > 6


def test_a_run_with_another_kind_of_number_begins_anew(preprocess, tmp_path, monkeypatch) -> None:
    """--vocab-size widens a tokenizer from 16 to 32 bits per token, and is no part of its fingerprint."""
    tokenizers = pytest.importorskip("tokenizers")
    tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1}, "a")).save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "a.txt").write_text("a\nb\n" * 1000)
    flags = ["--input", str(tmp_path / "a.txt"), "--tokenizer-type", "HuggingFaceTokenizer"]
    flags += ["--tokenizer-model", str(tmp_path / "tokenizer.json")]
    assert preprocess.main([*flags, "--output-prefix", str(tmp_path / "whole")]) == 0
    flags += ["--output-prefix", str(tmp_path / "out")]
    assert run_with_interruption(preprocess, monkeypatch, [*flags, "--vocab-size", "100000"], 6)
    assert list(tmp_path.glob("out.partial-*/*/0.bin"))
    assert preprocess.main(flags) == 0
    assert files_of(tmp_path / "out_text_document") == files_of(tmp_path / "whole_text_document")


@pytest.mark.parametrize("partitions", ["1", "2"])
@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_signals(tmp_path: Path, how: signal.Signals, partitions: str) -> None:
    (tmp_path / "c.txt").write_text("some words of text\n" * 250_000)
    command = [sys.executable, str(ROOT / "tools" / "preprocess_data.py"), "--input", str(tmp_path / "c.txt")]
    command += ["--output-prefix", str(tmp_path / "out"), *FLAGS, "--workers", "2", "--partitions", partitions]
    process = subprocess.Popen(command, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 30
    while not any(p.stat().st_size for p in tmp_path.glob("out.partial-*/*/0.bin")) and time.monotonic() < deadline:
        time.sleep(0.01)
    children = list(map(int, Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()))
    assert len(children) >= 2
    process.send_signal(how)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == {signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGKILL: -9}[how]
    assert "Traceback" not in errors, errors
    while not all(map(gone, children)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert all(map(gone, children))
    assert dataset_names(tmp_path) == []
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0
    # What was noted is not read again; a kill leaves what was noted in time.
    assert how == signal.SIGKILL or "going on after" in done.stderr
    tokens, _ = files_of(tmp_path / "out_text_document")
    assert len(tokens) == 2 * 250_000 * 19 and not list(tmp_path.glob("*partial*"))


def test_two_runs_at_once_are_refused(preprocess, tmp_path, capfd) -> None:
    (tmp_path / "c.txt").write_text("text\n")
    flags = ["--input", str(tmp_path / "c.txt"), "--output-prefix", str(tmp_path / "out"), *FLAGS]
    options = preprocess.parse_arguments(flags)
    plan = preprocess.partitioned(preprocess.open_inputs(options), 1)
    name = preprocess.identity(options, plan, preprocess._tokenizer(options))
    with parts.only_one(tmp_path / f"out.partial-{name}", "this"):
        assert preprocess.main(flags) == 2
    assert "another run is writing it" in capfd.readouterr().err


def test_other_work_is_left_alone_and_named(preprocess, tmp_path, capfd) -> None:
    (tmp_path / "c.txt").write_text("text\n")
    (tmp_path / "out.partial-0123").mkdir()
    flags = ["--input", str(tmp_path / "c.txt"), "--output-prefix", str(tmp_path / "out"), *FLAGS]
    assert preprocess.main(flags) == 0
    assert "out.partial-0123 is left from a run with other flags" in capfd.readouterr().err
    assert (tmp_path / "out.partial-0123").exists()


def test_long_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_hc.data import streams

    monkeypatch.setattr(streams, "LONGEST_PIECE", 6)
    blocks = [b"abc|", b"1234", b"5678", b"9|fin", b"e|", b"tool", b"ongatend"]
    assert list(pieces(iter(blocks), b"|")) == [b"abc", None, b"fine", None]
    assert list(pieces(iter([b"1234567", b"|x"]), b"|")) == [None, b"x"]
