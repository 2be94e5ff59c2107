"""Sparse aggregation over depth: arXiv 1801.05895. Dims: S sequence, B batch, J states, C hidden size."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from megatron_hc.kernels.depth import weighted_sum
from megatron_hc.kernels.norm import promote
from megatron_hc.residual.base import Carry, Draw, Reads, Residual, Site, TensorSpec


class SparseAggregation(Residual):
    """Sublayers read the states at depth offsets 1, 2, 4, 8, ...: arXiv 1801.05895, equation 3 with c = 2.

        x_k = sum_i a_ki y_(k+1-2^i), i = 0, 1, ... while 2^i <= k + 1;  y_0 = embedding, y_(k+1) = x_k + F_k(norm(x_k))

    k counts sublayers from 0; the last x is read out. The paper sums branch outputs with equal weights; here y keeps
    the residual sum and the weights are learned, so that (our choice) it starts at the plain residual. Initial values:
    a = 1 at offset 1, 0 elsewhere: equals pre-norm exactly.

    Boundary into layer l: the stream y_2l and those of y_0 .. y_(2l-1) that are read there or later: all but those
    whose last power of two has passed. Parameters: floor(log2(k + 1)) + 1 numbers per read but the first. FLOPs per
    token and read, forward: 2 C per number. Memory: the states, at most 2 L C activations in all.
    """

    def __init__(self, site: Site) -> None:
        super().__init__(site)
        k = site.index
        self.combines = k > 0
        self.sources = self.sources_of(k)
        self.kept, self.kept_next = self.kept_into(k), self.kept_into(k + 1)
        self.weights = nn.Parameter(torch.empty(len(self.sources))) if self.combines else None

    def sources_of(self, k: int) -> tuple[int, ...]:
        """j of the y_j that sublayer k reads, newest first."""
        return tuple(k + 1 - 2**i for i in range((k + 1).bit_length()))

    def kept_into(self, k: int) -> tuple[int, ...]:
        """j of the y_j in the history at sublayer k; 2 L: at the read-out."""
        readers = range(k, 2 * self.site.config.num_layers + 1)
        wanted = {j for reader in readers for j in self.sources_of(reader)}
        return tuple(j for j in range(k) if j in wanted)

    def boundary(self, layer: int) -> tuple[TensorSpec, ...]:
        shape = (1, self.site.config.hidden_size)
        return (
            TensorSpec("stream", shape, "stream", f"y{2 * layer}"),
            *(TensorSpec("history", shape, "stream", f"y{j}") for j in self.kept_into(2 * layer)),
        )

    def initial(self, name: str, draw: Draw) -> Tensor:
        weights = torch.zeros(len(self.sources))
        weights[0] = 1
        return weights

    def mixed(self, carry: Carry) -> tuple[Tensor | Reads, Carry]:
        states = dict(zip(self.kept, carry.history, strict=True))
        states[self.site.index] = stream = carry.stream
        history = tuple(states[j] for j in self.kept_next)
        if self.weights is not None:
            chosen = [states[j] for j in self.sources]
            stream = weighted_sum(self.weights.to(promote(stream.dtype)).unsqueeze(0), chosen)
        return stream.squeeze(2), carry.replace(stream=stream, history=history)
