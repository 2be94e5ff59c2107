"""Flags of Megatron-LM that have no field here: other spellings of a field, and flags that need not be said.

A flag that is a field of ``config`` must not occur in these tables (a test holds them to that): when a later feature
makes one real, its row goes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

VALUE: Literal["VALUE"] = "VALUE"
"""In an alias: the field takes the flag's own value."""

ALIASES: dict[str, dict[str, str]] = {
    "use_rotary_position_embeddings": {"position_embedding_type": "rope"},
    "encoder_seq_length": {"seq_length": VALUE},
    "layernorm_epsilon": {"norm_epsilon": VALUE},
    "use_torch_fsdp2": {"data_parallel_sharding_strategy": "optim_grads_params"},
    "use_distributed_optimizer": {"data_parallel_sharding_strategy": "optim"},
    "recompute_activations": {"recompute_granularity": "selective"},
    "wandb_name": {"wandb_exp_name": VALUE},
    "enable_mhc_connections": {"residual_connection": "mhc"},
    "mhc_num_residual_streams": {"residual_streams": VALUE},
    "cpu_optimizer": {"optimizer_cpu_offload": "true"},
}
"""Other spelling -> {field: fixed value, or VALUE}. Without a VALUE the flag stands alone (``--flag``; YAML: true)."""

UNDERSCORED = {
    "--deepspeed_config": "--deepspeed-config",
    "--override-opt_param-scheduler": "--override-opt-param-scheduler",
    "--use-checkpoint-opt_param-scheduler": "--use-checkpoint-opt-param-scheduler",
}
"""Flags that DeepSpeed and Megatron-LM spell with an underscore, and their spelling here."""


@dataclass(frozen=True)
class NotNeeded:
    """A flag of Megatron-LM that changes nothing here."""

    why: str
    takes: int = 0
    """Number of values that follow it."""
    values: tuple[str, ...] = ()
    """The values that it is not needed with; any other one is refused. Empty: any value."""


REPLACED: dict[str, str] = {
    "fp16": "use --bf16, which needs no loss scaling",
    "vocab_file": "put it into a folder as vocab.json beside merges.txt and give --tokenizer-type HuggingFaceTokenizer "
    "--tokenizer-model FOLDER",
    "merge_file": "put it into a folder as merges.txt beside vocab.json and give --tokenizer-type HuggingFaceTokenizer "
    "--tokenizer-model FOLDER",
    "checkpoint_activations": "use --recompute-granularity full --recompute-method uniform --recompute-num-layers 1",
    "distribute_saved_activations": "use --sequence-parallel, which keeps a part of the streams on each process",
    "mhc_recompute_layer_num": "use --residual-recompute-interval with twice its number: it counts boundaries, "
    "of which a layer has two",
    "deepspeed_activation_checkpointing": "use --recompute-granularity full --recompute-method uniform "
    "--recompute-num-layers 1",
    "decoder_seq_length": "there is no encoder: use --seq-length",
    "use_checkpoint_opt_param_scheduler": "schedules always follow the command line: give the flags of learning rate "
    "and weight decay that the checkpoint was trained with",
}
"""Flag that is not offered -> what to do instead."""

_KERNEL = "only picks a kernel"
_FUSION = "fused kernels are picked by themselves"
_SCHEDULE = "only picks when communication runs"
_ALWAYS = "always so here"
_FORMAT = "checkpoints have one format here, which any layout reads"
_JIT = "nothing is compiled ahead"
_TE = "only sets up a transformer-engine feature that is off"

