"""Other packages in the place of our own code: transformer-engine, torchao, apex. Speed and memory, never the maths.

A back end changes what a module of the finished model computes with, not what the model holds: parameters, their names
and places, collectives' groups, the optimizer and checkpoints are those of the plain model. Nothing here is imported
before a flag asks for it; ``check`` refuses what this machine does not have before anything is built.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from megatron_hc.backends.accumulation import attach_accumulation
from megatron_hc.backends.check import check_backends
from megatron_hc.backends.fp8_state import Fp8State
from megatron_hc.backends.norms import attach_norms
from megatron_hc.backends.torchao import attach_torchao
from megatron_hc.backends.transformer_engine import FLAG, attach_transformer_engine
from megatron_hc.config import TrainConfig
from megatron_hc.mesh import Mesh
from megatron_hc.model.gpt import GPT
from megatron_hc.packages import load
from megatron_hc.parallel.recompute import Checkpoint

__all__ = ["Attached", "Fp8State", "attach_backends", "check_backends", "checkpoint_of"]


class Attached(NamedTuple):
    """What ``attach_backends`` did."""

    said: list[str]
    """A line about each package for the log."""
    fp8_state: Fp8State
    """What delayed scaling remembers; empty without it."""


def attach_backends(model: GPT, config: TrainConfig, mesh: Mesh) -> Attached:
    """Have the chosen packages compute parts of a rank's model.

    Comes after ``parallelize`` and the cast to the compute dtype, before a pipeline or a compiler takes the model up.
    """
    options, num_layers, said, state = config.backends, config.model.num_layers, [], Fp8State({}, None)
    in_fp8 = [layer for layer in model.stage_layers() if options.is_fp8_layer(layer.layer, num_layers)]
    if options.norm_impl != "torch":
        said.append(f"{attach_norms(model, options.norm_impl)} norms by {options.norm_impl}")
    if options.uses_transformer_engine:
        state = Fp8State(*attach_transformer_engine(model, config.model, options, mesh.group("stage")))
        said.append("linear layers, experts and attention by transformer-engine")
    elif options.gradient_accumulation_fusion:
        said.append(f"weight gradients of {attach_accumulation(model.layers)} linear layers summed by apex")
    if options.fp8_format is not None and options.fp8_backend == "torchao":
        device = torch.device(mesh.device)
        count = sum(attach_torchao(layer, options, device) for layer in in_fp8)
        said.append(f"{count} matrices by torchao" + (", emulated on the CPU" if device.type == "cpu" else ""))
    if options.fp8_format is not None:
        said.append(
            f"FP8 ({options.fp8_recipe}, {options.fp8_format}) in {len(in_fp8)} of {len(model.layers)} layers here"
        )
    return Attached(said, state)


def checkpoint_of(config: TrainConfig) -> Checkpoint | None:
    """What recomputes activations, None: torch's. In FP8 transformer-engine's, which has the first pass's scales."""
    if config.backends.fp8_format is None or not config.backends.uses_transformer_engine:
        return None
    (modules,) = load("transformer-engine", FLAG, "transformer_engine.pytorch")
    return modules.checkpoint
