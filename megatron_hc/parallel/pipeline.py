"""Forward and backward passes of a global batch over pipeline stages. One process is a pipeline of one stage.

``schedules.py`` says what a process does in which order, ``stages.py`` what a stage computes and what crosses into it.
Here it is done: every process walks through its own list of actions. Messages go tensor by tensor, in the order of the
boundary; buffers exist from the moment a message is due. A tensor that this process already holds from an earlier
stage (virtual stages, the turn of a V) is not sent again: the stage takes the copy, and its gradient goes straight to
the stage it came from.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from megatron_hc.config import TrainConfig
from megatron_hc.mesh import Mesh
from megatron_hc.model.gpt import GPT
from megatron_hc.parallel.collectives import all_reduce
from megatron_hc.parallel.schedules import Action, Schedule, forward_schedule, training_schedule
from megatron_hc.parallel.stages import (
    Crossing,
    Measure,
    MicroBatch,
    Stage,
    WaitingWeights,
    WeightGradient,
    loss_dtype,
    weighted_loss,
)
from megatron_hc.pipeline_layout import ZERO_BUBBLE_SCHEDULES, PipelineLayout

__all__ = ["MicroBatch", "Pipeline", "Transfer", "declared_bytes", "transfers_of"]

MAX_SENDS = 8  # sends on their way: more would hold the memory of ever more boundaries


class Transfer(NamedTuple):
    """How the inputs of one stage get there."""

    received: tuple[Crossing, ...] = ()
    """Sent by the stage before it."""
    kept: tuple[tuple[Crossing, int], ...] = ()
    """(what, the earlier stage of the same process whose output it was)."""


def transfers_of(layout: PipelineLayout, entrances: Sequence[tuple[Crossing, ...]]) -> list[Transfer]:
    """For every stage; ``entrances``: what crosses into each, none into the first."""
    transfers = [Transfer()]
    for stage in range(1, layout.num_stages):
        received, kept = [], []
        earlier = [other for other in layout.stages_of(layout.rank_of(stage)) if other < stage]
        for crossing in entrances[stage]:
            names = {other: {output.name for output in entrances[other + 1]} for other in earlier}
            holders = [other for other in earlier if crossing.name in names[other]]
            if holders:
                kept.append((crossing, holders[-1]))
            else:
                received.append(crossing)
        transfers.append(Transfer(tuple(received), tuple(kept)))
    return transfers


class Pipeline:
    """Runs micro-batches through the stages of which this process's ``model`` is a part."""

    def __init__(self, model: GPT, config: TrainConfig, mesh: Mesh, *, trains: bool = True) -> None:
        """``trains`` false: forward passes only, beside the pipeline that trains the same model."""
        self.model, self.config, self.mesh = model, config, mesh
        self.layout = config.parallel.pipeline_layout(config.model.num_layers)
        assert self.layout.size == mesh.size("pp"), "the mesh is of another configuration"
        self.rank, self.group = mesh.rank("pp"), mesh.group("pp")
        own = self.layout.stages_of(self.rank)
        self.stages = {index: Stage(model, index, self.layout, config, mesh) for index in own}
        tp = mesh.size("tp")
        entrances = [Stage.entrance_of(config, self.layout, stage, tp) for stage in range(self.layout.num_stages)]
        self.transfers = transfers_of(self.layout, entrances)
        self.waiting = WaitingWeights()
        if trains and self.layout.schedule in ZERO_BUBBLE_SCHEDULES:
            self.waiting.serve(model.layers.modules())
        self.sent_bytes = 0
        """Bytes this process has sent to other stages so far."""
        self._schedules: dict[tuple[int, bool], Schedule] = {}
        self._busy = self._total = 0.0
        self._ideal_bubble = 0.0
        self._worked, self._steps = 0.0, 0

    def forward_backward(self, micro_batches: Sequence[MicroBatch]) -> Tensor:
        """Accumulate the gradients of the step's loss; returns each micro-batch's share of it, [micro-batches].

        The losses are the same on every stage. Raises ``ValueError`` where a micro-batch has another shape than the
        boundaries.
        """
        return self._run(micro_batches, has_backward=True)

    @torch.no_grad()
    def forward(self, micro_batches: Sequence[MicroBatch]) -> Tensor:
        """Each micro-batch's share of the loss, [micro-batches], without gradients."""
        return self._run(micro_batches, has_backward=False)

    @torch.no_grad()
    def measure(self, micro_batches: Sequence[MicroBatch], measure: Measure, shape: tuple[int, ...]) -> Tensor:
        """What ``measure`` makes of each micro-batch on the last stage, [micro-batches, *shape] in float64.

        The same on every stage; no gradients.
        """
        last = [stage for stage in self.stages.values() if stage.is_last]
        for stage in last:
            stage.measure = measure
        try:
            return self._run(micro_batches, has_backward=False, shape=shape)
        finally:
            for stage in last:
                stage.measure = weighted_loss

    def bubble(self) -> tuple[float, float]:
        """(share of the time that processes waited since the last call, the least share by ``Schedule.bubble``).

        Of training steps only, the mean over the pipeline's processes, which call together.
        """
        waited = torch.tensor(1 - self._busy / self._total if self._total else 0.0, device=self.mesh.device)
        self._busy = self._total = 0.0
        return float(all_reduce(waited, self.group)) / self.layout.size, self._ideal_bubble

    def work(self) -> tuple[float, int]:
        """(seconds of this process in forward and backward passes since the last call, training steps since then)."""
        found, self._worked, self._steps = (self._worked, self._steps), 0.0, 0
        return found

    def schedule(self, num_micro_batches: int, has_backward: bool) -> Schedule:
        """Made once for every number of micro-batches."""
        key = num_micro_batches, has_backward
        if key not in self._schedules:
            make = training_schedule if has_backward else forward_schedule
            self._schedules[key] = make(self.layout, num_micro_batches)
        return self._schedules[key]

    def _run(
        self, micro_batches: Sequence[MicroBatch], has_backward: bool, shape: tuple[int, ...] | None = None
    ) -> Tensor:
        """The loss of each micro-batch; with a ``shape``, what the last stage measures instead."""
        if self.layout.num_stages > 1:
            self._check(micro_batches)
        schedule = self.schedule(len(micro_batches), has_backward)
        passes = _Passes(self, micro_batches, has_backward)
        started = time.perf_counter()
        for action in schedule.actions[self.rank]:
            passes.perform(action)
        passes.finish()
        if has_backward and (self.layout.num_stages > 1 or self.config.logging.log_straggler):
            self._ideal_bubble = schedule.bubble
            busy = passes.busy_seconds()
            self._busy, self._worked, self._steps = self._busy + busy, self._worked + busy, self._steps + 1
            self._total += time.perf_counter() - started
        dtype = loss_dtype(self.config) if shape is None else torch.float64
        losses = torch.zeros(len(micro_batches), *(shape or ()), dtype=dtype, device=self.mesh.device)
        for index, loss in passes.losses.items():
            losses[index] = loss
        return all_reduce(losses, self.group)

    def _check(self, micro_batches: Sequence[MicroBatch]) -> None:
        expected = (self.config.training.micro_batch_size, self.config.model.seq_length)
        for index, batch in enumerate(micro_batches):
            if tuple(batch.tokens.shape) != expected:
                raise ValueError(
                    f"micro-batch {index} is {tuple(batch.tokens.shape)}, but pipeline stages exchange tensors for "
                    f"--micro-batch-size ({expected[0]}) samples of --seq-length ({expected[1]}) tokens"
                )


