"""Tokenizers of Hugging Face's ``tokenizers`` and of ``tiktoken``. This module needs no torch.

A byte-level BPE from a tokenizer.json is run by tiktoken, several times as fast, where a check at start-up finds the
same ids. Special tokens are recognised in text only where that is asked for: an ``</s>`` in a web page must not end a
document. Both libraries are optional.
"""

from __future__ import annotations

import base64
import json
import random
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_hc.data.tokenizer_text import Ids, fingerprint_of, valid_unicode

END_OF_DOCUMENT = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "<EOD>", "[EOS]")
CHECKED_PIECES = 10_000  # vocabulary pieces in the text of the start-up check: about 0.2 s

LONGEST_ORDINARY = 2**18  # characters that tiktoken certainly can take: its stack has 2**20 places

# How text is cut into words before the merges. v1 and v2 are Megatron-LM's names.
PATTERNS = {
    "gpt2": r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s+(?!\S)|\s+",
    "cl100k": r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+",
    "o200k": r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    "v1": r"[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+",
    "v2": r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
}


def import_optional(package: str, kind: str) -> Any:
    """A package that ``--tokenizer-type kind`` needs; ``ValueError`` names the extra to install."""
    try:
        return __import__(package)
    except ImportError as error:
        raise ValueError(
            f"--tokenizer-type {kind} needs the {package} package: pip install 'megatron_hc[hf]'"
        ) from error


class HuggingFaceTokenizer:
    """A tokenizer.json, or a folder that holds one, or GPT-2's vocab.json and merges.txt. No id is put before a text.

    End-of-document is the ``eos_token`` of the tokenizer_config.json beside it, else a special token with a usual name
    (``END_OF_DOCUMENT``), else one id added at the end. ``is_fast`` says whether tiktoken does the work.
    """

    def __init__(self, model: str, *, parse_special_tokens: bool = False, allow_fast: bool = True) -> None:
        tokenizers = import_optional("tokenizers", type(self).__name__)
        path = Path(model)
        path = path / "tokenizer.json" if path.is_dir() else path
        is_gpt2 = not path.exists() and path.with_name("merges.txt").exists()
        try:
            description = _gpt2_files(path.parent) if is_gpt2 else json.loads(path.read_text(encoding="utf-8"))
            assert isinstance(description, dict)
            # Set by the program that saved the file, for its own batches.
            description |= {"truncation": None, "padding": None}
            content = json.dumps(description, sort_keys=True, ensure_ascii=False)
            self._tokenizer = tokenizers.Tokenizer.from_str(content)
        except OSError as error:
            hint = "" if path.exists() else "; a name on the hub must be downloaded first: hf download NAME"
            raise ValueError(f"--tokenizer-model {path} cannot be read: {error.strerror}{hint}") from error
        except Exception as error:  # the library raises bare Exception
            raise ValueError(f"--tokenizer-model {path} is not a tokenizer.json: {error}") from error
        self._tokenizer.encode_special_tokens = not parse_special_tokens
        ids = self._tokenizer.get_vocab(with_added_tokens=True)
        size = max(ids.values(), default=-1) + 1
        if not size:
            raise ValueError(f"--tokenizer-model {path} has no tokens")
        named = _special_names(path.with_name("tokenizer_config.json"))
        if "eos" in named and named["eos"] not in ids:
            raise ValueError(f"{path.with_name('tokenizer_config.json')}: eos_token {named['eos']!r} is not in {path}")
        candidates = [named["eos"]] if "eos" in named else [name for name in END_OF_DOCUMENT if name in ids]
        self.eod = ids[candidates[0]] if candidates else size
        self.vocab_size = max(size, self.eod + 1)
        pad = ids.get(named.get("pad", ""), -1)
        self.pad = -1 if pad == self.eod else pad
        self._size = size
        self._fingerprint = fingerprint_of(b"HuggingFaceTokenizer", content.encode(), str(self.eod).encode())
        self._fast = None
        if allow_fast and not parse_special_tokens:
            self._fast = _tiktoken_equivalent(description, self._tokenizer)

    @property
    def is_fast(self) -> bool:
        """Whether tiktoken does the work."""
        return self._fast is not None

    @property
    def fingerprint(self) -> str:
        return self._fingerprint

    def tokenize(self, text: str) -> list[int]:
        return [int(i) for i in self.tokenize_batch([text])[0]]

    def tokenize_batch(self, texts: Sequence[str]) -> list[Ids]:
        texts = [valid_unicode(text) for text in texts]
        if self._fast is not None:
            try:
                return [self._fast.encode(text) for text in texts]
            except ValueError:
                pass  # tiktoken's regular expressions run out of stack on a million spaces in a row
        return [found.ids for found in self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)]

    def detokenize(self, ids: Iterable[int]) -> str:
        return self._tokenizer.decode([int(i) for i in ids if i != self.eod and i < self._size])


