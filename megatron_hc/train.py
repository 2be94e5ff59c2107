"""Pretraining, from top to bottom."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_hc import checkpoint
from megatron_hc.checkpoint_access import locked
from megatron_hc.cli import Parsed
from megatron_hc.config import TrainConfig
from megatron_hc.data import (
    Batch,
    Loader,
    SampleDataset,
    build_loader,
)
from megatron_hc.evaluation import Sums, lines_of, whole_losses
from megatron_hc.launch import SAVED_TO_RESUME, TrainingStopped, note_iteration
from megatron_hc.mesh import Mesh
from megatron_hc.model.branch import branch_factors
from megatron_hc.parallel.collectives import all_reduce
from megatron_hc.parallel.data import StepStats
from megatron_hc.parallel.expert import begin_step as begin_routers
from megatron_hc.parallel.expert import finish_step as finish_routers
from megatron_hc.parallel.pipeline import MicroBatch
from megatron_hc.parallel.replicas import differing_weights, samples_not_finite
from megatron_hc.parallel.straggler import straggler_report
from megatron_hc.residual_stats import Stats, measure
from megatron_hc.run import Progress, Run, save, set_up
from megatron_hc.signals import StopRequest
from megatron_hc.watchdog import watched


def train(parsed: Parsed) -> Progress:
    """Train as configured; returns how far the run came.

    Raises ``ValueError`` for settings, files and checkpoints that cannot work (before anything is written), and
    ``TrainingStopped`` at a loss or gradient that is not finite.
    """
    with StopRequest(parsed.config.training) as stop:
        run = set_up(parsed, stop=stop)
        with locked(run.config.checkpoint.save, run.mesh) as run.saver.check_folder:
            return train_until_stopped(run)


def train_until_stopped(run: Run) -> Progress:
    """Train, evaluate and save until the run is finished or has to stop."""
    config, progress = run.config, run.progress
    loader = build_loader(
        _required(run.datasets[0]),
        run.mesh,
        micro_batch_size=config.training.micro_batch_size,
        consumed_samples=progress.consumed_samples,
        num_workers=config.data.num_workers,
    )
    is_saved = progress.iteration > 0
    try:
        with run.logger, run.profiler, watched(config.parallel, run.mesh, lambda: progress.iteration):
            while not is_finished(run):
                run.profiler.step(progress.iteration)
                if progress.iteration + 1 in config.training.iterations_to_skip:
                    skip_step(run, loader)
                else:
                    train_step(run, loader)
                is_saved = False
                if _divides(config.training.eval_interval, progress.iteration):
                    evaluate(run, "validation")
                if _divides(config.evaluation.eval_harness_interval, progress.iteration):
                    score_tasks(run)
                if _divides(config.checkpoint.save_interval, progress.iteration):
                    save(run)
                    is_saved = True
                if should_exit(run):
                    break
            if not is_saved:
                save(run)
            if is_finished(run):
                if not _divides(config.training.eval_interval, progress.iteration):
                    evaluate(run, "validation")
                evaluate(run, "test")
                if not _divides(config.evaluation.eval_harness_interval, progress.iteration):
                    score_tasks(run)
            run.optimizer.wait_for_parameters()
            with run.logger.pause("saving"):  # the run has not ended before its last checkpoint is there
                run.saver.wait()
        progress.exit_code = run.saver.exit_code(progress.iteration, progress.exit_code)
    except (Exception, KeyboardInterrupt) as error:
        note_iteration(error, progress.iteration + 1)
        raise
    finally:
        loader.close()
        run.saver.join()
    return progress


def train_step(run: Run, loader: Loader) -> None:
    """One update of the weights from one global batch."""
    progress = run.progress
    consumed = progress.consumed_samples
    batches = loader.next(run.batches.num_micro_batches(consumed))
    micro_batches = leave_out(weighted(batches, run.config, run.mesh), run, loader.last_samples)
    if not run.model.training:  # train() walks through all modules
        run.model.train()
    begin_routers(
        *(run.model, run.mesh),
        seed=run.config.training.seed,
        iteration=progress.iteration,
        num_micro_batches=len(micro_batches),
    )
    run.optimizer.begin(len(micro_batches))
    losses = run.pipeline.forward_backward(micro_batches)
    loss = float(all_reduce(losses.sum(), run.mesh.group("dp_cp")))
    run.optimizer.reduce_gradients()
    grad_norm = run.optimizer.grad_norm()
    check_finite(run, losses, loss, grad_norm, loader)
    for warning in run.spikes.warnings(loss, grad_norm, progress.iteration + 1, loader.last_samples):
        run.logger.say(warning)
    has_stats = _divides(run.config.logging.log_residual_stats, progress.iteration + 1)
    layer_norms = run.optimizer.layer_grad_norms(run.config.model.num_layers) if has_stats else []
    stats: StepStats = run.optimizer.step(
        grad_norm,
        run.learning_rate.at(consumed),
        run.weight_decay.at(consumed),
        count_zeros=run.config.logging.log_num_zeros_in_grad,
    )
    progress.iteration += 1
    check_replicas(run)
    batch_size = run.batches.global_batch_size(consumed)
    progress.consumed_samples += batch_size
    run.logger.step(
        iteration=progress.iteration,
        consumed_samples=progress.consumed_samples,
        batch_size=batch_size,
        loss=loss,
        grad_norm=stats.grad_norm,
        # Megatron-LM prints the rate that the next step will use.
        learning_rate=run.learning_rate.at(progress.consumed_samples),
        num_zeros=stats.num_zeros,
        params_norm=run.optimizer.params_norm if run.config.logging.log_params_norm else None,
        router_losses=finish_routers(run.model, run.mesh),
        bubble=run.pipeline.bubble if run.mesh.size("pp") > 1 else None,
    )
    if run.config.logging.log_straggler and run.logger.is_due(progress.iteration):
        run.logger.say(straggler_report(*run.pipeline.work(), run.mesh))
    if has_stats:
        log_residual_stats(run, micro_batches[0], layer_norms)


def log_residual_stats(run: Run, micro_batch: MicroBatch, layer_norms: list[float]) -> None:
    """--log-residual-stats: measure the first micro-batch of every data-parallel rank with the step's new weights."""
    with run.logger.pause():
        run.optimizer.wait_for_parameters()
        whole = micro_batch._replace(branch_factors=None)
        stats = measure(run.model, run.mesh, lambda: run.pipeline.forward([whole]))
    norms: Stats = {"grad_norm": [*layer_norms]}
    run.logger.residual(run.progress.iteration, run.progress.consumed_samples, norms | stats)


