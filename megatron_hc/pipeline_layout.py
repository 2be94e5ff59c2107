"""Which layers each pipeline stage holds, and which process holds which stage. No torch, no other part of the package.

p processes along the pipeline hold v stages each; stages are numbered in the order of the layers. In a loop process r
holds stages r, r + p, r + 2 p, ...; in a V (zbv, dualpipev) stages r and 2 p - 1 - r. The first stage has the
embedding, the last one the final norm, the output layer and the loss.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

V_SCHEDULES = ("zbv", "dualpipev")
ZERO_BUBBLE_SCHEDULES = ("interleaved-zero-bubble", "zbv", "dualpipev")
"""Schedules that compute the gradients of inputs and of weights apart."""


@dataclass(frozen=True)
class PipelineLayout:
    """The stages of a run. Without arguments: one stage."""

    size: int = 1
    """Processes p along the pipeline."""
    schedule: str = "1f1b"
    bounds: tuple[tuple[int, int], ...] = ((0, 0),)
    """First layer, last layer + 1 of each stage."""

    @property
    def num_stages(self) -> int:
        return len(self.bounds)

    @property
    def stages_per_rank(self) -> int:
        return self.num_stages // self.size

    @property
    def is_tied_apart(self) -> bool:
        """Whether first and last stage are on different processes, so that a tied table is held twice."""
        return self.rank_of(0) != self.rank_of(self.num_stages - 1)

    def rank_of(self, stage: int) -> int:
        if self.schedule in V_SCHEDULES:
            return stage if stage < self.size else 2 * self.size - 1 - stage
        return stage % self.size

    def stages_of(self, rank: int) -> tuple[int, ...]:
        return tuple(stage for stage in range(self.num_stages) if self.rank_of(stage) == rank)

    def layers_of(self, rank: int) -> list[int]:
        """All layers of a process, in order."""
        return [layer for stage in self.stages_of(rank) for layer in range(*self.bounds[stage])]

    def has_end(self, rank: int) -> bool:
        """Whether a process has the embedding or the loss."""
        return rank in (self.rank_of(0), self.rank_of(self.num_stages - 1))

    def describe(self) -> str:
        """One line per process, for the log."""
        lines = [f"pipeline of {self.size} processes, {self.num_stages} stages, schedule {self.schedule}:"]
        for rank in range(self.size):
            parts = [self._describe_stage(stage) for stage in self.stages_of(rank)]
            lines.append(f"  process {rank}: {'; '.join(parts)}")
        return "\n".join(lines)

    def _describe_stage(self, stage: int) -> str:
        first, last = self.bounds[stage]
        parts = ["embedding"] if stage == 0 else []
        parts += [f"{last - first} layers ({first}..{last - 1})" if last > first else "no layers"]
        parts += ["output and loss"] if stage == self.num_stages - 1 else []
        return f"stage {stage}: {', '.join(parts)}"


def check_micro_batches(layout: PipelineLayout, number: int) -> None:
    """``ValueError`` where the schedule cannot run ``number`` micro-batches per step."""
    p, name = layout.size, f"--pipeline-schedule {layout.schedule}"
    if layout.schedule.startswith("interleaved"):
        rounds = max(1, number // p)
        if number % rounds:
            raise ValueError(
                f"{name} runs micro-batches in rounds of about --pipeline-model-parallel-size ({p}), which needs a "
                f"number of micro-batches per step that {rounds} divides, not {number}: change --global-batch-size"
            )
    if layout.schedule == "dualpipev" and number < 2 * p:
        raise ValueError(
            f"{name} needs at least {2 * p} micro-batches per step (twice --pipeline-model-parallel-size), not "
            f"{number}: raise --global-batch-size"
        )


def even_split(
    num_layers: int, num_stages: int, *, counts_embedding: bool = False, counts_loss: bool = False
) -> list[int]:
    """Layers per stage, as even as can be, earlier stages first served (30 on 4: 8 + 8 + 7 + 7).

    ``counts_embedding``, ``counts_loss``: the first (last) stage has a layer fewer, for its embedding (its output).
    Raises ``ValueError`` where a stage would have nothing to do.
    """
    total = num_layers + counts_embedding + counts_loss
    if total < num_stages or num_layers < 1:
        raise ValueError(f"--num-layers ({num_layers}) is too small for {num_stages} pipeline stages")
    sizes = [total // num_stages + (stage < total % num_stages) for stage in range(num_stages)]
    sizes[0] -= counts_embedding
    sizes[-1] -= counts_loss
    return sizes


def split_with_ends(
    num_layers: int, size: int, per_rank: int, first: int | None, last: int | None, *, is_v: bool = False
) -> list[int]:
    """Layers per stage where --decoder-first/last-pipeline-num-layers fix what the first and last process have."""
    middle = size - (first is not None) - (last is not None)
    rest = num_layers - (first or 0) - (last or 0)
    given = " and ".join(
        f"--decoder-{name}-pipeline-num-layers ({count})"
        for name, count in (("first", first), ("last", last))
        if count is not None
    )
    if rest < middle or (middle == 0 and rest):
        raise ValueError(
            f"{given} leave {rest} of --num-layers ({num_layers}) for the other {middle} of "
            f"--pipeline-model-parallel-size ({size}) processes"
        )
    sizes = even_split(rest, middle) if middle else []
    sizes = ([] if first is None else [first]) + sizes + ([] if last is None else [last])
    uneven = [count for count in sizes if count % per_rank]
    if uneven:
        raise ValueError(
            f"{given}: a process would have {uneven[0]} layers, which its {per_rank} virtual stages cannot share evenly"
        )
    chunks = [sizes[::-1] if is_v and chunk % 2 else sizes for chunk in range(per_rank)]
    return [count // per_rank for chunk in chunks for count in chunk]


def parse_layout(text: str, num_layers: int | None) -> list[int]:
    """Layers per stage from Megatron-LM's layout string: E embedding, t layer, L loss, | between stages, x*3, (..)*3.

    ``"Et*3|(tt|)*2,tL"`` is 3, 2, 2 and 1 layers. Raises ``ValueError`` for a string that is not such a layout, or
    has not ``num_layers`` layers.
    """
    name = f"--pipeline-model-parallel-layout ({text})"
    flat = re.sub(r"[\s,]", "", text)
    while (match := re.search(r"(?:\(([^()]*)\)|([EtLm|]))\*(\d+)", flat)) is not None:
        part, count = match[1] if match[2] is None else match[2], int(match[3])
        if len(part) * count > 100_000:
            raise ValueError(f"{name} repeats {part} {count} times: no model has as many layers")
        flat = flat[: match.start()] + part * count + flat[match.end() :]
    while (match := re.search(r"\(([^()]*)\)", flat)) is not None:
        flat = flat.replace(match[0], match[1])
    if "m" in flat:
        raise ValueError(f"{name} has a multi-token prediction layer (m), which there is not: leave it out")
    if not re.fullmatch(r"E[t|]*L", flat):
        raise ValueError(f"{name} must be E, then t and |, then L, with x*3 or (..)*3 for repeats; it reads {flat!r}")
    if num_layers is not None and flat.count("t") != num_layers:
        raise ValueError(f"{name} has {flat.count('t')} layers, but --num-layers is {num_layers}")
    return [stage.count("t") for stage in flat.split("|")]


def bounds_of(sizes: list[int]) -> tuple[tuple[int, int], ...]:
    """Layers per stage -> (first, last + 1) of each."""
    starts = [sum(sizes[:stage]) for stage in range(len(sizes) + 1)]
    return tuple(zip(starts, starts[1:], strict=False))
