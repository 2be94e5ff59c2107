"""Micro-batches in Megatron-LM's order, from worker processes, resumable at any number of consumed samples.

B = samples of a micro-batch, S = tokens of a sample.
"""

from __future__ import annotations

import atexit
import multiprocessing
import signal
import weakref
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from megatron_hc.data.dataset import Sample, SampleDataset
from megatron_hc.mesh import Mesh


class Batch(NamedTuple):
    """One micro-batch; every tensor is [B, S]."""

    tokens: Tensor
    """int64: what the model reads."""
    labels: Tensor
    """int64: the next token at each position."""
    loss_mask: Tensor
    """float32: 1 where the loss counts."""
    position_ids: Tensor
    """int64."""
    document_ids: Tensor | None
    """int64: number of the document within its sample; None unless documents must not see each other."""

    def to(self, device: str | torch.device) -> Batch:
        """The batch on ``device``; asynchronous from pinned memory."""
        return Batch(*(None if part is None else part.to(device, non_blocking=True) for part in self))  # type: ignore[arg-type]


def collate(samples: list[Sample]) -> Batch:
    """Samples [S] stacked to a micro-batch [B, S]."""
    columns = zip(*samples, strict=True)
    return Batch(*(None if column[0] is None else torch.from_numpy(np.stack(column)) for column in columns))  # type: ignore[arg-type]


class SequentialOrder:
    """Which samples each micro-batch of one data-parallel rank holds.

    Samples are taken in order: micro-batch m covers ``micro_batch_size * ranks`` consecutive samples from
    ``consumed_samples`` on, of which rank r has the r-th ``micro_batch_size``. A last piece that does not fill all
    ranks is left out. With ``cyclic`` the samples start again from 0 and never end.
    """

    def __init__(
        self,
        num_samples: int,
        consumed_samples: int,
        micro_batch_size: int,
        rank: int,
        ranks: int,
        cyclic: bool = False,
    ) -> None:
        self.num_samples = num_samples
        self.consumed_samples = consumed_samples
        self.micro_batch_size = micro_batch_size
        self.rank = rank
        self.stride = micro_batch_size * ranks
        self.cyclic = cyclic

    def samples(self, step: int) -> list[int] | None:
        """Samples of micro-batch ``step``; None past the end."""
        start = self.consumed_samples + step * self.stride
        if not self.cyclic and start + self.stride > self.num_samples:
            return None
        start += self.rank * self.micro_batch_size
        return [index % self.num_samples for index in range(start, start + self.micro_batch_size)]

    def __iter__(self) -> Iterator[list[int]]:
        step = 0
        while (samples := self.samples(step)) is not None:
            yield samples
            step += 1


class _Refused(NamedTuple):
    """A ``ValueError`` on its way from a worker: raised there it would arrive as a traceback in a message."""

    message: str


class _MicroBatches:
    """A dataset whose index is a list of samples and whose element is a whole micro-batch."""

    def __init__(self, dataset: SampleDataset) -> None:
        self.dataset = dataset

    def __getitem__(self, samples: list[int]) -> Batch | _Refused:
        try:
            return collate([self.dataset[index] for index in samples])
        except ValueError as error:
            return _Refused(str(error))


def _as_it_is(batch: Any) -> Any:
    return batch


def _prepare_worker(worker: int) -> None:
    # Ctrl-C and a scheduler's first SIGTERM reach the whole process group: the training process decides what happens,
    # and it may still be saving. A second SIGTERM (torch's and multiprocessing's own way to end a worker) counts.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: signal.signal(signal.SIGTERM, signal.SIG_DFL))


class Loader:
    """Hands out micro-batches, on ``device``. The same ones, bit for bit, for every number of workers."""

    def __init__(
        self, dataset: SampleDataset, order: SequentialOrder, num_workers: int = 0, device: str = "cpu"
    ) -> None:
        self.last_samples: list[int] = []
        """Samples (positions in the order of the run) of this rank's micro-batches most recently handed out."""
        self._order = order
        self._device = device
        self._step = 0
        self._iterator: Iterator[Batch | _Refused] | None = None
        fork = num_workers > 0 and "fork" in multiprocessing.get_all_start_methods()
        self._data: DataLoader[Any] = DataLoader(
            _MicroBatches(dataset),  # type: ignore[arg-type]
            batch_size=None,
            sampler=order,
            num_workers=num_workers,
            collate_fn=_as_it_is,
            pin_memory=device.startswith("cuda"),
            worker_init_fn=_prepare_worker,
            # Its own: every new iterator draws a seed, and from torch's generator that would move dropout on a resume.
            generator=torch.Generator(),
            # Workers only read memory maps: forked they start in milliseconds and share the maps.
            multiprocessing_context="fork" if fork else None,
        )

    def next(self, num_micro_batches: int) -> list[Batch]:
        """The next micro-batches of this rank; ``ValueError`` where the data ends before them or holds a bad token."""
        if self._iterator is None:
            self._iterator = iter(self._data)
            if self._data.num_workers > 0:
                # Registered after torch's own exit handlers and so run before them, which would wait for idle workers.
                atexit.register(_close, weakref.ref(self))
        batches = []
        self.last_samples = []
        for _ in range(num_micro_batches):
            samples = self._order.samples(self._step)
            if samples is None:
                raise ValueError(
                    f"the data ends after {self._order.num_samples} samples, and a micro-batch from sample "
                    f"{self._order.consumed_samples + self._step * self._order.stride} on is asked for: "
                    "give more data or a shorter run"
                )
            self.last_samples += samples
            batch = next(self._iterator)
            if isinstance(batch, _Refused):
                raise ValueError(f"{batch.message} (in samples {samples[0]} .. {samples[-1]})")
            batches.append(batch.to(self._device))
            self._step += 1
        return batches

    def close(self) -> None:
        """End the workers. Also happens when the loader is garbage-collected and when the process exits."""
        self._iterator = None


def _close(reference: weakref.ref[Loader]) -> None:
    loader = reference()
    if loader is not None:
        loader.close()


def build_loader(
    dataset: SampleDataset,
    mesh: Mesh,
    *,
    micro_batch_size: int,
    consumed_samples: int = 0,
    num_workers: int = 0,
    cyclic: bool = False,
) -> Loader:
    """The loader of this process: its data-parallel rank's micro-batches after ``consumed_samples`` of all ranks."""
    order = SequentialOrder(
        len(dataset), consumed_samples, micro_batch_size, mesh.rank("dp"), mesh.size("dp"), cyclic=cyclic
    )
    return Loader(dataset, order, num_workers=num_workers, device=mesh.device)
