"""Parameter groups, AdamW and clipping."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from megatron_hc.optim import adamw_step, clip_coefficient, grad_norm_squared, num_zeros, parameter_groups


class Mixer(nn.Module):
    """Stands for a residual: decides about its own parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.static = nn.Parameter(torch.zeros(4, 4))
        self.dynamic = nn.Parameter(torch.zeros(4, 8))
        self.scale = nn.Parameter(torch.zeros(1))

    def weight_decay(self, name: str) -> bool:
        return name == "dynamic"


class Table(nn.Module):
    is_embedding = True

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(9, 8))


def small_model() -> nn.Module:
    model = nn.Module()
    model.embedding, model.positions = nn.Embedding(16, 8), Table()
    model.norm, model.up, model.mixer = nn.LayerNorm(8), nn.Linear(8, 16), Mixer()
    model.output = nn.Linear(8, 16, bias=False)
    model.output.weight = model.embedding.weight
    model.frozen = nn.Parameter(torch.zeros(3, 3), requires_grad=False)
    model.head_bias = nn.Parameter(torch.zeros(2, 4))
    return model


def test_groups() -> None:
    groups = parameter_groups(small_model())
    found = {(g["kind"], g["weight_decay"], g["lr_mult"]): [name for name, _ in g["params"]] for g in groups}
    assert found == {
        ("embedding", True, 1.0): ["embedding.weight", "positions.weight"],
        ("vector", False, 1.0): ["head_bias", "norm.weight", "norm.bias", "up.bias"],
        ("matrix", True, 1.0): ["up.weight"],
        ("residual", False, 1.0): ["mixer.static", "mixer.scale"],
        ("residual", True, 1.0): ["mixer.dynamic"],
    }
    model = small_model()
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    flat = [name for group in parameter_groups(model) for name, _ in group["params"]]
    assert sorted(flat) == sorted(names) and "output.weight" not in flat
    for group in parameter_groups(model):
        positions = [names.index(name) for name, _ in group["params"]]
        assert positions == sorted(positions)
        assert all(dict(model.named_parameters())[name] is parameter for name, parameter in group["params"])


def tensors(seed: int, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=dtype) for shape in ((7, 5), (1,), (129,), (64, 33))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("fused", [True, False])
def test_adamw_equals_torch(dtype: torch.dtype, fused: bool) -> None:
    """Bit for bit with the fused kernel; to rounding with torch's plain loop."""
    ours, theirs = tensors(0, dtype), [nn.Parameter(tensor) for tensor in tensors(0, dtype)]
    first, second = [torch.zeros_like(t) for t in ours], [torch.zeros_like(t) for t in ours]
    optimizer = torch.optim.AdamW(theirs, lr=0.1, fused=fused, foreach=False, betas=(0.8, 0.95), eps=1e-6)
    for step in range(1, 6):
        lr, decay = 0.1 / step, 0.1 * step
        for parameter, grad in zip(theirs, tensors(step, dtype), strict=True):
            parameter.grad = grad
        optimizer.param_groups[0].update(lr=lr, weight_decay=decay)
        optimizer.step()
        adamw_step(
            ours, tensors(step, dtype), first, second, step=step, lr=lr, betas=(0.8, 0.95), eps=1e-6, weight_decay=decay
        )
    for i, parameter in enumerate(theirs):
        state = optimizer.state[parameter]
        pairs = ((ours[i], parameter.detach()), (first[i], state["exp_avg"]), (second[i], state["exp_avg_sq"]))
        for mine, reference in pairs:
            if fused:
                assert torch.equal(mine, reference)
            else:
                torch.testing.assert_close(mine, reference, rtol=1e-5 if dtype == torch.float32 else 1e-13, atol=1e-7)