def skip_step(run: Run, loader: Loader) -> None:
    """--iterations-to-skip: the samples are read, and nothing is learned from them."""
    consumed = run.progress.consumed_samples
    loader.next(run.batches.num_micro_batches(consumed))
    run.progress.iteration += 1
    run.progress.consumed_samples += run.batches.global_batch_size(consumed)
    run.logger.skipped(run.progress.iteration)


def weighted(batches: Sequence[Batch], config: TrainConfig, mesh: Mesh) -> list[MicroBatch]:
    """Give every token its share of the global batch's loss.

    With --calculate-per-token-loss: 1 over the unmasked tokens of the global batch; otherwise Megatron-LM's mean of
    micro-batch means. Normalised here, once: nothing later divides a loss or a gradient.
    """
    masks = [batch.loss_mask for batch in batches]
    if config.training.calculate_per_token_loss:
        total = all_reduce(torch.stack([mask.sum() for mask in masks]).sum(), mesh.group("dp")).clamp(min=1)
        weights = [mask / total for mask in masks]
    else:
        share = len(batches) * mesh.size("dp")
        weights = [mask / (mask.sum().clamp(min=1) * share) for mask in masks]
    # Positions 0 .. S-1 are the model's default, and cheaper when shared by the whole batch.
    resets = config.data.reset_position_ids
    return [
        MicroBatch(batch.tokens, batch.labels, weight, batch.position_ids if resets else None, batch.document_ids)
        for batch, weight in zip(batches, weights, strict=True)
    ]


def leave_out(micro_batches: list[MicroBatch], run: Run, samples: Sequence[int]) -> list[MicroBatch]:
    """Say what stochastic depth and LayerDrop leave out of each micro-batch; samples: of all, one after the other."""
    size = len(samples) // len(micro_batches)
    found = []
    for index, batch in enumerate(micro_batches):
        own = samples[index * size : (index + 1) * size]
        factors = branch_factors(run.config.model, run.config.training.seed, run.progress.iteration, own)
        found.append(batch._replace(branch_factors=None if factors is None else factors.to(run.mesh.device)))
    return found


def check_finite(run: Run, losses: Tensor, loss: float, grad_norm: float, loader: Loader) -> None:
    """Stop before a loss or gradient that is not finite reaches the weights; losses: of this rank's micro-batches."""
    if not run.config.training.check_for_nan_in_loss_and_grad or math.isfinite(loss) and math.isfinite(grad_norm):
        return
    folder = run.config.checkpoint.save or run.config.checkpoint.load
    last = checkpoint.latest_iteration(folder) if folder else None
    known = "there is no checkpoint" if last is None else f"the last good checkpoint is iteration {last} in {folder}"
    found = samples_not_finite(losses, run.optimizer.slots, loader.last_samples, run.mesh)
    where = [
        f"samples {', '.join(map(str, samples[:16]))}{' ...' if len(samples) > 16 else ''} of rank {rank}"
        for rank, samples in found.items()
    ]
    raise TrainingStopped(
        f"loss {loss} and gradient norm {grad_norm} at iteration {run.progress.iteration + 1} are not both finite "
        f"({'; '.join(where) or 'only their sums over ranks'}); {known}"
    )


