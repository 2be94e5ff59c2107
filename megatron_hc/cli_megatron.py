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
    "encoder_num_layers": {"num_layers": VALUE},
    "layernorm_epsilon": {"norm_epsilon": VALUE},
    "persistent_save_interval": {"save_interval": VALUE},
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
    "--DDP-impl": "--ddp-impl",
    "--deepspeed_config": "--deepspeed-config",
    "--override-opt_param-scheduler": "--override-opt-param-scheduler",
    "--use-checkpoint-opt_param-scheduler": "--use-checkpoint-opt-param-scheduler",
}
"""Flags that DeepSpeed and Megatron-LM spell with an underscore or capitals, and their spelling here."""


@dataclass(frozen=True)
class NotNeeded:
    """A flag of Megatron-LM that changes nothing here."""

    why: str
    takes: int | None = 0
    """Number of values that follow it; None: any number."""
    values: tuple[str, ...] = ()
    """The values that it is not needed with; any other one is refused. Empty: any value."""
    beside: tuple[str, tuple[str, ...]] | None = None
    """(field, values): it is not needed where the field has one of the values, and refused otherwise."""


_FOLDER = "--tokenizer-type HuggingFaceTokenizer --tokenizer-model FOLDER"
_MLA = "attention is multi-head or --group-query-attention, never latent: leave it out"
_MTP = "only the next token is predicted: leave it out"
_LEAVE = "leave it out"
_GRAPHS = "kernels are not captured in graphs: leave it out, or see --compile"
_FP8 = "only the flags of --fp8-format say what is computed in fp8: leave it out"
_ROTARY = "every layer's positions are rotated alike, by --rotary-base, --rotary-percent and --use-rope-scaling"
_ACTIVATION = "the MLP has GELU, --openai-gelu, --squared-relu or --swiglu"
_ONE_RATE = "all parameters share --lr and --min-lr: leave it out"
_SAVES = "use --save-interval and --async-save, with --save-retain-interval to keep some"
_CONVERT = "use tools/convert_checkpoint.py"
_PRETRAINING = "only pretraining is offered"
_TOKENS = "use the one that ends in -samples, with its number divided by --seq-length"

