"""A trained model from a checkpoint folder, ready to read and write text, in one process or several."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from megatron_hc import checkpoint
from megatron_hc.cli import from_flat
from megatron_hc.config import ParallelConfig, TrainConfig, ZeroConfig
from megatron_hc.data.tokenizer import Tokenizer, tokenizer_of
from megatron_hc.launch import place_of
from megatron_hc.mesh import Mesh, join
from megatron_hc.model.gpt import GPT
from megatron_hc.parallel.plan import (
    build_model,
    compute_dtype,
    owned_parameters,
    parallelize,
    parameter_dtype,
    placements,
)
from megatron_hc.state import model_tensors
from megatron_hc.stored import Stored

PRECISIONS = {"float32": (False, False), "bfloat16": (True, False), "float64": (False, True)}
"""Name -> --bf16, --fp64."""
ANY_KERNELS = {"attention_backend": "auto", "fused_residual_backend": "auto"}
"""The training run's kernels may not be there where the model works: they are no part of it."""


class Loaded(NamedTuple):
    """What a checkpoint folder gives without the optimizer."""

    model: GPT
    """This process's part, in evaluation mode."""
    tokenizer: Tokenizer
    config: TrainConfig
    """Of the run that saved, with the layout of this process instead."""
    folder: Path
    mesh: Mesh


def load_model(
    root: str,
    step: int | None = None,
    *,
    device: str = "cpu",
    tokenizer_model: str | None = None,
    layout: ParallelConfig | None = None,
    changes: Mapping[str, Any] | None = None,
    dtype: str | None = None,
    mesh: Mesh | None = None,
) -> Loaded:
    """The model of the last checkpoint under ``root`` (or of iteration ``step``), in evaluation mode.

    Args:
        device: 'cpu', 'cuda', 'cuda:K' or 'auto'.
        tokenizer_model: where the tokenizer's file is now, if it is not where it was while training.
        layout: how the model is spread over processes (``inference_layout``); they all call together. None: this
            process alone has all of it.
        changes: values by field name (tokenizer_type, ...) that take the place of the training run's.
        dtype: 'float32', 'bfloat16' or 'float64' instead of that of the training run.
        mesh: of processes that are already joined.

    Raises ``ValueError`` in one sentence for a folder without a whole checkpoint, a tokenizer that cannot be read and
    a layout that cannot work, and for a device that is not there.
    """
    if layout is None and mesh is None:
        _check_device(device)
    folder = checkpoint.find(root, step)
    config = single_process(from_flat(checkpoint.read_arguments(folder) | ANY_KERNELS | dict(changes or {})))
    if dtype is not None:
        if dtype not in PRECISIONS:
            raise ValueError(f"dtype ({dtype}) must be one of {', '.join(PRECISIONS)}")
        bf16, fp64 = PRECISIONS[dtype]
        config = dataclasses.replace(config, training=dataclasses.replace(config.training, bf16=bf16, fp64=fp64))
    tokenizer = tokenizer_of(config.data, tokenizer_model)
    if layout is not None:
        config = dataclasses.replace(config, parallel=dataclasses.replace(layout, device=_kind(device)))
        mesh = joined(config) if mesh is None else mesh
    mesh = Mesh(device=_kind(device) if device == "auto" else device) if mesh is None else mesh
    model, tensors = empty_model(config, tokenizer.vocab_size, mesh)
    checkpoint.load(folder, tensors, mesh=mesh)
    model.requires_grad_(False)
    return Loaded(model.eval(), tokenizer, config, folder, mesh)


def checkpoint_arguments(root: str, step: int | None = None) -> dict[str, Any]:
    """The arguments of the run that saved, by field name."""
    return checkpoint.read_arguments(checkpoint.find(root, step))


def empty_model(config: TrainConfig, vocab_size: int, mesh: Mesh) -> tuple[GPT, dict[str, Stored]]:
    """This process's part of a model whose weights are not yet there, and what a checkpoint fills of it, by name."""
    model = build_model(config, vocab_size, mesh)
    placed = placements(model, mesh)
    dtype = compute_dtype(config)
    for name, module, local_name in list(owned_parameters(model)):
        shape = [*placed[name].whole_shape]
        shape[placed[name].dim] = sum(piece.length for piece in placed[name].pieces)
        # Zeros: padding rows of the vocabulary are not stored.
        value = torch.zeros(shape, dtype=parameter_dtype(module, dtype), device=mesh.device)
        module._parameters[local_name] = nn.Parameter(value)
    for module in model.modules():
        for local_name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[local_name] = torch.zeros(buffer.shape, dtype=buffer.dtype, device=mesh.device)
    parallelize(model, mesh)
    return model, model_tensors(model, placed)


def single_process(config: TrainConfig) -> TrainConfig:
    """The same model in one process, nothing recomputed."""
    return dataclasses.replace(config, parallel=ParallelConfig(), zero=ZeroConfig())


def inference_layout(
    tensor_model_parallel_size: int = 1,
    pipeline_model_parallel_size: int = 1,
    expert_model_parallel_size: int = 1,
) -> ParallelConfig:
    """How a model is spread over processes to read and write text; what is left over is data parallel.

    Experts are shared out within a tensor-parallel group: ``expert_model_parallel_size`` of its processes have
    different experts, and each expert is cut over the rest. Data-parallel copies never wait for each other.
    """
    tp, ep = tensor_model_parallel_size, expert_model_parallel_size
    for name, value in (("tensor", tp), ("pipeline", pipeline_model_parallel_size), ("expert", ep)):
        if value < 1:
            raise ValueError(f"{name}-model-parallel-size must be at least 1, not {value}")
    if tp % ep:
        raise ValueError(
            f"expert-model-parallel-size ({ep}) must divide tensor-model-parallel-size ({tp}): while generating, the "
            "processes that share out experts must have the same tokens"
        )
    return ParallelConfig(
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pipeline_model_parallel_size,
        expert_model_parallel_size=ep,
        expert_tensor_parallel_size=tp // ep if ep > 1 else None,
    )


def joined(config: TrainConfig) -> Mesh:
    """The mesh of this process among those that torchrun started, once the layout is known to work."""
    config.parallel.validate(config.model)
    config.parallel.data_parallel_size(place_of().world_size)
    return join(config)


def _check_device(device: str) -> None:
    """Refuse what torch would: of several processes ``join`` does it."""
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", device):
        raise ValueError(f"--device {device} must be auto, cpu, cuda or cuda:K")
    there = torch.cuda.device_count()
    if device.startswith("cuda") and int(device.partition(":")[2] or 0) >= there:
        raise ValueError(f"--device {device} is not there: torch finds {there} CUDA devices; use --device cpu")


def _kind(device: str) -> Any:
    if device != "auto":
        return device.split(":")[0]
    return "cuda" if torch.cuda.is_available() else "cpu"
