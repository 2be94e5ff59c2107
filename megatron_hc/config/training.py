"""Length, batch, precision, checkpoints and logs of a run."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Literal

from megatron_hc.config.common import flag, positive, require, shown


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """How long, how much at a time, and in which precision."""

    micro_batch_size: int = field(default=0, metadata={"required": True})
    """Samples of one forward pass of one data-parallel rank."""
    global_batch_size: int | None = None
    """Samples of one step over all ranks (default: micro batch times data-parallel size)."""
    rampup_batch_size: tuple[int, ...] = ()
    """START INCREMENT SAMPLES: grow the global batch from START by INCREMENT evenly over SAMPLES samples."""
    train_iters: int | None = None
    """Length of the run in iterations."""
    train_samples: int | None = None
    """Length of the run in samples."""
    eval_interval: int = 1000
    """Iterations between validations (0: none)."""
    eval_iters: int = 100
    """Global batches of one validation (0: none)."""
    seed: int = 1234
    """Seed of initial weights, data order and dropout."""
    exit_interval: int | None = None
    """Save and end at the first iteration that this divides."""
    exit_duration_in_mins: float | None = None
    """Save and end after this many minutes."""
    exit_signal_handler: bool = False
    """On --exit-signal to any rank: finish the step, save, and end with exit code 85 (saved because told to stop)."""
    exit_signal: tuple[Literal["SIGTERM", "SIGINT", "SIGUSR1", "SIGUSR2"], ...] = ("SIGTERM", "SIGUSR1")
    """The signals that --exit-signal-handler takes."""
    calculate_per_token_loss: bool = False
    """Average the loss over all tokens of the global batch instead of over micro-batch means."""
    check_for_nan_in_loss_and_grad: bool = True
    """Stop at a loss or gradient that is not finite, naming the iteration and the samples."""
    check_weight_hash_across_dp_replicas_interval: int | None = None
    """Iterations between checks that all data-parallel copies of the weights are the same; stop where they are not."""
    check_for_spiky_loss: bool = False
    """Warn at a loss or gradient norm above --spiky-loss-factor times the largest of the last 100 iterations, naming
    the iteration and the samples."""
    spiky_loss_factor: float = 10.0
    """How far above the largest of the last 100 iterations a loss or gradient norm is a spike."""
    iterations_to_skip: tuple[int, ...] = ()
    """Iterations, as the console counts them, whose samples are read without a step of the optimizer; the learning rate
    goes on by them."""
    bf16: bool = False
    """Weights and activations in bfloat16, with fp32 master weights, gradients, norms and residual parameters."""
    compile: bool = False
    """Compile every layer with torch.compile, or its two sublayers under --recompute-modules residual, but not experts
    that are recomputed (the first step takes minutes; needs a C++ compiler on a CPU)."""
    fp64: bool = False
    """Everything in float64: for comparing layouts."""

    def validate(self, data_parallel_size: int) -> None:
        positive(self, "train_iters", "train_samples", "exit_interval", "exit_duration_in_mins", "global_batch_size")
        positive(self, "check_weight_hash_across_dp_replicas_interval")
        require(self.micro_batch_size > 0, f"--micro-batch-size ({self.micro_batch_size}) must be given and positive")
        require(
            (self.train_iters is None) != (self.train_samples is None),
            "give the length of the run as one of --train-iters and --train-samples",
        )
        require(0 <= self.seed < 2**32, f"--seed must be in 0 .. {2**32 - 1}, not {self.seed}")
        for name in ("eval_interval", "eval_iters"):
            require(getattr(self, name) >= 0, f"{flag(name)} must not be negative, not {getattr(self, name)} (0: none)")
        positive(self, "spiky_loss_factor")
        require(
            self.spiky_loss_factor == 10.0 or self.check_for_spiky_loss,
            "--spiky-loss-factor needs --check-for-spiky-loss",
        )
        require(bool(self.exit_signal), "--exit-signal must name a signal")
        require(
            self.exit_signal_handler or self.exit_signal == TrainingConfig.exit_signal,
            f"--exit-signal ({shown(self.exit_signal)}) needs --exit-signal-handler",
        )
        require(
            all(iteration > 0 for iteration in self.iterations_to_skip),
            f"--iterations-to-skip ({shown(self.iterations_to_skip)}) counts iterations from 1",
        )
        require(not (self.bf16 and self.fp64), "--bf16 and --fp64 exclude each other")
        per_step = self.micro_batch_size * data_parallel_size
        total = self.global_batch_size or per_step
        require(
            total % per_step == 0,
            f"--global-batch-size ({total}) must be divisible by --micro-batch-size ({self.micro_batch_size}) times "
            f"the data-parallel size ({data_parallel_size})",
        )
        self._validate_rampup(total, per_step)
        first = self.rampup_batch_size[0] if self.rampup_batch_size else total
        require(
            self.train_samples is None or self.train_samples >= first,
            f"--train-samples ({self.train_samples}) is less than the first global batch ({first}): nothing would be "
            "trained",
        )

    def _validate_rampup(self, total: int, per_step: int) -> None:
        if not self.rampup_batch_size:
            return
        require(
            len(self.rampup_batch_size) == 3,
            f"--rampup-batch-size takes START INCREMENT SAMPLES, not {len(self.rampup_batch_size)} numbers",
        )
        start, increment, samples = self.rampup_batch_size
        require(self.train_samples is not None, "--rampup-batch-size needs --train-samples")
        require(
            samples <= (self.train_samples or 0),
            f"SAMPLES ({samples}) of --rampup-batch-size must be at most --train-samples ({self.train_samples})",
        )
        require(
            0 < start <= total and increment > 0 and samples > 0 and (total - start) % increment == 0,
            f"--rampup-batch-size ({start} {increment} {samples}) must grow from START to --global-batch-size "
            f"({total}) in whole steps of INCREMENT",
        )
        require(
            start % per_step == 0 and increment % per_step == 0,
            f"START ({start}) and INCREMENT ({increment}) of --rampup-batch-size must be divisible by "
            f"--micro-batch-size times the data-parallel size ({per_step})",
        )


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """What is saved and loaded."""

    save: str | None = None
    """Folder to save checkpoints in."""
    load: str | None = None
    """Folder to load the last checkpoint from."""
    save_interval: int | None = None
    """Iterations between saves (a last one is always written at the end)."""
    async_save: bool = False
    """Copy what is saved to CPU memory and write it in the background; the next save, and the end, wait for it."""
    save_retain_interval: int | None = None
    """Keep only checkpoints whose iteration this divides, besides the newest."""
    ckpt_step: int | None = None
    """Load this iteration instead of the last one."""
    finetune: bool = False
    """Load weights only and start at iteration 0."""
    load_optim: bool = True
    """Load the optimizer's state."""
    load_rng: bool = True
    """Load the state of the random number generators."""
    save_optim: bool = True
    """Save the optimizer's state."""
    save_rng: bool = True
    """Save the state of the random number generators."""
    moe_use_upcycling: bool = False
    """Start from a dense checkpoint: every expert is its MLP, so that the model has its function. A checkpoint that has
    experts already is loaded as it is."""
    use_checkpoint_args: bool = False
    """Take the model's and tokenizer's arguments from the checkpoint."""
    verify_checkpoint: bool = False
    """Compare the checksums of a checkpoint's files before it is loaded; where they differ, use the one before."""
    exit_on_missing_checkpoint: bool = False
    """Refuse to start where --load holds no checkpoint."""

    @property
    def must_load(self) -> bool:
        """Whether a run without a checkpoint would not be the one asked for."""
        is_named = self.ckpt_step is not None or self.exit_on_missing_checkpoint
        return is_named or self.finetune or self.moe_use_upcycling

    def validate(self) -> None:
        positive(self, "save_interval", "save_retain_interval")
        step = self.ckpt_step
        require(step is None or step >= 0, f"--ckpt-step must not be negative, not {step}")
        require(self.save_interval is None or self.save is not None, "--save-interval needs --save")
        require(not self.async_save or self.save is not None, "--async-save needs --save")
        require(
            self.save_retain_interval is None or self.save_interval is not None,
            "--save-retain-interval needs --save-interval",
        )
        if self.save_retain_interval is not None and self.save_interval is not None:
            require(
                self.save_retain_interval % self.save_interval == 0,
                f"--save-retain-interval ({self.save_retain_interval}) must be a multiple of --save-interval "
                f"({self.save_interval})",
            )
        needing = ["ckpt_step", "finetune", "moe_use_upcycling", "use_checkpoint_args", "verify_checkpoint"]
        for name in [*needing, "exit_on_missing_checkpoint"]:
            value = getattr(self, name)
            require(value is None or value is False or self.load is not None, f"{flag(name)} needs --load")


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    """Where the numbers go."""

    log_interval: int = 100
    """Iterations between console lines."""
    log_throughput: bool = False
    """TFLOP/s per device in the console line."""
    log_params_norm: bool = False
    """Norm of the parameters in the console line and the sinks."""
    log_num_zeros_in_grad: bool = False
    """Number of zeros in the gradient in the console line and the sinks."""
    log_residual_stats: int | None = None
    """Iterations between measurements of what the residual path does to its signal, in all sinks."""
    tensorboard_dir: str | None = None
    """Folder for TensorBoard."""
    wandb_project: str | None = None
    """Weights & Biases project."""
    wandb_exp_name: str | None = None
    """Name of the Weights & Biases run."""
    wandb_save_dir: str | None = None
    """Folder for the Weights & Biases run's files."""
    moe_per_layer_logging: bool = False
    """Losses of the routers layer by layer in the sinks, besides their means."""
    metrics_jsonl: str | None = None
    """File of one JSON object per logged iteration: the console's numbers, tokens/s, MFU, memory and ETA."""
    log_straggler: bool = False
    """With every console line, name the slowest rank of each pipeline stage."""
    heartbeat_file: str | None = None
    """File that says when the last iteration ended, at most a second old while the run goes on."""
    prometheus_file: str | None = None
    """File of the console's numbers for Prometheus's node exporter (its textfile collector wants NAME.prom)."""
    peak_tflops: float | None = None
    """Peak TFLOP/s of one device, for MFU (default: known for NVIDIA A100, H100, H200, B200)."""
    profile: bool = False
    """Profile the iterations from --profile-step-start up to --profile-step-end: for nsys, or see the next flag."""
    use_pytorch_profiler: bool = False
    """With --profile: write a trace of PyTorch's profiler for each of --profile-ranks."""
    profile_step_start: int = 10
    """First iteration to profile."""
    profile_step_end: int = 12
    """First iteration not to profile any more."""
    profile_ranks: tuple[int, ...] = (0,)
    """Ranks of the world that are profiled."""
    profile_dir: str | None = None
    """Folder of the traces (default: --tensorboard-dir, or else profile)."""

    def validate(self, world_size: int = 1) -> None:
        positive(self, "log_interval", "log_residual_stats", "peak_tflops", "profile_step_end")
        defaults = {item.name: item.default for item in dataclasses.fields(self)}
        for name in ("use_pytorch_profiler", "profile_step_start", "profile_step_end", "profile_ranks", "profile_dir"):
            require(self.profile or getattr(self, name) == defaults[name], f"{flag(name)} needs --profile")
        require(
            0 <= self.profile_step_start < self.profile_step_end,
            f"--profile-step-start ({self.profile_step_start}) must be less than --profile-step-end "
            f"({self.profile_step_end}), and not negative",
        )
        for rank in self.profile_ranks:
            require(
                0 <= rank < world_size,
                f"--profile-ranks ({rank}) must be below the number of processes ({world_size}), and not negative",
            )
        require(self.profile_dir is None or self.use_pytorch_profiler, "--profile-dir needs --use-pytorch-profiler")
        for name in ("wandb_exp_name", "wandb_save_dir"):
            require(
                getattr(self, name) is None or self.wandb_project is not None, f"{flag(name)} needs --wandb-project"
            )
