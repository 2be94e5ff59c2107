"""Estimates and searches as text, JSON, pictures and a command to launch."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_hc.config import TrainConfig, flag, leaf_fields
from megatron_hc.estimate.estimate import Estimate
from megatron_hc.estimate.search import Result
from megatron_hc.outputs import replace_file

AXIS_NAMES = {
    **{"tp": "tensor parallel", "cp": "context parallel", "pp": "pipeline parallel", "dp": "data parallel"},
    **{"dp_cp": "data and context parallel", "experts": "expert parallel"},
    "embedding": "the tied table's gradient, between the first and the last stage",
}
SECONDS_PER_DAY = 86_400


@dataclasses.dataclass(frozen=True)
class Budget:
    """What a whole run takes."""

    tokens: float
    price_per_gpu_hour: float | None = None

    def days(self, found: Estimate) -> float:
        return self.tokens / found.tokens_per_second / SECONDS_PER_DAY

    def cost(self, found: Estimate) -> float | None:
        if self.price_per_gpu_hour is None:
            return None
        return self.days(found) * 24 * found.world_size * self.price_per_gpu_hour


def as_dict(found: Estimate, budget: Budget | None = None) -> dict[str, Any]:
    """Everything, for ``--json``: bytes, seconds and shares as plain numbers."""
    numbers: dict[str, Any] = {
        "total_parameters": found.total_parameters,
        "active_parameters": found.active,
        "parameters": dict(found.total),
        "world_size": found.world_size,
        "hardware": dataclasses.asdict(found.hardware),
        "ranks": [
            {
                "pipeline_rank": process,
                "parameters": dict(rank.state.parameters),
                "weight_bytes": rank.state.weights,
                "gradient_bytes": rank.state.gradients,
                "optimizer_bytes": rank.state.optimizer,
                "buffer_bytes": rank.state.buffers,
                "activation_bytes": rank.activations,
                "activation_bytes_per_micro_batch": rank.held_per_micro_batch,
                "total_bytes": rank.total,
            }
            for process, rank in enumerate(found.ranks)
        ],
        "fits": found.fits,
        "memory_limit_bytes": found.limit_bytes,
        "num_micro_batches": found.num_micro_batches,
        "step_seconds": found.step_seconds,
        "seconds": found.seconds,
        "bubble": found.simulation.bubble,
        "sent_bytes_per_step": found.sent,
        "flops_per_step": found.flops_per_step,
        "mfu": found.mfu,
        "tokens_per_second": found.tokens_per_second,
    }
    if budget is not None:
        numbers["days"], numbers["cost"] = budget.days(found), budget.cost(found)
    return numbers


def as_text(found: Estimate, budget: Budget | None = None) -> str:
    """The same for reading."""
    hardware = found.hardware
    lines = [
        f"parameters: {found.total_parameters:,}"
        + (f", of which a token uses {found.active:,}" if found.active != found.total_parameters else ""),
        "  " + ", ".join(f"{part} {count:,}" for part, count in found.total.most_common()),
        "",
        f"memory per GPU in GB ({hardware.name}: {hardware.memory_gb:g}, of which {hardware.reserved_gb:g} reserved):",
        "  pipeline rank   weights  gradients  optimizer  buffers  activations    total",
    ]
    for process, rank in enumerate(found.ranks):
        state = rank.state
        parts = (state.weights, state.gradients, state.optimizer, state.buffers, rank.activations, rank.total)
        widths = (10, 11, 11, 9, 13, 9)
        row = "".join(f"{size / 1e9:{width}.2f}" for size, width in zip(parts, widths, strict=True))
        lines.append(f"  {process:13d}{row}")
    if not found.fits:
        lines.append(f"  does not fit: {found.peak_bytes / 1e9:.1f} GB of {found.limit_bytes / 1e9:.1f}")
    lines += ["", f"step: {found.step_seconds:.3f} s with {found.num_micro_batches} micro-batches"]
    for name, seconds in found.seconds.items():
        if seconds > 0:
            lines.append(f"  {name:12s}{seconds:9.3f} s{seconds / found.step_seconds:8.1%}")
    if found.config.parallel.optimizer_cpu_offload:
        lines.append("  not counted: the update in CPU memory of --optimizer-cpu-offload, and the way there and back")
    lines.append(f"pipeline bubble: {found.simulation.bubble:.1%}")
    for axis, count in found.sent.items():
        lines.append(f"sent per GPU and step, {AXIS_NAMES.get(axis, axis)}: {count / 1e9:.2f} GB")
    lines += ["", f"model FLOPs per step: {found.flops_per_step:.3e}", f"MFU: {found.mfu:.1%}"]
    lines.append(f"tokens per second: {found.tokens_per_second:,.0f}")
    if budget is not None:
        cost = budget.cost(found)
        price = "" if cost is None else f", {cost:,.0f} at {budget.price_per_gpu_hour:g} per GPU-hour"
        lines.append(f"{budget.tokens:.3g} tokens: {budget.days(found):.1f} days on {found.world_size} GPUs{price}")
    return "\n".join(lines)


def search_text(results: Sequence[Result]) -> str:
    """A table, best layout first, and the command of the best."""
    lines = ["  tp   pp   vp   ep  micro  recompute    step (s)    MFU   GB per GPU   why it is not the first"]
    for choice, found, reason in results:
        lines.append(
            f"{choice.tp:4d} {choice.pp:4d} {choice.virtual:4d} {choice.ep:4d} {choice.micro_batch:6d}  "
            f"{choice.recompute:9s} {found.step_seconds:11.3f} {found.mfu:6.1%} "
            f"{found.peak_bytes / 1e9:12.1f}   {reason}".rstrip()
        )
    return "\n".join(lines)


def launch_command(config: TrainConfig, world_size: int, gpus_per_node: int) -> str:
    """torchrun with every flag that is not at its default, on the GPUs there (--device is this machine's: left out)."""
    # As many on each node as leave none over: 12 GPUs in nodes of 8 are two nodes with 6 processes each.
    per_node = next(size for size in range(min(world_size, gpus_per_node), 0, -1) if world_size % size == 0)
    nodes = world_size // per_node
    words = ["torchrun", "--nproc-per-node", str(per_node)]
    if nodes > 1:
        words += ["--nnodes", str(nodes), "--rdzv-backend", "c10d", "--rdzv-endpoint", "HOST:29500"]
    words.append("pretrain_gpt.py")
    for path, item in leaf_fields(TrainConfig):
        value: Any = config
        for name in path:
            value = getattr(value, name)
        if item.name == "device":
            continue
        if value == item.default or item.default_factory is not dataclasses.MISSING and value == item.default_factory():
            continue
        words += _words(item.name, value)
    return shlex.join(words)


def _words(name: str, value: Any) -> list[str]:
    if isinstance(value, bool):
        return [flag(name if value else f"no_{name}")]
    return [flag(name), *map(str, value if isinstance(value, tuple) else [value])]


def draw(found: Estimate, file: Path) -> None:
    """Memory per pipeline rank, stacked, and the parts of a step's time, as a PNG."""
    try:
        import matplotlib
    except ImportError as error:
        raise ValueError("a picture needs matplotlib: pip install 'megatron_hc[plot]'") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (memory, time) = pyplot.subplots(1, 2, figsize=(11, 4.5))
    parts = {
        "weights": [rank.state.weights for rank in found.ranks],
        "gradients": [rank.state.gradients for rank in found.ranks],
        "optimizer": [rank.state.optimizer for rank in found.ranks],
        "buffers": [rank.state.buffers for rank in found.ranks],
        "activations": [rank.activations for rank in found.ranks],
    }
    bottoms = [0.0] * len(found.ranks)
    for name, sizes in parts.items():
        heights = [size / 1e9 for size in sizes]
        memory.bar(range(len(heights)), heights, bottom=bottoms, label=name)
        bottoms = [low + height for low, height in zip(bottoms, heights, strict=True)]
    memory.axhline(found.limit_bytes / 1e9, color="black", linestyle="--", label="limit")
    memory.set(xlabel="pipeline rank", ylabel="GB per GPU", title="memory")
    memory.legend(fontsize=8)
    seconds = {name: value for name, value in found.seconds.items() if value > 0}
    time.barh(list(seconds), list(seconds.values()))
    time.invert_yaxis()
    time.set(xlabel="seconds per step", title=f"{found.step_seconds:.3f} s per step, MFU {found.mfu:.1%}")
    figure.tight_layout()
    kind = file.suffix.lstrip(".")
    if kind not in figure.canvas.get_supported_filetypes():
        raise ValueError(f"--output {file}: a picture's name ends in .png, .svg or .pdf")
    replace_file(file, lambda beside: figure.savefig(beside, format=kind, dpi=120))
    pyplot.close(figure)
