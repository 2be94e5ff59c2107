"""Updated parameters back to all data-parallel ranks: bucket by bucket, hidden behind the next forward if so wished."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from megatron_hc.parallel.collectives import start_all_gather
from megatron_hc.parallel.slots import Bucket, Sharding, columns_of, gather_rows


class ParameterGatherer:
    """All-gathers the ranks' rows of every parameter after a step.

    With ``overlap`` the gathers are only started, first layers first, and each module of ``users`` waits for those of
    its own parameters when its forward is called. ``wait_outside`` waits for parameters of no such module, ``wait`` for
    all. Whoever reads parameters in another way calls it first.
    """

    def __init__(
        self, buckets: Sequence[Bucket], sharding: Sharding, overlap: bool, users: Iterable[nn.Module]
    ) -> None:
        self.buckets, self.sharding = buckets, sharding
        self.overlap = overlap and sharding.group is not None
        self._pending: dict[int, tuple[Tensor, Any]] = {}
        self._outside = list(range(len(buckets)))
        if not self.overlap:
            return
        bucket_of = {id(slot.parameter): index for index, bucket in enumerate(buckets) for slot in bucket}
        inside: set[int] = set()
        for module in users:
            parameters = [id(parameter) for parameter in module.parameters() if id(parameter) in bucket_of]
            inside.update(parameters)
            module.register_forward_pre_hook(self._hook(sorted({bucket_of[key] for key in parameters})))
        self._outside = sorted({index for key, index in bucket_of.items() if key not in inside})

    def _hook(self, indices: list[int]) -> Any:
        @torch.compiler.disable  # every layer's would be code of its own, and end at the wait
        def before(module: nn.Module, arguments: Any) -> None:
            self.wait(indices)

        return before

    @torch.no_grad()
    def start(self) -> None:
        """Gather the parameters, whose own rows are up to date."""
        if self.sharding.group is None:
            return
        assert not self._pending, "the last step's parameters were never waited for"
        for index in reversed(range(len(self.buckets))):
            self._pending[index] = self._start(self.buckets[index])
            if not self.overlap:
                self.wait([index])

    def _start(self, bucket: Bucket) -> tuple[Tensor, Any]:
        shards = self.sharding.shards
        flat = bucket[0].parameter.new_zeros((1, sum(slot.shard_elements(shards) for slot in bucket)))
        for slot, columns in columns_of(bucket, flat, shards):
            own = slot.own_rows
            columns[0, : own.numel()].copy_(own.flatten())
        return start_all_gather(flat, self.sharding.group)

    def wait_outside(self) -> None:
        """Have the parameters that no module waits for itself."""
        self.wait(self._outside)

    @torch.no_grad()
    def wait(self, indices: Iterable[int] | None = None) -> None:
        """Have the parameters of some buckets; None: of all."""
        for index in list(self._pending) if indices is None else indices:
            if index in self._pending:
                everyone, work = self._pending.pop(index)
                if work is not None:
                    work.wait()
                for slot, columns in columns_of(self.buckets[index], everyone, self.sharding.shards):
                    gather_rows(columns, slot.parameter)
