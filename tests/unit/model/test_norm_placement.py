"""Norm placements in two shapes of model, DeepNorm's initial values, and what is refused."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers import build, randomise, small_config
from reference.compare import assert_equals_reference

from megatron_hc.config import OWN_NORM_CONNECTIONS, REPLACEABLE_CONNECTIONS, REPLACING_PLACEMENTS, ResidualConfig
from megatron_hc.model.placement import NORM_PLACEMENTS, UnitVectors
from megatron_hc.residual import RESIDUALS

FORMS: dict[str, dict[str, Any]] = {
    **{name: {"norm_placement": name} for name in NORM_PLACEMENTS},
    "pre-qk-norm": {"qk_layernorm": True},
    "reordered-qk-norm": {"norm_placement": "reordered", "qk_layernorm": True},
    "normformer-scale": {"norm_placement": "normformer", "normformer_residual_scale": True},
    "deepnorm-init": {"norm_placement": "deepnorm", "init_scheme": "deepnorm"},
    "hybrid-dense-values": {"norm_placement": "hybrid", "value_residual": "dense"},
    "hybrid-single-layer-value": {"norm_placement": "hybrid", "single_layer_value": True},
    "normformer-neutreno": {"norm_placement": "normformer", "value_residual": "neutreno"},
    "cosine-fp32-softmax": {"norm_placement": "res-post-cosine", "attention_softmax_in_fp32": True},
}
GPT2 = {
    "group_query_attention": False,
    "num_query_groups": 1,
    "disable_bias_linear": False,
    "normalization": "LayerNorm",
    "position_embedding_type": "learned_absolute",
    "swiglu": False,
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", [{}, GPT2], ids=["llama", "gpt2"])
def test_outputs_and_gradients_equal_the_reference(form: str, shape: dict[str, Any]) -> None:
    model = randomise(build(small_config(**{**shape, **FORMS[form]})))
    # Without rotation the bias of a key adds the same to all scores of a query, which the softmax does not see.
    assert_equals_reference(model, without_gradient="k_layernorm.bias" if shape else "no name ends so")


def test_the_cosine_scale_is_ten_at_the_start_and_at_most_a_hundred() -> None:
    unit = build(small_config(norm_placement="res-post-cosine")).stage_layers()[0].attention.q_layernorm
    assert isinstance(unit, UnitVectors) and unit.log_scale is not None
    x = torch.randn(5, 2, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(unit(x).norm(dim=-1), torch.full((5, 2, 4), 10.0).double(), rtol=1e-6, atol=0)
    with torch.no_grad():
        unit.log_scale[2] = 7.0
    expected = torch.tensor([10.0, 10.0, 100.0, 10.0]).double().expand(5, 2, 4)
    torch.testing.assert_close(unit(x).norm(dim=-1), expected, rtol=1e-6, atol=0)


def test_initial_values_of_deepnorm() -> None:
    """Xavier's by logical matrix; values, output projection and MLP smaller by (8 L)^(1/4), queries and keys not."""
    size = {"hidden_size": 64, "ffn_hidden_size": 96, "norm_placement": "deepnorm"}
    deep = build(small_config(init_scheme="deepnorm", **size), "fp32").stage_layers()[1]
    normal = build(small_config(**size), "fp32").stage_layers()[1]
    gain, std = (8 * 3) ** -0.25, 0.3
    per_group = {"q": 2 * 16, "k": 16, "v": 16}
    expected = {"q": math.sqrt(2 / 128), "k": math.sqrt(2 / 96), "v": gain * math.sqrt(2 / 96)}
    start = 0
    for part, rows in per_group.items():
        block = slice(start, start + rows)
        ours, theirs = (layer.attention.linear_qkv.weight.unflatten(0, (2, -1))[:, block] for layer in (deep, normal))
        torch.testing.assert_close(ours / expected[part], theirs / std, msg=part)
        start += rows
    output_std = std / math.sqrt(6)
    for name, wanted, usual in (
        ("attention.linear_proj", gain * math.sqrt(2 / 128), output_std),
        ("mlp.linear_fc1", gain * math.sqrt(2 / 160), std),
        ("mlp.linear_fc2", gain * math.sqrt(2 / 160), output_std),
    ):
        ours, theirs = (layer.get_submodule(name).weight for layer in (deep, normal))
        torch.testing.assert_close(ours / wanted, theirs / usual, msg=name)


def test_deepnorm_multiplies_the_stream_and_not_the_output() -> None:
    residual = build(small_config(norm_placement="deepnorm")).stage_layers()[0].attention_residual
    stream, output = torch.ones(2, 1, 1, 16).double(), torch.full((2, 1, 16), 5.0).double()
    torch.testing.assert_close(residual.fold(stream, output, None), torch.full_like(stream, 5 + 6**0.25))


def test_names_in_the_configuration_are_those_of_the_package() -> None:
    replacing = {name for name, layers in NORM_PLACEMENTS.items() if any("replaces" in layer[:2] for layer in layers)}
    assert replacing == set(REPLACING_PLACEMENTS)
    for method in RESIDUALS:
        layers = build(small_config({"residual_connection": method})).stage_layers()
        norms_itself = any(layer.attention_residual.replaces_norm for layer in layers)
        assert norms_itself == (method in OWN_NORM_CONNECTIONS), method


def refusal(**changes: Any) -> str:
    with pytest.raises(ValueError) as error:
        replace(small_config(), **changes).validate()
    return str(error.value)


@pytest.mark.parametrize("placement", REPLACING_PLACEMENTS)
@pytest.mark.parametrize("method", [name for name in RESIDUALS if name not in REPLACEABLE_CONNECTIONS])
def test_a_norm_that_replaces_the_stream_needs_one_stream(placement: str, method: str) -> None:
    message = refusal(norm_placement=placement, residual=ResidualConfig(residual_connection=method))
    assert message.startswith(f"--norm-placement {placement} replaces the stream by its norm, which")
    assert f"--residual-connection {method} does not allow" in message


def test_refused() -> None:
    gated = ResidualConfig(residual_connection="gated", gated_residual_rank=2)
    assert "--norm-placement reordered has no norm where" in refusal(norm_placement="reordered", residual=gated)
    message = refusal(norm_placement="hybrid", qk_layernorm=True)
    assert message.startswith("--qk-layernorm does not go with --norm-placement hybrid")
    message = refusal(normformer_residual_scale=True)
    assert message.startswith("--normformer-residual-scale needs --norm-placement normformer and")
    hyper = ResidualConfig(residual_connection="hyper")
    message = refusal(norm_placement="normformer", normformer_residual_scale=True, residual=hyper)
    assert message.endswith("not normformer and hyper")
    message = refusal(init_scheme="deepnorm", norm_placement="post")
    assert message.startswith("--init-scheme deepnorm needs --norm-placement deepnorm")
