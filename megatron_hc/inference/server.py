"""An OpenAI-compatible completions endpoint over a ``Service``: checking what comes in, streaming what goes out.

Routes: POST /v1/completions, GET /v1/models, /health, /metrics. Whatever a client sends, the answer is JSON in OpenAI's
form, and nothing of it costs more memory than --max-body-bytes.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from megatron_hc.data.tokenizer import Tokenizer
from megatron_hc.inference.completions import BadRequest, Completion, Limits, parse_completion
from megatron_hc.inference.metrics import Metrics
from megatron_hc.inference.service import Failed, QueueFull, Service, Ticket, Update

if TYPE_CHECKING:
    from fastapi import FastAPI
    from starlette.requests import Request as HttpRequest
    from starlette.responses import Response

CLOSE = {"Connection": "close"}  # where the rest of a body will not be read
DRAINED_BYTES = 1 << 26
"""Of a body that is too long, read and thrown away before the answer: many clients send all before they read, and would
find a connection that was reset instead of the reason."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What the endpoint needs to know beside the service."""

    model_name: str
    limits: Limits
    token: str | None = None
    """Bearer token that every request must bring; None: none."""
    body_timeout_s: float = 30.0
    """For the whole body of a request to arrive."""


class Endpoint:
    """Handlers of the routes."""

    def __init__(self, service: Service, tokenizer: Tokenizer, settings: Settings, metrics: Metrics) -> None:
        self.service, self.tokenizer, self.settings, self.metrics = service, tokenizer, settings, metrics
        self.created = int(time.time())

    # ---- routes ----

    async def health(self, request: HttpRequest) -> Response:
        is_well = self.service.error is None
        return _json({"status": "ok" if is_well else "failed"}, 200 if is_well else 503)

    async def models(self, request: HttpRequest) -> Response:
        self._authorize(request)
        entry = {"id": self.settings.model_name, "object": "model", "created": self.created, "owned_by": "megatron_hc"}
        return _json({"object": "list", "data": [entry]})

    async def metrics_page(self, request: HttpRequest) -> Response:
        from starlette.responses import Response

        self._authorize(request)
        return Response(self.metrics.page(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def completions(self, request: HttpRequest) -> Response:
        from starlette.responses import StreamingResponse

        self._authorize(request)
        body = await self._body(request)
        # In a thread of its own: tokenizing a long prompt must not hold up the others.
        completion = await asyncio.to_thread(
            parse_completion, body, self.tokenizer, self.settings.limits, self.settings.model_name
        )
        try:
            tickets = self.service.submit(completion.requests, completion.stream)
        except ValueError as error:
            raise BadRequest(str(error)) from error
        except QueueFull:
            raise BadRequest(
                "the queue is full: try again later", status=429, kind="rate_limit_error", headers={"Retry-After": "1"}
            ) from None
        except Failed as error:
            raise BadRequest(str(error), status=503, kind="server_error") from error
        answer = Answer(completion, tickets, self.settings.model_name, self.tokenizer)
        if completion.stream:
            self.metrics.answered(200)
            return StreamingResponse(self._stream(answer), media_type="text/event-stream")
        return await self._whole(answer, request)

    # ---- parts of them ----

    def _authorize(self, request: HttpRequest) -> None:
        if self.settings.token is None:
            return
        given = request.headers.get("authorization", "")
        if not hmac.compare_digest(given.encode(), f"Bearer {self.settings.token}".encode()):
            raise BadRequest(
                "a bearer token is needed",
                status=401,
                kind="authentication_error",
                headers={"WWW-Authenticate": "Bearer"},
            )

    async def _body(self, request: HttpRequest) -> Any:
        """The JSON value of a request's body, which may neither be too long nor take too long."""
        from starlette.requests import ClientDisconnect

        limit, size, body = self.settings.limits.body_bytes, 0, bytearray()
        too_long = BadRequest(f"the body is longer than {limit} bytes", status=413, headers=CLOSE)

        async def read() -> None:
            nonlocal size
            async for chunk in request.stream():
                size += len(chunk)
                if size <= limit:
                    body.extend(chunk)
                elif size > limit + DRAINED_BYTES:
                    break

        try:
            await asyncio.wait_for(read(), self.settings.body_timeout_s)
        except ClientDisconnect:
            raise BadRequest("the client has gone", status=499) from None  # nobody reads it
        except asyncio.TimeoutError:
            if size > limit:
                raise too_long from None
            raise BadRequest(
                f"the body did not arrive within {self.settings.body_timeout_s:g} seconds", status=408, headers=CLOSE
            ) from None
        if size > limit:
            raise too_long
        try:
            return json.loads(bytes(body))
        except (ValueError, RecursionError) as error:
            raise BadRequest(f"the body is not JSON: {error}") from error

    async def _whole(self, answer: Answer, request: HttpRequest) -> Response:
        """All texts at once, or nothing where the client has gone."""
        work = asyncio.ensure_future(answer.collect())
        gone = asyncio.ensure_future(_disconnected(request))
        try:
            await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                self.metrics.answered(499)
                return _json({}, 499)  # nobody reads it
            body = work.result()
        except Failed as error:
            raise BadRequest(str(error), status=500, kind="server_error") from error
        finally:
            gone.cancel()
            work.cancel()
            self._release(answer)
        self.metrics.answered(200)
        return _json(body)

    async def _stream(self, answer: Answer) -> AsyncIterator[bytes]:
        """Server-sent events, one per update; the client may leave at any of them."""
        try:
            async for part in answer.parts():
                yield b"data: " + json.dumps(part).encode() + b"\n\n"
            yield b"data: [DONE]\n\n"
        except Failed as error:
            yield b"data: " + json.dumps(BadRequest(str(error), kind="server_error").body()).encode() + b"\n\n"
        finally:
            self._release(answer)

    def _release(self, answer: Answer) -> None:
        for ticket in answer.unfinished:
            self.service.give_up(ticket)


class Answer:
    """The texts of one request, as OpenAI's completion objects."""

    def __init__(
        self, completion: Completion, tickets: Sequence[Ticket], model_name: str, tokenizer: Tokenizer
    ) -> None:
        self.completion, self.tickets, self.tokenizer = completion, tickets, tokenizer
        self.head = {
            "id": f"cmpl-{uuid.uuid4().hex}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": model_name,
        }
        self.unfinished = set(tickets)
        self.num_tokens = 0

    async def _next(self, ticket: Ticket) -> Update:
        update = await ticket.next()
        self.num_tokens += len(update.tokens)
        if update.finish is not None:
            self.unfinished.discard(ticket)
        return update

    def choice(self, index: int, update: Update, *, is_first: bool) -> dict[str, Any]:
        prompt = self.completion.echoed[index] if is_first else ""
        finish = None if update.finish is None else ("length" if update.finish == "length" else "stop")
        return {
            "index": index,
            "text": prompt + update.text,
            "logprobs": self._logprobs(index, update) if self.completion.has_logprobs else None,
            "finish_reason": finish,
        }

    def _logprobs(self, index: int, update: Update) -> dict[str, Any]:
        def name(token: int) -> str:
            return self.tokenizer.detokenize([token])

        def named(top: dict[int, float]) -> dict[str, float]:
            """Of tokens with one name (parts of characters, ...) the likeliest."""
            return {name(token): value for token, value in sorted(top.items(), key=lambda entry: entry[1])}

        shift = len(self.completion.echoed[index])
        # A token that ends a text (end-of-document) has no place in it.
        found = update.logprobs[: len(update.tokens)]
        return {
            "tokens": [name(token) for token in update.tokens],
            "token_logprobs": [entry.logprob for entry in found],
            "top_logprobs": [named(entry.top) for entry in found],
            "text_offset": [shift + at for at in update.text_at],
        }

    def usage(self) -> dict[str, int]:
        prompt = self.completion.num_prompt_tokens
        return {
            "prompt_tokens": prompt,
            "completion_tokens": self.num_tokens,
            "total_tokens": prompt + self.num_tokens,
        }

    async def collect(self) -> dict[str, Any]:
        updates = [await self._next(ticket) for ticket in self.tickets]
        choices = [self.choice(index, update, is_first=True) for index, update in enumerate(updates)]
        return {**self.head, "choices": choices, "usage": self.usage()}

    async def parts(self) -> AsyncIterator[dict[str, Any]]:
        """A completion object per update of any of the texts, in the order in which they come."""
        waiting = {asyncio.ensure_future(self._next(ticket)): index for index, ticket in enumerate(self.tickets)}
        begun: set[int] = set()
        try:
            while waiting:
                done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    index, update = waiting.pop(task), task.result()
                    yield {**self.head, "choices": [self.choice(index, update, is_first=index not in begun)]}
                    begun.add(index)
                    if update.finish is None:
                        waiting[asyncio.ensure_future(self._next(self.tickets[index]))] = index
        finally:
            for task in waiting:
                task.cancel()
        if self.completion.include_usage:
            yield {**self.head, "choices": [], "usage": self.usage()}


async def _disconnected(request: HttpRequest) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _json(content: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    from starlette.responses import Response

    # In ASCII: a client may echo half of a surrogate pair, which UTF-8 cannot have.
    return Response(json.dumps(content), status, headers, media_type="application/json")


def build_app(service: Service, tokenizer: Tokenizer, settings: Settings, metrics: Metrics) -> FastAPI:
    """The application; it starts and ends the service."""
    from contextlib import asynccontextmanager

    from fastapi import FastAPI
    from starlette.exceptions import HTTPException

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.start()
        yield
        await asyncio.get_running_loop().run_in_executor(None, service.close)

    async def refuse(request: HttpRequest, error: Exception) -> Response:
        if isinstance(error, HTTPException):  # no such route, wrong method
            error = BadRequest(str(error.detail), status=error.status_code, headers=dict(error.headers or {}))
        assert isinstance(error, BadRequest)
        if request.url.path == "/v1/completions":
            metrics.answered(error.status)
        return _json(error.body(), error.status, error.headers)

    app = FastAPI(lifespan=lifespan, openapi_url=None)
    app.add_exception_handler(BadRequest, refuse)
    app.add_exception_handler(HTTPException, refuse)
    endpoint = Endpoint(service, tokenizer, settings, metrics)
    for path, handler, method in (
        ("/health", endpoint.health, "GET"),
        ("/metrics", endpoint.metrics_page, "GET"),
        ("/v1/models", endpoint.models, "GET"),
        ("/v1/completions", endpoint.completions, "POST"),
    ):
        app.add_route(path, handler, methods=[method])
    return app