REPLACED: dict[str, str] = {
    "fp16": "use --bf16, which needs no loss scaling",
    "vocab_file": f"put it into a folder as vocab.json beside merges.txt and give {_FOLDER}",
    "merge_file": f"put it into a folder as merges.txt beside vocab.json and give {_FOLDER}",
    "checkpoint_activations": "use --recompute-granularity full --recompute-method uniform --recompute-num-layers 1",
    "distribute_saved_activations": "use --sequence-parallel, which keeps a part of the streams on each process",
    "mhc_recompute_layer_num": "use --residual-recompute-interval with twice its number: it counts boundaries, "
    "of which a layer has two",
    "deepspeed_activation_checkpointing": "use --recompute-granularity full --recompute-method uniform "
    "--recompute-num-layers 1",
    "decoder_seq_length": "there is no encoder: use --seq-length",
    "use_checkpoint_opt_param_scheduler": "schedules always follow the command line: give the flags of learning rate "
    "and weight decay that the checkpoint was trained with",
    # Megatron-LM: the model
    **dict.fromkeys(
        ("multi_latent_attention", "q_lora_rank", "kv_lora_rank", "qk_head_dim", "qk_pos_emb_head_dim", "v_head_dim"),
        _MLA,
    ),
    **dict.fromkeys(("mscale", "mscale_all_dim", "rotary_scaling_factor", "cache_mla_latents"), _MLA),
    **dict.fromkeys(("rotary_interleaved", "no_rope_freq", "mrope_section"), _ROTARY),
    **dict.fromkeys(("quick_geglu", "activation_func_clamp_value", "glu_linear_offset", "xielu"), _ACTIVATION),
    "window_size": "every token sees all before it, there are no sliding windows: leave it out",
    "window_attn_skip_freq": "every token sees all before it, there are no sliding windows: leave it out",
    "qk_l2_norm": "use --qk-layernorm, which has weights",
    "apply_residual_connection_post_layernorm": "norms are placed with --norm-placement",
    "embedding_init_method_std": "embeddings are drawn like other weights, with --init-method-std",
    "init_method_xavier_uniform": "weights are drawn by --init-scheme and --init-method-std",
    "padded_vocab_size": "use --vocab-size, and --make-vocab-size-divisible-by for the padding",
    "decoder_num_layers": "there is no encoder: use --num-layers",
    "use_mup": "learning rates and initial weights are not scaled by the width: give those of this width",
    # Megatron-LM: experts
    "moe_extended_tp": "use --expert-tensor-parallel-size",
    "moe_layer_recompute": "use --recompute-granularity selective --recompute-modules moe",
    "moe_enable_deepep": "use --moe-token-dispatcher-type alltoall",
    "moe_deepep_num_sms": "use --moe-token-dispatcher-type alltoall",
    "moe_flex_dispatcher_backend": "use --moe-token-dispatcher-type alltoall",
    "moe_router_force_load_balancing": "tokens always go where the router sends them: leave it out",
    "moe_apply_probs_on_input": "the router's weights are applied to what the experts give: leave it out",
    # Megatron-LM: training
    "decoupled_lr": _ONE_RATE,
    "decoupled_min_lr": _ONE_RATE,
    "head_lr_mult": _ONE_RATE,
    "batch_size": "use --micro-batch-size",
    "model_parallel_size": "use --tensor-model-parallel-size",
    "warmup": "use --lr-warmup-fraction",
    "check_for_large_grads": "use --check-for-spiky-loss, which also looks at the norm of the gradient",
    "result_rejected_tracker_filename": "use --iterations-to-skip",
    "decrease_batch_size_if_needed": "--global-batch-size always counts: give one that the processes can share out",
    "deterministic_mode": "no switch picks other kernels, and attention on a GPU may add in another order each time: "
    "leave it out",
    "data_parallel_random_init": "copies of the model always begin with the same weights: leave it out",
    "disable_bf16_reduced_precision_matmul": "matrix products are torch's: leave it out",
    "skip_train": "tools/eval_harness.py scores a checkpoint",
    "test_mode": _LEAVE,
    "multiple_validation_sets": "validation sets are one blend: leave it out",
    "cpu_offloading": "activations stay on their device: use --recompute-granularity",
    "cpu_offloading_num_layers": "activations stay on their device: use --recompute-granularity",
    # Megatron-LM: layouts
    "use_megatron_fsdp": "use --data-parallel-sharding-strategy optim_grads_params alone, without "
    "--use-distributed-optimizer",
    "torch_fsdp2_no_reshard_after_forward": "use --data-parallel-sharding-strategy optim, which keeps parameters whole",
    "enable_full_sharding_in_hsdp": "see --num-distributed-optimizer-instances",
    "hierarchical_context_parallel_sizes": "context-parallel ranks form one group: use --context-parallel-size",
    "distributed_timeout_seconds_after_init": "use --distributed-timeout-minutes",
    "standalone_embedding_stage": "use --account-for-embedding-in-pipeline-split, or --pipeline-model-parallel-layout",
    "pipeline_model_parallel_split_rank": "there is no encoder: leave it out",
    "use_mpi": "start the processes with torchrun or srun, whose ranks are read from the environment",
    "fp8_param_gather": _FP8,
    "no_fp8_wgrad": _FP8,
    "keep_fp8_transpose_cache": _FP8,
    "reuse_grad_buf_for_mxfp8_param_ag": _FP8,
    "fp8_quantizer_factory": _FP8,
    # Megatron-LM: data
    "per_split_data_args_path": "give what its train, valid and test say to --train-data-path, --valid-data-path and "
    "--test-data-path",
    "object_storage_cache_path": "datasets are read from the file system",
    "tokenizer_library": "use --tokenizer-type",
    "tokenizer_metadata": "use --tokenizer-type",
    "tiktoken_special_tokens": "special tokens have the names Megatron-LM gives them by default: leave it out",
    "allow_ambiguous_pad_tokens": "padding that is also end-of-document is never masked: leave it out",
    "use_packed_seq_params": "use --reset-attention-mask",
    # Megatron-LM: checkpoints and logs
    "pretrained_checkpoint": "use --load and --finetune",
    "use_mp_args_from_checkpoint_args": "give the sizes: a checkpoint fits any layout",
    "no_use_tokenizer_model_from_checkpoint_args": "give --tokenizer-model, which counts before the checkpoint's",
    "ckpt_convert_format": _CONVERT,
    "ckpt_convert_save": _CONVERT,
    "ckpt_convert_update_legacy_dist_opt_format": _CONVERT,
    "replication": _SAVES,
    "replication_jump": _SAVES,
    "replication_factor": _SAVES,
    "no_strict_fsdp_dtensor_load": "a checkpoint must always fit",
    "wandb_entity": "set WANDB_ENTITY in the environment, which Weights & Biases reads",
    "record_memory_history": "TensorBoard and --metrics-jsonl hold the memory: leave it out",
    "memory_snapshot_path": "TensorBoard and --metrics-jsonl hold the memory: leave it out",
    "log_energy": _LEAVE,
    "config_logger_dir": "arguments.json of a checkpoint holds every setting, and its origin",
    "run_workload_inspector_server": "see --profile",
    "enable_ft_package": "see --heartbeat-file",
    "calc_ft_timeouts": "see --heartbeat-file",
    # Megatron-DeepSpeed
    "tokenizer_name_or_path": f"put the tokenizer's tokenizer.json into a folder and give {_FOLDER}",
    "train_weighted_split_paths": "use --train-data-path WEIGHT PREFIX ...",
    "train_weighted_split_paths_path": "use --train-data-path WEIGHT PREFIX ...",
    "valid_weighted_split_paths": "use --valid-data-path WEIGHT PREFIX ...",
    "valid_weighted_split_paths_path": "use --valid-data-path WEIGHT PREFIX ...",
    "valid_num_workers": "use --num-workers",
    "train_tokens": _TOKENS,
    "lr_decay_tokens": _TOKENS,
    "lr_warmup_tokens": _TOKENS,
    "moe_expert_parallel_size": "use --expert-model-parallel-size",
    "moe_loss_coeff": "use --moe-aux-loss-coeff",
    "moe_train_capacity_factor": "use --moe-expert-capacity-factor",
    "moe_eval_capacity_factor": "use --moe-expert-capacity-factor",
    "moe_min_capacity": "use --moe-expert-capacity-factor",
    "topk": "use --moe-router-topk",
    "embed_layernorm": "the embedding has no norm of its own: leave it out",
    "pp_partition_method": "use --account-for-embedding-in-pipeline-split and --account-for-loss-in-pipeline-split, or "
    "--pipeline-model-parallel-layout",
    "kill_switch_path": "use --exit-signal-handler and send the signal",
    "ds_sequence_parallel_size": "use --context-parallel-size",
    "universal_checkpoint": "every checkpoint fits any layout: leave it out",
    # Pai-Megatron-Patch
    "patch_tokenizer_type": f"put the tokenizer's tokenizer.json into a folder and give {_FOLDER}",
    "extra_vocab_size": "use --vocab-size, which counts all rows of the embedding",
    "max_padding_length": "samples have --seq-length tokens and no padding: leave it out",
    "dataset": "data is what --data-path names, in Megatron-LM's format: leave it out",
    "optimizer_offload_policy": "use --optimizer-cpu-offload",
    "enable_shared_expert": "use --moe-shared-expert-intermediate-size",
    "num_shared_experts": "use --moe-shared-expert-intermediate-size",
    "use_multi_token_prediction": _MTP,
    "num_mtp_predictor": _MTP,
    "qk_nope_head_dim": _MLA,
    "qk_rope_head_dim": _MLA,
}
"""Flag that is not offered -> what to do instead."""

