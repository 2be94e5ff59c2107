"""tools/generate.py on checkpoints of whole runs: with the key/value cache and without it, the same text."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType

import pytest
from train_runs import ROOT, command, tiny

WIDE = "--init-method-std 0.3"  # an untrained model that does not repeat one token
MODELS = {
    "plain, rope": f"{WIDE} --residual-connection plain",
    "hyper, learned positions, LayerNorm": f"{WIDE} --residual-connection hyper --position-embedding-type "
    "learned_absolute --normalization LayerNorm",
    "frac, grouped queries, untied": f"{WIDE} --residual-connection frac --group-query-attention --num-query-groups 2 "
    "--untie-embeddings-and-output-weights --qk-layernorm",
    "mhc, value residual": f"{WIDE} --residual-connection mhc --value-residual learnable",
}


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate_tool", ROOT / "tools" / "generate.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module", params=MODELS)
def checkpoint(request: pytest.FixtureRequest, licence: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    steps = ["--train-iters", 2, "--lr", 1e-4, "--eval-interval", 0, "--max-position-embeddings", 48]
    assert command(tiny(licence, folder, *steps, *MODELS[request.param].split(), "--save", folder / "run")) == 0
    return folder / "run"


def written(tool: ModuleType, capsys: pytest.CaptureFixture, checkpoint: Path, *flags: str) -> str:
    capsys.readouterr()
    assert tool.main(["--load", str(checkpoint), "--prompt", "You may ", "--max-new-tokens", "40", *flags]) == 0
    return capsys.readouterr().out


def refused(tool: ModuleType, capsys: pytest.CaptureFixture, argv: list[str]) -> str:
    with pytest.raises(SystemExit) as stop:
        tool.main(argv)
    assert stop.value.code == 2
    return capsys.readouterr().err


def test_the_same_text_with_and_without_the_cache(
    tool: ModuleType, checkpoint: Path, capsys: pytest.CaptureFixture
) -> None:
    for flags in (["--temperature", "0"], ["--seed", "3", "--temperature", "0.8", "--top-k", "50", "--top-p", "0.9"]):
        cached = written(tool, capsys, checkpoint, *flags)
        assert cached == written(tool, capsys, checkpoint, *flags, "--no-kv-cache")
        assert cached.startswith("You may ") and len(set(cached)) > 10, "longer than the prompt, and varied"
    assert cached != written(tool, capsys, checkpoint, *flags, "--seed", "4")


@pytest.fixture(scope="module")
def plain(licence: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plain")
    assert command(tiny(licence, folder, "--train-iters", 3, "--save", folder / "run", "--save-interval", 1)) == 0
    return folder / "run"


def test_a_text_longer_than_the_positions_is_refused(
    tool: ModuleType, plain: Path, capsys: pytest.CaptureFixture
) -> None:
    message = refused(tool, capsys, ["--load", str(plain), "--prompt", "x" * 30, "--max-new-tokens", "3"])
    assert re.search(r"--max-new-tokens \(3\) after a prompt of 30 tokens exceeds --max-position-embeddings", message)
    assert message.count("\n") == 1
    assert tool.main(["--load", str(plain), "--prompt", "x" * 29, "--max-new-tokens", "3"]) == 0


@pytest.mark.parametrize(
    "flags, pattern",
    [
        (["--prompt", ""], "the prompt has no tokens"),
        ([], "no prompt: give --prompt TEXT"),
        (["--prompt-file", "nowhere"], "--prompt-file nowhere cannot be read"),
        (["--prompt", "x", "--output", "nowhere/texts.jsonl"], "--output nowhere/texts.jsonl cannot be written"),
        (["--prompt", "x", "--output", "."], r"--output \. cannot be written: name a file"),
        (["--prompt", "x", "--stop", ""], "--stop needs text"),
        (["--prompt", "x", "--batch-size", "0"], "--batch-size must be at least 1"),
        (["--prompt", "x", "--tensor-model-parallel-size", "2"], "must divide the number of processes"),
        (["--prompt", "x", "--expert-model-parallel-size", "2"], "must divide tensor-model-parallel-size"),
        (["--prompt", "x", "--temperature", "-1"], "--temperature must not be negative"),
        (["--prompt", "x", "--top-p", "0"], r"--top-p must be in \(0, 1\]"),
        (["--prompt", "x", "--max-new-tokens", "0"], "--max-new-tokens must be at least 1"),
        (["--prompt", "x", "--ckpt-step", "9"], "--ckpt-step 9 is not in .*: 1, 2, 3"),
        (["--prompt", "x", "--load", "nowhere"], "--load nowhere is not a folder"),
    ],
)
def test_bad_input(
    flags: list[str], pattern: str, tool: ModuleType, plain: Path, capsys: pytest.CaptureFixture
) -> None:
    message = refused(tool, capsys, ["--load", str(plain), *flags])
    assert message.startswith("generate.py: error: ") and message.count("\n") == 1
    assert re.search(pattern, message)


def test_an_earlier_checkpoint_writes_something_else(
    tool: ModuleType, plain: Path, capsys: pytest.CaptureFixture
) -> None:
    argv = ["--load", str(plain), "--prompt", "You", "--max-new-tokens", "20", "--seed", "1"]
    assert tool.main([*argv, "--ckpt-step", "1"]) == 0
    early = capsys.readouterr().out
    assert tool.main(argv) == 0
    assert capsys.readouterr().out != early


def test_what_looks_like_the_end_of_a_line_in_a_prompt(tool: ModuleType, tmp_path: Path) -> None:
    """JSON allows it in a string as it is, and most programs write it so."""
    prompts = ["one\u2028two", "three\u0085", "four\r\n"]
    file = tmp_path / "prompts.jsonl"
    file.write_text("\n".join(json.dumps(prompt, ensure_ascii=False) for prompt in prompts), encoding="utf-8")
    assert tool.prompts_of(tool.parse_arguments(["--load", "x", "--prompt-file", str(file)])) == prompts


def test_many_prompts_to_a_file(tool: ModuleType, plain: Path, capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    """Written together or alone, shown or in a file: the same texts; a stop string ends one before it."""
    prompts = ["You may", "Licence", "x"]
    flags = ["--load", str(plain), "--max-new-tokens", "20", "--seed", "1"]
    assert tool.main([*flags, "--prompt", *prompts]) == 0
    shown = capsys.readouterr().out
    file, output = tmp_path / "prompts.jsonl", tmp_path / "texts.jsonl"
    file.write_text("".join(json.dumps(prompt) + "\n" for prompt in prompts))
    assert tool.main([*flags, "--prompt-file", str(file), "--output", str(output), "--batch-size", "2"]) == 0
    found = [json.loads(line) for line in output.read_text().splitlines()]
    assert [line["prompt"] for line in found] == prompts
    assert shown == "\n---\n".join(line["prompt"] + line["text"] for line in found) + "\n"
    text = found[0]["text"]
    stop = text[2:4]
    assert tool.main([*flags, "--prompt", prompts[0], "--stop", stop]) == 0
    assert capsys.readouterr().out == prompts[0] + text[: text.index(stop)] + "\n"