def _gpt2_files(folder: Path) -> dict[str, Any]:
    """The tokenizer.json of a vocab.json and a merges.txt: the files of Megatron-LM's GPT2BPETokenizer."""
    vocab = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    lines = (folder / "merges.txt").read_text(encoding="utf-8").split("\n")
    merges = [line.split(" ") for line in lines if line and not line.startswith("#version")]
    special = [{"id": vocab[name], "content": name, "special": True} for name in ("<|endoftext|>",) if name in vocab]
    switches = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": True}
    return {
        "version": "1.0",
        "added_tokens": [token | switches for token in special],
        "pre_tokenizer": byte_level,
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": vocab, "merges": merges},
    }


def _special_names(path: Path) -> dict[str, str]:
    """``eos`` and ``pad`` of a tokenizer_config.json, where it is there and names them."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        found = {name: config.get(f"{name}_token") for name in ("eos", "pad")}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, AttributeError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    names = {name: value.get("content") if isinstance(value, dict) else value for name, value in found.items()}
    return {name: value for name, value in names.items() if isinstance(value, str)}


def _ordinary(encoding: Any, text: str) -> list[int]:
    """tiktoken's ids, special tokens taken as text; ``ValueError`` where its regular expressions run out of stack.

    ``encode_ordinary`` is half as fast again as ``encode``, but panics at a run of a million spaces.
    """
    if len(text) > LONGEST_ORDINARY:
        return encoding.encode(text, disallowed_special=())
    return encoding.encode_ordinary(text)


class _Fast:
    """A byte-level BPE run by tiktoken: ranks are the order of the merges, and a table turns them into the ids."""

    def __init__(self, pattern: str, ids: dict[bytes, int]) -> None:
        tiktoken = import_optional("tiktoken", "TikTokenizer")
        ranks = {token: rank for rank, token in enumerate(ids)}
        self._encoding = tiktoken.Encoding("fast", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
        self._table = np.array(list(ids.values()), dtype=np.int32)

    def encode(self, text: str) -> np.ndarray:
        return self._table[np.array(_ordinary(self._encoding, text), dtype=np.intp)]


def _tiktoken_equivalent(description: dict[str, Any], tokenizer: Any) -> _Fast | None:
    """tiktoken set up to do the same; None where it cannot, or where the check finds another id."""
    pattern = _word_pattern(description)
    model = description.get("model") or {}
    plain = not any(
        model.get(name) for name in ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix")
    )
    added_are_special = all(token.get("special") for token in description.get("added_tokens") or [])
    if pattern is None or model.get("type") != "BPE" or model.get("byte_fallback") or not plain:
        return None
    if not added_are_special:
        return None
    try:
        ids = _ids_in_merge_order(model)
        fast = _Fast(pattern, ids)
        for text in check_texts(list(ids)):
            found = tokenizer.encode(text, add_special_tokens=False).ids
            if fast.encode(text).tolist() != found:
                return None
    except (ValueError, KeyError, TypeError):
        return None  # an unusual file, or no tiktoken: the library that made the tokenizer runs it
    return fast


def _word_pattern(description: dict[str, Any]) -> str | None:
    """The regular expression of a byte-level pre-tokenizer that has only that; None for any other."""
    if description.get("normalizer"):
        return None
    steps = description.get("pre_tokenizer") or {}
    steps = steps.get("pretokenizers", []) if steps.get("type") == "Sequence" else [steps]
    if not steps or steps[-1].get("type") != "ByteLevel" or steps[-1].get("add_prefix_space"):
        return None
    if len(steps) == 1:
        return PATTERNS["gpt2"] if steps[0].get("use_regex", True) else None
    split = steps[0]
    is_split = split.get("type") == "Split" and split.get("behavior") == "Isolated" and not split.get("invert")
    if len(steps) != 2 or not is_split or steps[1].get("use_regex", True):
        return None
    return (split.get("pattern") or {}).get("Regex")


def byte_characters() -> dict[str, int]:
    """Byte-level vocabularies spell a byte as a printable character: itself, or one from U+0100 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


