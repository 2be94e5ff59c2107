"""SwiGLU as one operation against autograd."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron_hc.kernels.swiglu import swiglu, swiglu_reference


def both(h: Tensor, grad: Tensor) -> list[tuple[Tensor, Tensor]]:
    """(result, gradient) of the operation and of the reference."""
    found = []
    for function in (swiglu, swiglu_reference):
        leaf = h.clone(memory_format=torch.preserve_format).requires_grad_()
        result = function(leaf)
        found.append((result.detach(), *torch.autograd.grad(result, leaf, grad)))
    return found


@pytest.mark.parametrize("shape", [(1, 1, 2), (5, 3, 14), (0, 6), (64, 2, 344)])
@pytest.mark.parametrize("dtype,ulp", [(torch.float64, 2**-52), (torch.float32, 2**-23), (torch.bfloat16, 2**-7)])
def test_equals_autograd(shape: tuple[int, ...], dtype: torch.dtype, ulp: float) -> None:
    """A few roundings, in which the vectorised exponential may differ from the one of single numbers."""
    draw = torch.Generator().manual_seed(0)
    h = (3 * torch.randn(shape, generator=draw, dtype=torch.float64)).to(dtype)
    grad = torch.randn(*shape[:-1], shape[-1] // 2, generator=draw, dtype=torch.float64).to(dtype)
    ours, expected = both(h, grad)
    for mine, right in zip(ours, expected, strict=True):
        torch.testing.assert_close(mine, right, rtol=4 * ulp, atol=4 * ulp)


def test_keeps_its_input_alone() -> None:
    h, kept = torch.randn(5, 8, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.untyped_storage().data_ptr()), lambda t: t):
        swiglu(h)
    assert kept == [h.untyped_storage().data_ptr()]


def test_of_what_does_not_lie_in_a_row() -> None:
    h, grad = torch.randn(6, 5, dtype=torch.float64).t(), torch.randn(5, 3, dtype=torch.float64)
    ours, expected = both(h, grad)
    for mine, right in zip(ours, expected, strict=True):
        torch.testing.assert_close(mine, right, rtol=1e-14, atol=1e-14)
