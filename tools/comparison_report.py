"""What a comparison of residual paths found: statistics over seeds, CSV files, a page and a picture.

Used by ``compare_residuals.py``. Differences are paired: a seed gives every method the same data in the same order and
the same initial weights of what all methods have, so a method is compared with the first one seed by seed.
"""

from __future__ import annotations

import csv
import html
import io
import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import compare_runs

from megatron_hc.outputs import replace_file

Points = list[tuple[float, float]]

T_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
         2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052,
         2.048, 2.045, 2.042)  # fmt: skip
"""97.5 % quantiles of Student's t distribution for 1, 2, ... 30 degrees of freedom."""

WINDOW, SPIKE = 50, 6.0


@dataclass(frozen=True)
class Result:
    """One run."""

    name: str
    lr: float
    seed: int
    diverged: bool
    curve: Points
    """(tokens, training loss)"""
    validation: Points
    seconds: float
    """Median time of a logged iteration."""
    memory_bytes: float
    largest_grad_norm: float
    """After the first tenth of the run."""
    spikes: int

    @property
    def final_loss(self) -> float:
        return self.validation[-1][1] if self.validation and not self.diverged else math.nan


@dataclass(frozen=True)
class Summary:
    """One method at its learning rate, over seeds."""

    name: str
    lr: float
    num_runs: int
    num_diverged: int
    mean: float
    standard_error: float
    difference: float
    """To the first method, paired by seed; 0 for itself."""
    low: float
    high: float
    """95 % confidence interval of the difference (Student's t); nan with one seed."""
    tokens_ratio: float
    """Tokens until the validation loss is the first method's last one, over that one's tokens; mean of seeds that get
    there."""
    num_reached: int
    time_ratio: float
    memory_ratio: float
    largest_grad_norm: float
    spikes: int
    num_parameters: int

    @property
    def is_noise(self) -> bool:
        """Whether the interval holds 0, or there is none."""
        return not (self.low > 0 or self.high < 0)


# Statistics


def read_result(folder: Path, name: str, lr: float, seed: int, diverged: bool) -> Result:
    """A run from its metrics; of an iteration that occurs twice, the later record."""
    file = folder / "metrics.jsonl"
    try:
        records = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} cannot be read: {error}: delete {folder} to train this run again") from error
    trained = {r["iteration"]: r for r in records if "lm_loss" in r}
    checked = {r["iteration"]: r for r in records if "lm_loss_validation" in r}

    def or_infinite(loss: float | None) -> float:
        return math.inf if loss is None else loss

    losses = [or_infinite(r["lm_loss"]) for r in trained.values()]
    late = [r for i, r in trained.items() if i > max(trained) / 10]
    return Result(
        name,
        lr,
        seed,
        diverged,
        [(r["consumed_tokens"], loss) for r, loss in zip(trained.values(), losses, strict=True)],
        [(r["consumed_tokens"], or_infinite(r["lm_loss_validation"])) for r in checked.values()],
        statistics.median(r["seconds_per_iteration"] for r in late) if late else math.nan,
        max((r["memory_bytes"] for r in trained.values()), default=math.nan),
        max((r["grad_norm"] if r["grad_norm"] is not None else math.inf for r in late), default=math.nan),
        num_spikes(losses),
    )


def num_spikes(losses: Sequence[float]) -> int:
    """Losses more than 6 robust standard deviations (1.4826 times the median deviation) above the median of the 50
    before; several in a row count once."""
    found, was_spike = 0, False
    for index in range(WINDOW, len(losses)):
        before = losses[index - WINDOW : index]
        middle = statistics.median(before)
        spread = 1.4826 * statistics.median(abs(loss - middle) for loss in before)
        is_spike = losses[index] > middle + SPIKE * spread
        found += is_spike and not was_spike
        was_spike = is_spike
    return found


def interval(differences: Sequence[float]) -> tuple[float, float, float]:
    """Mean and the ends of its 95 % confidence interval."""
    mean = statistics.mean(differences)
    if len(differences) < 2:
        return mean, math.nan, math.nan
    half = t_quantile(len(differences) - 1) * statistics.stdev(differences) / math.sqrt(len(differences))
    return mean, mean - half, mean + half


def t_quantile(freedom: int) -> float:
    """97.5 % quantile of Student's t; behind the table by its expansion in 1 / freedom, right to four digits there."""
    if freedom <= len(T_975):
        return T_975[freedom - 1]
    z = 1.959964
    return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)


