"""Draw the loss curves of one or several runs, in the terminal or into a picture.

    python tools/plot_loss.py run/metrics.jsonl                              # in the terminal
    python tools/plot_loss.py a.jsonl b.log --labels plain hyper --output loss.png --smooth 10

A run is a file of --metrics-jsonl, or a console log (ours or Megatron-LM's). Validations are drawn as points.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import re
import shutil
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_hc.cli import exit_on_user_error
from megatron_hc.outputs import replace_file

Points = list[tuple[float, float]]

AXES = {"iteration": "iteration", "samples": "consumed_samples", "tokens": "consumed_tokens"}

CONSOLE = {
    "consumed samples": "consumed_samples",
    "elapsed time per iteration (ms)": "milliseconds_per_iteration",
    "throughput per GPU (TFLOP/s/GPU)": "tflops",
    "learning rate": "learning_rate",
    "global batch size": "global_batch_size",
    "lm loss": "lm_loss",
    "grad norm": "grad_norm",
    "params norm": "params_norm",
    "tokens per second": "tokens_per_second",
}
"""Name in a console line -> key of a record."""


@dataclass(frozen=True)
class Run:
    """One curve."""

    label: str
    curve: Points
    validation: Points


# Reading


def read_records(file: Path) -> list[dict[str, float]]:
    """The records of a metrics file or a console log; of an iteration that occurs twice, the later one."""
    try:
        lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        raise ValueError(f"{file} cannot be read: {error.strerror}") from error
    found: dict[tuple[float, bool], dict[str, float]] = {}
    for line in lines:
        record = _from_json(line) if line.startswith("{") else _from_console(line)
        if "iteration" in record:
            is_validation = any("_validation" in key or "_test" in key for key in record)
            found.setdefault((record["iteration"], is_validation), {}).update(record)
    for (iteration, is_validation), record in found.items():
        if is_validation:  # what a validation's line does not say stands in that of training
            trained = found.get((iteration, False), {})
            record |= {axis: trained[axis] for axis in AXES.values() if axis in trained and axis not in record}
    return [found[key] for key in sorted(found)]


def _from_json(line: str) -> dict[str, float]:
    try:
        record = json.loads(line)
    except ValueError:
        return {}
    return {key: value for key, value in record.items() if isinstance(value, int | float)}


def _from_console(line: str) -> dict[str, float]:
    validation = re.search(r"validation loss at iteration (\d+)(?: on (\w+) set)? *\|.*?lm loss value: (\S+)", line)
    if validation:
        number, split, loss = validation.groups()
        return {"iteration": float(number)} | _number(f"lm_loss_{split or 'validation'}", loss)
    iteration = re.search(r"\biteration +(\d+)/ *\d+ \|", line)
    if not iteration:
        return {}
    record = {"iteration": float(iteration.group(1))}
    for field in line.split("|"):
        name, _, value = field.strip().rpartition(": ")
        if name in CONSOLE:
            record |= _number(CONSOLE[name], value)
    return record


def _number(key: str, text: str) -> dict[str, float]:
    """{key: number}; nothing for what is none: a log that is cut off, or to which two processes write at once."""
    try:
        return {key: float(text)}
    except ValueError:
        return {}


def load(file: Path, label: str, metric: str, axis: str, smooth: int) -> Run:
    """Read one run; ``ValueError`` names the metrics that the file has where it has no ``metric``."""
    records = read_records(file)
    curve = _points(records, metric, axis)
    validation = _points(records, f"{metric}_validation", axis)
    if not curve and not validation:
        known = sorted({key for record in records for key in record if _points(records, key, axis)} - {*AXES.values()})
        has = f"it has {', '.join(known)}" if known else "it holds no lines of metrics (--metrics-jsonl or console)"
        raise ValueError(f"{file} has no points of {metric} against {axis}: {has}")
    return Run(label, smoothed(curve, smooth), validation)


def _points(records: Iterable[dict[str, float]], metric: str, axis: str) -> Points:
    pairs = ((record.get(AXES[axis]), record.get(metric)) for record in records)
    return [(float(x), float(y)) for x, y in pairs if x is not None and y is not None and math.isfinite(y)]


def smoothed(points: Points, width: int) -> Points:
    """Each point's mean with the ``width`` - 1 points before it."""
    values = [y for _, y in points]
    windows = (values[max(0, i + 1 - width) : i + 1] for i in range(len(values)))
    return [(x, sum(window) / len(window)) for (x, _), window in zip(points, windows, strict=True)]


