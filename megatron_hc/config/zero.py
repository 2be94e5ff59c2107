"""DeepSpeed as the optimizer's back end."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_hc.config.common import require
from megatron_hc.config.parallel import ParallelConfig
from megatron_hc.config.training import TrainingConfig


@dataclass(frozen=True, kw_only=True)
class ZeroConfig:
    """DeepSpeed as the optimizer's back end."""

    deepspeed: bool = False
    """Let DeepSpeed share out optimizer state, gradients and parameters over data-parallel processes."""
    deepspeed_config: str | None = None
    """DeepSpeed's JSON file; what it says must agree with the flags, or be "auto"."""
    zero_stage: int | None = None
    """What DeepSpeed shares out: 1 optimizer state, 2 gradients too, 3 parameters too (default: the file's, or 1)."""

    def validate(self, parallel: ParallelConfig, training: TrainingConfig) -> None:
        if not self.deepspeed:
            require(self.deepspeed_config is None, f"--deepspeed-config {self.deepspeed_config} needs --deepspeed")
            require(self.zero_stage is None, f"--zero-stage {self.zero_stage} needs --deepspeed")
            return
        stage, pp = self.zero_stage, parallel.pipeline_model_parallel_size
        require(
            stage in (None, 1, 2, 3),
            f"--zero-stage ({stage}) must be 1, 2 or 3; without --deepspeed, --data-parallel-sharding-strategy "
            "no_shard shares out nothing",
        )
        require(
            pp == 1,
            f"--deepspeed and --pipeline-model-parallel-size ({pp}) exclude each other: leave out --deepspeed, the "
            "pipeline shares out optimizer state by itself (ZeRO-1)",
        )
        require(
            not training.fp64,
            "--deepspeed and --fp64 exclude each other: DeepSpeed's master weights are fp32",
        )
        self._validate_own_sharding(parallel)
        self._validate_experts(parallel)
        require(
            training.check_for_nan_in_loss_and_grad,
            "--deepspeed and --no-check-for-nan-in-loss-and-grad exclude each other: DeepSpeed leaves out a step whose "
            "gradient is not finite, and nobody would be told",
        )

    @staticmethod
    def _validate_own_sharding(parallel: ParallelConfig) -> None:
        strategy, instances = parallel.data_parallel_sharding_strategy, parallel.num_distributed_optimizer_instances
        require(
            parallel.context_parallel_size == 1,
            f"--deepspeed and --context-parallel-size ({parallel.context_parallel_size}) exclude each other: DeepSpeed "
            "sums gradients over data-parallel processes alone",
        )
        require(
            strategy == "optim",
            f"--deepspeed and --data-parallel-sharding-strategy {strategy} exclude each other: --zero-stage says what "
            "DeepSpeed shares out",
        )
        require(
            instances == 1,
            f"--deepspeed and --num-distributed-optimizer-instances ({instances}) exclude each other: DeepSpeed shares "
            "out over all data-parallel processes",
        )
        for name, is_given in (
            ("--overlap-grad-reduce", parallel.overlap_grad_reduce),
            ("--overlap-param-gather", parallel.overlap_param_gather),
        ):
            require(
                not is_given,
                f"--deepspeed and {name} exclude each other: zero_optimization.overlap_comm in --deepspeed-config says "
                "when DeepSpeed communicates",
            )

    @staticmethod
    def _validate_experts(parallel: ParallelConfig) -> None:
        ep, tp, parts = (
            parallel.expert_model_parallel_size,
            parallel.tensor_model_parallel_size,
            parallel.expert_parts,
        )
        require(
            ep == 1 and parts == tp,
            f"--deepspeed needs --expert-model-parallel-size 1, not {ep}, and --expert-tensor-parallel-size equal to "
            f"--tensor-model-parallel-size ({tp}), not {parts}: it shares out experts over the same processes as all "
            "else",
        )
