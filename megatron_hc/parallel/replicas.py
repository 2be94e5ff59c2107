"""Checks across ranks: that replicas hold the same weights, and who brought a number that is not finite."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_hc.mesh import Mesh
from megatron_hc.parallel.collectives import Group, all_gather, all_reduce, group_size
from megatron_hc.parallel.slots import Sharding, Slot


def differing_weights(slots: Sequence[Slot], sharding: Sharding, mesh: Mesh) -> str | None:
    """Where data-parallel replicas hold other weights, in words, the same on every rank; None: nowhere.

    Compares a hash of every local parameter over the ranks that hold copies of it. All ranks call together.
    """
    experts = [slot for slot in slots if slot.placement.is_expert and not slot.is_fully_sharded]
    plain = [slot for slot in slots if not slot.placement.is_expert and not slot.is_fully_sharded]
    sharded = [slot for slot in slots if not slot.placement.is_expert and slot.is_fully_sharded]
    checks = ((plain, mesh.group("dp_cp")), (experts, mesh.group("edp")), (sharded, sharding.replicas))
    messages = [_differing(part, group, mesh) for part, group in checks]
    found = next((message for message in messages if message is not None), None)
    is_bad = torch.tensor([found is not None], dtype=torch.int32, device=mesh.device)
    if not int(all_reduce(is_bad, mesh.group("world"))):
        return None
    return next(message for message in gather_objects(found, mesh) if message is not None)


def _differing(slots: Sequence[Slot], group: Group, mesh: Mesh) -> str | None:
    """The first parameter that is not the same on all ranks of ``group``, with the ranks."""
    if group is None or not slots:
        return None
    own = torch.tensor([_digest(slot.own_rows if slot.is_fully_sharded else slot.parameter) for slot in slots])
    digests = all_gather(own.unsqueeze(0).to(mesh.device), group).cpu()  # [ranks, parameters]
    differs = (digests != digests[0]).any(dim=0).nonzero().flatten().tolist()
    if not differs:
        return None
    ranks, column = dist.get_process_group_ranks(group), digests[:, differs[0]].tolist()
    usual, _ = Counter(column).most_common(1)[0]
    same = ", ".join(str(rank) for rank, digest in zip(ranks, column, strict=True) if digest == usual)
    other = ", ".join(str(rank) for rank, digest in zip(ranks, column, strict=True) if digest != usual)
    more = f" (and {len(differs) - 1} more)" if len(differs) > 1 else ""
    return f"{slots[differs[0]].name}{more} is not on rank {other} what it is on rank {same}"


def _digest(tensor: Tensor) -> int:
    data = tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little", signed=True)


def samples_not_finite(
    losses: Tensor, slots: Sequence[Slot], samples: Sequence[int], mesh: Mesh
) -> dict[int, list[int]]:
    """World rank -> its samples, for the ranks whose own loss or gradient is not finite; all ranks call together.

    losses: this rank's, [micro-batches]; samples: of its micro-batches, one after the other. Where all losses are
    finite and a gradient is not, any of the rank's micro-batches may be the cause. Ranks with the same samples (tensor
    and context parallelism) are named once. Empty where no rank's own numbers say it: FSDP2 has added them up by then.
    """
    # A loss of other tokens of the samples: attention's backward pass has brought it here.
    losses = all_reduce(losses.clone(), mesh.group("cp"))
    bad = (~losses.isfinite()).nonzero().flatten().tolist()
    if not bad and not all(bool(slot.local_gradient.isfinite().all()) for slot in slots if not slot.is_fully_sharded):
        bad = list(range(len(losses)))
    size = len(samples) // max(len(losses), 1)
    own = [sample for index in bad for sample in samples[index * size : (index + 1) * size]]
    found: dict[int, list[int]] = {}
    for rank, theirs in enumerate(gather_objects(own, mesh)):
        if theirs and theirs not in found.values():
            found[rank] = theirs
    return found


def gather_objects(value: Any, mesh: Mesh) -> list[Any]:
    """Every rank's value, by world rank."""
    group = mesh.group("world")
    if group is None:
        return [value]
    values: list[Any] = [None] * group_size(group)
    dist.all_gather_object(values, value, group=group)
    return values
