"""One page about several runs: loss curves, a table, the learned connections, and what each model writes.

    python tools/compare_runs.py plain=runs/plain hyper=runs/hyper --output compare.html --png compare.png

A run is NAME=FOLDER, where FOLDER holds checkpoints of --save and a metrics.jsonl of --metrics-jsonl. The page needs
nothing else: no network, no script. The picture needs matplotlib.
"""

from __future__ import annotations

import argparse
import html
import json
import math
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_hc.cli import exit_on_user_error, to_flat
from megatron_hc.cli_options import options as options_of_runs
from megatron_hc.config import TrainConfig
from megatron_hc.outputs import replace_file

Points = list[tuple[float, float]]

COLOURS = (("#0b62c4", "#6cb0ff"), ("#c2410c", "#ff9f5a"), ("#15803d", "#5fd38a"), ("#7e22ce", "#c79bff"),
           ("#a16207", "#e6c34f"), ("#be185d", "#ff86bd"), ("#0f766e", "#4fd1c5"), ("#475569", "#a9b7c9"),
           ("#7c2d12", "#d9a08a"), ("#4d7c0f", "#b6e05a"), ("#1e3a8a", "#93a8ff"), ("#86198f", "#f0a6f7"))  # fmt: skip
"""Of each run, on light and on dark."""


@dataclass
class Run:
    """What the page says about one run."""

    name: str
    curve: Points
    """(tokens, training loss)"""
    validation: Points
    tokens_per_second: float
    memory_bytes: float
    num_parameters: int = 0
    num_residual_parameters: int = 0
    matrix: list[list[float]] = field(default_factory=list)
    samples: list[tuple[str, str]] = field(default_factory=list)
    """(prompt, continuation)"""
    settings: dict[str, Any] = field(default_factory=dict)
    others: dict[str, Any] = field(default_factory=dict)
    """What decides the numbers besides the residual path: flag -> value."""

    @property
    def final_loss(self) -> float | None:
        return self.validation[-1][1] if self.validation else None


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("runs", nargs="+", metavar="NAME=FOLDER", help="a name for the run and where it was saved")
    parser.add_argument("--output", type=Path, required=True, help="the page to write, .html")
    parser.add_argument("--png", type=Path, help="a picture of the curves and the connections, .png")
    parser.add_argument("--title", default="Residual paths compared")
    parser.add_argument("--prompt", nargs="+", default=["def "], help="texts that every model continues")
    parser.add_argument("--max-new-tokens", type=int, default=120)
    parser.add_argument("--temperature", type=float, default=0.7)
    parser.add_argument("--seed", type=int, default=1234)
    parser.add_argument("--tokenizer-model", help="the tokenizer's file, if it has moved since training")
    return parser.parse_args(argv)


# Reading


def read_metrics(name: str, folder: Path) -> Run:
    """The curves and speeds of a run; of an iteration that was run twice, the later record."""
    file = folder / "metrics.jsonl"
    try:
        records = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} cannot be read: {error}") from error
    trained = {record["iteration"]: record for record in records if "lm_loss" in record}
    checked = {record["iteration"]: record for record in records if "lm_loss_validation" in record}
    if not trained:
        raise ValueError(f"{file} holds no training loss: train longer than --log-interval")
    for kind, found in (("lm_loss", trained), ("lm_loss_validation", checked)):
        broken = next((iteration for iteration, record in found.items() if record[kind] is None), None)
        if broken is not None:
            raise ValueError(f"{file}: {kind} of iteration {broken} is not finite: a run that diverged has no curve")
    # The first lines include what is done once.
    speeds = [r["tokens_per_second"] for r in list(trained.values())[1:] or trained.values() if r["tokens_per_second"]]
    return Run(
        name,
        [(record["consumed_tokens"], record["lm_loss"]) for record in trained.values()],
        [(record["consumed_tokens"], record["lm_loss_validation"]) for record in checked.values()],
        statistics.median(speeds) if speeds else float("nan"),
        max(record["memory_bytes"] for record in trained.values()),
    )


