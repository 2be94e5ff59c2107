"""What the kernels of a fused boundary move through a GPU's memory, pass by pass as boundary_triton and
boundary_triton_joint name them: more than a kernel of one pass would have to.

Dims: N streams of width D, R parts read and written, C = R D.
"""

from __future__ import annotations

from collections import defaultdict

from torch import nn

from megatron_hc.kernels.coefficients import Form
from megatron_hc.residual import LinearMix


def boundary_bytes(form: Form, D: int, itemsize: int, is_dynamic: bool) -> tuple[int, int]:
    """Bytes per token, forward and backward, of one boundary whose streams have ``itemsize`` bytes per number."""
    streams, width = itemsize * form.num_streams * D, itemsize * form.num_reads * D
    in_fp32 = 4 * form.num_streams * D
    forward = 2 * streams + 2 * width  # H and Y; H' and x
    backward = streams + width  # H' and the gradient of x, for sums over D
    backward += 3 * streams + 3 * width  # gradients of H' and x, H and Y; gradients of H and Y
    if is_dynamic:
        backward += streams  # H' for W's gradient
    if form.is_joint:
        forward += streams  # H' for what is read
        if is_dynamic:
            forward += streams  # H' for the logits
            backward += 2 * in_fp32  # what the logits add to the gradient of H', from one kernel to the next
    return forward, backward


def fused_boundaries(model: nn.Module, itemsize: int) -> dict[int, list[tuple[int, int]]]:
    """Layer -> ``boundary_bytes`` of each of its boundaries that is fused; activations have ``itemsize`` bytes."""
    found: dict[int, list[tuple[int, int]]] = defaultdict(list)
    for module in model.modules():
        if not isinstance(module, LinearMix) or not module.site.is_sublayer or not module.site.config.fused_residual:
            continue
        fused = module.fused()
        if fused is not None:
            width = max(4, itemsize) if module.fp32_stream else itemsize
            D = module.site.config.hidden_size // fused.form.num_reads
            found[module.site.layer].append(boundary_bytes(fused.form, D, width, fused.projection is not None))
    return dict(found)
