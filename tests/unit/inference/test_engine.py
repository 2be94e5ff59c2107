"""Many texts at a time, joining and leaving: each is what the plainest loop over the whole text writes."""

from __future__ import annotations

import random
from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from cases import Case, main_cases
from helpers import VOCAB, build, randomise, small_config

from megatron_hc.config import ModelConfig, MoEConfig, TrainConfig
from megatron_hc.data.tokenizer import ByteTokenizer, NullTokenizer, Tokenizer, build_tokenizer
from megatron_hc.inference import Decoder, Engine, Request, TextWriter
from megatron_hc.inference import engine as engine_module
from megatron_hc.inference import service as service_module
from megatron_hc.inference.engine import Generation, TokenLogprobs
from megatron_hc.inference.service import Events, Failed, Service, Ticket, _update, follow
from megatron_hc.mesh import Mesh
from megatron_hc.model.generate import Sampling, _draw, _uniform, choose, generate, largest
from megatron_hc.model.gpt import GPT

TOKENIZER = NullTokenizer(VOCAB - 1)


def engine_of(config: ModelConfig, rows: int = 3, precision: str = "fp64") -> Engine:
    model = randomise(build(config, precision)).eval()
    return Engine(Decoder(model, TrainConfig(model=config), Mesh(), rows=rows, max_length=40), TOKENIZER)


def requests(number: int = 7, seed: int = 0) -> list[Request]:
    """Prompts of 1 to 12 tokens, greedy and drawn."""
    numbers = random.Random(seed)
    return [
        Request(
            prompt=tuple(numbers.randrange(VOCAB - 1) for _ in range(numbers.randrange(1, 13))),
            max_new_tokens=numbers.randrange(1, 9),
            sampling=Sampling(
                temperature=(0.0, 1.0, 0.7)[index % 3],
                top_k=(0, 0, 5)[index % 3],
                top_p=(1, 1, 0.9)[index % 3],
                seed=index,
            ),
        )
        for index in range(number)
    ]


def plainly(model: GPT, request: Request) -> list[int]:
    """Every token from the whole text."""
    return list(
        generate(*(model, request.prompt, request.max_new_tokens, request.sampling), eod=TOKENIZER.eod, use_cache=False)
    )


def check(engine: Engine, wanted: list[Request]) -> None:
    texts = engine.run(wanted)
    assert [text.tokens for text in texts] == [plainly(engine.decoder.model, request) for request in wanted]
    assert len({tuple(text.tokens) for text in texts}) > len(texts) // 2, "the model repeats itself: a weak test"
    assert set(engine.decoder.caches.lengths) == {0}, "rows are free again"


@main_cases()
def test_every_method(case: Case) -> None:
    check(engine_of(case.config(max_position_embeddings=40)), requests(5))


