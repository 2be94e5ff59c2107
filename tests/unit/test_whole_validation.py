"""Whole validations: every token once, and a standard error that is the spread of repeated draws."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import VOCAB, build, randomise, small_config

from megatron_hc.cli import parse
from megatron_hc.config import DataConfig, EvaluationConfig, TrainConfig, TrainingConfig
from megatron_hc.data import IndexedDatasetWriter, NullTokenizer, build_whole_validation
from megatron_hc.data.dataset import SampleFormat, WholeDataset
from megatron_hc.data.indexed import IndexedDataset
from megatron_hc.evaluation import Sums, flat_scores, lines_of, whole_losses
from megatron_hc.mesh import Mesh
from megatron_hc.parallel.pipeline import Pipeline

TOKENIZER = NullTokenizer(VOCAB - 1)
S = 8


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Seven documents of 1 to 20 tokens."""
    numbers, found = np.random.default_rng(0), str(tmp_path_factory.mktemp("data") / "text")
    with IndexedDatasetWriter(found, "uint16") as writer:
        for length in (5, 20, 1, 11, 7, 3, 9):
            writer.add_document([*numbers.integers(0, VOCAB - 1, length), TOKENIZER.eod])
    return found


@pytest.mark.parametrize("bounds", [(0, 7), (2, 5), (6, 7), (2, 3)])
def test_every_token_once_and_in_order(prefix: str, bounds: tuple[int, int]) -> None:
    indexed = IndexedDataset(prefix)
    text = np.concatenate([indexed[index] for index in range(*bounds)]).astype(np.int64)
    dataset = WholeDataset(indexed, bounds, SampleFormat.of(TOKENIZER, S))
    samples = [dataset[index] for index in range(len(dataset))]
    assert len(samples) == math.ceil((len(text) - 1) / S)
    read = np.concatenate([sample.tokens[sample.loss_mask > 0] for sample in samples])
    predicted = np.concatenate([sample.labels[sample.loss_mask > 0] for sample in samples])
    assert (read == text[:-1]).all() and (predicted == text[1:]).all() and len(predicted) == len(text) - 1
    assert all(sample.loss_mask.all() for sample in samples[:-1])


def test_a_token_outside_the_vocabulary_is_named(prefix: str) -> None:
    """Also where the look at the start has not come by."""
    dataset = WholeDataset(IndexedDataset(prefix), (0, 7), SampleFormat(seq_length=S, vocab_size=5, eod=4))
    with pytest.raises(ValueError, match=r"text\.bin holds the token id \d+, but the tokenizer has only 5 tokens"):
        dataset[1]


@pytest.mark.parametrize("are_apart", [False, True])
def test_the_loss_is_that_of_the_tokens(prefix: str, are_apart: bool) -> None:
    """Micro-batches of 3 over 8 samples: the last one is filled up. Documents see each other, or each is alone."""
    config = small_config(position_embedding_type="learned_absolute")
    model = randomise(build(config)).eval()
    resets = {"reset_position_ids": are_apart, "reset_attention_mask": are_apart}
    training = TrainingConfig(fp64=True, micro_batch_size=3)
    run = TrainConfig(model=config, training=training, data=DataConfig(mock_data=True, **resets))
    form = SampleFormat.of(TOKENIZER, S, eod_mask_loss=True, **resets)
    dataset = WholeDataset(IndexedDataset(prefix), (0, 7), form)
    assert len(dataset) % 3
    losses, counts = [], []
    for index in range(len(dataset)):
        sample = dataset[index]
        ends = np.flatnonzero(sample.tokens == TOKENIZER.eod) + 1
        documents = [part for part in np.split(sample.tokens, ends if are_apart else []) if len(part)]
        logits = torch.cat([model.output.logits(model(torch.from_numpy(part)[None]))[:, 0] for part in documents])
        each = torch.nn.functional.cross_entropy(logits, torch.from_numpy(sample.labels), reduction="none")
        losses.append(float((each * torch.from_numpy(sample.loss_mask)).sum()))
        counts.append(float(sample.loss_mask.sum()))
    found = whole_losses({"a": dataset}, Pipeline(model, run, Mesh()), run, Mesh())["a"].mean()
    mean = sum(losses) / sum(counts)
    deviations = [loss - mean * count for loss, count in zip(losses, counts, strict=True)]
    k = len(losses)
    error = math.sqrt(k / (k - 1) * sum(d * d for d in deviations)) / sum(counts)
    assert found.loss == pytest.approx(mean, rel=1e-12) and found.standard_error == pytest.approx(error, rel=1e-9)
    assert found.num_tokens == sum(counts)


