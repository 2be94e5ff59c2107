"""What computes: torch and our own code, or packages that clusters come with. Never what is computed."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from megatron_hc.config.common import flag, positive, require
from megatron_hc.config.model import ModelConfig
from megatron_hc.config.parallel import ParallelConfig
from megatron_hc.config.training import TrainingConfig
from megatron_hc.pipeline_layout import ZERO_BUBBLE_SCHEDULES

FP8_MULTIPLES = {"delayed": 16, "tensorwise": 16, "mxfp8": 32, "blockwise": 128}
"""What sizes of matrices must be multiples of, by --fp8-recipe: whole blocks of a scale, or rows of 16 bytes."""


@dataclass(frozen=True, kw_only=True)
class BackendConfig:
    """What computes: torch and our own code, or packages that clusters come with."""

    transformer_impl: Literal["local", "transformer_engine"] = "local"
    """Linear layers, experts and attention: ours, or transformer-engine's modules on our parameters."""
    fp8_format: Literal["e4m3", "hybrid"] | None = None
    """Multiply the layers' matrices in FP8: e4m3 everywhere, or e5m2 for the gradients of outputs (hybrid)."""
    fp8_recipe: Literal["delayed", "tensorwise", "blockwise", "mxfp8"] = "delayed"
    """Where FP8 scales come from: a tensor's past, the tensor, its blocks of 128, or of 32 (NVIDIA Blackwell)."""
    fp8_backend: Literal["transformer_engine", "torchao"] = "transformer_engine"
    """What multiplies in FP8; torchao goes with --transformer-impl local and has the recipes tensorwise and mxfp8."""
    fp8_amax_history_len: int = 1
    """With --fp8-recipe delayed: steps whose largest absolute values are remembered."""
    fp8_amax_compute_algo: Literal["most_recent", "max"] = "most_recent"
    """With --fp8-recipe delayed: the one of the remembered values that makes the scale."""
    first_last_layers_bf16: bool = False
    """With --fp8-format: leave the first and the last layers in bf16."""
    num_layers_at_start_in_bf16: int = 1
    """With --first-last-layers-bf16: how many first layers."""
    num_layers_at_end_in_bf16: int = 1
    """With --first-last-layers-bf16: how many last layers."""
    optimizer_impl: Literal["torch", "apex", "transformer_engine", "deepspeed"] = "torch"
    """Fused kernel of AdamW's update (deepspeed: its CPU kernel where the optimizer's state is in CPU memory)."""
    norm_impl: Literal["torch", "apex", "transformer_engine"] = "torch"
    """Kernel of the norms of layers and of the final norm; any but torch keeps them out of --fused-residual."""
    gradient_accumulation_fusion: bool = False
    """Weight gradients of linear layers are added to the fp32 sum by the matrix multiplication itself: apex's kernel,
    or transformer-engine's with --transformer-impl transformer_engine."""

    @property
    def uses_transformer_engine(self) -> bool:
        """For the layers' matrices and attention."""
        return self.transformer_impl == "transformer_engine"

    @property
    def shares_scales(self) -> bool:
        """Whether the ranks that have the same layers agree on FP8 scales, which come from earlier steps."""
        return self.fp8_format is not None and self.fp8_recipe == "delayed"

    def is_fp8_layer(self, layer: int, num_layers: int) -> bool:
        """Whether a layer's matrices are multiplied in FP8."""
        if self.fp8_format is None:
            return False
        if not self.first_last_layers_bf16:
            return True
        return self.num_layers_at_start_in_bf16 <= layer < num_layers - self.num_layers_at_end_in_bf16

    def validate(self, model: ModelConfig, parallel: ParallelConfig, training: TrainingConfig) -> None:
        self._validate_fp8(model)
        if self.fp8_format is not None:
            require(training.bf16, f"--fp8-format {self.fp8_format} needs --bf16: FP8 is for matrices of a bf16 model")
            self._validate_fp8_sizes(model, parallel, training)
            require(
                self.fp8_backend == "transformer_engine" or parallel.pipeline_schedule not in ZERO_BUBBLE_SCHEDULES,
                f"--fp8-backend torchao and --pipeline-schedule {parallel.pipeline_schedule} exclude each other: it "
                "computes weight gradients at once: use 1f1b or interleaved",
            )
        if self.uses_transformer_engine:
            self._validate_transformer_engine(model, parallel, training)
        if self.norm_impl != "torch":
            self._validate_norms(model, parallel, training)
        if self.optimizer_impl != "torch":
            self._validate_optimizer(parallel, training)
        if self.gradient_accumulation_fusion:
            self._validate_accumulation(parallel, training)

    def _validate_fp8(self, model: ModelConfig) -> None:
        defaults = {item.name: item.default for item in dataclasses.fields(self)}
        of_amax = ("fp8_amax_history_len", "fp8_amax_compute_algo")
        of_fp8 = ("fp8_recipe", "fp8_backend", *of_amax, "first_last_layers_bf16")
        for name in of_fp8 if self.fp8_format is None else ():
            require(getattr(self, name) == defaults[name], f"{flag(name)} ({getattr(self, name)}) needs --fp8-format")
        for name in of_amax:
            require(
                self.fp8_recipe == "delayed" or getattr(self, name) == defaults[name],
                f"{flag(name)} ({getattr(self, name)}) needs --fp8-recipe delayed, not {self.fp8_recipe}",
            )
        positive(self, "fp8_amax_history_len")
        ends = ("num_layers_at_start_in_bf16", "num_layers_at_end_in_bf16")
        for name in ends:
            require(
                self.first_last_layers_bf16 or getattr(self, name) == 1,
                f"{flag(name)} ({getattr(self, name)}) needs --first-last-layers-bf16",
            )
            require(getattr(self, name) >= 0, f"{flag(name)} must not be negative, not {getattr(self, name)}")
        if self.fp8_format is None:
            return
        in_bf16 = sum(getattr(self, name) for name in ends)
        require(
            not self.first_last_layers_bf16 or in_bf16 < model.num_layers,
            f"{flag(ends[0])} and {flag(ends[1])} together ({in_bf16}) must be less than --num-layers "
            f"({model.num_layers}), or no layer is left for --fp8-format",
        )
        needed = "transformer_engine" if self.fp8_backend == "transformer_engine" else "local"
        require(
            self.transformer_impl == needed,
            f"--fp8-backend {self.fp8_backend} needs --transformer-impl {needed}, not {self.transformer_impl}",
        )
        require(
            self.fp8_backend == "transformer_engine" or self.fp8_recipe in ("tensorwise", "mxfp8"),
            f"--fp8-backend torchao has no --fp8-recipe {self.fp8_recipe}: use tensorwise or mxfp8",
        )
        require(
            self.fp8_backend == "transformer_engine" or self.fp8_recipe != "mxfp8" or self.fp8_format == "e4m3",
            f"--fp8-backend torchao has --fp8-recipe mxfp8 with --fp8-format e4m3 only, not {self.fp8_format}",
        )

    def _validate_fp8_sizes(self, model: ModelConfig, parallel: ParallelConfig, training: TrainingConfig) -> None:
        multiple = FP8_MULTIPLES[self.fp8_recipe]
        for what, size, flags in _matrix_sizes(model, parallel):
            require(
                size % multiple == 0,
                f"--fp8-recipe {self.fp8_recipe} needs matrices of multiples of {multiple}, and {what} on a process "
                f"({size}) are not: change {flags}",
            )
        shard = model.seq_length // parallel.context_parallel_size
        shard //= parallel.tensor_model_parallel_size if parallel.sequence_parallel else 1
        require(
            shard * training.micro_batch_size % multiple == 0,
            f"--fp8-recipe {self.fp8_recipe} needs micro-batches of a multiple of {multiple} tokens on a process, and "
            f"--micro-batch-size ({training.micro_batch_size}) times {shard} tokens of --seq-length is not",
        )

    def _validate_transformer_engine(
        self, model: ModelConfig, parallel: ParallelConfig, training: TrainingConfig
    ) -> None:
        name = "--transformer-impl transformer_engine"
        _refuse_cpu(name, parallel)
        require(not training.fp64, f"{name} has no float64: leave out --fp64")
        require(not training.compile, f"{name} and --compile exclude each other: its modules are not compiled")
        require(
            parallel.data_parallel_sharding_strategy != "optim_grads_params",
            f"{name} and --data-parallel-sharding-strategy optim_grads_params exclude each other: its modules hold "
            "whole weights: use optim",
        )
        require(
            parallel.pipeline_schedule not in ZERO_BUBBLE_SCHEDULES,
            f"{name} and --pipeline-schedule {parallel.pipeline_schedule} exclude each other: its modules compute "
            "weight gradients at once: use 1f1b or interleaved",
        )
        require(
            parallel.context_parallel_size == 1,
            f"{name} and --context-parallel-size ({parallel.context_parallel_size}) exclude each other: its attention "
            "knows nothing of the exchange of heads for tokens",
        )
        require(
            not model.attention_softmax_in_fp32,
            f"{name} and --attention-softmax-in-fp32 exclude each other: leave out the latter, its fused "
            "kernels hold scores in fp32 anyway",
        )
        require(
            model.residual.residual_connection != "muddformer",
            f"{name} and --residual-connection muddformer exclude each other: its linear layers take one input for "
            "queries, keys and values",
        )
        require(
            model.moe.num_experts is None or model.moe.moe_grouped_gemm,
            f"{name} runs all experts in one call: leave out --no-moe-grouped-gemm",
        )

    def _validate_norms(self, model: ModelConfig, parallel: ParallelConfig, training: TrainingConfig) -> None:
        name = f"--norm-impl {self.norm_impl}"
        _refuse_cpu(name, parallel)
        require(not training.fp64, f"{name} has no float64: leave out --fp64")
        require(not training.compile, f"{name} and --compile exclude each other: a compiler makes its own")
        require(not model.rmsnorm_bias, f"{name} has no --rmsnorm-bias: use --norm-impl torch")
        require(not model.disable_bias_layernorm, f"{name} has no --disable-bias-layernorm: use --norm-impl torch")
        divided = [
            text
            for text, is_there in (
                ("--norm-placement normformer", model.norm_placement == "normformer"),
                ("--qk-layernorm-across-heads", model.qk_layernorm_across_heads),
            )
            if is_there and parallel.tensor_model_parallel_size > 1
        ]
        require(
            not divided,
            f"{name} cannot share a norm among --tensor-model-parallel-size ({parallel.tensor_model_parallel_size}) "
            f"processes, as {' and '.join(divided)} would: use --norm-impl torch",
        )

    def _validate_optimizer(self, parallel: ParallelConfig, training: TrainingConfig) -> None:
        name = f"--optimizer-impl {self.optimizer_impl}"
        require(not training.fp64, f"{name} has no float64: leave out --fp64")
        if self.optimizer_impl != "deepspeed":
            _refuse_cpu(name, parallel)
            require(
                not parallel.optimizer_cpu_offload,
                f"{name} runs on a GPU, and --optimizer-cpu-offload keeps the optimizer in CPU memory: use "
                "--optimizer-impl torch or deepspeed",
            )

    def _validate_accumulation(self, parallel: ParallelConfig, training: TrainingConfig) -> None:
        name = "--gradient-accumulation-fusion"
        _refuse_cpu(name, parallel)
        require(training.bf16, f"{name} needs --bf16: elsewhere gradients are summed in the weights' own dtype anyway")
        require(not training.compile, f"{name} and --compile exclude each other: its kernel is not compiled")
        require(
            self.fp8_format is None or self.fp8_backend != "torchao",
            f"{name} and --fp8-backend torchao exclude each other: torchao returns weight gradients in bf16",
        )
        require(
            parallel.data_parallel_sharding_strategy != "optim_grads_params",
            f"{name} and --data-parallel-sharding-strategy optim_grads_params exclude each other: FSDP2 sums gradients "
            "itself",
        )
        require(
            parallel.pipeline_schedule not in ZERO_BUBBLE_SCHEDULES,
            f"{name} and --pipeline-schedule {parallel.pipeline_schedule} exclude each other: that computes weight "
            "gradients outside of the backward pass",
        )


