"""Samples of ``seq_length`` tokens from a token file, and generated ones. This module needs no torch.

S = tokens of a sample.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from megatron_hc.data.indexed import IndexedDataset, bin_path
from megatron_hc.data.indices import Indices, build_indices, cached_arrays, lengths_digest
from megatron_hc.data.tokenizer import Tokenizer

SCANNED_TOKENS = 32 * 2**20  # what the check of token ids reads of a large file at start-up


class Sample(NamedTuple):
    """One sample, every array [S]."""

    tokens: np.ndarray
    """i64: what the model reads."""
    labels: np.ndarray
    """i64: the next token at each position."""
    loss_mask: np.ndarray
    """f32: 1 where the loss counts, 0 where it does not."""
    position_ids: np.ndarray
    """i64."""
    document_ids: np.ndarray | None
    """i64: number of the document within the sample, from 0; None unless documents must not see each other."""


class SampleDataset(Protocol):
    """What the loader and the blend ask of a dataset."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample: ...


@dataclass(frozen=True, kw_only=True)
class SampleFormat:
    """How tokens become a sample: the shared settings of all datasets of a run."""

    seq_length: int
    """S."""
    vocab_size: int
    """Ids are 0 .. vocab_size - 1."""
    eod: int
    """Id of end-of-document."""
    pad: int = -1
    """Id whose loss is masked and which the model then sees as 0; -1: none."""
    eod_mask_loss: bool = False
    """No loss where the input token is end-of-document."""
    reset_position_ids: bool = False
    """Positions start again after end-of-document."""
    reset_attention_mask: bool = False
    """Number the documents, so that attention can keep them apart."""

    @classmethod
    def of(
        cls,
        tokenizer: Tokenizer,
        seq_length: int,
        *,
        eod_mask_loss: bool = False,
        reset_position_ids: bool = False,
        reset_attention_mask: bool = False,
    ) -> SampleFormat:
        """The format for a tokenizer's ids."""
        return cls(
            seq_length=seq_length,
            vocab_size=tokenizer.vocab_size,
            eod=tokenizer.eod,
            pad=tokenizer.pad,
            eod_mask_loss=eod_mask_loss,
            reset_position_ids=reset_position_ids,
            reset_attention_mask=reset_attention_mask,
        )

    def sample(self, text: np.ndarray) -> Sample:
        """The sample of ``text``, i64[S + 1]; end-of-document belongs to the document that it ends."""
        tokens, labels = text[:-1], text[1:]
        loss_mask = np.ones(self.seq_length, dtype=np.float32)
        position_ids = np.arange(self.seq_length, dtype=np.int64)
        document_ids = None
        if self.eod_mask_loss:
            loss_mask[tokens == self.eod] = 0.0
        if self.reset_position_ids or self.reset_attention_mask:
            starts = np.zeros(self.seq_length, dtype=bool)
            starts[1:] = tokens[:-1] == self.eod
            if self.reset_attention_mask:
                document_ids = np.cumsum(starts, dtype=np.int64)
            if self.reset_position_ids:
                position_ids = position_ids - np.maximum.accumulate(np.where(starts, position_ids, 0))
        is_padding = text == self.pad
        if is_padding.any():
            loss_mask[is_padding[1:]] = 0.0
            text = np.where(is_padding, 0, text)
            tokens, labels = text[:-1], text[1:]
        return Sample(tokens, labels, loss_mask, position_ids, document_ids)


