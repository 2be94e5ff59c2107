"""Between a family's config.json and our arguments; what one side cannot say is refused, with the setting's name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_hc.config import ModelConfig
from megatron_hc.convert.names import NAMES

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "olmo2": "Olmo2ForCausalLM",
    "gpt2": "GPT2LMHeadModel",
    "mixtral": "MixtralForCausalLM",
    "olmoe": "OlmoeForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
}
NOT_YET = {
    "deepseek_v2": "latent attention",
    "deepseek_v3": "latent attention",
    "kimi_k2": "latent attention",
    "mistral": "sliding windows",
    "gpt_oss": "attention sinks and sliding windows",
    "gemma2": "soft caps of logits and sliding windows",
    "gemma3_text": "sliding windows",
    "olmo3": "sliding windows",
}
"""model_type -> what it has and we do not."""
LLAMA3_ROPE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
MOE = ("mixtral", "olmoe", "qwen3_moe")
DEFAULTS: dict[str, dict[str, Any]] = {
    "gpt2": {"activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, "tie_word_embeddings": True},
    "llama": {"rms_norm_eps": 1e-6},
    "qwen2": {"rms_norm_eps": 1e-6, "num_key_value_heads": 32},
    "qwen3": {"rms_norm_eps": 1e-6, "num_key_value_heads": 32, "head_dim": 128},
    "olmo2": {"rms_norm_eps": 1e-5},
    "mixtral": {"rms_norm_eps": 1e-5, "num_key_value_heads": 8, "num_experts_per_tok": 2, "rope_theta": 1e6},
    "olmoe": {"rms_norm_eps": 1e-5, "norm_topk_prob": False, "num_experts_per_tok": 8},
    "qwen3_moe": {
        "rms_norm_eps": 1e-6, "num_key_value_heads": 4, "norm_topk_prob": False, "decoder_sparse_step": 1,
        "num_experts_per_tok": 8,
    },
}  # fmt: skip
"""What a config.json leaves out where it is the family's default."""


def model_type_of(config: Mapping[str, Any]) -> str:
    """The family, if it is one that can be converted."""
    name = config.get("model_type")
    if name in NAMES:
        return str(name)
    why = "the families are " + ", ".join(NAMES)
    if name in NOT_YET:
        why = f"it has {NOT_YET[name]}, which is not here yet"
    raise ValueError(f"config.json: model_type {name!r} cannot be converted: {why}")


def arguments_of(config: Mapping[str, Any]) -> tuple[dict[str, Any], int]:
    """config.json -> (the model's arguments by field name, vocabulary size)."""
    family, given = model_type_of(config), {name: value for name, value in config.items() if value is not None}
    if config.get("num_key_value_heads", 0) is None and "num_attention_heads" in given:
        given["num_key_value_heads"] = given["num_attention_heads"]  # null says so; what is left out is the default
    config = {**DEFAULTS[family], **given}
    _refuse(family, config)
    try:
        found = _gpt2_arguments(config) if family == "gpt2" else _llama_arguments(family, config)
        vocab_size = int(config["vocab_size"])
    except (KeyError, TypeError, ZeroDivisionError) as error:
        raise ValueError(f"config.json of {family} lacks {error}, or it is no number") from error
    if vocab_size < 1:
        raise ValueError(f"config.json: vocab_size must be positive, not {vocab_size}")
    return found, vocab_size


