"""A GPT checkpoint of Megatron-LM in its ``torch_dist`` format -> a checkpoint of ours.

There a tensor of all layers is stacked on a leading dim (or named by layer, where layers differ), norms belong to the
linear after them, and SwiGLU's gate rows stand before its up rows. Query, key and value rows are grouped as here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_hc.cli_options import dump, from_flat, options
from megatron_hc.config import ModelConfig, TrainConfig
from megatron_hc.convert.checkpoints import save_weights
from megatron_hc.convert.hf import Options, fresh_state, listed, model_shapes, origins_of
from megatron_hc.convert.shards import Spec
from megatron_hc.convert.torch_dist import TorchDistFolder, read_common

WHOLE = {
    "embedding.weight": "embedding.word_embeddings.weight",
    "position_embedding.weight": "embedding.position_embeddings.weight",
    "final_norm.weight": "decoder.final_layernorm.weight",
    "final_norm.bias": "decoder.final_layernorm.bias",
    "output_layer.weight": "output_layer.weight",
}
"""Ours -> theirs, outside of layers."""
LAYER = {
    "attention_norm.weight": ("self_attention.linear_qkv.layer_norm_weight", "input_layernorm.weight"),
    "attention_norm.bias": ("self_attention.linear_qkv.layer_norm_bias", "input_layernorm.bias"),
    "attention.linear_qkv.weight": ("self_attention.linear_qkv.weight",),
    "attention.linear_qkv.bias": ("self_attention.linear_qkv.bias",),
    "attention.q_layernorm.weight": ("self_attention.q_layernorm.weight",),
    "attention.q_layernorm.bias": ("self_attention.q_layernorm.bias",),
    "attention.k_layernorm.weight": ("self_attention.k_layernorm.weight",),
    "attention.k_layernorm.bias": ("self_attention.k_layernorm.bias",),
    "attention.linear_proj.weight": ("self_attention.linear_proj.weight",),
    "attention.linear_proj.bias": ("self_attention.linear_proj.bias",),
    "mlp_norm.weight": ("mlp.linear_fc1.layer_norm_weight", "pre_mlp_layernorm.weight"),
    "mlp_norm.bias": ("mlp.linear_fc1.layer_norm_bias", "pre_mlp_layernorm.bias"),
    "mlp.linear_fc1.weight": ("mlp.linear_fc1.weight",),
    "mlp.linear_fc1.bias": ("mlp.linear_fc1.bias",),
    "mlp.linear_fc2.weight": ("mlp.linear_fc2.weight",),
    "mlp.linear_fc2.bias": ("mlp.linear_fc2.bias",),
    "mlp.router.weight": ("mlp.router.weight",),
    "mlp.router.expert_bias": ("mlp.router.expert_bias",),
    "mlp.experts.linear_fc1.weight": ("mlp.experts.experts.linear_fc1.weight",),
    "mlp.experts.linear_fc2.weight": ("mlp.experts.experts.linear_fc2.weight",),
    "mlp.experts.linear_fc1.bias": ("mlp.experts.experts.linear_fc1.bias",),
    "mlp.experts.linear_fc2.bias": ("mlp.experts.experts.linear_fc2.bias",),
    "mlp.shared_experts.linear_fc1.weight": ("mlp.shared_experts.linear_fc1.weight",),
    "mlp.shared_experts.linear_fc2.weight": ("mlp.shared_experts.linear_fc2.weight",),
    "mlp.shared_experts.gate.weight": ("mlp.shared_experts.gate_weight",),
}
"""Ours -> theirs (the first name that is there), below ``layers.N.`` and ``decoder.layers.``"""
HYPER = {"attention_residual": "self_attention_hyper_connection", "mlp_residual": "mlp_hyper_connection"}
ALPHAS = ("alpha_pre", "alpha_post", "alpha_res")
NOT_WEIGHTS = re.compile(r"_extra_state|^(optimizer|chained|rng_state|rerun|param_groups)|local_tokens_per_expert")
REFUSED = {
    "multi_latent_attention": "latent attention",
    "mtp_num_layers": "multi-token prediction",
    "heterogeneous_layers_config_path": "layers of different shapes",
    "sandwich_norm": "norms of outputs",
    "apply_layernorm_1p": "norm weights that are stored minus 1",
    "layernorm_zero_centered_gamma": "norm weights that are stored minus 1",
    "apply_residual_connection_post_layernorm": "residuals that start after the norm",
    "experimental_attention_variant": "another attention",
    "window_size": "sliding windows",
    "rotary_interleaved": "rotary positions that turn neighbouring channels",
    "rotary_seq_len_interpolation_factor": "interpolated positions",
    "rotary_base_per_layer": "a rotary base per layer",
    "no_rope_freq": "layers without rotary positions",
    "qk_l2_norm": "norms of queries and keys without weights",
    "softmax_type": "another softmax",
    "softmax_scale": "another scale of attention",
    "attention_output_gate": "gates of attention",
    "head_wise_attn_gate": "gates of attention",
    "quick_geglu": "another activation",
    "glu_linear_offset": "another activation",
    "activation_func_clamp_value": "another activation",
    "moe_apply_probs_on_input": "weights at the experts' input",
    "moe_mlp_glu_interleave_size": "gate and up rows in blocks",
    "moe_shared_expert_glu_interleave_size": "gate and up rows in blocks",
    "moe_n_hash_layers": "experts chosen by a table",
    "use_mup": "multipliers of muP",
    "scaling_recipe": "multipliers of muP",
}
"""Argument that changes the function, or how it is stored -> what it is."""
NEUTRAL = {"softmax_type": "vanilla", "rotary_seq_len_interpolation_factor": 1, "scaling_recipe": "none"}
"""Values of them that mean nothing; 0, False and None do so for all."""
OTHER_NAMES = {"layernorm_epsilon": "norm_epsilon"}
"""Since its arguments are made from its configuration, some have the names that they have there."""
NOT_FUNCTION = (
    "fused_residual", "attention_backend", "attention_dropout", "hidden_dropout", "attention_softmax_in_fp32",
)  # fmt: skip
"""Arguments of both that are about kernels and training; its --attention-backend is no text, but an enum of its own."""


class Place(NamedTuple):
    """Where one of our tensors is: ``names`` there, ``layer`` of stacked ones."""

    names: tuple[str, ...]
    layer: int | None


def import_megatron(
    load: str, save: str, *, step: int | None, vocab_size: int | None, seq_length: int | None, options: Options
) -> Path:
    """Write a checkpoint (iteration 0, weights alone); returns its folder. Unpickles: the caller has asked the user."""
    folder = find_folder(Path(load), step)
    common = read_common(folder)
    weights = TorchDistFolder(folder)
    table = "embedding.word_embeddings.weight"
    if table not in weights.specs:
        raise ValueError(f"{folder} has no {table}: this is no GPT model")
    rows = weights.specs[table].shape[0]
    config, vocab = training_config(vars(common["args"]), rows, vocab_size, seq_length, options.tokenizer_model)
    shapes = model_shapes(config.model, vocab)
    places = find_places(weights, shapes)
    specs = {
        f"model.{name}": Spec(shape, options.dtype or weights.specs[places[name].names[0]].dtype)
        for name, shape in shapes.items()
    }

    def read(full: str) -> Tensor:
        name = full.removeprefix("model.")
        tensor = join(config.model, name, [weights.read(theirs, places[name].layer) for theirs in places[name].names])
        if name in ("embedding.weight", "output_layer.weight"):
            tensor = tensor[:vocab]  # the rest is padding
        if tuple(tensor.shape) != shapes[name]:
            raise ValueError(
                f"{folder}: {name} has shape {list(tensor.shape)} and its arguments give {list(shapes[name])}"
            )
        return tensor.to(specs[full].dtype)

    found = save_weights(
        *(save, 0, specs, read, fresh_state(), dump(config, origins_of(config))), file_bytes=options.max_shard_bytes
    )
    options.say(f"{len(specs)} tensors of {folder} in {found}; {rows - vocab} rows of padding left out")
    return found


def find_folder(root: Path, step: int | None) -> Path:
    """The iter_N folder under what Megatron-LM's --save names, or that folder itself."""
    if (root / ".metadata").is_file():
        return root
    tracker = root / "latest_checkpointed_iteration.txt"
    if step is None and tracker.is_file():
        text = tracker.read_text(encoding="utf-8").strip()
        step = int(text) if text.isdigit() else None
    folder = root / f"iter_{step or 0:07d}"
    if not (folder / ".metadata").is_file():
        raise ValueError(f"--load {root} holds no torch_dist checkpoint ({folder / '.metadata'} is missing)")
    return folder


