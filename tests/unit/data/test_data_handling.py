"""tools/merge_datasets.py, tools/inspect_data.py and tools/prepare_cache.py."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from data_corpus import files_of, load_tool, megatron_datasets, texts_of, train_config, write_corpus

from megatron_hc import checkpoint
from megatron_hc.cli import dump, parse
from megatron_hc.data import ByteTokenizer, IndexedDataset, IndexedDatasetWriter, build_datasets, check_record
from megatron_hc.data.tokenizer import write_record
from megatron_hc.mesh import Mesh


def code_of(tool: ModuleType, arguments: list[str]) -> int:
    with pytest.raises(SystemExit) as ended:
        tool.main(arguments)
    return ended.value.code


@pytest.fixture(scope="module")
def preprocess() -> ModuleType:
    return load_tool("preprocess_data")


@pytest.fixture(scope="module")
def merge() -> ModuleType:
    return load_tool("merge_datasets")


@pytest.fixture(scope="module")
def inspect() -> ModuleType:
    return load_tool("inspect_data")


@pytest.fixture(scope="module")
def prepare() -> ModuleType:
    return load_tool("prepare_cache")


def written(tool: ModuleType, folder: Path, name: str, text: str, *flags: str) -> str:
    (folder / f"{name}.txt").write_text(text)
    arguments = ["--input", str(folder / f"{name}.txt"), "--output-prefix", str(folder / name), *flags]
    assert tool.main([*arguments, "--tokenizer-type", "ByteTokenizer", "--append-eod"]) == 0
    return str(folder / f"{name}_text_document")


# --- merge --------------------------------------------------------------------------------------------------------


def test_merged_equals_preprocessed_together(preprocess, merge, tmp_path, capfd) -> None:
    one, other = written(preprocess, tmp_path, "a", "x\nyy\n"), written(preprocess, tmp_path, "b", "\nzzz\n")
    together = written(preprocess, tmp_path, "c", "x\nyy\nzzz\n")
    assert merge.main(["--input", one, other, "--output-prefix", str(tmp_path / "m")]) == 0
    assert files_of(tmp_path / "m") == files_of(together)
    assert f"{tmp_path}/m.bin: 3 documents of 2 datasets, 9 tokens" in capfd.readouterr().out
    check_record(str(tmp_path / "m"), ByteTokenizer())
    assert json.loads((tmp_path / "m.json").read_text())["documents"] == 3
    assert not list(tmp_path.glob("*partial*"))


def test_merging_a_folder_equals_megatrons(merge, tmp_path) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    folder = tmp_path / "f"
    folder.mkdir()
    for number, lengths in enumerate(([3, 0, 5], [], [2])):
        write_corpus(folder / f"part{number}", lengths, seed=number)
    builder = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=np.uint16)
    for number in range(3):
        builder.add_index(str(folder / f"part{number}"))
    builder.finalize(str(tmp_path / "theirs.idx"))
    assert merge.main(["--input", str(folder), "--output-prefix", str(tmp_path / "ours")]) == 0
    assert files_of(tmp_path / "ours") == files_of(tmp_path / "theirs")
    assert not (tmp_path / "ours.json").exists()


def test_merge_refuses(preprocess, merge, tmp_path, capfd) -> None:
    one = written(preprocess, tmp_path, "a", "x\n")
    other = written(preprocess, tmp_path, "b", "y\n")
    plain = write_corpus(tmp_path / "plain", [3])
    wide = write_corpus(tmp_path / "wide", [3], dtype=np.int32)
    (tmp_path / "empty").mkdir()
    record = json.loads(Path(f"{other}.json").read_text())
    before = sorted(os.listdir(tmp_path))

    def message(*inputs: str, output: str = "m") -> str:
        assert merge.main(["--input", *inputs, "--output-prefix", str(tmp_path / output)]) == 2
        assert sorted(os.listdir(tmp_path)) == before
        return capfd.readouterr().err

    assert "holds uint16 and" in message(one, wide)
    assert f"{one} remembers its tokenizer and {plain} does not: delete {one}.json" in message(one, plain)
    assert "is one of the inputs" in message(one, other, output="a_text_document")
    assert "the folder holds no dataset" in message(str(tmp_path / "empty"))
    assert "does not exist" in message(one, str(tmp_path / "nowhere"))
    for what in ("fingerprint", "append_eod"):
        Path(f"{other}.json").write_text(json.dumps(record | {what: "other"}))
        assert f"do not belong together: {what} is" in message(one, other)
    Path(f"{other}.json").write_text("{")
    assert "b_text_document.json, the record of the tokenizer, cannot be read" in message(one, other)


def test_an_interrupted_merge_leaves_nothing(preprocess, merge, tmp_path, monkeypatch, capfd) -> None:
    from megatron_hc.data import parts

    one, other = written(preprocess, tmp_path, "a", "x\n"), written(preprocess, tmp_path, "b", "y\n")

    def interrupted(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(parts, "write_index", interrupted)
    before = sorted(os.listdir(tmp_path))
    assert merge.main(["--input", one, other, "--output-prefix", str(tmp_path / "m")]) == 130
    assert sorted(os.listdir(tmp_path)) == before and "interrupted, nothing was written" in capfd.readouterr().err


# --- inspect ------------------------------------------------------------------------------------------------------


def test_what_is_in_a_dataset(preprocess, inspect, tmp_path, capfd) -> None:
    prefix = written(preprocess, tmp_path, "a", "x\nfour\n\n" + "long" * 200 + "\n")
    capfd.readouterr()
    assert inspect.main([prefix, "--documents", "3"]) == 0
    lines = capfd.readouterr().out.splitlines()
    assert lines[0] == f"{prefix}: 3 documents, 3 sequences, 808 tokens (uint16, 0.0 MiB)"
    assert "mean 269.3, shortest 2, " in lines[1] and "half up to 5" in lines[1] and "longest 801" in lines[1]
    assert "ByteTokenizer, 257 tokens" in lines[3] and "with end-of-document; 0 bad" in lines[4]
    assert lines[5] == "  ids: 102 .. 256, 9 of 257 in use"
    assert lines[6:8] == ["  document 0 (2 tokens): 'x'", "  document 1 (5 tokens): 'four'"]
    assert lines[8].startswith("  document 2 (801 tokens): 'longlong") and lines[8].endswith(" ...")


@pytest.mark.parametrize("error, code", [(KeyboardInterrupt, 130), (BrokenPipeError, 1)])
def test_a_look_that_is_ended_early(error, code, inspect, tmp_path, monkeypatch, capfd) -> None:
    """Ctrl-C, and ``| head``: no traceback."""

    def ended(*arguments: object) -> None:
        raise error

    prefix = write_corpus(tmp_path / "c", [5])
    monkeypatch.setattr(inspect, "show_documents", ended)
    kept = os.dup(1)
    try:
        assert code_of(inspect, [prefix]) == code
    finally:
        os.dup2(kept, 1)
        os.close(kept)
    assert "Traceback" not in capfd.readouterr().err
    assert code_of(inspect, [prefix, "--documents", "-1"]) == 2
    assert "--documents must not be negative, not -1" in capfd.readouterr().err


def test_a_dataset_without_a_record(inspect, tmp_path, capfd) -> None:
    prefix = write_corpus(tmp_path / "c", [5, 0, 7])
    assert inspect.main([prefix]) == 0
    out = capfd.readouterr().out
    assert "no record of its tokenizer" in out and "empty documents: 1" in out and "(5 tokens): ids " in out
    assert code_of(inspect, [prefix, "--train-samples", "3"]) == 2
    assert "its tokenizer is not known: give --tokenizer-type" in capfd.readouterr().err
    with IndexedDatasetWriter(str(tmp_path / "none")):
        pass
    assert inspect.main([str(tmp_path / "none")]) == 0
    assert "0 documents, 0 sequences, 0 tokens" in capfd.readouterr().out


def test_the_sentencepiece_model_is_found_again(preprocess, inspect, tmp_path, capfd) -> None:
    (tmp_path / "c.txt").write_text("some words\n" * 40 + "".join(map(chr, range(33, 127))))
    train = load_tool("train_tokenizer")
    flags = ["--input", str(tmp_path / "c.txt"), "--output-prefix", str(tmp_path / "t"), "--vocab-size", "370"]
    assert train.main(flags) == 0
    flags = ["--input", str(tmp_path / "c.txt"), "--output-prefix", str(tmp_path / "out")]
    flags += ["--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", str(tmp_path / "t.model")]
    assert preprocess.main(flags) == 0
    capfd.readouterr()
    assert inspect.main([str(tmp_path / "out_text_document")]) == 0
    assert "'some words'" in capfd.readouterr().out
    os.rename(tmp_path / "t.model", tmp_path / "moved.model")
    assert inspect.main([str(tmp_path / "out_text_document")]) == 0
    assert "(3 tokens): ids" in re.sub(r"\(\d+ tokens", "(3 tokens", capfd.readouterr().out)
    assert inspect.main([str(tmp_path / "out_text_document"), "--tokenizer-model", str(tmp_path / "moved.model")]) == 0
    assert "'some words'" in capfd.readouterr().out
    assert code_of(inspect, [str(tmp_path / "out_text_document"), "--tokenizer-type", "ByteTokenizer"]) == 2
    assert "was written with another tokenizer" in capfd.readouterr().err


def test_blend_as_it_will_be_drawn(inspect, tmp_path, capfd) -> None:
    prefixes = [write_corpus(tmp_path / str(i), [300] * 10, seed=i) for i in range(2)]
    for prefix in prefixes:
        write_record(prefix, ByteTokenizer())
    flags = ["3", prefixes[0], "1", prefixes[1], "--train-samples", "400", "--seq-length", "16", "--split", "10,0,0"]
    before = sorted(os.listdir(tmp_path))
    assert inspect.main(flags) == 0
    out = capfd.readouterr().out
    assert sorted(os.listdir(tmp_path)) == before  # nothing is written
    blend = (prefixes, [3.0, 1.0])
    theirs, _, _ = megatron_datasets((400, 0, 0), 16, 1234, cache=None, split="10,0,0", blend=blend)
    drawn = np.bincount(theirs.dataset_index[:400]).tolist()
    for prefix, count, weight in zip(prefixes, drawn, ("0.7500", "0.2500"), strict=True):
        line = next(line for line in out.splitlines() if line.startswith(f"  {prefix}: weight"))
        assert f"weight {weight}, {count} samples = {count / 400:.4f} of all" in line
        assert f"{count * 16 / 3000:.3f} epochs" in line


def test_inspect_refuses(inspect, tmp_path, capfd) -> None:
    assert code_of(inspect, [str(tmp_path / "nowhere")]) == 2
    assert "nowhere.idx does not exist" in capfd.readouterr().err
    prefix = write_corpus(tmp_path / "c", [5])
    (tmp_path / "c.json").write_text("{")
    assert code_of(inspect, [prefix]) == 2
    assert "c.json cannot be read" in capfd.readouterr().err


# --- prepare_cache ------------------------------------------------------------------------------------------------


def test_prepared_caches_are_those_of_the_run(prepare, tmp_path, capfd, monkeypatch) -> None:
    prefix = write_corpus(tmp_path / "c", [300] * 50)
    flags = f"--num-layers 1 --hidden-size 8 --num-attention-heads 1 --seq-length 16 --max-position-embeddings 16 \
        --micro-batch-size 2 --train-iters 5 --eval-interval 5 --eval-iters 2 --lr 1e-3 --data-path {prefix} \
        --split 80,10,10 --tokenizer-type ByteTokenizer --data-cache-path {tmp_path / 'cache'}".split()
    assert prepare.main([*flags, "--world-size", "4"]) == 0
    out = capfd.readouterr().out
    assert "(40 will be drawn)" in out and "(32 will be drawn)" in out and str(tmp_path / "cache") in out
    files = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "cache").iterdir()}
    assert len(files) == 12
    config = train_config(16, data_path=(prefix,), split="80,10,10", data_cache_path=str(tmp_path / "cache"))
    build_datasets(config, ByteTokenizer(), (40, 32, 16))
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "cache").iterdir()} == files


def test_prepare_takes_the_arguments_of_a_checkpoint(prepare, tmp_path, capfd) -> None:
    prefix = write_corpus(tmp_path / "c", [300] * 50)
    flags = f"--load {tmp_path / 'run'} --micro-batch-size 2 --train-iters 5 --eval-iters 0 --lr 1e-3 \
        --data-path {prefix}".split()
    model = "--num-layers 1 --hidden-size 8 --num-attention-heads 1 --seq-length 16 --tokenizer-type ByteTokenizer"
    saved = parse([*flags, *model.split()])
    checkpoint.save(tmp_path / "run", 0, {}, {}, dump(saved.config, saved.origins), mesh=Mesh())
    with pytest.raises(SystemExit):
        prepare.main(flags)
    assert "--num-layers, --hidden-size" in capfd.readouterr().err
    assert prepare.main([*flags, "--use-checkpoint-args"]) == 0
    assert "(10 will be drawn)" in capfd.readouterr().out


def test_the_folders_of_prefixes_in_a_file_are_named(prepare, tmp_path, capfd) -> None:
    prefix = write_corpus(tmp_path / "c", [300] * 50)
    (tmp_path / "list.txt").write_text(f"1.0 {prefix}\n")
    flags = f"--num-layers 1 --hidden-size 8 --num-attention-heads 1 --seq-length 16 --max-position-embeddings 16 \
        --micro-batch-size 2 --train-iters 5 --eval-iters 0 --lr 1e-3 --data-args-path {tmp_path / 'list.txt'} \
        --split 80,10,10 --tokenizer-type ByteTokenizer".split()
    assert prepare.main(flags) == 0
    assert f"caches in {Path(prefix).parent / 'cache' / 'GPTDataset_indices'}, " in capfd.readouterr().out


def test_prepare_refuses_what_the_run_would(prepare, tmp_path, capfd) -> None:
    flags = "--num-layers 1 --hidden-size 8 --num-attention-heads 1 --seq-length 16 --max-position-embeddings 16 \
        --micro-batch-size 2 --train-iters 5 --lr 1e-3 --tokenizer-type ByteTokenizer".split()
    for more, message in (
        (["--mock-data"], "--mock-data has no files"),
        (["--data-path", "/nowhere"], "/nowhere.idx does not exist"),
        (["--data-path", "/nowhere", "--world-size", "0"], "--world-size must be positive"),
        (["--data-path", "x", "--no-such-flag"], "no-such-flag"),
    ):
        with pytest.raises(SystemExit) as caught:
            prepare.main([*flags, *more])
        assert caught.value.code == 2 and message in capfd.readouterr().err


def test_index_file_is_checked_in_both(merge, tmp_path, capfd) -> None:
    prefix = write_corpus(tmp_path / "c", [5])
    Path(f"{prefix}.bin").write_bytes(b"xx")
    assert merge.main(["--input", prefix, "--output-prefix", str(tmp_path / "m")]) == 2
    assert "does not match its index" in capfd.readouterr().err
    with pytest.raises(ValueError):
        IndexedDataset(prefix)
    assert not texts_of(write_corpus(tmp_path / "d", []))
