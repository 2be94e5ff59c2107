"""Log-likelihoods of given tokens, at any layout that can train.

Items are sorted by length, cut into batches, and the batches dealt out to the data-parallel copies. All processes run
passes of the same shapes in the same order, whatever their own items are, so that copies may share experts or shards
of parameters.

Dims: B items of a batch, S tokens of each (padded).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_hc.config import TrainConfig
from megatron_hc.mesh import Mesh
from megatron_hc.model.gpt import GPT
from megatron_hc.parallel.collectives import all_reduce
from megatron_hc.parallel.pipeline import MicroBatch, Pipeline

AUTO_TOKENS = 8192  # of a batch on one copy of the model, padding included
MAX_IN_FLIGHT = 16  # batches of one shape that go through the pipeline together


class Item(NamedTuple):
    """Tokens of which the last ``num_scored`` are scored, each given all before it."""

    tokens: Sequence[int]
    num_scored: int


class Score(NamedTuple):
    """Of an item."""

    logprob: float
    """Natural logarithm, summed over the scored tokens."""
    is_greedy: bool
    """No token would have been likelier than the scored ones."""


class Shape(NamedTuple):
    """Of a batch on one copy of the model."""

    B: int
    S: int


class Scorer:
    """Scores items with a model of which this process has a part; all processes call together, with the same items.

    ``batch_size``: items of a batch on one copy of the model; None: as many as make about 8,192 tokens.
    """

    def __init__(self, model: GPT, config: TrainConfig, mesh: Mesh, batch_size: int | None = None) -> None:
        self.model, self.config, self.mesh, self.batch_size = model, config, mesh, batch_size
        # Lengths are rounded up: batches of one shape can fill a pipeline, and a sequence must be cut evenly.
        parts = mesh.size("cp") * (mesh.size("tp") if mesh.sequence_parallel else 1)
        self.multiple = math.lcm(32 if mesh.size("pp") > 1 else 8, parts)

    def __call__(self, items: Sequence[Item], progress: Callable[[int], object] | None = None) -> list[Score]:
        """``progress`` is called with the number of items done since the last call."""
        longest = self.model.config.max_positions + 1
        for item in items:
            assert 0 < item.num_scored < len(item.tokens) <= longest, "nothing to score, or too long"
        order = sorted(range(len(items)), key=lambda index: -len(items[index].tokens))
        found = torch.zeros(len(items), 2, dtype=torch.float64)
        for shape, rounds in self._rounds(items, order):
            own = [part[self.mesh.rank("dp") * shape.B :][: shape.B] for part in rounds]
            batches = [self._batch([items[index] for index in part], shape) for part in own]
            scores = self._pipeline(shape).measure(batches, _score, (2, shape.B)).cpu()
            for part, score in zip(own, scores, strict=True):
                found[part] = score[:, : len(part)].t()
            if progress is not None:
                progress(sum(map(len, rounds)))
        whole = all_reduce(found.to(self.mesh.device), self.mesh.group("dp_cp"))
        return [Score(-loss, wrong == 0) for loss, wrong in whole.tolist()]

    def _rounds(self, items: Sequence[Item], order: list[int]) -> list[tuple[Shape, list[list[int]]]]:
        """Batches of the same shape that go through the model together: each a list of items for all copies."""
        copies, at = self.mesh.size("dp"), 0
        found: list[tuple[Shape, list[list[int]]]] = []
        while at < len(order):
            longest = len(items[order[at]].tokens) - 1
            S = -(-longest // self.multiple) * self.multiple
            wanted = self.batch_size or max(1, AUTO_TOKENS // S)
            B = min(wanted, -(-(len(order) - at) // copies))
            part = order[at : at + B * copies]
            at += len(part)
            if found and found[-1][0] == (B, S) and len(found[-1][1]) < MAX_IN_FLIGHT:
                found[-1][1].append(part)
            else:
                found.append((Shape(B, S), [part]))
        return found

    def _batch(self, items: Sequence[Item], shape: Shape) -> MicroBatch:
        tokens, labels = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape, dtype=torch.int64)
        is_scored = torch.zeros(shape, dtype=torch.bool)
        for row, item in enumerate(items):
            text = torch.tensor(item.tokens)
            length = len(text) - 1
            tokens[row, :length], labels[row, :length] = text[:-1], text[1:]
            is_scored[row, length - item.num_scored : length] = True
        # Padding may reach beyond the model's positions, where there is no table to look into.
        positions = torch.arange(shape.S).clamp(max=self.model.config.max_positions - 1).unsqueeze(0)
        return MicroBatch(*(x.to(self.mesh.device) for x in (tokens, labels, is_scored, positions)))

    def _pipeline(self, shape: Shape) -> Pipeline:
        """Stages that exchange tensors of a shape."""
        config = dataclasses.replace(
            self.config,
            model=dataclasses.replace(self.config.model, seq_length=shape.S),
            training=dataclasses.replace(self.config.training, micro_batch_size=shape.B),
        )
        return Pipeline(self.model, config, self.mesh, trains=False)


def _score(model: GPT, hidden: Tensor, batch: MicroBatch) -> Tensor:
    """[2, B]: loss of each row's scored tokens, and how many of them are not the likeliest."""
    losses, is_top = model.output.scores(hidden, batch.labels, batch.weights)
    return torch.stack((losses.double().sum(1), (~is_top).double().sum(1)))
