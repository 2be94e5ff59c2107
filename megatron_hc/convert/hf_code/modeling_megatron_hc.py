"""A decoder whose residual path is a part that was chosen: every method in one file, for transformers.

Written by megatron_hc, and needs nothing of it. The file is meant to be read: a method is a class of some lines
(``RESIDUALS`` at the end of part 2 lists them), and the layer is the same for all of them:

    x, carry, mix = residual.read(carry, norm)          what the sublayer gets, and how its output will be written
    carry = residual.write(carry, sublayer(x), mix)

Dims: B batch, S tokens of this call, T keys (cached ones included), N streams, R reads of a sublayer, D width of a
stream, C hidden size, Q query heads, G key/value heads, H head width, E experts, k experts per token.

Mixing weights, norms, rotary tables, routers and softmax are computed in at least fp32.
"""

import itertools
import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from .configuration_megatron_hc import MegatronHCConfig

CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"

# ---- 1. Small things that all parts use ----


def wide(dtype: torch.dtype) -> torch.dtype:
    """At least fp32; float64 stays float64."""
    return torch.promote_types(dtype, torch.float32)


def rms_norm(x: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


def normed(x: Tensor, config, weight: Tensor | None, bias: Tensor | None = None) -> Tensor:
    """The model's kind of norm over the last dim, in at least fp32; the result has x's dtype."""
    y = x.to(wide(x.dtype))
    if config.norm == "LayerNorm":
        y = y - y.mean(-1, keepdim=True)
    y = rms_norm(y, config.norm_epsilon)
    if weight is not None:
        y = y * weight.to(y.dtype)
    return (y if bias is None else y + bias.to(y.dtype)).to(x.dtype)


def has_norm_bias(config) -> bool:
    return config.layernorm_bias if config.norm == "LayerNorm" else config.norm_bias


class Norm(nn.Module):
    def __init__(self, config, width: int):
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width)) if has_norm_bias(config) else None

    def forward(self, x: Tensor) -> Tensor:
        return normed(x, self.config, self.weight, self.bias)


class Scale(nn.Module):
    """x times a learned number per channel, or per ``repeats`` channels."""

    def __init__(self, width: int, repeats: int = 1):
        super().__init__()
        self.repeats = repeats
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.to(wide(x.dtype)).repeat_interleave(self.repeats)
        return (x.to(weight.dtype) * weight).to(x.dtype)


class Linear(nn.Module):
    """y = x W^T + b; x is cast to W's dtype."""

    def __init__(self, in_features: int, out_features: int, bias: bool):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.to(self.weight.dtype), self.weight, self.bias)


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(*shape))


# ---- 2. The residual path ----


class Carry(NamedTuple):
    """What one sublayer hands to the next."""

    stream: Tensor
    """[B, S, N, D]"""
    values: tuple = ()
    """Attention values of earlier layers, each [B, S, G, H]."""
    history: tuple = ()
    """Earlier states, each [B, S, 1, C], for methods that look back over depth."""
    ahead: Tensor | None = None
    """Read weights for the next sublayer (single-pass mHC), [B, S, N, 1]."""


class Mix(NamedTuple):
    """Token-wise weights of one sublayer."""

    read: Tensor | None
    """[B, S, N, R] streams -> sublayer input"""
    write: Tensor
    """[B, S, R, N] sublayer output -> streams"""
    keep: Tensor | None
    """[B, S, N, N], keep[old, new]; None: streams stay as they are"""


class Residual(nn.Module):
    """plain: x' = x + F(norm(x)); also the interface. ``kind``: entry, attention, mlp or final."""

    replaces_norm = False

    def __init__(self, config, kind: str, layer: int):
        super().__init__()
        self.config, self.kind, self.layer = config, kind, layer
        self.options = config.residual_options or {}
        self.index = 2 * layer + (kind == "mlp")  # sublayers before this one
        self.is_sublayer, self.is_final = kind in ("attention", "mlp"), kind == "final"
        self.width = config.hidden_size

    def open(self, hidden: Tensor) -> Carry:
        """Embedding [B, S, C] -> the first carry."""
        return Carry(self.stream_dtype(hidden).unsqueeze(2))

    def stream_dtype(self, hidden: Tensor) -> Tensor:
        return hidden.to(wide(hidden.dtype)) if self.config.fp32_residual else hidden

    def mixed(self, carry: Carry):
        """-> (the sublayer's input before its norm [B, S, C], or three of them, carry, weights of the write)."""
        return carry.stream.squeeze(2), carry, None

    def read(self, carry: Carry, norm=None, replaces_stream: bool = False, stream_scale=None):
        x, carry, mix = self.mixed(carry)
        if norm is not None:
            x = norm(x) if isinstance(x, Tensor) else tuple(norm(part) for part in x)
        if replaces_stream:  # post-norm
            carry = carry._replace(stream=x.unsqueeze(2))
        if stream_scale is not None:
            carry = carry._replace(stream=stream_scale(carry.stream))
        return x, carry, mix

    def fold(self, stream: Tensor, output: Tensor, mix: Mix | None) -> Tensor:
        """The stream with a sublayer's output [B, S, C] in it."""
        if self.config.stream_factor == 1:
            return output.unsqueeze(2) + stream
        # On a CPU torch.add would round the factor itself to bfloat16.
        dtype = torch.promote_types(output.dtype, stream.dtype)
        wide = torch.promote_types(dtype, torch.float32)
        return torch.add(output.unsqueeze(2).to(wide), stream.to(wide), alpha=self.config.stream_factor).to(dtype)

    def write(self, carry: Carry, output: Tensor, mix: Mix | None) -> Carry:
        return carry._replace(stream=self.fold(carry.stream, output, mix))


class LinearMix(Residual):
    """Hyper-connections and their relatives: input and new streams are linear in the streams, token by token."""

    @property
    def num_streams(self) -> int:
        return self.options["streams"]

    @property
    def stream_width(self) -> int:
        return self.width

    def open(self, hidden: Tensor) -> Carry:
        return Carry(self.stream_dtype(hidden).unsqueeze(2).expand(-1, -1, self.num_streams, -1))

    def weights(self, stream: Tensor) -> Mix:
        raise NotImplementedError

    def mixed(self, carry: Carry):
        if self.is_final:
            return self.read_out(carry.stream), carry, None
        mix = self.weights(carry.stream)
        return self.combine(carry.stream, mix.read), carry, mix

    def combine(self, stream: Tensor, read: Tensor) -> Tensor:
        return (read.transpose(-1, -2) @ stream.to(read.dtype)).flatten(2).to(stream.dtype)

    def fold(self, stream: Tensor, output: Tensor, mix: Mix | None) -> Tensor:
        parts = output.unflatten(-1, (-1, stream.shape[-1])).to(mix.write.dtype)  # [B, S, R, D]
        old = stream.to(mix.write.dtype)
        if mix.keep is not None:
            old = mix.keep.transpose(-1, -2) @ old
        return (mix.write.transpose(-1, -2) @ parts + old).to(stream.dtype)

    def read_out(self, stream: Tensor) -> Tensor:
        total = stream.to(wide(stream.dtype)).sum(2)
        return (total / stream.shape[2] if self.options["readout"] == "mean" else total).to(stream.dtype)


