"""One boundary at all sizes against the formulas by autograd in float64: every backend that a CPU can run."""

from __future__ import annotations

import importlib.util
import itertools
import shutil
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from megatron_hc.config.run import STREAMS_OF_CPP
from megatron_hc.kernels import boundary_cpp
from megatron_hc.kernels.boundary import boundary, check_backend, fold, folds
from megatron_hc.kernels.coefficients import Form, coefficients
from megatron_hc.kernels.norm import norm

STREAMS, WIDTHS, TOKENS = (1, 2, 3, 4, 8), (48, 64, 320, 1024), (1, 7, 128, 1000)
SIZES = [(1, 48, 7), (2, 64, 128), (3, 320, 7), (4, 64, 1000), (4, 1024, 7), (8, 320, 1), (8, 48, 128), (5, 64, 7)]
SIZES += [(3, 37, 5)]  # no whole number of vectors
HYPER_KINDS = ["hyper", "hyper-static", "hyper-layernorm", "hyper-layernorm-no-bias"]
KINDS = [*HYPER_KINDS, "frac", "virtual", "mhc", "mhc-static", "kromhc"]
BOUND = {torch.float32: 1e-5, torch.bfloat16: 2**-8}
"""By a result's dtype: the largest norm of its error over the size of what is right (``reference``).

fp32: sums of up to 10^4 terms of random sign, each rounded by 2^-24; 1e-5 is about 170 of these. bf16: one rounding, by
half a unit in the last of 8 places. What an operation keeps in fp32 has the fp32 bound under bf16 too: the reference is
given the operation's own H', which is a result that is compared by itself, so that both go on from the same rounded
numbers. Only what comes after the gradient of H', which is rounded inside of the operation, has the bf16 bound."""
NORM_EPS = 0.1
"""With one stream the norm takes away what the read weight does, but for its epsilon: with a tiny one the gradient is
rounding errors of what cancels, and no comparison of it could be a narrow one."""


