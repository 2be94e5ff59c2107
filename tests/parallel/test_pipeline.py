"""Pipelines give the numbers of one process, with every method, under every schedule and with everything else.

The default run has every method on two stages and a covering array over layouts, schedules and the rest; ``slow`` has
every method under every schedule.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import cache
from typing import Any, NamedTuple

import pytest
import torch
from cells import HEADS, NORMS, RECOMPUTE, RECOMPUTE_TURNS, SHAPES, TABLES, VALUES, forms
from pairwise import Row, pairwise
from parity import Cell, Runs, run_cell
from pool import Pool, mesh

from megatron_hc import train
from megatron_hc.cli import parse
from megatron_hc.parallel.pipeline import Pipeline
from megatron_hc.parallel.stages import MicroBatch
from megatron_hc.residual import RESIDUALS, VALUE_RESIDUALS

PP2, PP4 = "--pipeline-model-parallel-size 2", "--pipeline-model-parallel-size 4"
AXES = {
    "pp2": (2, PP2),
    "pp4": (4, PP4),
    "pp2-tp2": (4, f"{PP2} --tensor-model-parallel-size 2"),
    "pp2-tp2-sp": (4, f"{PP2} --tensor-model-parallel-size 2 --sequence-parallel"),
    "pp2-dp2": (4, PP2),
}
EIGHT_RANKS = {
    "pp2-tp2-dp2": (8, f"{PP2} --tensor-model-parallel-size 2"),
    "pp2-tp2-sp-dp2": (8, f"{PP2} --tensor-model-parallel-size 2 --sequence-parallel"),
    "pp4-dp2": (8, PP4),
    "pp4-tp2-sp": (8, f"{PP4} --tensor-model-parallel-size 2 --sequence-parallel"),
}
SCHEDULES = {
    "1f1b": "--pipeline-schedule 1f1b",
    "gpipe": "--pipeline-schedule gpipe",
    "interleaved": "--num-virtual-stages-per-pipeline-rank 2",
    "zero-bubble": "--pipeline-schedule interleaved-zero-bubble",
    "interleaved-zero-bubble": "--pipeline-schedule interleaved-zero-bubble --num-virtual-stages-per-pipeline-rank 2",
    "zbv": "--pipeline-schedule zbv",
    "dualpipev": "--pipeline-schedule dualpipev",
}
DATA = {
    "one": "",
    "optim": "--data-parallel-sharding-strategy optim",
    "no_shard": "--data-parallel-sharding-strategy no_shard",
    "optim_grads_params": "--data-parallel-sharding-strategy optim_grads_params",
    "overlap": "--overlap-grad-reduce --overlap-param-gather --ddp-bucket-size 300",
}
VALUES_IN_TURN = ("none", "learnable", "dense", "single", "per-token")
FACTORS = {
    "axes": list(AXES),
    "schedule": list(SCHEDULES),
    "data": list(DATA),
    "value": list(VALUES_IN_TURN),
    "recompute": [name for name in RECOMPUTE if name not in RECOMPUTE_TURNS[1:]],
    "table": ["tied", "untied"],
    "shape": ["gpt", "llama"],
    "heads": ["mha", "kv1"],
}
MANY = "--global-batch-size 16"  # 8 micro-batches of 2, or 4 on each of two data-parallel ranks
MANY_TWICE = "--global-batch-size 32"


def allows(row: Row) -> bool:
    axes, data, schedule = row.get("axes"), row.get("data"), row.get("schedule")
    if data == "optim_grads_params" and schedule in ("zero-bubble", "interleaved-zero-bubble", "zbv", "dualpipev"):
        return False
    return not (axes and data and ("dp2" in axes) == (data == "one"))


@cache
def covering_rows(num_ranks: int = 4) -> tuple[tuple[Row, str], ...]:
    """Rows, each with a method; every form of every method takes its turn."""
    methods = itertools.cycle(form for turn in itertools.count() for form in one_form_each(turn))
    rows = pairwise(FACTORS | ({"axes": list(EIGHT_RANKS)} if num_ranks == 8 else {}), allows, seed=1)
    recompute = {"uniform": itertools.cycle(RECOMPUTE_TURNS)}
    for row in rows:
        if row["recompute"] in recompute:
            row["recompute"] = next(recompute[row["recompute"]])
    return tuple((row, method_for(row, methods)) for row in rows)


def one_form_each(turn: int) -> list[str]:
    return [forms(method)[turn % len(forms(method))] for method in RESIDUALS]


def method_for(row: Row, methods: Any) -> str:
    return next(form for form in methods if "muddformer" not in form or row["value"] != "single")


def cell_of(row: Row, method: str, **options: Any) -> Cell:
    world_size, axes = (AXES | EIGHT_RANKS)[row["axes"]]
    model = (SHAPES[row["shape"]], HEADS[row["heads"]], TABLES[row["table"]], VALUES[row["value"]], method)
    is_deep = "pp4" in row["axes"] and row["schedule"] in ("interleaved", "interleaved-zero-bubble", "zbv", "dualpipev")
    return Cell(
        model=" ".join((*model, f"--num-layers {9 if is_deep else 5}")),  # last: some forms have a number of their own
        layout=" ".join((axes, SCHEDULES[row["schedule"]], DATA[row["data"]])),
        options=RECOMPUTE[row["recompute"]],
        world_size=world_size,
        num_steps=2,
        batch=MANY_TWICE if world_size == 8 else MANY,
        **options,
    )


def name_of(row: Row, method: str) -> str:
    return "-".join((*(row[name] for name in FACTORS), method.removeprefix("--residual-connection ").strip()))


@pytest.mark.parametrize("value", ["none", "learnable"])
@pytest.mark.parametrize("method", list(RESIDUALS))
def test_every_method_on_two_stages(runs: Runs, method: str, value: str) -> None:
    for form in forms(method) if value == "none" else forms(method)[:1]:
        runs.check(Cell(f"--num-layers 3 {form} {VALUES[value]}", layout=PP2, world_size=2, num_steps=2))


@pytest.mark.parametrize("method", list(RESIDUALS))
def test_every_method_on_four_stages(runs: Runs, method: str) -> None:
    """Value residuals on and off in turn."""
    index = list(RESIDUALS).index(method)
    form, value = forms(method)[index % len(forms(method))], ("none", "dense")[index % 2]
    model = f"--num-layers 5 {form} {VALUES[value]}"
    runs.check(Cell(model, layout=PP4, world_size=4, num_steps=2))


@pytest.mark.parametrize(("row", "method"), [pytest.param(*row, id=name_of(*row)) for row in covering_rows()])
def test_covering_array(runs: Runs, row: Row, method: str) -> None:
    runs.check(cell_of(row, method))


def test_everything_occurs() -> None:
    rows = [row for row, _ in covering_rows()]
    wanted = FACTORS | {"recompute": list(RECOMPUTE)}
    assert all({row[name] for row in rows} == set(wanted[name]) for name in FACTORS)
    assert {method.split()[1] for _, method in covering_rows()} == set(RESIDUALS)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("schedule", ["1f1b", "interleaved-zero-bubble", "dualpipev"])
def test_narrow_precisions(runs: Runs, schedule: str, precision: str) -> None:
    # A small rate: where a gradient is rounding errors, Adam makes whole steps of them.
    model = f"--num-layers 4 {SHAPES['llama']} --residual-connection mhc --fp32-residual-connection --lr 1e-4"
    layout = f"{PP2} {SCHEDULES[schedule]}"
    runs.check(Cell(model, layout=layout, world_size=2, num_steps=2, precision=precision))


UNEVEN = {
    "ends": "--decoder-first-pipeline-num-layers 1 --decoder-last-pipeline-num-layers 4",
    "accounted": "--account-for-embedding-in-pipeline-split --account-for-loss-in-pipeline-split",
    "ends-of-their-own": "--pipeline-model-parallel-layout E|t*2|ttt|L",
    "empty-in-a-v": "--pipeline-schedule zbv --pipeline-model-parallel-layout Et||ttt|tL",
}


@pytest.mark.parametrize("split", list(UNEVEN))
@pytest.mark.parametrize("method", ["hyper", "attention", "denseformer"])
def test_uneven_stages(runs: Runs, method: str, split: str) -> None:
    model = f"--num-layers 5 --residual-connection {method} --value-residual dense"
    runs.check(Cell(model, layout=f"{PP2} {UNEVEN[split]}", world_size=2, num_steps=2))


@pytest.mark.parametrize("norm", ["post", "deepnorm", "hybrid", "peri", "reordered"])
def test_norm_placements(runs: Runs, norm: str) -> None:
    runs.check(Cell(f"--num-layers 3 {NORMS[norm]}", layout=PP2, world_size=2, num_steps=2))


@pytest.mark.parametrize("schedule", ["1f1b", "interleaved"])
def test_fully_sharded_experts(runs: Runs, schedule: str) -> None:
    axes = f"{PP2} --expert-model-parallel-size 2" if schedule == "1f1b" else PP2
    layout = f"{axes} {SCHEDULES[schedule]} {DATA['optim_grads_params']}"
    runs.check(Cell("--num-layers 4 --num-experts 4 --residual-connection mhc", layout, world_size=4, num_steps=2))


class Evaluated(NamedTuple):
    losses: list[float]
    without_gradients: list[float]
    of_three: list[float]
    """Of the first three micro-batches alone: another schedule."""
    left_alone: bool
    """Whether the passes without gradients left none."""


def evaluated(cell: Cell) -> list[Evaluated] | None:
    """Each step's micro-batches, with gradients and without."""
    found: list[Evaluated] = []

    def change(run: train.Run) -> None:
        real = run.pipeline.forward_backward

        def both(micro_batches: list[MicroBatch]) -> torch.Tensor:
            passes = [run.pipeline.forward(micro_batches), run.pipeline.forward(micro_batches[:3])]
            left_alone = all(parameter.grad is None for parameter in run.model.parameters())
            losses = real(micro_batches)
            found.append(Evaluated(losses.tolist(), *(one.tolist() for one in passes), left_alone))
            return losses

        run.pipeline.forward_backward = both  # type: ignore[method-assign]

    return found if run_cell(cell, change) is not None else None


