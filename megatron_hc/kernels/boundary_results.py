"""What a boundary's operations return, still empty, and what its kernels are handed.

Dims: T tokens, N streams, D width of one stream, R parts read and written, C = R D, K logits, rows: N, or 1 (joint).
"""

from __future__ import annotations

from torch import Tensor

from megatron_hc.kernels.norm import promote

NORMS = {"": 0, "RMSNorm": 1, "LayerNorm": 2}
"""How kernels know ``Form.norm``."""

Written = tuple[Tensor, Tensor, Tensor]
"""Y [T, R, D], write [T, R, N] and keep [T, N, N]: what one more H' is folded with."""
Seven = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def empty_results(streams: Tensor, num_reads: int, projection: Tensor | None, norm: str) -> Seven:
    """H' [T, N, D], x [T, C], write' [T, R, N], keep' [T, N, N], read' [T, N, R], statistics, those of the norm [T, 2].

    Statistics are [T, rows, K + 2] for W [K, D or N D], and [0] without W; without a norm its own are [0, 2].
    """
    T, N, D = streams.shape
    R, wide = num_reads, promote(streams.dtype)
    shape: tuple[int, ...] = (0,)
    if projection is not None:
        K, width = projection.shape
        shape = (T, N * D // width, K + 2)
    write, keep, read, statistics, of_norm = (
        streams.new_empty(size, dtype=wide) for size in ((T, R, N), (T, N, N), (T, N, R), shape, (T if norm else 0, 2))
    )
    return streams.new_empty((T, N, D)), streams.new_empty((T, R * D)), write, keep, read, statistics, of_norm


def empty_gradients(
    streams: Tensor, output: Tensor | None, write: Tensor | None, keep: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of H, Y, write and keep; absent ones are [0]."""
    wide = promote(streams.dtype)
    of_output, of_write, of_keep = (
        streams.new_empty(0, dtype=wide) if t is None else t.new_empty(t.shape) for t in (output, write, keep)
    )
    return streams.new_empty(streams.shape), of_output, of_write, of_keep


def pointer(tensor: Tensor | None, other: Tensor) -> Tensor:
    """Something for a kernel to be handed where there is nothing, which it does not look at."""
    return other if tensor is None else tensor.contiguous()


def unexpanded(streams: Tensor) -> tuple[Tensor, int]:
    """H and the numbers from one stream to the next: an embedding that was expanded to N streams is read once."""
    T, N, D = streams.shape
    if N > 1 and streams.stride() == (D, 0, 1):
        return streams, 0
    return streams.contiguous(), D
