"""What is measured during a run beside the training loss."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from megatron_hc.config.common import flag, positive, require


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """What is measured during a run beside the training loss."""

    full_validation: bool = False
    """Every validation reads all of the validation data once, instead of --eval-iters batches of it."""
    eval_harness_tasks: tuple[str, ...] = ()
    """Tasks of lm-evaluation-harness to score during the run (needs the extra eval)."""
    eval_harness_interval: int | None = None
    """Iterations between scores of --eval-harness-tasks (default: only at the end of the run)."""
    eval_harness_include_path: str | None = None
    """Folder with tasks of your own."""
    eval_harness_num_fewshot: int | None = None
    """Examples in front of every question (default: as the task says)."""
    eval_harness_limit: int | None = None
    """Questions per task (default: all)."""
    eval_harness_batch_size: int | None = None
    """Texts of a batch of one data-parallel rank (default: as many as make about 8,192 tokens)."""

    def validate(self) -> None:
        positive(self, "eval_harness_interval", "eval_harness_limit", "eval_harness_batch_size")
        shots = self.eval_harness_num_fewshot
        require(shots is None or shots >= 0, f"--eval-harness-num-fewshot must not be negative, not {shots}")
        for item in dataclasses.fields(self):
            if item.name not in ("full_validation", "eval_harness_tasks"):
                given = getattr(self, item.name) is not None
                require(not given or bool(self.eval_harness_tasks), f"{flag(item.name)} needs --eval-harness-tasks")
