"""The Triton kernels of a training step outside of the residual path, against their formulas in float64.

In Triton's interpreter on a CPU, compiled where there is a GPU.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_hc.kernels import cross_entropy
from megatron_hc.kernels.cross_entropy import VocabShard, linear_cross_entropy, token_scores

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


def assert_near(found: Tensor, wanted: Tensor, dtype: torch.dtype, floor: float = 1e-6) -> None:
    """Every number within one rounding; ``floor``: what fp32 may be off by, by itself, times the largest number."""
    slack = rounding(dtype) * wanted.abs() + floor * wanted.abs().max()
    worst = ((found.double() - wanted).abs() - slack).max().item()
    assert worst <= 0, f"off by {worst:.2e} more than {rounding(dtype):.1e} of the number"


@pytest.mark.skipif(IS_INTERPRETED, reason="these are the tests that it runs")
@pytest.mark.parametrize("marker", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_in_the_interpreter(marker: str) -> None:
    """In a process of its own: Triton decides when it is imported."""
    command = [sys.executable, "-m", "pytest", "-x", "-m", marker, __file__]
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
    assert_near(logits, grad, dtype)


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
