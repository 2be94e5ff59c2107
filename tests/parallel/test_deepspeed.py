"""DeepSpeed gives the numbers of one process, and its checkpoints are everybody's. On the CPU, in gloo processes.

DeepSpeed's master weights are fp32, so parity is in fp32; where it sums in the same order as our own ZeRO-1, the bits
are the same.
"""

from __future__ import annotations

import functools
import importlib.util
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from parity import (
    MODEL,
    PRECISION,
    RUN,
    TOLERANCES,
    Cell,
    Outcome,
    RandomSamples,
    Runs,
    assembled,
    differences,
    run_cell,
)
from pool import Pool, mesh
from processes import ROOT, TINY, Processes
from test_checkpoint_layouts import same_but_layout, train_and_save

from megatron_hc import checkpoint, train
from megatron_hc.cli import parse
from megatron_hc.data.loader import build_loader
from megatron_hc.launch import TrainingStopped
from megatron_hc.residual import RESIDUALS

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None,
    reason="DeepSpeed is not installed: pip install 'megatron_hc[deepspeed]'",
)

LLAMA = "--position-embedding-type rope --normalization RMSNorm --swiglu --disable-bias-linear --hidden-dropout 0"
MODELS = {
    "plain": "--untie-embeddings-and-output-weights",
    "hyper": f"{LLAMA} --residual-connection hyper",
    "mhc": f"{LLAMA} --residual-connection mhc --group-query-attention --num-query-groups 1",
    "value residual": f"{LLAMA} --value-residual learnable --qk-layernorm",
    "experts": f"{LLAMA} --num-experts 4 --moe-router-topk 2 --moe-aux-loss-coeff 0.3 --moe-ffn-hidden-size 8",
}
# A small rate: where a gradient is rounding errors, Adam makes whole steps of them.
RATE = "--lr 1e-4"
TP2 = "--tensor-model-parallel-size 2 --sequence-parallel"


@pytest.fixture(scope="module")
def pair() -> Iterator[Runs]:
    """Two ranks of their own: DeepSpeed has all processes meet, used or not."""
    pool = Pool(size=2)
    yield Runs(pool)
    pool.close()