class GPTDataset:
    """Shuffled samples of S + 1 tokens from a range of sequences of one token file.

    ``split`` ('train', 'valid', 'test') names the range in messages and in the cache; ``num_samples`` None means one
    epoch. The cache of indices lies in ``cache_dir`` (None: ``cache/GPTDataset_indices`` beside the data). Raises
    ``ValueError`` where the range holds less than one sample, and for token ids outside the vocabulary.
    """

    def __init__(
        self,
        indexed: IndexedDataset,
        sequence_range: tuple[int, int],
        num_samples: int | None,
        seed: int,
        split: str,
        format: SampleFormat,
        cache_dir: str | None = None,
    ) -> None:
        self.indexed = indexed
        self.split = split
        self.format = format
        first, stop = sequence_range
        check_length(indexed, sequence_range, split, format)
        beside = Path(indexed.prefix).parent / "cache" / "GPTDataset_indices"
        self.cache_folder = Path(cache_dir) if cache_dir else beside
        self.description = {
            "class": "GPTDataset",
            "dataset_path": indexed.prefix,
            "num_samples": num_samples,
            "index_split": split,
            "random_seed": seed,
            "sequence_length": format.seq_length,
            "sequence_range": [first, stop],
            "sequences": len(indexed),
            "tokens": indexed.num_tokens,
            "lengths_digest": lengths_digest(indexed.lengths),
        }
        self.indices = Indices(
            *cached_arrays(
                self.cache_folder,
                f"GPTDataset-{split}",
                self.description,
                ("document_index", "sample_index", "shuffle_index"),
                lambda: self._build(sequence_range, num_samples, seed),
            )
        )

    def _build(self, sequence_range: tuple[int, int], num_samples: int | None, seed: int) -> Indices:
        try:
            return build_indices(self.indexed.lengths, *sequence_range, num_samples, self.format.seq_length, seed)
        except (MemoryError, ValueError) as error:  # ValueError: numpy's, of an array that no machine could address
            raise ValueError(
                f"dataset {self.indexed.prefix}: the order of {num_samples} {self.split} samples does not fit in "
                f"memory ({error}): give a shorter run or fewer --eval-iters"
            ) from error

    def __len__(self) -> int:
        """Number of samples: at least those asked for."""
        return len(self.indices.shuffle)

    def text(self, index: int) -> np.ndarray:
        """The tokens of sample ``index`` (in shuffled order), i64[S + 1]; ``ValueError`` for a damaged index cache."""
        row = int(self.indices.shuffle[index])
        try:
            text = self._row(row)
        except (IndexError, TypeError, ValueError) as error:
            raise ValueError(self._damaged(index)) from error
        if len(text) != self.format.seq_length + 1:
            raise ValueError(self._damaged(index))
        return text.astype(np.int64)

    def _row(self, row: int) -> np.ndarray:
        document, samples, _ = self.indices
        (first, offset), (last, end) = samples[row].tolist(), samples[row + 1].tolist()
        if first == last:
            return self.indexed.get(int(document[first]), offset, end - offset + 1)
        sequences = document[first : last + 1].tolist()
        parts = [self.indexed.get(sequences[0], offset)]
        parts += [self.indexed.get(sequence) for sequence in sequences[1:-1]]
        parts.append(self.indexed.get(sequences[-1], 0, end + 1))
        return np.concatenate(parts)

    def _damaged(self, index: int) -> str:
        return (
            f"dataset {self.indexed.prefix}: the index cache in {self.cache_folder} is damaged (sample {index} of the "
            f"{self.split} part): delete that folder, it is written again"
        )

    def __getitem__(self, index: int) -> Sample:
        text = self.text(index)
        if text.view(np.uint64).max() >= self.format.vocab_size:  # one pass: negative ids are large here
            check_token_ids(text, self.indexed.prefix, self.format)
        return self.format.sample(text)


