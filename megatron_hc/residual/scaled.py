"""Methods that scale a sublayer's output: ReZero and LayerScale. Dims: S sequence, B batch, C hidden size."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from megatron_hc.kernels.norm import promote
from megatron_hc.residual.base import Carry, Draw, Residual, Site


class ScaledWrite(Residual):
    """x' = x + w * F(norm(x)) with learned ``weight`` of ``width`` numbers, applied in at least fp32, rounded once."""

    def __init__(self, site: Site, width: int) -> None:
        super().__init__(site)
        self.weight = nn.Parameter(torch.empty(width)) if site.is_sublayer else None

    def write(self, carry: Carry, output: Tensor, value: Tensor | None = None) -> Carry:
        assert self.weight is not None, "only sublayers write"
        # Mixed dtypes: torch widens inside, and keeps the output itself, not a wide copy, for the backward pass.
        scaled = (output * self.weight.to(promote(output.dtype))).to(output.dtype)
        return super().write(carry, scaled, value)


class ReZero(ScaledWrite):
    """ReZero: x' = x + a_k F(norm(x)), one number per sublayer, 0 at the start: arXiv 2003.04887, equation 1.

    The paper's form has no norms: ``--norm-placement none``; norms, where they are, are those of the placement.
    Initial values: a = 0: the model is the final norm of the embedding, not pre-norm (claims nothing).

    Boundary: the stream, [S, B, 1, C]. Parameters per sublayer: 1. FLOPs per token and sublayer, forward: C. Memory:
    the sublayer's output, C activations.
    """

    def __init__(self, site: Site) -> None:
        super().__init__(site, 1)

    def initial(self, name: str, draw: Draw) -> Tensor:
        return torch.zeros(1)


class LayerScale(ScaledWrite):
    """LayerScale: x' = x + diag(w_k) F(norm(x)): CaiT, arXiv 2103.17239, section 2.

    Initial values: ``--layerscale-init`` in every channel, by default the paper's 0.1 up to 18 layers, 1e-5 up to 24,
    1e-6 beyond: near the identity, not pre-norm (claims nothing; equals pre-norm at 1).

    Boundary: the stream, [S, B, 1, C]. Parameters per sublayer: C. FLOPs per token and sublayer, forward: C. Memory:
    the sublayer's output, C activations.
    """

    def __init__(self, site: Site) -> None:
        super().__init__(site, site.config.hidden_size)

    def initial(self, name: str, draw: Draw) -> Tensor:
        return torch.full((self.site.config.hidden_size,), self.site.config.layerscale_start)