NOT_NEEDED: dict[str, NotNeeded] = {
    # Kernels
    "use_flash_attn": NotNeeded(_KERNEL),
    "spec": NotNeeded(_KERNEL, 2),
    "use_mcore_models": NotNeeded(_ALWAYS),
    "use_legacy_models": NotNeeded("there is one model here"),
    "apply_query_key_layer_scaling": NotNeeded("a guard for fp16, which is not offered"),
    "no_query_key_layer_scaling": NotNeeded(_ALWAYS),
    "no_persist_layer_norm": NotNeeded(_KERNEL),
    "no_masked_softmax_fusion": NotNeeded(_FUSION),
    "no_bias_gelu_fusion": NotNeeded(_FUSION),
    "no_bias_swiglu_fusion": NotNeeded(_FUSION),
    "no_bias_dropout_fusion": NotNeeded(_FUSION),
    "no_rope_fusion": NotNeeded(_FUSION),
    "moe_permute_fusion": NotNeeded(_FUSION),
    "moe_router_fusion": NotNeeded(_FUSION),
    "moe_use_legacy_grouped_gemm": NotNeeded(_KERNEL),
    "moe_shared_expert_overlap": NotNeeded(_SCHEDULE),
    "overlap_moe_expert_parallel_comm": NotNeeded(_SCHEDULE),
    "tp_comm_overlap": NotNeeded(_SCHEDULE),
    "cross_entropy_loss_fusion": NotNeeded(_FUSION),
    "cross_entropy_fusion_impl": NotNeeded(_FUSION, 1),
    "no_async_tensor_model_parallel_allreduce": NotNeeded(_SCHEDULE),
    "disable_jit_fuser": NotNeeded(_JIT),
    # Precision that is the only one here
    "accumulate_allreduce_grads_in_fp32": NotNeeded("gradients are always summed in fp32"),
    "main_grads_dtype": NotNeeded("gradients are always summed in fp32", 1, ("fp32",)),
    "main_params_dtype": NotNeeded("master weights are always fp32", 1, ("fp32",)),
    "exp_avg_dtype": NotNeeded("moments are always fp32", 1, ("fp32",)),
    "exp_avg_sq_dtype": NotNeeded("moments are always fp32", 1, ("fp32",)),
    "no_fp8_weight_transpose_cache": NotNeeded(_TE),
    "grad_reduce_in_bf16": NotNeeded("gradients are always summed in fp32"),
    # Communication and start-up
    "distributed_backend": NotNeeded("follows from the device", 1),
    "local_rank": NotNeeded("read from the environment", 1),
    "overlap_param_gather_with_optimizer_step": NotNeeded(_SCHEDULE),
    "align_grad_reduce": NotNeeded(_SCHEDULE),
    "no_align_grad_reduce": NotNeeded(_SCHEDULE),
    "align_param_gather": NotNeeded(_SCHEDULE),
    "no_align_param_gather": NotNeeded(_SCHEDULE),
    "ddp_num_buckets": NotNeeded(_SCHEDULE, 1),
    "ddp_average_in_collective": NotNeeded("only picks where the mean is taken"),
    "use_ring_exchange_p2p": NotNeeded(_SCHEDULE),
    "no_pipeline_parallel": NotNeeded("without --pipeline-model-parallel-size there is none"),
    "no_overlap_p2p_communication": NotNeeded(_SCHEDULE),
    "cp_comm_type": NotNeeded("context-parallel ranks exchange heads for tokens", 1, ("a2a",)),
    "lazy_mpu_init": NotNeeded("there is no global state to set up", 1),
    "use_cpu_initialization": NotNeeded("weights are the same wherever they are drawn"),
    "no_initialization": NotNeeded("weights are always drawn"),
    "use_tp_pp_dp_mapping": NotNeeded("the order of ranks is fixed"),
    "no_async_grad_allreduce": NotNeeded(_SCHEDULE),
    "manual_gc": NotNeeded("garbage collection needs no care here"),
    "manual_gc_interval": NotNeeded("garbage collection needs no care here", 1),
    "no_manual_gc_eval": NotNeeded("garbage collection needs no care here"),
    # Data
    "dataloader_type": NotNeeded("data is always read in Megatron's order 'single'", 1, ("single",)),
    "no_create_attention_mask_in_dataloader": NotNeeded("no mask is made for causal attention"),
    "no_mmap_bin_files": NotNeeded("data is always memory-mapped"),
    "num_dataset_builder_threads": NotNeeded("index files are built in one go", 1),
    "data_impl": NotNeeded("there is one data format", 1, ("mmap", "infer")),
    "exit_signal_handler_for_dataloader": NotNeeded("signals never end the readers of data"),
    "legacy_tokenizer": NotNeeded("there is one tokenizer interface"),
    "no_position_embedding": NotNeeded("--position-embedding-type says it"),
    # Optimizer
    "optimizer": NotNeeded("AdamW is the only optimizer", 1, ("adam",)),
    "override_opt_param_scheduler": NotNeeded("schedules always follow the command line"),
    "loss_scale": NotNeeded("a guard for fp16, which is not offered", 1),
    "initial_loss_scale": NotNeeded("a guard for fp16, which is not offered", 1),
    "min_loss_scale": NotNeeded("a guard for fp16, which is not offered", 1),
    "loss_scale_window": NotNeeded("a guard for fp16, which is not offered", 1),
    "hysteresis": NotNeeded("a guard for fp16, which is not offered", 1),
    # Checkpoints
    "ckpt_format": NotNeeded(_FORMAT, 1),
    "dist_ckpt_format": NotNeeded(_FORMAT, 1),
    "use_dist_ckpt": NotNeeded(_FORMAT),
    "auto_detect_ckpt_format": NotNeeded(_FORMAT),
    "ckpt_fully_parallel_save": NotNeeded(_FORMAT),
    "no_ckpt_fully_parallel_save": NotNeeded(_FORMAT),
    "ckpt_fully_parallel_load": NotNeeded(_FORMAT),
    "ckpt_assume_constant_structure": NotNeeded(_FORMAT),
    "dist_ckpt_strictness": NotNeeded("a checkpoint must always fit", 1),
    "dist_ckpt_optim_fully_reshardable": NotNeeded(_FORMAT),
    # Logs
    "log_timers_to_tensorboard": NotNeeded("the iteration's time is always written"),
    "log_batch_size_to_tensorboard": NotNeeded("the batch size is always written"),
    "log_validation_ppl_to_tensorboard": NotNeeded("the perplexity is always written"),
    "log_memory_to_tensorboard": NotNeeded("memory is always written"),
    "log_world_size_to_tensorboard": NotNeeded("the world size is always written"),
    "no_log_learnig_rate_to_tensorboard": NotNeeded("the learning rate is always written"),
    "no_log_loss_scale_to_tensorboard": NotNeeded("there is no loss scale"),
    "tensorboard_log_interval": NotNeeded("TensorBoard gets what the console gets, see --log-interval", 1),
    "tensorboard_queue_size": NotNeeded("events are written at once", 1),
    "timing_log_level": NotNeeded("the iteration's time is always written", 1),
    "timing_log_option": NotNeeded("the iteration's time is always written", 1),
    "log_progress": NotNeeded("--metrics-jsonl holds it"),
    "disable_straggler_on_startup": NotNeeded("--log-straggler alone turns it on"),
    "straggler_ctrlr_port": NotNeeded("--log-straggler opens no port", 1),
    "straggler_minmax_count": NotNeeded("--log-straggler names the slowest rank of each stage", 1),
    "no_one_logger": NotNeeded("nothing is sent anywhere"),
}
"""Flag (underscores) -> why it is not needed. Values that change the numbers are refused, see ``NotNeeded.values``."""
