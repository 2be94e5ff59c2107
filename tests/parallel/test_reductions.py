"""Every reduction is needed: without it the numbers are wrong, and a parity cell sees it."""

from __future__ import annotations

import functools

import pytest
from cases import cases
from cells import SHAPES, SP, TP2
from helpers import small_config
from parity import TOLERANCES as TOLERANCE
from parity import Cell, RankOutcome, Runs, assembled, differences, run_cell

from megatron_hc import run
from megatron_hc.config import MoEConfig, TrainConfig
from megatron_hc.mesh import Mesh
from megatron_hc.parallel import plan

GPT = f"{SHAPES['gpt']} --residual-connection hyper --norm-placement peri --qk-layernorm --value-residual learnable"
SCALED = "--norm-placement normformer --normformer-residual-scale"
EXPERTS = "--num-experts 4 --moe-shared-expert-intermediate-size 24 --moe-shared-expert-gate"

MODEL_WITH = {
    "position_embedding.weight": GPT,
    "layers.*.linear_*.bias": GPT,
    "layers.*.attention.[qkv]_layernorm.*": GPT,
    "layers.*.attention.value_residual.*": GPT,
    "layers.*_norm.*": GPT,
    "embedding_norm.*": GPT,
    "final_norm.*": GPT,
    "*_residual.*": GPT,
    "layers.*.mlp_stream_scale.*": SCALED,
    "layers.*.mlp.shared_experts.gate.weight": EXPERTS,
    "layers.*.mlp.router.weight": EXPERTS,
}
"""Row of the table whose gradients are summed over tensor-parallel ranks -> a model with such parameters."""


def run_with(cell: Cell, table: tuple[plan.Entry, ...]) -> RankOutcome | None:
    """``run_cell`` with another table."""
    placements = run.placements
    run.placements = functools.partial(plan.placements, table=table)
    try:
        return run_cell(cell)
    finally:
        run.placements = placements


def test_no_entry_is_dead() -> None:
    """Every row of the table is the first that matches some parameter; and every parameter of every case has a row."""
    configs = [case.config() for case in cases()]
    moe = MoEConfig(num_experts=4, moe_shared_expert_intermediate_size=8, moe_shared_expert_gate=True)
    gelu = {"swiglu": False, "disable_bias_linear": False}
    learned = {"position_embedding_type": "learned_absolute", "untie_embeddings_and_output_weights": True}
    configs.append(small_config(moe=moe, **gelu, **learned))
    configs.append(small_config(qk_layernorm=True, qk_layernorm_across_heads=True))
    used = set()
    for config in configs:
        model = plan.build_model(TrainConfig(model=config), 23, Mesh())
        used |= {plan._entry(name, plan.PLAN) for name, _ in model.named_parameters()}
    assert not set(plan.PLAN) - used


def test_every_sum_has_a_model() -> None:
    assert MODEL_WITH.keys() == {entry.pattern for entry in plan.PLAN if entry.sum_over_tp != "never"}


@pytest.mark.parametrize("pattern", MODEL_WITH)
def test_without_an_entry_gradients_are_wrong(runs: Runs, pattern: str) -> None:
    """Those of the entry's parameters, and of no others."""
    (entry,) = (entry for entry in plan.PLAN if entry.pattern == pattern)
    layout = TP2 if entry.sum_over_tp == "always" else f"{TP2} {SP}"
    cell = Cell(MODEL_WITH[pattern], layout, world_size=2, num_steps=1)
    runs.check(cell)
    table = tuple(other._replace(sum_over_tp="never") if other is entry else other for other in plan.PLAN)
    ranks = runs.pool.run(run_with, cell, table)
    got, whole = assembled([rank for rank in ranks if rank is not None]), runs.whole(cell)
    found = differences(got, whole, TOLERANCE["fp64"])
    wrong = {line.split()[4] for line in found if "gradient of" in line}
    concerned = {name for name in whole.gradients[0] if plan._entry(name, plan.PLAN) is entry}
    assert wrong and wrong <= concerned, found
    assert any("gradient norm" in line for line in found), found


def forget(group: str, built: run.Run) -> None:
    """Leave out the sums over one group."""
    for slot in built.optimizer.slots:
        if slot.placement.sum_over == group:
            slot.placement = slot.placement._replace(sum_over=None)


SHARED = {
    "kv": (
        f"{SHAPES['gpt']} --group-query-attention --num-query-groups 1",
        TP2,
        ("linear_qkv.weight", "linear_qkv.bias"),
    ),
    "embedding": (GPT, "--pipeline-model-parallel-size 2", ("embedding.weight",)),
    "etp": (EXPERTS, f"{TP2} {SP}", ("experts.linear_fc2.bias",)),
}
"""Group whose ranks hold the same part of a parameter -> a model, a layout and the parameters."""


@pytest.mark.parametrize("group", SHARED)
def test_what_several_ranks_hold_is_summed(runs: Runs, group: str) -> None:
    """Shared key/value heads, a tied table on two pipeline stages, biases of experts that ranks share."""
    model, layout, names = SHARED[group]
    cell = Cell(model, layout, world_size=2, num_steps=1)
    runs.check(cell)
    found = runs.differences(cell, functools.partial(forget, group))
    assert all(any(name in line for line in found) for name in names), found
