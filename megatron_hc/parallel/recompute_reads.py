"""Recompute of residual reads in blocks: n streams are kept once per block of boundaries, not once per read.

What the reads save for their backward pass is thrown away, and computed again for the whole block at once from the
carry at the block's entrance and the outputs of its sublayers (arXiv 2512.24880, section 4.3.2 and equation 20: with L
boundaries, n streams of width C and blocks of L_r boundaries, n C L / L_r numbers per token are kept, and (n + 2) C L_r
of one block while it is in the backward pass: sqrt(n L / (n + 2)) boundaries are best).

Of fused boundaries (``kernels/boundary.py``) the few numbers per token that their weights are made of are kept, so that
nothing is summed again: a block's streams are folded one from the other, in Triton by one kernel.

``recompute_groups.py`` does the same beside full recompute.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_map_only

from megatron_hc.kernels.boundary import folds, known
from megatron_hc.kernels.boundary_results import Written
from megatron_hc.kernels.coefficients import Form
from megatron_hc.model.attention import Context
from megatron_hc.model.gpt import GPT, LayerRunner
from megatron_hc.model.layer import TransformerLayer
from megatron_hc.residual import Carry, LinearMix, Norm, Reads, Residual

Read = Callable[[Carry, Norm], tuple[Tensor | Reads, Carry]]
Write = Callable[..., Carry]
RunBoundary = Callable[..., tuple[Tensor, ...]]
"""``LinearMix.run_boundary``."""


class Recorder(Protocol):
    """Does the reads and writes of sublayers in a way of its own."""

    def read(self, read: Read, carry: Carry, norm: Norm) -> tuple[Tensor | Reads, Carry]: ...

    def write(self, write: Write, carry: Carry, output: Tensor, value: Tensor | None) -> Carry: ...

    def boundary(self, run: RunBoundary, form: Form, *tensors: Any) -> tuple[Tensor, ...]: ...


class Sublayers:
    """Leaves the reads and writes of a model's sublayers to ``recorder``, while there is one and gradients are on."""

    def __init__(self, model: GPT) -> None:
        self.recorder: Recorder | None = None
        for module in model.modules():
            if isinstance(module, Residual) and module.site.is_sublayer:
                module.read = self._reader(module.read)  # type: ignore[assignment,method-assign]
                module.write = self._writer(module.write)  # type: ignore[method-assign]
                if isinstance(module, LinearMix):
                    module.run_boundary = self._runner(module.run_boundary)  # type: ignore[method-assign]

    @contextmanager
    def recorded_by(self, recorder: Recorder) -> Iterator[None]:
        before, self.recorder = self.recorder, recorder
        try:
            yield
        finally:
            self.recorder = before

    def _reader(self, read: Read) -> Read:
        def recorded(carry: Carry, norm: Norm) -> tuple[Tensor | Reads, Carry]:
            if self.recorder is None or not torch.is_grad_enabled():
                return read(carry, norm)
            return self.recorder.read(read, carry, norm)

        return recorded

    def _writer(self, write: Write) -> Write:
        def recorded(carry: Carry, output: Tensor, value: Tensor | None = None) -> Carry:
            if self.recorder is None or not torch.is_grad_enabled():
                return write(carry, output, value)
            return self.recorder.write(write, carry, output, value)

        return recorded

    def _runner(self, run: RunBoundary) -> RunBoundary:
        def recorded(form: Form, *tensors: Any) -> tuple[Tensor, ...]:
            if self.recorder is None or not torch.is_grad_enabled():
                return run(form, *tensors)
            return self.recorder.boundary(run, form, *tensors)

        return recorded


class ReadBlocks:
    """A ``LayerRunner`` in blocks of ``interval`` residual reads that are recomputed together; None: the best number.

    A block never reaches into another pipeline stage: every stage begins with one. Every call has blocks of its own, so
    that micro-batches may be in flight together.
    """

    def __init__(self, sublayers: Sublayers, run: LayerRunner, num_streams: int, interval: int | None) -> None:
        self.sublayers, self.run, self.num_streams, self.interval = sublayers, run, num_streams, interval

    def __call__(self, layers: Iterable[TransformerLayer], carry: Carry, context: Context) -> Carry:
        layers = list(layers)
        interval = self.interval or best_interval(2 * len(layers), self.num_streams)
        with self.sublayers.recorded_by(_Blocks(self.sublayers, interval)):
            return self.run(layers, carry, context)


def best_interval(num_boundaries: int, num_streams: int) -> int:
    """Boundaries per block for which what is kept and what one block needs at a time are smallest together."""
    return max(1, round(math.sqrt(num_streams * num_boundaries / (num_streams + 2))))


