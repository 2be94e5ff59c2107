"""Megatron-LM's torch_dist checkpoints: written here in its layout, and (slow) by megatron-core itself."""

from __future__ import annotations

import argparse
import enum
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from convert_models import write_checkpoint
from helpers import VOCAB, random_tokens, small_config
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
import convert_checkpoint  # noqa: E402

from megatron_hc.config import ModelConfig, MoEConfig  # noqa: E402
from megatron_hc.inference import load_model  # noqa: E402
from megatron_hc.model.gpt import GPT  # noqa: E402

MHC = {"residual_connection": "mhc", "mhc_convention": "megatron", "residual_streams": 3}
EXPERTS = {"num_experts": 4, "moe_ffn_hidden_size": 8, "moe_shared_expert_intermediate_size": 12}
GPT2 = {
    "normalization": "LayerNorm", "swiglu": False, "disable_bias_linear": False, "openai_gelu": True,
    "position_embedding_type": "learned_absolute", "max_position_embeddings": 12,
}  # fmt: skip
MODELS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "llama": ({}, {"untie_embeddings_and_output_weights": True}),
    "qwen": ({}, {"add_qkv_bias": True, "qk_layernorm": True}),
    "gpt": ({}, GPT2),
    "mhc": (MHC, {}),
    "moe": ({}, {"moe": MoEConfig(**EXPERTS, moe_shared_expert_gate=True)}),
    "moe-mhc-some-dense": (
        MHC,
        {
            "moe": MoEConfig(
                num_experts=4, moe_ffn_hidden_size=8, moe_layer_freq=("[0,1,1]",),
                moe_router_score_function="sigmoid", moe_router_enable_expert_bias=True,
            )
        },
    ),
}  # fmt: skip


def in_their_layout(model: GPT, padding: int) -> dict[str, Tensor]:
    """The tensors of a model of ours under Megatron-LM's names, those of all layers stacked if all have them."""
    found, layers = {}, {}
    config = model.config
    names = {
        "attention_norm.weight": "self_attention.linear_qkv.layer_norm_weight",
        "attention_norm.bias": "self_attention.linear_qkv.layer_norm_bias",
        "mlp_norm.weight": "pre_mlp_layernorm.weight" if config.moe.num_experts else "mlp.linear_fc1.layer_norm_weight",
        "mlp_norm.bias": "mlp.linear_fc1.layer_norm_bias",
        "mlp.shared_experts.gate.weight": "mlp.shared_experts.gate_weight",
    }
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        tensor = tensor.detach()
        if not name.startswith("layers."):
            theirs = {"embedding": "embedding.word_embeddings", "position_embedding": "embedding.position_embeddings"}
            module, _, kind = name.rpartition(".")
            own = {"final_norm": "decoder.final_layernorm"} | theirs
            if module in ("embedding", "output_layer"):
                tensor = torch.cat((tensor[:VOCAB], torch.full((padding, tensor.shape[1]), 7.0)))
            found[f"{own.get(module, module)}.{kind}"] = tensor
            continue
        layer, rest = int(name.split(".")[1]), name.split(".", 2)[2]
        theirs_name = names.get(rest, rest.replace("attention.", "self_attention."))
        if "linear_fc1" in rest and config.swiglu:
            E = 4 if ".experts." in rest else 1
            rows = tensor.unflatten(0, (E, -1, 2)).transpose(1, 2)
            tensor = rows.flatten(1, 2) if E > 1 else rows.flatten(0, 2)
        elif rest == "mlp.experts.linear_fc2.weight":
            tensor = tensor.unflatten(0, (4, -1)).transpose(1, 2)
        theirs_name = theirs_name.replace("mlp.experts.", "mlp.experts.experts.")
        if "_residual." in rest:
            module, kind = rest.split(".")
            prefix = {"attention_residual": "self_attention", "mlp_residual": "mlp"}[module] + "_hyper_connection"
            if kind == "alpha":
                for number, which in enumerate(("pre", "post", "res")):
                    layers.setdefault(f"{prefix}.alpha_{which}", {})[layer] = tensor[number : number + 1]
                continue
            theirs_name = f"{prefix}.{'mapping_proj.weight' if kind == 'projection' else kind}"
        layers.setdefault(theirs_name, {})[layer] = tensor
    for name, by_layer in layers.items():
        if len(by_layer) == config.num_layers:
            found[f"decoder.layers.{name}"] = torch.stack([by_layer[i] for i in range(config.num_layers)])
        else:
            found |= {f"decoder.layers.{i}.{name}": tensor for i, tensor in by_layer.items()}
    return {name: tensor.contiguous() for name, tensor in found.items()}


