"""The same scores from a native checkpoint and, by ``lm_eval --model hf``, from its Hugging Face export."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from train_runs import ROOT, command

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
    tool("preprocess_data.py", "--input", text, "--document-separator", r"\n\n", "--output-prefix", folder / "text",
         "--append-eod", *tokenizer)  # fmt: skip
    flags = " ".join(map(str, tokenizer))
    return folder, f"--data-path {folder}/text_text_document --split 100,0,0 {flags}"


def tool(name: str, *words: object) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_DATASETS_OFFLINE": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools" / name), *map(str, words)], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def scores(folder: Path, *words: object) -> dict[str, dict[str, Any]]:
    """What tools/eval_harness.py writes; it takes every model of the harness."""
    tool("eval_harness.py", *words, "--include_path", ROOT / "examples" / "eval", "--tasks",
         "stdlib_choice,stdlib_perplexity", "--limit", 12, "--device", "cpu", "--batch_size", 4,
         "--output_path", folder)  # fmt: skip
    (file,) = folder.rglob("results_*.json")
    return json.loads(file.read_text())["results"]


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
def test_scores_of_checkpoint_and_export(model: str, data: tuple[Path, str], tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    pytest.importorskip("transformers")
    folder, flags = data
    run, export = tmp_path / "run", tmp_path / "hf"
    assert command(f"{BASE} {flags} --data-cache-path {tmp_path}/cache {MODELS[model]} --save {run}".split()) == 0
    tool("convert_checkpoint.py", "--from", "megatron-hc", "--to", "hf", "--load", run, "--save", export)
    ours = scores(tmp_path / "ours", "--model_args", f"load={run}")
    options = f"pretrained={export},trust_remote_code=True,dtype=float32"
    theirs = scores(tmp_path / "theirs", "--model", "hf", "--model_args", options)
    for task, metrics in (("stdlib_choice", ("acc", "acc_norm")), ("stdlib_perplexity", ("bits_per_byte",))):
        for metric in metrics:
            found, expected = ours[task][f"{metric},none"], theirs[task][f"{metric},none"]
            assert abs(found - expected) <= 1e-4 * max(1.0, abs(expected)), (task, metric, found, expected)
            print(f"{model} {task} {metric}: {found:.6f} (native), {expected:.6f} (export)")