def look_at_model(run: Run, folder: Path, options: argparse.Namespace) -> None:
    """Load the run's last checkpoint; count, measure and let it write."""
    import torch

    from megatron_hc.connections import connection_matrix
    from megatron_hc.inference import load_model
    from megatron_hc.model.generate import Sampling, generate
    from megatron_hc.residual import Residual

    model, tokenizer, config, _, _ = load_model(str(folder), tokenizer_model=options.tokenizer_model)
    run.num_parameters = sum(parameter.numel() for parameter in model.parameters())
    residuals = [module for module in model.modules() if isinstance(module, Residual)]
    run.num_residual_parameters = sum(parameter.numel() for module in residuals for parameter in module.parameters())
    shape = config.model
    run.settings = {
        "layers": shape.num_layers,
        "width": shape.hidden_size,
        "heads": shape.num_attention_heads,
        "tokens of a sample": shape.seq_length,
        "samples of a step": config.training.global_batch_size or config.training.micro_batch_size,
        "peak learning rate": config.optimizer.lr,
        "seed": config.training.seed,
    }
    run.others = others_of(config)
    sampling = Sampling(temperature=options.temperature, top_p=0.95, seed=options.seed)
    for prompt in options.prompt:
        ids = list(tokenizer.tokenize(prompt))
        new = generate(model, ids, options.max_new_tokens, sampling, eod=tokenizer.eod)
        text = tokenizer.detokenize([*ids, *new])
        run.samples.append((prompt, text[len(prompt) :] if text.startswith(prompt) else text))
    # The weights of a hyper-connection depend on the tokens: measured on text that the model itself wrote.
    text_ids = tokenizer.tokenize("".join(prompt + text for prompt, text in run.samples))[: shape.seq_length]
    run.matrix = connection_matrix(model, torch.tensor([text_ids])).tolist()


RESIDUAL = ("value_residual", "neutreno_coefficient", "single_layer_value", "norm_placement", "normformer_residual",
            "init_scheme", "fused_residual")  # fmt: skip
"""Beginnings of the model's settings that belong to the residual path, outside of its group."""

WITHOUT_EFFECT = ("data_cache_path", "num_workers", "micro_batch_size", "exit_", "check_", "eval_", "compile")
"""Beginnings of settings that two runs may have apart and still be compared."""


def others_of(config: TrainConfig) -> dict[str, Any]:
    """Model, data, schedule and length without the residual path."""
    groups = ("model", "data", "optimizer", "training")
    named = {name: option.path for name, option in options_of_runs().items() if option.path[0] in groups}
    kept = [
        name
        for name, path in named.items()
        if path[:2] != ("model", "residual") and not name.startswith((*RESIDUAL, *WITHOUT_EFFECT))
    ]
    values = to_flat(config)
    return {name: values[name] for name in kept}


# Page

STYLE = """
:root { color-scheme: light dark; --paper: #fff; --ink: #1b2430; --soft: #5b6776; --rule: #d9dfe7; --box: #f5f7fa;
  --plus: 11, 98, 196; --minus: 194, 65, 12; LIGHT }
@media (prefers-color-scheme: dark) { :root { --paper: #12161c; --ink: #e6eaf0; --soft: #9aa7b7; --rule: #2c3644;
  --box: #1a2029; --plus: 108, 176, 255; --minus: 255, 159, 90; DARK } }
body { background: var(--paper); color: var(--ink); font: 16px/1.55 system-ui, sans-serif; margin: 0 auto;
  max-width: 68rem; padding: 2rem 1.25rem 4rem }
h1 { font-size: 1.7rem; margin: 0 0 .3rem } h2 { font-size: 1.15rem; margin: 2.4rem 0 .6rem }
p, figcaption { color: var(--soft); max-width: 46rem; margin: .3rem 0 .9rem } b { color: var(--ink) }
svg { width: 100%; height: auto; display: block } svg text { fill: var(--soft); font: 12px system-ui, sans-serif }
.legend { display: flex; flex-wrap: wrap; gap: .3rem 1.3rem; margin: .4rem 0 } .legend span::before { content: "";
  display: inline-block; width: .8rem; height: .8rem; border-radius: 3px; background: var(--c); margin-right: .45rem }
.scroll { overflow-x: auto } table { border-collapse: collapse; font-variant-numeric: tabular-nums }
table.numbers { width: 100% } .numbers th, .numbers td { padding: .45rem .7rem; border-bottom: 1px solid var(--rule);
  text-align: right; white-space: nowrap } .numbers th:first-child, .numbers td:first-child { text-align: left }
.numbers th { color: var(--soft); font-weight: 500 } .best { font-weight: 700 }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); gap: 1.4rem }
figure { margin: 0; min-width: 0 } .cells td { min-width: 2.3rem; height: 1.7rem; padding: 0 .2rem; text-align: center;
  font-size: .72rem } .cells th { color: var(--soft); font-weight: 400; font-size: .72rem; padding: .1rem .35rem;
  text-align: right; white-space: nowrap } .cells thead th { text-align: center }
pre { background: var(--box); border: 1px solid var(--rule); border-radius: 8px; padding: .8rem 1rem; margin: .3rem 0;
  white-space: pre-wrap; overflow-wrap: anywhere; max-height: 22rem; overflow-y: auto;
  font: 13px/1.5 ui-monospace, monospace } pre i { color: var(--soft) }
h3 { font-size: 1rem; margin: .4rem 0; border-left: 4px solid var(--c); padding-left: .6rem }
"""


