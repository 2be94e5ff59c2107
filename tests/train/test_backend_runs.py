"""Whole runs with back ends: FP8 against bf16, what a checkpoint holds, and going on from it with another back end.

transformer-engine is a stand-in here (tests/stand_ins); torchao is itself, emulated on the CPU.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import stand_ins
import torch
from stand_ins import transformer_engine
from train_runs import command, losses, tiny

from megatron_hc import checkpoint

TE = ["--device", "auto", "--transformer-impl", "transformer_engine"]
DELAYED = [*TE, "--fp8-format", "hybrid", "--fp8-amax-history-len", 4, "--fp8-amax-compute-algo", "max"]
TENSORWISE = [*TE, "--fp8-format", "hybrid", "--fp8-recipe", "tensorwise"]
TORCHAO = ["--fp8-format", "hybrid", "--fp8-backend", "torchao", "--fp8-recipe", "tensorwise"]
RUN = ["--bf16", "--residual-connection", "hyper", "--eval-interval", 0, "--lr", 3e-3]
EXPERTS = ["--num-experts", 4, "--moe-router-topk", 2, "--moe-ffn-hidden-size", 32]


@pytest.fixture
def on_a_stand_in() -> object:
    with stand_ins.installed():
        yield


def run(licence: str, folder: Path, *flags: object, save: bool = False) -> list[float]:
    """Losses of a run in ``folder``."""
    if "torchao" in flags:
        pytest.importorskip("torchao")
    saves = ["--save", folder / "run", "--load", folder / "run"] if save else []
    assert command(tiny(licence, folder, *RUN, *saves, *flags)) == 0
    return losses(folder)


def test_fp8_learns_as_bf16_does(licence: str, tmp_path: Path) -> None:
    """50 steps by torchao, from a loss of 5.5 to 3.0: nowhere more than 2 % from bf16's curve, and not the same one."""
    plain = run(licence, tmp_path / "bf16", "--train-iters", 50)
    fp8 = run(licence, tmp_path / "fp8", "--train-iters", 50, *TORCHAO)
    distance = max(abs(a / b - 1) for a, b in zip(fp8, plain, strict=True))
    print(f"distance {distance:.4f}")  # seen with -s: 0.008
    assert 1e-5 < distance < 0.02 and plain[-1] < 0.6 * plain[0]


@pytest.mark.parametrize("flags", [DELAYED, [*TENSORWISE, *EXPERTS], [*TORCHAO, *EXPERTS]])
def test_a_run_in_fp8_goes_on_bit_for_bit(
    licence: str, tmp_path: Path, on_a_stand_in: object, flags: list[object]
) -> None:
    """Delayed scaling takes its scales from earlier steps, so they are in the checkpoint."""
    whole = run(licence, tmp_path / "whole", "--train-iters", 6, *flags)
    assert len(run(licence, tmp_path, "--train-iters", 6, "--exit-interval", 3, *flags, save=True)) == 3
    assert run(licence, tmp_path, "--train-iters", 6, *flags, save=True) == whole


def names(folder: Path) -> set[str]:
    found = checkpoint.find(str(folder / "run"))
    return set(checkpoint.load_tensor_shapes(found))


def test_checkpoints_are_interchangeable(licence: str, tmp_path: Path, on_a_stand_in: object) -> None:
    """The same names and shapes; what transformer-engine remembers lies apart, and is not missed where it is not."""
    steps = ["--train-iters", 6, "--exit-interval", 3]
    run(licence, tmp_path / "local", *steps, save=True)
    run(licence, tmp_path / "engine", *steps, *DELAYED, save=True)
    apart = {name for name in names(tmp_path / "engine") if name.startswith("fp8.")}
    assert names(tmp_path / "engine") - apart == names(tmp_path / "local")
    linears = ("attention.linear_qkv", "attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2")
    kinds = ("scale_fwd", "scale_bwd", "amax_history_fwd", "amax_history_bwd")
    assert apart == {f"fp8.layers.{n}.{linear}.{kind}" for n in range(2) for linear in linears for kind in kinds}
    whole = run(licence, tmp_path / "whole", "--train-iters", 6)
    for folder, flags in (("local", DELAYED), ("engine", [])):
        on = run(licence, tmp_path / folder, "--train-iters", 6, *flags, save=True)
        assert all(abs(a / b - 1) < 0.02 for a, b in zip(on, whole, strict=True))


