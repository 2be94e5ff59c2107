"""The fused boundary at a layout against the plain form in one process.

In fp32: float64, in which the other cells compare, always takes the plain form, and a cell in fp32 or bf16 takes the
fused one on both sides.
"""

from __future__ import annotations

import pytest
from cells import SHAPES, SP, TP2, forms
from parity import TOLERANCES, Cell, Runs, differences
from test_pipeline import PP2, SCHEDULES

LAYOUTS = {
    "tp2-sp-dp2": (4, f"{TP2} {SP}"),
    "pp2": (2, PP2),
    "pp2-tp2-sp": (4, f"{PP2} {TP2} {SP} {SCHEDULES['interleaved']}"),
}
MORE = {name: (2, f"{PP2} {flags}") for name, flags in SCHEDULES.items()}
RECOMPUTE = "--recompute-granularity selective --recompute-modules residual core_attn"
METHODS = ("hyper", "frac", "mhc", "mhc-lite", "kromhc", "virtual-width")


def check(runs: Runs, model: str, layout: tuple[int, str], options: str = "") -> None:
    """``options`` for the fused side only: backends and recompute change no number."""
    # A small rate: where a gradient is rounding errors, Adam makes whole steps of them. A large epsilon: where streams
    # nearly cancel in a read, the norm would make a gradient of rounding errors, others in each of the two forms.
    model = f"--num-layers 4 {SHAPES['llama']} {model} --lr 1e-4 --norm-epsilon 0.1"
    plain = runs.whole(Cell(f"{model} --no-fused-residual", precision="fp32", num_steps=2))
    world_size, flags = layout
    fused = Cell(model, layout=flags, options=options, world_size=world_size, precision="fp32", num_steps=2)
    found = differences(runs.outcome(fused), plain, TOLERANCES["fp32"])
    assert not found, "\n".join(found[:20])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("method", ["hyper", "frac", "mhc"])
def test_fused_at_a_layout_equals_plain_in_one_process(runs: Runs, method: str, layout: str) -> None:
    check(runs, f"--residual-connection {method}", LAYOUTS[layout], RECOMPUTE if layout == "pp2" else "")


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS | MORE)
@pytest.mark.parametrize("method", METHODS)
def test_every_form_at_every_layout(runs: Runs, method: str, layout: str) -> None:
    for form in forms(method):
        check(runs, form, (LAYOUTS | MORE)[layout])


@pytest.mark.slow
@pytest.mark.parametrize("options", ["--fused-residual-backend cpp", RECOMPUTE])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("method", METHODS)
def test_backends_and_recompute(runs: Runs, method: str, layout: str, options: str) -> None:
    check(runs, f"--residual-connection {method}", LAYOUTS[layout], options)
