"""What a trained residual path does: signal, gradients, streams, mixing matrices and learned connections, by depth.

    python tools/inspect_residual.py runs/hyper --input text.txt --output residual.html --png residual.png

The last checkpoint in the folder (or --step) is run over windows of the text, or, without --input, of what the model
itself writes. The page needs nothing else: no network, no script. The picture needs matplotlib. What the numbers are:
megatron_hc/residual_stats.py; the same are logged while training with --log-residual-stats.
"""

from __future__ import annotations

import argparse
import html
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import compare_runs
import torch
from torch import Tensor

from megatron_hc.cli import exit_on_user_error
from megatron_hc.connections import connection_matrix, names
from megatron_hc.data.tokenizer import Tokenizer
from megatron_hc.inference import load_model
from megatron_hc.mesh import Mesh
from megatron_hc.model.generate import Sampling, generate
from megatron_hc.model.gpt import GPT
from megatron_hc.outputs import replace_file
from megatron_hc.residual_stats import Stats, measure

PROMPT, SAMPLES = "The ", 8


@dataclass(frozen=True)
class Panel:
    """Statistics that are drawn together."""

    title: str
    rows: tuple[str, ...]
    caption: str
    is_log: bool = False


PANELS = (
    Panel(
        "Signal",
        ("channel_squared_mean", "channel_variance", "branch_variance"),
        "Of the stream at every read, and of what each sublayer writes: squared channel means, channel variance "
        "(Brock et al. 2021).",
        is_log=True,
    ),
    Panel("Gradient", ("grad_norm",), "Norm of the gradient of each layer's parameters on this text.", is_log=True),
    Panel(
        "Effective rank of the streams",
        ("stream_rank",),
        "Between 1 and the number of streams; near 1 the streams have collapsed into one.",
    ),
    Panel("Cosine between streams", ("stream_cosine",), "Mean over all pairs."),
    Panel(
        "Composite gain of the mixing matrices",
        ("forward_gain", "backward_gain"),
        "Largest absolute row and column sum of the product of H_res up to each sublayer (mHC's Amax); 1: bounded.",
        is_log=True,
    ),
    Panel(
        "Sums of the mixing matrices",
        ("row_deviation", "column_deviation"),
        "Largest distance of a row's, a column's sum from 1, mean over tokens; 0: doubly stochastic.",
    ),
    Panel(
        "Linearity of the layers",
        ("linearity", "update_linearity", "layer_cosine"),
        "How well a linear map predicts a layer's output, and its update, from its input; cosine of input and output "
        "(2405.12250).",
    ),
    Panel(
        "Value residual",
        ("value_first", "value_own"),
        "Learned weights of the first layer's and of a layer's own values.",
    ),
)


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("checkpoint", help="folder of --save")
    parser.add_argument("--step", type=int, help="iteration (default: the last)")
    parser.add_argument("--input", type=Path, help="a text to measure on (default: what the model writes)")
    parser.add_argument("--prompt", help=f"what the model continues without --input (default: {PROMPT!r})")
    parser.add_argument("--samples", type=int, help=f"windows of the text of --input (default: {SAMPLES})")
    parser.add_argument("--output", type=Path, required=True, help="the page to write, .html")
    parser.add_argument("--png", type=Path, help="a picture, .png")
    parser.add_argument("--tokenizer-model", help="the tokenizer's file, if it has moved since training")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:K (default: cpu)")
    return parser.parse_args(argv)


def check(options: argparse.Namespace) -> None:
    """Refuse, before the model is loaded, what would do nothing or could not be written."""
    if options.samples is not None and options.samples < 1:
        raise ValueError(f"--samples ({options.samples}) must be at least 1")
    if options.samples is not None and options.input is None:
        raise ValueError("--samples would do nothing without --input: the model's own text is one sample")
    if options.prompt is not None and options.input is not None:
        raise ValueError("--prompt would do nothing with --input: leave one of them out")
    if options.png is not None and options.png.absolute() == options.output.absolute():
        raise ValueError(f"--png and --output both name {options.png}: give them different files")
    for flag, file in (("--output", options.output), ("--png", options.png)):
        if file is not None and file.is_dir():
            raise ValueError(f"{flag} {file} is a folder: name a file")


# Measuring


