"""The Triton kernels of a training step outside of the residual path, against their formulas in float64.

In Triton's interpreter on a CPU, compiled where there is a GPU.
"""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import VOCAB, build, gradients, loss_of, random_tokens, randomise, selective_recompute, small_config
from torch import Tensor

from megatron_hc.cli import parse
from megatron_hc.estimate.paper import PaperRank
from megatron_hc.estimate.trace import trace
from megatron_hc.kernels import choice, cross_entropy
from megatron_hc.kernels.cross_entropy import VocabShard, linear_cross_entropy, token_scores
from megatron_hc.kernels.norm import NormParts, norm, norm_of_sum, promote
from megatron_hc.kernels.swiglu import swiglu, swiglu_reference
from megatron_hc.model.attention import CoreAttention
from megatron_hc.model.rope import RopeTable, apply_rope
from megatron_hc.residual import base as residual_base

pytest.importorskip("triton")
IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not IS_INTERPRETED else "cpu"
runs_kernels = pytest.mark.skipif(DEVICE == "cpu" and not IS_INTERPRETED, reason="needs a GPU or TRITON_INTERPRET=1")
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


def rounding(dtype: torch.dtype) -> float:
    """Largest relative error of a rounding to bf16, for which the interpreter cuts off; fp32: of a few sums."""
    if dtype == torch.float32:
        return 2e-6
    return 2**-7 if IS_INTERPRETED else 2**-8 + 1e-6


def assert_near(found: Tensor, wanted: Tensor, roundings: int = 1) -> None:
    """Every number within so many roundings to its dtype, and what fp32 is off by where terms cancel."""
    bound = roundings * rounding(found.dtype)
    worst = ((found.double() - wanted).abs() - bound * wanted.abs() - 1e-6 * wanted.abs().max()).max().item()
    assert worst <= 0, f"off by {worst:.2e} more than {bound:.1e} of the number"


@pytest.mark.skipif(IS_INTERPRETED, reason="these are the tests that it runs")
def test_in_the_interpreter() -> None:
    """In a process of its own: Triton decides when it is imported."""
    command = [sys.executable, "-m", "pytest", "-x", __file__]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-3000:]


def loss_problem(dtype: torch.dtype, tokens: int, vocab: int, rows: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """hidden [T, 16], weight [rows, 16] (padding not 0), labels, weights of the tokens, the first of which is 0."""
    draw = torch.Generator().manual_seed(vocab)
    hidden, weight = (torch.randn(n, 16, generator=draw) for n in (tokens, rows))
    labels = torch.randint(0, vocab, (tokens,), generator=draw)
    labels[-1] = vocab - 1
    scales = torch.rand(tokens, generator=draw)
    scales[0] = 0
    return hidden.to(DEVICE, dtype), weight.to(DEVICE, dtype), labels.to(DEVICE), scales.to(DEVICE)


def logit_gradients(logits: Tensor, labels: Tensor, scales: Tensor, vocab: int) -> Tensor:
    """(softmax - one-hot) * scale in float64, 0 in the padding."""
    grad = torch.zeros(logits.shape, dtype=torch.float64, device=logits.device)
    softmax = logits[:, :vocab].double().softmax(-1)
    grad[:, :vocab] = (softmax - F.one_hot(labels, vocab)) * scales[:, None]
    return grad


@runs_kernels
@DTYPES
@pytest.mark.parametrize("vocab,rows", [(1, 1), (100, 128), (1000, 1001), (17000, 17024), (8192, 8192)])
def test_logits_become_losses_and_gradients(vocab: int, rows: int, dtype: torch.dtype) -> None:
    from megatron_hc.kernels import cross_entropy_triton

    hidden, weight, labels, scales = loss_problem(dtype, 5, vocab, rows)
    logits = hidden @ weight.t()
    expected = F.cross_entropy(logits[:, :vocab].double(), labels, reduction="none")
    grad = logit_gradients(logits, labels, scales, vocab)
    found = cross_entropy_triton.losses(logits, labels, scales, vocab, needs_gradient=True)
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=2e-6)
    assert not logits[:, vocab:].any(), "padding has a gradient"
    assert_near(logits, grad)


