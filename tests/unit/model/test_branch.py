"""Factors on outputs, what is left out, initial values by scheme, and the penalty on layers that change little."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import TRAINING, build, random_tokens, randomise, small_config
from torch import Tensor

from megatron_hc.config import ParallelConfig, TrainConfig
from megatron_hc.mesh import Mesh
from megatron_hc.model import branch
from megatron_hc.model.branch import branch_factors, scaled, with_linearity_penalty
from megatron_hc.model.gpt import GPT
from megatron_hc.optim import parameter_groups
from megatron_hc.parallel.stages import MicroBatch, Stage
from megatron_hc.residual import RESIDUALS, Carry

# What is left out


def test_factors_depend_on_seed_iteration_sample_and_sublayer_only() -> None:
    config = small_config({"stochastic_depth": 0.6, "layerdrop": 0.3}, num_layers=4)
    whole = branch_factors(config, 7, 3, [10, 11, 12, 13])
    assert whole is not None and whole.shape == (8, 4)
    parts = [branch_factors(config, 7, 3, samples) for samples in ([10], [11, 12], [13])]
    assert torch.equal(torch.cat(parts, 1), whole)  # type: ignore[arg-type]
    for other in (branch_factors(config, 8, 3, [10, 11, 12, 13]), branch_factors(config, 7, 4, [10, 11, 12, 13])):
        assert other is not None and not torch.equal(other, whole)
    assert branch_factors(small_config(), 7, 3, [10]) is None


def test_shares_of_what_is_left_out() -> None:
    """Standard error of a share of 4,000 samples: at most 0.008."""
    samples = range(4000)
    depth = branch_factors(small_config({"stochastic_depth": 0.6}), 1, 0, samples)
    layer = branch_factors(small_config({"layerdrop": 0.3}), 1, 0, samples)
    assert depth is not None and layer is not None
    chances = torch.arange(1, 7) * 0.1
    torch.testing.assert_close((depth == 0).double().mean(1), chances.double(), atol=0.03, rtol=0)
    torch.testing.assert_close(depth.amax(1), 1 / (1 - chances))
    torch.testing.assert_close((layer == 0).double().mean(1), torch.full((6,), 0.3).double(), atol=0.03, rtol=0)
    assert torch.equal(layer[0::2], layer[1::2]) and set(layer.unique().tolist()) == {0.0, 1.0}


def test_a_samples_factor_multiplies_that_of_the_depth() -> None:
    """In bf16 the product of both is wide, and the output is rounded once."""
    output, factors = torch.linspace(1, 2, 64).bfloat16().view(32, 1, 2).expand(32, 2, 2), torch.tensor([1 / 0.7, 0.0])
    expected = output.double() * 0.3 * factors.double()[:, None]
    assert scaled(output, 0.3, factors).equal(expected.bfloat16())
    torch.testing.assert_close(scaled(output.double(), 0.3, factors.double()), expected, rtol=1e-14, atol=0)


def stage_of(model: GPT) -> Stage:
    run = TrainConfig(model=model.config, training=TRAINING["fp64"], parallel=ParallelConfig())
    return Stage(model, 0, run.parallel.pipeline_layout(model.config.num_layers), run, Mesh())


def batch_of(tokens: Tensor, **options: Any) -> MicroBatch:
    weights = torch.linspace(0.5, 1.5, tokens.numel(), dtype=torch.float64).reshape(tokens.shape) / tokens.numel()
    return MicroBatch(tokens, tokens.roll(-1, 1), weights, **options)


@pytest.mark.parametrize("method", ["plain", "hyper", "orthogonal", "deep-delta", "attention"])
def test_a_sublayer_that_is_left_out_changes_nothing_any_more(method: str) -> None:
    """Without it in any sample the attention weights of layer 1 get no gradient; with one sample they do."""
    model, tokens = randomise(build(small_config({"residual_connection": method}))), random_tokens()
    factors = torch.ones(6, 2)
    factors[2] = 0
    weight = model.stage_layers()[1].attention.linear_proj.weight
    (loss,) = stage_of(model).forward(batch_of(tokens, branch_factors=factors), ())
    loss.backward()
    assert weight.grad.abs().max() == 0 and all(
        p.grad.isfinite().all() for p in model.parameters() if p.grad is not None
    )
    factors[2, 1] = 1
    (other,) = stage_of(model).forward(batch_of(tokens, branch_factors=factors), ())
    other.backward()
    assert weight.grad.abs().max() > 0 and other != loss


# Initial values


def test_output_matrices_by_streams() -> None:
    config = {"residual_connection": "hyper", "residual_streams": 4}
    usual = build(small_config(config), "fp32")
    smaller = build(small_config({**config, "output_init_by_streams": True}), "fp32")
    for (name, ours), theirs in zip(smaller.named_parameters(), usual.parameters(), strict=True):
        factor = 0.5 if name.endswith(("linear_proj.weight", "linear_fc2.weight")) else 1.0
        torch.testing.assert_close(ours, factor * theirs, msg=name)


def parts_of(model: GPT) -> dict[str, Tensor]:
    layer = model.stage_layers()[1]
    found = {
        **layer.attention.qkv_parts.split(layer.attention.linear_qkv.weight),
        "proj": layer.attention.linear_proj.weight,
    }
    gate_up = layer.mlp.linear_fc1.parts.split(layer.mlp.linear_fc1.weight)
    return {
        name: weight.detach().double()
        for name, weight in {**found, **gate_up, "fc2": layer.mlp.linear_fc2.weight}.items()
    }


SIZE = {"hidden_size": 64, "ffn_hidden_size": 96, "num_layers": 3}


def test_orthogonal_matrices() -> None:
    """Rows, or columns where there are fewer, are orthonormal; those of outputs have the length 1 / sqrt(2 L)."""
    for name, weight in parts_of(build(small_config(init_scheme="orthogonal", **SIZE), "fp32")).items():
        short = weight if weight.shape[0] <= weight.shape[1] else weight.t()
        scale = 1 / 6 if name in ("proj", "fc2") else 1.0
        torch.testing.assert_close(
            short @ short.t(), scale * torch.eye(len(short)).double(), atol=1e-6, rtol=0, msg=name
        )


def test_fixup_and_t_fixup() -> None:
    normal = parts_of(build(small_config(**SIZE), "fp32"))
    fixup = parts_of(build(small_config(init_scheme="fixup", norm_placement="none", **SIZE), "fp32"))
    t_fixup_model = build(small_config(init_scheme="t-fixup", norm_placement="none", **SIZE), "fp32")
    t_fixup = parts_of(t_fixup_model)
    usual = {name: 0.3 / (math.sqrt(6) if name in ("proj", "fc2") else 1) for name in normal}
    for name, weight in normal.items():
        expected = torch.zeros_like(weight) if name in ("proj", "fc2") else weight / math.sqrt(6)
        torch.testing.assert_close(fixup[name], expected, msg=name)
        xavier = math.sqrt(2 / sum(weight.shape))
        std = xavier * (math.sqrt(0.5) if name in ("q", "k") else 0.67 * 3**-0.25)
        torch.testing.assert_close(t_fixup[name], weight / usual[name] * std, msg=name)
    table = build(small_config(**SIZE), "fp32").embedding.weight
    torch.testing.assert_close(t_fixup_model.embedding.weight, table / 0.3 * 27**-0.25 / 8)


# Depth


@pytest.mark.parametrize("scale", ["depth-mup", "completep"])
def test_a_model_of_the_base_depth_is_the_plain_one(scale: str) -> None:
    plain = build(small_config())
    scaled = build(small_config({"residual_scale": scale, "base_num_layers": 3}))
    assert torch.equal(plain(random_tokens()), scaled(random_tokens()))
    groups = parameter_groups(scaled, scaled.config)
    assert {(group["lr_mult"], group["eps_mult"]) for group in groups} == {(1.0, 1.0)}


@pytest.mark.parametrize(("scale", "lr", "eps"), [("depth-mup", 0.5, 0.5), ("completep", 1.0, 0.25)])
def test_rules_at_four_times_the_base_depth(scale: str, lr: float, eps: float) -> None:
    """CompleteP, table 1: learning rate m^(a - 1), epsilon m^-a of what is in layers; initial values as at the base."""
    model = build(small_config({"residual_scale": scale, "base_num_layers": 1}, num_layers=4))
    assert model.config.branch_scale == (0.5 if scale == "depth-mup" else 0.25)
    names = {group["params"][0][0]: group for group in parameter_groups(model, model.config)}
    seen = set()
    for group in names.values():
        for name, _ in group["params"]:
            inside = name.startswith("layers.")
            assert (group["lr_mult"], group["eps_mult"]) == ((lr, eps) if inside else (1.0, 1.0)), name
            seen.add(inside)
    assert seen == {True, False}
    base = build(small_config(num_layers=1)).stage_layers()[0].mlp.linear_fc2.weight
    assert torch.equal(model.stage_layers()[0].mlp.linear_fc2.weight, base)


# Linearity


@pytest.mark.parametrize("method", list(RESIDUALS))
def test_linearity_penalty_is_in_the_gradient(method: str) -> None:
    """Gradients of the penalised model are those of loss + c sum_l sum_t w (1 - cos(h_l, h_(l+1))), by autograd."""
    changes: dict[str, Any] = {"residual_connection": method}
    model = randomise(build(small_config({**changes, "linearity_regularization": 0.7})))
    tokens = random_tokens()
    batch = batch_of(tokens)
    (loss,) = stage_of(model).forward(batch, ())
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)

    positions = torch.arange(tokens.shape[1]).unsqueeze(0)
    carry, states, context = model.open(tokens, positions), [], model.context(positions, None)
    for layer in model.stage_layers():
        states.append(layer.attention_residual.state(carry))
        carry = layer(carry, context)
    states.append(model.final_residual.state(carry))
    total = model.output.loss(model.close(carry), batch.labels, batch.weights)
    assert torch.equal(total, loss)
    for before, after in zip(states, states[1:], strict=False):
        cosine = (before * after).sum(-1) / (before.norm(dim=-1) * after.norm(dim=-1))
        total = total + 0.7 * (batch.weights.t() * (1 - cosine)).sum()
    total.backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(found[name], parameter.grad, rtol=1e-9, atol=1e-12, msg=name)


def test_the_penalty_of_bf16_states_is_wide(monkeypatch: pytest.MonkeyPatch) -> None:
    """States of neighbouring layers are nearly parallel: 1 - cosine of numbers with 8 bits would be mostly rounding."""
    penalties: list[Tensor] = []
    monkeypatch.setattr(branch, "attach_loss", lambda x, penalty: penalties.append(penalty) or x)
    torch.manual_seed(0)
    before = torch.randn(5, 2, 16)
    before, after = before.bfloat16(), (before + 0.05 * torch.randn(5, 2, 16)).bfloat16()
    weights, residual = torch.rand(5, 2), SimpleNamespace(state=lambda carry: carry.stream)
    with_linearity_penalty(Carry(stream=after), residual, before, weights)  # type: ignore[arg-type]
    cosine = F.cosine_similarity(before.double(), after.double(), dim=-1)
    torch.testing.assert_close(penalties[0].double(), (weights * (1 - cosine)).sum(), rtol=1e-3, atol=0)


def test_no_penalty_without_gradients() -> None:
    model = build(small_config({"linearity_regularization": 0.7}))
    with torch.no_grad():
        (loss,) = stage_of(model).forward(batch_of(random_tokens()), ())
    (plain,) = stage_of(build(small_config())).forward(batch_of(random_tokens()), ())
    assert torch.equal(loss, plain)
