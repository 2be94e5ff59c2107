"""DenseFormer and attention residuals: what is particular to them; what every method owes is in test_registry.py."""

from __future__ import annotations

import pytest
import torch
from helpers import build, random_tokens, randomise, small_config
from torch import Tensor

from megatron_hc.kernels.depth import key_scores, key_scores_reference, weighted_sum, weighted_sum_reference
from megatron_hc.model.gpt import GPT
from megatron_hc.residual import Carry, Residual
from megatron_hc.residual.depth import DenseFormer

C = 16


def states(count: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randn(5, 2, 1, C, generator=generator, dtype=torch.float64) for _ in range(count)]
    return [state.to(dtype).requires_grad_() for state in drawn]


# Kernels


@pytest.mark.parametrize("shape", [(5, 2, 4, 3), (5, 2, 1, 3), (1, 3), (4, 3)])
def test_weighted_sum_equals_its_reference(shape: tuple[int, ...]) -> None:
    weights = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).requires_grad_()
    sources = states(3)
    assert torch.autograd.gradcheck(lambda w, *s: weighted_sum(w, s), (weights, *sources))
    torch.testing.assert_close(weighted_sum(weights, sources), weighted_sum_reference(weights, sources))


def test_a_sum_of_bf16_states_is_rounded_once() -> None:
    """And the weights' gradients not at all."""
    sources, weights = states(5, torch.bfloat16), torch.rand(3, 5, generator=torch.Generator().manual_seed(1))
    weights.requires_grad_()
    wide = [tensor.detach().double().requires_grad_() for tensor in (weights, *sources)]
    found, expected = weighted_sum(weights, sources), weighted_sum_reference(wide[0], wide[1:])
    assert found.equal(expected.bfloat16())
    grad = torch.randn(expected.shape, generator=torch.Generator().manual_seed(2)).bfloat16()
    of_weights, *of_states = torch.autograd.grad(found, (weights, *sources), grad)
    wanted, *others = torch.autograd.grad(expected, wide, grad.double())
    torch.testing.assert_close(of_weights, wanted.float(), rtol=1e-5, atol=1e-5)
    assert all(one.equal(other.bfloat16()) for one, other in zip(of_states, others, strict=True))


def test_key_scores_equal_their_reference() -> None:
    query = torch.randn(C, generator=torch.Generator().manual_seed(1), dtype=torch.float64).requires_grad_()
    sources = states(3)
    assert torch.autograd.gradcheck(lambda q, *s: key_scores(q, s, 0.1), (query, *sources))
    torch.testing.assert_close(key_scores(query, sources, 0.1), key_scores_reference(query, sources, 0.1))


