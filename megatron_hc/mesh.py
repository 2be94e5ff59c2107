"""Where this process stands in the layout: axes, sizes, ranks and process groups. Made once and passed on."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from typing import Any, NamedTuple

from megatron_hc.config import TrainConfig
from megatron_hc.place import Place, place_of

Join = Callable[[list[list[int]]], Any]
"""Makes a process group of each list of ranks and returns this rank's."""

AXES = ("pp", "dp", "cp", "tp")  # outermost first: neighbouring ranks share a tensor-parallel group, as in Megatron-LM


class ExpertRanks(NamedTuple):
    """Which experts a rank holds, and which part of each."""

    rank: int = 0
    """Place among the ranks that share out the experts."""
    ranks: int = 1
    part: int = 0
    """Place among the ranks that share each expert (expert tensor parallelism)."""
    parts: int = 1


@dataclass(frozen=True, kw_only=True)
class Mesh:
    """The layout of a run, seen from one process.

    An axis of size 1 has rank 0 and group ``None``; every collective of ``parallel/collectives.py`` is the identity on
    group ``None``, so one process needs no process group at all.
    """

    sizes: dict[str, int] = field(default_factory=lambda: dict.fromkeys(AXES, 1))
    """Number of ranks along each axis."""
    ranks: dict[str, int] = field(default_factory=lambda: dict.fromkeys(AXES, 0))
    """This process's place along each axis."""
    groups: dict[str, Any] = field(default_factory=lambda: dict.fromkeys(AXES))
    """torch.distributed groups by axis, by joined axes ('dp_cp', 'world'), 'kv': the ranks that share key/value
    heads, 'embedding': the two that hold a tied table, 'dp_cp_shard' and 'dp_cp_replica': of hybrid sharding, 'writer':
    all, for --async-save; None where the size is 1. With experts also 'tp_cp': the ranks that share a micro-batch,
    'experts': those that together hold all experts, 'etp': of these, those that share one expert, and 'edp': those that
    hold the same part of the same experts. With experts or --fp8-recipe delayed 'stage': those with the same layers."""
    device: str = "cpu"
    """'cpu' or 'cuda:K'."""
    sequence_parallel: bool = False
    """Outside the tensor-parallel regions a rank has its part of the sequence."""
    experts: ExpertRanks = ExpertRanks()
    """Which experts this process holds."""

    def __post_init__(self) -> None:
        assert set(self.sizes) == set(self.ranks) == set(AXES)
        assert all(0 <= self.ranks[axis] < self.sizes[axis] for axis in AXES)

    def size(self, axis: str) -> int:
        return self.sizes[axis]

    def rank(self, axis: str) -> int:
        return self.ranks[axis]

    def group(self, axis: str) -> Any:
        return self.groups.get(axis)

    @property
    def copies(self) -> int:
        """Ranks with the same weights, each with samples or tokens of its own."""
        return self.sizes["dp"] * self.sizes["cp"]

    @property
    def copy(self) -> int:
        """This process's place among them."""
        return self.ranks["dp"] * self.sizes["cp"] + self.ranks["cp"]

    @property
    def world_size(self) -> int:
        size = 1
        for axis in AXES:
            size *= self.sizes[axis]
        return size

    @property
    def world_rank(self) -> int:
        rank = 0
        for axis in AXES:
            rank = rank * self.sizes[axis] + self.ranks[axis]
        return rank

    @property
    def is_first(self) -> bool:
        """Rank 0 of the world: writes what exists once."""
        return self.world_rank == 0

    def on(self, device: str) -> Mesh:
        return dataclasses.replace(self, device=device)


def build_mesh(config: TrainConfig) -> Mesh:
    """The mesh of this process: from torchrun's environment, or one process.

    Raises ``ValueError`` for a layout or device that cannot work, before any process group exists.
    """
    config.validate(place_of().world_size)
    return join(config)


