"""One layout, whole: what ``tools/estimate.py`` prints."""

from __future__ import annotations

import dataclasses
from collections import Counter
from dataclasses import dataclass
from typing import Any

from megatron_hc.config import TrainConfig
from megatron_hc.estimate.cost import PassSeconds, Roofline, passes_of
from megatron_hc.estimate.hardware import Hardware
from megatron_hc.estimate.memory import (
    StateBytes,
    active_parameters,
    data_parallel_bytes,
    partial_sum_bytes,
    state_bytes,
    total_parameters,
)
from megatron_hc.estimate.paper import PaperRank, stage_ranks
from megatron_hc.estimate.simulate import Simulation, simulate
from megatron_hc.estimate.trace import StageTrace, trace
from megatron_hc.log import flops_per_token
from megatron_hc.parallel.pipeline import transfers_of
from megatron_hc.parallel.stages import Stage
from megatron_hc.pipeline_layout import ZERO_BUBBLE_SCHEDULES


@dataclass
class RankMemory:
    """Bytes on one process of the pipeline."""

    state: StateBytes
    activations: int
    """At the worst moment of a step."""
    held_per_micro_batch: int
    """Between forward and backward pass, over the process's stages."""

    @property
    def total(self) -> int:
        return self.state.total + self.activations


@dataclass
class Estimate:
    """What a run will need; times in seconds per step, bytes per rank."""

    config: TrainConfig
    hardware: Hardware
    world_size: int
    total: Counter[str]
    """Parameters of the whole model by part."""
    active: int
    """Parameters that a token goes through."""
    ranks: list[RankMemory]
    """By process of the pipeline."""
    seconds: dict[str, float]
    """Parts of the step's time, on the process that the others wait for; they add up to ``step_seconds``."""
    sent: dict[str, float]
    """By axis: most bytes that one rank sends in a step."""
    simulation: Simulation
    flops_per_step: float
    """As Megatron-LM counts them: without recompute and residual path."""
    num_micro_batches: int

    @property
    def total_parameters(self) -> int:
        return sum(self.total.values())

    @property
    def step_seconds(self) -> float:
        return sum(self.seconds.values())

    @property
    def mfu(self) -> float:
        return self.flops_per_step / self.world_size / self.step_seconds / (self.hardware.peak_tflops * 1e12)

    @property
    def tokens_per_step(self) -> int:
        size = self.config.training.global_batch_size
        per_step = self.config.training.micro_batch_size * self.config.parallel.data_parallel_size(self.world_size)
        return (size or per_step) * self.config.model.seq_length

    @property
    def tokens_per_second(self) -> float:
        return self.tokens_per_step / self.step_seconds

    @property
    def peak_bytes(self) -> int:
        """Of the fullest rank."""
        return max(rank.total for rank in self.ranks)

    @property
    def limit_bytes(self) -> float:
        return (self.hardware.memory_gb - self.hardware.reserved_gb) * 1e9

    @property
    def fits(self) -> bool:
        return self.peak_bytes <= self.limit_bytes


def estimate(config: TrainConfig, hardware: Hardware, world_size: int, vocab_size: int) -> Estimate:
    """Everything about one layout. Raises ``ValueError`` where the layout cannot work.

    ``vocab_size``: tokens, end-of-document included.
    """
    config.validate(world_size)
    refuse_unknown(config)
    layout = config.parallel.pipeline_layout(config.model.num_layers)
    ranks = [PaperRank(config, world_size, rank, vocab_size) for rank in stage_ranks(config, world_size)]
    traces: list[StageTrace] = [trace(ranks[layout.rank_of(stage)], stage) for stage in range(layout.num_stages)]
    return put_together(config, hardware, world_size, vocab_size, ranks, traces)


def refuse_unknown(config: TrainConfig) -> None:
    """What the estimator knows is our own sharding, and matrix products in one precision."""
    if config.zero.deepspeed:
        raise ValueError(
            "--deepspeed is not estimated: leave it out; its ZeRO-1 needs about what the default needs, its ZeRO-3 "
            "what --data-parallel-sharding-strategy optim_grads_params needs"
        )
    if config.backends.fp8_format is not None:
        raise ValueError(
            f"--fp8-format {config.backends.fp8_format} is not estimated: leave it out; without it the figures are "
            "those of bf16"
        )


