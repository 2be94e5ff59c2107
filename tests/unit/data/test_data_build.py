"""Data flags to datasets: what is refused, and the cache of indices."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from data_corpus import train_config, write_corpus

from megatron_hc.data import (
    ByteTokenizer,
    GPTDataset,
    IndexedDataset,
    IndexedDatasetWriter,
    MockDataset,
    NullTokenizer,
    SampleFormat,
    build_datasets,
    build_whole_validation,
    check_record,
    write_record,
)
from megatron_hc.data import dataset as dataset_module
from megatron_hc.data.build import parse_blend, split_ranges
from megatron_hc.data.dataset import scan_token_ids

BYTES = ByteTokenizer()


def refused(message: str, sizes: tuple[int, int, int] = (5, 5, 5), **flags: object) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        build_datasets(train_config(16, **flags), BYTES, sizes)
    assert "\n" not in str(caught.value)


@pytest.fixture
def prefix(tmp_path: Path) -> str:
    return write_corpus(tmp_path / "d", [40] * 30)


def test_part_shorter_than_a_sample_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    prefix = write_corpus(tmp_path / "d", [40] * 10 + [16])
    before = sorted(os.listdir(tmp_path))
    message = (
        r"the valid part \(1 of 11 sequences, 16 tokens\) is shorter than one sample of --seq-length \+ 1 = 17 tokens"
    )
    refused(message, (5, 5, 0), data_path=(prefix,), split="10,1,0")
    refused(r"the valid part \(0 of 11 sequences, 0 tokens\)", (5, 5, 0), data_path=(prefix,), split="999,1,0")
    refused(r"the train part .*, 16 tokens", (5, 0, 0), train_data_path=(write_corpus(tmp_path / "s", [16]),))
    assert sorted(os.listdir(tmp_path)) == sorted([*before, "s.bin", "s.idx"])
    build_datasets(train_config(16, data_path=(prefix,), split="999,1,0"), BYTES, (5, 0, 0))


def test_split_of_share_zero_and_size_zero_are_none(prefix: str) -> None:
    train, valid, test = build_datasets(train_config(16, data_path=(prefix,), split="8,0,2"), BYTES, (5, 5, 0))
    assert train is not None and valid is None and test is None


@pytest.mark.parametrize("split", ["99, 1,0", "'99,1,0'", '"99/1/0"', " 99 1\n"])
def test_a_split_as_launch_scripts_write_it(split: str) -> None:
    assert split_ranges(split) == [(0.0, 0.99), (0.99, 1.0), None]


@pytest.mark.parametrize("split", ["'", "", "a,b", "1,2,3,4", "0,0,0", "-1,2", "nan,1", "1,,1"])
def test_bad_split(prefix: str, split: str) -> None:
    with pytest.raises(ValueError, match=r"--split \(.*\) must be one to three shares"):
        split_ranges(split)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (["1", "a", "b", "c"], "gives weights to some datasets only"),
        (["-1", "a"], "the weight -1.0 must be a positive number"),
        (["0", "a"], "must be a positive number"),
        (["nan", "a"], "must be a positive number"),
        (["1e308", "a", "1e308", "b"], "have no finite sum"),
        ([], "names no dataset"),
    ],
)
def test_bad_blend(values: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_blend(values, "--data-path")


def test_blend_spellings() -> None:
    assert parse_blend(["a"], "") == (["a"], None)
    assert parse_blend(["a", "b"], "") == (["a", "b"], None)
    assert parse_blend(["3", "a", ".5", "b "], "") == (["a", "b"], [3.0, 0.5])


@pytest.mark.parametrize("samples", [10**15, 10**20])
def test_a_run_whose_order_no_memory_holds_is_refused(prefix: str, samples: int) -> None:
    message = f"{prefix}: the order of {samples} train samples does not fit in memory"
    refused(message, (samples, 0, 0), train_data_path=(prefix,))


def test_missing_files_are_refused(tmp_path: Path) -> None:
    refused(r"nothing\.idx does not exist", data_path=(str(tmp_path / "nothing"),))
    refused("--data-args-path .*nothing cannot be read", data_args_path=str(tmp_path / "nothing"))


def test_run_longer_than_unweighted_data_is_refused(tmp_path: Path) -> None:
    prefixes = tuple(write_corpus(tmp_path / f"d{i}", [40] * 5) for i in range(2))
    refused("hold 24 training samples in one epoch, but the run needs 25", (25, 0, 0), train_data_path=prefixes)


def test_token_outside_the_vocabulary_is_refused_at_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prefix = write_corpus(tmp_path / "d", [40] * 30)
    config = train_config(16, data_path=(prefix,))
    with pytest.raises(ValueError, match=r"d\.bin holds the token id 256, but the tokenizer has only 101 tokens"):
        build_datasets(config, NullTokenizer(100), (5, 0, 0))
    assert not (tmp_path / "cache").exists()
    # A file larger than what is scanned: the end of it still is, and the rest is checked sample by sample.
    monkeypatch.setattr(dataset_module, "SCANNED_TOKENS", 640)
    with IndexedDatasetWriter(str(tmp_path / "e"), np.uint16) as writer:
        writer.add_document([1] * 1999 + [256])
    for indexed in (IndexedDataset(prefix), IndexedDataset(str(tmp_path / "e"))):
        with pytest.raises(ValueError, match="holds the token id 256"):
            scan_token_ids(indexed, SampleFormat(seq_length=16, vocab_size=256, eod=0))


def test_negative_token_is_refused(tmp_path: Path) -> None:
    prefix = write_corpus(tmp_path / "d", [40] * 5, dtype=np.int32)
    with open(prefix + ".bin", "r+b") as file:
        file.seek(80)
        file.write(np.int32(-7).tobytes())
    refused("holds the token id -7", data_path=(prefix,))


def test_dataset_of_another_tokenizer_is_refused(prefix: str) -> None:
    write_record(prefix, BYTES, append_eod=True)
    check_record(prefix, BYTES)
    assert json.loads(Path(prefix + ".json").read_text())["append_eod"] is True
    with pytest.raises(ValueError, match=r"written with another tokenizer \(ByteTokenizer, 257 tokens"):
        build_datasets(train_config(16, data_path=(prefix,)), NullTokenizer(256), (5, 0, 0))
    Path(prefix + ".json").write_text("{")
    refused(r"d\.json, the record of the dataset's tokenizer, cannot be read", data_path=(prefix,))


def test_mock_data_needs_no_files() -> None:
    train, valid, test = build_datasets(train_config(16, mock_data=True), BYTES, (5, 3, 0))
    assert isinstance(train, MockDataset) and len(train) == 5
    assert valid is not None and len(valid) == 3 and test is None
    assert (train[0].tokens != valid[0].tokens).any()


def test_mock_data_is_split() -> None:
    """A share of 0 is no data there either, and a split that is none is refused."""
    train, valid, test = build_datasets(train_config(16, mock_data=True, split="9,0,1"), BYTES, (5, 5, 5))
    assert train is not None and valid is None and test is not None
    refused("no training data: give --train-data-path, or a first share", mock_data=True, split="0,1,0")
    refused(r"--split \(most,rest\) must be", mock_data=True, split="most,rest")
    with pytest.raises(ValueError, match="--full-validation: there is no validation data"):
        build_whole_validation(train_config(16, mock_data=True, split="9,0,1"), BYTES, 5)


def test_flags_reach_the_samples(prefix: str) -> None:
    plain, *_ = build_datasets(train_config(16, data_path=(prefix,)), BYTES, (9, 0, 0))
    flags = dict(eod_mask_loss=True, reset_position_ids=True, reset_attention_mask=True)
    changed, *_ = build_datasets(train_config(16, data_path=(prefix,), **flags), BYTES, (9, 0, 0))
    assert plain is not None and changed is not None
    assert all(plain[i].document_ids is None and plain[i].loss_mask.all() for i in range(9))
    assert all(changed[i].document_ids is not None for i in range(9))
    assert any(not changed[i].loss_mask.all() for i in range(9))
    assert any((changed[i].position_ids != plain[i].position_ids).any() for i in range(9))


def cache_files(folder: Path) -> list[str]:
    return sorted(path.name.split("-", 1)[1] for path in folder.iterdir())


def test_cache_lies_beside_the_data_and_is_used(prefix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = train_config(16, data_path=(prefix,), split="1")
    first, *_ = build_datasets(config, BYTES, (50, 0, 0))
    assert isinstance(first, GPTDataset)
    names = ["description.txt", "document_index.npy", "sample_index.npy", "shuffle_index.npy"]
    folder = Path(prefix).parent / "cache" / "GPTDataset_indices"
    assert cache_files(folder) == [f"GPTDataset-train-{name}" for name in names]

    def fail(*args: object) -> None:
        raise AssertionError("built although it is cached")

    with monkeypatch.context() as patch:
        patch.setattr(dataset_module, "build_indices", fail)
        again, *_ = build_datasets(config, BYTES, (50, 0, 0))
    assert isinstance(again, GPTDataset)
    assert all((a == b).all() for a, b in zip(first.indices, again.indices, strict=True))
    # What is damaged is built again; what differs (seed, length, rewritten data) has other names.
    for path in folder.glob("*sample_index.npy"):
        content = path.read_bytes()
        path.unlink()  # `first` still maps the old file
        path.write_bytes(content[:100])
    repaired, *_ = build_datasets(config, BYTES, (50, 0, 0))
    assert isinstance(repaired, GPTDataset) and (repaired.indices.sample == first.indices.sample).all()
    assert len(cache_files(folder)) == 4
    build_datasets(train_config(16, seed=5, data_path=(prefix,), split="1"), BYTES, (50, 0, 0))
    assert len(cache_files(folder)) == 8
    write_corpus(Path(prefix), [39] * 30 + [30])
    build_datasets(config, BYTES, (50, 0, 0))
    assert len(cache_files(folder)) == 12


def test_the_datasets_of_a_blend_prepare_a_surplus(tmp_path: Path) -> None:
    paths = tuple(write_corpus(tmp_path / name, [40] * 30) for name in "ab")
    config = train_config(16, train_data_path=("3", paths[0], "1", paths[1]), mid_level_dataset_surplus=0.5)
    blend, *_ = build_datasets(config, BYTES, (40, 0, 0))
    assert [part.description["num_samples"] for part in blend.datasets] == [45, 15] and len(blend) == 40


def test_every_blend_has_a_cache_of_its_own(tmp_path: Path) -> None:
    """By shares, also those of which the datasets prepare as many samples, by number of samples and by datasets."""
    a, b = (write_corpus(tmp_path / name, [40] * 30) for name in "ab")
    shares = [(("73.75", a, "26.25", b), 40), (("73", a, "27", b), 40), (("73", b, "27", a), 40)]
    blends = [*shares, ((a, b), 10), ((a, b), 12)]
    for number, (paths, samples) in enumerate(blends, 1):
        build_datasets(train_config(16, train_data_path=paths), BYTES, (samples, 0, 0))
        assert len(list((tmp_path / "cache").glob("*/*BlendedDataset-train-description.txt"))) == number


def test_whatever_changes_the_indices_has_a_cache_of_its_own(prefix: str) -> None:
    """Length and number of samples, the part of the file, the order of its documents' lengths."""
    folder = Path(prefix).parent / "cache" / "GPTDataset_indices"
    write_corpus(Path(prefix), [30, 50] * 15)
    for length, split, samples in ((16, "1", 50), (17, "1", 50), (16, "1", 900), (16, "2,1", 50), (16, "1,1,1", 50)):
        before = len(cache_files(folder)) if folder.exists() else 0
        build_datasets(train_config(length, data_path=(prefix,), split=split), BYTES, (samples, 0, 0))
        assert len(cache_files(folder)) == before + 4
    write_corpus(Path(prefix), [50, 30] * 15)
    build_datasets(train_config(16, data_path=(prefix,), split="1"), BYTES, (50, 0, 0))
    assert len(cache_files(folder)) == 24


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("shuffle", lambda values: values + 2**30),
        ("sample", lambda values: values + [[0, 1]] * (np.arange(len(values)) % 2 == 1)[:, None]),
        ("sample", lambda values: values[::-1]),
        ("sample", lambda values: values[:, 0]),
        ("document", lambda values: values + 2**30),
    ],
)
def test_a_damaged_cache_is_refused_where_it_shows(prefix: str, name: str, change: Callable) -> None:
    """Not found at the start, which would read all of it; but no sample of another length reaches the model."""
    config = train_config(16, data_path=(prefix,), split="1")
    build_datasets(config, BYTES, (50, 0, 0))
    (file,) = (Path(prefix).parent / "cache" / "GPTDataset_indices").glob(f"*-{name}_index.npy")
    values = np.load(file)
    np.save(file, np.asarray(change(values)).astype(values.dtype))
    train, *_ = build_datasets(config, BYTES, (50, 0, 0))
    assert train is not None
    with pytest.raises(ValueError, match=r"the index cache in \S+_indices is damaged \(sample \d+ of the train"):
        for index in range(50):
            train[index]


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("dataset_index", lambda values: values + 2),
        ("dataset_index", lambda values: values[:-1]),
        ("dataset_sample_index", lambda values: values + 2**40),
    ],
)
def test_a_damaged_cache_of_a_blend_is_refused(tmp_path: Path, name: str, change: Callable) -> None:
    prefixes = [write_corpus(tmp_path / f"d{i}", [40] * 20) for i in range(2)]
    config = train_config(16, data_path=("1", prefixes[0], "2", prefixes[1]), split="1")
    build_datasets(config, BYTES, (50, 0, 0))
    (file,) = (tmp_path / "cache" / "GPTDataset_indices").glob(f"*BlendedDataset*-{name}.npy")
    values = np.load(file)
    np.save(file, change(values).astype(values.dtype))
    with pytest.raises(ValueError, match=r"the index cache of the train blend in \S+_indices is damaged: delete"):
        train, *_ = build_datasets(config, BYTES, (50, 0, 0))
        assert train is not None
        train[0]


