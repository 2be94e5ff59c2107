"""MUDDFormer: what is particular to it; what every method owes is in test_registry.py."""

from __future__ import annotations

import pytest
import torch
from helpers import build, gradients, random_tokens, randomise, small_config

from megatron_hc.model.attention import Attention
from megatron_hc.model.linear import Linear
from megatron_hc.optim.groups import parameter_groups
from megatron_hc.parallel.tensor import ColumnParallelLinear, Region, become
from megatron_hc.residual import Norm, Reads

MUDD = {"residual_connection": "muddformer"}
C, LAYERS = 16, 3


def test_only_later_layers_have_ways_and_norms_of_their_own() -> None:
    layers = build(small_config(MUDD)).stage_layers()
    assert [layer.attention_norm is None for layer in layers] == [False, True, True]
    assert [len(list(layer.attention_residual.parameters())) for layer in layers] == [0, 6, 6]
    assert not any(list(layer.mlp_residual.parameters()) for layer in layers)


def test_parameter_count() -> None:
    plain = sum(p.numel() for p in build(small_config()).parameters())
    layers = sum(4 * J * C + 16 * J * J + 4 * J + 2 * C for J in range(2, LAYERS + 1))
    J = LAYERS + 1
    found = sum(p.numel() for p in build(small_config(MUDD)).parameters())
    assert found - plain == layers + 4 * J * C + 4 * J * J + J


@pytest.mark.parametrize("without_bias", [False, True])
def test_norms_have_the_bias_of_the_layers(without_bias: bool) -> None:
    model = build(small_config(MUDD, normalization="LayerNorm", disable_bias_layernorm=without_bias))
    biases = [name for name, _ in model.named_parameters() if "_residual." in name and name.endswith("norm_bias")]
    assert len(biases) == (0 if without_bias else 3 * (LAYERS - 1))


def test_initial_values_and_decay() -> None:
    model = build(small_config(MUDD, hidden_size=256, num_attention_heads=4))
    residual = model.stage_layers()[2].attention_residual
    assert residual.static.tolist() == [[0, 0, 1]] * 4
    assert residual.w2.abs().max() == 0
    assert abs(residual.w1.std().item() * 16 - 1) < 0.1
    groups = parameter_groups(model)
    decays = {
        name.split(".")[-1] for g in groups for name, _ in g["params"] if "_residual." in name and g["weight_decay"]
    }
    assert decays == {"w1", "w2"}


@pytest.mark.parametrize("normalization", ["RMSNorm", "LayerNorm"])
def test_each_way_has_its_own_sum_and_norm(normalization: str) -> None:
    model = build(small_config(MUDD, normalization=normalization))
    residual = model.stage_layers()[1].attention_residual
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.randn(3, 2, C, generator=generator, dtype=torch.float64) for _ in range(2))
    with torch.no_grad():
        residual.static.copy_(torch.tensor([[1, 0], [0, 1], [1, 1], [2, -1]]))  # q, k, v, r
        residual.v_norm_weight.fill_(3)
    carry = residual.open(second)._replace(history=(first.unsqueeze(2),))
    x, carry = residual.read(carry, Norm(None))
    assert isinstance(x, Reads)

    def normed(t: torch.Tensor) -> torch.Tensor:
        if normalization == "LayerNorm":
            return torch.nn.functional.layer_norm(t, (C,), eps=1e-5)
        return torch.nn.functional.rms_norm(t, (C,), eps=1e-5)

    torch.testing.assert_close(x.q, normed(first))
    torch.testing.assert_close(x.k, normed(second))
    torch.testing.assert_close(x.v, 3 * normed(first + second))
    torch.testing.assert_close(carry.stream.squeeze(2), 2 * first - second)
    assert carry.history[1].equal(second.unsqueeze(2))


@pytest.mark.parametrize("bias", [False, True])
def test_attention_of_equal_reads_is_attention_of_one(bias: bool) -> None:
    model = randomise(build(small_config(disable_bias_linear=not bias)))
    attention: Attention = model.stage_layers()[0].attention
    x = torch.randn(8, 2, C, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(attention.project(Reads(x, x, x)), attention.project(x))
    changed = attention.project(Reads(x, x, 2 * x))
    for name, equal in (("q", True), ("k", True), ("v", False)):
        assert torch.allclose(changed[name], attention.project(x)[name]) is equal


def test_a_linear_layer_with_its_own_forward_needs_its_own_parts() -> None:
    """A parallel layer whose forward does more than the product must not be passed over."""

    class Gathering(Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(2 * x)

    linear = build(small_config()).stage_layers()[0].attention.linear_qkv
    linear.__class__ = Gathering
    with pytest.raises(AssertionError, match="Gathering has a forward of its own"):
        linear.forward_parts({"q": torch.ones(1, 1, C, dtype=torch.float64)})


def test_parts_that_share_an_input_enter_a_region_once() -> None:
    """Value and gate read the same sum: under tensor parallelism it is gathered, or its gradient reduced, once."""
    linear = build(small_config(MUDD, value_residual="per-token")).stage_layers()[1].attention.linear_qkv
    entered: list[torch.Tensor] = []

    class Counting(Region):
        def enter(self, x: torch.Tensor) -> torch.Tensor:
            entered.append(x)
            return x

    become(linear, ColumnParallelLinear, region=Counting(None, sequence_parallel=False))
    q, k, v = (torch.ones(1, 1, C, dtype=torch.float64) for _ in range(3))
    linear.forward_parts({"q": q, "k": k, "v": v, "gate": v})
    assert [id(x) for x in entered] == [id(q), id(k), id(v)]


def test_gradients_at_the_start_equal_those_of_the_plain_residual() -> None:
    """Weights shared with the plain model get the same gradients while W_2 = 0 and a is one-hot."""
    tokens = random_tokens()
    loss, plain = gradients(build(small_config()), tokens)
    our_loss, found = gradients(build(small_config(MUDD)), tokens)
    assert our_loss.allclose(loss, rtol=1e-12)
    shared = plain.keys() & found.keys()
    assert plain.keys() - shared == {f"layers.{layer}.attention_norm.weight" for layer in (1, 2)}
    for name in shared:
        torch.testing.assert_close(found[name], plain[name], rtol=1e-9, atol=1e-12)
