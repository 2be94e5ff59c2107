"""Checkpoints do not know of stages: saved at one pipeline, loaded at another or in one process, bit for bit."""

from __future__ import annotations

from pathlib import Path

import pool as pools
import pytest
import torch
from parity import (
    TOLERANCES,
    Cell,
    Outcome,
    RankOutcome,
    assembled,
    differences,
    move_off_initial_values,
    run_steps,
)
from pool import Pool
from torch import Tensor

from megatron_hc import checkpoint, train
from megatron_hc.cli import parse

PP2 = "--pipeline-model-parallel-size 2"
LAYOUTS = {
    "one process": (1, ""),
    "tp2-sp-pp2": (4, f"{PP2} --tensor-model-parallel-size 2 --sequence-parallel"),
    "pp4": (4, "--pipeline-model-parallel-size 4"),
    "pp2-virtual": (2, f"{PP2} --num-virtual-stages-per-pipeline-rank 2"),
    "pp2-dp2-zbv": (4, f"{PP2} --pipeline-schedule zbv"),
    "pp2-dp2-fsdp": (4, f"{PP2} --data-parallel-sharding-strategy optim_grads_params"),
}
MODEL = "--num-layers 5 --residual-connection mhc --value-residual learnable --hidden-dropout 0.1"
TIED = {"tied": "", "untied": "--untie-embeddings-and-output-weights"}


def steps_between(cell: Cell, load: str, save: str, num_steps: int) -> RankOutcome | None:
    """On a rank: load unless "", train on the samples that come next, save unless ""."""
    parsed = parse([*cell.flags, *(["--load", load] if load else []), *(["--save", save] if save else [])])
    mesh = pools.mesh(parsed.config, cell.world_size)
    if mesh is None:
        return None
    run = train.set_up(parsed, mesh)
    if not load:
        move_off_initial_values(run)
    outcome = run_steps(run, num_steps)
    train.save(run)
    return outcome


def at(pool: Pool, layout: str, model: str, load: Path | None, save: Path | None, num_steps: int) -> Outcome:
    world_size, flags = LAYOUTS[layout]
    cell = Cell(model=model, layout=flags, world_size=world_size, num_steps=9)
    ranks = pool.run(steps_between, cell, str(load or ""), str(save or ""), num_steps)
    return assembled([rank for rank in ranks if rank is not None])


def tensors_in(folder: Path) -> dict[str, Tensor]:
    """Everything in the last checkpoint, whole."""
    found = checkpoint.find(folder, None)
    whole = {
        name: torch.full(shape, torch.nan, dtype=dtype)
        for name, (shape, dtype) in checkpoint.load_tensor_shapes(found).items()
    }
    checkpoint.load(found, whole)
    return whole


@pytest.mark.parametrize("table", list(TIED))
@pytest.mark.parametrize(
    ("saved_at", "loaded_at"),
    [
        ("tp2-sp-pp2", "one process"),
        ("pp4", "one process"),
        ("pp2-virtual", "one process"),
        ("pp2-dp2-zbv", "one process"),
        ("pp4", "pp2-virtual"),
        ("pp2-virtual", "tp2-sp-pp2"),
        ("pp2-dp2-fsdp", "pp4"),
    ],
)
def test_there_and_back(pool: Pool, tmp_path: Path, saved_at: str, loaded_at: str, table: str) -> None:
    """What is saved, loaded elsewhere, saved again, loaded where it came from and saved again, is the same bits."""
    model = f"{MODEL} {TIED[table]}"
    first, second, third = (tmp_path / name for name in ("first", "second", "third"))
    at(pool, saved_at, model, None, first, 2)
    at(pool, loaded_at, model, first, second, 0)
    at(pool, saved_at, model, second, third, 0)
    saved = tensors_in(first)
    assert any(name.startswith("optimizer.") for name in saved)
    for again in (tensors_in(second), tensors_in(third)):
        assert saved.keys() == again.keys()
        assert [name for name in saved if not saved[name].equal(again[name])] == []


def test_training_goes_on(pool: Pool, tmp_path: Path) -> None:
    """As in a run that never stopped: to the bit at the same layout, within parity at another."""
    model = MODEL.replace("--hidden-dropout 0.1", "")
    others = {"pp4": "pp2-dp2-zbv", "tp2-sp-pp2": "pp2-dp2-fsdp", "pp2-virtual": "tp2-sp-pp2"}
    for saved_at, other in others.items():
        whole = at(pool, saved_at, model, None, None, 4)
        half = tmp_path / saved_at
        assert at(pool, saved_at, model, None, half, 2).losses == whole.losses[:2]
        assert at(pool, saved_at, model, half, None, 2).losses == whole.losses[2:]
        for layout in ("one process", other):
            more = at(pool, layout, model, half, None, 2)
            found = differences(more, whole.after(2), TOLERANCES["fp64"])
            assert not found, f"{saved_at} to {layout}: {found[:20]}"


def test_dropout_goes_on(pool: Pool, tmp_path: Path) -> None:
    """Every stage has random numbers of its own, and goes on with them; with other stages they begin anew."""
    whole = at(pool, "pp4", MODEL, None, tmp_path / "whole", 4).losses
    at(pool, "pp4", MODEL, None, tmp_path / "half", 2)
    assert at(pool, "pp4", MODEL, tmp_path / "half", None, 2).losses == whole[2:]
    assert at(pool, "pp2-virtual", MODEL, tmp_path / "half", None, 2).losses != whole[2:]


def masks(cell: Cell) -> float | None:
    """The first random number of this rank's generator."""
    parsed = parse(cell.flags)
    mesh = pools.mesh(parsed.config, cell.world_size)
    if mesh is None:
        return None
    train.set_up(parsed, mesh)
    return float(torch.rand(()))


def test_stages_do_not_share_dropout_masks(pool: Pool) -> None:
    found = pool.run(masks, Cell(model=MODEL, layout=LAYOUTS["pp4"][1], world_size=4))
    assert len(set(found)) == 4
