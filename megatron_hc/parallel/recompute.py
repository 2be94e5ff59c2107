"""Activation recompute: whole layers, or named parts of every layer. Changes memory and time, never a number."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

from megatron_hc.model.attention import Context, CoreAttention
from megatron_hc.model.gpt import GPT, LayerRunner, run_layers
from megatron_hc.model.layer import TransformerLayer
from megatron_hc.model.linear import NormLayer
from megatron_hc.model.mlp import MLP
from megatron_hc.model.moe import MoE
from megatron_hc.model.router import Remembering, routers_of
from megatron_hc.parallel.recompute_reads import ReadBlocks
from megatron_hc.residual import Carry


def layer_runner(granularity: str | None, method: str | None, num_layers: int | None) -> LayerRunner:
    """How a stage runs its layers under ``--recompute-granularity full``; otherwise one after the other."""
    if granularity != "full":
        return run_layers
    assert num_layers is not None
    return functools.partial(_run_uniform if method == "uniform" else _run_block, num_layers)


def _run_uniform(group: int, layers: Iterable[TransformerLayer], carry: Carry, context: Context) -> Carry:
    """Save the carry at every ``group``-th layer only."""
    layers = list(layers)
    for start in range(0, len(layers), group):
        chosen = layers[start : start + group]
        carry = _recomputed(run_layers, chosen)(chosen, carry, context)
    return carry


def _run_block(count: int, layers: Iterable[TransformerLayer], carry: Carry, context: Context) -> Carry:
    """Recompute each of the first ``count`` layers of the stage, keep the others' activations."""
    for position, layer in enumerate(layers):
        run = _recomputed(run_layers, [layer]) if position < count else run_layers
        carry = run([layer], carry, context)
    return carry


def _recomputed(function: Callable[..., Any], inside: Iterable[nn.Module] = ()) -> Callable[..., Any]:
    """``function``, run again in the backward pass. ``inside``: the modules in it, whose routers decide once."""
    routers = routers_of(inside)
    if not routers:
        return functools.partial(checkpoint, function, use_reentrant=False)

    def run(*arguments: Any) -> Any:
        once = Remembering(routers)
        return checkpoint(function, *arguments, use_reentrant=False, context_fn=lambda: (once, once))

    return run


def recompute_modules(model: GPT, names: Iterable[str], residual_interval: int | None = None) -> None:
    """Recompute the named parts: core_attn, mlp, moe, layernorm, residual (its reads; Megatron-LM's name: mhc).

    The first of every ``residual_interval`` reads keeps its input, all streams; None: ``best_interval`` of the stage.
    """
    kinds = {"core_attn": CoreAttention, "mlp": MLP, "moe": MoE, "layernorm": NormLayer}
    for name in names:
        if name in ("residual", "mhc"):
            ReadBlocks(model, residual_interval)
            continue
        for module in model.modules():
            if name in kinds and isinstance(module, kinds[name]):
                module.forward = _recomputed(functools.partial(_forward, module), [module])


def _forward(module: nn.Module, *inputs: Any) -> Any:
    """Looked up when called: a tensor-parallel run changes a module's class after this is set up."""
    return type(module).forward(module, *inputs)
