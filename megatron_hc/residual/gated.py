"""Gated residual: Qwen3.8-Next report, arXiv 2608.30320. Dims: S, B, N streams (n), C hidden size, r gate rank."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_hc.kernels.norm import promote, rms_norm
from megatron_hc.residual.base import Carry, Draw, LinearMix, Mix, Reads, Site


class GatedResidual(LinearMix):
    """n streams, read through an elementwise low-rank gate that takes the place of the sublayer's norm.

        Z_i = RMSNorm(R_i) g_i
        G   = sigmoid(W_u SiLU(W_d vec(Z) / n)),  W_d [r, n C], W_u [n C, r]
        x   = sum_i G_i * Z_i / n                 R_i' = R_i + s_i F(x)
        s   = 2 sigmoid(W_w vec(Z) / n),          W_w [n, n C]

    The streams start as n copies of the embedding; the read-out is one more such read, without W_w, and takes the
    place of the final norm. Initial values: g = 1, the matrices N(0, --init-method-std^2): claims no equality with
    pre-norm. r is --gated-residual-rank, by default C / 8.

    Boundary: n streams, [S, B, n, C]. Parameters per read: n C + 2 n C r, and n^2 C where it is written. FLOPs per
    token and sublayer, forward: 4 n C r + 2 n^2 C. Memory: about 5 n C activations per sublayer, n C of them streams.
    W_d and W_u multiply in the streams' dtype, as the sublayers' own matrices do; all else is in at least fp32.
    """

    replaces_norm = True

    def __init__(self, site: Site) -> None:
        super().__init__(site)
        if site.kind == "entry":
            return
        N, C = self.num_streams(), site.config.hidden_size
        rank = site.config.residual.gated_residual_rank or C // 8
        self.eps = site.config.norm_epsilon
        self.norm_weight = nn.Parameter(torch.empty(N, C))
        self.gate_down = nn.Parameter(torch.empty(rank, N * C))
        self.gate_up = nn.Parameter(torch.empty(N * C, rank))
        self.write_weight = nn.Parameter(torch.empty(N, N * C)) if site.is_sublayer else None

    def initial(self, name: str, draw: Draw) -> Tensor:
        shape = tuple(self._parameters[name].shape)  # type: ignore[union-attr]
        return torch.ones(shape) if name == "norm_weight" else draw("", shape, self.site.config.init_method_std)

    def weight_decay(self, name: str) -> bool:
        return name != "norm_weight"

    def mixed(self, carry: Carry) -> tuple[Tensor | Reads, Carry]:
        stream = carry.stream
        dtype, wide, N = stream.dtype, promote(stream.dtype), stream.shape[2]
        normed = rms_norm(stream.to(wide), None, self.eps) * self.norm_weight.to(wide)  # [S, B, N, C]
        flat = normed.flatten(2)
        hidden = F.linear(flat.to(dtype), self.gate_down.to(dtype)).to(wide) / N  # [S, B, r]
        gate = torch.sigmoid(F.linear(F.silu(hidden).to(dtype), self.gate_up.to(dtype)).to(wide))
        x = (gate.unflatten(-1, (N, -1)) * normed).mean(2).to(dtype)  # [S, B, C]
        if self.write_weight is None:
            return x, carry
        write = 2 * torch.sigmoid(F.linear(flat, self.write_weight.to(wide)) / N)  # [S, B, N]
        return x, carry.replace(mix=Mix(read=None, write=write.unsqueeze(-2), keep=None))
