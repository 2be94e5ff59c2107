"""Every Triton kernel compiles for a GPU where there is none: the interpreter takes code that the compiler refuses.

No number is right here, since nothing is started; ``test_boundary_triton.py`` and ``test_step_triton.py`` compare them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from test_boundary_sizes import problem
from torch import Tensor

from megatron_hc.kernels.boundary import _row_sums

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1" or torch.cuda.is_available():
    pytest.skip("for a CPU, without the interpreter", allow_module_level=True)

import triton
from triton.backends import backends
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from megatron_hc.kernels import (
    boundary_triton,
    boundary_triton_joint,
    cross_entropy_triton,
    norm_triton,
    rope_triton,
    swiglu_triton,
)

SHARED_MEMORY = 227 * 1024
"""Bytes of a program on Hopper; a kernel that wants more compiles and does not start."""

pytestmark = pytest.mark.skipif("nvidia" not in backends, reason="Triton's compiler for NVIDIA GPUs is not installed")


class Hopper:
    """What Triton asks a driver before it starts a kernel."""

    get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))
    get_current_device = staticmethod(lambda: 0)
    get_current_stream = staticmethod(lambda device: 0)


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Kernels are compiled instead of run; their names."""
    names: list[str] = []
    run = JITFunction.run

    def compile_alone(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        names.append(kernel.metadata.name)
        assert kernel.metadata.shared <= SHARED_MEMORY, f"{names[-1]} wants {kernel.metadata.shared} bytes"

    monkeypatch.setattr(driver, "_active", Hopper())
    monkeypatch.setattr(JITFunction, "run", compile_alone)
    yield names


CASES = [
    ("hyper", 3, 40, 1, True),
    ("hyper", 4, 64, 7, True),
    ("hyper-layernorm", 2, 48, 7, False),
    ("hyper-static", 2, 40, 7, True),
    ("frac", 3, 48, 7, True),
    ("virtual-layernorm", 3, 48, 1, True),
    ("virtual-static", 2, 40, 7, False),
    ("mhc", 3, 40, 1, True),
    ("mhc-static", 2, 48, 7, True),
]
MORE = [
    (kind, n, d, 7, True)
    for kind in ("hyper", "hyper-layernorm", "hyper-static", "frac", "virtual", "virtual-layernorm", "mhc")
    for n in (1, 2, 4, 8)
    for d in (48, 1024)
    if kind != "mhc" or 1 < n < 8  # n = 8 takes minutes
]
MORE += [("hyper", 4, 4096, 7, True), ("hyper", 8, 8192, 7, True), ("frac", 8, 2048, 7, True)]


def check(case: tuple[str, int, int, int, bool], dtype: torch.dtype, compiled: list[str]) -> None:
    kind, n, d, tokens, has_output = case
    form, inputs, grads = problem(kind, n, d, tokens, has_output)
    pieces = boundary_triton_joint if form.is_joint else boundary_triton
    narrow = [dtype, dtype, *[torch.float32] * 5]
    tensors = [None if t is None else t.to(of) for t, of in zip(inputs[:7], narrow, strict=True)]
    parameters = [p.float() for p in inputs[7]]
    sums = _row_sums(form, tensors[4])
    new, x, write, keep, read, statistics, of_norm = pieces.forward(form, *tensors, parameters, sums)
    given = [g.to(t.dtype) for g, t in zip(grads, (new, x, write, keep), strict=True)]
    kept = (new, read, statistics, of_norm)
    pieces.backward(form, *given, *tensors[:6], parameters, sums, *kept)
    wanted = {"weights", "backward_read", "backward_weights", "backward_streams", "parameter_gradients", "_sum_of_rows"}
    wanted |= {"fold", "read_and_norm"} if form.is_joint else {"forward"}
    if tensors[4] is not None:
        wanted |= {"_projection_gradient", *(("logits", "with_product") if form.is_joint else ())}
    assert wanted <= set(compiled)


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_a_boundary(case: tuple[str, int, int, int, bool], compiled: list[str]) -> None:
    for dtype in (torch.bfloat16, torch.float32) if case[0] in ("hyper", "mhc") else (torch.bfloat16,):
        check(case, dtype, compiled)


@pytest.mark.slow
@pytest.mark.parametrize("case", MORE, ids=lambda case: "-".join(map(str, case)))
def test_more_boundaries(case: tuple[str, int, int, int, bool], compiled: list[str]) -> None:
    for dtype in (torch.bfloat16, torch.float32):
        check(case, dtype, compiled)


def test_many_boundaries_streams(compiled: list[str]) -> None:
    form, inputs, _ = problem("hyper", 3, 48, 7)
    streams, output, write, keep = inputs[0].bfloat16(), inputs[1].bfloat16(), inputs[2].float(), inputs[3].float()
    boundary_triton.folds(streams, [(output, write, keep)] * 3)
    assert compiled == ["fold_all"]


def test_the_rest_of_a_step(compiled: list[str]) -> None:
    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.bfloat16)

    x, weight = normal(5, 48), normal(48)
    for bias, is_centred in ((None, False), (weight, True)):
        _, statistics = norm_triton.forward(x, weight, bias, is_centred, 1e-5)
        norm_triton.backward(x, x, None, weight, bias, statistics, is_centred)
        _, _, statistics = norm_triton.forward_of_sum(x, x, 1.0, weight, bias, is_centred, 1e-5)
        norm_triton.backward(x, x, x, weight, bias, statistics, is_centred)
    swiglu_triton.backward(x, swiglu_triton.forward(x))
    table = torch.randn(4, 1, 1, 16)
    for direction in (1, -1):
        rope_triton.turned(normal(4, 2, 3, 24), table, table, direction)
    labels, scales = torch.zeros(5, dtype=torch.int64), torch.ones(5)
    for entries in (48, 1 << 13):
        logits = normal(5, entries)
        for needs_gradient in (False, True):
            cross_entropy_triton.losses(logits, labels, scales, entries - 3, needs_gradient)
        cross_entropy_triton.statistics(logits, labels, entries - 3, 0.0)
        cross_entropy_triton.write_gradient(logits, labels, scales, scales, entries - 3)
    assert {"_turn", "_loss", "_statistics", "_gradient"} <= set(compiled) and compiled.count("_forward") == 5


def test_what_the_compiler_refuses_is_seen(compiled: list[str]) -> None:
    @triton.jit
    def wrong(x):  # type: ignore[no-untyped-def]
        x + undefined  # noqa: B018, F821

    with pytest.raises(triton.CompilationError):
        wrong[(1,)](torch.zeros(4))
