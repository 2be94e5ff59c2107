"""Activation recompute: whole layers, or named parts of every layer. Changes memory and time, never a number."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

from megatron_hc.config import ParallelConfig
from megatron_hc.model.attention import Context, CoreAttention
from megatron_hc.model.gpt import GPT, LayerRunner, run_layers
from megatron_hc.model.layer import TransformerLayer
from megatron_hc.model.linear import NormLayer
from megatron_hc.model.mlp import MLP
from megatron_hc.model.moe import MoE
from megatron_hc.model.router import Remembering, routers_of
from megatron_hc.parallel.recompute_groups import GroupBlocks
from megatron_hc.parallel.recompute_reads import ReadBlocks, Sublayers
from megatron_hc.residual import Carry

Checkpoint = Callable[..., Any]
"""``torch.utils.checkpoint.checkpoint``, or another package's that does the same with what it keeps of its own."""


def set_up_recompute(model: GPT, parallel: ParallelConfig, keep: Checkpoint | None = None) -> None:
    """Make the model recompute what the flags of ``parallel`` name; ``keep``: by what, None: torch's."""
    run: LayerRunner = run_layers
    if parallel.recomputes_residual:
        sublayers, interval = Sublayers(model), parallel.residual_recompute_interval
        run = ReadBlocks(sublayers, run_layers, model.config.residual.num_streams, interval)
    if parallel.recompute_granularity == "selective":
        recompute_modules(model, parallel.recompute_modules, keep)
    elif parallel.recompute_granularity == "full":
        method, number = parallel.recompute_method, parallel.recompute_num_layers
        assert number is not None
        if parallel.recomputes_residual:
            group, count = (number, None) if method == "uniform" else (1, number)
            run = GroupBlocks(sublayers, functools.partial(_recomputed, keep=keep), group, interval, count, rest=run)
        else:
            run = functools.partial(_run_uniform if method == "uniform" else _run_block, keep, number)
    model.run = run


def _run_uniform(
    keep: Checkpoint | None, group: int, layers: Iterable[TransformerLayer], carry: Carry, context: Context
) -> Carry:
    """Save the carry at every ``group``-th layer only."""
    layers = list(layers)
    for start in range(0, len(layers), group):
        chosen = layers[start : start + group]
        carry = _recomputed(run_layers, chosen, keep)(chosen, carry, context)
    return carry


def _run_block(
    keep: Checkpoint | None, count: int, layers: Iterable[TransformerLayer], carry: Carry, context: Context
) -> Carry:
    """Recompute each of the first ``count`` layers of the stage, keep the others' activations."""
    for position, layer in enumerate(layers):
        run = _recomputed(run_layers, [layer], keep) if position < count else run_layers
        carry = run([layer], carry, context)
    return carry


def _recomputed(
    function: Callable[..., Any], inside: Iterable[nn.Module] = (), keep: Checkpoint | None = None
) -> Callable[..., Any]:
    """``function``, run again in the backward pass. ``inside``: the modules in it, whose routers decide once."""
    routers = routers_of(inside)
    if not routers:
        return functools.partial(keep or checkpoint, function, use_reentrant=False)

    def run(*arguments: Any) -> Any:
        once = Remembering(routers)
        return (keep or checkpoint)(function, *arguments, use_reentrant=False, context_fn=lambda: (once, once))

    return run


def recompute_modules(model: GPT, names: Iterable[str], keep: Checkpoint | None = None) -> None:
    """Recompute the named parts that are modules: core_attn, mlp, moe, layernorm."""
    kinds = {"core_attn": CoreAttention, "mlp": MLP, "moe": MoE, "layernorm": NormLayer}
    for module in model.modules():
        if any(isinstance(module, kinds[name]) for name in names if name in kinds):
            module.forward = _recomputed(functools.partial(_forward, module), [module], keep)


def _forward(module: nn.Module, *inputs: Any) -> Any:
    """Looked up when called: a tensor-parallel run changes a module's class after this is set up."""
    return type(module).forward(module, *inputs)
