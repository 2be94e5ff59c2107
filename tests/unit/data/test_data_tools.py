"""Tokenizers, tools/train_tokenizer.py and tools/preprocess_data.py."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from data_corpus import ENVIRONMENT, ROOT, load_tool
from hypothesis import example, given, settings
from hypothesis import strategies as st

from megatron_hc.data import (
    ByteTokenizer,
    IndexedDataset,
    NullTokenizer,
    SentencePieceTokenizer,
    build_tokenizer,
    check_record,
)
from megatron_hc.data.readers import PlainText

TEXT = st.text(st.characters(exclude_characters="\u2581", exclude_categories=["Cs"]), max_size=40)


@pytest.fixture(scope="module")
def preprocess() -> ModuleType:
    return load_tool("preprocess_data")


@pytest.fixture(scope="module")
def train() -> ModuleType:
    return load_tool("train_tokenizer")


@pytest.fixture(scope="module")
def sources() -> list[str]:
    return [str(path) for path in sorted((ROOT / "megatron_hc").glob("*.py"))]


@pytest.fixture(scope="module")
def model(train: ModuleType, sources: list[str], tmp_path_factory: pytest.TempPathFactory) -> str:
    prefix = str(tmp_path_factory.mktemp("tokenizer") / "t")
    assert train.main(["--input", *sources, "--output-prefix", prefix, "--vocab-size", "600"]) == 0
    return prefix + ".model"


@pytest.fixture(scope="module")
def sentencepiece(model: str) -> SentencePieceTokenizer:
    return SentencePieceTokenizer(model)


# --- tokenizers ---------------------------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(TEXT)
@example("  indented\n\n\ttab  \r\n trailing ")
@example("</s><unk> \x00 \U0001f389 <0x41>")
def test_text_survives_the_round_trip(sentencepiece: SentencePieceTokenizer, text: str) -> None:
    for tokenizer in (sentencepiece, ByteTokenizer()):
        ids = tokenizer.tokenize(text)
        assert tokenizer.detokenize([*ids, tokenizer.eod]) == text
        assert all(0 <= i < tokenizer.vocab_size and i != tokenizer.eod for i in ids)


def test_sentencepiece_ids(sentencepiece: SentencePieceTokenizer) -> None:
    assert (sentencepiece.vocab_size, sentencepiece.eod, sentencepiece.pad) == (600, 1, -1)
    assert len(sentencepiece.tokenize("        return self")) <= 5  # indentation is not spelt space by space


def test_sentencepiece_without_eos_gets_an_end_of_document(tmp_path: Path, sources: list[str]) -> None:
    from sentencepiece import SentencePieceTrainer

    common = dict(input=sources, vocab_size=400, model_type="bpe", bos_id=-1, eos_id=-1, minloglevel=2)
    SentencePieceTrainer.train(model_prefix=str(tmp_path / "added"), **common)
    added = SentencePieceTokenizer(str(tmp_path / "added.model"))
    assert (added.eod, added.vocab_size) == (400, 401)
    assert added.detokenize([*added.tokenize("hello"), added.eod]) == "hello"
    SentencePieceTrainer.train(model_prefix=str(tmp_path / "own"), control_symbols=["<EOD>"], **common)
    own = SentencePieceTokenizer(str(tmp_path / "own.model"))
    assert own.eod < 400 and own.vocab_size == 400
    assert own.fingerprint != added.fingerprint


def test_lone_surrogates_become_replacement_characters(sentencepiece: SentencePieceTokenizer) -> None:
    for tokenizer in (sentencepiece, ByteTokenizer()):
        assert tokenizer.detokenize(tokenizer.tokenize("a\ud800b")) == "a\ufffdb"


def test_byte_and_null_tokenizer() -> None:
    byte = ByteTokenizer()
    assert (byte.vocab_size, byte.eod) == (257, 256) and byte.tokenize("aé") == [97, 195, 169]
    with pytest.raises(ValueError, match=r"--vocab-size \(300\) does not go with --tokenizer-type ByteTokenizer"):
        build_tokenizer("ByteTokenizer", None, 300)
    null = NullTokenizer(100)
    assert (null.vocab_size, null.eod) == (101, 100)
    assert null.tokenize(" 5 99  0") == [5, 99, 0] and null.detokenize([5, 99, 100]) == "5 99"
    for wrong in ("100", "-1", "x", "1.0", "٣"):
        with pytest.raises(ValueError, match=r"NullTokenizer: '.*' is not an id in 0 \.\. 99"):
            null.tokenize(wrong)
    assert len({byte.fingerprint, null.fingerprint, NullTokenizer(101).fingerprint}) == 3


@pytest.mark.parametrize("content", [None, b"", b"not a model", b"\x0a\x05"])
def test_unreadable_model_is_refused(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "m").write_bytes(content)
    with pytest.raises(
        ValueError, match="^--tokenizer-model .*/m (cannot be read: No such|is not a sentencepiece model)"
    ):
        build_tokenizer("SentencePieceTokenizer", str(tmp_path / "m"))


def test_tokenizer_arguments() -> None:
    with pytest.raises(ValueError, match="SentencePieceTokenizer needs --tokenizer-model"):
        build_tokenizer("SentencePieceTokenizer")
    with pytest.raises(ValueError, match="NullTokenizer needs a positive --vocab-size, not None"):
        build_tokenizer("NullTokenizer")
    with pytest.raises(ValueError, match=r"--tokenizer-type \(GPT2\) must be one of"):
        build_tokenizer("GPT2")


# --- train_tokenizer ----------------------------------------------------------------------------------------------


def test_training_is_deterministic(train: ModuleType, model: str, sources: list[str], tmp_path: Path) -> None:
    for name in ("a", "b"):
        flags = ["--input", *sources, "--output-prefix", str(tmp_path / name), "--vocab-size", "400"]
        assert train.main([*flags, "--sample-lines", "300"]) == 0
    assert (tmp_path / "a.model").read_bytes() == (tmp_path / "b.model").read_bytes()
    assert sorted(os.listdir(tmp_path)) == ["a.model", "a.vocab", "b.model", "b.vocab"]
    assert len((tmp_path / "a.vocab").read_text().splitlines()) == 400


def test_training_reads_json_lines(train: ModuleType, sources: list[str], tmp_path: Path) -> None:
    lines = [json.dumps({"body": Path(path).read_text()}) for path in sources]
    (tmp_path / "c.jsonl").write_text("\n".join(lines))
    flags = ["--input", str(tmp_path / "c.jsonl"), "--json-keys", "body", "--output-prefix", str(tmp_path / "t")]
    assert train.main([*flags, "--vocab-size", "600"]) == 0
    assert SentencePieceTokenizer(str(tmp_path / "t.model")).vocab_size == 600


def test_a_small_text_gives_as_many_tokens_as_it_has(train: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "c.txt").write_text("a few words\n" * 20)
    flags = ["--input", str(tmp_path / "c.txt"), "--output-prefix", str(tmp_path / "t"), "--vocab-size", "4096"]
    assert train.main(flags) == 2
    assert train.main([*flags, "--soft-vocab-limit"]) == 0
    tokenizer = SentencePieceTokenizer(str(tmp_path / "t.model"))
    assert 256 < tokenizer.vocab_size < 400 and tokenizer.detokenize(tokenizer.tokenize("a few é")) == "a few é"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--vocab-size", "100"],
            "--vocab-size 100: sentencepiece cannot train on this text (Vocabulary size is smaller",
        ),
        (["--vocab-size", "100000"], "Vocabulary size too high (100000)"),
        (["--input", "/nowhere"], "--input /nowhere cannot be read: No such file"),
        (["--input", "/dev/null"], "there is no text"),
    ],
)
def test_training_refuses(train, sources, tmp_path, capfd, flags, message) -> None:
    assert train.main(["--input", *sources, "--output-prefix", str(tmp_path / "t"), *flags]) == 2
    assert message in capfd.readouterr().err and os.listdir(tmp_path) == []


# --- preprocess_data ----------------------------------------------------------------------------------------------


def run(tool: ModuleType, tmp_path: Path, *flags: str, output: str = "out") -> int:
    return tool.main(["--output-prefix", str(tmp_path / output), "--tokenizer-type", "ByteTokenizer", *flags])


def texts(prefix: Path | str) -> list[str]:
    dataset = IndexedDataset(str(prefix))
    return [ByteTokenizer().detokenize(dataset.get(i).tolist()) for i in range(len(dataset))]


def test_json_lines(preprocess: ModuleType, tmp_path: Path) -> None:
    rows = [
        {"text": "one\nline", "more": "x"},
        {"text": "", "more": "y"},
        {"text": ["two", "", "parts"], "more": ["", ""]},
        {"text": "\ud800é", "more": "z"},
    ]
    path = tmp_path / "c.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + "\n\n".join(map(json.dumps, rows)).encode())
    assert run(preprocess, tmp_path, "--input", str(path), "--json-keys", "text", "more", "--append-eod") == 0
    dataset = IndexedDataset(str(tmp_path / "out_text_document"))
    assert texts(tmp_path / "out_text_document") == ["one\nline", "two", "parts", "\ufffdé"]
    assert dataset.document_indices.tolist() == [0, 1, 1, 3, 4]  # an empty document has no sequence, as in Megatron
    assert [256 in dataset.get(i) for i in range(4)] == [True, False, True, True]  # once per document
    assert dataset.dtype.name == "uint16"
    assert texts(tmp_path / "out_more_document") == ["x", "y", "z"]
    check_record(str(tmp_path / "out_text_document"), ByteTokenizer())
    with pytest.raises(ValueError, match="another tokenizer"):
        check_record(str(tmp_path / "out_text_document"), NullTokenizer(9))


def test_files_equal_those_of_megatrons_recipe(
    preprocess: ModuleType, sentencepiece, model: str, tmp_path: Path
) -> None:
    import numpy as np
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    rows = [{"text": f"def f{i}():\n    return {i}\n" * (i % 4)} for i in range(2000)]
    (tmp_path / "c.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    builder = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=np.uint16)
    for row in rows:
        ids = sentencepiece.tokenize(row["text"])
        ids += [sentencepiece.eod] if ids else []
        builder.add_document(ids, [len(ids)] if ids else [])
    builder.finalize(str(tmp_path / "theirs.idx"))
    flags = ["--input", str(tmp_path / "c.jsonl"), "--append-eod", "--tokenizer-type", "SentencePieceTokenizer"]
    for workers in ("1", "2"):
        flags_of_run = [*flags, "--tokenizer-model", model, "--workers", workers]
        assert run(preprocess, tmp_path, *flags_of_run, output=workers) == 0
        for suffix in (".bin", ".idx"):
            ours = (tmp_path / f"{workers}_text_document{suffix}").read_bytes()
            assert ours == (tmp_path / f"theirs{suffix}").read_bytes()


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ([], ["a", " b ", "c\rd", "e"]),
        (["--document-separator", r"\n\n"], ["a\r\n b ", "c\rd\ne"]),
        (["--document-separator", ""], ["a\r\n b \n\nc\rd\ne"]),
        (["--document-separator", "d"], ["a\r\n b \n\nc\r", "\ne"]),
        (["--document-separator", "é"], ["a\r\n b \n\nc\rd\ne"]),
    ],
)
def test_plain_text(preprocess: ModuleType, tmp_path: Path, flags: list[str], expected: list[str]) -> None:
    (tmp_path / "c.txt").write_bytes(b"a\r\n b \n\nc\rd\ne")
    assert run(preprocess, tmp_path, "--input", str(tmp_path / "c.txt"), *flags) == 0
    assert texts(tmp_path / "out_text_document") == expected


def test_separator_in_another_alphabet(preprocess: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "c.txt").write_text("éinsµzwei§drei漢vier", encoding="utf-8")
    for separator, count in (("µ", 2), ("漢", 2), ("§", 2), (r"\xb5", 2), ("é", 1)):
        assert run(preprocess, tmp_path, "--input", str(tmp_path / "c.txt"), "--document-separator", separator) == 0
        assert len(IndexedDataset(str(tmp_path / "out_text_document"))) == count


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text("ab|", max_size=30), max_size=8), st.sampled_from(["|", "||", "ab", "\n"]), st.integers(1, 7))
def test_pieces_do_not_depend_on_the_block_size(tmp_path_factory, parts, separator, block) -> None:
    from megatron_hc.data import streams

    path = tmp_path_factory.mktemp("p") / "c.txt"
    content = separator.join(parts)
    path.write_text(content)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(streams, "BLOCK_BYTES", block)
        found = [record.content.decode() for record in PlainText(str(path), separator, "text").records()]
    assert found == [part for part in content.split(separator) if part]


@pytest.mark.parametrize("workers", ["1", "2"])
@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("c.jsonl", b'{"text": "a"}\n{"text": \n', r"c.jsonl, line 2 is not JSON"),
        ("c.jsonl", b'{"text": "a"}\n\n["text"]\n', r"c.jsonl, line 3 holds a JSON list instead of an object"),
        ("c.jsonl", b'{"body": "a"}', r"c.jsonl, line 1 has no text under --json-keys text \(its keys: 'body'\)"),
        ("c.jsonl", b'{"text": [1]}', r"c.jsonl, line 1 has no text under --json-keys text"),
        ("c.jsonl", b'{"text": "\xff"}', r"c.jsonl, line 1: byte 10 is not UTF-8"),
        ("c.jsonl", b"[" * 100_000, r"c.jsonl, line 1 is not JSON"),
        ("c.txt", b"fine\nbad \xe9\n", r"c.txt, line 2: byte 4 is not UTF-8"),
        ("c.txt", b"\n\n", r"there is no text \(key text\) in 0 documents"),
    ],
)
def test_bad_input_is_named_and_nothing_is_written(
    preprocess, tmp_path, capfd, name, content, message, workers
) -> None:
    (tmp_path / name).write_bytes(content)
    assert run(preprocess, tmp_path, "--input", str(tmp_path / name), "--workers", workers) == 2
    errors = capfd.readouterr().err
    assert re.search(message, errors) and len(errors.splitlines()) == 1
    assert os.listdir(tmp_path) == [name]


def test_word_outside_the_null_tokenizer(preprocess, tmp_path, capfd) -> None:
    (tmp_path / "c.txt").write_text("1 2\n3 70\n")
    flags = ["--input", str(tmp_path / "c.txt"), "--tokenizer-type", "NullTokenizer", "--vocab-size", "70"]
    assert run(preprocess, tmp_path, *flags) == 2
    assert "c.txt, line 2: NullTokenizer: '70' is not an id in 0 .. 69" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--input", "/nowhere.txt"], "--input /nowhere.txt cannot be read: No such file or directory"),
        (["--json-keys", "a", "b"], "is plain text and has one text per document"),
        (["--output-prefix", "/dev/null/x"], "/dev/null"),
        (["--tokenizer-type", "SentencePieceTokenizer"], "SentencePieceTokenizer needs --tokenizer-model"),
    ],
)
def test_arguments_are_refused(preprocess, tmp_path, capfd, flags, message) -> None:
    (tmp_path / "c.txt").write_text("text\n")
    assert run(preprocess, tmp_path, "--input", str(tmp_path / "c.txt"), *flags) == 2
    assert message in capfd.readouterr().err and os.listdir(tmp_path) == ["c.txt"]


@pytest.mark.parametrize(
    "flags", [["--workers", "0"], ["--document-separator", "\\x"], ["--json-keys", "a", "a"], ["--inptu", "x"]]
)
def test_wrong_flags_exit_with_2(preprocess, tmp_path, flags) -> None:
    with pytest.raises(SystemExit) as caught:
        run(preprocess, tmp_path, "--input", "x", *flags)
    assert caught.value.code == 2


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--keep-sequential-samples"], "--keep-sequential-samples is not offered: documents keep their order"),
        (["--json-key", "text"], "--json-key is not offered: use --json-keys"),
        (["--vocab-file", "v.json", "--append-eod"], "--vocab-file is not offered: put it into a folder as vocab.json"),
        (["--trust-remote-code"], "--trust-remote-code is not offered: a tokenizer's own code is never run"),
        (["--tokenizer-type", "Llama2Tokenizer"], "Llama2Tokenizer is not offered: use SentencePieceTokenizer with"),
        (["--tokenizer-type", "Llama3Tokenizer"], "invalid choice: 'Llama3Tokenizer'"),
    ],
)
def test_flags_of_megatrons_tool(preprocess, tmp_path, capfd, flags, message) -> None:
    with pytest.raises(SystemExit) as caught:
        run(preprocess, tmp_path, "--input", "x", *flags)
    assert caught.value.code == 2 and message in capfd.readouterr().err


def test_command_line(tmp_path: Path) -> None:
    (tmp_path / "c.txt").write_text("one\ntwo\n")
    command = [sys.executable, str(ROOT / "tools" / "preprocess_data.py"), "--input", str(tmp_path / "c.txt")]
    command += ["--output-prefix", str(tmp_path / "new" / "out"), "--tokenizer-type", "ByteTokenizer"]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stderr == ""
    assert done.stdout == f"{tmp_path}/new/out_text_document.bin: 2 documents, 6 tokens\n"
    done = subprocess.run([*command, "--vocab"], env=ENVIRONMENT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "--vocab" in done.stderr
