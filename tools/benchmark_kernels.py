"""One boundary alone, for tools/benchmark.py: time, and bytes per second against a copy."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from benchmark_peers import boundary_peers
from torch import Tensor

from megatron_hc.kernels.boundary import boundary
from megatron_hc.kernels.coefficients import Form

KERNELS = {
    "hyper-static": ("tanh", False),
    "hyper-dynamic": ("tanh", True),
    "frac": ("tanh", True),
    "virtual-width": ("virtual", True),
    "mhc": ("sinkhorn", True),
}


def fractions(method: str, n: int) -> int:
    """R: into how many streams' widths a hidden vector is cut."""
    return {"frac": n, "virtual-width": 2}.get(method, 1)


def problem(method: str, n: int, d: int, tokens: int, dtype: torch.dtype, shape: Any) -> tuple[Form, list[Any]]:
    """A form of boundary and what it takes, all with gradients."""
    kind, is_dynamic = KERNELS[method]
    R = fractions(method, n)
    D, is_joint, is_virtual = d // R, kind == "sinkhorn", kind == "virtual"
    K = n * n + 2 * n if is_joint else R + n + (R if is_virtual else 1)
    normal = lambda *size, of=torch.float32: torch.randn(*size, dtype=of, device=shape.device).requires_grad_()  # noqa: E731
    form = Form(kind, n, R, is_joint, False, 1e-5, 20, "RMSNorm", 1e-5, shape.backend)
    written = normal(tokens, R, D, of=dtype), normal(tokens, R, n), normal(tokens, n, n)
    projection = normal(K, n * D if is_joint else D) if is_dynamic else None
    static = [normal(n, R), normal(n, n), normal(R, n) if is_virtual else normal(n)]
    scales = [normal(n, R + n), normal(R, n)] if is_virtual else [normal(1), normal(1)]
    parameters = [normal(K), normal(3)] if is_joint else [*static, *(scales if is_dynamic else [])]
    return form, [normal(tokens, n, D, of=dtype), *written, projection, normal(d), None, parameters]


def minimum_bytes(method: str, n: int, d: int, tokens: int, dtype: torch.dtype) -> tuple[int, int]:
    """What a boundary has to read and write, forward and backward: 2 n D + 2 C and 3 n D + 3 C numbers per token."""
    D = d // fractions(method, n)
    return tuple(factor * (n * D + d) * tokens * dtype.itemsize for factor in (2, 3))  # type: ignore[return-value]


def best_time(run: Callable[[], Any], shape: Any) -> float:
    """Median seconds of ``run`` over the rounds; on CUDA of the device alone."""
    if shape.device == "cuda":
        return _device_time(run, max(15, shape.rounds))
    times = []
    for _ in range(shape.rounds + 1):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def _device_time(run: Callable[[], Any], rounds: int) -> float:
    """By events, each time with a cache that holds nothing of the inputs, and with the whole of ``run`` in the queue
    before the device comes to it, so that no time of the host is measured."""
    other = torch.empty(2**28, dtype=torch.uint8, device="cuda")  # a few times as large as any L2
    events = []
    for _ in range(3 + rounds):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        other.zero_()
        torch.cuda._sleep(10_000_000)  # cycles: some 5 ms
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        events.append((start, end))
    return statistics.median(start.elapsed_time(end) / 1e3 for start, end in events[3:])


def copy_speed(streams: Tensor, shape: Any) -> float:
    """Bytes per second, read and written, of a copy as large as the streams; on CUDA of 1 GiB, which no cache holds."""
    source = torch.zeros(2**28, device="cuda") if shape.device == "cuda" else streams
    return 2 * source.numel() * source.element_size() / best_time(source.clone, shape)


def kernel(method: str, n: int, d: int, tokens: int, dtype: torch.dtype, shape: Any) -> dict[str, Any]:
    """Time and bytes per second of one boundary, and of a copy."""
    form, inputs = problem(method, n, d, tokens, dtype, shape)
    leaves = [t for t in (*inputs[:7], *inputs[7]) if t is not None]
    outputs = boundary(form, *inputs)[:4]
    grads = [torch.randn_like(o) for o in outputs]
    with torch.no_grad():
        forward = best_time(lambda: boundary(form, *inputs), shape)
        bandwidth = copy_speed(inputs[0], shape)
    backward = best_time(lambda: torch.autograd.grad(outputs, leaves, grads, retain_graph=True), shape)
    moved = minimum_bytes(method, n, d, tokens, dtype)
    row = {"method": method, "n": n, "d": d, "tokens": tokens, "copy_bytes_per_second": bandwidth}
    for name, seconds, count in zip(("forward", "backward"), (forward, backward), moved, strict=True):
        share = count / seconds / bandwidth
        row |= {f"{name}_seconds": seconds, f"{name}_bytes": count, f"{name}_share_of_copy": share}
    for name, run in boundary_peers(method, n, d, tokens, dtype, shape.device).items():
        row[f"{name}_forward_backward_seconds"] = best_time(run, shape)
    others = [key for key in row if key.endswith("forward_backward_seconds")]
    beside = "".join(f"  {key.split('_forward')[0]} {1e3 * row[key]:.2f} ms" for key in others)
    print(
        f"{method:14s} n {n} d {d:5d}  forward {1e3 * forward:8.2f} ms ({row['forward_share_of_copy']:.2f} of copy)  "
        f"backward {1e3 * backward:8.2f} ms ({row['backward_share_of_copy']:.2f}){beside}",
        flush=True,
    )
    return row
