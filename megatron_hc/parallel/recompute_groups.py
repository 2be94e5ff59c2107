"""Full recompute beside residual recompute: groups of layers run again in the backward pass, and few streams are kept.

Full recompute keeps the carry at the entrance of every group of layers, with n streams of width C (n + 1) C numbers per
token. Here groups stand in blocks. A block keeps the carry at its own entrance and what its sublayers put out, 2 C per
layer; from these its reads and writes alone, without the sublayers, give the carries at the entrances of its groups
again, all of them when its backward pass begins. With G groups and blocks of m, n C G / m numbers per token are kept
for the streams, and n C m are there while a block is in the backward pass: sqrt(G) groups are best.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from megatron_hc.kernels.coefficients import Form
from megatron_hc.model.attention import Context
from megatron_hc.model.gpt import LayerRunner, run_layers
from megatron_hc.model.layer import TransformerLayer
from megatron_hc.parallel.recompute_reads import Read, RunBoundary, Sublayers, Write, leaf
from megatron_hc.residual import Carry, Norm, Reads

Recomputed = Callable[[Callable[..., Any], Iterable[nn.Module]], Callable[..., Any]]
"""(function, the modules inside) -> the function, run again in the backward pass."""


class GroupBlocks:
    """A ``LayerRunner``: groups of ``group`` layers are recomputed, the first ``count`` layers only; then ``rest``.

    ``interval``: boundaries per block, whole groups; None: the best number for the stage.
    """

    def __init__(
        self,
        sublayers: Sublayers,
        recomputed: Recomputed,
        group: int,
        interval: int | None,
        count: int | None = None,
        rest: LayerRunner = run_layers,
    ) -> None:
        self.sublayers, self.recomputed, self.group, self.count, self.rest = sublayers, recomputed, group, count, rest
        assert interval is None or interval % (2 * group) == 0, f"{interval} boundaries, groups of {group} layers"
        self.groups_per_block = None if interval is None else interval // (2 * group)

    def __call__(self, layers: Iterable[TransformerLayer], carry: Carry, context: Context) -> Carry:
        layers = list(layers)
        if not torch.is_grad_enabled():
            return run_layers(layers, carry, context)
        first = layers[: self.count]
        groups = [first[start : start + self.group] for start in range(0, len(first), self.group)]
        size = self.groups_per_block or max(1, round(math.sqrt(len(groups))))
        for start in range(0, len(groups), size):
            block = _Block(carry)
            for chosen in groups[start : start + size]:
                with self.sublayers.recorded_by(block):
                    carry = self._run_group(block, chosen, carry, context)
        remaining = layers[len(first) :]
        return self.rest(remaining, carry, context) if remaining else carry

    def _run_group(self, block: _Block, layers: list[TransformerLayer], carry: Carry, context: Context) -> Carry:
        entrance = _Entrance(block, carry)

        def run(_: Tensor) -> Carry:
            return run_layers(layers, entrance.carry(), context)

        # The carry is not an argument, which would be kept. The tensor tells on which device random states are kept.
        carry = self.recomputed(run, layers)(carry.stream.new_empty(0))
        entrance.given = None
        return carry


class _Block:
    """Records the reads and writes of a few groups. Holds no tensor of the autograd graph, only detached ones."""

    def __init__(self, carry: Carry) -> None:
        self.entrance = tree_map_only(Tensor, leaf, carry)
        self.steps: list[Callable[[Carry], Carry]] = []
        self.starts: dict[int, list[bool]] = {}
        """Steps before a group -> which tensors of its carry need a gradient."""
        self.replayed: dict[int, Carry] = {}

    def read(self, read: Read, carry: Carry, norm: Norm) -> tuple[Tensor | Reads, Carry]:
        self.steps.append(lambda carry: read(carry, norm)[1])
        return read(carry, norm)

    def write(self, write: Write, carry: Carry, output: Tensor, value: Tensor | None) -> Carry:
        kept = output.detach(), None if value is None else value.detach()
        self.steps.append(lambda carry: write(carry, *kept))
        return write(carry, output, value)

    def boundary(self, run: RunBoundary, form: Form, *tensors: Any) -> tuple[Tensor, ...]:
        return run(form, *tensors)

    def start_group(self, carry: Carry) -> int:
        start = len(self.steps)
        self.starts[start] = [tensor.requires_grad for tensor in _tensors(carry)]
        return start

    def carry_at(self, start: int) -> Carry:
        """The carry that entered the group, as leaves that need gradients where it did."""
        if start not in self.replayed:
            self._replay()
        carry, needs = self.replayed.pop(start), iter(self.starts[start])
        return tree_map_only(Tensor, lambda tensor: tensor.detach().requires_grad_(next(needs)), carry)

    def _replay(self) -> None:
        carry, last = self.entrance, max(self.starts)
        with torch.no_grad():
            for position, step in enumerate(self.steps[: last + 1]):
                if position in self.starts:
                    self.replayed[position] = carry
                if position < last:
                    carry = step(carry)


class _Entrance:
    """The carry into a group: the one of the forward pass while that lasts, then a replayed one."""

    def __init__(self, block: _Block, carry: Carry) -> None:
        self.block, self.start = block, block.start_group(carry)
        self.given: Carry | None = carry

    def carry(self) -> Carry:
        return self.block.carry_at(self.start) if self.given is None else self.given


def _tensors(carry: Carry) -> list[Tensor]:
    return [part for part in tree_leaves(carry) if isinstance(part, Tensor)]
