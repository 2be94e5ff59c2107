"""Layouts of a world size compared: which is fastest within the memory, and why the others lose."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

from megatron_hc.config import ParallelConfig, TrainConfig
from megatron_hc.estimate.estimate import Estimate, estimate, put_together, refuse_unknown
from megatron_hc.estimate.hardware import Hardware
from megatron_hc.estimate.paper import PaperRank, stage_ranks
from megatron_hc.estimate.trace import Pass, StageTrace, trace

MICRO_BATCHES = (1, 2, 4, 8)
MAX_FINALISTS = 12  # estimated layer by layer; the rest by the layers of a small model


class Choice(NamedTuple):
    """What the search varies."""

    tp: int
    pp: int
    virtual: int
    ep: int
    micro_batch: int
    recompute: str
    """'none', 'selective' (residual, layernorm and the MLP's or experts' branch) or 'full'."""


class Result(NamedTuple):
    """One layout, and why it is not the first."""

    choice: Choice
    estimate: Estimate
    reason: str
    """"" for the best."""


def search(config: TrainConfig, hardware: Hardware, world_size: int, vocab_size: int, count: int = 8) -> list[Result]:
    """The best ``count`` layouts, best first; of those that do not fit only if fewer fit.

    Raises ``ValueError`` where no layout at all can work.
    """
    refuse_unknown(config)
    small = _SmallTraces(vocab_size)
    rough: list[tuple[Choice, TrainConfig, Estimate]] = []
    refusals: list[ValueError] = []
    for choice in choices(config, hardware, world_size):
        candidate = changed(config, choice)
        try:
            candidate.validate(world_size)
            rough.append((choice, candidate, small.estimate(candidate, hardware, world_size)))
        except ValueError as error:
            refusals.append(error)
    if not rough:  # the first of all is the simplest: its refusal is about the batch, or about no layout at all
        raise ValueError(
            f"no layout of {world_size} GPUs can train this; without tensor and pipeline parallelism: {refusals[0]}"
        ) from refusals[0]
    rough.sort(key=lambda found: _order(found[2]))
    exact = [
        (choice, estimate(candidate, hardware, world_size, vocab_size))
        for choice, candidate, _ in rough[: max(count, MAX_FINALISTS)]
    ]
    exact.sort(key=lambda found: _order(found[1]))
    best = exact[0][1]
    return [Result(choice, found, "" if found is best else why_not(found, best)) for choice, found in exact[:count]]


def _order(found: Estimate) -> tuple[bool, float, int]:
    """The fastest that fits first, of equally fast ones the one that needs less memory."""
    return not found.fits, float(f"{found.step_seconds:.4g}"), found.peak_bytes


def choices(config: TrainConfig, hardware: Hardware, world_size: int) -> Iterator[Choice]:
    """All that could work: tensor and expert blocks within a node, pipelines of at most a layer a stage."""
    model = config.model
    experts = model.moe.num_experts
    node = min(hardware.gpus_per_node, world_size)
    tps = [tp for tp in _powers(node) if model.num_attention_heads % tp == 0]
    pps = [pp for pp in _powers(world_size) if pp <= model.num_layers]
    eps = [1] if experts is None else [ep for ep in _powers(world_size) if experts % ep == 0]
    for tp, pp, ep, size, recompute in itertools.product(tps, pps, eps, MICRO_BATCHES, ("none", "selective", "full")):
        if world_size % (tp * pp) or (world_size // pp) % ep:
            continue
        for virtual in (1, 2) if pp > 1 and model.num_layers >= 2 * pp else (1,):
            yield Choice(tp, pp, virtual, ep, size, recompute)


def _powers(limit: int) -> list[int]:
    return [1 << shift for shift in range(limit.bit_length()) if 1 << shift <= limit]


def changed(config: TrainConfig, choice: Choice) -> TrainConfig:
    """The run with this layout."""
    has_experts = config.model.moe.num_experts is not None
    branch = "moe" if has_experts else "mlp"
    ways: dict[str, dict[str, Any]] = {
        "none": {"recompute_granularity": None},
        "selective": {
            "recompute_granularity": "selective",
            "recompute_modules": ("residual", "layernorm", branch),
        },
        "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
    }
    recompute = ways[choice.recompute]
    layout: dict[str, Any] = {
        "tensor_model_parallel_size": choice.tp,
        "sequence_parallel": choice.tp > 1,
        "pipeline_model_parallel_size": choice.pp,
        "num_virtual_stages_per_pipeline_rank": choice.virtual if choice.virtual > 1 else None,
        "expert_model_parallel_size": choice.ep,
        "expert_tensor_parallel_size": 1 if has_experts else None,
        "moe_token_dispatcher_type": "alltoall" if has_experts else "allgather",
        "overlap_grad_reduce": True,
        "overlap_param_gather": config.parallel.data_parallel_sharding_strategy != "no_shard",
    }
    of_others = (
        *("recompute_method", "recompute_num_layers", "recompute_modules", "residual_recompute_interval"),
        *("pipeline_schedule", "pipeline_model_parallel_layout", "num_layers_per_virtual_pipeline_stage"),
        *("decoder_first_pipeline_num_layers", "decoder_last_pipeline_num_layers"),
        *("account_for_embedding_in_pipeline_split", "account_for_loss_in_pipeline_split"),
    )
    cleared: dict[str, Any] = {name: getattr(ParallelConfig(), name) for name in of_others}
    parallel = dataclasses.replace(config.parallel, **(cleared | layout | recompute))
    training = dataclasses.replace(config.training, micro_batch_size=choice.micro_batch)
    return dataclasses.replace(config, parallel=parallel, training=training)


def why_not(found: Estimate, best: Estimate) -> str:
    """What makes a layout worse than the best one, the largest part first."""
    if not found.fits:
        return f"needs {found.peak_bytes / 1e9:.0f} GB of {found.limit_bytes / 1e9:.0f}"
    slower = {name: found.seconds[name] - best.seconds[name] for name in found.seconds}
    worst = sorted(slower, key=lambda name: -slower[name])[:2]
    words = [f"{name} +{slower[name] / best.step_seconds:.1%}" for name in worst if slower[name] > 0]
    return ", ".join(words) or "equal"


class _SmallTraces:
    """Estimates from traces of models of a few layers, which all stages of all layouts are put together from."""

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self._traces: dict[TrainConfig, StageTrace] = {}
        self._ranks: dict[tuple[TrainConfig, int, int], PaperRank] = {}

    def estimate(self, config: TrainConfig, hardware: Hardware, world_size: int) -> Estimate:
        layout = config.parallel.pipeline_layout(config.model.num_layers)
        per_layer, ends = self._traces_of(config)
        traces = [
            _sum(per_layer, last - first, ends if stage == layout.num_stages - 1 else None)
            for stage, (first, last) in enumerate(layout.bounds)
        ]
        picked = stage_ranks(config, world_size)
        ends_and_middle = {0: 0, layout.size - 1: layout.size - 1}
        ranks = [
            self._rank(config, world_size, picked[ends_and_middle.get(process, min(1, layout.size - 1))])
            for process in range(layout.size)
        ]
        return put_together(config, hardware, world_size, self.vocab_size, ranks, traces)

    def _rank(self, config: TrainConfig, world_size: int, rank: int) -> PaperRank:
        """Parameters do not depend on the batch or on recompute."""
        plain = dataclasses.replace(
            config,
            training=dataclasses.replace(config.training, micro_batch_size=1),
            parallel=dataclasses.replace(
                config.parallel,
                recompute_granularity=None,
                recompute_modules=(),
                recompute_method=None,
                recompute_num_layers=None,
            ),
        )
        key = plain, world_size, rank
        if key not in self._ranks:
            self._ranks[key] = PaperRank(plain, world_size, rank, self.vocab_size)
        return self._ranks[key]

    def _traces_of(self, config: TrainConfig) -> tuple[StageTrace, StageTrace]:
        """(one layer, the mean over dense ones and those with experts; what is not layers)."""
        model, parallel = config.model, config.parallel
        # As few ranks as hold a whole sequence and all experts.
        sharers = parallel.tensor_model_parallel_size * parallel.context_parallel_size
        world = math.lcm(sharers, parallel.expert_model_parallel_size * parallel.expert_parts)
        pattern = model.moe.has_experts(model.num_layers)
        share = sum(pattern) / len(pattern)
        one, two = (self._small(config, world, kinds) for kinds in ((share > 0,), (share > 0,) * 2))
        layer = _difference(two, one)
        ends = _difference(one, layer)
        if 0 < share < 1:
            dense = _difference(self._small(config, world, (False,)), ends)
            layer = _blend(layer, dense, share)
        return layer, ends

    def _small(self, config: TrainConfig, world: int, with_experts: tuple[bool, ...]) -> StageTrace:
        moe = dataclasses.replace(config.model.moe, moe_layer_freq=(str([*map(int, with_experts)]),))
        if not any(with_experts):
            moe = type(moe)()
        parallel = dataclasses.replace(
            config.parallel, pipeline_model_parallel_size=1, num_virtual_stages_per_pipeline_rank=None
        )
        model = dataclasses.replace(config.model, num_layers=len(with_experts), moe=moe)
        small = dataclasses.replace(config, model=model, parallel=parallel)
        # Everything grows by the same amount with every sample of a micro-batch.
        one, two = (self._traced(small, world, size) for size in (1, 2))
        return _combine(one, _difference(two, one), 1, config.training.micro_batch_size - 1)

    def _traced(self, small: TrainConfig, world: int, micro_batch_size: int) -> StageTrace:
        training = dataclasses.replace(small.training, micro_batch_size=micro_batch_size)
        key = dataclasses.replace(small, training=training)
        if key not in self._traces:
            self._traces[key] = trace(PaperRank(key, world, 0, self.vocab_size), 0)
        return self._traces[key]


def _combine(left: StageTrace, right: StageTrace, scale_left: float, scale_right: float) -> StageTrace:
    def passes(a: Pass, b: Pass) -> Pass:
        sent: Counter[tuple[str, str]] = Counter()
        for key in {*a.sent, *b.sent}:
            sent[key] = scale_left * a.sent[key] + scale_right * b.sent[key]  # type: ignore[assignment]
        peak = scale_left * a.peak_bytes + scale_right * b.peak_bytes
        return Pass(scale_left * a.flops + scale_right * b.flops, round(peak), sent)

    return StageTrace(
        round(scale_left * left.held_bytes + scale_right * right.held_bytes),
        passes(left.forward, right.forward),
        passes(left.backward, right.backward),
        passes(left.weight, right.weight),
        round(scale_left * left.waiting_bytes + scale_right * right.waiting_bytes),
    )


def _difference(left: StageTrace, right: StageTrace) -> StageTrace:
    return _combine(left, right, 1, -1)


def _blend(experts: StageTrace, dense: StageTrace, share: float) -> StageTrace:
    return _combine(experts, dense, share, 1 - share)


def _sum(layer: StageTrace, num_layers: int, ends: StageTrace | None) -> StageTrace:
    return _combine(layer, layer if ends is None else ends, num_layers, 0 if ends is None else 1)
