"""Signals that ask a run to end: noted when they come, acted upon by all ranks at the same step."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

import torch

from megatron_hc.config import TrainingConfig
from megatron_hc.mesh import Mesh
from megatron_hc.parallel.collectives import all_reduce


class StopRequest:
    """Notes --exit-signal while the context lasts, if --exit-signal-handler is given.

    A scheduler's signal reaches some ranks a step before others, and some not at all: ``agreed`` tells every rank what
    the first has heard. Readers of data forked meanwhile inherit the handler, so that the signal does not end them.
    """

    def __init__(self, config: TrainingConfig) -> None:
        self._signals = [getattr(signal, name) for name in config.exit_signal] if config.exit_signal_handler else []
        # A clock on each rank: that they run out at the same step must be agreed upon as well.
        self._asks = bool(self._signals) or config.exit_duration_in_mins is not None
        self._received = 0
        self._earlier: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            self._earlier = {number: signal.signal(number, self._note) for number in self._signals}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._earlier.items():
            signal.signal(number, handler)
        self._earlier = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._received = number

    def agreed(self, is_late: bool, mesh: Mesh) -> tuple[str | None, bool]:
        """(name of a signal that some rank has received, whether some rank is late); all ranks call together."""
        if not self._asks:
            return None, False
        found = torch.tensor([self._received, int(is_late)], dtype=torch.int32, device=mesh.device)
        number, late = all_reduce(found, mesh.group("world"), torch.distributed.ReduceOp.MAX).tolist()
        return signal.Signals(number).name if number else None, bool(late)
