"""The completions endpoint over real connections to this machine: clients of all kinds, and what it does about them."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import importlib.util
import json
import random
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from helpers import build, randomise, small_config

from megatron_hc.config import TrainConfig
from megatron_hc.data.tokenizer import ByteTokenizer
from megatron_hc.inference import Decoder, Engine
from megatron_hc.inference.completions import BadRequest, Completion, Limits, parse_completion
from megatron_hc.inference.engine import TokenLogprobs
from megatron_hc.inference.service import Service, Update
from megatron_hc.mesh import Mesh
from megatron_hc.model.generate import Sampling, generate

httpx = pytest.importorskip("httpx")
pytest.importorskip("fastapi")
pytest.importorskip("prometheus_client")
uvicorn = pytest.importorskip("uvicorn")
ROOM = 64


class Server:
    """An endpoint in a thread of this process."""

    def __init__(
        self, *, rows: int = 16, max_waiting: int = 256, token: str | None = None, body_timeout_s: float = 60.0
    ) -> None:
        from megatron_hc.inference.metrics import Metrics
        from megatron_hc.inference.server import Settings, build_app

        config = small_config({"residual_connection": "hyper"}, max_position_embeddings=ROOM)
        self.model = randomise(build(config, "fp32", vocab_size=257)).eval().requires_grad_(False)
        self.engine = Engine(
            Decoder(self.model, TrainConfig(model=config), Mesh(), rows=rows, max_length=ROOM), ByteTokenizer()
        )
        metrics = Metrics()
        self.service = Service(self.engine, max_waiting, metrics)
        limits = Limits(prompt_tokens=40, new_tokens=50, total_tokens=ROOM, body_bytes=10_000)
        settings = Settings(model_name="small", limits=limits, token=token, body_timeout_s=body_timeout_s)
        app = build_app(self.service, ByteTokenizer(), settings, metrics)
        uvicorn_config = uvicorn.Config(app, host="127.0.0.1", port=0, log_level="error", timeout_graceful_shutdown=60)
        self.socket = uvicorn_config.bind_socket()
        self.port = self.socket.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.server = uvicorn.Server(uvicorn_config)
        self.client = httpx.Client(base_url=self.url, timeout=120)
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self.socket]})

    def __enter__(self) -> Server:
        self.thread.start()
        wait_until(lambda: self.server.started)
        return self

    def __exit__(self, *exception: object) -> None:
        self.client.close()
        self.server.should_exit = True
        self.thread.join(90)
        assert not self.thread.is_alive(), "the server did not stop"

    def post(self, body: Any, **options: Any) -> Any:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        return self.client.post("/v1/completions", content=content, **options)

    def expected(self, prompt: str, number: int, sampling: Sampling) -> str:
        tokenizer = ByteTokenizer()
        tokens = generate(self.model, tokenizer.tokenize(prompt), number, sampling, eod=256)
        return tokenizer.detokenize([*tokenizer.tokenize(prompt), *tokens])[len(prompt) :]


def wait_until(condition: Any, timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.01)


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with Server() as found:
        yield found
        wait_until(lambda: found.engine.is_idle)
        assert found.service.error is None


def test_the_openai_client(server: Server) -> None:
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0)
    assert [model.id for model in client.models.list()] == ["small"]
    options = {"model": "small", "prompt": ["You may", "ab"], "max_tokens": 9, "temperature": 0.7, "seed": 5, "n": 2}
    whole = client.completions.create(**options)
    texts = [choice.text for choice in whole.choices]
    wanted = [(prompt, seed) for prompt in ("You may", "ab") for seed in (5, 6)]
    assert texts == [server.expected(p, 9, Sampling(temperature=0.7, seed=seed)) for p, seed in wanted]
    assert whole.usage.prompt_tokens == 9 and 0 < whole.usage.completion_tokens <= 36
    streamed, finishes, usage = [""] * 4, [None] * 4, None
    for part in client.completions.create(**options, stream=True, stream_options={"include_usage": True}):
        for choice in part.choices:
            streamed[choice.index] += choice.text
            finishes[choice.index] = choice.finish_reason or finishes[choice.index]
        usage = part.usage or usage
    assert streamed == texts and finishes == [choice.finish_reason for choice in whole.choices]
    assert usage == whole.usage
    with pytest.raises(openai.BadRequestError, match="the prompt has 41 tokens, more than the 40 allowed"):
        client.completions.create(model="small", prompt="x" * 41)
    with pytest.raises(openai.NotFoundError, match="no model 'other'"):
        client.completions.create(model="other", prompt="x")


def test_fields(server: Server) -> None:
    greedy = {"prompt": "You", "max_tokens": 12, "temperature": 0}
    text = server.expected("You", 12, Sampling(temperature=0))

    def choice(**more: Any) -> Any:
        return server.post({**greedy, **more}).json()["choices"][0]

    assert choice()["text"] == choice(prompt=[89, 111, 117])["text"] == text
    assert choice(echo=True)["text"] == "You" + text
    assert choice(prompt="a\ud800", echo=True)["text"].startswith("a\ud800"), "half of a surrogate pair"
    stop = text[4:6]
    cut = choice(stop=stop)
    assert cut["text"] == text[: text.index(stop)] and cut["finish_reason"] == "stop"
    logprobs = choice(logprobs=3)["logprobs"]
    assert len(logprobs["tokens"]) == len(logprobs["token_logprobs"]) == len(logprobs["top_logprobs"]) > 0
    assert all(value <= 0 for value in logprobs["token_logprobs"])
    assert choice(temperature=0.9, top_k=5, top_p=0.8, seed=3)["text"] == server.expected(
        "You", 12, Sampling(temperature=0.9, top_k=5, top_p=0.8, seed=3)
    )
    assert choice(max_tokens=50, ignore_eos=True)["finish_reason"] == "length"


def test_what_a_body_becomes() -> None:
    """Up to the last token that there is room for, and the last id there is."""
    limits, tokenizer = Limits(prompt_tokens=40, new_tokens=50, total_tokens=45), ByteTokenizer()
    body = {"prompt": ["ab", [3, 256]], "max_tokens": 43, "n": 2, "echo": True, "ignore_eos": True, "seed": 7}
    found = parse_completion(body, tokenizer, limits, "small")
    assert [request.prompt for request in found.requests] == [(97, 98)] * 2 + [(3, 256)] * 2
    assert [request.sampling.seed for request in found.requests] == [7, 8, 7, 8]
    assert all(request.ignore_eod and request.max_new_tokens == 43 for request in found.requests)
    assert found.echoed == ["ab"] * 2 + [tokenizer.detokenize([3, 256])] * 2
    assert found.num_prompt_tokens == 4 and not found.has_logprobs
    assert parse_completion({"prompt": "a", "logprobs": 0}, tokenizer, limits, "small").has_logprobs
    for wrong in ({"max_tokens": 44}, {"prompt": [257]}):
        with pytest.raises(BadRequest):
            parse_completion(body | wrong, tokenizer, limits, "small")


def test_of_tokens_with_one_name_the_likeliest_counts() -> None:
    """Bytes that are no character by themselves."""
    from megatron_hc.inference.server import Answer

    completion = Completion([], [""], stream=False, include_usage=False, has_logprobs=True, num_prompt_tokens=1)
    found = TokenLogprobs(-0.5, {97: -0.5, 200: -2.0, 201: -3.0})
    answer = Answer(completion, [], "small", ByteTokenizer())
    choice = answer.choice(0, Update("a", [97], [found], [0], None), is_first=True)
    assert choice["logprobs"]["top_logprobs"] == [{"a": -0.5, "\ufffd": -2.0}]


async def many(server: Server, number: int, retries: int) -> list[tuple[int, int, str]]:
    """Short requests at once: (status, how often it was told to come back, text) of each."""
    limits = httpx.Limits(max_connections=number)
    async with httpx.AsyncClient(base_url=server.url, timeout=120, limits=limits) as client:

        async def one(index: int) -> tuple[int, int, str]:
            body = {"prompt": f"text {index}", "max_tokens": 4, "seed": index}
            tried = 0
            while (answer := await client.post("/v1/completions", json=body)).status_code == 429:
                assert answer.headers["retry-after"] == "1"
                assert answer.json()["error"]["type"] == "rate_limit_error"
                if tried == retries:
                    break
                tried += 1
                await asyncio.sleep(0.05)
            text = answer.json()["choices"][0]["text"] if answer.status_code == 200 else ""
            return answer.status_code, tried, text

        return await asyncio.gather(*(one(index) for index in range(number)))


def test_two_hundred_at_once(server: Server) -> None:
    found = asyncio.run(many(server, 200, retries=0))
    assert [status for status, _, _ in found] == [200] * 200
    for index in range(0, 200, 10):
        assert found[index][2] == server.expected(f"text {index}", 4, Sampling(seed=index))


def test_beyond_the_queue_is_told_to_come_back() -> None:
    with Server(rows=2, max_waiting=6) as server:
        found = asyncio.run(many(server, 200, retries=0))
        statuses = [status for status, _, _ in found]
        assert set(statuses) == {200, 429} and statuses.count(200) >= 6
        page = httpx.get(f"{server.url}/metrics").text
        assert f'megatron_hc_http_answers_total{{status="429"}} {float(statuses.count(429))}' in page
        assert f'megatron_hc_http_answers_total{{status="200"}} {float(statuses.count(200))}' in page
        never = server.post({"prompt": "a", "n": 7})
        assert never.status_code == 400 and "7 texts at once are more than" in never.json()["error"]["message"]
        assert server.post({"prompt": "a", "n": 6, "max_tokens": 1}).status_code == 200
        again = asyncio.run(many(server, 24, retries=400))
        assert [status for status, _, _ in again] == [200] * 24 and any(tried for _, tried, _ in again)


WRONG: list[Any] = [
    b"", b"{", b"[]", b"null", b"\xff\xfe", b'"text"', b"[" * 5000, b'{"prompt": NaN}', b'{"prompt": "a", "n": 1e400}',
    {}, {"prompt": None}, {"prompt": ""}, {"prompt": []}, {"prompt": [""]}, {"prompt": [[]]}, {"prompt": [300]},
    {"prompt": [-1]}, {"prompt": [True]}, {"prompt": ["a", 1]}, {"prompt": {"a": 1}}, {"prompt": ["a"] * 200},
    {"prompt": "a", "max_tokens": 0}, {"prompt": "a", "max_tokens": "5"}, {"prompt": "a", "max_tokens": 51},
    {"prompt": "a" * 40, "max_tokens": 40}, {"prompt": "a", "n": 0}, {"prompt": "a", "n": 10**9},
    {"prompt": "a", "temperature": -1}, {"prompt": "a", "temperature": "hot"}, {"prompt": "a", "top_p": 0},
    {"prompt": "a", "top_p": 1.1}, {"prompt": "a", "top_k": -1}, {"prompt": "a", "seed": 1.5},
    {"prompt": "a", "stop": ""},
    {"prompt": "a", "stop": ["x"] * 17}, {"prompt": "a", "stop": {"x": 1}}, {"prompt": "a", "stream": 1},
    {"prompt": "a", "stream": "yes"}, {"prompt": "a", "logprobs": 999}, {"prompt": "a", "logprobs": 1, "echo": True},
    {"prompt": "a", "suffix": "x"}, {"prompt": "a", "best_of": 2}, {"prompt": "a", "logit_bias": {"1": 5}},
    {"prompt": "a", "presence_penalty": 0.5}, {"prompt": "a", "stream_options": 3},
    {"prompt": "a", "stream_options": 0}, {"prompt": "a", "stream_options": ""}, {"prompt": "a", "nonsense": 1},
    {"prompt": "a", "model": 5}, {"prompt": "x" * 9000}, {"prompt": "a", "temperature": 10**400},
]  # fmt: skip


def test_what_makes_no_sense_is_refused_in_a_sentence(server: Server) -> None:
    for body in WRONG:
        answer = server.post(body)
        assert answer.status_code in (400, 404), (body, answer.status_code)
        message = answer.json()["error"]["message"]
        assert message and "\n" not in message, (body, message)
    assert server.post({"prompt": "a" * 20_000}).status_code == 413
    for path, method in (("/v1/completions", "GET"), ("/v1/nothing", "GET"), ("/health", "POST")):
        assert "error" in httpx.request(method, server.url + path).json()


def test_random_bytes_and_random_json(server: Server) -> None:
    numbers = random.Random(0)
    good = json.dumps({"prompt": "ab", "max_tokens": 2, "temperature": 0, "stop": ["x"], "n": 1}).encode()

    def value(depth: int) -> Any:
        kinds = [None, True, -1, 0, 2**70, 1.5, "", "text", "\u2028\ud7ff"]
        if depth and numbers.random() < 0.5:
            some = [value(depth - 1) for _ in range(numbers.randrange(3))]
            return some if numbers.random() < 0.5 else {str(item)[:5]: item for item in some}
        return numbers.choice(kinds)

    names = ["prompt", "max_tokens", "n", "stop", "temperature", "stream", "logprobs", "seed", "stream_options"]
    for round_number in range(120):
        if round_number % 2:
            broken = bytearray(good)
            for _ in range(numbers.randrange(1, 4)):
                broken[numbers.randrange(len(broken))] = numbers.randrange(256)
            answer = server.post(bytes(broken))
        else:
            answer = server.post({"prompt": "a"} | {name: value(2) for name in numbers.sample(names, 2)})
        assert answer.status_code in (200, 400, 404), answer.text
    assert server.post({"prompt": "a"}).status_code == 200


def test_a_body_far_too_long_is_answered_not_reset(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a client that sends all before it reads, as most do; only what is beyond all bounds is cut off."""
    from megatron_hc.inference import server as module

    for _ in range(2):  # the body has been read to its end
        client = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
        client.request("POST", "/v1/completions", bytes(8 << 20))
        assert client.getresponse().status == 413
        client.close()
    monkeypatch.setattr(module, "DRAINED_BYTES", 1 << 20)
    connection = raw(server, HEAD % (1 << 40) + bytes(10_000 + (1 << 20) + 1))
    answer = connection.makefile("rb").read(12)  # though more was announced
    assert answer == b"HTTP/1.1 413"


