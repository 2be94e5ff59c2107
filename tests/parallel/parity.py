"""The same training run at a layout and in one process, and whether they agree.

A ``Cell`` is flags of a model, a layout and how many steps. It goes through the steps of a real run (``train.set_up``,
``train.train_step``) on random samples with uneven loss masks, with parameters moved off their initial values, where
many gradients are zero and a missing reduction would not show. Gradients are compared, not weights: Adam turns the
noise of a gradient that is zero into whole steps.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import pool as pools
import torch

from megatron_hc import train
from megatron_hc.cli import parse
from megatron_hc.data import Sample
from megatron_hc.data.loader import build_loader
from megatron_hc.model.gpt import VocabTable
from megatron_hc.model.linear import Linear
from megatron_hc.parallel.plan import draw_for, owned_parameters, stored

VOCAB = 23  # with end-of-document; padded for every layout, and differently


class Tolerance(NamedTuple):
    """Relative; a parameter's gradient to its norm, or to ``smallest`` times the norm of all, if that is larger."""

    loss: float
    grad_norm: float
    gradient: float
    smallest: float
    """Below this share of the global norm a gradient is made of rounding errors of what cancels: 50 ulp in float64."""


TOLERANCES = {
    "fp64": Tolerance(1e-10, 1e-9, 1e-8, 1e-6),
    "fp32": Tolerance(1e-5, 2e-5, 1e-4, 1e-2),
    "bf16": Tolerance(2e-2, math.inf, math.inf, 1.0),
}

MODEL = (
    "--num-layers 2 --hidden-size 16 --ffn-hidden-size 24 --num-attention-heads 4 --seq-length 8 "
    "--make-vocab-size-divisible-by 1 --init-method-std 0.3"
)
RUN = (
    f"--mock-data --tokenizer-type NullTokenizer --vocab-size {VOCAB - 1} --num-workers 0 --eval-iters 0 --lr 1e-2 "
    "--micro-batch-size 2 --global-batch-size 8 --clip-grad 0.5 --log-interval 1000000 --device cpu"
)
PRECISION = {"fp64": "--fp64", "fp32": "", "bf16": "--bf16"}


@dataclass(frozen=True)
class Cell:
    """One run. Flags are written as on the command line; ``layout`` and ``options`` must not change a number."""

    model: str = ""
    """Flags beyond ``MODEL``."""
    layout: str = ""
    """--tensor-model-parallel-size and the like."""
    options: str = ""
    """Recompute, overlap and the like."""
    world_size: int = 1
    precision: str = "fp64"
    num_steps: int = 3
    batch: str = ""
    """Batch sizes, where they are not those of ``RUN``."""

    @property
    def flags(self) -> list[str]:
        """Later flags win."""
        parts = (MODEL, RUN, f"--train-iters {self.num_steps}", PRECISION[self.precision])
        given: dict[str, list[str]] = {}
        for part in (*parts, self.batch, self.model, self.layout, self.options):
            name = ""
            for word in part.split():
                if word.startswith("--"):
                    name = word
                    given[name] = []
                else:
                    given[name].append(word)
        return [word for name, values in given.items() for word in (name, *values)]

    @property
    def whole(self) -> Cell:
        """The same in one process."""
        return Cell(self.model, precision=self.precision, num_steps=self.num_steps, batch=self.batch)

    def __str__(self) -> str:
        return f"{self.world_size} ranks, {self.precision}: {' '.join([self.layout, self.options, self.model])}"


class Bounds(NamedTuple):
    """A whole tensor of which several ranks hold copies: the least and the greatest of them, element by element."""

    low: np.ndarray
    high: np.ndarray


@dataclass
class Outcome:
    """What a run gave, step by step."""

    losses: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    gradients: list[dict[str, Bounds]] = field(default_factory=list)
    """Whole gradients by parameter name."""

    def after(self, steps: int) -> Outcome:
        """Without the first steps."""
        return Outcome(self.losses[steps:], self.grad_norms[steps:], self.gradients[steps:])


class Pieces(NamedTuple):
    """One rank's part of a tensor."""

    shape: tuple[int, ...]
    slices: tuple[tuple[tuple[int, ...], np.ndarray], ...]
    """(offset in the whole, values)"""


@dataclass
class RankOutcome:
    """What one rank saw."""

    losses: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    pieces: list[dict[str, Pieces]] = field(default_factory=list)
    stats: list[Mapping[str, Sequence[float | None]]] = field(default_factory=list)
    """What --log-residual-stats shows."""

    def pause(self) -> Any:
        """In a logger's place, as all methods here."""
        return contextlib.nullcontext()

    def residual(self, iteration: int, consumed_samples: int, stats: Mapping[str, Sequence[float | None]]) -> None:
        self.stats.append(stats)

    def step(self, *, loss: float, grad_norm: float, **others: Any) -> None:
        """In a logger's place."""
        self.losses.append(loss)
        self.grad_norms.append(grad_norm)


