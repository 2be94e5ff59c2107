"""transformers -> ours -> the same logits -> transformers -> the same bits."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from convert_models import FAMILIES, random_model, saved, tensors_of, tokens
from helpers import assert_same_bits, small_config
from safetensors.torch import save_file

from megatron_hc.config import MoEConfig
from megatron_hc.convert import families, hf
from megatron_hc.inference import load_model

transformers = pytest.importorskip("transformers")

QUIET = hf.Options(say=lambda text: None)
SHARDED = hf.Options(say=lambda text: None, max_shard_bytes=20_000)


def our_logits(folder: Path) -> torch.Tensor:
    model = load_model(str(folder)).model
    with torch.no_grad():
        return model.output.logits(model(tokens())).transpose(0, 1)


@pytest.mark.parametrize("name", FAMILIES)
def test_there_and_back(name: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    theirs = saved(name, tmp_path / "hf", max_shard_size="30KB")
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 1
    hf.import_hf(str(tmp_path / "hf"), str(tmp_path / "ours"), seq_length=None, options=SHARDED)
    with torch.no_grad():
        expected = theirs(tokens()).logits
    assert expected.abs().max() > 1
    torch.testing.assert_close(our_logits(tmp_path / "ours"), expected, rtol=0, atol=1e-5)
    hf.export_hf(str(tmp_path / "ours"), str(tmp_path / "back"), step=None, family=None, options=SHARDED)
    assert_same_bits(tensors_of(tmp_path / "back"), tensors_of(tmp_path / "hf"))
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path / "back", output_loading_info=True)
    assert type(again) is type(theirs) and not any(info[kind] for kind in info), info
    with torch.no_grad():
        torch.testing.assert_close(again(tokens()).logits, expected, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["mixtral", "olmoe", "qwen3_moe-some-dense"])
def test_experts_in_one_tensor(name: str, tmp_path: Path) -> None:
    """What transformers 5 writes with save_original_format=False."""
    theirs = saved(name, tmp_path / "hf", save_original_format=False)
    assert any(key.endswith("experts.gate_up_proj") for key in tensors_of(tmp_path / "hf"))
    hf.import_hf(str(tmp_path / "hf"), str(tmp_path / "ours"), seq_length=None, options=QUIET)
    with torch.no_grad():
        torch.testing.assert_close(our_logits(tmp_path / "ours"), theirs(tokens()).logits, rtol=0, atol=1e-5)


def test_rope_scaling_is_seen(tmp_path: Path) -> None:
    """The tolerance above is below what the scaling changes."""
    saved("llama3", tmp_path / "hf")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    config["rope_parameters"]["rope_type"] = "default"
    hf.import_hf(str(tmp_path / "hf"), str(tmp_path / "scaled"), seq_length=None, options=QUIET)
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config))
    hf.import_hf(str(tmp_path / "hf"), str(tmp_path / "plain"), seq_length=None, options=QUIET)
    difference = our_logits(tmp_path / "scaled") - our_logits(tmp_path / "plain")
    assert difference.abs().max() > 1e-3


@pytest.mark.parametrize("name", ["llama3", "qwen2", "qwen3", "mixtral"])
def test_key_value_heads_that_are_null(name: str) -> None:
    """As many as heads; where nothing is said of them it is the family's default."""
    config = random_model(name).config.to_dict() | {"num_attention_heads": 64, "head_dim": 2}
    found, _ = families.arguments_of(config | {"num_key_value_heads": None})
    assert not found["group_query_attention"]
    del config["num_key_value_heads"]
    heads = {"llama3": 64, "qwen2": 32, "qwen3": 32, "mixtral": 8}[name]
    found, _ = families.arguments_of(config)
    assert found["group_query_attention"] == (heads < 64) and found["num_query_groups"] == (heads if heads < 64 else 1)


@pytest.mark.parametrize("family", families.ARCHITECTURES)
def test_what_a_config_leaves_out_is_the_familys_default(family: str) -> None:
    """As transformers fills it in."""
    sizes = dict(zip(("n_layer", "n_embd", "n_head", "n_positions"), (2, 64, 4, 32), strict=True))
    if family != "gpt2":
        heads = {"num_hidden_layers": 2, "hidden_size": 128, "num_attention_heads": 32 if family != "llama" else 4}
        sizes = heads | {"intermediate_size": 64, "max_position_embeddings": 32}
    if family in families.MOE:
        sizes |= {"num_local_experts" if family == "mixtral" else "num_experts": 16}
        sizes |= {"moe_intermediate_size": 32} if family == "qwen3_moe" else {}
    config = {"model_type": family, "vocab_size": 60000, **sizes}
    theirs = transformers.AutoConfig.for_model(**config).to_dict()
    assert families.arguments_of(config) == families.arguments_of(theirs)