def declared_bytes(pipeline: Pipeline) -> int:
    """Bytes that all stages together send for one micro-batch, there and back, by what is declared to cross."""
    return 2 * sum(crossing.num_bytes for transfer in pipeline.transfers for crossing in transfer.received)


Key = tuple[int, int]  # stage, micro-batch


@dataclass
class _Message:
    """Tensors on their way to this process."""

    tensors: dict[str, Tensor]
    works: list[Any]

    def wait(self) -> dict[str, Tensor]:
        for work in self.works:
            work.wait()
        return self.tensors


@dataclass
class _Passes:
    """One walk through the schedule: what is under way between its actions."""

    pipeline: Pipeline
    micro_batches: Sequence[MicroBatch]
    has_backward: bool
    losses: dict[int, Tensor] = field(default_factory=dict)
    arriving: dict[tuple[str, int, int], _Message] = field(default_factory=dict)
    leaving: dict[tuple[str, int, int], list[Tensor]] = field(default_factory=dict)
    inputs: dict[Key, dict[str, Tensor]] = field(default_factory=dict)
    """Leaves of the stages' graphs."""
    roots: dict[Key, dict[str, GradientEdge]] = field(default_factory=dict)
    """Where backward passes start. Not the outputs themselves: a stage that has sent one does not need it any more."""
    kept: dict[Key, dict[str, Tensor]] = field(default_factory=dict)
    """Outputs that later stages of this process take."""
    gradients: dict[Key, dict[str, Tensor]] = field(default_factory=dict)
    """Of outputs, from later stages of this process."""
    weights: dict[Key, list[WeightGradient]] = field(default_factory=dict)
    sends: deque[tuple[list[Any], list[Tensor]]] = field(default_factory=deque)
    times: list[tuple[Any, Any]] = field(default_factory=list)

    def perform(self, action: Action) -> None:
        kind, stage, index = action
        if kind.startswith(("send", "receive")):
            getattr(self, kind)(stage, index)
            return
        with torch.profiler.record_function(f"{kind} of stage {stage}, micro-batch {index}"):
            message = self._await(kind, stage, index)
            start = self._now()
            getattr(self, kind)(stage, index, message)
            self.times.append((start, self._now()))

    # ---- passes ----

    def forward(self, stage: int, index: int, received: dict[str, Tensor]) -> None:
        transfer, part = self.pipeline.transfers[stage], self.pipeline.stages[stage]
        for crossing, holder in transfer.kept:
            received[crossing.name] = self.kept[holder, index][crossing.name]
        inputs = {
            crossing.name: received[crossing.name].detach().requires_grad_(self.has_backward)
            for crossing in part.entrance
        }
        outputs = part.forward(self.micro_batches[index], list(inputs.values()))
        names = ["loss"] if part.is_last else [crossing.name for crossing in part.exit]
        if self.has_backward:
            self.inputs[stage, index] = inputs
            self.roots[stage, index] = {
                name: get_gradient_edge(output)
                for name, output in zip(names, outputs, strict=True)
                if output.requires_grad
            }
        if part.is_last:
            self.losses[index] = outputs[0].detach()
            return
        data = {name: output.detach().contiguous() for name, output in zip(names, outputs, strict=True)}
        self.kept[stage, index] = data
        if self.pipeline.layout.rank_of(stage + 1) != self.pipeline.rank:
            wanted = self.pipeline.transfers[stage + 1].received
            self.leaving["send_forward", stage, index] = [data[crossing.name] for crossing in wanted]
        self._forget(stage, index)

    def _forget(self, stage: int, index: int) -> None:
        """Drop what no later stage of this process takes."""
        own = self.pipeline.layout.stages_of(self.pipeline.rank)
        kept = [self.pipeline.transfers[later].kept for later in own if later > stage]
        later = {(crossing.name, holder) for part in kept for crossing, holder in part}
        for holder in own:
            if (holder, index) in self.kept:
                data = self.kept[holder, index]
                self.kept[holder, index] = {name: data[name] for name in data if (name, holder) in later}

    def backward(self, stage: int, index: int, received: dict[str, Tensor]) -> None:
        self.backward_input(stage, index, received)
        self.backward_weight(stage, index, {})

    def _backward(self, stage: int, index: int, received: dict[str, Tensor]) -> None:
        part = self.pipeline.stages[stage]
        gradients = self.gradients.pop((stage, index), {})
        for name, gradient in received.items():
            gradients[name] = gradients[name] + gradient if name in gradients else gradient
        if part.is_last:
            gradients["loss"] = torch.ones_like(self.losses[index])
        roots = self.roots.pop((stage, index))
        started = [name for name in roots if name in gradients]
        torch.autograd.backward([roots[name] for name in started], [gradients[name] for name in started])
        self._hand_on(stage, index)

    def backward_input(self, stage: int, index: int, received: dict[str, Tensor]) -> None:
        self._backward(stage, index, received)
        self.weights[stage, index] = self.pipeline.waiting.take()

    def backward_weight(self, stage: int, index: int, received: dict[str, Tensor]) -> None:
        for gradient in self.weights.pop((stage, index)):
            gradient.compute()

    def _hand_on(self, stage: int, index: int) -> None:
        """The gradients of a stage's inputs: to the stages they came from. One that has none sends zeros."""
        inputs, transfer = self.inputs.pop((stage, index)), self.pipeline.transfers[stage]
        for crossing, holder in transfer.kept:
            gradient = inputs[crossing.name].grad
            if gradient is not None:
                earlier = self.gradients.setdefault((holder, index), {})
                name = crossing.name
                earlier[name] = earlier[name] + gradient if name in earlier else gradient
        if stage > 0 and self.pipeline.layout.rank_of(stage - 1) != self.pipeline.rank:
            leaves = [inputs[crossing.name] for crossing in transfer.received]
            self.leaving["send_backward", stage, index] = [
                torch.zeros_like(leaf) if leaf.grad is None else leaf.grad.contiguous() for leaf in leaves
            ]

    # ---- messages ----

    def send_forward(self, stage: int, index: int) -> None:
        self._send("send_forward", stage, index, stage + 1)

    def send_backward(self, stage: int, index: int) -> None:
        self._send("send_backward", stage, index, stage - 1)

    def receive_forward(self, stage: int, index: int) -> None:
        wanted = self.pipeline.transfers[stage].received
        self.arriving["forward", stage, index] = self._receive(wanted, stage - 1)

    def receive_backward(self, stage: int, index: int) -> None:
        wanted = self.pipeline.transfers[stage + 1].received
        self.arriving["backward", stage, index] = self._receive(wanted, stage + 1)

    def _send(self, kind: str, stage: int, index: int, target: int) -> None:
        tensors, pipeline = self.leaving.pop((kind, stage, index)), self.pipeline
        peer = pipeline.layout.rank_of(target)
        works = [dist.isend(tensor, group=pipeline.group, group_dst=peer) for tensor in tensors]
        pipeline.sent_bytes += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        self.sends.append((works, tensors))
        if len(self.sends) > MAX_SENDS:
            self._wait_for_send()

    def _wait_for_send(self) -> None:
        for work in self.sends.popleft()[0]:
            work.wait()

    def _receive(self, wanted: Sequence[Crossing], source: int) -> _Message:
        pipeline = self.pipeline
        tensors = {
            crossing.name: torch.empty(crossing.shape, dtype=crossing.dtype, device=pipeline.mesh.device)
            for crossing in wanted
        }
        peer = pipeline.layout.rank_of(source)
        works = [dist.irecv(tensor, group=pipeline.group, group_src=peer) for tensor in tensors.values()]
        return _Message(tensors, works)

    def _await(self, kind: str, stage: int, index: int) -> dict[str, Tensor]:
        key = ("forward" if kind == "forward" else "backward", stage, index)
        return self.arriving.pop(key).wait() if key in self.arriving else {}

    def finish(self) -> None:
        """Everything that was begun is done."""
        while self.sends:
            self._wait_for_send()
        left = [
            name for name in ("arriving", "leaving", "inputs", "roots", "gradients", "weights") if getattr(self, name)
        ]
        assert not left, f"the schedule left {left}"

    # ---- time ----

    def _now(self) -> Any:
        if not self.pipeline.mesh.device.startswith("cuda"):
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def busy_seconds(self) -> float:
        """Time spent in forward and backward passes."""
        if not self.pipeline.mesh.device.startswith("cuda"):
            return sum(end - start for start, end in self.times)
        torch.cuda.synchronize()
        return sum(start.elapsed_time(end) for start, end in self.times) / 1000
