"""Remove experts from a checkpoint: those whose router changed least in fine-tuning, or those that data uses least.

::

    python tools/prune_experts.py runs/finetuned --before runs/pretrained --keep 8 --output runs/pruned
    python tools/prune_experts.py runs/a --by-load --keep 8 --output runs/pruned --data-path valid_text

``--before``: expert e of a layer has the score |w_e| - |w_e before|, the change of the l2 norm of its row in the
router (2405.16646); the experts with the least score go first. ``--by-load``: the score is the share of choices that
fall on the expert in the sequences of ``--data-path``, or of the validation split of the run; losses before and after
are shown.

Every layer with experts keeps ``--keep`` of them, the same number from each of ``--moe-router-num-groups``; of equal
scores the lower expert stays. Routers, expert biases, experts and their optimizer states lose the same rows, so the
result is loaded and trained on like any checkpoint, with ``--num-experts KEEP``, at any layout. About 2 GB of
tensors are in memory at a time.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from average_checkpoints import (
    add_validation_options,
    check_output,
    folder_of,
    refuse_validation_options,
    validation_of,
)

from megatron_hc.cli import exit_on_user_error

if TYPE_CHECKING:
    from torch import Tensor

    from megatron_hc.checkpoint import Reader
    from megatron_hc.config import TrainConfig
    from megatron_hc.validation import Validation

ROUTER = re.compile(r"model\.layers\.(\d+)\.mlp\.router\.weight")
OF_EXPERTS = re.compile(r"layers\.(\d+)\.mlp\.(?:router|experts)\.")
"""Tensors whose dim 0 is experts, one block of rows each; also inside names of optimizer states."""

Scores = dict[int, list[float]]
"""Layer -> a number per expert; the least go first."""


def routers_of(reader: Reader) -> dict[int, Tensor]:
    """Layer -> the router's matrix [experts, hidden size]."""
    names = {int(match[1]): name for name in reader.shapes if (match := ROUTER.fullmatch(name))}
    return {layer: reader.read(name) for layer, name in sorted(names.items())}


def changes(reader: Reader, before: Reader) -> Scores:
    """The change of the l2 norm of every expert's row in the router."""
    ours, theirs = routers_of(reader), routers_of(before)
    shapes = [{layer: tuple(weight.shape) for layer, weight in routers.items()} for routers in (ours, theirs)]
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"--before {before.folder} must have the routers of {reader.folder}: {_described(shapes[0])} there are, "
            f"and {_described(shapes[1])} before"
        )
    return {
        layer: (weight.double().norm(dim=1) - theirs[layer].double().norm(dim=1)).tolist()
        for layer, weight in ours.items()
    }


def _described(shapes: dict[int, tuple[int, ...]]) -> str:
    if not shapes:
        return "none"
    return f"{len(shapes)} of shape {' or '.join(sorted({str(list(shape)) for shape in shapes.values()}))}"


def loads(validation: Validation) -> tuple[Scores, float]:
    """(the share of all choices that fall on each expert, loss)"""
    import torch

    from megatron_hc.model.router import Router, Routing, routers_of

    counts = {router.layer: torch.zeros(router.num_experts) for router in routers_of([validation.model])}

    def count(router: Router, inputs: Any, routing: Routing) -> None:
        counts[router.layer] += torch.bincount(routing.experts.flatten(), minlength=router.num_experts).cpu()

    hooks = [router.register_forward_hook(count) for router in routers_of([validation.model])]
    loss = validation.loss()
    for hook in hooks:
        hook.remove()
    return {layer: (found / found.sum()).tolist() for layer, found in counts.items()}, loss


