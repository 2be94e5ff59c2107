"""Writes that look at a direction of the stream: orthogonal updates and deep delta learning.

Dims: S sequence, B batch, C hidden size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_hc.kernels.norm import promote, rms_norm
from megatron_hc.residual.base import Carry, Draw, Mix, Reads, Residual, Site

EPS = 1e-6


class OrthogonalUpdate(Residual):
    """The part of a sublayer's output that is orthogonal to the stream: arXiv 2505.11881, feature-wise form.

        x' = x + f - (x . f) / (|x|^2 + 1e-6) x,  f = F(norm(x)), token by token, in at least fp32

    The paper's global form takes x . f and |x|^2 over all tokens: refused, a token would see later ones. Claims nothing
    at its start: it is another function than pre-norm.

    Boundary: the stream, [S, B, 1, C]. Parameters: none. FLOPs per token and sublayer, forward: 6 C. Memory: C
    activations per sublayer (the output), and two numbers per token.
    """

    def __init__(self, site: Site) -> None:
        super().__init__(site)
        assert site.config.residual.orthogonal_form == "feature", "the configuration refuses the global form"

    def fold(self, stream: Tensor, output: Tensor, mix: Mix | None) -> Tensor:
        x, f = stream.to(promote(stream.dtype)), output.unsqueeze(2).to(promote(output.dtype))
        share = (x * f).sum(-1, keepdim=True) / (x.square().sum(-1, keepdim=True) + EPS)
        return ((self.stream_factor - share) * x + f).to(stream.dtype)


class DeepDelta(Residual):
    """Deep delta learning with a vector state (d_v = 1): arXiv 2601.00417.

        x' = x + b (v - k . x) k,   k = f / |f|, f = F(norm(x))
        b = 2 sigmoid(w_b . z + c_b),   v = w_v . z + c_v,   z = RMSNorm(x) without weight

    Along the direction k that the sublayer gives, b of what the stream holds is replaced by v: 0 keeps it, 1 overwrites
    it, 2 reflects it. As in the authors' code k is the sublayer's output and the gate looks at the normed stream; v is
    learned there or the constant 2, here it is learned and starts at 2. Initial values: w = 0, b = 1, v = 2: claims
    nothing. |f| is sqrt(f . f + 1e-12), so that a dropped sublayer writes nothing.

    Boundary: the stream, [S, B, 1, C]. Parameters per sublayer: 2 C + 2. FLOPs per token and sublayer, forward: about
    12 C. Memory: the output, C activations per sublayer, and two numbers per token.
    ``mix.write`` holds (b, v) per token, [S, B, 1, 2].
    """

    def __init__(self, site: Site) -> None:
        super().__init__(site)
        self.eps = site.config.norm_epsilon
        if site.is_sublayer:
            self.projection = nn.Parameter(torch.empty(2, site.config.hidden_size))
            self.bias = nn.Parameter(torch.empty(2))

    def initial(self, name: str, draw: Draw) -> Tensor:
        return torch.tensor([0.0, 2.0]) if name == "bias" else torch.zeros(2, self.site.config.hidden_size)

    def weight_decay(self, name: str) -> bool:
        return name == "projection"

    def mixed(self, carry: Carry) -> tuple[Tensor | Reads, Carry]:
        x, carry = super().mixed(carry)
        if not self.site.is_sublayer:
            return x, carry
        wide = promote(carry.stream.dtype)
        z = rms_norm(carry.stream.to(wide), None, self.eps)
        gate, target = F.linear(z, self.projection.to(wide), self.bias.to(wide)).split(1, -1)
        return x, carry.replace(mix=Mix(None, torch.cat((2 * torch.sigmoid(gate), target), -1), None))

    def fold(self, stream: Tensor, output: Tensor, mix: Mix | None) -> Tensor:
        assert mix is not None, "the gate of a deep delta is chosen by its read"
        gate, target = mix.write.split(1, -1)  # [S, B, 1, 1]
        x, f = stream.to(gate.dtype), output.unsqueeze(2).to(gate.dtype)
        k = f * torch.rsqrt(f.square().sum(-1, keepdim=True) + EPS**2)
        return (x + gate * (target - (k * x).sum(-1, keepdim=True)) * k).to(stream.dtype)
