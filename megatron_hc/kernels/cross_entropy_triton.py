"""Loss terms of a chunk of logits, and in their place the logits' gradients, in Triton.

Dims: T tokens of the chunk, V vocabulary rows held here (padding included).

A program has one token. It reads the row for the maximum and the sum of exponentials, kept by lanes that meet once at
the row's end, then again, backwards, so that what is still in the cache comes first, and writes softmax - one-hot,
times the token's weight, over it: 3 V numbers of traffic at most. Where ranks share the vocabulary, the two halves are
two kernels with the reduction between them. Computed in fp32; the gradient is rounded to the logits' dtype once.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# Lower than any logit; the difference of two of them is 0, not NaN as that of two infinities.
LOWEST = tl.constexpr(-1.0e30)
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _exp_of_difference(x, y):  # type: ignore[no-untyped-def]
    """exp(x - y) in one multiply-add and a power of 2."""
    return tl.exp2(x * LOG2_E - y * LOG2_E)


@triton.jit
def _columns(block, STEPS: tl.constexpr, LANES: tl.constexpr):  # type: ignore[no-untyped-def]
    """Columns of a block [STEPS, LANES]: a thread has a few neighbouring lanes, at all steps."""
    return block * STEPS * LANES + tl.arange(0, STEPS)[:, None] * LANES + tl.arange(0, LANES)[None, :]


@triton.jit
def _load_end(row, column, NUM_REAL: tl.constexpr, NUM_ROWS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Logits of a block at the row's end; -inf from ``NUM_REAL`` on, whatever is in the padding."""
    x = tl.load(row + column, mask=column < NUM_ROWS, other=0.0).to(tl.float32)
    return tl.where(column < NUM_REAL, x, float("-inf"))


@triton.jit
def _with_block(top, total, x):  # type: ignore[no-untyped-def]
    """Maximum and sum of exp(logit - maximum) of every lane, x [STEPS, LANES] included."""
    higher = tl.maximum(top, tl.max(x, 0))
    total = total * _exp_of_difference(top, higher) + tl.sum(_exp_of_difference(x, higher[None, :]), 0)
    return higher, total


@triton.jit
def _row_statistics(  # type: ignore[no-untyped-def]
    row, NUM_REAL: tl.constexpr, NUM_ROWS: tl.constexpr, STEPS: tl.constexpr, LANES: tl.constexpr
):
    """Maximum of a row's first ``NUM_REAL`` logits and the sum of exp(logit - maximum)."""
    top = tl.full([LANES], LOWEST, tl.float32)
    total = tl.zeros([LANES], tl.float32)
    full: tl.constexpr = NUM_REAL // (STEPS * LANES)
    for block in range(full):
        x = tl.load(row + _columns(block, STEPS, LANES)).to(tl.float32)
        top, total = _with_block(top, total, x)
    if full * STEPS * LANES < NUM_REAL:
        x = _load_end(row, _columns(full, STEPS, LANES), NUM_REAL, NUM_ROWS)
        top, total = _with_block(top, total, x)
    whole = tl.max(top, 0)
    return whole, tl.sum(total * _exp_of_difference(top, whole), 0)


@triton.jit
def _label_logit(row, label, elsewhere, NUM_REAL: tl.constexpr):  # type: ignore[no-untyped-def]
    is_here = (label >= 0) & (label < NUM_REAL)
    return tl.load(row + tl.where(is_here, label, 0), mask=is_here, other=elsewhere).to(tl.float32)


