"""Weighted sums and scores over earlier states of the same token, which never copy the states.

By autograd each of these would keep a wide copy of every state at every sublayer, memory that grows with the square of
the depth. The Functions here keep the states themselves, which are alive anyway, and widen them one at a time.

Dims: S sequence, B batch, J states, W results per token, C hidden size. A state is [S, B, 1, C].
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_hc.kernels.compiled import is_compiled_without_gradients, own


def weighted_sum_reference(weights: Tensor, states: Sequence[Tensor]) -> Tensor:
    """sum_j weights[..., j] states[j], by autograd; arguments as ``weighted_sum``."""
    wide = torch.cat([state.to(weights.dtype) for state in states], dim=2)  # [S, B, J, C]
    return (weights @ wide).to(states[0].dtype)


def weighted_sum(weights: Tensor, states: Sequence[Tensor]) -> Tensor:
    """sum_j weights[..., j] states[j]: weights [S, B, W, J], or [W, J] for all tokens, -> [S, B, W, C].

    Accumulated in the weights' dtype, which is at least fp32, and rounded to the states' dtype once.
    """
    assert weights.shape[-1] == len(states), f"{weights.shape[-1]} weights for {len(states)} states"
    return _sum(weights, states) if is_compiled_without_gradients() else _WeightedSum.apply(weights, *states)


def key_scores_reference(query: Tensor, states: Sequence[Tensor], eps: float) -> Tensor:
    """query . (state_j / rms(state_j)), by autograd; arguments as ``key_scores``."""
    wide = torch.cat([state.to(query.dtype) for state in states], dim=2)  # [S, B, J, C]
    return torch.nn.functional.rms_norm(wide, (wide.shape[-1],), None, eps) @ query


def key_scores(query: Tensor, states: Sequence[Tensor], eps: float) -> Tensor:
    """query . (state_j / sqrt(mean(state_j^2) + eps)): query [C] in at least fp32 -> [S, B, J] in its dtype."""
    return _scores(query, eps, states) if is_compiled_without_gradients() else _KeyScores.apply(query, eps, *states)


def _sum(weights: Tensor, states: Sequence[Tensor]) -> Tensor:
    total = weights[..., 0:1] * states[0].to(weights.dtype)  # [S, B, W, 1] * [S, B, 1, C]
    for j in range(1, len(states)):
        total = total + weights[..., j : j + 1] * states[j].to(weights.dtype)
    return total.to(states[0].dtype)


def _scores(query: Tensor, eps: float, states: Sequence[Tensor]) -> Tensor:
    scores = []
    for state in states:
        wide = state.squeeze(2).to(query.dtype)  # [S, B, C]
        scores.append((wide @ query) * _inverse_rms(wide, eps))
    return torch.stack(scores, dim=-1)


class _WeightedSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weights: Tensor, *states: Tensor) -> Tensor:
        ctx.save_for_backward(weights, *states)
        return own(_sum(weights, states))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weights, *states = ctx.saved_tensors
        grad = grad.to(weights.dtype)
        grad_weights = None
        if ctx.needs_input_grad[0]:
            per_token = torch.stack([(grad * state.to(grad.dtype)).sum(-1) for state in states], dim=-1)
            grad_weights = per_token.sum((0, 1)) if weights.dim() == 2 else per_token  # [S, B, W, J]
        grads: list[Tensor | None] = [None] * len(states)
        for j, state in enumerate(states):
            if ctx.needs_input_grad[1 + j]:
                grads[j] = (weights[..., j : j + 1] * grad).sum(2, keepdim=True).to(state.dtype)
        return (grad_weights, *grads)


class _KeyScores(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, eps: float, *states: Tensor) -> Tensor:
        ctx.eps = eps
        ctx.save_for_backward(query, *states)
        return _scores(query, eps, states)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, *states = ctx.saved_tensors
        grad_query = torch.zeros_like(query)
        grads: list[Tensor | None] = []
        for j, state in enumerate(states):
            wide = state.squeeze(2).to(query.dtype)
            inverse = _inverse_rms(wide, ctx.eps)
            scaled = grad[..., j] * inverse  # [S, B]
            grad_query = grad_query + (scaled.unsqueeze(-1) * wide).sum((0, 1))
            if not ctx.needs_input_grad[2 + j]:
                grads.append(None)
                continue
            shrink = scaled * inverse.square() * (wide @ query) / wide.shape[-1]
            grad_state = scaled.unsqueeze(-1) * query - shrink.unsqueeze(-1) * wide
            grads.append(grad_state.unsqueeze(2).to(state.dtype))
        return (grad_query, None, *grads)


def _inverse_rms(wide: Tensor, eps: float) -> Tensor:
    return torch.rsqrt(wide.square().mean(-1) + eps)
