"""A tokenizer.json of a ByteTokenizer or a TikTokenizer: transformers has no other file for them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from megatron_hc.data import ByteTokenizer, TikTokenizer
from megatron_hc.data.tokenizer_bpe import PATTERNS, byte_characters, check_texts, import_optional


def describe(tokenizer: ByteTokenizer | TikTokenizer) -> dict[str, Any]:
    """The tokenizer.json that gives the same ids, special tokens taken as text or not.

    ``ValueError`` where there is none: a special token is spelt like an ordinary one, or a check finds another id.
    """
    if isinstance(tokenizer, ByteTokenizer):
        return tokenizer_json({bytes([byte]): byte for byte in range(256)}, {"<|endoftext|>": tokenizer.eod}, None)
    found = tokenizer_json(tokenizer.ranks, tokenizer.special, PATTERNS[tokenizer.pattern])
    theirs = import_optional("tokenizers", "TikTokenizer").Tokenizer.from_str(json.dumps(found))
    theirs.encode_special_tokens = True
    for text in check_texts(list(tokenizer.ranks)):
        if theirs.encode(text, add_special_tokens=False).ids != tokenizer.tokenize(text):
            raise ValueError(f"a tokenizer.json of it gives other ids for {text[:40]!r} ...")
    return found


def tokenizer_json(ranks: Mapping[bytes, int], special: Mapping[str, int], pattern: str | None) -> dict[str, Any]:
    """The tokenizer.json of a byte-pair encoding as tiktoken runs it.

    ``ranks``: token -> id, of which the lowest is joined first; ``special``: name -> id; ``pattern``: the regular
    expression that cuts text into words, None where nothing is ever joined. ``ValueError``: a name is in both.
    """
    character = {byte: letter for letter, byte in byte_characters().items()}
    spelled = {token: "".join(character[byte] for byte in token) for token in ranks}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    steps = [split, byte_level] if pattern else [byte_level]
    switches = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False) | {"special": True}
    vocab = {spelled[token]: rank for token, rank in ranks.items()}
    twice = sorted(vocab.keys() & special.keys())
    if twice:
        raise ValueError(f"its special token {twice[0]} (id {special[twice[0]]}) is an ordinary one too")
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": name} | switches for name, i in special.items()],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps},
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": True,  # tiktoken takes a word that is a token as it is
            "vocab": vocab | dict(special),
            # One string each, which older versions of the library read too: no spelt token has a space in it.
            "merges": [f"{spelled[left]} {spelled[right]}" for left, right in _merges(ranks)],
        },
    }


def _merges(ranks: Mapping[bytes, int]) -> list[tuple[bytes, bytes]]:
    """Every pair of tokens whose join is a token: tiktoken joins those, the join of the lowest rank first."""
    merges = []
    for token in sorted(ranks, key=ranks.__getitem__):
        pairs = [(token[:i], token[i:]) for i in range(1, len(token))]
        found = [pair for pair in pairs if pair[0] in ranks and pair[1] in ranks]
        merges += sorted(found, key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))
    return merges
