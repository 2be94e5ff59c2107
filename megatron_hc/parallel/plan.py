"""From a plain model to this rank's part of it: a table says, parameter by parameter, what each rank holds.

Every parameter is drawn full-size, per logical matrix, from a seed made of its name, and then cut: so a model has the
same weights at every layout.
"""

from __future__ import annotations

import fnmatch
import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from megatron_hc.config import ModelConfig, TrainConfig
from megatron_hc.kernels.norm import promote
from megatron_hc.mesh import Mesh
from megatron_hc.model.attention import Attention
from megatron_hc.model.dropout import Dropout
from megatron_hc.model.gpt import GPT, padded_vocab_size
from megatron_hc.model.linear import NormLayer, Parts
from megatron_hc.parallel.context import HeadExchange
from megatron_hc.parallel.expert import spread_experts
from megatron_hc.parallel.placement import Box, Placement, even, expert_rows, grouped_queries, held_twice, whole
from megatron_hc.parallel.recompute import Checkpoint, set_up_recompute
from megatron_hc.parallel.tensor import (
    ColumnParallelLinear,
    ParallelPositionTable,
    Region,
    RowParallelLinear,
    VocabParallelTable,
    WidthParallelNorm,
    become,
)
from megatron_hc.residual import Draw, Residual
from megatron_hc.stored import Stored


class Entry(NamedTuple):
    """One row of the table."""

    pattern: str
    """Parameters it is about, as a shell pattern of their names; the first row that matches counts."""
    cut: Literal["whole", "rows", "columns", "qkv", "experts", "whole experts"]
    """How tensor parallelism divides the parameter; experts are divided among expert-parallel ranks, and each, unless
    whole, among expert-tensor-parallel ones."""
    sum_over_tp: Literal["never", "sequence", "always"] = "never"
    """When the gradient is a partial sum on each tensor-parallel rank: under sequence parallelism, or always."""
    becomes: type[nn.Module] | None = None
    """The parallel version of the module that owns the parameter."""


PLAN: tuple[Entry, ...] = (
    Entry("embedding.weight", "rows", becomes=VocabParallelTable),
    Entry("output_layer.weight", "rows", becomes=VocabParallelTable),
    Entry("position_embedding.weight", "whole", "sequence", ParallelPositionTable),
    Entry("layers.*.attention.linear_qkv.*", "qkv", becomes=ColumnParallelLinear),
    Entry("layers.*.mlp.linear_fc1.*", "rows", becomes=ColumnParallelLinear),
    Entry("layers.*.mlp.inner_norm.*", "rows", becomes=WidthParallelNorm),
    Entry("layers.*.mlp.shared_experts.linear_fc1.*", "rows", becomes=ColumnParallelLinear),
    Entry("layers.*.mlp.shared_experts.gate.weight", "whole", "sequence"),
    Entry("layers.*.mlp.router.weight", "whole", "sequence"),
    Entry("layers.*.mlp.experts.linear_fc2.bias", "whole experts"),
    Entry("layers.*.mlp.experts.*", "experts"),
    Entry("layers.*.linear_*.weight", "columns", becomes=RowParallelLinear),
    Entry("layers.*.linear_*.bias", "whole", "sequence", RowParallelLinear),
    # Inside attention every rank has its own heads, whatever the sequence: what they share gets a part of its gradient.
    Entry("layers.*.attention.q_layernorm.log_scale", "rows"),
    Entry("layers.*.attention.head_scale.*", "rows"),
    Entry("layers.*.attention.[qk]_layernorm.across_heads.*", "rows", becomes=WidthParallelNorm),
    Entry("layers.*.attention.[qkv]_layernorm.*", "whole", "always"),
    Entry("layers.*.attention.value_residual.*", "whole", "always"),
    # Norms and residuals stand outside the parallel regions: each rank sees its part of the sequence, or all of it.
    Entry("layers.*_norm.*", "whole", "sequence"),
    Entry("layers.*.mlp_stream_scale.*", "whole", "sequence"),
    Entry("embedding_norm.*", "whole", "sequence"),
    Entry("final_norm.*", "whole", "sequence"),
    Entry("*_residual.*", "whole", "sequence"),
)


