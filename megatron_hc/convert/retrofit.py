"""A plain checkpoint becomes one of another residual method with the same function, ready to be trained on.

Old tensors are copied bit for bit, their optimizer state too. What is new starts where it changes nothing: at the
method's own initial values, where its class says that it then equals the plain residual, or at others given here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from megatron_hc.cli import parse
from megatron_hc.cli_options import to_flat
from megatron_hc.config import ModelConfig, TrainConfig, flag, leaf_fields
from megatron_hc.convert.checkpoints import Folder, kept_arguments, save_weights
from megatron_hc.convert.hf import check_ours
from megatron_hc.convert.shards import Spec
from megatron_hc.model.gpt import GPT
from megatron_hc.parallel.plan import draw_for, owned_parameters
from megatron_hc.residual import Residual

PLACEMENTS = ("pre", "peri", "reordered")
"""Norm placements in which a sublayer's output is added to the stream, and nothing else happens to it."""
MOMENTS = ("optimizer.exp_avg", "optimizer.exp_avg_sq")
OWN_START = (
    "hyper", "frac", "mhc", "virtual-width", "attention", "denseformer", "muddformer", "laurel", "sparse-aggregation",
)  # fmt: skip
"""Methods that are the plain residual at their own initial values, as far as ``reasons_against`` lets them through."""
VALUE_FIELDS = ("value_residual", "value_residual_first_weight", "value_residual_own_weight")


def retrofit(load: str, save: str, flags: Sequence[str], *, step: int | None = None) -> Path:
    """Write a checkpoint of the iteration of the one that is read; returns its folder. ``flags``: as for training."""
    source = Folder(load, step)
    before = parse([], base=source.arguments).config
    config = parse(_with_start(flags), base=source.arguments).config
    config.model.validate()
    _check(before, config)
    vocab_size = source.specs["model.embedding.weight"].shape[0]
    check_ours(source, before.model, vocab_size)
    with torch.device("meta"):
        model = GPT(config.model, vocab_size, padded_vocab=vocab_size)
    starts = {name: start for name, start in _starts(model, source, config.training.seed)}
    specs, reads = {}, {}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        old = f"model.{name}"
        if old in source.specs and name not in starts:
            specs[old], reads[old] = source.specs[old], _reading(source, old)
        else:
            specs[old], reads[old] = Spec(tuple(tensor.shape), torch.float32), starts[name]
        for moment in MOMENTS if any(key.startswith(MOMENTS) for key in source.specs) else ():
            key = f"{moment}.{name}"
            if key in source.specs and name not in starts:
                specs[key], reads[key] = source.specs[key], _reading(source, key)
            elif isinstance(tensor, nn.Parameter):
                specs[key] = Spec(tuple(tensor.shape), torch.float32)
                reads[key] = _zeros(specs[key].shape)
    arguments = kept_arguments(source, config)
    return save_weights(save, source.state["iteration"], specs, lambda name: reads[name](), source.state, arguments)


def _reading(source: Folder, name: str) -> Callable[[], Tensor]:
    return lambda: source.read(name)


def _zeros(shape: tuple[int, ...]) -> Callable[[], Tensor]:
    return lambda: torch.zeros(shape)


def _with_start(flags: Sequence[str]) -> list[str]:
    """The flags, and with --value-residual learnable the weights (0, 1) to start from."""
    words = list(flags)
    if "learnable" in words or "--value-residual=learnable" in words:
        for name, value in (("first", "0"), ("own", "1")):
            if not any(word.startswith(f"--value-residual-{name}-weight") for word in words):
                words += [f"--value-residual-{name}-weight", value]
    return words


def _check(before: TrainConfig, after: TrainConfig) -> None:
    """Refuse what is not plain before, and what cannot have the same function after."""
    old, new = before.model, after.model
    if old.residual.residual_connection != "plain" or old.value_residual != "none" or old.single_layer_value:
        raise ValueError(
            f"the checkpoint has --residual-connection {old.residual.residual_connection} and --value-residual "
            f"{old.value_residual}: only a plain one can be retrofitted"
        )
    changed = {name for name, value in to_flat(after).items() if to_flat(before)[name] != value}
    allowed = {path[-1] for path, _ in leaf_fields(ModelConfig) if path[0] == "residual"} | set(VALUE_FIELDS)
    other = sorted(changed - allowed)
    if other:
        raise ValueError(f"{', '.join(map(flag, other))} cannot change here: a retrofit is about the residual path")
    if not changed:
        raise ValueError("nothing would change: give --residual-connection or --value-residual")
    if new.norm_placement not in PLACEMENTS:
        raise ValueError(
            f"--norm-placement {new.norm_placement} cannot be retrofitted, only {', '.join(PLACEMENTS)}: norms of the "
            "stream itself do not go with other methods"
        )
    reasons = reasons_against(new)
    if reasons:
        raise ValueError(f"there is no start with the same function: {'; '.join(reasons)}")