def raw(server: Server, content: bytes) -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", server.port), timeout=10)
    connection.sendall(content)
    return connection


HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"


def test_slow_and_broken_connections() -> None:
    with Server(body_timeout_s=2.0) as server:
        slow_and_broken(server)


def slow_and_broken(server: Server) -> None:
    body = json.dumps({"prompt": "ab", "max_tokens": 50, "stream": True, "ignore_eos": True}).encode()
    slow = [raw(server, HEAD % 100 + b'{"prompt"') for _ in range(20)]
    silent = [raw(server, b"") for _ in range(20)]
    half = [raw(server, b"POST /v1/comp") for _ in range(20)]
    for number in range(20):
        raw(server, HEAD % len(body) + body[: number * 3]).close()  # gone in the middle of the request
        with contextlib.suppress(OSError):
            raw(server, b"\x16\x03\x01" + bytes(number)).close()  # not HTTP
        reader = raw(server, HEAD % len(body) + body)
        reader.recv(200 * (number % 3))  # gone before, or in the middle of the answer
        reader.close()
    assert server.post({"prompt": "ab"}).status_code == 200, "the others do not notice"
    for connection in slow:
        answer = connection.makefile("rb").read()  # the server closes it
        assert b" 408 " in answer.split(b"\r\n")[0] and b"did not arrive" in answer
    for connection in (*slow, *silent, *half):
        connection.close()
    wait_until(lambda: server.engine.is_idle and not server.service._numbers)
    assert httpx.get(f"{server.url}/health").json() == {"status": "ok"}


