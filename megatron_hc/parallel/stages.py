"""One pipeline stage: the forward pass of its layers, and what crosses into and out of it.

What crosses is the settled carry as a tuple of tensors, each with a name: the same name at two boundaries is the same
tensor, passed on unchanged. Dims: S sequence, B batch, N streams, D width of one stream, G key/value heads, H.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_hc.config import ModelConfig, TrainConfig
from megatron_hc.kernels.norm import promote
from megatron_hc.mesh import Mesh
from megatron_hc.model.gpt import GPT
from megatron_hc.model.linear import Linear
from megatron_hc.parallel.collectives import own_part
from megatron_hc.pipeline_layout import PipelineLayout
from megatron_hc.residual import Carry, Residual, Site, TensorSpec, build_residual, carry_boundary, flatten, unflatten
from megatron_hc.residual.base import stream_dtype_of


class MicroBatch(NamedTuple):
    """What one forward pass needs; every tensor [B, S]."""

    tokens: Tensor
    labels: Tensor
    weights: Tensor
    """Each token's share of the global batch's loss: the loss of a step is the sum of weight times cross entropy."""
    position_ids: Tensor | None = None
    document_ids: Tensor | None = None
    branch_factors: Tensor | None = None
    """[2 L, B] what stochastic depth and LayerDrop leave out; None: nothing."""


class Crossing(NamedTuple):
    """One tensor at a boundary."""

    name: str
    spec: TensorSpec
    shape: tuple[int, ...]
    """On this rank: its part of the sequence under sequence parallelism, its key/value heads."""
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


Boundary = tuple[Crossing, ...]


def boundary_of(
    config: TrainConfig, layer: int, tensor_parallel_size: int = 1, tokens: tuple[int, int] | None = None
) -> Boundary:
    """What crosses into ``layer`` (number of layers: into the final read), in the order of ``flatten``.

    ``tokens``: S and B of the pass over all ranks, by default those of training.
    """
    training, model = config.training, config.model
    dtype = torch.bfloat16 if training.bf16 else torch.float64 if training.fp64 else torch.float32
    S, B = tokens or (model.seq_length, training.micro_batch_size)
    S //= config.parallel.context_parallel_size
    shard = S // tensor_parallel_size if config.parallel.sequence_parallel else S
    found: list[Crossing] = []
    num_values = 0
    for index, spec in enumerate(carry_boundary(method_of(model), layer)):
        name, shape = spec.name or f"{spec.kind} {index} into {layer}", (shard, B, *spec.shape)
        if spec.kind == "values":
            G, H = spec.shape
            name, shape = f"V{num_values}", (S, B, max(1, G // tensor_parallel_size), H)
            num_values += 1
        found.append(Crossing(name, spec, shape, stream_dtype_of(spec, dtype, model.fp32_residual_connection)))
    return tuple(found)


def method_of(model: ModelConfig) -> Residual:
    """A module of the model's residual method, without storage: for what it says about boundaries."""
    with torch.device("meta"):
        return build_residual(Site("entry", 0, model))


