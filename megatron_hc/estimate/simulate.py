"""A pipeline's step played through on paper: when each pass runs, and what waits in memory meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megatron_hc.estimate.trace import StageTrace
from megatron_hc.parallel.schedules import Action, training_schedule
from megatron_hc.pipeline_layout import PipelineLayout

Seconds = Callable[[str, int], float]
"""(kind of pass, stage) -> its time."""


@dataclass
class Simulation:
    """What came out."""

    seconds: float
    """Of all passes, from the first forward to the last backward."""
    busy: list[float]
    """By process of the pipeline: time in passes."""
    peak_micro_batches: list[int]
    """By process: most passes of stages that wait for their backward pass at once."""
    peak_bytes: list[int]
    """By process: most bytes of activations at once."""

    @property
    def bubble(self) -> float:
        """Share of the time that processes wait, the mean over them."""
        return 1 - sum(self.busy) / (self.seconds * len(self.busy)) if self.seconds else 0.0


STEADY = 4  # times the number of stages: from so many micro-batches on each one more adds the same time


def simulate(
    layout: PipelineLayout,
    num_micro_batches: int,
    seconds: Seconds,
    message_seconds: Sequence[float],
    traces: Sequence[StageTrace],
) -> Simulation:
    """Play a training step. ``message_seconds``: by stage, of what crosses into it; ``traces``: by stage.

    A pass starts when its process is free and what it needs has arrived; messages travel beside the passes. Of very
    many micro-batches the middle is not played: there every round of the pipeline takes the same time.
    """
    rounds, rest = divmod(num_micro_batches, layout.size)
    most = STEADY * layout.stages_per_rank
    if rest or rounds <= 2 * most:
        return _play(layout, num_micro_batches, seconds, message_seconds, traces)
    few, more = (_play(layout, count * layout.size, seconds, message_seconds, traces) for count in (most, 2 * most))
    times = (rounds - 2 * most) / most

    def go_on(short: float, long: float) -> float:
        return long + times * (long - short)

    busy = [go_on(*pair) for pair in zip(few.busy, more.busy, strict=True)]
    return Simulation(go_on(few.seconds, more.seconds), busy, more.peak_micro_batches, more.peak_bytes)


def _play(
    layout: PipelineLayout,
    num_micro_batches: int,
    seconds: Seconds,
    message_seconds: Sequence[float],
    traces: Sequence[StageTrace],
) -> Simulation:
    actions = [
        [action for action in own if not action.kind.startswith(("send", "receive"))]
        for own in training_schedule(layout, num_micro_batches).actions
    ]
    ends: dict[Action, float] = {}
    free, busy, position = [0.0] * layout.size, [0.0] * layout.size, [0] * layout.size
    while any(position[rank] < len(own) for rank, own in enumerate(actions)):
        moved = False
        for rank, own in enumerate(actions):
            while position[rank] < len(own):
                action = own[position[rank]]
                ready = _ready(layout, action, ends, message_seconds)
                if ready is None:
                    break
                time = seconds(action.kind, action.stage)
                free[rank] = max(free[rank], ready) + time
                busy[rank] += time
                kind = "backward_input" if action.kind == "backward" else action.kind
                ends[action._replace(kind=kind)] = free[rank]
                position[rank] += 1
                moved = True
        assert moved, f"the schedule {layout.schedule} waits for itself"
    memory = [_memory(own, traces) for own in actions]
    return Simulation(max(free), busy, [count for count, _ in memory], [size for _, size in memory])


def _ready(
    layout: PipelineLayout, action: Action, ends: dict[Action, float], message_seconds: Sequence[float]
) -> float | None:
    """When what the pass needs is there; None: not known yet."""
    kind, stage, index = action
    if kind == "backward_weight":
        return ends.get(Action("backward_input", stage, index))
    if kind == "forward":
        needs, crossing = Action("forward", stage - 1, index), stage
        if stage == 0:
            return 0.0
    elif stage == layout.num_stages - 1:
        return ends.get(Action("forward", stage, index))
    else:
        needs, crossing = Action("backward_input", stage + 1, index), stage + 1
    if needs not in ends:
        return None
    is_apart = layout.rank_of(needs.stage) != layout.rank_of(stage)
    return ends[needs] + (message_seconds[crossing] if is_apart else 0.0)


def _memory(actions: Sequence[Action], traces: Sequence[StageTrace]) -> tuple[int, int]:
    """(most passes that wait for their backward pass, most bytes) of one process."""
    count = most = held = peak = 0
    for kind, stage, _ in actions:
        part = traces[stage]
        if kind == "forward":
            peak = max(peak, held + part.forward.peak_bytes)
            held += part.held_bytes
            count += 1
            most = max(most, count)
        elif kind == "backward_weight":
            peak = max(peak, held + part.weight.peak_bytes)
            held -= part.waiting_bytes
        else:
            peak = max(peak, held + part.backward.peak_bytes)
            held -= part.held_bytes
            count -= 1
            held += part.waiting_bytes if kind == "backward_input" else 0
        peak = max(peak, held)
    return most, peak