# Terminal


class Canvas:
    """A grid of characters of 2 x 4 dots each (braille), or of one marker each."""

    def __init__(self, columns: int, rows: int, braille: bool) -> None:
        self.braille, self.columns, self.rows = braille, columns, rows
        self.wide, self.high = (2, 4) if braille else (1, 1)
        self.cells: dict[tuple[int, int], tuple[int, int]] = {}  # (column, row) -> (braille bits, run)
        self.markers: dict[tuple[int, int], tuple[str, int]] = {}

    def dot(self, x: float, y: float, run: int) -> None:
        """Set the dot at x, y in [0, 1], y upwards."""
        across = min(int(x * self.columns * self.wide), self.columns * self.wide - 1)
        down = min(int((1 - y) * self.rows * self.high), self.rows * self.high - 1)
        cell = (across // self.wide, down // self.high)
        bit = ((0x01, 0x02, 0x04, 0x40), (0x08, 0x10, 0x20, 0x80))[across % self.wide][down % self.high]
        self.cells[cell] = (self.cells.get(cell, (0, run))[0] | bit, run)

    def line(self, start: tuple[float, float], end: tuple[float, float], run: int) -> None:
        dots = max(abs(end[0] - start[0]) * self.columns * self.wide, abs(end[1] - start[1]) * self.rows * self.high)
        count = max(1, math.ceil(2 * dots))  # two samples a dot, so that rounding leaves no gap
        for i in range(count + 1):
            share = i / count
            self.dot(start[0] + share * (end[0] - start[0]), start[1] + share * (end[1] - start[1]), run)

    def mark(self, x: float, y: float, run: int, marker: str) -> None:
        column, row = int(x * self.columns), int((1 - y) * self.rows)
        self.markers[min(column, self.columns - 1), min(row, self.rows - 1)] = (marker, run)

    def text(self, row: int, symbols: Sequence[str], colour: bool) -> str:
        out = []
        for column in range(self.columns):
            mark, cell = self.markers.get((column, row)), self.cells.get((column, row))
            if mark is None and cell is None:
                out.append(" ")
                continue
            run = mark[1] if mark is not None else cell[1] if cell is not None else 0
            body = mark[0] if mark is not None else chr(0x2800 + cell[0]) if cell and self.braille else symbols[run]
            out.append(_coloured(body, run) if colour else body)
        return "".join(out)


def _coloured(text: str, run: int) -> str:
    return f"\x1b[{(36, 33, 35, 32, 31, 34)[run % 6]}m{text}\x1b[0m"


def chart(runs: Sequence[Run], metric: str, axis: str, width: int, *, unicode: bool, colour: bool) -> str:
    """The runs as lines of text of at most ``width`` columns.

    One run, or several in colour, are drawn with braille dots; several without colour with one letter per run.
    """
    every = [point for run in runs for point in run.curve + run.validation]
    left, right = min(x for x, _ in every), max(x for x, _ in every)
    low, high = min(y for _, y in every), max(y for _, y in every)
    room = (high - low) * 0.03 or abs(high) * 0.1 or 1.0
    low, high = low - room, high + room
    rows, ticks = 17, 5
    digits = ".2e" if abs(high) < 0.01 else f".{min(max(2 - math.floor(math.log10(high - low)), 0), 5)}f"
    every_tick = range(0, rows, (rows - 1) // (ticks - 1))
    labels = {row: f"{high - (high - low) * row / (rows - 1):{digits}}" for row in every_tick}
    margin = max(map(len, labels.values()))
    canvas = Canvas(max(20, width - margin - 3), rows, braille=unicode and (len(runs) == 1 or colour))
    symbols = ["*"] if len(runs) == 1 else [chr(ord("a") + i % 26) for i in range(len(runs))]
    point = "◆" if unicode else "#"

    def place(x: float, y: float) -> tuple[float, float]:
        return (x - left) / ((right - left) or 1.0), (y - low) / (high - low)

    for number, run in enumerate(runs):
        for start, end in itertools.pairwise(run.curve[:1] + run.curve):
            canvas.line(place(*start), place(*end), number)
    for number, run in enumerate(runs):
        for x, y in run.validation:
            canvas.mark(*place(x, y), number, point)
    tick, bar, corner, rule = ("┤", "│", "└", "─") if unicode else ("+", "|", "+", "-")
    lines = [f"{'':{margin}}  {metric.replace('_', ' ')}"]
    for row in range(rows):
        edge = tick if row in labels else bar
        lines.append(f"{labels.get(row, ''):>{margin}} {edge}{canvas.text(row, symbols, colour)}".rstrip())
    lines.append(f"{'':{margin}} {corner}{rule * canvas.columns}")
    ends = f"{left:.10g}", f"{right:.10g}"
    middle = axis.center(canvas.columns - len(ends[0]) - len(ends[1]))
    lines += [f"{'':{margin}}  {ends[0]}{middle}{ends[1]}", *_legend(runs, symbols, canvas, point, colour)]
    return "\n".join(lines)


def _legend(runs: Sequence[Run], symbols: Sequence[str], canvas: Canvas, point: str, colour: bool) -> list[str]:
    lines = []
    wide = max(len(run.label) for run in runs)
    for number, run in enumerate(runs):
        sign = "⣿" if canvas.braille else symbols[number]
        text = f"{_coloured(sign, number) if colour else sign} {run.label:<{wide}}"
        if run.curve:
            text += f"  last {run.curve[-1][1]:.4g}, lowest {min(y for _, y in run.curve):.4g}"
        if run.validation:
            text += f"   {point} validation: last {run.validation[-1][1]:.4g}"
            text += f", lowest {min(y for _, y in run.validation):.4g}"
        lines.append(f"  {text}")
    return lines


# Picture


def draw(runs: Sequence[Run], metric: str, axis: str, output: Path) -> None:
    """Write a picture; its format follows from the name (.png, .svg, .pdf)."""
    try:
        import matplotlib
    except ImportError as error:
        raise ValueError("--output needs the matplotlib package: pip install 'megatron_hc[log]'") from error
    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    if output.suffix.lstrip(".") not in figure.canvas.get_supported_filetypes():
        raise ValueError(f"--output {output}: a picture's name ends in .png, .svg or .pdf")
    for number, run in enumerate(runs):
        axes.plot(*zip(*run.curve, strict=True) if run.curve else ((), ()), color=f"C{number}", label=run.label, lw=1.2)
        if run.validation:
            label = f"{run.label}, validation"
            axes.plot(*zip(*run.validation, strict=True), "o", color=f"C{number}", ms=4, mec="black", label=label)
    axes.set(xlabel=axis, ylabel=metric.replace("_", " "))
    axes.grid(alpha=0.3)
    axes.legend()
    replace_file(output, lambda beside: figure.savefig(beside, format=output.suffix.lstrip("."), dpi=150))


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="plot_loss.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="FILE", help="metrics file or console log, one per run")
    parser.add_argument("--labels", nargs="+", help="one name per run (default: the file's name)")
    parser.add_argument("--metric", default="lm_loss", help="what to draw: a key of the metrics file [lm_loss]")
    parser.add_argument("--against", choices=AXES, default="iteration", help="horizontal axis [iteration]")
    parser.add_argument("--smooth", type=int, default=1, help="mean over this many points [1]")
    parser.add_argument("--output", type=Path, help="picture to write: .png, .svg or .pdf (needs matplotlib)")
    parser.add_argument("--ascii", action="store_true", help="draw in the terminal (the default without --output)")
    options = parser.parse_args(argv)
    with exit_on_user_error("plot_loss.py"):
        labels = options.labels or _names(options.runs)
        if len(labels) != len(options.runs):
            raise ValueError(f"--labels has {len(labels)} names for {len(options.runs)} runs: give one for each")
        if options.smooth < 1:
            raise ValueError(f"--smooth must be at least 1, not {options.smooth}")
        pairs = zip(options.runs, labels, strict=True)
        runs = [load(file, label, options.metric, options.against, options.smooth) for file, label in pairs]
        if options.output is not None:
            draw(runs, options.metric, options.against, options.output)
            print(f"wrote {options.output}")
        if options.ascii or options.output is None:
            unicode = (sys.stdout.encoding or "").lower().startswith("utf")
            width = min(shutil.get_terminal_size((100, 24)).columns, 120)
            colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
            print(chart(runs, options.metric, options.against, width, unicode=unicode, colour=colour))


def _names(files: Sequence[Path]) -> list[str]:
    """The files' names; their folders' too, where names repeat."""
    names = [file.stem for file in files]
    return names if len(set(names)) == len(names) else [str(file.with_suffix("")) for file in files]


if __name__ == "__main__":
    main(sys.argv[1:])
