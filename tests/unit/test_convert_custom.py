"""Models that no family holds: exported with code of their own, loaded in a fresh process without megatron_hc."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import ADDITIONS, Case, cases, combined, is_allowed
from convert_models import write_checkpoint
from helpers import random_tokens
from safetensors.torch import save_file

from megatron_hc.config import MoEConfig
from megatron_hc.convert import hf
from megatron_hc.convert.custom import served
from megatron_hc.inference import load_model
from megatron_hc.residual import RESIDUALS, VALUE_RESIDUALS

pytest.importorskip("transformers")
PROGRAM = Path(__file__).with_name("convert_exports.py")
VALUES = [*(name for name in VALUE_RESIDUALS if name != "none"), "single-layer-value"]
QUIET = hf.Options(say=lambda text: None)

EXPERTS = {"num_experts": 4, "moe_ffn_hidden_size": 8, "moe_router_topk": 2}
MOES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    # name: fields of MoEConfig, of ModelConfig
    "softmax": (EXPERTS, {}),
    "pre-softmax": (EXPERTS | {"moe_router_pre_softmax": True, "moe_layer_freq": ("[0,1,1]",)}, {}),
    "sigmoid": (
        EXPERTS
        | {"moe_router_score_function": "sigmoid", "moe_router_enable_expert_bias": True}
        | {"moe_router_topk_scaling_factor": 2.5, "moe_router_num_groups": 2, "moe_router_group_topk": 1},
        {},
    ),
    "shared": (
        EXPERTS | {"moe_shared_expert_intermediate_size": 12, "moe_shared_expert_gate": True},
        {"swiglu": False, "openai_gelu": True, "disable_bias_linear": False},
    ),
    "sinkhorn": (EXPERTS | {"moe_router_load_balancing_type": ("sinkhorn",), "moe_router_topk": 1}, {}),
}
OTHERS: dict[str, dict[str, Any]] = {
    "learned-positions": {"position_embedding_type": "learned_absolute", "max_position_embeddings": 12},
    "no-positions": {"position_embedding_type": "none"},
    "llama3-rope": {"use_rope_scaling": True, "rotary_percent": 0.5, "kv_channels": 8},
    "untied": {"untie_embeddings_and_output_weights": True, "squared_relu": True, "swiglu": False},
    "across-heads": {"qk_layernorm": True, "qk_layernorm_across_heads": True, "add_qkv_bias": True},
    "fp32-stream": {"fp32_residual_connection": True},
}
NUMBERS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    # fields of ResidualConfig, of ModelConfig: far from what both sides have by default
    "base-and-epsilon": (
        {"residual_connection": "mhc", "mhc_sinkhorn_iterations": 1, "residual_streams": 3},
        {"rotary_base": 50.0, "norm_epsilon": 0.3, "ffn_hidden_size": 20},
    ),
    "weights-of-values": (
        {"residual_connection": "gated", "gated_residual_rank": 3},
        {
            "value_residual": "sparse", "value_residual_layers": 1, "value_residual_first_weight": 3.0,
            "value_residual_own_weight": 0.5,
        },
    ),
    "scaled-branches": (
        {"residual_connection": "hyper", "residual_scale": "completep", "base_num_layers": 1},
        {"value_residual": "neutreno", "neutreno_coefficient": 0.9},
    ),
    "readout-of-fractions": (
        {"residual_connection": "virtual-width", "virtual_width_fractions": 4, "residual_streams": 5}
        | {"virtual_width_projections": False, "residual_readout": "sum", "residual_norm_weight": False},
        {"value_residual": "constant", "value_residual_first_weight": 3.0, "value_residual_own_weight": 0.5},
    ),
    "router-in-double-precision": (
        {"residual_connection": "hyper", "residual_norm_weight": True},
        {"ffn_hidden_size": 20, "moe": MoEConfig(num_experts=3, moe_router_topk=3, moe_router_dtype="fp64")},
    ),
}  # fmt: skip


FORMS_BY_DEFAULT = (
    "hyper-static", "frac-static", "mhc-single-pass", "mhc-megatron", "virtual-width-copies", "attention-blocks-of-2",
    "denseformer-2x3", "laurel-rw-lr-pa-2", "muddformer-layernorm-without-bias",
)  # fmt: skip


def with_experts_and_others() -> list[Case]:
    found = []
    for name, (moe, model) in MOES.items():
        residual = {"residual_connection": "hyper" if name != "softmax" else "plain"}
        found.append(Case(f"moe-{name}", "unstated", residual, model | {"moe": MoEConfig(**moe)}))
    for name, model in OTHERS.items():
        found.append(Case(name, "unstated", {"residual_connection": "mhc"}, model))
    found += [Case(name, "unstated", residual, model) for name, (residual, model) in NUMBERS.items()]
    return found


def default_cases() -> list[Case]:
    """Every method with one value residual in turn, every norm placement, experts, and some forms of methods."""
    turns = [combined(method, VALUES[number % len(VALUES)]) for number, method in enumerate(RESIDUALS)]
    found = [case if is_allowed(case) else combined(case.residual["residual_connection"], "dense") for case in turns]
    placements = [combined("plain", name) for name, model in ADDITIONS.items() if "norm_placement" in model]
    forms = [case for case in cases() if case.name in FORMS_BY_DEFAULT]
    return [case for case in (*found, *placements, *forms, *with_experts_and_others()) if is_allowed(case)]


def checked(chosen: list[Case], folder: Path, dtype: str = "fp64", scale: float = 0.3) -> dict[str, dict[str, Any]]:
    """Case name -> what a fresh process finds in its export, with parameters ``scale`` off their initial values."""
    folders: dict[str, str] = {}
    for case in chosen:
        place = folder / case.name
        if case.name in folders:
            continue
        write_checkpoint(place / "ours", case.config(), dtype, scale)
        hf.export_hf(str(place / "ours"), str(place / "hf"), step=None, family="custom", options=QUIET)
        ours = load_model(str(place / "ours")).model
        tokens = random_tokens()
        with torch.no_grad():
            logits = ours.output.logits(ours(tokens)).transpose(0, 1).contiguous()
        save_file({"tokens": tokens, "logits": logits}, place / "hf" / "expected.safetensors")
        folders[case.name] = str(place / "hf")
    (folder / "cases.json").write_text(json.dumps(list(folders.values())))
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(folder / "modules"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(PROGRAM), str(folder / "cases.json"), str(folder / "results.json")]
    subprocess.run(command, env=environment, cwd=folder, check=True, timeout=900, capture_output=True)
    results = json.loads((folder / "results.json").read_text())
    return {name: results[path] for name, path in folders.items()}


def assert_same(results: dict[str, dict[str, Any]], tolerance: float = 1e-9) -> None:
    failed = {name: found["failed"] for name, found in results.items() if "failed" in found}
    assert not failed
    for key in ("error", "loss", "padding", "cache"):
        wrong = {name: found[key] for name, found in results.items() if not found[key] < tolerance}
        assert not wrong, key
    assert all(found["same_text"] and found["unset"] and found["tuple"] for found in results.values())
    assert all(len(found["refusals"]) == 4 for found in results.values())
    assert all(found["tied"] == (name != "untied") for name, found in results.items())


def test_every_method_is_served() -> None:
    assert served() >= RESIDUALS.keys(), "add the method to megatron_hc/convert/hf_code/modeling_megatron_hc.py"


def test_exports(tmp_path: Path) -> None:
    chosen = default_cases()
    methods = {case.residual.get("residual_connection", "plain") for case in chosen}
    values = {case.model.get("value_residual", "none") for case in chosen}
    assert methods == RESIDUALS.keys() and values == VALUE_RESIDUALS.keys()
    assert any(case.model.get("single_layer_value") for case in chosen)
    assert_same(checked(chosen, tmp_path))


@pytest.mark.slow
def test_every_form(tmp_path: Path) -> None:
    assert_same(checked([case for case in cases() if is_allowed(case)], tmp_path))


@pytest.mark.slow
def test_every_method_with_every_value_residual(tmp_path: Path) -> None:
    every = [case for method in RESIDUALS for value in VALUES if is_allowed(case := combined(method, value))]
    assert_same(checked(every, tmp_path))


def test_single_precision(tmp_path: Path) -> None:
    chosen = [combined(method, "learnable") for method in ("plain", "hyper", "mhc", "frac", "gated", "muddformer")]
    assert_same(checked(chosen, tmp_path, "fp32", scale=0.03), tolerance=1e-5)


def test_bfloat16(tmp_path: Path) -> None:
    """Norms, routers and residual parameters stay fp32, as in training."""
    chosen = [combined("mhc", "per-token"), combined("gated", "peri")]
    chosen.append(Case("moe", "unstated", {"residual_connection": "hyper"}, {"moe": MoEConfig(**MOES["sigmoid"][0])}))
    results = checked(chosen, tmp_path, "bf16")
    assert not any("failed" in found for found in results.values()), results
    for name, found in results.items():
        assert found["dtypes"] == ["torch.bfloat16", "torch.float32"], results
        # A rounding can send a token to another expert.
        assert name == "moe" or found["error"] < 0.15, results
