"""tools/benchmark.py at sizes that take no time."""

from __future__ import annotations

import argparse
import importlib
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))
names = ("benchmark", "benchmark_steps", "benchmark_launch")
benchmark, steps, launch = (importlib.import_module(name) for name in names)
sys.path.pop(0)
CASES = steps.CASES

TINY = "--hidden 16 --layers 2 --heads 2 --ffn 24 --seq 8 --vocab 23 --rounds 1 --device cpu --dtype fp32 --no-peers"


def run(monkeypatch: pytest.MonkeyPatch, flags: str) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmark.py", *f"{TINY} --threads {torch.get_num_threads()} {flags}".split()])
    benchmark.main()


def test_a_method_that_fails_does_not_end_the_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    measure = benchmark.kernel

    def fails_for_mhc(method: str, *rest: Any) -> dict[str, Any]:
        if method == "mhc":
            raise RuntimeError("no such\nkernel")
        return measure(method, *rest)

    monkeypatch.setattr(benchmark, "kernel", fails_for_mhc)
    monkeypatch.setitem(CASES, "hyper-static-n2", steps.case("hyper", residual_streams=0))
    path = tmp_path / "figures.json"
    with pytest.raises(SystemExit, match="benchmark.py: failed: mhc n 2 d 16, mhc n 4 d 16, hyper-static-n2"):
        run(monkeypatch, f"--parts steps,kernels --methods plain,hyper-static-n2,frac-m4 --output {path}")
    figures = json.loads(path.read_text())
    expected = 2 * ["hyper-static"] + 2 * ["hyper-dynamic"] + ["frac"] + 2 * ["virtual-width"]
    assert [row["method"] for row in figures["kernels"]] == expected
    assert list(figures["steps"]) == ["plain", "frac-m4"]
    assert figures["errors"]["mhc n 2 d 16"] == "RuntimeError: no such kernel"
    assert "residual-streams" in figures["errors"]["hyper-static-n2"]
    assert "mhc n 2 d 16                 failed: RuntimeError: no such kernel\n" in capsys.readouterr().out


def test_the_file_holds_what_there_is_when_a_run_is_cut_off(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    measured = []

    def cut_off(*_: Any) -> dict[str, Any]:
        if measured:
            raise KeyboardInterrupt
        measured.append(1)
        return {"method": "frac"}

    monkeypatch.setattr(benchmark, "kernel", cut_off)
    with pytest.raises(KeyboardInterrupt):
        run(monkeypatch, f"--parts kernels --output {tmp_path / 'figures.json'}")
    assert json.loads((tmp_path / "figures.json").read_text())["kernels"] == [{"method": "frac"}]


def test_launch_options_are_put_in_and_taken_back(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("triton")
    triton = importlib.import_module("megatron_hc.kernels.boundary_triton")
    chosen = triton.row_options, triton.streams_options
    seen = []

    def measured(method: str, *_: Any) -> dict[str, Any]:
        seen.append((triton.row_options({"NP": 4, "DP": 2048}), triton.streams_options is chosen[1]))
        return {"method": method}

    monkeypatch.setattr(launch, "kernel", measured)
    monkeypatch.setattr(benchmark, "check_backend", lambda *_: None)
    run(monkeypatch, f"--parts launch --backend triton --output {tmp_path / 'figures.json'}")
    rows = json.loads((tmp_path / "figures.json").read_text())["launch"]
    of_one = [row["options"] for row in rows if row["method"] == "mhc"]
    assert "forward: 1 columns" in {row["options"] for row in rows} - set(of_one)
    assert of_one[:3] == ["as chosen", "read: 1 columns", "read: 2 columns"]
    assert of_one[-2:] == ["row: 8 warps", "row: 16 warps"]
    assert seen[0] == ({"num_warps": 4}, True) and seen[-1] == ({"num_warps": 16}, True)
    assert {is_chosen for _, is_chosen in seen} == {True, False}
    assert (triton.row_options, triton.streams_options) == chosen
    with pytest.raises(SystemExit, match="--parts launch needs --device cuda"):
        run(monkeypatch, "--parts launch")


def test_curves_leave_out_what_kernels_have_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(benchmark, "kernel", lambda method, n, d, *_: {"method": method, "n": n, "d": d})
    run(monkeypatch, f"--parts kernels,curves --output {tmp_path / 'figures.json'}")
    figures = json.loads((tmp_path / "figures.json").read_text())
    points = [tuple(row.values()) for part in ("kernels", "curves") for row in figures[part]]
    assert len(set(points)) == len(points)
    assert {n for method, n, _ in points if method == "hyper-dynamic"} == {1, 2, 4, 8}  # 3 does not divide 16


@pytest.mark.parametrize("name", CASES)
def test_weights_are_drawn_on_the_device(name: str) -> None:
    """On the meta device: a value made elsewhere would not mix with them."""
    shape = argparse.Namespace(
        **{"hidden": 16, "layers": 2, "heads": 2, "ffn": 24, "seq": 8, "vocab": 23},
        **{"device": "meta", "backend": "auto", "compile": False},
    )
    model = steps.model_of(CASES[name], shape, torch.bfloat16)
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert model.embedding.weight.dtype == torch.bfloat16
    shape.device = "cpu"
    for parameter, value in steps.model_of(CASES[name], shape, torch.float32).named_parameters():
        assert value.isfinite().all() and (value.any() or "residual" in parameter), parameter


def test_peak_memory_leaves_out_the_other_model(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = argparse.Namespace(batch=1, seq=4, vocab=7, cpu_time=False, device="cpu", compile=False)
    trainer = steps.Trainer(torch.nn.Linear(3, 5), lambda tokens, labels: trainer.model(torch.ones(3)).sum(), shape)
    trainer.step()
    state = 4 * 20 * 4 + 2 * 4  # weights and biases, gradients, two moments in fp32; AdamW's counters
    assert trainer.state_bytes() == state
    others, most = 1000, 250
    for name, value in (("memory_allocated", others + state), ("max_memory_allocated", others + state + most)):
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    assert trainer.measured_peak() == state + most


def test_kept_memory_holds_what_recompute_keeps() -> None:
    """Streams at the entrances of blocks, which autograd's hooks do not see."""
    shape = argparse.Namespace(
        **{"hidden": 64, "layers": 4, "heads": 2, "ffn": 96, "seq": 32, "vocab": 23, "batch": 1, "backend": "auto"},
        **{"device": "cpu", "compile": False, "cpu_time": False},
    )
    names = ("plain", "hyper-dynamic-n4-recompute", "hyper-dynamic-n4")
    kept = [steps.trainer_of(CASES[name], shape, torch.float32).saved_bytes() for name in names]
    entrance = 4 * 32 * 64 * 4  # n [S, C] in fp32
    assert kept[0] + 3 * entrance < kept[1] < kept[2] - entrance


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--methods mhc", "--methods: mhc must be among plain"),
        ("--heads 3", "--heads .3. must divide --hidden .16."),
        ("--device cuda --cpu-time", "--cpu-time needs --device cpu"),
    ],
)
def test_bad_input(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], flags: str, message: str
) -> None:
    with pytest.raises(SystemExit):
        run(monkeypatch, flags)
    assert re.search(message, capsys.readouterr().err)


def test_a_pipeline_of_one_step_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    sys.path.insert(0, str(Path(benchmark.__file__).parent))
    pipeline = importlib.import_module("benchmark_pipeline")
    sys.path.pop(0)
    with pytest.raises(SystemExit):
        pipeline.main(["--steps", "1"])
    assert "--steps (1) must be at least 2" in capsys.readouterr().err