def test_recompute_in_fp8(licence: str, tmp_path: Path, on_a_stand_in: object) -> None:
    """A second forward pass has the scales of the first and moves none."""
    full = ["--recompute-granularity", "full", "--recompute-method", "uniform", "--recompute-num-layers", 1]
    some = ["--recompute-granularity", "selective", "--recompute-modules", "mlp", "core_attn", "layernorm"]
    kept = run(licence, tmp_path / "kept", "--train-iters", 4, *DELAYED)
    assert run(licence, tmp_path / "full", "--train-iters", 4, *DELAYED, *full) == kept
    assert run(licence, tmp_path / "some", "--train-iters", 4, *DELAYED, *some) == kept


def test_first_and_last_layers_and_validation_stay_in_bf16(
    licence: str, tmp_path: Path, on_a_stand_in: object, capfd: pytest.CaptureFixture[str]
) -> None:
    ends = ["--first-last-layers-bf16", "--num-layers-at-end-in-bf16", 0]
    run(licence, tmp_path, "--train-iters", 2, *DELAYED, *ends, "--eval-interval", 1)
    # Two steps of two micro-batches: four linear layers of the one layer that is left.
    assert transformer_engine.CALLED == ["Linear"] * 16
    out = capfd.readouterr().out
    assert "linear layers, experts and attention by transformer-engine" in out
    assert "FP8 (delayed, hybrid) in 1 of 2 layers here" in out


@pytest.mark.parametrize("flags", [["--norm-impl", "apex"], ["--norm-impl", "transformer_engine"]])
@pytest.mark.parametrize("normalization", ["RMSNorm", "LayerNorm"])
def test_norms_in_bf16(
    licence: str, tmp_path: Path, on_a_stand_in: object, flags: list[str], normalization: str
) -> None:
    """bf16 activations and fp32 weights: to a rounding of what our own give."""
    shared = ["--train-iters", 3, "--device", "auto", "--normalization", normalization]
    ours, theirs = run(licence, tmp_path / "a", *shared), run(licence, tmp_path / "b", *shared, *flags)
    assert all(abs(a / b - 1) < 2e-3 for a, b in zip(ours, theirs, strict=True))


def test_fused_adam_in_a_run(licence: str, tmp_path: Path, on_a_stand_in: object) -> None:
    shared = ["--train-iters", 5, "--device", "auto"]
    ours = run(licence, tmp_path / "ours", *shared)
    for impl in ("apex", "transformer_engine"):
        theirs = run(licence, tmp_path / impl, *shared, "--optimizer-impl", impl)
        assert all(abs(a / b - 1) < 1e-3 for a, b in zip(ours, theirs, strict=True))


@pytest.mark.slow
def test_deepspeeds_adam_in_a_run(licence: str, tmp_path: Path) -> None:
    """Its CPU kernel, compiled at its first use."""
    ours = run(licence, tmp_path / "ours", "--train-iters", 5)
    theirs = run(licence, tmp_path / "theirs", "--train-iters", 5, "--optimizer-impl", "deepspeed")
    assert all(abs(a / b - 1) < 1e-3 for a, b in zip(ours, theirs, strict=True)) and not torch.equal(
        torch.tensor(ours), torch.tensor(theirs)
    )


@pytest.mark.slow
def test_torchao_is_compiled(licence: str, tmp_path: Path) -> None:
    eager = run(licence, tmp_path / "eager", "--train-iters", 3, *TORCHAO)
    compiled = run(licence, tmp_path / "compiled", "--train-iters", 3, *TORCHAO, "--compile")
    assert all(abs(a / b - 1) < 5e-3 for a, b in zip(eager, compiled, strict=True))
