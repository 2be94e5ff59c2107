"""What test_registry.py runs: every registered method in every form of it that has equations of its own."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import pytest
from helpers import small_config

from megatron_hc.config import ModelConfig
from megatron_hc.residual import RESIDUALS

Claim = Literal["exact", "without eps", "nothing", "unstated"]


@dataclass(frozen=True)
class Case:
    """One form of a method."""

    name: str
    claim: Claim
    """At its initial values, against the plain residual: equal ('without eps': with --norm-epsilon 0) or different."""
    residual: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    is_main: bool = False
    """Runs in every test; the others skip the slow ones (compile) unless ``--slow``."""

    def config(self, **model: Any) -> ModelConfig:
        return small_config(self.residual, **{**self.model, **model})


THREE_SUMMED = {"residual_streams": 3, "residual_readout": "sum"}
SINGLE_PASS_STATIC = {"mhc_single_pass": True, "static_residual": True, "residual_streams": 3}
MEGATRON_STATIC = {"mhc_convention": "megatron", "static_residual": True, "residual_streams": 2}
COPIES_SUMMED = {
    "virtual_width_projections": False,
    "virtual_width_fractions": 4,
    "residual_streams": 8,
    "residual_readout": "sum",
    "residual_norm_weight": False,
}

LAYERNORM_WITHOUT_BIAS = {"normalization": "LayerNorm", "disable_bias_layernorm": True}

FORMS: dict[str, list[tuple[str, Claim, dict[str, Any], dict[str, Any]]]] = {
    # method: (form, claim, fields of ResidualConfig, fields of ModelConfig); the first form is the main one
    "plain": [
        ("", "exact", {}, {}),
        ("layernorm", "exact", {}, {"normalization": "LayerNorm"}),
    ],
    "hyper": [
        ("dynamic", "exact", {}, {}),
        ("static", "exact", {"static_residual": True}, {}),
        ("norm-weight", "exact", {"residual_norm_weight": True}, LAYERNORM_WITHOUT_BIAS),
        ("n3-sum", "without eps", {"residual_streams": 3, "residual_readout": "sum"}, {}),
        ("n1", "exact", {"residual_streams": 1}, {}),
    ],
    "frac": [
        ("dynamic", "exact", {}, {}),
        ("static", "exact", {"static_residual": True}, {}),
        ("no-norm-weight-m2", "exact", {"residual_norm_weight": False, "residual_streams": 2}, {}),
        ("layernorm", "exact", {}, {"normalization": "LayerNorm"}),
    ],
    "mhc": [
        ("dynamic", "exact", {}, {}),
        ("static-n2", "exact", {"static_residual": True, "residual_streams": 2}, {}),
        ("n3-sum-5-iterations", "without eps", THREE_SUMMED | {"mhc_sinkhorn_iterations": 5}, {}),
        ("single-pass", "exact", {"mhc_single_pass": True}, {}),
        ("single-pass-static-n3", "exact", SINGLE_PASS_STATIC, {}),
        ("megatron", "nothing", {"mhc_convention": "megatron"}, {}),
        ("megatron-static-n2", "exact", MEGATRON_STATIC, {}),
    ],
    "mhc-lite": [
        ("dynamic", "nothing", {}, {}),
        ("n3-sum", "nothing", THREE_SUMMED, {}),
        ("static", "nothing", {"static_residual": True}, {}),
    ],
    "kromhc": [
        ("dynamic", "nothing", {}, {}),
        ("n8", "nothing", {"residual_streams": 8}, {}),
        ("static-n2", "nothing", {"static_residual": True, "residual_streams": 2}, {}),
    ],
    "gated": [
        ("", "nothing", {}, {}),
        ("n2-rank3", "nothing", {"residual_streams": 2, "gated_residual_rank": 3}, {}),
    ],
    "virtual-width": [
        ("dynamic", "nothing", {}, {}),
        ("static", "nothing", {"static_residual": True}, {}),
        ("m2-n3", "nothing", {"residual_streams": 3}, {}),
        ("copies", "exact", {"virtual_width_projections": False}, {}),
        ("copies-m4-n8-sum", "without eps", COPIES_SUMMED, {"normalization": "LayerNorm"}),
        ("copies-m2-n3", "exact", {"virtual_width_projections": False, "residual_streams": 3}, {}),
    ],
    "attention": [
        ("full", "without eps", {}, {}),
        ("blocks-of-2", "without eps", {"attention_residual_block_size": 2}, {}),
        ("blocks-of-4", "without eps", {"attention_residual_block_size": 4}, {}),
        ("blocks-of-5", "without eps", {"attention_residual_block_size": 5}, {"normalization": "LayerNorm"}),
    ],
    "denseformer": [
        ("", "exact", {}, {}),
        ("dilation-2", "exact", {"denseformer_dilation": 2}, {"num_layers": 4}),
        ("period-2", "exact", {"denseformer_period": 2}, {"num_layers": 4}),
        ("2x3", "exact", {"denseformer_dilation": 2, "denseformer_period": 3}, {"num_layers": 7}),
    ],
    "muddformer": [
        ("", "exact", {}, {}),
        ("layernorm", "exact", {}, {"normalization": "LayerNorm", "qk_layernorm": True}),
        ("layernorm-without-bias", "exact", {}, LAYERNORM_WITHOUT_BIAS),
    ],
    "rezero": [("", "nothing", {}, {})],
    "layerscale": [("", "nothing", {}, {})],
    "laurel": [  # its other forms are in test_single.py
        ("rw-lr", "nothing", {"laurel_form": "rw-lr"}, {}),
        ("pa", "exact", {"laurel_form": "pa"}, {}),
        ("rw-lr-pa-2", "nothing", {"laurel_form": "rw-lr-pa", "laurel_previous": 2}, {}),
    ],
    "orthogonal": [("", "nothing", {}, {})],
    "sparse-aggregation": [("5-layers", "exact", {}, {"num_layers": 5})],
    "deep-delta": [("", "nothing", {}, {})],
}

ADDITIONS: dict[str, dict[str, Any]] = {
    # Value residuals and norm placements go with every method: fields of ModelConfig.
    "half": {"value_residual": "half"},
    "constant": {"value_residual": "constant"},
    "constant-weights": {
        "value_residual": "constant",
        "value_residual_first_weight": -0.25,
        "value_residual_own_weight": 0.75,
    },
    "learnable": {"value_residual": "learnable"},
    "sparse": {"value_residual": "sparse"},
    "sparse-2-of-4": {"value_residual": "sparse", "value_residual_layers": 2, "num_layers": 4},
    "dense": {"value_residual": "dense"},
    "neutreno": {"value_residual": "neutreno"},
    "per-token": {"value_residual": "per-token"},
    "single-layer-value": {"single_layer_value": True},
    "post": {"norm_placement": "post"},
    "deepnorm": {"norm_placement": "deepnorm", "init_scheme": "deepnorm"},
    "reordered": {"norm_placement": "reordered", "qk_layernorm": True},
    "peri": {"norm_placement": "peri"},
    "hybrid": {"norm_placement": "hybrid"},
    "hybrid-star": {"norm_placement": "hybrid-star", "normalization": "LayerNorm"},
    "normformer": {"norm_placement": "normformer"},
    "normformer-scale": {"norm_placement": "normformer", "normformer_residual_scale": True},
    "res-post-cosine": {"norm_placement": "res-post-cosine"},
    "none": {"norm_placement": "none"},
    "depth-mup": {"residual": {"residual_scale": "depth-mup", "base_num_layers": 2}},
    "completep": {"residual": {"residual_scale": "completep", "base_num_layers": 1}, "normalization": "LayerNorm"},
    "hybrid-neutreno": {"norm_placement": "hybrid", "value_residual": "neutreno"},
    "normformer-dense": {"norm_placement": "normformer", "value_residual": "dense", "normalization": "LayerNorm"},
}

COMBINATIONS: tuple[tuple[str, str], ...] = (
    ("hyper", "dense"),
    ("hyper", "single-layer-value"),
    ("frac", "peri"),
    ("mhc", "per-token"),
    ("mhc", "reordered"),
    ("mhc-lite", "normformer"),
    ("kromhc", "res-post-cosine"),
    ("gated", "learnable"),
    ("gated", "normformer-dense"),
    ("virtual-width", "sparse"),
    ("attention", "half"),
    ("attention", "peri"),
    ("denseformer", "single-layer-value"),
    ("denseformer", "reordered"),
    ("muddformer", "per-token"),
    ("muddformer", "dense"),
    ("muddformer", "peri"),
    ("hyper", "completep"),
    ("layerscale", "peri"),
    ("laurel", "dense"),
    ("sparse-aggregation", "single-layer-value"),
    ("deep-delta", "reordered"),
)
"""(method, addition) of the default run; all allowed ones are tested under ``slow``."""

COMPILED = (("plain", "post"), ("plain", "peri"), ("hyper", "dense"), ("mhc", "per-token"), ("muddformer", "per-token"))


def combined(method: str, addition: str) -> Case:
    _, _, residual, model = FORMS.get(method, [("", "nothing", {}, {})])[0]
    model = {**model, **ADDITIONS[addition]}
    residual = {**residual, **model.pop("residual", {})}
    claim: Claim = "exact" if method == "plain" else "unstated"
    is_main = (method, addition) in COMPILED
    return Case(f"{method}-{addition}", claim, {"residual_connection": method, **residual}, model, is_main)


def is_allowed(case: Case) -> bool:
    try:
        case.config()
    except ValueError:
        return False
    return True


def all_combinations() -> list[Case]:
    """Every method with every addition that the configuration does not refuse."""
    return [case for m in RESIDUALS for a in ADDITIONS if is_allowed(case := combined(m, a))]


def cases() -> list[Case]:
    """Every case of every registered method. A method without a line above gets one, and fails for want of a claim."""
    found = [combined("plain", addition) for addition in ADDITIONS]
    found += [combined(method, addition) for method, addition in COMBINATIONS]
    for method in RESIDUALS:
        for position, (form, claim, residual, model) in enumerate(FORMS.get(method, [("", "exact", {}, {})])):
            name = f"{method}-{form}" if form else method
            residual = {"residual_connection": method, **residual}
            found.append(Case(name, claim, residual, model, is_main=position == 0))
    return found


def every_case() -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", [pytest.param(c, id=c.name) for c in cases()])


def main_cases() -> pytest.MarkDecorator:
    """The first form of each method by default, the others under ``slow``."""
    marks = {True: [], False: [pytest.mark.slow]}
    return pytest.mark.parametrize("case", [pytest.param(c, id=c.name, marks=marks[c.is_main]) for c in cases()])