# ---- in a rank ----


class RandomSamples:
    """Random tokens; about a third of the positions carry no loss, so that no two samples weigh the same."""

    def __init__(self, num_samples: int, length: int, vocab_size: int) -> None:
        self.num_samples, self.length, self.vocab_size = num_samples, length, vocab_size

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, index: int) -> Sample:
        random = np.random.default_rng([7, index])
        text = random.integers(0, self.vocab_size, self.length + 1)
        mask = (random.random(self.length) < 0.7).astype(np.float32)
        return Sample(text[:-1], text[1:], mask, np.arange(self.length), None)


def run_cell(cell: Cell, change: Callable[[train.Run], None] | None = None) -> RankOutcome | None:
    """Train as the cell says, on this rank; None for ranks it does not use. ``change``: of the run before it starts."""
    parsed = parse(cell.flags)
    mesh = pools.mesh(parsed.config, cell.world_size)
    if mesh is None:
        return None
    run = train.set_up(parsed, mesh)
    move_off_initial_values(run)
    if change is not None:
        change(run)
    return run_steps(run, cell.num_steps)


def run_steps(run: train.Run, num_steps: int) -> RankOutcome:
    """The next steps of a run that is set up, with the gradients of each."""
    outcome, logger, grad_norm = RankOutcome(), run.logger, run.optimizer.grad_norm

    def recorded() -> float:
        outcome.pieces.append(gradient_pieces(run))
        return grad_norm()

    run.logger, run.optimizer.grad_norm = outcome, recorded  # type: ignore[assignment, method-assign]
    consumed = run.progress.consumed_samples
    num_samples = consumed + num_steps * run.batches.largest
    samples = RandomSamples(num_samples, run.config.model.seq_length, run.tokenizer.vocab_size)
    size = run.config.training.micro_batch_size
    loader = build_loader(samples, run.mesh, micro_batch_size=size, consumed_samples=consumed)
    for _ in range(num_steps):
        train.train_step(run, loader)
    run.optimizer.wait_for_parameters()
    run.logger, run.optimizer.grad_norm = logger, grad_norm  # type: ignore[method-assign]
    return outcome


@torch.no_grad()
def move_off_initial_values(run: train.Run, scale: float = 0.25) -> None:
    """Add noise that depends on the name only to all but the large matrices, which are random already."""
    random = {
        name
        for name, module, local_name in owned_parameters(run.model)
        if isinstance(module, VocabTable) or (isinstance(module, Linear) and local_name == "weight")
    }
    for slot in run.optimizer.slots:
        if slot.name not in random:
            noise = slot.placement.cut(draw_for(slot.name, 0)("noise", slot.placement.whole_shape, scale))
            for offset, box in slot.boxes(slot.master):
                place = tuple(slice(o, o + n) for o, n in zip(offset, box.shape, strict=True))
                box += noise[place].to(box.dtype)
    run.optimizer.update_parameters()
    run.optimizer.wait_for_parameters()


def gradient_pieces(run: train.Run) -> dict[str, Pieces]:
    found = {}
    for slot in run.optimizer.slots:
        assert slot.grad is not None
        part = stored(run.model, run.placed, slot.name, slot.boxes(slot.grad), slot.grad.dtype)
        slices = tuple((offset, values.double().numpy().copy()) for offset, values in part.slices)
        found[slot.name] = Pieces(part.shape, slices)
    return found


# ---- in the test ----


@dataclass
class Sums:
    """What ``Runs.report`` says of one layout."""

    num_cells: int = 0
    worst: dict[str, float] = field(default_factory=dict)


class Runs:
    """Runs cells on a pool; the run in one process of each model happens once."""

    def __init__(self, pool: pools.Pool) -> None:
        self.pool = pool
        self.sums: dict[str, Sums] = {}
        self._whole: dict[Cell, Outcome] = {}

    def outcome(self, cell: Cell, change: Callable[[train.Run], None] | None = None) -> Outcome:
        ranks = self.pool.run(run_cell, cell, change)
        found = assembled([rank for rank in ranks if rank is not None])
        # What every layout leaves out of a norm, no comparison of layouts shows. A change may break it on purpose.
        if cell.precision == "fp64" and change is None:
            check_norms(found)
        return found

    def whole(self, cell: Cell) -> Outcome:
        if cell.whole not in self._whole:
            self._whole[cell.whole] = self.outcome(cell.whole)
        return self._whole[cell.whole]

    def differences(self, cell: Cell, change: Callable[[train.Run], None] | None = None) -> list[str]:
        """What the cell's layout changes; nothing, if all is well."""
        whole = self.whole(cell)
        return differences(self.outcome(cell, change), whole, TOLERANCES[cell.precision])

    def check(self, cell: Cell) -> None:
        """Fail where the cell differs from one process; otherwise count it for ``report``."""
        whole, got, tolerance = self.whole(cell), self.outcome(cell), TOLERANCES[cell.precision]
        found = differences(got, whole, tolerance)
        assert not found, f"{cell}\n" + "\n".join(found[:20])
        sums = self.sums.setdefault(f"{cell.precision}, {cell.world_size} ranks {cell.layout}", Sums())
        sums.num_cells += 1
        for error in errors(got, whole, tolerance):
            sums.worst[error.kind] = max(sums.worst.get(error.kind, 0.0), error.size)

    def report(self) -> str:
        """One line per layout: cells checked, and the largest relative errors of loss, norm and gradient."""
        lines = []
        for layout, sums in sorted(self.sums.items()):
            worst = ", ".join(f"{kind} {size:.0e}" for kind, size in sums.worst.items())
            lines.append(f"{layout}: {sums.num_cells} cells, {worst}")
        return "\n".join(lines)