def training_config(
    args: Mapping[str, Any], rows: int, vocab_size: int | None, seq_length: int | None, tokenizer_model: str | None
) -> tuple[TrainConfig, int]:
    """Megatron-LM's arguments -> (our configuration, vocabulary size)."""
    model = model_arguments(args)
    kind, path = args.get("tokenizer_type"), tokenizer_model or args.get("tokenizer_model")
    trained = args.get("vocab_size")
    if trained and kind == "NullTokenizer":
        trained += 1  # end-of-document, which its --vocab-size does not count
    vocab = trained or rows if vocab_size is None else vocab_size
    if not 0 < vocab <= rows:
        raise ValueError(f"--vocab-size ({vocab}) must be in 1 .. {rows}, the rows of the embedding")
    data: dict[str, Any] = {"tokenizer_type": "NullTokenizer", "vocab_size": vocab - 1}
    if kind in ("HuggingFaceTokenizer", "SentencePieceTokenizer") and path and Path(path).exists():
        data = {"tokenizer_type": kind, "tokenizer_model": str(Path(path).absolute()), "vocab_size": vocab}
    if seq_length is not None:
        model["seq_length"] = seq_length
    try:
        config = from_flat({**model, **data})
        config.model.validate()
    except ValueError as error:
        raise ValueError(f"the arguments in common.pt cannot be a model here: {error}") from error
    return config, vocab


