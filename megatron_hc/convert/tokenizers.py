"""Tokenizer files: which argument they give, and copies of them that transformers 4 and 5 and other tools read."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_hc.config import DataConfig
from megatron_hc.convert.byte_level import describe
from megatron_hc.convert.shards import read_json
from megatron_hc.data import ByteTokenizer, TikTokenizer, Tokenizer, tokenizer_of

FILES = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "chat_template.jinja", "generation_config.json",
)  # fmt: skip


def arguments_of_folder(folder: Path) -> dict[str, Any]:
    """Arguments for the tokenizer that lies in a Hugging Face folder; none where there is none."""
    has_both = (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file()
    if (folder / "tokenizer.json").is_file() or has_both:
        return {"tokenizer_type": "HuggingFaceTokenizer", "tokenizer_model": str(folder.absolute())}
    if (folder / "tokenizer.model").is_file():
        file = str((folder / "tokenizer.model").absolute())
        return {"tokenizer_type": "SentencePieceTokenizer", "tokenizer_model": file}
    return {}


def copy_files(source: Path, target: Path) -> None:
    """Copy tokenizer files from one folder to another that exists, and mend what older tools cannot read."""
    for name in FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
    mend(target)


def mend(folder: Path) -> None:
    """transformers 5 names a class that transformers 4 and others do not know; the class before reads the same file."""
    file = folder / "tokenizer_config.json"
    if not file.is_file():
        return
    config = read_json(file)
    if config.get("tokenizer_class") == "TokenizersBackend":
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
        for name in ("backend", "is_local"):
            config.pop(name, None)
        _write_json(file, config)


def export_tokenizer(data: DataConfig, vocab_size: int, target: Path, say: Callable[[str], object]) -> dict[str, Any]:
    """Write a run's tokenizer into a Hugging Face folder; returns what config.json says of it.

    ``say`` is told where there is no file that transformers reads, and why.
    """
    tokenizer = _tokenizer(data)
    if tokenizer is None:
        return {}
    if tokenizer.vocab_size > vocab_size:
        raise ValueError(
            f"--tokenizer-model {data.tokenizer_model} has {tokenizer.vocab_size} tokens and the model {vocab_size} "
            "rows: give the tokenizer that the model was trained with"
        )
    path = Path(data.tokenizer_model or "")
    if data.tokenizer_type == "HuggingFaceTokenizer":
        copy_files(path if path.is_dir() else path.parent, target)
        if not path.is_dir() and path.name != "tokenizer.json":
            shutil.copyfile(path, target / "tokenizer.json")
        if not (target / "tokenizer_config.json").exists():
            _write_config(tokenizer, target)
    elif data.tokenizer_type == "SentencePieceTokenizer":
        shutil.copyfile(path, target / "tokenizer.model")
    elif isinstance(tokenizer, (ByteTokenizer, TikTokenizer)):
        try:
            _write_json(target / "tokenizer.json", describe(tokenizer))
            _write_config(tokenizer, target)
        except ValueError as error:
            say(f"no tokenizer files: {data.tokenizer_type} {path}: {error}")
    return {"eos_token_id": tokenizer.eod} if tokenizer.eod < vocab_size else {}


def _write_config(tokenizer: Tokenizer, target: Path) -> None:
    """The least that makes AutoTokenizer read a bare tokenizer.json; end of a document and padding, if they have names.

    transformers 4 takes spaces before punctuation out of texts where it is not told otherwise.
    """
    added = read_json(target / "tokenizer.json").get("added_tokens") or []
    named = {item["id"]: item["content"] for item in added if isinstance(item, dict)}
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    for key, i in (("eos_token", tokenizer.eod), ("pad_token", tokenizer.pad)):
        if i in named:
            config[key] = named[i]
    _write_json(target / "tokenizer_config.json", config)


def _write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _tokenizer(data: DataConfig) -> Tokenizer | None:
    """The run's tokenizer; None where there is none.

    A NullTokenizer may stand for one that a model from elsewhere came without: its last id ends nothing then.
    """
    if data.tokenizer_type in (None, "NullTokenizer"):
        return None
    return tokenizer_of(data)