def test_nothing_wide_is_kept_for_the_backward_pass() -> None:
    """By autograd each sublayer would keep an fp32 copy of every state."""
    sources, kept = states(3, torch.bfloat16), []
    weights = torch.ones(5, 2, 1, 3, requires_grad=True)
    query = torch.ones(C, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        weighted_sum(weights, sources)
        key_scores(query, sources, 1e-5)
    assert {t.data_ptr() for t in kept} <= {t.data_ptr() for t in (*sources, weights, query)}


def test_a_state_without_gradient_gets_none() -> None:
    first, second = (state.detach() for state in states(2))
    second.requires_grad_()
    weighted_sum(torch.ones(1, 2, dtype=torch.float64), (first, second)).sum().backward()
    key_scores(torch.ones(C, dtype=torch.float64), (first, second), 1e-5).sum().backward()
    assert first.grad is None and second.grad is not None


# DenseFormer


def carries(model: GPT) -> list[Carry]:
    """The settled carry into every layer, and into the final read."""
    tokens, positions = random_tokens(), torch.arange(8).unsqueeze(0)
    context, carry = model.context(positions, None), model.open(tokens, positions)
    found = [carry]
    for layer in model.stage_layers():
        carry = layer(carry, context)
        found.append(model.final_residual.settle(carry))
    return found


@pytest.mark.parametrize(
    "dilation,period,kept,averaged",
    [
        (1, 1, [0, 1, 2, 3, 4], {1: 2, 2: 3, 3: 4, 4: 5}),
        (1, 2, [0, 1, 2, 3, 4], {2: 3, 4: 5}),
        (2, 2, [0, 1, 1, 2, 2], {2: 2, 4: 3}),
        (2, 1, [0, 1, 2, 3, 2], {1: 1, 2: 2, 3: 2, 4: 3}),
        (3, 4, [0, 0, 1, 1, 1], {4: 2}),
    ],
)
def test_denseformer_keeps_what_is_averaged_later(
    dilation: int, period: int, kept: list[int], averaged: dict[int, int]
) -> None:
    """History at each of the 5 entrances of 4 layers, and the number of states averaged where any are."""
    residual = {"residual_connection": "denseformer", "denseformer_dilation": dilation, "denseformer_period": period}
    model = randomise(build(small_config(residual, num_layers=4)))
    assert [len(carry.history) for carry in carries(model)] == kept
    entrances = [*(layer.attention_residual for layer in model.stage_layers()), model.final_residual]
    alphas = {i: r.alpha.numel() for i, r in enumerate(entrances) if r.alpha is not None}
    assert alphas == averaged


def test_dilation_of_one_and_the_right_zeros_are_any_dilation() -> None:
    """k = 2, p = 3 is k = p = 1 with one-hot averages elsewhere and zeros at odd distances."""
    sparse = {"residual_connection": "denseformer", "denseformer_dilation": 2, "denseformer_period": 3}
    model = randomise(build(small_config(sparse, num_layers=4)))
    dense = build(small_config({"residual_connection": "denseformer"}, num_layers=4))
    values = {**dense.state_dict(), **{n: p for n, p in model.state_dict().items() if not n.endswith(".alpha")}}
    alpha = model.state_dict()["layers.3.attention_residual.alpha"]  # of X_1 and X_3
    values["layers.3.attention_residual.alpha"] = torch.stack([alpha[0] * 0, alpha[0], alpha[0] * 0, alpha[1]])
    dense.load_state_dict(values)
    tokens = random_tokens()
    torch.testing.assert_close(model(tokens), dense(tokens), rtol=1e-12, atol=1e-12)


def test_denseformer_parameter_count() -> None:
    model = build(small_config({"residual_connection": "denseformer"}, num_layers=5))
    assert sum(p.numel() for m in model.modules() if isinstance(m, DenseFormer) for p in m.parameters()) == 5 * 8 // 2


# Attention residuals


@pytest.mark.parametrize(
    "size,history", [(0, [0, 2, 4, 6, 8]), (1, [0, 2, 4, 6, 8]), (3, [0, 1, 2, 2, 3]), (9, [0, 1, 1, 1, 1])]
)
def test_attention_residual_sources(size: int, history: list[int]) -> None:
    """ceil(2 l / S) sources before the newest one at the entrance of each layer, and at the final read."""
    residual = {"residual_connection": "attention", "attention_residual_block_size": size}
    model = randomise(build(small_config(residual, num_layers=4)))
    assert [len(carry.history) for carry in carries(model)] == history
    assert [len(model.final_residual.boundary(layer)) - 1 for layer in range(5)] == history


def test_a_block_is_the_sum_of_its_outputs() -> None:
    """Reads that ignore the sources' weights: the sum of all sources is the pre-norm stream at any block size."""
    totals = []
    for size in (1, 2, 3, 8):
        config = small_config({"residual_connection": "attention", "attention_residual_block_size": size})
        residuals = [m for m in build(config).modules() if isinstance(m, Residual) and m.site.is_sublayer]
        hidden = torch.randn(3, 2, C, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        carry = residuals[0].open(hidden)
        for k, residual in enumerate(residuals):
            _, carry = residual.mixed(residual.settle(carry))
            carry = residual.write(carry, torch.full_like(hidden, 2.0**k))
        carry = residuals[0].settle(carry)
        totals.append(sum((*carry.history, carry.stream)) - hidden.unsqueeze(2))
    assert all(total.sub(2.0**6 - 1).abs().max() < 1e-12 for total in totals)


def test_a_large_query_picks_one_source() -> None:
    model = build(small_config({"residual_connection": "attention"}))
    residual = model.stage_layers()[1].mlp_residual
    sources = [s.detach() for s in states(4)]
    with torch.no_grad():
        residual.query.copy_(1e4 * sources[1][0, 0, 0])
        x, _ = residual.mixed(Carry(stream=sources[3], history=tuple(sources[:3])))
    torch.testing.assert_close(x[0, 0], sources[1][0, 0, 0])


def test_attention_residual_parameter_count() -> None:
    plain = sum(p.numel() for p in build(small_config()).parameters())
    model = build(small_config({"residual_connection": "attention"}))
    assert sum(p.numel() for p in model.parameters()) - plain == 4 * 3 * C


@pytest.mark.parametrize(
    "residual,message",
    [
        ({"attention_residual_block_size": -1}, "--attention-residual-block-size must not be negative, not -1"),
        ({"attention_residual_block_size": 2}, r"--attention-residual-block-size \(2\) needs .* attention, not plain"),
        ({"denseformer_period": 0}, "--denseformer-period must be positive, not 0"),
        ({"denseformer_dilation": 2}, r"--denseformer-dilation \(2\) needs --residual-connection denseformer"),
        (
            {"residual_connection": "denseformer", "denseformer_period": 4},
            r"--denseformer-period \(4\) must not exceed --num-layers \(3\)",
        ),
        ({"residual_connection": "denseformer", "residual_streams": 2}, r"--residual-streams \(2\) needs"),
    ],
)
def test_refusals(residual: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small_config(residual)
