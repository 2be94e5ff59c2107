"""The plain residual against a pre-norm Llama-like decoder written by hand on the same merged projections.

Dims: S sequence, B batch, C hidden size, Q query heads, G key/value heads, H head width.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    SMALL,
    VOCAB,
    assert_same_bits,
    build,
    full_recompute,
    gradients,
    random_tokens,
    randomise,
    selective_recompute,
    small_config,
)
from torch import Tensor, nn
from torch.nn.attention import SDPBackend

from megatron_hc.config import ModelConfig, MoEConfig, ParallelConfig
from megatron_hc.model import attention
from megatron_hc.model.attention import Attention
from megatron_hc.model.dropout import Dropout
from megatron_hc.model.gpt import GPT
from megatron_hc.model.rope import RopeTable, apply_rope, inverse_frequencies


def llama(weights: dict[str, Tensor], config: ModelConfig, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
    """tokens [B, S] -> logits [S, B, vocabulary with padding]."""
    S, (C, H, G) = tokens.shape[1], (config.hidden_size, config.head_size, config.num_kv_heads)
    per_group = config.num_attention_heads // G
    frequencies = 1.0 / config.rotary_base ** (torch.arange(0, H, 2, dtype=torch.float32) / H)
    angles = torch.arange(S, dtype=torch.float32)[:, None, None, None] * frequencies
    cos, sin = torch.cat((angles, angles), -1).cos(), torch.cat((angles, angles), -1).sin()

    def turn(x: Tensor) -> Tensor:
        left, right = x[..., : H // 2], x[..., H // 2 :]
        return x * cos + torch.cat((-right, left), -1) * sin

    def normed(x: Tensor, name: str) -> Tensor:
        # A view: on a CPU the norm is several operations, whose gradients are then summed before the residual's joins.
        return F.rms_norm(x.view_as(x), (C,), weights[f"{name}.weight"], config.norm_epsilon)

    x = F.embedding(tokens.t(), weights["embedding.weight"])
    for i in range(config.num_layers):
        layer = f"layers.{i}"
        qkv = F.linear(normed(x, f"{layer}.attention_norm"), weights[f"{layer}.attention.linear_qkv.weight"])
        qkv = qkv.view(S, -1, G, (per_group + 2) * H)
        q = qkv[..., : per_group * H].reshape(S, -1, G * per_group, H)
        k, v = qkv[..., per_group * H : -H], qkv[..., -H:]
        # Contiguous: a CPU's products of other strides may take their sums in another order.
        q, k, v = (t.permute(1, 2, 0, 3).contiguous() for t in (turn(q), turn(k), v))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True)
        y = y.permute(2, 0, 1, 3).reshape(S, -1, G * per_group * H)
        x = x + F.linear(y, weights[f"{layer}.attention.linear_proj.weight"])
        merged = F.linear(normed(x, f"{layer}.mlp_norm"), weights[f"{layer}.mlp.linear_fc1.weight"])
        # Contiguous: a CPU's exponential of strided numbers is another one, which may differ in the last bit.
        h = F.silu(merged[..., 0::2].contiguous()) * merged[..., 1::2]
        x = x + F.linear(h, weights[f"{layer}.mlp.linear_fc2.weight"])
    output = weights.get("output_layer.weight", weights["embedding.weight"])
    return F.linear(normed(x, "final_norm"), output)


@pytest.mark.parametrize("untied", [False, True])
@pytest.mark.parametrize("width", [16, 24, 64])
def test_plain_residual_is_llama_bit_for_bit(untied: bool, width: int) -> None:
    config = small_config(
        untie_embeddings_and_output_weights=untied, hidden_size=width, ffn_hidden_size=3 * width, norm_epsilon=0.1
    )
    model, tokens = randomise(build(config, "fp32")), random_tokens()
    weights = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    labels = tokens.roll(-1, 1).t().reshape(-1)

    logits = model.output.logits(model(tokens))
    F.cross_entropy(logits.flatten(0, 1), labels).backward()
    expected = llama(weights, config, tokens)[..., :VOCAB]
    F.cross_entropy(expected.flatten(0, 1), labels).backward()

    assert logits.equal(expected)
    found = {name: p.grad for name, p in model.named_parameters()}
    assert_same_bits(found, {name: p.grad for name, p in weights.items()})  # type: ignore[arg-type]


def test_documents_do_not_see_each_other() -> None:
    """Two documents in one sequence, positions reset, equal the two documents alone; the others' mask is causal."""
    model = randomise(build(SMALL))
    tokens = random_tokens(batch=1)
    documents = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1]])
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4]])
    together = model(tokens, positions, documents)
    alone = torch.cat([model(tokens[:, :3]), model(tokens[:, 3:])])
    torch.testing.assert_close(together, alone, rtol=1e-12, atol=1e-12)
    assert (model(tokens) - together).abs().max() > 1e-3

    # A batch in which every sample has documents of its own.
    tokens, documents = random_tokens(), torch.tensor([[0] * 5 + [1] * 3, [0] * 8])
    torch.testing.assert_close(model(tokens, None, documents)[:, 1:], model(tokens[1:]), rtol=1e-12, atol=1e-12)


