"""Which parameters share the optimizer's settings."""

from __future__ import annotations

from typing import TypedDict

from torch import nn

from megatron_hc.config import ModelConfig


class ParameterGroup(TypedDict):
    """Parameters with the same settings."""

    kind: str
    """matrix, vector (biases and 1-D), embedding, or residual: what a matrix optimizer chooses by."""
    weight_decay: bool
    """Whether the run's weight decay applies."""
    lr_mult: float
    """Factor on the run's learning rate."""
    eps_mult: float
    """Factor on the run's epsilon of Adam."""
    params: list[tuple[str, nn.Parameter]]
    """(name in the model, parameter)."""


def parameter_groups(model: nn.Module, config: ModelConfig | None = None) -> list[ParameterGroup]:
    """Megatron-LM's groups: weight decay for all parameters but biases and 1-D ones.

    With --residual-scale parameters of layers have the multipliers of CompleteP (arXiv 2505.01618, table 1, at the base
    width): m^(a - 1) for the learning rate and m^-a for epsilon, m = layers / base layers; all others have 1.

    A module with a method ``weight_decay(name) -> bool`` (a residual) decides about its own parameters. Groups and
    parameters come in the order of ``named_parameters()``, which is the same on every rank; a tied parameter comes
    once, under its first name; frozen parameters are left out.
    """
    lr_mult, eps_mult = (1.0, 1.0) if config is None else depth_multipliers(config)
    groups: dict[tuple[str, bool, bool], ParameterGroup] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        kind, decays = _kind_and_decay(model, name, parameter)
        is_scaled = name.startswith("layers.") and (lr_mult, eps_mult) != (1.0, 1.0)
        key = kind, decays, is_scaled
        if key not in groups:
            multipliers = (lr_mult, eps_mult) if is_scaled else (1.0, 1.0)
            groups[key] = ParameterGroup(
                kind=kind, weight_decay=decays, lr_mult=multipliers[0], eps_mult=multipliers[1], params=[]
            )
        groups[key]["params"].append((name, parameter))
    return list(groups.values())


def depth_multipliers(config: ModelConfig) -> tuple[float, float]:
    """(of the learning rate, of Adam's epsilon) for parameters of layers."""
    if config.residual.residual_scale == "none":
        return 1.0, 1.0
    return config.depth_ratio ** (config.depth_power - 1), config.depth_ratio**-config.depth_power


def _kind_and_decay(model: nn.Module, name: str, parameter: nn.Parameter) -> tuple[str, bool]:
    owner_name, _, local = name.rpartition(".")
    owner = model.get_submodule(owner_name)
    decides = getattr(owner, "weight_decay", None)
    if callable(decides):
        return "residual", bool(decides(local))
    if parameter.ndim <= 1 or local.endswith("bias"):
        return "vector", False
    return ("embedding" if is_embedding(owner) else "matrix"), True


def is_embedding(module: nn.Module) -> bool:
    """Whether a module's matrix has a row per token or position; own classes say ``is_embedding = True``."""
    return isinstance(module, nn.Embedding) or bool(getattr(module, "is_embedding", False))