@pytest.mark.parametrize("schedule", ["1f1b", "interleaved", "zbv", "dualpipev"])
def test_evaluation(pool: Pool, schedule: str) -> None:
    cell = Cell("--num-layers 4 --residual-connection attention", layout=f"{PP2} {SCHEDULES[schedule]}", world_size=2)
    for rank in pool.run(evaluated, cell)[:2]:
        assert len(rank) == cell.num_steps
        for step in rank:
            assert len(step.losses) == 4 and step.left_alone
            assert step.without_gradients == pytest.approx(step.losses, rel=1e-12)
            assert step.of_three == pytest.approx(step.losses[:3], rel=1e-12)


def known_bubble(cell: Cell) -> tuple[float, float] | None:
    """Of processes that were at work for 1 and 2 of 4 s."""
    parsed = parse(cell.flags)
    own = mesh(parsed.config, cell.world_size)
    if own is None:
        return None
    pipeline = train.set_up(parsed, own).pipeline
    pipeline._busy, pipeline._total = 1.0 + own.rank("pp"), 4.0
    return pipeline.bubble()


def test_the_bubble_is_the_mean_over_processes(pool: Pool) -> None:
    assert pool.run(known_bubble, Cell(layout=PP2, world_size=2))[:2] == [(0.625, 0.0)] * 2


