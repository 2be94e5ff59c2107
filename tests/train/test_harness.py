"""The model of lm-evaluation-harness on a checkpoint: its numbers, and what it refuses."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from train_runs import ROOT, command, tiny

pytest.importorskip("lm_eval")


@pytest.fixture(scope="module")
def checkpoint(licence: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    flags = ["--train-iters", 2, "--eval-interval", 0, "--max-position-embeddings", 48, "--init-method-std", 0.3]
    assert command(tiny(licence, folder, *flags, "--save", folder / "run")) == 0
    return folder / "run"


def made(checkpoint: Path, **arguments: Any) -> Any:
    from megatron_hc.inference.harness import register

    return register()(load=str(checkpoint), device="cpu", **arguments)


def asked(*arguments: Any) -> Any:
    return SimpleNamespace(args=arguments)


def logprobs(model: Any, tokens: list[int]) -> torch.Tensor:
    """[tokens - 1] of each token but the first, given those before it."""
    inner = model.model
    found = inner.output.logits(inner(torch.tensor([tokens[:-1]])))[:, 0].log_softmax(-1)
    return found.gather(1, torch.tensor(tokens[1:])[:, None])[:, 0]


def test_log_likelihoods(checkpoint: Path) -> None:
    """With a context, without one or of spaces alone (end-of-document then stands in front), and with one that is too
    long."""
    model = made(checkpoint, batch_size=2, dtype="float64")
    pairs = [("You may", " use"), ("", "abc"), ("long" * 30, "end"), ("You may", " us"), (" ", "abc")]
    found = model.loglikelihood([asked(*pair) for pair in pairs], disable_tqdm=True)
    for (context, continuation), (logprob, _) in zip(pairs, found, strict=True):
        context, continuation = context.rstrip(), " " * (context == " ") + continuation
        text = list(context.encode()) or [256]
        tokens = [*text, *continuation.encode()][-49:]
        assert logprob == pytest.approx(float(logprobs(model, tokens)[-len(continuation) :].sum()), rel=1e-9)


def test_rolling(checkpoint: Path) -> None:
    """Every token once: 48 after end-of-document, the rest with the 48 before them."""
    model = made(checkpoint, batch_size="auto", dtype="float64")
    text = (ROOT / "LICENSE").read_text()[200:300]
    tokens = [256, *text.encode()]
    expected = logprobs(model, tokens[:49]).sum() + logprobs(model, tokens[48:97]).sum()
    expected = expected + logprobs(model, tokens[52:101])[-4:].sum()
    (found,) = model.loglikelihood_rolling([asked(text)], disable_tqdm=True)
    assert found == pytest.approx(float(expected), rel=1e-9)
    assert model.loglikelihood_rolling([asked("")], disable_tqdm=True) == [0.0]


def test_writing(checkpoint: Path) -> None:
    from megatron_hc.data import ByteTokenizer
    from megatron_hc.model.generate import Sampling, generate

    model = made(checkpoint)
    long = "".join(map(chr, range(33, 123)))  # of which the last 39 tokens leave room for 9 of 48

    def written(prompt: str, **sampling: Any) -> str:
        tokens = generate(model.model, prompt.encode()[-39:], 9, Sampling(**sampling), eod=256)
        return ByteTokenizer().detokenize(tokens)

    expected = written("You may", temperature=0)
    options = {"until": ["\n\n"], "max_gen_toks": 9}
    drawn = {**options, "do_sample": True, "temperature": 0.9, "top_k": 7}
    texts = model.generate_until([asked("You may", options), asked("You may", drawn), asked(long, options)])
    assert texts == [expected, written("You may", temperature=0.9, top_k=7, seed=1235), written(long, temperature=0)]
    assert texts[1] != expected
    with pytest.raises(ValueError, match=r"--top-p must be in \(0, 1\], not 0.0"):
        model.generate_until([asked("You may", {**drawn, "top_p": 0})])
    with pytest.raises(ValueError, match="generation arguments beams are not known here"):
        model.generate_until([asked("You may", {**options, "beams": 3})])


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"load": "nowhere"}, "nowhere is not a folder"),
        ({"ckpt_step": 7}, "ckpt-step 7 is not in"),
        ({"tensor_model_paralel_size": 2}, "did you mean tensor_model_parallel_size"),
        ({"tensor_model_parallel_size": 3}, r"\(3\) must divide --num-attention-heads \(4\)"),
        ({"tensor_model_parallel_size": 2}, r"must divide the number of processes \(1\)"),
        ({"expert_model_parallel_size": 2}, "must divide tensor-model-parallel-size"),
        ({"hidden_size": 99}, "hidden_size=99, but the checkpoint's model has 32"),
        ({"devices": 4}, "there are 1 processes"),
        ({"seq_length": 49}, r"seq_length \(49\) must be in 1 .. 48"),
        ({"batch_size": 0}, r"batch_size \(0\) must be a positive number or auto"),
        ({"dtype": "float8"}, r"dtype \(float8\) must be one of"),
        ({"extra_args": "--nonsense 1"}, "--nonsense is not a flag"),
        ({"extra_args": "--lr 3"}, "--lr would do nothing here"),
        ({"extra_args": "'"}, "cannot be read"),
        ({"tokenizer_type": "HuggingFaceTokenizer"}, "needs --tokenizer-model"),
    ],
)
def test_refused(checkpoint: Path, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as refused:
        made(**{"checkpoint": checkpoint} | arguments) if "load" not in arguments else made(Path(arguments["load"]))
    assert "\n" not in str(refused.value)


def test_what_repeats_the_checkpoint_is_taken(checkpoint: Path) -> None:
    model = made(
        checkpoint, num_layers=2, hidden_size=32, devices=1, extra_args="--bf16", max_gen_toks=5, seq_length=32
    )
    assert (model.max_length, model.max_gen_toks, model.batch_size) == (32, 5, "auto")
    assert next(model.model.parameters()).dtype == torch.bfloat16


def test_a_file_that_was_cut_short(checkpoint: Path, tmp_path: Path) -> None:
    shutil.copytree(checkpoint, tmp_path / "run")
    (file,) = (tmp_path / "run").glob("iter_*/model*.safetensors")
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match="instead of"):
        made(tmp_path / "run")


def test_flags_of_one_of_several_processes() -> None:
    import importlib.util

    spec = importlib.util.spec_from_file_location("eval_harness_tool", ROOT / "tools" / "eval_harness.py")
    assert spec is not None and spec.loader is not None
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    given = ["--tasks", "a", "--output_path", "x", "--log_samples", "--limit", "3"]
    assert tool.harness_flags(given, 0, 2) == ["run", *given, "--model", "megatron_hc"]
    assert tool.harness_flags(["run", *given], 1, 2) == [
        "run",
        "--tasks",
        "a",
        "--limit",
        "3",
        "--model",
        "megatron_hc",
    ]
    assert tool.harness_flags(["--model", "hf"], 0, 1) == ["run", "--model", "hf"]
    assert tool.harness_flags(["ls", "tasks"], 0, 1) == ["ls", "tasks"]
    with pytest.raises(ValueError, match="--use_cache is for one process"):
        tool.harness_flags(["--use_cache", "x"], 0, 2)