class HyperConnection(LinearMix):
    """Hyper-connections (arXiv 2409.19606): weights = static + scale * tanh(norm(stream) W)."""

    num_reads = 1

    def __init__(self, config, kind, layer):
        super().__init__(config, kind, layer)
        if not self.is_sublayer:
            return
        N, D, R = self.num_streams, self.stream_width, self.num_reads
        self.static_read, self.static_keep, self.static_write = parameter(N, R), parameter(N, N), parameter(N)
        self.is_dynamic = not self.options["static"]
        if self.is_dynamic:
            self.dynamic_weight = parameter(R + N + 1, D)  # rows: read, keep, write
            self.scale_alpha, self.scale_beta = parameter(1), parameter(1)
            self.norm_weight = parameter(D) if self.options["norm_weight"] else None

    def weights(self, stream: Tensor) -> Mix:
        dtype = wide(stream.dtype)
        read, keep, write = (p.to(dtype) for p in (self.static_read, self.static_keep, self.static_write))
        if self.is_dynamic:
            flat = normed(stream.to(dtype), self.config, self.norm_weight)
            dynamic = torch.tanh(F.linear(flat, self.dynamic_weight.to(dtype)))  # [B, S, N, R + N + 1]
            d_read, d_keep, d_write = dynamic.split((self.num_reads, self.num_streams, 1), dim=-1)
            alpha, beta = self.scale_alpha.to(dtype), self.scale_beta.to(dtype)
            read, keep, write = read + alpha * d_read, keep + alpha * d_keep, write + beta * d_write.squeeze(-1)
        return Mix(read, self.write_matrix(write), keep)

    def write_matrix(self, write: Tensor) -> Tensor:
        """One weight per stream [..., N] -> [..., R, N]."""
        return write.unsqueeze(-2)


class FracConnection(HyperConnection):
    """Frac-connections (arXiv 2503.14125): the hidden vector is cut into m fractions, which are mixed."""

    @property
    def num_reads(self) -> int:
        return self.num_streams

    @property
    def stream_width(self) -> int:
        return self.width // self.num_streams

    def open(self, hidden: Tensor) -> Carry:
        return Carry(self.stream_dtype(hidden).unflatten(-1, (self.num_streams, -1)))

    def write_matrix(self, write: Tensor) -> Tensor:
        return torch.diag_embed(write)

    def read_out(self, stream: Tensor) -> Tensor:
        return stream.flatten(2)


class ManifoldConnection(LinearMix):
    """mHC (arXiv 2512.24880): keep is doubly stochastic, by Sinkhorn's iterations; read and write are sigmoids.

    h = alpha * (vec(X) / rms(vec(X))) phi + b, cut into logits of read (n), of write (n) and of the stream matrix.
    """

    def __init__(self, config, kind, layer):
        super().__init__(config, kind, layer)
        if not self.is_sublayer:
            return
        n = self.num_streams
        self.sizes = (n, n, self.num_matrix_logits())
        self.bias = parameter(sum(self.sizes))
        self.is_dynamic = not self.options["static"]
        if self.is_dynamic:
            self.projection, self.alpha = parameter(sum(self.sizes), n * self.width), parameter(3)

    def num_matrix_logits(self) -> int:
        return self.num_streams**2

    def matrix(self, logits: Tensor) -> Tensor:
        """[B, S, M] -> [B, S, new, old]; Megatron-LM's form takes rows first."""
        first, second, floor = (-1, -2, 1e-6) if self.options["megatron"] else (-2, -1, 0.0)
        logits = logits.unflatten(-1, (self.num_streams, -1))
        matrix = (logits - logits.amax(first, keepdim=True)).clamp(min=0.9 * math.log(torch.finfo(logits.dtype).tiny))
        matrix = matrix.exp()
        for _ in range(self.options["iterations"]):
            matrix = matrix / matrix.sum(first, keepdim=True).clamp(min=floor)
            matrix = matrix / matrix.sum(second, keepdim=True).clamp(min=floor)
        return matrix

    def weights(self, stream: Tensor) -> Mix:
        flat = stream.flatten(2).to(wide(stream.dtype))
        h = self.bias.to(flat.dtype).expand(*flat.shape[:2], -1)
        if self.is_dynamic:
            alpha = self.alpha.to(flat.dtype).repeat_interleave(torch.tensor(self.sizes, device=flat.device))
            h = F.linear(flat, self.projection.to(flat.dtype)) * self.inverse_rms(flat) * alpha + h
        read, write, matrix = h.split(self.sizes, dim=-1)
        keep = self.matrix(matrix).transpose(-1, -2)
        return Mix(torch.sigmoid(read).unsqueeze(-1), 2 * torch.sigmoid(write).unsqueeze(-2), keep)

    def inverse_rms(self, flat: Tensor) -> Tensor:
        square = flat.square().mean(-1, keepdim=True)
        return (
            1 / (square.sqrt() + 1e-6)
            if self.options.get("megatron")
            else torch.rsqrt(square + self.config.norm_epsilon)
        )

    def open(self, hidden: Tensor) -> Carry:
        carry = super().open(hidden)
        if not self.options.get("single_pass"):
            return carry
        first = torch.eye(self.num_streams, 1, dtype=wide(hidden.dtype), device=hidden.device)
        return carry._replace(ahead=first.expand(*hidden.shape[:2], -1, -1))

    def mixed(self, carry: Carry):
        """Single-pass (DeepSeek-V4.1): a sublayer reads with the weights that the one before it computed."""
        if not self.options.get("single_pass"):
            return super().mixed(carry)
        x = self.combine(carry.stream, carry.ahead)
        if self.is_final:
            return x, carry, None
        mix = self.weights(carry.stream)
        return x, carry._replace(ahead=mix.read), mix


