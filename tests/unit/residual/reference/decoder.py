"""A decoder in float64, written out from the textbook, that takes its residual path from a reference method.

It shares no code with the package: parameters come by name, norms, rotary positions, attention and the MLP are spelled
out. Dims: S sequence, B batch, C hidden size, H head width. ``k`` counts sublayers: attention 2 l, MLP 2 l + 1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_hc.config import ModelConfig


class QKV(NamedTuple):
    """What attention reads where query, key and value differ."""

    q: Tensor
    k: Tensor
    v: Tensor


class Method:
    """A residual path as its paper has it. ``state`` is whatever the method keeps between sublayers."""

    def __init__(self, config: ModelConfig, parameters: Mapping[str, Tensor]) -> None:
        self.config, self.options, self.parameters = config, config.residual, parameters
        self.num_sublayers = 2 * config.num_layers
        self.eps = config.norm_epsilon

    def p(self, k: int, name: str) -> Tensor:
        """Parameter ``name`` of sublayer k; k = 2 L: of the final read."""
        return self.parameters[f"{self.prefix(k)}.{name}"]

    def has(self, k: int, name: str) -> bool:
        return f"{self.prefix(k)}.{name}" in self.parameters

    def prefix(self, k: int) -> str:
        if k == self.num_sublayers:
            return "final_residual"
        return f"layers.{k // 2}.{'mlp' if k % 2 else 'attention'}_residual"

    def norms_itself(self, k: int) -> bool:
        """Whether the read of sublayer k includes its norm."""
        return False

    def open(self, hidden: Tensor) -> Any:
        raise NotImplementedError

    def read(self, state: Any, k: int) -> tuple[Tensor | QKV, Any]:
        """Input of sublayer k before its norm (normed already where ``norms_itself``), and the state to write to."""
        raise NotImplementedError

    def write(self, state: Any, k: int, output: Tensor) -> Any:
        raise NotImplementedError

    def close(self, state: Any) -> Tensor:
        """The hidden vector before the final norm (after it where ``norms_itself``)."""
        raise NotImplementedError


def rms(x: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean of squares + eps) over the last dim."""
    return x / (x.pow(2).sum(-1, keepdim=True) / x.shape[-1] + eps).sqrt()


def layer_norm(x: Tensor, eps: float) -> Tensor:
    centred = x - x.sum(-1, keepdim=True) / x.shape[-1]
    return centred / (centred.pow(2).sum(-1, keepdim=True) / x.shape[-1] + eps).sqrt()


def plain_norm(x: Tensor, config: ModelConfig) -> Tensor:
    """The norm of --normalization, without weights."""
    return rms(x, config.norm_epsilon) if config.normalization == "RMSNorm" else layer_norm(x, config.norm_epsilon)


