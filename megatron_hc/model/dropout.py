"""Dropout whose masks are a process's own, where it has samples, tokens or heads that others do not have.

All processes of a pipeline stage keep one state of torch's generator: what several of them compute, they drop alike,
and a checkpoint holds one state for all. For what a process has alone it draws a seed there, which is everybody's, and
makes its masks from this seed and its own number; recompute, which puts the generator back, comes to the same masks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from megatron_hc.config import ModelConfig


class Dropout(nn.Dropout):
    """``part``: this process's number among those whose masks must differ; None: all draw the same."""

    part: int | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.part is None or not self.training:
            return super().forward(x)
        return apart(self.part, x.device, super().forward, x)


def hidden_dropout(config: ModelConfig) -> nn.Module:
    """Dropout of the embedding and of sublayers' outputs, or nothing."""
    return Dropout(config.hidden_dropout) if config.hidden_dropout else nn.Identity()


@torch.compiler.disable
def apart(part: int, device: torch.device, function: Callable[..., Tensor], *arguments: Any) -> Tensor:
    """``function(*arguments)`` with random numbers of ``part``; the generators then stand where all parts' do."""
    # Of the CPU's generator, also on a GPU: the host need not wait for it.
    seed = int(torch.randint(2**62, (), device="cpu")) + part
    is_cuda = device.type == "cuda"
    with torch.random.fork_rng([device] if is_cuda else []):
        (torch.cuda.manual_seed if is_cuda else torch.default_generator.manual_seed)(seed)
        return function(*arguments)