def join(config: TrainConfig) -> Mesh:
    """``build_mesh`` for a configuration that is known to work with this number of processes."""
    import torch

    place = place_of()
    rank, world_size = place.rank, place.world_size
    device = _device(config.parallel.device, place)
    if config.parallel.optimizer_cpu_offload and device == "cpu" and not config.zero.deepspeed:
        raise ValueError("--optimizer-cpu-offload needs a GPU, and here is none: leave it out")
    if world_size == 1:
        return Mesh(device=device)
    if device.startswith("cuda"):
        torch.cuda.set_device(device)
    backend = "nccl" if device.startswith("cuda") else "gloo"
    timeout = _timeout(config, device)
    torch.distributed.init_process_group(
        backend, store=_meet(place, timeout), rank=rank, world_size=world_size, timeout=timeout
    )
    return mesh_of(rank, world_size, config, device)


def _meet(place: Place, timeout: timedelta) -> Any:
    """The store of the process group. torchrun's outlives a restart of the processes: each attempt has its own names.

    torch 2.13 leaves them to be the same, and processes started again would look for those that have ended.
    """
    import torch.distributed as dist
    from torch.distributed.rendezvous import rendezvous

    store, _, _ = next(rendezvous(place.init_method, place.rank, place.world_size, timeout=timeout))
    store.set_timeout(timeout)
    return dist.PrefixStore(f"attempt_{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def leave_groups() -> None:
    """End the process groups, if there are any."""
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def mesh_of(rank: int, world_size: int, config: TrainConfig, device: str, join: Join | None = None) -> Mesh:
    """The mesh of ``rank`` of ``world_size``, once a process group exists; all ranks call together.

    ``join``: what makes the groups instead of torch.distributed; then no process group is needed.
    """
    is_real = join is None
    join = join or partial(_own_group, rank, _timeout(config, device))
    tp, pp = config.parallel.tensor_model_parallel_size, config.parallel.pipeline_model_parallel_size
    cp, dp = config.parallel.context_parallel_size, config.parallel.data_parallel_size(world_size)
    sizes = {"pp": pp, "dp": dp, "cp": cp, "tp": tp}
    ranks, rest = {}, rank
    for axis in reversed(AXES):
        ranks[axis] = rest % sizes[axis]
        rest //= sizes[axis]
    members = {axis: _along(axis, sizes) for axis in ("tp", "cp", "dp", "pp")} | {"world": [list(range(world_size))]}
    copies = _along("dp", {**sizes, "dp": dp * cp, "cp": 1})
    if cp > 1:
        members["dp_cp"] = copies
    layout = config.parallel.pipeline_layout(config.model.num_layers)
    if layout.is_tied_apart and not config.model.untie_embeddings_and_output_weights:
        ends = (layout.rank_of(0), layout.rank_of(layout.num_stages - 1))
        members["embedding"] = [[ranks[stage] for stage in ends] for ranks in members["pp"]]
    sharers = tp // config.model.num_kv_heads
    if sharers > 1:
        members["kv"] = [list(range(first, first + sharers)) for first in range(0, world_size, sharers)]
    has_experts, stage = config.model.moe.num_experts is not None, world_size // pp
    if has_experts or config.backends.shares_scales:
        members["stage"] = [list(range(first, first + stage)) for first in range(0, world_size, stage)]
    groups = {name: join(lists) for name, lists in members.items()}
    groups.setdefault("dp_cp", groups["dp"])
    groups |= _shard_groups(join, copies, config.parallel.num_distributed_optimizer_instances)
    experts = ExpertRanks()
    if has_experts:
        experts = _expert_ranks(rank, config)
        groups |= _expert_groups(join, world_size, sizes, experts)
    if is_real and config.checkpoint.async_save and world_size > 1:
        groups["writer"] = _writer_group(_timeout(config, device))
    return Mesh(
        sizes=sizes,
        ranks=ranks,
        groups=groups,
        device=device,
        sequence_parallel=config.parallel.sequence_parallel,
        experts=experts,
    )


def _expert_ranks(rank: int, config: TrainConfig) -> ExpertRanks:
    """Neighbours share an expert, neighbours of these have the other experts, as in Megatron-LM."""
    parts, ranks = config.parallel.expert_parts, config.parallel.expert_model_parallel_size
    return ExpertRanks(rank=rank // parts % ranks, ranks=ranks, part=rank % parts, parts=parts)


def _expert_groups(join: Join, world_size: int, sizes: dict[str, int], experts: ExpertRanks) -> dict[str, Any]:
    """Expert parallelism folds into the ranks of a stage: its blocks of neighbours hold all experts each."""
    stage, block, sharers = world_size // sizes["pp"], experts.ranks * experts.parts, sizes["tp"] * sizes["cp"]
    members = {
        "tp_cp": [list(range(first, first + sharers)) for first in range(0, world_size, sharers)],
        "experts": [list(range(first, first + block)) for first in range(0, world_size, block)],
        "etp": [list(range(first, first + experts.parts)) for first in range(0, world_size, experts.parts)],
        "edp": [
            list(range(first + place, first + stage, block))
            for first in range(0, world_size, stage)
            for place in range(block)
        ],
    }
    return {name: join(lists) for name, lists in members.items()}


def _along(axis: str, sizes: dict[str, int]) -> list[list[int]]:
    """The ranks of each line of the mesh along ``axis``."""
    position = AXES.index(axis)
    stride = math.prod(sizes[inner] for inner in AXES[position + 1 :])
    block, world_size = stride * sizes[axis], math.prod(sizes.values())
    return [
        list(range(first, first + block, stride))
        for start in range(0, world_size, block)
        for first in range(start, start + stride)
    ]


def _writer_group(timeout: timedelta) -> Any:
    """All ranks once more, on CPU tensors: for saves in the background.

    Nothing but the next save waits for them, so a disk that is slow for one rank has gloo's own 30 minutes at least.
    """
    import torch.distributed as dist

    return dist.new_group(backend="gloo", timeout=max(timeout, timedelta(minutes=30)))


def _shard_groups(join: Join, copies: list[list[int]], instances: int) -> dict[str, Any]:
    """Groups of --num-distributed-optimizer-instances: neighbours share one copy out, as in Megatron-LM."""
    if instances == 1:
        return {}
    shards, replicas = [], []
    for ranks in copies:
        size = len(ranks) // instances
        shards += [ranks[first : first + size] for first in range(0, len(ranks), size)]
        replicas += [ranks[first::size] for first in range(size)]
    return {"dp_cp_shard": join(shards), "dp_cp_replica": join(replicas)}


def _timeout(config: TrainConfig, device: str) -> timedelta:
    """How long a collective waits. gloo raises there; NCCL ends the process from within: the watchdog comes first."""
    spare = 1 if device.startswith("cuda") else 0
    return timedelta(minutes=config.parallel.distributed_timeout_minutes + spare)


def _own_group(rank: int, timeout: timedelta, members: list[list[int]]) -> Any:
    """Make a process group of each list (every rank makes all, in the same order) and return the one of ``rank``."""
    import torch.distributed as dist

    own = None
    for ranks in members:
        group = dist.new_group(ranks, timeout=timeout) if len(ranks) > 1 else None
        if rank in ranks:
            own = group
    return own


def _device(wanted: str, place: Place) -> str:
    import torch

    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    if wanted == "cpu":
        return wanted
    if place.local_rank is None and place.world_size > 1:
        raise ValueError("LOCAL_RANK, which says which GPU is whose, is not set: start with torchrun or srun")
    local = place.local_rank or 0
    if place.launcher == "Slurm" and torch.cuda.device_count() == 1 and _has_own_gpu(os.environ):
        local = 0  # Slurm shows each task the one GPU that it is bound to
    if local >= torch.cuda.device_count():
        raise ValueError(
            f"--device cuda: this machine has {torch.cuda.device_count()} CUDA devices and process {local} of it needs "
            "one of its own; start fewer processes, or use --device cpu"
        )
    return f"cuda:{local}"


def _has_own_gpu(environment: Mapping[str, str]) -> bool:
    """Whether srun's flags have given every task a GPU of its own (--gpus-per-task, --gpu-bind)."""
    bound = environment.get("SLURM_GPU_BIND", "") + environment.get("SLURM_TRES_BIND", "")
    return bool(environment.get("SLURM_GPUS_PER_TASK")) or "single" in bound or "per_task" in bound
