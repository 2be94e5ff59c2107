"""Causal self-attention with grouped queries.

Dims: S sequence, T keys (cached ones included), B batch, C hidden size, Q query heads, G key/value heads, H head width.
"""

from __future__ import annotations

import math
import warnings
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from megatron_hc.config import ModelConfig
from megatron_hc.kernels.compiled import turned
from megatron_hc.kernels.norm import promote
from megatron_hc.model.cache import LayerCache, Span
from megatron_hc.model.dropout import apart, hidden_dropout
from megatron_hc.model.linear import Linear, Parts, build_linear
from megatron_hc.model.placement import head_norms, head_scale, output_norm, placement_of
from megatron_hc.model.rope import RopeTable, apply_rope
from megatron_hc.residual import Reads, build_value_residual


class Context(NamedTuple):
    """What every layer of a forward pass shares."""

    rope: RopeTable | None = None
    mask: Tensor | None = None
    """[B or 1, 1, S, T], true where a query sees a key; None: causal."""
    span: Span | None = None
    """While generating: where the tokens lie in the caches."""
    cache: LayerCache | None = None
    """This layer's cache while generating."""
    branch_factors: Tensor | None = None
    """[2 L, B] see ``branch.branch_factors``; None: nothing is left out."""
    linearity_weights: Tensor | None = None
    """[S, B] weights of the tokens' terms of --linearity-regularization; None: there are none."""


class Exchange(Protocol):
    """Turns tokens of all heads into all tokens of some heads, and back: ``parallel/context.py``."""

    def heads(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]: ...

    def tokens(self, y: Tensor) -> Tensor: ...


class CoreAttention(nn.Module):
    """softmax(q k^T / sqrt(H) + mask) v. A module of its own, so that recompute can name it.

    ``has_scaled_queries``: the queries come with their scale, nothing is divided by sqrt(H).
    """

    def __init__(self, config: ModelConfig, has_scaled_queries: bool) -> None:
        super().__init__()
        self.divisor = 1.0 if has_scaled_queries else math.sqrt(config.head_size)
        self.dropout = config.attention_dropout
        self.softmax_in_fp32 = config.attention_softmax_in_fp32
        self.backend = config.attention_backend

    def arranged(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """[S, B, heads, H] each, as the device reads it fastest: on a CPU the rows of a head side by side in memory.

        It also lets go of the merged product, which a view of it would keep for the backward pass.
        """
        return tuple(heads_apart(x) for x in tensors) if tensors[0].device.type == "cpu" else tensors

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """q [S, B, Q, H], k and v [T, B, G, H] -> [S, B, Q * H]."""
        heads_first = (1, 2, 0, 3)
        q, k, v = q.permute(heads_first), k.permute(heads_first), v.permute(heads_first)  # [B, heads, S or T, H]
        dropout = self.dropout if self.training else 0.0
        # One query sees every key, so that decoding needs neither a mask nor the causal rule.
        is_causal = mask is None and q.shape[2] > 1
        if self.softmax_in_fp32:
            y = _explicit_attention(q, k, v, mask, is_causal, dropout, self.divisor)
        else:
            heads = q.shape[1]
            if q.shape[2] == 1:  # a group's queries in the place of the sequence: keys need not be repeated for them
                q = q.reshape(q.shape[0], k.shape[1], -1, q.shape[3])
            with chosen_kernels(self.backend, q.device):
                y = F.scaled_dot_product_attention(
                    *(q, k, v),
                    attn_mask=mask,
                    dropout_p=dropout,
                    is_causal=is_causal,
                    scale=1 / self.divisor,
                    enable_gqa=q.shape[1] != k.shape[1],
                ).reshape(q.shape[0], heads, -1, q.shape[3])
        return y.permute(2, 0, 1, 3).flatten(2)


def heads_apart(x: Tensor) -> Tensor:
    """[S, B, heads, H], in memory [B, heads, S, H]."""
    return x.permute(1, 2, 0, 3).contiguous().permute(2, 0, 1, 3)


KERNELS = {
    "flash": [SDPBackend.FLASH_ATTENTION],
    "fused": [SDPBackend.CUDNN_ATTENTION],
    "unfused": [SDPBackend.MATH],
    "hopper": [
        SDPBackend.CUDNN_ATTENTION,
        SDPBackend.FLASH_ATTENTION,
        SDPBackend.EFFICIENT_ATTENTION,
        SDPBackend.MATH,
    ],
}
"""What torch may take, the best first. On Hopper torch's own order has FlashAttention 2 before cuDNN."""


def chosen_kernels(backend: str, device: torch.device) -> AbstractContextManager[object]:
    """Attention inside runs on ``--attention-backend``; one that cannot do it (masks, head widths) is torch's error."""
    if backend == "auto" and device.type == "cuda" and is_hopper(device):
        backend = "hopper"
    return nullcontext() if backend == "auto" else sdpa_kernel(KERNELS[backend], set_priority=True)


def check_attention(config: ModelConfig, dtype: torch.dtype, has_mask: bool, device: torch.device) -> None:
    """Try --attention-backend on a few tokens: ``ValueError`` where it cannot do what the run needs.

    ``has_mask``: documents do not see each other. The random generators are left as they are.
    """
    S = min(config.seq_length, 128)
    tokens = torch.ones(S, 1, config.num_attention_heads, config.head_size, dtype=dtype, device=device)
    mask = torch.ones(1, 1, S, S, dtype=torch.bool, device=device).tril() if has_mask else None
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's reasons, kernel by kernel
            q = tokens.requires_grad_()
            k = tokens[:, :, : config.num_kv_heads]
            CoreAttention(config, has_scaled_queries=False)(q, k, k, mask).sum().backward()
    except RuntimeError as error:
        needs = [f"heads of {config.head_size} channels in {str(dtype).removeprefix('torch.')}"]
        needs += [f"--attention-dropout {config.attention_dropout:g}"] * (config.attention_dropout > 0)
        needs += ["--reset-attention-mask"] * has_mask
        raise ValueError(
            f"--attention-backend {config.attention_backend} has no kernel on {device.type} for {', '.join(needs)}: "
            "use auto"
        ) from error


@torch.compiler.assume_constant_result  # a compiler would end its graph at the question
def is_hopper(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device)[0] == 9


def _explicit_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool, dropout: float, divisor: float
) -> Tensor:
    """Attention with scores and softmax held in at least fp32 (--attention-softmax-in-fp32). [B, heads, S, H]."""
    wide = promote(q.dtype)
    repeats = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(repeats, dim=1), v.repeat_interleave(repeats, dim=1)
    scores = (q.to(wide) @ k.to(wide).transpose(-1, -2)) / divisor
    if is_causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    weights = F.dropout(scores.softmax(-1), dropout) if dropout else scores.softmax(-1)
    return weights.to(v.dtype) @ v


