"""Token files, datasets, blends, tokenizers and the loader.

``build_tokenizer`` -> ``build_datasets`` -> ``build_loader``. What needs torch (``Batch``, ``Loader``,
``build_loader``) is imported on first use, so that the data tools start without it.
"""

from typing import TYPE_CHECKING, Any

from megatron_hc.data.blend import BlendedDataset
from megatron_hc.data.build import build_datasets, build_whole_validation
from megatron_hc.data.dataset import GPTDataset, MockDataset, Sample, SampleDataset, SampleFormat
from megatron_hc.data.indexed import IndexedDataset, IndexedDatasetWriter, optimal_dtype
from megatron_hc.data.tokenizer import (
    ByteTokenizer,
    NullTokenizer,
    SentencePieceTokenizer,
    Tokenizer,
    build_tokenizer,
    check_record,
    tokenizer_of,
    write_record,
)
from megatron_hc.data.tokenizer_bpe import HuggingFaceTokenizer, TikTokenizer

if TYPE_CHECKING:
    from megatron_hc.data.loader import Batch, Loader, build_loader

__all__ = [
    "Batch",
    "BlendedDataset",
    "ByteTokenizer",
    "GPTDataset",
    "HuggingFaceTokenizer",
    "IndexedDataset",
    "IndexedDatasetWriter",
    "Loader",
    "MockDataset",
    "NullTokenizer",
    "Sample",
    "SampleDataset",
    "SampleFormat",
    "SentencePieceTokenizer",
    "TikTokenizer",
    "Tokenizer",
    "build_datasets",
    "build_loader",
    "build_tokenizer",
    "build_whole_validation",
    "check_record",
    "optimal_dtype",
    "tokenizer_of",
    "write_record",
]


def __getattr__(name: str) -> Any:
    if name in ("Batch", "Loader", "build_loader"):
        from megatron_hc.data import loader

        return getattr(loader, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
