"""Run as a program: a GPT model of megatron-core with random weights, saved as torch_dist, and its logits.

python convert_megatron_core.py {dense,moe,qk} FOLDER
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

MODEL: dict[str, Any] = {
    "num_layers": 3, "hidden_size": 32, "ffn_hidden_size": 48, "num_attention_heads": 4, "num_query_groups": 2,
    "normalization": "RMSNorm", "add_bias_linear": False, "layernorm_epsilon": 1e-5,
}  # fmt: skip
OTHERS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "dense": ({}, {}),
    "moe": (
        {"num_moe_experts": 4, "moe_router_topk": 2, "moe_ffn_hidden_size": 24, "moe_grouped_gemm": False},
        {"num_experts": 4, "moe_grouped_gemm": False},
    ),
    "qk": ({"qk_layernorm": True, "add_qkv_bias": True}, {"qk_layernorm": True}),
}
VOCAB, LENGTH = 128, 64


def main() -> None:
    import torch
    import torch._dynamo
    import torch.nn.functional as F

    name, folder = sys.argv[1], Path(sys.argv[2])
    torch._dynamo.config.disable = True
    torch.cuda.current_device = lambda: "cpu"  # type: ignore[assignment,return-value]
    torch.cuda.synchronize = lambda *_: None  # type: ignore[assignment]
    folder.mkdir(parents=True)
    store = torch.distributed.FileStore(str(folder / "store"), 1)
    torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=store)
    from megatron.core import dist_checkpointing, parallel_state
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.tensor_parallel.random import initialize_rng_tracker
    from megatron.core.transformer.moe import moe_utils
    from megatron.core.transformer.transformer_config import TransformerConfig

    moe_utils.te_general_gemm = None  # which is not defined without transformer-engine
    stream = SimpleNamespace(wait_stream=lambda other: None, synchronize=lambda: None)
    torch.cuda.Stream = lambda *_, **__: stream  # type: ignore[assignment,misc]
    torch.cuda.current_stream = lambda device=None: stream  # type: ignore[assignment]
    torch.cuda.stream = lambda stream: contextlib.nullcontext()  # type: ignore[assignment]
    parallel_state.initialize_model_parallel()
    initialize_rng_tracker(inference_rng_tracker=True)
    fields, spec = OTHERS[name]
    off = ("bias_dropout_fusion", "bias_activation_fusion", "masked_softmax_fusion", "persist_layer_norm")
    off += ("apply_rope_fusion", "gradient_accumulation_fusion")
    config = TransformerConfig(
        **MODEL, **fields, **dict.fromkeys(off, False), gated_linear_unit=True, activation_func=F.silu,
        hidden_dropout=0.0, attention_dropout=0.0, use_cpu_initialization=True,
    )  # fmt: skip
    model = GPTModel(
        config, get_gpt_layer_local_spec(normalization="RMSNorm", **spec), vocab_size=VOCAB,
        max_sequence_length=LENGTH, position_embedding_type="rope", share_embeddings_and_output_weights=False,
    ).eval()  # fmt: skip
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.2)
        tokens = torch.arange(16).reshape(2, 8)
        positions = torch.arange(8).unsqueeze(0).expand(2, -1)
        mask = ~torch.ones(8, 8, dtype=torch.bool).tril()[None, None]
        logits = model(tokens, positions, mask)
    place = folder / "iter_0000003"
    place.mkdir()
    arguments = {
        **MODEL, "norm_epsilon": 1e-5, "group_query_attention": True, "seq_length": LENGTH, "swiglu": True,
        "max_position_embeddings": LENGTH, "position_embedding_type": "rope", "rotary_base": 10000,
        "untie_embeddings_and_output_weights": True, "num_experts": fields.get("num_moe_experts"),
        "moe_ffn_hidden_size": fields.get("moe_ffn_hidden_size"), "moe_router_topk": 2, "moe_layer_freq": 1,
        "qk_layernorm": "qk_layernorm" in fields, "add_qkv_bias": "add_qkv_bias" in fields, "vocab_size": VOCAB,
        "attention_backend": config.attention_backend,
    }  # fmt: skip
    arguments.pop("layernorm_epsilon")
    state = {"model": model.sharded_state_dict(), "args": argparse.Namespace(**arguments), "iteration": 3}
    dist_checkpointing.save(state, str(place))
    (folder / "latest_checkpointed_iteration.txt").write_text("3")
    (folder / "logits.json").write_text(json.dumps(logits.tolist()))


if __name__ == "__main__":
    main()
