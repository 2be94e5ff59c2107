"""Modules of other packages that compute with parameters of ours."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor


class Kept:
    """A module that its user keeps without being its parent.

    As a child its parameters would be the model's, its names would be in checkpoints, and its extra state in every
    ``state_dict``. Here it has the user's parameters, lent for a call: names, shapes, placement, gradients and the
    optimizer are those of the plain model.
    """

    def __init__(self, module: Any) -> None:
        self.module = module

    def lend(self, parameters: Mapping[str, Tensor]) -> Any:
        """The module, with these in the places of its own parameters. Each call anew: a parameter may be replaced."""
        self.module._parameters.update(parameters)
        return self.module