def compute_dtype(config: TrainConfig) -> torch.dtype:
    """dtype of weights and activations."""
    return torch.bfloat16 if config.training.bf16 else torch.float64 if config.training.fp64 else torch.float32


def build_model(config: TrainConfig, vocab_size: int, mesh: Mesh, keep: Checkpoint | None = None) -> GPT:
    """This rank's model, its parameters full-size and still without storage (meta device). ``keep``: recomputes."""
    layers, layout = config.parallel, config.parallel.pipeline_layout(config.model.num_layers)
    stages = layout.stages_of(mesh.rank("pp"))
    with torch.device("meta"):
        model = GPT(
            config.model,
            vocab_size,
            padded_vocab=padded_vocab_size(config.model, vocab_size, mesh.size("tp")),
            layers=layout.layers_of(mesh.rank("pp")),
            has_embedding=0 in stages,
            has_output=layout.num_stages - 1 in stages,
        )
    spread_experts(model, mesh, layers.moe_token_dispatcher_type)
    set_up_recompute(model, layers, keep)
    return model


def placements(model: GPT, mesh: Mesh, table: Sequence[Entry] = PLAN) -> dict[str, Placement]:
    """Parameter name -> what this rank holds of it; from a model whose parameters are still full-size."""
    is_sequence_parallel = mesh.sequence_parallel
    found = {}
    for name, parameter in model.named_parameters():
        entry = _entry(name, table)
        is_partial = entry.sum_over_tp == "always" or entry.sum_over_tp == "sequence" and is_sequence_parallel
        found[name] = _placement(entry, tuple(parameter.shape), model.config, mesh, "tp" if is_partial else None)
        if name in ("embedding.weight", "output_layer.weight"):
            found[name] = found[name]._replace(padding=parameter.shape[0] - model.vocab_size)
        if name == "embedding.weight" and mesh.group("embedding") is not None:
            found[name] = held_twice(found[name])
        if name == "embedding.weight" and mesh.size("pp") > 1 and model.is_first and model.is_last:
            # Tied, and both ends of a V are here: two stages, each with a backward pass of its own.
            found[name] = found[name]._replace(passes=1 if model.output_layer is not None else 2)
    return found


def _entry(name: str, table: Sequence[Entry]) -> Entry:
    for entry in table:
        if fnmatch.fnmatchcase(name, entry.pattern):
            return entry
    raise AssertionError(f"the table of parallel/plan.py has no row for {name}")


def _placement(
    entry: Entry, shape: tuple[int, ...], config: ModelConfig, mesh: Mesh, sum_over: str | None
) -> Placement:
    rank, ranks = mesh.rank("tp"), mesh.size("tp")
    if entry.cut in ("experts", "whole experts"):
        assert config.moe.num_experts is not None
        return expert_rows(shape, config.moe.num_experts, mesh.experts, is_divided=entry.cut == "experts")
    if entry.cut == "whole":
        return whole(shape, ranks, sum_over if ranks > 1 else None)
    if entry.cut == "qkv" and config.num_kv_heads < ranks:
        queries = config.num_attention_heads // config.num_kv_heads * config.head_size
        shared = shape[0] // config.num_kv_heads - queries
        return grouped_queries(shape, rank, ranks, config.num_kv_heads, queries, shared)
    return even(shape, 1 if entry.cut == "columns" else 0, rank, ranks)


def parallelize(model: GPT, mesh: Mesh, table: Sequence[Entry] = PLAN) -> None:
    """Turn modules into their parallel versions, once ``materialize`` has cut their parameters."""
    tell_dropout(model, mesh)
    if mesh.size("cp") > 1:
        for module in model.modules():
            if isinstance(module, Attention):
                module.exchange = HeadExchange(mesh.group("cp"))
    if mesh.size("tp") == 1:
        return
    region = Region(mesh.group("tp"), mesh.sequence_parallel)
    for name, module, _ in list(owned_parameters(model)):
        kind = _entry(name, table).becomes
        if kind is not None and not isinstance(module, kind):
            become(module, kind, region=region)
    sharers = mesh.size("tp") // model.config.num_kv_heads
    if sharers > 1:
        for module in model.modules():
            if isinstance(module, Attention):
                _share_key_value_heads(module, sharers)


