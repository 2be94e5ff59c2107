"""Cost of residual methods at a model's real shapes: bytes per second of a boundary, and whole training steps.

    python tools/benchmark.py --preset cpu-small [--output figures.json] [--plot figures.png]

Parts (--parts, default all that can run): "kernels" runs one boundary forward and backward and compares the bytes that
it must move with a copy measured in the same run; "steps" runs whole training steps (forward, loss, backward, AdamW)
of every method, of this project's peers where they are installed, and prints times and peak memory as ratios to the
plain residual; "curves" repeats "kernels" over widths and numbers of streams; "launch" tries other launch options of
the Triton kernels. A method and plain take turns in random
order, and a ratio is the median over rounds of ratios within a round, so that a drift of the machine falls on both.
"""

from __future__ import annotations

import argparse
import functools
from typing import Any

import torch
from benchmark_kernels import KERNELS, kernel
from benchmark_launch import launch
from benchmark_report import Report, plot
from benchmark_steps import CASES, steps

from megatron_hc.cpu_memory import keep_freed_memory
from megatron_hc.kernels.boundary import check_backend

PRESETS: dict[str, dict[str, Any]] = {
    "cpu-small": {"hidden": 512, "layers": 3, "heads": 8, "ffn": 1344, "seq": 2048, "batch": 1, "vocab": 256},
    "gpt-124m": {"hidden": 768, "layers": 12, "heads": 12, "ffn": 2048, "seq": 1024, "batch": 16, "vocab": 50304},
    "dense-1b": {"hidden": 2048, "layers": 16, "heads": 16, "ffn": 8192, "seq": 4096, "batch": 4, "vocab": 128256},
    "dense-7b-slice": {"hidden": 4096, "layers": 4, "heads": 32, "ffn": 11008, "seq": 4096, "batch": 2, "vocab": 32000},
    "moe-1b-7b-slice": {
        **{"hidden": 2048, "layers": 4, "heads": 16, "ffn": 1024, "seq": 4096, "batch": 2, "vocab": 50304},
        **{"experts": 64, "topk": 8},
    },
}
"""Llama-like decoders (MoE: OLMoE's shape); the slices have the width of a large model and few of its layers."""


def kernels(shape: argparse.Namespace, dtype: torch.dtype, report: Report) -> None:
    for method, n, d in kernel_sizes(shape):
        measure_kernel("kernels", method, n, d, shape, dtype, report)


def curves(shape: argparse.Namespace, dtype: torch.dtype, report: Report) -> None:
    """Over d and over n, but for what "kernels" has measured. A new size costs seconds of compiling on CUDA."""
    is_cuda = shape.device == "cuda"
    widths = [(4, d) for d in ((512, 1024, 2048, 4096) if is_cuda else (256, 512, 1024, 2048, 4096))]
    counts = [(n, shape.hidden) for n in ((2, 4, 8) if is_cuda else (1, 2, 3, 4, 8)) if shape.hidden % n == 0]
    done = kernel_sizes(shape) if "kernels" in shape.parts else []
    for n, d in dict.fromkeys((*widths, *counts)):
        for method in KERNELS:
            is_possible = n > 1 or method not in ("mhc", "virtual-width")
            if is_possible and d <= 2 * shape.hidden and (method, n, d) not in done:
                measure_kernel("curves", method, n, d, shape, dtype, report)


def kernel_sizes(shape: argparse.Namespace) -> list[tuple[str, int, int]]:
    counts = {"frac": (4,), "virtual-width": (3, 4)}
    return [(method, n, shape.hidden) for method in KERNELS for n in counts.get(method, (2, 4))]


def measure_kernel(
    part: str, method: str, n: int, d: int, shape: argparse.Namespace, dtype: torch.dtype, report: Report
) -> None:
    measure = functools.partial(kernel, method, n, d, shape.seq * shape.batch, dtype, shape)
    row = report.attempt(f"{method} n {n} d {d}", measure)
    if row is not None:
        report.add(part, row)


PARTS = {"kernels": kernels, "steps": steps, "curves": curves, "launch": launch}
"""In the order in which they run."""


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--preset", choices=PRESETS, default="cpu-small")
    for name in ("hidden", "layers", "heads", "ffn", "seq", "batch", "vocab"):
        parser.add_argument(f"--{name}", type=int, help="instead of the preset's")
    parser.add_argument("--parts", default="kernels,steps", help="comma-separated: kernels, steps, curves, launch")
    parser.add_argument("--methods", help=f"comma-separated, default all: {', '.join(CASES)}")
    parser.add_argument("--peers", action=argparse.BooleanOptionalAction, default=True, help="other implementations")
    parser.add_argument("--rounds", type=int, help="default: 7 on a CPU, 5 on CUDA")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--cpu-time", action="store_true", help="time of the process, for a machine that is busy")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), help="default: bf16 on CUDA, fp32 on a CPU")
    parser.add_argument("--backend", default="auto", help="--fused-residual-backend")
    parser.add_argument("--compile", action="store_true", help="torch.compile every layer (peers stay as they are)")
    parser.add_argument("--peak-tflops", type=float, help="of one device, for MFU")
    parser.add_argument("--output", help="JSON file of all figures")
    parser.add_argument("--plot", help="PNG file")
    arguments = parser.parse_args()
    for name, value in PRESETS[arguments.preset].items():
        if getattr(arguments, name, None) is None:
            setattr(arguments, name, value)
    arguments.rounds = arguments.rounds or (5 if arguments.device == "cuda" else 7)
    arguments.methods = list(CASES) if arguments.methods is None else arguments.methods.split(",")
    arguments.parts = arguments.parts.split(",")
    for name, values, known in (
        ("--methods", arguments.methods, CASES),
        ("--parts", arguments.parts, PARTS),
    ):
        unknown = [value for value in values if value not in known]
        if unknown:
            parser.error(f"{name}: {', '.join(unknown)} must be among {', '.join(known)}")
    if arguments.cpu_time and arguments.device == "cuda":
        parser.error("--cpu-time needs --device cpu: the process waits while a GPU works")
    if arguments.hidden % arguments.heads:
        parser.error(f"--heads ({arguments.heads}) must divide --hidden ({arguments.hidden})")
    return arguments


def main() -> None:
    shape = read_arguments()
    torch.set_num_threads(shape.threads)
    if shape.device == "cpu":
        keep_freed_memory()  # as training does
    chosen = shape.dtype or ("bf16" if shape.device == "cuda" else "fp32")
    dtype = torch.bfloat16 if chosen == "bf16" else torch.float32
    try:
        check_backend(shape.backend, torch.device(shape.device))
    except ValueError as error:
        raise SystemExit(f"benchmark.py: error: {error}") from None
    tokens = shape.seq * shape.batch
    device = torch.cuda.get_device_name() if shape.device == "cuda" else f"CPU, {shape.threads} threads"
    head = {"preset": shape.preset, "device": device, "dtype": chosen, "torch": torch.__version__}
    report = Report({**head, "compile": shape.compile}, shape.output)
    print(f"{shape.preset}: {device}, {chosen}, d {shape.hidden}, {shape.layers} layers, {tokens} tokens", flush=True)
    for name, part in PARTS.items():
        if name in shape.parts:
            part(shape, dtype, report)
    report.save()
    if shape.plot is not None:
        plot(report.figures, shape.plot)
    if report.errors:
        raise SystemExit(f"benchmark.py: failed: {', '.join(report.errors)}")


if __name__ == "__main__":
    main()
