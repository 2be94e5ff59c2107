"""A boundary of hyper-connections, frac-connections and virtual width networks in Triton.

Dims as in ``boundary_triton_kernels``.

Forward: one kernel, a token per warp up to C = 2,048, reads (n + 1) C numbers per token and writes (n + 1) C (and reads
H' again, from the second cache); a small one makes the weights that go on. Backward: the sums over D that everything
else waits for (reads (n + 1) C); through tanh, a number per thread; the streams, a token per warp (reads (2 n + 2) C,
writes (n + 1) C); W's gradient as a product of matrices (reads n C). Any N up to 8 and any D, masked; the number of
tokens is no constant of a kernel. What is summed over tokens leaves a program as a partial sum in fp32, and these are
added in a fixed order. Everything is computed in fp32 and rounded to the streams' dtype once.

Measured on an H200 and left out, each slower: sums between threads as products of matrices; the streams' gradients in
columns, with W and its gradient in registers; loads ahead of time through shared memory.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from megatron_hc.kernels import boundary_triton_backward_kernels as kernels
from megatron_hc.kernels.boundary_results import NORMS, empty_gradients, empty_results, pointer, unexpanded
from megatron_hc.kernels.boundary_triton_folds import folds as folds  # one of this module's operations
from megatron_hc.kernels.boundary_triton_kernels import forward as forward_kernel
from megatron_hc.kernels.boundary_triton_kernels import weights
from megatron_hc.kernels.coefficients import READ_OUT, Form
from megatron_hc.kernels.triton_pieces import IS_INTERPRETED, multiprocessors, projection_gradient, sum_of_rows, take


def can_do(form: Form, streams: Tensor) -> bool:
    """Static and dynamic weights that are tanh of row-wise logits, with every token's streams in one program."""
    is_known = form.kind in ("tanh", "virtual", READ_OUT) and form.num_streams <= 8
    return is_known and streams.shape[1] * streams.shape[2] <= 1 << 16


def num_logits(form: Form) -> int:
    """K; static weights have as many numbers per row."""
    N, R = form.num_streams, form.num_reads
    if form.is_joint:
        return N * N + 2 * N
    return R + N + (R if form.kind == "virtual" else 1)


def constants_of(form: Form, streams: Tensor, projection: Tensor | None) -> dict[str, Any]:
    """Of every kernel."""
    N, R, K = form.num_streams, form.num_reads, num_logits(form)
    return {
        **{"N": N, "D": streams.shape[2], "R": R, "NP": triton.next_power_of_2(N), "RP": triton.next_power_of_2(R)},
        **{"K": K, "KP": triton.next_power_of_2(K + 2), "DP": max(32, triton.next_power_of_2(streams.shape[2]))},
        **{"IS_DYNAMIC": projection is not None, "IS_CENTRED": form.is_centred, "NORM": NORMS[form.norm]},
        "HAS_MATRICES": form.kind == "virtual",  # of scales
        "V": 16 // streams.element_size(),  # a thread's load has 16 bytes
        "IS_COMPILED": not IS_INTERPRETED,
    }