FAMILIES: dict[str, str] = {
    **dict.fromkeys(
        ("retro_", "biencoder_", "ict_", "bert_", "retriever_", "indexer_", "vision_", "dino_", "swin_", "img_"),
        "all models are decoders",
    ),
    **dict.fromkeys(("mamba_", "hybrid_", "is_hybrid_model", "heterogeneous_"), "every layer is attention and an MLP"),
    **dict.fromkeys(("rl_", "grpo_", "langrl_", "perform_rl_step", "sft", "ap_sft"), _PRETRAINING),
    **dict.fromkeys(("muon_", "ademamix_", "sgd_", "dion_"), "AdamW is the only optimizer"),
    **dict.fromkeys(("cuda_graph_", "enable_cuda_graph", "external_cuda_graph"), _GRAPHS),
    "mtp_": _MTP,
    "mup_": "learning rates and initial weights are not scaled by the width: give those of this width",
    "fp4_": "use --bf16, or --fp8-format",
    "kitchen_": "use --bf16, or --fp8-format",
    "fim_": "samples are not rearranged: leave it out",
    "relative_attention_": "positions are --position-embedding-type rope, learned_absolute or none",
    "attention_sink_": "attention has torch's softmax: leave it out",
    "goldfish_": "the loss is of every token: leave it out",
    "curriculum_": "samples always have --seq-length tokens: leave it out",
    "data_efficiency_": "samples always have --seq-length tokens: leave it out",
    "inference_": "see tools/generate.py and tools/serve.py",
    "inprocess_": "use --max-restarts of torchrun",
    "error_injection_": "there is no rerun of an iteration to test: leave it out",
    "non_persistent_": _SAVES,
    "adlr_": "use --exit-signal-handler or --exit-duration-in-mins",
}
"""How the names of flags begin that are not offered -> why, or what to do instead."""

