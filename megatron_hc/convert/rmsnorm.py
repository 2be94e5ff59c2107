"""Pre-LN -> Pre-RMSNorm without any change of the function: arXiv 2305.14858.

LayerNorm subtracts the mean of the stream over its channels. Where everything that is added to the stream has mean 0,
there is nothing to subtract, and LayerNorm is RMSNorm with the same weight, bias and epsilon. So the mean is taken out
of the embeddings and of the output matrices of sublayers once, here. A tied output layer becomes one of its own, with
the embedding as it was.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from torch import Tensor

from megatron_hc.cli import parse
from megatron_hc.config import ModelConfig
from megatron_hc.convert.checkpoints import Folder, kept_arguments, save_weights
from megatron_hc.convert.hf import check_ours, model_shapes
from megatron_hc.convert.shards import Spec


def to_rmsnorm(load: str, save: str, *, step: int | None = None) -> Path:
    """Write a checkpoint of weights alone; returns its folder."""
    source = Folder(load, step)
    config = parse([], base=source.arguments).config
    _check(config.model)
    vocab_size = source.specs["model.embedding.weight"].shape[0]
    check_ours(source, config.model, vocab_size)
    model = replace(
        config.model,
        normalization="RMSNorm",
        rmsnorm_bias=config.model.has_norm_bias,
        disable_bias_layernorm=False,
        untie_embeddings_and_output_weights=True,
    )
    model.validate()
    config = replace(config, model=model)
    specs = {}
    for name, shape in model_shapes(model, vocab_size).items():
        old = f"model.{name}" if f"model.{name}" in source.specs else "model.embedding.weight"
        specs[f"model.{name}"] = Spec(shape, source.specs[old].dtype)

    def read(name: str) -> Tensor:
        if name not in source.specs:
            return source.read("model.embedding.weight")  # a tied output layer
        tensor = source.read(name)
        return centred(name, tensor.double()).to(tensor.dtype) if writes_stream(name) else tensor

    return save_weights(save, source.state["iteration"], specs, read, source.state, kept_arguments(source, config))


def _check(model: ModelConfig) -> None:
    wrong = {
        f"--normalization {model.normalization}": model.normalization != "LayerNorm",
        f"--norm-placement {model.norm_placement}": model.norm_placement != "pre",
        f"--residual-connection {model.residual.residual_connection}": model.residual.residual_connection != "plain",
        "--qk-layernorm (its norm is not of the stream)": model.qk_layernorm,
    }
    found = [name for name, is_wrong in wrong.items() if is_wrong]
    if found:
        raise ValueError(f"--pre-rmsnorm takes a plain model with LayerNorm at its reads, not {', '.join(found)}")


def writes_stream(name: str) -> bool:
    """Whether a tensor's numbers are added to the stream: its channels are the last dim, or those of a Linear dim 0."""
    tables = ("model.embedding.weight", "model.position_embedding.weight")
    return name in tables or ".linear_proj." in name or ".linear_fc2." in name


def centred(name: str, tensor: Tensor) -> Tensor:
    """The tensor without the mean over the stream's channels."""
    is_linear = (".linear_proj." in name or ".linear_fc2." in name) and ".experts." not in name
    dim = 0 if is_linear else -1  # experts' second matrices and their biases, and tables, have channels last
    return tensor - tensor.mean(dim, keepdim=True)