@contextmanager
def poison() -> Iterator[None]:
    """Memory that an operation has not written is NaN."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    with poison():
        yield


@pytest.fixture(params=["torch", "cpp"])
def backend(request: pytest.FixtureRequest) -> str:
    if request.param == "cpp":
        try:
            boundary_cpp.build()
        except ValueError as error:
            pytest.skip(str(error)[:200])
    return request.param


def problem(kind: str, n: int, d: int, tokens: int, has_output: bool = True) -> tuple[Form, list, list[Tensor]]:
    """A form, what ``boundary`` takes after it (float64, random), and gradients of its results.

    "virtual" reads and writes half of its streams, rounded up, at a time, "virtual-all" all of them.
    """
    draw = torch.Generator().manual_seed(n * 7919 + d * 31 + tokens)
    normal = lambda *shape: torch.randn(shape, generator=draw, dtype=torch.float64)  # noqa: E731
    family = kind.split("-")[0]
    R = n if kind in ("frac", "virtual-all") else -(-n // 2) if family == "virtual" else 1
    D = -(-d // n) if kind == "frac" else d
    of = {"hyper": "tanh", "frac": "tanh", "virtual": "virtual", "mhc": "sinkhorn", "kromhc": "kronecker"}[family]
    K = {
        "tanh": R + n + 1,
        "virtual": 2 * R + n,
        "sinkhorn": n * n + 2 * n,
        "kronecker": 2 * n + 2 * (n.bit_length() - 1),
    }[of]
    is_joint, is_static = of in ("sinkhorn", "kronecker"), kind.endswith("static")
    of_norm = "LayerNorm" if "layernorm" in kind else "RMSNorm"
    form = Form(of, n, R, is_joint, of_norm == "LayerNorm", 1e-5, 20, of_norm, NORM_EPS)
    written = [normal(tokens, R, D), normal(tokens, R, n), normal(tokens, n, n) / n**0.5] if has_output else [None] * 3
    projection = None if is_static else normal(K, n * D if is_joint else D) / D**0.5
    if is_joint:
        parameters = [normal(K)] + ([] if is_static else [normal(3)])
    else:
        write = normal(R, n) if of == "virtual" else normal(n)
        scales = [normal(n, R + n), normal(R, n)] if of == "virtual" else [normal(1), normal(1)]
        parameters = [normal(n, R), normal(n, n), write, *([] if is_static else scales)]
    norms = [normal(R * D), normal(R * D) if kind.endswith("layernorm") else None]
    inputs = [normal(tokens, n, D), *written, projection, *norms, parameters]
    grads = [normal(tokens, n, D), normal(tokens, R * D), normal(tokens, R, n), normal(tokens, n, n)]
    return form, inputs, grads


class Given(torch.autograd.Function):
    """In place of H' what an operation has stored; its gradient is rounded to bf16 on the way back."""

    @staticmethod
    def forward(ctx, exact: Tensor, stored: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        return stored.double()

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[no-untyped-def]
        return grad.float().bfloat16().double(), None


def reference(
    form: Form, inputs: list, grads: list[Tensor], stored: Tensor | None
) -> tuple[list[Tensor], list[Tensor]]:
    """The formulas in float64 by autograd -> four results and the gradients of all inputs; the size of each one.

    Sizes: the norm; or, where a result is made of few sums over many numbers, which may cancel by chance, that of their
    terms, the root of the sum of their squares, if it is larger. ``stored``: H' in bf16.
    """
    tensors = [None if t is None else t.requires_grad_() for t in inputs[:7]]
    parameters = [p.requires_grad_() for p in inputs[7]]
    streams, output, write, keep, projection, weight, bias = tensors
    exact = streams
    if output is not None:
        exact = torch.einsum("tij,tid->tjd", keep, streams) + torch.einsum("trj,trd->tjd", write, output)
    new = exact.clone() if stored is None else Given.apply(exact, stored)
    T, logits = new.shape[0], None
    if projection is not None:
        rows = new.flatten(1).unsqueeze(1) if form.is_joint else new
        centred = rows - rows.mean(-1, keepdim=True) if form.is_centred else rows
        logits = centred @ projection.t() * torch.rsqrt(centred.square().mean(-1, keepdim=True) + form.eps)
    read, next_write, next_keep = (w.expand(T, -1, -1) for w in coefficients(form, logits, parameters))
    before = torch.einsum("tnr,tnd->trd", read, new)
    x = norm(before.flatten(1), form.norm, weight, bias, form.norm_eps)
    wanted = [t for t in (*tensors, *parameters) if t is not None]
    weights = read, next_write, next_keep
    outputs = new, x, next_write, next_keep
    *found, g_new, g_before = torch.autograd.grad(outputs, [*wanted, new, before], grads, retain_graph=True)
    results = [t.detach() for t in (exact, x, next_write, next_keep, *found)]
    sizes = [t.norm() for t in results]

    def terms(left: Tensor, right: Tensor) -> Tensor:
        """Of the products over D: [T, i, D] and [T, j, D] -> [T, i, j]"""
        return torch.einsum("tid,tjd->tij", left.detach().square(), right.square()).sqrt()

    if output is not None:
        sizes[6], sizes[7] = terms(output, g_new).norm(), terms(streams, g_new).norm()
    of_weights = terms(new, g_before), grads[2], grads[3]
    if projection is not None:
        place = 4 + next(i for i, t in enumerate(wanted) if t is projection)
        signs = torch.randn(of_weights[0].shape, generator=torch.Generator().manual_seed(0)).sign()
        (through,) = torch.autograd.grad(weights, projection, (of_weights[0] * signs, *of_weights[1:]))
        sizes[place] = max(sizes[place], through.norm())
    of_read, of_write, of_keep = (t.norm() for t in of_weights)
    few = [torch.stack((of_read, of_write, of_keep)).norm()] * len(parameters)
    if not form.is_joint:
        few[:3] = of_read, of_keep, of_write
    first = len(sizes) - len(few)
    return results, [*sizes[:first], *map(max, few, sizes[first:])]  # type: ignore[arg-type]


def results(form: Form, inputs: list, grads: list[Tensor], dtype: torch.dtype, device: str = "cpu") -> list[Tensor]:
    """The four results and the gradients of all inputs. Streams and outputs have ``dtype``, the rest at least fp32."""
    grads = [g.to(device) for g in grads]
    inputs = [*(t if t is None else t.to(device) for t in inputs[:7]), [p.to(device) for p in inputs[7]]]
    wide = torch.promote_types(dtype, torch.float32)
    narrow = [dtype, dtype, wide, wide, wide, wide, wide]
    leaves = [
        None if t is None else t.detach().to(of).requires_grad_() for t, of in zip(inputs[:7], narrow, strict=True)
    ]
    parameters = [p.detach().to(wide).requires_grad_() for p in inputs[7]]
    outputs = boundary(form, *leaves, parameters)[:4]
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
) -> list[float]:
    """-> error of every result over its bound."""
    form, inputs, grads = problem(kind, n, d, tokens, has_output)
    inputs, grads = rounded(inputs, grads, dtype)
    found, again = (results(form._replace(backend=backend), inputs, grads, dtype, device) for _ in range(2))
    is_narrow = dtype == torch.bfloat16
    expected, sizes = reference(form, inputs, grads, found[0] if is_narrow else None)
    shares = []
    for position, (ours, twice, right, size) in enumerate(zip(found, again, expected, sizes, strict=True)):
        assert torch.equal(ours, twice), f"{kind} {n, d, tokens}: result {position} differs between two runs"
        # Write and keep: products of the rounded gradient of H'.
        is_rounded = ours.dtype == torch.bfloat16 or (is_narrow and has_output and position in (6, 7))
        bound = BOUND[torch.bfloat16 if is_rounded else torch.float32]
        error = (ours.double() - right).norm()
        assert error <= bound * size, f"{backend} {kind} {n, d, tokens}: result {position} {error / size:.1e} > {bound}"
        shares.append(float(error / (bound * size)) if size else 0.0)
    return shares


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
    assert torch.equal(new, fold(streams, output, write, keep, backend, "tanh"))


