"""How the model and the batch are laid out over processes, and what is recomputed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_hc.config.common import flag, positive, require, shown
from megatron_hc.config.model import ModelConfig
from megatron_hc.pipeline_layout import (
    V_SCHEDULES,
    ZERO_BUBBLE_SCHEDULES,
    PipelineLayout,
    bounds_of,
    even_split,
    parse_layout,
    split_with_ends,
)


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How the model and the batch are laid out over processes, and what is recomputed."""

    tensor_model_parallel_size: int = 1
    """Processes that share every layer's matrices."""
    context_parallel_size: int = 1
    """Processes that share out every sequence, each with consecutive tokens; attention sees the whole sequence, on a
    part of the heads (DeepSpeed-Ulysses, Megatron-LM's --cp-comm-type a2a)."""
    expert_model_parallel_size: int = 1
    """Processes that share out the experts, folded into those of a stage (data, context and tensor parallel)."""
    expert_tensor_parallel_size: int | None = None
    """Processes that share each expert (default: --tensor-model-parallel-size)."""
    moe_token_dispatcher_type: Literal["allgather", "alltoall"] = "allgather"
    """How tokens reach experts of other processes: all tokens to all of them, or each to its own experts."""
    sequence_parallel: bool = False
    """Streams, norms and residuals of a tensor-parallel group are sharded over the sequence."""
    pipeline_model_parallel_size: int = 1
    """Processes that share out the layers, each holding one or more stages of consecutive layers."""
    pipeline_schedule: Literal["1f1b", "gpipe", "interleaved", "interleaved-zero-bubble", "zbv", "dualpipev"] | None = (
        None
    )
    """Order of forward and backward passes (default: 1f1b, or interleaved with virtual stages)."""
    num_layers_per_virtual_pipeline_stage: int | None = None
    """Layers per stage with the interleaved schedules, which give every process several stages."""
    num_virtual_stages_per_pipeline_rank: int | None = None
    """The same as a number of stages per process."""
    pipeline_model_parallel_layout: str | None = None
    """Stages written out: E embedding, t layer, L loss, | between stages, x*3 or (..)*3 repeats."""
    decoder_first_pipeline_num_layers: int | None = None
    """Layers of the first process of the pipeline; the others share the rest evenly."""
    decoder_last_pipeline_num_layers: int | None = None
    """Layers of the last process of the pipeline."""
    account_for_embedding_in_pipeline_split: bool = False
    """The embedding counts as a layer when layers are shared out: the first stage has one less."""
    account_for_loss_in_pipeline_split: bool = False
    """The output layer counts as a layer when layers are shared out: the last stage has one less."""
    data_parallel_sharding_strategy: Literal["optim", "no_shard", "optim_grads", "optim_grads_params"] = "optim"
    """Data-parallel ranks share out optimizer state (optim: ZeRO-1), all (optim_grads_params: FSDP2), or no_shard."""
    num_distributed_optimizer_instances: int = 1
    """Share out within this many groups of data-parallel ranks instead of over all; the groups hold copies."""
    overlap_grad_reduce: bool = False
    """Reduce gradients over data-parallel ranks during the last micro-batch's backward pass."""
    overlap_param_gather: bool = False
    """Gather updated parameters while the next step's forward pass runs."""
    ddp_bucket_size: int = 40_000_000
    """Gradient elements that are reduced over data-parallel ranks at a time."""
    optimizer_cpu_offload: bool = False
    """Keep master weights and optimizer state in CPU memory and update them there."""
    distributed_timeout_minutes: float = 10.0
    """A collective that waits longer ends the run."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to run: auto takes CUDA where there is one."""
    recompute_granularity: Literal["full", "selective"] | None = None
    """Recompute whole layers (full) or the parts of --recompute-modules (selective) in the backward pass."""
    recompute_method: Literal["uniform", "block"] | None = None
    """With full recompute: all layers in groups (uniform), or that many layers and no more (block)."""
    recompute_num_layers: int | None = None
    """Layers per recompute group (uniform), or layers recomputed (block)."""
    recompute_modules: tuple[str, ...] = ("core_attn",)
    """With selective recompute: any of core_attn, mlp, moe, layernorm, residual (or mhc, Megatron-LM's name for it);
    residual goes with full recompute too: layers then keep their outputs instead of all streams at their entrance."""
    residual_recompute_interval: int | None = None
    """With --recompute-modules residual: boundaries (reads, two a layer) from one kept state of the streams to the
    next; 1: kept at every read (default: about sqrt(n B / (n + 2)) for a stage of B boundaries with n streams). With
    full recompute a multiple of 2 --recompute-num-layers (block: of 2; default: about the root of its layers or
    groups)."""

    @property
    def recomputes_residual(self) -> bool:
        return self.recompute_granularity is not None and bool({"residual", "mhc"} & {*self.recompute_modules})

    @property
    def recomputes_experts(self) -> bool:
        return self.recompute_granularity == "full" or (
            self.recompute_granularity == "selective" and "moe" in self.recompute_modules
        )

    @property
    def expert_parts(self) -> int:
        """Processes that share one expert."""
        return self.expert_tensor_parallel_size or self.tensor_model_parallel_size

    @property
    def model_parallel_size(self) -> int:
        """Processes that together train on one sample: of a copy of the model, for each part of the sequence."""
        return self.tensor_model_parallel_size * self.pipeline_model_parallel_size * self.context_parallel_size

    def pipeline_layout(self, num_layers: int) -> PipelineLayout:
        """The stages; ``ValueError`` where the layers cannot be shared out so."""
        size, schedule = self.pipeline_model_parallel_size, self._schedule
        if self.pipeline_model_parallel_layout is not None:
            sizes = parse_layout(self.pipeline_model_parallel_layout, num_layers)
            require(
                len(sizes) == size * max(1, len(sizes) // size),
                f"--pipeline-model-parallel-layout has {len(sizes)} stages, which --pipeline-model-parallel-size "
                f"({size}) must divide",
            )
        else:
            sizes = self._split(num_layers, self._virtual_stages(num_layers))
        layout = PipelineLayout(size, schedule, bounds_of(sizes))
        per_rank = layout.stages_per_rank
        require(
            per_rank == 2 or schedule not in V_SCHEDULES,
            f"--pipeline-schedule {schedule} has 2 stages per process, not {per_rank}",
        )
        require(
            per_rank == 1 or schedule not in ("1f1b", "gpipe"),
            f"--pipeline-schedule {schedule} has one stage per process, not {per_rank}: use interleaved",
        )
        idle = [rank for rank in range(1, size) if not layout.layers_of(rank) and not layout.has_end(rank)]
        require(
            not idle,
            f"--pipeline-model-parallel-layout ({self.pipeline_model_parallel_layout}) leaves process "
            f"{', '.join(map(str, idle))} of the pipeline without a layer, embedding or loss",
        )
        return layout

    @property
    def _schedule(self) -> str:
        if self.pipeline_schedule is not None:
            return self.pipeline_schedule
        size, text = self.pipeline_model_parallel_size, self.pipeline_model_parallel_layout
        several = self.num_layers_per_virtual_pipeline_stage or (self.num_virtual_stages_per_pipeline_rank or 1) > 1
        if text is not None:
            several = len(text) > 0 and len(parse_layout(text, None)) > size
        return "interleaved" if several else "1f1b"

    def _virtual_stages(self, num_layers: int) -> int:
        """Stages per process."""
        size, layers = self.pipeline_model_parallel_size, self.num_layers_per_virtual_pipeline_stage
        if layers is None:
            return self.num_virtual_stages_per_pipeline_rank or (2 if self._schedule in V_SCHEDULES else 1)
        require(
            layers > 0 and num_layers % (size * layers) == 0,
            f"--num-layers ({num_layers}) must be a multiple of --pipeline-model-parallel-size ({size}) times "
            f"--num-layers-per-virtual-pipeline-stage ({layers}), or give --num-virtual-stages-per-pipeline-rank",
        )
        return num_layers // (size * layers)

    def _split(self, num_layers: int, per_rank: int) -> list[int]:
        size = self.pipeline_model_parallel_size
        first, last = self.decoder_first_pipeline_num_layers, self.decoder_last_pipeline_num_layers
        if first is None and last is None:
            return even_split(
                num_layers,
                size * per_rank,
                counts_embedding=self.account_for_embedding_in_pipeline_split,
                counts_loss=self.account_for_loss_in_pipeline_split,
            )
        is_v = self._schedule in V_SCHEDULES
        return split_with_ends(num_layers, size, per_rank, first, last, is_v=is_v)

    def _validate_pipeline(self, model: ModelConfig) -> None:
        size, name = self.pipeline_model_parallel_size, "--pipeline-model-parallel-size"
        counts = ("num_layers_per_virtual_pipeline_stage", "num_virtual_stages_per_pipeline_rank")
        ends = ("decoder_first_pipeline_num_layers", "decoder_last_pipeline_num_layers")
        accounts = ("account_for_embedding_in_pipeline_split", "account_for_loss_in_pipeline_split")
        positive(self, "pipeline_model_parallel_size", *counts, *ends)
        given = [
            option
            for option in ("pipeline_schedule", "pipeline_model_parallel_layout", *counts, *ends, *accounts)
            if getattr(self, option)
        ]
        needs = "needs" if len(given) == 1 else "need"
        require(size > 1 or not given, f"{' and '.join(map(flag, given))} {needs} {name} above 1, not {size}")
        exclusive = ("pipeline_model_parallel_layout", *counts, *ends)
        chosen = [option for option in given if option in exclusive]
        splits = [option for option in chosen if option not in ends]
        require(len(splits) < 2, f"{' and '.join(map(flag, splits))} exclude each other: give one")
        clashing = [option for option in given if option in (*ends, *accounts)]
        require(
            self.pipeline_model_parallel_layout is None or not clashing,
            f"--pipeline-model-parallel-layout says which stage has which layers: leave out "
            f"{' and '.join(map(flag, clashing))}",
        )
        has_ends = any(option in ends for option in given)
        require(
            not has_ends or not any(option in accounts for option in given),
            f"{' and '.join(map(flag, clashing))} exclude each other: the former say how many layers the ends have",
        )
        sharding = self.data_parallel_sharding_strategy
        require(
            sharding in ("optim", "no_shard") or self.pipeline_schedule not in ZERO_BUBBLE_SCHEDULES,
            f"--data-parallel-sharding-strategy {sharding} and --pipeline-schedule {self.pipeline_schedule} exclude "
            "each other: gradients of weights come outside of the backward pass there: use optim",
        )
        self.pipeline_layout(model.num_layers)

    def data_parallel_size(self, world_size: int) -> int:
        """Copies of the model in ``world_size`` processes; refuses a number that does not come out even."""
        sizes = {
            f"--{name}-parallel-size ({size})": size
            for name, size in (
                ("tensor-model", self.tensor_model_parallel_size),
                ("pipeline-model", self.pipeline_model_parallel_size),
                ("context", self.context_parallel_size),
            )
        }
        given = [name for name, size in sizes.items() if size > 1]
        require(
            world_size % self.model_parallel_size == 0,
            f"{' times '.join(given)} must divide the number of processes ({world_size})",
        )
        stage = world_size // self.pipeline_model_parallel_size
        block = self.expert_model_parallel_size * self.expert_parts
        require(
            stage % block == 0,
            f"--expert-model-parallel-size ({self.expert_model_parallel_size}) times --expert-tensor-parallel-size "
            f"({self.expert_parts}) must divide the processes of a pipeline stage ({stage})",
        )
        size, instances = world_size // self.model_parallel_size, self.num_distributed_optimizer_instances
        copies = size * self.context_parallel_size
        name = "data-parallel size" + (" times --context-parallel-size" if self.context_parallel_size > 1 else "")
        require(
            instances == 1 or copies % instances == 0 and instances < copies,
            f"--num-distributed-optimizer-instances ({instances}) must divide the {name} ({copies}), and be smaller",
        )
        return size

    def _validate_experts(self, model: ModelConfig) -> None:
        ep, tp, parts = self.expert_model_parallel_size, self.tensor_model_parallel_size, self.expert_parts
        positive(self, "expert_model_parallel_size", "expert_tensor_parallel_size")
        if model.moe.num_experts is None:
            require(
                ep == 1 and self.expert_tensor_parallel_size is None,
                f"--expert-model-parallel-size ({ep}) and --expert-tensor-parallel-size "
                f"({self.expert_tensor_parallel_size}) need --num-experts",
            )
            require(
                self.moe_token_dispatcher_type == ParallelConfig.moe_token_dispatcher_type,
                f"--moe-token-dispatcher-type ({self.moe_token_dispatcher_type}) needs --num-experts",
            )
            return
        require(
            model.moe.num_experts % ep == 0,
            f"--expert-model-parallel-size ({ep}) must divide --num-experts ({model.moe.num_experts})",
        )
        require(
            model.expert_ffn_size % parts == 0,
            f"--expert-tensor-parallel-size ({parts}) must divide --moe-ffn-hidden-size ({model.expert_ffn_size})",
        )
        shared = model.moe.moe_shared_expert_intermediate_size
        require(
            shared is None or shared % tp == 0,
            f"--tensor-model-parallel-size ({tp}) must divide --moe-shared-expert-intermediate-size ({shared})",
        )

    def _validate_tensor_parallel(self, model: ModelConfig) -> None:
        tp, name = self.tensor_model_parallel_size, "--tensor-model-parallel-size"
        positive(self, "tensor_model_parallel_size", "distributed_timeout_minutes")
        require(not self.sequence_parallel or tp > 1, f"--sequence-parallel needs {name} above 1: leave it out")
        heads, kv_heads = model.num_attention_heads, model.num_kv_heads
        require(heads % tp == 0, f"{name} ({tp}) must divide --num-attention-heads ({heads})")
        require(
            kv_heads % tp == 0 or tp % kv_heads == 0,
            f"{name} ({tp}) must divide --num-query-groups ({kv_heads}) or be a multiple of it",
        )
        require(
            not model.qk_layernorm_across_heads or kv_heads % tp == 0,
            f"{name} ({tp}) must divide --num-query-groups ({kv_heads}) with --qk-layernorm-across-heads, whose norm "
            "of the keys needs each key on one rank",
        )
        require(model.ffn_size % tp == 0, f"{name} ({tp}) must divide --ffn-hidden-size ({model.ffn_size})")
        require(
            not self.sequence_parallel or model.seq_length % tp == 0,
            f"{name} ({tp}) must divide --seq-length ({model.seq_length}) with --sequence-parallel",
        )

    def _validate_context_parallel(self, model: ModelConfig) -> None:
        cp, tp, name = self.context_parallel_size, self.tensor_model_parallel_size, "--context-parallel-size"
        positive(self, "context_parallel_size")
        if cp == 1:
            return
        of_one = " of a tensor-parallel process" if tp > 1 else ""
        heads, groups = model.num_attention_heads // tp, max(1, model.num_kv_heads // tp)
        require(
            heads % cp == 0,
            f"{name} ({cp}) must divide the attention heads{of_one} ({heads}), of which every process takes a part "
            "for the whole sequence",
        )
        require(
            groups % cp == 0 or cp % groups == 0,
            f"{name} ({cp}) must divide the query groups{of_one} ({groups}) or be a multiple of them",
        )
        parts = cp * tp if self.sequence_parallel else cp
        times = f" times --tensor-model-parallel-size ({tp}) with --sequence-parallel" if parts > cp else ""
        require(model.seq_length % parts == 0, f"{name} ({cp}){times} must divide --seq-length ({model.seq_length})")

    def _validate_data_parallel(self) -> None:
        strategy, name = self.data_parallel_sharding_strategy, "--data-parallel-sharding-strategy"
        positive(self, "num_distributed_optimizer_instances", "ddp_bucket_size")
        require(
            strategy != "optim_grads",
            f"{name} optim_grads is not offered: gradients kept as shards must be reduced after every micro-batch "
            "instead of once a step; take optim, or optim_grads_params where memory counts",
        )
        require(
            strategy != "no_shard" or self.num_distributed_optimizer_instances == 1,
            f"--num-distributed-optimizer-instances ({self.num_distributed_optimizer_instances}) needs {name} optim or "
            "optim_grads_params, not no_shard, where every process holds everything",
        )
        require(
            strategy != "no_shard" or not self.overlap_param_gather,
            f"--overlap-param-gather needs {name} optim, not no_shard, where no parameter is gathered",
        )

    def validate(self, model: ModelConfig) -> None:
        self._validate_tensor_parallel(model)
        self._validate_context_parallel(model)
        self._validate_experts(model)
        self._validate_pipeline(model)
        self._validate_data_parallel()
        self._validate_recompute(model)

    def _validate_recompute(self, model: ModelConfig) -> None:
        allowed = ("core_attn", "mlp", "moe", "layernorm", "residual", "mhc")
        for name in self.recompute_modules:
            require(name in allowed, f"--recompute-modules ({name}) must be any of {', '.join(allowed)}")
            require(name != "moe" or model.moe.num_experts is not None, "--recompute-modules moe needs --num-experts")
        self._validate_recompute_modules()
        number = self.recompute_num_layers
        if self.recompute_granularity == "full":
            require(
                self.recompute_method is not None and number is not None,
                "--recompute-granularity full needs --recompute-method and --recompute-num-layers",
            )
            require(
                1 <= (number or 0) <= model.num_layers,
                f"--recompute-num-layers ({number}) must be in 1 .. --num-layers ({model.num_layers})",
            )
        else:
            require(
                self.recompute_method is None and number is None,
                "--recompute-method and --recompute-num-layers need --recompute-granularity full",
            )
        self._validate_residual_interval(model)

    def _validate_recompute_modules(self) -> None:
        """Refuse modules that would not be recomputed; core_attn is the default, and part of whole layers."""
        if self.recompute_granularity is None:
            require(
                self.recompute_modules in ((), ParallelConfig.recompute_modules),
                f"--recompute-modules ({shown(self.recompute_modules)}) needs --recompute-granularity selective, or "
                "full for residual",
            )
        elif self.recompute_granularity == "full":
            parts = [name for name in self.recompute_modules if name not in ("core_attn", "residual", "mhc")]
            require(
                not parts,
                f"--recompute-modules ({shown(tuple(parts))}) needs --recompute-granularity selective: full recomputes "
                "whole layers, beside which only residual does something",
            )

    def _validate_residual_interval(self, model: ModelConfig) -> None:
        interval, most = self.residual_recompute_interval, 2 * model.num_layers
        if interval is None:
            return
        name = f"--residual-recompute-interval ({interval})"
        require(
            self.recomputes_residual,
            f"{name} needs --recompute-granularity selective or full and --recompute-modules residual",
        )
        require(1 <= interval <= most, f"{name} must be in 1 .. {most}, two boundaries a layer")
        if self.recompute_granularity == "full":
            group = (self.recompute_num_layers or 1) if self.recompute_method == "uniform" else 1
            require(
                interval % (2 * group) == 0,
                f"{name} must be a multiple of {2 * group}, two boundaries for each of the {group} layers that "
                "full recompute runs again together",
            )