class PermutationConnection(ManifoldConnection):
    """mHC-lite (arXiv 2601.05732): keep is a mean of all permutations."""

    def num_matrix_logits(self) -> int:
        return math.factorial(self.num_streams)

    def matrix(self, logits: Tensor) -> Tensor:
        n = self.num_streams
        eye = torch.eye(n, dtype=logits.dtype, device=logits.device)
        table = torch.stack([eye[list(order)] for order in itertools.permutations(range(n))]).flatten(1)
        return (logits.softmax(-1) @ table).unflatten(-1, (n, n))


class KroneckerConnection(ManifoldConnection):
    """KromHC (arXiv 2601.21579): keep is a Kronecker product of 2 x 2 matrices [[a, b], [b, a]]."""

    def num_matrix_logits(self) -> int:
        return 2 * (self.num_streams.bit_length() - 1)

    def matrix(self, logits: Tensor) -> Tensor:
        pairs = logits.unflatten(-1, (-1, 2)).softmax(-1)
        factors = torch.stack((pairs, pairs.flip(-1)), dim=-2).unbind(2)  # each [B, S, 2, 2]
        product = factors[0]
        for factor in factors[1:]:
            product = torch.einsum("bsij,bskl->bsikjl", product, factor).flatten(4, 5).flatten(2, 3)
        return product


class GatedResidual(LinearMix):
    """Gated residual (arXiv 2608.30320): streams are read through an elementwise low-rank gate instead of a norm."""

    replaces_norm = True

    def __init__(self, config, kind, layer):
        super().__init__(config, kind, layer)
        if kind == "entry":
            return
        N, C, rank = self.num_streams, self.width, self.options["rank"]
        self.norm_weight = parameter(N, C)
        self.gate_down, self.gate_up = parameter(rank, N * C), parameter(N * C, rank)
        self.write_weight = parameter(N, N * C) if self.is_sublayer else None

    def mixed(self, carry: Carry):
        stream, N = carry.stream, self.num_streams
        dtype, up = stream.dtype, wide(stream.dtype)
        z = rms_norm(stream.to(up), self.config.norm_epsilon) * self.norm_weight.to(up)
        flat = z.flatten(2)
        hidden = F.linear(flat.to(dtype), self.gate_down.to(dtype)).to(up) / N
        gate = torch.sigmoid(F.linear(F.silu(hidden).to(dtype), self.gate_up.to(dtype)).to(up))
        x = (gate.unflatten(-1, (N, -1)) * z).mean(2).to(dtype)
        if self.write_weight is None:
            return x, carry, None
        write = 2 * torch.sigmoid(F.linear(flat, self.write_weight.to(up)) / N)
        return x, carry, Mix(None, write.unsqueeze(-2), None)


