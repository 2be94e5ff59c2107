"""One boundary at all sizes against the formulas by autograd in float64: every backend that a CPU can run."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from megatron_hc.kernels import boundary_cpp, boundary_listed
from megatron_hc.kernels.boundary import boundary, check_backend, fold
from megatron_hc.kernels.coefficients import Form

STREAMS, WIDTHS, TOKENS = (1, 2, 3, 4, 8), (48, 64, 320, 1024), (1, 7, 128, 1000)
SIZES = [(1, 48, 7), (2, 64, 128), (3, 320, 7), (4, 64, 1000), (4, 1024, 7), (8, 320, 1), (8, 48, 128), (5, 64, 7)]
KINDS = ["hyper", "hyper-static", "hyper-layernorm", "frac", "virtual", "mhc", "mhc-static", "kromhc"]
BOUND = {torch.float32: 1e-5, torch.bfloat16: 2**-8}
"""Norm of the error over the norm of what is right. bf16: every result is rounded once, by half a unit in the last of 8
places. H' and its gradient, which are rounded where they are stored, are so in the reference too."""


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    """Memory that an operation has not written is NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=["torch", "cpp"])
def backend(request: pytest.FixtureRequest) -> str:
    if request.param == "cpp":
        try:
            boundary_cpp.build()
        except ValueError as error:
            pytest.skip(str(error)[:200])
    return request.param


def problem(kind: str, n: int, d: int, tokens: int, has_output: bool = True) -> tuple[Form, list, list[Tensor]]:
    """A form, what ``boundary`` takes after it (float64, random), and gradients of its results."""
    draw = torch.Generator().manual_seed(n * 7919 + d * 31 + tokens)
    normal = lambda *shape: torch.randn(shape, generator=draw, dtype=torch.float64)  # noqa: E731
    R = n if kind == "frac" else max(1, n // 2) if kind == "virtual" else 1
    D = -(-d // n) if kind == "frac" else d
    others = {"frac": "tanh", "virtual": "virtual", "kromhc": "kronecker"}
    of = others.get(kind, "tanh" if "hyper" in kind else "sinkhorn")
    K = {
        "tanh": R + n + 1,
        "virtual": 2 * R + n,
        "sinkhorn": n * n + 2 * n,
        "kronecker": 2 * n + 2 * (n.bit_length() - 1),
    }[of]
    is_joint, is_static = of in ("sinkhorn", "kronecker"), kind.endswith("static")
    norm = "LayerNorm" if kind == "hyper-layernorm" else "RMSNorm"
    form = Form(of, n, R, is_joint, norm == "LayerNorm", 1e-5, 20, norm, 1e-5)
    written = [normal(tokens, R, D), normal(tokens, R, n), normal(tokens, n, n) / n**0.5] if has_output else [None] * 3
    projection = None if is_static else normal(K, n * D if is_joint else D) / D**0.5
    if is_joint:
        parameters = [normal(K)] + ([] if is_static else [normal(3)])
    else:
        write = normal(R, n) if of == "virtual" else normal(n)
        scales = [normal(n, R + n), normal(R, n)] if of == "virtual" else [normal(1), normal(1)]
        parameters = [normal(n, R), normal(n, n), write, *([] if is_static else scales)]
    norms = [normal(R * D), normal(R * D) if norm == "LayerNorm" else None]
    inputs = [normal(tokens, n, D), *written, projection, *norms, parameters]
    grads = [normal(tokens, n, D), normal(tokens, R * D), normal(tokens, R, n), normal(tokens, n, n)]
    return form, inputs, grads


class Stored(torch.autograd.Function):
    """Rounds a float64 number to bf16, or cuts it off, and so the gradient that comes back."""

    @staticmethod
    def forward(ctx, x: Tensor, cuts: bool) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.cuts = cuts
        return bf16(x, cuts)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[no-untyped-def]
        return bf16(grad, ctx.cuts), None


def bf16(x: Tensor, cuts: bool) -> Tensor:
    x = x.float()
    return ((x.view(torch.int32) & -65536).view(torch.float32) if cuts else x.bfloat16()).double()


def reference(dtype: torch.dtype, cuts: bool = False):  # type: ignore[no-untyped-def]
    """The formulas, by autograd, in the precision of the inputs; H' is stored in ``dtype``."""

    def run(form: Form, streams: Tensor, output, write, keep, *rest):  # type: ignore[no-untyped-def]
        new = streams if output is None else boundary_listed.fold(streams, output, write, keep)
        if dtype == torch.bfloat16:
            new = Stored.apply(new, cuts)
        return boundary_listed.boundary(form, new, None, None, None, *rest)

    return run


