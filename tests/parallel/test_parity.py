"""Any layout gives the numbers of one process: losses, gradient norms and every gradient, step by step.

The default run is a covering array over layouts, methods and model variants (``pytest -v`` prints it: every row is a
test); ``slow`` has whole products.
"""

from __future__ import annotations

import pytest
from cells import (
    AXES,
    CP2,
    CP4,
    HEADS,
    LOSSES,
    NORMS,
    RECOMPUTE,
    SHAPES,
    SP,
    STRATEGIES,
    TABLES,
    TP2,
    TP4,
    VALUES,
    allows,
    cell_of,
    covering_rows,
    forms,
    name_of,
    product,
)
from pairwise import pairs_of, pairwise
from parity import Cell, Runs
from pool import Pool

from megatron_hc.model.placement import NORM_PLACEMENTS
from megatron_hc.residual import RESIDUALS, VALUE_RESIDUALS

ROWS = covering_rows()


@pytest.mark.parametrize(("row", "form"), [pytest.param(row, form, id=name_of(row, form)) for row, form in ROWS])
def test_covering_array(runs: Runs, row: dict[str, str], form: int) -> None:
    runs.check(cell_of(row, form))


def test_everything_occurs() -> None:
    """Every layout, every form of every method, every value residual and every norm placement."""
    rows = [row for row, _ in ROWS]
    assert {row["axes"] for row in rows} == set(AXES)
    assert {(row["method"], form) for row, form in ROWS} == {(m, f) for m in RESIDUALS for f in range(len(forms(m)))}
    assert {row["value"] for row in rows} >= set(VALUE_RESIDUALS)
    assert {row["norm"] for row in rows} >= set(NORM_PLACEMENTS)
    assert {row["recompute"] for row in rows} == set(RECOMPUTE)


def test_pairs_are_covered() -> None:
    factors = {"a": ["1", "2", "3"], "b": ["1", "2"], "c": ["1", "2", "3"]}
    rows = pairwise(factors, lambda row: not (row.get("a") == "1" and row.get("b") == "2"))
    covered = set().union(*(pairs_of(row, factors) for row in rows))
    assert len(covered) == 3 * 2 + 3 * 3 + 2 * 3 - 1
    assert (("a", "1"), ("b", "2")) not in covered
    assert len(rows) < 3 * 2 * 3 - 3


TP2_SP_DP2 = {"layout": AXES["tp2-sp-dp2"][1], "world_size": 4}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("method", ["plain", "hyper", "mhc", "muddformer"])
def test_narrow_precisions(runs: Runs, method: str, precision: str) -> None:
    # A small rate: where a gradient is rounding errors, Adam makes whole steps of them.
    model = f"{SHAPES['llama']} --residual-connection {method} --lr 1e-4"
    runs.check(Cell(model, precision=precision, **TP2_SP_DP2))


@pytest.mark.slow
@pytest.mark.parametrize("axes", list(AXES))
@pytest.mark.parametrize("method", list(RESIDUALS))
def test_every_form_at_every_layout(runs: Runs, axes: str, method: str) -> None:
    for row in product(axes=[axes], strategy=STRATEGIES, method=[method]):
        for form in range(len(forms(method))):
            runs.check(cell_of(row, form, num_steps=5))


OTHERS = {"norm": NORMS, "value": VALUES, "recompute": RECOMPUTE, "table": TABLES, "shape": SHAPES, "loss": LOSSES}


@pytest.mark.slow
@pytest.mark.parametrize("axes", list(AXES))
@pytest.mark.parametrize("other", OTHERS)
def test_everything_else_at_every_layout(runs: Runs, axes: str, other: str) -> None:
    heads = HEADS if "tp" in axes or "cp" in axes else ["mha"]
    for row in product(axes=[axes], heads=heads, **{other: OTHERS[other]}):
        runs.check(cell_of(row, num_steps=5))


OTHER_STRATEGIES = [
    (axes, strategy)
    for axes in AXES
    for strategy in STRATEGIES
    if strategy not in ("one", "optim") and allows({"axes": axes, "strategy": strategy})
]
"""The test above has the default, and one data-parallel rank."""


@pytest.mark.slow
@pytest.mark.parametrize(("axes", "strategy"), OTHER_STRATEGIES)
def test_everything_else_with_every_strategy(runs: Runs, axes: str, strategy: str) -> None:
    for other, values in OTHERS.items():
        for row in product(axes=[axes], strategy=[strategy], heads=["mha"], **{other: values}):
            runs.check(cell_of(row, num_steps=5))


@pytest.mark.slow
@pytest.mark.parametrize(
    "layout", [f"{TP4} {SP}", f"{TP2} {SP}", f"{TP2} {STRATEGIES['hybrid']}", f"{CP2} {TP2} {SP}", CP4]
)
@pytest.mark.parametrize("method", ["mhc", "muddformer"])
def test_eight_ranks(layout: str, method: str) -> None:
    pool = Pool(size=8, timeout_s=300)
    try:
        heads = HEADS["kv2"]
        Runs(pool).check(Cell(f"{SHAPES['llama']} {heads} --residual-connection {method}", layout, world_size=8))
    finally:
        pool.close()
