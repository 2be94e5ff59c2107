"""What the parity tests go through: layouts, residual methods, and the other things that a layout must not change."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from typing import Any

from cases import FORMS
from pairwise import Row, pairwise
from parity import Cell

from megatron_hc.config import (
    HEAD_NORM_PLACEMENTS,
    NO_READ_NORM_PLACEMENTS,
    OWN_NORM_CONNECTIONS,
    REPLACEABLE_CONNECTIONS,
    REPLACING_PLACEMENTS,
    flag,
)
from megatron_hc.model.placement import NORM_PLACEMENTS
from megatron_hc.residual import RESIDUALS, VALUE_RESIDUALS

TP2, TP4, SP = "--tensor-model-parallel-size 2", "--tensor-model-parallel-size 4", "--sequence-parallel"
CP2, CP4 = "--context-parallel-size 2", "--context-parallel-size 4"
AXES: dict[str, tuple[int, str]] = {
    "tp2": (2, TP2),
    "tp4": (4, TP4),
    "tp2-sp": (2, f"{TP2} {SP}"),
    "tp4-sp": (4, f"{TP4} {SP}"),
    "dp2": (2, ""),
    "dp4": (4, ""),
    "tp2-dp2": (4, TP2),
    "tp2-sp-dp2": (4, f"{TP2} {SP}"),
    "cp2": (2, CP2),
    "cp2-dp2": (4, CP2),
    "cp2-tp2-sp": (4, f"{CP2} {TP2} {SP}"),
}
"""name -> (ranks, flags)"""

SHARDING = "--data-parallel-sharding-strategy"
STRATEGIES = {
    "one": "",
    "optim": f"{SHARDING} optim",
    "no_shard": f"{SHARDING} no_shard",
    "optim_grads_params": f"{SHARDING} optim_grads_params",
    "hybrid": f"{SHARDING} optim --num-distributed-optimizer-instances 2",
}
"""'one' where no two ranks have the same weights."""
OVERLAP = ("no", "yes")

VALUES = {name: f"--value-residual {name}" for name in VALUE_RESIDUALS} | {"single": "--single-layer-value"}
NORMS = {name: f"--norm-placement {name}" for name in NORM_PLACEMENTS} | {"qk": "--qk-layernorm"}
NORMS["deepnorm"] += " --init-scheme deepnorm"
ALIKE = {"deepnorm": "post", "hybrid-star": "hybrid", "half": "constant", "sparse": "constant"}
"""What differs from another value by constants, or in one layer, takes turns with it in the covering array."""
RECOMPUTE_TURNS = ("uniform", "uniform-residual")
"""The first stands for both in covering arrays, where they take turns."""
TURNS = {
    "rezero": "plain",
    "layerscale": "plain",
    "orthogonal": "plain",
    "deep-delta": "kromhc",
    "laurel": "gated",
    "sparse-aggregation": "denseformer",
}
"""Methods that add nothing to what a layout has to do, and take turns with another one in the covering array."""
RECOMPUTE = {
    "none": "",
    "uniform": "--recompute-granularity full --recompute-method uniform --recompute-num-layers 2",
    "uniform-residual": "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1 "
    "--recompute-modules residual --residual-recompute-interval 4",
    "block": "--recompute-granularity full --recompute-method block --recompute-num-layers 1",
    "selective": "--recompute-granularity selective --recompute-modules core_attn mlp layernorm residual",
    "blocks-of-reads": "--recompute-granularity selective --recompute-modules residual --residual-recompute-interval 3",
}
HEADS = {
    "mha": "",
    "kv2": "--group-query-attention --num-query-groups 2",
    "kv1": "--group-query-attention --num-query-groups 1",
}
TABLES = {
    # 23 tokens: one row of padding for 2 ranks, one for 4; 24: none.
    "tied": "",
    "untied": "--untie-embeddings-and-output-weights",
    "tied-24": "--vocab-size 23",
    "untied-24": "--untie-embeddings-and-output-weights --vocab-size 23",
}
SHAPES = {
    # The longest position, 12, is beyond the sequence: rows of the table that nothing uses.
    "gpt": "--max-position-embeddings 12",
    "gpt-rms": "--max-position-embeddings 12 --normalization RMSNorm --squared-relu",
    "llama": "--position-embedding-type rope --normalization RMSNorm --swiglu --disable-bias-linear",
    "qwen": "--position-embedding-type rope --normalization RMSNorm --swiglu --disable-bias-linear --add-qkv-bias",
}
LOSSES = {"mean-of-means": "", "per-token": "--calculate-per-token-loss"}

FACTORS: dict[str, Sequence[str]] = {
    "axes": list(AXES),
    "strategy": list(STRATEGIES),
    "overlap": OVERLAP,
    "method": [name for name in RESIDUALS if name not in TURNS],
    "norm": [name for name in NORMS if name not in ALIKE],
    "value": [name for name in VALUES if name not in ALIKE],
    "recompute": [name for name in RECOMPUTE if name not in RECOMPUTE_TURNS[1:]],
    "heads": list(HEADS),
    "table": list(TABLES),
    "shape": list(SHAPES),
    "loss": list(LOSSES),
}


def has_copies(axes: str) -> bool:
    """Ranks with the same weights, which share them out and sum their gradients."""
    return "dp" in axes or "cp" in axes


def allows(row: Row) -> bool:
    """What the configuration refuses, as far as these factors meet it."""
    axes, strategy = row.get("axes"), row.get("strategy")
    if axes and strategy and has_copies(axes) == (strategy == "one"):
        return False
    if strategy == "hybrid" and axes and axes not in ("dp4", "cp2-dp2"):
        return False
    if row.get("overlap") == "yes" and (strategy == "one" or (axes and not has_copies(axes))):
        return False
    method, norm = row.get("method"), row.get("norm")
    if method and norm:
        if norm in REPLACING_PLACEMENTS and method not in REPLACEABLE_CONNECTIONS:
            return False
        if norm in NO_READ_NORM_PLACEMENTS and method in OWN_NORM_CONNECTIONS:
            return False
    return not (method == "muddformer" and row.get("value") == "single")


def written(fields: Mapping[str, Any]) -> str:
    """Fields of a configuration as flags."""
    words = []
    for name, value in fields.items():
        if isinstance(value, bool):
            words.append(flag(name) if value else f"--no-{flag(name)[2:]}")
        else:
            words.append(f"{flag(name)} {value}")
    return " ".join(words)


def forms(method: str) -> list[str]:
    """The method in each of its forms, as flags; the first is the main one."""
    found = FORMS.get(method, [("", "exact", {}, {})])
    return [f"--residual-connection {method} {written(residual)} {written(model)}" for _, _, residual, model in found]


def cell_of(row: Row, form: int = 0, **options: Any) -> Cell:
    world_size, axes = AXES[row["axes"]]
    layout = [axes, STRATEGIES[row["strategy"]]]
    if row["overlap"] == "yes":
        layout.append("--overlap-grad-reduce --ddp-bucket-size 300")
        layout.append("" if row["strategy"] == "no_shard" else "--overlap-param-gather")
    method = forms(row["method"])[form]
    if row["norm"] in HEAD_NORM_PLACEMENTS:
        method = method.replace("--qk-layernorm", "")
    model = (SHAPES[row["shape"]], HEADS[row["heads"]], TABLES[row["table"]], NORMS[row["norm"]], VALUES[row["value"]])
    return Cell(
        model=" ".join(filter(None, (*model, LOSSES[row["loss"]], method))),
        layout=" ".join(filter(None, layout)),
        options=RECOMPUTE[row["recompute"]],
        world_size=world_size,
        **options,
    )


@cache
def covering_rows() -> tuple[tuple[Row, int], ...]:
    """The covering array, each row with the number of a form of its method; forms and what is alike take turns."""
    turns: dict[str, Iterator[Any]] = {}
    for name in FACTORS["method"]:
        same = [name, *(other for other, alike in TURNS.items() if alike == name)]
        turns[name] = itertools.cycle([(method, form) for method in same for form in range(len(forms(method)))])
    for name in set(ALIKE.values()):
        turns[name] = itertools.cycle([name, *(other for other, same in ALIKE.items() if same == name)])
    turns["uniform"] = itertools.cycle(RECOMPUTE_TURNS)
    found = []
    for row in pairwise(FACTORS, allows, apart=[("norm", "value")], seed=1, tries=20):
        names = "norm", "value", "recompute"
        taken = {name: next(turns[row[name]]) if row[name] in turns else row[name] for name in names}
        method, form = next(turns[row["method"]])
        found.append((row | taken | {"method": method}, form))
    return tuple(found)


def name_of(row: Row, form: int = 0) -> str:
    return "-".join((*(row[name] for name in FACTORS), str(form)))


def product(**chosen: Iterable[str]) -> list[Row]:
    """All allowed combinations of some factors' values, the other factors at their first value."""
    rows = []
    for values in itertools.product(*chosen.values()):
        row = {name: values_of[0] for name, values_of in FACTORS.items()} | dict(zip(chosen, values, strict=True))
        if "strategy" not in chosen:
            row["strategy"] = "optim" if has_copies(row["axes"]) else "one"
        if allows(row):
            rows.append(row)
    return rows