def test_cache_folder_that_cannot_be_written(prefix: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    refused("cannot write the index cache in .*file/c .*--data-cache-path", (5, 0, 0), data_path=(prefix,),
            data_cache_path=str(tmp_path / "file" / "c"))  # fmt: skip


def _build_and_sum(config: object, barrier: object, results: object) -> None:
    barrier.wait(30)  # type: ignore[attr-defined]
    total = 0
    for _ in range(5):
        train, *_ = build_datasets(config, BYTES, (400, 0, 0))  # type: ignore[arg-type]
        assert train is not None
        total += sum(int(train[i].tokens.sum()) for i in range(0, 400, 40))
    results.put(total)  # type: ignore[attr-defined]


def test_processes_that_start_together_build_the_same_cache(tmp_path: Path) -> None:
    prefixes = [write_corpus(tmp_path / f"d{i}", [40] * 200, seed=i) for i in range(2)]
    config = train_config(16, data_path=("1", prefixes[0], "2", prefixes[1]), data_cache_path=str(tmp_path / "c"))
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(6), context.Queue()
    processes = [context.Process(target=_build_and_sum, args=(config, barrier, results)) for _ in range(6)]
    for process in processes:
        process.start()
    totals = [results.get(timeout=60) for _ in processes]
    for process in processes:
        process.join(30)
        assert process.exitcode == 0
    assert len(set(totals)) == 1
    assert len(cache_files(tmp_path / "c")) == 4 + 4 + 3  # two datasets and their blend, no leftovers
    lone = dataclasses.replace(config, data=dataclasses.replace(config.data, data_cache_path=str(tmp_path / "lone")))
    train, *_ = build_datasets(lone, BYTES, (400, 0, 0))
    assert train is not None and totals[0] == 5 * sum(int(train[i].tokens.sum()) for i in range(0, 400, 40))
