"""How families of Hugging Face name their tensors, as they lie on disk. ``{i}`` is the layer, ``{e}`` the expert.

Names in memory may differ (transformers 5 fuses experts when it loads them): files are what counts here.
"""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True, kw_only=True)
class Names:
    """Templates of one family; None: the family has no such tensor. Linears are without .weight and .bias."""

    layer: str = "model.layers.{i}."
    """Put before all names of a layer."""
    embedding: str = "model.embed_tokens.weight"
    position: str | None = None
    final_norm: str = "model.norm"
    output: str = "lm_head.weight"
    attention_norm: str | None = "input_layernorm"
    """At attention's read."""
    mlp_norm: str | None = "post_attention_layernorm"
    attention_output_norm: str | None = None
    """Of attention's output, before it is added."""
    mlp_output_norm: str | None = None
    qkv: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    """Three linears, or one that holds all queries, then all keys, then all values."""
    q_norm: str | None = None
    k_norm: str | None = None
    proj: str = "self_attn.o_proj"
    fc1: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    """Gate and up, or one."""
    fc2: str = "mlp.down_proj"
    router: str | None = None
    expert_fc1: tuple[str, ...] = ()
    expert_fc2: str = ""
    fused_fc1: str = "mlp.experts.gate_up_proj"
    """All experts in one tensor [E, 2 F, C], gates first: what newer files may hold instead."""
    fused_fc2: str = "mlp.experts.down_proj"
    """[E, C, F]"""
    fused_router: str = "mlp.gate"
    is_transposed: bool = False
    """Linears are stored [in, out] (GPT-2's Conv1D)."""
    optional_prefix: str = ""
    """What some files leave out in front of every name."""
    ignored: tuple[str, ...] = (r"rotary_emb\.inv_freq$",)
    """Regular expressions of tensors that older versions wrote, and that can be computed."""


LLAMA = Names()
QWEN3 = replace(LLAMA, q_norm="self_attn.q_norm", k_norm="self_attn.k_norm")
OLMO2 = replace(
    QWEN3,
    attention_norm=None,
    mlp_norm=None,
    attention_output_norm="post_attention_layernorm",
    mlp_output_norm="post_feedforward_layernorm",
)
QWEN3_MOE = replace(
    QWEN3,
    router="mlp.gate",
    expert_fc1=("mlp.experts.{e}.gate_proj", "mlp.experts.{e}.up_proj"),
    expert_fc2="mlp.experts.{e}.down_proj",
)
MIXTRAL = replace(
    LLAMA,
    router="block_sparse_moe.gate",
    expert_fc1=("block_sparse_moe.experts.{e}.w1", "block_sparse_moe.experts.{e}.w3"),
    expert_fc2="block_sparse_moe.experts.{e}.w2",
)
GPT2 = Names(
    layer="transformer.h.{i}.",
    embedding="transformer.wte.weight",
    position="transformer.wpe.weight",
    final_norm="transformer.ln_f",
    attention_norm="ln_1",
    mlp_norm="ln_2",
    qkv=("attn.c_attn",),
    proj="attn.c_proj",
    fc1=("mlp.c_fc",),
    fc2="mlp.c_proj",
    is_transposed=True,
    optional_prefix="transformer.",
    ignored=(r"\.attn\.(masked_)?bias$",),
)

NAMES: dict[str, Names] = {
    "llama": LLAMA,
    "qwen2": LLAMA,
    "qwen3": QWEN3,
    "olmo2": OLMO2,
    "gpt2": GPT2,
    "mixtral": MIXTRAL,
    "olmoe": QWEN3_MOE,
    "qwen3_moe": QWEN3_MOE,
}
"""model_type -> its names."""
