"""Tokenizers of the tokenizers and tiktoken libraries: ids against the libraries and Megatron, and the fast path."""

from __future__ import annotations

import base64
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_corpus import ROOT, load_tool
from hypothesis import example, given, settings
from hypothesis import strategies as st

from megatron_hc.config import DataConfig
from megatron_hc.convert import byte_level
from megatron_hc.convert.tokenizers import export_tokenizer
from megatron_hc.data import HuggingFaceTokenizer, TikTokenizer, build_tokenizer, check_record, tokenizer_of
from megatron_hc.data.tokenizer_bpe import PATTERNS

tokenizers = pytest.importorskip("tokenizers")
tiktoken = pytest.importorskip("tiktoken")

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)
HARD = "I'll  x\r\n\n  y\t\u00a0é\u0301 12345 </s><|endoftext|> \U0001f468\u200d\U0001f469 न 你好"


def trained(path: Path, *, word_pattern: str | None = None, special: tuple[str, ...] = (), **changes: Any) -> Path:
    """A small byte-level BPE; ``changes`` are made in its tokenizer.json."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    byte_level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=word_pattern is None)
    tokenizer.pre_tokenizer = byte_level
    if word_pattern:
        split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(word_pattern), "isolated")
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    names = ("config/model", "config/parallel", "train", "log", "mesh")
    lines = [line for name in names for line in (ROOT / "megatron_hc" / f"{name}.py").open()]
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=list(special),
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(lines, trainer)
    description = json.loads(tokenizer.to_str())
    for key, value in changes.items():
        where = description if key in description else description["model"]
        where[key] = value
    path.write_text(json.dumps(description))
    return path


@pytest.fixture(scope="module")
def gpt2_like(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tmp_path_factory.mktemp("t") / "tokenizer.json", special=("<|endoftext|>",))


@pytest.fixture(scope="module")
def fast_and_slow(gpt2_like: Path) -> tuple[HuggingFaceTokenizer, HuggingFaceTokenizer]:
    return HuggingFaceTokenizer(str(gpt2_like)), HuggingFaceTokenizer(str(gpt2_like), allow_fast=False)


@pytest.mark.parametrize("pattern", [None, PATTERNS["cl100k"], PATTERNS["o200k"]])
@pytest.mark.parametrize("ignore_merges", [False, True])
def test_fast_path_gives_the_ids_of_the_library(tmp_path: Path, pattern: str | None, ignore_merges: bool) -> None:
    path = trained(tmp_path / "t.json", word_pattern=pattern, special=("</s>",), ignore_merges=ignore_merges)
    fast, slow = HuggingFaceTokenizer(str(path)), HuggingFaceTokenizer(str(path), allow_fast=False)
    assert fast.is_fast and not slow.is_fast and fast.fingerprint == slow.fingerprint
    text = (ROOT / "megatron_hc" / "train.py").read_text() + HARD
    library = tokenizers.Tokenizer.from_file(str(path))
    library.encode_special_tokens = True
    assert fast.tokenize(text) == slow.tokenize(text) == library.encode(text, add_special_tokens=False).ids
    assert fast.detokenize([*fast.tokenize(text), fast.eod]) == text


@settings(max_examples=150, deadline=None)
@given(TEXT)
@example(HARD)
@example(" " * 300 + "x")
def test_any_text(fast_and_slow: tuple[HuggingFaceTokenizer, HuggingFaceTokenizer], text: str) -> None:
    fast, slow = fast_and_slow
    ids = fast.tokenize(text)
    assert ids == slow.tokenize(text) and fast.eod not in ids and fast.detokenize(ids) == text
    assert [list(found) for found in fast.tokenize_batch([text, "", text])] == [ids, [], ids]


def reordered(path: Path) -> Path:
    """The same tokenizer with other ids, so that they are not in the order of the merges."""
    description = json.loads(path.read_text())
    vocab = description["model"]["vocab"]
    top = max(vocab.values())
    special = {token["content"] for token in description["added_tokens"]}
    for token in description["added_tokens"]:
        token["id"] = top - token["id"]
    description["model"]["vocab"] = {token: top - id for token, id in vocab.items()}
    assert special <= vocab.keys()
    path.write_text(json.dumps(description))
    return path


def test_fast_path_where_ids_are_not_in_the_order_of_merges(tmp_path: Path) -> None:
    path = reordered(trained(tmp_path / "t.json", special=("<|endoftext|>",)))
    fast, slow = HuggingFaceTokenizer(str(path)), HuggingFaceTokenizer(str(path), allow_fast=False)
    assert fast.is_fast and fast.eod == fast.vocab_size - 1
    assert fast.tokenize(HARD) == slow.tokenize(HARD)


@pytest.mark.parametrize(
    "changes",
    [
        {"normalizer": {"type": "NFC"}},
        {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}},
        {"pre_tokenizer": {"type": "Whitespace"}},
        {"added_tokens": [
            {"id": 300, "content": "ab", "special": False, "single_word": False, "lstrip": False, "rstrip": False,
             "normalized": False}
        ]},
        {"merges": []},  # whole words are looked up first by tiktoken, which then finds other ids
    ],
)  # fmt: skip
def test_no_fast_path_where_ids_would_differ(tmp_path: Path, changes: dict[str, Any]) -> None:
    path = trained(tmp_path / "t.json", **changes)
    tokenizer = HuggingFaceTokenizer(str(path))
    assert not tokenizer.is_fast or changes == {"merges": []}
    library = tokenizers.Tokenizer.from_file(str(path))
    assert tokenizer.tokenize(HARD) == library.encode(HARD, add_special_tokens=False).ids


def test_a_text_too_hard_for_tiktoken_takes_the_slow_path(gpt2_like: Path) -> None:
    fast, slow = HuggingFaceTokenizer(str(gpt2_like)), HuggingFaceTokenizer(str(gpt2_like), allow_fast=False)
    text = "x" + " " * 1_100_000 + "x"
    with pytest.raises(ValueError, match="(?i)stack"):
        fast._fast.encode(text)  # type: ignore[union-attr]
    assert fast.tokenize(text) == slow.tokenize(text)


def test_special_tokens_are_text_unless_asked_for(gpt2_like: Path) -> None:
    text = "a<|endoftext|>b"
    plain = HuggingFaceTokenizer(str(gpt2_like))
    parsing = build_tokenizer("HuggingFaceTokenizer", str(gpt2_like), parse_special_tokens=True)
    assert plain.eod not in plain.tokenize(text) and plain.detokenize(plain.tokenize(text)) == text
    assert parsing.tokenize(text).count(plain.eod) == 1 and parsing.fingerprint == plain.fingerprint


@pytest.mark.parametrize("kind", ["ByteTokenizer", "NullTokenizer", "SentencePieceTokenizer"])
def test_special_tokens_cannot_be_asked_for_where_there_are_none(kind: str) -> None:
    with pytest.raises(ValueError, match=f"--parse-special-tokens goes with .* a {kind} has no"):
        build_tokenizer(kind, "unread", 100, parse_special_tokens=True)


def test_end_of_document(tmp_path: Path) -> None:
    named = trained(tmp_path / "tokenizer.json", special=("<pad>", "<|im_end|>", "</s>"))
    assert HuggingFaceTokenizer(str(tmp_path)).eod == 2  # a usual name
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": {"content": "<|im_end|>"}, "pad_token": "<pad>"}')
    tokenizer = HuggingFaceTokenizer(str(tmp_path))  # what the folder says
    assert (tokenizer.eod, tokenizer.pad, tokenizer.vocab_size) == (1, 0, 600)
    assert tokenizer.fingerprint == HuggingFaceTokenizer(str(named)).fingerprint
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<none>"}')
    with pytest.raises(ValueError, match="tokenizer_config.json: eos_token '<none>' is not in"):
        HuggingFaceTokenizer(str(tmp_path))
    (tmp_path / "tokenizer_config.json").unlink()
    added = HuggingFaceTokenizer(str(trained(tmp_path / "none.json")))
    assert (added.eod, added.vocab_size) == (600, 601)


def test_padding_that_is_end_of_document_is_none(tmp_path: Path) -> None:
    """Else the loss of every document's end would be masked."""
    trained(tmp_path / "tokenizer.json", special=("<pad>", "</s>"))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "</s>", "pad_token": "</s>"}')
    assert (HuggingFaceTokenizer(str(tmp_path)).eod, HuggingFaceTokenizer(str(tmp_path)).pad) == (1, -1)
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "</s>", "pad_token": "<nowhere>"}')
    assert HuggingFaceTokenizer(str(tmp_path)).pad == -1


