"""tools/convert_checkpoint.py as it is called; training on from its output; runs of ours as models of transformers."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from convert_models import saved, tensors_of, write_checkpoint
from helpers import small_config
from safetensors.torch import save_file

sys.path[:0] = [str(Path(__file__).parents[2] / "tools"), str(Path(__file__).parents[1] / "train")]

import convert_checkpoint  # noqa: E402
import generate  # noqa: E402
from train_runs import command, losses, tiny  # noqa: E402

from megatron_hc.convert.logits import check_logits  # noqa: E402
from megatron_hc.validation import _of_one_process  # noqa: E402

pytest.importorskip("transformers")
TO_OURS, TO_HF = ["--from", "hf", "--to", "megatron-hc"], ["--from", "megatron-hc", "--to", "hf"]


def tool(*argv: object) -> int:
    try:
        return convert_checkpoint.main([str(word) for word in argv])
    except SystemExit as stop:
        return int(stop.code or 0)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    from megatron_hc.data import ByteTokenizer, IndexedDatasetWriter

    prefix = str(tmp_path_factory.mktemp("text") / "text")
    with IndexedDatasetWriter(prefix, "uint16") as writer:
        for paragraph in (Path(__file__).parents[2] / "LICENSE").read_text().split("\n\n"):
            writer.add_document([*ByteTokenizer().tokenize(paragraph), 256])
    return prefix


def write_tokenizer(folder: Path, size: int) -> None:
    """A byte-level tokenizer of ``size`` tokens, as transformers 5 writes it."""
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
    from tokenizers.decoders import ByteLevel

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())[: size - 1]
    built = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    built.pre_tokenizer, built.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), ByteLevel()
    built.add_special_tokens([AddedToken("<|endoftext|>", special=True)])
    built.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "TokenizersBackend", "backend": "tokenizers", "is_local": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"eos_token": "<|endoftext|>"}))


def test_import_train_generate_export(tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Fewer tokens than rows; trained on with the arguments of the checkpoint; back, with a tokenizer for all."""
    saved("qwen3", tmp_path / "hf")
    write_tokenizer(tmp_path / "hf", 120)
    assert tool(*TO_OURS, "--load", tmp_path / "hf", "--save", tmp_path / "a", "--check-logits") == 0
    said = capsys.readouterr().out
    assert "random tokens: largest difference" in said and "text: largest difference" in said
    run = f"""--load {tmp_path / "a"} --save {tmp_path / "b"} --use-checkpoint-args --finetune --seq-length 32
    --micro-batch-size 2 --train-iters 2 --lr 1e-3 --mock-data --eval-iters 0 --num-workers 0 --device cpu"""
    assert command(run.split()) == 0
    assert generate.main(f"--load {tmp_path / 'b'} --prompt ab --max-new-tokens 3".split()) == 0
    capsys.readouterr()
    assert tool(*TO_HF, "--load", tmp_path / "b", "--save", tmp_path / "out", "--check-logits") == 0
    assert "family qwen3" in capsys.readouterr().out
    from transformers import AutoTokenizer

    assert json.loads((tmp_path / "out" / "tokenizer_config.json").read_text()) == {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|endoftext|>",
    }
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.decode(tokenizer("!ab")["input_ids"]) == "!ab"
    assert json.loads((tmp_path / "out" / "config.json").read_text())["eos_token_id"] == tokenizer.eos_token_id == 119
    before, after = tensors_of(tmp_path / "hf"), tensors_of(tmp_path / "out")
    assert before.keys() == after.keys() and not any(before[name].equal(after[name]) for name in before)


FLAGS = {
    "llama": "--group-query-attention --num-query-groups 2 --untie-embeddings-and-output-weights",
    "qwen2": "--add-qkv-bias",
    "olmo2": "--norm-placement reordered --qk-layernorm --qk-layernorm-across-heads",
    "qwen3_moe": "--qk-layernorm --num-experts 4 --moe-ffn-hidden-size 16 --moe-layer-freq [0,1]",
}


@pytest.mark.parametrize("family", FLAGS)
def test_a_run_of_ours_as_a_family(family: str, tmp_path: Path, text: str) -> None:
    """A few steps, then the same loss on the same text in transformers."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from megatron_hc.data import IndexedDataset
    from megatron_hc.inference import load_model

    extra = f"{FLAGS[family]} --train-iters 3 --save {tmp_path / 'run'} --norm-epsilon 1e-6".split()
    assert command(tiny(text, tmp_path, *extra)) == 0
    assert losses(tmp_path)[-1] < losses(tmp_path)[0]
    assert tool(*TO_HF, "--load", tmp_path / "run", "--save", tmp_path / "out") == 0
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert theirs.config.model_type == family
    assert theirs.config.eos_token_id == theirs.generation_config.eos_token_id == 256, "where its texts end"
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    hard = "na\u00efve  \u4f60\n\t\x00 ."
    assert tokenizer(hard)["input_ids"] == list(hard.encode()) and tokenizer.decode(list(hard.encode())) == hard
    assert tokenizer.eos_token_id == tokenizer(tokenizer.eos_token)["input_ids"][0] == 256
    ours = load_model(str(tmp_path / "run")).model
    words = torch.tensor(IndexedDataset(text)[20][:32].astype(int))[None]
    with torch.no_grad():
        expected = float(theirs(words, labels=words).loss)
        logits = ours.output.logits(ours(words[:, :-1]))[:, 0]
    assert abs(float(torch.nn.functional.cross_entropy(logits, words[0, 1:])) - expected) < 1e-5


def test_kernels_of_another_machine(tmp_path: Path) -> None:
    """A run on GPUs names kernels that a CPU does not have; its model works here all the same."""
    config = small_config({"residual_connection": "hyper"})
    kernels = {"attention_backend": "fused", "fused_residual_backend": "triton"}
    write_checkpoint(tmp_path / "ours", config, **kernels)
    assert tool(*TO_HF, "--load", tmp_path / "ours", "--save", tmp_path / "hf", "--check-logits") == 0
    found = _of_one_process(tmp_path / "ours" / "iter_0000000", ())
    assert (found.model.attention_backend, found.model.fused_residual_backend) == ("auto", "auto")


def test_check_logits_of_a_bf16_run(tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Its checkpoint has fp32 weights, which the export takes over, or rounds where --dtype says so; and back."""
    run = f"--train-iters 3 --save {tmp_path / 'run'} --bf16 --fp32-residual-connection".split()
    assert command(tiny(text, tmp_path, *run)) == 0
    for dtype, back in (("keep", "bfloat16"), ("bfloat16", "keep")):
        exported = ["--load", tmp_path / "run", "--save", tmp_path / dtype, "--dtype", dtype]
        assert tool(*TO_HF, *exported, "--check-logits") == 0
        imported = ["--load", tmp_path / dtype, "--save", tmp_path / f"ours-{dtype}", "--dtype", back]
        assert tool(*TO_OURS, *imported, "--check-logits") == 0


def test_check_logits_sees_a_difference(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved("llama2", tmp_path / "hf")
    assert tool(*TO_OURS, "--load", tmp_path / "hf", "--save", tmp_path / "ours") == 0
    tensors = tensors_of(tmp_path / "hf")
    tensors["model.layers.1.mlp.down_proj.weight"] *= 1.01
    save_file(tensors, tmp_path / "hf" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="which is more than rounding"):
        check_logits(str(tmp_path / "hf"), str(tmp_path / "ours"), None, lambda text: None)
