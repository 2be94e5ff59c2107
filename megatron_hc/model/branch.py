"""What happens to a sublayer's output before it is written, and what training adds per layer.

Stochastic depth (arXiv 1603.09382) and LayerDrop (arXiv 1909.11556) leave out sublayers of single samples: their output
counts as zero (a method's mixing goes on). Which ones is a hash of (seed, iteration, sample, sublayer), so that every
layout, every pipeline stage and a second run for recompute leave out the same. The output is computed all the same: no
time is saved.

Dims: S sequence, B batch, C hidden size, L layers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_hc.config import ModelConfig
from megatron_hc.kernels.attach import attach_loss
from megatron_hc.kernels.norm import promote
from megatron_hc.residual import Carry, Residual


def branch_factors(config: ModelConfig, seed: int, iteration: int, samples: Sequence[int]) -> Tensor | None:
    """[2 L, B] what the output of each sublayer of each sample is multiplied by; None where nothing is left out.

    --stochastic-depth p: sublayer k = 1 .. 2 L is left out with chance p k / 2L and otherwise divided by one minus
    that. --layerdrop p: both sublayers of a layer are left out together, with chance p, the others stay as they are.
    ``samples``: positions in the order of the run.
    """
    depth, layer = config.residual.stochastic_depth, config.residual.layerdrop
    if not depth and not layer:
        return None
    count = 2 * config.num_layers
    factors = torch.ones(count, len(samples))
    for column, sample in enumerate(samples):
        for k in range(count):
            chance = depth * (k + 1) / count
            key = f"{seed}/{iteration}/{sample}"
            is_out = chance > _uniform(f"{key}/sublayer {k}") if depth else False
            is_out |= layer > _uniform(f"{key}/layer {k // 2}") if layer else False
            factors[k, column] = 0.0 if is_out else 1 / (1 - chance)
    return factors


def _uniform(key: str) -> float:
    """In [0, 1), by the key alone."""
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little") / 2**64


def scaled(output: Tensor, scale: float, factors: Tensor | None) -> Tensor:
    """A sublayer's output [S, B, C] times --residual-scale's factor and, if given, each sample's own [B]."""
    if factors is not None:
        return (output * (scale * factors.to(promote(output.dtype))).unsqueeze(-1)).to(output.dtype)
    return output if scale == 1.0 else output * scale


def with_linearity_penalty(carry: Carry, residual: Residual, before: Tensor, weights: Tensor) -> Carry:
    """--linearity-regularization (arXiv 2405.12250): sum of weight * (1 - cos(before, after)) joins the step's loss.

    ``before``: ``residual.state`` of the carry into the layer; ``carry``: out of it; weights [S, B], the coefficient
    included.
    """
    after, wide = residual.state(carry), promote(before.dtype)
    cosine = torch.cosine_similarity(before.to(wide), after.to(wide), dim=-1)
    penalty = (weights.to(wide) * (1 - cosine)).sum()
    if carry.pending is None:  # a method that has written already
        return carry.replace(stream=attach_loss(carry.stream, penalty))
    output, mix = carry.pending
    return carry.replace(pending=(attach_loss(output, penalty), mix))
