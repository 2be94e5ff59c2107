"""One transformer layer, the same for every residual method."""

from __future__ import annotations

from torch import Tensor, nn

from megatron_hc.config import ModelConfig
from megatron_hc.model.attention import Attention, Context
from megatron_hc.model.branch import scaled, with_linearity_penalty
from megatron_hc.model.moe import build_mlp
from megatron_hc.model.placement import norm_of, placement_of, read_norm, stream_scale
from megatron_hc.residual import Carry, Norm, Reads, Site, build_residual


class TransformerLayer(nn.Module):
    """carry -> read -> attention -> write -> read -> MLP -> write -> carry

    The write is only recorded; the next read, perhaps in the next layer, folds it in. An output may be scaled, or left
    out, before it is written (``branch.py``).
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.placement = placement_of(config, layer)
        self.attention_residual = build_residual(Site("attention", layer, config))
        self.attention_norm = read_norm(config, self.attention_residual, self.placement.attention_read)
        self.attention = Attention(config, layer)
        self.mlp_residual = build_residual(Site("mlp", layer, config))
        self.mlp_norm = read_norm(config, self.mlp_residual, self.placement.mlp_read)
        self.mlp_stream_scale = stream_scale(config)
        self.mlp = build_mlp(config, layer)
        self.branch_scale = config.branch_scale

    def forward(self, carry: Carry, context: Context) -> Carry:
        weights = context.linearity_weights
        before = None if weights is None else self.attention_residual.state(carry)
        x, carry = self.attention_residual.read(carry, self.attention_read_norm)
        y, value = self.attend(x, context, carry.values)
        carry = self.attention_residual.write(carry, y, value)
        x, carry = self.mlp_residual.read(carry, self.mlp_read_norm)
        carry = self.mlp_residual.write(carry, self.feed_forward(x, context))
        if before is None or weights is None:
            return carry
        return with_linearity_penalty(carry, self.mlp_residual, before, weights)

    def attend(
        self, x: Tensor | Reads, context: Context, first_values: tuple[Tensor, ...]
    ) -> tuple[Tensor, Tensor | None]:
        """What the first sublayer puts out, and its values if a later layer takes them."""
        y, value = self.attention(x, context, first_values=first_values)
        return self.scaled(y, context, 0), value

    def feed_forward(self, x: Tensor | Reads, context: Context) -> Tensor:
        """What the second sublayer puts out."""
        return self.scaled(self.mlp(x), context, 1)

    def scaled(self, output: Tensor, context: Context, sublayer: int) -> Tensor:
        factors = context.branch_factors
        return scaled(output, self.branch_scale, None if factors is None else factors[2 * self.layer + sublayer])

    @property
    def attention_read_norm(self) -> Norm:
        return norm_of(self.attention_norm, self.placement.attention_read)

    @property
    def mlp_read_norm(self) -> Norm:
        return norm_of(self.mlp_norm, self.placement.mlp_read, self.mlp_stream_scale)