def tokens_of(model: GPT, tokenizer: Tokenizer, options: argparse.Namespace) -> Tensor:
    """[samples, S] token ids: windows of the text, as long as a training sample or the whole text if that is short."""
    length = model.config.seq_length
    samples = SAMPLES if options.samples is None else options.samples
    if options.input is None:
        ids = list(tokenizer.tokenize(PROMPT if options.prompt is None else options.prompt))
        if len(ids) >= length:
            raise ValueError(f"--prompt has {len(ids)} tokens, which fill a training sample ({length}): shorten it")
        new = generate(model, ids, length - len(ids), Sampling(top_p=0.95), eod=tokenizer.eod)
        ids += new
    else:
        try:
            text = options.input.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"--input {options.input} cannot be read: {error}") from error
        ids = list(tokenizer.tokenize(text[: 64 * samples * length]))
    length = min(length, len(ids))
    if length < 2:
        raise ValueError("the text has fewer than 2 tokens: give --input a longer one")
    count = min(samples, len(ids) // length)
    return torch.tensor(ids[: count * length]).view(count, length)


def look_at(model: GPT, tokens: Tensor) -> Stats:
    """Everything that goes by depth; the weights' own precision for the signal, fp32 for the gradient."""
    stats = measure(model, Mesh(device=str(tokens.device)), lambda: model(tokens))
    return {"grad_norm": gradient_norms(model.float().requires_grad_(True), tokens), **stats}


def gradient_norms(model: GPT, tokens: Tensor) -> list[float | None]:
    """Of each layer's parameters, of the mean next-token loss."""
    labels, weights = tokens.roll(-1, 1), torch.ones(tokens.shape, device=tokens.device)
    weights[:, -1] = 0
    model.output.loss(model(tokens), labels, weights / weights.sum()).backward()
    norms: list[float | None] = []
    for layer in model.stage_layers():
        squares = [p.grad.double().square().sum() for p in layer.parameters() if p.grad is not None]
        norms.append(float(torch.stack(squares).sum().sqrt()))
    model.zero_grad(set_to_none=True)
    return norms


# Page


def labels_of(count: int, num_layers: int) -> list[str]:
    """What stands below the points of a row of ``count`` numbers."""
    if count == num_layers:
        return [f"layer {index}" for index in range(num_layers)]
    return [*names(num_layers)[1:], "output"][:count]


def chart(panel: Panel, stats: Stats, num_layers: int) -> str:
    """Lines over depth as an SVG; on a logarithmic scale zeros are left out."""
    rows = {name: stats[name] for name in panel.rows if name in stats}
    width, height, left, bottom, top = 620, 230, 60, 46, 10

    def height_of(value: float) -> float | None:
        if panel.is_log:
            return math.log10(value) if value > 0 else None
        return value

    points = {
        name: [(i, y) for i, v in enumerate(row) if v is not None and (y := height_of(v)) is not None]
        for name, row in rows.items()
    }
    every = [y for line in points.values() for _, y in line] or [0.0]
    low, high = min(every), max(every)
    pad = 0.08 * (high - low) or 0.5
    low, high = low - pad, high + pad
    count = max(len(row) for row in rows.values())

    def place(index: int, y: float) -> tuple[float, float]:
        across = left + (width - left - 14) * (index + 0.5) / count
        return across, top + (height - top - bottom) * (high - y) / (high - low)

    parts = [f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{html.escape(panel.title)}">']
    for value in compare_runs.ticks(low, high, 5):
        _, y = place(0, value)
        text = f"1e{value:g}" if panel.is_log else f"{value:g}"
        parts.append(f'<path d="M{left} {y:.1f}H{width - 14}" stroke="var(--rule)"/>')
        parts.append(f'<text x="{left - 8}" y="{y + 4:.1f}" text-anchor="end">{text}</text>')
    step = max(1, -(-count // 10))
    for index, label in enumerate(labels_of(count, num_layers)):
        if index % step == 0:
            x, _ = place(index, low)
            parts.append(f'<text x="{x:.1f}" y="{height - 22}" text-anchor="middle">{label}</text>')
    for number, (name, line) in enumerate(points.items()):
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*point) for point in line))
        parts.append(f'<polyline points="{path}" fill="none" stroke="var(--c{number})" stroke-width="2"/>')
        for index, y_value in line:
            x, y = place(index, y_value)
            note = f"{name} at {labels_of(len(rows[name]), num_layers)[index]}: {rows[name][index]:.4g}"
            parts.append(
                f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="var(--c{number})"><title>{note}</title></circle>'
            )
    return "".join(parts) + "</svg>"


def figure(panel: Panel, stats: Stats, num_layers: int) -> str:
    shown = [name for name in panel.rows if name in stats]
    legend = "".join(f'<span style="--c: var(--c{i})">{name}</span>' for i, name in enumerate(shown))
    return (
        f'<figure><h3>{html.escape(panel.title)}</h3><div class="legend">{legend}</div>'
        f"{chart(panel, stats, num_layers)}<figcaption>{html.escape(panel.caption)}</figcaption></figure>"
    )


def panels_of(stats: Stats) -> list[Panel]:
    """Those of which the model has something."""
    return [panel for panel in PANELS if any(name in stats for name in panel.rows)]


def page(title: str, about: str, stats: Stats, matrix: Sequence[Sequence[float]], num_layers: int) -> str:
    """The whole HTML document."""
    figures = "".join(figure(panel, stats, num_layers) for panel in panels_of(stats))
    learned = compare_runs.connections(compare_runs.Run("", [], [], 0.0, 0.0, matrix=[list(row) for row in matrix]), 0)
    return f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(title)}</title><style>{compare_runs.style(3)}</style>
