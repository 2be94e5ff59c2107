"""What real processes hold, send and have under way, against the same layout on paper."""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any, NamedTuple

import pool as pools
import pytest
from parity import VOCAB, Cell, RandomSamples

from megatron_hc import train
from megatron_hc.cli import parse
from megatron_hc.data.loader import build_loader
from megatron_hc.estimate.memory import data_parallel_bytes, partial_sum_bytes, state_bytes
from megatron_hc.estimate.paper import PaperRank
from megatron_hc.estimate.simulate import simulate
from megatron_hc.estimate.trace import trace
from megatron_hc.mesh import Mesh
from megatron_hc.parallel import pipeline
from megatron_hc.parallel.collectives import CountedGroup

TP2, SP = "--tensor-model-parallel-size 2", "--sequence-parallel"
LLAMA = "--position-embedding-type rope --normalization RMSNorm --swiglu --disable-bias-linear"
EXPERTS = "--num-experts 4 --moe-router-topk 2 --expert-model-parallel-size 2"
COUNTED = (
    "tp", "cp", "kv", "tp_cp", "dp", "dp_cp", "dp_cp_shard", "dp_cp_replica",
    "experts", "etp", "edp", "stage", "embedding",
)  # fmt: skip
CP2 = "--context-parallel-size 2"
PP2 = "--pipeline-model-parallel-size 2"
MANY = "--global-batch-size 16"

CELLS = {
    "tp2-sp-dp2": Cell(f"--residual-connection hyper {LLAMA}", f"{TP2} {SP}", world_size=4, precision="bf16"),
    "tp2-no-shard": Cell(
        "--residual-connection mhc --untie-embeddings-and-output-weights",
        f"{TP2} --data-parallel-sharding-strategy no_shard",
        world_size=4,
    ),
    "cp2-tp2-sp": Cell(
        f"--residual-connection hyper {LLAMA}", f"--context-parallel-size 2 {TP2} {SP}", world_size=4, precision="bf16"
    ),
    "cp2-dp2": Cell("--residual-connection mhc --group-query-attention --num-query-groups 1", CP2, world_size=4),
    "cp2-no-shard": Cell("", f"{CP2} --data-parallel-sharding-strategy no_shard", world_size=4),
    "hybrid": Cell("", "--num-distributed-optimizer-instances 2", world_size=4, precision="bf16"),
    "ep2-allgather": Cell(
        f"{EXPERTS} --residual-connection frac", "--moe-token-dispatcher-type allgather", world_size=4
    ),
    "ep2-etp2-alltoall": Cell(
        f"{EXPERTS} --moe-expert-capacity-factor 1.5 --moe-pad-expert-input-to-capacity",
        f"{TP2} {SP} --moe-token-dispatcher-type alltoall",
        world_size=4,
    ),
    "pp2-1f1b": Cell("--num-layers 4 --residual-connection attention", PP2, world_size=2, batch=MANY),
    "pp2-tp2-sp": Cell(
        f"--num-layers 4 --residual-connection hyper {LLAMA}", f"{PP2} {TP2} {SP}", world_size=4, batch=MANY
    ),
    "pp2-interleaved": Cell(
        "--num-layers 4 --value-residual learnable",
        f"{PP2} --num-virtual-stages-per-pipeline-rank 2",
        world_size=2,
        batch=MANY,
    ),
    "pp2-zbv": Cell("--num-layers 4 --residual-connection hyper", f"{PP2} --pipeline-schedule zbv", "", 2, batch=MANY),
}


class Seen(NamedTuple):
    """What one rank had."""

    parameters: int
    weights: int
    gradients: int
    optimizer: int
    passes: Counter[tuple[str, str]]
    """Sent within its groups during forward and backward passes."""
    step: Counter[tuple[str, str]]
    """Sent for sums of gradients and for new weights."""
    messages: int
    """Sent to other stages."""
    waiting: int
    """Most passes that waited for their backward pass."""


