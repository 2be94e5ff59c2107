"""What delayed scaling remembers from step to step, as tensors of a checkpoint: apart from the model's, under 'fp8.'.

transformer-engine's own ``get_extra_state`` pickles it; nothing here is pickled. The ranks that have the same layers
agree on these numbers after every step, so each name is one whole tensor whatever the layout. A checkpoint without
them, or with a history of another length, starts them anew: they are as good as before after a few steps.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from megatron_hc.stored import Stored

DIRECTIONS = ("fwd", "bwd")
KINDS = ("scale", "amax_history")


class Fp8State:
    """The state of transformer-engine's modules; ``modules``: by the name of the module of ours that each runs."""

    def __init__(self, modules: Mapping[str, Any], recipe: Any) -> None:
        self.modules, self.recipe = modules, recipe

    def tensors(self) -> dict[str, Stored]:
        """'fp8.NAME.scale_fwd' and so on -> its numbers; none before the first step, or where a recipe has no state."""
        found: dict[str, Tensor] = {}
        for name, module in self.modules.items():
            for direction in DIRECTIONS:
                state = module.fp8_meta.get(f"scaling_{direction}")
                for kind in KINDS:
                    if isinstance(getattr(state, kind, None), Tensor):
                        found[f"fp8.{name}.{kind}_{direction}"] = getattr(state, kind)
        return {name: _whole(tensor) for name, tensor in found.items()}

    def asked(self, shapes: Mapping[str, tuple[tuple[int, ...], torch.dtype]]) -> dict[str, Stored]:
        """Room for what a checkpoint has of it; ``shapes``: of all tensors of the checkpoint, by name."""
        for name, module in self.modules.items():
            history = shapes.get(f"fp8.{name}.amax_history_fwd")
            if history is not None and hasattr(self.recipe, "amax_history_len"):
                # As transformer-engine prepares itself before it loads its own extra state.
                module.fp8_meta["num_gemms"] = getattr(module, "num_gemms", 1)
                module.fp8_meta["recipe"] = self.recipe
                module.init_fp8_meta_tensors(self.recipe)
        return {name: room for name, room in self.tensors().items() if name in shapes and room.shape == shapes[name][0]}


def _whole(tensor: Tensor) -> Stored:
    return Stored(tuple(tensor.shape), tensor.dtype, (((0,) * tensor.dim(), tensor),))