def style(num_runs: int) -> str:
    """The style sheet with a colour --c0, --c1, ... for every run, on light and on dark."""
    light, dark = (
        " ".join(f"--c{i}: {COLOURS[i % len(COLOURS)][tone]};" for i in range(num_runs)) for tone in (0, 1)
    )
    return STYLE.replace("LIGHT", light).replace("DARK", dark)


def page(runs: Sequence[Run], title: str) -> str:
    """The whole HTML document."""
    settings = ", ".join(f"{html.escape(name)} {value}" for name, value in runs[0].settings.items())
    samples = "".join(
        f'<figure style="--c: var(--c{i})"><h3>{html.escape(run.name)}</h3>'
        + "".join(f"<pre><i>{html.escape(prompt)}</i>{html.escape(text)}</pre>" for prompt, text in run.samples)
        + "</figure>"
        for i, run in enumerate(runs)
    )
    return f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(title)}</title><style>{style(len(runs))}</style>
<h1>{html.escape(title)}</h1>
<p>{verdict(runs)} {fairness(runs)}</p>
<h2>Loss</h2>{legend(runs)}<figure>{curves(runs)}<figcaption>Training loss (lines) and validation loss (points) over the
tokens seen; lower is better.</figcaption></figure>
<h2>In numbers</h2><div class="scroll">{table(runs)}</div>
<h2>What the residual path learned</h2>
<p>Row: the input of a sublayer, or of the output layer at the bottom. Column: the embedding or the output of a
sublayer. The number is the weight with which the row takes the column. <b>The plain residual takes everything with
weight 1</b>; what differs from 1 has been learned.</p>
<div class="pair">{"".join(connections(run, i) for i, run in enumerate(runs))}</div>
<h2>What the models write</h2><div class="pair">{samples}</div>
<p>{settings}.</p></html>
"""


def verdict(runs: Sequence[Run]) -> str:
    """The result in a sentence."""
    scored = [(run.final_loss, run.name) for run in runs if run.final_loss is not None]
    if len(scored) < 2:
        return ""
    (best, name), *_, (worst, last) = sorted(scored)
    first = f"<b>{html.escape(name)}</b> ends at a validation loss of <b>{best:.4f}</b>"
    return f"{first}, {worst - best:.4f} below {html.escape(last)} ({worst:.4f})."


def fairness(runs: Sequence[Run]) -> str:
    """Whether the runs can be compared."""
    first = runs[0].settings | runs[0].others
    apart = [name for name in first if any((run.settings | run.others).get(name) != first[name] for run in runs)]
    apart += ["tokens seen"] * (len({run.curve[-1][0] for run in runs}) > 1)
    if apart:
        return f"<b>The runs differ in more than the residual path</b>: {html.escape(', '.join(apart))}."
    return (
        f"Every run saw the same {runs[0].curve[-1][0]:,.0f} tokens in the same order; only the residual path differs."
    )


def legend(runs: Sequence[Run]) -> str:
    names = "".join(f'<span style="--c: var(--c{i})">{html.escape(run.name)}</span>' for i, run in enumerate(runs))
    return f'<div class="legend">{names}</div>'


def ticks(low: float, high: float, count: int) -> list[float]:
    """About ``count`` round numbers between the two."""
    unit = 10.0 ** math.floor(math.log10((high - low) / count))
    step = next(factor * unit for factor in (1, 2, 5, 10) if factor * unit * count >= high - low)
    first = math.ceil(low / step)
    return [round((first + i) * step, 10) for i in range(math.floor(high / step) - first + 1)]


def curves(runs: Sequence[Run]) -> str:
    """The loss curves as an SVG; the beginning, which is far above all that matters, may be cut off at the top."""
    width, height, left, bottom, top = 960, 380, 52, 34, 10
    every = [y for run in runs for _, y in run.curve + run.validation]
    late = [y for run in runs for _, y in run.curve[len(run.curve) // 20 :] + run.validation]
    low, high = min(every), max(late)
    low, high = low - 0.03 * (high - low) - 1e-6, high + 0.02 * (high - low) + 1e-6
    right = max(x for run in runs for x, _ in run.curve + run.validation)

    def place(x: float, y: float) -> tuple[float, float]:
        down = (min(high, y) - low) / (high - low)
        return left + (width - left - 12) * x / right, top + (height - top - bottom) * (1 - down)

    parts = [f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="loss curves">']
    for value in ticks(low, high, 6):
        _, y = place(0, value)
        parts.append(f'<path d="M{left} {y:.1f}H{width - 12}" stroke="var(--rule)"/>')
        parts.append(f'<text x="{left - 8}" y="{y + 4:.1f}" text-anchor="end">{value:g}</text>')
    for value in ticks(0, right, 6):
        x, _ = place(value, low)
        parts.append(f'<text x="{x:.1f}" y="{height - 12}" text-anchor="middle">{short(value)}</text>')
    for i, run in enumerate(runs):
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*point) for point in run.curve))
        parts.append(f'<polyline points="{line}" fill="none" stroke="var(--c{i})" stroke-width="1.6" opacity=".8"/>')
    for i, run in enumerate(runs):
        for tokens, loss in run.validation:
            x, y = place(tokens, loss)
            note = f"{html.escape(run.name)}: validation loss {loss:.4f} after {short(tokens)} tokens"
            parts.append(
                f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4.5" fill="var(--c{i})" stroke="var(--paper)" '
                f'stroke-width="1.5"><title>{note}</title></circle>'
            )
    return "".join(parts) + "</svg>"


def short(value: float) -> str:
    """1250000 -> 1.25M"""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"


def table(runs: Sequence[Run]) -> str:
    losses = [run.final_loss for run in runs if run.final_loss is not None]
    rows = []
    for run in runs:
        loss = "–" if run.final_loss is None else f"{run.final_loss:.4f}"
        best = ' class="best"' if losses and run.final_loss == min(losses) else ""
        is_compared = run is not runs[0] and run.final_loss is not None and runs[0].final_loss is not None
        gap = f"{run.final_loss - runs[0].final_loss:+.4f}" if is_compared else "–"  # type: ignore[operator]
        cells = [
            f"<td>{html.escape(run.name)}</td><td{best}>{loss}</td><td>{gap}</td>",
            f"<td>{run.curve[-1][1]:.4f}</td><td>{run.tokens_per_second:,.0f}</td>",
            f"<td>{run.num_parameters:,}</td><td>{run.num_residual_parameters:,}</td>",
            f"<td>{run.memory_bytes / 2**20:,.0f} MiB</td>",
        ]
        rows.append(f"<tr>{''.join(cells)}</tr>")
    against = f"against {html.escape(runs[0].name)}"
    head = ["method", "validation loss", against, "training loss", "tokens/s", "parameters",
            "of these residual", "peak memory"]  # fmt: skip
    titles = "".join(f"<th>{name}</th>" for name in head)
    return f'<table class="numbers"><thead><tr>{titles}</tr></thead><tbody>{"".join(rows)}</tbody></table>'


def connections(run: Run, number: int) -> str:
    """The matrix as a table of coloured cells."""
    from megatron_hc.connections import names

    sources = names((len(run.matrix) - 1) // 2)
    targets = [*sources[1:], "output"]
    # Colour by the distance from the plain residual's 1; stronger at twice the weight or at none.
    rows = []
    for j, (target, row) in enumerate(zip(targets, run.matrix, strict=True)):
        cells = "".join(cell(value) if k <= j else "<td></td>" for k, value in enumerate(row))
        rows.append(f"<tr><th>{target}</th>{cells}</tr>")
    head = "".join(f"<th>{name.replace(' ', '<br>')}</th>" for name in sources)
    return (
        f'<figure style="--c: var(--c{number})"><h3>{html.escape(run.name)}</h3><div class="scroll">'
        f'<table class="cells"><thead><tr><th></th>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'
        "</figure>"
    )


def cell(value: float) -> str:
    shade = min(1.0, abs(value - 1.0)) * 0.75
    tone = "plus" if value >= 1 else "minus"
    return f'<td style="background: rgba(var(--{tone}), {shade:.2f})">{value:.2f}</td>'


# Picture


def draw(runs: Sequence[Run], title: str, output: Path) -> None:
    """The curves and the connections as a PNG."""
    try:
        import matplotlib
    except ImportError as error:
        raise ValueError("--png needs the matplotlib package: pip install 'megatron_hc[log]'") from error
    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    from megatron_hc.connections import names

    figure = Figure(figsize=(max(9.0, 4.2 * len(runs)), 8.4), layout="constrained")
    grid = figure.add_gridspec(2, len(runs), height_ratios=(1.15, 1))
    axes = figure.add_subplot(grid[0, :])
    late = [y for run in runs for _, y in run.curve[len(run.curve) // 20 :] + run.validation]
    for i, run in enumerate(runs):
        colour = COLOURS[i % len(COLOURS)][0]
        label = run.name if run.final_loss is None else f"{run.name}: {run.final_loss:.4f}"
        axes.plot(*zip(*run.curve, strict=True), color=colour, lw=1.2, alpha=0.7, label=label)
        if run.validation:
            axes.plot(*zip(*run.validation, strict=True), "o", color=colour, ms=5, mec="white")
    axes.set(
        xlabel="tokens", ylabel="loss (points: validation)", title=title, ylim=(min(late) - 0.05, max(late) + 0.05)
    )
    axes.grid(alpha=0.25)
    axes.legend(title="validation loss at the end")
    for i, run in enumerate(runs):
        part = figure.add_subplot(grid[1, i])
        shown = [[value if k <= j else float("nan") for k, value in enumerate(row)] for j, row in enumerate(run.matrix)]
        part.imshow(shown, cmap="RdBu", vmin=0, vmax=2)
        for j, row in enumerate(run.matrix):
            for k, value in enumerate(row[: j + 1]):
                ink = "white" if abs(value - 1) > 0.7 else "black"
                part.text(k, j, f"{value:.2f}", ha="center", va="center", fontsize=6, color=ink)
        sources = names((len(run.matrix) - 1) // 2)
        part.set_xticks(range(len(sources)), sources, rotation=60, fontsize=7)
        part.set_yticks(range(len(sources)), [*sources[1:], "output"], fontsize=7)
        part.set_title(f"{run.name}: input (row) takes output (column) with weight", fontsize=8)
    replace_file(output, lambda beside: figure.savefig(beside, format="png", dpi=130))


def main(argv: list[str]) -> int:
    options = parse_arguments(argv)
    with exit_on_user_error("compare_runs.py"):
        found = []
        for text in options.runs:
            name, equals, folder = text.partition("=")
            if not (name and equals and folder):
                raise ValueError(f"{text} must be NAME=FOLDER")
            run = read_metrics(name, Path(folder))
            look_at_model(run, Path(folder), options)
            found.append(run)
        content = page(found, options.title)
        replace_file(options.output, lambda beside: beside.write_text(content, encoding="utf-8"))
        print(f"wrote {options.output}")
        if options.png:
            draw(found, options.title, options.png)
            print(f"wrote {options.png}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
