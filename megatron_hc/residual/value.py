"""Value residuals: attention of later layers mixes in values of earlier ones (arXiv 2410.17897).

Dims: S sequence, B batch, G key/value heads, H head width, C hidden size, L layers.

A value residual is part of attention, not of the residual path: it goes with every residual method. Throughout, V_n
[S, B, G, H] is what layer n = 1 .. L makes of its own input (after the norm of values, where there is one) and V'_n is
what its attention uses and its cache keeps. V'_1 = V_1. Weights are applied in at least fp32 and rounded once.

With every variant but ``none``, tensors of G H numbers per token cross into a layer (``value_boundary``) and stay in
memory until the last layer has used them: V_1 alone, with ``dense`` all the V_j so far.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from megatron_hc.config import ModelConfig
from megatron_hc.kernels.norm import promote
from megatron_hc.residual.base import Draw, Residual, TensorSpec


class ValueResidual(nn.Module):
    """The interface, and no value residual at all: V'_n = V_n. Parameters, FLOPs, memory, boundary: none."""

    keeps_fp32 = True

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.records = self.num_carried(config, layer + 1) > self.num_carried(config, layer)
        self.mixes = self.mixes_in(config, layer)

    @classmethod
    def mixes_in(cls, config: ModelConfig, layer: int) -> bool:
        """Whether ``layer``, counted from 0, does anything with values of earlier layers."""
        return False

    @classmethod
    def num_carried(cls, config: ModelConfig, layer: int) -> int:
        """How many tensors ``carry.values`` holds at the entrance of ``layer``."""
        return 0

    @classmethod
    def parts(cls, config: ModelConfig, layer: int) -> tuple[tuple[str, int], ...]:
        """(name, rows per key/value head) of what the merged QKV projection holds after queries and keys."""
        return (("v", config.head_size),)

    def mix(self, own: Tensor | None, earlier: tuple[Tensor, ...], gate: Tensor | None) -> Tensor:
        """V'_n from V_n, ``carry.values`` and the projection's part "gate" [S, B, G, 1]."""
        assert own is not None, "this layer has values of its own"
        return self.mixed(own, earlier, gate) if self.mixes else own

    def mixed(self, own: Tensor, earlier: tuple[Tensor, ...], gate: Tensor | None) -> Tensor:
        """``mix`` in the layers that mix."""
        return own

    def correct(self, output: Tensor, own: Tensor | None, earlier: tuple[Tensor, ...]) -> Tensor:
        """The output of attention [S, B, Q * H] before its projection, changed or not."""
        return output

    def recorded(self, own: Tensor | None) -> Tensor | None:
        """What later layers get, if anything; ``own`` is V_n."""
        return own if self.records else None

    def initial(self, name: str, draw: Draw) -> Tensor:
        """Full-size fp32 initial value of the parameter ``name``."""
        raise NotImplementedError(f"{type(self).__name__} has no initial value for {name}")

    def weight_decay(self, name: str) -> bool:
        return False


class FirstValue(ValueResidual):
    """What all variants share that look back at V_1 only."""

    @classmethod
    def mixes_in(cls, config: ModelConfig, layer: int) -> bool:
        return layer > 0

    @classmethod
    def num_carried(cls, config: ModelConfig, layer: int) -> int:
        return 1 if 0 < layer < config.num_layers else 0


class ConstantValue(FirstValue):
    """half, constant: V'_n = a V_1 + b V_n for n > 1, with a = b = 1/2 or a = 2, b = 1 (two flags change them).

    Claims no equality with the model without. Parameters: none. FLOPs per token and layer, forward: 3 G H.
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__(config, layer)
        self.first, self.own = config.value_weights

    def mixed(self, own: Tensor, earlier: tuple[Tensor, ...], gate: Tensor | None) -> Tensor:
        wide = promote(own.dtype)
        return (self.first * earlier[0].to(wide) + self.own * own.to(wide)).to(own.dtype)


class SparseValue(ConstantValue):
    """sparse: ``constant`` with a = 5, b = 1, in the last third of the layers (--value-residual-layers) only.

    Claims no equality. The paper's best variant mixes late layers; that they are the last third is our choice.
    Parameters: none. FLOPs per token and mixing layer, forward: 3 G H. V_1 crosses every boundary, to the last layer.
    """

    @classmethod
    def mixes_in(cls, config: ModelConfig, layer: int) -> bool:
        return layer >= max(config.num_layers - config.num_value_residual_layers, 1)


class LearnableValue(FirstValue):
    """learnable: V'_n = a_n V_1 + b_n V_n for n > 1 with two learned numbers per layer, both 1/2 at the start.

    Claims no equality at 1/2; with --value-residual-first-weight 0 --value-residual-own-weight 1 it starts as the model
    without. Parameters: one tensor [2] (a, b) per layer but the first. FLOPs per token and layer, forward: 3 G H.
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__(config, layer)
        self.start = config.value_weights
        self.weights = nn.Parameter(torch.empty(2)) if self.mixes else None

    def initial(self, name: str, draw: Draw) -> Tensor:
        return torch.tensor(self.start)

    def mixed(self, own: Tensor, earlier: tuple[Tensor, ...], gate: Tensor | None) -> Tensor:
        assert self.weights is not None
        wide = promote(own.dtype)
        first_weight, own_weight = self.weights.to(wide)
        return (first_weight * earlier[0].to(wide) + own_weight * own.to(wide)).to(own.dtype)


