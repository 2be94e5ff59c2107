"""Methods with one stream: what is particular to them; what every method owes is in test_registry.py."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from helpers import build, random_tokens, randomise, small_config
from reference.compare import assert_equals_reference

from megatron_hc.config import ModelConfig
from megatron_hc.residual import Carry, Norm, Site, TensorSpec, build_residual
from megatron_hc.residual.directional import OrthogonalUpdate
from megatron_hc.residual.sparse import SparseAggregation


@pytest.mark.parametrize(
    "method,residual,model",
    [
        ("rezero", {}, {"norm_placement": "none"}),
        ("rezero", {}, {"norm_placement": "post"}),
        ("layerscale", {"layerscale_init": 0.5}, {"norm_placement": "deepnorm"}),
        ("layerscale", {}, {"norm_placement": "hybrid"}),
        ("layerscale", {}, {"value_residual": "dense"}),
        ("orthogonal", {}, {"norm_placement": "post", "normalization": "LayerNorm"}),
        ("orthogonal", {}, {"norm_placement": "deepnorm"}),
        ("laurel", {"laurel_form": "rw"}, {}),
        ("laurel", {"laurel_form": "lr", "laurel_rank": 5}, {}),
        ("laurel", {"laurel_form": "rw-pa", "laurel_previous": 4}, {}),
        ("laurel", {"laurel_form": "lr-pa", "laurel_previous": 9}, {}),
        ("laurel", {"laurel_form": "pa", "laurel_previous": 1}, {}),
        ("sparse-aggregation", {}, {"num_layers": 2}),
    ],
)
def test_other_forms_equal_the_reference(method: str, residual: dict[str, Any], model: dict[str, Any]) -> None:
    assert_equals_reference(randomise(build(small_config({"residual_connection": method, **residual}, **model))))


@pytest.mark.parametrize("form", ["lr", "pa", "lr-pa"])
def test_laurel_without_rw_starts_as_pre_norm(form: str) -> None:
    tokens = random_tokens()
    model = build(small_config({"residual_connection": "laurel", "laurel_form": form}))
    assert (model(tokens) - build(small_config())(tokens)).abs().max() <= 1e-10


def test_rezero_starts_as_the_final_norm_of_the_embedding() -> None:
    model, tokens = build(small_config({"residual_connection": "rezero"})), random_tokens()
    expected = model.final_norm(model.embedding.embed(tokens))
    torch.testing.assert_close(model(tokens), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("layers", "start"), [(18, 0.1), (19, 1e-5), (24, 1e-5), (25, 1e-6)])
def test_layerscale_starts_by_depth(layers: int, start: float) -> None:
    config = small_config({"residual_connection": "layerscale"}, num_layers=layers)
    assert config.layerscale_start == start
    weight = build(small_config({"residual_connection": "layerscale"})).stage_layers()[2].mlp_residual.weight
    assert weight.shape == (16,) and (weight - 0.1).abs().max() < 1e-8  # three layers


def test_layerscale_of_one_is_pre_norm() -> None:
    model, tokens = build(small_config({"residual_connection": "layerscale", "layerscale_init": 1.0})), random_tokens()
    assert (model(tokens) - build(small_config())(tokens)).abs().max() <= 1e-10


@pytest.mark.parametrize(
    ("residual", "values", "expected"),
    [
        ({"residual_connection": "rezero"}, [1.003], 1.003),
        ({"residual_connection": "layerscale"}, [1.003] * 16, 1.003),
        ({"residual_connection": "laurel", "laurel_form": "rw"}, [math.log(1.003 / 0.997), 0.0], 1.003 / 2),
    ],
)
def test_a_factor_of_1003_is_seen_under_bf16(residual: dict[str, str], values: list[float], expected: float) -> None:
    """bfloat16 knows no number between 1 and 1.0078, nor between 0.5 and 0.5039."""
    module = build(small_config(residual), "bf16").stage_layers()[0].mlp_residual
    (weights,) = module.parameters()
    with torch.no_grad():
        weights.copy_(torch.tensor(values))
    output = torch.randn(400, 8, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    written = module.settle(module.write(Carry(torch.zeros_like(output).unsqueeze(2)), output)).stream.double()
    assert abs(written.abs().sum() / output.double().abs().sum() - expected) < 2e-4


def test_an_orthogonal_update_is_orthogonal_to_the_stream() -> None:
    residual = build_residual(Site("mlp", 0, small_config({"residual_connection": "orthogonal"})))
    assert isinstance(residual, OrthogonalUpdate)
    stream, output = torch.randn(2, 5, 2, 1, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    written = residual.settle(residual.write(Carry(stream), output.squeeze(2))).stream - stream
    assert ((written * stream).sum(-1) / stream.square().sum(-1)).abs().max() < 1e-6 < written.abs().max()


def test_a_deep_delta_overwrites_its_direction() -> None:
    """b = 1 at the start: what the stream holds along the output's direction becomes v = 2, the rest stays."""
    model = build(small_config({"residual_connection": "deep-delta"}))
    residual = model.stage_layers()[0].mlp_residual
    stream, output = torch.randn(2, 5, 2, 1, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    _, carry = residual.read(Carry(stream), Norm(None))
    new = residual.settle(residual.write(carry, output.squeeze(2))).stream
    direction = output / output.norm(dim=-1, keepdim=True)
    torch.testing.assert_close((new * direction).sum(-1), torch.full((5, 2, 1), 2.0).double())
    rest = [x - (x * direction).sum(-1, keepdim=True) * direction for x in (stream, new)]
    torch.testing.assert_close(*rest)
    _, carry = residual.read(Carry(stream), Norm(None))
    assert torch.equal(residual.settle(residual.write(carry, 0 * output.squeeze(2))).stream, stream)


def test_sparse_aggregation_reads_at_powers_of_two() -> None:
    config = small_config({"residual_connection": "sparse-aggregation"}, num_layers=9)
    residual = build_residual(Site("final", 9, config))
    assert isinstance(residual, SparseAggregation)
    assert residual.sources == (18, 17, 15, 11, 3)
    assert [residual.sources_of(k) for k in range(4)] == [(0,), (1, 0), (2, 1), (3, 2, 0)]
    # Into the final read: what it reads. One sublayer earlier: also what sublayer 17 reads, 17 + 1 - (1, 2, 4, 8, 16).
    assert residual.kept_into(18) == (3, 11, 15, 17) and residual.kept_into(17) == (2, 3, 10, 11, 14, 15, 16)


def names(config: ModelConfig, layer: int) -> list[str]:
    specs: tuple[TensorSpec, ...] = build_residual(Site("entry", 0, config)).boundary(layer)
    return [spec.name for spec in specs]


def test_laurel_hands_on_what_later_sublayers_read() -> None:
    config = small_config({"residual_connection": "laurel", "laurel_form": "rw-pa", "laurel_previous": 4})
    assert [names(config, layer) for layer in range(4)] == [
        ["x0"],
        ["x2", "x0", "x1"],
        ["x4", "x1", "x2", "x3"],
        ["x6"],
    ]
    config = small_config({"residual_connection": "laurel"})
    assert [names(config, layer) for layer in (0, 2)] == [["x0"], ["x4"]]


@pytest.mark.parametrize(
    "residual,model,message",
    [
        (
            {"residual_connection": "orthogonal", "orthogonal_form": "global"},
            {},
            "--orthogonal-form global projects on the stream of all tokens together, so a token would see later ones",
        ),
        (
            {"residual_connection": "laurel", "laurel_rank": 17},
            {},
            r"--laurel-rank \(17\) must be at most --hidden-size",
        ),
        ({"residual_connection": "laurel", "laurel_form": "pa", "laurel_rank": 2}, {}, "needs a --laurel-form with lr"),
        ({"residual_connection": "laurel", "laurel_previous": 2}, {}, "needs a --laurel-form with pa, not lr"),
        (
            {"residual_connection": "laurel", "laurel_form": "pa", "laurel_previous": 0},
            {},
            "--laurel-previous must be at least 1, not 0",
        ),
        ({"laurel_form": "pa"}, {}, r"--laurel-form \(pa\) needs --residual-connection laurel, not plain"),
        ({"layerscale_init": 0.1}, {}, r"--layerscale-init \(0.1\) needs --residual-connection layerscale, not plain"),
        (
            {"residual_connection": "layerscale", "layerscale_init": 0.0},
            {},
            "--layerscale-init must be positive, not 0.0",
        ),
        (
            {"residual_connection": "laurel"},
            {"norm_placement": "post"},
            "--norm-placement post replaces the stream by its norm, which --residual-connection laurel does not allow",
        ),
        (
            {"residual_connection": "frac", "output_init_by_streams": True},
            {},
            r"--output-init-by-streams \(True\) needs",
        ),
        (
            {"residual_scale": "completep"},
            {},
            r"--residual-scale \(completep\) and --base-num-layers \(None\) go together",
        ),
        ({"base_num_layers": 2}, {}, r"--residual-scale \(none\) and --base-num-layers \(2\) go together"),
        ({"stochastic_depth": 1.0}, {}, r"--stochastic-depth must be in \[0, 1\), not 1.0"),
        ({"layerdrop": -0.1}, {}, r"--layerdrop must be in \[0, 1\), not -0.1"),
        ({"linearity_regularization": -1.0}, {}, "--linearity-regularization must not be negative, not -1.0"),
        (
            {"residual_connection": "rezero"},
            {"init_scheme": "fixup"},
            "--init-scheme fixup starts sublayers' outputs at 0, from where --residual-connection rezero does not",
        ),
        (
            {"residual_connection": "deep-delta", "residual_scale": "completep", "base_num_layers": 2},
            {},
            "deep-delta takes the direction only: leave it out",
        ),
        ({}, {"init_scheme": "deepnorm"}, "--init-scheme deepnorm needs --norm-placement deepnorm"),
        (
            {"residual_scale": "completep", "base_num_layers": 2},
            {"init_scheme": "fixup"},
            "--init-scheme must be megatron or orthogonal, not fixup",
        ),
    ],
)
def test_refusals(residual: dict[str, Any], model: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small_config(residual, **model)