class WholeDataset:
    """A range of sequences of one token file, every token once and in order.

    Sample i reads tokens i S .. i S + S - 1 of the range; the last one is filled up with tokens that carry no loss.
    """

    def __init__(self, indexed: IndexedDataset, sequence_range: tuple[int, int], format: SampleFormat) -> None:
        first, stop = sequence_range
        self.indexed, self.format = indexed, format
        self.start = int(indexed.lengths[:first].sum(dtype=np.int64))
        self.num_tokens = int(indexed.lengths[first:stop].sum(dtype=np.int64))
        if self.num_tokens < 2:
            raise ValueError(
                f"dataset {indexed.prefix}: the validation part ({stop - first} of {len(indexed)} sequences) has no "
                "two tokens: give more text or another --split"
            )

    def __len__(self) -> int:
        return -(-(self.num_tokens - 1) // self.format.seq_length)

    def __getitem__(self, index: int) -> Sample:
        S, first = self.format.seq_length, index * self.format.seq_length
        text = self.indexed.tokens(self.start + first, self.start + min(first + S + 1, self.num_tokens))
        text = text.astype(np.int64)
        check_token_ids(text, self.indexed.prefix, self.format)
        num_labels = len(text) - 1
        sample = self.format.sample(np.pad(text, (0, S - num_labels), constant_values=self.format.eod))
        sample.loss_mask[num_labels:] = 0.0
        return sample


def check_length(indexed: IndexedDataset, sequence_range: tuple[int, int], split: str, format: SampleFormat) -> None:
    """Refuse (``ValueError``) a part of a file that is shorter than one sample."""
    first, stop = sequence_range
    tokens = int(indexed.lengths[first:stop].sum(dtype=np.int64))
    if tokens <= format.seq_length:
        raise ValueError(
            f"dataset {indexed.prefix}: the {split} part ({stop - first} of {len(indexed)} sequences, {tokens} tokens) "
            f"is shorter than one sample of --seq-length + 1 = {format.seq_length + 1} tokens: give more text, another "
            f"--split or a smaller --seq-length{'' if split == 'train' else ', or --eval-iters 0'}"
        )


def check_token_ids(tokens: np.ndarray, prefix: str, format: SampleFormat) -> None:
    """Refuse (``ValueError``) ids outside the vocabulary, naming the file, the id and the vocabulary's size."""
    low, high = int(tokens.min()), int(tokens.max())
    if high >= format.vocab_size or (low < 0 and low != format.pad):
        wrong = high if high >= format.vocab_size else low
        raise ValueError(
            f"{bin_path(prefix)} holds the token id {wrong}, but the tokenizer has only {format.vocab_size} tokens "
            f"(0 .. {format.vocab_size - 1}): give the tokenizer that the dataset was written with"
        )


def scan_token_ids(indexed: IndexedDataset, format: SampleFormat) -> None:
    """``check_token_ids`` of a whole file of up to 32 Mi tokens, or of that many spread evenly over a larger one.

    The rest of a large file is checked when its samples are read.
    """
    if not np.issubdtype(indexed.dtype, np.integer):
        raise ValueError(f"{bin_path(indexed.prefix)} holds {indexed.dtype.name} numbers, not token ids")
    limits = np.iinfo(indexed.dtype)
    if indexed.num_tokens == 0 or (limits.min >= 0 and limits.max < format.vocab_size):
        return
    chunks = 1 if indexed.num_tokens <= SCANNED_TOKENS else 64
    length = min(indexed.num_tokens, SCANNED_TOKENS) // chunks
    for start in np.linspace(0, indexed.num_tokens - length, chunks).astype(np.int64).tolist():
        check_token_ids(indexed.tokens(start, start + length), indexed.prefix, format)


class MockDataset:
    """Generated samples that a model can learn: documents that count up in steps of 1, 2 or 3 from a random token.

    Sample ``index`` depends on the seed, the split and the index only.
    """

    def __init__(self, num_samples: int, seed: int, split: str, format: SampleFormat) -> None:
        self.num_samples = num_samples
        self.format = format
        self._key = [seed % 2**32, sum(map(ord, split))]

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, index: int) -> Sample:
        format = self.format
        random = np.random.default_rng([*self._key, index])
        count = max(1, min(format.vocab_size - 1, 256))
        parts: list[np.ndarray] = []
        missing = format.seq_length + 1
        while missing > 0:
            length = int(random.integers(16, 129))
            steps = int(random.integers(1, 4)) * np.arange(length, dtype=np.int64)
            values = (int(random.integers(count)) + steps) % count
            # The ids count over 0 .. count with end-of-document left out.
            values[values >= format.eod] += 1
            values[-1] = format.eod
            parts.append(values)
            missing -= length
        return format.sample(np.concatenate(parts)[: format.seq_length + 1])