def tokens_to_reach(curve: Points, loss: float) -> float:
    """Tokens at which a validation curve first comes down to ``loss``, between two points linearly; inf: never."""
    if curve and curve[0][1] <= loss:
        return curve[0][0]
    for (x0, y0), (x1, y1) in zip(curve, curve[1:], strict=False):
        if y1 <= loss:
            return x1 if math.isinf(y0) else x0 + (x1 - x0) * (y0 - loss) / (y0 - y1)
    return math.inf


def best_rate(results: Sequence[Result]) -> list[Result]:
    """Of one method's runs those at the learning rate with the smallest mean loss; a run that diverged is the worst."""
    by_rate: dict[float, list[Result]] = {}
    for result in results:
        by_rate.setdefault(result.lr, []).append(result)

    def badness(runs: Sequence[Result]) -> tuple[int, float]:
        losses = [run.final_loss for run in runs if not math.isnan(run.final_loss)]
        return len(runs) - len(losses), statistics.mean(losses) if losses else math.inf

    return min(by_rate.values(), key=badness)


def summarise(results: Sequence[Result], parameters: dict[str, int]) -> list[Summary]:
    """One line per method, in the order in which methods first occur."""
    chosen = {
        name: best_rate([r for r in results if r.name == name]) for name in dict.fromkeys(r.name for r in results)
    }
    first = {run.seed: run for run in next(iter(chosen.values()))}
    return [_summary(runs, first, parameters[name]) for name, runs in chosen.items()]


def _summary(runs: Sequence[Result], first: dict[int, Result], num_parameters: int) -> Summary:
    losses = [run.final_loss for run in runs if not math.isnan(run.final_loss)]
    pairs = [(run, first[run.seed]) for run in runs if run.seed in first]
    whole = [(a, b) for a, b in pairs if not (math.isnan(a.final_loss) or math.isnan(b.final_loss))]
    difference = interval([a.final_loss - b.final_loss for a, b in whole]) if whole else (math.nan,) * 3
    reached = [tokens_to_reach(a.validation, b.final_loss) / b.validation[-1][0] for a, b in whole]
    reached = [ratio for ratio in reached if math.isfinite(ratio)]
    return Summary(
        name=runs[0].name,
        lr=runs[0].lr,
        num_runs=len(runs),
        num_diverged=sum(run.diverged for run in runs),
        mean=statistics.mean(losses) if losses else math.nan,
        standard_error=statistics.stdev(losses) / math.sqrt(len(losses)) if len(losses) > 1 else math.nan,
        difference=difference[0],
        low=difference[1],
        high=difference[2],
        tokens_ratio=statistics.mean(reached) if reached else math.nan,
        num_reached=len(reached),
        time_ratio=statistics.median(a.seconds / b.seconds for a, b in pairs) if pairs else math.nan,
        memory_ratio=statistics.median(a.memory_bytes / b.memory_bytes for a, b in pairs) if pairs else math.nan,
        largest_grad_norm=max(run.largest_grad_norm for run in runs),
        spikes=sum(run.spikes for run in runs),
        num_parameters=num_parameters,
    )


# Text

HEAD = ("method", "lr", "runs", "validation loss", "standard error", "minus {first}", "95 % interval",
        "tokens to its loss", "step time", "memory", "largest gradient norm", "spikes", "diverged",
        "parameters")  # fmt: skip


def cells(summary: Summary, is_first: bool) -> list[str]:
    """One row of the table, below ``HEAD``."""
    ends = "–" if math.isnan(summary.low) or is_first else f"{summary.low:+.4f} .. {summary.high:+.4f}"
    tokens = "–" if math.isnan(summary.tokens_ratio) else f"{summary.tokens_ratio:.2f}"
    if summary.num_reached < summary.num_runs and not is_first:
        tokens += f" ({summary.num_reached} of {summary.num_runs})"
    return [
        summary.name,
        f"{summary.lr:g}",
        str(summary.num_runs),
        f"{summary.mean:.4f}",
        "–" if math.isnan(summary.standard_error) else f"{summary.standard_error:.4f}",
        "–" if is_first else f"{summary.difference:+.4f}",
        ends,
        tokens,
        f"{summary.time_ratio:.2f}",
        f"{summary.memory_ratio:.2f}",
        f"{summary.largest_grad_norm:.2f}",
        str(summary.spikes),
        str(summary.num_diverged),
        f"{summary.num_parameters:,}",
    ]