VALUES: dict[str, dict[str, str]] = {
    "tokenizer_type": {
        "GPT2BPETokenizer": f"put its two files into a folder as vocab.json and merges.txt and give {_FOLDER}",
        "GPTSentencePieceTokenizer": "use SentencePieceTokenizer, which is the same here",
        "Llama2Tokenizer": "use SentencePieceTokenizer with the same model: it puts no BOS before a text, and ends "
        "documents with the same token",
        "PretrainedFromHF": f"put the tokenizer's tokenizer.json into a folder and give {_FOLDER}",
        "SFTTokenizer": _PRETRAINING,
        "BertWordPieceLowerCase": "all models are decoders",
        "BertWordPieceCase": "all models are decoders",
    },
    "position_embedding_type": dict.fromkeys(
        ("alibi", "relative", "mrope", "yarn"), "use rope, learned_absolute or none"
    ),
    "moe_token_dispatcher_type": {"flex": "use alltoall, which gives the same numbers"},
    "attention_backend": {"local": "use unfused"},
    "lr_wsd_decay_style": {"1-sqrt": "use minus_sqrt"},
}
"""Field -> values that other programs have for it -> what to do instead."""

_KERNEL = "only picks a kernel"
_FUSION = "fused kernels are picked by themselves"
_SCHEDULE = "only picks when communication runs"
_ALWAYS = "always so here"
_FORMAT = "checkpoints have one format here, which any layout reads"
_JIT = "nothing is compiled ahead"
_OFFLOAD = "--optimizer-cpu-offload does it in one way"
_MEMORY = "only picks how memory is used"
_TE = "only sets up a transformer-engine feature that is off"