def check_folds(backend: str, kind: str, dtype: torch.dtype, device: str = "cpu") -> None:
    """Streams of three boundaries in a chain, again from the weights of their writes."""
    form, inputs, _ = problem(kind, 3, 48, 7)
    form = form._replace(backend=backend)
    inputs = [t if t is None else t.to(device) for t in inputs[:7]] + [[p.float().to(device) for p in inputs[7]]]
    first, output, write, keep = (t.to(of) for t, of in zip(inputs, (dtype, dtype, *[torch.float32] * 2), strict=False))
    rest = [t if t is None else t.float() for t in inputs[4:7]]
    written = [(output.roll(k, 0), write.roll(k, 0), keep.roll(k, 0)) for k in range(3)]
    streams, expected = first, []
    for one in written:
        streams = boundary(form, streams, *one, *rest, inputs[7])[0]
        expected.append(streams)
    found = folds(form, first, written)
    assert len(found) == 3 and all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert torch.equal(fold(first, *written[0], backend, form.kind), expected[0])


@pytest.mark.parametrize("dtype", BOUND, ids=["fp32", "bf16"])
@pytest.mark.parametrize("kind", ["hyper", "frac", "virtual", "mhc"])
def test_folds_are_the_boundaries_own(backend: str, kind: str, dtype: torch.dtype) -> None:
    check_folds(backend, kind, dtype)


@pytest.mark.parametrize("kind", ["hyper", "mhc"])
def test_threads_change_no_bit(backend: str, kind: str) -> None:
    form, inputs, grads = problem(kind, 4, 64, 1000)
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            found.append(results(form._replace(backend=backend), inputs, grads, torch.float32))
    finally:
        torch.set_num_threads(threads)
    # Of a matrix product over all tokens (W's gradient) only the order of sums may differ.
    for one, many in zip(*found, strict=True):
        torch.testing.assert_close(one, many, rtol=1e-5, atol=1e-5)


def strided(tensor: Tensor | None) -> Tensor | None:
    """The same numbers, with others between them in memory."""
    return tensor if tensor is None else torch.stack((tensor, -tensor), dim=-1)[..., 0]