def markdown(summaries: Sequence[Summary]) -> str:
    """The table for a terminal, or for a document."""
    head = [text.format(first=summaries[0].name) for text in HEAD]
    rows = [cells(summary, index == 0) for index, summary in enumerate(summaries)]
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))


def write_csv(results: Sequence[Result], summaries: Sequence[Summary], folder: Path) -> None:
    """runs.csv: a line per run; summary.csv: a line per method."""
    runs = io.StringIO()
    writer = csv.writer(runs)
    writer.writerow(["method", "lr", "seed", "validation_loss", "training_loss", "seconds_per_iteration",
                     "memory_bytes", "largest_grad_norm", "spikes", "diverged"])  # fmt: skip
    for run in results:
        last = run.curve[-1][1] if run.curve else math.nan
        writer.writerow([run.name, run.lr, run.seed, run.final_loss, last, run.seconds, run.memory_bytes,
                         run.largest_grad_norm, run.spikes, run.diverged])  # fmt: skip
    fields = list(Summary.__dataclass_fields__)
    table = io.StringIO()
    writer = csv.writer(table)
    writer.writerow(fields)
    writer.writerows([getattr(summary, name) for name in fields] for summary in summaries)
    for name, text in (("runs.csv", runs.getvalue()), ("summary.csv", table.getvalue())):
        replace_file(folder / name, lambda beside, text=text: beside.write_text(text, encoding="utf-8"))


# Page and picture


def mean_curves(results: Sequence[Result], summaries: Sequence[Summary]) -> list[compare_runs.Run]:
    """The mean over seeds of each method's curves, training smoothed over a fiftieth of the run."""
    found = []
    for summary in summaries:
        runs = [r for r in results if r.name == summary.name and r.lr == summary.lr and not r.diverged]
        found.append(
            compare_runs.Run(
                summary.name,
                smooth(mean_of([run.curve for run in runs])),
                mean_of([run.validation for run in runs]),
                math.nan,
                math.nan,
            )
        )
    return [run for run in found if run.curve]


def mean_of(curves: Sequence[Points]) -> Points:
    """Point by point, as far as all of them go."""
    return [(points[0][0], statistics.mean(y for _, y in points)) for points in zip(*curves, strict=False)]


