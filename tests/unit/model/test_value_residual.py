"""Value residuals in models of other shapes than the registry's tests have, their parameters, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers import build, random_tokens, randomise, small_config
from reference.compare import assert_equals_reference

from megatron_hc.config import ModelConfig, ResidualConfig
from megatron_hc.optim.groups import parameter_groups
from megatron_hc.residual import VALUE_RESIDUALS, value_boundary

VARIANTS: dict[str, dict[str, Any]] = {
    **{name: {"value_residual": name} for name in VALUE_RESIDUALS if name != "none"},
    "neutreno-1.5": {"value_residual": "neutreno", "neutreno_coefficient": 1.5},
    "single-layer": {"single_layer_value": True},
}
SHAPES: dict[str, dict[str, Any]] = {
    "gpt2": {
        "group_query_attention": False,
        "num_query_groups": 1,
        "disable_bias_linear": False,
        "normalization": "LayerNorm",
        "position_embedding_type": "learned_absolute",
        "swiglu": False,
    },
    "one-group": {
        "num_layers": 4,
        "num_query_groups": 1,
        "add_qkv_bias": True,
        "attention_softmax_in_fp32": True,
        "qk_layernorm": True,
    },
}

every_variant = pytest.mark.parametrize("variant", VARIANTS)


def config_of(variant: str, **changes: Any) -> ModelConfig:
    return small_config(**{**VARIANTS[variant], **changes})


@every_variant
@pytest.mark.parametrize("shape", SHAPES)
def test_outputs_and_gradients_equal_the_reference(variant: str, shape: str) -> None:
    assert_equals_reference(randomise(build(config_of(variant, **SHAPES[shape]))))


def test_half_is_constant_and_the_start_of_learnable() -> None:
    tokens = random_tokens()
    half = build(config_of("half"))(tokens)
    weights = {"value_residual_first_weight": 0.5, "value_residual_own_weight": 0.5}
    assert build(config_of("constant", **weights))(tokens).equal(half)
    torch.testing.assert_close(build(config_of("learnable"))(tokens), half, rtol=0, atol=1e-12)


def test_dense_starts_at_the_mean() -> None:
    layers = build(config_of("dense")).stage_layers()
    assert layers[0].attention.value_residual.weights is None
    for layer, expected in ((1, [0.5, 0.5]), (2, [1 / 3] * 3)):
        assert torch.allclose(layers[layer].attention.value_residual.weights.double(), torch.tensor(expected).double())


def test_only_the_layers_that_mix_have_parameters_and_they_stay_fp32_without_decay() -> None:
    for variant in ("learnable", "dense"):
        model = build(config_of(variant), "bf16")
        weights = {name: p.dtype for name, p in model.named_parameters() if ".value_residual." in name}
        assert weights == {f"layers.{i}.attention.value_residual.weights": torch.float32 for i in (1, 2)}
        decays = {name for group in parameter_groups(model) if group["weight_decay"] for name, _ in group["params"]}
        assert not decays & set(weights) and "layers.1.attention.linear_qkv.weight" in decays


@pytest.mark.parametrize(
    ("variant", "numbers"),
    [("half", [0, 1, 1]), ("sparse", [0, 1, 1]), ("dense", [0, 1, 2]), ("single-layer", [0, 1, 1])],
)
def test_what_crosses_a_boundary(variant: str, numbers: list[int]) -> None:
    config = config_of(variant)
    assert [len(value_boundary(config, layer)) for layer in range(3)] == numbers
    assert {(spec.kind, spec.shape) for spec in value_boundary(config, 2)} == {("values", (2, 4))}
    assert value_boundary(small_config(), 2) == ()


def test_the_last_layer_hands_nothing_on() -> None:
    for variant, number in (("half", 1), ("dense", 2), ("single-layer", 1)):
        model = build(config_of(variant))
        positions = torch.arange(8).unsqueeze(0)
        carry = model.open(random_tokens(), positions)
        for layer in model.stage_layers():
            carry = layer(carry, model.context(positions, None))
        assert len(carry.values) == number


def test_sparse_mixes_in_the_last_third() -> None:
    for num_layers, expected in ((3, [2]), (4, [2, 3]), (6, [4, 5]), (2, [1])):
        layers = build(config_of("sparse", num_layers=num_layers)).stage_layers()
        assert [i for i, layer in enumerate(layers) if layer.attention.value_residual.mixes] == expected


@every_variant
def test_values_of_bf16_are_mixed_in_fp32(variant: str) -> None:
    """And rounded once: nearly all numbers are those of float64, rounded."""
    generator = torch.Generator().manual_seed(2)
    first, second, own = (torch.randn(8, 64, 2, 4, generator=generator).bfloat16() for _ in range(3))
    gate, output = (torch.randn(8, 64, *shape, generator=generator).bfloat16() for shape in ((2, 1), (16,)))
    found = []
    for precision, dtype in (("bf16", torch.bfloat16), ("fp64", torch.float64)):
        mixer = randomise(build(config_of(variant), precision)).stage_layers()[2].attention.value_residual
        earlier = tuple(v.to(dtype) for v in (first, second)[: 2 if variant == "dense" else 1])
        mixed = mixer.mix(own.to(dtype), earlier, gate.to(dtype))
        found.append(torch.cat((mixed.flatten(2), mixer.correct(output.to(dtype), own.to(dtype), earlier)), -1))
    assert found[0].dtype == torch.bfloat16
    assert (found[0] == found[1].bfloat16()).double().mean() > 0.999


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"value_residual": "half", "single_layer_value": True},
            "--value-residual half and --single-layer-value exclude each other: with the latter later layers have no",
        ),
        ({"value_residual": "half", "num_layers": 1}, "--num-layers (1) must be at least 2 with --value-residual half"),
        (
            {"single_layer_value": True, "num_layers": 1},
            "--num-layers (1) must be at least 2 with --single-layer-value",
        ),
        ({"neutreno_coefficient": 0.4}, "--neutreno-coefficient (0.4) needs --value-residual neutreno, not none"),
        (
            {"value_residual": "half", "value_residual_first_weight": 1.0},
            "--value-residual-first-weight (1.0) needs --value-residual constant or sparse or learnable, not half",
        ),
        (
            {"value_residual": "dense", "value_residual_layers": 1},
            "--value-residual-layers (1) needs --value-residual sparse, not dense",
        ),
        (
            {"value_residual": "sparse", "value_residual_layers": 3},
            "--value-residual-layers (3) must be positive and less than --num-layers (3)",
        ),
        (
            {"value_residual": "sparse", "value_residual_layers": 0},
            "--value-residual-layers (0) must be positive and less than --num-layers (3)",
        ),
        (
            {"single_layer_value": True, "residual": ResidualConfig(residual_connection="muddformer")},
            "--single-layer-value and --residual-connection muddformer exclude each other",
        ),
    ],
)
def test_refused(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError) as error:
        replace(small_config(), **changes).validate()
    assert str(error.value).startswith(sentence)