def test_adamw_starts_anywhere_and_repeats_bit_for_bit() -> None:
    """A step from restored state is the step that would have followed."""

    def run(stop: int) -> list[Tensor]:
        weights = tensors(0, torch.float32)
        state = [[torch.zeros_like(t) for t in weights] for _ in range(2)]
        for step in range(1, 7):
            if step == stop:  # through a checkpoint
                weights, state = [w.clone() for w in weights], [[t.clone() for t in kind] for kind in state]
            grads = tensors(step, torch.float32)
            adamw_step(weights, grads, *state, step=step, lr=0.01, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1)
        return weights

    assert all(torch.equal(a, b) for a, b in zip(run(0), run(4), strict=True))


def test_adamw_leaves_gradients_and_takes_empty_lists() -> None:
    weights, grads = tensors(0, torch.float32), tensors(1, torch.float32)
    state = [[torch.zeros_like(t) for t in weights] for _ in range(2)]
    adamw_step(weights, grads, *state, step=1, lr=0.01, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.0)
    assert all(torch.equal(a, b) for a, b in zip(grads, tensors(1, torch.float32), strict=True))
    adamw_step([], [], [], [], step=1, lr=0.01, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.0)


@pytest.mark.parametrize("dtype, rel", [(torch.float32, 1e-6), (torch.float64, 1e-14)])
def test_norm(dtype: torch.dtype, rel: float) -> None:
    grads = tensors(3, dtype)
    flat = torch.cat([grad.flatten() for grad in grads]).double()
    squared = grad_norm_squared(grads)
    assert squared.dtype == dtype and squared.ndim == 0
    assert float(squared) == pytest.approx(float(flat.square().sum()), rel=rel)


def test_norm_of_bf16_is_summed_in_fp32() -> None:
    ones = torch.ones(4096, dtype=torch.bfloat16)
    squared = grad_norm_squared([ones, torch.ones(1)])
    assert squared.dtype == torch.float32 and float(squared) == pytest.approx(4097.0, rel=1e-6)
    assert float(grad_norm_squared([])) == 0.0
    assert grad_norm_squared([torch.ones(1), torch.ones(1, dtype=torch.float64)]).dtype == torch.float64
    large = torch.randn(3 * 2**14, generator=torch.Generator().manual_seed(0)).bfloat16()
    both = [large, large[:9000]]  # more than a row of a CPU's, and less
    wanted = sum(float(numbers.double().square().sum()) for numbers in both)
    assert float(grad_norm_squared(both)) == pytest.approx(wanted, rel=2e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norm_of_many_equal_numbers(dtype: torch.dtype) -> None:
    """A sum that grows by the same small term: where fp32 rounds each time it lost 0.4 % here."""
    value = torch.tensor(0.013, dtype=dtype)
    large = value.expand(2048, 2048).contiguous()
    rest = large.flatten()[: 2**15 + 7]
    squared = grad_norm_squared([large, large.t(), rest, rest[:7]])  # the second is not in one piece
    assert float(squared) == pytest.approx((2 * 2**22 + 2**15 + 14) * float(value) ** 2, rel=2e-5)
    assert float(grad_norm_squared([rest])) == pytest.approx((2**15 + 7) * float(value) ** 2, rel=2e-5)


def test_num_zeros() -> None:
    assert num_zeros([torch.tensor([0.0, 1.0, -0.0]), torch.zeros(2, 2), torch.ones(3)]) == 6


def test_clip_coefficient_is_that_of_torch() -> None:
    for scale in (0.01, 0.08, 1.0, 50.0):  # norms of 0.09, 0.7, 9 and 450
        parameter = nn.Parameter(torch.zeros(64, dtype=torch.float64))
        parameter.grad = torch.randn(64, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * scale
        mine = parameter.grad * clip_coefficient(float(grad_norm_squared([parameter.grad]) ** 0.5), 1.0)
        torch.nn.utils.clip_grad_norm_([parameter], 1.0)
        torch.testing.assert_close(mine, parameter.grad, rtol=1e-14, atol=0)
    assert clip_coefficient(1e9, 0.0) == 1.0
    assert math.isnan(clip_coefficient(math.nan, 1.0)) and clip_coefficient(math.inf, 1.0) == 0.0
