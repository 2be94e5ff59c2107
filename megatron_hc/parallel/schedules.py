"""What every pipeline process does in a step, in order: forward and backward passes, sends and receives.

The orders of 1f1b and gpipe are made here, the others are those of ``torch.distributed.pipelining``. From an order of
passes follows, by playing it through with a forward pass of one unit of time and a backward pass of two, where each
message is sent and received, and how long processes wait at best.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Literal, NamedTuple

from megatron_hc.pipeline_layout import V_SCHEDULES, PipelineLayout

Kind = Literal[
    "forward", "backward", "backward_input", "backward_weight",
    "send_forward", "receive_forward", "send_backward", "receive_backward",
]  # fmt: skip

COST = {"forward": 1.0, "backward": 2.0, "backward_input": 1.0, "backward_weight": 1.0}
"""Units of time."""


class Action(NamedTuple):
    """One thing a process does. A receive names the stage that needs the message, a send the one that made it."""

    kind: Kind
    stage: int
    micro_batch: int


class Schedule(NamedTuple):
    """A whole step."""

    actions: tuple[tuple[Action, ...], ...]
    """By process of the pipeline."""
    bubble: float
    """Share of the step that processes wait, by the units of ``COST``: (p - 1) / (m + p - 1) for 1f1b and gpipe."""


def training_schedule(layout: PipelineLayout, num_micro_batches: int) -> Schedule:
    """Forward and backward passes of all micro-batches."""
    return _with_messages(layout, _ORDERS[layout.schedule](layout, num_micro_batches))


def forward_schedule(layout: PipelineLayout, num_micro_batches: int) -> Schedule:
    """Forward passes only: in a V as they come in training, in a loop in rounds of one micro-batch per process."""
    if layout.schedule in V_SCHEDULES:
        planned = _torch_order("ScheduleZBVZeroBubble", layout, num_micro_batches)
        return _with_messages(layout, [[a for a in actions if a.kind == "forward"] for actions in planned])
    order = [
        [
            Action("forward", stage, micro_batch)
            for start in range(0, num_micro_batches, layout.size)
            for stage in layout.stages_of(rank)
            for micro_batch in range(start, min(start + layout.size, num_micro_batches))
        ]
        for rank in range(layout.size)
    ]
    return _with_messages(layout, order)


Order = list[list[Action]]


def _one_forward_one_backward(layout: PipelineLayout, number: int) -> Order:
    order: Order = []
    for rank in range(layout.size):
        ahead = min(number, layout.size - 1 - rank)
        actions = [Action("forward", rank, index) for index in range(ahead)]
        for index in range(number):
            if index + ahead < number:
                actions.append(Action("forward", rank, index + ahead))
            actions.append(Action("backward", rank, index))
        order.append(actions)
    return order


def _all_forward_all_backward(layout: PipelineLayout, number: int) -> Order:
    kinds: tuple[Kind, Kind] = ("forward", "backward")
    return [[Action(kind, rank, index) for kind in kinds for index in range(number)] for rank in range(layout.size)]


def _torch_order(name: str, layout: PipelineLayout, number: int) -> Order:
    """The order of a schedule class of torch, which wants stages only to know how many there are."""
    from torch.distributed.pipelining import schedules

    stages = [
        SimpleNamespace(
            stage_index=stage, num_stages=layout.num_stages, group_size=layout.size, group_rank=0, submod=None
        )
        for stage in layout.stages_of(0)
    ]
    kinds: dict[str, Kind] = {"F": "forward", "B": "backward", "I": "backward_input", "W": "backward_weight"}
    by_rank = getattr(schedules, name)(stages, n_microbatches=number).pipeline_order
    order: Order = []
    for rank in range(layout.size):
        planned = [action for action in by_rank[rank] if action is not None]
        flat = [part for action in planned for part in (getattr(action, "sub_actions", None) or (action,))]
        order.append([Action(kinds[a.computation_type.value], a.stage_index, a.microbatch_index) for a in flat])
    return order


_ORDERS = {
    "1f1b": _one_forward_one_backward,
    "gpipe": _all_forward_all_backward,
    "interleaved": lambda layout, number: _torch_order("ScheduleInterleaved1F1B", layout, number),
    "interleaved-zero-bubble": lambda layout, number: _torch_order("ScheduleInterleavedZeroBubble", layout, number),
    "zbv": lambda layout, number: _torch_order("ScheduleZBVZeroBubble", layout, number),
    "dualpipev": lambda layout, number: _torch_order("ScheduleDualPipeV", layout, number),
}


class _Play:
    """Plays an order of passes through and notes who sends what when.

    A send and its receive enter the lists of both processes at the same moment of the play. So any two processes see
    the messages between them in the same order, and even sends that block until they are received cannot deadlock.
    """

    def __init__(self, layout: PipelineLayout, order: Sequence[Sequence[Action]]) -> None:
        self.layout, self.order = layout, order
        self.actions: list[list[Action]] = [[] for _ in order]
        self.done: dict[Action, float] = {}  # by ``_done``: when
        self.free = [0.0] * len(order)
        self.position = [0] * len(order)
        self.ready: list[tuple[float, int]] = []  # when a process can start its next action, and which process
        self.waiting: dict[Action, list[int]] = {}  # what processes' next actions wait for
        self.messages: list[tuple[float, int, Action]] = []  # on their way: (when, number, the send)
        self.num_messages = 0

    def run(self) -> None:
        for rank in range(len(self.order)):
            self._look(rank)
        while self.ready:
            start, rank = heapq.heappop(self.ready)
            action = self.order[rank][self.position[rank]]
            self.position[rank] += 1
            self._deliver(start)
            self._perform(rank, action, start)
            self._look(rank)
            for other in self.waiting.pop(_done(action), ()):
                self._look(other)
        are_done = all(at == len(actions) for at, actions in zip(self.position, self.order, strict=True))
        assert are_done, f"the schedule {self.layout.schedule} waits for itself"
        self._deliver(float("inf"))

    def _look(self, rank: int) -> None:
        """Note when the process can start its next action, or what that waits for."""
        if self.position[rank] == len(self.order[rank]):
            return
        needs = self._needs(self.order[rank][self.position[rank]])
        if needs is None or needs in self.done:
            at = self.free[rank] if needs is None else max(self.free[rank], self.done[needs])
            heapq.heappush(self.ready, (at, rank))
        else:
            self.waiting.setdefault(needs, []).append(rank)

    def _needs(self, action: Action) -> Action | None:
        """What must have been done before the action, by ``_done``; None: nothing."""
        stage, last = action.stage, self.layout.num_stages - 1
        if action.kind == "forward":
            return None if stage == 0 else Action("forward", stage - 1, action.micro_batch)
        if action.kind == "backward_weight":
            return Action("backward_input", stage, action.micro_batch)
        if stage == last:
            return Action("forward", stage, action.micro_batch)
        return Action("backward_input", stage + 1, action.micro_batch)

    def _perform(self, rank: int, action: Action, start: float) -> None:
        self.actions[rank].append(action)
        self.free[rank] = end = start + COST[action.kind]
        self.done[_done(action)] = end
        goes_on = action.stage < self.layout.num_stages - 1 if action.kind == "forward" else action.stage > 0
        if action.kind == "backward_weight" or not goes_on:
            return
        step = 1 if action.kind == "forward" else -1
        if self.layout.rank_of(action.stage + step) != rank:
            kind: Kind = "send_forward" if step == 1 else "send_backward"
            heapq.heappush(self.messages, (end, self.num_messages, action._replace(kind=kind)))
            self.num_messages += 1

    def _deliver(self, until: float) -> None:
        while self.messages and self.messages[0][0] <= until:
            send = heapq.heappop(self.messages)[2]
            is_forward = send.kind == "send_forward"
            target = send.stage + (1 if is_forward else -1)
            receive = Action("receive_forward" if is_forward else "receive_backward", target, send.micro_batch)
            self.actions[self.layout.rank_of(send.stage)].append(send)
            self.actions[self.layout.rank_of(target)].append(receive)


def _done(action: Action) -> Action:
    """What others know an action as: a full backward pass is one that gives the gradients of inputs."""
    return action._replace(kind="backward_input") if action.kind == "backward" else action


def _with_messages(layout: PipelineLayout, order: Order) -> Schedule:
    play = _Play(layout, order)
    play.run()
    work = sum(COST[action.kind] for actions in order for action in actions)
    total = max(play.free) * layout.size
    return Schedule(tuple(map(tuple, play.actions)), 1 - work / total if total else 0.0)
