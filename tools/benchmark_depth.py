"""Does the best learning rate stay where it is when the model gets deeper? A sweep, with and without --residual-scale.

    python tools/benchmark_depth.py --input tinyshakespeare.txt

A small decoder (32 wide, RMSNorm, SwiGLU, bytes) of several depths is trained for a few hundred steps at learning rates
a factor of two apart, for --residual-scale none, depth-mup and completep with the smallest depth as --base-num-layers,
where all three are the same model. Printed: the training loss of the last fifth of the steps, averaged over seeds, and,
for every scale and depth, the best rate: the lowest point of a parabola through the three best neighbours (in log2 of
the rate), with its distance from the best rate at the base depth in factors of two.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import math
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
from benchmark_shakespeare import write_part

from megatron_hc.cli import exit_on_user_error, parse
from megatron_hc.launch import TrainingStopped
from megatron_hc.train import train

SCALES = ("none", "depth-mup", "completep")

FLAGS = """--hidden-size 32 --num-attention-heads 2 --seq-length 32 --position-embedding-type rope --swiglu
    --ffn-hidden-size 88 --normalization RMSNorm --disable-bias-linear --make-vocab-size-divisible-by 1
    --init-method-std 0.1 --micro-batch-size 16 --lr-decay-style cosine --weight-decay 0 --adam-beta2 0.95
    --tokenizer-type ByteTokenizer --eval-iters 0 --eval-interval 0 --num-workers 0 --log-interval 1 --device cpu"""


def one_run(
    scale: str, layers: int, base: int, lr: float, iterations: int, seed: int, data: str, folder: Path
) -> float:
    """Mean training loss of the last fifth of the steps; nan where the run stopped."""
    metrics = folder / "metrics.jsonl"
    metrics.unlink(missing_ok=True)
    depth = "" if scale == "none" else f"--residual-scale {scale} --base-num-layers {base}"
    flags = f"""{FLAGS} --num-layers {layers} --lr {lr} --min-lr {lr / 10} --train-iters {iterations} --seed {seed}
        --lr-warmup-iters {iterations // 10} --train-data-path {data} --data-cache-path {folder / "cache"}
        --metrics-jsonl {metrics} {depth}"""
    parsed = parse(flags.split())
    parsed.config.validate()
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            train(parsed)
    except TrainingStopped:
        return math.nan
    losses = [json.loads(line)["lm_loss"] for line in metrics.read_text(encoding="utf-8").splitlines()]
    return statistics.mean(losses[-max(1, iterations // 5) :])


def best_rate(losses: dict[float, float]) -> float:
    """log2 of the best rate; at an end of the sweep that end itself."""
    points = [(math.log2(lr), loss) for lr, loss in sorted(losses.items()) if not math.isnan(loss)]
    at = min(range(len(points)), key=lambda index: points[index][1])
    if at in (0, len(points) - 1):
        return points[at][0]
    (x0, y0), (x1, y1), (x2, y2) = points[at - 1 : at + 2]
    left, right = (y1 - y0) / (x1 - x0), (y2 - y1) / (x2 - x1)
    curvature = (right - left) / (x2 - x0)
    return (x0 + x1) / 2 - left / (2 * curvature) if curvature > 0 else x1


def report(found: dict[tuple[str, int], dict[float, float]], rates: Sequence[float], base: int) -> None:
    print(f"| scale | layers | {' | '.join(f'{lr:.2g}' for lr in rates)} | best rate | moved, in factors of 2 |")
    print("|---" * (len(rates) + 4) + "|")
    for (scale, layers), losses in found.items():
        best = best_rate(losses)
        shift = best - best_rate(found[scale, base])
        row = " | ".join(f"{losses[lr]:.3f}" for lr in rates)
        print(f"| {scale} | {layers} | {row} | {2**best:.2g} | {shift:+.2f} |")


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0], allow_abbrev=False)
    parser.add_argument("--input", type=Path, required=True, help="the text")
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 8, 16], help="depths, the base first")
    parser.add_argument("--exponents", type=int, nargs="+", default=[-9, -8, -7, -6, -5, -4], help="log2 of the rates")
    parser.add_argument("--iterations", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=2, help="runs with seeds 1 .. N are averaged (default: 2)")
    options = parser.parse_args(argv)
    with exit_on_user_error("benchmark_depth.py"), tempfile.TemporaryDirectory() as name:
        try:
            data = write_part(Path(name) / "train", options.input.read_bytes())
        except OSError as error:
            raise ValueError(f"--input {options.input} cannot be read ({error.strerror})") from error
        if options.iterations < 20 or len(options.exponents) < 3 or options.seeds < 1:
            raise ValueError("--iterations must be at least 20, --exponents at least 3, --seeds at least 1")
        torch.set_num_threads(1)
        rates, base = [2.0**exponent for exponent in sorted(options.exponents)], options.layers[0]
        found: dict[tuple[str, int], dict[float, float]] = {}
        for layers in options.layers:
            for scale in SCALES:
                if layers == base and scale != "none":
                    found[scale, layers] = found["none", layers]  # the same model
                    continue
                found[scale, layers] = {
                    lr: statistics.mean(
                        one_run(scale, layers, base, lr, options.iterations, seed, data, Path(name))
                        for seed in range(1, options.seeds + 1)
                    )
                    for lr in rates
                }
                print(scale, layers, *(f"{loss:.3f}" for loss in found[scale, layers].values()), flush=True)
        print(
            f"training loss (nats per byte) after {options.iterations} steps of 16 x 32 bytes, by largest learning rate"
        )
        report(found, rates, base)


if __name__ == "__main__":
    main(sys.argv[1:])
