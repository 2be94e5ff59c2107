"""What is in a dataset: counts, lengths, decoded samples, and how a blend will be drawn.

    python tools/inspect_data.py data/corpus_text_document --documents 3
    python tools/inspect_data.py 0.7 data/a_document 0.3 data/b_document --train-samples 100000 --seq-length 1024

Nothing is written. The tokenizer is the one that the dataset remembers, or that of --tokenizer-type.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import tempfile
from typing import Any

import numpy as np

from megatron_hc.cli import exit_on_user_error
from megatron_hc.config import DataConfig, ModelConfig, TrainConfig, TrainingConfig
from megatron_hc.data.blend import BlendedDataset
from megatron_hc.data.build import DEFAULT_SPLIT, build_datasets, cut, parse_blend, split_ranges
from megatron_hc.data.dataset import GPTDataset
from megatron_hc.data.indexed import IndexedDataset
from megatron_hc.data.tokenizer import TOKENIZERS, NullTokenizer, Tokenizer, build_tokenizer, check_record, record_path
from megatron_hc.data.tokenizer_bpe import PATTERNS

SCANNED_TOKENS = 2**24  # read for the share of ids in use
SHOWN_CHARACTERS = 400


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("data", nargs="+", metavar="[WEIGHT] PREFIX", help="as after --data-path")
    parser.add_argument("--documents", type=int, default=2, help="documents to decode, spread over the file")
    parser.add_argument("--tokenizer-type", choices=list(TOKENIZERS))
    parser.add_argument("--tokenizer-model", metavar="FILE")
    parser.add_argument("--vocab-size", type=int)
    parser.add_argument("--tiktoken-pattern", choices=list(PATTERNS))
    parser.add_argument("--tiktoken-num-special-tokens", type=int, default=1000)
    run = parser.add_argument_group("how a run will draw")
    run.add_argument("--train-samples", type=int, help="samples of the run; without it the blend is not drawn")
    run.add_argument("--seq-length", type=int, default=1024)
    run.add_argument("--split", default=DEFAULT_SPLIT)
    run.add_argument("--seed", type=int, default=1234)
    options = parser.parse_args(arguments)
    for name in ("train_samples", "seq_length"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be positive, not {getattr(options, name)}")
    if options.documents < 0:
        parser.error(f"--documents must not be negative, not {options.documents}")
    return options


def read_record(prefix: str) -> dict[str, Any]:
    """What the dataset remembers; {} where there is no record."""
    try:
        found = json.loads(record_path(prefix).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ValueError(f"{record_path(prefix)} cannot be read: {error}") from error
    return found if isinstance(found, dict) else {}


def tokenizer_for(options: argparse.Namespace, record: dict[str, Any]) -> Tokenizer | None:
    """The tokenizer of the flags, else the remembered one, else None."""
    if options.tokenizer_type is not None:
        return build_tokenizer(
            options.tokenizer_type,
            options.tokenizer_model,
            options.vocab_size,
            tiktoken_pattern=options.tiktoken_pattern,
            tiktoken_num_special_tokens=options.tiktoken_num_special_tokens,
        )
    kind = record.get("tokenizer_type")
    if kind == "NullTokenizer":
        return NullTokenizer(int(record["eod"]))
    try:
        return build_tokenizer(
            kind,
            options.tokenizer_model or record.get("tokenizer_model"),
            record.get("vocab_size")
            if kind == "TikTokenizer" and str(record.get("tokenizer_model")).endswith(".json")
            else None,
            tiktoken_pattern=record.get("tiktoken_pattern"),
            tiktoken_num_special_tokens=record.get("tiktoken_num_special_tokens", 1000),
        )
    except ValueError:
        return None  # unknown, or its file has moved


def spread(lengths: np.ndarray) -> str:
    """How lengths are distributed, in one line."""
    low, first, middle, last, high = np.quantile(lengths, [0, 0.1, 0.5, 0.9, 1], method="nearest").tolist()
    shares = f"10 % up to {first}, half up to {middle}, 90 % up to {last}"
    return f"mean {lengths.mean():.1f}, shortest {low}, {shares}, longest {high}"


def show_file(prefix: str, options: argparse.Namespace) -> None:
    """Everything about one dataset."""
    dataset = IndexedDataset(prefix)
    record = read_record(prefix)
    ends = dataset.document_indices
    documents = len(ends) - 1
    sums = np.concatenate((np.zeros(1, np.int64), np.cumsum(dataset.lengths, dtype=np.int64)))
    per_document = np.diff(sums[ends])
    size = dataset.num_tokens * dataset.dtype.itemsize / 2**20
    tokens = f"{dataset.num_tokens} tokens ({dataset.dtype.name}, {size:.1f} MiB)"
    print(f"{prefix}: {documents} documents, {len(dataset)} sequences, {tokens}")
    if documents:
        print(f"  tokens of a document: {spread(per_document)}")
        print(f"  empty documents: {int((per_document == 0).sum())}")
    if record:
        eod = "with" if record.get("append_eod") else "without"
        fingerprint = str(record.get("fingerprint"))[:12]
        print(f"  {record.get('tokenizer_type')}, {record.get('vocab_size')} tokens, fingerprint {fingerprint}")
        print(f"  {eod} end-of-document; {record.get('skipped_documents', 0)} bad documents were left out")
        for problem in record.get("unreadable_files", []):
            print(f"  the rest is missing: {problem}")
    else:
        print("  no record of its tokenizer")
    tokenizer = tokenizer_for(options, record)
    if dataset.num_tokens:
        scanned = dataset.tokens(0, min(SCANNED_TOKENS, dataset.num_tokens))
        share = "" if len(scanned) == dataset.num_tokens else f" of the first {len(scanned)} tokens"
        used = np.unique(scanned)
        known = f" of {tokenizer.vocab_size}" if tokenizer else ""
        print(f"  ids{share}: {used[0]} .. {used[-1]}, {len(used)}{known} in use")
    if tokenizer is not None:
        check_record(prefix, tokenizer)
    show_documents(dataset, tokenizer, per_document, options.documents)


def show_documents(dataset: IndexedDataset, tokenizer: Tokenizer | None, per_document: np.ndarray, count: int) -> None:
    """The beginnings of some documents that are not empty."""
    filled = np.flatnonzero(per_document)
    for place in np.unique(np.linspace(0, len(filled) - 1, min(count, len(filled))).astype(int)).tolist():
        document = int(filled[place])
        first, stop = dataset.document_indices[document : document + 2].tolist()
        ids = np.concatenate([dataset.get(sequence) for sequence in range(first, stop)])
        shown = ids[:SHOWN_CHARACTERS].tolist()
        text = "ids " + " ".join(map(str, shown[:40])) if tokenizer is None else repr(tokenizer.detokenize(shown))
        more = " ..." if len(text) > SHOWN_CHARACTERS or len(ids) > len(shown) else ""
        print(f"  document {document} ({len(ids)} tokens): {text[:SHOWN_CHARACTERS]}{more}")


def show_draws(options: argparse.Namespace, tokenizer: Tokenizer) -> None:
    """How many samples each dataset of the blend gives, and how often that repeats it."""
    prefixes, weights = parse_blend(options.data, "data")
    config = dataclasses.replace(
        TrainConfig(),
        model=ModelConfig(num_layers=1, hidden_size=8, num_attention_heads=1, seq_length=options.seq_length),
        training=TrainingConfig(micro_batch_size=1, train_samples=options.train_samples, seed=options.seed),
    )
    with tempfile.TemporaryDirectory() as cache:
        data = DataConfig(data_path=tuple(options.data), split=options.split, data_cache_path=cache)
        config = dataclasses.replace(config, data=data)
        train, _, _ = build_datasets(config, tokenizer, (options.train_samples, 0, 0))
    bounds = split_ranges(options.split)[0]
    assert train is not None and bounds is not None
    parts = train.datasets if isinstance(train, BlendedDataset) else [train]
    order = (
        train.dataset_index[: options.train_samples]
        if isinstance(train, BlendedDataset)
        else np.zeros(options.train_samples, np.int16)
    )
    drawn = np.bincount(order, minlength=len(parts))
    early = np.bincount(order[:1000], minlength=len(parts))
    print(f"{len(order)} samples of {options.seq_length} tokens, from the training part of --split {options.split}:")
    for number, part in enumerate(parts):
        assert isinstance(part, GPTDataset)
        first, stop = cut(bounds, len(part.indexed))
        tokens = int(part.indexed.lengths[first:stop].sum(dtype=np.int64))
        weight = "" if weights is None else f"weight {weights[number] / sum(weights):.4f}, "
        share, at_first = drawn[number] / len(order), early[number] / early.sum()
        epochs = drawn[number] * options.seq_length / tokens
        print(
            f"  {prefixes[number]}: {weight}{drawn[number]} samples = {share:.4f} of all, {at_first:.4f} of the first "
            f"{early.sum()}, {epochs:.3f} epochs"
        )


def inspect(options: argparse.Namespace) -> None:
    """Print everything; ``ValueError`` in one sentence for a dataset that cannot be read."""
    prefixes, _ = parse_blend(options.data, "data")
    for prefix in prefixes:
        show_file(prefix, options)
    if options.train_samples is not None:
        tokenizer = tokenizer_for(options, read_record(prefixes[0]))
        if tokenizer is None:
            raise ValueError(f"{prefixes[0]}: its tokenizer is not known: give --tokenizer-type and --tokenizer-model")
        show_draws(options, tokenizer)


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    with exit_on_user_error("inspect_data.py"):
        inspect(options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