class Decoder:
    """The whole model as a function of its parameters."""

    def __init__(self, config: ModelConfig, parameters: Mapping[str, Tensor], method: Method) -> None:
        self.config, self.parameters, self.method = config, parameters, method

    def hidden(self, tokens: Tensor) -> Tensor:
        """tokens [B, S] -> normed hidden states [S, B, C]."""
        method, config = self.method, self.config
        embedded = self.parameters["embedding.weight"][tokens.t()]
        if config.position_embedding_type == "learned_absolute":
            embedded = embedded + self.parameters["position_embedding.weight"][: tokens.shape[1]].unsqueeze(1)
        state = method.open(self.norm(embedded, "embedding_norm") if config.norm_placement == "peri" else embedded)
        values: list[Tensor] = []  # V_1, V_2, ... as the layers make them
        for k in range(2 * config.num_layers):
            x, state = method.read(state, k)
            layer, kind = f"layers.{k // 2}", "mlp" if k % 2 else "attention"
            rule = read_rule(config.norm_placement, k)
            if rule != "none" and not method.norms_itself(k):
                name = f"{layer}.{kind}_norm"
                x = QKV(*(self.norm(part, name) for part in x)) if isinstance(x, QKV) else self.norm(x, name)
            if rule == "replaces":
                state = x
            if k % 2 and config.normformer_residual_scale:
                state = state * self.parameters[f"{layer}.mlp_stream_scale.weight"]
            if k % 2:
                assert isinstance(x, Tensor)
                y = self.mlp(x, f"{layer}.mlp")
            else:
                y = self.attention(x, k // 2, values)
            if config.norm_placement in OUTPUT_NORMS or (config.norm_placement == "normformer" and k % 2 == 0):
                y = self.norm(y, f"{layer}.{kind}.output_norm")
            state = method.write(state, k, y * self.branch_scale)
        hidden = method.close(state)
        return hidden if method.norms_itself(2 * config.num_layers) else self.norm(hidden, "final_norm")

    @property
    def branch_scale(self) -> float:
        """CompleteP's m^-a (arXiv 2505.01618), m = layers / base layers."""
        options = self.config.residual
        if options.base_num_layers is None:
            return 1.0
        ratio = self.config.num_layers / options.base_num_layers
        return {"depth-mup": 1 / math.sqrt(ratio), "completep": 1 / ratio}[options.residual_scale]

    def loss(self, hidden: Tensor, labels: Tensor, weights: Tensor, vocab_size: int) -> Tensor:
        """hidden [S, B, C], labels and weights [B, S] -> sum of weighted cross entropies; padding rows do not exist."""
        table = self.parameters.get("output_layer.weight", self.parameters["embedding.weight"])[:vocab_size]
        log_probabilities = torch.log_softmax(hidden.transpose(0, 1) @ table.t(), -1)
        return -(log_probabilities.gather(-1, labels[..., None]).squeeze(-1) * weights).sum()

    def norm(self, x: Tensor, name: str) -> Tensor:
        normed = plain_norm(x, self.config) * self.parameters[f"{name}.weight"]
        return normed + self.parameters[f"{name}.bias"] if f"{name}.bias" in self.parameters else normed

    def linear(self, x: Tensor, name: str) -> Tensor:
        y = x @ self.parameters[f"{name}.weight"].t()
        return y + self.parameters[f"{name}.bias"] if f"{name}.bias" in self.parameters else y

    def mlp(self, x: Tensor, name: str) -> Tensor:
        """SwiGLU, where rows of the first matrix alternate gate, up; or GELU."""
        h = self.linear(x, f"{name}.linear_fc1")
        if self.config.swiglu:
            gate, up = h[..., 0::2], h[..., 1::2]
            h = gate / (1 + torch.exp(-gate)) * up
        else:
            h = h * (1 + torch.erf(h / math.sqrt(2))) / 2
        if self.config.norm_placement == "normformer":
            h = self.norm(h, f"{name}.inner_norm")
        return self.linear(h, f"{name}.linear_fc2")

    def attention(self, x: Tensor | QKV, layer: int, values: list[Tensor]) -> Tensor:
        """Causal attention, one query head at a time; key/value head g serves Q / G consecutive query heads.

        Appends V_n [S, B, G, H] to ``values`` unless the layer has none.
        """
        config, name = self.config, f"layers.{layer}.attention"
        H, G = config.head_size, config.num_kv_heads
        per_group = config.num_attention_heads // G
        has_values = not (config.single_layer_value and layer > 0)
        has_gate = config.value_residual == "per-token" and layer > 0
        rows = (per_group + 1 + has_values) * H + has_gate  # of one group: query heads, key, value, gate
        if not isinstance(x, QKV):
            x = QKV(x, x, x)
        q_all, k_all, v_all = (self.linear(part, f"{name}.linear_qkv").unflatten(-1, (G, rows)) for part in x)
        if has_values:
            own = v_all[..., (per_group + 1) * H : (per_group + 2) * H]
            values.append(self.norm(own, f"{name}.v_layernorm") if "hybrid" in config.norm_placement else own)
        used = self.mixed_values(layer, values, v_all[..., -1:])
        outputs = []
        for g in range(G):
            key = self.head(k_all[..., g, per_group * H : (per_group + 1) * H], f"{name}.k_layernorm")
            for j in range(per_group):
                query = self.head(q_all[..., g, j * H : (j + 1) * H], f"{name}.q_layernorm")
                scale = torch.tensor(math.sqrt(H), dtype=query.dtype)
                if config.norm_placement == "res-post-cosine":  # divided by tau, learned as log(1 / tau)
                    scale = torch.exp(-self.parameters[f"{name}.q_layernorm.log_scale"][g * per_group + j])
                    scale = torch.clamp(scale, min=0.01)
                y = attend(query, key, used[:, :, g], scale)
                if config.value_residual == "neutreno" and layer > 0:
                    y = y + config.neutreno_weight * (values[0] - values[layer])[:, :, g]
                if config.norm_placement == "normformer":
                    y = y * self.parameters[f"{name}.head_scale.weight"][g * per_group + j]
                outputs.append(y)
        return self.linear(torch.cat(outputs, -1), f"{name}.linear_proj")

    def mixed_values(self, layer: int, values: list[Tensor], gate: Tensor) -> Tensor:
        """V'_n of arXiv 2410.17897 from V_1 .. V_n, n = layer + 1; gate [S, B, G, 1] before its sigmoid."""
        config, variant = self.config, self.config.value_residual
        if layer == 0 or config.single_layer_value:
            return values[0]
        first, own = values[0], values[layer]
        if variant == "half":
            return 0.5 * first + 0.5 * own
        last = config.value_residual_layers or math.ceil(config.num_layers / 3)
        if variant == "constant" or (variant == "sparse" and layer >= config.num_layers - last):
            a, b = {"constant": (2, 1), "sparse": (5, 1)}[variant]
            given = (config.value_residual_first_weight, config.value_residual_own_weight)
            return (a if given[0] is None else given[0]) * first + (b if given[1] is None else given[1]) * own
        if variant == "learnable":
            weights = self.parameters[f"layers.{layer}.attention.value_residual.weights"]
            return weights[0] * first + weights[1] * own
        if variant == "dense":
            weights = self.parameters[f"layers.{layer}.attention.value_residual.weights"]
            return sum(w * v for w, v in zip(weights, values, strict=True))  # type: ignore[return-value]
        if variant == "per-token":
            share = 1 / (1 + torch.exp(-gate))
            return (1 - share) * first + share * own
        assert variant in ("none", "sparse", "neutreno"), f"no reference for --value-residual {variant}"
        return own

    def head(self, x: Tensor, norm: str) -> Tensor:
        """A query or key [S, B, H]: its norm, if any, then its rotation, if any."""
        if self.config.norm_placement == "res-post-cosine":
            x = x / x.pow(2).sum(-1, keepdim=True).sqrt()
        elif f"{norm}.weight" in self.parameters:
            x = self.norm(x, norm)
        return rotate(x, self.config) if self.config.position_embedding_type == "rope" else x


OUTPUT_NORMS = ("reordered", "peri", "res-post-cosine")


def read_rule(placement: str, k: int) -> str:
    """What the norm at the read of sublayer k does: 'keeps' the stream, 'replaces' it, or there is 'none'."""
    if placement in ("pre", "peri", "normformer") or (placement == "hybrid-star" and k < 2):
        return "keeps"
    if placement in ("reordered", "res-post-cosine", "none"):
        return "none"
    if placement in ("post", "deepnorm"):  # N(x + F(x)): the norm of sublayer k - 1
        return "replaces" if k > 0 else "none"
    assert placement in ("hybrid", "hybrid-star"), f"no reference for --norm-placement {placement}"
    return "replaces" if k % 2 else "none"


def rotate(x: Tensor, config: ModelConfig) -> Tensor:
    """Rotary positions 0 .. S-1 on x [S, B, H]: channels i and i + H/2 turn by position / base^(2i/H)."""
    S, _, H = x.shape
    turned = [torch.zeros(0)] * H
    for i in range(H // 2):
        angle = torch.arange(S, dtype=x.dtype)[:, None] / config.rotary_base ** (2 * i / H)
        a, b = x[..., i], x[..., i + H // 2]
        turned[i] = a * angle.cos() - b * angle.sin()
        turned[i + H // 2] = b * angle.cos() + a * angle.sin()
    return torch.stack(turned, -1)


def attend(query: Tensor, key: Tensor, value: Tensor, scale: Tensor) -> Tensor:
    """One head, [S, B, H] each: position s sees positions 0 .. s; scores are divided by ``scale``."""
    rows = []
    for s in range(query.shape[0]):
        scores = (query[s] * key[: s + 1]).sum(-1) / scale  # [s + 1, B]
        rows.append((torch.softmax(scores, 0)[..., None] * value[: s + 1]).sum(0))
    return torch.stack(rows)