def test_the_standard_error_is_the_spread_of_repeated_draws() -> None:
    """400 files of 200 samples whose tokens share a part of their loss: within 10 % (4 standard deviations)."""
    generator = torch.Generator().manual_seed(0)
    means, errors = [], []
    for _ in range(400):
        counts = torch.randint(1, 30, (200,), generator=generator).double()
        shared = torch.randn(200, generator=generator, dtype=torch.float64)
        own = torch.randn(200, generator=generator, dtype=torch.float64) * counts.sqrt()
        mean = Sums.of(3 * counts + shared * counts + own, counts).mean()
        means.append(mean.loss)
        errors.append(mean.standard_error)
    spread = float(torch.tensor(means).std())
    assert np.mean(errors) == pytest.approx(spread, rel=0.15)


def test_one_sample_has_no_standard_error() -> None:
    mean = Sums.of(torch.tensor([6.0, 0.0]), torch.tensor([3.0, 0.0])).mean()
    assert mean.loss == 2 and mean.standard_error is None and mean.num_tokens == 3


def test_data_without_a_loss_has_no_mean() -> None:
    mean = Sums.of(torch.zeros(2), torch.zeros(2)).mean()
    assert math.isnan(mean.loss) and mean.standard_error is None and mean.num_tokens == 0
    assert lines_of({"masked": mean}) == ["  masked | loss nan | perplexity nan | tokens 0"]


def test_sources(prefix: str, tmp_path: Path) -> None:
    flags = f"""--num-layers 2 --hidden-size 16 --num-attention-heads 4 --seq-length {S} --micro-batch-size 1 --lr 1
        --train-iters 1 --tokenizer-type NullTokenizer --vocab-size {VOCAB - 1} --full-validation"""

    def sources(more: str) -> dict[str, int]:
        config = parse(f"{flags} {more}".split()).config
        return {name: len(dataset) for name, dataset in build_whole_validation(config, TOKENIZER, 5).items()}

    assert sources(f"--train-data-path {prefix} --valid-data-path 1 {prefix} 2 {prefix}") == {"text": 8}
    assert sources(f"--data-path {prefix} --split 50,50,0") == {"text": 3}
    assert sources("--mock-data") == {"mock": 5}
    with pytest.raises(ValueError, match="--full-validation: there is no validation data"):
        sources(f"--data-path {prefix} --split 100,0,0")


def test_scores_by_name() -> None:
    results = {"a": {"alias": "a", "acc,none": 0.5, "acc_stderr,none": "N/A", "em,strict": 1}}
    assert flat_scores(results) == {"a/acc": 0.5, "a/em/strict": 1.0}


def test_options_of_tasks_reach_the_harness(monkeypatch: pytest.MonkeyPatch) -> None:
    """And it draws nothing from the run's random generators."""
    lm_eval = pytest.importorskip("lm_eval")
    from megatron_hc.evaluation import Tasks
    from megatron_hc.inference.harness import register

    given: dict[str, Any] = {}
    monkeypatch.setattr(lm_eval, "simple_evaluate", lambda **options: given.update(options))
    tasks, config = Tasks.__new__(Tasks), small_config()
    tasks.model_class, tasks.manager = register(), "manager"
    tasks.options = EvaluationConfig(
        eval_harness_tasks=("a", "b"), eval_harness_num_fewshot=2, eval_harness_limit=3, eval_harness_batch_size=5
    )
    assert tasks.scores(build(config), TrainConfig(model=config), Mesh(), TOKENIZER) == {}
    assert given.pop("model").batch_size == 5
    expected = {"tasks": ["a", "b"], "num_fewshot": 2, "limit": 3, "task_manager": "manager"}
    seeds = dict.fromkeys(("random_seed", "numpy_random_seed", "torch_random_seed"))
    assert {name: given[name] for name in (*expected, *seeds)} == expected | seeds


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--eval-harness-interval 5", "--eval-harness-interval needs --eval-harness-tasks"),
        ("--eval-harness-limit 0 --eval-harness-tasks x", "--eval-harness-limit must be positive"),
        ("--full-validation --eval-interval 0", "--full-validation needs an --eval-interval above 0"),
    ],
)
def test_what_is_refused(flags: str, message: str) -> None:
    config = parse(
        f"""--num-layers 2 --hidden-size 16 --num-attention-heads 4 --seq-length 8 --micro-batch-size 1 --lr 1
        --train-iters 1 --mock-data --tokenizer-type ByteTokenizer {flags}""".split()
    ).config
    with pytest.raises(ValueError, match=message):
        config.validate()


def test_a_task_that_does_not_exist() -> None:
    pytest.importorskip("lm_eval")
    from megatron_hc.evaluation import Tasks

    folder = Path(__file__).parents[2] / "examples" / "eval"
    flags = f"--eval-harness-tasks nothing --eval-harness-include-path {folder}"
    config = parse(
        f"""--num-layers 2 --hidden-size 16 --num-attention-heads 4 --seq-length 8 --micro-batch-size 1 --lr 1
        --train-iters 1 --mock-data --tokenizer-type ByteTokenizer {flags}""".split()
    ).config
    with pytest.raises(ValueError, match="lm-evaluation-harness has no task nothing"):
        Tasks(config, Mesh())
