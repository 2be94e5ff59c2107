"""Measurements during a run beside the mean over --eval-iters batches: whole validation files, and tasks.

Dims: B samples of a micro-batch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_hc.config import TrainConfig
from megatron_hc.data import SampleDataset, Tokenizer
from megatron_hc.data.loader import Batch, collate
from megatron_hc.inference.decoder import check_can_write
from megatron_hc.mesh import Mesh
from megatron_hc.model.gpt import GPT
from megatron_hc.parallel.collectives import all_reduce
from megatron_hc.parallel.pipeline import MicroBatch, Pipeline

MAX_IN_FLIGHT = 16  # micro-batches that go through the pipeline together


class Mean(NamedTuple):
    """A mean loss per token."""

    loss: float
    """Nats."""
    standard_error: float | None
    """None where there is one sample only."""
    num_tokens: int
    """Tokens that carry a loss."""


@dataclass
class Sums:
    """Sums over samples of their losses L and numbers of tokens n, from which means and standard errors follow."""

    values: Tensor
    """[6] float64: samples, L, n, L^2, L n, n^2."""

    @classmethod
    def of(cls, losses: Tensor, counts: Tensor) -> Sums:
        """Samples without a token do not count."""
        losses, counts = losses.double(), counts.double()
        parts = ((counts > 0).double(), losses, counts, losses**2, losses * counts, counts**2)
        return cls(torch.stack([part.sum() for part in parts]))

    def __add__(self, other: Sums) -> Sums:
        return Sums(self.values + other.values)

    def mean(self) -> Mean:
        """Loss per token and its standard error.

        Tokens of one sample depend on each other, so the samples are what is drawn: the error is that of the ratio
        sum L / sum n, sqrt(k / (k - 1) sum (L - mean n)^2) / sum n with k samples.
        """
        number, losses, tokens, squares, products, counts = self.values.tolist()
        if tokens == 0:  # --eod-mask-loss or padding can leave nothing: no reason to end a run
            return Mean(math.nan, None, 0)
        loss = losses / tokens
        spread = max(squares - 2 * loss * products + loss**2 * counts, 0.0)
        error = None if number < 2 else math.sqrt(number / (number - 1) * spread) / tokens
        return Mean(loss, error, int(tokens))


def whole_losses(
    sources: Mapping[str, SampleDataset], pipeline: Pipeline, config: TrainConfig, mesh: Mesh
) -> dict[str, Sums]:
    """Every sample of every source once, by name; all processes call together, and get the same.

    ``pipeline`` is of a model in evaluation mode, with tensors of --micro-batch-size samples.
    """
    found = {}
    for name, dataset in sources.items():
        B, copies = config.training.micro_batch_size, mesh.size("dp")
        num_rounds = -(-len(dataset) // (B * copies))
        sums = Sums(torch.zeros(6, dtype=torch.float64))
        for first in range(0, num_rounds, MAX_IN_FLIGHT):
            rounds = range(first, min(first + MAX_IN_FLIGHT, num_rounds))
            batches = [_batch(dataset, (number * copies + mesh.rank("dp")) * B, B, mesh.device) for number in rounds]
            resets = config.data.reset_position_ids
            micro_batches = [
                MicroBatch(b.tokens, b.labels, b.loss_mask, b.position_ids if resets else None, b.document_ids)
                for b in batches
            ]
            losses = pipeline.measure(micro_batches, _loss_per_sample, (B,))
            losses = all_reduce(losses, mesh.group("cp"))  # a rank has the losses of its tokens
            counts = torch.stack([batch.loss_mask.sum(1) for batch in batches])
            sums = sums + Sums.of(losses.cpu(), counts.cpu())
        found[name] = Sums(all_reduce(sums.values.to(mesh.device), mesh.group("dp")).cpu())
    return found


def _batch(dataset: SampleDataset, first: int, size: int, device: str) -> Batch:
    """``size`` samples from ``first`` on; beyond the last one, samples without loss."""
    last = len(dataset) - 1
    batch = collate([dataset[min(index, last)] for index in range(first, first + size)])
    batch.loss_mask[max(last + 1 - first, 0) :] = 0.0
    return batch.to(device)


def _loss_per_sample(model: GPT, hidden: Tensor, batch: MicroBatch) -> Tensor:
    """[B]"""
    losses, _ = model.output.scores(hidden, batch.labels, batch.weights > 0)
    return (losses.double() * batch.weights).sum(1)


class Tasks:
    """--eval-harness-tasks.

    Raises ``ValueError`` before any training for tasks that do not exist, cannot be loaded or cannot be scored at this
    layout.
    """

    def __init__(self, config: TrainConfig, mesh: Mesh) -> None:
        from megatron_hc.inference.harness import register

        self.options = config.evaluation
        self.model_class: Any = register()
        from lm_eval.tasks import TaskManager

        path, names = self.options.eval_harness_include_path, self.options.eval_harness_tasks
        self.manager = TaskManager(include_path=path, include_defaults=False) if path is not None else TaskManager()
        if path is not None and not set(names) <= set(self.manager.all_tasks):
            self.manager = TaskManager(include_path=path)
        unknown = [name for name in names if name not in self.manager.all_tasks]
        if unknown:
            raise ValueError(f"--eval-harness-tasks: lm-evaluation-harness has no task {', '.join(unknown)}")
        if any(self._writes(name) for name in names):
            check_can_write(config, mesh)

    def _writes(self, name: str) -> bool:
        """Whether a task, or one of its group, has text written."""
        from lm_eval.tasks import get_task_dict

        try:
            found = get_task_dict([name], self.manager)
        except Exception as error:  # whatever the task's own code and data make of it
            raise ValueError(f"--eval-harness-tasks {name} cannot be loaded: {error}") from error
        return _has_generation(found)

    def scores(self, model: GPT, config: TrainConfig, mesh: Mesh, tokenizer: Tokenizer) -> dict[str, float]:
        """'TASK/METRIC' -> number, on the first process; all call together, with a model in evaluation mode."""
        from lm_eval import simple_evaluate

        options = self.options
        results = simple_evaluate(
            model=self.model_class.of(model, config, mesh, tokenizer, options.eval_harness_batch_size),
            tasks=list(options.eval_harness_tasks),
            num_fewshot=options.eval_harness_num_fewshot,
            limit=options.eval_harness_limit,
            task_manager=self.manager,
            bootstrap_iters=0,
            # The run's random generators stay as they are.
            random_seed=None,
            numpy_random_seed=None,
            torch_random_seed=None,
            verbosity="ERROR",
        )
        return {} if results is None else flat_scores(results["results"])


def _has_generation(tasks: Any) -> bool:
    if isinstance(tasks, Mapping):
        return any(_has_generation(inner) for inner in tasks.values())
    return getattr(tasks, "OUTPUT_TYPE", None) == "generate_until"


def flat_scores(results: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """The harness's results ({task: {"acc,none": 0.5, "acc_stderr,none": ..}}) by 'task/acc', 'task/acc_stderr'."""
    found = {}
    for task, metrics in results.items():
        for key, value in metrics.items():
            metric, _, kind = key.partition(",")
            if isinstance(value, int | float) and not isinstance(value, bool) and kind:
                found[f"{task}/{metric}" + ("" if kind == "none" else f"/{kind}")] = float(value)
    return found


def lines_of(means: Mapping[str, Mean]) -> Sequence[str]:
    """One line per source."""
    width = max(map(len, means))
    return [
        f"  {name:{width}} | loss {mean.loss:.6f}"
        + ("" if mean.standard_error is None else f" +- {mean.standard_error:.6f}")
        + f" | perplexity {math.exp(min(mean.loss, 20.0)):.4f} | tokens {mean.num_tokens}"
        for name, mean in means.items()
    ]
