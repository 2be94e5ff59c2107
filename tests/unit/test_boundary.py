"""The fused boundary gives the plain form's numbers and gradients, in one block of tokens and in many."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, Literal

import pytest
import torch
from helpers import VOCAB, build, gradients, random_tokens, randomise, small_config
from torch import Tensor

from megatron_hc.kernels import boundary as kernel
from megatron_hc.kernels import boundary_blocks
from megatron_hc.kernels.boundary import check_backend
from megatron_hc.kernels.coefficients import Form
from megatron_hc.residual import base
from megatron_hc.residual.base import LinearMix

FORMS = [
    {"residual_connection": "hyper"},
    {"residual_connection": "hyper", "residual_streams": 1},
    {"residual_connection": "hyper", "residual_streams": 3, "residual_norm_weight": True},
    {"residual_connection": "hyper", "static_residual": True},
    {"residual_connection": "frac"},
    {"residual_connection": "frac", "residual_streams": 2, "static_residual": True},
    {"residual_connection": "mhc"},
    {"residual_connection": "mhc", "residual_streams": 2, "static_residual": True},
    {"residual_connection": "mhc-lite", "residual_streams": 3},
    {"residual_connection": "kromhc"},
    {"residual_connection": "virtual-width", "residual_streams": 3},
    {"residual_connection": "virtual-width", "residual_streams": 4, "static_residual": True},
]


def ids(form: dict) -> str:
    return "-".join(str(value) for value in form.values())


@contextmanager
def counted() -> Iterator[list[str]]:
    """Names of the fused operations that run inside."""
    names: list[str] = []

    class Count(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            if func.namespace == "megatron_hc":
                names.append(func.__name__.split(".")[0])
            return func(*args, **(kwargs or {}))

    with Count():
        yield names


def run(
    form: dict, precision: str, norm: str, monkeypatch: pytest.MonkeyPatch, fused: bool, **model_fields: Any
) -> tuple[Tensor, dict]:
    """Hidden states, and every parameter's gradient. The number of fused reads is asserted: nothing falls back."""
    monkeypatch.setattr(LinearMix, "is_fused", lambda self, stream: fused)
    config = small_config(form, normalization=norm, **model_fields)
    model = randomise(build(config, precision))
    tokens = torch.randint(0, VOCAB, (3, 8), generator=torch.Generator().manual_seed(0))
    with counted() as names:
        hidden = model(tokens)
        model.output.loss(hidden, tokens, torch.full((3, 8), 1 / 24)).backward()
    # The last write and the final norm are one more boundary, but for virtual width's own read-out.
    is_last_fused = fused and form["residual_connection"] != "virtual-width"
    expected = 2 * config.num_layers + is_last_fused if fused else 0
    assert names.count("boundary") == names.count("boundary_backward") == expected
    # H' of the last one is not kept: its backward pass folds it again.
    assert (names.count("fold"), names.count("fold_backward")) == (fused, fused - is_last_fused)
    return hidden, {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("block", [1, 7 * 16 * 4, 1 << 18], ids=["a token", "seven tokens", "all"])
@pytest.mark.parametrize("norm", ["RMSNorm", "LayerNorm"])
@pytest.mark.parametrize("form", FORMS, ids=ids)
def test_equals_the_plain_form(form: dict, norm: str, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(boundary_blocks, "BLOCK_ELEMENTS", block)
    check_float64(form, norm, monkeypatch)


@pytest.mark.parametrize("form", [FORMS[0], FORMS[4], FORMS[6]], ids=ids)
def test_a_layernorm_without_bias_equals_the_plain_form(form: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    names = check_float64(form, "LayerNorm", monkeypatch, disable_bias_layernorm=True)
    assert not [name for name in names if name.endswith("norm.bias")]


def check_float64(form: dict, norm: str, monkeypatch: pytest.MonkeyPatch, **model_fields: bool) -> list[str]:
    """Fused against plain; returns the names of the parameters."""
    expected, expected_grads = run(form, "fp64", norm, monkeypatch, fused=False, **model_fields)
    hidden, grads = run(form, "fp64", norm, monkeypatch, fused=True, **model_fields)
    torch.testing.assert_close(hidden, expected, rtol=0, atol=1e-12)
    scale = max(grad.abs().max() for grad in expected_grads.values())
    for name, grad in grads.items():
        torch.testing.assert_close(grad, expected_grads[name], rtol=1e-9, atol=1e-12 * float(scale), msg=name)
    return list(grads)


def distance(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Relative, over all parameters."""
    norm = torch.stack([grad.double().norm() for grad in expected.values()]).norm()
    error = torch.stack([(found[name].double() - grad.double()).norm() for name, grad in expected.items()]).norm()
    return float(error / norm)


@pytest.mark.parametrize("form", FORMS, ids=ids)
def test_fp32(form: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    _, expected = run(form, "fp32", "RMSNorm", monkeypatch, fused=False)
    _, grads = run(form, "fp32", "RMSNorm", monkeypatch, fused=True)
    assert distance(grads, expected) <= 2e-5


@pytest.mark.parametrize("form", [FORMS[0], FORMS[4], FORMS[6]], ids=ids)
def test_a_norm_behind_the_boundary(form: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    """An RMSNorm with a bias is a module of its own: the boundary ends with the read."""
    names = check_float64(form, "RMSNorm", monkeypatch, rmsnorm_bias=True)
    assert any(name.endswith("norm.bias") for name in names)


@pytest.mark.parametrize("form", [FORMS[2], FORMS[4], FORMS[6]], ids=ids)
def test_a_norm_behind_the_boundary_in_cpp(form: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        check_backend("cpp", torch.device("cpu"))
    except ValueError as error:
        pytest.skip(str(error)[:200])
    fields = {"rmsnorm_bias": True, "fused_residual_backend": "cpp"}
    _, expected = run(form, "fp32", "RMSNorm", monkeypatch, fused=False, **fields)
    _, grads = run(form, "fp32", "RMSNorm", monkeypatch, fused=True, **fields)
    assert distance(grads, expected) <= 2e-5


@pytest.mark.parametrize("form", FORMS, ids=ids)
def test_bf16_is_as_near_to_float64_as_the_plain_form(form: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same weights in float64 are the truth: rounding makes up to 0.3 of the gradient in these small models."""
    exact, rounded = (randomise(build(small_config(form), precision)) for precision in ("fp64", "bf16"))
    with torch.no_grad():
        for wide, narrow in zip(exact.parameters(), rounded.parameters(), strict=True):
            wide.copy_(narrow)
    tokens = random_tokens(3)
    _, expected = gradients(exact, tokens)
    monkeypatch.setattr(LinearMix, "is_fused", lambda self, stream: True)
    error = distance(gradients(rounded, tokens)[1], expected)
    monkeypatch.setattr(LinearMix, "is_fused", lambda self, stream: False)
    assert error <= 2 * distance(gradients(rounded, tokens)[1], expected)


def test_same_numbers_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    first = run(FORMS[0], "fp32", "RMSNorm", monkeypatch, fused=True)
    second = run(FORMS[0], "fp32", "RMSNorm", monkeypatch, fused=True)
    assert torch.equal(first[0], second[0])
    assert all(torch.equal(grad, second[1][name]) for name, grad in first[1].items())


@pytest.mark.parametrize("precision,fused,expected", [("fp32", True, 7), ("fp32", False, 0), ("fp64", True, 0)])
def test_flag_turns_it_off_and_float64_is_plain(precision: str, fused: bool, expected: int) -> None:
    model = build(small_config(FORMS[0], fused_residual=fused), precision)
    with counted() as names:
        model(torch.zeros(1, 8, dtype=torch.long))
    assert names.count("boundary") == expected


@pytest.mark.parametrize("has_output", [True, False])
@pytest.mark.parametrize("form", [FORMS[0], FORMS[4], FORMS[7]], ids=ids)
def test_registered_as_torch_expects(form: dict, has_output: bool) -> None:
    """torch's own checks: schema, gradients, and that shapes alone (``--compile``) give what the operation gives."""
    model = randomise(build(small_config(form), "fp32"))
    residual = model.stage_layers()[0].mlp_residual
    assert isinstance(residual, LinearMix)
    fused = residual.fused()
    assert fused is not None
    N, D, R = residual.num_streams(), residual.stream_width(), fused.form.num_reads
    leaf = lambda *shape: torch.randn(*shape, requires_grad=True)  # noqa: E731
    written = (leaf(5, R, D), leaf(5, R, N), leaf(5, N, N)) if has_output else (None, None, None)
    form_of = fused.form._replace(norm="RMSNorm", norm_eps=1e-5)
    tensors = (leaf(5, N, D), *written, fused.projection, leaf(R * D), None, list(fused.parameters))
    torch.library.opcheck(torch.ops.megatron_hc.boundary.default, (*tensors, *form_of))
    if has_output:
        torch.library.opcheck(torch.ops.megatron_hc.fold.default, (tensors[0], *written, "auto", form_of.kind))


@pytest.mark.parametrize("backend", ["torch", "cpp"])
def test_a_pipeline_stage_changes_no_bit(backend: Literal["torch", "cpp"]) -> None:
    """A carry that is settled and read as a stage's first one: the same numbers and gradients as one that is not."""
    try:
        check_backend(backend, torch.device("cpu"))
    except ValueError as error:
        pytest.skip(str(error)[:200])
    for dtype, form in itertools.product((torch.float32, torch.bfloat16), (FORMS[0], FORMS[4], FORMS[6])):
        found, precision = [], "bf16" if dtype == torch.bfloat16 else "fp32"
        for settles in (False, True):
            model = randomise(build(small_config(form, fused_residual_backend=backend), precision))
            hidden = torch.randn(8, 2, 16, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()
            context = model.context(torch.arange(8).unsqueeze(0), None)
            carry = model.entry_residual.open(hidden)
            for layer in model.stage_layers():
                carry = layer(layer.attention_residual.settle(carry) if settles else carry, context)
            model.close(carry).float().square().sum().backward()
            found.append([hidden.grad, *(p.grad for p in model.parameters() if p.grad is not None)])
        assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_every_boundary_and_fold_runs_in_the_backend_that_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str]] = []

    def boundary(form: Form, *tensors: Any) -> Any:
        asked.append((form.kind, form.backend))
        return kernel.boundary(form, *tensors)

    def fold(*arguments: Any) -> Tensor:
        asked.append(("fold", arguments[4]))
        return kernel.fold(*arguments)

    monkeypatch.setattr(base, "fused_kernel", SimpleNamespace(boundary=boundary, fold=fold))
    model = build(small_config(FORMS[0], fused_residual_backend="torch", num_layers=1), "fp32")
    carry = model.open(random_tokens(), torch.arange(8).unsqueeze(0))
    carry = model.stage_layers()[0](carry, model.context(torch.arange(8).unsqueeze(0), None))
    model.close(carry)
    model.final_residual.settle(carry)
    assert asked == [("tanh", "torch"), ("tanh", "torch"), ("read-out", "torch"), ("fold", "torch")]


def test_a_norm_weight_of_1003_is_seen_under_bf16() -> None:
    """bfloat16 knows no number between 1 and 1.0078."""
    model, found = build(small_config(FORMS[0]), "bf16"), []
    layer, hidden = model.stage_layers()[0], torch.randn(400, 8, 16, generator=torch.Generator().manual_seed(0))
    for weight in (1.0, 1.003):
        with torch.no_grad():
            layer.attention_norm.weight.fill_(weight)
        residual = layer.attention_residual
        found.append(residual.read(residual.open(hidden.bfloat16()), layer.attention_read_norm)[0].double().abs().sum())
    assert abs(found[1] / found[0] - 1.003) < 2e-4
