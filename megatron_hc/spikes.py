"""--check-for-spiky-loss: an iteration far above the ones before it is named, with its samples."""

from __future__ import annotations

import math
from collections import deque
from typing import Any

from megatron_hc.config import TrainingConfig

WINDOW = 100


class SpikeWatch:
    """Compares each loss and gradient norm with the largest of the last 100 iterations that were no spikes themselves.

    Says nothing before it has seen ten. A spike is warned of and training goes on, as in Megatron-LM; to leave the
    iteration out, resume from before it with --iterations-to-skip.
    """

    def __init__(self, config: TrainingConfig) -> None:
        self.is_on, self.factor = config.check_for_spiky_loss, config.spiky_loss_factor
        self._seen: dict[str, deque[float]] = {name: deque(maxlen=WINDOW) for name in ("loss", "gradient norm")}

    def warnings(self, loss: float, grad_norm: float, iteration: int, samples: list[int]) -> list[str]:
        """What there is to warn of at an iteration; then its values belong to the past. ``samples``: rank 0's."""
        return [
            f"WARNING: spike at iteration {iteration}: {spike}; rank 0 has samples {samples[0]} .. {samples[-1]}. To "
            f"leave it out, resume from before it with --iterations-to-skip {iteration}"
            for spike in self._spikes(loss, grad_norm)
        ]

    def _spikes(self, loss: float, grad_norm: float) -> list[str]:
        if not self.is_on:
            return []
        found = []
        for name, value in (("loss", loss), ("gradient norm", grad_norm)):
            seen = self._seen[name]
            largest = max(seen, default=math.inf)
            if len(seen) >= 10 and not abs(value) <= self.factor * largest:
                found.append(f"{name} {value:.6g} is above {self.factor:g} x {largest:.6g}")
            elif math.isfinite(value):
                seen.append(abs(value))
        return found

    def state(self) -> dict[str, Any]:
        return {name: list(values) for name, values in self._seen.items()}

    def restore(self, state: dict[str, Any]) -> None:
        for name, values in self._seen.items():
            values.extend(state.get(name, []))