class DenseValue(ValueResidual):
    """dense: V'_n = sum_{j <= n} w_nj V_j for n > 1 with learned weights, 1 / n each at the start (our choice).

    The mean agrees with ``learnable`` at n = 2. Claims no equality. Parameters: one tensor [n] per layer but the first.
    FLOPs per token and layer n, forward: 2 n G H. Memory and boundary: all V_j so far.
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__(config, layer)
        self.weights = nn.Parameter(torch.empty(layer + 1)) if self.mixes else None

    @classmethod
    def mixes_in(cls, config: ModelConfig, layer: int) -> bool:
        return layer > 0

    @classmethod
    def num_carried(cls, config: ModelConfig, layer: int) -> int:
        return layer if layer < config.num_layers else 0

    def initial(self, name: str, draw: Draw) -> Tensor:
        assert self.weights is not None
        return torch.full(self.weights.shape, 1 / self.weights.numel())

    def mixed(self, own: Tensor, earlier: tuple[Tensor, ...], gate: Tensor | None) -> Tensor:
        assert self.weights is not None
        wide = promote(own.dtype)
        total, *others = (w * v.to(wide) for w, v in zip(self.weights.to(wide), (*earlier, own), strict=True))
        for term in others:
            total = total + term
        return total.to(own.dtype)


class NeutrenoValue(FirstValue):
    """neutreno: output of attention, per head, += c (V_1 - V_n) for n > 1 (arXiv 2312.00751), c = 0.4 by default.

    V'_n = V_n; a query head takes V of its key/value head. Claims no equality. Parameters: none. FLOPs per token and
    layer, forward: about 3 Q H with Q query heads.
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__(config, layer)
        self.coefficient = config.neutreno_weight

    def correct(self, output: Tensor, own: Tensor | None, earlier: tuple[Tensor, ...]) -> Tensor:
        if not self.mixes:
            return output
        assert own is not None
        wide = promote(own.dtype)
        step = self.coefficient * (earlier[0].to(wide) - own.to(wide))  # [S, B, G, H]
        heads = output.to(wide).unflatten(-1, (own.shape[2], -1, own.shape[3]))  # [S, B, G, queries of a group, H]
        return (heads + step.unsqueeze(3)).flatten(2).to(output.dtype)


class PerTokenValue(FirstValue):
    """per-token: V'_n = V_1 + g (V_n - V_1) for n > 1, g = sigmoid(W x) per token and key/value head.

    As in lucidrains' x-transformers. x is what attention reads (its value input, where query, key and value differ). W
    [G, C] is the part "gate" of the merged QKV projection: it is drawn, cut, cast and decays as the other parts, and
    has a bias where they do. Initial values: N(0, --init-method-std^2): g is near 1/2, so no equality is claimed.
    Parameters per layer but the first: G C (+ G). FLOPs per token and layer, forward: 2 G C + 3 G H.
    """

    @classmethod
    def parts(cls, config: ModelConfig, layer: int) -> tuple[tuple[str, int], ...]:
        own = super().parts(config, layer)
        return (*own, ("gate", 1)) if cls.mixes_in(config, layer) else own

    def mixed(self, own: Tensor, earlier: tuple[Tensor, ...], gate: Tensor | None) -> Tensor:
        assert gate is not None
        wide = promote(own.dtype)
        return torch.lerp(earlier[0].to(wide), own.to(wide), torch.sigmoid(gate.to(wide))).to(own.dtype)


class SingleLayerValue(FirstValue):
    """--single-layer-value (SVFormer): V'_n = V_1; layers after the first have no value projection and cache no values.

    While generating, all layers of a process share one cache of V_1: one process's caches hold (L + 1) / (2 L) of what
    they would. Claims no equality. Parameters: G H C (and bias) fewer per layer but
    the first, and 2 G H C fewer FLOPs per token and layer, forward.
    """

    @classmethod
    def parts(cls, config: ModelConfig, layer: int) -> tuple[tuple[str, int], ...]:
        return () if cls.mixes_in(config, layer) else super().parts(config, layer)

    def mix(self, own: Tensor | None, earlier: tuple[Tensor, ...], gate: Tensor | None) -> Tensor:
        return earlier[0] if own is None else own


VALUE_RESIDUALS: dict[str, type[ValueResidual]] = {
    "none": ValueResidual,
    "half": ConstantValue,
    "constant": ConstantValue,
    "learnable": LearnableValue,
    "sparse": SparseValue,
    "dense": DenseValue,
    "neutreno": NeutrenoValue,
    "per-token": PerTokenValue,
}


def value_residual_class(config: ModelConfig) -> type[ValueResidual]:
    """The variant that the configuration names."""
    return SingleLayerValue if config.single_layer_value else VALUE_RESIDUALS[config.value_residual]


def build_value_residual(config: ModelConfig, layer: int) -> ValueResidual:
    """The value residual of one layer, by ``--value-residual`` and ``--single-layer-value``."""
    return value_residual_class(config)(config, layer)


def value_parts(config: ModelConfig, layer: int) -> tuple[tuple[str, int], ...]:
    """(name, rows per key/value head) of what a layer's merged QKV projection holds after queries and keys."""
    return value_residual_class(config).parts(config, layer)


def value_boundary(config: ModelConfig, layer: int) -> tuple[TensorSpec, ...]:
    """The attention values that cross into ``layer``; in training S is the whole sequence, sharded or not."""
    spec = TensorSpec("values", (config.num_kv_heads, config.head_size), "activation")
    return (spec,) * value_residual_class(config).num_carried(config, layer)


def carry_boundary(residual: Residual, layer: int) -> tuple[TensorSpec, ...]:
    """All that crosses into ``layer``, in the order of ``flatten``."""
    return (*residual.boundary(layer), *value_boundary(residual.site.config, layer))
