"""Where a layer's norms stand, and the small modules that some placements bring. Dims: S, B, Q query heads, H, C."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_hc.config import ModelConfig
from megatron_hc.kernels.norm import promote
from megatron_hc.model.linear import NormLayer
from megatron_hc.residual import Draw, Norm, Residual

ReadNorm = Literal["none", "keeps", "replaces"]


class NormPlacement(NamedTuple):
    """The norms of one layer. The default is pre-norm: x + F(norm(x))."""

    attention_read: ReadNorm = "keeps"
    """At the read: no norm; x = norm(stream); or x = stream = norm(stream)."""
    mlp_read: ReadNorm = "keeps"
    attention_output: bool = False
    """A norm of the sublayer's output before it is written."""
    mlp_output: bool = False
    mlp_inner: bool = False
    """A norm between the MLP's activation and its second matrix."""
    heads: Literal["optional", "qkv", "cosine"] = "optional"
    """Norms per head: of queries and keys with --qk-layernorm, of all three, or unit vectors and a learned scale."""
    scales_heads: bool = False
    """A learned factor per query head before the output projection."""


PRE = NormPlacement()
POST = NormPlacement("replaces", "replaces")
AFTER_FIRST_READ = NormPlacement("none", "replaces")
HYBRID = NormPlacement("none", "replaces", heads="qkv")
REORDERED = NormPlacement("none", "none", attention_output=True, mlp_output=True)
PERI = NormPlacement(attention_output=True, mlp_output=True)
NORMFORMER = NormPlacement(attention_output=True, mlp_inner=True, scales_heads=True)
COSINE = REORDERED._replace(heads="cosine")
NONE = NormPlacement("none", "none")

NORM_PLACEMENTS: dict[str, tuple[NormPlacement, NormPlacement]] = {
    "pre": (PRE, PRE),
    "post": (AFTER_FIRST_READ, POST),
    "deepnorm": (AFTER_FIRST_READ, POST),
    "hybrid": (HYBRID, HYBRID),
    "hybrid-star": (PRE._replace(heads="qkv"), HYBRID),
    "reordered": (REORDERED, REORDERED),
    "peri": (PERI, PERI),
    "normformer": (NORMFORMER, NORMFORMER),
    "res-post-cosine": (COSINE, COSINE),
    "none": (NONE, NONE),
}
"""--norm-placement -> (first layer, all others). All have a final norm.

pre             x' = x + F(N(x))                    Xiong et al. 2020 (2002.04745)
post            x' = N(x + F(x))                    Vaswani et al. 2017; the norm of a sublayer runs at the next read,
                                                    that of the last one is the final norm, the first read has none
deepnorm        x' = N(a x + F(x)), a = (2 L)^1/4   DeepNet (2203.00555); a is in the residual's fold
reordered       x' = x + N(F(x))                    OLMo 2 (2501.00656), there with --qk-layernorm
peri            x' = x + N(F(N(x)))                 Peri-LN (2502.02732); the embedding is normed too
normformer      x + N(s * attention(N(x))), then    NormFormer (2110.09456): s per head, 1 at the start; optionally
                r x + W_2 N(act(W_1 N(x)))          r per channel, 1 at the start (--normformer-residual-scale)
hybrid          Y = x + attention(x) with norms     HybridNorm (2503.04598); q, k, v are normed per head
                of q, k, v; x' = N(Y) + MLP(N(Y))
hybrid-star     hybrid, but in the first layer Y = x + attention(N(x)), x' = Y + MLP(N(Y))
res-post-cosine reordered, with scores              Swin v2 (2111.09883): t per head, learned as log(1 / t), 0.1 at the
                cos(q, k) / t                       start and at least 0.01
none            x' = x + F(x)                       Fixup (1901.09321), T-Fixup, ReZero (2003.04887), with their initial
                                                    values; only the final norm is left

Only pre equals pre-norm at the start. Parameters: a norm of width C, or 3 of width H, or 1 of the MLP's width, for each
N beyond pre's; Q for s and t; C for r. None changes what crosses a boundary.
"""


def placement_of(config: ModelConfig, layer: int) -> NormPlacement:
    """The norms of one layer, by ``--norm-placement``."""
    first, others = NORM_PLACEMENTS[config.norm_placement]
    return first if layer == 0 else others


