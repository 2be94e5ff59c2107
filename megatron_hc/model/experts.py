"""Experts, and the order that their rows come in.

Dims: T tokens, k experts per token, N rows (pairs of token and chosen expert), E experts, C hidden size, F their width.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_hc.config import ModelConfig
from megatron_hc.kernels.compiled import gated, own
from megatron_hc.kernels.norm import promote
from megatron_hc.model.initial import initial_of
from megatron_hc.model.linear import Parts
from megatron_hc.model.mlp import activated, activation_name
from megatron_hc.residual import Draw


class Rows(NamedTuple):
    """Which pair (token t, its j-th expert), numbered t * k + j, stands in which row; rows are sorted by expert."""

    pairs: Tensor
    """[N] the pair of each row; any where there is none."""
    places: Tensor
    """[T * k] the row of each pair; any where it has none."""
    counts: Tensor
    """[E] rows of each expert; rows behind the last expert's belong to nobody."""
    has_pair: Tensor | None
    """[N] whether a row stands for a pair; None: all do."""
    has_row: Tensor | None
    """[T * k] whether a pair has a row; None: all have."""


def arrange(experts: Tensor, kept: Tensor | None, num_experts: int, num_slots: int | None = None) -> Rows:
    """Sort pairs by expert, in the order of tokens; no shape depends on the numbers.

    experts: [T, k]. kept: [T, k] pairs that get a row. num_slots: every expert has exactly that many rows, of which
    those without a pair are padding (needs ``kept``, with at most that many pairs per expert).
    """
    flat = experts.flatten()
    num_pairs, has_row = flat.numel(), None if kept is None else kept.flatten()
    if has_row is not None:
        flat = torch.where(has_row, flat, num_experts)  # the others come last
    pairs = flat.sort(stable=True).indices
    numbers = torch.arange(num_pairs, device=flat.device)
    places = torch.empty_like(flat).scatter_(0, pairs, numbers)
    totals = flat.new_zeros(num_experts + 1).scatter_add_(0, flat, torch.ones_like(flat))
    counts = totals[:num_experts]
    if num_slots is None:
        return Rows(pairs, places, counts, None if has_row is None else numbers < counts.sum(), has_row)
    assert has_row is not None
    starts = totals.cumsum(0) - totals
    size = num_experts * num_slots
    slots = torch.where(has_row, flat * num_slots + places - starts[flat], size)
    pairs = flat.new_zeros(size + 1).scatter_(0, slots, numbers)[:size]
    has_pair = torch.zeros(size + 1, dtype=torch.bool, device=flat.device).scatter_(0, slots, has_row)[:size]
    return Rows(pairs, slots.clamp(max=size - 1), torch.full_like(counts, num_slots), has_pair, has_row)


