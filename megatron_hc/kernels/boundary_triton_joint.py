"""A boundary of mHC in Triton.

Dims: T tokens, N streams, D width of a stream, K = N^2 + 2 N logits, KP: the next power of 2, at least 16; M tokens, E
columns of a program.

W has K rows of N D numbers, too many to pass by every token: logits are a product of matrices, and so is what they give
back. Forward: H' (reads (n + 1) C numbers per token, writes n C); the product (reads n C); the weights, a token per
thread with Sinkhorn in its registers; the read and its norm (reads n C, writes C). Backward: sums over D (reads
(n + 1) C); through Sinkhorn and the sigmoids, a token per thread; the product for W's gradient (reads n C); the product
for the streams, added to the gradient of H' (reads n C, writes n C in fp32, so that all of it is rounded once); the
streams (reads (2 n + 2) C, writes (n + 1) C). What is done row by row are kernels of ``boundary_triton``.

Streams in bf16 are factors as they are, and W as a sum of three numbers of bf16, 24 bits: products are exact and their
sums are fp32. (What the logits give back to the streams has 16 bits of both factors: it is rounded to 8.) Sums over
tokens leave a program as partial sums and are added in a fixed order.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
from torch import Tensor

from megatron_hc.kernels import boundary_triton
from megatron_hc.kernels import boundary_triton_joint_kernels as kernels
from megatron_hc.kernels.boundary_results import NORMS, empty_results, pointer, unexpanded
from megatron_hc.kernels.boundary_triton_folds import folds as folds  # one of this module's operations
from megatron_hc.kernels.coefficients import Form
from megatron_hc.kernels.triton_pieces import IS_INTERPRETED, multiprocessors, projection_gradient, take


def can_do(form: Form, streams: Tensor) -> bool:
    """Static and dynamic weights of mHC in the paper's form."""
    return form.kind == "sinkhorn" and 2 <= form.num_streams <= 8


def _floor() -> float:
    return 0.9 * math.log(torch.finfo(torch.float32).tiny)  # as in sinkhorn.py


M, E = 64, 64  # tokens and columns that a program of a product has at a time
PARTS = 4  # of W's width, so that logits have programs for every multiprocessor


def _constants(form: Form, streams: Tensor, projection: Tensor | None) -> dict[str, Any]:
    """Of every kernel."""
    N, D = form.num_streams, streams.shape[2]
    K = N**2 + 2 * N
    return {
        **{"N": N, "D": D, "K": K, "KP": max(16, triton.next_power_of_2(K)), "WIDTH": N * D},
        **{"DP": max(32, triton.next_power_of_2(D)), "NORM": NORMS[form.norm]},
        **{"IS_DYNAMIC": projection is not None, "IS_COMPILED": not IS_INTERPRETED},
        "IS_SPLIT": streams.dtype == torch.bfloat16 and not IS_INTERPRETED,
        **{"ITERATIONS": form.iterations, "FLOOR": _floor()},
    }


def _factors(constants: dict[str, Any], projection: Tensor) -> Tensor:
    """W as the products take it."""
    projection = projection.contiguous()
    if not constants["IS_SPLIT"]:
        return projection
    parts = torch.empty(3, *projection.shape, dtype=torch.bfloat16, device=projection.device)
    count = projection.numel()
    kernels.split_projection[(triton.cdiv(count, 1024),)](projection, parts, count, B=1024)
    return parts


