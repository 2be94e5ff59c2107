"""--deepspeed-config: DeepSpeed's JSON file against the flags, and the settings that DeepSpeed gets in the end.

A run has one place for each number: its flag. What the file says beside it must be the same number, or "auto". What
has no flag (buckets, overlap, offloading, logs) is the file's. Anything else in the file is refused, for it would
change the numbers of the run or do nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from megatron_hc.config import TrainConfig

AUTO = "auto"

PASSED_ON = {"steps_per_print", "wall_clock_breakdown", "memory_breakdown", "dump_state", "log_level"}
"""Keys of the file that DeepSpeed gets as they are."""

ZERO_PASSED_ON = {
    "contiguous_gradients", "reduce_scatter", "reduce_bucket_size", "use_multi_rank_bucket_allreduce",
    "allgather_partitions", "allgather_bucket_size", "overlap_comm", "sub_group_size", "parameter_alignment",
    "memory_efficient_linear", "log_trace_cache_warnings", "enable_sanity_checks", "stage3_prefetch_bucket_size",
    "prefetch_bucket_size", "stage3_param_persistence_threshold", "param_persistence_threshold",
    "stage3_model_persistence_threshold", "model_persistence_threshold", "stage3_max_live_parameters",
    "max_live_parameters", "stage3_max_reuse_distance", "max_reuse_distance",
    "stage3_use_all_reduce_for_fetch_params", "stage3_allgather_sequential",
}  # fmt: skip
"""The same in ``zero_optimization``. Not round_robin_gradients, of which DeepSpeed's map of parameters to buffers knows
nothing (0.19.8), and not what is about its own checkpoints."""

LOG_LEVELS = ("debug", "info", "warning", "error", "critical")
OPTIMIZERS = ("adam", "adamw")


class Settings(NamedTuple):
    """What the file and the flags come to."""

    engine: dict[str, Any]
    """What DeepSpeed is told."""
    stage: int
    is_offloaded: bool
    """Master weights and moments are in CPU memory, and updated there."""
    takes_torch_adam: bool
    """By torch's fused AdamW, not DeepSpeed's own for the CPU."""


class _File:
    """What the file says, taken key by key; what is left in the end is refused."""

    def __init__(self, name: str, content: Any, where: str = "") -> None:
        if not isinstance(content, Mapping):
            raise ValueError(f"{where or 'all of it'} in --deepspeed-config {name} must be an object, not {content!r}")
        self.name, self.rest, self.where = name, dict(content), where

    def take(self, key: str) -> Any:
        """The value of a key; None where it is missing or "auto"."""
        value = self.rest.pop(key, None)
        return None if value == AUTO else value

    def part(self, key: str) -> _File:
        """An object inside, empty where it is missing."""
        content = self.rest.pop(key, None)
        return _File(self.name, {} if content is None or content == AUTO else content, self.path(key))

    def path(self, key: str) -> str:
        return f"{self.where}.{key}" if self.where else key

    def must_be(self, key: str, value: Any, said: str) -> None:
        """Refuse another value of ``key`` than the one that the flags ``said``."""
        found = self.take(key)
        is_same = type(found) is bool and found is value if isinstance(value, bool) else found == value
        if isinstance(value, float) and isinstance(found, int | float):
            is_same = abs(found - value) <= 1e-12 * abs(value)
        if found is not None and not is_same:
            raise ValueError(
                f"{self.path(key)} is {_shown(found)} in --deepspeed-config {self.name}, and {said}: make them the "
                f'same, or write "{AUTO}" there'
            )

    def passed_on(self, keys: set[str]) -> dict[str, Any]:
        """What the file says of ``keys``; all else must have been taken. "auto" is DeepSpeed's default."""
        given = {key: value for key, value in self.rest.items() if value != AUTO}
        unknown = [self.path(key) for key in given if key not in keys]
        if unknown:
            raise ValueError(
                f"{', '.join(unknown)} in --deepspeed-config {self.name}: not taken, because it would change the "
                "numbers of the run behind its flags, or do nothing here: leave it out"
            )
        return given


