"""Parts of a step and of a validation, each with numbers of its own."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_hc import train
from megatron_hc.cli import parse
from megatron_hc.data import Batch
from megatron_hc.mesh import Mesh

FLAGS = """--num-layers 2 --hidden-size 16 --num-attention-heads 2 --seq-length 8 --position-embedding-type rope --fp64
    --tokenizer-type ByteTokenizer --mock-data --micro-batch-size 2 --global-batch-size 4 --lr 1e-2 --train-iters 20
    --init-method-std 0.3 --device cpu"""


def set_up(*flags: str) -> train.Run:
    return train.set_up(parse([*FLAGS.split(), *flags]), Mesh())


def batch_of(*masks: list[float]) -> Batch:
    mask = torch.tensor(masks, dtype=torch.float32)
    tokens = torch.arange(mask.numel()).view_as(mask)
    return Batch(tokens, tokens + 1, mask, tokens + 2, tokens + 3)


BATCHES = [
    batch_of([1, 1, 1, 0], [1, 0, 0, 0]),
    batch_of([0, 0, 0, 0], [0, 0, 0, 0]),
    batch_of([1, 1, 1, 1], [1, 1, 1, 1]),
]
"""4, 0 and 8 tokens that count."""


@pytest.mark.parametrize(
    ("flags", "shares"),
    [((), [1 / 4 / 3, 0, 1 / 8 / 3]), (("--calculate-per-token-loss",), [1 / 12, 0, 1 / 12])],
    ids=["mean of means", "per token"],
)
def test_every_token_has_its_share_of_the_loss(flags: tuple[str, ...], shares: list[float]) -> None:
    config = parse([*FLAGS.split(), *flags]).config
    for batch, share, found in zip(BATCHES, shares, train.weighted(BATCHES, config, Mesh()), strict=True):
        torch.testing.assert_close(found.weights, batch.loss_mask * share)
        assert found.tokens is batch.tokens and found.labels is batch.labels and found.position_ids is None
        assert found.document_ids is batch.document_ids


def test_positions_are_handed_on_where_documents_begin_anew() -> None:
    config = parse([*FLAGS.split(), "--reset-position-ids"]).config
    found = train.weighted(BATCHES, config, Mesh())
    assert all(one.position_ids is batch.position_ids for batch, one in zip(BATCHES, found, strict=True))


@pytest.mark.parametrize("calculate", [[], ["--calculate-per-token-loss"]])
def test_a_batch_without_a_token_that_counts_has_a_loss_of_0(calculate: list[str]) -> None:
    found = train.weighted(BATCHES[1:2], parse([*FLAGS.split(), *calculate]).config, Mesh())
    assert not found[0].weights.any()


def test_samples_of_each_micro_batch_are_left_out_by_their_own_numbers() -> None:
    run = set_up("--stochastic-depth", "0.5", "--seed", "7")
    run.progress.iteration = 3
    micro_batches = train.weighted(BATCHES, run.config, run.mesh)
    found = train.leave_out(micro_batches, run, [20, 21, 22, 23, 24, 25])
    for batch, samples in zip(found, ([20, 21], [22, 23], [24, 25]), strict=True):
        expected = train.branch_factors(run.config.model, 7, 3, samples)
        assert batch.branch_factors is not None and expected is not None and batch.branch_factors.equal(expected)


def reference_loss(run: train.Run, indices: list[int]) -> float:
    """Mean cross entropy of samples of the validation data, without dropout."""
    dataset = run.datasets[1]
    assert dataset is not None
    samples = [dataset[index] for index in indices]
    tokens, labels = (torch.stack([torch.from_numpy(sample[part]) for sample in samples]) for part in (0, 1))
    with torch.no_grad():
        logits: Tensor = run.model.eval().output.logits(run.model(tokens))
    run.model.train()
    return float(F.cross_entropy(logits.flatten(0, 1), labels.t().flatten()))


@pytest.mark.parametrize(("iteration", "first"), [(3, 0), (6, 8), (7, 16)], ids=["first", "second", "at the end"])
def test_a_validation_reads_the_samples_after_those_of_the_one_before(iteration: int, first: int) -> None:
    """2 batches of the largest size, 4, however small training's are; the mean of all of them, without dropout."""
    growing = ["--rampup-batch-size", "2", "2", "40", "--train-samples", "80", "--lr-decay-samples", "80"]
    flags = [flag for flag in FLAGS.split() if flag not in ("--train-iters", "20")]
    evaluations = ["--eval-interval", "3", "--eval-iters", "2", "--hidden-dropout", "0.5"]
    run = train.set_up(parse([*flags, *growing, *evaluations]), Mesh())
    run.progress.iteration, run.progress.consumed_samples = iteration, 2 * iteration
    expected = reference_loss(run, [*range(first, first + 8)])
    assert train.evaluate(run, "validation") == pytest.approx(expected, rel=1e-12)
