"""Recompute of residual reads in blocks: n streams are kept once per block of boundaries, not once per read.

What the reads save for their backward pass is thrown away, and computed again for the whole block at once from the
carry at the block's entrance and the outputs of its sublayers (arXiv 2512.24880, section 4.3.2 and equation 20: with L
boundaries, n streams of width C and blocks of L_r boundaries, n C L / L_r numbers per token are kept, and (n + 2) C L_r
of one block while it is in the backward pass: sqrt(n L / (n + 2)) boundaries are best).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_map_only

from megatron_hc.model.attention import Context
from megatron_hc.model.gpt import GPT
from megatron_hc.model.layer import TransformerLayer
from megatron_hc.residual import Carry, Norm, Reads, Residual

Read = Callable[[Carry, Norm], tuple[Tensor | Reads, Carry]]
Write = Callable[..., Carry]


class ReadBlocks:
    """Makes ``model`` run in blocks of ``interval`` residual reads that are recomputed together.

    A block never reaches into another pipeline stage: every stage begins with one. ``interval`` None: the best one for
    the stage.
    """

    def __init__(self, model: GPT, interval: int | None = None) -> None:
        self.interval = interval
        self.num_streams = model.config.residual.num_streams
        self.block: _Block | None = None
        self.num_reads = self.current = 0
        self.run_layer = model.run
        for module in model.modules():
            if isinstance(module, Residual) and module.site.is_sublayer:
                module.read = self._reader(module.read)  # type: ignore[assignment,method-assign]
                module.write = self._writer(module.write)  # type: ignore[method-assign]
        model.run = self.run

    def run(self, layers: Iterable[TransformerLayer], carry: Carry, context: Context) -> Carry:
        """A ``LayerRunner``. Every call has blocks of its own, so that micro-batches may be in flight together."""
        layers = list(layers)
        self.current = self.interval or best_interval(2 * len(layers), self.num_streams)
        self.num_reads, self.block = 0, _Block()
        try:
            return self.run_layer(layers, carry, context)
        finally:
            self.block = None

    def _reader(self, read: Read) -> Read:
        def recomputed(carry: Carry, norm: Norm) -> tuple[Tensor | Reads, Carry]:
            if self.block is None or not torch.is_grad_enabled():
                return read(carry, norm)
            if self.num_reads % self.current == 0:
                self.block = _Block()
            self.num_reads += 1
            return self.block.read(read, carry, norm)

        return recomputed

    def _writer(self, write: Write) -> Write:
        def recomputed(carry: Carry, output: Tensor, value: Tensor | None = None) -> Carry:
            if self.block is None or not torch.is_grad_enabled():
                return write(carry, output, value)
            return self.block.write(write, carry, output, value)

        return recomputed


def best_interval(num_boundaries: int, num_streams: int) -> int:
    """Boundaries per block for which what is kept and what one block needs at a time are smallest together."""
    return max(1, round(math.sqrt(num_streams * num_boundaries / (num_streams + 2))))


class _Block:
    """The reads of a few layers in one forward pass. Holds no tensor of the autograd graph, only detached ones."""

    def __init__(self) -> None:
        self.entrance: Carry | None = None
        self.steps: list[Callable[[Carry], Carry]] = []
        self.num_saved = 0
        self.recomputed: dict[int, Tensor] = {}

    def read(self, read: Read, carry: Carry, norm: Norm) -> tuple[Tensor | Reads, Carry]:
        if self.entrance is None:
            self.entrance = tree_map_only(Tensor, _leaf, carry)
        self.steps.append(lambda carry: read(carry, norm)[1])
        with saved_tensors_hooks(self._forget, self._recall):
            return read(carry, norm)

    def write(self, write: Write, carry: Carry, output: Tensor, value: Tensor | None) -> Carry:
        kept = _leaf(output)
        self.steps.append(lambda carry: write(carry, kept))  # no read looks at attention values
        with saved_tensors_hooks(self._forget, self._recall):
            return write(carry, output, value)

    def _forget(self, tensor: Tensor) -> int:
        self.num_saved += 1
        return self.num_saved - 1

    def _recall(self, index: int) -> Tensor:
        if index not in self.recomputed:
            self._replay()
        return self.recomputed.pop(index)

    def _replay(self) -> None:
        """All reads and writes again: the same operations save the same tensors in the same order."""
        assert self.entrance is not None
        carry, found = self.entrance, self.recomputed
        found.clear()
        with torch.enable_grad(), saved_tensors_hooks(lambda t: found.setdefault(len(found), t.detach()), _unused):
            for step in self.steps:
                carry = step(carry)
        assert len(found) == self.num_saved, f"{len(found)} tensors saved again, not {self.num_saved}"


def _leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().requires_grad_(tensor.requires_grad)


def _unused(tensor: Tensor) -> Tensor:
    raise AssertionError("no backward pass runs through a replay")