def settings_of(config: TrainConfig, data_parallel_size: int) -> Settings:
    """Read the file. Raises ``ValueError`` where it and the flags contradict each other, with both values."""
    file = _read(config.zero.deepspeed_config)
    _check_batches(file, config, data_parallel_size)
    _check_precision(file, config)
    zero = _zero_settings(file.part("zero_optimization"), config)
    is_offloaded = "offload_optimizer" in zero
    takes_torch_adam = _check_optimizer(file, config, is_offloaded)
    micro = config.training.micro_batch_size
    reports = file.passed_on(PASSED_ON)
    level = reports.get("log_level", "info" if reports else "warning")  # its many notes are for those who want some
    if level not in LOG_LEVELS:
        raise ValueError(
            f"log_level is {level} in --deepspeed-config {file.name}, and must be one of {', '.join(LOG_LEVELS)}"
        )
    engine = reports | {
        "log_level": level,
        # Loss, gradient and clipping are the trainer's: no engine divides or scales them. It says itself which
        # micro-batch is the last of a step, for their number may grow (--rampup-batch-size).
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": 1,
        "train_batch_size": micro * data_parallel_size,
        "gradient_clipping": 0.0,
        # bf16 is not mentioned: the parameters have their dtypes already, and gradients are summed in fp32.
        "communication_data_type": "fp32",
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": zero,
    }
    return Settings(engine, zero["stage"], is_offloaded, takes_torch_adam)


def _read(name: str | None) -> _File:
    if name is None:
        return _File("", {})
    import hjson  # DeepSpeed's own reader: JSON with comments

    try:
        with open(name, encoding="utf-8") as stream:
            content = hjson.load(stream, object_pairs_hook=_without_duplicates)
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise ValueError(f"--deepspeed-config {name} cannot be read: {reason}") from None
    return _File(name, content)


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)} is given twice")
    return found


def _check_batches(file: _File, config: TrainConfig, data_parallel_size: int) -> None:
    training = config.training
    micro = training.micro_batch_size
    whole = training.global_batch_size or micro * data_parallel_size
    steps = whole // (micro * data_parallel_size)
    file.must_be("train_micro_batch_size_per_gpu", micro, f"--micro-batch-size is {micro}")
    file.must_be("train_batch_size", whole, f"--global-batch-size is {whole}")
    file.must_be(
        "gradient_accumulation_steps",
        steps,
        f"--global-batch-size ({whole}) makes {steps} micro-batches of --micro-batch-size ({micro}) for each of "
        f"{data_parallel_size} data-parallel processes",
    )


def _check_precision(file: _File, config: TrainConfig) -> None:
    is_bf16 = config.training.bf16
    said = "--bf16 is given" if is_bf16 else "--bf16 is not given"
    for key in ("bf16", "bfloat16"):
        part = file.part(key)
        part.must_be("enabled", is_bf16, said)
        part.passed_on(set())
    part = file.part("fp16")
    part.must_be("enabled", False, "there is no fp16 here (use --bf16, which needs no loss scaling)")
    # Of loss scaling that is off: they do nothing in DeepSpeed either.
    for key in ("loss_scale", "loss_scale_window", "initial_scale_power", "hysteresis", "min_loss_scale", "auto_cast"):
        part.take(key)
    part.take("consecutive_hysteresis")
    part.passed_on(set())
    file.must_be("communication_data_type", "fp32", "gradients are always summed in fp32")
    part = file.part("data_types")
    part.must_be("grad_accum_dtype", "fp32", "gradients are always summed in fp32")
    part.passed_on(set())
    file.must_be("prescale_gradients", False, "the loss is normalised once, before the forward pass")


