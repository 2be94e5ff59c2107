"""Tiny models of transformers with random weights, for the tests of conversion."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import helpers
import torch
from torch import Tensor

from megatron_hc import checkpoint
from megatron_hc.cli_options import dump
from megatron_hc.config import DataConfig, ModelConfig, TrainConfig
from megatron_hc.convert.hf import fresh_state, origins_of
from megatron_hc.mesh import Mesh
from megatron_hc.model.gpt import GPT
from megatron_hc.parallel.plan import placements
from megatron_hc.state import model_tensors

VOCAB = 131
LLAMA: dict[str, Any] = {
    "hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 6, "num_key_value_heads": 3,
    "intermediate_size": 40, "vocab_size": VOCAB, "max_position_embeddings": 96, "bos_token_id": None,
    "eos_token_id": None, "pad_token_id": None,
}  # fmt: skip
MOE = {"num_experts_per_tok": 2}
LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip
GPT2 = {
    "n_embd": 48, "n_layer": 2, "n_head": 3, "n_positions": 96, "vocab_size": VOCAB, "bos_token_id": None,
    "eos_token_id": None,
}  # fmt: skip

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama2": ("llama", LLAMA | {"num_key_value_heads": 6}),
    "llama3": ("llama", LLAMA | {"rope_parameters": LLAMA3_ROPE, "head_dim": 32, "tie_word_embeddings": True}),
    "llama-biases": ("llama", LLAMA | {"attention_bias": True, "mlp_bias": True}),
    "qwen2": ("qwen2", LLAMA | {"tie_word_embeddings": True}),
    "qwen2-untied": ("qwen2", LLAMA),
    "qwen3": ("qwen3", LLAMA | {"head_dim": 20, "tie_word_embeddings": True}),
    "olmo2": ("olmo2", LLAMA),
    "gpt2": ("gpt2", GPT2),
    "mixtral": ("mixtral", LLAMA | MOE | {"num_local_experts": 5, "head_dim": 12}),
    "olmoe": ("olmoe", LLAMA | MOE | {"num_experts": 5}),
    "olmoe-renormed": ("olmoe", LLAMA | MOE | {"num_experts": 4, "norm_topk_prob": True}),
    "qwen3_moe": (
        "qwen3_moe",
        LLAMA | MOE | {"num_experts": 4, "moe_intermediate_size": 24, "head_dim": 20, "norm_topk_prob": True},
    ),
    "qwen3_moe-some-dense": (
        "qwen3_moe",
        LLAMA | MOE | {"num_experts": 4, "moe_intermediate_size": 24, "head_dim": 20, "mlp_only_layers": [1]},
    ),
}
"""name of a case -> (model_type, settings): 3 key/value heads, heads that are not hidden / heads wide, odd sizes."""


def random_model(name: str, seed: int = 0) -> Any:
    """A model whose every parameter is random, norms and biases included."""
    from transformers import AutoConfig, AutoModelForCausalLM

    family, settings = FAMILIES[name]
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **settings))
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape)
            parameter.copy_(noise * 0.15 if parameter.dim() > 1 else parameter + 0.3 * noise)
    return model.eval()


def saved(name: str, folder: Path, **options: Any) -> Any:
    model = random_model(name)
    model.save_pretrained(folder, **options)
    return model


def tensors_of(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder of safetensors files."""
    from safetensors.torch import load_file

    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def tokens(vocab_size: int = VOCAB) -> Tensor:
    return torch.randint(0, vocab_size, (2, 64), generator=torch.Generator().manual_seed(3))


def write_checkpoint(
    folder: Path, config: ModelConfig, precision: str = "fp32", scale: float = 0.3, **lies: object
) -> GPT:
    """A checkpoint of ours with random weights, of a model for ``helpers.VOCAB`` tokens; returns the model.

    ``lies``: arguments that are written with values other than the model's.
    """
    data = DataConfig(tokenizer_type="NullTokenizer", vocab_size=helpers.VOCAB - 1)
    run = TrainConfig(model=config, data=data, training=helpers.TRAINING[precision])
    model = helpers.randomise(helpers.build(config, precision), scale=scale)
    tensors = model_tensors(model, placements(model, Mesh()))
    arguments = dump(run, origins_of(run))
    for name, value in lies.items():
        arguments[name] = {"value": value, "origin": "checkpoint"}
    checkpoint.save(folder, 0, tensors, fresh_state(), arguments, mesh=Mesh())
    return model