def reasons_against(model: ModelConfig) -> list[str]:
    """Why a model has no values of its new parameters at which it has the plain model's function."""
    options, found = model.residual, []
    method, name = options.residual_connection, f"--residual-connection {options.residual_connection}"
    has_eps = model.norm_epsilon > 0
    rules = [
        (
            options.residual_readout == "sum" and has_eps,
            "--residual-readout sum makes the stream larger against --norm-epsilon: use mean",
        ),
        (
            method == "attention" and has_eps,
            f"{name} reads means where pre-norm reads sums, which differ by --norm-epsilon ({model.norm_epsilon:g})",
        ),
        (options.mhc_convention == "megatron", "--mhc-convention megatron has no weights near 1: use paper"),
        (
            method == "virtual-width" and options.virtual_width_projections,
            f"{name} with learned projections norms what it reads out: use --no-virtual-width-projections",
        ),
        (
            method == "laurel" and "rw" in options.laurel_form,
            f"--laurel-form {options.laurel_form} weighs stream and output with weights of sum 1: use lr, pa or lr-pa",
        ),
        (method == "orthogonal", f"{name} takes away what is parallel to the stream, at any weights"),
        (method == "deep-delta", f"{name} overwrites a direction of the stream, at any weights"),
        (
            method == "gated" and model.normalization != "RMSNorm",
            f"{name} has RMS norms, the checkpoint --normalization {model.normalization}",
        ),
        (
            method in ("gated", "muddformer") and model.rmsnorm_bias,
            f"{name} norms its reads itself, without the bias of --rmsnorm-bias",
        ),
        (method == "gated" and model.norm_placement == "reordered", f"{name} norms its reads, reordered does not"),
        (
            options.residual_scale != "none" and model.branch_scale != 1.0,
            f"--residual-scale {options.residual_scale} multiplies every output",
        ),
        (
            model.value_residual not in ("none", "learnable", "dense"),
            f"--value-residual {model.value_residual} has no learned weights that could start at (0, 1): use learnable "
            "or dense",
        ),
        (
            model.value_residual == "learnable" and model.value_weights != (0.0, 1.0),
            "--value-residual learnable must start with --value-residual-first-weight 0 and "
            "--value-residual-own-weight 1",
        ),
    ]
    found += [reason for is_wrong, reason in rules if is_wrong]
    known = (*OWN_START, "plain", "mhc-lite", "kromhc", "gated", "rezero", "layerscale")
    if method not in known and not found:
        found.append(f"{name} claims none")
    return found


@dataclass(frozen=True)
class _Place:
    """One residual module of the new model."""

    prefix: str
    module: Residual
    norm: str
    """The tensor of the old model that holds the weight of this read's norm."""


def _starts(model: GPT, source: Folder, seed: int) -> Iterator[tuple[str, Callable[[], Tensor]]]:
    """(name, how to make it) of every parameter that the old model has not, or that starts elsewhere."""
    residuals = {prefix: module for prefix, module in model.named_modules() if isinstance(module, Residual)}
    for name, module, local in owned_parameters(model):
        if f"model.{name}" in source.specs:
            continue
        prefix = name.rpartition(".")[0]
        if prefix in residuals:
            norm = "final_norm" if prefix == "final_residual" else prefix.replace("_residual", "_norm")
            yield name, _start(_Place(prefix, residuals[prefix], f"model.{norm}"), name, local, source, seed)
        elif ".value_residual." in name:
            yield name, _last_one(tuple(module._parameters[local].shape))  # type: ignore[union-attr]
        else:
            raise AssertionError(f"{name} is new and has no start")


def _last_one(shape: tuple[int, ...]) -> Callable[[], Tensor]:
    """Weights of (earlier values ..., own values): 0, ..., 0, 1."""
    return lambda: torch.eye(shape[0])[-1]


def _start(place: _Place, name: str, local: str, source: Folder, seed: int) -> Callable[[], Tensor]:
    config, module = place.module.site.config, place.module
    method, n = config.residual.residual_connection, config.residual.residual_streams
    parameter = module._parameters[local]
    assert parameter is not None
    shape = tuple(parameter.shape)
    if method in ("rezero", "layerscale"):
        return lambda: torch.ones(shape)
    if method in ("mhc-lite", "kromhc") and local == "bias":
        return lambda: _manifold_bias(module, n, seed)
    if method == "gated" and local in ("gate_up", "write_weight"):
        return _zeros(shape)
    if method == "gated" and local == "norm_weight":
        # Gates of 1/2; unequal shares, which sum to n, so that streams can part.
        shares = torch.full((n, 1), 0.3 * n / max(n - 1, 1) if n > 1 else 1.0)
        shares[module.site.index % n] = 0.7 * n if n > 1 else 1.0
        return lambda: 2 * shares * source.read(f"{place.norm}.weight").float()
    if method == "muddformer" and "_norm_" in local:
        kind = local.rpartition("_")[2]
        return lambda: source.read(f"{place.norm}.{kind}").float()
    return lambda: module.initial(local, draw_for(name, seed))


def _manifold_bias(module: Residual, n: int, seed: int) -> Tensor:
    """mHC's start for methods that publish another: reads that sum to 1, writes of 1; the matrix as published."""
    bias = module.initial("bias", draw_for("", seed))
    read = torch.full((n,), math.log(0.3 / (n - 1) / (1 - 0.3 / (n - 1))))
    read[module.site.index % n] = math.log(0.7 / 0.3)
    return torch.cat((read, torch.zeros(n), bias[2 * n :]))
