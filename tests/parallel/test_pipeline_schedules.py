"""Orders of passes and messages, without processes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import pytest

from megatron_hc.config import ParallelConfig
from megatron_hc.parallel.schedules import _ORDERS, Action, Schedule, _Play, forward_schedule, training_schedule
from megatron_hc.pipeline_layout import PipelineLayout

CASES = [
    (schedule, size, per_rank, number)
    for size in (2, 3, 4)
    for number in (1, 4, 8)
    for schedule, per_rank in (
        ("1f1b", 1),
        ("gpipe", 1),
        ("interleaved", 2),
        ("interleaved", 3),
        ("interleaved-zero-bubble", 1),
        ("interleaved-zero-bubble", 2),
        ("zbv", 2),
        ("dualpipev", 2),
    )
    if schedule != "dualpipev" or number >= 2 * size
    if "interleaved" not in schedule or number % max(1, number // size) == 0
]


def layout_of(schedule: str, size: int, per_rank: int) -> PipelineLayout:
    config = ParallelConfig(
        pipeline_model_parallel_size=size,
        pipeline_schedule=schedule,  # type: ignore[arg-type]
        num_virtual_stages_per_pipeline_rank=per_rank if per_rank > 1 else None,
    )
    return config.pipeline_layout(size * per_rank)


@pytest.mark.parametrize(("schedule", "size", "per_rank", "number"), CASES)
def test_every_pass_happens_once_where_its_stage_is(schedule: str, size: int, per_rank: int, number: int) -> None:
    layout = layout_of(schedule, size, per_rank)
    every = {(stage, index) for stage in range(layout.num_stages) for index in range(number)}
    for found, has_backward in ((training_schedule(layout, number), True), (forward_schedule(layout, number), False)):
        kinds: dict[str, Counter] = {}
        for rank, actions in enumerate(found.actions):
            for kind, stage, index in actions:
                assert layout.rank_of(stage) == rank
                kinds.setdefault(kind, Counter())[stage, index] += 1
        backward = kinds.get("backward", Counter()) + kinds.get("backward_input", Counter())
        assert kinds["forward"] == Counter(every)
        assert backward == (Counter(every) if has_backward else Counter())
        assert kinds.get("backward_weight", Counter()) == kinds.get("backward_input", Counter())


@pytest.mark.parametrize(("schedule", "size", "per_rank", "number"), CASES)
def test_messages_meet_even_if_every_send_waits(schedule: str, size: int, per_rank: int, number: int) -> None:
    layout = layout_of(schedule, size, per_rank)
    for found in (training_schedule(layout, number), forward_schedule(layout, number)):
        assert_runs(layout, found)


def assert_runs(layout: PipelineLayout, schedule: Schedule) -> None:
    """Play the lists with sends that block until the receiver is there; receives do not block, passes do."""
    position, received, done = [0] * layout.size, set(), set()
    waiting: list[list[Action]] = [[] for _ in range(layout.size)]  # receives that are open, in order

    def is_possible(action: Action) -> bool:
        kind, stage, index = action
        if kind.startswith("receive"):
            return True
        if kind.startswith("send"):
            is_forward = kind == "send_forward"
            assert ("forward" if is_forward else "backward_input", stage, index) in done, "sent before it was made"
            target = stage + (1 if is_forward else -1)
            wanted = Action("receive_forward" if is_forward else "receive_backward", target, index)
            queue = [r for r in waiting[layout.rank_of(target)] if layout.rank_of(sender(r)) == layout.rank_of(stage)]
            if wanted not in queue:
                return False
            assert queue[0] == wanted, "messages between two processes come in the order they were asked for"
            return True
        if kind == "backward_weight":
            return ("backward_input", stage, index) in done
        is_forward, last = kind == "forward", layout.num_stages - 1
        before = stage - 1 if is_forward else stage + 1
        if not is_forward:
            assert ("forward", stage, index) in done
        if before < 0 or before > last:
            return True
        name = "forward" if is_forward else "backward_input"
        if layout.rank_of(before) == layout.rank_of(stage):
            return (name, before, index) in done
        return (name, stage, index) in received

    def perform(rank: int, action: Action) -> None:
        kind, stage, index = action
        if kind.startswith("receive"):
            waiting[rank].append(action)
        elif kind.startswith("send"):
            is_forward = kind == "send_forward"
            target = stage + (1 if is_forward else -1)
            wanted = Action("receive_forward" if is_forward else "receive_backward", target, index)
            waiting[layout.rank_of(target)].remove(wanted)
            received.add(("forward" if is_forward else "backward_input", target, index))
        else:
            done.add(("backward_input" if kind == "backward" else kind, stage, index))

    lists: Sequence[Sequence[Action]] = schedule.actions
    while any(at < len(actions) for at, actions in zip(position, lists, strict=True)):
        moved = False
        for rank, actions in enumerate(lists):
            while position[rank] < len(actions) and is_possible(actions[position[rank]]):
                perform(rank, actions[position[rank]])
                position[rank] += 1
                moved = True
        assert moved, "the processes wait for each other"
    assert not any(waiting), "something was asked for and never sent"


def sender(receive: Action) -> int:
    return receive.stage + (-1 if receive.kind == "receive_forward" else 1)


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("number", [1, 4, 12])
def test_ideal_bubbles(size: int, number: int) -> None:
    ideal = (size - 1) / (number + size - 1)
    assert training_schedule(layout_of("1f1b", size, 1), number).bubble == pytest.approx(ideal)
    assert training_schedule(layout_of("gpipe", size, 1), number).bubble == pytest.approx(ideal)
    assert forward_schedule(layout_of("1f1b", size, 1), number).bubble == pytest.approx(ideal)
    if number >= 2 * size:
        interleaved = training_schedule(layout_of("interleaved", size, 2), number).bubble
        assert interleaved == pytest.approx((size - 1) / (2 * number + size - 1))
        for schedule in ("zbv", "dualpipev"):
            assert training_schedule(layout_of(schedule, size, 2), number).bubble < interleaved


@pytest.mark.parametrize("size", [2, 4])
def test_1f1b_keeps_few_micro_batches(size: int) -> None:
    """Process r holds the activations of at most p - r micro-batches, however many there are."""
    for rank, actions in enumerate(training_schedule(layout_of("1f1b", size, 1), 12).actions):
        held = most = 0
        for action in actions:
            held += (action.kind == "forward") - (action.kind == "backward")
            most = max(most, held)
        assert most == size - rank


def test_playing_looks_only_at_what_can_have_changed() -> None:
    """Not at all processes for every pass: of 64 with 512 micro-batches that took ten seconds, at every start."""
    looks = 0

    class Done(dict[Action, float]):
        def __contains__(self, action: object) -> bool:
            nonlocal looks
            looks += 1
            return super().__contains__(action)

    layout = layout_of("1f1b", 16, 1)
    order = _ORDERS["1f1b"](layout, 32)
    play = _Play(layout, order)
    play.done = Done()
    play.run()
    assert looks <= 2 * sum(map(len, order))
