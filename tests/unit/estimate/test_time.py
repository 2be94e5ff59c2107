"""The roofline against steps that were measured (docs/benchmarks.md, One H200), and the traffic of a boundary.

Dims: C hidden size.
"""

from __future__ import annotations

import functools

import pytest
import torch

from megatron_hc.cli import parse
from megatron_hc.estimate.boundaries import fused_boundaries
from megatron_hc.estimate.estimate import estimate
from megatron_hc.estimate.hardware import HARDWARE
from megatron_hc.mesh import Mesh
from megatron_hc.parallel.plan import build_model

COMMON = (
    "--seq-length 4096 --swiglu --disable-bias-linear --normalization RMSNorm --position-embedding-type rope --bf16 "
    "--train-iters 1 --lr 1e-4 --mock-data --tokenizer-type NullTokenizer"
)
PRESETS = {
    "dense-1b": "--num-layers 16 --hidden-size 2048 --ffn-hidden-size 8192 --num-attention-heads 16 "
    "--micro-batch-size 4 --global-batch-size 4 --vocab-size 128255",
    "dense-7b-slice": "--num-layers 4 --hidden-size 4096 --ffn-hidden-size 11008 --num-attention-heads 32 "
    "--micro-batch-size 2 --global-batch-size 2 --vocab-size 31999",
}
"""As in tools/benchmark.py."""
STEP_BOUND, RATIO_BOUND = 0.06, 0.025
"""Of a plain step's seconds, relative; of a method's ratio to it, whose measured rounds scatter by 0.03."""


@functools.cache
def seconds(preset: str, method: str) -> float:
    words = f"{COMMON} {PRESETS[preset]} --residual-connection {method}"
    config = parse(words.split()).config
    return estimate(config, HARDWARE["h200"], 1, config.data.vocab_size + 1).step_seconds


@pytest.mark.parametrize(("preset", "measured"), [("dense-1b", 0.2547), ("dense-7b-slice", 0.0851)])
def test_a_plain_step(preset: str, measured: float) -> None:
    assert seconds(preset, "plain") == pytest.approx(measured, rel=STEP_BOUND)


@pytest.mark.parametrize(
    ("preset", "method", "measured"),
    [
        ("dense-1b", "hyper", 1.080),
        ("dense-1b", "hyper --static-residual", 1.062),
        ("dense-1b", "hyper --residual-streams 2", 1.044),
        ("dense-1b", "hyper --recompute-granularity selective --recompute-modules residual", 1.099),
        ("dense-1b", "frac", 1.028),
        ("dense-1b", "mhc", 1.135),  # the mean of two figures, and what its kernels move more since
        ("dense-7b-slice", "hyper", 1.053),
    ],
)
def test_what_a_method_costs(preset: str, method: str, measured: float) -> None:
    assert seconds(preset, method) / seconds(preset, "plain") == pytest.approx(measured, abs=RATIO_BOUND)


@pytest.mark.parametrize(
    ("method", "forward", "backward"),
    [
        ("hyper", 10, 24),
        ("hyper --static-residual", 10, 20),
        ("hyper --residual-streams 2", 6, 14),
        ("frac", 4, 9),
        ("mhc", 18, 40),
        ("mhc --static-residual", 14, 20),
    ],
)
def test_traffic_of_a_boundary(method: str, forward: int, backward: int) -> None:
    """In numbers of bf16, C per token: the passes that the kernels' modules list, added up by hand."""
    words = f"{COMMON} --num-layers 2 --hidden-size 64 --num-attention-heads 4 --micro-batch-size 1 --vocab-size 127"
    model = build_model(parse(f"{words} --residual-connection {method}".split()).config, 128, Mesh(device="meta"))
    found = fused_boundaries(model, torch.bfloat16.itemsize)
    replay = 2 if method == "frac" else 3 if "streams 2" in method else 5
    assert found == {layer: tuple(2 * 2 * 64 * count for count in (forward, backward, replay)) for layer in range(2)}


@pytest.mark.parametrize("method", ["plain", "attention", "hyper --no-fused-residual"])
def test_no_fused_boundary(method: str) -> None:
    words = f"{COMMON} --num-layers 2 --hidden-size 64 --num-attention-heads 4 --micro-batch-size 1 --vocab-size 127"
    model = build_model(parse(f"{words} --residual-connection {method}".split()).config, 128, Mesh(device="meta"))
    assert fused_boundaries(model, 2) == {}
