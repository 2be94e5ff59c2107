"""What attention remembers of earlier tokens while text is generated: one allocation, written in place.

Dims: R rows (texts there is room for), T tokens there is room for, B rows of one pass, S new tokens of each,
G key/value heads, H head width.

Rows are independent texts of different lengths. A pass is about consecutive rows, so that nothing is ever gathered:
attention reads views. A text that ends gives its row to the last one (``move``).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Span(NamedTuple):
    """The new tokens of one pass: where they lie in the rows, and what they may see."""

    caches: Caches
    rows: slice
    positions: Tensor
    """[B, S] position of every new token, [1, S] where all rows are equally long."""
    start: int | None
    """The first position, where it is the same in all rows."""
    end: int
    """Tokens of the longest row, the new ones included."""
    mask: Tensor | None
    """[B or 1, 1, S, end], true where a new token sees a remembered one; None: causal, or a single token sees all."""


class LayerCache:
    """Keys and values of one layer, each [R, G, T, H].

    With ``shared_values`` the values are another layer's (--single-layer-value), which writes them.
    """

    def __init__(self, keys: Tensor, shared_values: Tensor | None = None) -> None:
        self.keys = keys
        self.values = torch.zeros_like(keys) if shared_values is None else shared_values
        self.tensors = (keys, self.values) if shared_values is None else (keys,)
        """What this layer writes."""

    def append(self, span: Span, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store new keys and values [S, B, G, H]; returns all that the rows hold, [end, B, G, H], views."""
        for kept, new in zip(self.tensors, (k, v), strict=False):
            _write(kept[span.rows], new, span)
        heads_inside = (2, 0, 1, 3)
        return tuple(kept[span.rows, :, : span.end].permute(heads_inside) for kept in (self.keys, self.values))  # type: ignore[return-value]


def _write(kept: Tensor, new: Tensor, span: Span) -> None:
    """new [S, B, G, H] into kept [B, G, T, H]."""
    if span.start is not None:
        kept[:, :, span.start : span.start + new.shape[0]] = new.permute(1, 2, 0, 3)
    else:
        rows = torch.arange(kept.shape[0], device=kept.device).unsqueeze(1)
        kept.transpose(1, 2)[rows, span.positions] = new.transpose(0, 1)


class Caches:
    """The caches of all layers of a model (of a pipeline stage), and how long every row is."""

    def __init__(self, layers: Sequence[LayerCache], rows: int, max_length: int, device: torch.device) -> None:
        self.layers, self.max_length, self.device = list(layers), max_length, device
        self.lengths = [0] * rows
        """Tokens of every row; what lies behind them is of earlier texts, and finite."""

    def __iter__(self) -> Iterator[LayerCache]:
        return iter(self.layers)

    def extend(self, counts: Sequence[int], first_row: int = 0) -> Span:
        """Room for ``counts[i]`` more tokens in row ``first_row + i``, which a pass then brings.

        The pass brings S = max(counts) tokens to each row. Those beyond a row's own count are padding: no later token
        sees them, and the next ones take their places.
        """
        rows = slice(first_row, first_row + len(counts))
        starts, S = self.lengths[rows], max(counts)
        end = max(starts) + S
        assert end <= self.max_length, f"the cache holds {self.max_length} tokens, {end} are needed"
        self.lengths[rows] = [start + count for start, count in zip(starts, counts, strict=True)]
        is_even = len(set(starts)) == 1
        first = torch.tensor(starts[:1] if is_even else starts, device=self.device)
        positions = first.unsqueeze(1) + torch.arange(S, device=self.device)
        mask = None
        if not is_even or (starts[0] > 0 and S > 1):
            mask = (torch.arange(end, device=self.device) <= positions.unsqueeze(-1)).unsqueeze(1)
        return Span(self, rows, positions, starts[0] if is_even else None, end, mask)

    def move(self, source: int, target: int) -> None:
        """Row ``source`` takes the place of row ``target``, and is empty then."""
        length = self.lengths[source]
        if source != target:
            for layer in self.layers:
                for tensor in layer.tensors:
                    tensor[target, :, :length] = tensor[source, :, :length]
        self.lengths[target], self.lengths[source] = length, 0

    def clear(self) -> None:
        """All rows empty."""
        self.lengths = [0] * len(self.lengths)
