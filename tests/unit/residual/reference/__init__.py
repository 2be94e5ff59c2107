"""Every residual method a second time, from its paper's equations, in float64 and without the package's code."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from megatron_hc.config import ModelConfig
from reference.decoder import Decoder, Method
from reference.depth import AttentionResiduals, DenseFormer, MuddFormer
from reference.manifold import MHC, KromHC, MHCLite, SinglePassMHC
from reference.single import DeepDelta, Laurel, Orthogonal, Scaled, SparseAggregation
from reference.streams import Frac, Hyper, Plain
from reference.wide import Gated, VirtualWidth


def _mhc(config: ModelConfig, parameters: Mapping[str, Tensor]) -> Method:
    return (SinglePassMHC if config.residual.mhc_single_pass else MHC)(config, parameters)


REFERENCES: dict[str, Callable[[ModelConfig, Mapping[str, Tensor]], Method]] = {
    "plain": Plain,
    "hyper": Hyper,
    "frac": Frac,
    "mhc": _mhc,
    "mhc-lite": MHCLite,
    "kromhc": KromHC,
    "gated": Gated,
    "virtual-width": VirtualWidth,
    "attention": AttentionResiduals,
    "denseformer": DenseFormer,
    "muddformer": MuddFormer,
    "rezero": Scaled,
    "layerscale": Scaled,
    "laurel": Laurel,
    "orthogonal": Orthogonal,
    "sparse-aggregation": SparseAggregation,
    "deep-delta": DeepDelta,
}


def reference_decoder(config: ModelConfig, parameters: Mapping[str, Tensor]) -> Decoder:
    """The decoder of ``config`` with these parameters, by name as in ``GPT.named_parameters``."""
    return Decoder(config, parameters, REFERENCES[config.residual.residual_connection](config, parameters))