def with_a_shorter_batch(cell: Cell) -> str | None:
    """What a rank says when a step's second micro-batch is shorter than the others."""

    def change(run: train.Run) -> None:
        real = run.pipeline.forward_backward

        def shortened(micro_batches: list[MicroBatch]) -> torch.Tensor:
            first, second, *others = micro_batches
            short = [part if part is None else part[:, :6] for part in second]
            return real([first, MicroBatch(*short), *others])

        run.pipeline.forward_backward = shortened  # type: ignore[method-assign, assignment]

    try:
        return None if run_cell(cell, change) is None else "went on"
    except ValueError as error:
        return str(error)


def test_another_sequence_length_is_refused_on_every_stage(pool: Pool) -> None:
    message = (
        "micro-batch 1 is (2, 6), but pipeline stages exchange tensors for --micro-batch-size (2) samples of "
        "--seq-length (8) tokens"
    )
    assert pool.run(with_a_shorter_batch, Cell(layout=PP2, world_size=2)) == [message, message, None, None]


def sent_bytes(cell: Cell) -> int | None:
    """What this rank sends in one step."""
    pipelines: list[Pipeline] = []
    found = run_cell(cell, lambda run: pipelines.append(run.pipeline))
    return None if found is None else pipelines[0].sent_bytes


