"""The MLP branch. Dims: S sequence, B batch, C hidden size, F ffn size."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from megatron_hc.config import ModelConfig
from megatron_hc.kernels.compiled import gated
from megatron_hc.model.dropout import hidden_dropout
from megatron_hc.model.linear import Linear, build_linear
from megatron_hc.model.placement import output_norm, placement_of


def activation_name(config: ModelConfig) -> str:
    """The activation of MLPs and experts, by --swiglu, --squared-relu and --openai-gelu."""
    if config.swiglu:
        return "swiglu"
    return "squared_relu" if config.squared_relu else "gelu_tanh" if config.openai_gelu else "gelu"


def activated(h: Tensor, name: str) -> Tensor:
    """An activation that looks at single numbers."""
    if name == "squared_relu":
        return F.relu(h).square()
    return F.gelu(h, approximate="tanh" if name == "gelu_tanh" else "none")


class MLP(nn.Module):
    """linear_fc1 -> activation -> (norm) -> linear_fc2 -> (norm) -> dropout; the norms by ``--norm-placement``.

    With SwiGLU the rows of fc1 alternate gate, up, gate, up ..., so that tensor parallelism cuts dim 0.
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        placement = placement_of(config, layer)
        self.linear_fc1: Linear = build_linear("fc1", config, layer)
        self.inner_norm = output_norm(config, placement.mlp_inner, config.ffn_size)
        self.linear_fc2: Linear = build_linear("fc2", config, layer)
        self.output_norm = output_norm(config, placement.mlp_output)
        self.activation = activation_name(config)
        self.dropout = hidden_dropout(config)

    def forward(self, x: Tensor) -> Tensor:
        """[S, B, C] -> [S, B, C]"""
        h = self.linear_fc1(x)  # [S, B, F], or [S, B, 2 F] with SwiGLU
        if self.activation == "swiglu":
            h = gated(h)
        else:
            h = activated(h, self.activation)
        return self.dropout(self.output_norm(self.linear_fc2(self.inner_norm(h))))
