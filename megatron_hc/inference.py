"""A trained model from a checkpoint folder, ready to read and write text."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import NamedTuple

import torch

from megatron_hc import checkpoint
from megatron_hc.cli import from_flat
from megatron_hc.config import ParallelConfig, TrainConfig
from megatron_hc.data.tokenizer import Tokenizer, tokenizer_of
from megatron_hc.mesh import Mesh
from megatron_hc.model.gpt import GPT
from megatron_hc.parallel.plan import build_model, cast_parameters, compute_dtype, placements
from megatron_hc.state import model_tensors
from megatron_hc.stored import Stored


class Loaded(NamedTuple):
    """What a checkpoint folder gives without the optimizer."""

    model: GPT
    tokenizer: Tokenizer
    config: TrainConfig
    folder: Path


def load_model(
    root: str, step: int | None = None, *, device: str = "cpu", tokenizer_model: str | None = None
) -> Loaded:
    """The model of the last checkpoint under ``root`` (or of iteration ``step``), in evaluation mode.

    ``tokenizer_model``: where the tokenizer's file is now, if it is not where it was while training. Raises
    ``ValueError`` in one sentence for a folder without a whole checkpoint or a tokenizer that cannot be read.
    """
    folder = checkpoint.find(root, step)
    config = single_process(from_flat(checkpoint.read_arguments(folder)))
    tokenizer = tokenizer_of(config.data, tokenizer_model)
    model, tensors = empty_model(config, tokenizer.vocab_size, device)
    checkpoint.load(folder, tensors)
    model.requires_grad_(False)
    return Loaded(model.eval(), tokenizer, config, folder)


def empty_model(config: TrainConfig, vocab_size: int, device: str) -> tuple[GPT, dict[str, Stored]]:
    """A model for one process whose weights are not yet there, and what a checkpoint fills of it, by name."""
    mesh = Mesh(device=device)
    model = build_model(config, vocab_size, mesh)
    placed = placements(model, mesh)
    model.to_empty(device=device)
    for parameter in model.parameters():
        torch.nn.init.zeros_(parameter)  # padding rows of the vocabulary are not stored
    cast_parameters(model, compute_dtype(config))
    return model, model_tensors(model, placed)


def single_process(config: TrainConfig) -> TrainConfig:
    """The same model in one process, nothing recomputed."""
    return dataclasses.replace(config, parallel=ParallelConfig())
