"""Small files for whoever watches a run from outside: a heartbeat, and metrics for Prometheus's node exporter."""

from __future__ import annotations

import json
import math
import os
import socket
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any


def replace_text(path: Path, text: str) -> None:
    """Give a file new content so that no reader sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f"{path.name}.tmp")
    beside.write_text(text, encoding="utf-8")
    os.replace(beside, path)


class Heartbeat:
    """--heartbeat-file: one JSON object with iteration, time (seconds since 1970), what is going on, host and process.

    Written after an iteration, at most once in ``every_s`` seconds, and whenever something else than training begins or
    ends. A file that stays old while it says "training" is of a run that hangs or has died.
    """

    def __init__(self, path: str, every_s: float = 1.0, clock: Callable[[], float] = time.monotonic) -> None:
        self.path, self._every_s, self._clock = Path(path), every_s, clock
        self._last = -math.inf
        self._state = ""

    def beat(self, iteration: int, state: str) -> None:
        now = self._clock()
        if state == self._state and now - self._last < self._every_s:
            return
        self._last, self._state = now, state
        content = {
            "iteration": iteration,
            "time": round(time.time(), 3),
            "state": state,
            "host": socket.gethostname(),
            "pid": os.getpid(),
        }
        replace_text(self.path, json.dumps(content) + "\n")


class Prometheus:
    """--prometheus-file: every number of the last records as a gauge ``megatron_hc_NAME``, replaced at every record."""

    def __init__(self, path: str) -> None:
        self.path = Path(path)
        self._values: dict[str, float] = {}

    def write(self, record: Mapping[str, Any]) -> None:
        numbers = {key: value for key, value in record.items() if isinstance(value, int | float)}
        self._values |= {_metric(key): float(value) for key, value in numbers.items()}
        lines = []
        for name, value in sorted(self._values.items()):
            lines += [f"# TYPE {name} gauge", f"{name} {_number(value)}"]
        replace_text(self.path, "\n".join(lines) + "\n")

    def close(self) -> None:
        pass


def _metric(key: str) -> str:
    """A name of letters, digits and underscores; ``_`` for what Prometheus does not take."""
    return "megatron_hc_" + "".join(letter if letter.isascii() and letter.isalnum() else "_" for letter in key)


def _number(value: float) -> str:
    if math.isnan(value):
        return "NaN"
    return repr(value) if math.isfinite(value) else "+Inf" if value > 0 else "-Inf"