def bytes_of(pool: Pool, model: str, schedule: str = "1f1b", layers: int = 4) -> list[int]:
    layout = f"{PP2} {SCHEDULES[schedule]}"
    cell = Cell(f"--num-layers {layers} {model}", layout=layout, world_size=2, num_steps=1)
    return pool.run(sent_bytes, cell)[:2]


TENSOR = 8 * 2 * 16 * 8  # S B C of ``parity.MODEL`` in float64
STEP = 4 * TENSOR  # of its 4 micro-batches; as much goes forth (gradients: back)


@pytest.mark.parametrize(
    ("model", "tensors"),
    [
        ("--residual-connection plain", 1),
        ("--residual-connection hyper", 4),
        ("--residual-connection frac", 1),
        ("--residual-connection mhc", 4),
        ("--residual-connection mhc --mhc-single-pass --residual-streams 2", 2 + 2 / 16),
        ("--residual-connection mhc-lite", 4),
        ("--residual-connection kromhc", 4),
        ("--residual-connection gated --residual-streams 3", 3),
        ("--residual-connection virtual-width", 4 / 2),
        ("--residual-connection plain --value-residual learnable", 2),
        ("--residual-connection plain --value-residual dense", 3),
        ("--residual-connection attention", 5),
        ("--residual-connection attention --attention-residual-block-size 4", 2),
        ("--residual-connection denseformer", 3),
        ("--residual-connection denseformer --denseformer-period 4", 3),
        ("--residual-connection muddformer", 3),
    ],
)
def test_bytes_between_two_stages(pool: Pool, model: str, tensors: float) -> None:
    """Into layer 2 of 4: the streams, values of earlier layers, and the history that later layers read."""
    assert bytes_of(pool, model) == [tensors * STEP, tensors * STEP]


@pytest.mark.parametrize(
    ("model", "forth", "back"),
    [
        # Stages 0 and 2 are on the first process, 1 and 3 on the second. Boundaries: 0 -> 1, 1 -> 2, 2 -> 3.
        ("--residual-connection hyper", 4 + 4, 4),
        ("--residual-connection plain --value-residual learnable", 2 + 1, 1),  # V_1 once
        ("--residual-connection attention", 3 + 2, 2),  # v0 v1 v2; v3 v4; v5 v6
        ("--residual-connection denseformer", 2 + 1, 1),  # X0 X1; X2; X3
    ],
)
def test_what_a_process_holds_is_not_sent_again(pool: Pool, model: str, forth: int, back: int) -> None:
    assert bytes_of(pool, model, "interleaved") == [(forth + back) * STEP] * 2


@pytest.mark.slow
@pytest.mark.parametrize("schedule", list(SCHEDULES))
@pytest.mark.parametrize("method", list(RESIDUALS))
def test_every_form_under_every_schedule(runs: Runs, method: str, schedule: str) -> None:
    for form, value in itertools.product(forms(method), ("none", "learnable", "dense")):
        model, layout = f"--num-layers 4 {form} {VALUES[value]}", f"{PP2} {SCHEDULES[schedule]}"
        runs.check(Cell(model, layout=layout, world_size=2, num_steps=2))
    model, layout = f"{forms(method)[0]} --value-residual dense --num-layers 8", f"{PP4} {SCHEDULES[schedule]}"
    runs.check(Cell(model, layout=layout, world_size=4, num_steps=2, batch=MANY))


@pytest.mark.slow
@pytest.mark.parametrize("schedule", list(SCHEDULES))
@pytest.mark.parametrize("value", list(VALUE_RESIDUALS))
def test_every_value_residual(runs: Runs, value: str, schedule: str) -> None:
    model, layout = f"--num-layers 5 --residual-connection hyper {VALUES[value]}", f"{PP2} {SCHEDULES[schedule]}"
    runs.check(Cell(model, layout=layout, world_size=2, num_steps=2))


@pytest.fixture(scope="module")
def runs_of_eight() -> Iterator[Runs]:
    pool = Pool(size=8, timeout_s=300)
    found = Runs(pool)
    yield found
    pool.close()
    print("\n" + found.report())  # seen with -s


@pytest.mark.slow
@pytest.mark.parametrize(("row", "method"), [pytest.param(*row, id=name_of(*row)) for row in covering_rows(8)])
def test_eight_ranks(runs_of_eight: Runs, row: Row, method: str) -> None:
    runs_of_eight.check(cell_of(row, method))