def _ids_in_merge_order(model: dict[str, Any]) -> dict[bytes, int]:
    """Token -> id: the single bytes, then what each merge makes, then words that no merge makes."""
    spelled = byte_characters()
    vocab: dict[str, int] = model["vocab"]
    merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
    order = [*spelled, *(left + right for left, right in merges)]
    if model.get("ignore_merges"):
        order += [token for token in vocab if set(token) <= spelled.keys()]
    return {bytes(spelled[character] for character in token): vocab[token] for token in dict.fromkeys(order)}


def check_texts(tokens: list[bytes]) -> list[str]:
    """Texts that meet every token and many of their neighbourhoods, and what cutting into words finds hard."""
    chooser = random.Random(1)
    chosen = tokens + chooser.choices(tokens, k=CHECKED_PIECES)
    chooser.shuffle(chosen)
    joined = b"".join(chosen).decode(errors="replace")
    spaced = " ".join(token.decode(errors="replace") for token in tokens[:: max(1, len(tokens) // CHECKED_PIECES)])
    hard = (
        "I'll we've THEY'RE it's 'tis x'S 12345 1,234.5e-6 3½ ²³ ٣٤ Ⅷ\r\n\r\n \n\t\t  indented\n        return\r"
        "\u00a0no-break\u3000wide\u2028line\u0085next\u200bzero a\u0301 e\u0300\u0301 "
        "नमस्ते สวัสดี 你好，世界。 こんにちは 한국어 "
        "Привет مرحبا שלום ǅ ʰ \U0001f389\U0001f468\u200d\U0001f469\u200d\U0001f467 \x00\x01\x7f "
        "\ufeff\ufffd https://a.b/c?d=e&f=%20 "
        "</s><|endoftext|> {{{}}}((()))!!!??? ....  --== snake_case camelCase  trailing   "
    )
    every = "".join(chr(code) for code in range(1, 0x3000))
    return [hard, joined, spaced, every, " ".join(every[::7]), "\n".join(every[::11]), "", " ", "\n\n\n", "a" * 500]


class TikTokenizer:
    """A tiktoken vocabulary: Megatron-LM's .json, or a .tiktoken file (lines of base64 and rank).

    In a .json the ids 0 .. ``num_special_tokens`` - 1 are special (2 is ``</s>``, end-of-document; 4 is ``<pad>``), the
    file's tokens follow, and ``vocab_size`` counts all of them (None: the whole file, up to 131,072). A .tiktoken file
    gets end-of-document after its last id. ``pattern`` is a key of ``PATTERNS``; None: v2 for .json, cl100k else.

    ``ranks``: token -> id of what is not special, the order of the merges; ``special``: name -> id.
    """

    def __init__(
        self,
        model: str,
        *,
        pattern: str | None = None,
        num_special_tokens: int = 1000,
        vocab_size: int | None = None,
        parse_special_tokens: bool = False,
    ) -> None:
        tiktoken = import_optional("tiktoken", type(self).__name__)
        is_json = Path(model).suffix == ".json"
        self.pattern = pattern or ("v2" if is_json else "cl100k")
        try:
            content = Path(model).read_bytes()
            tokens = _megatron_tokens(content) if is_json else _ranked_tokens(content)
        except OSError as error:
            raise ValueError(f"--tokenizer-model {model} cannot be read: {error.strerror}") from error
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"--tokenizer-model {model} is not a tiktoken vocabulary ({error})") from error
        if is_json:
            size = min(2**17, len(tokens) + num_special_tokens) if vocab_size is None else vocab_size
            if not num_special_tokens + 256 <= size <= len(tokens) + num_special_tokens:
                raise ValueError(
                    f"--vocab-size {size}: {model} allows {num_special_tokens + 256} .. "
                    f"{len(tokens) + num_special_tokens} with {num_special_tokens} special tokens"
                )
            names = ["<unk>", "<s>", "</s>", "<mask>", "<pad>", "<cls>", "<sep>"]
            names += [f"<SPECIAL_{i}>" for i in range(len(names), num_special_tokens)]
            self.special = {name: i for i, name in enumerate(names)}
            self.ranks = {token: i + num_special_tokens for i, token in enumerate(tokens[: size - num_special_tokens])}
            self.eod, self.pad = self.special["</s>"], self.special["<pad>"]
        else:
            if vocab_size is not None:
                raise ValueError(
                    f"--vocab-size ({vocab_size}) is for a TikTokenizer's .json: {model} has {len(tokens)} tokens and "
                    "end-of-document, leave it out"
                )
            self.ranks = {token: i for i, token in enumerate(tokens)}
            self.eod, self.pad = len(tokens), -1
            self.special = {"<|endoftext|>": self.eod}
        self.vocab_size = max(*self.ranks.values(), *self.special.values()) + 1
        self._special = set(self.special.values())
        self._allowed: frozenset[str] = frozenset(self.special) if parse_special_tokens else frozenset()
        self._encoding = tiktoken.Encoding(
            "text", pat_str=PATTERNS[self.pattern], mergeable_ranks=self.ranks, special_tokens=self.special
        )
        settings = f"{self.pattern} {self.vocab_size} {self.eod}"
        self._fingerprint = fingerprint_of(b"TikTokenizer", content, settings.encode())

    @property
    def fingerprint(self) -> str:
        return self._fingerprint

    def tokenize(self, text: str) -> list[int]:
        text = valid_unicode(text)
        if not self._allowed:
            return _ordinary(self._encoding, text)
        return self._encoding.encode(text, allowed_special=self._allowed)

    def tokenize_batch(self, texts: Sequence[str]) -> list[Ids]:
        return [self.tokenize(text) for text in texts]

    def detokenize(self, ids: Iterable[int]) -> str:
        return self._encoding.decode([int(i) for i in ids if i not in self._special and i < self.vocab_size])


def _megatron_tokens(content: bytes) -> list[bytes]:
    entries = json.loads(content)
    tokens = [base64.b64decode(entry["token_bytes"], validate=True) for entry in entries]
    _check_ranks(tokens, [entry["rank"] for entry in entries])
    return tokens


def _ranked_tokens(content: bytes) -> list[bytes]:
    lines = [line.split() for line in content.splitlines() if line]
    if not all(len(line) == 2 for line in lines):
        raise ValueError("a line is not base64 and rank")
    tokens = [base64.b64decode(line[0], validate=True) for line in lines]
    _check_ranks(tokens, [int(line[1]) for line in lines])
    return tokens


def _check_ranks(tokens: list[bytes], ranks: list[int]) -> None:
    if ranks != list(range(len(tokens))):
        raise ValueError("its ranks are not 0, 1, 2 ...")
    if len(set(tokens)) != len(tokens) or not {bytes([byte]) for byte in range(256)} <= set(tokens):
        raise ValueError("a token occurs twice or a single byte is missing")
