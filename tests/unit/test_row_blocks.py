"""Operations that a CPU does block by block: the bits of the whole, whatever the blocks."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_hc.kernels import norm, row_blocks, swiglu
from megatron_hc.model import rope
from megatron_hc.model.rope import RopeTable, apply_rope

DTYPES = [torch.float32, torch.float64, torch.bfloat16]


def outputs_and_gradients(run: Callable[..., Tensor], leaves: Sequence[Tensor], grad: Tensor) -> list[Tensor]:
    fresh = [leaf.detach().requires_grad_() for leaf in leaves]
    y = run(*fresh)
    return [y, *torch.autograd.grad(y, fresh, grad)]


def assert_equal(found: list[Tensor], expected: list[Tensor]) -> None:
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(found, expected, strict=True))


@pytest.fixture(params=[64, 1000, 1 << 17])
def blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Numbers of a block."""
    small = lambda x, numbers=0, multiple=1: row_blocks.row_blocks(x, request.param, multiple)  # noqa: E731
    for module in (norm, swiglu, rope):
        monkeypatch.setattr(module, "row_blocks", small)
    return request.param


def test_rows() -> None:
    x = torch.empty(10, 3, 4)
    assert row_blocks.row_blocks(x, 24 // torch.get_num_threads()) == [slice(i, i + 2) for i in range(0, 10, 2)]
    assert row_blocks.row_blocks(x, 1, multiple=4) == [slice(0, 4), slice(4, 8), slice(8, 10)]
    assert row_blocks.row_blocks(x, 1 << 20) == [slice(0, 10)] == row_blocks.row_blocks(x.to("meta"), 1)
    assert row_blocks.row_blocks(x[:0]) == []


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(7, 16), (5, 2, 24), (33, 1, 3, 65), (1, 40), (0, 4)], ids=str)
@pytest.mark.parametrize("has_weight", [True, False])
def test_rms_norm_is_torch_s(blocks: int, shape: tuple[int, ...], has_weight: bool, dtype: torch.dtype) -> None:
    """Its gradients too, as autograd has them."""
    torch.manual_seed(0)
    x, grad, weight = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype), torch.rand(shape[-1]).to(dtype)
    leaves = [x, weight] if has_weight else [x]

    def expected(x: Tensor, weight: Tensor | None = None) -> Tensor:
        wide = norm.promote(dtype)
        return F.rms_norm(x.to(wide), shape[-1:], None if weight is None else weight.to(wide), 1e-5).to(dtype)

    def found(x: Tensor, weight: Tensor | None = None) -> Tensor:
        return norm.rms_norm(x, weight, 1e-5)

    assert_equal(outputs_and_gradients(found, leaves, grad), outputs_and_gradients(expected, leaves, grad))


@pytest.mark.parametrize("kind", ["RMSNorm", "LayerNorm"])
def test_a_norm_with_a_bias_is_rounded_once(kind: str) -> None:
    torch.manual_seed(0)
    x, weight, bias = torch.randn(9, 2, 24).bfloat16(), torch.rand(24), torch.randn(24)
    wide = x.double() - (x.double().mean(-1, keepdim=True) if kind == "LayerNorm" else 0)
    expected = wide / (wide.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double() + bias.double()
    assert torch.equal(norm.norm(x, kind, weight, bias, 1e-5), expected.bfloat16())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(70, 2, 24), (100, 6), (1, 2), (0, 8)], ids=str)
def test_swiglu_is_the_formula(blocks: int, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    h, grad = torch.randn(shape).to(dtype), torch.randn(*shape[:-1], shape[-1] // 2).to(dtype)

    def formula(h: Tensor) -> Tensor:
        gate, up = h[..., 0::2].contiguous(), h[..., 1::2]
        return F.silu(gate) * up

    assert_equal(outputs_and_gradients(swiglu.swiglu, [h], grad), outputs_and_gradients(formula, [h], grad))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 2], ids=["positions of all texts", "positions of each text"])
def test_rope_is_the_formula(blocks: int, rows: int, dtype: torch.dtype) -> None:
    """A part of every head's channels is turned; the gradient is the turn back."""
    torch.manual_seed(0)
    S, B, heads, H, turned = 37, 2, 3, 12, 8
    whole = torch.randn(S, B, heads, 2 * H).to(dtype)
    x, grad = whole[..., :H], torch.randn(S, B, heads, H).to(dtype)
    angles = (torch.rand(S, rows, 1, turned // 2, dtype=norm.promote(dtype)) * math.tau).repeat(1, 1, 1, 2)
    cos, sin = angles.cos(), angles.sin()

    def turn(x: Tensor, sign: int) -> Tensor:
        wide = x[..., :turned].to(cos.dtype)
        left, right = wide.chunk(2, dim=-1)
        other = torch.cat((-sign * right, sign * left), dim=-1)
        return torch.cat(((wide * cos + other * sin).to(dtype), x[..., turned:]), dim=-1)

    found = outputs_and_gradients(lambda x: apply_rope(x, RopeTable(cos, sin)), [x], grad)
    assert_equal(found, [turn(x, 1), turn(grad, -1)])
