"""Gated residuals: what is particular to them; what every method owes is in test_registry.py."""

from __future__ import annotations

import pytest
import torch
from helpers import build, random_tokens, randomise, small_config

from megatron_hc.optim.groups import parameter_groups

N, C, LAYERS = 4, 16, 3


def test_the_layer_builds_no_norm() -> None:
    model = build(small_config({"residual_connection": "gated"}))
    assert not [name for name, _ in model.named_parameters() if name.endswith("_norm.weight")]


@pytest.mark.parametrize("rank", [None, 5])
def test_parameter_count(rank: int | None) -> None:
    model = build(small_config({"residual_connection": "gated", "gated_residual_rank": rank}))
    plain = build(small_config())
    reads = 2 * LAYERS + 1
    expected = reads * (N * C + 2 * N * C * (rank or C // 8)) + 2 * LAYERS * N * N * C - reads * C
    assert sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in plain.parameters()) == expected


def test_matrices_decay_and_norm_weights_do_not() -> None:
    groups = parameter_groups(build(small_config({"residual_connection": "gated"})))
    decays = {name.split(".")[-1]: g["weight_decay"] for g in groups for name, _ in g["params"] if "_residual." in name}
    assert decays == {"norm_weight": False, "gate_down": True, "gate_up": True, "write_weight": True}


def test_the_matrices_have_the_standard_deviation_of_the_others() -> None:
    model = build(small_config({"residual_connection": "gated"}, hidden_size=64, init_method_std=0.05), "fp32")
    read = model.stage_layers()[1].mlp_residual
    for matrix in (read.gate_down, read.gate_up, read.write_weight):
        assert abs(matrix.std().item() / 0.05 - 1) < 0.1
    assert not read.gate_down.equal(model.stage_layers()[2].mlp_residual.gate_down)
    assert read.norm_weight.equal(torch.ones(N, 64))


def test_equal_streams_and_closed_gates_give_half_the_norm_and_a_write_of_one() -> None:
    """With all matrices 0 every gate is 1/2 and every write weight 1: pre-norm with half the normed input."""
    model = build(small_config({"residual_connection": "gated"}))
    residual = model.stage_layers()[0].attention_residual
    with torch.no_grad():
        for matrix in (residual.gate_down, residual.gate_up, residual.write_weight):
            matrix.zero_()
    hidden = torch.randn(3, 2, C, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x, carry = residual.mixed(residual.open(hidden))
    torch.testing.assert_close(x, torch.nn.functional.rms_norm(hidden, (C,), None, 1e-5) / 2)
    assert carry.mix.write.equal(torch.ones(3, 2, 1, N, dtype=torch.float64))


def test_the_gate_of_a_channel_depends_on_the_token() -> None:
    model = randomise(build(small_config({"residual_connection": "gated"})))
    residual = model.stage_layers()[0].attention_residual
    carry = residual.open(model.embedding.embed(random_tokens()))
    x, _ = residual.mixed(carry)
    doubled, _ = residual.mixed(carry._replace(stream=2 * carry.stream))
    torch.testing.assert_close(x, doubled, rtol=1e-3, atol=1e-4)  # each stream is normed
    assert (x[0, 0] / carry.stream[0, 0, 0] - x[1, 0] / carry.stream[1, 0, 0]).abs().max() > 1e-2


@pytest.mark.parametrize(
    "wrong,message",
    [
        ({"static_residual": True}, "--static-residual .* needs --residual-connection"),
        ({"residual_readout": "sum"}, "--residual-readout .* not gated"),
        ({"gated_residual_rank": 0}, "--gated-residual-rank must be positive, not 0"),
    ],
)
def test_refusals(wrong: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small_config({"residual_connection": "gated", **wrong})


def test_the_rank_belongs_to_gated_residuals() -> None:
    with pytest.raises(ValueError, match=r"--gated-residual-rank \(4\) needs --residual-connection gated, not hyper"):
        small_config({"residual_connection": "hyper", "gated_residual_rank": 4})