def read_norm(config: ModelConfig, residual: Residual, where: ReadNorm) -> NormLayer | None:
    """The norm at a sublayer's read, if it has one; a method that norms its own reads needs none."""
    return None if residual.replaces_norm or where == "none" else NormLayer(config)


def output_norm(config: ModelConfig, wanted: bool, width: int | None = None) -> nn.Module:
    """A norm inside a branch, or nothing."""
    return NormLayer(config, width) if wanted else nn.Identity()


def head_norms(config: ModelConfig, placement: NormPlacement) -> tuple[nn.Module, nn.Module, nn.Module]:
    """What queries, keys and values [S, B, heads, H] go through after their projection."""

    def norm() -> nn.Module:
        return NormLayer(config, config.head_size)

    if placement.heads == "cosine":
        return UnitVectors(config.num_attention_heads), UnitVectors(), nn.Identity()
    if placement.heads == "qkv":
        return norm(), norm(), norm()
    if not config.qk_layernorm:
        return nn.Identity(), nn.Identity(), nn.Identity()
    if config.qk_layernorm_across_heads:
        q, k = (NormAcrossHeads(config, heads) for heads in (config.num_attention_heads, config.num_kv_heads))
        return q, k, nn.Identity()
    return norm(), norm(), nn.Identity()


class NormAcrossHeads(nn.Module):
    """One norm over all heads of [S, B, heads, H] together (OLMo 2, 2501.00656)."""

    def __init__(self, config: ModelConfig, num_heads: int) -> None:
        super().__init__()
        self.across_heads = NormLayer(config, num_heads * config.head_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.across_heads(x.flatten(-2)).view_as(x)


class UnitVectors(nn.Module):
    """x / |x| per head, times exp(log_scale) where ``num_heads`` is given: at most 100, 10 at the start (Swin v2)."""

    keeps_fp32 = True

    def __init__(self, num_heads: int | None = None) -> None:
        super().__init__()
        self.log_scale = None if num_heads is None else nn.Parameter(torch.empty(num_heads))

    def forward(self, x: Tensor) -> Tensor:
        unit = F.normalize(x.to(promote(x.dtype)), dim=-1)
        if self.log_scale is not None:
            unit = unit * self.log_scale.to(unit.dtype).clamp(max=math.log(100)).exp().unsqueeze(-1)
        return unit.to(x.dtype)

    def initial(self, name: str, draw: Draw) -> Tensor:
        assert self.log_scale is not None
        return torch.full(self.log_scale.shape, math.log(10))


class Scale(nn.Module):
    """x times a learned vector, 1 at the start; ``repeats``: each number of it counts for so many channels."""

    keeps_fp32 = True

    def __init__(self, width: int, repeats: int = 1) -> None:
        super().__init__()
        self.repeats = repeats
        self.weight = nn.Parameter(torch.empty(width))

    def forward(self, x: Tensor) -> Tensor:
        wide = promote(x.dtype)
        parts = x.to(wide).unflatten(-1, (-1, self.repeats))
        return (parts * self.weight.to(wide).unsqueeze(-1)).flatten(-2).to(x.dtype)

    def initial(self, name: str, draw: Draw) -> Tensor:
        return torch.ones(self.weight.shape)


def head_scale(config: ModelConfig, placement: NormPlacement) -> nn.Module:
    """A learned factor per query head on attention's output [S, B, Q * H], or nothing."""
    return Scale(config.num_attention_heads, config.head_size) if placement.scales_heads else nn.Identity()


def stream_scale(config: ModelConfig) -> Scale | None:
    """A learned factor per channel on the stream that the MLP's output is added to, or nothing."""
    return Scale(config.hidden_size) if config.normformer_residual_scale else None


def embedding_norm(config: ModelConfig) -> nn.Module:
    """The norm of the embedding, positions included, that peri has, or nothing."""
    return output_norm(config, config.norm_placement == "peri")


def norm_of(module: nn.Module | None, where: ReadNorm, scale: nn.Module | None = None) -> Norm:
    """What a read is given."""
    return Norm(module, where == "replaces", scale)
