"""A run saved at any layout goes on at any other; and no kill costs more than the steps since the last save."""

from __future__ import annotations

import itertools
import random
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from parity import (
    MODEL,
    PRECISION,
    RUN,
    TOLERANCES,
    Outcome,
    RankOutcome,
    assembled,
    differences,
    move_off_initial_values,
    run_steps,
)
from pool import Pool, mesh
from processes import ROOT, TINY, Processes

from megatron_hc import checkpoint, train
from megatron_hc.checkpoint_folder import problem
from megatron_hc.cli import parse

sys.path.insert(0, str(ROOT / "tools"))
import inspect_checkpoint  # noqa: E402  (a script, not part of the package)

LAYOUTS = {
    "1": (1, ""),
    "tp2": (2, "--tensor-model-parallel-size 2"),
    "dp2": (2, ""),
    "tp4": (4, "--tensor-model-parallel-size 4"),  # more ranks than key/value heads
    "dp2-fsdp": (2, "--data-parallel-sharding-strategy optim_grads_params"),
    "tp2-sp": (2, "--tensor-model-parallel-size 2 --sequence-parallel"),
    "dp2-no_shard": (2, "--data-parallel-sharding-strategy no_shard"),
    "tp2-dp2": (4, "--tensor-model-parallel-size 2 --overlap-param-gather --async-save"),
    "cp2-dp2": (4, "--context-parallel-size 2"),
    "dp4-hybrid": (4, "--num-distributed-optimizer-instances 2 --async-save"),
}
HYPER = "--residual-connection hyper --group-query-attention --num-query-groups 2 --swiglu --hidden-dropout 0"
BEFORE, AFTER = 2, 2  # steps before the save, and after it


def flags_of(layout: str, model: str) -> list[str]:
    parts = (MODEL, RUN, PRECISION["fp64"], model, LAYOUTS[layout][1], f"--train-iters {BEFORE + AFTER}")
    return " ".join(parts).split()


def train_and_save(flags: list[str], world_size: int, steps: int) -> RankOutcome | None:
    """In a rank: some steps, from the start or from --load; then a save."""
    parsed = parse(flags)
    own = mesh(parsed.config, world_size)
    if own is None:
        return None
    run = train.set_up(parsed, own)
    if parsed.config.checkpoint.load is None:
        move_off_initial_values(run)
    outcome = run_steps(run, steps)
    train.save(run)
    run.saver.wait()
    return outcome


def outcome_of(pool: Pool, layout: str, model: str, steps: int, *checkpoints: str) -> Outcome:
    found = pool.run(train_and_save, [*flags_of(layout, model), *checkpoints], LAYOUTS[layout][0], steps)
    return assembled([rank for rank in found if rank is not None])


def assert_parity(got: Outcome, expected: Outcome) -> None:
    found = differences(got, expected, TOLERANCES["fp64"])
    assert not found, "\n".join(found[:20])


class Saved:
    """Checkpoints after ``BEFORE`` steps, each made once, and an uninterrupted run in one process."""

    def __init__(self, pool: Pool, root: Path, model: str) -> None:
        self.pool, self.root, self.model = pool, root, model
        self.whole = outcome_of(pool, "1", model, BEFORE + AFTER, "--save", str(root / "whole"))
        self.made: set[str] = set()

    def at(self, layout: str) -> Path:
        folder = self.root / layout
        if layout not in self.made:
            outcome = outcome_of(self.pool, layout, self.model, BEFORE, "--save", str(folder))
            np.testing.assert_allclose(outcome.losses, self.whole.losses[:BEFORE], rtol=1e-10)
            self.made.add(layout)
        return folder


@pytest.fixture(scope="module")
def saved(pool: Pool, tmp_path_factory: pytest.TempPathFactory) -> Saved:
    return Saved(pool, tmp_path_factory.mktemp("layouts"), HYPER)


ALL = list(itertools.permutations(LAYOUTS, 2))
DEFAULT = [pair for pair in ALL if (list(LAYOUTS).index(pair[1]) - list(LAYOUTS).index(pair[0])) % len(LAYOUTS) == 4]


