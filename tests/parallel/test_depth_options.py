"""What goes with every residual method and depends on depth, sample or token: the same at every layout."""

from __future__ import annotations

import pytest
from cells import RECOMPUTE, SP, TP2
from parity import Cell, Runs

LEFT_OUT = "--stochastic-depth 0.5 --layerdrop 0.2"
SCALED = "--residual-scale depth-mup --base-num-layers 1 --adam-eps 1e-3"
LINEARITY = "--linearity-regularization 0.3 --calculate-per-token-loss"
PP2 = "--pipeline-model-parallel-size 2"
LAYOUTS = {
    "tp2-sp-uniform": (2, f"{TP2} {SP}", "uniform"),
    "tp2-blocks-of-reads": (2, TP2, "blocks-of-reads"),
    "pp2-dp2-uniform": (4, PP2, "uniform"),
    "pp2-tp2-sp": (4, f"{PP2} {TP2} {SP}", "none"),
}


@pytest.mark.parametrize("options", [f"{LEFT_OUT} {SCALED}", LINEARITY], ids=["left-out-and-scaled", "linearity"])
@pytest.mark.parametrize(
    ("layout", "method"), [*((layout, "hyper") for layout in LAYOUTS), ("pp2-tp2-sp", "sparse-aggregation")]
)
def test_layouts_give_the_numbers_of_one_process(runs: Runs, layout: str, method: str, options: str) -> None:
    world_size, axes, recompute = LAYOUTS[layout]
    model = f"--num-layers 3 --residual-connection {method} {options}"
    runs.check(Cell(model, layout=axes, options=RECOMPUTE[recompute], world_size=world_size, num_steps=2))


@pytest.mark.parametrize("options", [LEFT_OUT, SCALED, LINEARITY])
def test_the_options_change_the_run(runs: Runs, options: str) -> None:
    plain = runs.whole(Cell("--num-layers 3 --calculate-per-token-loss --adam-eps 1e-3", num_steps=2))
    found = runs.whole(Cell(f"--num-layers 3 --calculate-per-token-loss --adam-eps 1e-3 {options}", num_steps=2))
    assert found.grad_norms[0] != plain.grad_norms[0] and found.losses[1] != plain.losses[1]


@pytest.mark.parametrize("scheme", ["fixup", "t-fixup", "orthogonal"])
def test_initial_values_are_the_same_at_every_layout(runs: Runs, scheme: str) -> None:
    model = f"--init-scheme {scheme} --norm-placement none --residual-connection layerscale"
    runs.check(Cell(model, layout=f"{TP2} {SP}", world_size=2, num_steps=2))