def row_options(constants: dict[str, Any]) -> dict[str, Any]:
    """Of mHC's kernels with a token per program: a thread has 64 numbers of H'."""
    return {"num_warps": max(1, min(16, constants["NP"] * constants["DP"] // 2048))}


def read_options(constants: dict[str, Any]) -> dict[str, Any]:
    """Of ``backward_read``: a thread has some 64 columns of the norm's gradient, fewer where there are many sums."""
    N, R, kinds = constants["N"], constants["R"], max(1, constants["NORM"])
    num_warps = max(1, min(16, constants["RP"] * constants["DP"] * kinds // 2048))
    sums = 2 * N * R + (R + N if kinds == 2 else 0)
    is_held = sums + N * R <= 120
    taken = sums + (N * R if is_held else 0)
    while num_warps < 16 and taken + R * kinds * -(-constants["D"] // (32 * num_warps)) > 160:
        num_warps *= 2
    width, taken = constants["V"], taken + R * kinds * -(-constants["D"] // (32 * num_warps))
    while width > 2 and taken + width * (N + 2 * R) > 200:
        width //= 2
    return {"E": 32 * num_warps * width, "V": width, "IS_HELD": is_held, "num_warps": num_warps}


def streams_options(form: Form, constants: dict[str, Any]) -> dict[str, Any]:
    """Of ``backward_streams``, a token per warp: columns of a thread, whether a token's numbers are held in registers.

    A thread's 255 registers have them, its parts of the sums over D, and some vectors of every stream and part.
    """
    N, R, K = constants["N"], constants["R"], constants["K"]
    logits = N * (K + 2) if constants["IS_DYNAMIC"] and not form.is_joint else 0
    sums, numbers, vectors = (N + R) * N, N * N + 2 * N * R + logits, 3 * N + 2 * R
    width, is_held = constants["V"], numbers + sums <= 120
    taken = sums + (numbers if is_held else 0)
    while width > 1 and taken + width * vectors > 220:
        width //= 2
    return {"E": 32 * width, "V": width, "IS_HELD": is_held, "num_warps": 1}


def forward_options(constants: dict[str, Any]) -> dict[str, Any]:
    """Of ``forward``: 64 numbers of x in a thread, and as many columns at a time as registers have room for."""
    N, R, K = constants["N"], constants["R"], constants["K"]
    num_warps = max(1, min(16, constants["RP"] * constants["DP"] // 2048))
    sums, numbers = N * (K + 1) if constants["IS_DYNAMIC"] else 0, N * N + N * R
    width, is_held = constants["V"], numbers + sums <= 120
    taken = sums + (numbers if is_held else 0)
    while width > 1 and taken + width * (2 * N + R) > 220:
        width //= 2
    return {"E": 32 * num_warps * width, "V": width, "IS_HELD": is_held, "num_warps": num_warps}


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
    T = streams.shape[0]
    results = empty_results(streams, form.num_reads, projection, form.norm)
    new, x, next_write, next_keep, read, statistics, norm_statistics = results
    if form.kind != "virtual" and form.num_reads > 1:
        next_write.zero_()  # but for its diagonal
    h, stride = unexpanded(streams)
    static, scales = ([p.contiguous() for p in some] for some in (parameters[:3], parameters[3:] or parameters[:2]))
    constants, sums = constants_of(form, streams, projection), pointer(row_sums, x)
    forward_kernel[(T,)](
        *(h, pointer(output, h), pointer(write, x), pointer(keep, x), pointer(projection, x), sums),
        *(static[0], scales[0], pointer(norm_weight, x), pointer(norm_bias, x), new, x, statistics, norm_statistics),
        *(form.eps, form.norm_eps, stride),
        **take(constants, "N", "D", "R", "K", "DP", "NORM"),
        **take(constants, "IS_DYNAMIC", "IS_CENTRED", "HAS_MATRICES", "IS_COMPILED"),
        HAS_OUTPUT=output is not None,
        HAS_BIAS=norm_bias is not None,
        **forward_options(constants),
    )
    weights[(triton.cdiv(T, 16),)](
        *(statistics, sums, *static, *scales, read, next_write, next_keep, T, form.eps),
        **take(constants, "N", "R", "K", "NP", "KP", "IS_DYNAMIC", "IS_CENTRED", "HAS_MATRICES"),
        M=16,
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
    (T, N, D), is_dynamic = new.shape, projection is not None
    wide: dict[str, Any] = {"dtype": torch.float32, "device": new.device}
    g_new, g_x, g_write, g_keep = (g.contiguous() for g in (g_new, g_x, g_write, g_keep))
    constants = constants_of(form, streams, projection)
    g_read, of_norm, g_norm = backward_of_read(form, g_x, new, norm_weight, read, norm_statistics)
    grads = (g_read, g_keep, g_write)
    g_z, g_parameters, of_row_sums = backward_of_weights(constants, grads, statistics, parameters, row_sums, form.eps)
    g_projection = torch.empty(0, **wide)
    if is_dynamic:
        g_projection = projection_gradient(g_z.view(T * N, -1), new.view(T * N, D), constants["K"])
        if row_sums is not None:
            g_projection += of_row_sums.unsqueeze(-1)
    inputs = (g_new, g_x, streams, output, write, keep, projection, norm_weight)
    found = backward_of_streams(form, constants, inputs, (read, norm_statistics, g_norm, g_z))
    return [*found, g_projection], of_norm, g_parameters


def backward_of_read(
    form: Form, g_x: Tensor, new: Tensor, norm_weight: Tensor | None, read: Tensor, norm_statistics: Tensor
) -> tuple[Tensor, list[Tensor], Tensor]:
    """-> gradients of read and of the norm's weight and bias, what the norm takes off that of x [T, 2]."""
    (T, _, D), R, rows = new.shape, form.num_reads, NORMS[form.norm]
    wide: dict[str, Any] = {"dtype": torch.float32, "device": new.device}
    g_read, g_norm = torch.empty_like(read), torch.empty_like(norm_statistics)
    constants = constants_of(form, new, None)
    options = read_options(constants)
    programs = min(T, max(1, 8 // options["num_warps"]) * multiprocessors(new.device))
    partial = torch.empty(programs, rows, R * D, **wide)
    kernels.backward_read[(programs,)](
        *(g_x, new, pointer(norm_weight, read), read, norm_statistics, g_read, g_norm, partial, T),
        **take(constants, "N", "D", "R", "NORM"),
        **options,
    )
    of_norm = [torch.zeros(R * D, **wide) if row >= rows else torch.empty(R * D, **wide) for row in range(2)]
    for row in range(rows):
        sum_of_rows(partial[:, row], of_norm[row])
    return g_read, of_norm, g_norm


def backward_of_weights(
    constants: dict[str, Any],
    grads: tuple[Tensor, Tensor, Tensor],
    statistics: Tensor,
    parameters: list[Tensor],
    row_sums: Tensor | None,
    eps: float,
) -> tuple[Tensor, list[Tensor], Tensor]:
    """Gradients of read, keep and write -> of the logits (``backward_weights``), the parameters and W's row sums."""
    g_read = grads[0]
    (T, N, _), K, is_dynamic = g_read.shape, constants["K"], constants["IS_DYNAMIC"]
    wide: dict[str, Any] = {"dtype": torch.float32, "device": g_read.device}
    scales = [p.contiguous() for p in parameters[3:]] if is_dynamic else [g_read, g_read]
    small = take(constants, "N", "R", "K", "NP", "KP", "IS_DYNAMIC", "IS_CENTRED", "HAS_MATRICES")
    numbers = constants["NP"] * constants["KP"]
    programs = min(triton.cdiv(T, 16), 2 * multiprocessors(g_read.device))
    g_z, sums = torch.empty_like(statistics), torch.empty(programs, 3, N, K, **wide)
    kernels.backward_weights[(programs,)](
        *(*grads, statistics, pointer(row_sums, g_read), *scales, g_z, sums, T, eps),
        **{**small, "D": constants["D"], "M": 16, "num_warps": 8 if numbers > 128 else 4},  # without spills
    )
    g_parameters, of_row_sums = [torch.empty(p.shape, **wide) for p in parameters], torch.empty(K, **wide)
    kernels.parameter_gradients[(1,)](
        *(sums, *g_parameters[:3], *(g_parameters[3:] or g_parameters[:2]), of_row_sums, programs),
        **{**small, "B": max(1, 4096 // numbers), "num_warps": 8},
    )
    return g_z, g_parameters, of_row_sums


def backward_of_streams(
    form: Form, constants: dict[str, Any], inputs: tuple[Any, ...], small: tuple[Tensor, ...]
) -> list[Tensor]:
    """-> gradients of H, Y, write and keep.

    ``inputs``: the gradients of H' and x, then H, Y, write, keep, W and the norm's weight; ``small``: read, the norm's
    statistics, what ``backward_read`` and what ``backward_weights`` found.
    """
    g_new, g_x, streams, output, write, keep, projection, norm_weight = inputs
    read, found = small[0], empty_gradients(streams, output, write, keep)
    h, stride = unexpanded(streams)
    kernels.backward_streams[(g_new.shape[0],)](
        *(g_new, g_x, h, pointer(output, h), pointer(write, read), pointer(keep, read), pointer(projection, read)),
        *(pointer(norm_weight, read), *small, *found, stride),
        **take(constants, "N", "D", "R", "K", "IS_DYNAMIC", "IS_CENTRED", "NORM", "IS_COMPILED"),
        HAS_OUTPUT=output is not None,
        IS_JOINT=form.is_joint,
        **streams_options(form, constants),
    )
    return list(found)
