"""Files for watchers: heartbeat and Prometheus, and files of numbers on a disk that is full for a while."""

from __future__ import annotations

import json
import os
import re
import time
from pathlib import Path

import pytest

from megatron_hc.log_files import Heartbeat, Prometheus
from megatron_hc.log_sinks import JsonLines


def test_heartbeat_once_a_second_and_at_every_change(tmp_path: Path) -> None:
    now = 0.0
    path = tmp_path / "new" / "heartbeat.json"
    heart = Heartbeat(str(path), clock=lambda: now)
    seen = []
    for now, iteration, state in [  # noqa: B007
        *((0.0, 1, "training"), (0.5, 2, "training"), (1.2, 3, "training"), (1.3, 3, "saving"), (1.4, 3, "training")),
        *((1.5, 4, "training"), (1.6, 4, "ended")),
    ]:
        heart.beat(iteration, state)
        content = json.loads(path.read_text())
        seen.append((content["iteration"], content["state"]))
        assert abs(content["time"] - time.time()) < 60 and content["pid"] == os.getpid() and content["host"]
    training = "training"
    assert seen == [
        (1, training),
        (1, training),
        (3, training),
        (3, "saving"),
        (3, training),
        (3, training),
        (4, "ended"),
    ]


def test_prometheus_text_format(tmp_path: Path) -> None:
    path = tmp_path / "run.prom"
    sink = Prometheus(str(path))
    sink.write(
        {"iteration": 5, "lm_loss": 2.5, "num_zeros": None, "moe/z_loss_layer_1": 1e-7, "grad_norm": float("inf")}
    )
    sink.write({"iteration": 6, "lm_loss_validation": float("nan")})
    lines = path.read_text().splitlines()
    values = dict(line.split(" ") for line in lines if not line.startswith("#"))
    assert values == {
        "megatron_hc_iteration": "6.0",
        "megatron_hc_lm_loss": "2.5",
        "megatron_hc_moe_z_loss_layer_1": "1e-07",
        "megatron_hc_grad_norm": "+Inf",
        "megatron_hc_lm_loss_validation": "NaN",
    }
    for line in lines:  # the grammar of the exposition format
        assert re.fullmatch(
            r"# TYPE [a-zA-Z_][a-zA-Z0-9_]* gauge|[a-zA-Z_][a-zA-Z0-9_]* ([-+]?[0-9.e+-]+|NaN|[+-]Inf)", line
        )
    assert path.read_text().endswith("\n") and list(tmp_path.iterdir()) == [path]


class FullDisk:
    """A file of a disk with room for ``room`` bytes."""

    def __init__(self, file: object, room: int) -> None:
        self.file, self.room = file, room

    def write(self, data: bytes) -> int:
        if self.room == 0:
            raise OSError(28, "No space left on device")
        taken = self.file.write(data[: self.room])  # type: ignore[attr-defined]
        self.room -= taken
        return taken

    def close(self) -> None:
        self.file.close()  # type: ignore[attr-defined]


def test_lines_wait_for_room(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    sink = JsonLines(path, 0)
    sink.write({"iteration": 1, "lm_loss": 1.0})
    disk = FullDisk(sink._file, room=10)
    sink._file = disk  # type: ignore[assignment]
    for iteration in (2, 3):
        with pytest.raises(OSError, match="No space left on device: .*metrics.jsonl"):
            sink.write({"iteration": iteration, "lm_loss": 1.0})
    disk.room = 1000
    sink.write({"iteration": 4, "lm_loss": 1.0})
    sink.close()
    assert [json.loads(line)["iteration"] for line in path.read_text().splitlines()] == [1, 2, 3, 4]
