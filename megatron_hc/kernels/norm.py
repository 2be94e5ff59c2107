"""Norms in at least fp32. Dims: D the normed width; any leading dims."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class NormParts(NamedTuple):
    """A norm as numbers, for an operation that does it with something else."""

    kind: str
    """RMSNorm or LayerNorm."""
    weight: Tensor
    bias: Tensor | None
    eps: float


def promote(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which mixing weights, norms and losses are computed: at least fp32, float64 stays float64."""
    return torch.promote_types(dtype, torch.float32)


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """``x.to(dtype)``, without its few microseconds where there is nothing to do: several times a sublayer."""
    return x if x.dtype == dtype else x.to(dtype)


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dim; result in x's dtype (Zhang & Sennrich, 2019)."""
    dtype = promote(x.dtype)
    wide = None if weight is None else cast(weight, dtype)
    return cast(F.rms_norm(cast(x, dtype), (x.shape[-1],), wide, eps), x.dtype)


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """(x - mean) / sqrt(var + eps) * weight + bias over the last dim; result in x's dtype (Ba et al., 2016)."""
    dtype = promote(x.dtype)
    wide = [None if t is None else cast(t, dtype) for t in (weight, bias)]
    return cast(F.layer_norm(cast(x, dtype), (x.shape[-1],), wide[0], wide[1], eps), x.dtype)


def norm(x: Tensor, kind: str, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """``rms_norm`` or ``layer_norm`` by Megatron's names; a bias of RMSNorm is added in at least fp32."""
    if kind != "RMSNorm":
        return layer_norm(x, weight, bias, eps)
    if bias is None:
        return rms_norm(x, weight, eps)
    wide = promote(x.dtype)
    return (rms_norm(x.to(wide), weight, eps) + bias.to(wide)).to(x.dtype)