def model_arguments(args: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of the model under the names that both have, and those that differ."""
    args = {**args, **{ours: args[theirs] for theirs, ours in OTHER_NAMES.items() if args.get(theirs) is not None}}
    for name, what in REFUSED.items():
        if args.get(name) and args[name] != NEUTRAL.get(name):
            raise ValueError(
                f"the checkpoint has --{name.replace('_', '-')} {args[name]}: {what} cannot be converted yet"
            )
    known = {name for name, option in options().items() if option.path[0] == "model"}
    found = {name: args[name] for name in known & args.keys() - {*NOT_FUNCTION} if args[name] is not None}
    has_bias = bool(args.get("add_bias_linear", True))
    found["disable_bias_linear"] = not has_bias
    # The fused GELU with a bias is the tanh formula.
    is_gelu = not (args.get("swiglu") or args.get("squared_relu"))
    found["openai_gelu"] = is_gelu and bool(
        args.get("openai_gelu") or (has_bias and args.get("bias_gelu_fusion", True))
    )
    found["max_position_embeddings"] = args.get("max_position_embeddings") or args["seq_length"]
    if not args.get("group_query_attention"):
        found.pop("num_query_groups", None)
    if args.get("enable_mhc_connections"):
        found |= {"residual_connection": "mhc", "mhc_convention": "megatron"}
        found["residual_streams"] = args.get("mhc_num_residual_streams", 4)
    return _without_unused(found | _expert_arguments(args))


def _expert_arguments(args: Mapping[str, Any]) -> dict[str, Any]:
    if not args.get("num_experts"):
        return {}
    found: dict[str, Any] = {}
    for name in ("moe_layer_freq", "moe_router_load_balancing_type", "moe_aux_loss_coeff"):
        value = args.get(name)
        if value is not None:
            values = value if isinstance(value, list | tuple) else [value]
            found[name] = [str(list(values))] if name == "moe_layer_freq" and len(values) > 1 else values
    if "moe_layer_freq" in found:
        found["moe_layer_freq"] = [str(value) for value in found["moe_layer_freq"]]
    if args.get("moe_router_dtype") is None:
        found["moe_router_dtype"] = "fp32"
    return found


def _without_unused(found: dict[str, Any]) -> dict[str, Any]:
    """Without what does nothing there and is refused here (experts' flags of a dense model, ...)."""
    if not found.get("num_experts"):
        found = {name: value for name, value in found.items() if not name.startswith("moe_")}
    if found.get("position_embedding_type") != "rope":
        found = {name: value for name, value in found.items() if name not in ("use_rope_scaling", "rotary_percent")}
    if found.get("residual_connection") != "mhc":
        found = {name: value for name, value in found.items() if not name.startswith("mhc_")}
    return found


def find_places(weights: TorchDistFolder, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Place]:
    """Our tensor -> where it is; ``ValueError`` lists what is missing and what is too much."""
    places: dict[str, Place] = {}
    missing: list[str] = []
    used: set[str] = set()
    for name in shapes:
        place = _place(weights, name)
        absent = [theirs for theirs in place.names if theirs not in weights.specs]
        missing += absent
        places[name] = place
        used.update(place.names)
    extra = sorted(name for name in weights.specs.keys() - used if not NOT_WEIGHTS.search(name))
    lists = (("missing", sorted(set(missing))), ("unexpected", extra))
    problems = [f"{len(names)} tensors {what}: {listed(names)}" for what, names in lists if names]
    if problems:
        raise ValueError(f"{weights.folder} does not hold what its arguments say: {'; '.join(problems)}")
    return places


def _place(weights: TorchDistFolder, name: str) -> Place:
    if name in WHOLE:
        return Place((WHOLE[name],), None)
    match = re.fullmatch(r"layers\.(\d+)\.(.+)", name)
    assert match is not None, name
    layer, rest = int(match[1]), match[2]
    module, _, kind = rest.rpartition(".")
    if module in HYPER:
        ending = {"projection": ("mapping_proj.weight",), "bias": ("bias",), "alpha": ALPHAS}[kind]
        candidates = [tuple(f"{HYPER[module]}.{end}" for end in ending)]
    elif rest in LAYER:
        candidates = [(theirs,) for theirs in LAYER[rest]]
    else:
        raise ValueError(f"{name} has no counterpart in Megatron-LM's checkpoints")
    for names in candidates:
        for prefix, index in ((f"decoder.layers.{layer}.", None), ("decoder.layers.", layer)):
            full = tuple(prefix + theirs for theirs in names)
            if all(theirs in weights.specs for theirs in full):
                return Place(full, index)
    return Place(tuple("decoder.layers." + theirs for theirs in candidates[0]), layer)


def join(config: ModelConfig, name: str, tensors: list[Tensor]) -> Tensor:
    """One of our tensors made of theirs."""
    if name.endswith("_residual.alpha"):
        return torch.cat([tensor.reshape(1) for tensor in tensors])
    (tensor,) = tensors
    kind = name.rpartition(".")[2]
    is_expert = ".mlp.experts." in name  # [E, rows, ...]
    if ".linear_fc1." in name and config.swiglu:
        tensor = _interleaved(tensor, dim=int(is_expert))
    elif is_expert and name.endswith("linear_fc2.weight"):
        tensor = tensor.transpose(1, 2)
    if is_expert and not name.endswith("linear_fc2.bias"):
        tensor = tensor.flatten(0, 1)
    return tensor.reshape(1, -1) if kind == "weight" and ".shared_experts.gate." in name else tensor


def _interleaved(tensor: Tensor, dim: int) -> Tensor:
    """Rows gate, ..., up, ... -> gate, up, gate, up, ..."""
    return torch.stack(tensor.chunk(2, dim), dim=dim + 1).flatten(dim, dim + 1)