@runs_kernels
@pytest.mark.parametrize("first_row", [0, 40, 100, 128], ids=["before", "within", "after", "padding"])
def test_a_shard_with_the_others_in_between(first_row: int) -> None:
    """Columns [first_row, first_row + 64) of 100 and padding: the reduction brings what the other columns have."""
    from megatron_hc.kernels import cross_entropy_triton

    hidden, weight, labels, scales = loss_problem(torch.float32, 6, 100, 192)
    labels[:3] = torch.tensor([0, 50, 99], device=DEVICE)
    logits = hidden @ weight.t()
    logits[:, 100:] = 1e4
    own = logits[:, first_row : first_row + 64].contiguous()
    is_other = torch.ones(192, dtype=torch.bool, device=DEVICE)
    is_other[first_row : first_row + 64] = False
    is_other[100:] = False
    others = logits.masked_fill(~is_other, float("-inf"))

    def reduce(tensor: Tensor, op: str) -> Tensor:
        if op == "max":
            reduce.top = torch.maximum(tensor, others.max(-1).values)  # type: ignore[attr-defined]
            return tensor.copy_(reduce.top)  # type: ignore[attr-defined]
        sums = (others - reduce.top[:, None]).exp().sum(-1)  # type: ignore[attr-defined]
        of_label = torch.where(is_other[labels], logits.gather(1, labels[:, None]).squeeze(1), 0.0)
        return tensor.add_(torch.stack((sums, of_label)))

    shard = VocabShard(first_row, reduce)
    here, num_real = labels - first_row, min(max(100 - first_row, 0), 64)
    log_sum, of_label, top = cross_entropy._triton_statistics(own, here, num_real, shard)
    whole = logits[:, :100].double()
    torch.testing.assert_close(log_sum.double(), whole.logsumexp(-1), rtol=1e-6, atol=1e-6)
    assert of_label.equal(logits.gather(1, labels[:, None]).squeeze(1)) and top.equal(logits[:, :100].max(-1).values)
    expected = logit_gradients(logits, labels, scales, 100)[:, first_row : first_row + 64]
    cross_entropy_triton.write_gradient(own, here, scales, log_sum, num_real)
    assert (own - expected).abs().max() <= 2e-6 and not own[:, num_real:].any()


@runs_kernels
@DTYPES
@pytest.mark.parametrize("tokens_per_chunk", [3, 100])
def test_the_loss_in_chunks(monkeypatch: pytest.MonkeyPatch, tokens_per_chunk: int, dtype: torch.dtype) -> None:
    monkeypatch.setattr(cross_entropy, "CHUNK_BYTES", tokens_per_chunk * 128 * dtype.itemsize)
    hidden, weight, labels, scales = loss_problem(dtype, 7, 100, 128)
    found, expected = [], []
    for leaves, results, backend in (
        ([t.clone().requires_grad_() for t in (hidden, weight)], found, "triton"),
        ([t.double().requires_grad_() for t in (hidden, weight)], expected, "torch"),
    ):
        loss = linear_cross_entropy(leaves[0], leaves[1], labels, scales, 100, backend=backend)
        results += [loss.detach(), *torch.autograd.grad(3 * loss, leaves)]
    assert found[0].dtype == torch.float32 and found[1].dtype == dtype
    for got, wanted in zip(found, expected, strict=True):
        # The logits are rounded, and then their gradients: of some 2^-8 each.
        bound = 1e-5 if dtype == torch.float32 else 2**-6
        assert (got.double() - wanted).norm() <= bound * wanted.norm()
    losses, is_top = token_scores(hidden, weight, labels, 100, backend="triton")
    right, is_right = token_scores(hidden, weight, labels, 100, backend="torch")
    torch.testing.assert_close(losses, right, rtol=1e-6, atol=2e-6)
    assert is_top.equal(is_right)


@runs_kernels
def test_a_label_outside_of_the_vocabulary_is_no_number() -> None:
    hidden, weight, labels, scales = loss_problem(torch.float32, 4, 100, 128)
    for label in (-100, 100, 128, 1 << 40):
        labels[1] = label
        assert linear_cross_entropy(hidden, weight, labels, scales, 100, backend="triton").isnan()
        losses, _ = token_scores(hidden, weight, labels, 100, backend="triton")
        assert losses.isnan().tolist() == [False, True, False, False]