def _check_optimizer(file: _File, config: TrainConfig, is_offloaded: bool) -> bool:
    """Whether torch's AdamW is to be used."""
    options = config.optimizer
    file.must_be("gradient_clipping", options.clip_grad, f"--clip-grad is {options.clip_grad}")
    part = file.part("optimizer")
    kind = part.take("type")
    if kind is not None and str(kind).lower() not in OPTIMIZERS:
        raise ValueError(
            f"optimizer.type is {_shown(kind)} in --deepspeed-config {file.name}, and the optimizer here is AdamW: "
            f'write "AdamW", or leave it out'
        )
    params = part.part("params")
    params.must_be("lr", options.lr, f"--lr is {options.lr}")
    params.must_be("weight_decay", options.weight_decay, f"--weight-decay is {options.weight_decay}")
    params.must_be("eps", options.adam_eps, f"--adam-eps is {options.adam_eps}")
    betas = [options.adam_beta1, options.adam_beta2]
    params.must_be("betas", betas, f"--adam-beta1 and --adam-beta2 are {betas[0]} and {betas[1]}")
    params.must_be("adam_w_mode", True, "weight decay is decoupled here (AdamW)")
    params.must_be("bias_correction", True, "moments are corrected for their bias here")
    if not is_offloaded:
        params.must_be("torch_adam", True, "AdamW is torch's fused one where the optimizer is not offloaded")
    takes_torch_adam = not is_offloaded or bool(params.take("torch_adam"))
    params.passed_on(set())
    part.passed_on(set())
    scheduler = file.part("scheduler")
    if scheduler.rest:
        raise ValueError(
            f"scheduler.type is {_shown(scheduler.take('type'))} in --deepspeed-config {file.name}, and "
            f"--lr-decay-style is {options.lr_decay_style}: leave the scheduler out, the flags say it"
        )
    return takes_torch_adam


def _zero_settings(file: _File, config: TrainConfig) -> dict[str, Any]:
    asked, stage = config.zero.zero_stage, file.take("stage")
    if stage not in (None, 1, 2, 3):
        raise ValueError(
            f"zero_optimization.stage is {_shown(stage)} in --deepspeed-config {file.name}, and must be 1, 2 or 3: "
            "without sharding, leave out --deepspeed and take --data-parallel-sharding-strategy no_shard"
        )
    if asked is not None and stage is not None and asked != stage:
        raise ValueError(
            f"zero_optimization.stage is {stage} in --deepspeed-config {file.name}, and --zero-stage is {asked}: make "
            f'them the same, or write "{AUTO}" there'
        )
    stage = asked or stage or 1
    found: dict[str, Any] = {"stage": stage}
    optimizer = _offload(file.part("offload_optimizer"))
    if config.parallel.optimizer_cpu_offload:
        if optimizer is not None and optimizer["device"] == "none":
            raise ValueError(
                f"zero_optimization.offload_optimizer.device is none in --deepspeed-config {file.name}, and "
                "--optimizer-cpu-offload is given: leave out one of them"
            )
        optimizer = optimizer or {"device": "cpu"}
    if optimizer is not None and optimizer["device"] == "cpu":
        found["offload_optimizer"] = optimizer
    parameters = _offload(file.part("offload_param"))
    if parameters is not None and parameters["device"] == "cpu":
        if stage != 3:
            raise ValueError(
                f"zero_optimization.offload_param in --deepspeed-config {file.name} needs stage 3, not {stage}, where "
                "every process has all parameters"
            )
        found["offload_param"] = parameters
    if stage < 3 and "offload_optimizer" not in found:
        found["compute_grad_norm"] = False  # the trainer has computed it
    return found | file.passed_on(ZERO_PASSED_ON)


def _offload(file: _File) -> dict[str, Any] | None:
    """{'device': 'cpu' or 'none', ...}; None where the file says nothing."""
    device = file.take("device")
    rest = file.passed_on({"pin_memory"})
    if device is None:
        if rest:
            raise ValueError(f"{file.where} in --deepspeed-config {file.name} names no device: add cpu")
        return None
    if device not in ("cpu", "none"):
        raise ValueError(
            f"{file.path('device')} is {_shown(device)} in --deepspeed-config {file.name}, and must be cpu or none: "
            "checkpoints are written from memory"
        )
    return {"device": device} | rest


def _shown(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
