"""Fused kernels of other packages for AdamW's update, in ``adamw_step``'s place (--optimizer-impl).

The update is the same (decoupled decay of the weight before the update, epsilon added after the bias correction), in
another order of rounding: weights differ from ``adamw_step``'s by a few ulp of fp32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from megatron_hc.optim.adamw import adamw_step
from megatron_hc.packages import first_line, load


class AdamUpdate(Protocol):
    """What ``adamw_step`` is."""

    def __call__(
        self,
        master: Sequence[Tensor],
        grad: Sequence[Tensor],
        exp_avg: Sequence[Tensor],
        exp_avg_sq: Sequence[Tensor],
        *,
        step: int,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
    ) -> None: ...


def adam_update(impl: str, device: torch.device) -> AdamUpdate:
    """The update of --optimizer-impl for masters and moments on ``device``; ``ValueError`` where it cannot be had."""
    flag = f"--optimizer-impl {impl}"
    if impl == "torch":
        return adamw_step
    if impl == "apex":
        apply, kernels = load("apex", flag, "apex.multi_tensor_apply", "amp_C")
        return MultiTensorAdam(apply.multi_tensor_applier, kernels.multi_tensor_adam, device)
    if impl == "transformer_engine":
        (optimizers,) = load("transformer-engine", flag, "transformer_engine.pytorch.optimizers")
        return MultiTensorAdam(optimizers.multi_tensor_applier, optimizers.multi_tensor_adam, device)
    assert impl == "deepspeed", impl
    return _deepspeed(flag, device)


def _deepspeed(flag: str, device: torch.device) -> AdamUpdate:
    """DeepSpeed compiles its kernels when they are first loaded."""
    adam, builder = load("deepspeed", flag, "deepspeed.ops.adam", "deepspeed.ops.op_builder")
    try:
        if device.type == "cpu":
            return CpuAdam(adam.DeepSpeedCPUAdam([torch.nn.Parameter(torch.zeros(1))], adamw_mode=True))
        (apply,) = load("deepspeed", flag, "deepspeed.ops.adam.multi_tensor_apply")
        kernel = builder.FusedAdamBuilder().load().multi_tensor_adam
        return MultiTensorAdam(apply.MultiTensorApply(2048 * 32), kernel, device)
    except (RuntimeError, OSError, ImportError, AttributeError) as error:
        cause = error.__cause__ or error
        raise ValueError(
            f"{flag} needs DeepSpeed's kernel for {device.type}, which did not compile ({first_line(cause)}): "
            "install a C++ compiler (for a GPU nvcc too) and ninja, or use --optimizer-impl torch"
        ) from error


class MultiTensorAdam:
    """The CUDA kernel that apex, transformer-engine and DeepSpeed share: all tensors of a list in a few launches.

    apply: calls a kernel on lists of tensors, as apex's ``multi_tensor_applier``.
    """

    def __init__(self, apply: Callable[..., Any], kernel: Callable[..., Any], device: torch.device) -> None:
        self.apply, self.kernel = apply, kernel
        self.skips = torch.zeros(1, dtype=torch.int, device=device)
        """Told by the kernel's caller to skip a step whose gradients overflowed; here such a step is never made."""

    def __call__(
        self,
        master: Sequence[Tensor],
        grad: Sequence[Tensor],
        exp_avg: Sequence[Tensor],
        exp_avg_sq: Sequence[Tensor],
        *,
        step: int,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
    ) -> None:
        if not master:
            return
        decouples_decay, corrects_bias = 1, 1
        lists = [list(grad), list(master), list(exp_avg), list(exp_avg_sq)]
        numbers = (lr, *betas, eps, step, decouples_decay, corrects_bias, weight_decay)
        self.apply(self.kernel, self.skips, lists, *numbers)


class CpuAdam:
    """DeepSpeed's vectorised kernel for optimizer state in CPU memory, several times as fast as a loop."""

    def __init__(self, holder: Any) -> None:
        """``holder``: a ``DeepSpeedCPUAdam``, which owns the compiled object."""
        self.holder = holder

    def __call__(
        self,
        master: Sequence[Tensor],
        grad: Sequence[Tensor],
        exp_avg: Sequence[Tensor],
        exp_avg_sq: Sequence[Tensor],
        *,
        step: int,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
    ) -> None:
        kernel, number = self.holder.ds_opt_adam, self.holder.opt_id
        for weight, gradient, first, second in zip(master, grad, exp_avg, exp_avg_sq, strict=True):
            assert weight.is_contiguous(), "the kernel would update a copy"
            kernel.adam_update(
                number, step, lr, *betas, eps, weight_decay, True, weight, gradient.contiguous(), first, second
            )