@pytest.fixture(scope="module")
def partitioned(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A file with which stage 3 keeps nothing whole: by default it spares parameters of up to 100,000 elements."""
    return written(tmp_path_factory, stage3_param_persistence_threshold=0)


@pytest.fixture(scope="module")
def offloaded(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Optimizer in CPU memory, updated by torch's AdamW: DeepSpeed's own would be compiled first."""
    torch_adam = {"optimizer": {"type": "AdamW", "params": {"torch_adam": True}}}
    return written(tmp_path_factory, torch_adam, offload_optimizer={"device": "cpu"})


def written(factory: pytest.TempPathFactory, content: dict[str, Any] | None = None, **zero: Any) -> str:
    file = factory.mktemp("deepspeed") / "config.json"
    file.write_text(json.dumps({**(content or {}), "zero_optimization": {"stage": "auto", **zero}}))
    return f"--deepspeed --deepspeed_config {file}"


def cases(first: int, stages: tuple[int, ...]) -> list[Any]:
    """Every model at every stage; by default each at one, in turns."""
    return [
        pytest.param(model, stage, marks=[] if stage == stages[(index + first) % len(stages)] else pytest.mark.slow)
        for index, model in enumerate(MODELS)
        for stage in stages
    ]


@pytest.mark.parametrize(("model", "stage"), cases(2, (1, 2, 3)))
def test_two_data_parallel_ranks(pair: Runs, partitioned: str, model: str, stage: int) -> None:
    pair.check(Cell(f"{MODELS[model]} {RATE}", f"{partitioned} --zero-stage {stage}", "", 2, "fp32"))


@pytest.mark.parametrize(
    "method", [name if name == "muddformer" else pytest.param(name, marks=pytest.mark.slow) for name in RESIDUALS]
)
def test_every_method_at_stage_three(pair: Runs, partitioned: str, method: str) -> None:
    """Where a module's wide parameters are no parameters of it any more, but attributes."""
    model = f"--num-layers 3 --residual-connection {method} --norm-epsilon 0.1 {RATE}"
    pair.check(Cell(model, f"{partitioned} --zero-stage 3", "", 2, "fp32", num_steps=2))


@pytest.mark.parametrize(("model", "stage"), cases(0, (1, 2)))
def test_tensor_and_data_parallel_ranks(runs: Runs, partitioned: str, model: str, stage: int) -> None:
    """With sequence parallelism, where gradients of norms and residual methods are partial sums."""
    runs.check(Cell(f"{MODELS[model]} {RATE}", f"{TP2} {partitioned} --zero-stage {stage}", "", 4, "fp32"))


@pytest.mark.parametrize(
    "model", [name if name == "mhc" else pytest.param(name, marks=pytest.mark.slow) for name in MODELS]
)
def test_tensor_parallel_ranks_alone(pair: Runs, partitioned: str, model: str) -> None:
    """One copy of the model: DeepSpeed's data-parallel groups are of one process."""
    pair.check(Cell(f"{MODELS[model]} {RATE}", f"{TP2} {partitioned} --zero-stage 3", "", 2, "fp32"))


RECOMPUTE = {
    "full": "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1",
    "selective": "--recompute-granularity selective --recompute-modules core_attn mlp layernorm residual",
}


SETTINGS: dict[str, dict[str, Any]] = {
    "small buckets": {"reduce_bucket_size": 200, "allgather_bucket_size": 200, "overlap_comm": True},
    "one by one": {"contiguous_gradients": False, "use_multi_rank_bucket_allreduce": False},
    "all-reduce": {"reduce_scatter": False},
    "aligned": {"parameter_alignment": True},
    "small groups": {"sub_group_size": 200, "stage3_prefetch_bucket_size": 0},
    "nothing ahead": {"stage3_max_live_parameters": 0, "stage3_max_reuse_distance": 0},
    "fetched by all-reduce": {"stage3_use_all_reduce_for_fetch_params": True, "memory_efficient_linear": False},
    "fetched in turn": {"stage3_allgather_sequential": True},
}


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("chosen", SETTINGS)
def test_what_the_file_alone_says(
    pair: Runs, tmp_path_factory: pytest.TempPathFactory, chosen: str, stage: int
) -> None:
    settings = {"stage3_param_persistence_threshold": 0, **SETTINGS[chosen]}
    layout = f"{written(tmp_path_factory, **settings)} --zero-stage {stage}"
    pair.check(Cell(f"{MODELS['mhc']} {RATE}", layout, "", 2, "fp32"))
    narrow = pair.differences(Cell(f"{MODELS['mhc']} {RATE}", layout, "", 2, "bf16"))
    assert not narrow, "\n".join(narrow)


@pytest.mark.slow
@pytest.mark.parametrize(("world_size", "layout"), [(4, TP2), (4, ""), (3, "")], ids=["tp2 x dp2", "dp4", "dp3"])
def test_more_ranks(partitioned: str, world_size: int, layout: str) -> None:
    """Stage 3 beside tensor parallelism, ranks that have nothing of a small parameter, runs that begin within a row."""
    pool = Pool(size=world_size)
    try:
        runs = Runs(pool)
        for stage, model in itertools.product((1, 2, 3), MODELS):
            batch = "--micro-batch-size 2 --global-batch-size 24"
            flags = f"{layout} {partitioned} --zero-stage {stage}"
            runs.check(Cell(f"{MODELS[model]} {RATE}", flags, "", world_size, "fp32", batch=batch))
    finally:
        pool.close()


@pytest.mark.parametrize("stage", [pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow), 3])
@pytest.mark.parametrize("recompute", ["full", pytest.param("selective", marks=pytest.mark.slow)])
def test_recompute(pair: Runs, partitioned: str, stage: int, recompute: str) -> None:
    layout = f"{partitioned} --zero-stage {stage}"
    pair.check(Cell(f"{MODELS['hyper']} {RATE}", layout, RECOMPUTE[recompute], 2, "fp32"))