def test_files_of_gpt2(tmp_path: Path) -> None:
    """vocab.json and merges.txt, as Megatron-LM's GPT2BPETokenizer takes them, are the same tokenizer."""
    whole = trained(tmp_path / "one.json", special=("<|endoftext|>",))
    (tmp_path / "gpt2").mkdir()
    tokenizers.Tokenizer.from_file(str(whole)).model.save(str(tmp_path / "gpt2"))
    got, expected = HuggingFaceTokenizer(str(tmp_path / "gpt2")), HuggingFaceTokenizer(str(whole))
    assert got.is_fast and expected.is_fast
    assert (got.eod, got.vocab_size) == (expected.eod, expected.vocab_size)
    text = "#version of it: 'tis 3 o'clock\n\n  <|endoftext|> naïve 你好"
    assert got.tokenize(text) == expected.tokenize(text)
    assert got.detokenize(got.tokenize(text)) == text


def test_what_a_program_saved_for_its_batches_does_not_count(gpt2_like: Path, tmp_path: Path) -> None:
    description = json.loads(gpt2_like.read_text())
    description["truncation"] = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    (tmp_path / "t.json").write_text(json.dumps(description))
    one, other = HuggingFaceTokenizer(str(tmp_path / "t.json")), HuggingFaceTokenizer(str(gpt2_like))
    assert one.fingerprint == other.fingerprint and one.tokenize(HARD) == other.tokenize(HARD)


