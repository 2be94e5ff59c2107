"""Tokenizers: text to ids and back. This module needs no torch.

``TOKENIZERS`` maps ``--tokenizer-type`` to a builder; a new kind is a class and a line there. A dataset remembers in
``PREFIX.json`` which tokenizer wrote it, by fingerprint; training refuses another one.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from megatron_hc.config import DataConfig
from megatron_hc.config.data import WITHOUT_MODEL, check_model_is_read
from megatron_hc.data.tokenizer_bpe import PATTERNS, HuggingFaceTokenizer, TikTokenizer
from megatron_hc.data.tokenizer_text import Ids, fingerprint_of, valid_unicode


class Tokenizer(Protocol):
    """What the data tools and the datasets ask of a tokenizer."""

    @property
    def vocab_size(self) -> int:
        """Number of ids, end-of-document included: ids are 0 .. vocab_size - 1."""

    @property
    def eod(self) -> int:
        """Id of end-of-document."""

    @property
    def pad(self) -> int:
        """Id of padding, whose loss is masked; -1 where there is none."""

    @property
    def fingerprint(self) -> str:
        """Hex SHA-256 of everything that decides which ids a text gets."""

    def tokenize(self, text: str) -> list[int]:
        """The ids of ``text``, without end-of-document."""

    def tokenize_batch(self, texts: Sequence[str]) -> list[Ids]:
        """The ids of each text: what the data tools call."""

    def detokenize(self, ids: Iterable[int]) -> str:
        """The text of ``ids``; special ids have none."""


class ByteTokenizer:
    """One id per byte of the UTF-8 text (its value); end-of-document is 256."""

    vocab_size = 257
    eod = 256
    pad = -1

    @property
    def fingerprint(self) -> str:
        return fingerprint_of(b"ByteTokenizer")

    def tokenize(self, text: str) -> list[int]:
        return list(valid_unicode(text).encode())

    def tokenize_batch(self, texts: Sequence[str]) -> list[Ids]:
        return [np.frombuffer(valid_unicode(text).encode(), dtype=np.uint8) for text in texts]

    def detokenize(self, ids: Iterable[int]) -> str:
        return bytes(i for i in ids if i < 256).decode(errors="replace")


class NullTokenizer:
    """Text that already is ids, separated by spaces; for tests and benchmarks. End-of-document is ``vocab_size``.

    As in Megatron-LM the argument does not count end-of-document, so the property ``vocab_size`` is one more.
    """

    pad = -1

    def __init__(self, vocab_size: int) -> None:
        self.eod = vocab_size
        self.vocab_size = vocab_size + 1

    @property
    def fingerprint(self) -> str:
        return fingerprint_of(b"NullTokenizer", str(self.eod).encode())

    def tokenize(self, text: str) -> list[int]:
        ids = []
        for word in text.split():
            if not (word.isascii() and word.isdigit() and int(word) < self.eod):
                raise ValueError(f"NullTokenizer: {word[:40]!r} is not an id in 0 .. {self.eod - 1}")
            ids.append(int(word))
        return ids

    def tokenize_batch(self, texts: Sequence[str]) -> list[Ids]:
        return [self.tokenize(text) for text in texts]

    def detokenize(self, ids: Iterable[int]) -> str:
        return " ".join(str(i) for i in ids if i != self.eod)


class SentencePieceTokenizer:
    """A sentencepiece model. End-of-document is the model's eos, or its piece ``<EOD>``, or one id added at the end.

    Models of ``tools/train_tokenizer.py`` give back every text exactly, whitespace included (all but U+2581, which
    sentencepiece uses for the space).
    """

    def __init__(self, model: str) -> None:
        from sentencepiece import SentencePieceProcessor

        try:
            content = Path(model).read_bytes()
        except OSError as error:
            raise ValueError(f"--tokenizer-model {model} cannot be read: {error.strerror}") from error
        if not content:  # which sentencepiece takes, and complains about on stderr later
            raise ValueError(f"--tokenizer-model {model} is not a sentencepiece model: it is empty")
        try:
            self._processor = SentencePieceProcessor(model_proto=content)
            pieces = self._processor.get_piece_size()
        except (RuntimeError, OSError) as error:
            raise ValueError(f"--tokenizer-model {model} is not a sentencepiece model") from error
        if pieces == 0:
            raise ValueError(f"--tokenizer-model {model} is not a sentencepiece model")
        self._pieces = pieces
        self._fingerprint = fingerprint_of(b"SentencePieceTokenizer", content)
        self.eod = self._processor.eos_id()
        if self.eod < 0:
            named = self._processor.piece_to_id("<EOD>")
            self.eod = named if self._processor.id_to_piece(named) == "<EOD>" else pieces
        self.vocab_size = max(pieces, self.eod + 1)
        pad = self._processor.pad_id()
        # A padding id that doubles as end-of-document would mask the loss of every document's end.
        self.pad = -1 if pad == self.eod else pad

    @property
    def fingerprint(self) -> str:
        return self._fingerprint

    def tokenize(self, text: str) -> list[int]:
        return self._processor.encode(valid_unicode(text), out_type=int)

    def tokenize_batch(self, texts: Sequence[str]) -> list[Ids]:
        return self._processor.encode([valid_unicode(text) for text in texts], out_type=int, num_threads=1)

    def detokenize(self, ids: Iterable[int]) -> str:
        return self._processor.decode([int(i) for i in ids if i != self.eod and i < self._pieces])


@dataclass(frozen=True, kw_only=True)
class _Options:
    """The arguments of ``build_tokenizer``."""

    tokenizer_type: str
    tokenizer_model: str | None
    vocab_size: int | None
    tiktoken_pattern: str | None
    tiktoken_num_special_tokens: int
    parse_special_tokens: bool


def _model(options: _Options) -> str:
    if options.tokenizer_model is None:
        raise ValueError(f"--tokenizer-type {options.tokenizer_type} needs --tokenizer-model")
    return options.tokenizer_model


def _byte(options: _Options) -> Tokenizer:
    if options.vocab_size is not None:
        raise ValueError(
            f"--vocab-size ({options.vocab_size}) does not go with --tokenizer-type ByteTokenizer, which has "
            f"{ByteTokenizer.vocab_size} tokens: leave it out"
        )
    return ByteTokenizer()


def _null(options: _Options) -> Tokenizer:
    if options.vocab_size is None or options.vocab_size < 1:
        raise ValueError(f"--tokenizer-type NullTokenizer needs a positive --vocab-size, not {options.vocab_size}")
    return NullTokenizer(options.vocab_size)


def _widened(tokenizer: SentencePieceTokenizer | HuggingFaceTokenizer, options: _Options) -> Tokenizer:
    """With as many ids as --vocab-size says: models from elsewhere have rows that no token uses."""
    if options.vocab_size is not None:
        if options.vocab_size < tokenizer.vocab_size:
            raise ValueError(
                f"--vocab-size ({options.vocab_size}) is less than the {tokenizer.vocab_size} tokens of "
                f"--tokenizer-model {options.tokenizer_model}"
            )
        tokenizer.vocab_size = options.vocab_size
    return tokenizer


def _tiktoken(options: _Options) -> Tokenizer:
    return TikTokenizer(
        _model(options),
        pattern=options.tiktoken_pattern,
        num_special_tokens=options.tiktoken_num_special_tokens,
        vocab_size=options.vocab_size,
        parse_special_tokens=options.parse_special_tokens,
    )


TOKENIZERS: dict[str, Callable[[_Options], Tokenizer]] = {
    "SentencePieceTokenizer": lambda options: _widened(SentencePieceTokenizer(_model(options)), options),
    "HuggingFaceTokenizer": lambda options: _widened(
        HuggingFaceTokenizer(_model(options), parse_special_tokens=options.parse_special_tokens), options
    ),
    "TikTokenizer": _tiktoken,
    "ByteTokenizer": _byte,
    "NullTokenizer": _null,
}


def build_tokenizer(
    tokenizer_type: str | None,
    tokenizer_model: str | None = None,
    vocab_size: int | None = None,
    *,
    tiktoken_pattern: str | None = None,
    tiktoken_num_special_tokens: int = 1000,
    parse_special_tokens: bool = False,
) -> Tokenizer:
    """The tokenizer of ``--tokenizer-type`` and the flags beside it; ``ValueError`` where it cannot be made.

    With ``parse_special_tokens`` special tokens spelled out in a text become their ids, instead of being text.
    """
    if tokenizer_type not in TOKENIZERS:
        raise ValueError(f"--tokenizer-type ({tokenizer_type}) must be one of {', '.join(TOKENIZERS)}")
    if tiktoken_pattern is not None and (tokenizer_type != "TikTokenizer" or tiktoken_pattern not in PATTERNS):
        raise ValueError(
            f"--tiktoken-pattern ({tiktoken_pattern}) must be one of {', '.join(PATTERNS)}, and with a TikTokenizer"
        )
    if parse_special_tokens and tokenizer_type not in ("HuggingFaceTokenizer", "TikTokenizer"):
        raise ValueError(
            f"--parse-special-tokens goes with HuggingFaceTokenizer and TikTokenizer: a {tokenizer_type} has no "
            "special tokens to find in a text"
        )
    check_model_is_read(tokenizer_type, tokenizer_model)
    options = _Options(
        tokenizer_type=tokenizer_type,
        tokenizer_model=tokenizer_model,
        vocab_size=vocab_size,
        tiktoken_pattern=tiktoken_pattern,
        tiktoken_num_special_tokens=tiktoken_num_special_tokens,
        parse_special_tokens=parse_special_tokens,
    )
    return TOKENIZERS[tokenizer_type](options)


def tokenizer_of(data: DataConfig, tokenizer_model: str | None = None) -> Tokenizer:
    """The tokenizer of a run; ``tokenizer_model``: where its file is now, if it has moved."""
    # Runs were once begun with a file that their tokenizer does not read: their checkpoints are as good as others.
    stored = None if data.tokenizer_type in WITHOUT_MODEL else data.tokenizer_model
    return build_tokenizer(
        data.tokenizer_type,
        tokenizer_model or stored,
        data.vocab_size,
        tiktoken_pattern=data.tiktoken_pattern,
        tiktoken_num_special_tokens=data.tiktoken_num_special_tokens,
    )


def record_path(prefix: str) -> Path:
    """The file beside a dataset that says which tokenizer wrote it."""
    return Path(f"{prefix}.json")


def record_of(tokenizer: Tokenizer, **extra: object) -> dict[str, object]:
    """What a dataset remembers of its tokenizer; ``extra`` is kept for the reader's information."""
    return {
        "tokenizer_type": type(tokenizer).__name__,
        "fingerprint": tokenizer.fingerprint,
        "vocab_size": tokenizer.vocab_size,
        "eod": tokenizer.eod,
        **extra,
    }


def write_record(prefix: str, tokenizer: Tokenizer, **extra: object) -> None:
    """Write the record of dataset ``prefix``."""
    path = record_path(prefix)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(record_of(tokenizer, **extra), indent=2) + "\n", encoding="utf-8")
    os.replace(partial, path)


def check_record(prefix: str, tokenizer: Tokenizer) -> None:
    """Refuse (``ValueError``) a dataset written with another tokenizer; a dataset without a record passes."""
    path = record_path(prefix)
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        kind, fingerprint, size = (record[key] for key in ("tokenizer_type", "fingerprint", "vocab_size"))
    except FileNotFoundError:
        return
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path}, the record of the dataset's tokenizer, cannot be read ({error}): "
            "delete it to train without this check"
        ) from error
    if fingerprint != tokenizer.fingerprint:
        raise ValueError(
            f"dataset {prefix} was written with another tokenizer ({kind}, {size} tokens, fingerprint "
            f"{fingerprint[:12]}) than --tokenizer-type {type(tokenizer).__name__} ({tokenizer.vocab_size} tokens, "
            f"fingerprint {tokenizer.fingerprint[:12]}): preprocess the text again or give the dataset's tokenizer"
        )
