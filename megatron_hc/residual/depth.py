"""Methods that look back over depth: DenseFormer and attention residuals.

Dims: S sequence, B batch, J states, C hidden size, L layers.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from megatron_hc.kernels.depth import key_scores, weighted_sum
from megatron_hc.kernels.norm import promote
from megatron_hc.residual.base import Carry, Draw, Reads, Residual, Site, TensorSpec


class DenseHistory(Residual):
    """What DenseFormer and MUDDFormer share: layer outputs X_j are kept, and combined before a later layer.

    X_0 is the embedding and X_j the stream after j layers. At the entrance of layer i the stream is X_i and the history
    holds those of X_0 .. X_(i-1) that are combined here or later, in order: all of them, but with a dilation k and a
    period p only layers i with i mod p = 0 combine, and only X_j with j mod k = i mod k.
    """

    def __init__(self, site: Site, dilation: int, period: int) -> None:
        super().__init__(site)
        self.dilation, self.period = dilation, period
        layer = site.layer
        self.is_entrance = site.kind in ("attention", "final")
        self.combines = self.is_entrance and layer > 0 and layer % period == 0
        self.kept = self.kept_into(layer)
        self.kept_next = self.kept_into(layer + 1)
        self.sources = self.sources_of(layer)

    def sources_of(self, layer: int) -> tuple[int, ...]:
        """j of the X_j that the entrance of ``layer`` combines, X_layer last."""
        return tuple(range(layer % self.dilation, layer + 1, self.dilation))

    def kept_into(self, layer: int) -> tuple[int, ...]:
        """j of the X_j in the history at the entrance of ``layer``."""
        readers = range(max(layer, 1), self.site.config.num_layers + 1)
        wanted = {j for reader in readers if reader % self.period == 0 for j in self.sources_of(reader)}
        return tuple(j for j in range(layer) if j in wanted)

    def boundary(self, layer: int) -> tuple[TensorSpec, ...]:
        shape = (1, self.site.config.hidden_size)
        return (
            TensorSpec("stream", shape, "stream", f"X{layer}"),
            *(TensorSpec("history", shape, "stream", f"X{j}") for j in self.kept_into(layer)),
        )

    def combine(self, states: list[Tensor]) -> tuple[Tensor | Reads, Tensor]:
        """States [S, B, 1, C], the stream last -> (the sublayer's input [S, B, C], the new stream [S, B, 1, C])."""
        raise NotImplementedError

    def mixed(self, carry: Carry) -> tuple[Tensor | Reads, Carry]:
        if not self.is_entrance:
            return super().mixed(carry)
        states = dict(zip(self.kept, carry.history, strict=True))
        states[self.site.layer] = carry.stream
        history = tuple(states[j] for j in self.kept_next)
        if not self.combines:
            return carry.stream.squeeze(2), carry.replace(history=history)
        x, stream = self.combine([states[j] for j in self.sources])
        return x, carry.replace(stream=stream, history=history)


class DenseFormer(DenseHistory):
    """Depth-weighted averages of layer outputs: arXiv 2402.02622.

        X_0 = embedding, X_i = layer_i(Y_(i-1)), Y_0 = X_0, Y_i = sum_{j <= i} alpha_ij X_j; the last Y is read out

    Y_i is formed only after every --denseformer-period-th layer (elsewhere Y_i = X_i), from X_j whose distance i - j
    --denseformer-dilation divides. Initial values: alpha_ii = 1, the others 0: equals pre-norm exactly.

    Boundary into layer i: the stream X_i and those of X_0 .. X_(i-1) averaged there or later, each [S, B, 1, C].
    Parameters: one 1-D tensor of floor(i / k) + 1 numbers per averaged layer i: L (L + 3) / 2 in all with k = p = 1.
    FLOPs per token, forward: 2 C per number. Memory: the X_j themselves, at most L C activations.
    """

    def __init__(self, site: Site) -> None:
        config = site.config.residual
        super().__init__(site, config.denseformer_dilation, config.denseformer_period)
        self.alpha = nn.Parameter(torch.empty(len(self.sources))) if self.combines else None

    def initial(self, name: str, draw: Draw) -> Tensor:
        alpha = torch.zeros(len(self.sources))
        alpha[-1] = 1
        return alpha

    def combine(self, states: list[Tensor]) -> tuple[Tensor | Reads, Tensor]:
        assert self.alpha is not None
        stream = weighted_sum(self.alpha.to(promote(states[-1].dtype)).unsqueeze(0), states)
        return stream.squeeze(2), stream


class AttentionResidual(Residual):
    """Attention residuals, full and in blocks: arXiv 2603.15031.

        x_k = sum_i a_i v_i,  a = softmax_i(w_k . (RMSNorm(v_i) g_k)),  v_0 = embedding, v_i = F_i(norm(x_i))

    With --attention-residual-block-size S, v_1, v_2, ... are the sums of the outputs of S consecutive sublayers, the
    last of them so far as it has come; 0 or 1 is the full form. The read-out is one more such sum. Initial values:
    w = 0, g = 1: every read is the mean of the outputs so far, which its norm turns into what pre-norm has except for
    eps: equals pre-norm with --norm-epsilon 0.

    Boundary into layer l: the newest source and the ceil(2 l / S) before it, each [S, B, 1, C]. Parameters: 2 C per
    read but the first, which has one source: 4 L C in all. FLOPs per token and sublayer k, forward: 6 C J for
    J = ceil(k / S) + 1 sources. Memory: the sources, (2 L / S + 1) C activations in all, and J weights per read.
    """

    def __init__(self, site: Site) -> None:
        super().__init__(site)
        C = site.config.hidden_size
        self.eps = site.config.norm_epsilon
        self.block_size = max(site.config.residual.attention_residual_block_size, 1)
        self.starts_block = site.index % self.block_size == 0
        self.has_choice = site.index > 0  # the first read has one source
        if self.has_choice:
            self.query = nn.Parameter(torch.empty(C))
            self.key_norm_weight = nn.Parameter(torch.empty(C))

    def initial(self, name: str, draw: Draw) -> Tensor:
        fill = torch.zeros if name == "query" else torch.ones
        return fill(self.site.config.hidden_size)

    def boundary(self, layer: int) -> tuple[TensorSpec, ...]:
        spec = TensorSpec("history", (1, self.site.config.hidden_size), "stream")
        newest = -(-2 * layer // self.block_size)  # number of the newest source, complete where a block ends here
        name = f"v{newest}" if 2 * layer % self.block_size == 0 else ""
        stream = spec._replace(kind="stream", name=name)
        return (stream, *(spec._replace(name=f"v{source}") for source in range(newest)))

    def mixed(self, carry: Carry) -> tuple[Tensor | Reads, Carry]:
        if not self.has_choice:
            return super().mixed(carry)
        sources = (*carry.history, carry.stream)
        wide = promote(carry.stream.dtype)
        query = self.query.to(wide) * self.key_norm_weight.to(wide)
        weights = key_scores(query, sources, self.eps).softmax(-1)  # [S, B, J]
        return weighted_sum(weights.unsqueeze(2), sources).squeeze(2), carry

    def merged(self, carry: Carry) -> Tensor:
        """The sum of all outputs so far, which is pre-norm's stream."""
        wide = promote(carry.stream.dtype)
        return torch.stack([source.squeeze(2).to(wide) for source in (*carry.history, carry.stream)]).sum(0)

    def write(self, carry: Carry, output: Tensor, value: Tensor | None = None) -> Carry:
        """The first output of a block is a new source; the others wait to be added to the newest one."""
        carry = super().write(carry, output, value)
        if not self.starts_block:
            return carry
        stream = self.stream_dtype(output).unsqueeze(2)
        return carry.replace(stream=stream, history=(*carry.history, carry.stream), pending=None)
