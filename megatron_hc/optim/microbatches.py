"""How many samples a step takes, as a pure function of the samples consumed before it (Megatron-LM's ramp-up)."""

from __future__ import annotations

from megatron_hc.config import TrainingConfig


class BatchSchedule:
    """Global batch size and number of micro-batches of every step; the length of the run.

    With --rampup-batch-size START INCREMENT SAMPLES the batch grows from START to --global-batch-size in equal steps,
    each lasting SAMPLES / number of steps; it has its full size once more than SAMPLES samples are consumed.
    """

    def __init__(self, config: TrainingConfig, data_parallel_size: int = 1) -> None:
        self.per_micro_batch = config.micro_batch_size * data_parallel_size
        """Samples of one micro-batch over all data-parallel ranks."""
        self.largest = config.global_batch_size or self.per_micro_batch
        """The full global batch size."""
        self._start, self._increment, self._ramp_samples = config.rampup_batch_size or (self.largest, 1, 0)
        self._num_steps = (self.largest - self._start) // self._increment
        self._train_iters, self._train_samples = config.train_iters, config.train_samples
        self.total_iterations = self.iterations_at_end(0, 0)
        """Iterations of the run. With --train-samples, a last partial batch is left out, as in Megatron-LM."""
        self.total_samples = config.train_samples or self.total_iterations * self.largest
        """Samples that the training data must have."""

    def global_batch_size(self, consumed_samples: int) -> int:
        """Samples of the step that starts after ``consumed_samples`` samples."""
        if self._num_steps == 0 or consumed_samples > self._ramp_samples:
            return self.largest
        # Division in float as Megatron-LM does it, so that a step begins at the same sample.
        return self._start + int(consumed_samples / (self._ramp_samples / self._num_steps)) * self._increment

    def num_micro_batches(self, consumed_samples: int) -> int:
        """Micro-batches per data-parallel rank of the step that starts after ``consumed_samples`` samples."""
        return self.global_batch_size(consumed_samples) // self.per_micro_batch

    def iterations_at_end(self, iteration: int, consumed_samples: int) -> int:
        """Iterations of the run when it ends, for one that has done so many with batches of today's or other sizes."""
        if self._train_samples is None:
            return self._train_iters or 0
        iterations, consumed = iteration, consumed_samples
        while self._num_steps and consumed <= self._ramp_samples:
            consumed += self.global_batch_size(consumed)
            iterations += 1
        # Negative where the ramp's last batch passes the end of the run: then that batch is the one left out.
        return max(iteration, iterations + (self._train_samples - consumed) // self.largest)