class _Blocks:
    """The blocks of one forward pass, one after the other."""

    def __init__(self, sublayers: Sublayers, interval: int) -> None:
        self.sublayers, self.interval, self.num_reads, self.block = sublayers, interval, 0, _Block(sublayers)

    def read(self, read: Read, carry: Carry, norm: Norm) -> tuple[Tensor | Reads, Carry]:
        if self.num_reads % self.interval == 0:
            self.block = _Block(self.sublayers)
        self.num_reads += 1
        return self.block.read(read, carry, norm)

    def write(self, write: Write, carry: Carry, output: Tensor, value: Tensor | None) -> Carry:
        return self.block.write(write, carry, output, value)

    def boundary(self, run: RunBoundary, form: Form, *tensors: Any) -> tuple[Tensor, ...]:
        return self.block.chain.run(run, form, *tensors)


class _Chain:
    """The fused boundaries of a block, each of which reads the streams that the one before made; detached tensors."""

    def __init__(self) -> None:
        self.form: Form | None = None
        self.streams: list[Tensor] = []
        """Of the first boundary, before it; [] as long as there is none."""
        self.written: list[Written | None] = []
        self.found: list[tuple[Tensor, ...]] = []
        """write', keep', read', statistics: what a boundary finds but for H' and x."""
        self.last_new = 0
        self.is_broken = False

    def run(self, run: RunBoundary, form: Form, *tensors: Any) -> tuple[Tensor, ...]:
        results = run(form, *tensors)
        is_next = not self.found or tensors[0].data_ptr() == self.last_new
        # Without its norm a module of its own comes after it, and keeps x.
        self.is_broken = self.is_broken or not is_next or not form.norm
        if self.is_broken:
            self.streams, self.written, self.found = [], [], []
        else:
            self._note(form, tensors, results)
        return results

    def _note(self, form: Form, tensors: tuple[Any, ...], results: tuple[Tensor, ...]) -> None:
        streams, output, write, keep = tensors[:4]
        if not self.found:
            self.form, self.streams = form, [leaf(streams)]
        self.written.append(None if output is None else (leaf(output), leaf(write), leaf(keep)))
        self.found.append(tuple(leaf(tensor) for tensor in results[2:]))
        self.last_new = results[0].data_ptr()

    def replayed(self) -> Iterator[tuple[Tensor, ...]]:
        """H', write', keep', read' and statistics, boundary by boundary; nothing where they must be run again."""
        if not self.found:
            return
        assert self.form is not None
        first, *rest = self.written
        with torch.no_grad():
            news = [self.streams[0].contiguous()] if first is None else folds(self.form, self.streams[0], [first])
            news += folds(self.form, news[0], [one for one in rest if one is not None])
        for new, found in zip(news, self.found, strict=True):
            yield (new, *found)


class _Replay:
    """Runs the boundaries of a block again, from what is known of them as far as it is."""

    def __init__(self, chain: _Chain) -> None:
        self.known = chain.replayed()

    def boundary(self, run: RunBoundary, form: Form, *tensors: Any) -> tuple[Tensor, ...]:
        results = next(self.known, None)
        return run(form, *tensors) if results is None else known(form, tensors, results)

    def read(self, read: Read, carry: Carry, norm: Norm) -> tuple[Tensor | Reads, Carry]:
        return read(carry, norm)

    def write(self, write: Write, carry: Carry, output: Tensor, value: Tensor | None) -> Carry:
        return write(carry, output, value)


class _Block:
    """The reads of a few layers in one forward pass. Holds no tensor of the autograd graph, only detached ones."""

    def __init__(self, sublayers: Sublayers) -> None:
        self.sublayers, self.chain = sublayers, _Chain()
        self.entrance: Carry | None = None
        self.steps: list[Callable[[Carry], Carry]] = []
        self.num_saved = 0
        self.recomputed: dict[int, Tensor] = {}

    def read(self, read: Read, carry: Carry, norm: Norm) -> tuple[Tensor | Reads, Carry]:
        if self.entrance is None:
            self.entrance = tree_map_only(Tensor, leaf, carry)
        self.steps.append(lambda carry: read(carry, norm)[1])
        with saved_tensors_hooks(self._forget, self._recall):
            return read(carry, norm)

    def write(self, write: Write, carry: Carry, output: Tensor, value: Tensor | None) -> Carry:
        kept = leaf(output)
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
        keep = saved_tensors_hooks(lambda tensor: found.setdefault(len(found), tensor.detach()), _unused)
        with torch.enable_grad(), keep, self.sublayers.recorded_by(_Replay(self.chain)):
            for step in self.steps:
                carry = step(carry)
        assert len(found) == self.num_saved, f"{len(found)} tensors saved again, not {self.num_saved}"


def leaf(tensor: Tensor) -> Tensor:
    """The same numbers, outside of the autograd graph."""
    return tensor.detach().requires_grad_(tensor.requires_grad)


def _unused(tensor: Tensor) -> Tensor:
    raise AssertionError("no backward pass runs through a replay")
