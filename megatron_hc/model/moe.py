"""The mixture-of-experts branch, which takes the MLP's place. Dims: S sequence, B batch, T = S * B, C hidden size."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

from megatron_hc.config import ModelConfig, MoEConfig
from megatron_hc.model.dropout import hidden_dropout
from megatron_hc.model.experts import Experts, arrange, combine, dispatch, weights_of_rows
from megatron_hc.model.initial import initial_of
from megatron_hc.model.mlp import MLP
from megatron_hc.model.placement import output_norm, placement_of
from megatron_hc.model.router import Router, Routing
from megatron_hc.residual import Draw


class MoE(nn.Module):
    """x -> router -> rows sorted by expert -> experts -> sum of each token's rows, + shared expert -> (norm) -> dropout

    A router's weights are applied inside the experts, before their second matrix. ``parallel/expert.py`` has versions
    whose experts are on several processes: they only override ``routed``.
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        assert config.moe.num_experts is not None
        self.num_experts, self.topk = config.moe.num_experts, config.moe.moe_router_topk
        self.router = Router(config, layer)
        self.experts = Experts(config)
        has_shared = config.moe.moe_shared_expert_intermediate_size is not None
        self.shared_experts = SharedExperts(config, layer) if has_shared else None
        self.output_norm = output_norm(config, placement_of(config, layer).mlp_output)
        self.dropout = hidden_dropout(config)

    def forward(self, x: Tensor) -> Tensor:
        """[S, B, C] -> [S, B, C]"""
        routing = self.router(x)
        y = self.routed(self._narrowed(x.flatten(0, 1)), routing).view_as(x)
        if self.shared_experts is not None:
            y = y + self.shared_experts(x)
        return self.dropout(self.output_norm(y))

    def _narrowed(self, x: Tensor) -> Tensor:
        """In the experts' dtype, if that is less to move; FSDP2 shows its own wide copy of the weights out here."""
        dtype = self.experts.linear_fc1.weight.dtype
        return x.to(dtype) if dtype.itemsize < x.dtype.itemsize else x

    def routed(self, x: Tensor, routing: Routing) -> Tensor:
        """x [T, C] -> the weighted sum of each token's experts, [T, C]."""
        rows = arrange(routing.experts, routing.kept, self.num_experts, routing.num_slots)
        y = self.experts(dispatch(x, rows, self.topk), weights_of_rows(routing.weights, rows), rows.counts)
        return combine(y, rows, self.topk)


class SharedExperts(MLP):
    """An MLP that every token goes through, times sigmoid(gate x) with --moe-shared-expert-gate."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        # The norms and the dropout of the branch come after the sum of all experts.
        width = config.moe.moe_shared_expert_intermediate_size
        inner = {"ffn_hidden_size": width, "norm_placement": "pre", "hidden_dropout": 0.0, "moe": MoEConfig()}
        super().__init__(dataclasses.replace(config, **inner), layer)  # type: ignore[arg-type]
        self.gate = SharedExpertGate(config) if config.moe.moe_shared_expert_gate else None

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y if self.gate is None else self.gate(x, y)


class SharedExpertGate(nn.Module):
    """y * sigmoid(w x)"""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.initial_values = initial_of("fc1", "", config, config.hidden_size, 1)
        self.weight = nn.Parameter(torch.empty(1, config.hidden_size))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return y * (x.to(self.weight.dtype) @ self.weight.t()).sigmoid().to(y.dtype)

    def initial(self, name: str, draw: Draw) -> Tensor:
        return self.initial_values.value(draw, "", (1, self.weight.shape[1]))


def build_mlp(config: ModelConfig, layer: int) -> MLP | MoE:
    """The MLP of a layer, or its experts."""
    return MoE(config, layer) if config.has_experts(layer) else MLP(config, layer)