def watched_step(cell: Cell) -> Seen | None:
    """In a rank: one step with groups that count."""
    parsed = parse(cell.flags)
    mesh = pools.mesh(parsed.config, cell.world_size)
    if mesh is None:
        return None
    sent: Counter[tuple[str, str]] = Counter()
    run = train.set_up(parsed, _counted(mesh, sent))
    training = run.config.training
    loader = build_loader(
        RandomSamples(run.batches.largest, run.config.model.seq_length, run.tokenizer.vocab_size),
        run.mesh,
        micro_batch_size=training.micro_batch_size,
    )
    batches = train.weighted(loader.next(run.batches.num_micro_batches(0)), run.config, run.mesh)
    run.optimizer.begin(len(batches))
    run.model.train()
    sent.clear()
    waiting = _run_and_count(run, batches)
    passes = sent.copy()
    sent.clear()
    run.optimizer.reduce_gradients()
    reduced = sent.copy()
    gradients = _unique_bytes(
        t for slot in run.optimizer.slots for t in (slot.main_grad, slot.parameter.grad, slot.grad)
    )
    norm = run.optimizer.grad_norm()
    sent.clear()  # sums of a few numbers
    run.optimizer.step(norm, 0.0, 0.0)
    slots = run.optimizer.slots
    return Seen(
        parameters=sum(slot.parameter.numel() for slot in slots),
        weights=sum(slot.parameter.nbytes for slot in slots),
        gradients=gradients,
        optimizer=sum(
            slot.exp_avg.nbytes + slot.exp_avg_sq.nbytes + slot.is_apart * slot.master.nbytes for slot in slots
        ),
        passes=passes,
        step=reduced + sent,
        messages=run.pipeline.sent_bytes,
        waiting=waiting,
    )


def _counted(mesh: Mesh, sent: Counter[tuple[str, str]]) -> Mesh:
    import torch.distributed as dist

    groups = dict(mesh.groups)
    for name in COUNTED:
        group = mesh.group(name)
        if group is not None:
            groups[name] = CountedGroup(name, dist.get_world_size(group), dist.get_rank(group), sent, group)
    if mesh.size("cp") == 1:
        groups["dp_cp"] = groups["dp"]  # one group with two names, counted once
    return dataclasses.replace(mesh, groups=groups)


def _run_and_count(run: train.Run, batches: Any) -> int:
    """Forward and backward passes; the most that wait for their backward pass at once."""
    most, perform = 0, pipeline._Passes.perform

    def counted(passes: pipeline._Passes, action: Any) -> None:
        nonlocal most
        perform(passes, action)
        most = max(most, len(passes.roots))

    pipeline._Passes.perform = counted  # type: ignore[method-assign]
    try:
        run.pipeline.forward_backward(batches)
    finally:
        pipeline._Passes.perform = perform  # type: ignore[method-assign]
    return most


def _unique_bytes(tensors: Any) -> int:
    found = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t is not None}
    return sum(found.values())


@pytest.mark.parametrize("name", list(CELLS))
def test_on_paper(pool: pools.Pool, name: str) -> None:
    """Every rank: parameters, bytes kept for them, bytes sent by each collective and passes under way."""
    cell = CELLS[name]
    seen = [rank for rank in pool.run(watched_step, cell) if rank is not None]
    assert len(seen) == cell.world_size
    config = parse(cell.flags).config
    layout = config.parallel.pipeline_layout(config.model.num_layers)
    number = (config.training.global_batch_size or 0) // (
        config.training.micro_batch_size * config.parallel.data_parallel_size(cell.world_size)
    )
    ranks = [PaperRank(config, cell.world_size, index, VOCAB, device="cpu") for index in range(cell.world_size)]
    per_process = cell.world_size // layout.size
    traces = [trace(ranks[layout.rank_of(stage) * per_process], stage) for stage in range(layout.num_stages)]
    played = simulate(layout, number, lambda kind, stage: 1.0, [0.0] * layout.num_stages, traces)
    for index, (rank, real) in enumerate(zip(ranks, seen, strict=True)):
        state = state_bytes(rank)
        assert (sum(state.parameters.values()), state.weights) == (real.parameters, real.weights)
        assert (state.gradients, state.optimizer) == (real.gradients, real.optimizer)
        process = index // per_process
        expected: Counter[tuple[str, str]] = Counter()
        for stage in layout.stages_of(process):
            found = trace(rank, stage)
            for part in (found.forward, found.backward, found.weight):
                for key, count in part.sent.items():
                    expected[key] += number * count
        assert expected == real.passes
        reductions = data_parallel_bytes(rank)
        assert bool(reductions) == (cell.world_size > layout.size * config.parallel.tensor_model_parallel_size)
        assert real.step == reductions + partial_sum_bytes(rank)
        assert played.peak_micro_batches[process] == real.waiting
