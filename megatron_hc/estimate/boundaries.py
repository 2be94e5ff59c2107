"""What the kernels of a fused boundary move through a GPU's memory, pass by pass as boundary_triton and
boundary_triton_joint name them: more than a kernel of one pass would have to.

Dims: N streams of width D, R parts read and written, C = R D.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import nn

from megatron_hc.kernels.coefficients import Form
from megatron_hc.residual import LinearMix


class Moved(NamedTuple):
    """Bytes per token."""

    forward: float
    backward: float
    replay: float
    """The streams made again, from those of the boundary before."""


def moved_by(form: Form, D: int, itemsize: int, is_dynamic: bool) -> Moved:
    """By one boundary whose streams have ``itemsize`` bytes per number."""
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
    return Moved(forward, backward, replay=streams + width)


def fused_boundaries(model: nn.Module, itemsize: int) -> dict[int, Moved]:
    """Layer -> what its fused boundaries move together; activations have ``itemsize`` bytes."""
    found: dict[int, Moved] = {}
    for module in model.modules():
        if not isinstance(module, LinearMix) or not module.site.is_sublayer or not module.site.config.fused_residual:
            continue
        fused, layer = module.fused(), module.site.layer
        if fused is not None:
            width = max(4, itemsize) if module.fp32_stream else itemsize
            D = module.site.config.hidden_size // fused.form.num_reads
            moved = moved_by(fused.form, D, width, fused.projection is not None)
            found[layer] = Moved(*map(sum, zip(moved, found.get(layer, (0, 0, 0)), strict=True)))
    return found