<h1>{html.escape(title)}</h1><p>{html.escape(about)}</p>
<h2>By depth</h2><div class="pair">{figures}</div>
<h2>Connections</h2><p>Row: the input of a sublayer, or of the output layer at the bottom. Column: the embedding or the
output of a sublayer. The number is the weight with which the row takes the column, mean over the tokens; the plain
residual takes everything with weight 1.</p>{learned}</html>
"""


def draw(title: str, stats: Stats, matrix: Sequence[Sequence[float]], num_layers: int, output: Path) -> None:
    """All panels and the connections as a PNG."""
    try:
        import matplotlib
    except ImportError as error:
        raise ValueError("--png needs the matplotlib package: pip install 'megatron_hc[plot]'") from error
    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    panels = panels_of(stats)
    height = -(-(len(panels) + 1) // 3)
    image = Figure(figsize=(15, 3.6 * height), layout="constrained")
    image.suptitle(title)
    for number, panel in enumerate(panels, 1):
        axes = image.add_subplot(height, 3, number)
        for index, name in enumerate(name for name in panel.rows if name in stats):
            row = [math.nan if value is None else value for value in stats[name]]
            axes.plot(row, "o-", ms=3, lw=1.3, color=compare_runs.COLOURS[index][0], label=name)
        if panel.is_log and any(v is not None and v > 0 for name in panel.rows for v in stats.get(name, [])):
            axes.set_yscale("log")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set_title(panel.title, fontsize=10)
        axes.legend(fontsize=7)
        axes.grid(alpha=0.25)
    axes = image.add_subplot(height, 3, len(panels) + 1)
    lower = [[value if k <= j else math.nan for k, value in enumerate(row)] for j, row in enumerate(matrix)]
    shown = axes.imshow(lower, cmap="RdBu", vmin=0, vmax=2)
    image.colorbar(shown, ax=axes)
    axes.set_title("Connections: input (row) takes output (column)", fontsize=10)
    labels = names(num_layers)
    if num_layers <= 12:
        axes.set_xticks(range(len(labels)), labels, rotation=70, fontsize=6)
        axes.set_yticks(range(len(labels)), [*labels[1:], "output"], fontsize=6)
    replace_file(output, lambda beside: image.savefig(beside, format="png", dpi=90))


def main(argv: list[str]) -> int:
    options = parse_arguments(argv)
    with exit_on_user_error("inspect_residual.py"):
        check(options)
        model, tokenizer, config, folder, _ = load_model(
            options.checkpoint, options.step, device=options.device, tokenizer_model=options.tokenizer_model
        )
        tokens = tokens_of(model, tokenizer, options).to(options.device)
        matrix = connection_matrix(model, tokens).tolist()
        stats = look_at(model, tokens)
        method, layers = config.model.residual.residual_connection, config.model.num_layers
        title = f"The residual path of {Path(options.checkpoint).name}: {method}"
        text = "the model's own text" if options.input is None else options.input.name
        about = (
            f"{folder.name}, {layers} layers, {config.model.hidden_size} wide; on {tokens.numel():,} tokens of {text}."
        )
        content = page(title, about, stats, matrix, layers)
        replace_file(options.output, lambda beside: beside.write_text(content, encoding="utf-8"))
        print(f"wrote {options.output}")
        if options.png is not None:
            draw(title, stats, matrix, layers, options.png)
            print(f"wrote {options.png}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
