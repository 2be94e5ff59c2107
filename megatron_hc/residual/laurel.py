"""Learned augmented residuals: LAuReL, arXiv 2411.07501. Dims: S sequence, B batch, C hidden size, r rank, J states."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_hc.kernels.depth import weighted_sum
from megatron_hc.kernels.norm import promote
from megatron_hc.residual.base import Carry, Draw, Reads, Residual, Site, TensorSpec


class Laurel(Residual):
    """LAuReL: arXiv 2411.07501, equations 2-6; ``--laurel-form`` chooses among rw, lr, pa and their combinations.

        x_(k+1) = a f(x_k) + b (x_k + sum_j g_j h_j(x_(k-j))),   j = 0 .. J - 1, J = min(--laurel-previous, k + 1)

    rw: (a, b) = softmax of two learned numbers; otherwise a = b = 1. lr: h_j(x) = B_j A_j x, A_j [r, C] and B_j [C, r];
    otherwise h_j(x) = x. pa: the sum as printed, g learned; with lr alone it is h_0, g_0 = 1; with rw alone it is gone.
    k counts sublayers. Initial values: A[i, c] = 1 / sqrt(r C) where c mod r = i, else 0; B = 0; g = 0, with lr 1; both
    numbers of rw 0, so a = b = 1/2: claims nothing with rw; without rw equals pre-norm exactly. (The paper leaves rw's
    start open. Halves make the stream forget by 2 per sublayer, which costs much at the beginning of training.)

    Boundary into layer l: the stream, with pa also the min(--laurel-previous - 1, 2 l) states before it that later
    sublayers read, [S, B, 1, C] each. Parameters per sublayer: rw 2, pa J, lr 2 r C, with pa J times as many. FLOPs per
    token and sublayer, forward: rw 2 C, lr 4 r C (with pa J times), pa 2 J C. Memory: the states are alive anyway;
    without rw about 0, with rw C activations per sublayer.
    """

    def __init__(self, site: Site) -> None:
        super().__init__(site)
        options = site.config.residual
        parts = options.laurel_form.split("-")
        self.weighs, self.is_low_rank, self.looks_back = ("rw" in parts, "lr" in parts, "pa" in parts)
        self.num_previous = options.laurel_previous if self.looks_back else 1
        self.num_states = min(self.num_previous, site.index + 1)
        last = 2 * site.config.num_layers - 1
        self.num_kept = min(self.num_previous - 1, site.index + 1) if site.index < last else 0  # for the next sublayer
        if not site.is_sublayer:
            return
        J, r, C = self.num_states, options.laurel_rank, site.config.hidden_size
        self.weights = nn.Parameter(torch.empty(2)) if self.weighs else None
        self.gammas = nn.Parameter(torch.empty(J)) if self.looks_back else None
        self.low = nn.Parameter(torch.empty(J, r, C)) if self.is_low_rank else None
        self.high = nn.Parameter(torch.empty(J, C, r)) if self.is_low_rank else None

    def initial(self, name: str, draw: Draw) -> Tensor:
        J, r, C = self.num_states, self.site.config.residual.laurel_rank, self.site.config.hidden_size
        if name == "weights":
            return torch.zeros(2)
        if name == "gammas":
            return torch.full((J,), float(self.is_low_rank))
        if name == "high":
            return torch.zeros(J, C, r)
        columns = torch.arange(C) % r == torch.arange(r).unsqueeze(1)
        return (columns / math.sqrt(r * C)).float().repeat(J, 1, 1)

    def weight_decay(self, name: str) -> bool:
        return name in ("low", "high")

    def boundary(self, layer: int) -> tuple[TensorSpec, ...]:
        newest = 2 * layer
        kept = min(self.num_previous - 1, newest) if layer < self.site.config.num_layers else 0
        shape = (1, self.site.config.hidden_size)
        states = (TensorSpec("history", shape, "stream", f"x{j}") for j in range(newest - kept, newest))
        return (TensorSpec("stream", shape, "stream", f"x{newest}"), *states)

    def mixed(self, carry: Carry) -> tuple[Tensor | Reads, Carry]:
        x, carry = super().mixed(carry)
        if not self.site.is_sublayer:
            return x, carry
        states = (*carry.history, carry.stream)
        history = states[len(states) - self.num_kept :]
        return x, carry.replace(stream=self.skip(states[::-1][: self.num_states]), history=history)

    def skip(self, states: tuple[Tensor, ...]) -> Tensor:
        """b (x_k + sum_j g_j h_j(x_(k-j))) from x_k, x_(k-1), ..., [S, B, 1, C] each."""
        x = states[0]
        wide = promote(x.dtype)
        weight = torch.ones(1, dtype=wide, device=x.device) if self.weights is None else self.shares(wide)[1:]
        if not self.is_low_rank:
            factors = torch.eye(len(states), dtype=wide, device=x.device)[0]
            if self.gammas is not None:
                factors = factors + self.gammas.to(wide)
            return weighted_sum((weight * factors).unsqueeze(0), states)
        assert self.low is not None and self.high is not None
        total = x.to(wide)
        for j, state in enumerate(states):
            # As the sublayers' own matrices, these multiply in the stream's dtype.
            term = F.linear(F.linear(state, self.low[j].to(x.dtype)), self.high[j].to(x.dtype)).to(wide)
            total = total + (term if self.gammas is None else self.gammas[j : j + 1].to(wide) * term)
        return (weight * total).to(x.dtype)

    def shares(self, dtype: torch.dtype) -> Tensor:
        """(a, b)"""
        assert self.weights is not None
        return self.weights.to(dtype).softmax(0)

    def write(self, carry: Carry, output: Tensor, value: Tensor | None = None) -> Carry:
        if self.weighs:
            output = (output * self.shares(promote(output.dtype))[:1]).to(output.dtype)
        return super().write(carry, output, value)