def _to_rows(x: Tensor, rows: Rows, k: int) -> Tensor:
    out = x.index_select(0, rows.pairs // k)
    return out if rows.has_pair is None else out.masked_fill_(~rows.has_pair.unsqueeze(-1), 0)


def _to_tokens(y: Tensor, rows: Rows, k: int) -> Tensor:
    wide = promote(y.dtype)
    if rows.has_row is None and wide == y.dtype:
        return F.embedding_bag(rows.places.view(-1, k), y, mode="sum")  # one pass; a CPU's bf16 would be rounded down
    picked = y.index_select(0, rows.places)
    if rows.has_row is not None:
        picked = picked.masked_fill_(~rows.has_row.unsqueeze(-1), 0)  # also drops what nobody computed
    choices = picked.unflatten(0, (-1, k))
    if y.is_cuda:
        return choices.sum(1, dtype=wide).to(y.dtype)
    total = choices[:, 0].to(wide, copy=True)  # a sum over the middle dim takes a CPU several times as long
    for j in range(1, k):
        total += choices[:, j]
    return total.to(y.dtype)


class _Dispatch(torch.autograd.Function):
    """[T, C] -> [N, C]. Its adjoint adds a token's rows in a fixed order, where autograd's own would not."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Rows, k: int) -> Tensor:
        ctx.rows, ctx.k = rows, k
        return own(_to_rows(x, rows, k))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return _to_tokens(grads[0], ctx.rows, ctx.k), None, None


class _Combine(torch.autograd.Function):
    """[N, C] -> [T, C], the sum of each token's rows: the adjoint of ``_Dispatch``."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, rows: Rows, k: int) -> Tensor:
        ctx.rows, ctx.k = rows, k
        return own(_to_tokens(y, rows, k))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return _to_rows(grads[0], ctx.rows, ctx.k), None, None


def dispatch(x: Tensor, rows: Rows, k: int) -> Tensor:
    """Tokens [T, C] -> the experts' rows [N, C], zero where nobody's."""
    return _Dispatch.apply(x, rows, k)


def combine(y: Tensor, rows: Rows, k: int) -> Tensor:
    """The experts' rows [N, C] -> tokens [T, C]."""
    return _Combine.apply(y, rows, k)


class _RowsOfOwners(torch.autograd.Function):
    """[E, out] -> [N, out], the row of each one's owner [N].

    The gradient is a product, which adds in fp32; autograd's own would round an expert's sum to bf16 at each row.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, owners: Tensor) -> Tensor:
        ctx.save_for_backward(owners)
        ctx.num_owners = x.shape[0]
        return x.index_select(0, owners)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (owners,) = ctx.saved_tensors
        numbers = torch.arange(ctx.num_owners, device=owners.device)
        return (numbers.unsqueeze(1) == owners).to(grads[0].dtype) @ grads[0], None


def weights_of_rows(weights: Tensor, rows: Rows) -> Tensor:
    """Weights [T, k] -> [N], zero in rows without a pair."""
    return dispatch(weights.reshape(-1, 1), rows, 1).squeeze(1)


def grouped_linear(x: Tensor, weight: Tensor, counts: Tensor, use_grouped_mm: bool) -> Tensor:
    """x [N, in] sorted by expert, weight [E, in, out], counts [E] -> [N, out]; rows past the counts are undefined."""
    if use_grouped_mm and can_group(x, weight):
        return F.grouped_mm(x, weight, offs=counts.cumsum(0).to(torch.int32))
    sizes = counts.tolist()
    parts = [part @ weight[e] for e, part in enumerate(x[: sum(sizes)].split(sizes))]
    rest = x.shape[0] - sum(sizes)
    return torch.cat([*parts, x.new_zeros(rest, weight.shape[2])] if rest else parts)


def can_group(x: Tensor, weight: Tensor) -> bool:
    """Whether torch's grouped matrix multiplication takes these: dtype, and rows of whole 16 bytes."""
    takes_fp32 = not x.is_cuda and not torch.compiler.is_compiling()  # what --compile knows of it is CUDA's
    allowed = (torch.bfloat16, torch.float32) if takes_fp32 else (torch.bfloat16,)
    is_aligned = all(size * x.element_size() % 16 == 0 for size in weight.shape[1:])
    return hasattr(F, "grouped_mm") and x.dtype in allowed and is_aligned


class ExpertMatrix(nn.Module):
    """One matrix per expert, stored below each other, and their biases.

    fc1: [E * rows, C]; with SwiGLU an expert's rows alternate gate, up. fc2: [E * F, C], transposed, so that both are
    cut along dim 0: between experts, and inside each for expert tensor parallelism. Each logical matrix of each expert
    has initial values of its own, whatever process holds it.
    """

    def __init__(self, kind: str, config: ModelConfig) -> None:
        super().__init__()
        assert kind in ("fc1", "fc2") and config.moe.num_experts is not None
        self.kind, self.num_experts = kind, config.moe.num_experts
        self.width, self.hidden_size = config.expert_ffn_size, config.hidden_size
        names = ("gate", "up") if kind == "fc1" and config.swiglu else ("",)
        self.parts = Parts(tuple((name, 1) for name in names))
        sizes = (self.hidden_size, self.width) if kind == "fc1" else (self.width, self.hidden_size)
        self.initials = {
            name: initial_of("fc1" if kind == "fc1" else "fc2", name, config, *sizes) for name, _ in self.parts.sizes
        }
        rows = self.width * len(names)
        self.weight = nn.Parameter(torch.empty(self.num_experts * rows, self.hidden_size))
        shape = (self.num_experts * rows,) if kind == "fc1" else (self.num_experts, self.hidden_size)
        self.bias = None if config.disable_bias_linear else nn.Parameter(torch.empty(shape))

    def initial(self, name: str, draw: Draw) -> Tensor:
        if name == "bias":
            assert self.bias is not None
            return torch.zeros(self.bias.shape)
        return torch.cat([self._initial_expert(expert, draw) for expert in range(self.num_experts)])

    def _initial_expert(self, expert: int, draw: Draw) -> Tensor:
        if self.kind == "fc2":
            return self.initials[""].value(draw, f"expert {expert}", (self.hidden_size, self.width)).t()
        shape = (self.width, self.hidden_size)
        return self.parts.merge(
            {part: how.value(draw, f"expert {expert} {part}", shape) for part, how in self.initials.items()}
        )

    def stacked(self, num_experts: int) -> Tensor:
        """[experts here, in, out]"""
        weight = self.weight.unflatten(0, (num_experts, -1))
        return weight.transpose(1, 2) if self.kind == "fc1" else weight

    def bias_of_rows(self, counts: Tensor, num_rows: int) -> Tensor:
        """[N, out] the bias of each row's expert; 0, and no gradient, in rows of nobody."""
        assert self.bias is not None
        ends, rows = counts.cumsum(0), torch.arange(num_rows, device=counts.device)
        owners = torch.searchsorted(ends, rows, right=True).clamp(max=counts.shape[0] - 1)
        biases = _RowsOfOwners.apply(self.bias.view(counts.shape[0], -1), owners)
        return biases.masked_fill((rows >= ends[-1]).unsqueeze(-1), 0.0)


class Experts(nn.Module):
    """All experts of this process: linear_fc1 -> activation, times the row's weight -> linear_fc2."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        assert config.moe.num_experts is not None
        self.num_experts = config.moe.num_experts
        """Of this process."""
        self.adds_bias = True
        """Whether this process, of those that share an expert, adds the second bias."""
        self.linear_fc1 = ExpertMatrix("fc1", config)
        self.linear_fc2 = ExpertMatrix("fc2", config)
        self.activation = activation_name(config)
        self.use_grouped_mm = config.moe.moe_grouped_gemm

    def forward(self, x: Tensor, weights: Tensor, counts: Tensor) -> Tensor:
        """x [N, C] sorted by expert, weights [N], counts [E] -> weight * expert(x), [N, C].

        Rows past the sum of the counts hold undefined numbers; nothing of them reaches a gradient of a parameter.
        """
        x = x.to(self.linear_fc1.weight.dtype)
        h = self.grouped(x, self.linear_fc1, counts)
        if self.linear_fc1.bias is not None:
            h = h + self.linear_fc1.bias_of_rows(counts, x.shape[0])
        weights = weights.unsqueeze(-1)
        h = (self.activate(h) * weights).to(x.dtype)  # weights are fp32: one rounding
        y = self.grouped(h, self.linear_fc2, counts)
        if self.linear_fc2.bias is not None and self.adds_bias:
            y = y + (self.linear_fc2.bias_of_rows(counts, x.shape[0]) * weights).to(y.dtype)
        return y

    def grouped(self, x: Tensor, matrix: ExpertMatrix, counts: Tensor) -> Tensor:
        """Rows x [N, in] sorted by expert times each expert's matrix -> [N, out]: what another package may do."""
        return grouped_linear(x, matrix.stacked(self.num_experts), counts, self.use_grouped_mm)

    def activate(self, h: Tensor) -> Tensor:
        if self.activation == "swiglu":
            return gated(h)
        return activated(h, self.activation)
