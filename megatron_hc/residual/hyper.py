"""Hyper-connections (arXiv 2409.19606) and frac-connections (arXiv 2503.14125).

Dims: S sequence, B batch, N streams (n) or fractions (m), D width of one stream: C, or C / m.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from megatron_hc.kernels.coefficients import Form, coefficients
from megatron_hc.kernels.norm import norm, promote
from megatron_hc.residual.base import Carry, Draw, FusedMix, LinearMix, Mix, Site

SCALE = 0.01  # initial s_alpha and s_beta of both papers


class _StaticDynamicMix(LinearMix):
    """weights = static + s * tanh(norm(stream) W): what both papers share. ``num_reads`` is R: 1, or m."""

    def __init__(self, site: Site, num_reads: int, default_norm_weight: bool) -> None:
        super().__init__(site)
        N, D, R = self.num_streams(), self.stream_width(), num_reads
        self.num_reads = R
        config = site.config.residual
        if not site.is_sublayer:
            return
        self.static_read = nn.Parameter(torch.empty(N, R))
        self.static_keep = nn.Parameter(torch.empty(N, N))
        self.static_write = nn.Parameter(torch.empty(N))
        self.is_dynamic = not config.static_residual
        if not self.is_dynamic:
            return
        # Rows: R for read, N for keep, 1 for write. Rows rather than columns, so that the skinny product is x @ W^T.
        self.dynamic_weight = nn.Parameter(torch.empty(R + N + 1, D))
        self.scale_alpha = nn.Parameter(torch.empty(1))
        self.scale_beta = nn.Parameter(torch.empty(1))
        chosen = config.residual_norm_weight
        has_norm_weight = default_norm_weight if chosen is None else chosen
        self.norm_weight = nn.Parameter(torch.empty(D)) if has_norm_weight else None

    def initial(self, name: str, draw: Draw) -> Tensor:
        N, R = self.num_streams(), self.num_reads
        if name == "static_read":
            return torch.eye(N)[:, [self.site.index % N]] if R == 1 else torch.eye(N)
        if name == "static_keep":
            return torch.eye(N)
        if name == "dynamic_weight":
            return torch.zeros(R + N + 1, self.stream_width())
        if name in ("scale_alpha", "scale_beta"):
            return torch.full((1,), SCALE)
        if name == "static_write":
            return torch.ones(N)
        assert name == "norm_weight", name
        return torch.ones(self.stream_width())

    def weight_decay(self, name: str) -> bool:
        return name == "dynamic_weight"

    def weights(self, stream: Tensor) -> Mix:
        S, B, N, _ = stream.shape
        dtype = promote(stream.dtype)
        logits = None
        if self.is_dynamic:
            config = self.site.config
            normed = norm(stream.to(dtype), config.normalization, self.norm_weight, None, config.norm_epsilon)
            logits = nn.functional.linear(normed, self.dynamic_weight.to(dtype)).flatten(0, 1)
        mix = coefficients(self.form(), logits, self.mix_parameters(dtype))
        read, write, keep = (t.expand(S * B, -1, -1).unflatten(0, (S, B)) for t in mix)
        return Mix(read, write, keep)

    def mix_parameters(self, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """What ``coefficients`` takes."""
        static = (self.static_read, self.static_keep, self.static_write)
        found = (*static, self.scale_alpha, self.scale_beta) if self.is_dynamic else static
        return tuple(t.to(dtype) for t in found)

    def form(self) -> Form:
        config = self.site.config
        is_centred = config.normalization == "LayerNorm"
        return Form(self.kind, self.num_streams(), self.num_reads, False, is_centred, config.norm_epsilon)

    def fused(self) -> FusedMix:
        dtype = promote(self.static_read.dtype)
        projection = None
        if self.is_dynamic:
            projection = self.dynamic_weight.to(dtype)
            projection = projection if self.norm_weight is None else projection * self.norm_weight.to(dtype)
        return FusedMix(self.form(), projection, self.mix_parameters(dtype))


class HyperConnection(_StaticDynamicMix):
    """Hyper-connections, static and dynamic: arXiv 2409.19606, equations 1-5 and 10-13.

        x  = A_m^T H            H' = A_r^T H            H_next = B^T F(norm(x))^T + H'
        A_m = static + s_alpha tanh(norm(H) W_m), A_r likewise, B = static + s_beta tanh(norm(H) W_beta)

    H holds n copies of the embedding at the start and is read out as their mean (``--residual-readout sum``: the sum).
    Initial values: A_m = e_(k mod n), A_r = I, B = 1, W = 0, s = 0.01: equals pre-norm, exactly with the mean.

    Boundary: n streams, [S, B, n, C]. Parameters per sublayer: n (n + 2), dynamic also C (n + 2) + 2, and C with
    ``--residual-norm-weight`` (default off). FLOPs per token and sublayer, forward: 2 C n (n + 2), dynamic also
    2 C n (n + 2). Memory: n C activations per sublayer.
    """

    def __init__(self, site: Site) -> None:
        super().__init__(site, num_reads=1, default_norm_weight=False)


class FracConnection(_StaticDynamicMix):
    """Frac-connections, static and dynamic: arXiv 2503.14125, section 3 and Algorithm 1.

        H = hidden vector cut in m fractions of C / m      x = join(Y^T H)
        H_next = diag(B) cut(F(norm(x))) + A^T H           Y, A, B = static + s tanh(norm(H) W)

    Initial values: Y = A = I, B = 1, W = 0, s = 0.01: equals pre-norm exactly.

    Boundary: one hidden vector, [S, B, m, C / m]. Parameters per sublayer: m (2 m + 1), dynamic also
    (C / m) (2 m + 1) + 2, and C / m unless ``--no-residual-norm-weight``. FLOPs per token and sublayer, forward:
    2 C (2 m + 1), dynamic also 2 C (2 m + 1). Memory: C activations per sublayer, as pre-norm.
    """

    def __init__(self, site: Site) -> None:
        super().__init__(site, num_reads=site.config.residual.residual_streams, default_norm_weight=True)

    def stream_width(self) -> int:
        return self.site.config.hidden_size // self.num_streams()

    def open(self, hidden: Tensor) -> Carry:
        return Carry(stream=self.stream_dtype(hidden).unflatten(-1, (self.num_streams(), -1)))

    def merged(self, carry: Carry) -> Tensor:
        return carry.stream.flatten(2).to(promote(carry.stream.dtype))

    def read_out_weights(self, stream: Tensor) -> Tensor:
        return torch.eye(stream.shape[2], dtype=promote(stream.dtype), device=stream.device)

    def read_out(self, stream: Tensor) -> Tensor:
        return stream.flatten(2)
