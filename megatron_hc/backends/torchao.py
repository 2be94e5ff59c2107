"""--fp8-backend torchao: matrices of layers multiplied in FP8 by torchao, with our parameters and our collectives.

What multiplies is ``Linear.product`` and ``Experts.grouped``; entering and leaving a tensor-parallel region, biases
and everything else stay as they are. Scales are made anew from every tensor (tensorwise) or block of 32 (mxfp8), so
there is no state, and recompute and checkpoints know nothing of it. Passes without gradients multiply in bf16.

Dims: N rows, E experts, in, out.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_hc.config import BackendConfig
from megatron_hc.config.backends import FP8_MULTIPLES
from megatron_hc.model.experts import ExpertMatrix, Experts
from megatron_hc.model.linear import Linear
from megatron_hc.packages import load

FLAG = "--fp8-backend torchao"

Multiply = Callable[[Tensor, Tensor], Tensor]
"""x [..., in], weight [out, in] -> x W^T [..., out] with operands in FP8, in x's dtype."""


def multiply_of(config: BackendConfig, device: torch.device) -> Multiply:
    """What --fp8-recipe and --fp8-format say, for matrices on ``device``; on a CPU torchao emulates (for tests)."""
    return (_mxfp8 if config.fp8_recipe == "mxfp8" else _tensorwise)(config, device)


def _tensorwise(config: BackendConfig, device: torch.device) -> Multiply:
    """One scale per tensor, from its largest absolute value; gradients of outputs in e5m2 with hybrid."""
    linears, configs = load("torchao", FLAG, "torchao.float8.float8_linear", "torchao.float8.config")
    of_gradients = torch.float8_e5m2 if config.fp8_format == "hybrid" else torch.float8_e4m3fn
    cast = {
        "cast_config_input": configs.CastConfig(target_dtype=torch.float8_e4m3fn),
        "cast_config_weight": configs.CastConfig(target_dtype=torch.float8_e4m3fn),
        "cast_config_grad_output": configs.CastConfig(target_dtype=of_gradients),
    }
    chosen = configs.Float8LinearConfig(**cast, emulate=device.type == "cpu")
    gemms = linears.Float8Linear(16, 16, bias=False, device="meta", config=chosen).linear_mm_config

    def multiply(x: Tensor, weight: Tensor) -> Tensor:
        return linears.matmul_with_hp_or_float8_args.apply(x, weight.t(), gemms, chosen)

    return multiply


def _mxfp8(config: BackendConfig, device: torch.device) -> Multiply:
    """A power of two per 32 numbers (OCP's MX formats), rounded up so that nothing saturates."""
    linears, formats, kernels = load(
        "torchao",
        f"{FLAG} --fp8-recipe mxfp8",
        "torchao.prototype.moe_training.mxfp8_linear",
        "torchao.prototype.mx_formats.config",
        "torchao.quantization.quantize_.common.kernel_preference",
    )
    kernel = kernels.KernelPreference.EMULATED if device.type == "cpu" else kernels.KernelPreference.AUTO
    return partial(
        _keyword_call,
        linears._to_mxfp8_then_scaled_mm,
        kernel_preference=kernel,
        scale_calculation_mode=formats.ScaleCalculationMode.RCEIL,
    )


def _keyword_call(function: Callable[..., Tensor], x: Tensor, weight: Tensor, **options: object) -> Tensor:
    return function(x, weight, **options)


def attach_torchao(model: nn.Module, config: BackendConfig, device: torch.device) -> int:
    """Multiply the matrices of ``model``, one layer or more, in FP8; returns how many matrices there are."""
    in_fp8, multiple, count = multiply_of(config, device), FP8_MULTIPLES[config.fp8_recipe], 0
    for module in model.modules():
        if isinstance(module, Linear):
            module.product = partial(_product, in_fp8)  # type: ignore[method-assign]
            count += 1
        elif isinstance(module, Experts):
            module.grouped = partial(_grouped, module, in_fp8, multiple)  # type: ignore[method-assign]
            count += 2
    return count


def _product(in_fp8: Multiply, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if not torch.is_grad_enabled():
        return F.linear(x, weight, bias)
    y = in_fp8(x, weight)
    return y if bias is None else y + bias


def _grouped(
    experts: Experts, in_fp8: Multiply, multiple: int, x: Tensor, matrix: ExpertMatrix, counts: Tensor
) -> Tensor:
    """x [N, in] sorted by expert, counts [E] -> [N, out]; rows past the counts are zero.

    One expert after the other, its rows padded with zeros to a multiple of what FP8 multiplies: zeros change no scale.
    """
    if not torch.is_grad_enabled():
        return Experts.grouped(experts, x, matrix, counts)
    sizes, weight = counts.tolist(), matrix.stacked(experts.num_experts)  # [E, in, out]
    outputs = []
    for expert, rows in enumerate(x[: sum(sizes)].split(sizes)):
        if rows.shape[0] == 0:
            outputs.append(rows @ weight[expert])  # nothing, and a gradient of zero
            continue
        padded = F.pad(rows, (0, 0, 0, -rows.shape[0] % multiple))
        outputs.append(in_fp8(padded, weight[expert].t())[: rows.shape[0]])
    rest = x.shape[0] - sum(sizes)
    return torch.cat([*outputs, x.new_zeros(rest, weight.shape[2])] if rest else outputs)