def test_scaled_frequencies_are_those_of_llama_3() -> None:
    """Meta's own loop over the frequencies, each of whose three branches is taken."""
    config = small_config(kv_channels=64, rotary_base=500000, use_rope_scaling=True, rope_scaling_factor=8.0)
    plain, scaled = (
        inverse_frequencies(one, torch.float64, torch.device("cpu")).tolist()
        for one in (replace(config, use_rope_scaling=False), config)
    )
    branches = [0, 0, 0]
    for before, after in zip(plain, scaled, strict=True):
        wavelength = 2 * math.pi / before
        smooth = (8192 / wavelength - 1) / (4 - 1)
        expected = (before, before / 8, (1 - smooth) * before / 8 + smooth * before)
        branch = 0 if wavelength < 8192 / 4 else 1 if wavelength > 8192 else 2
        branches[branch] += 1
        assert after == pytest.approx(expected[branch], rel=1e-12)
    assert min(branches) >= 2


@pytest.mark.parametrize("documents", [False, True])
def test_fp32_softmax_equals_fused_attention(documents: bool) -> None:
    tokens = random_tokens()
    ids = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1]] * 2) if documents else None
    explicit, fused = (build(small_config(attention_softmax_in_fp32=flag)) for flag in (True, False))
    torch.testing.assert_close(explicit(tokens, None, ids), fused(tokens, None, ids), rtol=1e-12, atol=1e-12)


def test_fp32_softmax_under_bf16_rounds_after_the_softmax() -> None:
    """Scores of 256 and 257 are one number in bfloat16."""
    core = build(small_config(attention_softmax_in_fp32=True), "bf16").stage_layers()[0].attention.core
    q = torch.full((1, 1, 1, 4), 16.0).bfloat16()
    k = torch.full((2, 1, 1, 4), 8.0).bfloat16()
    k[1, 0, 0, 0] = 8.125
    v = torch.tensor([0.0, 1.0]).bfloat16()[:, None, None, None].expand(2, 1, 1, 4)
    expected = 1 / (1 + math.exp(-16 * 0.125 / 2))  # the scores differ by 1
    assert abs(core(q, k, v, None)[0, 0, 0].item() - expected) < 4e-3


def test_grouped_queries_equal_repeated_heads() -> None:
    grouped = randomise(build(SMALL))
    config = replace(SMALL, group_query_attention=False, num_query_groups=1)
    full = build(config)
    H, per_group = config.head_size, 2
    state = grouped.state_dict()
    for name in [n for n in state if n.endswith("linear_qkv.weight")]:
        groups = state[name].unflatten(0, (2, (per_group + 2) * H))
        heads = [
            torch.cat((group[j * H : (j + 1) * H], group[per_group * H :]))
            for group in groups
            for j in range(per_group)
        ]
        state[name] = torch.cat(heads)
    full.load_state_dict(state)
    tokens = random_tokens()
    torch.testing.assert_close(full(tokens), grouped(tokens), rtol=1e-12, atol=1e-12)


