"""The residual path as an interface, and the plain residual, which is its simplest member.

Dims: S sequence, B batch, N streams, R reads of one sublayer, D width of one stream, C hidden size.

A sublayer (attention or MLP) reads its input from the carry and writes its output back:

    x, carry = residual.read(carry, norm)        # settle + mixed + norm
    carry = residual.write(carry, sublayer(x))   # only records

The write waits until the next read, because the weights of a hyper-connection exist before the sublayer runs: so one
kernel can do "write of sublayer k, weights, read of sublayer k+1, its norm".

Rules for the author of a method:

1. ``Mix`` and ``pending`` hold computed tensors, never parameters.
2. No token looks at another one, so that a residual runs unchanged on a shard of the sequence.
3. Mixing weights are computed in at least fp32 (``promote``); the streams keep the activation dtype.
4. No randomness from the rank; initial values depend on the site only.
5. The docstring says what the method equals at its initial values, and a test holds it to that.
6. No 0-d parameters (FSDP2 refuses them): shape [1].
7. Nothing that varies is a class attribute; ``forward`` reads no Python value that differs from layer to layer.
8. A carry is made by ``Carry(...)`` or ``carry.replace(...)``, a mix by ``Mix(...)``, neither by ``_replace``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from megatron_hc.config import ModelConfig
from megatron_hc.kernels import boundary as fused_kernel
from megatron_hc.kernels import boundary_listed
from megatron_hc.kernels.coefficients import READ_OUT, Form
from megatron_hc.kernels.norm import NormParts, is_one_pass_with_sum, norm_of_sum, promote

Draw = Callable[[str, tuple[int, ...], float], Tensor]
"""(logical part, shape, standard deviation) -> fp32 normal numbers that depend on the seed and the name only."""


class Mix(NamedTuple):
    """Token-wise weights of one sublayer."""

    read: Tensor | None
    """[S, B, N, R] streams -> sublayer input; None where the method reads in its own way."""
    write: Tensor
    """[S, B, R, N] sublayer output -> streams."""
    keep: Tensor | None
    """[S, B, N, N] ``keep[old, new]``; None: streams stay as they are."""


class Reads(NamedTuple):
    """What attention reads where query, key and value differ; each [S, B, C]."""

    q: Tensor
    k: Tensor
    v: Tensor


class Norm(NamedTuple):
    """The norm that belongs to a read."""

    module: nn.Module | None
    replaces_stream: bool = False
    """Post-norm: the normed value becomes the stream (one stream only)."""
    stream_scale: nn.Module | None = None
    """What the stream goes through once it has been read (one stream only)."""


class Carry(NamedTuple):
    """What one sublayer hands to the next. Immutable; a pytree as it is."""

    stream: Tensor
    """[S, B, N, D]"""
    values: tuple[Tensor, ...] = ()
    """Attention values of earlier layers that later ones use, each [S', B, G, H]."""
    history: tuple[Tensor, ...] = ()
    """Earlier states for methods that look back over depth, each [S, B, 1, D]."""
    ahead: Tensor | None = None
    """Read weights for the next sublayer (single-pass mHC), [S, B, N, R]."""
    pending: tuple[Tensor, Mix | None] | None = None
    """A sublayer output not yet folded into the stream."""
    mix: Mix | None = None
    """Chosen by read, consumed by write."""

    def replace(self, **fields: Any) -> Carry:
        """The carry with these fields changed: ``_replace``, whose result torch 2.11's compiler returns empty."""
        return Carry(**{**dict(zip(self._fields, self, strict=True)), **fields})


class TensorSpec(NamedTuple):
    """One tensor of the settled carry at a layer's entrance: its full shape is [S, B, *shape]."""

    kind: Literal["stream", "values", "history", "ahead"]
    shape: tuple[int, ...]
    """Per token; value tensors count all key/value heads, of which a tensor-parallel rank holds its share."""
    dtype: Literal["activation", "stream", "coefficient"]
    """activation: the weights' dtype; stream: fp32 under --fp32-residual-connection; coefficient: at least fp32."""
    name: str = ""
    """The same name at two boundaries: the same tensor, passed on unchanged, which a pipeline process keeps instead of
    getting it twice. "": a tensor of this boundary alone."""


@dataclass(frozen=True)
class Site:
    """Where in the model a residual module stands."""

    kind: Literal["entry", "attention", "mlp", "final"]
    layer: int
    """Global layer index; num_layers at the final site."""
    config: ModelConfig

    @property
    def index(self) -> int:
        """Number of sublayers before this one: the papers' k."""
        return 2 * self.layer + (self.kind == "mlp")

    @property
    def is_final(self) -> bool:
        return self.kind == "final"

    @property
    def is_sublayer(self) -> bool:
        """A site that is read and written; entry and final sites of most methods have no parameters."""
        return self.kind in ("attention", "mlp")


class Residual(nn.Module):
    """The interface, and the plain residual x' = x + F(norm(x)) (He et al. 2016; pre-norm: Xiong et al. 2020).

    Boundary: the stream, [S, B, 1, C]. Parameters, extra FLOPs and extra memory: none.
    """

    replaces_norm: bool = False
    """The method norms its own reads: the layer then builds no norm."""

    def __init__(self, site: Site) -> None:
        super().__init__()
        self.site = site
        self.fp32_stream = site.config.fp32_residual_connection
        self.stream_factor = site.config.residual_stream_factor

    def open(self, hidden: Tensor) -> Carry:
        """Embedding [S, B, C] -> the first carry. Called at the entry site only."""
        return Carry(stream=self.stream_dtype(hidden).unsqueeze(2))

    def boundary(self, layer: int) -> tuple[TensorSpec, ...]:
        """What crosses into ``layer`` beside attention values: declared, so that buffers are sized before a run."""
        return (TensorSpec("stream", (1, self.site.config.hidden_size), "stream"),)

    def fold(self, stream: Tensor, output: Tensor, mix: Mix | None) -> Tensor:
        """Write a sublayer's output [S, B, C] into the stream. Token-wise, no parameters."""
        if self.stream_factor == 1:
            return output.unsqueeze(2) + stream
        # On a CPU torch.add would round the factor itself to bfloat16.
        dtype = torch.promote_types(output.dtype, stream.dtype)
        wide = torch.promote_types(dtype, torch.float32)
        return torch.add(output.unsqueeze(2).to(wide), stream.to(wide), alpha=self.stream_factor).to(dtype)

    def settle(self, carry: Carry) -> Carry:
        """The carry with nothing pending."""
        if carry.pending is None:
            return carry
        output, mix = carry.pending
        return carry.replace(stream=self.fold(carry.stream, output, mix), pending=None)

    def mixed(self, carry: Carry) -> tuple[Tensor | Reads, Carry]:
        """The sublayer's input before its norm, [S, B, C], from a settled carry; chooses ``carry.mix``."""
        return carry.stream.squeeze(2), carry

    def read(self, carry: Carry, norm: Norm) -> tuple[Tensor | Reads, Carry]:
        """The sublayer's normed input and the carry to write to."""
        parts = self.parts_with_sum(carry, norm)
        if parts is not None:
            return self.summed_and_normed(carry, parts)
        x, carry = self.mixed(self.settle(carry))
        if isinstance(x, Reads):
            return (x if norm.module is None else Reads(*(norm.module(part) for part in x))), carry
        if norm.module is not None:
            x = norm.module(x)
        if norm.replaces_stream:
            carry = carry.replace(stream=x.unsqueeze(2))
        if norm.stream_scale is not None:
            carry = carry.replace(stream=norm.stream_scale(carry.stream))
        return x, carry

    def parts_with_sum(self, carry: Carry, norm: Norm) -> NormParts | None:
        """The norm, where one kernel can both fold the pending output in and norm: this class's own read, on a GPU."""
        if carry.pending is None or norm.module is None or not is_one_pass_with_sum(carry.stream):
            return None
        is_plain = type(self).fold is Residual.fold and type(self).mixed is Residual.mixed
        if not is_plain or norm.replaces_stream or norm.stream_scale is not None:
            return None
        # A norm whose forward was replaced is one to be recomputed.
        return None if "forward" in vars(norm.module) else norm_parts(norm.module)

    def summed_and_normed(self, carry: Carry, parts: NormParts) -> tuple[Tensor, Carry]:
        assert carry.pending is not None
        stream, x = norm_of_sum(carry.stream.squeeze(2), carry.pending[0], self.stream_factor, parts)
        return x, carry.replace(stream=stream.unsqueeze(2), pending=None)

    def write(self, carry: Carry, output: Tensor, value: Tensor | None = None) -> Carry:
        """Record a sublayer's output [S, B, C], and an attention value that later layers use."""
        values = carry.values if value is None else (*carry.values, value)
        return carry.replace(pending=(output, carry.mix), mix=None, values=values)

    def state(self, carry: Carry) -> Tensor:
        """The carry as one vector per token, [S, B, C] in at least fp32: the mean of the streams, all outputs in it."""
        return self.merged(self.settle(carry))

    def merged(self, carry: Carry) -> Tensor:
        """``state`` of a settled carry; no parameters, token-wise."""
        return carry.stream.to(promote(carry.stream.dtype)).mean(2)

    def stream_dtype(self, hidden: Tensor) -> Tensor:
        return hidden.to(promote(hidden.dtype)) if self.fp32_stream else hidden

    def initial(self, name: str, draw: Draw) -> Tensor:
        """Full-size fp32 initial value of this module's own parameter ``name``."""
        raise NotImplementedError(f"{type(self).__name__} has no initial value for {name}")

    def weight_decay(self, name: str) -> bool:
        """Whether the parameter decays: matrices of token-dependent projections do, everything else does not."""
        return False


class FusedMix(NamedTuple):
    """A method's mixing weights as ``kernels.boundary`` takes them."""

    form: Form
    projection: Tensor | None
    """[K, D], joint [K, N D]: in at least fp32, the norm's weight taken up; None: static weights."""
    parameters: tuple[Tensor, ...]
    """What ``kernels.coefficients`` takes besides the logits."""


class LinearMix(Residual):
    """The hyper-connection family: sublayer input and new streams are linear in the streams, token by token.

        x       = sum_i read[i, r] stream_i                        (R parts, joined to width C)
        stream' = sum_i keep[i, j] stream_i + sum_r write[r, j] output_r

    A member writes ``weights`` and the initial values; with N streams of width C ``open`` copies the embedding.
    """

    kind = "tanh"
    """``Form.kind`` of its boundaries."""

    def weights(self, stream: Tensor) -> Mix:
        raise NotImplementedError

    def num_streams(self) -> int:
        return self.site.config.residual.residual_streams

    def stream_width(self) -> int:
        return self.site.config.hidden_size

    def open(self, hidden: Tensor) -> Carry:
        copies = (-1, -1, self.num_streams(), -1)
        return Carry(stream=self.stream_dtype(hidden).unsqueeze(2).expand(copies))

    def boundary(self, layer: int) -> tuple[TensorSpec, ...]:
        return (TensorSpec("stream", (self.num_streams(), self.stream_width()), "stream"),)

    def fold(self, stream: Tensor, output: Tensor, mix: Mix | None) -> Tensor:
        assert mix is not None, "a linear mix is written with the weights its read chose"
        tokens, D = stream.shape[:2], stream.shape[-1]
        parts = output.unflatten(-1, (-1, D))  # [S, B, R, D]
        if mix.keep is None:
            dtype = mix.write.dtype
            return (mix.write.transpose(-1, -2) @ parts.to(dtype) + stream.to(dtype)).to(stream.dtype)
        if not self.is_fused(stream):
            wide = stream.to(mix.keep.dtype)
            return (mix.keep.transpose(-1, -2) @ wide + mix.write.transpose(-1, -2) @ parts.to(wide.dtype)).to(
                stream.dtype
            )
        # The fused boundary's own sum: a carry settled between pipeline stages holds the same numbers.
        flat = stream.flatten(0, 1), parts.flatten(0, 1), mix.write.flatten(0, 1), mix.keep.flatten(0, 1)
        if is_listed(stream):
            return boundary_listed.fold(*flat).unflatten(0, tokens)
        backend = self.site.config.fused_residual_backend
        return fused_kernel.fold(*flat, backend, self.kind).unflatten(0, tokens)

    def mixed(self, carry: Carry) -> tuple[Tensor | Reads, Carry]:
        if self.site.is_final:
            return self.read_out(carry.stream), carry
        mix = self.weights(carry.stream)
        return self.combine(carry.stream, mix), carry.replace(mix=mix)

    def fused(self) -> FusedMix | None:
        """What ``weights`` computes, in the form that the fused boundary takes; None: this method has no such form."""
        return None

    def read(self, carry: Carry, norm: Norm) -> tuple[Tensor | Reads, Carry]:
        fused = self.fused_read(carry)
        if fused is None:
            return super().read(carry, norm)
        assert not norm.replaces_stream, "refused with n streams"
        tokens, D = carry.stream.shape[:2], carry.stream.shape[-1]
        written: tuple[Tensor | None, Tensor | None, Tensor | None] = (None, None, None)
        if carry.pending is not None:
            output, mix = carry.pending
            assert mix is not None and mix.keep is not None
            written = (output.unflatten(-1, (-1, D)).flatten(0, 1), mix.write.flatten(0, 1), mix.keep.flatten(0, 1))
        form, of_norm = fused.form, norm_parts(norm.module)
        weight = bias = None
        if of_norm is not None:
            wide = promote(carry.stream.dtype)
            weight, bias = of_norm.weight.to(wide), None if of_norm.bias is None else of_norm.bias.to(wide)
            form = form._replace(norm=of_norm.kind, norm_eps=of_norm.eps)
        form = form._replace(backend=self.site.config.fused_residual_backend)
        run = boundary_listed.boundary if is_listed(carry.stream) else self.run_boundary
        stream, x, write, keep, *_ = run(
            form, carry.stream.flatten(0, 1), *written, fused.projection, weight, bias, fused.parameters
        )
        # The read is done: of the weights only those of the write go on.
        mix = Mix(read=None, write=write.unflatten(0, tokens), keep=keep.unflatten(0, tokens))
        carry = carry.replace(stream=stream.unflatten(0, tokens), pending=None, mix=mix)
        x = x.unflatten(0, tokens)
        return x if norm.module is None or of_norm is not None else norm.module(x), carry

    def run_boundary(self, form: Form, *tensors: Any) -> tuple[Tensor, ...]:
        """The fused operation, with its arguments and results. Recompute of reads puts another in its place."""
        return fused_kernel.boundary(form, *tensors)

    def fused_read(self, carry: Carry) -> FusedMix | None:
        """What the fused boundary does here, if it does.

        After the last layer the streams are read with constant weights: the last write, the read-out and the final
        norm are one boundary, of which only x is used.
        """
        if not self.is_fused(carry.stream):
            return None
        if self.site.is_sublayer:
            return self.fused()
        mix = carry.pending[1] if self.site.is_final and carry.pending is not None else None
        read = None if mix is None or mix.keep is None else self.read_out_weights(carry.stream)
        if read is None:
            return None
        N, R = read.shape
        form = Form(READ_OUT, N, R, False, False, 0.0, backend=self.site.config.fused_residual_backend)
        return FusedMix(form, None, (read, read.new_zeros(N, N), read.new_zeros(N)))

    def is_fused(self, stream: Tensor) -> bool:
        """Whether reads and writes go through the fused boundary; float64 takes the plain form."""
        return self.site.config.fused_residual and stream.dtype != torch.float64

    def combine(self, stream: Tensor, mix: Mix) -> Tensor:
        """Streams [S, B, N, D] -> sublayer input [S, B, C]; accumulated in the weights' dtype, rounded once."""
        assert mix.read is not None
        x = mix.read.transpose(-1, -2) @ stream.to(mix.read.dtype)  # [S, B, R, D]
        return x.flatten(2).to(stream.dtype)

    def read_out_weights(self, stream: Tensor) -> Tensor | None:
        """``read_out`` as weights [N, R] of the streams, on their device; None: it is no such sum."""
        N = stream.shape[2]
        share = 1 / N if self.site.config.residual.residual_readout == "mean" else 1.0
        return torch.full((N, 1), share, dtype=promote(stream.dtype), device=stream.device)

    def read_out(self, stream: Tensor) -> Tensor:
        """Streams [S, B, N, D] -> hidden [S, B, C] before the final norm."""
        total = stream.to(promote(stream.dtype)).sum(2)
        if self.site.config.residual.residual_readout == "mean":
            total = total / stream.shape[2]
        return total.to(stream.dtype)


def is_listed(stream: Tensor) -> bool:
    """Whether this is code that a compiler joins by itself: on a GPU it calls the fused operation."""
    return torch.compiler.is_compiling() and stream.device.type == "cpu"


def norm_parts(module: nn.Module | None) -> NormParts | None:
    """A norm that the boundary can do itself."""
    parts = getattr(module, "parts", None)
    return None if parts is None else parts()


def flatten(carry: Carry) -> tuple[Tensor, ...]:
    """A settled carry as the tensors that cross a pipeline stage, in the order of ``boundary``."""
    assert carry.pending is None and carry.mix is None, "settle the carry first"
    ahead = () if carry.ahead is None else (carry.ahead,)
    return (carry.stream, *carry.history, *ahead, *carry.values)


def unflatten(tensors: Sequence[Tensor], specs: Sequence[TensorSpec]) -> Carry:
    """The inverse of ``flatten``; ``specs`` as given by ``boundary`` (attention values last)."""
    assert len(tensors) == len(specs), f"{len(tensors)} tensors for {len(specs)} specs"
    of_kind: dict[str, list[Tensor]] = {"stream": [], "history": [], "ahead": [], "values": []}
    for tensor, spec in zip(tensors, specs, strict=True):
        of_kind[spec.kind].append(tensor)
    (stream,) = of_kind["stream"]
    return Carry(
        stream=stream,
        values=tuple(of_kind["values"]),
        history=tuple(of_kind["history"]),
        ahead=of_kind["ahead"][0] if of_kind["ahead"] else None,
    )


def stream_dtype_of(spec: TensorSpec, activation: torch.dtype, fp32_stream: bool) -> torch.dtype:
    """The dtype a boundary tensor has in a model whose activations are ``activation``."""
    if spec.dtype == "coefficient" or (spec.dtype == "stream" and fp32_stream):
        return promote(activation)
    return activation
