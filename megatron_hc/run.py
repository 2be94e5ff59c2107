"""A run: what it is made of, and how it is checked, built, loaded and saved."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from megatron_hc import checkpoint
from megatron_hc.backends import Fp8State, attach_backends, check_backends, checkpoint_of
from megatron_hc.checkpoint_access import check_not_taken, choose, going_on, newer_checkpoint
from megatron_hc.cli import Parsed, describe, dump
from megatron_hc.config import TrainConfig
from megatron_hc.cpu_memory import keep_freed_memory
from megatron_hc.data import (
    SampleDataset,
    Tokenizer,
    build_datasets,
    build_whole_validation,
    tokenizer_of,
)
from megatron_hc.evaluation import Tasks
from megatron_hc.kernels.boundary import check_backend
from megatron_hc.log import Logger
from megatron_hc.mesh import Mesh, build_mesh
from megatron_hc.model.attention import check_attention
from megatron_hc.model.gpt import GPT
from megatron_hc.optim import BatchSchedule, LearningRate, WeightDecay, adam_update, parameter_groups
from megatron_hc.parallel.compiled import compile_layers
from megatron_hc.parallel.data import DataParallelOptimizer
from megatron_hc.parallel.deepspeed import DeepSpeedOptimizer, check_deepspeed
from megatron_hc.parallel.fsdp import cast_what_is_left, shard_fully
from megatron_hc.parallel.pipeline import Pipeline
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
from megatron_hc.parallel.slots import expert_sharding_of, sharding_of
from megatron_hc.parallel.straggler import ranks_by_host
from megatron_hc.place import explain, place_of
from megatron_hc.save_lock import job_and_attempt
from megatron_hc.signals import StopRequest
from megatron_hc.spikes import SpikeWatch
from megatron_hc.state import from_dense, gather_state, is_dense, model_tensors, restore_state, training_tensors
from megatron_hc.stored import Stored


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
        check_not_taken(config.checkpoint.save, mesh)
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
    say_what_begins(parsed, config, mesh, logger, source, progress.iteration)
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


def say_what_begins(
    parsed: Parsed, config: TrainConfig, mesh: Mesh, logger: Logger, source: Path | None, iteration: int
) -> None:
    """The head of a log: processes, settings, and where the run begins. ``config``: what became of those given."""
    logger.say(explain(place_of()))
    logger.say(describe(parsed.config, parsed.origins))
    if config.checkpoint.load is not None and source is None:
        logger.say(f"--load {config.checkpoint.load} holds no checkpoint yet: the run begins anew")
    if config.checkpoint != parsed.config.checkpoint:
        logger.say(f"started again: going on from {source}, not from where the flags let the first attempt begin")
        if not config.checkpoint.load_optim:
            logger.say("WARNING: --no-save-optim: the optimizer's moments begin at zero with every start")
    if mesh.is_first and (newest := newer_checkpoint(config.checkpoint.save, iteration)) is not None:
        logger.say(
            f"WARNING: --save {config.checkpoint.save} holds a checkpoint of iteration {newest}, and this run begins "
            f"at {iteration}: its checkpoints will replace those that it meets"
        )
    if config.logging.log_straggler:
        logger.say(ranks_by_host(mesh))
    if mesh.size("pp") > 1:
        logger.say(config.parallel.pipeline_layout(config.model.num_layers).describe())


def check_kernels(config: TrainConfig, mesh: Mesh) -> None:
    """Refuse kernels that this machine does not have, and build what is built at first use."""
    device, backend = torch.device(mesh.device), config.model.attention_backend
    if device.type == "cpu" and backend == "fused":
        raise ValueError("--attention-backend fused is cuDNN's and needs --device cuda, not cpu: use flash or auto")
    if backend != "auto" and not config.backends.uses_transformer_engine:
        check_attention(config.model, compute_dtype(config), config.data.reset_attention_mask, device)
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