class Attention(nn.Module):
    """linear_qkv -> norms per head -> rotary -> value residual -> attention -> linear_proj -> (norm) -> dropout.

    The norms are there by ``--norm-placement`` and ``--qk-layernorm``. The QKV weight is stored per key/value head as
    [its q heads, k, v and what the value residual adds], so that tensor parallelism cuts dim 0.
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        placement = placement_of(config, layer)
        self.head_size = config.head_size
        self.linear_qkv: Linear = build_linear("qkv", config, layer)
        self.has_values = "v" in dict(self.qkv_parts.sizes)
        self.q_layernorm, self.k_layernorm, norm_of_values = head_norms(config, placement)
        self.v_layernorm = norm_of_values if self.has_values else nn.Identity()
        self.value_residual = build_value_residual(config, layer)
        self.part: int | None = None
        """Whose masks dropout of attention weights draws, see ``dropout.py``."""
        self.core = CoreAttention(config, placement.heads == "cosine")
        self.exchange: Exchange | None = None
        """With other ranks that have other tokens, under context parallelism."""
        self.head_scale = head_scale(config, placement)
        self.linear_proj: Linear = build_linear("proj", config, layer)
        self.output_norm = output_norm(config, placement.attention_output)
        self.dropout = hidden_dropout(config)

    @property
    def qkv_parts(self) -> Parts:
        assert self.linear_qkv.parts is not None
        return self.linear_qkv.parts

    def forward(
        self, x: Tensor | Reads, context: Context, first_values: tuple[Tensor, ...] = ()
    ) -> tuple[Tensor, Tensor | None]:
        """x [S, B, C], values of earlier layers -> (output [S, B, C], a value for later layers or None)."""
        parts = self.project(x)
        q, k = self.q_layernorm(parts["q"]), self.k_layernorm(parts["k"])
        own = self.v_layernorm(parts["v"]) if self.has_values else None
        if context.rope is not None:
            rotate = turned if torch.compiler.is_compiling() else apply_rope
            q, k = rotate(q, context.rope), rotate(k, context.rope)
        v = self.value_residual.mix(own, first_values, parts.get("gate"))
        if context.cache is not None:
            assert context.span is not None
            k, v = context.cache.append(context.span, k, v)
        else:
            q, k, v = self.core.arranged(*(q, k, v) if self.exchange is None else self.exchange.heads(q, k, v))
        y = self.attended(q, k, v, context.mask)
        if self.exchange is not None:
            y = self.exchange.tokens(y)
        y = self.value_residual.correct(y, own, first_values)
        y = self.output_norm(self.linear_proj(self.head_scale(y)))
        return self.dropout(y), self.value_residual.recorded(own)

    def attended(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        if self.part is None or not self.training:
            return self.core(q, k, v, mask)
        return apart(self.part, q.device, self.core, q, k, v, mask)

    def project(self, x: Tensor | Reads) -> dict[str, Tensor]:
        """x [S, B, C] -> "q" [S, B, Q, H], "k" and "v" [S, B, G, H], "gate" [S, B, G, 1] as far as there are.

        Head counts come from the weight's shape: a tensor-parallel rank has its own heads only.
        """
        if isinstance(x, Reads):
            inputs = {name: getattr(x, "v" if name == "gate" else name) for name, _ in self.qkv_parts.sizes}
            outputs = self.linear_qkv.forward_parts(inputs)
            return {name: y.unflatten(-1, (-1, self.width_of(name))) for name, y in outputs.items()}
        outputs = self.qkv_parts.split_output(self.linear_qkv(x))  # [S, B, G, rows of a group]
        return {name: y.unflatten(-1, (-1, self.width_of(name))).flatten(2, 3) for name, y in outputs.items()}

    def width_of(self, part: str) -> int:
        return 1 if part == "gate" else self.head_size

    def new_cache(self, max_length: int, rows: int, shared_values: Tensor | None) -> LayerCache:
        """An empty cache for ``rows`` texts of ``max_length`` tokens, in the weights' dtype and on their device.

        ``shared_values``: of the first layer here; for layers that have no values of their own.
        """
        weight = self.linear_qkv.weight
        groups = weight.shape[0] // self.qkv_parts.rows_per_group
        # Zeros: a mask turns a weight to 0, and 0 times what uninitialised memory may hold is not 0.
        keys = weight.new_zeros((rows, groups, max_length, self.head_size))
        return LayerCache(keys, None if self.has_values else shared_values)
