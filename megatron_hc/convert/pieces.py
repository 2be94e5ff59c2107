"""One of our tensors and the tensors of a family that it is made of.

Dims: C hidden size, Q query heads, G key/value heads, H head width, F width of the MLP or of an expert, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_hc.config import ModelConfig
from megatron_hc.convert.names import Names
from megatron_hc.model.linear import Parts

Shapes = tuple[tuple[str, tuple[int, ...]], ...]
"""(name, shape) of some tensors, in order."""


@dataclass(frozen=True)
class Piece:
    """``join`` makes ours of theirs, in the order of ``theirs``; ``cut`` is its inverse."""

    ours: str
    theirs: Shapes
    join: Callable[[Sequence[Tensor]], Tensor]
    cut: Callable[[Tensor], Sequence[Tensor]]
    fused: Piece | None = None
    """The same with what newer files hold instead."""


def all_pieces(config: ModelConfig, vocab_size: int, names: Names) -> Iterator[Piece]:
    """Every tensor of a plain model, layer by layer."""
    C = config.hidden_size
    yield _same("embedding.weight", names.embedding, (vocab_size, C))
    if names.position is not None:
        yield _same("position_embedding.weight", names.position, (config.max_positions, C))
    for i in range(config.num_layers):
        yield from _layer(config, names, i)
    yield from _norm(config, "final_norm", names.final_norm, C)
    if config.untie_embeddings_and_output_weights:
        yield _same("output_layer.weight", names.output, (vocab_size, C))


def _layer(config: ModelConfig, names: Names, i: int) -> Iterator[Piece]:
    C, H = config.hidden_size, config.head_size
    ours, theirs = f"layers.{i}.", names.layer.format(i=i)
    widths = (config.num_attention_heads, config.num_kv_heads) if config.qk_layernorm_across_heads else (1, 1)
    across = ".across_heads" if config.qk_layernorm_across_heads else ""
    for own, other, width in (
        ("attention_norm", names.attention_norm, C),
        ("mlp_norm", names.mlp_norm, C),
        ("attention.output_norm", names.attention_output_norm, C),
        ("mlp.output_norm", names.mlp_output_norm, C),
        (f"attention.q_layernorm{across}", names.q_norm, widths[0] * H),
        (f"attention.k_layernorm{across}", names.k_norm, widths[1] * H),
    ):
        if other is not None:
            yield from _norm(config, ours + own, theirs + other, width)
    has_bias = not config.disable_bias_linear
    yield from _qkv(config, names, ours + "attention.linear_qkv", theirs)
    proj = (C, config.num_attention_heads * H)
    yield from _linear(names, ours + "attention.linear_proj", theirs + names.proj, proj, has_bias)
    if config.has_experts(i):
        yield from _experts(config, names, ours + "mlp.", theirs, i)
        return
    F = config.ffn_size
    if config.swiglu:
        both = dict(zip(("gate", "up"), (theirs + name for name in names.fc1), strict=True))
        parts = Parts((("gate", 1), ("up", 1)))
        yield _merged(ours + "mlp.linear_fc1.weight", parts, F, both, ".weight", (C,))
        if has_bias:
            yield _merged(ours + "mlp.linear_fc1.bias", parts, F, both, ".bias", ())
    else:
        yield from _linear(names, ours + "mlp.linear_fc1", theirs + names.fc1[0], (F, C), has_bias)
    yield from _linear(names, ours + "mlp.linear_fc2", theirs + names.fc2, (C, F), has_bias)


def _same(ours: str, theirs: str, shape: tuple[int, ...]) -> Piece:
    return Piece(ours, ((theirs, shape),), lambda parts: parts[0], lambda whole: (whole,))


def _transposed(ours: str, theirs: str, shape: tuple[int, int]) -> Piece:
    """shape: of ours."""
    return Piece(ours, ((theirs, shape[::-1]),), lambda parts: parts[0].t(), lambda whole: (whole.t(),))


def _norm(config: ModelConfig, ours: str, theirs: str, width: int) -> Iterator[Piece]:
    yield _same(f"{ours}.weight", f"{theirs}.weight", (width,))
    if config.has_norm_bias:
        yield _same(f"{ours}.bias", f"{theirs}.bias", (width,))


def _linear(names: Names, ours: str, theirs: str, shape: tuple[int, int], has_bias: bool) -> Iterator[Piece]:
    make = _transposed if names.is_transposed else _same
    yield make(f"{ours}.weight", f"{theirs}.weight", shape)
    if has_bias:
        yield _same(f"{ours}.bias", f"{theirs}.bias", shape[:1])


def _merged(ours: str, parts: Parts, groups: int, theirs: dict[str, str], suffix: str, rest: tuple[int, ...]) -> Piece:
    """A merged weight or bias whose logical matrices are tensors of their own there."""
    shapes = tuple((theirs[name] + suffix, (groups * count, *rest)) for name, count in parts.sizes)
    order = [name for name, _ in parts.sizes]
    return Piece(
        ours,
        shapes,
        lambda tensors: parts.merge(dict(zip(order, tensors, strict=True))),
        lambda whole: list(parts.split(whole).values()),
    )


def _qkv(config: ModelConfig, names: Names, ours: str, theirs: str) -> Iterator[Piece]:
    C, H, G = config.hidden_size, config.head_size, config.num_kv_heads
    parts = Parts((("q", config.num_attention_heads // G * H), ("k", H), ("v", H)))
    kinds: list[tuple[str, tuple[int, ...]]] = [(".weight", (C,))]
    if config.add_qkv_bias or not config.disable_bias_linear:
        kinds.append((".bias", ()))
    for suffix, rest in kinds:
        if len(names.qkv) == 3:
            three = {part: theirs + name for part, name in zip("qkv", names.qkv, strict=True)}
            yield _merged(ours + suffix, parts, G, three, suffix, rest)
        else:
            yield _one_qkv(ours + suffix, theirs + names.qkv[0] + suffix, parts, G, rest, names.is_transposed)


def _one_qkv(ours: str, theirs: str, parts: Parts, groups: int, rest: tuple[int, ...], is_transposed: bool) -> Piece:
    """All queries, all keys, all values below each other, or with ``is_transposed`` side by side."""
    sizes = [groups * count for _, count in parts.sizes]
    turn = is_transposed and bool(rest)

    def join(tensors: Sequence[Tensor]) -> Tensor:
        whole = tensors[0].t() if turn else tensors[0]
        return parts.merge(dict(zip(("q", "k", "v"), whole.split(sizes), strict=True)))

    def cut(whole: Tensor) -> Sequence[Tensor]:
        below = torch.cat(list(parts.split(whole).values()))
        return (below.t() if turn else below,)

    shape = (sum(sizes), *rest)
    return Piece(ours, ((theirs, shape[::-1] if turn else shape),), join, cut)


def _experts(config: ModelConfig, names: Names, ours: str, theirs: str, i: int) -> Iterator[Piece]:
    E, F, C = config.moe.num_experts, config.expert_ffn_size, config.hidden_size
    assert E is not None and names.router is not None
    router = _same(ours + "router.weight", f"{theirs}{names.router}.weight", (E, C))
    fused = _same(ours + "router.weight", f"{theirs}{names.fused_router}.weight", (E, C))
    yield Piece(router.ours, router.theirs, router.join, router.cut, fused)
    yield _expert_fc1(ours + "experts.linear_fc1.weight", names, theirs, (E, F, C))
    yield _expert_fc2(ours + "experts.linear_fc2.weight", names, theirs, (E, F, C))


def _expert_fc1(ours: str, names: Names, theirs: str, dims: tuple[int, int, int]) -> Piece:
    """Ours: [E * 2 F, C], an expert's rows alternating gate, up."""
    E, F, C = dims
    apart = tuple(
        (f"{theirs}{name.format(e=e)}.weight", (F, C)) for e in range(E) for name in names.expert_fc1
    )  # gate of expert 0, up of expert 0, gate of expert 1, ...

    def join(tensors: Sequence[Tensor]) -> Tensor:
        whole = tensors[0].new_empty(E, F, 2, C)
        for number, tensor in enumerate(tensors):
            whole[number // 2, :, number % 2] = tensor
        return whole.view(-1, C)

    def cut(whole: Tensor) -> Sequence[Tensor]:
        rows = whole.view(E, F, 2, C)
        return [rows[e, :, which] for e in range(E) for which in range(2)]

    fused = Piece(
        ours,
        ((theirs + names.fused_fc1, (E, 2 * F, C)),),
        lambda tensors: tensors[0].view(E, 2, F, C).transpose(1, 2).reshape(-1, C),
        lambda whole: (whole.view(E, F, 2, C).transpose(1, 2).reshape(E, 2 * F, C),),
    )
    return Piece(ours, apart, join, cut, fused)


def _expert_fc2(ours: str, names: Names, theirs: str, dims: tuple[int, int, int]) -> Piece:
    """Ours: [E * F, C], transposed."""
    E, F, C = dims
    apart = tuple((f"{theirs}{names.expert_fc2.format(e=e)}.weight", (C, F)) for e in range(E))

    def join(tensors: Sequence[Tensor]) -> Tensor:
        whole = tensors[0].new_empty(E, F, C)
        for e, tensor in enumerate(tensors):
            whole[e] = tensor.t()
        return whole.view(-1, C)

    fused = Piece(
        ours,
        ((theirs + names.fused_fc2, (E, C, F)),),
        lambda tensors: tensors[0].transpose(1, 2).reshape(-1, C),
        lambda whole: (whole.view(E, F, C).transpose(1, 2),),
    )
    return Piece(ours, apart, join, lambda whole: [m.t() for m in whole.view(E, F, C)], fused)