NOT_NEEDED: dict[str, NotNeeded] = {
    # Kernels
    "use_flash_attn": NotNeeded(_KERNEL),
    "spec": NotNeeded("layers are what the other flags say, and kernels are picked by themselves", None, ("local",)),
    "enable_experimental": NotNeeded("nothing waits behind it"),
    "use_te_activation_func": NotNeeded(_KERNEL),
    "use_fused_weighted_squared_relu": NotNeeded(_FUSION),
    "qknorm_impl": NotNeeded(_KERNEL, 1),
    "onnx_safe": NotNeeded("nothing is exported while it trains", 1),
    "softmax_type": NotNeeded("attention has torch's softmax", 1, ("vanilla",)),
    "apply_layernorm_1p": NotNeeded(
        "norms' weights stay fp32 and have no weight decay, so where they lie does not matter"
    ),
    "rope_type": NotNeeded("--position-embedding-type says it", 1, ("rope",)),
    "rotary_seq_len_interpolation_factor": NotNeeded("positions are not interpolated", 1, ("1",)),
    "no_clone_scatter_output_in_embedding": NotNeeded(_MEMORY),
    "abort_on_unmet_fused_kernel_constraints": NotNeeded(_FUSION),
    "moe_router_padding_for_fp8": NotNeeded(_KERNEL),
    "moe_upcycling_granularity": NotNeeded("an expert is as wide as the MLP it is made of", 1, ("1",)),
    "create_moe_param_group": NotNeeded("experts are always told apart from other parameters"),
    "disable_moe_token_dropping": NotNeeded("without --moe-expert-capacity-factor no token is dropped"),
    "pad_vocab_size_to": NotNeeded("padding is never predicted or stored", 1),
    "vocab_extra_ids": NotNeeded("no ids are added to a tokenizer's", 1, ("0",)),
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
    "fp8_margin": NotNeeded("scales have no margin", 1, ("0",)),
    "fp8_interval": NotNeeded("scales are new in every step", 1, ("1",)),
    "te_rng_tracker": NotNeeded("random numbers need no tracker"),
    "inference_rng_tracker": NotNeeded("random numbers need no tracker"),
    "use_precision_aware_optimizer": NotNeeded("master weights, gradients and moments are always fp32"),
    "fp16_lm_cross_entropy": NotNeeded("a part of fp16, which is not offered"),
    "ddp_reduce_scatter_with_fp32_accumulation": NotNeeded("gradients are always summed in fp32"),
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
    "ddp_impl": NotNeeded("gradients are summed in one way", 1, ("local", "torch")),
    "ddp_pad_buckets_for_high_nccl_busbw": NotNeeded(_SCHEDULE),
    "use_contiguous_parameters_in_local_ddp": NotNeeded(_MEMORY),
    "no_contiguous_buffers_in_local_ddp": NotNeeded(_MEMORY),
    "no_gradient_reduce_div_fusion": NotNeeded(_SCHEDULE),
    "no_scatter_gather_tensors_in_pipeline": NotNeeded(_SCHEDULE),
    "overlap_p2p_communication": NotNeeded(_SCHEDULE),
    "overlap_p2p_communication_warmup_flush": NotNeeded(_SCHEDULE),
    "microbatch_group_size_per_virtual_pipeline_stage": NotNeeded(_SCHEDULE, 1),
    "pipeline_model_parallel_comm_backend": NotNeeded("follows from the device", 1),
    "defer_embedding_wgrad_compute": NotNeeded(_SCHEDULE),
    "wgrad_deferral_limit": NotNeeded(_SCHEDULE, 1),
    "delay_wgrad_compute": NotNeeded(_SCHEDULE),
    "tp_comm_overlap_cfg": NotNeeded(_SCHEDULE, 1),
    "tp_comm_overlap_rs_dgrad": NotNeeded(_SCHEDULE),
    "tp_comm_bootstrap_backend": NotNeeded(_SCHEDULE, 1),
    "disable_tp_comm_overlap_ag": NotNeeded(_SCHEDULE),
    "disable_tp_comm_overlap_rs": NotNeeded(_SCHEDULE),
    "disable_tp_comm_bulk_dgrad": NotNeeded(_SCHEDULE),
    "disable_tp_comm_bulk_wgrad": NotNeeded(_SCHEDULE),
    "disable_tp_comm_split_ag": NotNeeded(_SCHEDULE),
    "disable_tp_comm_split_rs": NotNeeded(_SCHEDULE),
    "suggested_communication_unit_size": NotNeeded(_SCHEDULE, 1),
    "fsdp_double_buffer": NotNeeded(_SCHEDULE),
    "high_priority_stream_groups": NotNeeded(_SCHEDULE, None),
    "use_nccl_ub": NotNeeded(_SCHEDULE),
    "disable_symmetric_registration": NotNeeded(_SCHEDULE),
    "use_sharp": NotNeeded(_SCHEDULE),
    "sharp_enabled_group": NotNeeded(_SCHEDULE, 1),
    "nccl_communicator_config_path": NotNeeded(_SCHEDULE, 1),
    "disable_gloo_process_groups": NotNeeded("groups are made as they are needed"),
    "init_model_with_meta_device": NotNeeded(_ALWAYS),
    "empty_unused_memory_level": NotNeeded(_MEMORY, 1),
    "train_sync_interval": NotNeeded("only picks when the CPU waits for the GPU", 1),
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
    "no_position_embedding": NotNeeded(
        "--position-embedding-type says it", beside=("position_embedding_type", ("rope", "none"))
    ),
    "disable_msc": NotNeeded("datasets are read from the file system"),
    "trust_remote_code": NotNeeded("a tokenizer's own code is never run"),
    "train_mode": NotNeeded(_PRETRAINING, 1, ("pretrain",)),
    # Optimizer
    "optimizer": NotNeeded("AdamW is the only optimizer", 1, ("adam",)),
    "rerun_mode": NotNeeded("there is no rerun of an iteration", 1, ("disabled",)),
    "optimizer_offload_fraction": NotNeeded(_OFFLOAD, 1, ("1", "1.0")),
    "use_torch_optimizer_for_cpu_offload": NotNeeded(_OFFLOAD),
    "overlap_cpu_optimizer_d2h_h2d": NotNeeded(_OFFLOAD),
    "no_pin_cpu_grads": NotNeeded(_OFFLOAD),
    "no_pin_cpu_params": NotNeeded(_OFFLOAD),
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
    "distrib_optim_fully_reshardable_mem_efficient": NotNeeded(_FORMAT),
    "dist_ckpt_save_pre_mcore_014": NotNeeded(_FORMAT),
    "load_main_params_from_ckpt": NotNeeded("a checkpoint's weights are the fp32 master weights"),
    "use_persistent_ckpt_worker": NotNeeded("--async-save says it"),
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
    "one_logger_project": NotNeeded("nothing is sent anywhere", 1),
    "one_logger_run_name": NotNeeded("nothing is sent anywhere", 1),
    "one_logger_async": NotNeeded("nothing is sent anywhere"),
    "app_tag_run_name": NotNeeded("nothing is sent anywhere", 1),
    "app_tag_run_version": NotNeeded("nothing is sent anywhere", 1),
    "logging_level": NotNeeded("messages have one level", 1),
    "no_barrier_with_level_1_timing": NotNeeded("the iteration's time is always written"),
}
"""Flag (underscores) -> why it is not needed. Values that change the numbers are refused, see ``NotNeeded.values``."""


def instead_of(name: str) -> str | None:
    """What to do instead of a flag (underscores) that is known and not offered; None for any other."""
    return REPLACED.get(name) or next((why for prefix, why in FAMILIES.items() if name.startswith(prefix)), None)