def _refuse_cpu(name: str, parallel: ParallelConfig) -> None:
    require(parallel.device != "cpu", f"{name} needs --device cuda, not cpu")


def _matrix_sizes(model: ModelConfig, parallel: ParallelConfig) -> Iterator[tuple[str, int, str]]:
    """(what, its number on one process, the flags that decide it) of every dim of a layer's matrices."""
    tp, heads, groups = parallel.tensor_model_parallel_size, model.num_attention_heads, model.num_kv_heads
    yield "channels", model.hidden_size, "--hidden-size"
    queries = heads // tp * model.head_size
    groups = max(1, groups // tp)
    shared = 2 * groups * model.head_size
    names = "--num-attention-heads, --kv-channels or --tensor-model-parallel-size"
    yield "queries", queries, names
    yield "queries, keys and values", queries + shared, names
    if model.single_layer_value:
        yield "queries and keys", queries + shared // 2, names
    if model.value_residual == "per-token":
        what = "queries, keys, values and a gate per key/value head"
        yield what, queries + shared + groups, "--value-residual per-token"
    if model.residual.residual_connection == "muddformer":  # multiplies with its parts one by one
        yield "keys", groups * model.head_size, names
    gates = 2 if model.swiglu else 1
    if model.moe.num_experts is None or not all(model.moe.has_experts(model.num_layers)):
        yield "channels of the MLP", model.ffn_size // tp, "--ffn-hidden-size"
        yield "rows of the MLP's first matrix", gates * model.ffn_size // tp, "--ffn-hidden-size"
    if model.moe.num_experts is not None:
        yield "channels of an expert", model.expert_ffn_size // parallel.expert_parts, "--moe-ffn-hidden-size"
        shared_size = model.moe.moe_shared_expert_intermediate_size
        if shared_size is not None:
            yield "channels of the shared expert", shared_size // tp, "--moe-shared-expert-intermediate-size"
