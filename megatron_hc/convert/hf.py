"""A folder of Hugging Face -> a checkpoint of ours, and back, tensor by tensor."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_hc.cli_options import dump, from_flat, options
from megatron_hc.config import ModelConfig, TrainConfig
from megatron_hc.convert import tokenizers
from megatron_hc.convert.checkpoints import Folder, new_folder, save_weights
from megatron_hc.convert.custom import name_of, write_code
from megatron_hc.convert.families import arguments_of, config_of, family_of, model_type_of, reasons_against
from megatron_hc.convert.names import NAMES, Names
from megatron_hc.convert.pieces import Piece, all_pieces
from megatron_hc.convert.shards import ShardedFolder, ShardWriter, Spec, read_json
from megatron_hc.data import tokenizer_of
from megatron_hc.model.gpt import GPT

ORIGIN = "checkpoint"
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
"""Of all tensors of our models."""
Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Options:
    """What the two directions share."""

    dtype: torch.dtype | None = None
    """Of floating-point tensors that are written; None: as they are."""
    max_shard_bytes: int = 5_000_000_000
    tokenizer_model: str | None = None
    """Where the tokenizer is, if not beside the weights (or not where it was while training)."""
    say: Say = print


def import_hf(load: str, save: str, *, seq_length: int | None, options: Options) -> Path:
    """Write a checkpoint (iteration 0, weights alone) of a folder of save_pretrained; returns its folder."""
    source = Path(load)
    if not source.is_dir():
        raise ValueError(f"--load {load} is not a folder: name a folder of save_pretrained")
    hf_config = read_json(source / "config.json")
    arguments, vocab_size = arguments_of(hf_config)
    names = NAMES[model_type_of(hf_config)]
    config = training_config(arguments, vocab_size, seq_length, source, options.tokenizer_model)
    weights = ShardedFolder(source)
    pieces = chosen_pieces(weights, config.model, vocab_size, names)
    specs = {f"model.{piece.ours}": _spec_of_ours(piece, weights, options.dtype) for piece in pieces}
    is_bf16 = all(spec.dtype == torch.bfloat16 for spec in specs.values())
    config = replace(config, training=replace(config.training, bf16=is_bf16))
    by_name = {f"model.{piece.ours}": piece for piece in pieces}

    def read(name: str) -> Tensor:
        piece = by_name[name]
        return piece.join([weights.read(theirs) for theirs, _ in piece.theirs]).to(specs[name].dtype)

    folder = save_weights(
        *(save, 0, specs, read, fresh_state(), dump(config, origins_of(config))), file_bytes=options.max_shard_bytes
    )
    options.say(f"{len(pieces)} tensors of {source} in {folder}")
    return folder


def training_config(
    arguments: Mapping[str, Any], vocab_size: int, seq_length: int | None, source: Path, tokenizer_model: str | None
) -> TrainConfig:
    """Our configuration of a model that comes from elsewhere, its tokenizer included."""
    longest = int(arguments["max_position_embeddings"])
    data: dict[str, Any] = tokenizers.arguments_of_folder(Path(tokenizer_model) if tokenizer_model else source)
    if data:
        data["vocab_size"] = vocab_size
    else:
        data = {"tokenizer_type": "NullTokenizer", "vocab_size": vocab_size - 1}
    length = min(longest, 4096) if seq_length is None else seq_length
    try:
        config = from_flat({**arguments, "seq_length": length, **data})
        config.model.validate()
    except ValueError as error:
        raise ValueError(f"{source / 'config.json'} cannot be a model here: {error}") from error
    tokenizer_of(config.data)  # refuses one with more tokens than the model has rows
    return config


def origins_of(config: TrainConfig) -> dict[str, str]:
    return dict.fromkeys(options(), ORIGIN)


def fresh_state() -> dict[str, Any]:
    """Progress of a model that no run of ours has trained yet."""
    return {"iteration": 0, "consumed_samples": 0, "optimizer_steps": 0, "logger": {"losses": []}}


def chosen_pieces(weights: ShardedFolder, model: ModelConfig, vocab_size: int, names: Names) -> list[Piece]:
    """Every piece in the form in which the files hold it. ``ValueError`` lists what is missing and what is too much."""
    there = weights.specs.keys()
    without = names.optional_prefix
    if without and names.embedding not in there and names.embedding.removeprefix(without) in there:
        strip = {name: name.removeprefix(without) for name in _theirs(all_pieces(model, vocab_size, names))}
    else:
        strip = {}
    found, used, missing = [], set(), []
    for piece in all_pieces(model, vocab_size, names):
        if strip:
            piece = replace(piece, theirs=tuple((strip[name], shape) for name, shape in piece.theirs))
        absent = [name for name, _ in piece.theirs if name not in there]
        if absent and piece.fused is not None and all(name in there for name, _ in piece.fused.theirs):
            piece, absent = piece.fused, []
        missing += absent
        found.append(piece)
        used |= {name for name, _ in piece.theirs}
    ignored = re.compile("|".join(names.ignored) or "$^")
    extra = sorted(name for name in there - used if not ignored.search(name))
    if names.output in extra and not model.untie_embeddings_and_output_weights:
        _check_tied(weights, names, strip)
        extra.remove(names.output)
    wrong = [
        f"{name} has shape {list(weights.specs[name].shape)} and config.json gives {list(shape)}"
        for piece in found
        for name, shape in piece.theirs
        if name in there and weights.specs[name].shape != shape
    ]
    lists = (("missing", missing), ("unexpected", extra), ("of a wrong shape", wrong))
    problems = [f"{len(names_)} tensors {what}: {listed(names_)}" for what, names_ in lists if names_]
    if problems:
        raise ValueError(f"{weights.folder} does not hold what its config.json says: {'; '.join(problems)}")
    check_complete(model, vocab_size, {piece.ours for piece in found})
    return found


def _theirs(pieces: Iterable[Piece]) -> list[str]:
    return [name for piece in pieces for name, _ in piece.theirs]


def listed(names: list[str], most: int = 12) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _check_tied(weights: ShardedFolder, names: Names, strip: Mapping[str, str]) -> None:
    embedding = strip.get(names.embedding, names.embedding)
    if embedding in weights.specs and not torch.equal(weights.read(names.output), weights.read(embedding)):
        raise ValueError(
            f"{weights.folder}: config.json says tie_word_embeddings, but {names.output} differs from {embedding}: set "
            "tie_word_embeddings to false"
        )


def model_shapes(model: ModelConfig, vocab_size: int) -> dict[str, tuple[int, ...]]:
    """Our tensors without padding: name -> shape."""
    with torch.device("meta"):
        whole = GPT(model, vocab_size, padded_vocab=vocab_size)
    parts = (*whole.named_parameters(), *whole.named_buffers())
    return {name: tuple(tensor.shape) for name, tensor in parts}


def check_complete(model: ModelConfig, vocab_size: int, ours: set[str]) -> None:
    wanted = model_shapes(model, vocab_size).keys()
    assert ours == wanted, f"the table of names leaves {sorted(ours ^ wanted)}"


def _spec_of_ours(piece: Piece, weights: ShardedFolder, dtype: torch.dtype | None) -> Spec:
    dtypes = [weights.specs[name].dtype for name, _ in piece.theirs]
    if not all(found.is_floating_point for found in dtypes):
        raise ValueError(f"{piece.theirs[0][0]} is of dtype {dtypes[0]}: quantized checkpoints are not read")
    widest = dtypes[0]
    for other in dtypes:
        widest = torch.promote_types(widest, other)
    shapes = [torch.empty(shape, device="meta") for _, shape in piece.theirs]
    return Spec(tuple(piece.join(shapes).shape), dtype or widest)


def export_hf(
    load: str,
    save: str,
    *,
    step: int | None,
    family: str | None,
    options: Options,
    check: Callable[[Path], object] | None = None,
) -> Path:
    """Write a folder that transformers loads, of one of our checkpoints; returns it.

    ``check`` is called with the finished folder before that takes its name: where it raises, nothing is left.
    """
    source = Folder(load, step)
    config = from_flat(source.arguments)
    if options.tokenizer_model is not None:
        config = replace(config, data=replace(config.data, tokenizer_model=options.tokenizer_model))
    model, vocab_size = config.model, source.specs["model.embedding.weight"].shape[0]
    chosen = _chosen_family(model, family)
    shapes = check_ours(source, model, vocab_size)
    target = Path(save)
    with new_folder(target) as partial:
        if chosen is None:
            pieces = [_as_it_is(name, shape) for name, shape in shapes.items()]
        else:
            pieces = list(all_pieces(model, vocab_size, NAMES[chosen]))
            check_complete(model, vocab_size, {piece.ours for piece in pieces})
        dtype = _write_weights(source, pieces, partial, options)
        extra = tokenizers.export_tokenizer(config.data, vocab_size, partial, options.say)
        if chosen is None:
            hf_config = write_code(model, vocab_size, dtype, partial)
        else:
            hf_config = config_of(chosen, model, vocab_size, dtype)
        text = json.dumps(hf_config | extra, indent=2, sort_keys=True) + "\n"
        (partial / "config.json").write_text(text, encoding="utf-8")
        if check is not None:
            check(partial)
    code = "modelling code of its own (load it with trust_remote_code=True)" if chosen is None else f"family {chosen}"
    options.say(f"{len(pieces)} tensors of {source.path} in {target}: {code}")
    return target


def _as_it_is(name: str, shape: tuple[int, ...]) -> Piece:
    return Piece(name, ((name_of(name), shape),), lambda parts: parts[0], lambda whole: (whole,))


def _chosen_family(model: ModelConfig, asked: str | None) -> str | None:
    """The family to write; None: code of its own."""
    if asked is None:
        return family_of(model)
    if asked == "custom":
        return None
    if asked not in NAMES:
        raise ValueError(f"--family {asked} must be custom or one of {', '.join(NAMES)}")
    reasons = reasons_against(asked, model)
    if reasons:
        raise ValueError(f"--family {asked} cannot hold this model: {', '.join(reasons)}; use --family custom")
    return asked


def check_ours(source: Folder, model: ModelConfig, vocab_size: int) -> dict[str, tuple[int, ...]]:
    """Name -> shape of our tensors; ``ValueError`` lists in what a checkpoint is not that model."""
    shapes = model_shapes(model, vocab_size)
    held = {name.removeprefix("model."): spec for name, spec in source.specs.items() if name.startswith("model.")}
    missing, extra = sorted(shapes.keys() - held.keys()), sorted(held.keys() - shapes.keys())
    wrong = [
        f"{name} is {list(held[name].shape)} instead of {list(shape)}"
        for name, shape in shapes.items()
        if name in held and held[name].shape != shape
    ]
    odd = [f"{name} is {spec.dtype}" for name, spec in held.items() if name in shapes and spec.dtype not in DTYPES]
    lists = (("missing", missing), ("unexpected", extra), ("of a wrong shape", wrong), ("of a wrong dtype", odd))
    problems = [f"{len(names)} tensors {what}: {listed(names)}" for what, names in lists if names]
    if problems:
        raise ValueError(f"{source.path} does not hold what its arguments say: {'; '.join(problems)}")
    return shapes


def _write_weights(source: Folder, pieces: list[Piece], target: Path, options: Options) -> str:
    """Write all tensors; returns the name of the embedding's dtype: norms may be wider."""

    def dtype_of(piece: Piece) -> torch.dtype:
        return options.dtype or source.specs[f"model.{piece.ours}"].dtype

    pieces.sort(key=lambda piece: -dtype_of(piece).itemsize)
    groups = [{name: Spec(shape, dtype_of(piece)) for name, shape in piece.theirs} for piece in pieces]
    with ShardWriter(target, groups, options.max_shard_bytes) as writer:
        for piece in pieces:
            tensors = piece.cut(source.read(f"model.{piece.ours}"))
            for (name, _), tensor in zip(piece.theirs, tensors, strict=True):
                writer.write(name, tensor)
    writer.write_index()
    (embedding,) = (piece for piece in pieces if piece.ours == "embedding.weight")
    return str(dtype_of(embedding)).removeprefix("torch.")
