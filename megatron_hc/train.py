"""Pretraining, from top to bottom."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from megatron_hc import checkpoint
from megatron_hc.backends import Fp8State, attach_backends, check_backends, checkpoint_of
from megatron_hc.checkpoint_access import check_not_locked, choose, going_on, locked, newer_checkpoint
from megatron_hc.cli import Parsed, describe, dump
from megatron_hc.config import TrainConfig
from megatron_hc.cpu_memory import keep_freed_memory
from megatron_hc.data import (
    Batch,
    Loader,
    SampleDataset,
    Tokenizer,
    build_datasets,
    build_loader,
    build_whole_validation,
    tokenizer_of,
)
from megatron_hc.evaluation import Sums, Tasks, lines_of, whole_losses
from megatron_hc.kernels.boundary import check_backend
from megatron_hc.launch import SAVED_TO_RESUME, TrainingStopped, note_iteration
from megatron_hc.log import Logger
from megatron_hc.mesh import Mesh, build_mesh
from megatron_hc.model.branch import branch_factors
from megatron_hc.model.gpt import GPT
from megatron_hc.optim import BatchSchedule, LearningRate, WeightDecay, adam_update, parameter_groups
from megatron_hc.parallel.collectives import all_reduce
from megatron_hc.parallel.compiled import compile_layers
from megatron_hc.parallel.data import DataParallelOptimizer, StepStats
from megatron_hc.parallel.deepspeed import DeepSpeedOptimizer, check_deepspeed
from megatron_hc.parallel.expert import begin_step as begin_routers
from megatron_hc.parallel.expert import finish_step as finish_routers
from megatron_hc.parallel.fsdp import cast_what_is_left, shard_fully
from megatron_hc.parallel.pipeline import MicroBatch, Pipeline
from megatron_hc.parallel.placement import Placement
from megatron_hc.parallel.plan import (
    build_model,
    cast_parameters,
    compute_dtype,
    materialize,
    owned_parameters,
    parallelize,
    parameter_dtype,
    placements,
)
from megatron_hc.parallel.profile import Profiler
from megatron_hc.parallel.replicas import differing_weights, samples_not_finite
from megatron_hc.parallel.slots import expert_sharding_of, sharding_of
from megatron_hc.parallel.straggler import ranks_by_host, straggler_report
from megatron_hc.place import explain, place_of
from megatron_hc.residual_stats import Stats, measure
from megatron_hc.save_lock import job_and_attempt
from megatron_hc.signals import StopRequest
from megatron_hc.spikes import SpikeWatch
from megatron_hc.state import from_dense, gather_state, is_dense, model_tensors, restore_state, training_tensors
from megatron_hc.stored import Stored
from megatron_hc.watchdog import watched


@dataclass
class Progress:
    """How far the run is."""

    iteration: int = 0
    consumed_samples: int = 0
    started: float = field(default_factory=time.monotonic)
    exit_code: int = 0
    """Of the process, once training has ended."""


@dataclass
class Run:
    """Everything a step needs."""

    config: TrainConfig
    arguments: dict[str, Any]
    mesh: Mesh
    tokenizer: Tokenizer
    model: GPT
    placed: dict[str, Placement]
    pipeline: Pipeline
    optimizer: DataParallelOptimizer
    fp8_state: Fp8State
    batches: BatchSchedule
    learning_rate: LearningRate
    weight_decay: WeightDecay
    datasets: Sequence[SampleDataset | None]
    whole_validation: dict[str, SampleDataset]
    """Of --full-validation, by name of the source."""
    tasks: Tasks | None
    """Of --eval-harness-tasks."""
    progress: Progress
    logger: Logger
    profiler: Profiler
    saver: checkpoint.Saver
    stop: StopRequest
    spikes: SpikeWatch


def train(parsed: Parsed) -> Progress:
    """Train as configured; returns how far the run came.

    Raises ``ValueError`` for settings, files and checkpoints that cannot work (before anything is written), and
    ``TrainingStopped`` at a loss or gradient that is not finite.
    """
    with StopRequest(parsed.config.training) as stop:
        run = set_up(parsed, stop=stop)
        with locked(run.config.checkpoint.save, run.mesh):
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
        run.saver.wait()
        progress.exit_code = run.saver.exit_code(progress.iteration, progress.exit_code)
    except (Exception, KeyboardInterrupt) as error:
        note_iteration(error, progress.iteration + 1)
        raise
    finally:
        loader.close()
        run.saver.join()
    return progress


def set_up(parsed: Parsed, mesh: Mesh | None = None, stop: StopRequest | None = None) -> Run:
    """Check everything that can be wrong, then build it, then load; ``mesh``: of processes that are already joined."""
    config = parsed.config
    if mesh is None:
        check_deepspeed(config, place_of().world_size)
        mesh = build_mesh(config)
    if torch.device(mesh.device).type == "cpu":
        keep_freed_memory()
    if config.checkpoint.save is not None:
        checkpoint.check_save_folder(config.checkpoint.save)
        checkpoint.check_not_megatrons(config.checkpoint.save)
        check_not_locked(config.checkpoint.save, mesh)
    config = dataclasses.replace(config, checkpoint=going_on(config.checkpoint, mesh))
    check_kernels(config, mesh)
    tokenizer = tokenizer_of(config.data)
    model = build_model(config, tokenizer.vocab_size, mesh, checkpoint_of(config))
    placed = placements(model, mesh)
    source = choose(config.checkpoint, mesh)
    if source is not None:
        checkpoint.check(source, asked_of(source, config, model_tensors(model, placed)))
    batches = BatchSchedule(config.training, mesh.size("dp"))
    progress = Progress()
    if source is not None and not takes_weights_only(source, config):
        state = checkpoint.read_state(source)
        progress.iteration, progress.consumed_samples = state["iteration"], state["consumed_samples"]
    logger = Logger(
        config,
        mesh,
        tokenizer.vocab_size,
        total_iterations=batches.iterations_at_end(progress.iteration, progress.consumed_samples),
        start_iteration=progress.iteration,
    )
    profiler = Profiler(config.logging, mesh)
    tasks = Tasks(config, mesh) if config.evaluation.eval_harness_tasks else None
    is_whole = config.evaluation.full_validation
    whole = build_whole_validation(config, tokenizer, num_mock_samples(config, batches)) if is_whole else {}
    datasets = build_datasets(config, tokenizer, num_samples(config, batches))  # writes index caches: comes last
    check_enough_samples(config, batches, progress, datasets[0])
    logger.say(explain(place_of()))
    logger.say(describe(parsed.config, parsed.origins))
    if config.checkpoint.load is not None and source is None:
        logger.say(f"--load {config.checkpoint.load} holds no checkpoint yet: the run begins anew")
    if config.checkpoint != parsed.config.checkpoint:
        logger.say(f"started again: going on from {source}, not from where the flags let the first attempt begin")
    if mesh.is_first and (newest := newer_checkpoint(config.checkpoint.save, progress.iteration)) is not None:
        logger.say(
            f"WARNING: --save {config.checkpoint.save} holds a checkpoint of iteration {newest}, and this run begins "
            f"at {progress.iteration}: its checkpoints will replace those that it meets"
        )
    if config.logging.log_straggler:
        logger.say(ranks_by_host(mesh))
    if mesh.size("pp") > 1:
        logger.say(config.parallel.pipeline_layout(config.model.num_layers).describe())
    # Dropout only: initial weights and data order have seeds of their own. Stages do not repeat each other's masks.
    torch.manual_seed(config.training.seed + 100 * mesh.rank("pp"))
    optimizer = build_optimizer(config, model, placed, mesh)
    attached = attach_backends(model, config, mesh)
    for line in attached.said:
        logger.say(line)
    if config.training.compile:
        compile_layers(model, config.parallel, mesh)
    run = Run(
        config=config,
        arguments=dump(parsed.config, parsed.origins),
        mesh=mesh,
        tokenizer=tokenizer,
        model=model,
        placed=placed,
        pipeline=Pipeline(model, config, mesh),
        optimizer=optimizer,
        fp8_state=attached.fp8_state,
        batches=batches,
        learning_rate=LearningRate(config.optimizer, config.training, mesh.size("dp")),
        weight_decay=WeightDecay(config.optimizer, config.training, mesh.size("dp")),
        datasets=datasets,
        whole_validation=whole,
        tasks=tasks,
        progress=progress,
        logger=logger,
        profiler=profiler,
        saver=checkpoint.Saver(mesh, config.checkpoint.async_save, logger.say),
        stop=stop or StopRequest(config.training),
        spikes=SpikeWatch(config.training),
    )
    if source is not None:
        load(run, source)
    return run


def check_kernels(config: TrainConfig, mesh: Mesh) -> None:
    """Refuse kernels that this machine does not have, and build what is built at first use."""
    device, backend = torch.device(mesh.device), config.model.attention_backend
    if device.type == "cpu" and backend == "fused":
        raise ValueError("--attention-backend fused is cuDNN's and needs --device cuda, not cpu: use flash or auto")
    check_backend(config.model.fused_residual_backend, device)
    check_backends(config, device)


def build_optimizer(config: TrainConfig, model: GPT, placed: dict[str, Placement], mesh: Mesh) -> DataParallelOptimizer:
    """Initial weights, their fp32 masters, then the cast to the compute dtype."""
    dtype = compute_dtype(config)
    materialize(model, placed, config.training.seed, mesh, dtype)
    parallelize(model, mesh)
    fully = config.parallel.data_parallel_sharding_strategy == "optim_grads_params"
    shardings = sharding_of(config.parallel, mesh), expert_sharding_of(config.parallel, mesh)
    is_cast = fully and shard_fully(model, model.stage_layers(), mesh, *shardings, dtype)
    dtypes = {name: parameter_dtype(module, dtype) for name, module, _ in owned_parameters(model)}
    groups = parameter_groups(model, config.model)
    if config.zero.deepspeed:
        return DeepSpeedOptimizer(model, groups, config, mesh, dtype, placed)
    optimizer = DataParallelOptimizer(
        groups,
        config.optimizer,
        config.parallel,
        mesh,
        dtypes,
        placed,
        users=model.stage_layers(),
        update=adam_update(config.backends.optimizer_impl, state_device(config, mesh)),
    )
    if is_cast:
        cast_what_is_left(model, dtype)
    else:
        cast_parameters(model, dtype)
    return optimizer


def state_device(config: TrainConfig, mesh: Mesh) -> torch.device:
    """Where master weights and moments are."""
    return torch.device("cpu" if config.parallel.optimizer_cpu_offload else mesh.device)


def num_samples(config: TrainConfig, batches: BatchSchedule) -> tuple[int, int, int]:
    """Samples that training, all validations and the test will take (Megatron-LM's numbers)."""
    training = config.training
    per_eval = training.eval_iters * batches.largest
    num_evals = batches.total_iterations // training.eval_interval + 1 if training.eval_interval else 0
    if config.evaluation.full_validation:
        num_evals = 0
    return batches.total_samples, num_evals * per_eval, per_eval if training.eval_interval else 0


def check_enough_samples(
    config: TrainConfig, batches: BatchSchedule, progress: Progress, dataset: SampleDataset | None
) -> None:
    """Refuse to resume what would run out of data: at --train-iters there are samples for steps of today's size."""
    remaining = batches.total_iterations - progress.iteration
    needed = progress.consumed_samples + remaining * batches.largest
    if config.training.train_iters is None or dataset is None or remaining <= 0 or needed <= len(dataset):
        return
    raise ValueError(
        f"--train-iters ({config.training.train_iters}) of --global-batch-size ({batches.largest}) make "
        f"{len(dataset)} samples, but the checkpoint has consumed {progress.consumed_samples} in {progress.iteration} "
        f"iterations and {remaining} are left: give the checkpoint's --global-batch-size, or --train-samples {needed} "
        "instead of --train-iters"
    )


def num_mock_samples(config: TrainConfig, batches: BatchSchedule) -> int:
    """Samples of a whole validation on --mock-data, which never ends."""
    return max(config.training.eval_iters, 1) * batches.largest


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


def is_upcycled(source: Any, config: TrainConfig) -> bool:
    """Whether a dense checkpoint becomes a model with experts."""
    return config.checkpoint.moe_use_upcycling and is_dense(checkpoint.load_tensor_shapes(source))


def takes_weights_only(source: Any, config: TrainConfig) -> bool:
    """Whether the run begins at iteration 0 with the weights of a checkpoint."""
    return config.checkpoint.finetune or is_upcycled(source, config)


def asked_of(source: Any, config: TrainConfig, tensors: dict[str, Stored]) -> dict[str, Stored]:
    """What the checkpoint is asked for so that ``tensors`` are filled."""
    if not is_upcycled(source, config):
        return tensors
    assert config.model.moe.num_experts is not None
    return from_dense(tensors, config.model.moe.num_experts)


def save(run: Run) -> None:
    """Write a checkpoint, if --save is given."""
    options, progress = run.config.checkpoint, run.progress
    if options.save is None:
        return
    state = gather_state(run.optimizer, progress.iteration, progress.consumed_samples, with_rng=options.save_rng)
    with run.logger.pause("saving"):
        run.saver.save(
            options.save,
            progress.iteration,
            training_tensors(run.model, run.placed, run.optimizer, with_optimizer=options.save_optim)
            | (run.fp8_state.tensors() if options.save_optim else {}),
            state | {"logger": run.logger.state(), "spikes": run.spikes.state(), "job": job_and_attempt()[0]},
            run.arguments,
            retain_interval=options.save_retain_interval,
        )


def load(run: Run, source: Any) -> None:
    """Weights, optimizer and random state from a checkpoint, as far as the options ask for them."""
    options, weights_only = run.config.checkpoint, takes_weights_only(source, run.config)
    with_optimizer = options.load_optim and not weights_only
    tensors = training_tensors(run.model, run.placed, run.optimizer, with_optimizer=with_optimizer)
    checkpoint.load(source, asked_of(source, run.config, tensors), mesh=run.mesh)
    if with_optimizer:
        scales = run.fp8_state.asked(checkpoint.load_tensor_shapes(source))
        checkpoint.load(source, scales, prefixes=(), mesh=run.mesh)
    run.optimizer.update_parameters()
    state = checkpoint.read_state(source)
    with_rng = options.load_rng and not weights_only
    restore_state(state, run.optimizer if with_optimizer else None, run.mesh, with_rng=with_rng)
    model = run.config.model
    if with_rng and "rng" not in state and max(model.hidden_dropout, model.attention_dropout) > 0:
        run.logger.say(f"WARNING: {source} holds no state of the random generators: dropout begins as at iteration 0")
    if not weights_only:
        run.logger.restore(state["logger"])
        run.spikes.restore(state.get("spikes", {}))
    run.logger.say(f"loaded {source}")


def _divides(interval: int | None, iteration: int) -> bool:
    return bool(interval) and iteration % int(interval or 1) == 0


def _required(dataset: SampleDataset | None) -> SampleDataset:
    if dataset is None:
        raise ValueError("no training data: the first share of --split must be above 0")
    return dataset
