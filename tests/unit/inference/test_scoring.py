"""Batched scores are those of each text alone."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import TRAINING, VOCAB, build, random_tokens, randomise, small_config

from megatron_hc.config import TrainConfig
from megatron_hc.data.tokenizer import ByteTokenizer
from megatron_hc.inference import scoring
from megatron_hc.inference.harness import HarnessModel
from megatron_hc.inference.scoring import Item, Scorer, _score
from megatron_hc.mesh import Mesh
from megatron_hc.model.generate import Sampling
from megatron_hc.parallel.pipeline import Pipeline
from megatron_hc.parallel.stages import MicroBatch


def items(number: int = 20, longest: int = 31) -> list[Item]:
    numbers = random.Random(0)
    found = []
    for _ in range(number):
        length = numbers.randrange(2, longest + 1)
        found.append(Item([numbers.randrange(VOCAB - 1) for _ in range(length)], numbers.randrange(1, length)))
    return found


@pytest.mark.parametrize("batch_size", [None, 1, 7])
@pytest.mark.parametrize(
    "change", [{}, {"position_embedding_type": "learned_absolute"}, {"untie_embeddings_and_output_weights": True}]
)
def test_scores(change: dict[str, Any], batch_size: int | None) -> None:
    config = small_config({"residual_connection": "mhc"}, max_position_embeddings=30, **change)
    model = randomise(build(config)).eval()
    wanted = items()
    done: list[int] = []
    scores = Scorer(model, TrainConfig(model=config, training=TRAINING["fp64"]), Mesh(), batch_size)(
        wanted, done.append
    )
    assert sum(done) == len(wanted)
    for item, score in zip(wanted, scores, strict=True):
        logprobs = model.output.logits(model(torch.tensor([item.tokens[:-1]])))[:, 0].log_softmax(-1)
        labels = torch.tensor(item.tokens[1:])
        own = slice(-item.num_scored, None)
        assert abs(score.logprob - float(logprobs.gather(1, labels[:, None])[own].sum())) < 1e-10
        assert score.is_greedy == bool((logprobs.argmax(-1) == labels)[own].all())


def test_a_greedy_continuation_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of texts longer than a batch's tokens, which go one by one."""
    monkeypatch.setattr(scoring, "AUTO_TOKENS", 4)
    config = small_config(max_position_embeddings=30)
    model = randomise(build(config)).eval()
    text = [3, 1, 4]
    for _ in range(5):
        text.append(int(model.output.logits(model(torch.tensor([text])))[-1, 0].argmax()))
    scorer = Scorer(model, TrainConfig(model=config, training=TRAINING["fp64"]), Mesh())
    wrong = [*text[:-1], (text[-1] + 1) % 22]
    assert [score.is_greedy for score in scorer([Item(text, 5), Item(wrong, 5), Item(wrong[:-1], 4)])] == [
        True,
        False,
        True,
    ]


def test_how_many_batches_go_through_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few of each shape: all of them at once would be held in memory."""
    monkeypatch.setattr(scoring, "MAX_IN_FLIGHT", 2)
    config = TrainConfig(model=small_config(max_position_embeddings=30))
    wanted = [Item([1] * length, 1) for length in (9, 9, 9, 9, 9, 9, 17)]
    rounds = Scorer(build(config.model), config, Mesh(), 1)._rounds(wanted, [6, *range(6)])
    assert [(shape.S, len(parts)) for shape, parts in rounds] == [(16, 1), (8, 2), (8, 2), (8, 2)]


def test_what_the_harness_asks_to_be_written() -> None:
    """A stop text that is empty stops nothing; a prompt keeps one token at least."""
    pytest.importorskip("lm_eval")
    config = TrainConfig(model=small_config(max_position_embeddings=30))
    model = HarnessModel.of(build(config.model), config, Mesh(), ByteTokenizer())
    options = {"until": ["", "x"], "max_gen_toks": 29, "do_sample": True, "temperature": 0.5, "top_p": 0.25}
    found = model._request(3, "ab", options)
    assert (found.prompt, found.stop, found.max_new_tokens) == ((98,), ("x",), 29)
    assert found.sampling == Sampling(temperature=0.5, top_p=0.25, seed=1237)
    assert model._request(0, "", options).prompt == (256,)
    assert model._request(0, "a", {**options, "do_sample": False}).sampling.temperature == 0
    with pytest.raises(ValueError, match=r"max_gen_toks \(30\) must be less than the model's 30 tokens"):
        model._request(0, "ab", {**options, "max_gen_toks": 30})


def test_the_longest_continuation_of_the_harness() -> None:
    """As long as what the model sees; one token more would leave no place for a context."""
    pytest.importorskip("lm_eval")
    config = TrainConfig(model=small_config(max_position_embeddings=8), training=TRAINING["fp64"])
    model = HarnessModel.of(build(config.model).eval(), config, Mesh(), ByteTokenizer())
    ((logprob, _),) = model._loglikelihood_tokens([(None, [1, 2], [3] * 8)], disable_tqdm=True)
    (score,) = Scorer(model.model, config, Mesh())([Item([2, *[3] * 8], 8)])
    assert logprob == score.logprob < 0
    assert model._loglikelihood_tokens([(None, [1], [])], disable_tqdm=True) == [(0.0, True)]
    with pytest.raises(ValueError, match="a continuation of 9 tokens is longer than the 8"):
        model._loglikelihood_tokens([(None, [1], [3] * 9)], disable_tqdm=True)


def test_what_is_measured_stays_in_float64() -> None:
    """Also of a model in fp32: sums over thousands of tokens come from the last stage as they are."""
    config, tokens = small_config(), random_tokens()
    pipeline = Pipeline(build(config, "fp32"), TrainConfig(model=config), Mesh())
    third = torch.tensor([1 / 3], dtype=torch.float64)
    found = pipeline.measure([MicroBatch(tokens, tokens, torch.ones(tokens.shape))], lambda *_: third, (1,))
    assert found.tolist() == [[1 / 3]]
    losses = torch.full((1, 5000), 0.1)
    model: Any = SimpleNamespace(output=SimpleNamespace(scores=lambda *_: (losses, losses > 0)))
    total, wrong = _score(model, torch.empty(0), MicroBatch(*[torch.empty(0)] * 3))
    assert float(total) == float(losses.double().sum()) and float(wrong) == 0


def test_texts_can_be_cut_evenly() -> None:
    """Over the processes of a context, and with sequence parallelism those of a tensor."""
    config, sizes = TrainConfig(model=small_config()), {"cp": 3, "tp": 5, "pp": 1}
    for is_cut, multiple in ((False, 24), (True, 120)):
        mesh: Any = SimpleNamespace(size=sizes.__getitem__, sequence_parallel=is_cut)
        assert Scorer(build(config.model), config, mesh).multiple == multiple
