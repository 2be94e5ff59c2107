"""--compile: torch.compile of a model's layers."""

from __future__ import annotations

import os
import shutil

import torch

from megatron_hc.config import ParallelConfig
from megatron_hc.mesh import Mesh
from megatron_hc.model.gpt import GPT
from megatron_hc.model.moe import MoE


def compile_layers(model: GPT, parallel: ParallelConfig, mesh: Mesh) -> None:
    """Compile every layer; layers of one structure share their code.

    With --recompute-modules residual a layer's reads and writes are recorded one by one, as they run: its two sublayers
    are compiled, without them. Experts that are recomputed run as they are. Raises ``ValueError`` on a CPU without a
    C++ compiler.
    """
    if torch.device(mesh.device).type == "cpu" and shutil.which(os.environ.get("CXX") or "g++") is None:
        raise ValueError("--compile needs a C++ compiler on a CPU: install g++ or set CXX, or leave --compile out")
    _set_up_compiler(len(model.stage_layers()))
    recomputed = _with_recomputed_experts(parallel, model.config.num_layers)
    for layer in model.stage_layers():
        if isinstance(layer.mlp, MoE) and layer.layer in recomputed:
            # A router that repeats its decision is other code than one that decides, and what two codes save for the
            # backward pass need not be the same tensors in the same order, by which recompute finds them.
            layer.mlp.forward = torch.compiler.disable(layer.mlp.forward)  # type: ignore[method-assign]
        if parallel.recomputes_residual:
            layer.attend = torch.compile(layer.attend)  # type: ignore[method-assign]
            layer.feed_forward = torch.compile(layer.feed_forward)  # type: ignore[method-assign]
        else:
            layer.compile()


def _with_recomputed_experts(parallel: ParallelConfig, num_layers: int) -> set[int]:
    """The layers whose experts, if they have any, are recomputed: in block form the first ones of every stage."""
    if not parallel.recomputes_experts:
        return set()
    is_block = parallel.recompute_granularity == "full" and parallel.recompute_method == "block"
    number = parallel.recompute_num_layers if is_block else num_layers
    bounds = parallel.pipeline_layout(num_layers).bounds
    return {layer for first, last in bounds for layer in range(first, last)[:number]}


def _set_up_compiler(num_layers: int) -> None:
    """Layers of a method that looks back over depth have each its own code. torch would compile eight of them and run
    the others as they are, with a warning: its limit is raised by what these layers may need, with and without
    gradients.

    torch 2.13 makes wrong gradients, silently, where tensors saved for the backward pass are views of one another, as
    the coefficients of hyper-connections are: it takes each for memory of its own that the pass may write into. It is
    told that none is. The tag leaves code alone that was compiled otherwise and lies in a cache on the disk.
    """
    limits = torch._dynamo.config
    limits.recompile_limit += 4 * num_layers
    limits.accumulated_recompile_limit = max(limits.accumulated_recompile_limit, limits.recompile_limit)
    torch._functorch.config.donated_buffer = False
    torch.compiler.config.cache_key_tag = "what is saved stays as it is"