def arguments_of(config: ModelConfig, padding: int) -> argparse.Namespace:
    """Megatron-LM's arguments of such a run, with some that mean nothing here."""
    same = (
        "num_layers hidden_size num_attention_heads group_query_attention num_query_groups kv_channels seq_length "
        "position_embedding_type rotary_base normalization norm_epsilon swiglu add_qkv_bias qk_layernorm "
        "untie_embeddings_and_output_weights max_position_embeddings init_method_std"
    ).split()
    found = {name: getattr(config, name) for name in same}
    found |= {"ffn_hidden_size": config.ffn_size, "add_bias_linear": not config.disable_bias_linear}
    found |= {"bias_gelu_fusion": True, "padded_vocab_size": VOCAB + padding, "use_rope_scaling": False}
    found |= {"moe_router_topk": 2, "num_experts": None, "tensor_model_parallel_size": 8, "vocab_size": None}
    if config.residual.residual_connection == "mhc":
        found |= {"enable_mhc_connections": True, "mhc_num_residual_streams": 3}
        found |= {"mhc_sinkhorn_iterations": 20, "mhc_init_gating_factor": 0.01}
    if config.moe.num_experts:
        moe = config.moe
        found |= {
            "num_experts": 4,
            "moe_ffn_hidden_size": 8,
            "moe_layer_freq": [0, 1, 1] if "0" in moe.moe_layer_freq[0] else 1,
        }
        for name in ("score_function", "enable_expert_bias", "pre_softmax"):
            found[f"moe_router_{name}"] = getattr(moe, f"moe_router_{name}")
        found |= {"moe_shared_expert_intermediate_size": moe.moe_shared_expert_intermediate_size}
        found |= {"moe_shared_expert_gate": moe.moe_shared_expert_gate, "moe_router_dtype": None}
        found |= {"moe_router_load_balancing_type": "aux_loss", "moe_aux_loss_coeff": 0.0}
    return argparse.Namespace(**found)


def write_theirs(folder: Path, model: GPT, padding: int, **changes: Any) -> Path:
    place = folder / "iter_0000007"
    place.mkdir(parents=True)
    extra = {"optimizer.state.exp_avg.decoder.layers.mlp.linear_fc1.weight": torch.zeros(3), "rng_state/shard_0_1": "x"}
    dcp.save(in_their_layout(model, padding) | extra, checkpoint_id=place, no_dist=True)
    arguments = arguments_of(model.config, padding)
    torch.save({"args": arguments, "iteration": 7, "checkpoint_version": 3.0} | changes, place / "common.pt")
    (folder / "latest_checkpointed_iteration.txt").write_text("7")
    return place


def tool(*argv: object) -> int:
    try:
        return convert_checkpoint.main(["--from", "megatron", "--to", "megatron-hc", *map(str, argv)])
    except SystemExit as stop:
        return int(stop.code or 0)


@pytest.mark.parametrize("name", MODELS)
def test_bits_and_logits(name: str, tmp_path: Path) -> None:
    residual, fields = MODELS[name]
    model = write_checkpoint(tmp_path / "ours", small_config(residual, **fields))
    write_theirs(tmp_path / "theirs", model, padding=9)
    where = ("--load", tmp_path / "theirs", "--save", tmp_path / "back", "--vocab-size", VOCAB)
    assert tool(*where, "--allow-pickle") == 0
    found, expected = load_model(str(tmp_path / "back")), load_model(str(tmp_path / "ours"))
    assert found.config.model.residual == expected.config.model.residual
    with torch.no_grad():
        a, b = (each.model.output.logits(each.model(random_tokens())) for each in (found, expected))
    assert a.equal(b)
    for (key, ours), (_, theirs) in zip(found.model.named_parameters(), expected.model.named_parameters(), strict=True):
        rows = VOCAB if key in ("embedding.weight", "output_layer.weight") else ours.shape[0]
        assert ours[:rows].equal(theirs[:rows]), key


OTHER_FUNCTIONS: dict[str, Any] = {
    "apply_layernorm_1p": True, "layernorm_zero_centered_gamma": True, "rotary_interleaved": True, "no_rope_freq": 4,
    "rotary_seq_len_interpolation_factor": 2, "softmax_type": "off-by-one", "softmax_scale": 0.5, "qk_l2_norm": True,
    "glu_linear_offset": 1.0, "quick_geglu": True, "apply_residual_connection_post_layernorm": True,
    "moe_apply_probs_on_input": True, "moe_mlp_glu_interleave_size": 32, "scaling_recipe": "mup", "use_mup": True,
}  # fmt: skip
"""Arguments that leave the names and shapes of all tensors as they are."""