@pytest.mark.parametrize("stage", [pytest.param(1, marks=pytest.mark.slow), 2, 3])
def test_offloaded_optimizer(pair: Runs, offloaded: str, stage: int) -> None:
    pair.check(Cell(f"{MODELS['hyper']} {RATE}", f"{offloaded} --zero-stage {stage}", "", 2, "fp32"))


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_offloaded_optimizer_by_deepspeed_s_adam(pair: Runs, stage: int) -> None:
    """Its first use compiles it."""
    layout = f"--deepspeed --optimizer-cpu-offload --zero-stage {stage}"
    cell = Cell(f"{MODELS['hyper']} {RATE}", layout, "", 2, "fp32")
    found = pair.pool.run(run_cell, cell, timeout_s=600)
    whole = pair.whole(cell)
    assert not differences(assembled([rank for rank in found if rank is not None]), whole, TOLERANCES["fp32"])


@pytest.mark.slow
def test_offloaded_parameters(pair: Runs, tmp_path_factory: pytest.TempPathFactory) -> None:
    torch_adam = {"optimizer": {"type": "AdamW", "params": {"torch_adam": True}}}
    cpu = {"device": "cpu", "pin_memory": False}
    layout = written(
        tmp_path_factory, torch_adam, offload_param=cpu, offload_optimizer=cpu, stage3_param_persistence_threshold=0
    )
    pair.check(Cell(f"{MODELS['mhc']} {RATE}", f"{layout} --zero-stage 3", "", 2, "fp32"))


@pytest.mark.slow
def test_compiled_layers(pair: Runs) -> None:
    cell = Cell(f"{MODELS['hyper']} {RATE}", "--deepspeed --zero-stage 2", "--compile", 2, "fp32")
    found = pair.pool.run(run_cell, cell, timeout_s=600)
    assert not differences(assembled(found), pair.whole(cell), TOLERANCES["fp32"])


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_the_same_bits_as_our_own_zero_1(pair: Runs, tmp_path_factory: pytest.TempPathFactory, stage: int) -> None:
    """In bf16, with norms and residual parameters in fp32, and biases, which do not decay.

    One micro-batch: with more, stages 2 and 3 add up ranks first. Sizes are multiples of 16, so that wherever a run is
    cut, torch's AdamW has no rest, which it would round in another way than what fills a vector register. DeepSpeed's
    linear layers, which round a product before they add the bias, are left out.
    """
    file = written(tmp_path_factory, stage3_param_persistence_threshold=0, memory_efficient_linear=False)
    sizes = "--hidden-size 32 --ffn-hidden-size 64 --max-position-embeddings 16"
    batch = "--micro-batch-size 2 --global-batch-size 4"
    cell = Cell(f"{sizes} --residual-connection mhc --clip-grad 0 --weight-decay 0.1", "", "", 2, "bf16", batch=batch)
    ours = pair.outcome(cell)
    theirs = pair.outcome(replace(cell, layout=f"{file} --zero-stage {stage}"))
    assert theirs.losses == ours.losses
    for mine, other in zip(theirs.gradients, ours.gradients, strict=True):
        assert mine.keys() == other.keys()
        assert not [name for name in mine if (mine[name].low != other[name].low).any()]


# ---- checkpoints ----

BEFORE, AFTER = 2, 2  # steps before the save, and after it
LAYOUTS = {
    "zero-1": "--deepspeed --zero-stage 1",
    "zero-2": "--deepspeed --zero-stage 2",
    "zero-3": "--deepspeed --zero-stage 3",
    "tp2": TP2,
    "dp2": "",
}


def flags_of(layout: str, precision: str, partitioned: str) -> list[str]:
    layout = LAYOUTS[layout].replace("--deepspeed", partitioned)
    parts = (MODEL, RUN, PRECISION[precision], MODELS["mhc"], RATE, layout, f"--train-iters {BEFORE + AFTER}")
    return " ".join(parts).replace("--lr 1e-2", "").split()


def outcome_of(pair: Runs, flags: list[str], steps: int, world_size: int = 2) -> Outcome:
    found = pair.pool.run(train_and_save, flags, world_size, steps)
    return assembled([rank for rank in found if rank is not None])


PAIRS = [("zero-3", "tp2"), ("tp2", "zero-2"), ("dp2", "zero-3"), ("zero-1", "dp2"), ("zero-2", "zero-3")]


