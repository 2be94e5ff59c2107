"""bf16 models on as many tokens as a batch has: sums over tokens must not be rounded term by term."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import VOCAB, build, gradients, randomise, small_config
from torch import Tensor

from megatron_hc.config import MoEConfig
from megatron_hc.model.experts import Experts, arrange, combine, dispatch
from megatron_hc.model.gpt import GPT
from megatron_hc.model.router import Router, routers_of
from megatron_hc.parallel.tensor import Region, VocabParallelTable, become

GPT_2 = {"normalization": "LayerNorm", "swiglu": False, "disable_bias_linear": False}
MODELS: dict[str, dict[str, Any]] = {
    "tied": {},
    "untied": {"untie_embeddings_and_output_weights": True},
    "learned positions, biases": {"position_embedding_type": "learned_absolute", **GPT_2},
    "experts with biases": {"moe": MoEConfig(num_experts=4), "disable_bias_linear": False},
    "experts with biases, a loop": {"moe": MoEConfig(num_experts=4, moe_grouped_gemm=False), **GPT_2},
}


def frequent_tokens() -> Tensor:
    """[8, 256] with one token that is a third of them, as spaces are in text."""
    chances = torch.full((VOCAB,), 1.0)
    chances[0] = VOCAB / 2
    return torch.multinomial(chances, 8 * 256, replacement=True, generator=torch.Generator().manual_seed(1)).view(
        8, 256
    )


def narrow_and_wide(changes: dict[str, Any]) -> tuple[GPT, GPT]:
    """A bf16 model, and one of float64 with its weights and its choices of experts."""
    config = small_config(num_layers=1, hidden_size=32, seq_length=256, init_method_std=0.1, **changes)
    narrow, wide = (randomise(build(config, precision), scale=0.1) for precision in ("bf16", "fp64"))
    wide.load_state_dict({name: value.double() for name, value in narrow.state_dict().items()})
    for ours, theirs in zip(routers_of([narrow]), routers_of([wide]), strict=True):
        repeat_choices(ours, theirs)
    return narrow, wide


def repeat_choices(ours: Router, theirs: Router) -> None:
    """``theirs``, which runs after ``ours``, sends tokens where that did, though logits differ by a rounding."""
    choose, choices = ours.choose, []

    def chosen(logits: Tensor) -> Tensor:
        choices.append(choose(logits))
        return choices[-1]

    ours.choose, theirs.choose = chosen, lambda logits: choices[-1]  # type: ignore[method-assign]


@pytest.mark.parametrize("changes", MODELS.values(), ids=MODELS)
def test_every_gradient_of_many_tokens(changes: dict[str, Any]) -> None:
    """To a few roundings of bf16; a sum that is rounded at each token is 6 % off here and more."""
    tokens = frequent_tokens()
    (loss, found), (expected_loss, expected) = (gradients(model, tokens) for model in narrow_and_wide(changes))
    assert abs(loss - expected_loss) < 2e-3 * expected_loss
    errors = {name: ((found[name].double() - g).norm() / g.norm()).item() for name, g in expected.items()}
    assert max(errors.values()) < 0.02, errors


def test_positions_that_start_again_and_a_part_of_the_vocabulary() -> None:
    """Tables whose rows come often, in the ways that only some runs look them up."""
    model, _ = narrow_and_wide({"position_embedding_type": "learned_absolute", **GPT_2})
    tokens = frequent_tokens()
    become(model.embedding, VocabParallelTable, region=Region(None, sequence_parallel=False))
    for table, look_up in (
        (model.embedding, model.embedding.embed),
        (model.position_embedding, model.position_embedding),
    ):
        rows = look_up(tokens)
        grad = torch.rand(rows.shape, generator=torch.Generator().manual_seed(2)).to(rows.dtype)
        (found,) = torch.autograd.grad(rows, table.weight, grad)
        expected = torch.zeros(table.weight.shape, dtype=torch.float64)
        expected.index_add_(0, tokens.t().flatten(), grad.double().flatten(0, 1))
        torch.testing.assert_close(found, expected.to(found.dtype), rtol=1e-2, atol=0)


def test_what_nobodys_rows_hold_reaches_no_bias() -> None:
    model, _ = narrow_and_wide(MODELS["experts with biases"])
    matrix = model.stage_layers()[0].mlp.experts.linear_fc1
    rows = matrix.bias_of_rows(torch.tensor([2, 0, 1, 3]), 8)
    grad = torch.ones(rows.shape, dtype=rows.dtype)
    grad[6:] = torch.nan
    assert not rows[6:].any()
    found = torch.autograd.grad(rows, matrix.bias, grad)[0].unflatten(0, (4, -1))
    assert found.equal(torch.tensor([2, 0, 1, 3]).to(found.dtype).unsqueeze(1).expand_as(found))


@pytest.mark.parametrize("kept", [None, torch.ones(32, 4, dtype=torch.bool)], ids=["all", "kept"])
def test_a_token_s_experts_are_added_wide(kept: Tensor | None) -> None:
    torch.manual_seed(0)
    chosen = torch.rand(32, 8).argsort(1)[:, :4]
    rows = arrange(chosen, kept, 8)
    y = torch.randn(32 * 4, 16).bfloat16()
    expected = y.double()[rows.places].unflatten(0, (32, 4)).sum(1).bfloat16()
    x = torch.randn(32, 16).bfloat16().requires_grad_()
    assert combine(y, rows, 4).equal(expected)
    assert torch.autograd.grad(dispatch(x, rows, 4), x, y)[0].equal(expected)


def test_an_expert_s_row_is_weighted_wide() -> None:
    config = small_config(moe=MoEConfig(num_experts=2), swiglu=False)
    experts = Experts(config).bfloat16()
    experts.grouped = lambda x, matrix, counts: x  # type: ignore[method-assign]
    x, weights = torch.randn(64, 16).bfloat16(), torch.rand(64)
    expected = F.gelu(x).double() * weights.double().unsqueeze(1)
    assert experts(x, weights, torch.tensor([32, 32])).equal(expected.bfloat16())