@pytest.mark.parametrize("kind", ["hyper-layernorm", "mhc"])
def test_strides_change_no_number(backend: str, kind: str) -> None:
    """An embedding is expanded to streams, outputs are parts of others, gradients come as they like."""
    form, (streams, *rest, parameters), grads = problem(kind, 4, 64, 7)
    found, copies = [], streams[:, :1].float().expand(-1, 4, -1)
    for lay_out, first in ((torch.clone, copies.contiguous()), (strided, strided(copies)), (strided, copies)):
        leaves = [t if t is None else t.float().requires_grad_() for t in rest]
        own = [p.float().requires_grad_() for p in parameters]
        first.requires_grad_()
        given = [t if t is None else lay_out(t) for t in leaves]
        outputs = boundary(form._replace(backend=backend), first, *given, own)[:4]
        outputs = (*outputs, fold(first, *given[:3], backend, form.kind))
        wanted = [first, *(t for t in leaves if t is not None), *own]
        gradients = torch.autograd.grad(outputs, wanted, [lay_out(g.float()) for g in (*grads, grads[0])])
        found.append([*outputs, *gradients])
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["hyper", "frac"])
def test_a_gradient_of_one_result_alone(backend: str, kind: str) -> None:
    """The others have none: what reads the streams may read nothing else."""
    form, inputs, grads = problem(kind, 2, 48, 7)
    leaves = [t if t is None else t.float().requires_grad_() for t in inputs[:7]]
    wanted = [t for t in leaves if t is not None]
    outputs = boundary(form._replace(backend=backend), *leaves, [p.float() for p in inputs[7]])[:4]
    for position in range(4):
        alone = [g.float() if place == position else torch.zeros(g.shape) for place, g in enumerate(grads)]
        expected = torch.autograd.grad(outputs, wanted, alone, retain_graph=True)
        found = torch.autograd.grad(outputs[position], wanted, alone[position], retain_graph=True)
        torch.testing.assert_close(found, expected)


def test_a_layernorm_of_numbers_far_from_zero(backend: str) -> None:
    """A variance that is a difference of squares would be wrong by several percent."""
    form, inputs, _ = problem("hyper-layernorm", 2, 48, 7, has_output=False)
    inputs[0] += 1000
    expected, _ = reference(form._replace(norm_eps=1e-5), inputs, problem("hyper-layernorm", 2, 48, 7)[2], None)
    wide = [t if t is None else t.detach().float() for t in inputs[:7]]
    parameters = [p.detach().float() for p in inputs[7]]
    found = boundary(form._replace(backend=backend, norm_eps=1e-5), *wide, parameters)[1:4]
    for ours, right in zip(found, expected[1:4], strict=True):
        torch.testing.assert_close(ours.double(), right, rtol=2e-3, atol=2e-3)


def test_how_many_streams_cpp_takes() -> None:
    """The command line refuses more, and cannot read the source."""
    assert f"constexpr int MAX_STREAMS = {STREAMS_OF_CPP};" in boundary_cpp.SOURCE.read_text()


def test_cpp_is_built_to_run_on_all_threads() -> None:
    """``at::parallel_for`` is a plain loop in a library that was compiled without OpenMP, and nothing else tells."""
    if shutil.which("c++") is None:
        pytest.skip("no C++ compiler")
    library = boundary_cpp.build().read_bytes()
    assert b"GOMP_parallel" in library or b"__kmpc_fork_call" in library


def test_no_compiler_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ValueError, match="needs a C\\+\\+ compiler, and no-such-compiler is not found"):
        boundary_cpp.build()
    with pytest.raises(ValueError, match="is for --device cpu"):
        check_backend("cpp", torch.device("cuda"))


def test_no_triton_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor is there a GPU, and kernels are not interpreted."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    with pytest.raises(ValueError, match="triton needs --device cuda, not cpu: use torch or cpp"):
        check_backend("triton", torch.device("cpu"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="triton needs Triton, which comes with torch for CUDA"):
        check_backend("triton", torch.device("cuda"))
