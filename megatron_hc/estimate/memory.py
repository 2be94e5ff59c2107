"""Parameters of a rank, and the bytes of weights, gradients and optimizer state that they take."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import NamedTuple

import torch

from megatron_hc.config import TrainConfig
from megatron_hc.estimate.paper import PaperRank
from megatron_hc.kernels.norm import promote
from megatron_hc.model.gpt import GPT
from megatron_hc.parallel.collectives import group_size
from megatron_hc.parallel.plan import compute_dtype
from megatron_hc.parallel.slots import Sharding, expert_sharding_of, sharding_of

PARTS = (
    ("attention.value_residual", "residual"),
    ("_residual.", "residual"),
    ("embedding", "embedding"),
    ("output_layer", "output"),
    ("router", "router"),
    ("shared_experts", "mlp"),
    ("experts", "experts"),
    ("norm", "norms"),
    ("attention", "attention"),
    ("mlp", "mlp"),
)
"""(what a parameter's name contains, the part of the model it counts to); the first match counts."""


def part_of(name: str) -> str:
    """Which part of the model a parameter belongs to."""
    return next(part for word, part in PARTS if word in name)


def total_parameters(config: TrainConfig, vocab_size: int) -> Counter[str]:
    """Parameters of the whole model by part, the vocabulary's padding not counted."""
    with torch.device("meta"):
        model = GPT(config.model, vocab_size)
    found: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        rows = vocab_size if name in ("embedding.weight", "output_layer.weight") else parameter.shape[0]
        found[part_of(name)] += rows * (parameter.numel() // parameter.shape[0])
    return found


def active_parameters(config: TrainConfig, total: Counter[str]) -> int:
    """Those that one token goes through: of the experts its k."""
    moe = config.model.moe
    experts = total["experts"]
    idle = experts - experts * moe.moe_router_topk // moe.num_experts if moe.num_experts else 0
    return sum(total.values()) - idle


@dataclass
class StateBytes:
    """What one rank keeps for its parameters."""

    parameters: Counter[str]
    """Number by part, the vocabulary's padding included."""
    weights: int = 0
    gradients: int = 0
    """Sums over micro-batches, and this rank's part of the sums over ranks."""
    optimizer: int = 0
    """fp32 master weights and two moments."""
    updated: int = 0
    """One fp32 number for each that the optimizer updates here; part of nothing above."""
    buffers: int = 0
    """The largest buffers of a reduction or of FSDP2's gathered layers."""

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.buffers


class _Sizes(NamedTuple):
    """One parameter on one rank."""

    name: str
    elements: int
    own: int
    """Elements of the rows whose optimizer state is here."""
    shared: int
    """Of these, elements that other ranks of tensor or pipeline parallelism hold as well."""
    largest: int
    """Elements of the largest rank's rows: what travels in collectives."""
    width: int
    """Bytes of an element of the parameter."""
    wide: int
    """Bytes of an element of the master weights."""
    sharding: Sharding


def state_bytes(rank: PaperRank) -> StateBytes:
    """Bytes of weights, gradients and optimizer state of a rank."""
    parallel = rank.config.parallel
    found = StateBytes(Counter())
    has_copies = group_size(rank.mesh.group("dp_cp")) > 1
    is_fsdp = has_copies and parallel.data_parallel_sharding_strategy == "optim_grads_params"
    wide_layers: Counter[str] = Counter()
    for sizes in _sizes(rank):
        found.parameters[part_of(sizes.name)] += sizes.elements
        found.updated += sizes.own * sizes.wide
        is_mixed = sizes.width < sizes.wide
        is_sharded = is_fsdp and is_mixed
        if is_sharded:  # FSDP2 keeps wide shards, which are the master weights
            found.weights += sizes.own * sizes.wide
            found.gradients += sizes.own * sizes.wide
            found.optimizer += 2 * sizes.own * sizes.wide
            wide_layers[".".join(sizes.name.split(".")[:2])] += sizes.elements * sizes.width
            continue
        found.weights += sizes.elements * sizes.width
        found.gradients += sizes.elements * sizes.wide
        if sizes.sharding.group is not None or sizes.sharding.replicas is not None:
            found.gradients += sizes.largest * sizes.wide  # the sums over ranks have memory of their own
        apart = 0 if not is_mixed else sizes.own * sizes.wide
        found.optimizer += 0 if parallel.optimizer_cpu_offload else apart + 2 * sizes.own * sizes.wide
    # A layer at work, the next one on its way, and gradients of one.
    found.buffers = 4 * max(wide_layers.values(), default=0) + _bucket_bytes(rank, is_fsdp)
    return found


def _bucket_bytes(rank: PaperRank, is_fsdp: bool) -> int:
    """The flat buffer of the largest bucket of a reduction."""
    if is_fsdp or rank.mesh.group("dp_cp") is None:
        return 0
    limit = rank.config.parallel.ddp_bucket_size
    sizes = [sizes.elements for sizes in _sizes(rank)]
    return 4 * min(sum(sizes), limit + max(sizes))


def data_parallel_bytes(rank: PaperRank) -> Counter[tuple[str, str]]:
    """(group, collective) -> bytes that the rank sends per step to reduce gradients and to gather parameters."""
    found: Counter[tuple[str, str]] = Counter()
    for sizes in _sizes(rank):
        sharding = sizes.sharding
        if sharding.group is None:
            copies = group_size(sharding.replicas)
            if copies > 1:
                found[sharding.replicas.name, "all_reduce"] += 2 * sizes.elements * sizes.wide * (copies - 1) / copies  # type: ignore[assignment]
            continue
        others = sharding.shards - 1
        found[sharding.group.name, "reduce_scatter"] += others * sizes.largest * sizes.wide
        found[sharding.group.name, "all_gather"] += others * sizes.largest * sizes.width
        copies = group_size(sharding.replicas)
        if copies > 1:
            found[sharding.replicas.name, "all_reduce"] += 2 * sizes.largest * sizes.wide * (copies - 1) / copies  # type: ignore[assignment]
    return found


def partial_sum_bytes(rank: PaperRank) -> Counter[tuple[str, str]]:
    """(group, collective) -> bytes sent per step after that, where ranks hold the same rows and a part of their sum."""
    found: Counter[tuple[str, str]] = Counter()
    for sizes in _sizes(rank):
        name = rank.placed[sizes.name].sum_over
        copies = 1 if name is None else group_size(rank.mesh.group(name))
        if name is not None and copies > 1:
            found[name, "all_reduce"] += 2 * sizes.shared * sizes.wide * (copies - 1) / copies  # type: ignore[assignment]
    return found


def _sizes(rank: PaperRank) -> list[_Sizes]:
    config = rank.config
    shardings = sharding_of(config.parallel, rank.mesh), expert_sharding_of(config.parallel, rank.mesh)
    wide = promote(compute_dtype(config)).itemsize
    found = []
    for name, parameter, placement in rank.parameters():
        sharding = shardings[placement.is_expert]
        length, row = parameter.shape[0], parameter.numel() // max(parameter.shape[0], 1)
        first, last = sharding.rows(length)
        largest = -(-length // sharding.shards) * row
        own = (last - first) * row
        width = parameter.element_size()
        box = (first, *[0] * (parameter.dim() - 1)), parameter.detach()[first:last]
        shared = sum(values.numel() for piece, _, values in placement.overlaps(box) if piece.holders > 1)
        found.append(_Sizes(name, parameter.numel(), own, shared, largest, width, wide, sharding))
    return found