def forward(
    form: Form,
    streams: Tensor,
    output: Tensor | None,
    write: Tensor | None,
    keep: Tensor | None,
    projection: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    parameters: list[Tensor],
    row_sums: Tensor | None,
) -> tuple[Tensor, ...]:
    """-> H', x, write', keep', read', the statistics, those of the norm: as ``boundary`` has them."""
    T, N, D = streams.shape
    results = empty_results(streams, 1, projection, form.norm)
    new, x, next_write, next_keep, read, statistics, norm_statistics = results
    h, stride = unexpanded(streams)
    constants, of_rows = _constants(form, streams, projection), boundary_triton.constants_of(form, streams, projection)
    kernels.fold[(T,)](
        *(h, pointer(output, h), pointer(write, x), pointer(keep, x), new, statistics, stride),
        **take(constants, "N", "D", "K", "DP", "IS_DYNAMIC", "IS_COMPILED"),
        HAS_OUTPUT=output is not None,
        **boundary_triton.row_options(of_rows),
    )
    sums = torch.empty(PARTS, T, constants["KP"], dtype=torch.float32, device=h.device)
    if projection is not None:
        columns = triton.cdiv(N * D, PARTS * E) * E
        kernels.logits[(triton.cdiv(T, M), PARTS)](
            *(new, _factors(constants, projection), sums, T),
            **take(constants, "WIDTH", "K", "KP", "IS_SPLIT"),
            **{"COLUMNS": columns, "M": M, "E": E, "num_warps": 4, "num_stages": 3},
        )
    bias = parameters[0].contiguous()
    kernels.weights[(triton.cdiv(T, 32),)](
        *(sums, statistics, parameters[-1], bias, read, next_write, next_keep, T, form.eps),
        **take(constants, "N", "K", "KP", "ITERATIONS", "FLOOR", "IS_DYNAMIC"),
        **{"M": 32, "PARTS": PARTS, "num_warps": 1},
    )
    kernels.read_and_norm[(T,)](
        *(new, read, pointer(norm_weight, x), pointer(norm_bias, x), x, norm_statistics, form.norm_eps),
        **take(constants, "N", "D", "DP", "NORM", "IS_COMPILED"),
        HAS_BIAS=norm_bias is not None,
        **boundary_triton.row_options(of_rows),
    )
    return results


def backward(
    form: Form,
    g_new: Tensor,
    g_x: Tensor,
    g_write: Tensor,
    g_keep: Tensor,
    streams: Tensor,
    output: Tensor | None,
    write: Tensor | None,
    keep: Tensor | None,
    projection: Tensor | None,
    norm_weight: Tensor | None,
    parameters: list[Tensor],
    row_sums: Tensor | None,
    new: Tensor,
    read: Tensor,
    statistics: Tensor,
    norm_statistics: Tensor,
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """-> gradients of H, Y, write, keep, W ([0] where absent), of the norm's weight and bias, of parameters."""
    T, N, D = new.shape
    wide: dict[str, Any] = {"dtype": torch.float32, "device": new.device}
    g_new, g_x, g_write, g_keep = (g.contiguous() for g in (g_new, g_x, g_write, g_keep))
    constants = _constants(form, streams, projection)
    K = constants["K"]
    g_read, of_norm, g_norm = boundary_triton.backward_of_read(form, g_x, new, norm_weight, read, norm_statistics)
    g_z, scratch = torch.empty_like(statistics), torch.empty(2 * form.iterations * N, T, **wide)
    of_tokens = torch.empty(triton.cdiv(T, 32), 2, K, **wide)
    bias = parameters[0].contiguous()
    kernels.backward_weights[(triton.cdiv(T, 32),)](
        *(g_read, g_write, g_keep, statistics, parameters[-1], bias, g_z, scratch, of_tokens, T, form.eps, N * D),
        **take(constants, "N", "K", "ITERATIONS", "FLOOR", "IS_DYNAMIC"),
        **{"M": 32, "num_warps": 1},
    )
    g_parameters, g_projection = [torch.empty(p.shape, **wide) for p in parameters], torch.empty(0, **wide)
    kernels.parameter_gradients[(1,)](
        *(of_tokens, g_parameters[0], g_parameters[-1], of_tokens.shape[0]),
        **take(constants, "N", "K", "KP", "IS_DYNAMIC"),
        **{"B": 4096 // constants["KP"], "num_warps": 8},
    )
    if projection is not None:
        g_projection = projection_gradient(g_z.view(T, K + 2), new.view(T, N * D), K)
        with_product = torch.empty(g_new.shape, **wide)  # rounded with all the rest of it, once
        blocks = triton.cdiv(N * D, E)
        programs = max(1, min(triton.cdiv(T, M), 3 * multiprocessors(new.device) // blocks))
        kernels.with_product[(blocks, programs)](
            *(g_new, g_z, _factors(constants, projection), with_product, T),
            **take(constants, "WIDTH", "K", "KP", "IS_SPLIT"),
            **{"M": M, "E": E, "STAGES": 3, "num_warps": 4},
        )
        g_new = with_product
    inputs = (g_new, g_x, streams, output, write, keep, projection, norm_weight)
    of_rows = boundary_triton.constants_of(form, streams, projection)
    found = boundary_triton.backward_of_streams(form, of_rows, inputs, (read, norm_statistics, g_norm, g_z))
    return [*found, g_projection], of_norm, g_parameters