def best(scores: list[float], keep: int, num_groups: int) -> list[int]:
    """The experts that stay: as many of each group of neighbours, those of largest score, in order."""
    size = len(scores) // num_groups
    kept: list[int] = []
    for first in range(0, len(scores), size):
        ranking = sorted(range(first, first + size), key=lambda expert: (-scores[expert], expert))
        kept += sorted(ranking[: keep // num_groups])
    return kept


def checked_config(folder: Path, keep: int) -> tuple[TrainConfig, TrainConfig]:
    """The run's configuration and that of the pruned model; ``ValueError`` where it cannot be."""
    from megatron_hc import checkpoint
    from megatron_hc.cli import from_flat

    arguments = checkpoint.read_arguments(folder)
    config = from_flat(arguments)
    num_experts, groups = config.model.moe.num_experts, config.model.moe.moe_router_num_groups or 1
    if num_experts is None:
        raise ValueError(f"{folder} has no experts: nothing to prune")
    if not 0 < keep < num_experts:
        raise ValueError(f"--keep must be at least 1 and below the {num_experts} experts of {folder}, not {keep}")
    if keep % groups:
        raise ValueError(f"--keep ({keep}) must be a multiple of the {groups} groups of {folder}")
    pruned = from_flat(arguments | {"num_experts": keep})
    try:
        pruned.model.validate()
    except ValueError as error:
        raise ValueError(f"--keep {keep} is too few: {error}") from error
    return config, pruned


def pruned_reader(
    reader: Reader, kept: dict[int, list[int]], num_experts: int
) -> tuple[dict[str, tuple[tuple[int, ...], Any]], Callable[[str], Tensor]]:
    """(name -> shape and dtype, name -> tensor) without the rows of the experts that go."""
    shapes = {}
    for name, (shape, dtype) in reader.shapes.items():
        match = OF_EXPERTS.search(name)
        if match:
            shape = (shape[0] // num_experts * len(kept[int(match[1])]), *shape[1:])
        shapes[name] = shape, dtype

    def read(name: str) -> Tensor:
        whole, match = reader.read(name), OF_EXPERTS.search(name)
        return whole.unflatten(0, (num_experts, -1))[kept[int(match[1])]].flatten(0, 1) if match else whole

    return shapes, read


def prune(options: argparse.Namespace) -> None:
    from megatron_hc import checkpoint

    check_output(options.output)
    folder = folder_of(options.checkpoint)
    config, pruned = checked_config(folder, options.keep)
    moe = config.model.moe
    assert moe.num_experts is not None
    loss = None
    with checkpoint.Reader(folder) as reader:
        if options.by_load:
            scores, loss = loads(validation_of(folder, options))
        else:
            with checkpoint.Reader(folder_of(options.before)) as before:
                scores = changes(reader, before)
        kept = {layer: best(found, options.keep, moe.moe_router_num_groups or 1) for layer, found in scores.items()}
        for layer, found in scores.items():
            gone = ", ".join(f"{e} ({found[e]:.4g})" for e in range(moe.num_experts) if e not in kept[layer])
            print(f"layer {layer}: keeps {', '.join(map(str, kept[layer]))}; without {gone}")
        state, arguments = checkpoint.read_state(folder), checkpoint.read_origins(folder)
        record = {"from": str(folder), "by": "load" if options.by_load else options.before, "kept": kept}
        written = checkpoint.save_one_by_one(
            options.output,
            state["iteration"],
            *pruned_reader(reader, kept, moe.num_experts),
            state | {"pruned": record},
            arguments | {"num_experts": {"value": options.keep, "origin": "prune_experts.py"}},
        )
    print(f"{pruned.model.moe.num_experts} of {moe.num_experts} experts in {written}")
    if loss is not None:
        print(f"loss {loss:.6f} before, {validation_of(written, options).loss():.6f} after")


def main(argv: list[str]) -> int:
    """Exit codes: 0, 2 for what the user can mend."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("checkpoint", help="an iter_N folder, or a folder of them: the latest")
    criterion = parser.add_mutually_exclusive_group(required=True)
    criterion.add_argument("--before", metavar="CHECKPOINT", help="the model before fine-tuning")
    criterion.add_argument("--by-load", action="store_true", help="by the load measured on data")
    parser.add_argument("--keep", type=int, required=True, help="experts that stay in every layer")
    parser.add_argument("--output", required=True, help="a new folder of checkpoints, for --load")
    add_validation_options(parser)
    options = parser.parse_args(argv)
    with exit_on_user_error("prune_experts.py"):
        if not options.by_load:
            refuse_validation_options(options, "--before")
        prune(options)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
