"""One micro-batch through one stage of a rank on paper: what stays in memory, what is computed, what is sent."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from megatron_hc.estimate.paper import PaperRank
from megatron_hc.parallel.stages import MicroBatch, Stage, WaitingWeights
from megatron_hc.pipeline_layout import ZERO_BUBBLE_SCHEDULES


@dataclass
class Pass:
    """A forward or backward pass of one micro-batch through one stage."""

    flops: float = 0.0
    """Of matrix products, attention included."""
    peak_bytes: int = 0
    """Most that is held at once, beyond what was held before."""
    sent: Counter[tuple[str, str]] = field(default_factory=Counter)
    """(group, collective) -> bytes."""


@dataclass
class StageTrace:
    """One stage's share of one micro-batch."""

    held_bytes: int
    """What waits in memory between forward and backward pass: saved tensors and what came from the stage before."""
    forward: Pass
    backward: Pass
    """With a zero-bubble schedule: without what it leaves for later."""
    weight: Pass = field(default_factory=Pass)
    """The gradients of weights that a zero-bubble schedule computes apart."""
    waiting_bytes: int = 0
    """What waits in memory between the two."""


class Held(TorchDispatchMode):
    """Counts the storages that operations inside make, as long as they live, and the FLOPs of matrix products.

    ``others``: tensors that were there before, whose views do not count.
    """

    def __init__(self, others: Iterable[Tensor]) -> None:
        super().__init__()
        self.bytes = self.peak = 0
        self.flops = 0.0
        self._others = list(others)  # held, so that no address is used twice
        self._alive = {tensor.untyped_storage()._cdata for tensor in self._others}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            self.flops += formula(*args, **(kwargs or {}), out_val=out)
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._note(tensor)
        return out

    def _note(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._alive:
            return
        self._alive.add(key)
        size = storage.nbytes()
        self.bytes += size
        self.peak = max(self.peak, self.bytes)
        weakref.finalize(storage, partial(self._freed, key, size)).atexit = False

    def _freed(self, key: int, size: int) -> None:
        self._alive.discard(key)
        self.bytes -= size


def trace(rank: PaperRank, index: int) -> StageTrace:
    """Stage ``index``, one of the rank's: forward and backward, with gradients of parameters handed on at once."""
    layout = rank.config.parallel.pipeline_layout(rank.config.model.num_layers)
    stage = Stage(rank.model, index, layout, rank.config, rank.mesh)
    handles = [p.register_post_accumulate_grad_hook(_drop_gradient) for p in rank.model.parameters()]
    rank.model.train()
    rank.sent.clear()
    try:
        with Held([*rank.model.parameters(), *rank.model.buffers()]) as held:
            found = _passes(rank, stage, held, rank.waiting if layout.schedule in ZERO_BUBBLE_SCHEDULES else None)
    finally:
        for handle in handles:
            handle.remove()
    attention = _attention_flops(rank, stage)
    found.forward.flops += attention
    found.backward.flops += 2.5 * attention  # the scores once more, and four products of their size instead of two
    return found


def _passes(rank: PaperRank, stage: Stage, held: Held, waiting: WaitingWeights | None) -> StageTrace:
    batch = _micro_batch(rank, stage)
    inputs = [
        torch.empty(crossing.shape, dtype=crossing.dtype, device="meta").requires_grad_() for crossing in stage.entrance
    ]
    outputs = stage.forward(batch, inputs)
    roots = [(get_gradient_edge(y), tuple(y.shape), y.dtype) for y in outputs if y.requires_grad]
    del outputs
    kept, forward = held.bytes, _pass(held, rank, 0)
    gradients = [torch.empty(shape, dtype=dtype, device="meta") for _, shape, dtype in roots]
    torch.autograd.backward([root for root, _, _ in roots], gradients)
    backward = _pass(held, rank, kept)
    if waiting is None:
        return StageTrace(kept, forward, backward)
    roots.clear()
    gradients.clear()
    inputs.clear()
    del batch
    left = held.bytes
    held.peak = left
    for gradient in waiting.take():
        gradient.compute()
    return StageTrace(kept, forward, backward, _pass(held, rank, left), left)


def _pass(held: Held, rank: PaperRank, before: int) -> Pass:
    """What has been counted since the last pass; ``before``: bytes held when it began."""
    found = Pass(held.flops, held.peak - before, rank.sent.copy())
    held.peak, held.flops = held.bytes, 0.0
    rank.sent.clear()
    return found


def _drop_gradient(parameter: Tensor) -> None:
    parameter.grad = None


def _micro_batch(rank: PaperRank, stage: Stage) -> MicroBatch:
    config = rank.config
    shape = (config.training.micro_batch_size, config.model.seq_length)
    numbers = torch.empty(shape, dtype=torch.int64, device="meta")
    documents = numbers if config.data.reset_attention_mask else None
    return MicroBatch(numbers, numbers, torch.empty(shape, device="meta"), None, documents)


def _attention_flops(rank: PaperRank, stage: Stage) -> float:
    """Scores and weighted sum of values of one micro-batch, half of the square for the causal rule; forward."""
    model = rank.config.model
    if model.attention_softmax_in_fp32:
        return 0.0  # explicit products are counted as such
    heads = max(1, model.num_attention_heads // (rank.mesh.size("tp") * rank.mesh.size("cp")))
    per_layer = 2.0 * model.seq_length**2 * heads * model.head_size * rank.config.training.micro_batch_size
    return per_layer * (stage.end - stage.first)
