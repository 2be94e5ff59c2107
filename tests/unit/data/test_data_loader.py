"""The loader's order, workers, resuming and errors; the generated data."""

from __future__ import annotations

import atexit
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from data_corpus import ENVIRONMENT, gone, write_corpus
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_hc.data import ByteTokenizer, GPTDataset, IndexedDataset, MockDataset, SampleFormat, build_loader
from megatron_hc.data.loader import Batch, SequentialOrder
from megatron_hc.mesh import Mesh

FORMAT = SampleFormat.of(ByteTokenizer(), 8, eod_mask_loss=True, reset_position_ids=True, reset_attention_mask=True)


def mesh_of(rank: int, size: int) -> Mesh:
    return Mesh(sizes={"pp": 1, "dp": size, "cp": 1, "tp": 1}, ranks={"pp": 0, "dp": rank, "cp": 0, "tp": 0})


@pytest.fixture
def dataset(tmp_path: Path) -> GPTDataset:
    indexed = IndexedDataset(write_corpus(tmp_path / "d", [7, 30, 12, 55] * 10))
    return GPTDataset(indexed, (0, len(indexed)), 60, 1, "train", FORMAT)


def equal(one: Batch, other: Batch) -> bool:
    return all(a is b is None or (a.dtype == b.dtype and torch.equal(a, b)) for a, b in zip(one, other, strict=True))


def test_batches_are_the_samples_in_order(dataset: GPTDataset) -> None:
    loader = build_loader(dataset, Mesh(), micro_batch_size=2)
    first, second = loader.next(2)
    assert loader.last_samples == [0, 1, 2, 3]
    assert [part.dtype for part in first] == [torch.int64, torch.int64, torch.float32, torch.int64, torch.int64]
    assert all(part.shape == (2, 8) for part in first)
    for i, (batch, row) in enumerate([(first, 0), (first, 1), (second, 0), (second, 1)]):
        for part, expected in zip(batch, dataset[i], strict=True):
            assert part[row].tolist() == expected.tolist()
    assert loader.next(1)[0].tokens[0].tolist() == dataset[4].tokens.tolist() and loader.last_samples == [4, 5]


@settings(max_examples=50, deadline=None)
@given(
    total=st.integers(1, 80),
    consumed=st.integers(0, 80),
    micro=st.integers(1, 5),
    ranks=st.integers(1, 4),
    cyclic=st.booleans(),
)
def test_ranks_share_consecutive_chunks(total: int, consumed: int, micro: int, ranks: int, cyclic: bool) -> None:
    orders = [SequentialOrder(total, consumed, micro, rank, ranks, cyclic) for rank in range(ranks)]
    for step in range(30):
        start = consumed + step * micro * ranks
        joined = [order.samples(step) for order in orders]
        if not cyclic and start + micro * ranks > total:
            assert joined == [None] * ranks
        else:
            expected = [i % total for i in range(start, start + micro * ranks)]
            assert [i for samples in joined for i in samples or ()] == expected


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_workers_and_resuming_change_nothing(dataset: GPTDataset, rank: int) -> None:
    mesh = mesh_of(rank, 3)
    whole = build_loader(dataset, mesh, micro_batch_size=2).next(8)
    workers = build_loader(dataset, mesh, micro_batch_size=2, num_workers=2)
    # A growing number of micro-batches per step, as under a batch-size ramp-up.
    handed_out = [batch for count in (1, 2, 3, 2) for batch in workers.next(count)]
    workers.close()
    assert all(equal(one, other) for one, other in zip(whole, handed_out, strict=True))
    resumed = build_loader(dataset, mesh, micro_batch_size=2, consumed_samples=3 * 6, num_workers=rank).next(5)
    assert all(equal(one, other) for one, other in zip(whole[3:], resumed, strict=True))


def test_cyclic_starts_again(dataset: GPTDataset) -> None:
    count = len(dataset)
    loader = build_loader(dataset, Mesh(), micro_batch_size=2, consumed_samples=count - 1, cyclic=True)
    (batch,) = loader.next(1)
    assert loader.last_samples == [count - 1, 0]
    assert batch.tokens.tolist() == [dataset[count - 1].tokens.tolist(), dataset[0].tokens.tolist()]


def test_a_loader_without_workers_leaves_nothing_behind(dataset: GPTDataset) -> None:
    """Every validation has one of its own: what each left for the process's end would be kept to it."""
    before = atexit._ncallbacks()
    build_loader(dataset, Mesh(), micro_batch_size=2).next(1)
    assert atexit._ncallbacks() == before


