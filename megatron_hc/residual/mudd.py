"""MUDDFormer: multiway dynamic dense connections, arXiv 2502.12170.

Dims: S sequence, B batch, J states, W ways, C hidden size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_hc.kernels.depth import weighted_sum
from megatron_hc.kernels.norm import norm, promote, rms_norm
from megatron_hc.residual.base import Draw, Reads, Site
from megatron_hc.residual.depth import DenseHistory

WAYS = ("q", "k", "v", "r")


class MuddFormer(DenseHistory):
    """Every layer but the first gets its query, key, value and residual input as four sums over all earlier states.

        A = GELU(RMSNorm(X_i) W_1) W_2 + a  (per token)     Y^c = sum_{j <= i} A[c, j] X_j,  c in Q, K, V, R
        X_(i+1) = H + MLP(norm(H)),  H = Y^R + attention(norm_Q(Y^Q), norm_K(Y^K), norm_V(Y^V))

    X_0 is the embedding, which layer 0 reads as it is; before the read-out there is way R only. W_1 is as wide as
    A has entries, before the read-out 4 times as wide. The three norms belong to this class, not to the layer.
    Initial values: W_1 N(0, 1 / C), W_2 = 0, a = 1 for X_i and 0 for the others: equals pre-norm exactly.

    Boundary into layer i: the stream X_i and X_0 .. X_(i-1), each [S, B, 1, C]. Parameters at layer i > 0, with
    J = i + 1: 4 J C + 16 J^2 + 4 J, and two norms more than pre-norm has; at the read-out 4 J C + 4 J^2 + J. FLOPs per
    token, forward: 8 J C + 32 J^2 and 8 J C for the sums. Memory: the X_j and 4 C activations per layer.
    """

    def __init__(self, site: Site) -> None:
        super().__init__(site, dilation=1, period=1)
        C = site.config.hidden_size
        self.normalization, self.eps = site.config.normalization, site.config.norm_epsilon
        self.replaces_norm = self.combines and not site.is_final
        if not self.combines:
            return
        J = len(self.sources)
        self.num_ways = 1 if site.is_final else len(WAYS)
        hidden = self.num_ways * J * (4 if site.is_final else 1)
        self.w1 = nn.Parameter(torch.empty(hidden, C))
        self.w2 = nn.Parameter(torch.empty(self.num_ways * J, hidden))
        self.static = nn.Parameter(torch.empty(self.num_ways, J))
        if self.replaces_norm:
            for way in WAYS[:3]:
                self.register_parameter(f"{way}_norm_weight", nn.Parameter(torch.empty(C)))
                bias = nn.Parameter(torch.empty(C)) if site.config.has_norm_bias else None
                self.register_parameter(f"{way}_norm_bias", bias)

    def initial(self, name: str, draw: Draw) -> Tensor:
        J, C = len(self.sources), self.site.config.hidden_size
        if name == "w1":
            return draw("", tuple(self.w1.shape), C**-0.5)
        if name == "w2":
            return torch.zeros(self.w2.shape)
        if name == "static":
            return torch.eye(J)[-1:].repeat(self.num_ways, 1)
        return torch.zeros(C) if name.endswith("bias") else torch.ones(C)

    def weight_decay(self, name: str) -> bool:
        return name in ("w1", "w2")

    def combine(self, states: list[Tensor]) -> tuple[Tensor | Reads, Tensor]:
        mixed = weighted_sum(self.way_weights(states[-1]), states)  # [S, B, W, C]
        if self.site.is_final:
            return mixed.squeeze(2), mixed
        q, k, v, r = mixed.unbind(2)
        return Reads(self.normed("q", q), self.normed("k", k), self.normed("v", v)), r.unsqueeze(2)

    def way_weights(self, stream: Tensor) -> Tensor:
        """A: stream [S, B, 1, C] -> [S, B, W, J] in at least fp32."""
        dtype = promote(stream.dtype)
        normed = rms_norm(stream.squeeze(2).to(dtype), None, self.eps)
        hidden = F.gelu(F.linear(normed, self.w1.to(dtype)))
        dynamic = F.linear(hidden, self.w2.to(dtype)).unflatten(-1, (self.num_ways, -1))
        return dynamic + self.static.to(dtype)

    def normed(self, way: str, x: Tensor) -> Tensor:
        weight, bias = (getattr(self, f"{way}_norm_{part}") for part in ("weight", "bias"))
        return norm(x, self.normalization, weight, bias, self.eps)
