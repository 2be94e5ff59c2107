"""The same scores from a native checkpoint and, by ``lm_eval --model hf``, from its Hugging Face export."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
from train_runs import ROOT, command

from megatron_hc.inference.harness import register

MODELS = {
    "plain": "",
    "hyper": "--residual-connection hyper",
    "mhc": "--residual-connection mhc",
    "values": "--value-residual learnable",
    "experts": "--num-experts 4 --moe-router-topk 2",
}
BASE = """--num-layers 2 --hidden-size 64 --num-attention-heads 4 --seq-length 128 --max-position-embeddings 256
    --position-embedding-type rope --normalization RMSNorm --swiglu --ffn-hidden-size 128 --disable-bias-linear
    --untie-embeddings-and-output-weights --micro-batch-size 4 --train-iters 30 --lr 1e-2 --lr-decay-style constant
    --eval-iters 0 --num-workers 0 --device cpu --log-interval 30"""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A byte-level BPE tokenizer of 400 tokens, and flags of a dataset written with it."""
    tokenizers = pytest.importorskip("tokenizers")
    folder = tmp_path_factory.mktemp("data")
    text = ROOT / "LICENSE"
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    made.train([str(text)], trainer)
    made.save(str(folder / "tokenizer.json"))
    tokenizer = ("--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", folder / "tokenizer.json")
    tool("preprocess_data", "--input", text, "--document-separator", r"\n\n", "--output-prefix", folder / "text",
         "--append-eod", *tokenizer)  # fmt: skip
    flags = " ".join(map(str, tokenizer))
    return folder, f"--data-path {folder}/text_text_document --split 100,0,0 {flags}"


def tool(name: str, *words: object) -> None:
    """A tool's ``main`` in this process."""
    spec = importlib.util.spec_from_file_location(f"{name}_tool", ROOT / "tools" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert not module.main([str(word) for word in words])


def scores(model: str, arguments: str) -> dict[str, dict[str, Any]]:
    """What ``lm_eval --model MODEL --model_args ARGUMENTS`` reports."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    results = simple_evaluate(
        model=model,
        model_args=arguments,
        tasks=["stdlib_choice", "stdlib_perplexity"],
        task_manager=TaskManager(include_path=str(ROOT / "examples" / "eval"), include_defaults=False),
        limit=12,
        batch_size=4,
        device="cpu",
        bootstrap_iters=0,
        verbosity="ERROR",
    )
    return results["results"]


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
def test_scores_of_checkpoint_and_export(model: str, data: tuple[Path, str], tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")  # lm_eval --model hf needs it
    folder, flags = data
    run, export = tmp_path / "run", tmp_path / "hf"
    assert command(f"{BASE} {flags} --data-cache-path {tmp_path}/cache {MODELS[model]} --save {run}".split()) == 0
    tool("convert_checkpoint", "--from", "megatron-hc", "--to", "hf", "--load", run, "--save", export)
    register()
    ours = scores("megatron_hc", f"load={run}")
    theirs = scores("hf", f"pretrained={export},trust_remote_code=True,dtype=float32")
    for task, metrics in (("stdlib_choice", ("acc", "acc_norm")), ("stdlib_perplexity", ("bits_per_byte",))):
        for metric in metrics:
            found, expected = ours[task][f"{metric},none"], theirs[task][f"{metric},none"]
            assert abs(found - expected) <= 1e-4 * max(1.0, abs(expected)), (task, metric, found, expected)
            print(f"{model} {task} {metric}: {found:.6f} (native), {expected:.6f} (export)")