def smooth(curve: Points) -> Points:
    size = max(1, len(curve) // 50)
    blocks = [curve[start : start + size] for start in range(0, len(curve), size)]
    return [(block[-1][0], statistics.mean(y for _, y in block)) for block in blocks]


def verdict(summaries: Sequence[Summary]) -> str:
    """The result in words: what is better, what is worse, what is noise."""
    first, *others = summaries
    groups: dict[str, list[str]] = {"better": [], "worse": [], "noise": []}
    for summary in others:
        kind = "noise" if summary.is_noise else "better" if summary.high < 0 else "worse"
        groups[kind].append(summary.name)
    parts = [
        f"{', '.join(names)} {'is' if len(names) == 1 else 'are'} {text}"
        for names, text in (
            (groups["better"], f"better than {first.name}"),
            (groups["worse"], f"worse than {first.name}"),
            (groups["noise"], f"not told apart from {first.name} by these runs"),
        )
        if names
    ]
    return "; ".join(parts) + "."


def intervals(summaries: Sequence[Summary]) -> str:
    """Paired differences with their intervals, as an SVG."""
    others = list(enumerate(summaries))[1:]
    ends = [x for _, s in others for x in (s.difference, s.low, s.high) if math.isfinite(x)] + [0.0]
    low, high = min(ends), max(ends)
    low, high = low - 0.06 * (high - low) - 1e-6, high + 0.06 * (high - low) + 1e-6
    width, left, step = 960, 190, 28
    height = step * len(others) + 40

    def place(x: float) -> float:
        return left + (width - left - 12) * (x - low) / (high - low)

    parts = [f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="differences">']
    for value in compare_runs.ticks(low, high, 6):
        x = place(value)
        stroke = "var(--ink)" if value == 0 else "var(--rule)"
        parts.append(f'<path d="M{x:.1f} 6V{height - 30}" stroke="{stroke}"/>')
        parts.append(f'<text x="{x:.1f}" y="{height - 12}" text-anchor="middle">{value:+g}</text>')
    for row, (index, summary) in enumerate(others):
        y = 6 + step * (row + 0.5)
        parts.append(f'<text x="{left - 10}" y="{y + 4:.1f}" text-anchor="end">{html.escape(summary.name)}</text>')
        if math.isfinite(summary.low):
            ends_of = f"M{place(summary.low):.1f} {y:.1f}H{place(summary.high):.1f}"
            parts.append(f'<path d="{ends_of}" stroke="var(--c{index})" stroke-width="3"/>')
        if math.isfinite(summary.difference):
            x = place(summary.difference)
            parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" fill="var(--c{index})"/>')
    return "".join(parts) + "</svg>"


def page(results: Sequence[Result], summaries: Sequence[Summary], about: Sequence[str], title: str) -> str:
    """The whole HTML document; ``about``: sentences on what was run."""
    runs, first = mean_curves(results, summaries), html.escape(summaries[0].name)
    head = "".join(f"<th>{html.escape(text.format(first=summaries[0].name))}</th>" for text in HEAD)
    rows = "".join(
        "<tr>" + "".join(f"<td>{html.escape(text)}</td>" for text in cells(summary, index == 0)) + "</tr>"
        for index, summary in enumerate(summaries)
    )
    return f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(title)}</title><style>{compare_runs.style(len(summaries))}</style>
<h1>{html.escape(title)}</h1>
<p><b>{html.escape(verdict(summaries))}</b> {html.escape(" ".join(about))}</p>
<h2>Against {first}</h2><figure>{intervals(summaries)}<figcaption>Validation loss minus that of {first} with the same
seed: mean and 95 % confidence interval (Student's t over seeds). An interval that holds 0 is noise as far as these runs
can tell; of many methods compared, one in twenty falls outside by chance.</figcaption></figure>
<h2>Loss</h2>{compare_runs.legend(runs)}<figure>{compare_runs.curves(runs)}<figcaption>Training loss (lines) and
validation loss (points), means over seeds; lower is better.</figcaption></figure>
<h2>In numbers</h2><div class="scroll"><table class="numbers"><thead><tr>{head}</tr></thead><tbody>{rows}</tbody>
</table></div><p>Tokens to its loss: until the validation loss is the last one of {first}, as a share of its tokens.
Step time and memory over those of {first}, medians over seeds. The largest gradient norm is before clipping and after
the first tenth of the run. A spike is a training loss more than {SPIKE:g} robust standard deviations above the median
of the {WINDOW} logged before it.</p></html>
"""


def draw(results: Sequence[Result], summaries: Sequence[Summary], title: str, output: Path) -> None:
    """Validation curves and paired differences as a PNG."""
    try:
        import matplotlib
    except ImportError as error:
        raise ValueError("the picture needs the matplotlib package: pip install 'megatron_hc[plot]'") from error
    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for index, run in enumerate(mean_curves(results, summaries)):
        colour: Any = compare_runs.COLOURS[index % len(compare_runs.COLOURS)][0]
        left.plot(*zip(*run.curve, strict=True), color=colour, lw=0.8, alpha=0.5)
        if run.validation:
            left.plot(*zip(*run.validation, strict=True), "o-", color=colour, ms=3, lw=1.3, label=run.name)
    lasts = [y for run in mean_curves(results, summaries) for _, y in run.validation] or [0.0]
    left.set(
        xlabel="tokens", ylabel="loss (points: validation)", title=title, ylim=(min(lasts) - 0.05, max(lasts) + 0.1)
    )
    left.legend(fontsize=7)
    left.grid(alpha=0.25)
    for row, summary in enumerate(summaries[1:]):
        colour = compare_runs.COLOURS[(row + 1) % len(compare_runs.COLOURS)][0]
        if math.isfinite(summary.low):
            right.plot([summary.low, summary.high], [row, row], color=colour, lw=2.5)
        right.plot([summary.difference], [row], "o", color=colour)
    right.axvline(0, color="black", lw=0.8)
    right.set_yticks(range(len(summaries) - 1), [summary.name for summary in summaries[1:]], fontsize=8)
    right.invert_yaxis()
    right.set(xlabel=f"validation loss minus {summaries[0].name}, paired by seed, 95 % interval")
    right.grid(alpha=0.25, axis="x")
    replace_file(output, lambda beside: figure.savefig(beside, format="png", dpi=100))
