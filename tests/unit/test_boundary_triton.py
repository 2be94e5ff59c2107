"""The Triton kernels against the formulas: in Triton's interpreter on a CPU, compiled where there is a GPU."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from helpers import build, gradients, random_tokens, randomise, small_config
from test_boundary import counted, distance
from test_boundary_sizes import BOUND, check, check_folds, poison, problem

from megatron_hc.kernels import boundary
from megatron_hc.kernels.coefficients import Form

triton = pytest.importorskip("triton")
IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not IS_INTERPRETED else "cpu"
runs_kernels = pytest.mark.skipif(DEVICE == "cpu" and not IS_INTERPRETED, reason="needs a GPU or TRITON_INTERPRET=1")

CASES = [
    ("hyper", 4, 48, 4, True),
    ("hyper", 3, 40, 5, True),
    ("hyper", 1, 16, 3, True),
    ("hyper", 2, 64, 7, False),
    ("hyper", 8, 48, 1, True),
    ("hyper-static", 2, 32, 5, True),
    ("hyper-layernorm", 3, 48, 6, True),
    ("hyper-layernorm-no-bias", 3, 48, 6, True),
    ("frac", 4, 48, 3, True),
    ("frac", 3, 48, 5, False),
    ("virtual-layernorm", 3, 48, 2, True),
    ("virtual-static", 3, 40, 2, True),
    ("virtual-layernorm", 8, 32, 1, False),
    ("virtual-layernorm", 7, 28, 2, True),  # 15 logits: one column of 16 is left, two are wanted
    ("mhc", 4, 48, 4, True),
    ("mhc", 3, 40, 3, True),
    ("mhc", 2, 32, 70, False),
    ("mhc-static", 4, 48, 2, True),
]
ALL_CASES = [
    (kind, n, d, tokens, True)
    for kind in ("hyper", "frac", "virtual", "mhc")
    for n in (1, 2, 3, 4, 8)
    for d in (48, 64, 320, 1024)
    for tokens in (1, 7, 128, 1000)
    if kind != "mhc" or n > 1
]
ALL_CASES += [
    (f"virtual-{kind}", n, 48, tokens, tokens > 1)
    for kind in ("all", "layernorm", "static")
    for n in (1, 2, 3, 8)
    for tokens in (1, 7)
]
MANY_TOKENS = [("hyper", 4, 48, 5000, True), ("frac", 2, 64, 5000, True), ("virtual-layernorm", 2, 48, 5000, True)]
"""More than all programs of a GPU take at once."""
FEW_TOKENS = [case for case in ALL_CASES if case[3] <= 7]  # the interpreter goes through them one by one


@pytest.mark.skipif(IS_INTERPRETED, reason="these are the tests that it runs")
@pytest.mark.parametrize("marker", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_in_the_interpreter(marker: str) -> None:
    """In a process of its own: Triton decides when it is imported."""
    if triton.__version__.startswith("3.6.") and np.lib.NumpyVersion(np.__version__) >= "2.4.0":
        pytest.skip("Triton 3.6 makes a loop's bound a number in a way that numpy 2.4 refuses: install numpy<2.4")
    command = [sys.executable, "-m", "pytest", "-x", "-m", marker, __file__]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    limit = 600 if marker == "not slow" else 7200
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=limit)
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-3000:]


def check_kernels(case: tuple[str, int, int, int, bool], dtype: torch.dtype) -> None:
    kind, n, d, tokens, has_output = case
    form, (streams, *_), _ = problem(kind, n, d, tokens, has_output)
    module = boundary.implementation(form._replace(backend="triton"), streams.to(dtype))
    assert module.__name__.startswith("megatron_hc.kernels.boundary_triton"), "torch did it"
    with poison():
        check("triton", kind, dtype, n, d, tokens, has_output, DEVICE)


@runs_kernels
@pytest.mark.parametrize("dtype", BOUND, ids=["fp32", "bf16"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_kernels(case: tuple[str, int, int, int, bool], dtype: torch.dtype) -> None:
    check_kernels(case, dtype)


@runs_kernels
def test_more_tokens_than_all_programs_take_at_once() -> None:
    check_kernels(("hyper-layernorm", 2, 16, 70 if IS_INTERPRETED else 5000, True), torch.float32)


@runs_kernels
@pytest.mark.parametrize("kind", ["hyper", "frac", "virtual", "mhc"])
def test_many_boundaries_streams_in_one_kernel(kind: str) -> None:
    check_folds("triton", kind, torch.bfloat16, DEVICE)


@pytest.mark.slow
@pytest.mark.skipif(not IS_INTERPRETED, reason="needs TRITON_INTERPRET=1")
@pytest.mark.parametrize("case", FEW_TOKENS, ids=lambda case: "-".join(map(str, case)))
def test_sizes_in_the_interpreter(case: tuple[str, int, int, int, bool]) -> None:
    for dtype in BOUND:
        check_kernels(case, dtype)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
@pytest.mark.parametrize("case", ALL_CASES + MANY_TOKENS, ids=lambda case: "-".join(map(str, case)))
def test_sizes_on_a_gpu(case: tuple[str, int, int, int, bool]) -> None:
    for dtype in BOUND:
        check_kernels(case, dtype)


@runs_kernels
def test_an_embedding_is_read_once_for_all_streams() -> None:
    """The first boundary of a model: streams that are one tensor, expanded."""
    hidden = torch.randn(5, 1, 32, device=DEVICE)
    form = Form("tanh", 4, 1, False, False, 1e-5, 0, "RMSNorm", 1e-5, "triton")
    static = [torch.randn(shape, device=DEVICE) for shape in ((4, 1), (4, 4), (4,))]
    inputs = (None, None, None, None, torch.randn(32, device=DEVICE), None, static)
    expanded = boundary.boundary(form, hidden.expand(-1, 4, -1), *inputs)
    copied = boundary.boundary(form, hidden.expand(-1, 4, -1).contiguous(), *inputs)
    assert all(torch.equal(a, b) for a, b in zip(expanded, copied, strict=True))


@runs_kernels
@pytest.mark.parametrize(
    ("form", "norm"),
    [
        ({"residual_connection": "hyper", "residual_streams": 2, "residual_readout": "sum"}, "LayerNorm"),
        ({"residual_connection": "frac", "residual_streams": 2}, "RMSNorm"),
        ({"residual_connection": "mhc", "residual_streams": 2}, "RMSNorm"),
    ],
    ids=lambda value: value if isinstance(value, str) else value["residual_connection"],
)
def test_a_model_to_its_end(form: dict, norm: str) -> None:
    """Last write, read-out and final norm are a boundary too."""
    assert boundaries_of_a_model(form, norm) == {"torch": (3, 1), "triton": (3, 1)}


@runs_kernels
def test_a_model_whose_read_out_is_its_own() -> None:
    form = {"residual_connection": "virtual-width", "residual_streams": 3}
    assert boundaries_of_a_model(form, "LayerNorm") == {"torch": (2, 1), "triton": (2, 1)}


@runs_kernels
@pytest.mark.parametrize(
    ("form", "boundaries"),
    [
        ({"residual_connection": "gated"}, 0),  # keeps its stream as it is
        ({"residual_connection": "mhc", "residual_streams": 2, "mhc_single_pass": True}, 0),  # reads what came before
        ({"residual_connection": "mhc", "residual_streams": 2, "mhc_convention": "megatron"}, 1),
        ({"residual_connection": "mhc-lite", "residual_streams": 2}, 3),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else None,
)
def test_a_model_whose_own_boundaries_are_not_in_triton(form: dict, boundaries: int) -> None:
    assert boundaries_of_a_model(form, "RMSNorm")["triton"][0] == boundaries


def boundaries_of_a_model(form: dict, norm: str) -> dict[str, tuple[int, int]]:
    """Fused boundaries and folds by backend; all gradients in fp32 are as torch's kernels have them."""
    found, counts = {}, {}
    for backend in ("torch", "triton"):
        config = small_config(form, normalization=norm, fused_residual_backend=backend, num_layers=1)
        model = randomise(build(config, "fp32")).to(DEVICE)
        with counted() as names:
            _, found[backend] = gradients(model, random_tokens(1).to(DEVICE))
        counts[backend] = (names.count("boundary"), names.count("fold"))
    assert distance(found["triton"], found["torch"]) <= 2e-5
    return counts


def test_refusals() -> None:
    if not IS_INTERPRETED:
        with pytest.raises(ValueError, match="needs --device cuda, not cpu"):
            boundary.check_backend("triton", torch.device("cpu"))