SHAPES: dict[str, dict[str, Any]] = {
    "learned": {"position_embedding_type": "learned_absolute"},
    "one-group": {"num_query_groups": 1, "rotary_percent": 0.5},
    "multi-head": {"group_query_attention": False, "num_query_groups": 1},
    "explicit": {"attention_softmax_in_fp32": True},
    "experts": {"moe": MoEConfig(num_experts=4, moe_router_topk=2), "single_layer_value": True},
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rows", [1, 2, 16])
def test_shapes_and_numbers_of_rows(shape: str, rows: int) -> None:
    check(engine_of(small_config(max_position_embeddings=40, **SHAPES[shape]), rows), requests(12, seed=rows))


def test_texts_that_come_and_go_at_any_time() -> None:
    engine = engine_of(small_config(max_position_embeddings=40))
    wanted, numbers = requests(20), random.Random(1)
    texts, cancelled = [], set()
    while len(texts) < len(wanted) or not engine.is_idle:
        if len(texts) < len(wanted) and numbers.random() < 0.6:
            texts.append(engine.add(wanted[len(texts)]))
        going = [text for text in texts if text.finish is None]
        if going and numbers.random() < 0.15:
            victim = numbers.choice(going)
            engine.cancel(victim)
            cancelled.add(id(victim))
        engine.step()
    assert cancelled
    for request, text in zip(wanted, texts, strict=True):
        expected = plainly(engine.decoder.model, request)
        if id(text) in cancelled:
            assert text.finish == "cancelled" and text.tokens == expected[: len(text.tokens)]
        else:
            assert text.tokens == expected and text.finish in ("stop", "length")


def test_logprobs_are_those_of_the_whole_text() -> None:
    engine = engine_of(small_config(max_position_embeddings=40))
    wanted = [Request(**{**vars(request), "num_logprobs": index}) for index, request in enumerate(requests(4))]
    for request, text in zip(wanted, engine.run(wanted), strict=True):
        whole = torch.tensor([[*request.prompt, *text.tokens]])
        model = engine.decoder.model
        logprobs = model.output.logits(model(whole))[:, 0].log_softmax(-1)[len(request.prompt) - 1 :]
        for token, found, row in zip(text.tokens, text.logprobs, logprobs, strict=False):
            assert abs(found.logprob - float(row[token])) < 1e-9
            top = row.topk(request.num_logprobs or 0)
            assert list(found.top) == top.indices.tolist()
            assert list(found.top.values()) == pytest.approx(top.values.tolist())


def test_where_tokens_begin_in_the_text_beside_stop_strings() -> None:
    """What may begin a stop string is held back, and its tokens have places of their own all the same."""
    request = Request(prompt=(65,), max_new_tokens=20, stop=("abz", "!?"))
    text = Generation(request, TextWriter(ByteTokenizer(), request.prompt, request.stop))
    for token in "xabaé!?".encode():
        text.take(token, 256)
    assert (text.text, text.finish, text.text_at) == ("xabaé", "stop", [0, 1, 2, 3, 4, 4, 5, 6])


def test_a_stop_string_in_the_last_token() -> None:
    """It ends with the first byte of a character that will not come: its text is known at the end alone."""

    class Pieces(ByteTokenizer):
        def detokenize(self, ids: Iterable[int]) -> str:
            return b"".join((b"ab ", b"!\xe2")[token] for token in ids).decode(errors="replace")

    for stop, text, finish in ((("!",), "ab ", "stop"), ((), "ab !\ufffd", "length")):
        found = Generation(Request(prompt=(0,), max_new_tokens=2, stop=stop), TextWriter(Pieces(), (0,), stop))
        for token in (0, 1):
            found.take(token, 256)
        assert (found.text, found.finish) == (text, finish)


def test_other_processes_follow_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts that come together and later, of which some are given up: running, waiting, ended and beside new ones."""
    wanted = [Request(prompt=(1 + index,), max_new_tokens=number) for index, number in enumerate((9, 6, 9, 1, 5, 8))]
    turns = [
        Events(wanted[:2], [], False), Events(wanted[2:4], [1], False), Events([], [], False),
        Events(wanted[4:], [5], False), Events([], [3], False), *[Events([], [], False)] * 8, Events([], [], True),
    ]  # fmt: skip
    engine, coming, texts = engine_of(small_config(max_position_embeddings=40), rows=3), iter(turns), []
    add = engine.add
    monkeypatch.setattr(engine, "add", lambda request: texts.append(add(request)) or texts[-1])
    monkeypatch.setattr(dist, "broadcast_object_list", lambda found, **_: found.__setitem__(0, next(coming)))
    follow(engine)
    assert engine.is_idle and [text.request for text in texts] == wanted
    assert [text.finish == "cancelled" for text in texts] == [False, True, False, False, False, True]


def test_an_update_has_what_is_new_alone() -> None:
    request = Request(prompt=(65,), max_new_tokens=3, num_logprobs=0)
    text = Generation(request, TextWriter(ByteTokenizer(), request.prompt))
    ticket: Any = SimpleNamespace(sent=0, sent_tokens=0)
    for place, token in enumerate(b"xyz"):
        text.logprobs.append(TokenLogprobs(-1.0 - place, {}))
        text.take(token, 256)
        finish = "length" if place == 2 else None
        assert _update(ticket, text) == ("xyz"[place], [token], [text.logprobs[place]], [place], finish)


def test_everybody_hears_of_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those whose texts run, and those whom the engine has not seen yet."""
    told: list[Any] = []
    monkeypatch.setattr(service_module, "_post", lambda loop, updates: told.extend(updates))
    service = Service(engine_of(small_config(max_position_embeddings=40)), 5)
    running, new = (Ticket(requests(1)[0], None, False) for _ in range(2))  # type: ignore[arg-type]
    service._numbers, service._inbox, reason = {running: 0}, [new], Failed("why")
    service._fail(reason)
    assert told == [(running, reason), (new, reason)] and service._ends


def test_what_cannot_be_written_is_refused() -> None:
    engine = engine_of(small_config(max_position_embeddings=40))
    for change, message in (
        ({"prompt": ()}, "no tokens"),
        ({"prompt": (1,) * 39, "max_new_tokens": 2}, "exceeds --max-position-embeddings"),
        ({"max_new_tokens": 0}, "at least 1"),
        ({"prompt": (VOCAB,)}, "outside 0"),
        ({"sampling": Sampling(top_p=0)}, "--top-p"),
    ):
        with pytest.raises(ValueError, match=message):
            engine.add(Request(**{"prompt": (1,), "max_new_tokens": 3, **change}))
    assert engine.is_idle


def test_no_memory_for_a_cache_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def new_caches(*arguments: int) -> None:
        raise RuntimeError("you tried to allocate 1 EiB\nframe #0")

    monkeypatch.setattr(GPT, "new_caches", new_caches)
    with pytest.raises(ValueError, match=r"of 3 texts of 40 tokens: lower .* length \(you tried to allocate 1 EiB\)$"):
        engine_of(small_config(max_position_embeddings=40))


# How tokens are chosen


def test_draws_follow_the_distribution() -> None:
    """20,000 draws of 5 tokens, plain and cut; each frequency within 4 standard deviations."""
    logits, number = torch.tensor([[0.3, -1.0, 1.2, 0.0, -3.0]], dtype=torch.float64), 20_000
    for sampling, kept in (
        (Sampling(temperature=0.8), [0, 1, 2, 3, 4]),
        (Sampling(temperature=0.8, top_k=3), [0, 2, 3]),
        (Sampling(temperature=0.8, top_p=0.8), [0, 2]),
        (Sampling(temperature=0.8, top_k=3, top_p=0.9999), [0, 2, 3]),
    ):
        expected = torch.full((5,), float("-inf"), dtype=torch.float64)
        expected[kept] = logits[0, kept] / 0.8
        expected = expected.softmax(-1)
        drawn = choose(logits.expand(number, 5), [sampling] * number, range(number))
        share = torch.bincount(drawn, minlength=5) / number
        assert ((share - expected).abs() <= 4 * (expected * (1 - expected) / number).sqrt()).all(), (sampling, share)


def test_seeds_and_places_that_look_alike_draw_apart() -> None:
    assert len({_uniform(1, 23), _uniform(12, 3), _uniform(123, 0), _uniform(1, 230)}) == 4


def test_what_a_draw_takes_at_its_limits() -> None:
    """What holds top_p exactly is enough; a token without probability is not drawn, even at 0."""
    even = torch.tensor([[0.0, 0.0, -1000.0]]).expand(50, 3)
    assert not choose(even, [Sampling(top_p=0.5)] * 50, range(50)).any()
    assert choose(even, [Sampling(top_p=0.51)] * 50, range(50)).unique().tolist() == [0, 1]
    impossible_first = torch.tensor([[float("-inf"), 0.0, 0.0]])
    unknown = torch.full((1, 3), float("nan"))
    for cuts in (False, True):
        assert int(choose(unknown, [Sampling(top_k=2 * cuts)], [0])) in range(3), "a model that diverged ends nothing"
        assert _draw(impossible_first, [Sampling(top_k=3)], [0.0], cuts).tolist() == [1]


def test_a_temperature_next_to_0_takes_the_likeliest_token() -> None:
    """Even one at which every quotient would be infinite."""
    logits = torch.randn(1, 50, generator=torch.Generator().manual_seed(0)) + 3
    for cut in ({}, {"top_k": 3}, {"top_p": 0.5}):
        for temperature in (1e-9, 1e-310):
            sampling = Sampling(temperature=temperature, **cut)
            assert choose(logits, [sampling], [0]).equal(logits.argmax(-1)), sampling


def test_a_draw_does_not_depend_on_its_neighbours() -> None:
    logits = torch.randn(6, 50, generator=torch.Generator().manual_seed(0))
    samplings = [
        Sampling(temperature=0), Sampling(seed=1), Sampling(top_k=3), Sampling(top_p=0.5), Sampling(top_k=20, seed=9),
        Sampling(temperature=2, top_k=49, top_p=0.9),
    ]  # fmt: skip
    together = choose(logits, samplings, [4] * 6).tolist()
    assert together == [int(choose(logits[i : i + 1], [samplings[i]], [4])) for i in range(6)]


def test_equally_likely_tokens_at_the_edge_of_top_k() -> None:
    """Logits in bf16 are often equal: the lower index is taken, whatever the neighbours and the vocabulary's size."""
    numbers = torch.Generator().manual_seed(0)
    for vocab in (5, 50, 400):
        logits = torch.randn(8, vocab, generator=numbers).round()
        for k in (1, 2, 9, vocab // 2):
            ordered = logits.sort(dim=-1, descending=True, stable=True)
            values, indices = largest(logits, min(k, vocab))
            assert values.equal(ordered.values[:, :k]) and indices.equal(ordered.indices[:, :k]), (vocab, k)
        samplings = [Sampling(top_k=1 + row, top_p=0.9, seed=row) for row in range(7)] + [Sampling(top_k=vocab - 1)]
        together = choose(logits, samplings, [4] * 8).tolist()
        assert together == [int(choose(logits[i : i + 1], [samplings[i]], [4])) for i in range(8)], vocab


def test_tokens_that_hold_top_p_exactly_are_enough() -> None:
    assert {int(choose(torch.zeros(1, 4), [Sampling(top_p=0.5, seed=seed)], [0])) for seed in range(50)} == {0, 1}


# Text


def write(text: str, stop: tuple[str, ...] = (), prompt: str = "") -> tuple[list[str], bool]:
    """Byte after byte; (what each gave and the end, whether it was stopped)."""
    tokenizer = ByteTokenizer()
    writer, parts = TextWriter(tokenizer, tokenizer.tokenize(prompt), stop), []
    for token in tokenizer.tokenize(text):
        parts.append(writer.add(token))
        if writer.is_stopped:
            break
    return [*parts, writer.finish()], writer.is_stopped


def test_characters_come_whole() -> None:
    parts, _ = write("aé€😀 " * 30, prompt="Où € 😀")
    assert "".join(parts) == "aé€😀 " * 30 and not any("\ufffd" in part for part in parts)
    assert parts[:4] == ["a", "", "é", ""]


def test_bytes_that_are_no_character_do_not_stop_the_text() -> None:
    writer = TextWriter(ByteTokenizer(), [65])
    parts = [writer.add(0xFF) for _ in range(100)] + [writer.add(66), writer.finish()]
    assert "".join(parts) == "\ufffd" * 100 + "B"
    assert sum(map(len, parts[:99])) > 80, "they are not held back for ever"


def test_random_bytes_are_the_text_of_all_of_them() -> None:
    """Beginnings of characters among them, which later bytes finish or do not."""
    numbers = random.Random(1)
    for _ in range(200):
        tokens = [numbers.choice((*"é中😀".encode(), 0xFF, 65)) for _ in range(numbers.randrange(1, 80))]
        writer = TextWriter(ByteTokenizer(), [65])
        parts = [writer.add(token) for token in tokens]
        assert "".join(parts) + writer.finish() == bytes(tokens).decode(errors="replace")


@pytest.fixture(scope="module")
def llama2_like(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """What is not in its vocabulary is spelled in bytes; a run of them is decoded as a whole or not at all."""
    library = pytest.importorskip("tokenizers")
    pieces = ["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", *"abcdefgh."]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    model = library.models.BPE(vocabulary, [], byte_fallback=True, unk_token="<unk>", fuse_unk=True)
    tokenizer, decoders = library.Tokenizer(model), library.decoders
    tokenizer.normalizer = library.normalizers.Replace(" ", "\u2581")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tokenizer.save(str(path))
    return build_tokenizer("HuggingFaceTokenizer", str(path))


def test_a_long_run_of_bytes(llama2_like: Tokenizer) -> None:
    """Wherever the prompt ends, also inside of a character; a prompt of which the last tokens are such a run."""
    text = "a bc 中文字符测试中文字符测试é中文字符测试😀文字符测试中文字符 ha. 中文 d" * 2
    tokens = llama2_like.tokenize(text)
    for length in range(1, len(tokens)):
        writer = TextWriter(llama2_like, tokens[:length])
        parts = [writer.add(token) for token in tokens[length:]] + [writer.finish()]
        shown = (llama2_like.detokenize(tokens[: length - lacking]) for lacking in range(4))
        assert next(part for part in shown if text.startswith(part)) + "".join(parts) == text
    writer = TextWriter(llama2_like, llama2_like.tokenize("中"))
    parts = [writer.add(token) for token in llama2_like.tokenize("文")[:2]]
    assert "".join(parts) + writer.finish() == "\ufffd" * 2, "the character before stays one"


@pytest.mark.parametrize(
    "text, stop, expected, is_stopped",
    [
        ("one two three", ("two",), "one ", True),
        ("one two three", ("three", "two t"), "one ", True),
        ("ababac", ("abac",), "ab", True),
        ("no end in sig", ("sight",), "no end in sig", False),
        ("a\n\nb", ("\n\n",), "a", True),
        ("né", ("é",), "n", True),
        ("x", ("x",), "", True),
    ],
)
def test_stop_strings(text: str, stop: tuple[str, ...], expected: str, is_stopped: bool) -> None:
    parts, stopped = write(text, stop, prompt="ab two")
    assert ("".join(parts), stopped) == (expected, is_stopped)


def test_prompts_are_read_within_the_budget_of_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """The padding counts; one prompt always fits."""
    monkeypatch.setattr(engine_module, "MAX_PREFILL_TOKENS", 12)
    for lengths, first in (((4, 6, 2), 2), ((6, 7), 1), ((20, 1), 1), ((1, 6, 1), 2)):
        engine = engine_of(small_config(max_position_embeddings=40))
        for length in lengths:
            engine.add(Request(prompt=(1,) * length, max_new_tokens=2, ignore_eod=True))
        assert len(engine.step()) == first, lengths


def test_a_text_longer_than_its_row_is_refused() -> None:
    """Rows can be shorter than the model's positions."""
    engine = engine_of(small_config(max_position_embeddings=64))
    engine.check(Request(prompt=(1,) * 38, max_new_tokens=2))
    with pytest.raises(ValueError, match="after a prompt of 39 tokens"):
        engine.check(Request(prompt=(1,) * 39, max_new_tokens=2))


def test_nothing_is_dropped_while_text_is_written() -> None:
    """Of a model that comes from training."""
    model = randomise(build(small_config(hidden_dropout=0.5, max_position_embeddings=40)))
    texts = [list(generate(model.train(), [1, 2], 8, Sampling(temperature=0), eod=-1)) for _ in range(2)]
    assert texts[0] == texts[1] == list(generate(model.eval(), [1, 2], 8, Sampling(temperature=0), eod=-1))