@pytest.mark.parametrize("num_workers", [0, 1])
def test_end_of_the_data_is_an_error(dataset: GPTDataset, num_workers: int) -> None:
    loader = build_loader(
        dataset, Mesh(), micro_batch_size=2, consumed_samples=len(dataset) - 3, num_workers=num_workers
    )
    loader.next(1)
    with pytest.raises(
        ValueError, match=f"the data ends after {len(dataset)} samples, .* from sample {len(dataset) - 1} on"
    ):
        loader.next(1)
    loader.close()


@pytest.mark.parametrize("num_workers", [0, 1])
def test_token_outside_the_vocabulary_is_named(tmp_path: Path, num_workers: int) -> None:
    indexed = IndexedDataset(write_corpus(tmp_path / "d", [40] * 4))
    format = SampleFormat(seq_length=8, vocab_size=256, eod=0)
    dataset = GPTDataset(indexed, (0, 4), 4, 1, "train", format)
    loader = build_loader(dataset, Mesh(), micro_batch_size=4, num_workers=num_workers)
    message = r"^\S+d\.bin holds the token id 256, but the tokenizer has only 256 tokens .* \(in samples 0 \.\. 3\)$"
    with pytest.raises(ValueError, match=message):
        loader.next(1)
    loader.close()


SCRIPT = """
    import os, signal, sys, time
    from megatron_hc.data import ByteTokenizer, MockDataset, SampleFormat, build_loader
    from megatron_hc.mesh import Mesh
    dataset = MockDataset(1000, 1, "train", SampleFormat.of(ByteTokenizer(), 8))
    loader = build_loader(dataset, Mesh(), micro_batch_size=2, num_workers=2)
    loader.next(2)
    print(*[worker.pid for worker in loader._iterator._workers], flush=True)
    if sys.argv[1] == "signal":  # what a scheduler does: the training process decides, its workers go on
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        os.killpg(0, signal.SIGTERM)
        time.sleep(0.2)
        loader.next(20)
    if sys.argv[1] == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    print("done", flush=True)
"""


def run_script(what: str) -> tuple[subprocess.CompletedProcess[str], list[int]]:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(SCRIPT), what],
        capture_output=True,
        text=True,
        timeout=50,
        start_new_session=True,
        env=ENVIRONMENT,
    )
    return done, [int(word) for word in done.stdout.splitlines()[0].split()]


@pytest.mark.parametrize("what", ["end", "signal"])
def test_process_ends_with_its_workers(what: str) -> None:
    done, workers = run_script(what)
    assert done.returncode == 0 and done.stdout.endswith("done\n") and done.stderr == ""
    assert all(map(gone, workers))


def test_workers_end_after_sigkill_of_the_process() -> None:
    done, workers = run_script("kill")
    assert done.returncode == -signal.SIGKILL
    deadline = time.monotonic() + 30
    while not all(map(gone, workers)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert all(map(gone, workers))


def test_mock_samples_depend_on_seed_split_and_index_only() -> None:
    dataset = MockDataset(50, 7, "train", FORMAT)
    assert (dataset[3].tokens == MockDataset(9, 7, "train", FORMAT)[3].tokens).all()
    for other in (dataset[4], MockDataset(50, 8, "train", FORMAT)[3], MockDataset(50, 7, "valid", FORMAT)[3]):
        assert (dataset[3].tokens != other.tokens).any()


@pytest.mark.parametrize(("vocab_size", "eod"), [(257, 256), (33, 32), (2, 0), (1000, 1)])
def test_mock_samples_count_up(vocab_size: int, eod: int) -> None:
    dataset = MockDataset(20, 7, "train", SampleFormat(seq_length=64, vocab_size=vocab_size, eod=eod))
    samples = [dataset[i] for i in range(20)]
    tokens = np.stack([sample.tokens for sample in samples])
    assert tokens.min() >= 0 and tokens.max() < vocab_size and (tokens == eod).any()
    assert all((sample.tokens[1:] == sample.labels[:-1]).all() for sample in samples)
    if vocab_size == 257:
        steps = (tokens[:, 1:] - tokens[:, :-1])[(tokens[:, 1:] != eod) & (tokens[:, :-1] != eod)] % 256
        assert set(steps.tolist()) == {1, 2, 3}


def test_no_torch_in_the_data_tools_path() -> None:
    code = "import sys, megatron_hc.data.build; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT).returncode == 0