def test_what_an_export_says_of_training() -> None:
    """Nothing that changes the function, but whoever trains on begins with it."""
    training = {"hidden_dropout": 0.1, "attention_dropout": 0.2, "init_method_std": 0.3}
    moe = MoEConfig(num_experts=4, moe_router_load_balancing_type=("aux_loss",), moe_aux_loss_coeff=(0.5,))
    gpt2 = families.config_of("gpt2", small_config(**training), 50, "float32")
    found = [gpt2[name] for name in ("resid_pdrop", "embd_pdrop", "attn_pdrop", "initializer_range")]
    assert found == [0.1, 0.1, 0.2, 0.3]
    mixtral = families.config_of("mixtral", small_config(**training, moe=moe), 50, "float32")
    found = [mixtral[name] for name in ("attention_dropout", "initializer_range", "router_aux_loss_coef")]
    assert found == [0.2, 0.3, 0.5]


def test_words_for_one_thing() -> None:
    """GELU's tanh formula has two names; what kind of scaled rotary positions it is, once was "type"."""
    gpt2 = {"model_type": "gpt2", "n_layer": 2, "n_embd": 64, "n_head": 4, "n_positions": 32, "vocab_size": 50}
    for name, is_tanh in (("gelu_new", True), ("gelu_pytorch_tanh", True), ("gelu", False)):
        assert families.arguments_of(gpt2 | {"activation_function": name})[0]["openai_gelu"] == is_tanh
    llama = random_model("llama3").config.to_dict()
    for name in ("rope_parameters", "rope_scaling"):
        llama.pop(name, None)
    for name in ("type", "rope_type"):
        found, _ = families.arguments_of(llama | {"rope_scaling": {name: "llama3", "factor": 8.0}})
        assert found["use_rope_scaling"] and found["rope_scaling_factor"] == 8


def test_every_other_layer_of_qwen3_moe_has_experts() -> None:
    sizes = {"num_hidden_layers": 4, "hidden_size": 128, "num_attention_heads": 32, "intermediate_size": 64}
    sizes |= {"max_position_embeddings": 32, "vocab_size": 50, "num_experts": 16, "moe_intermediate_size": 32}
    for step, dense, pattern in ((2, [], [0, 1, 0, 1]), (1, [2], [1, 1, 0, 1]), (3, [], [0, 0, 1, 0])):
        config = {"model_type": "qwen3_moe", **sizes, "decoder_sparse_step": step, "mlp_only_layers": dense}
        assert families.arguments_of(config)[0]["moe_layer_freq"] == [str(pattern)]


def test_dtypes(tmp_path: Path) -> None:
    """bfloat16 stays what it is, there and back; --dtype casts."""
    model = random_model("qwen2").to(torch.bfloat16)
    model.save_pretrained(tmp_path / "hf")
    hf.import_hf(str(tmp_path / "hf"), str(tmp_path / "ours"), seq_length=32, options=QUIET)
    loaded = load_model(str(tmp_path / "ours"))
    assert loaded.config.training.bf16 and loaded.config.model.seq_length == 32
    assert loaded.model.embedding.weight.dtype == torch.bfloat16
    hf.export_hf(str(tmp_path / "ours"), str(tmp_path / "back"), step=None, family=None, options=QUIET)
    original = tensors_of(tmp_path / "hf")
    assert_same_bits(tensors_of(tmp_path / "back"), original)
    assert json.loads((tmp_path / "back" / "config.json").read_text())["dtype"] == "bfloat16"
    wide = hf.Options(say=lambda text: None, dtype=torch.float32)
    hf.export_hf(str(tmp_path / "ours"), str(tmp_path / "wide"), step=None, family=None, options=wide)
    assert_same_bits(tensors_of(tmp_path / "wide"), {name: t.float() for name, t in original.items()})


def test_old_names_of_gpt2(tmp_path: Path) -> None:
    """The hub's gpt2: no prefix, and masks among the tensors."""
    theirs = saved("gpt2", tmp_path / "hf")
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in tensors_of(tmp_path / "hf").items()}
    tensors["h.0.attn.bias"] = torch.ones(1, 1, 96, 96)
    save_file(tensors, tmp_path / "hf" / "model.safetensors")
    hf.import_hf(str(tmp_path / "hf"), str(tmp_path / "ours"), seq_length=None, options=QUIET)
    with torch.no_grad():
        torch.testing.assert_close(our_logits(tmp_path / "ours"), theirs(tokens()).logits, rtol=0, atol=1e-5)


def test_a_copy_of_tied_embeddings(tmp_path: Path) -> None:
    """An output layer in the file that is the embedding is the embedding; another one is refused."""
    saved("qwen2", tmp_path / "hf")
    tensors = tensors_of(tmp_path / "hf")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, tmp_path / "hf" / "model.safetensors")
    hf.import_hf(str(tmp_path / "hf"), str(tmp_path / "ours"), seq_length=None, options=QUIET)
    tensors["lm_head.weight"][0, 0] += 1
    save_file(tensors, tmp_path / "hf" / "model.safetensors")
    with pytest.raises(ValueError, match="tie_word_embeddings, but lm_head.weight differs"):
        hf.import_hf(str(tmp_path / "hf"), str(tmp_path / "other"), seq_length=None, options=QUIET)
    assert not (tmp_path / "other" / "iter_0000000").exists()