def check_replicas(run: Run) -> None:
    """--check-weight-hash-across-dp-replicas-interval: stop where copies of the weights have come apart."""
    if _divides(run.config.training.check_weight_hash_across_dp_replicas_interval, run.progress.iteration):
        run.optimizer.wait_for_parameters()
        found = differing_weights(run.optimizer.slots, run.optimizer.sharding, run.mesh)
        if found is not None:
            raise TrainingStopped(f"copies of the weights came apart at iteration {run.progress.iteration}: {found}")


def evaluate(run: Run, split: str) -> float | None:
    """Mean loss over the next --eval-iters global batches of a split, logged; None where there is nothing to do.

    Every validation of a run reads the samples after those of the one before, as in Megatron-LM.
    """
    if split == "validation" and run.whole_validation:
        return evaluate_whole(run)
    training, progress = run.config.training, run.progress
    dataset = run.datasets[1 if split == "validation" else 2]
    if dataset is None or training.eval_iters == 0 or training.eval_interval == 0:
        return None
    earlier = (progress.iteration - 1) // training.eval_interval if split == "validation" else 0
    with run.logger.pause("validation"):
        loader = build_loader(
            dataset,
            run.mesh,
            micro_batch_size=training.micro_batch_size,
            consumed_samples=earlier * training.eval_iters * run.batches.largest,
            cyclic=True,
        )
        run.model.eval()
        run.optimizer.wait_for_parameters()
        total = torch.zeros(())
        for _ in range(training.eval_iters):
            batches = loader.next(run.batches.largest // run.batches.per_micro_batch)
            total = total + run.pipeline.forward(weighted(batches, run.config, run.mesh)).sum()
        loss = float(all_reduce(total, run.mesh.group("dp_cp"))) / training.eval_iters
    run.logger.evaluation(split, progress.iteration, progress.consumed_samples, loss)
    return loss


def evaluate_whole(run: Run) -> float:
    """Mean loss over all tokens of the validation data, logged with its standard error and for each source."""
    with run.logger.pause():
        run.model.eval()
        run.optimizer.wait_for_parameters()
        sums = whole_losses(run.whole_validation, run.pipeline, run.config, run.mesh)
    total = sum(sums.values(), Sums(torch.zeros(6, dtype=torch.float64))).mean()
    means = {name: part.mean() for name, part in sums.items()}
    details: dict[str, float | None] = {
        "lm_loss_validation_stderr": total.standard_error,
        "validation_tokens": total.num_tokens,
    }
    for name, mean in means.items():
        details |= {f"validation/{name}/lm_loss": mean.loss, f"validation/{name}/lm_loss_stderr": mean.standard_error}
    lines = lines_of({**means, "all": total} if len(means) > 1 else means)
    progress = run.progress
    run.logger.evaluation(
        "validation", progress.iteration, progress.consumed_samples, total.loss, details=details, lines=lines
    )
    return total.loss


def score_tasks(run: Run) -> None:
    """--eval-harness-tasks, logged."""
    if run.tasks is None:
        return
    with run.logger.pause():
        run.model.eval()
        run.optimizer.wait_for_parameters()
        scores = run.tasks.scores(run.model, run.config, run.mesh, run.tokenizer)
    run.logger.scores(run.progress.iteration, run.progress.consumed_samples, scores)


def is_finished(run: Run) -> bool:
    """Whether all of --train-iters or --train-samples is done."""
    training, progress = run.config.training, run.progress
    if training.train_samples is not None:
        # A last batch that is not full is left out, as in Megatron-LM.
        consumed = progress.consumed_samples
        return consumed + run.batches.global_batch_size(consumed) > training.train_samples
    return progress.iteration >= (training.train_iters or 0)


def should_exit(run: Run) -> bool:
    """--exit-interval, --exit-duration-in-mins and --exit-signal, agreed on by all ranks."""
    training, progress = run.config.training, run.progress
    minutes = (time.monotonic() - progress.started) / 60
    is_late = training.exit_duration_in_mins is not None and minutes > training.exit_duration_in_mins
    signal, is_late = run.stop.agreed(is_late, run.mesh)
    if signal is not None and not is_finished(run):
        run.logger.say(f"{signal}: saving and exiting the program at iteration {progress.iteration}")
        progress.exit_code = SAVED_TO_RESUME
        return True
    if is_late or _divides(training.exit_interval, progress.iteration):
        run.logger.say(f"exiting the program at iteration {progress.iteration}")
        return True
    return False


def _divides(interval: int | None, iteration: int) -> bool:
    return bool(interval) and iteration % int(interval or 1) == 0


def _required(dataset: SampleDataset | None) -> SampleDataset:
    if dataset is None:
        raise ValueError("no training data: the first share of --split must be above 0")
    return dataset
