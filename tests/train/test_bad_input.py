"""What cannot work ends in one sentence on stderr, with exit code 2, before anything is written."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from train_runs import ROOT, command, listing, tiny

from megatron_hc.data import IndexedDatasetWriter

Prepare = Callable[[Path, str], list[str]]
"""(folder, prefix of a good dataset) -> flags to add to a good run; may write what the user has got wrong."""


def write(file: Path, content: str | bytes) -> Path:
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    return file


def copied(folder: Path, licence: str) -> str:
    for suffix in (".bin", ".idx"):
        shutil.copy(licence + suffix, folder / f"data{suffix}")
    return str(folder / "data")


def dataset(folder: Path, *documents: list[int]) -> list[str]:
    with IndexedDatasetWriter(str(folder / "own"), "uint16") as writer:
        for document in documents:
            writer.add_document(document)
    return ["--data-path", str(folder / "own")]


def truncated(suffix: str) -> Prepare:
    def prepare(folder: Path, licence: str) -> list[str]:
        prefix = copied(folder, licence)
        file = Path(prefix + suffix)
        file.write_bytes(file.read_bytes()[:-7])
        return ["--data-path", prefix]

    return prepare


def missing(suffix: str) -> Prepare:
    def prepare(folder: Path, licence: str) -> list[str]:
        prefix = copied(folder, licence)
        Path(prefix + suffix).unlink()
        return ["--data-path", prefix]

    return prepare


def not_an_index(folder: Path, licence: str) -> list[str]:
    prefix = copied(folder, licence)
    write(Path(prefix + ".idx"), "this is text, " * 20)
    return ["--data-path", prefix]


def yaml(content: str | bytes) -> Prepare:
    return lambda folder, licence: ["--yaml-cfg", str(write(folder / "run.yaml", content))]


def save_is_a_file(folder: Path, licence: str) -> list[str]:
    return ["--save", str(write(folder / "taken", "something else"))]


def tokenizer(content: bytes) -> Prepare:
    def prepare(folder: Path, licence: str) -> list[str]:
        model = write(folder / "tokenizer.model", content)
        return ["--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", str(model)]

    return prepare


def metrics_of_something_else(folder: Path, licence: str) -> list[str]:
    return ["--metrics-jsonl", str(write(folder / "notes.txt", "remember the milk\nand the bread\n"))]


def of_megatron(flag: str) -> Prepare:
    def prepare(folder: Path, licence: str) -> list[str]:
        (folder / "theirs" / "iter_0000100" / "mp_rank_00").mkdir(parents=True)
        write(folder / "theirs" / "latest_checkpointed_iteration.txt", "100")
        return [flag, str(folder / "theirs")]

    return prepare


def below_a_file(*flags: str) -> Prepare:
    """The last of the flags names a file below something that is no folder."""
    return lambda folder, licence: [*flags, str(write(folder / "taken", "something else") / "below" / "file")]


def given(*flags: str) -> Prepare:
    return lambda folder, licence: list(flags)


CASES: dict[str, tuple[Prepare, str]] = {
    "unknown flags, all at once": (
        given("--hiden-size", "8", "--num_layers", "3", "--recompute-granularty", "full"),
        r"--hiden-size is not a flag.*--hidden-size.*--num_layers is not a flag.*--num-layers.*--recompute-granularity",
    ),
    "unknown YAML keys, all at once": (
        yaml("hiden-size: 8\nlearning_rate: 1e-3\nlr-decay-stile: cosine\n"),
        r"hiden-size .*hidden.size.*learning_rate .*lr-decay-stile .*lr.decay.style",
    ),
    "a YAML file that is none": (yaml("lr: [1, 2\nsplit: {"), r"--yaml-cfg \S+run.yaml: is not YAML"),
    "bytes as YAML": (yaml(b"\xff\xfe\x00\x01"), r"--yaml-cfg \S+run.yaml: "),
    "YAML that is a list": (yaml("- lr\n- split\n"), r"--yaml-cfg \S+run.yaml: must hold 'name: value' lines"),
    "no YAML file": (given("--yaml-cfg", "nowhere.yaml"), r"--yaml-cfg nowhere.yaml: cannot be read"),
    "a word for a number": (given("--lr", "fast"), r"--lr: .*fast"),
    "no .bin": (missing(".bin"), r"data\.bin\b.*missing|data\.bin.*(not exist|cannot be read|No such)"),
    "no .idx": (missing(".idx"), r"data\.idx\b.*missing|data\.idx.*(not exist|cannot be read|No such)"),
    "a .bin cut short": (truncated(".bin"), r"data\.bin \S*.*\d+ bytes.*\d+"),
    "an .idx cut short": (truncated(".idx"), r"data\.idx \S*.*\d+"),
    "an .idx that is none": (not_an_index, r"data\.idx "),
    "a token beyond the vocabulary": (
        lambda folder, licence: dataset(folder, [5] * 4000 + [300] + [5] * 4000),
        r"\b300\b.*\b257\b",
    ),
    "a dataset shorter than one sample": (
        lambda folder, licence: dataset(folder, *[[1, 2, 3]] * 4),
        r"own.*\b32\b|--seq-length",
    ),
    "a global batch that is not whole micro-batches": (
        given("--global-batch-size", "5"),
        r"--global-batch-size \(5\) must be divisible by --micro-batch-size \(2\)",
    ),
    "a tokenizer that is not there": (
        given("--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", "nowhere.model"),
        r"--tokenizer-model nowhere.model cannot be read: No such file",
    ),
    "a tokenizer that is none": (tokenizer(b"text, and no protobuf"), r"--tokenizer-model \S+ is not a sentencepiece"),
    "an empty tokenizer": (tokenizer(b""), r"--tokenizer-model \S+ is not a sentencepiece model"),
    "no tokenizer model": (
        given("--tokenizer-type", "SentencePieceTokenizer"),
        r"--tokenizer-type SentencePieceTokenizer needs --tokenizer-model",
    ),
    "a file in the place of --save": (save_is_a_file, r"--save \S+taken cannot be a folder because \S+taken is a file"),
    "no folder to load, and it must be there": (
        given("--load", "nowhere", "--exit-on-missing-checkpoint"),
        r"--load nowhere is not a folder",
    ),
    "an iteration that is not there": (
        given("--load", "nowhere", "--ckpt-step", "3"),
        r"--load nowhere is not a folder",
    ),
    "nothing to finetune": (given("--load", "nowhere", "--finetune"), r"--load nowhere is not a folder"),
    "a file in the place of --load": (
        lambda folder, licence: ["--load", str(write(folder / "taken", "something else"))],
        r"--load \S+taken is not a folder",
    ),
    "a checkpoint of Megatron-LM": (of_megatron("--load"), r"Megatron-LM in its format torch .*convert_checkpoint"),
    "a folder of Megatron-LM": (of_megatron("--save"), r"--save \S+theirs holds a checkpoint of Megatron-LM .*choose"),
    "metrics that are another file": (
        metrics_of_something_else,
        r"--metrics-jsonl \S+: line 1 is not a line of metrics",
    ),
    "metrics below a file": (below_a_file("--metrics-jsonl"), r"--metrics-jsonl: .*because \S+taken is a file"),
    "a heartbeat below a file": (below_a_file("--heartbeat-file"), r"--heartbeat-file: .*because \S+taken is a file"),
    "a profile below a file": (
        below_a_file("--profile", "--use-pytorch-profiler", "--profile-dir"),
        r"--profile-dir \S+ cannot be a folder because \S+taken is a file",
    ),
    "a name that is too long": (given("--save", "x" * 300), r"--save x+ cannot be used: File name too long"),
    "heads that do not divide": (given("--num-attention-heads", "5"), r"--num-attention-heads \(5\)"),
    "a residual of another name": (given("--residual-connection", "hypr"), r"--residual-connection.*hypr.*hyper"),
    "a split of words": (given("--split", "most,rest"), r"--split \(most,rest\) must be"),
    "no training share": (given("--split", "0,1,0"), r"--split"),
    "no length": (given("--train-samples", "4"), r"--train-iters and --train-samples"),
    "more than one thing": (given("--lr", "-1", "--hiden-size", "3"), r"--hiden-size"),
}


def good(licence: str, folder: Path) -> list[str]:
    return tiny(licence, folder, "--train-iters", 2, "--save", folder / "run")


def check(code: int, message: str, pattern: str) -> None:
    assert code == 2
    assert message.startswith("pretrain_gpt.py: error: ") and "Traceback" not in message
    assert re.search(pattern, message, re.DOTALL), message
    is_list = re.search(r"arguments to mend", message) is not None
    assert is_list or message.count("\n") == 1, f"one sentence on one line: {message}"


@pytest.mark.parametrize("case", CASES)
def test_refused_in_one_sentence_and_nothing_written(
    case: str, licence: str, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    prepare, pattern = CASES[case]
    argv = [*good(licence, tmp_path), *prepare(tmp_path, licence)]
    before = listing(tmp_path)
    code = command(argv)
    output = capsys.readouterr()
    check(code, output.err, pattern)
    assert output.out == ""
    assert listing(tmp_path) == before


@pytest.mark.parametrize("case", ["a .bin cut short", "unknown flags, all at once", "an empty tokenizer"])
def test_the_command_itself(case: str, licence: str, tmp_path: Path) -> None:
    prepare, pattern = CASES[case]
    argv = [*good(licence, tmp_path), *prepare(tmp_path, licence)]
    before = listing(tmp_path)
    environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1"}
    line = [sys.executable, str(ROOT / "pretrain_gpt.py"), *argv]
    done = subprocess.run(line, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    check(done.returncode, done.stderr, pattern)
    assert listing(tmp_path) == before


# Checkpoints


@pytest.fixture(scope="module")
def checkpoint(licence: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    assert command(good(licence, folder)) == 0
    return folder / "run"


def biggest(folder: Path) -> Path:
    return max(folder.rglob("*.safetensors"), key=lambda file: file.stat().st_size)


def cut_short(run: Path) -> list[str]:
    file = biggest(run)
    file.write_bytes(file.read_bytes()[:-100])
    return []


def with_a_damaged(name: str) -> Callable[[Path], list[str]]:
    def damage(run: Path) -> list[str]:
        (file,) = run.rglob(name)
        write(file, "x" * file.stat().st_size)
        return []

    return damage


def without_a_file(run: Path) -> list[str]:
    biggest(run).unlink()
    return []


CHECKPOINTS: dict[str, tuple[Callable[[Path], list[str]], str]] = {
    "of another width": (
        lambda run: ["--hidden-size", "48", "--ffn-hidden-size", "64"],
        r"another shape: model\.\S+ is \[[\d, ]*32\] there and \[[\d, ]*48\] here",
    ),
    "of another depth": (lambda run: ["--num-layers", "3"], r"another model: it lacks model\.layers\.2\S*"),
    "of another residual": (
        lambda run: ["--residual-connection", "hyper"],
        r"another model: it lacks model\.\S+residual",
    ),
    "cut short": (cut_short, r"iteration 2: \S+safetensors has \d+ bytes instead of \d+"),
    "with a file missing": (without_a_file, r"iteration 2: \S+safetensors is missing"),
    "with a broken index": (with_a_damaged("checkpoint.json"), r"checkpoint\.json is not the index of a checkpoint"),
    "with a broken state": (with_a_damaged("state.json"), r"state\.json is not what was written"),
    "without that iteration": (lambda run: ["--ckpt-step", "7"], r"--ckpt-step 7 is not in \S+, which holds .*: 2"),
}


@pytest.mark.parametrize("case", CHECKPOINTS)
def test_a_checkpoint_that_does_not_fit(
    case: str, checkpoint: Path, licence: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    run = tmp_path / "run"
    shutil.copytree(checkpoint, run)
    damage, pattern = CHECKPOINTS[case]
    argv = [*good(licence, tmp_path), "--load", str(run), *damage(run)]
    before = listing(tmp_path)
    code = command(argv)
    check(code, capsys.readouterr().err, pattern)
    assert listing(tmp_path) == before


def test_damaged_arguments_of_a_checkpoint(
    checkpoint: Path, licence: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    shutil.copytree(checkpoint, tmp_path / "run")
    (file,) = (tmp_path / "run").rglob("arguments.json")
    content = json.loads(file.read_text())
    del content["hidden_size"]
    write(file, json.dumps(content).ljust(file.stat().st_size))
    before = listing(tmp_path)
    code = command([*good(licence, tmp_path), "--load", str(tmp_path / "run"), "--use-checkpoint-args"])
    if code != 0:  # a field that is missing may be given on the command line instead
        check(code, capsys.readouterr().err, "arguments.json")
        assert listing(tmp_path) == before