@pytest.fixture(scope="module")
def unbroken(pair: Runs) -> Callable[[str], Outcome]:
    """Precision -> the run without a break, on our own ZeRO-1."""

    @functools.cache
    def found(precision: str) -> Outcome:
        return outcome_of(pair, flags_of("dp2", precision, ""), BEFORE + AFTER)

    return found


@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("source", "target"),
    [pair if pair in PAIRS[:2] else pytest.param(*pair, marks=pytest.mark.slow) for pair in PAIRS],
)
def test_checkpoints(
    pair: Runs,
    partitioned: str,
    unbroken: Callable[[str], Outcome],
    tmp_path: Path,
    source: str,
    target: str,
    precision: str,
) -> None:
    """What was loaded is the same bit for bit (it is saved again at once), and the run goes on as without a break."""

    def flags(layout: str, name: str, *load: str) -> list[str]:
        return [*flags_of(layout, precision, partitioned), "--save", str(tmp_path / name), *load]

    outcome_of(pair, flags(source, "half"), BEFORE)
    load = "--load", str(tmp_path / "half"), "--exit-on-missing-checkpoint"
    outcome_of(pair, flags(target, "again", *load), 0)
    same_but_layout(tmp_path / "half", tmp_path / "again")
    more = outcome_of(pair, flags(target, "more", *load), AFTER)
    found = differences(more, unbroken(precision).after(BEFORE), TOLERANCES[precision])
    assert not found, "\n".join(found[:20])


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_batch_that_grows(pair: Runs, partitioned: str, stage: int) -> None:
    """Another number of micro-batches at every step, which DeepSpeed's own counter does not know."""
    batch = "--micro-batch-size 2 --global-batch-size 12 --rampup-batch-size 4 4 8 --train-samples 48"
    flags = Cell(f"{MODELS['plain']} {RATE}", precision="fp32", batch=batch).flags
    first = flags.index("--train-iters")
    del flags[first : first + 2]
    whole = outcome_of(pair, flags, 3, world_size=1)
    got = outcome_of(pair, [*flags, *partitioned.split(), "--zero-stage", str(stage)], 3)
    assert not differences(got, whole, TOLERANCES["fp32"])


@pytest.mark.parametrize("stage", ["zero-1", "zero-2", "zero-3"])
def test_weights_and_moments(pair: Runs, partitioned: str, tmp_path: Path, stage: str) -> None:
    """After several clipped steps they are those of our own ZeRO-1; losses and gradients would hardly show a moment."""
    for layout in ("dp2", stage):
        outcome_of(pair, [*flags_of(layout, "fp32", partitioned), "--save", str(tmp_path / layout)], BEFORE + AFTER)
    tolerance = TOLERANCES["fp32"]
    with (
        checkpoint.Reader(checkpoint.find(tmp_path / "dp2")) as ours,
        checkpoint.Reader(checkpoint.find(tmp_path / stage)) as theirs,
    ):
        assert ours.shapes == theirs.shapes
        for kind in ("model.", "optimizer.exp_avg.", "optimizer.exp_avg_sq."):
            names = [name for name in ours.shapes if name.startswith(kind)]
            norms = {name: float(ours.read(name).norm()) for name in names}
            whole = sum(norm**2 for norm in norms.values()) ** 0.5
            for name in names:
                error = float((ours.read(name) - theirs.read(name)).norm())
                assert error <= tolerance.gradient * max(norms[name], tolerance.smallest * whole), name


# ---- checks of the trainer ----


def poisoned_step(flags: list[str]) -> str | None:
    """In a rank: a step with one weight that is not a number."""
    parsed = parse(flags)
    run = train.set_up(parsed, mesh(parsed.config, 2))
    for slot in run.optimizer.slots[-1:]:
        slot.master.fill_(float("nan"))
    run.optimizer.update_parameters()
    loader = build_loader(RandomSamples(32, 8, run.tokenizer.vocab_size), run.mesh, micro_batch_size=2)
    try:
        train.train_step(run, loader)
    except TrainingStopped as error:
        return str(error)
    return None


def test_a_number_that_is_not_finite_stops_the_run(pair: Runs) -> None:
    cell = Cell(MODELS["hyper"], "--deepspeed --zero-stage 2", world_size=2, precision="fp32")
    for message in pair.pool.run(poisoned_step, cell.flags):
        assert message is not None and "at iteration 1 are not both finite" in message