def tell_dropout(model: GPT, mesh: Mesh) -> None:
    """Say what this rank drops by itself: its own samples; of samples it shares its own tokens, and its own heads."""
    first = mesh.copy * mesh.size("tp")
    of_heads = first + mesh.rank("tp") if mesh.copies * mesh.size("tp") > 1 else None
    of_tokens = of_heads if mesh.sequence_parallel else first if mesh.copies > 1 else None
    for module in model.modules():
        if isinstance(module, Dropout):
            module.part = of_tokens
        elif isinstance(module, Attention) and model.config.attention_dropout > 0:
            module.part = of_heads


def _share_key_value_heads(attention: Attention, sharers: int) -> None:
    """This rank has all keys and values of one group, and ``1 / sharers`` of its queries."""
    parts = attention.linear_qkv.parts
    assert parts is not None
    sizes = tuple((name, count // sharers if name == "q" else count) for name, count in parts.sizes)
    attention.linear_qkv.parts = Parts(sizes)


def materialize(
    model: GPT,
    placed: dict[str, Placement],
    seed: int,
    mesh: Mesh,
    dtype: torch.dtype,
    draw: Callable[[str, int], Draw] | None = None,
) -> None:
    """Give every parameter storage on the mesh's device and its initial value, in at least fp32.

    ``cast_parameters`` comes after the optimizer has taken its fp32 master weights. ``draw``: ``draw_for``, or for
    weights whose values do not matter another source of numbers.
    """
    draw = draw or draw_for
    drawn: dict[str, Tensor] = {}
    for name, module, local_name in owned_parameters(model):
        value = module.initial(local_name, draw(name, seed))  # type: ignore[operator]
        assert tuple(value.shape) == placed[name].whole_shape, f"{name}: {value.shape}"
        drawn[name] = placed[name].cut(value).to(mesh.device, promote(dtype))
    for name, module, local_name in list(owned_parameters(model)):
        module._parameters[local_name] = nn.Parameter(drawn[name])
    for module in model.modules():
        for local_name, buffer in module._buffers.items():
            if buffer is not None:  # what training moves by itself starts at zero, in at least fp32
                module._buffers[local_name] = torch.zeros(buffer.shape, dtype=promote(dtype), device=mesh.device)


def cast_parameters(model: GPT, dtype: torch.dtype) -> None:
    """Weights to ``dtype``; norms and residual parameters stay in at least fp32."""
    for _, module, local_name in owned_parameters(model):
        parameter = module._parameters[local_name]
        assert parameter is not None
        parameter.data = parameter.data.to(parameter_dtype(module, dtype))


def parameter_dtype(module: nn.Module, dtype: torch.dtype) -> torch.dtype:
    """The dtype the parameters of ``module`` have in a model that computes in ``dtype``."""
    keeps = isinstance(module, NormLayer | Residual) or getattr(module, "keeps_fp32", False)
    return promote(dtype) if keeps else dtype


def owned_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """(full name, owning module, name in it) of every parameter, in the order of ``named_parameters``."""
    for prefix, module in model.named_modules():
        for local_name, parameter in module._parameters.items():
            if parameter is not None:
                yield f"{prefix}.{local_name}", module, local_name


def draw_for(name: str, seed: int) -> Draw:
    """Normal numbers for the parameter ``name``: they depend on the seed, its name and the logical part only.

    Drawn on the CPU, because a CUDA generator gives other numbers.
    """

    def draw(part: str, shape: tuple[int, ...], std: float) -> Tensor:
        digest = hashlib.blake2b(f"{seed}/{name}/{part}".encode(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
        return torch.randn(shape, generator=generator, dtype=torch.float32).mul_(std)

    return draw


def stored(
    model: GPT, placed: dict[str, Placement], name: str, boxes: Iterable[Box], dtype: torch.dtype
) -> Stored:
    """What a checkpoint holds of a parameter or of its optimizer state; the vocabulary's padding is left out."""
    placement = placed[name]
    is_vocab = name in ("embedding.weight", "output_layer.weight")
    return placement.stored(boxes, dtype, model.vocab_size if is_vocab else placement.whole_shape[placement.dim])