def test_a_reader_who_leaves_frees_its_row() -> None:
    with Server(rows=1) as server:
        body = {"prompt": "ab", "max_tokens": 50, "ignore_eos": True}
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{server.url}/v1/completions", json=body, timeout=0.02)
        with httpx.stream("POST", f"{server.url}/v1/completions", json={**body, "stream": True}, timeout=20) as answer:
            next(answer.iter_lines())
        wait_until(lambda: server.engine.is_idle)
        page = httpx.get(f"{server.url}/metrics").text
        assert 'texts_finished_total{reason="cancelled"}' in page


def test_a_token() -> None:
    with Server(token="secret") as server:
        for path in ("/v1/models", "/metrics"):
            assert httpx.get(server.url + path).status_code == 401
        assert server.post({"prompt": "a"}).status_code == 401
        assert server.post({"prompt": "a"}, headers={"Authorization": "Bearer secreT"}).status_code == 401
        assert server.post({"prompt": "a"}, headers={"Authorization": "Bearer secret"}).status_code == 200
        assert httpx.get(f"{server.url}/health").status_code == 200


def test_a_stop_lets_texts_end() -> None:
    with Server() as server:
        answers: list[Any] = []
        body = {"prompt": "ab", "max_tokens": 50, "ignore_eos": True}
        thread = threading.Thread(target=lambda: answers.append(server.post(body)))
        thread.start()
        wait_until(lambda: server.engine.running)
        server.server.should_exit = True
        thread.join(90)
    assert answers[0].status_code == 200 and answers[0].json()["usage"]["completion_tokens"] == 50
    with pytest.raises(httpx.ConnectError):
        httpx.post(f"{server.url}/v1/completions", json=body)


