"""Where a rank's part of a parameter lies in the whole, and which ranks hold the same part.

A parameter is cut along one dim into pieces of consecutive rows (dim 0) or columns (dim 1). Most have one piece; a QKV
weight whose key/value heads are fewer than the tensor-parallel ranks has two: its own queries, and keys and values that
several ranks share.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_hc.mesh import ExpertRanks
from megatron_hc.stored import Stored

Box = tuple[tuple[int, ...], Tensor]
"""(offset in this rank's part of a parameter, the values there)"""


class Piece(NamedTuple):
    """Consecutive indices along ``Placement.dim``."""

    whole: int
    """First index in the whole tensor."""
    local: int
    """First index in this rank's tensor."""
    length: int
    holders: int = 1
    """Ranks that hold the same piece, beside data-parallel copies."""


class Placement(NamedTuple):
    """This rank's part of one parameter."""

    whole_shape: tuple[int, ...]
    dim: int
    pieces: tuple[Piece, ...]
    sum_over: str | None = None
    """Name of the mesh group over which the gradient of what is held by several ranks is partial; None: it is whole."""
    is_expert: bool = False
    """Its copies are in the expert data-parallel group, not in the data-parallel one."""
    passes: int = 1
    """Backward passes of one micro-batch that bring a part of its gradient."""
    padding: int = 0
    """Indices at the end of the whole that are zero and no part of the model: how many depends on the layout."""

    def cut(self, whole: Tensor) -> Tensor:
        """The whole tensor -> this rank's part, a new tensor."""
        return torch.cat([whole.narrow(self.dim, piece.whole, piece.length) for piece in self.pieces], dim=self.dim)

    def overlaps(self, box: Box) -> Iterator[tuple[Piece, int, Tensor]]:
        """Where pieces lie in a box of this rank's part: (piece, first index along ``dim`` here, a view of the box).

        Padding is left out.
        """
        offset, values = box
        start, length = offset[self.dim], values.shape[self.dim]
        end = self.whole_shape[self.dim] - self.padding
        for piece in self.pieces:
            own = min(piece.length, end - piece.whole)
            first, last = max(piece.local, start), min(piece.local + own, start + length)
            if first < last:
                whole = last - first == length
                yield piece, first, values if whole else values.narrow(self.dim, first - start, last - first)

    def stored(self, boxes: Iterable[Box], dtype: torch.dtype, stored_length: int) -> Stored:
        """The slices of a checkpoint tensor that boxes of this rank's part hold.

        stored_length: what a checkpoint keeps along ``dim``: padding beyond it is left out.
        """
        whole_shape = [*self.whole_shape]
        whole_shape[self.dim] = stored_length
        slices = []
        for box in boxes:
            for piece, first, values in self.overlaps(box):
                offset = [*box[0]]
                offset[self.dim] = piece.whole + first - piece.local
                length = min(values.shape[self.dim], stored_length - offset[self.dim])
                if length > 0:
                    slices.append((tuple(offset), values.narrow(self.dim, 0, length)))
        return Stored(tuple(whole_shape), dtype, tuple(slices))


def whole(shape: tuple[int, ...], holders: int, sum_over: str | None) -> Placement:
    """A parameter that every rank holds."""
    return Placement(shape, 0, (Piece(0, 0, shape[0], holders),), sum_over)


def held_twice(placement: Placement) -> Placement:
    """A tied table: the first and the last pipeline stage have the same part, each a part of its gradient."""
    pieces = tuple(piece._replace(holders=2 * piece.holders) for piece in placement.pieces)
    return placement._replace(pieces=pieces, sum_over="embedding")


def even(shape: tuple[int, ...], dim: int, rank: int, ranks: int) -> Placement:
    """A parameter cut into equal parts along ``dim``."""
    assert shape[dim] % ranks == 0, f"{shape[dim]} over {ranks} ranks"
    length = shape[dim] // ranks
    return Placement(shape, dim, (Piece(rank * length, 0, length),))


def grouped_queries(
    shape: tuple[int, ...], rank: int, ranks: int, num_groups: int, query_rows: int, shared_rows: int
) -> Placement:
    """A merged QKV parameter of ``num_groups`` blocks [query rows, shared rows] over more ranks than blocks.

    ``ranks / num_groups`` ranks share a block: each has its part of the queries and all of the keys and values.
    """
    sharers = ranks // num_groups
    block = rank // sharers * (query_rows + shared_rows)
    own = query_rows // sharers
    queries = Piece(block + rank % sharers * own, 0, own)
    return Placement(shape, 0, (queries, Piece(block + query_rows, own, shared_rows, sharers)), "kv")


def expert_rows(shape: tuple[int, ...], num_experts: int, where: ExpertRanks, *, is_divided: bool) -> Placement:
    """A parameter that has ``num_experts`` blocks of rows: a rank's blocks, and of each its part if ``is_divided``."""
    assert num_experts % where.ranks == 0, f"{num_experts} experts over {where.ranks} ranks"
    block, own = shape[0] // num_experts, num_experts // where.ranks
    first = where.rank * own
    if where.parts == 1 or not is_divided:
        piece = Piece(first * block, 0, own * block, where.parts)
        return Placement(shape, 0, (piece,), "etp" if where.parts > 1 else None, is_expert=True)
    assert block % where.parts == 0, f"{block} rows of an expert over {where.parts} ranks"
    length = block // where.parts
    pieces = tuple(
        Piece((first + expert) * block + where.part * length, expert * length, length) for expert in range(own)
    )
    return Placement(shape, 0, pieces, is_expert=True)