def test_partial_rotary_leaves_the_other_channels() -> None:
    """Half of the channels turned: shifting all positions changes nothing, exchanging two does."""
    model = build(small_config(rotary_percent=0.5))
    tokens, positions = random_tokens(), torch.arange(8).unsqueeze(0)
    cos, sin = model.context(positions, None).rope  # type: ignore[misc]
    assert cos.shape == sin.shape == (8, 1, 1, 2)
    torch.testing.assert_close(model(tokens, positions + 11), model(tokens, positions), rtol=1e-10, atol=1e-10)
    swapped = positions[:, [1, 0, *range(2, 8)]]
    assert (model(tokens, swapped) - model(tokens)).abs().max() > 1e-4
    full, none = build(small_config()), build(small_config(position_embedding_type="none"))
    assert (full(tokens) - model(tokens)).abs().max() > 1e-4
    assert (none(tokens) - model(tokens)).abs().max() > 1e-4

    q = torch.randn(8, 1, 1, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    turned = apply_rope(q, RopeTable(cos, sin))
    assert turned[..., 2:].equal(q[..., 2:])
    angle = torch.arange(8, dtype=torch.float64)  # the slowest and only pair turns by position / base^0
    torch.testing.assert_close(
        turned[:, 0, 0, 0], q[:, 0, 0, 0] * angle.cos() - q[:, 0, 0, 1] * angle.sin(), rtol=1e-12, atol=1e-12
    )


def test_learned_positions_are_added_to_the_embedding() -> None:
    model = build(small_config(position_embedding_type="learned_absolute", max_position_embeddings=20))
    tokens, positions = random_tokens(), torch.tensor([[3, 1, 19, 0, 4, 4, 2, 7]])
    carry = model.open(tokens, positions)
    expected = model.embedding.weight[tokens.t()] + model.position_embedding.weight[positions.t()]
    assert carry.stream.squeeze(2).equal(expected)
    first_eight = torch.arange(8).unsqueeze(0)
    assert model(tokens).equal(model(tokens, first_eight))
    without = build(small_config(position_embedding_type="none"))
    assert (without(tokens) - model(tokens)).abs().max() > 1e-3


RECOMPUTE: dict[str, ParallelConfig] = {
    "uniform-1": full_recompute("uniform", 1),
    "uniform-2": full_recompute("uniform", 2),
    "uniform-3": full_recompute("uniform", 3),
    "block-2": full_recompute("block", 2),
    "core_attn": selective_recompute("core_attn"),
    "mlp": selective_recompute("mlp"),
    "layernorm": selective_recompute("layernorm"),
    "residual": selective_recompute("residual"),
    "all-parts": selective_recompute("core_attn", "mlp", "layernorm", "residual"),
}


@pytest.mark.parametrize("name", RECOMPUTE)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_recompute_gives_the_same_bits(name: str, precision: str, dropout: float) -> None:
    """Dropout included: the same seed drops the same numbers again."""
    config = small_config({"residual_connection": "hyper"}, attention_dropout=dropout, hidden_dropout=dropout)
    tokens = random_tokens()

    def run(parallel: ParallelConfig | None) -> tuple[Tensor, dict[str, Tensor]]:
        model = randomise(build(config, precision, parallel=parallel))
        torch.manual_seed(7)
        return gradients(model, tokens)

    loss, expected = run(None)
    again, found = run(RECOMPUTE[name])
    assert again.equal(loss)
    assert_same_bits(found, expected)


@pytest.mark.parametrize(
    "change",
    [
        {"attention_dropout": 0.5, "hidden_dropout": 0.5},
        {"hidden_dropout": 0.5},
        {"attention_dropout": 0.5},
        {"attention_dropout": 0.5, "attention_softmax_in_fp32": True},
    ],
    ids=["both", "hidden", "attention", "attention-fp32-softmax"],
)
def test_dropout_is_random_in_training_and_absent_in_evaluation(change: dict[str, Any]) -> None:
    model, tokens = build(small_config(**change)), random_tokens()
    assert not model(tokens).equal(model(tokens))
    torch.manual_seed(1)
    first = model(tokens)
    torch.manual_seed(1)
    assert first.equal(model(tokens))
    without = {name: 0.0 if "dropout" in name else value for name, value in change.items()}
    assert model.eval()(tokens).equal(build(small_config(**without))(tokens))


@pytest.mark.parametrize("moe", [MoEConfig(), MoEConfig(num_experts=4, moe_shared_expert_intermediate_size=8)])
def test_every_sublayer_has_its_dropout(moe: MoEConfig) -> None:
    model = build(small_config(hidden_dropout=0.5, moe=moe))
    dropouts = {name: module for name, module in model.named_modules() if isinstance(module, nn.Dropout)}
    assert len(dropouts) == 1 + 2 * len(model.layers)
    called: list[str] = []
    for name, module in dropouts.items():
        module.register_forward_hook(lambda *_, name=name: called.append(name))
    model(random_tokens())
    assert sorted(called) == sorted(dropouts)


def test_a_rank_with_masks_of_its_own_draws_nothing_in_evaluation() -> None:
    """Masks of training would otherwise depend on how often a run is validated."""
    model, tokens = build(small_config(attention_dropout=0.5, hidden_dropout=0.5)), random_tokens()
    for module in model.modules():
        if isinstance(module, Attention | Dropout):
            module.part = 1
    for is_training in (False, True):
        before = torch.get_rng_state()
        model.train(is_training)(tokens)
        assert before.equal(torch.get_rng_state()) != is_training


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, []),
        ({"attention_backend": "flash"}, [SDPBackend.FLASH_ATTENTION]),
        ({"attention_backend": "unfused"}, [SDPBackend.MATH]),
        ({"attention_softmax_in_fp32": True}, None),
    ],
    ids=["auto", "flash", "unfused", "fp32-softmax"],
)
def test_attention_runs_on_what_was_asked_for(
    change: dict[str, Any], expected: list[SDPBackend] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``expected``: what torch's attention is confined to ([]: not at all); None: it is not called."""
    asked, calls, original = [], [], F.scaled_dot_product_attention
    monkeypatch.setattr(attention, "sdpa_kernel", lambda kernels, **_: asked.append(kernels) or nullcontext())
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *a, **k: calls.append(1) or original(*a, **k))
    model = build(small_config(**change))
    model(random_tokens())
    num_layers = len(model.layers)
    assert len(calls) == (0 if expected is None else num_layers)
    assert asked == ([expected] * num_layers if expected else [])


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"normalization": "LayerNorm", "swiglu": False, "disable_bias_linear": False},
        {"squared_relu": True, "swiglu": False, "qk_layernorm": True, "add_qkv_bias": True},
        {"position_embedding_type": "learned_absolute", "kv_channels": 6},
    ],
    ids=["llama", "gpt2", "nemotron", "wide-heads"],
)
def test_cached_decoding_equals_the_full_forward(change: dict[str, Any]) -> None:
    model: GPT = randomise(build(small_config(**change))).eval()
    tokens = random_tokens()
    with torch.no_grad():
        caches = model.new_caches(8, 2)
        pieces = [model(tokens[:, a:b], caches=caches) for a, b in ((0, 1), (1, 5), (5, 6), (6, 8))]
        torch.testing.assert_close(torch.cat(pieces), model(tokens), rtol=1e-11, atol=1e-11)