def _refuse(family: str, config: Mapping[str, Any]) -> None:
    """Settings that would change the function, at other values than those that are offered."""
    wanted = {
        "use_sliding_window": (False,),
        "sliding_window": (None,) if config.get("use_sliding_window", family == "mixtral") else None,
        "mlp_bias": (False,),
        "attention_bias": (False,),
        "clip_qkv": (None,),
        "hidden_act": ("silu",),
        "pretraining_tp": (1,),
        "activation_function": ("gelu_new", "gelu", "gelu_pytorch_tanh"),
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "reorder_and_upcast_attn": (False,),
        "add_cross_attention": (False,),
        "partial_rotary_factor": (1, 1.0),
    }
    for name, allowed in wanted.items():
        value = config.get(name)
        if value is None or allowed is None or value in allowed:
            continue
        if name in ("attention_bias", "mlp_bias") and config.get("attention_bias") == config.get("mlp_bias") is True:
            continue  # a bias everywhere: ours without --disable-bias-linear
        offered = " or ".join(str(item) for item in allowed)
        raise ValueError(f"config.json: {name} {value!r} of {family} is not offered here, only {offered}")
    kinds = set(config.get("layer_types") or ()) - {"full_attention"}
    if kinds:
        raise ValueError(f"config.json: layer_types {', '.join(sorted(kinds))} of {family} are not offered here")


def _gpt2_arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "num_layers": config["n_layer"],
        "hidden_size": config["n_embd"],
        "num_attention_heads": config["n_head"],
        "ffn_hidden_size": config.get("n_inner") or 4 * config["n_embd"],
        "max_position_embeddings": config["n_positions"],
        "position_embedding_type": "learned_absolute",
        "normalization": "LayerNorm",
        "norm_epsilon": config["layer_norm_epsilon"],
        "openai_gelu": config["activation_function"] != "gelu",
        "untie_embeddings_and_output_weights": not config["tie_word_embeddings"],
        "init_method_std": config.get("initializer_range", 0.02),
    }


def _llama_arguments(family: str, config: Mapping[str, Any]) -> dict[str, Any]:
    heads = config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads", heads)
    has_bias = bool(config.get("attention_bias")) and bool(config.get("mlp_bias"))
    found = {
        "num_layers": config["num_hidden_layers"],
        "hidden_size": config["hidden_size"],
        "num_attention_heads": heads,
        "group_query_attention": kv_heads != heads,
        "num_query_groups": kv_heads if kv_heads != heads else 1,
        "kv_channels": config.get("head_dim") or config["hidden_size"] // heads,
        "ffn_hidden_size": config["intermediate_size"],
        "max_position_embeddings": config["max_position_embeddings"],
        "position_embedding_type": "rope",
        "normalization": "RMSNorm",
        "norm_epsilon": config["rms_norm_eps"],
        "swiglu": True,
        "disable_bias_linear": not has_bias,
        "add_qkv_bias": family == "qwen2",
        "qk_layernorm": family in ("qwen3", "qwen3_moe", "olmo2", "olmoe"),
        "qk_layernorm_across_heads": family in ("olmo2", "olmoe"),
        "norm_placement": "reordered" if family == "olmo2" else "pre",
        "untie_embeddings_and_output_weights": not config.get("tie_word_embeddings", False),
        "init_method_std": config.get("initializer_range", 0.02),
    }
    return found | _rope_arguments(config) | (_moe_arguments(family, config) if family in MOE else {})


def _rope_arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    rope = dict(config.get("rope_scaling") or {}) | dict(config.get("rope_parameters") or {})
    found: dict[str, Any] = {"rotary_base": rope.get("rope_theta", config.get("rope_theta", 10000.0))}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(f"config.json: partial_rotary_factor {rope['partial_rotary_factor']} is not offered here")
    if kind == "default":
        return found
    if kind != "llama3":
        raise ValueError(f"config.json: rope type {kind!r} is not offered here, only default and llama3")
    for name, value in LLAMA3_ROPE.items():
        if rope.get(name, value) != value:
            raise ValueError(f"config.json: {name} {rope[name]} of rope type llama3 must be {value:g}, as in Llama 3")
    return found | {"use_rope_scaling": True, "rope_scaling_factor": rope["factor"]}


