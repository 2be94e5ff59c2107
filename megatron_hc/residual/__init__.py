"""The residual path: one class per method, chosen by name. ``base.py`` has the interface and the rules for authors."""

from __future__ import annotations

from megatron_hc.residual.base import (
    Carry,
    Draw,
    LinearMix,
    Mix,
    Norm,
    Reads,
    Residual,
    Site,
    TensorSpec,
    flatten,
    unflatten,
)
from megatron_hc.residual.depth import AttentionResidual, DenseFormer
from megatron_hc.residual.directional import DeepDelta, OrthogonalUpdate
from megatron_hc.residual.gated import GatedResidual
from megatron_hc.residual.hyper import FracConnection, HyperConnection
from megatron_hc.residual.laurel import Laurel
from megatron_hc.residual.manifold import KroneckerConnection, ManifoldConnection, PermutationConnection
from megatron_hc.residual.mudd import MuddFormer
from megatron_hc.residual.scaled import LayerScale, ReZero
from megatron_hc.residual.sparse import SparseAggregation
from megatron_hc.residual.value import (
    VALUE_RESIDUALS,
    ValueResidual,
    build_value_residual,
    carry_boundary,
    value_boundary,
    value_parts,
)
from megatron_hc.residual.virtual import VirtualWidth

RESIDUALS: dict[str, type[Residual]] = {
    "plain": Residual,
    "hyper": HyperConnection,
    "frac": FracConnection,
    "mhc": ManifoldConnection,
    "mhc-lite": PermutationConnection,
    "kromhc": KroneckerConnection,
    "gated": GatedResidual,
    "virtual-width": VirtualWidth,
    "attention": AttentionResidual,
    "denseformer": DenseFormer,
    "muddformer": MuddFormer,
    "rezero": ReZero,
    "layerscale": LayerScale,
    "laurel": Laurel,
    "orthogonal": OrthogonalUpdate,
    "sparse-aggregation": SparseAggregation,
    "deep-delta": DeepDelta,
}


def build_residual(site: Site) -> Residual:
    """The residual module of one site, by ``--residual-connection``."""
    return RESIDUALS[site.config.residual.residual_connection](site)


__all__ = [
    "RESIDUALS", "VALUE_RESIDUALS", "Carry", "Draw", "LinearMix", "Mix", "Norm", "Reads", "Residual", "Site",
    "TensorSpec", "ValueResidual", "build_residual", "build_value_residual", "carry_boundary", "flatten", "unflatten",
    "value_boundary", "value_parts",
]  # fmt: skip
