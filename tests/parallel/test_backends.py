"""Back ends under layouts: stand-ins for transformer-engine and apex against our own code in one process.

Their maths is ours, so a layout must give one process's numbers: whose parameters the modules compute with, the groups
that they get, and what is summed where. torchao runs as it is, emulated.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import stand_ins
import torch
from parity import TOLERANCES, Cell, RankOutcome, Runs, assembled, differences, run_cell

from megatron_hc import train

TE = "--device auto --transformer-impl transformer_engine"
NORMS = {impl: f"--device auto --norm-impl {impl}" for impl in ("apex", "transformer_engine")}
TP2, TP4, DP2, SP = (
    "--tensor-model-parallel-size 2",
    "--tensor-model-parallel-size 4",
    "",
    "--tensor-model-parallel-size 2 --sequence-parallel",
)
LLAMA = "--normalization RMSNorm --swiglu --position-embedding-type rope --disable-bias-linear"
GROUPED = "--group-query-attention --num-query-groups 2"
EXPERTS = "--num-experts 4 --moe-router-topk 2 --moe-ffn-hidden-size 16 --moe-shared-expert-intermediate-size 16"
HYPER, MHC = "--residual-connection hyper", "--residual-connection mhc"

Change = Callable[[train.Run], None] | None


def run_with_stand_ins(cell: Cell, change: Change = None) -> RankOutcome | None:
    with stand_ins.installed(in_float64=cell.precision == "fp64"):
        return run_cell(cell, change)


def compared(runs: Runs, cell: Cell, change: Change = None) -> list[str]:
    """What differs from our own code in one process."""
    ranks = runs.pool.run(run_with_stand_ins, cell, change)
    got = assembled([rank for rank in ranks if rank is not None])
    return differences(got, runs.whole(cell), TOLERANCES[cell.precision])


@pytest.mark.parametrize(
    "model, layout, ranks",
    [
        (HYPER, "", 1),
        (f"{LLAMA} {GROUPED} {MHC} --value-residual learnable", TP2, 2),
        (f"{LLAMA} {GROUPED} {HYPER}", f"{TP4} --sequence-parallel", 4),
        (f"{HYPER} --norm-placement peri", SP, 2),
        (f"{HYPER} --norm-placement peri", SP, 4),
        (f"{LLAMA} {EXPERTS} {HYPER}", f"{SP} --expert-model-parallel-size 2 --expert-tensor-parallel-size 1", 2),
        (f"{LLAMA} {EXPERTS}", "--expert-model-parallel-size 2 --pipeline-model-parallel-size 2", 4),
    ],
)
def test_transformer_engine_under_layouts(runs: Runs, model: str, layout: str, ranks: int) -> None:
    cell = Cell(model=model, layout=layout, options=TE, world_size=ranks)
    assert not compared(runs, cell)


def forget_a_group(run: train.Run) -> None:
    """As if a row-parallel matrix had been given no group."""
    for layer in run.model.stage_layers():
        layer.attention.linear_proj.kept.module.parallel_mode = None  # type: ignore[union-attr]


def test_the_comparison_sees_a_missing_group(runs: Runs) -> None:
    cell = Cell(model=HYPER, layout=TP2, options=TE, world_size=2)
    assert compared(runs, cell, forget_a_group)


@pytest.mark.parametrize("impl", NORMS)
@pytest.mark.parametrize("model", [HYPER, f"{LLAMA} {MHC} --qk-layernorm --norm-placement peri"])
def test_norms_under_sequence_parallelism(runs: Runs, impl: str, model: str) -> None:
    cell = Cell(model=model, layout=SP, options=NORMS[impl], world_size=2)
    assert not compared(runs, cell)


@pytest.mark.parametrize("options", ["--optimizer-impl apex", "--optimizer-impl transformer_engine"])
def test_fused_adam_under_data_parallelism(runs: Runs, options: str) -> None:
    cell = Cell(model=HYPER, options=f"--device auto {options}", world_size=2)
    assert not compared(runs, cell)


@pytest.mark.parametrize("options", ["--device auto", TE])
@pytest.mark.parametrize("layout, ranks", [("", 1), (f"{SP} --overlap-grad-reduce --ddp-bucket-size 300", 4)])
def test_gradients_added_by_the_matrix_multiplication(runs: Runs, options: str, layout: str, ranks: int) -> None:
    """The first step's gradients are those that are rounded to bf16 first, to that rounding."""
    cell = Cell(f"{LLAMA} {HYPER}", layout, options, world_size=ranks, precision="bf16", num_steps=1)
    plain, fused = (
        assembled([rank for rank in runs.pool.run(run_with_stand_ins, chosen) if rank is not None])
        for chosen in (cell, replace(cell, options=f"{options} --gradient-accumulation-fusion"))
    )
    assert fused.losses == plain.losses
    changed = set()
    for name, (low, _) in fused.gradients[0].items():
        expected = plain.gradients[0][name].low
        error = np.linalg.norm(low - expected) / np.linalg.norm(expected)
        assert error < 2**-8, f"{name}: {error}"
        changed |= {name} if error > 0 else set()
    linear = {name for name in fused.gradients[0] if "linear_" in name and name.endswith("weight")}
    assert changed == linear


FP8_MODEL = f"{LLAMA} {HYPER} --hidden-size 64 --ffn-hidden-size 64 --seq-length 32 --init-method-std 0.05"
FP8 = {
    "torchao": "--fp8-format hybrid --fp8-backend torchao --fp8-recipe tensorwise",
    "mxfp8": "--fp8-format e4m3 --fp8-backend torchao --fp8-recipe mxfp8",
    "delayed": f"{TE} --fp8-format hybrid --fp8-amax-history-len 4 --fp8-amax-compute-algo max",
    "tensorwise": f"{TE} --fp8-format e4m3 --fp8-recipe tensorwise",
}


@pytest.mark.parametrize("kind", FP8)
@pytest.mark.parametrize("layout, ranks", [(TP2, 2), (SP, 4)])
def test_fp8_under_tensor_parallelism(runs: Runs, kind: str, layout: str, ranks: int) -> None:
    """Within bf16's bound of the bf16 model in one process; every rank has the same loss and gradient norm."""
    if ranks == 4 and kind in ("mxfp8", "tensorwise"):
        pytest.skip("the same code as with two ranks")
    if kind in ("torchao", "mxfp8"):
        pytest.importorskip("torchao")
    cell = Cell(model=FP8_MODEL, layout=layout, options=FP8[kind], world_size=ranks, precision="bf16")
    assert not compared(runs, cell)


def test_torch_is_as_it_was(runs: Runs) -> None:
    """The pool's processes go on without stand-ins."""
    assert runs.pool.run(_has_no_stand_ins) == [True] * runs.pool.size


def _has_no_stand_ins() -> bool:
    import sys

    return "transformer_engine" not in sys.modules and not torch.cuda.is_available()
