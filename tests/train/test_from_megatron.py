"""A launch script of Megatron-LM: refused once, with all that is not needed, and then it trains."""

from __future__ import annotations

import os
import shlex
import subprocess
from pathlib import Path

import pytest

from megatron_hc import cli
from megatron_hc.cli_megatron import NOT_NEEDED
from megatron_hc.train import train

SCRIPT = Path(__file__).parents[2] / "examples" / "megatron" / "gpt3_345m.sh"


@pytest.fixture
def argv(tmp_path: Path) -> list[str]:
    """The arguments that the script gives to pretrain_gpt.py."""
    stand_in = tmp_path / "torchrun"
    stand_in.write_text("#!/bin/sh\nprintf '%s\\0' \"$@\"\n")
    stand_in.chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    run = subprocess.run(["bash", str(SCRIPT)], env=environment, capture_output=True, text=True, check=True)
    words = run.stdout.split("\0")[:-1]
    return words[words.index("pretrain_gpt.py") + 1 :]


def cleaned(argv: list[str]) -> list[str]:
    """The command line that the refusal prints."""
    with pytest.raises(cli.UsageError) as caught:
        cli.parse(argv)
    return shlex.split(str(caught.value).splitlines()[-1])[1:]


def test_it_is_refused_once_with_all_that_is_not_needed(argv: list[str]) -> None:
    flags = [word for word in argv if word.startswith("--")]
    expected = [name for name in flags if name[2:].replace("-", "_") in NOT_NEEDED]
    assert len(flags) > 70 and len(expected) > 15
    with pytest.raises(cli.UsageError) as caught:
        cli.parse(argv)
    first, *listed, _, command = str(caught.value).splitlines()
    assert first == f"{len(expected)} arguments to mend"
    assert [line.split()[0] for line in listed] == expected
    assert all(" is not needed here: " in line for line in listed)
    page = (SCRIPT.parents[2] / "docs" / "from-megatron.md").read_text()
    shown = page[page.index("pretrain_gpt.py: error: ") :].split("```")[0].splitlines()
    assert shown[0].endswith(first) and shown[1:3] == listed[:2] and shown[4] == listed[-1]
    assert f"the usual flags, {len(flags)} of them" in page and command.startswith(shown[-1].removesuffix(" ..."))
    parsed = cli.parse([*shlex.split(command)[1:], "--transformer-impl", "local"])
    parsed.config.validate(world_size=8)
    assert parsed.config.parallel.data_parallel_sharding_strategy == "optim"
    assert parsed.config.model.hidden_dropout == 0.1


def test_the_cleaned_command_line_trains(argv: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At a size for one process: later flags win."""
    monkeypatch.chdir(tmp_path)
    command = cleaned(argv)
    for name in ("--data-path", "--split", "--tokenizer-model"):
        at = command.index(name)
        del command[at : at + 2]
    small = """--num-layers 2 --hidden-size 32 --ffn-hidden-size 64 --num-attention-heads 2 --kv-channels 16
        --seq-length 16 --max-position-embeddings 16 --micro-batch-size 1 --global-batch-size 4
        --rampup-batch-size 2 2 6 --train-samples 16 --lr-decay-samples 12 --lr-warmup-samples 4
        --tensor-model-parallel-size 1 --pipeline-model-parallel-size 1 --no-sequence-parallel --num-workers 0
        --transformer-impl local
        --mock-data --tokenizer-type ByteTokenizer --eval-interval 2 --eval-iters 1 --log-interval 1 --device cpu"""
    parsed = cli.parse([*command, *small.split()])
    parsed.config.validate()
    progress = train(parsed)
    # 2 + 2 + 2, then batches of 4; the two samples that are left fill none.
    assert progress.iteration == 5 and progress.consumed_samples == 14
