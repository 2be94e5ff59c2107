"""From the data flags to the training, validation and test datasets. This module needs no torch."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megatron_hc.config import TrainConfig
from megatron_hc.data.blend import BlendedDataset, normalize
from megatron_hc.data.dataset import (
    GPTDataset,
    MockDataset,
    SampleDataset,
    SampleFormat,
    WholeDataset,
    check_length,
    scan_token_ids,
)
from megatron_hc.data.indexed import IndexedDataset
from megatron_hc.data.tokenizer import Tokenizer, check_record

SPLITS = ("train", "valid", "test")
DEFAULT_SPLIT = "969,30,1"

Blend = tuple[list[str], list[float] | None]


def parse_blend(values: Sequence[str], flag: str) -> Blend:
    """Prefixes and weights (None: none given) of ``PREFIX ...`` or ``WEIGHT PREFIX WEIGHT PREFIX ...``."""
    if not values:
        raise ValueError(f"{flag} names no dataset")
    if len(values) % 2 == 0:
        weights = [_number(value) for value in values[::2]]
        if all(weight is not None for weight in weights):
            for weight in weights:
                if not (weight is not None and 0 < weight < math.inf):
                    raise ValueError(f"{flag}: the weight {weight} must be a positive number")
            if sum(weight for weight in weights if weight is not None) == math.inf:
                raise ValueError(f"{flag}: the weights ({' '.join(values[::2])}) have no finite sum: give smaller ones")
            return [value.strip() for value in values[1::2]], [weight for weight in weights if weight is not None]
        if any(weight is not None for weight in weights):
            raise ValueError(f"{flag} ({' '.join(values)}) gives weights to some datasets only: give all or none")
    return [value.strip() for value in values], None


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def split_ranges(split: str) -> list[tuple[float, float] | None]:
    """Where training, validation and test begin and end, as shares of a file; None for a share of 0.

    ``split`` is one to three numbers, e.g. '969,30,1'; they need not sum to anything. Quotes around them are left out,
    which launch scripts pass on that keep their flags in arrays (also one of Megatron-LM's own).
    """
    shares = [_number(part) for part in re.split(r"\s*[,/]\s*|\s+", split.strip("'\" \n\t"))]
    valid = [share for share in shares if share is not None and 0 <= share < math.inf]
    if len(valid) != len(shares) or not 1 <= len(valid) <= 3 or sum(valid) == 0:
        raise ValueError(f"--split ({split}) must be one to three shares such as {DEFAULT_SPLIT}, not all zero")
    cuts = [0.0]
    for share in normalize(valid + [0.0] * (3 - len(valid))):
        cuts.append(cuts[-1] + share)
    return [(low, high) if high > low else None for low, high in zip(cuts, cuts[1:], strict=False)]


def cut(bounds: tuple[float, float], num_sequences: int) -> tuple[int, int]:
    """First sequence and the one after the last of a share of a file."""
    return int(round(bounds[0] * num_sequences)), int(round(bounds[1] * num_sequences))


@dataclass
class _Builder:
    """Opens and checks every file once."""

    config: TrainConfig
    tokenizer: Tokenizer
    format: SampleFormat
    files: dict[str, IndexedDataset] = field(default_factory=dict)

    def open(self, prefix: str) -> IndexedDataset:
        if prefix not in self.files:
            indexed = IndexedDataset(prefix)
            check_record(prefix, self.tokenizer)
            scan_token_ids(indexed, self.format)
            self.files[prefix] = indexed
        return self.files[prefix]

    def part(self, prefix: str, bounds: tuple[float, float], num_samples: int | None, split: str) -> GPTDataset:
        indexed = self.open(prefix)
        return GPTDataset(
            indexed,
            cut(bounds, len(indexed)),
            num_samples,
            self.config.training.seed,
            split,
            self.format,
            self.config.data.data_cache_path,
        )

    def blend(
        self, blend: Blend, bounds: tuple[float, float], num_samples: int, split: str, *, plain_if_single: bool
    ) -> SampleDataset:
        """One split. ``plain_if_single``: the weight of a lone prefix says nothing."""
        prefixes, weights = blend
        if len(prefixes) == 1 and (weights is None or plain_if_single):
            return self.part(prefixes[0], bounds, num_samples, split)
        cache = self.config.data.data_cache_path
        if weights is None:
            # One epoch of each, in proportion to their lengths.
            parts = [self.part(prefix, bounds, None, split) for prefix in prefixes]
            sizes = [len(part) for part in parts]
            return BlendedDataset(parts, sizes, min(num_samples, sum(sizes)), cache)
        weights = normalize(weights)
        surplus = 1 + self.config.data.mid_level_dataset_surplus
        wanted = [math.ceil(num_samples * weight) for weight in weights]
        parts = [
            self.part(prefix, bounds, math.ceil(count * surplus), split)
            for prefix, count in zip(prefixes, wanted, strict=True)
        ]
        return BlendedDataset(parts, weights, sum(wanted), cache)


def build_datasets(
    config: TrainConfig, tokenizer: Tokenizer, num_samples: tuple[int, int, int]
) -> tuple[SampleDataset | None, SampleDataset | None, SampleDataset | None]:
    """Training, validation and test datasets with at least ``num_samples`` samples each (0: None, nothing is built).

    A split with a share of 0 or without a path is None too. Index caches are written where they are missing; every
    process may call this at once. Raises ``ValueError`` in one sentence for anything wrong with the files.
    """
    data = config.data
    format = _format(config, tokenizer)
    builder = _Builder(config, tokenizer, format)
    plans, separate = _plans(config), bool(data.train_data_path)
    shares = _mock_shares(config)
    if num_samples[0] and plans[0] is None and not shares[0]:
        raise ValueError("no training data: give --train-data-path, or a first share of --split above 0")
    # Every file is opened and checked before the first cache is written.
    for split, plan, count in zip(SPLITS, plans, num_samples, strict=True):
        if plan and count:
            (prefixes, _), bounds = plan
            for indexed in map(builder.open, prefixes):
                check_length(indexed, cut(bounds, len(indexed)), split, format)

    datasets: list[SampleDataset | None] = []
    for split, plan, count, has_mock in zip(SPLITS, plans, num_samples, shares, strict=True):
        if count and has_mock:
            datasets.append(MockDataset(count, config.training.seed, split, format))
        elif count and plan:
            datasets.append(builder.blend(*plan, count, split, plain_if_single=separate))
        else:
            datasets.append(None)
    train, valid, test = datasets
    if train is not None and len(train) < num_samples[0]:
        raise ValueError(
            f"the datasets without weights hold {len(train)} training samples in one epoch, but the run needs "
            f"{num_samples[0]}: give WEIGHT PREFIX pairs, which repeat the data, or a shorter run"
        )
    return train, valid, test


def build_whole_validation(config: TrainConfig, tokenizer: Tokenizer, mock_samples: int) -> dict[str, SampleDataset]:
    """All of the validation data, once and in order: name -> samples, for each file of a blend.

    The last sample of a file is filled up with tokens that carry no loss. Of --mock-data there are ``mock_samples``.
    Raises ``ValueError`` where there is no validation data.
    """
    format, plan = _format(config, tokenizer), _plans(config)[1]
    if _mock_shares(config)[1]:
        return {"mock": MockDataset(mock_samples, config.training.seed, "valid", format)}
    if plan is None:
        raise ValueError(
            "--full-validation: there is no validation data: give --valid-data-path, or a second share "
            "of --split above 0"
        )
    (prefixes, _), bounds = plan
    builder = _Builder(config, tokenizer, format)
    found: dict[str, SampleDataset] = {}
    for prefix in dict.fromkeys(prefixes):
        indexed = builder.open(prefix)
        name = (
            Path(prefix).name if [Path(other).name for other in {*prefixes}].count(Path(prefix).name) == 1 else prefix
        )
        found[name] = WholeDataset(indexed, cut(bounds, len(indexed)), format)
    return found


def _format(config: TrainConfig, tokenizer: Tokenizer) -> SampleFormat:
    data = config.data
    return SampleFormat.of(
        tokenizer,
        config.model.seq_length,
        eod_mask_loss=data.eod_mask_loss,
        reset_position_ids=data.reset_position_ids,
        reset_attention_mask=data.reset_attention_mask,
    )


def _plans(config: TrainConfig) -> list[tuple[Blend, tuple[float, float]] | None]:
    """What training, validation and test are made of: files, and which share of each."""
    data = config.data
    if data.mock_data:
        return [None] * 3
    if data.train_data_path:
        paths = {f"--{split}-data-path": getattr(data, f"{split}_data_path") for split in SPLITS}
        return [(parse_blend(values, flag), (0.0, 1.0)) if values else None for flag, values in paths.items()]
    blend = _common_blend(config)
    return [(blend, bounds) if bounds else None for bounds in split_ranges(data.split or DEFAULT_SPLIT)]


def _mock_shares(config: TrainConfig) -> list[bool]:
    """Whether there is training, validation and test data of --mock-data: a share of 0 of --split is none, as ever."""
    if not config.data.mock_data:
        return [False] * 3
    return [bounds is not None for bounds in split_ranges(config.data.split or DEFAULT_SPLIT)]


def _common_blend(config: TrainConfig) -> Blend:
    path = config.data.data_args_path
    if path is None:
        return parse_blend(config.data.data_path, "--data-path")
    try:
        values = Path(path).read_text(encoding="utf-8").split()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--data-args-path {path} cannot be read: {error}") from error
    return parse_blend(values, f"--data-args-path {path}")
