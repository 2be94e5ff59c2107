"""Virtual width networks, arXiv 2511.11238.

Dims: S, B, N streams (n), M fractions of the hidden vector (m), C hidden size, D = C / m the width of a stream.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_hc.kernels.coefficients import Form, coefficients
from megatron_hc.kernels.norm import layer_norm, norm, promote
from megatron_hc.residual.base import Carry, Draw, FusedMix, LinearMix, Mix, Site


class VirtualWidth(LinearMix):
    """Generalized hyper-connections: n streams of width C / m, of which a sublayer reads and writes m at a time.

        H = cut(W_expand h)       x = join(A_m^T H)       H_next = B^T cut(F(norm(x))) + A_r^T H
        [A_m | A_r] = A + S_a tanh(norm(H) W_a / t)       B = B_0 + (S_b tanh(norm(H) W_b / t))^T
        read-out: W_reduce GroupNorm(join(H))             t = sqrt(C / m)

    (Equations 3, 4, 6, 8-12; the square root is in the paper's Algorithm 2. S_a and S_b multiply element by element.)
    GroupNorm has groups of C channels and is left out where m does not divide n, as the paper does at m = 2, n = 3.
    n is --residual-streams, m is --virtual-width-fractions; --static-residual drops the tanh terms.

    Initial values: W = 0, S = 1, B_0[i, j] = 1 where i = j mod m, A_m = first m streams, A_r = I, W_expand and W_reduce
    N(0, --init-method-std^2): claims no equality. With --no-virtual-width-projections, W_expand copies fraction j mod m
    to stream j and the read-out is the mean (--residual-readout sum: the sum) of the streams of one fraction, without
    GroupNorm: then it equals pre-norm exactly, hyper-connections are the case m = 1 and frac-connections the case
    n = m, W being t times theirs, S their scale (for B of frac-connections: on the diagonal, 0 elsewhere, and W_b its
    one column m times), with the same --residual-norm-weight.

    Boundary: n streams, [S, B, n, C / m]. Parameters per sublayer: n (2 m + n), dynamic also n (2 m + n) +
    (C / m) (2 m + n), and C / m unless --no-residual-norm-weight; W_expand and W_reduce C^2 n / m each, GroupNorm
    2 C n / m. FLOPs per token and sublayer, forward: 2 (C / m) n (2 m + n), dynamic also as many. Memory: C n / m
    activations per sublayer.
    """

    kind = "virtual"

    def __init__(self, site: Site) -> None:
        super().__init__(site)
        config = site.config.residual
        N, M, D, C = self.num_streams(), config.virtual_width_fractions, self.stream_width(), site.config.hidden_size
        self.num_fractions = M
        self.eps = site.config.norm_epsilon
        expands = config.virtual_width_projections and site.kind == "entry"
        reduces = config.virtual_width_projections and site.is_final
        self.expand = nn.Parameter(torch.empty(N * D, C)) if expands else None
        self.reduce = nn.Parameter(torch.empty(C, N * D)) if reduces else None
        has_groups = reduces and N % M == 0
        self.group_weight = nn.Parameter(torch.empty(N * D)) if has_groups else None
        self.group_bias = nn.Parameter(torch.empty(N * D)) if has_groups else None
        if not site.is_sublayer:
            return
        self.static_read = nn.Parameter(torch.empty(N, M))
        self.static_keep = nn.Parameter(torch.empty(N, N))
        self.static_write = nn.Parameter(torch.empty(M, N))
        self.is_dynamic = not config.static_residual
        if not self.is_dynamic:
            return
        self.dynamic_weight = nn.Parameter(torch.empty(M + N + M, D))  # rows: read, keep, write
        self.scale_alpha = nn.Parameter(torch.empty(N, M + N))
        self.scale_beta = nn.Parameter(torch.empty(M, N))
        self.norm_weight = None if config.residual_norm_weight is False else nn.Parameter(torch.empty(D))

    def stream_width(self) -> int:
        return self.site.config.hidden_size // self.site.config.residual.virtual_width_fractions

    def initial(self, name: str, draw: Draw) -> Tensor:
        N, M = self.num_streams(), self.num_fractions
        shape = tuple(self._parameters[name].shape)  # type: ignore[union-attr]
        if name in ("expand", "reduce"):
            return draw("", shape, self.site.config.init_method_std)
        if name in ("static_read", "static_keep"):
            return torch.eye(*shape)
        if name == "static_write":
            return torch.eye(M).repeat(1, -(-N // M))[:, :N]
        return torch.zeros(shape) if name in ("dynamic_weight", "group_bias") else torch.ones(shape)

    def weight_decay(self, name: str) -> bool:
        return name in ("expand", "reduce", "dynamic_weight")

    def open(self, hidden: Tensor) -> Carry:
        N, M = self.num_streams(), self.num_fractions
        hidden = self.stream_dtype(hidden)
        if self.expand is not None:
            return Carry(stream=F.linear(hidden, self.expand.to(hidden.dtype)).unflatten(-1, (N, -1)))
        fractions = hidden.unflatten(-1, (M, -1))
        return Carry(stream=torch.cat([fractions] * -(-N // M), dim=2)[:, :, :N])

    def weights(self, stream: Tensor) -> Mix:
        S, B, _, D = stream.shape
        dtype, logits = promote(stream.dtype), None
        if self.is_dynamic:
            normed = norm(stream.to(dtype), self.site.config.normalization, self.norm_weight, None, self.eps)
            logits = (F.linear(normed, self.dynamic_weight.to(dtype)) / math.sqrt(D)).flatten(0, 1)
        mix = coefficients(self.form(), logits, self.mix_parameters(dtype))
        read, write, keep = (t.expand(S * B, -1, -1).unflatten(0, (S, B)) for t in mix)
        return Mix(read, write, keep)

    def mix_parameters(self, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """What ``coefficients`` takes."""
        static = (self.static_read, self.static_keep, self.static_write)
        found = (*static, self.scale_alpha, self.scale_beta) if self.is_dynamic else static
        return tuple(t.to(dtype) for t in found)

    def form(self) -> Form:
        is_centred = self.site.config.normalization == "LayerNorm"
        return Form(self.kind, self.num_streams(), self.num_fractions, False, is_centred, self.eps)

    def fused(self) -> FusedMix:
        dtype, projection = promote(self.static_read.dtype), None
        if self.is_dynamic:
            projection = self.dynamic_weight.to(dtype) / math.sqrt(self.stream_width())
            projection = projection if self.norm_weight is None else projection * self.norm_weight.to(dtype)
        return FusedMix(self.form(), projection, self.mix_parameters(dtype))

    def merged(self, carry: Carry) -> Tensor:
        """The mean of each fraction's copies, joined."""
        wide = carry.stream.to(promote(carry.stream.dtype))
        return torch.cat([wide[:, :, i :: self.num_fractions].mean(2) for i in range(self.num_fractions)], dim=-1)

    def read_out_weights(self, stream: Tensor) -> None:
        return None

    def read_out(self, stream: Tensor) -> Tensor:
        if self.reduce is not None:
            x = stream.flatten(2)  # [S, B, N * D]
            if self.group_weight is not None and self.group_bias is not None:
                wide, C = promote(x.dtype), self.site.config.hidden_size
                groups = layer_norm(x.to(wide).unflatten(-1, (-1, C)), None, None, self.eps).flatten(2)
                x = (groups * self.group_weight.to(wide) + self.group_bias.to(wide)).to(x.dtype)
            return F.linear(x, self.reduce.to(x.dtype))
        wide_stream = stream.to(promote(stream.dtype))
        is_mean = self.site.config.residual.residual_readout == "mean"
        of_fraction = [wide_stream[:, :, i :: self.num_fractions] for i in range(self.num_fractions)]
        merged = [copies.mean(2) if is_mean else copies.sum(2) for copies in of_fraction]
        return torch.cat(merged, dim=-1).to(stream.dtype)