def results(  # type: ignore[no-untyped-def]
    run, form: Form, inputs: list, grads: list[Tensor], dtype: torch.dtype, device: str = "cpu"
) -> list[Tensor]:
    """The four results and the gradients of all inputs. Streams and outputs have ``dtype``, the rest at least fp32."""
    grads = [g.to(device) for g in grads]
    inputs = [*(t if t is None else t.to(device) for t in inputs[:7]), [p.to(device) for p in inputs[7]]]
    wide = torch.promote_types(dtype, torch.float32)
    narrow = [dtype, dtype, wide, wide, wide, wide, wide]
    leaves = [None if t is None else t.to(of).requires_grad_() for t, of in zip(inputs[:7], narrow, strict=True)]
    parameters = [p.to(wide).requires_grad_() for p in inputs[7]]
    outputs = run(form, *leaves, parameters)
    wanted = [t for t in (*leaves, *parameters) if t is not None]
    found = torch.autograd.grad(outputs, wanted, [g.to(o.dtype) for g, o in zip(grads, outputs, strict=True)])
    return [t.detach().cpu() for t in (*outputs, *found)]


def rounded(inputs: list, grads: list[Tensor], dtype: torch.dtype) -> tuple[list, list[Tensor]]:
    """The numbers that are exact in ``dtype``, so that both sides see the same ones."""
    *tensors, parameters = inputs
    tensors = [t if t is None else t.to(dtype).double() for t in tensors]
    return [*tensors, [p.to(dtype).double() for p in parameters]], [g.to(dtype).double() for g in grads]


def check(
    backend: str,
    kind: str,
    dtype: torch.dtype,
    n: int,
    d: int,
    tokens: int,
    has_output: bool = True,
    device: str = "cpu",
    cuts: bool = False,
) -> None:
    """``cuts``: numbers are cut off to bf16, which is twice the error of rounding."""
    bound = 2 * BOUND[dtype] if cuts else BOUND[dtype]
    form, inputs, grads = problem(kind, n, d, tokens, has_output)
    inputs, grads = rounded(inputs, grads, dtype)
    expected = results(reference(dtype, cuts), form, inputs, grads, torch.float64)
    found, again = (results(boundary, form._replace(backend=backend), inputs, grads, dtype, device) for _ in range(2))
    plain = results(reference(dtype), form, inputs, grads, dtype) if dtype == torch.float32 else [None] * len(found)
    for position, (ours, twice, right, eager) in enumerate(zip(found, again, expected, plain, strict=True)):
        assert torch.equal(ours, twice), f"result {position} differs between two runs"
        error, allowed = (ours.double() - right).norm(), bound * right.norm()
        if eager is not None:
            # Sums whose terms cancel (with one stream the norm takes away what the read weight does): there autograd
            # in fp32 is as far off.
            allowed = torch.maximum(allowed, 10 * (eager.double() - right).norm())
        # 1e-5: of the single terms, which have size 1, where their sum is exactly zero.
        assert error <= allowed + 1e-5, f"{kind} {n, d, tokens}: result {position} {error / right.norm():.1e}"


def is_possible(kind: str, n: int) -> bool:
    return kind != "kromhc" or n in (2, 4, 8)


@pytest.mark.parametrize("dtype", BOUND, ids=["fp32", "bf16"])
@pytest.mark.parametrize("kind", KINDS)
def test_sizes(backend: str, kind: str, dtype: torch.dtype) -> None:
    for n, d, tokens in SIZES:
        if is_possible(kind, n):
            check(backend, kind, dtype, n, d, tokens)
    check(backend, kind, dtype, 2, 64, 7, has_output=False)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", BOUND, ids=["fp32", "bf16"])
@pytest.mark.parametrize("kind", KINDS)
def test_all_sizes(backend: str, kind: str, dtype: torch.dtype) -> None:
    for n, d, tokens in itertools.product(STREAMS, WIDTHS, TOKENS):
        if is_possible(kind, n):
            check(backend, kind, dtype, n, d, tokens)


@pytest.mark.parametrize("dtype", BOUND, ids=["fp32", "bf16"])
def test_fold_is_the_boundary_s_own(backend: str, dtype: torch.dtype) -> None:
    form, inputs, _ = problem("hyper", 4, 320, 200)
    wide = torch.float32
    streams, output, write, keep = (t.to(of) for t, of in zip(inputs, (dtype, dtype, wide, wide), strict=False))
    rest = [t if t is None else t.to(wide) for t in inputs[4:7]]
    parameters = [p.to(wide) for p in inputs[7]]
    new, *_ = boundary(form._replace(backend=backend), streams, output, write, keep, *rest, parameters)
    assert torch.equal(new, fold(streams, output, write, keep, backend))


def test_threads_change_no_bit(backend: str) -> None:
    form, inputs, grads = problem("hyper", 4, 64, 1000)
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            found.append(results(boundary, form._replace(backend=backend), inputs, grads, torch.float32))
    finally:
        torch.set_num_threads(threads)
    # Of a matrix product over all tokens (W's gradient) only the order of sums may differ.
    for one, many in zip(*found, strict=True):
        torch.testing.assert_close(one, many, rtol=1e-5, atol=1e-5)


def test_no_compiler_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ValueError, match="needs a C\\+\\+ compiler, and no-such-compiler is not found"):
        boundary_cpp.build()
    with pytest.raises(ValueError, match="is for --device cpu"):
        check_backend("cpp", torch.device("cuda"))
