"""Mixture of experts at any layout gives the numbers of one process: routers, experts and everything else.

One process has the same micro-batches, one after the other, so that capacity, drops and balancing losses are about the
same tokens. The covering array is over everything that issue-sized bugs hide in; every row is a test.
"""

from __future__ import annotations

from typing import Any

import pool as pools
import pytest
from pairwise import Row, pairwise
from parity import TOLERANCES, VOCAB, Cell, RandomSamples, Runs, differences
from pool import Pool

from megatron_hc import train
from megatron_hc.cli import parse
from megatron_hc.data.loader import build_loader
from megatron_hc.parallel.expert import DISPATCHERS

EP, TP2 = "--expert-model-parallel-size", "--tensor-model-parallel-size 2 --sequence-parallel"
ETP = "--expert-tensor-parallel-size"
CP2 = "--context-parallel-size 2"
STRATEGY = "--data-parallel-sharding-strategy"
AXES: dict[str, tuple[int, str]] = {
    "ep2": (2, f"{EP} 2"),
    "ep4": (4, f"{EP} 4"),
    "ep2-tp2-etp1": (2, f"{EP} 2 {TP2} {ETP} 1"),
    "ep2-tp2-etp1-dp2": (4, f"{EP} 2 {TP2} {ETP} 1"),
    "ep2-tp2-etp2": (4, f"{EP} 2 {TP2} {ETP} 2"),
    "ep4-tp2-etp1": (4, f"{EP} 4 {TP2} {ETP} 1"),
    "tp2-etp1": (2, f"{TP2} {ETP} 1"),
    "tp2-etp2-dp2": (4, f"{TP2}"),
    "etp2-dp2": (2, f"{ETP} 2"),
    "ep2-edp2": (4, f"{EP} 2"),
    "ep2-edp2-no_shard": (4, f"{EP} 2 {STRATEGY} no_shard"),
    "ep2-edp2-overlap": (4, f"{EP} 2 --overlap-grad-reduce --overlap-param-gather --ddp-bucket-size 300"),
    "ep2-edp2-hybrid": (4, f"{EP} 2 --num-distributed-optimizer-instances 2"),
    "ep2-edp2-fully": (4, f"{EP} 2 {STRATEGY} optim_grads_params"),
    "ep2-pp2": (4, f"{EP} 2 --pipeline-model-parallel-size 2"),
    "cp2": (2, CP2),
    "ep2-cp2": (2, f"{EP} 2 {CP2}"),
    "ep2-cp2-dp2": (4, f"{EP} 2 {CP2}"),
    "ep4-cp2-tp2-etp1": (4, f"{EP} 4 {CP2} {TP2} {ETP} 1"),
}
CAPACITY = "--moe-expert-capacity-factor 0.8"
DROPS = {
    "dropless": "",
    "probs": CAPACITY,
    "position": f"{CAPACITY} --moe-token-drop-policy position",
    "padded": f"{CAPACITY} --moe-pad-expert-input-to-capacity",
}
BALANCING = {
    "aux+z": "--moe-aux-loss-coeff 0.3 --moe-z-loss-coeff 0.02",
    "aux+seq": "--moe-router-load-balancing-type aux_loss seq_aux_loss --moe-aux-loss-coeff 0.3 0.2",
    "bias": "--moe-router-score-function sigmoid --moe-router-enable-expert-bias --moe-router-bias-update-rate 0.2 "
    "--moe-router-load-balancing-type none",
    "groups": "--moe-router-pre-softmax --moe-router-num-groups 2 --moe-router-group-topk 1 "
    "--moe-router-topk-scaling-factor 1.5 --moe-aux-loss-coeff 0.3",
    "sinkhorn": "--moe-router-load-balancing-type sinkhorn",
    "jitter": "--moe-input-jitter-eps 0.2 --moe-router-load-balancing-type seq_aux_loss --moe-aux-loss-coeff 0.2",
}
SHARED = {
    "none": "",
    "shared": "--moe-shared-expert-intermediate-size 12",
    "gated": "--moe-shared-expert-intermediate-size 12 --moe-shared-expert-gate",
}
METHODS = ("plain", "hyper", "frac", "mhc", "gated", "attention", "value residual")
RECOMPUTE = {
    "none": "",
    "full": "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1",
    "moe": "--recompute-granularity selective --recompute-modules moe",
}
SHAPES = {
    "gpt": "",
    "llama": "--position-embedding-type rope --normalization RMSNorm --swiglu --disable-bias-linear "
    "--moe-ffn-hidden-size 8 --moe-layer-freq ([0]+[1])",
}
FACTORS: dict[str, Any] = {
    "axes": list(AXES),
    "dispatcher": list(DISPATCHERS),
    "drop": list(DROPS),
    "balancing": list(BALANCING),
    "shared": list(SHARED),
    "method": METHODS,
    "recompute": list(RECOMPUTE),
    "shape": list(SHAPES),
}
ROWS = pairwise(FACTORS, lambda row: True, seed=1)


