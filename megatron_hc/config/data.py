"""What the model reads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_hc.config.common import flag, positive, require

WITHOUT_MODEL = ("ByteTokenizer", "NullTokenizer")
"""Kinds of tokenizers that read no file."""


def check_model_is_read(tokenizer_type: str | None, tokenizer_model: str | None) -> None:
    """Refuse (``ValueError``) a file that is named, and so meant to be read, beside a tokenizer that reads none."""
    require(
        tokenizer_model is None or tokenizer_type not in WITHOUT_MODEL,
        f"--tokenizer-model ({tokenizer_model}) is not read with --tokenizer-type {tokenizer_type}: "
        "leave it out, or give the type of that file",
    )


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What the model reads."""

    data_path: tuple[str, ...] = ()
    """Dataset prefixes (without .bin/.idx), split by --split: one, several, or WEIGHT PREFIX WEIGHT PREFIX ..."""
    split: str | None = None
    """Shares of training, validation and test of --data-path (default: 969,30,1)."""
    train_data_path: tuple[str, ...] = ()
    """Training prefixes, with weights or not; instead of --data-path."""
    valid_data_path: tuple[str, ...] = ()
    """Validation prefixes, with weights or not; instead of --data-path."""
    test_data_path: tuple[str, ...] = ()
    """Test prefixes, with weights or not; instead of --data-path."""
    data_args_path: str | None = None
    """A file that holds what would follow --data-path."""
    data_cache_path: str | None = None
    """Folder of the index caches (default: cache/GPTDataset_indices beside the data)."""
    mock_data: bool = False
    """Train on generated tokens, without files."""
    eod_mask_loss: bool = False
    """No loss where the input token is end-of-document."""
    reset_position_ids: bool = False
    """Positions start again after end-of-document."""
    reset_attention_mask: bool = False
    """Documents of one sample do not see each other."""
    num_workers: int = 2
    """Processes that prepare batches (0: in the training process)."""
    mid_level_dataset_surplus: float = 0.005
    """Extra share of samples that each part of a blend prepares."""
    tokenizer_type: (
        Literal["SentencePieceTokenizer", "HuggingFaceTokenizer", "TikTokenizer", "ByteTokenizer", "NullTokenizer"]
        | None
    ) = None
    """Kind of the tokenizer the data was written with."""
    tokenizer_model: str | None = None
    """File of the tokenizer, or (HuggingFaceTokenizer) a folder with tokenizer.json, or vocab.json and merges.txt."""
    vocab_size: int | None = None
    """Tokens of a NullTokenizer, end-of-document not counted, or of a TikTokenizer's .json, all counted; rows of the
    embedding with a SentencePieceTokenizer or HuggingFaceTokenizer that has fewer tokens."""
    tiktoken_pattern: Literal["v1", "v2", "gpt2", "cl100k", "o200k"] | None = None
    """How a TikTokenizer cuts text into words (default: v2 for a .json, cl100k for a .tiktoken)."""
    tiktoken_num_special_tokens: int = 1000
    """Ids in front of a TikTokenizer's .json that are special tokens."""

    def validate(self) -> None:
        separate = self.train_data_path or self.valid_data_path or self.test_data_path
        given = [
            name
            for name, value in (
                ("--data-path", self.data_path),
                ("--train-data-path/--valid-data-path/--test-data-path", separate),
                ("--data-args-path", self.data_args_path),
                ("--mock-data", self.mock_data),
            )
            if value
        ]
        require(bool(given), "no data: give --data-path PREFIX, --train-data-path PREFIX or --mock-data")
        require(len(given) == 1, f"{' and '.join(given)} exclude each other: give one")
        require(
            not separate or bool(self.train_data_path), "--valid-data-path/--test-data-path need --train-data-path"
        )
        require(not (separate and self.split), "--split belongs to --data-path: separate paths are not split")
        for name in ("num_workers", "mid_level_dataset_surplus"):
            require(getattr(self, name) >= 0, f"{flag(name)} must not be negative, not {getattr(self, name)}")
        require(self.tokenizer_type is not None, "--tokenizer-type must be given")
        if self.tokenizer_type == "NullTokenizer":
            require(self.vocab_size is not None, "--tokenizer-type NullTokenizer needs --vocab-size")
        elif self.tokenizer_type in ("SentencePieceTokenizer", "HuggingFaceTokenizer", "TikTokenizer"):
            require(
                self.tokenizer_model is not None, f"--tokenizer-type {self.tokenizer_type} needs --tokenizer-model"
            )
        check_model_is_read(self.tokenizer_type, self.tokenizer_model)
        require(
            self.tiktoken_pattern is None or self.tokenizer_type == "TikTokenizer",
            f"--tiktoken-pattern needs --tokenizer-type TikTokenizer, not {self.tokenizer_type}",
        )
        require(
            self.tiktoken_num_special_tokens >= 7,
            f"--tiktoken-num-special-tokens ({self.tiktoken_num_special_tokens}) must be at least 7: <unk> .. <sep>",
        )
        require(
            self.tokenizer_type == "TikTokenizer"
            or self.tiktoken_num_special_tokens == DataConfig.tiktoken_num_special_tokens,
            f"--tiktoken-num-special-tokens ({self.tiktoken_num_special_tokens}) needs --tokenizer-type TikTokenizer, "
            f"not {self.tokenizer_type}",
        )
        positive(self, "vocab_size")