class VirtualWidth(LinearMix):
    """Virtual width networks (arXiv 2511.11238): n streams of width C / m, of which a sublayer reads m at a time."""

    def __init__(self, config, kind, layer):
        super().__init__(config, kind, layer)
        N, M, D, C = self.num_streams, self.options["fractions"], self.stream_width, self.width
        self.fractions = M
        projects = self.options["projections"]
        self.expand = parameter(N * D, C) if projects and kind == "entry" else None
        self.reduce = parameter(C, N * D) if projects and self.is_final else None
        has_groups = self.reduce is not None and N % M == 0
        self.group_weight = parameter(N * D) if has_groups else None
        self.group_bias = parameter(N * D) if has_groups else None
        if not self.is_sublayer:
            return
        self.static_read, self.static_keep, self.static_write = parameter(N, M), parameter(N, N), parameter(M, N)
        self.is_dynamic = not self.options["static"]
        if self.is_dynamic:
            self.dynamic_weight = parameter(M + N + M, D)
            self.scale_alpha, self.scale_beta = parameter(N, M + N), parameter(M, N)
            self.norm_weight = parameter(D) if self.options["norm_weight"] else None

    @property
    def stream_width(self) -> int:
        return self.width // self.options["fractions"]

    def open(self, hidden: Tensor) -> Carry:
        hidden, N = self.stream_dtype(hidden), self.num_streams
        if self.expand is not None:
            return Carry(F.linear(hidden, self.expand.to(hidden.dtype)).unflatten(-1, (N, -1)))
        copies = [hidden.unflatten(-1, (self.fractions, -1))] * -(-N // self.fractions)
        return Carry(torch.cat(copies, dim=2)[:, :, :N])

    def weights(self, stream: Tensor) -> Mix:
        N, M, dtype = self.num_streams, self.fractions, wide(stream.dtype)
        read, keep, write = (p.to(dtype) for p in (self.static_read, self.static_keep, self.static_write))
        if self.is_dynamic:
            flat = normed(stream.to(dtype), self.config, self.norm_weight)
            dynamic = torch.tanh(F.linear(flat, self.dynamic_weight.to(dtype)) / math.sqrt(self.stream_width))
            alpha, beta = dynamic.split((M + N, M), dim=-1)
            d_read, d_keep = (self.scale_alpha.to(dtype) * alpha).split((M, N), dim=-1)
            write = write + self.scale_beta.to(dtype) * beta.transpose(-1, -2)
            read, keep = read + d_read, keep + d_keep
        return Mix(read, write, keep)

    def read_out(self, stream: Tensor) -> Tensor:
        x, up = stream.flatten(2), wide(stream.dtype)
        if self.reduce is not None:
            if self.group_weight is not None:
                groups = x.to(up).unflatten(-1, (-1, self.width))
                groups = rms_norm(groups - groups.mean(-1, keepdim=True), self.config.norm_epsilon).flatten(2)
                x = (groups * self.group_weight.to(up) + self.group_bias.to(up)).to(x.dtype)
            return F.linear(x, self.reduce.to(x.dtype))
        copies = [stream.to(up)[:, :, i :: self.fractions] for i in range(self.fractions)]
        merged = [c.mean(2) if self.options["readout"] == "mean" else c.sum(2) for c in copies]
        return torch.cat(merged, dim=-1).to(stream.dtype)


def weighted_sum(weights: Tensor, states) -> Tensor:
    """weights [..., W, J] of J states [B, S, 1, C] -> [B, S, W, C]."""
    return (weights @ torch.cat([state.to(weights.dtype) for state in states], dim=2)).to(states[0].dtype)


class AttentionResidual(Residual):
    """Attention residuals (arXiv 2603.15031): softmax over the outputs so far, or over sums of blocks of them."""

    def __init__(self, config, kind, layer):
        super().__init__(config, kind, layer)
        self.starts_block = self.index % self.options["block_size"] == 0
        if self.index > 0:
            self.query, self.key_norm_weight = parameter(self.width), parameter(self.width)

    def mixed(self, carry: Carry):
        if self.index == 0:
            return super().mixed(carry)
        sources, up = (*carry.history, carry.stream), wide(carry.stream.dtype)
        keys = rms_norm(torch.cat(sources, dim=2).to(up), self.config.norm_epsilon)  # [B, S, J, C]
        weights = (keys @ (self.query.to(up) * self.key_norm_weight.to(up))).softmax(-1)
        return weighted_sum(weights.unsqueeze(2), sources).squeeze(2), carry, None

    def write(self, carry: Carry, output: Tensor, mix: Mix | None) -> Carry:
        if not self.starts_block:
            return super().write(carry, output, mix)
        new = self.stream_dtype(output).unsqueeze(2)
        return carry._replace(stream=new, history=(*carry.history, carry.stream))


class DenseHistory(Residual):
    """Outputs X_j of layers are kept, and combined at the entrance of later ones."""

    dilation = period = 1

    def __init__(self, config, kind, layer):
        super().__init__(config, kind, layer)
        self.is_entrance = kind in ("attention", "final")
        self.combines = self.is_entrance and layer > 0 and layer % self.period == 0
        self.num_sources = len(self.sources())

    def sources(self):
        return range(self.layer % self.dilation, self.layer + 1, self.dilation)

    def mixed(self, carry: Carry):
        if not self.is_entrance:
            return super().mixed(carry)
        states = (*carry.history, carry.stream)
        carry = carry._replace(history=states)
        if not self.combines:
            return carry.stream.squeeze(2), carry, None
        x, stream = self.combine([states[j] for j in self.sources()])
        return x, carry._replace(stream=stream), None


class DenseFormer(DenseHistory):
    """DenseFormer (arXiv 2402.02622): depth-weighted averages of layer outputs."""

    def __init__(self, config, kind, layer):
        self.dilation, self.period = config.residual_options["dilation"], config.residual_options["period"]
        super().__init__(config, kind, layer)
        self.alpha = parameter(self.num_sources) if self.combines else None

    def combine(self, states):
        stream = weighted_sum(self.alpha.to(wide(states[-1].dtype)).unsqueeze(0), states)
        return stream.squeeze(2), stream


class MuddFormer(DenseHistory):
    """MUDDFormer (arXiv 2502.12170): four dynamic sums over depth, for query, key, value and stream."""

    def __init__(self, config, kind, layer):
        super().__init__(config, kind, layer)
        self.replaces_norm = self.combines and not self.is_final
        if not self.combines:
            return
        J, C, ways = self.num_sources, self.width, 1 if self.is_final else 4
        self.ways, hidden = ways, ways * J * (4 if self.is_final else 1)
        self.w1, self.w2, self.static = parameter(hidden, C), parameter(ways * J, hidden), parameter(ways, J)
        for way in "qkv" if self.replaces_norm else "":
            self.register_parameter(f"{way}_norm_weight", parameter(C))
            self.register_parameter(f"{way}_norm_bias", parameter(C) if has_norm_bias(config) else None)

    def combine(self, states):
        up = wide(states[-1].dtype)
        hidden = F.gelu(F.linear(rms_norm(states[-1].squeeze(2).to(up), self.config.norm_epsilon), self.w1.to(up)))
        dynamic = F.linear(hidden, self.w2.to(up)).unflatten(-1, (self.ways, -1))
        mixed = weighted_sum(dynamic + self.static.to(up), states)  # [B, S, W, C]
        if self.is_final:
            return mixed.squeeze(2), mixed
        q, k, v, stream = mixed.unbind(2)
        inputs = []
        for way, x in (("q", q), ("k", k), ("v", v)):
            weight, bias = getattr(self, f"{way}_norm_weight"), getattr(self, f"{way}_norm_bias")
            inputs.append(normed(x, self.config, weight, bias))
        return tuple(inputs), stream.unsqueeze(2)


class ScaledWrite(Residual):
    """ReZero (arXiv 2003.04887): a number per sublayer; LayerScale (arXiv 2103.17239): one per channel."""

    def __init__(self, config, kind, layer):
        super().__init__(config, kind, layer)
        width = 1 if config.residual == "rezero" else self.width
        self.weight = parameter(width) if self.is_sublayer else None

    def write(self, carry: Carry, output: Tensor, mix: Mix | None) -> Carry:
        return super().write(carry, (output * self.weight.to(wide(output.dtype))).to(output.dtype), mix)


class Laurel(Residual):
    """LAuReL (arXiv 2411.07501): x' = a f(x) + b (x + low-rank maps of earlier states, or weights of them)."""

    def __init__(self, config, kind, layer):
        super().__init__(config, kind, layer)
        parts = self.options["form"].split("-")
        previous = self.options["previous"] if "pa" in parts else 1
        J, r, C = min(previous, self.index + 1), self.options["rank"], self.width
        self.num_states, self.num_kept = J, min(previous - 1, self.index + 1)
        if not self.is_sublayer:
            return
        self.weights = parameter(2) if "rw" in parts else None
        self.gammas = parameter(J) if "pa" in parts else None
        self.low = parameter(J, r, C) if "lr" in parts else None
        self.high = parameter(J, C, r) if "lr" in parts else None

    def mixed(self, carry: Carry):
        x = carry.stream
        if not self.is_sublayer:
            return x.squeeze(2), carry, None
        states, up = (*carry.history, x), wide(x.dtype)
        total = x.to(up)
        for j, state in enumerate(states[::-1][: self.num_states]):
            if self.low is not None:
                term = F.linear(F.linear(state, self.low[j].to(x.dtype)), self.high[j].to(x.dtype)).to(up)
            elif self.gammas is not None:
                term = state.to(up)
            else:
                break
            total = total + (term if self.gammas is None else self.gammas[j].to(up) * term)
        if self.weights is not None:
            total = total * self.weights.to(up).softmax(0)[1]
        history = states[len(states) - self.num_kept :]
        return x.squeeze(2), carry._replace(stream=total.to(x.dtype), history=history), None

    def write(self, carry: Carry, output: Tensor, mix: Mix | None) -> Carry:
        if self.weights is not None:
            output = (output * self.weights.to(wide(output.dtype)).softmax(0)[0]).to(output.dtype)
        return super().write(carry, output, mix)


class OrthogonalUpdate(Residual):
    """Orthogonal residual update (arXiv 2505.11881), feature-wise: the output's part orthogonal to the stream."""

    def fold(self, stream: Tensor, output: Tensor, mix: Mix | None) -> Tensor:
        x, f = stream.to(wide(stream.dtype)), output.unsqueeze(2).to(wide(output.dtype))
        share = (x * f).sum(-1, keepdim=True) / (x.square().sum(-1, keepdim=True) + 1e-6)
        return ((self.config.stream_factor - share) * x + f).to(stream.dtype)


class SparseAggregation(Residual):
    """Sparse aggregation (arXiv 1801.05895): sublayers read states at depth offsets 1, 2, 4, 8, ..."""

    def __init__(self, config, kind, layer):
        super().__init__(config, kind, layer)
        k = self.index
        self.sources = [k + 1 - 2**i for i in range((k + 1).bit_length())]
        self.weights = parameter(len(self.sources)) if k > 0 else None

    def mixed(self, carry: Carry):
        states, stream = (*carry.history, carry.stream), carry.stream
        if self.weights is not None:
            weights = self.weights.to(wide(stream.dtype)).unsqueeze(0)
            stream = weighted_sum(weights, [states[j] for j in self.sources])
        return stream.squeeze(2), carry._replace(stream=stream, history=states), None


class DeepDelta(Residual):
    """Deep delta learning (arXiv 2601.00417): along the output's direction the stream gets a learned value."""

    def __init__(self, config, kind, layer):
        super().__init__(config, kind, layer)
        if self.is_sublayer:
            self.projection, self.bias = parameter(2, self.width), parameter(2)

    def mixed(self, carry: Carry):
        x, carry, _ = super().mixed(carry)
        if not self.is_sublayer:
            return x, carry, None
        up = wide(carry.stream.dtype)
        z = rms_norm(carry.stream.to(up), self.config.norm_epsilon)
        gate, target = F.linear(z, self.projection.to(up), self.bias.to(up)).split(1, -1)
        return x, carry, Mix(None, torch.cat((2 * torch.sigmoid(gate), target), -1), None)

    def fold(self, stream: Tensor, output: Tensor, mix: Mix | None) -> Tensor:
        gate, target = mix.write.split(1, -1)
        x, f = stream.to(gate.dtype), output.unsqueeze(2).to(gate.dtype)
        k = f * torch.rsqrt(f.square().sum(-1, keepdim=True) + 1e-12)
        return (x + gate * (target - (k * x).sum(-1, keepdim=True)) * k).to(stream.dtype)


RESIDUALS = {
    "plain": Residual,
    "hyper": HyperConnection,
    "frac": FracConnection,
    "mhc": ManifoldConnection,
    "mhc-lite": PermutationConnection,
    "kromhc": KroneckerConnection,
    "gated": GatedResidual,
    "virtual-width": VirtualWidth,
    "attention": AttentionResidual,
    "denseformer": DenseFormer,
    "muddformer": MuddFormer,
    "rezero": ScaledWrite,
    "layerscale": ScaledWrite,
    "laurel": Laurel,
    "orthogonal": OrthogonalUpdate,
    "sparse-aggregation": SparseAggregation,
    "deep-delta": DeepDelta,
}

# ---- 3. Where norms stand ----


class Placement(NamedTuple):
    """Norms of a layer: at the reads (None; "keeps" the stream; "replaces" it), of outputs, in the MLP, of heads."""

    attention_read: str | None = "keeps"
    mlp_read: str | None = "keeps"
    attention_output: bool = False
    mlp_output: bool = False
    mlp_inner: bool = False
    heads: str | None = None  # "qkv": q, k and v per head; "cosine": unit vectors and a learned scale
    scales_heads: bool = False


PRE, HYBRID = Placement(), Placement(None, "replaces", heads="qkv")
REORDERED = Placement(None, None, attention_output=True, mlp_output=True)
PLACEMENTS = {  # name -> (first layer, all others)
    "pre": (PRE, PRE),
    "post": (Placement(None, "replaces"), Placement("replaces", "replaces")),
    "deepnorm": (Placement(None, "replaces"), Placement("replaces", "replaces")),
    "hybrid": (HYBRID, HYBRID),
    "hybrid-star": (PRE._replace(heads="qkv"), HYBRID),
    "reordered": (REORDERED, REORDERED),
    "peri": (Placement(attention_output=True, mlp_output=True),) * 2,
    "normformer": (Placement(attention_output=True, mlp_inner=True, scales_heads=True),) * 2,
    "res-post-cosine": (REORDERED._replace(heads="cosine"),) * 2,
    "none": (Placement(None, None),) * 2,
}

# ---- 4. Attention ----


class NormAcrossHeads(nn.Module):
    def __init__(self, config, num_heads: int):
        super().__init__()
        self.across_heads = Norm(config, num_heads * config.head_dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.across_heads(x.flatten(-2)).unflatten(-1, x.shape[-2:])


class UnitVectors(nn.Module):
    """x / |x| per head, times exp(log_scale), at most 100 (Swin v2)."""

    def __init__(self, num_heads: int | None = None):
        super().__init__()
        self.log_scale = None if num_heads is None else parameter(num_heads)

    def forward(self, x: Tensor) -> Tensor:
        unit = F.normalize(x.to(wide(x.dtype)), dim=-1)
        if self.log_scale is not None:
            unit = unit * self.log_scale.to(unit.dtype).clamp(max=math.log(100)).exp().unsqueeze(-1)
        return unit.to(x.dtype)


def rope_tables(position_ids: Tensor, config, dtype: torch.dtype):
    """Positions [B, S] -> cos and sin, [B, S, 1, rotated channels], in at least fp32 (arXiv 2104.09864)."""
    up = wide(dtype)
    rotated = int(config.head_dim * config.rotary_percent)
    steps = torch.arange(0, rotated, 2, dtype=up, device=position_ids.device) / rotated
    frequencies = 1.0 / (config.rope_base**steps)
    if config.rope_scaling_factor is not None:  # Llama 3
        low, high, original = 1.0, 4.0, 8192
        wavelengths = 2 * math.pi / frequencies
        smooth = ((original / wavelengths - low) / (high - low)).clamp(0, 1)
        frequencies = (1 - smooth) * frequencies / config.rope_scaling_factor + smooth * frequencies
    angles = position_ids.to(up)[..., None, None] * frequencies
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    turning, rest = x[..., : cos.shape[-1]].to(cos.dtype), x[..., cos.shape[-1] :]
    first, second = turning.chunk(2, dim=-1)
    turned = turning * cos + torch.cat((-second, first), dim=-1) * sin
    return torch.cat((turned.to(x.dtype), rest), dim=-1)


class ValueResidual(nn.Module):
    """Attention of later layers mixes in the values V_1 of the first one (arXiv 2410.17897).

    constant: a V_1 + b V_n; learnable: a and b are learned; dense: all earlier values, learned weights; neutreno: the
    output of attention += c (V_1 - V_n); per-token: a gate between V_1 and V_n; single: V_1 instead of V_n.
    """

    def __init__(self, config, layer: int):
        super().__init__()
        self.kind = config.value_residual
        self.mixes = self.kind != "none" and layer >= config.value_first_layer
        self.records = layer == 0 and self.kind != "none" or self.kind == "dense"
        self.constants = config.value_weights
        learned = {"learnable": 2, "dense": layer + 1}.get(self.kind, 0) if self.mixes else 0
        self.weights = parameter(learned) if learned else None

    def mix(self, own: Tensor, earlier: tuple, gate: Tensor | None) -> Tensor:
        if not self.mixes or self.kind in ("neutreno", "single"):
            return own
        up = wide(own.dtype)
        if self.kind == "per-token":
            return torch.lerp(earlier[0].to(up), own.to(up), torch.sigmoid(gate.to(up))).to(own.dtype)
        values = (*earlier, own) if self.kind == "dense" else (earlier[0], own)
        weights = self.constants if self.weights is None else self.weights.to(up)
        return sum(w * v.to(up) for w, v in zip(weights, values, strict=True)).to(own.dtype)

    def correct(self, output: Tensor, own: Tensor, earlier: tuple) -> Tensor:
        """output [B, S, Q * H]"""
        if self.kind != "neutreno" or not self.mixes:
            return output
        up = wide(own.dtype)
        step = self.constants[0] * (earlier[0].to(up) - own.to(up))  # [B, S, G, H]
        heads = output.to(up).unflatten(-1, (own.shape[2], -1, own.shape[3]))
        return (heads + step.unsqueeze(3)).flatten(2).to(output.dtype)


class Attention(nn.Module):
    """The rows of linear_qkv are, per key/value head: its query heads, its key, its value and what else there is."""

    def __init__(self, config, layer: int, placement: Placement):
        super().__init__()
        self.config, self.layer = config, layer
        Q, G, H = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.value_residual = ValueResidual(config, layer)
        mixes, kind = self.value_residual.mixes, config.value_residual
        self.has_values = not (kind == "single" and mixes)
        sizes = {"q": Q // G * H, "k": H} | ({"v": H} if self.has_values else {})
        self.sizes = sizes | ({"gate": 1} if kind == "per-token" and mixes else {})
        self.linear_qkv = Linear(
            config.hidden_size, G * sum(self.sizes.values()), config.linear_bias or config.qkv_bias
        )
        self.linear_proj = Linear(Q * H, config.hidden_size, config.linear_bias)
        nothing = nn.Identity()
        self.q_layernorm = self.k_layernorm = self.v_layernorm = nothing
        if placement.heads == "cosine":
            self.q_layernorm, self.k_layernorm = UnitVectors(Q), UnitVectors()
        elif placement.heads == "qkv" or config.qk_norm == "per-head":
            self.q_layernorm, self.k_layernorm = Norm(config, H), Norm(config, H)
            if placement.heads == "qkv" and self.has_values:
                self.v_layernorm = Norm(config, H)
        elif config.qk_norm == "across-heads":
            self.q_layernorm, self.k_layernorm = NormAcrossHeads(config, Q), NormAcrossHeads(config, G)
        self.scale = 1.0 if placement.heads == "cosine" else H**-0.5
        self.head_scale = Scale(Q, H) if placement.scales_heads else nothing
        self.output_norm = Norm(config, config.hidden_size) if placement.attention_output else nothing

    def project(self, x) -> dict:
        """x [B, S, C], or one for each of q, k and v -> the parts, [B, S, heads, width]."""
        G, sizes = self.config.num_key_value_heads, self.sizes
        if isinstance(x, Tensor):
            pieces = self.linear_qkv(x).unflatten(-1, (G, -1)).split(list(sizes.values()), dim=-1)
        else:
            by_part = dict(zip("qkv", x, strict=True)) | {"gate": x[2]}
            whole = {id(part): self.linear_qkv(part).unflatten(-1, (G, -1)) for part in x}
            pieces = [whole[id(by_part[name])].split(list(sizes.values()), dim=-1)[i] for i, name in enumerate(sizes)]
        heads = {"gate": 1}
        return {
            name: piece.unflatten(-1, (-1, heads.get(name, self.config.head_dim))).flatten(2, 3)
            for name, piece in zip(sizes, pieces, strict=True)
        }

    def forward(self, x, rope, mask: Tensor | None, values: tuple, cache):
        """-> (output [B, S, C], the values that later layers see or None)"""
        parts = self.project(x)
        q, k = self.q_layernorm(parts["q"]), self.k_layernorm(parts["k"])
        own = self.v_layernorm(parts["v"]) if self.has_values else None
        if rope is not None:
            q, k = rotate(q, *rope), rotate(k, *rope)
        # Without values of its own a layer caches none; V_1 of the whole text comes from the first layer's cache.
        v = k[..., :0] if own is None else self.value_residual.mix(own, values, parts.get("gate"))
        if cache is not None:
            # A static cache gives back all that it has room for.
            T = int(cache.get_seq_length(self.layer)) + k.shape[1]
            k, v = (t.transpose(1, 2)[:, :T] for t in cache.update(k.transpose(1, 2), v.transpose(1, 2), self.layer))
        if own is None:
            v = values[0]
        q, k, v_used = (t.transpose(1, 2) for t in (q, k, v))
        repeats = q.shape[1] // k.shape[1]
        k, v_used = k.repeat_interleave(repeats, dim=1), v_used.repeat_interleave(repeats, dim=1)
        is_causal = mask is None and q.shape[2] > 1
        y = F.scaled_dot_product_attention(q, k, v_used, attn_mask=mask, is_causal=is_causal, scale=self.scale)
        y = y.transpose(1, 2).flatten(2)
        if own is not None:
            y = self.value_residual.correct(y, own, values)
        y = self.output_norm(self.linear_proj(self.head_scale(y)))
        if not self.value_residual.records:
            return y, None
        return y, v if self.config.value_residual == "single" else own


# ---- 5. MLP and experts ----


def activated(h: Tensor, kind: str) -> Tensor:
    """With SwiGLU the columns of h alternate gate, up."""
    if kind == "swiglu":
        gate, up = h.unflatten(-1, (-1, 2)).unbind(-1)
        return F.silu(gate) * up
    if kind == "squared_relu":
        return F.relu(h).square()
    return F.gelu(h, approximate="tanh" if kind == "gelu_tanh" else "none")


class MLP(nn.Module):
    def __init__(self, config, width: int, has_inner_norm: bool = False, has_output_norm: bool = False):
        super().__init__()
        self.activation = config.activation
        rows = 2 * width if config.activation == "swiglu" else width
        self.linear_fc1 = Linear(config.hidden_size, rows, config.linear_bias)
        self.inner_norm = Norm(config, width) if has_inner_norm else nn.Identity()
        self.linear_fc2 = Linear(width, config.hidden_size, config.linear_bias)
        self.output_norm = Norm(config, config.hidden_size) if has_output_norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.output_norm(self.linear_fc2(self.inner_norm(activated(self.linear_fc1(x), self.activation))))


class Router(nn.Module):
    """x [T, C] -> the chosen experts and their weights, [T, k] each."""

    def __init__(self, config):
        super().__init__()
        self.topk, self.options = config.experts_per_token, config.router_options
        self.weight = parameter(config.num_experts, config.hidden_size)
        has_bias = self.options["expert_bias"]
        self.register_buffer("expert_bias", torch.zeros(config.num_experts) if has_bias else None)

    def forward(self, x: Tensor):
        options, k = self.options, self.topk
        dtype = torch.promote_types(wide(x.dtype), torch.float64 if options["fp64"] else torch.float32)
        logits = F.linear(x.to(dtype), self.weight.to(dtype))
        if options["sinkhorn"]:
            experts = self.top(logits)
            return experts, (logits.sigmoid() if k == 1 else logits.softmax(-1)).gather(1, experts)
        is_sigmoid = options["score_function"] == "sigmoid"
        scores = logits.sigmoid() if is_sigmoid else logits.softmax(-1) if options["pre_softmax"] else logits
        biased = scores if self.expert_bias is None else scores + self.expert_bias.to(dtype)
        if options["num_groups"] is not None:
            biased = self.only_best_groups(biased)
        experts = self.top(biased)
        weights = scores.gather(1, experts)
        if is_sigmoid and k > 1:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        elif not is_sigmoid and not options["pre_softmax"]:
            weights = weights.softmax(-1)
        return experts, weights * options["scaling_factor"]

    def top(self, scores: Tensor) -> Tensor:
        """Of equal scores the lower index."""
        return scores.sort(dim=-1, descending=True, stable=True).indices[:, : self.topk]

    def only_best_groups(self, scores: Tensor) -> Tensor:
        groups, chosen = self.options["num_groups"], self.options["group_topk"]
        grouped = scores.unflatten(1, (groups, -1))
        sums = grouped.topk(self.topk // chosen, dim=-1).values.sum(-1)
        best = sums.sort(dim=-1, descending=True, stable=True).indices[:, :chosen]
        is_best = torch.zeros_like(sums, dtype=torch.bool).scatter_(1, best, True)
        return grouped.masked_fill(~is_best.unsqueeze(-1), float("-inf")).flatten(1)


class Experts(nn.Module):
    """linear_fc1 [E * rows, C] and linear_fc2 [E * width, C], the experts' matrices below each other."""

    def __init__(self, config):
        super().__init__()
        E, C, width = config.num_experts, config.hidden_size, config.expert_size
        self.num_experts, self.activation = E, config.activation
        rows = 2 * width if config.activation == "swiglu" else width
        self.linear_fc1, self.linear_fc2 = nn.Module(), nn.Module()
        self.linear_fc1.weight, self.linear_fc2.weight = parameter(E * rows, C), parameter(E * width, C)
        self.linear_fc1.bias = parameter(E * rows) if config.linear_bias else None
        self.linear_fc2.bias = parameter(E, C) if config.linear_bias else None

    def forward(self, x: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
        E = self.num_experts
        fc1, fc2 = (m.weight.unflatten(0, (E, -1)) for m in (self.linear_fc1, self.linear_fc2))
        x = x.to(fc1.dtype)
        total = torch.zeros(x.shape, dtype=wide(x.dtype), device=x.device)
        for e in range(E):
            tokens, place = (experts == e).nonzero(as_tuple=True)
            weight = weights[tokens, place].unsqueeze(-1)
            bias = None if self.linear_fc1.bias is None else self.linear_fc1.bias.view(E, -1)[e]
            h = (activated(F.linear(x[tokens], fc1[e], bias), self.activation) * weight).to(x.dtype)
            y = h @ fc2[e]
            if self.linear_fc2.bias is not None:
                y = y + (self.linear_fc2.bias[e] * weight).to(y.dtype)
            total.index_add_(0, tokens, y.to(total.dtype))
        return total.to(x.dtype)


class SharedExpert(MLP):
    """An MLP that every token goes through, times sigmoid(gate x) where there is a gate."""

    def __init__(self, config):
        super().__init__(config, config.shared_expert_size)
        self.gate = Linear(config.hidden_size, 1, bias=False) if config.shared_expert_gate else None

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y if self.gate is None else y * self.gate(x).sigmoid().to(y.dtype)


class MoE(nn.Module):
    def __init__(self, config, has_output_norm: bool):
        super().__init__()
        self.router, self.experts = Router(config), Experts(config)
        self.shared_experts = SharedExpert(config) if config.shared_expert_size else None
        self.output_norm = Norm(config, config.hidden_size) if has_output_norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(0, 1)
        y = self.experts(flat, *self.router(flat)).view_as(x)
        if self.shared_experts is not None:
            y = y + self.shared_experts(x)
        return self.output_norm(y)


# ---- 6. The model ----


class Layer(nn.Module):
    def __init__(self, config, layer: int):
        super().__init__()
        first, others = PLACEMENTS[config.norm_placement]
        place = first if layer == 0 else others
        method, C = RESIDUALS[config.residual], config.hidden_size
        self.placement, self.branch_scale = place, config.branch_scale
        self.attention_residual = method(config, "attention", layer)
        self.mlp_residual = method(config, "mlp", layer)
        self.attention_norm = self.mlp_norm = None
        if place.attention_read is not None and not self.attention_residual.replaces_norm:
            self.attention_norm = Norm(config, C)
        if place.mlp_read is not None and not self.mlp_residual.replaces_norm:
            self.mlp_norm = Norm(config, C)
        self.mlp_stream_scale = Scale(C) if config.normformer_residual_scale else None
        self.attention = Attention(config, layer, place)
        if config.num_experts is not None and config.expert_layers[layer]:
            self.mlp = MoE(config, place.mlp_output)
        else:
            self.mlp = MLP(config, config.intermediate_size, place.mlp_inner, place.mlp_output)

    def forward(self, carry: Carry, rope, mask: Tensor | None, cache) -> Carry:
        place = self.placement
        x, carry, mix = self.attention_residual.read(carry, self.attention_norm, place.attention_read == "replaces")
        y, value = self.attention(x, rope, mask, carry.values, cache)
        if value is not None:
            carry = carry._replace(values=(*carry.values, value))
        carry = self.attention_residual.write(carry, self.scaled(y), mix)
        x, carry, mix = self.mlp_residual.read(
            carry, self.mlp_norm, place.mlp_read == "replaces", self.mlp_stream_scale
        )
        return self.mlp_residual.write(carry, self.scaled(self.mlp(x)), mix)

    def scaled(self, output: Tensor) -> Tensor:
        return output if self.branch_scale == 1.0 else output * self.branch_scale


class MegatronHCPreTrainedModel(PreTrainedModel):
    config_class = MegatronHCConfig
    base_model_prefix = "model"
    _no_split_modules = ["Layer"]
    _supports_sdpa = True
    _skip_keys_device_placement = ["past_key_values"]
    # What is computed in fp32 has fp32 parameters, in a bf16 model too.
    _keep_in_fp32_modules_strict = [
        "entry_residual", "attention_residual", "mlp_residual", "final_residual", "value_residual", "attention_norm",
        "mlp_norm", "final_norm", "output_norm", "inner_norm", "q_layernorm", "k_layernorm", "v_layernorm",
        "head_scale", "mlp_stream_scale", "embedding_norm", "router",
    ]  # fmt: skip

    def _init_weights(self, module):
        """Methods have no initial values here: what no file brings is NaN, and shows, instead of what memory held."""
        super()._init_weights(module)
        if not isinstance(module, (nn.Embedding, nn.Linear, Norm, Scale)):
            for own in module.parameters(recurse=False):
                nn.init.constant_(own, math.nan)


class MegatronHCModel(MegatronHCPreTrainedModel):
    """tokens -> embedding -> open -> layers -> final read -> norm -> hidden states [B, S, C]"""

    def __init__(self, config):
        super().__init__(config)
        C, method = config.hidden_size, RESIDUALS[config.residual]
        self.embedding = nn.Embedding(config.vocab_size, C)
        learned = config.position_embedding == "learned"
        self.position_embedding = nn.Embedding(config.max_position_embeddings, C) if learned else None
        self.embedding_norm = Norm(config, C) if config.norm_placement == "peri" else nn.Identity()
        self.entry_residual = method(config, "entry", 0)
        self.layers = nn.ModuleList([Layer(config, layer) for layer in range(config.num_hidden_layers)])
        self.final_residual = method(config, "final", config.num_hidden_layers)
        self.final_norm = None if self.final_residual.replaces_norm else Norm(config, C)
        self.post_init()

    def get_input_embeddings(self):
        return self.embedding

    def set_input_embeddings(self, value):
        self.embedding = value

    def forward(
        self, input_ids=None, attention_mask=None, position_ids=None, past_key_values=None, inputs_embeds=None
    ) -> Tensor:
        hidden = self.embedding(input_ids) if inputs_embeds is None else inputs_embeds
        S, past = hidden.shape[1], 0 if past_key_values is None else int(past_key_values.get_seq_length())
        if position_ids is None:
            position_ids = torch.arange(past, past + S, device=hidden.device).unsqueeze(0)
            if attention_mask is not None and attention_mask.dim() == 2:  # padding on the left does not count
                position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -S:]
        if self.position_embedding is not None:
            hidden = hidden + self.position_embedding(position_ids)
        is_rotary = self.config.position_embedding == "rope"
        rope = rope_tables(position_ids, self.config, hidden.dtype) if is_rotary else None
        mask = attention_mask_of(attention_mask, S, past, hidden.device)
        carry = self.entry_residual.open(self.embedding_norm(hidden))
        for layer in self.layers:
            carry = layer(carry, rope, mask, past_key_values)
        return self.final_residual.read(carry, self.final_norm)[0]


def attention_mask_of(given: Tensor | None, S: int, past: int, device) -> Tensor | None:
    """[B, T] with 0 at padding -> [B or 1, 1, S, T], true where a query sees a key; None: causal is enough.

    ``given`` may be [B, 1, S, T or more] of its own: booleans, or what is added to the scores (0 where seen, else a
    large negative number).
    """
    is_full = given is None or (given.dim() == 2 and bool(given.all()))
    if is_full and (past == 0 or S == 1):
        return None
    T = past + S
    causal = torch.ones(S, T, dtype=torch.bool, device=device).tril(past)
    if is_full:
        return causal[None, None]
    # Padding sees itself: a row without any key would be NaN.
    own = torch.eye(S, T, dtype=torch.bool, device=device).roll(past, 1)
    if given.dim() == 4:
        if given.dtype != torch.bool and (not given.is_floating_point() or bool((given > 0).any())):
            raise ValueError(
                "attention_mask of 4 dims must be booleans, or what is added to the scores (0 where a token is seen), "
                "not 1 and 0: give it .bool()"
            )
        return (given if given.dtype == torch.bool else given == 0)[..., :T] | own
    return (causal & given[:, None, None, :T].bool()) | own


class MegatronHCForCausalLM(MegatronHCPreTrainedModel, GenerationMixin):
    # transformers 4 wants a list.
    _tied_weights_keys: Any = {"lm_head.weight": "model.embedding.weight"}
    if int(transformers.__version__.split(".")[0]) < 5:
        _tied_weights_keys = ["lm_head.weight"]

    def __init__(self, config):
        super().__init__(config)
        self.model = MegatronHCModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.model.embedding

    def set_input_embeddings(self, value):
        self.model.embedding = value

    def get_output_embeddings(self):
        return self.lm_head

    def set_output_embeddings(self, value):
        self.lm_head = value

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        inputs_embeds=None,
        labels=None,
        use_cache=None,
        logits_to_keep=0,
        cache=None,  # what newer versions call past_key_values
        num_items_in_batch=None,  # Trainer: labels of all micro-batches of a step, whose losses it adds up
        **kwargs,
    ):
        for name in ("output_attentions", "output_hidden_states"):
            if kwargs.get(name):
                raise ValueError(f"{name} is not offered by this model: leave it out")
        past_key_values = cache if past_key_values is None else past_key_values
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if use_cache and past_key_values is None and not self.training:
            past_key_values = DynamicCache()
        hidden = self.model(input_ids, attention_mask, position_ids, past_key_values, inputs_embeds)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        hidden = hidden[:, kept]
        weight = self.lm_head.weight
        logits = F.linear(hidden.to(weight.dtype), weight).to(wide(weight.dtype))
        loss = None
        if labels is not None:
            how = "mean" if num_items_in_batch is None else "sum"
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction=how)
            if num_items_in_batch is not None:
                loss = loss / torch.as_tensor(num_items_in_batch, device=loss.device)
        output = CausalLMOutputWithPast(loss=loss, logits=logits, **{CACHE: past_key_values})
        return output.to_tuple() if kwargs.get("return_dict") is False else output