def compare(
    run: Callable[..., Sequence[Tensor]],
    formula: Callable[..., Sequence[Tensor]],
    inputs: Sequence[Tensor | None],
    roundings: int = 1,
) -> None:
    """Results and gradients of ``run`` against ``formula`` on the same numbers in float64."""
    given = [t if t is None else t.detach().requires_grad_() for t in inputs]
    wide = [t if t is None else t.detach().double().requires_grad_() for t in inputs]
    found, expected = run(*given), formula(*wide)
    draw = torch.Generator().manual_seed(11)
    grads = [torch.randn(t.shape, generator=draw).to(t.device, t.dtype) for t in found]
    leaves, right = ([t for t in side if t is not None] for side in (given, wide))
    found = [*found, *torch.autograd.grad(found, leaves, grads)]
    expected = [*expected, *torch.autograd.grad(expected, right, [g.double() for g in grads])]
    for got, wanted in zip(found, expected, strict=True):
        if wanted.numel():
            assert_near(got, wanted, roundings)


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


@runs_kernels
@DTYPES
@pytest.mark.parametrize("shape", [(1, 1, 2), (5, 3, 14), (0, 6), (3, 2, 1600)])
def test_swiglu(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    h = 3 * random(*shape, dtype=dtype)
    compare(lambda h: [swiglu(h, "triton")], lambda h: [swiglu_reference(h)], [h])


@runs_kernels
def test_swiglu_of_what_does_not_lie_in_a_row() -> None:
    h = random(6, 5).t()
    compare(lambda h: [swiglu(h, "triton")], lambda h: [swiglu_reference(h)], [h])


@runs_kernels
@DTYPES
@pytest.mark.parametrize(
    "shape,rotated", [((3, 2, 4, 8), 8), ((5, 1, 3, 12), 8), ((1, 2, 1, 6), 2), ((2, 1, 40, 128), 128)]
)
@pytest.mark.parametrize("table_rows", [1, 2])
def test_rope(shape: tuple[int, ...], rotated: int, table_rows: int, dtype: torch.dtype) -> None:
    """Heads that lie apart, as the parts of a QKV product do, gradients in attention's layout, channels left alone."""
    S, B, heads, H = shape
    angles = random(S, min(B, table_rows), 1, rotated // 2, seed=1)
    angles = torch.cat((angles, angles), -1)
    table = RopeTable(angles.cos(), angles.sin())
    merged = random(S, B, heads, H + 4, dtype=dtype)

    def rotate(merged: Tensor, backend: str) -> list[Tensor]:
        turned = apply_rope(merged[..., 2 : H + 2], RopeTable(*(t.to(promote(merged.dtype)) for t in table)), backend)
        return [turned.permute(1, 2, 0, 3)]

    compare(lambda x: rotate(x, "triton"), lambda x: rotate(x, "torch"), [merged])


@runs_kernels
@DTYPES
@pytest.mark.parametrize("kind", ["RMSNorm", "LayerNorm"])
@pytest.mark.parametrize("with_weight,with_bias", [(True, True), (True, False), (False, False)])
@pytest.mark.parametrize("rows,width", [(7, 48), (70, 20), (4, 3000)])
def test_norms(rows: int, width: int, with_weight: bool, with_bias: bool, kind: str, dtype: torch.dtype) -> None:
    """Several rows to a program and one; more tiles than programs of the backward pass."""
    x = random(rows, 1, width, dtype=dtype) + 0.5
    weight = random(width, seed=1) if with_weight else None
    bias = random(width, seed=2) if with_bias else None
    run = lambda backend: lambda x, weight, bias: [norm(x, kind, weight, bias, 1e-2, backend)]  # noqa: E731
    compare(run("triton"), run("torch"), [x, weight, bias])


@runs_kernels
@pytest.mark.parametrize("factor", [1.0, 1.7])
@pytest.mark.parametrize("kind", ["RMSNorm", "LayerNorm"])
@pytest.mark.parametrize(
    "dtypes",
    [
        *((torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16)),
        *((torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)),
    ],
)
def test_the_norm_of_a_sum(dtypes: tuple[torch.dtype, torch.dtype], kind: str, factor: float) -> None:
    x, output = random(5, 2, 72, dtype=dtypes[0]), random(5, 2, 72, dtype=dtypes[1], seed=1)
    weight, bias = random(72, seed=2), random(72, seed=3) if kind == "LayerNorm" else None
    parts = NormParts(kind, weight, bias, 1e-2)
    summed = norm_of_sum(x, output, factor, parts)[0]
    assert IS_INTERPRETED or summed.equal(torch.add(output, x, alpha=factor))

    def formula(x: Tensor, output: Tensor, weight: Tensor, bias: Tensor | None) -> list[Tensor]:
        total = output + factor * x
        rounded = total + (summed.double() - total).detach()  # what is normed is the operation's own sum, rounded
        return [total, norm(rounded, kind, weight, bias, 1e-2)]

    def run(x: Tensor, output: Tensor, weight: Tensor, bias: Tensor | None) -> Sequence[Tensor]:
        return norm_of_sum(x, output, factor, NormParts(kind, weight, bias, 1e-2))

    # With a factor the gradient of x is that of the sum, rounded, times the factor.
    compare(run, formula, [x, output, weight, bias], roundings=1 if factor == 1 else 2)


MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("plain", {"qk_layernorm": True}),
    "deepnorm": ("plain", {"normalization": "LayerNorm", "norm_placement": "deepnorm", "rotary_percent": 0.5}),
    "rezero": ("rezero", {}),
}


@runs_kernels
@pytest.mark.parametrize("name", MODELS)
def test_a_model_is_the_same_in_triton(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything that picks a kernel by itself, in a whole model."""
    method, change = MODELS[name]
    model = randomise(build(small_config({"residual_connection": method}, **change), "fp32"))
    tokens = random_tokens()
    if DEVICE == "cuda":
        loss, found = gradients(copy.deepcopy(model).to(DEVICE), tokens.to(DEVICE))
    expected_loss, expected = gradients(model, tokens)
    if DEVICE == "cpu":
        for module in (choice, cross_entropy):
            monkeypatch.setattr(module, "runs_in_triton", lambda tensor, backend="auto": True)
        loss, found = gradients(model, tokens)
    assert abs(loss.item() - expected_loss.item()) <= 1e-5 * expected_loss.item()
    for parameter, wanted in expected.items():
        assert (found[parameter].cpu() - wanted).norm() <= 2e-5 * wanted.norm() + 1e-7, parameter


@runs_kernels
def test_the_plain_residual_reads_in_one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """2 L reads and the final one, but the first; none with a norm to be recomputed, of a normed stream the final."""
    sums: list[int] = []
    monkeypatch.setattr(residual_base, "is_one_pass_with_sum", lambda stream: True)
    monkeypatch.setattr(residual_base, "norm_of_sum", lambda *given: sums.append(1) or norm_of_sum(*given))
    tokens = random_tokens().to(DEVICE)
    recompute = selective_recompute("layernorm")
    for placement, parallel, count in (("pre", None, 6), ("pre", recompute, 0), ("post", None, 1)):
        sums.clear()
        build(small_config(norm_placement=placement), "fp32", parallel=parallel).to(DEVICE)(tokens)
        assert len(sums) == count


@runs_kernels
@pytest.mark.parametrize("method", ["plain", "attention"])
def test_the_estimator_knows_what_is_kept(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between forward and backward pass, on a GPU; within the 5 % that the estimator has on a CPU."""
    flags = (
        "--num-layers 3 --hidden-size 64 --num-attention-heads 4 --ffn-hidden-size 96 --seq-length 16 --train-iters 1 "
        "--micro-batch-size 2 --bf16 --lr 1 --mock-data --tokenizer-type NullTokenizer --vocab-size 22 --swiglu "
        "--normalization RMSNorm --position-embedding-type rope --disable-bias-linear --make-vocab-size-divisible-by 4 "
        f"--device cpu --residual-connection {method}"
    )
    config = parse(flags.split()).config
    estimated = {device: trace(PaperRank(config, 1, 0, VOCAB, device), 0).held_bytes for device in ("cpu", "cuda")}
    if DEVICE == "cpu":
        for module in (choice, cross_entropy):
            monkeypatch.setattr(module, "runs_in_triton", lambda tensor, backend="auto": True)
        monkeypatch.setattr(CoreAttention, "arranged", lambda self, *tensors: tensors)
    model = build(config.model, "bf16").to(DEVICE)
    own, sizes, held = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}, []

    def note(tensor: Tensor) -> Tensor:
        held.append(tensor)
        if tensor.untyped_storage().data_ptr() not in own:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        assert loss_of(model, random_tokens(length=16).to(DEVICE)).requires_grad
    kept = sum(sizes.values())
    assert abs(estimated["cuda"] - kept) <= 0.05 * kept < abs(estimated["cpu"] - kept)