def _moe_arguments(family: str, config: Mapping[str, Any]) -> dict[str, Any]:
    experts = config["num_experts"] if "num_experts" in config else config["num_local_experts"]
    found: dict[str, Any] = {
        "num_experts": experts,
        "moe_router_topk": config["num_experts_per_tok"],
        # Softmax over all, then divided by the sum of the chosen: the same as softmax over the chosen.
        "moe_router_pre_softmax": family != "mixtral" and not config["norm_topk_prob"],
        "moe_router_load_balancing_type": ["aux_loss"],
    }
    if family == "qwen3_moe":
        layers, step = config["num_hidden_layers"], config["decoder_sparse_step"]
        dense = set(config.get("mlp_only_layers") or ())
        pattern = [int(i not in dense and (i + 1) % step == 0) for i in range(layers)]
        found |= {"moe_ffn_hidden_size": config["moe_intermediate_size"]}
        if 0 in pattern:
            found["moe_layer_freq"] = [str(pattern)]
    return found


def config_of(family: str, model: ModelConfig, vocab_size: int, dtype: str) -> dict[str, Any]:
    """Our model as config.json of a family that ``reasons_against`` has nothing against."""
    common = {
        "architectures": [ARCHITECTURES[family]],
        "model_type": family,
        "vocab_size": vocab_size,
        "dtype": dtype,
        "torch_dtype": dtype,  # what transformers 4 reads
        "tie_word_embeddings": not model.untie_embeddings_and_output_weights,
        "initializer_range": model.init_method_std,
        "use_cache": True,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    if family == "gpt2":
        return common | {
            "n_layer": model.num_layers,
            "n_embd": model.hidden_size,
            "n_head": model.num_attention_heads,
            "n_inner": model.ffn_size,
            "n_positions": model.max_positions,
            "layer_norm_epsilon": model.norm_epsilon,
            "activation_function": "gelu_new" if model.openai_gelu else "gelu",
            "attn_pdrop": model.attention_dropout,
            "embd_pdrop": model.hidden_dropout,
            "resid_pdrop": model.hidden_dropout,
        }
    common |= {
        "num_hidden_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.num_kv_heads,
        "head_dim": model.head_size,
        "intermediate_size": model.ffn_size,
        "max_position_embeddings": model.max_positions,
        "rms_norm_eps": model.norm_epsilon,
        "hidden_act": "silu",
        "attention_bias": family == "llama" and not model.disable_bias_linear,
        "attention_dropout": model.attention_dropout,
    }
    if family == "llama":
        common["mlp_bias"] = not model.disable_bias_linear
    return common | _rope_config(model) | (_moe_config(family, model) if family in MOE else {})


def _rope_config(model: ModelConfig) -> dict[str, Any]:
    rope: dict[str, Any] = {"rope_theta": model.rotary_base, "rope_type": "default"}
    found: dict[str, Any] = {"rope_parameters": rope, "rope_theta": model.rotary_base}
    if model.use_rope_scaling:
        rope |= {"rope_type": "llama3", "factor": model.rope_scaling_factor, **LLAMA3_ROPE}
        found["rope_scaling"] = {name: value for name, value in rope.items() if name != "rope_theta"}
    return found


def _moe_config(family: str, model: ModelConfig) -> dict[str, Any]:
    moe = model.moe
    found: dict[str, Any] = {
        "num_experts_per_tok": moe.moe_router_topk,
        "router_aux_loss_coef": moe.aux_loss_coeff("aux_loss"),
        "output_router_logits": False,
    }
    found["num_local_experts" if family == "mixtral" else "num_experts"] = moe.num_experts
    if family in ("mixtral", "olmoe"):
        found["intermediate_size"] = model.expert_ffn_size
    if family != "mixtral":
        found["norm_topk_prob"] = not moe.moe_router_pre_softmax
    if family == "qwen3_moe":
        has_experts = moe.has_experts(model.num_layers)
        found |= {
            "moe_intermediate_size": model.expert_ffn_size,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [i for i, is_sparse in enumerate(has_experts) if not is_sparse],
        }
    return found


def reasons_against(family: str, model: ModelConfig) -> list[str]:
    """Flags of a model that a family has no words for; none: the family's own code computes the model."""
    is_gpt2, moe = family == "gpt2", model.moe
    has_across = family in ("olmo2", "olmoe")
    wanted: dict[str, tuple[bool, bool]] = {  # what is shown -> (as it is, as the family has it)
        "--position-embedding-type learned_absolute": (model.position_embedding_type == "learned_absolute", is_gpt2),
        "--position-embedding-type none": (model.position_embedding_type == "none", False),
        "--rotary-percent": (model.position_embedding_type == "rope" and model.rotary_percent != 1, False),
        "--normalization LayerNorm": (model.normalization == "LayerNorm", is_gpt2),
        "--disable-bias-layernorm": (model.disable_bias_layernorm, False),
        "--rmsnorm-bias": (model.rmsnorm_bias, False),
        "--swiglu": (model.swiglu, not is_gpt2),
        "--squared-relu": (model.squared_relu, False),
        "--add-qkv-bias": (model.add_qkv_bias and model.disable_bias_linear, family == "qwen2"),
        "--qk-layernorm": (model.qk_layernorm, has_across or family in ("qwen3", "qwen3_moe")),
        "--qk-layernorm-across-heads": (model.qk_layernorm_across_heads, has_across),
        "--num-experts": (moe.num_experts is not None, family in MOE),
        f"--value-residual {model.value_residual}": (model.value_residual != "none", False),
        "--single-layer-value": (model.single_layer_value, False),
        f"--residual-scale {model.residual.residual_scale}": (model.branch_scale != 1.0, False),
        f"--residual-connection {model.residual.residual_connection}": (
            model.residual.residual_connection != "plain",
            False,
        ),
    }
    found = [name if is_there else f"no {name}" for name, (is_there, wants) in wanted.items() if is_there != wants]
    placement = "reordered" if family == "olmo2" else "pre"
    if model.norm_placement != placement:
        found.append(f"--norm-placement {model.norm_placement}")
    has_bias = not model.disable_bias_linear
    if family != "llama" and has_bias != is_gpt2:
        found.append("--disable-bias-linear" if is_gpt2 else "no --disable-bias-linear")
    if is_gpt2 and (model.kv_channels not in (None, model.hidden_size // model.num_attention_heads)):
        found.append(f"--kv-channels {model.kv_channels}")
    if is_gpt2 and model.group_query_attention:
        found.append("--group-query-attention")
    if family == "olmoe" and model.head_size != model.hidden_size // model.num_attention_heads:
        found.append(f"--kv-channels {model.kv_channels}")
    if family in MOE:
        found += _reasons_against_moe(family, model)
    return found


def _reasons_against_moe(family: str, model: ModelConfig) -> list[str]:
    moe = model.moe
    found = []
    if moe.moe_router_score_function != "softmax":
        found.append(f"--moe-router-score-function {moe.moe_router_score_function}")
    if moe.moe_router_topk_scaling_factor not in (None, 1.0):
        found.append("--moe-router-topk-scaling-factor")
    if moe.moe_router_num_groups is not None:
        found.append("--moe-router-num-groups")
    if moe.moe_shared_expert_intermediate_size is not None:
        found.append("--moe-shared-expert-intermediate-size")
    if "sinkhorn" in moe.moe_router_load_balancing_type:
        found.append("--moe-router-load-balancing-type sinkhorn")
    if family == "mixtral" and moe.moe_router_pre_softmax:
        found.append("--moe-router-pre-softmax")
    if family != "qwen3_moe" and not all(moe.has_experts(model.num_layers)):
        found.append("--moe-layer-freq")
    return found


def family_of(model: ModelConfig) -> str | None:
    """The first family whose own code computes the model; None: it needs code of its own."""
    return next((family for family in NAMES if not reasons_against(family, model)), None)
