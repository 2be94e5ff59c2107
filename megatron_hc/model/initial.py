"""Initial values of the model's matrices, by ``--init-scheme``."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from megatron_hc.config import ModelConfig
from megatron_hc.residual import Draw

LinearKind = Literal["qkv", "proj", "fc1", "fc2"]


class Initial(NamedTuple):
    """How one logical matrix [out, in] is drawn."""

    scale: float
    """Standard deviation of its elements, or factor on a (half-)orthogonal matrix."""
    is_orthogonal: bool = False

    def value(self, draw: Draw, part: str, shape: tuple[int, int]) -> Tensor:
        """fp32, the same numbers wherever ``draw`` gives the same ones."""
        return orthogonal(draw(part, shape, 1.0)) * self.scale if self.is_orthogonal else draw(part, shape, self.scale)


def orthogonal(normal: Tensor) -> Tensor:
    """Normal numbers [out, in] -> a matrix whose rows (or columns, if there are fewer) are orthonormal, uniform.

    As ``torch.nn.init.orthogonal_`` (Saxe et al. 2014), decomposed in float64, so that ranks round to the same fp32.
    """
    rows, columns = normal.shape
    tall = (normal if rows >= columns else normal.t()).double()
    q, r = torch.linalg.qr(tall)
    q = q * r.diagonal().sign()
    return (q if rows >= columns else q.t()).to(normal.dtype)


def initial_of(kind: LinearKind, part: str, config: ModelConfig, in_features: int, out_features: int) -> Initial:
    """Initial values of one logical matrix [out, in]; N layers, sublayers' output matrices are proj and fc2.

    megatron: N(0, --init-method-std^2), outputs smaller by sqrt(2 N). orthogonal: orthogonal matrices, outputs smaller
    by sqrt(2 N). With --residual-scale N is --base-num-layers in both: the factor on the output does the rest.
    deepnorm (arXiv 2203.00555): Xavier's sqrt(2 / (in + out)), smaller by (8 N)^(1/4) for values, outputs and all of
    the MLP. fixup (arXiv 1901.09321, with m = 2 matrices per branch and 2 N branches): outputs 0, all others N(0,
    --init-method-std^2) smaller by sqrt(2 N). t-fixup (Huang et al. 2020): Xavier's, times 0.67 N^(-1/4) for values,
    outputs and all of the MLP (the encoder's constant: a layer has two sublayers, as an encoder's), and sqrt(1/2) for
    queries and keys, as in the code that it was tuned with. --output-init-by-streams: outputs smaller by sqrt(n).
    """
    layers, scheme = config.residual.base_num_layers or config.num_layers, config.init_scheme
    is_output, is_query_or_key = kind in ("proj", "fc2"), kind == "qkv" and part != "v"
    xavier = math.sqrt(2 / (in_features + out_features))
    if scheme == "megatron":
        scale = config.init_method_std / (math.sqrt(2 * layers) if is_output else 1)
    elif scheme == "orthogonal":
        scale = 1 / (math.sqrt(2 * layers) if is_output else 1)
    elif scheme == "fixup":
        scale = 0.0 if is_output else config.init_method_std / math.sqrt(2 * layers)
    elif scheme == "deepnorm":
        scale = xavier * (1.0 if is_query_or_key else (8 * layers) ** -0.25)
    else:
        assert scheme == "t-fixup", scheme
        scale = xavier * (math.sqrt(0.5) if is_query_or_key else 0.67 * layers**-0.25)
    if is_output and config.residual.output_init_by_streams:
        scale /= math.sqrt(config.residual.residual_streams)
    return Initial(scale, scheme == "orthogonal")


def embedding_std(config: ModelConfig) -> float:
    """Of the vocabulary's and the positions' table; T-Fixup: (9 N)^(-1/4) d^(-1/2)."""
    if config.init_scheme == "t-fixup":
        return (9 * config.num_layers) ** -0.25 * config.hidden_size**-0.5
    return config.init_method_std
