"""Experts saved at one layout load at any other, expert biases included; a dense checkpoint becomes experts."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from parity import MODEL, PRECISION, RUN
from pool import Pool
from safetensors import safe_open
from test_checkpoint_layouts import AFTER, BEFORE, same_but_layout, train_and_save

from megatron_hc import checkpoint

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
import average_checkpoints  # noqa: E402  (scripts, not part of the package)
import prune_experts  # noqa: E402

TP2 = "--tensor-model-parallel-size 2 --sequence-parallel"
LAYOUTS = {
    "1": (1, ""),
    "ep2": (2, "--expert-model-parallel-size 2"),
    "ep4": (4, "--expert-model-parallel-size 4 --moe-token-dispatcher-type alltoall"),
    "ep2-tp2-etp1": (2, f"--expert-model-parallel-size 2 {TP2} --expert-tensor-parallel-size 1"),
    "ep2-tp2-etp2": (4, f"--expert-model-parallel-size 2 {TP2} --expert-tensor-parallel-size 2"),
    "ep2-pp2": (4, "--expert-model-parallel-size 2 --pipeline-model-parallel-size 2"),
    "ep2-fsdp": (4, "--expert-model-parallel-size 2 --data-parallel-sharding-strategy optim_grads_params"),
    "ep2-edp2": (4, "--expert-model-parallel-size 2 --async-save"),
}
MOE = (
    "--num-experts 4 --residual-connection mhc --moe-router-score-function sigmoid --moe-router-enable-expert-bias "
    "--moe-router-bias-update-rate 0.1 --moe-aux-loss-coeff 0.1 --moe-shared-expert-intermediate-size 8"
)


def losses_of(pool: Pool, layout: str, model: str, steps: int, *checkpoints: str) -> list[float]:
    world_size, flags = LAYOUTS[layout]
    parts = (MODEL, RUN, PRECISION["fp64"], model, flags, f"--train-iters {BEFORE + AFTER}")
    found = pool.run(train_and_save, [*" ".join(parts).split(), *checkpoints], world_size, steps)
    ranks = [outcome.losses for outcome in found if outcome is not None]
    assert all(losses == ranks[0] for losses in ranks)
    return ranks[0]


@pytest.fixture(scope="module")
def saved(pool: Pool, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[float], set[str]]:
    root = tmp_path_factory.mktemp("moe")
    return root, losses_of(pool, "1", MOE, BEFORE + AFTER, "--save", str(root / "whole")), set()


ALL = list(itertools.permutations(LAYOUTS, 2))
DEFAULT = [pair for pair in ALL if (list(LAYOUTS).index(pair[1]) - list(LAYOUTS).index(pair[0])) % len(LAYOUTS) == 3]


@pytest.mark.parametrize(
    "source, target", [pair if pair in DEFAULT else pytest.param(*pair, marks=pytest.mark.slow) for pair in ALL]
)
def test_saved_at_one_layout_resumed_at_another(
    pool: Pool, saved: tuple[Path, list[float], set[str]], tmp_path: Path, source: str, target: str
) -> None:
    root, losses, made = saved
    folder = root / source
    if source not in made:
        before = losses_of(pool, source, MOE, BEFORE, "--save", str(folder))
        np.testing.assert_allclose(before, losses[:BEFORE], rtol=1e-10)
        made.add(source)
    again = tmp_path / "again"
    losses_of(pool, target, MOE, 0, "--load", str(folder), "--save", str(again))
    same_but_layout(folder, again)
    more = losses_of(pool, target, MOE, AFTER, "--load", str(folder), "--save", str(tmp_path / "more"))
    np.testing.assert_allclose(more, losses[BEFORE:], rtol=1e-10)


def test_expert_biases_are_saved(pool: Pool, tmp_path: Path) -> None:
    losses_of(pool, "ep2", MOE, BEFORE, "--save", str(tmp_path))
    folder = checkpoint.find(tmp_path)
    found = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            found |= {key: tensors.get_tensor(key) for key in tensors.keys() if "expert_bias" in key}
    assert len(found) == 2 and any(bias.abs().max() > 0 for bias in found.values())
    for bias in found.values():
        assert torch.allclose(bias / 0.1, (bias / 0.1).round())


@pytest.mark.parametrize("shape", ["--swiglu --disable-bias-linear", ""], ids=["swiglu", "gelu-biases"])
@pytest.mark.parametrize("target", ["1", "ep2-tp2-etp2", "ep2-edp2", "ep2-pp2"])
def test_upcycling_keeps_the_function(pool: Pool, tmp_path: Path, target: str, shape: str) -> None:
    dense, experts = f"{shape} --residual-connection hyper", f"{shape} --residual-connection hyper --num-experts 4"
    losses_of(pool, "1", dense, BEFORE, "--save", str(tmp_path / "dense"))
    expected = losses_of(pool, "1", dense, 1, "--load", str(tmp_path / "dense"), "--finetune", "--save", str(tmp_path))
    upcycled = ("--moe-use-upcycling", "--save", str(tmp_path / "experts"))
    found = losses_of(pool, target, experts, 1, "--load", str(tmp_path / "dense"), *upcycled)
    np.testing.assert_allclose(found, expected, rtol=1e-10)
    # A checkpoint that has experts goes on, with the same flags.
    losses_of(pool, target, experts, 1, "--load", str(tmp_path / "experts"), *upcycled)
    assert checkpoint.read_state(checkpoint.find(tmp_path / "experts"))["iteration"] == 2


def test_pruned_and_averaged_experts_load_at_any_layout(pool: Pool, tmp_path: Path) -> None:
    """Made from what several processes saved, resumed by one and by several."""
    for steps in (2, 3):
        losses_of(pool, "ep2-tp2-etp2", MOE, steps, "--save", str(tmp_path / "saved"))
    sources = [str(tmp_path / "saved" / f"iter_000000{steps}") for steps in (2, 3)]
    prune = [sources[1], "--before", sources[0], "--keep", "2", "--output", str(tmp_path / "pruned")]
    assert prune_experts.main(prune) == average_checkpoints.main([*sources, "--output", str(tmp_path / "mean")]) == 0
    fewer = MOE.replace("--num-experts 4", "--num-experts 2")
    for model, made, flags in ((fewer, "pruned", ()), (MOE, "mean", ("--finetune",))):
        load = ("--load", str(tmp_path / made), *flags, "--save", str(tmp_path / f"again-{made}"))
        found = [losses_of(pool, layout, model, 2, *load) for layout in ("1", "ep2-tp2-etp2", "ep2-pp2")]
        np.testing.assert_allclose(found[1:], [found[0]] * 2, rtol=1e-10)
