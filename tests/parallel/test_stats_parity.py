"""What --log-residual-stats shows at a layout is what it shows in one process, to 1e-9."""

from __future__ import annotations

import pytest
from cells import CP2, RECOMPUTE, SP, TP2
from parity import Cell, run_cell
from pool import Pool

PP2 = "--pipeline-model-parallel-size 2"
LAYOUTS = {"tp2": TP2, "cp2": CP2, "tp2-sp": f"{TP2} {SP}", "pp2": PP2, "pp2-v": f"{PP2} --pipeline-schedule zbv"}
STATS = "--log-residual-stats 2"


@pytest.mark.parametrize("method", ["mhc", "attention"])
@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_statistics_equal_one_process(pool: Pool, layout: str, method: str) -> None:
    model = f"--num-layers 4 --residual-connection {method} --value-residual learnable"
    options = f"{STATS} {RECOMPUTE['uniform']}"
    one, *_ = pool.run(run_cell, Cell(model, options=STATS, num_steps=2))
    ranks = pool.run(run_cell, Cell(model, LAYOUTS[layout], options, world_size=2, num_steps=2))[:2]
    (expected,) = one.stats
    assert {"grad_norm", "linearity", "value_first", "branch_variance"} <= set(expected)
    for rank in ranks:
        (found,) = rank.stats
        assert set(found) == set(expected)
        for name, row in expected.items():
            wanted = [None if value is None else pytest.approx(value, rel=1e-9, abs=1e-14) for value in row]
            assert found[name] == wanted, name


@pytest.mark.parametrize("strategy", ["optim", "optim_grads_params"])
def test_data_parallel_ranks(pool: Pool, strategy: str) -> None:
    """Each rank's first micro-batch is measured: other tokens than one process measures, but the same parameters."""
    model = "--num-layers 3 --residual-connection hyper --value-residual learnable"
    one, *_ = pool.run(run_cell, Cell(model, options=STATS, num_steps=2))
    layout = f"--data-parallel-sharding-strategy {strategy}"
    first, second = (r.stats for r in pool.run(run_cell, Cell(model, layout, STATS, world_size=2, num_steps=2))[:2])
    assert first == second
    for name in ("grad_norm", "value_first", "value_own"):
        wanted = [None if value is None else pytest.approx(value, rel=1e-9) for value in one.stats[0][name]]
        assert first[0][name] == wanted, name
    assert set(first[0]) == set(one.stats[0])


def test_parameters_that_are_still_being_gathered(pool: Pool) -> None:
    """--overlap-param-gather: the statistics are of the step's new weights, also those that no layer waits for."""
    model = "--num-layers 3 --residual-connection hyper --value-residual learnable"
    cells = (Cell(model, "", f"{STATS} {more}", world_size=2, num_steps=2) for more in ("", "--overlap-param-gather"))
    expected, found = (pool.run(run_cell, cell)[0].stats for cell in cells)
    assert len(found) == 1 and found == expected


def test_measuring_changes_nothing(pool: Pool) -> None:
    """The same losses, bit for bit; what a step left out of its samples is measured nevertheless."""
    model = "--num-layers 3 --residual-connection hyper --stochastic-depth 0.5 --layerdrop 0.9"
    with_stats, without = (
        pool.run(run_cell, Cell(model, options=options, num_steps=3))[0] for options in ("--log-residual-stats 1", "")
    )
    assert with_stats.losses == without.losses and len(with_stats.stats) == 3
    assert all(variance > 0 for stats in with_stats.stats for variance in stats["branch_variance"])