def assembled(ranks: Sequence[RankOutcome]) -> Outcome:
    """Whole gradients from all ranks' pieces; every element must be there."""
    first = ranks[0]
    for rank, other in enumerate(ranks):
        assert other.grad_norms == first.grad_norms, f"rank {rank} has another gradient norm: {other.grad_norms}"
        assert other.losses == first.losses, f"rank {rank} has another loss: {other.losses}"
    steps = [join(step) for step in zip(*(rank.pieces for rank in ranks), strict=True)]
    return Outcome(first.losses, first.grad_norms, steps)


def check_norms(outcome: Outcome) -> None:
    """Gradient norms are those of the whole gradients, to float64's rounding."""
    for norm, gradients in zip(outcome.grad_norms, outcome.gradients, strict=True):
        wanted = math.sqrt(sum(float(np.square(gradient.low).sum()) for gradient in gradients.values()))
        assert norm == 0 == wanted or abs(norm / wanted - 1) < 1e-12, f"gradient norm {norm!r} instead of {wanted!r}"


def join(parts: Iterable[Mapping[str, Pieces]]) -> dict[str, Bounds]:
    whole: dict[str, Bounds] = {}
    for part in parts:
        for name, pieces in part.items():
            if name not in whole:
                whole[name] = Bounds(np.full(pieces.shape, np.nan), np.full(pieces.shape, np.nan))
            assert whole[name].low.shape == pieces.shape, f"{name} is {whole[name].low.shape} and {pieces.shape}"
            for offset, values in pieces.slices:
                place = tuple(slice(o, o + n) for o, n in zip(offset, values.shape, strict=True))
                whole[name].low[place] = np.fmin(whole[name].low[place], values)
                whole[name].high[place] = np.fmax(whole[name].high[place], values)
    missing = [name for name, bounds in whole.items() if np.isnan(bounds.low).any()]
    assert not missing, f"no rank has all of {missing}"
    return whole


class Error(NamedTuple):
    """How far one number of a run is from that of one process."""

    kind: str
    """A field of ``Tolerance``."""
    size: float
    """Relative."""
    words: str


def errors(got: Outcome, expected: Outcome, tolerance: Tolerance) -> Iterator[Error]:
    """Every comparison; a number that is not finite is infinitely wrong."""
    assert got.gradients[0].keys() == expected.gradients[0].keys(), "other parameters"
    assert len(got.losses) == len(expected.losses) == len(got.gradients) > 0
    for step, (loss, wanted) in enumerate(zip(got.losses, expected.losses, strict=True), 1):
        yield Error("loss", _size(loss - wanted, wanted), f"step {step}: loss {loss!r} instead of {wanted!r}")
    for step, (norm, wanted) in enumerate(zip(got.grad_norms, expected.grad_norms, strict=True), 1):
        words = f"step {step}: gradient norm {norm!r} instead of {wanted!r}"
        yield Error("grad_norm", _size(norm - wanted, wanted), words)
    for step, (gradients, wanted) in enumerate(zip(got.gradients, expected.gradients, strict=True), 1):
        for name, (low, high) in gradients.items():
            reference = wanted[name].low
            size = max(float(np.linalg.norm(reference)), tolerance.smallest * expected.grad_norms[step - 1])
            off = float(np.linalg.norm(np.maximum(abs(low - reference), abs(high - reference))))
            error = _size(off, size)
            yield Error("gradient", error, f"step {step}: gradient of {name} off by {error:.1e} (norm {size:.1e})")


def _size(error: float, reference: float) -> float:
    return abs(error / reference) if math.isfinite(error) else math.inf


def differences(got: Outcome, expected: Outcome, tolerance: Tolerance) -> list[str]:
    """Each number that is off by more than the tolerance, in words."""
    found = errors(got, expected, tolerance)
    return [error.words for error in found if not (error.size <= getattr(tolerance, error.kind))]