class Stage:
    """Some consecutive layers of ``model``, the embedding at the first, the loss at the last stage."""

    def __init__(self, model: GPT, index: int, layout: PipelineLayout, config: TrainConfig, mesh: Mesh) -> None:
        self.model, self.index = model, index
        self.first, self.end = layout.bounds[index]
        self.is_first, self.is_last = index == 0, index == layout.num_stages - 1
        tp = mesh.size("tp")
        self.sequence_parts, self.sequence_part = (tp, mesh.rank("tp")) if mesh.sequence_parallel else (1, 0)
        self.entrance = self.entrance_of(config, layout, index, tp)
        self.exit = () if self.is_last else self.entrance_of(config, layout, index + 1, tp)
        self.method = method_of(config.model)
        self.sharers = mesh.group("cp")
        """The ranks with the other tokens of the same sequences."""
        self.measure: Measure = weighted_loss
        """What the last stage computes."""

    @staticmethod
    def entrance_of(config: TrainConfig, layout: PipelineLayout, index: int, tensor_parallel_size: int) -> Boundary:
        """What crosses into stage ``index``; nothing into the first."""
        return boundary_of(config, layout.bounds[index][0], tensor_parallel_size) if index else ()

    def forward(self, batch: MicroBatch, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """``inputs`` as ``entrance`` says -> tensors as ``exit`` says; the last stage: the micro-batch's loss alone."""
        return self.model.through(self._forward, batch, inputs)

    def _forward(self, whole: MicroBatch, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        model, batch = self.model, self._own(whole)
        positions = batch.position_ids
        assert positions is not None
        if self.is_first:
            carry = model.open(batch.tokens, positions)
        else:
            carry = unflatten(inputs, [crossing.spec for crossing in self.entrance])
        if self.end > self.first:
            layers = [model.layers[str(layer)] for layer in range(self.first, self.end)]
            context = model.context(positions, batch.document_ids)._replace(
                branch_factors=batch.branch_factors, linearity_weights=self._linearity_weights(batch)
            )
            carry = model.run(layers, carry, context)  # type: ignore[arg-type]
        if self.is_last:
            return (self.measure(model, model.close(carry), batch),)
        return leave(self.method, carry, self.exit)

    def _own(self, batch: MicroBatch) -> MicroBatch:
        """This rank's part of the sequences, with their positions; documents stay whole, for attention is over all."""
        positions = batch.position_ids
        if positions is None:
            positions = torch.arange(batch.tokens.shape[1], device=batch.tokens.device).unsqueeze(0)
        tokens, labels, weights, positions = (
            own_part(x.t(), self.sharers).t() for x in (batch.tokens, batch.labels, batch.weights, positions)
        )
        return batch._replace(tokens=tokens, labels=labels, weights=weights, position_ids=positions)

    def _linearity_weights(self, batch: MicroBatch) -> Tensor | None:
        """[S, B] of this rank's part of the sequence, in training."""
        coefficient = self.model.config.residual.linearity_regularization
        if not coefficient or not torch.is_grad_enabled():
            return None
        weights = batch.weights.t() * coefficient
        return weights.chunk(self.sequence_parts)[self.sequence_part]


Measure = Callable[[GPT, Tensor, MicroBatch], Tensor]
"""(model, normed hidden states [S, B, C], micro-batch) -> what the last stage makes of them."""


def weighted_loss(model: GPT, hidden: Tensor, batch: MicroBatch) -> Tensor:
    """The micro-batch's share of the step's loss."""
    return model.output.loss(hidden, batch.labels, batch.weights)


def leave(method: Residual, carry: Carry, boundary: Boundary) -> tuple[Tensor, ...]:
    """The carry as the tensors that cross ``boundary``."""
    num_values = sum(crossing.spec.kind == "values" for crossing in boundary)
    carry = method.settle(carry).replace(values=carry.values[:num_values])  # others: no later layer wants them
    outputs = flatten(carry)
    expected = [(crossing.shape, crossing.dtype) for crossing in boundary]
    found = [(tuple(output.shape), output.dtype) for output in outputs]
    assert found == expected, f"{type(method).__name__}.boundary says {expected}, not {found}"
    return outputs


class WaitingWeights:
    """Gradients of linear layers' weights that backward passes leave to be computed later, as zero-bubble schedules do.

    A backward pass through a layer that is served computes the gradient of its input and notes (weight, input, the
    output's gradient) here; parameters of other modules get their gradients at once.
    """

    def __init__(self) -> None:
        self.noted: list[WeightGradient] = []

    def serve(self, modules: Iterable[nn.Module]) -> None:
        """Have the linear layers among ``modules`` note their weight gradients here."""
        for module in modules:
            if isinstance(module, Linear):
                module.multiply = partial(self._multiply, module)  # type: ignore[method-assign]

    def _multiply(self, module: Linear, x: Tensor, bias: Tensor | None) -> Tensor:
        # Without a graph to hang on, the note would never be written.
        if not (torch.is_grad_enabled() and x.requires_grad and module.weight.requires_grad):
            return F.linear(x, module.weight, bias)
        y = _WeightLater.apply(x, module, self.noted.append)
        return y if bias is None else y + bias

    def take(self) -> list[WeightGradient]:
        """What the last backward pass has left."""
        taken = self.noted.copy()
        self.noted.clear()
        return taken


class WeightGradient(NamedTuple):
    """All that is needed to compute one."""

    weight: nn.Parameter
    x: Tensor
    """[..., in]"""
    grad: Tensor
    """Of the output, [..., out]."""

    @torch.no_grad()
    def compute(self) -> None:
        """Accumulate it; through autograd, so that hooks on the parameter see it."""
        torch.autograd.backward([self.weight], [self.grad.flatten(0, -2).t() @ self.x.flatten(0, -2)])


class _WeightLater(torch.autograd.Function):
    """y = x W^T. Backward: the gradient of x, and a note.

    W is no input of the node: its hooks would be called without a gradient.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, module: Linear, note: Callable[[WeightGradient], None]) -> Tensor:
        ctx.save_for_backward(x)
        ctx.module, ctx.note = module, note
        return F.linear(x, module.weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (x,) = ctx.saved_tensors
        ctx.note(WeightGradient(ctx.module.weight, x, grads[0]))
        return grads[0] @ ctx.module.weight, None, None


def loss_dtype(config: TrainConfig) -> torch.dtype:
    """Of a stage's loss."""
    return promote(torch.float64 if config.training.fp64 else torch.float32)