@pytest.mark.parametrize(
    "source, target",
    [pair if pair in DEFAULT else pytest.param(*pair, marks=pytest.mark.slow) for pair in ALL],
)
def test_saved_at_one_layout_resumed_at_another(saved: Saved, tmp_path: Path, source: str, target: str) -> None:
    """What was loaded is the same bit for bit (it is saved again at once), and every step from there on has parity."""
    folder = saved.at(source)
    again = tmp_path / "again"
    outcome_of(saved.pool, target, saved.model, 0, "--load", str(folder), "--save", str(again))
    same_but_layout(folder, again)
    more = outcome_of(saved.pool, target, saved.model, AFTER, "--load", str(folder), "--save", str(tmp_path / "more"))
    assert_parity(more, saved.whole.after(BEFORE))
    # The comparison sees a single number.
    changed = inspect_checkpoint.differences(checkpoint.find(folder), checkpoint.find(tmp_path / "more"), "*")
    assert any("model." in line for line in changed)


def same_but_layout(one: Path, other: Path) -> None:
    found = list(inspect_checkpoint.differences(checkpoint.find(one), checkpoint.find(other), "*"))
    assert not [line for line in found if not line.startswith("argument ")]


def test_resumed_at_the_same_layout_the_losses_are_the_same_bits(pool: Pool, tmp_path: Path) -> None:
    for layout in ("tp2-dp2", "dp2-fsdp"):
        model = "--residual-connection mhc --untie-embeddings-and-output-weights"
        folder = tmp_path / layout
        whole = outcome_of(pool, layout, model, BEFORE + AFTER, "--save", str(folder / "whole"))
        first = outcome_of(pool, layout, model, BEFORE, "--save", str(folder / "half"))
        second = outcome_of(pool, layout, model, AFTER, "--load", str(folder / "half"), "--save", str(folder / "more"))
        assert first.losses + second.losses == whole.losses
        assert first.grad_norms + second.grad_norms == whole.grad_norms
        same_but_layout(folder / "whole", folder / "more")


# ---- kills ----


def read_everything(folder: Path) -> None:
    """Every tensor of a checkpoint that claims to be whole."""
    shapes = checkpoint.load_tensor_shapes(folder)
    tensors = {name: torch.full(shape, float("nan"), dtype=dtype) for name, (shape, dtype) in shapes.items()}
    checkpoint.load(folder, tensors, prefixes=())
    assert all(tensor.isfinite().all() for tensor in tensors.values())
    assert checkpoint.read_state(folder)["iteration"] == int(folder.name[5:12])


def kill_again_and_again(root: Path, kills: int) -> None:
    """Runs of two processes that save after every step; one of them, or both, are killed; the next run goes on."""
    chance, reached = random.Random(kills), 0
    save = root / "save"
    for attempt in range(kills):
        kind = "--async-save" if attempt % 2 else "--data-parallel-sharding-strategy no_shard"
        argv = f"{TINY} --train-iters 100000 --save-interval 1 --save {save} {kind}"
        argv += f" --load {save} --exit-on-missing-checkpoint" if attempt else ""
        with Processes(2, argv, root / f"logs-{attempt}") as run:
            if attempt:
                run.wait_for(f"loaded {save}/iter_{reached:07d}\n")
            run.wait_for("saved ")
            run.processes[0].join(chance.uniform(0, 0.6))
            run.kill(*((0,), (1,), (0, 1))[attempt % 3])
            run.wait()
            finished = [int(number) for number in re.findall(r"saved .*iter_(\d+) in", run.output())]
        latest = checkpoint.latest_iteration(save)
        assert latest is not None and latest >= max(finished) > reached
        for folder in save.glob("iter_*"):
            if problem(folder) is None and re.fullmatch(r"iter_\d+", folder.name):
                read_everything(folder)
        reached = latest


def test_kills_around_saves(tmp_path: Path) -> None:
    kill_again_and_again(tmp_path, 3)


@pytest.mark.slow
def test_twenty_kills_around_saves(tmp_path: Path) -> None:
    kill_again_and_again(tmp_path, 20)