def test_arguments_of_newer_versions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names of its configuration, defaults that mean nothing, and an enum of a package that is not here."""
    model = write_checkpoint(tmp_path / "ours", small_config())
    place = write_theirs(tmp_path / "theirs", model, padding=0)
    arguments = vars(arguments_of(model.config, 0)) | {"layernorm_zero_centered_gamma": False, "qk_l2_norm": False}
    arguments |= {"softmax_type": "vanilla", "scaling_recipe": "none", "glu_linear_offset": 0.0, "no_rope_freq": None}
    arguments |= {"rotary_seq_len_interpolation_factor": 1, "layernorm_epsilon": 1e-3}
    del arguments["norm_epsilon"]
    there = ModuleType("not_here")
    there.AttnBackend = enum.Enum("AttnBackend", {"auto": 5}, module="not_here")  # type: ignore[attr-defined]
    arguments["attention_backend"] = there.AttnBackend.auto
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "not_here", there)
        torch.save({"args": argparse.Namespace(**arguments)}, place / "common.pt")
    assert tool("--load", tmp_path / "theirs", "--save", tmp_path / "new", "--allow-pickle") == 0
    found = load_model(str(tmp_path / "new")).config.model
    assert (found.norm_epsilon, found.attention_backend) == (1e-3, "auto")


def test_end_of_document_of_a_null_tokenizer_is_kept(tmp_path: Path) -> None:
    """Its --vocab-size does not count end-of-document, which has the row after."""
    model = write_checkpoint(tmp_path / "ours", small_config())
    place = write_theirs(tmp_path / "theirs", model, padding=9)
    changes = {"tokenizer_type": "NullTokenizer", "vocab_size": VOCAB - 1}
    torch.save({"args": argparse.Namespace(**vars(arguments_of(model.config, 9)) | changes)}, place / "common.pt")
    assert tool("--load", tmp_path / "theirs", "--save", tmp_path / "new", "--allow-pickle") == 0
    found = load_model(str(tmp_path / "new"))
    assert (found.model.vocab_size, found.tokenizer.eod) == (VOCAB, VOCAB - 1)
    assert found.model.embedding.weight[:VOCAB].equal(model.embedding.weight[:VOCAB])


def test_refusals(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = write_checkpoint(tmp_path / "ours", small_config(MHC))
    place = write_theirs(tmp_path / "theirs", model, padding=0)
    where = ("--load", tmp_path / "theirs", "--save", tmp_path / "new")

    def error(*argv: object) -> str:
        assert tool(*where, *argv) == 2
        return capsys.readouterr().err

    assert "add --allow-pickle" in error()
    assert "--vocab-size (99) must be in 1 .. 23, the rows" in error("--allow-pickle", "--vocab-size", 99)
    assert "--vocab-size (0) must be in 1 .. 23, the rows" in error("--allow-pickle", "--vocab-size", 0)
    assert "needs both models" in error("--allow-pickle", "--check-logits")
    arguments = arguments_of(model.config, 0)
    for changes, message in (
        ({"enable_mhc_connections": False}, "10 tensors unexpected: decoder.layers"),
        ({"untie_embeddings_and_output_weights": True}, "1 tensors missing: output_layer.weight"),
        ({"num_layers": 2}, "has shape"),
        ({"multi_latent_attention": True}, "latent attention cannot be converted yet"),
        ({"num_attention_heads": 5}, "cannot be a model here"),
        *(({name: value}, f"--{name.replace('_', '-')} {value}: ") for name, value in OTHER_FUNCTIONS.items()),
    ):
        torch.save({"args": argparse.Namespace(**{**vars(arguments), **changes})}, place / "common.pt")
        if "num_layers" not in changes:
            assert message in error("--allow-pickle"), changes
    torch.save({"iteration": 7}, place / "common.pt")
    assert "holds no arguments" in error("--allow-pickle")
    torch.save({"args": arguments}, place / "common.pt")
    data = next(place.glob("*.distcp"))
    data.write_bytes(data.read_bytes()[:1000])
    assert "cannot be read" in error("--allow-pickle")
    (place / ".metadata").write_bytes(b"nothing")
    assert "this is no torch_dist folder" in error("--allow-pickle")
    assert not list((tmp_path / "new").glob("iter_*"))


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("megatron") is None, reason="needs megatron-core")
@pytest.mark.parametrize("name", ["dense", "moe", "qk"])
def test_written_by_megatron_core(name: str, tmp_path: Path) -> None:
    """Its own sharded_state_dict and dist_checkpointing.save; the logits of its own model."""
    program = Path(__file__).with_name("convert_megatron_core.py")
    subprocess.run([sys.executable, str(program), name, str(tmp_path / "theirs")], check=True, timeout=400)
    assert tool("--load", tmp_path / "theirs", "--save", tmp_path / "ours", "--allow-pickle") == 0
    found = load_model(str(tmp_path / "ours")).model
    expected = torch.tensor(json.loads((tmp_path / "theirs" / "logits.json").read_text()))
    with torch.no_grad():
        logits = found.output.logits(found(torch.arange(16).reshape(2, 8))).transpose(0, 1)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)
