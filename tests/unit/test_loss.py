"""The chunked output layer and loss (kernels/cross_entropy.py) against torch's cross entropy on all logits at once."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from helpers import VOCAB, build, random_tokens, small_config
from torch import Tensor

from megatron_hc.kernels import cross_entropy
from megatron_hc.kernels.cross_entropy import linear_cross_entropy, token_scores

T, C, V, ROWS = 13, 8, 11, 16


def inputs(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """hidden [T, C], weight [ROWS, C] (zero from V on), labels [T], token weights [T] with a zero among them."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, C, generator=generator, dtype=torch.float64) for n in (T, ROWS))
    weight[V:] = 0
    labels = torch.randint(0, V, (T,), generator=generator)
    labels[:2] = torch.tensor([0, V - 1])
    weights = torch.rand(T, generator=generator, dtype=torch.float64)
    weights[3] = 0
    return hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), labels, weights


def direct(hidden: Tensor, weight: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    logits = F.linear(hidden, weight[:V]).to(torch.promote_types(weight.dtype, torch.float32))
    return (F.cross_entropy(logits, labels, reduction="none") * weights.to(logits.dtype)).sum()


@pytest.mark.parametrize("tokens_per_chunk", [1, 4, T, 100])
def test_float64_equals_cross_entropy(monkeypatch: pytest.MonkeyPatch, tokens_per_chunk: int) -> None:
    monkeypatch.setattr(cross_entropy, "CHUNK_LOGITS", tokens_per_chunk * ROWS)
    hidden, weight, labels, weights = inputs(torch.float64)
    expected = torch.autograd.grad(3 * direct(hidden, weight, labels, weights), (hidden, weight))
    loss = linear_cross_entropy(hidden, weight, labels, weights, V)
    found = torch.autograd.grad(3 * loss, (hidden, weight))
    assert abs(loss.item() - direct(hidden, weight, labels, weights).item()) <= 1e-12
    for got, wanted in zip(found, expected, strict=True):
        assert (got - wanted).abs().max() <= 1e-12
    assert not found[1][V:].any(), "a padding row has a gradient"
    losses, is_top = token_scores(hidden, weight, labels, V)
    assert is_top.equal((hidden @ weight[:V].t()).argmax(-1) == labels)
    assert (losses - F.cross_entropy(hidden @ weight[:V].t(), labels, reduction="none")).abs().max() <= 1e-12


def test_padding_changes_nothing() -> None:
    hidden, weight, labels, weights = inputs(torch.float64)
    padded = linear_cross_entropy(hidden, weight, labels, weights, V)
    whole = linear_cross_entropy(hidden, weight[:V], labels, weights, V)
    assert abs(padded.item() - whole.item()) <= 1e-12
    with torch.no_grad():
        weight[V:] = 50.0  # even with values in it
    assert linear_cross_entropy(hidden, weight, labels, weights, V).item() == padded.item()


def test_bf16_products_have_an_fp32_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    """bf16 logits widened before the softmax; gradients in bf16, near those of float64 on the same numbers."""
    monkeypatch.setattr(cross_entropy, "CHUNK_LOGITS", 5 * ROWS)
    hidden, weight, labels, weights = inputs(torch.bfloat16)
    loss = linear_cross_entropy(hidden, weight, labels, weights, V)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, direct(hidden, weight, labels, weights), rtol=1e-6, atol=1e-6)
    found = torch.autograd.grad(loss, (hidden, weight))
    wide = [t.detach().double().requires_grad_() for t in (hidden, weight)]
    expected = torch.autograd.grad(direct(wide[0], wide[1], labels, weights), wide)
    for got, wanted in zip(found, expected, strict=True):
        assert got.dtype == torch.bfloat16
        assert (got.double() - wanted).norm() <= 0.01 * wanted.norm()
    assert token_scores(hidden, weight, labels, V)[0].dtype == torch.float32


def test_many_chunks_in_bf16_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sum kept in bf16 stops growing at some 256 equal terms."""
    monkeypatch.setattr(cross_entropy, "CHUNK_LOGITS", ROWS)
    hidden, weight, labels, weights = inputs(torch.bfloat16)
    gradients = []
    for times in (1, 1024):
        many = hidden[:1].expand(times, C), weight, labels[:1].expand(times), weights[:1].expand(times) / times
        gradients.append(torch.autograd.grad(linear_cross_entropy(*many, V), weight)[0])
    torch.testing.assert_close(gradients[1], gradients[0], rtol=0.02, atol=0)


@pytest.mark.parametrize("needed", [(True, False), (False, True), (False, False)])
def test_gradients_only_where_needed(needed: tuple[bool, bool]) -> None:
    hidden, weight, labels, weights = inputs(torch.float64)
    expected = torch.autograd.grad(direct(hidden, weight, labels, weights), (hidden, weight))
    leaves = [t.detach().requires_grad_(flag) for t, flag in zip((hidden, weight), needed, strict=True)]
    loss = linear_cross_entropy(leaves[0], leaves[1], labels, weights, V)
    assert loss.requires_grad == any(needed)
    if any(needed):
        loss.backward()
    for leaf, flag, wanted in zip(leaves, needed, expected, strict=True):
        assert (leaf.grad is not None) == flag
        if flag:
            assert (leaf.grad - wanted).abs().max() <= 1e-12  # type: ignore[operator]


def test_the_model_reads_labels_batch_first() -> None:
    """``loss`` and ``scores`` of the output table take [B, S], hidden states are [S, B, C]."""
    model, tokens = build(small_config()), random_tokens()
    labels = random_tokens(seed=9)
    weights = torch.rand(2, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    hidden = model(tokens)
    logits = model.output.logits(hidden).transpose(0, 1)  # [B, S, V]
    assert logits.shape == (2, 8, VOCAB)
    expected = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view(2, 8)
    wanted = torch.rand(2, 8, generator=torch.Generator().manual_seed(1)) < 0.6
    labels[0] = logits[0].argmax(-1)
    losses, is_top = model.output.scores(hidden, labels, wanted)
    expected = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
    torch.testing.assert_close(losses, expected.masked_fill(~wanted, 0), rtol=1e-12, atol=1e-12)
    assert is_top.equal((logits.argmax(-1) == labels) | ~wanted) and wanted[0].any() and not is_top.all()
    torch.testing.assert_close(
        model.output.loss(hidden, labels, weights), (expected * weights).sum(), rtol=1e-12, atol=1e-12
    )
