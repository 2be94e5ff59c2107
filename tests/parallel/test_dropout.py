"""Dropout masks over ranks: what a rank alone has is dropped by a mask of its own, what ranks share by one mask."""

from __future__ import annotations

from dataclasses import replace

import pool as pools
import pytest
import torch
from cells import CP2, CP4, SP, TP2
from parity import Cell, Runs, run_cell
from pool import Pool
from test_dp_features import same_bits
from torch import nn

from megatron_hc import train
from megatron_hc.cli import parse
from megatron_hc.model.attention import CoreAttention

DROPOUT = "--hidden-dropout 0.5 --attention-dropout 0.25"


def masks(cell: Cell) -> dict[str, bytes] | None:
    """On a rank: the first mask of every dropout; of attention's, the state of the generator that it is drawn from."""
    found: dict[str, bytes] = {}

    def watch(run: train.Run) -> None:
        for name, module in run.model.named_modules():
            if isinstance(module, nn.Dropout):
                module.register_forward_hook(lambda _, __, y, name=name: note(name, y == 0))
            elif isinstance(module, CoreAttention):
                module.register_forward_pre_hook(lambda _, __, name=name: note(name, torch.get_rng_state()))

    def note(name: str, value: torch.Tensor) -> None:
        found.setdefault(name, value.numpy().tobytes())

    return None if run_cell(cell, watch) is None else found


# Ranks with the same letter have the same samples (and tokens), or heads.
@pytest.mark.parametrize(
    ("layout", "of_tokens", "of_heads"),
    [
        *((f"{TP2} {SP}", "abcd", "abcd"), (TP2, "aabb", "abcd"), ("", "abcd", "abcd")),
        *((f"{CP2} {TP2}", "aabb", "abcd"), (f"{CP2} {TP2} {SP}", "abcd", "abcd"), (CP4, "abcd", "abcd")),
    ],
)
def test_ranks_share_masks_of_what_they_share(pool: Pool, layout: str, of_tokens: str, of_heads: str) -> None:
    ranks = pool.run(masks, Cell(DROPOUT, layout, world_size=4, num_steps=1))
    assert len(ranks[0]) == 1 + 2 * 3
    for name in ranks[0]:
        expected = of_heads if name.endswith("core") else of_tokens
        for rank, letter in zip(ranks, expected, strict=True):
            same = [other == letter for other in expected]
            assert [other[name] == rank[name] for other in ranks] == same, name


@pytest.mark.parametrize("layout", [f"{TP2} {SP}", TP2, CP2])
def test_copies_stay_the_same_and_recompute_repeats_masks(runs: Runs, layout: str) -> None:
    cell = Cell(f"{DROPOUT} --residual-connection mhc", layout, world_size=4, precision="fp32")
    kept = runs.outcome(cell)  # whose losses and norms agree on all ranks
    for step in kept.gradients:
        assert all((low == high).all() for low, high in step.values())
    for options in (
        "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1 --recompute-modules residual",
        "--recompute-granularity selective --recompute-modules core_attn mlp",
    ):
        same_bits(runs.outcome(replace(cell, options=options)), kept)


def generator_states(cell: Cell) -> tuple[bytes, bytes] | None:
    """On a rank: the generator's state after set-up and after training."""
    parsed = parse(cell.flags)
    if pools.mesh(parsed.config, cell.world_size) is None:
        return None
    states: list[bytes] = []

    def note(run: train.Run) -> None:
        states.append(torch.get_rng_state().numpy().tobytes())

    run_cell(cell, note)
    return states[0], torch.get_rng_state().numpy().tobytes()


def test_generators_go_on_alike(pool: Pool) -> None:
    """So that one state, which a checkpoint holds, is that of all ranks of a stage."""
    ranks = pool.run(generator_states, Cell(DROPOUT, f"{TP2} {SP}", world_size=4, num_steps=2))
    assert len(set(ranks)) == 1 and ranks[0][0] != ranks[0][1]