def test_an_engine_that_fails_is_reported() -> None:
    failed: list[BaseException] = []
    with Server() as server:
        server.service.on_failure = failed.append

        def fail(*arguments: Any) -> Any:
            raise RuntimeError("out of memory")

        server.engine.decoder.extend = fail  # type: ignore[method-assign]
        answer = server.post({"prompt": "a"})
        assert answer.status_code == 500 and "RuntimeError" in answer.json()["error"]["message"]
        assert server.post({"prompt": "a"}).status_code == 503
        assert httpx.get(f"{server.url}/health").status_code == 503
    assert isinstance(failed[0], RuntimeError)


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    path = Path(__file__).parents[3] / "tools" / "serve.py"
    spec = importlib.util.spec_from_file_location("serve_tool", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--host 0.0.0.0", "can be reached from other machines: give --token-file"),
        ("--host 192.0.2.1", "can be reached from other machines"),
        ("--host example.org", "can be reached from other machines"),
        ("--token-file nowhere", "--token-file nowhere cannot be read"),
        ("--port 70000", "--port must be in"),
        ("--max-batch-size 0", "--max-batch-size must be at least 1"),
        ("--max-length 1", "--max-length must be at least 2, not 1"),
        ("--body-timeout 0", "--body-timeout must be positive"),
    ],
)
def test_what_is_not_served(
    tool: ModuleType, flags: str, message: str, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(tool.TOKEN_VARIABLE, raising=False)
    with pytest.raises(SystemExit) as stop:
        tool.main(["--load", "nowhere", *flags.split()])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_a_token_opens_the_host(tool: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    arguments = tool.parse_arguments(["--load", "x", "--host", "0.0.0.0"])
    monkeypatch.setenv(tool.TOKEN_VARIABLE, "secret")
    assert tool.check(arguments) == "secret"
    (tmp_path / "token").write_text("other\n")
    arguments.token_file = str(tmp_path / "token")
    assert tool.check(arguments) == "other"