@pytest.mark.parametrize("content", [b"", b"{}", b"[1]", b"\xff", b'{"model": {"type": "BPE", "vocab": {}}}'])
def test_unreadable_tokenizer_json(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(ValueError, match="^--tokenizer-model .*tokenizer.json (is not a tokenizer.json|has no tokens)"):
        HuggingFaceTokenizer(str(tmp_path))
    with pytest.raises(ValueError, match="org/name cannot be read: .*: hf download NAME"):
        HuggingFaceTokenizer("org/name")


# --- tiktoken -----------------------------------------------------------------------------------------------------


def tokens_of(path: Path) -> list[bytes]:
    from megatron_hc.data.tokenizer_bpe import _ids_in_merge_order

    return list(_ids_in_merge_order(json.loads(path.read_text())["model"]))


@pytest.fixture(scope="module")
def megatron_json(gpt2_like: Path) -> Path:
    """A vocabulary in Megatron's form: single bytes in their order first."""
    tokens = [bytes([byte]) for byte in range(256)] + tokens_of(gpt2_like)[256:]
    entries = [
        {"rank": i, "token_bytes": base64.b64encode(token).decode(), "token_str": token.decode(errors="replace")}
        for i, token in enumerate(tokens)
    ]
    path = gpt2_like.with_name("vocab.json")
    path.write_text(json.dumps(entries))
    return path


@pytest.mark.parametrize("pattern", ["v1", "v2"])
def test_ids_equal_megatrons(megatron_json: Path, pattern: str) -> None:
    from megatron.core.tokenizers.text.libraries.tiktoken_tokenizer import TikTokenTokenizer

    size = 1000 + 500
    theirs = TikTokenTokenizer(str(megatron_json), pattern=pattern, vocab_size=size)
    ours = TikTokenizer(str(megatron_json), pattern=pattern, vocab_size=size)
    assert (ours.vocab_size, ours.eod, ours.pad) == (theirs.vocab_size, theirs.eod, theirs.pad_id)
    text = (ROOT / "megatron_hc" / "train.py").read_text() + HARD.replace("</s>", "")
    assert ours.tokenize(text) == theirs.text_to_ids(text)
    parsing = TikTokenizer(str(megatron_json), pattern=pattern, vocab_size=size, parse_special_tokens=True)
    assert parsing.tokenize("a</s>b") == theirs.text_to_ids("a</s>b") and ours.eod not in ours.tokenize("a</s>b")


def test_tiktoken_file(gpt2_like: Path, tmp_path: Path) -> None:
    tokens = tokens_of(gpt2_like)
    path = tmp_path / "own.tiktoken"
    path.write_bytes(b"".join(base64.b64encode(token) + b" %d\n" % i for i, token in enumerate(tokens)))
    tokenizer = TikTokenizer(str(path), pattern="gpt2")
    assert (tokenizer.eod, tokenizer.vocab_size, tokenizer.pad) == (len(tokens), len(tokens) + 1, -1)
    ids = tokenizer.tokenize(HARD)
    assert tokenizer.detokenize([*ids, tokenizer.eod]) == HARD
    library = HuggingFaceTokenizer(str(gpt2_like))
    table = library._fast._table  # type: ignore[union-attr]
    assert [int(table[i]) for i in ids] == library.tokenize(HARD)  # the same words and merges
    assert np.concatenate(tokenizer.tokenize_batch([HARD, "x"])).tolist() == ids + tokenizer.tokenize("x")
    assert TikTokenizer(str(path)).fingerprint != tokenizer.fingerprint
    with pytest.raises(ValueError, match=r"--vocab-size \(9000\) is for a TikTokenizer's .json: .*own.tiktoken has"):
        TikTokenizer(str(path), vocab_size=9000)


@pytest.mark.parametrize(("size", "pattern"), [(None, "v2"), (1400, "v1"), (None, "o200k")])
def test_as_a_tokenizer_json(megatron_json: Path, tmp_path: Path, size: int | None, pattern: str) -> None:
    """What a checkpoint's export gives to transformers has the same ids, and so has what is read back from there."""
    transformers = pytest.importorskip("transformers")
    data = DataConfig(
        tokenizer_type="TikTokenizer", tokenizer_model=str(megatron_json), vocab_size=size, tiktoken_pattern=pattern
    )
    ours = tokenizer_of(data)
    assert export_tokenizer(data, 2000, tmp_path, pytest.fail) == {"eos_token_id": 2}
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    back = HuggingFaceTokenizer(str(tmp_path))
    assert (theirs.eos_token_id, theirs.pad_token_id, back.eod, back.pad) == (2, 4, 2, 4)
    assert len(theirs) == back.vocab_size == ours.vocab_size and back.is_fast
    for text in (HARD, (ROOT / "megatron_hc" / "train.py").read_text(), " .  ,", ""):
        ids = ours.tokenize(text)
        assert back.tokenize(text) == theirs(text, split_special_tokens=True)["input_ids"] == ids
        assert theirs.decode(ids) == text
    assert theirs("a</s>b")["input_ids"][1] == 2 and theirs.decode([2, 4], skip_special_tokens=True) == ""


def test_a_tokenizer_json_that_cannot_be(gpt2_like: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An ordinary token spelt like the special one, or another id: no file, and a sentence that says why."""
    tokens = [*tokens_of(gpt2_like), b"<|endoftext|>"]
    path = tmp_path / "own.tiktoken"
    path.write_bytes(b"".join(base64.b64encode(token) + b" %d\n" % i for i, token in enumerate(tokens)))
    data = DataConfig(tokenizer_type="TikTokenizer", tokenizer_model=str(path), tiktoken_pattern="gpt2")
    said: list[str] = []
    assert export_tokenizer(data, 2000, tmp_path, said.append) == {"eos_token_id": len(tokens)}
    path.write_bytes(b"".join(base64.b64encode(token) + b" %d\n" % i for i, token in enumerate(tokens[:-1])))
    monkeypatch.setattr(byte_level, "_merges", lambda ranks: [])
    assert export_tokenizer(data, 2000, tmp_path, said.append) == {"eos_token_id": len(tokens) - 1}
    assert f"{path}: its special token <|endoftext|> (id {len(tokens)}) is an ordinary one too" in said[0]
    assert "a tokenizer.json of it gives other ids for" in said[1]
    assert not list(tmp_path.glob("*.json"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", b"{}", "is not a tiktoken vocabulary"),
        ("a.json", b"[]", "a single byte is missing"),
        ("a.json", b'[{"rank": 3, "token_bytes": "YQ=="}]', "its ranks are not 0, 1, 2"),
        ("a.tiktoken", b"YQ==\n", "a line is not base64 and rank"),
        ("a.tiktoken", b"\xff 0\n", "is not a tiktoken vocabulary"),
    ],
)
def test_unreadable_vocabulary(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"--tokenizer-model .*{message}"):
        TikTokenizer(str(tmp_path / name))


def test_size_of_a_tiktoken_vocabulary(megatron_json: Path) -> None:
    with pytest.raises(ValueError, match=r"--vocab-size 1100: .* allows 1256 \.\. 1599 with 1000 special tokens"):
        TikTokenizer(str(megatron_json), vocab_size=1100)
    assert TikTokenizer(str(megatron_json)).vocab_size == 1599
    assert TikTokenizer(str(megatron_json), num_special_tokens=7).vocab_size == 606


# --- both ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["HuggingFaceTokenizer", "TikTokenizer"])
def test_preprocessing_and_the_runs_tokenizer_agree(kind, gpt2_like, megatron_json, tmp_path) -> None:
    model = str(gpt2_like if kind == "HuggingFaceTokenizer" else megatron_json)
    (tmp_path / "c.txt").write_text("some text\nand more\n")
    flags = ["--input", str(tmp_path / "c.txt"), "--output-prefix", str(tmp_path / "out"), "--tokenizer-type", kind]
    assert load_tool("preprocess_data").main([*flags, "--tokenizer-model", model, "--workers", "2"]) == 0
    data = DataConfig(tokenizer_type=kind, tokenizer_model=model, mock_data=True)  # type: ignore[arg-type]
    data.validate()
    check_record(str(tmp_path / "out_text_document"), tokenizer_of(data))
    with pytest.raises(ValueError, match=f"was written with another tokenizer \\({kind}"):
        check_record(str(tmp_path / "out_text_document"), build_tokenizer("ByteTokenizer"))


@pytest.mark.parametrize(("kind", "package"), [("HuggingFaceTokenizer", "tokenizers"), ("TikTokenizer", "tiktoken")])
def test_missing_library_names_the_extra(kind, package, gpt2_like, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ValueError, match=f"{kind} needs the {package} package: pip install 'megatron_hc\\[hf\\]'"):
        build_tokenizer(kind, str(gpt2_like))


def test_without_tiktoken_the_library_itself_works(gpt2_like, monkeypatch) -> None:
    ids = HuggingFaceTokenizer(str(gpt2_like)).tokenize(HARD)
    monkeypatch.setitem(sys.modules, "tiktoken", None)
    slow = HuggingFaceTokenizer(str(gpt2_like))
    assert not slow.is_fast and slow.tokenize(HARD) == ids


def test_flags_are_refused() -> None:
    with pytest.raises(ValueError, match=r"--tiktoken-pattern \(v9\) must be one of"):
        build_tokenizer("TikTokenizer", "x", tiktoken_pattern="v9")
    for kind in ("HuggingFaceTokenizer", "TikTokenizer"):
        with pytest.raises(ValueError, match=f"{kind} needs --tokenizer-model"):
            build_tokenizer(kind)
    for kind in ("ByteTokenizer", "NullTokenizer"):
        with pytest.raises(ValueError, match=rf"--tokenizer-model \(x\) is not read with --tokenizer-type {kind}"):
            build_tokenizer(kind, "x", None if kind == "ByteTokenizer" else 8)
    stored = DataConfig(tokenizer_type="ByteTokenizer", mock_data=True, tokenizer_model="x")
    assert tokenizer_of(stored).vocab_size == 257, "of an older checkpoint"
    with pytest.raises(ValueError, match=r"--tokenizer-model \(y\) is not read with"):
        tokenizer_of(stored, "y")
    with pytest.raises(ValueError, match="--tiktoken-pattern needs --tokenizer-type TikTokenizer"):
        DataConfig(tokenizer_type="ByteTokenizer", mock_data=True, tiktoken_pattern="v1").validate()
    with pytest.raises(ValueError, match=r"--tiktoken-num-special-tokens \(3\) must be at least 7"):
        DataConfig(tokenizer_type="ByteTokenizer", mock_data=True, tiktoken_num_special_tokens=3).validate()