def come_apart(flags: list[str]) -> str | None:
    """In a rank: the second one's copy of a weight changes behind everybody's back."""
    parsed = parse([*flags, "--check-weight-hash-across-dp-replicas-interval", "1"])
    run = train.set_up(parsed, mesh(parsed.config, 2))
    loader = build_loader(RandomSamples(32, 8, run.tokenizer.vocab_size), run.mesh, micro_batch_size=2)
    train.train_step(run, loader)  # all is well
    if run.mesh.world_rank == 1:
        with torch.no_grad():
            run.optimizer.slots[-1].parameter.view(-1)[0] += 1
    try:
        train.check_replicas(run)
    except TrainingStopped as error:
        return str(error)
    return None


def test_copies_that_come_apart_stop_the_run(pair: Runs) -> None:
    cell = Cell(MODELS["hyper"], "--deepspeed --zero-stage 2", world_size=2, precision="fp32")
    for message in pair.pool.run(come_apart, cell.flags):
        assert message is not None and "copies of the weights came apart" in message


# ---- whole runs ----


def as_a_slurm_step(rank: int) -> None:
    """In a process before its run: srun's variables in the place of torchrun's."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        del os.environ[name]
    step = {"STEP_ID": 0, "PROCID": rank, "LOCALID": rank, "STEP_NUM_TASKS": 2, "STEP_NODELIST": "localhost"}
    os.environ.update({f"SLURM_{name}": str(value) for name, value in step.items()})


@pytest.mark.parametrize(
    ("size", "fault"),
    [(1, None), (2, as_a_slurm_step), pytest.param(2, None, marks=pytest.mark.slow)],
    ids=["one process", "Slurm", "torchrun"],
)
def test_whole_runs(tmp_path: Path, size: int, fault: Callable[[int], None] | None) -> None:
    """Trains, evaluates, shows residual statistics, saves, and goes on without DeepSpeed."""
    argv = f"{TINY} --residual-connection hyper --log-residual-stats 1 --eval-iters 1 --eval-interval 2 --train-iters"
    save = f"--save {tmp_path / 'save'} --load {tmp_path / 'save'}"
    with Processes(size, f"{argv} 2 {save} --deepspeed --zero-stage 3", tmp_path / "first", fault) as run:
        assert run.wait(120) == [0] * size, run.output()
        assert "iteration        2/       2" in run.output()
        assert fault is None or "2 processes by Slurm" in run.output()
    with Processes(size, f"{argv} 3 {save} --exit-on-missing-checkpoint", tmp_path / "second", fault) as run:
        assert run.wait(120) == [0] * size, run.output()
        assert "iteration        3/       3" in run.output()


@pytest.mark.slow
def test_reports(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    reports = {"steps_per_print": 1, "wall_clock_breakdown": True, "memory_breakdown": True, "dump_state": True}
    file = written(tmp_path_factory, reports)
    with Processes(2, f"{TINY} --train-iters 2 {file} --zero-stage 2", tmp_path) as run:
        assert run.wait(120) == [0, 0], run.output()
        assert "step=2" in run.output() and "fwd" in run.output()
    with Processes(2, f"{TINY} --train-iters 2 --deepspeed --zero-stage 2", tmp_path / "quiet") as run:
        assert run.wait(120) == [0, 0], run.output()
        assert "[INFO] [engine" not in run.output()


@pytest.mark.slow
def test_the_deepspeed_launcher(tmp_path: Path) -> None:
    command = [
        *(str(Path(sys.executable).with_name("deepspeed")), "--num_accelerators", "2", "--master_port", "29533"),
        *(str(ROOT / "pretrain_gpt.py"), *TINY.split(), "--train-iters", "2", "--deepspeed", "--zero-stage", "2"),
    ]
    environment = {"DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    found = subprocess.run(
        command, env={**os.environ, **environment}, capture_output=True, text=True, timeout=180, cwd=tmp_path
    )
    assert found.returncode == 0, found.stdout + found.stderr
    assert "2 processes by the environment" in found.stdout
    assert "iteration        2/       2" in found.stdout