@triton.jit
def _write_row_gradient(  # type: ignore[no-untyped-def]
    row, label, of_label, scale, log_sum,
    NUM_REAL: tl.constexpr, NUM_ROWS: tl.constexpr, STEPS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """(softmax - one-hot) times scale over the row, 0 over its padding; ``of_label``: the label's logit."""
    tl.debug_barrier()  # the label's logit has been read by all threads
    full: tl.constexpr = NUM_REAL // (STEPS * LANES)
    blocks: tl.constexpr = (NUM_ROWS + STEPS * LANES - 1) // (STEPS * LANES)
    for block in range(full, blocks):
        column = _columns(block, STEPS, LANES)
        grad = _exp_of_difference(_load_end(row, column, NUM_REAL, NUM_ROWS), log_sum) * scale
        tl.store(row + column, grad.to(row.dtype.element_ty), mask=column < NUM_ROWS)
    for done in range(full):
        column = _columns(full - 1 - done, STEPS, LANES)
        x = tl.load(row + column).to(tl.float32)
        tl.store(row + column, (_exp_of_difference(x, log_sum) * scale).to(row.dtype.element_ty))
    tl.debug_barrier()  # one number is written a second time
    grad = (_exp_of_difference(of_label, log_sum) - 1.0) * scale
    tl.store(row + label, grad.to(row.dtype.element_ty), mask=(label >= 0) & (label < NUM_REAL))


@triton.jit
def _loss(  # type: ignore[no-untyped-def]
    logits, labels, scales, losses, NUM_REAL: tl.constexpr, NUM_ROWS: tl.constexpr,
    STEPS: tl.constexpr, LANES: tl.constexpr, NEEDS_GRADIENT: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64)
    row, label = logits + t * NUM_ROWS, tl.load(labels + t)
    # A label outside of the vocabulary is an error of the data: a loss that is not a number stops the run.
    of_label = _label_logit(row, label, float("nan"), NUM_REAL)
    top, total = _row_statistics(row, NUM_REAL, NUM_ROWS, STEPS, LANES)
    log_sum = top + tl.log(total)
    tl.store(losses + t, log_sum - of_label)
    if NEEDS_GRADIENT:
        _write_row_gradient(row, label, of_label, tl.load(scales + t), log_sum, NUM_REAL, NUM_ROWS, STEPS, LANES)


@triton.jit
def _statistics(  # type: ignore[no-untyped-def]
    logits, labels, results, elsewhere, num_tokens,
    NUM_REAL: tl.constexpr, NUM_ROWS: tl.constexpr, STEPS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64)
    row = logits + t * NUM_ROWS
    top, total = _row_statistics(row, NUM_REAL, NUM_ROWS, STEPS, LANES)
    tl.store(results + t, top)
    tl.store(results + num_tokens + t, total)
    tl.store(results + 2 * num_tokens + t, _label_logit(row, tl.load(labels + t), elsewhere, NUM_REAL))


@triton.jit
def _gradient(  # type: ignore[no-untyped-def]
    logits, labels, scales, log_sums,
    NUM_REAL: tl.constexpr, NUM_ROWS: tl.constexpr, STEPS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64)
    row, label = logits + t * NUM_ROWS, tl.load(labels + t)
    of_label = _label_logit(row, label, 0.0, NUM_REAL)
    scale, log_sum = tl.load(scales + t), tl.load(log_sums + t)
    _write_row_gradient(row, label, of_label, scale, log_sum, NUM_REAL, NUM_ROWS, STEPS, LANES)


def _constants(num_real: int, num_rows: int) -> dict[str, Any]:
    """Compiled for the vocabulary: a few lengths in a run, and of loops of known length the end alone is masked."""
    sizes = {"NUM_REAL": num_real, "NUM_ROWS": num_rows}
    if num_rows < 1 << 13:
        return sizes | {"STEPS": 1, "LANES": max(16, min(1024, triton.next_power_of_2(num_rows))), "num_warps": 4}
    return sizes | {"STEPS": 2, "LANES": 4096, "num_warps": 16}


def losses(logits: Tensor, labels: Tensor, scales: Tensor, num_real: int, needs_gradient: bool) -> Tensor:
    """Logits [T, V] of a whole vocabulary, labels [T], fp32 scales [T] -> -log softmax at the labels, fp32 [T].

    With ``needs_gradient`` the logits become the gradients of sum(scales * losses). Columns from ``num_real`` on are
    padding, whatever is in them. NaN for a label that is not in the vocabulary.
    """
    assert logits.is_contiguous()
    T, V = logits.shape
    found = torch.empty(T, dtype=torch.float32, device=logits.device)
    _loss[(T,)](
        *(logits, labels.contiguous(), scales.contiguous(), found),
        NEEDS_GRADIENT=needs_gradient,
        **_constants(num_real, V),
    )
    return found


def statistics(logits: Tensor, labels: Tensor, num_real: int, elsewhere: float) -> Tensor:
    """Logits [T, V] -> fp32 [3, T]: their maximum, the sum of exp(logit - maximum), the label's logit.

    The logit of a label that is not among the first ``num_real`` columns is ``elsewhere``; of no columns at all the
    maximum is lower than any logit, but finite, and the sum 0.
    """
    assert logits.is_contiguous()
    T, V = logits.shape
    found = torch.empty(3, T, dtype=torch.float32, device=logits.device)
    _statistics[(T,)](logits, labels.contiguous(), found, elsewhere, T, **_constants(num_real, V))
    return found


def write_gradient(logits: Tensor, labels: Tensor, scales: Tensor, log_sums: Tensor, num_real: int) -> None:
    """Logits [T, V] become (exp(logit - log sum) - one-hot) times scale; labels that are not here have no one."""
    assert logits.is_contiguous()
    T, V = logits.shape
    _gradient[(T,)](
        *(logits, labels.contiguous(), scales.contiguous(), log_sums.contiguous()), **_constants(num_real, V)
    )
