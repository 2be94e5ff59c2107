"""One parameter as the optimizer sees it, and the buckets that parameters travel in between data-parallel ranks.

``Sharding`` says which ranks share out the optimizer state: of each parameter every one of ``shards`` ranks keeps its
own rows (dim 0 in equal parts, the last ones short or empty), and ``replicas`` are the ranks that keep the same rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from megatron_hc.config import ParallelConfig
from megatron_hc.mesh import Mesh
from megatron_hc.parallel.collectives import Group, group_rank, group_size
from megatron_hc.parallel.placement import Box, Placement


class Sharding(NamedTuple):
    """How the data-parallel ranks share out optimizer state."""

    group: Group
    """The ranks that together hold one copy; None: every rank holds everything."""
    replicas: Group
    """The ranks that hold the same rows."""
    shards: int
    """Ranks of ``group``."""
    shard: int
    """This rank's place in it."""

    def rows(self, length: int) -> tuple[int, int]:
        """This rank's rows of ``length``: first, last + 1."""
        size = -(-length // self.shards)
        return min(self.shard * size, length), min((self.shard + 1) * size, length)


def sharding_of(config: ParallelConfig, mesh: Mesh) -> Sharding:
    """Over all data-parallel ranks, over a part of them (hybrid), or not at all."""
    if config.data_parallel_sharding_strategy == "no_shard":
        return Sharding(None, mesh.group("dp_cp"), 1, 0)
    instances = config.num_distributed_optimizer_instances
    if instances == 1:
        return Sharding(mesh.group("dp_cp"), None, mesh.copies, mesh.copy)
    count = mesh.copies // instances
    return Sharding(mesh.group("dp_cp_shard"), mesh.group("dp_cp_replica"), count, mesh.copy % count)


def expert_sharding_of(config: ParallelConfig, mesh: Mesh) -> Sharding:
    """The same for experts, whose copies are on fewer ranks; never hybrid."""
    group = mesh.group("edp")
    if config.data_parallel_sharding_strategy == "no_shard":
        return Sharding(None, group, 1, 0)
    return Sharding(group, None, group_size(group), group_rank(group))


@dataclass
class Slot:
    """One parameter and what the optimizer keeps for this rank's rows of it."""

    name: str
    parameter: nn.Parameter
    dtype: torch.dtype
    """Of the parameter, once it is cast."""
    placement: Placement
    decays: bool
    lr_mult: float
    rows: tuple[int, int]
    """This rank's rows of the parameter: first, last + 1."""
    master: Tensor
    """fp32 (fp64) weights of these rows; a view of the parameter unless ``is_apart``."""
    exp_avg: Tensor
    exp_avg_sq: Tensor
    is_apart: bool = False
    """The master weights have memory of their own: another dtype, or another device."""
    is_fully_sharded: bool = False
    """FSDP2 shards the parameter itself and reduces its gradient (parallel/fsdp.py)."""
    eps_mult: float = 1.0
    arrivals: int = 0
    """Micro-batches of this step whose gradient has come."""
    main_grad: Tensor | None = None
    """Whole gradient summed over micro-batches, where the parameter's dtype is too narrow to sum in."""
    grad: Tensor | None = None
    """Reduced gradient of this rank's rows, on the parameter's device."""

    @property
    def is_mixed(self) -> bool:
        return self.master.dtype != self.dtype

    @property
    def local_gradient(self) -> Tensor:
        """This rank's sum over micro-batches, in the master's dtype."""
        grad = self.main_grad if self.is_mixed else self.parameter.grad
        return torch.zeros_like(self.parameter, dtype=self.master.dtype) if grad is None else grad

    @property
    def own_rows(self) -> Tensor:
        """This rank's rows of the parameter itself, a view."""
        return local(self.parameter.detach()) if self.is_fully_sharded else self.parameter[self.rows[0] : self.rows[1]]

    def boxes(self, tensor: Tensor) -> list[Box]:
        """A tensor of this rank's rows (master, moment, gradient), as views that say where they lie."""
        return [((self.rows[0], *[0] * (tensor.dim() - 1)), tensor)] if tensor.numel() > 0 else []

    @property
    def is_fused(self) -> bool:
        """Whether a matrix multiplication adds gradients to ``main_grad`` itself (--gradient-accumulation-fusion).

        Megatron-LM's protocol, which transformer-engine's modules know: the parameter has a ``main_grad`` and is told
        by ``grad_added_to_main_grad``; the gradient that autograd then brings is any tensor of its shape.
        """
        return hasattr(self.parameter, "grad_added_to_main_grad")

    def prepare_fusion(self) -> None:
        """A sum of zero for the step to come."""
        self.main_grad = torch.zeros_like(self.parameter, dtype=self.master.dtype)
        self.parameter.main_grad = self.main_grad  # type: ignore[attr-defined]
        self.parameter.grad_added_to_main_grad = False  # type: ignore[attr-defined]

    def accumulate(self) -> None:
        """Move a micro-batch's gradient into the wide sum and free it."""
        grad = self.parameter.grad
        assert grad is not None
        if self.is_fused and self.parameter.grad_added_to_main_grad:  # type: ignore[attr-defined]
            self.parameter.grad_added_to_main_grad = False  # type: ignore[attr-defined]
        elif self.main_grad is None:
            self.main_grad = grad.to(self.master.dtype)
        else:
            self.main_grad.add_(grad)
        self.parameter.grad = None

    def shard_elements(self, shards: int) -> int:
        """Elements of one (the largest) shard."""
        length = self.parameter.shape[0]
        return -(-length // shards) * (self.parameter.numel() // max(length, 1))


@dataclass
class FlatSlot(Slot):
    """A parameter of which this rank has a run of elements, wherever rows begin; master and moments are 1-d.

    Somebody else reduces its gradient and updates its master weights: DeepSpeed (parallel/deepspeed.py).
    """

    shape: tuple[int, ...] = ()
    """Of this rank's whole part; the parameter itself may be empty (ZeRO-3)."""
    start: int = 0
    """First element of the run in the part, flattened."""

    @property
    def local_gradient(self) -> Tensor:
        """Nothing: by the time anybody asks, it has been added to those of other ranks."""
        return self.master.new_zeros(0)

    def boxes(self, tensor: Tensor) -> list[Box]:
        return list(boxes_of(tensor, self.start, self.shape))


def boxes_of(run: Tensor, start: int, shape: tuple[int, ...]) -> Iterator[Box]:
    """A run of elements of a tensor of ``shape``, flattened, as boxes of it: the end of a row, whole rows, a start."""
    if run.numel() == 0:
        return
    if len(shape) == 1:
        yield (start,), run
        return
    size = math.prod(shape[1:])
    row, within = divmod(start, size)
    if within > 0 or run.numel() < size:
        length = min(size - within, run.numel())
        for offset, values in boxes_of(run[:length], within, shape[1:]):
            yield (row, *offset), values.unsqueeze(0)
    else:
        length = run.numel() // size * size
        yield (row, *[0] * (len(shape) - 1)), run[:length].view(-1, *shape[1:])
    yield from boxes_of(run[length:], start + length, shape)


Bucket = list[Slot]
"""Parameters of one dtype that are reduced, and gathered, together."""


def buckets_of(slots: Sequence[Slot], elements: int) -> Iterator[Bucket]:
    """Slots of the same dtypes, last layers first (their gradients are ready first), up to a number of elements."""
    by_dtype: dict[tuple[torch.dtype, torch.dtype], Bucket] = {}
    for slot in reversed(slots):
        by_dtype.setdefault((slot.master.dtype, slot.dtype), []).append(slot)
    for same in by_dtype.values():
        bucket: Bucket = []
        for slot in same:
            bucket.append(slot)
            if sum(other.parameter.numel() for other in bucket) >= elements:
                yield bucket
                bucket = []
        if bucket:
            yield bucket


def columns_of(bucket: Bucket, flat: Tensor, shards: int) -> Iterable[tuple[Slot, Tensor]]:
    """Each parameter's part of a [shards, elements] buffer."""
    return zip(bucket, flat.split([slot.shard_elements(shards) for slot in bucket], dim=1), strict=True)


def scatter_rows(rows: Tensor, columns: Tensor) -> None:
    """[rows, ...] -> [shards, elements]: shard i's rows in row i, the end zero."""
    shards = columns.shape[0]
    if rows.shape[0] % shards == 0:
        columns.copy_(rows.reshape(shards, -1))
        return
    for part, row in zip(rows.split(-(-rows.shape[0] // shards)), columns, strict=False):
        row[: part.numel()].copy_(part.flatten())


def gather_rows(columns: Tensor, rows: Tensor) -> None:
    """The inverse of ``scatter_rows``, into ``rows``."""
    shards = columns.shape[0]
    if rows.shape[0] % shards == 0:
        rows.copy_(columns.reshape(rows.shape))
        return
    for part, row in zip(rows.split(-(-rows.shape[0] // shards)), columns, strict=False):
        part.copy_(row[: part.numel()].view_as(part))


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a DTensor; a plain tensor as it is."""
    from torch.distributed.tensor import DTensor

    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