def cell_of(row: Row) -> Cell:
    world_size, axes = AXES[row["axes"]]
    is_value = row["method"] == "value residual"
    method = "--value-residual learnable" if is_value else f"--residual-connection {row['method']}"
    parts = (
        *("--num-experts 4 --moe-router-topk 2", SHAPES[row["shape"]], DROPS[row["drop"]]),
        *(BALANCING[row["balancing"]], SHARED[row["shared"]], method),
    )
    return Cell(
        model=" ".join(filter(None, parts)),
        layout=f"{axes} --moe-token-dispatcher-type {row['dispatcher']}",
        options=RECOMPUTE[row["recompute"]],
        world_size=world_size,
    )


@pytest.mark.parametrize("row", [pytest.param(row, id="-".join(row.values())) for row in ROWS])
def test_covering_array(runs: Runs, row: Row) -> None:
    runs.check(cell_of(row))


def test_global_aux_loss(runs: Runs) -> None:
    """Its counts are of all processes: one process sees the same with a micro-batch as large."""
    model = (
        "--num-experts 4 --calculate-per-token-loss --moe-router-load-balancing-type global_aux_loss "
        "--moe-aux-loss-coeff 0.3"
    )
    for layout, world_size in ((f"{EP} 2", 2), (f"{EP} 2 {TP2} {ETP} 1", 4)):
        whole = runs.outcome(Cell(model, batch="--micro-batch-size 4 --global-batch-size 8"))
        cell = Cell(model, layout, world_size=world_size, batch="--micro-batch-size 2 --global-batch-size 8")
        found = differences(runs.outcome(cell), whole, TOLERANCES["fp64"])
        assert not found, "\n".join(found[:10])


def logged_losses(cell: Cell) -> list[dict[str, list[float]]] | None:
    """In a rank: what routers log, step by step."""
    parsed = parse(cell.flags)
    mesh = pools.mesh(parsed.config, cell.world_size)
    if mesh is None:
        return None
    run, found = train.set_up(parsed, mesh), []
    run.logger.step = lambda router_losses, **others: found.append(router_losses)  # type: ignore[method-assign]
    loader = build_loader(RandomSamples(100, 8, VOCAB), mesh, micro_batch_size=parsed.config.training.micro_batch_size)
    for _ in range(cell.num_steps):
        train.train_step(run, loader)
    return found


@pytest.mark.parametrize("axes", ["ep2-tp2-etp1-dp2", "ep4", "ep2-pp2"])
@pytest.mark.parametrize("recompute", ["none", "full"])
def test_logged_losses(pool: Pool, axes: str, recompute: str) -> None:
    """Summed, averaged and counted once, whatever the layout; layers without experts have none."""
    model = f"--num-experts 4 --moe-layer-freq ([1]+[0])*2 --num-layers 4 {BALANCING['aux+seq']} --moe-z-loss-coeff 0.1"
    cell = Cell(model, AXES[axes][1], RECOMPUTE[recompute], world_size=AXES[axes][0])
    whole, *_ = pool.run(logged_losses, cell.whole)
    for rank in pool.run(logged_losses, cell):
        for step, expected in zip(rank, whole, strict=True):
            assert list(step) == ["load_balancing_loss", "seq_load_balancing_loss", "z_loss"] == list(expected)
            for name, layers in step.items():
                assert [value is None for value in layers] == [False, True, False, True]
                assert layers[::2] == pytest.approx(expected[name][::2], rel=1e-10) and min(layers[::2]) > 0


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("dispatcher", list(DISPATCHERS))
def test_narrow_precisions(runs: Runs, dispatcher: str, precision: str) -> None:
    """One step: later ones start from weights that Adam made of rounding errors, which a router turns into jumps."""
    model = f"--num-experts 4 --residual-connection hyper {SHAPES['llama']} {BALANCING['aux+z']}"
    layout = f"{AXES['ep2-tp2-etp2'][1]} --moe-token-dispatcher-type {dispatcher}"
    runs.check(Cell(model, layout, world_size=4, precision=precision, num_steps=1))


@pytest.mark.slow
@pytest.mark.parametrize("axes", list(AXES))
def test_every_layout_and_dispatcher_with_everything(runs: Runs, axes: str) -> None:
    for dispatcher in DISPATCHERS:
        for drop in DROPS:
            for balancing in BALANCING:
                row = {name: values[0] for name, values in FACTORS.items()}
                runs.check(
                    cell_of(row | {"axes": axes, "dispatcher": dispatcher, "drop": drop, "balancing": balancing})
                )


@pytest.mark.slow
@pytest.mark.parametrize("dispatcher", list(DISPATCHERS))
@pytest.mark.parametrize("etp", [1, 2])
def test_tensor_expert_and_pipeline_parallel(dispatcher: str, etp: int) -> None:
    """Eight ranks; with one etp rank the experts have copies, with two they have none."""
    pool = Pool(size=8, timeout_s=240)
    try:
        layout = f"{TP2} {EP} 2 {ETP} {etp} --pipeline-model-parallel-size 2 --moe-token-dispatcher-type {dispatcher}"
        model = f"--num-experts 4 {SHARED['gated']} {BALANCING['aux+seq']} {DROPS['probs']}"
        for method in ("hyper", "attention"):
            Runs(pool).check(Cell(f"{model} --residual-connection {method}", layout, RECOMPUTE["full"], world_size=8))
    finally:
        pool.close()
