"""Linear layers, norms and their initial values. Every linear of the model comes from ``build_linear``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_hc.config import ModelConfig
from megatron_hc.kernels.norm import NormParts, cast, norm
from megatron_hc.model.initial import Initial, LinearKind, initial_of
from megatron_hc.residual import Draw, value_parts


class Parts(NamedTuple):
    """How the rows of a merged weight are made of logical matrices.

    Rows are ``groups`` blocks, each holding ``count`` rows of every part in turn. A cut of dim 0 between groups is then
    a cut of every logical matrix: so a merged weight is sharded, and resharded, along dim 0 without a shuffle.
    """

    sizes: tuple[tuple[str, int], ...]
    """(name, rows per group) in order."""

    @property
    def rows_per_group(self) -> int:
        return sum(count for _, count in self.sizes)

    def split(self, merged: Tensor) -> dict[str, Tensor]:
        """[groups * rows, ...] -> {name: [groups * count, ...]}."""
        blocks = merged.unflatten(0, (-1, self.rows_per_group))
        pieces = blocks.split([count for _, count in self.sizes], dim=1)
        return {name: piece.flatten(0, 1) for (name, _), piece in zip(self.sizes, pieces, strict=True)}

    def split_output(self, merged: Tensor) -> dict[str, Tensor]:
        """The same for what the weight makes: [..., groups * rows] -> {name: [..., groups, count]}, views."""
        blocks = merged.unflatten(-1, (-1, self.rows_per_group))
        pieces = blocks.split([count for _, count in self.sizes], dim=-1)
        return {name: piece for (name, _), piece in zip(self.sizes, pieces, strict=True)}

    def merge(self, parts: dict[str, Tensor]) -> Tensor:
        """The inverse of ``split``."""
        blocks = [parts[name].unflatten(0, (-1, count)) for name, count in self.sizes]
        return torch.cat(blocks, dim=1).flatten(0, 1)


class Linear(nn.Module):
    """y = x W^T + b with W [out, in]; x is cast to W's dtype (an fp32 stream meets bf16 weights here)."""

    def __init__(
        self,
        kind: LinearKind,
        in_features: int,
        out_features: int,
        *,
        bias: bool,
        initials: Mapping[str, Initial],
        parts: Parts | None,
    ) -> None:
        """``initials``: the initial values of each part; a weight that is not merged is part ""."""
        super().__init__()
        self.kind = kind
        self.initials = initials
        self.parts = parts
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return self.multiply(cast(x, self.weight.dtype), self.bias)

    def multiply(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x W^T (+ b): what a zero-bubble pipeline replaces by a version whose weight gradient can wait."""
        return self.product(x, self.weight, bias)

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """x [..., in], rows of W [out, in] and of b -> [..., out]: the arithmetic, which another package may do."""
        return F.linear(x, weight, bias)

    def forward_parts(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Each logical matrix of a merged weight times an input of its own, {name: [..., in]} -> {name: [..., out]}."""
        assert self.parts is not None, f"linear_{self.kind} is not merged"
        kind = type(self)
        overridden = kind.forward is Linear.forward or kind.forward_parts is not Linear.forward_parts
        assert overridden, f"{kind.__name__} has a forward of its own, so it needs a forward_parts of its own"
        weights = self.parts.split(self.weight)
        biases = {} if self.bias is None else self.parts.split(self.bias)
        dtype = self.weight.dtype
        return {name: self.product(x.to(dtype), weights[name], biases.get(name)) for name, x in inputs.items()}

    def initial(self, name: str, draw: Draw) -> Tensor:
        out_features, in_features = self.weight.shape
        if name == "bias":
            return torch.zeros(out_features)
        if self.parts is None:
            return self.initials[""].value(draw, "", (out_features, in_features))
        groups = out_features // self.parts.rows_per_group
        return self.parts.merge(
            {
                part: self.initials[part].value(draw, part, (groups * count, in_features))
                for part, count in self.parts.sizes
            }
        )


def build_linear(kind: LinearKind, config: ModelConfig, layer: int) -> Linear:
    """The linear layer of one place in the model: shape, bias, initial standard deviations and parts."""
    C, H, G, ffn = config.hidden_size, config.head_size, config.num_kv_heads, config.ffn_size
    queries = config.num_attention_heads // G
    bias = not config.disable_bias_linear
    in_features, groups, sizes = {
        "qkv": (C, G, (("q", queries * H), ("k", H), *value_parts(config, layer))),
        "proj": (G * queries * H, 1, (("", C),)),
        "fc1": (C, ffn, (("gate", 1), ("up", 1))) if config.swiglu else (C, 1, (("", ffn),)),
        "fc2": (ffn, 1, (("", C),)),
    }[kind]
    parts = Parts(sizes)
    return Linear(
        kind,
        in_features,
        groups * parts.rows_per_group,
        bias=bias or (kind == "qkv" and config.add_qkv_bias),
        initials={name: initial_of(kind, name, config, in_features, groups * count) for name, count in sizes},
        parts=parts if len(sizes) > 1 else None,
    )


class NormLayer(nn.Module):
    """RMSNorm or LayerNorm over the last dim, computed in at least fp32; its parameters stay fp32 under --bf16."""

    def __init__(self, config: ModelConfig, width: int | None = None) -> None:
        super().__init__()
        width = width or config.hidden_size
        self.kind, self.eps = config.normalization, config.norm_epsilon
        self.weight = nn.Parameter(torch.empty(width))
        self.bias = nn.Parameter(torch.empty(width)) if config.has_norm_bias else None

    def forward(self, x: Tensor) -> Tensor:
        return norm(x, self.kind, self.weight, self.bias, self.eps)

    def parts(self) -> NormParts | None:
        """What ``forward`` computes, for an operation that takes the norm up; None for an RMSNorm with a bias."""
        if self.kind == "RMSNorm" and self.bias is not None:
            return None
        return NormParts(self.kind, self.weight, self.bias, self.eps)

    def initial(self, name: str, draw: Draw) -> Tensor:
        return torch.ones_like(self.weight, device="cpu") if name == "weight" else torch.zeros(self.weight.shape[0])
