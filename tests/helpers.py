"""Small models for tests, built through the same steps as a run: build_model, materialize, cast_parameters."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from megatron_hc.config import ModelConfig, ParallelConfig, ResidualConfig, TrainConfig, TrainingConfig
from megatron_hc.mesh import Mesh
from megatron_hc.model.gpt import GPT
from megatron_hc.parallel.plan import build_model, cast_parameters, compute_dtype, materialize, placements
from megatron_hc.residual import Residual

VOCAB = 23  # not a multiple of the padding, so that padding rows exist

SMALL = ModelConfig(
    num_layers=3,
    hidden_size=16,
    ffn_hidden_size=24,
    num_attention_heads=4,
    group_query_attention=True,
    num_query_groups=2,
    seq_length=8,
    position_embedding_type="rope",
    normalization="RMSNorm",
    swiglu=True,
    disable_bias_linear=True,
    make_vocab_size_divisible_by=16,
    init_method_std=0.3,  # branches as large as the stream, so that a wrong mix shows in the output
)
"""A Llama-like decoder: grouped queries, rotary positions, RMSNorm, SwiGLU, tied embeddings."""

TRAINING = {"fp64": TrainingConfig(fp64=True), "fp32": TrainingConfig(), "bf16": TrainingConfig(bf16=True)}


def small_config(residual: dict[str, Any] | None = None, **model: Any) -> ModelConfig:
    """``SMALL`` with changes; ``residual`` holds fields of ResidualConfig. Refuses what the command line would."""
    config = replace(SMALL, residual=ResidualConfig(**(residual or {})), **model)
    config.validate()
    return config


def build(
    config: ModelConfig,
    precision: str = "fp64",
    *,
    seed: int = 1,
    vocab_size: int = VOCAB,
    parallel: ParallelConfig | None = None,
) -> GPT:
    """A model with its initial values."""
    run = TrainConfig(model=config, training=TRAINING[precision], parallel=parallel or ParallelConfig())
    model = build_model(run, vocab_size, Mesh())
    materialize(model, placements(model, Mesh()), seed, Mesh(), compute_dtype(run))
    cast_parameters(model, compute_dtype(run))
    return model


def full_recompute(method: str = "uniform", layers: int = 1) -> ParallelConfig:
    return ParallelConfig(
        recompute_granularity="full",
        recompute_method=method,  # type: ignore[arg-type]
        recompute_num_layers=layers,
    )


def selective_recompute(*modules: str) -> ParallelConfig:
    return ParallelConfig(recompute_granularity="selective", recompute_modules=modules)


@torch.no_grad()
def randomise(model: GPT, seed: int = 5, scale: float = 0.3) -> GPT:
    """Move every vector and every residual parameter off its initial value, where many gradients are exactly zero."""
    generator = torch.Generator().manual_seed(seed)
    owned = {id(p) for m in model.modules() if isinstance(m, Residual) for p in m.parameters(recurse=True)}
    for parameter in model.parameters():
        if id(parameter) in owned or parameter.dim() == 1:
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * scale
            parameter += noise.to(parameter.dtype)
    return model


def random_tokens(batch: int = 2, length: int = 8, seed: int = 3, vocab_size: int = VOCAB) -> Tensor:
    return torch.randint(0, vocab_size, (batch, length), generator=torch.Generator().manual_seed(seed))


def loss_of(model: GPT, tokens: Tensor, hidden: Tensor | None = None) -> Tensor:
    """Next-token cross entropy with uneven token weights (the last position has none)."""
    hidden = model(tokens) if hidden is None else hidden
    weights = torch.linspace(0.5, 1.5, tokens.numel(), dtype=torch.float64).reshape(tokens.shape) / tokens.numel()
    weights[:, -1] = 0
    return model.output.loss(hidden, tokens.roll(-1, 1), weights.to(hidden.device, hidden.dtype))


def gradients(model: GPT, tokens: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """(loss, gradient of every parameter by name) of ``loss_of``; a parameter without a gradient is an error."""
    model.zero_grad(set_to_none=True)
    loss = loss_of(model, tokens)
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    missing = [name for name, p in model.named_parameters() if p.grad is None]
    assert not missing, f"no gradient reaches {missing}"
    return loss.detach(), found


def assert_same_bits(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Equal names, dtypes and bits."""
    assert got.keys() == expected.keys()
    different = [name for name in got if got[name].dtype != expected[name].dtype or not got[name].equal(expected[name])]
    assert not different, f"not bit-identical: {different}"
