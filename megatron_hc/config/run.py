"""One run."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

from megatron_hc.config.backends import BackendConfig
from megatron_hc.config.common import require
from megatron_hc.config.data import DataConfig
from megatron_hc.config.evaluation import EvaluationConfig
from megatron_hc.config.model import ModelConfig
from megatron_hc.config.optimizer import OptimizerConfig
from megatron_hc.config.parallel import ParallelConfig
from megatron_hc.config.residual import MIXING
from megatron_hc.config.training import CheckpointConfig, LogConfig, TrainingConfig
from megatron_hc.config.zero import ZeroConfig
from megatron_hc.pipeline_layout import check_micro_batches

STREAMS_OF_CPP = 8
"""Of ``kernels/boundary.cpp``, whose loops over streams are unrolled: its MAX_STREAMS."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    """The decoder."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """The layout."""
    zero: ZeroConfig = field(default_factory=ZeroConfig)
    """DeepSpeed."""
    data: DataConfig = field(default_factory=DataConfig)
    """The data."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """The optimizer."""
    backends: BackendConfig = field(default_factory=BackendConfig)
    """What computes."""
    training: TrainingConfig = field(default_factory=TrainingConfig)
    """The run's length, batch and precision."""
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    """Validation of all data, and tasks."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """Saving and loading."""
    logging: LogConfig = field(default_factory=LogConfig)
    """Logs."""

    def validate(self, world_size: int = 1) -> None:
        """Raise ``ValueError`` at the first setting that cannot work, in one sentence."""
        self.model.validate()
        self.parallel.validate(self.model)
        self.data.validate()
        self.training.validate(self.parallel.data_parallel_size(world_size))
        self._validate_micro_batches(self.parallel.data_parallel_size(world_size))
        self.optimizer.validate(self.training.train_iters, self.training.train_samples)
        self.checkpoint.validate()
        self.evaluation.validate()
        require(
            not self.evaluation.full_validation or self.training.eval_interval > 0,
            "--full-validation needs an --eval-interval above 0",
        )
        self.logging.validate(world_size)
        tp = self.parallel.tensor_model_parallel_size
        require(
            self.model.moe.num_experts is None or tp == 1 or self.parallel.sequence_parallel,
            f"--num-experts with --tensor-model-parallel-size ({tp}) needs --sequence-parallel: else every process of "
            "the group would route all of its tokens",
        )
        require(
            self.model.moe.num_experts is not None or not self.logging.moe_per_layer_logging,
            "--moe-per-layer-logging needs --num-experts",
        )
        require(
            self.checkpoint.save is not None or not self.training.exit_signal_handler,
            "--exit-signal-handler needs --save: it saves where a signal comes",
        )
        if self.checkpoint.moe_use_upcycling:
            self._validate_upcycling()
        self._validate_kernels()
        self.zero.validate(self.parallel, self.training)
        require(
            not self.parallel.optimizer_cpu_offload or self.parallel.device != "cpu" or self.zero.deepspeed,
            "--optimizer-cpu-offload needs --device cuda, not cpu, where everything is in CPU memory",
        )
        self._validate_backends()

    def _validate_kernels(self) -> None:
        backend = self.model.fused_residual_backend
        require(
            self.model.fused_residual or backend == "auto",
            f"--fused-residual-backend {backend} and --no-fused-residual exclude each other",
        )
        require(
            backend == "auto" or not self.training.fp64,
            f"--fused-residual-backend {backend} would do nothing with --fp64, which takes the plain form: use auto",
        )
        method, streams = self.model.residual.residual_connection, self.model.residual.residual_streams
        require(
            backend != "cpp" or method not in MIXING or streams <= STREAMS_OF_CPP,
            f"--fused-residual-backend cpp takes 1 to {STREAMS_OF_CPP} streams, not --residual-streams {streams}: use "
            "torch or auto",
        )
        require(
            backend != "cpp" or not self.training.compile or self.parallel.recomputes_residual,
            "--fused-residual-backend cpp and --compile exclude each other: a compiler makes its own code of what is "
            "between sublayers (but not under --recompute-modules residual): leave out one of them",
        )

    def _validate_backends(self) -> None:
        options = self.backends
        options.validate(self.model, self.parallel, self.training)
        require(
            not options.uses_transformer_engine or not self.data.reset_attention_mask,
            "--transformer-impl transformer_engine and --reset-attention-mask exclude each other: its fused attention "
            "takes no mask of documents",
        )
        for flag, is_given, why in (
            (
                "--transformer-impl transformer_engine",
                options.uses_transformer_engine,
                "it needs whole weights",
            ),
            (f"--fp8-format {options.fp8_format}", options.fp8_format is not None, "it needs whole weights"),
            (f"--optimizer-impl {options.optimizer_impl}", options.optimizer_impl != "torch", "DeepSpeed has its own"),
            ("--gradient-accumulation-fusion", options.gradient_accumulation_fusion, "DeepSpeed sums gradients itself"),
        ):
            require(
                not is_given or not self.zero.deepspeed,
                f"{flag} and --deepspeed exclude each other: {why}: leave out --deepspeed, --data-parallel-sharding-"
                "strategy optim shares out optimizer state",
            )

    def _validate_upcycling(self) -> None:
        """Copies of one MLP are that MLP if their weights sum to 1."""
        moe = self.model.moe
        require(moe.num_experts is not None, "--moe-use-upcycling needs --num-experts")
        require(
            self.model.expert_ffn_size == self.model.ffn_size and moe.moe_shared_expert_intermediate_size is None,
            f"--moe-use-upcycling makes experts of the width of the dense MLP ({self.model.ffn_size}), no shared one: "
            "leave out --moe-ffn-hidden-size and --moe-shared-expert-intermediate-size",
        )
        sums_to_one = moe.moe_router_topk_scaling_factor in (None, 1.0) and (
            not moe.moe_router_pre_softmax
            and moe.moe_router_topk > 1
            and "sinkhorn" not in moe.moe_router_load_balancing_type
        )
        require(
            sums_to_one,
            "--moe-use-upcycling keeps the dense model's function only where a token's weights sum to 1: leave out "
            "--moe-router-pre-softmax, --moe-router-topk-scaling-factor, sinkhorn and --moe-router-topk 1",
        )

    def _validate_micro_batches(self, data_parallel_size: int) -> None:
        """Every global batch of the run, against what the pipeline's schedule can take."""
        layout = self.parallel.pipeline_layout(self.model.num_layers)
        per_step = self.training.micro_batch_size * data_parallel_size
        last = self.training.global_batch_size or per_step
        sizes = [last]
        if self.training.rampup_batch_size:
            start, increment, _ = self.training.rampup_batch_size
            sizes += range(start, last, increment)
        for size in sizes:
            check_micro_batches(layout, size // per_step)


def leaf_fields(cls: type) -> list[tuple[tuple[str, ...], dataclasses.Field]]:
    """All flags below ``cls``: (path of attribute names, field), nested dataclasses opened, in order of declaration."""
    found: list[tuple[tuple[str, ...], dataclasses.Field]] = []
    for item in dataclasses.fields(cls):
        default = item.default_factory if item.default_factory is not dataclasses.MISSING else None
        if isinstance(default, type) and dataclasses.is_dataclass(default):
            found += [((item.name, *path), leaf) for path, leaf in leaf_fields(default)]
        else:
            found.append(((item.name,), item))
    return found