def put_together(
    config: TrainConfig,
    hardware: Hardware,
    world_size: int,
    vocab_size: int,
    ranks: list[PaperRank],
    traces: list[StageTrace],
) -> Estimate:
    """From what each stage does in one micro-batch to a step."""
    layout = config.parallel.pipeline_layout(config.model.num_layers)
    roofline = Roofline(config, hardware, world_size)
    dp = config.parallel.data_parallel_size(world_size)
    number = (config.training.global_batch_size or config.training.micro_batch_size * dp) // (
        config.training.micro_batch_size * dp
    )
    tp = config.parallel.tensor_model_parallel_size
    entrances = [Stage.entrance_of(config, layout, stage, tp) for stage in range(layout.num_stages)]
    crossing_bytes = [sum(c.num_bytes for c in t.received) for t in transfers_of(layout, entrances)]
    has_weights = layout.schedule in ZERO_BUBBLE_SCHEDULES
    times: dict[tuple[str, int], PassSeconds] = {}
    for stage, found in enumerate(traces):
        for kind, part in passes_of(found, has_weights).items():
            rank = ranks[layout.rank_of(stage)]
            times[kind, stage] = roofline.pass_seconds(rank, layout.bounds[stage], part, kind)
    simulation = simulate(
        layout,
        number,
        lambda kind, stage: times[kind, stage].total,
        [roofline.message_seconds(count) for count in crossing_bytes],
        traces,
    )
    states = [state_bytes(rank) for rank in ranks]
    memory = [
        RankMemory(
            state,
            simulation.peak_bytes[process],
            sum(traces[stage].held_bytes for stage in layout.stages_of(process)),
        )
        for process, state in enumerate(states)
    ]
    slowest = max(range(layout.size), key=lambda process: simulation.busy[process])
    seconds = _parts(layout.stages_of(slowest), times, number, has_weights)
    seconds["bubble"] = simulation.seconds - sum(seconds.values())
    seconds |= _outside(config, roofline, ranks, states, times, layout)
    total = total_parameters(config, vocab_size)
    flops = flops_per_token(config.model, vocab_size) * config.model.seq_length
    return Estimate(
        config=config,
        hardware=hardware,
        world_size=world_size,
        total=total,
        active=active_parameters(config, total),
        ranks=memory,
        seconds=seconds,
        sent=_sent(ranks, traces, layout, number, crossing_bytes),
        simulation=simulation,
        flops_per_step=flops * (config.training.global_batch_size or config.training.micro_batch_size * dp),
        num_micro_batches=number,
    )


def _parts(
    stages: tuple[int, ...], times: dict[tuple[str, int], PassSeconds], number: int, has_weights: bool
) -> dict[str, float]:
    """Seconds of one process's passes in a step, part by part."""
    kinds = ("forward", "backward_input", "backward_weight") if has_weights else ("forward", "backward")
    found = dict.fromkeys((field.name for field in dataclasses.fields(PassSeconds)), 0.0)
    for stage in stages:
        for kind in kinds:
            for name in found:
                found[name] += number * getattr(times[kind, stage], name)
    return found


def _outside(
    config: TrainConfig,
    roofline: Roofline,
    ranks: list[PaperRank],
    states: list[StateBytes],
    times: dict[tuple[str, int], PassSeconds],
    layout: Any,
) -> dict[str, float]:
    """Seconds of reductions over data-parallel ranks and of the optimizer, on the slowest process."""
    parallel, worst = config.parallel, {"data": 0.0, "optimizer": 0.0}
    for process, (rank, state) in enumerate(zip(ranks, states, strict=True)):
        reduce = gather = 0.0
        for (group, kind), count in data_parallel_bytes(rank).items():
            seconds = count / roofline.bandwidth(group, rank)
            gather, reduce = (gather + seconds, reduce) if kind == "all_gather" else (gather, reduce + seconds)
        own = layout.stages_of(process)
        if parallel.overlap_grad_reduce:
            reduce = max(
                0.0, reduce - sum(times[kind, s].total for kind, s in times if kind == "backward" and s in own)
            )
        if parallel.overlap_param_gather:
            gather = max(0.0, gather - sum(times[kind, s].total for kind, s in times if kind == "forward" and s in own))
        # Behind the last reduction, so that nothing hides them.
        sums = sum(count / roofline.bandwidth(group, rank) for (group, _), count in partial_sum_bytes(rank).items())
        worst["data"] = max(worst["data"], reduce + sums + gather)
        worst["optimizer"] = max(worst["optimizer"], roofline.optimizer_seconds(state))
    return worst


def _sent(
    ranks: list[PaperRank], traces: list[StageTrace], layout: Any, number: int, crossing_bytes: list[int]
) -> dict[str, float]:
    """Bytes that the busiest rank sends in a step, by axis."""
    found: dict[str, float] = {}
    for process, rank in enumerate(ranks):
        own: Counter[str] = Counter()
        for stage in layout.stages_of(process):
            for part in (traces[stage].forward, traces[stage].backward, traces[stage].weight):
                for (group, _), count in part.sent.items():
                    own[group] += number * count
            # Forth into the next stage, gradients back into the one before.
            if stage + 1 < layout.num_stages and layout.rank_of(stage + 1) != process:
                own["pp"] += number * crossing_bytes[stage + 1]
            if stage > 0 and layout.rank_of(stage - 1) != process:
                own["pp"] += number * crossing_bytes[stage]
        for (group, _), count in (data_parallel_bytes(rank) + partial_sum_bytes(rank)).items():
            own[group] += count
        for group, count in own.items():
            found[group] = max(found.get(group, 0.0), count)
    return found
