"""Figures of tools/benchmark.py: kept as they come, written to a file, drawn."""

from __future__ import annotations

import gc
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch

Result = TypeVar("Result")


class Report:
    """Figures of a run. The file is written after each of them, so that a run that is cut off keeps what it has."""

    def __init__(self, head: dict[str, Any], path: str | None) -> None:
        self.figures, self.path = {**head}, path
        self.errors: dict[str, str] = {}

    def attempt(self, name: str, measure: Callable[[], Result]) -> Result | None:
        """``measure()``; None if it fails: that goes into the file and on the screen, and the run goes on."""
        try:
            return measure()
        except Exception as error:
            self.errors[name] = " ".join(f"{type(error).__name__}: {error}".split())[:500]
        # The exception is gone, and with it the frames that held what had been measured.
        release_memory()
        print(f"{name:28s} failed: {self.errors[name]}", flush=True)
        self.figures["errors"] = self.errors
        self.save()
        return None

    def add(self, part: str, row: dict[str, Any], name: str | None = None) -> None:
        """A row of a list, or the entry ``name`` of a table."""
        if name is None:
            self.figures.setdefault(part, []).append(row)
        else:
            self.figures.setdefault(part, {})[name] = row
        self.save()

    def save(self) -> None:
        if self.path is not None:
            beside = Path(f"{self.path}.tmp")
            beside.write_text(json.dumps(self.figures, indent=1))
            beside.replace(self.path)


def release_memory() -> None:
    """Give what is no longer held back to the device."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def plot(figures: dict[str, Any], path: str) -> None:
    """Ratios of steps, and time of a boundary over d and n."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(16, 5))
    table = figures.get("steps", {})
    for offset, key in ((0.2, "step_time_ratio"), (-0.2, "peak_memory_ratio")):
        values = [row[key] for row in table.values()]
        axes[0].barh([i + offset for i in range(len(table))], values, height=0.4, label=key)
    axes[0].set_yticks(range(len(table)), list(table))
    axes[0].axvline(1.0, color="black", linewidth=0.8)
    axes[0].legend()
    rows = [*figures.get("kernels", []), *figures.get("curves", [])]
    for axis, over, fixed in ((axes[1], "d", "n"), (axes[2], "n", "d")):
        for method in dict.fromkeys(row["method"] for row in rows):
            own = [row for row in rows if row["method"] == method]
            chosen, _ = Counter(row[fixed] for row in own).most_common(1)[0]
            points = sorted((row for row in own if row[fixed] == chosen), key=lambda row: row[over])
            seconds = [1e9 * (row["forward_seconds"] + row["backward_seconds"]) / row["tokens"] for row in points]
            axis.plot([row[over] for row in points], seconds, marker="o", label=f"{method} ({fixed} {chosen})")
        axis.set_xlabel(over)
        axis.set_ylabel("ns per token and boundary")
        axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
