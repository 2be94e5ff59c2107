"""A model that no family can hold, as a folder with modelling code of its own (``hf_code/``)."""

from __future__ import annotations

import ast
import shutil
from pathlib import Path
from typing import Any

from megatron_hc.config import ModelConfig
from megatron_hc.model.mlp import activation_name

CODE = Path(__file__).parent / "hf_code"
MODELING, CONFIGURATION = "modeling_megatron_hc", "configuration_megatron_hc"
MODEL_TYPE = "megatron_hc"
AUTO_MAP = {
    "AutoConfig": f"{CONFIGURATION}.MegatronHCConfig",
    "AutoModelForCausalLM": f"{MODELING}.MegatronHCForCausalLM",
}
OUTPUT, OUTPUT_THERE = "output_layer.weight", "lm_head.weight"


def name_of(ours: str) -> str:
    """One of our tensors as the modelling code names it."""
    return OUTPUT_THERE if ours == OUTPUT else f"model.{ours}"


def served() -> set[str]:
    """Residual methods that the modelling code knows, read from its text."""
    for node in ast.parse((CODE / f"{MODELING}.py").read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "RESIDUALS":
            assert isinstance(node.value, ast.Dict)
            return {key.value for key in node.value.keys if isinstance(key, ast.Constant)}  # type: ignore[misc]
    raise AssertionError("the modelling code has no table RESIDUALS")


def write_code(model: ModelConfig, vocab_size: int, dtype: str, folder: Path) -> dict[str, Any]:
    """Copy the modelling code into ``folder``; returns its config.json."""
    method = model.residual.residual_connection
    if method not in served():
        raise ValueError(f"--residual-connection {method} cannot be exported: the modelling code does not have it yet")
    for name in (MODELING, CONFIGURATION):
        shutil.copyfile(CODE / f"{name}.py", folder / f"{name}.py")
    return custom_config(model, vocab_size, dtype)


def custom_config(model: ModelConfig, vocab_size: int, dtype: str) -> dict[str, Any]:
    """config.json: what ``MegatronHCConfig`` takes."""
    is_scaled = model.position_embedding_type == "rope" and model.use_rope_scaling
    qk_norm = "across-heads" if model.qk_layernorm_across_heads else "per-head" if model.qk_layernorm else None
    positions = {"rope": "rope", "learned_absolute": "learned", "none": "none"}
    return {
        "architectures": ["MegatronHCForCausalLM"],
        "auto_map": AUTO_MAP,
        "model_type": MODEL_TYPE,
        "dtype": dtype,
        "torch_dtype": dtype,  # what transformers 4 reads
        "vocab_size": vocab_size,
        "num_hidden_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_size,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.num_kv_heads,
        "head_dim": model.head_size,
        "max_position_embeddings": model.max_positions,
        "initializer_range": model.init_method_std,
        "tie_word_embeddings": not model.untie_embeddings_and_output_weights,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
        "position_embedding": positions[model.position_embedding_type],
        "rope_base": model.rotary_base,
        "rotary_percent": model.rotary_percent,
        "rope_scaling_factor": model.rope_scaling_factor if is_scaled else None,
        "norm": model.normalization,
        "norm_epsilon": model.norm_epsilon,
        "norm_bias": model.rmsnorm_bias,
        "layernorm_bias": not model.disable_bias_layernorm,
        "norm_placement": model.norm_placement,
        "normformer_residual_scale": model.normformer_residual_scale,
        "activation": activation_name(model),
        "linear_bias": not model.disable_bias_linear,
        "qkv_bias": model.add_qkv_bias,
        "qk_norm": qk_norm,
        "residual": model.residual.residual_connection,
        "residual_options": residual_options(model),
        "fp32_residual": model.fp32_residual_connection,
        "stream_factor": model.residual_stream_factor,
        "branch_scale": model.branch_scale,
        **value_config(model),
        **expert_config(model),
    }


def residual_options(model: ModelConfig) -> dict[str, Any]:
    """What a method of the modelling code reads beside its name."""
    options = model.residual
    method = options.residual_connection
    if method in ("hyper", "frac", "mhc", "mhc-lite", "kromhc", "virtual-width"):
        found: dict[str, Any] = {"streams": options.residual_streams, "static": options.static_residual}
        found["readout"] = options.residual_readout
        if method in ("hyper", "frac", "virtual-width"):
            chosen = options.residual_norm_weight
            found["norm_weight"] = method != "hyper" if chosen is None else chosen
        if method == "mhc":
            found["megatron"] = options.mhc_convention == "megatron"
            found |= {"single_pass": options.mhc_single_pass, "iterations": options.mhc_sinkhorn_iterations}
        if method == "virtual-width":
            found |= {"fractions": options.virtual_width_fractions, "projections": options.virtual_width_projections}
        return found
    if method == "gated":
        rank = options.gated_residual_rank or model.hidden_size // 8
        return {"streams": options.residual_streams, "rank": rank, "readout": "mean"}
    if method == "attention":
        return {"block_size": max(options.attention_residual_block_size, 1)}
    if method == "denseformer":
        return {"dilation": options.denseformer_dilation, "period": options.denseformer_period}
    if method == "laurel":
        return {"form": options.laurel_form, "rank": options.laurel_rank, "previous": options.laurel_previous}
    return {}


def value_config(model: ModelConfig) -> dict[str, Any]:
    kind = model.value_residual
    if model.single_layer_value:
        return {"value_residual": "single"}
    if kind in ("half", "constant"):
        return {"value_residual": "constant", "value_weights": list(model.value_weights)}
    if kind == "sparse":
        first = max(model.num_layers - model.num_value_residual_layers, 1)
        return {"value_residual": "constant", "value_weights": list(model.value_weights), "value_first_layer": first}
    if kind == "neutreno":
        return {"value_residual": kind, "value_weights": [model.neutreno_weight]}
    return {"value_residual": kind}


def expert_config(model: ModelConfig) -> dict[str, Any]:
    moe = model.moe
    if moe.num_experts is None:
        return {}
    router = {
        "score_function": moe.moe_router_score_function,
        "pre_softmax": moe.moe_router_pre_softmax,
        "scaling_factor": moe.moe_router_topk_scaling_factor or 1.0,
        "num_groups": moe.moe_router_num_groups,
        "group_topk": moe.moe_router_group_topk,
        "expert_bias": moe.moe_router_enable_expert_bias,
        "sinkhorn": "sinkhorn" in moe.moe_router_load_balancing_type,
        "fp64": moe.moe_router_dtype == "fp64",
    }
    return {
        "num_experts": moe.num_experts,
        "expert_layers": moe.has_experts(model.num_layers),
        "expert_size": model.expert_ffn_size,
        "experts_per_token": moe.moe_router_topk,
        "router_options": router,
        "shared_expert_size": moe.moe_shared_expert_intermediate_size,
        "shared_expert_gate": moe.moe_shared_expert_gate,
    }
