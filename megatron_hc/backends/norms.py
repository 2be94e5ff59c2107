"""--norm-impl: norms by the kernels of apex or transformer-engine, on our parameters.

As in our own, statistics and weights are in fp32 and the result has the input's dtype; ``parts`` says None, so that a
fused boundary leaves the norm to the chosen kernel. Norms inside a residual method stay the method's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from megatron_hc.backends.kept import Kept
from megatron_hc.kernels.norm import NormParts, cast
from megatron_hc.model.linear import NormLayer
from megatron_hc.packages import load
from megatron_hc.parallel.tensor import become


class ChosenNorm(NormLayer):
    """A norm that another package's kernel computes."""

    compute: Callable[[NormLayer, Tensor], Tensor]

    def forward(self, x: Tensor) -> Tensor:
        return cast(self.compute(self, x), x.dtype)

    def parts(self) -> NormParts | None:
        return None


class ApexNorm:
    """apex's functions: the mixed ones take a bf16 input with fp32 weights, and return fp32."""

    def __init__(self, functions: Any) -> None:
        self.functions = functions

    def __call__(self, norm: NormLayer, x: Tensor) -> Tensor:
        kind = "rms_norm" if norm.kind == "RMSNorm" else "layer_norm"
        name = f"fused_{kind}_affine" if x.dtype == norm.weight.dtype else f"mixed_dtype_fused_{kind}_affine"
        parameters = (norm.weight,) if norm.bias is None else (norm.weight, norm.bias)
        return getattr(self.functions, name)(x, *parameters, norm.weight.shape, norm.eps)


class TransformerEngineNorm:
    """transformer-engine's module, which computes and returns in its weights' dtype (fp32)."""

    def __init__(self, modules: Any, norm: NormLayer) -> None:
        kind = modules.RMSNorm if norm.kind == "RMSNorm" else modules.LayerNorm
        self.kept = Kept(kind(norm.weight.shape[0], eps=norm.eps, device="meta", dtype=norm.weight.dtype))

    def __call__(self, norm: NormLayer, x: Tensor) -> Tensor:
        parameters = {"weight": norm.weight} if norm.bias is None else {"weight": norm.weight, "bias": norm.bias}
        return self.kept.lend(parameters)(x)


def attach_norms(model: nn.Module, impl: str) -> int:
    """Have the model's norms computed by ``impl``; returns how many there are."""
    flag = f"--norm-impl {impl}"
    if impl == "apex":
        (functions, _) = load("apex", flag, "apex.normalization.fused_layer_norm", "fused_layer_norm_cuda")
        shared = ApexNorm(functions)
    else:
        (modules,) = load("transformer-engine", flag, "transformer_engine.pytorch")
    found = [module for module in model.modules() if isinstance(module, NormLayer)]
    for module in found:
        assert type(module) is NormLayer, "config.validate: a norm whose width is shared among processes stays ours"
        compute = shared if impl == "apex" else TransformerEngineNorm(modules, module)
        become(module, ChosenNorm, compute=compute)
    return len(found)
