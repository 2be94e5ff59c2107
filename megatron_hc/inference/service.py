"""An engine that runs by itself in a thread and takes requests from an asyncio program, one of its queue at a time.

In several processes the first one has the queue; before every step it tells the others what has come and what has been
given up (``follow``), and so all engines take the same steps.
"""

from __future__ import annotations

import asyncio
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch.distributed as dist

from megatron_hc.inference.engine import Engine, Finish, Generation, Request, TokenLogprobs

HEARTBEAT_S = 60.0  # an idle first process lets the others know that it is there, before a collective times out


class QueueFull(Exception):
    """No room in the queue: come back later."""


class Failed(Exception):
    """The engine has ended with an error."""


class Update(NamedTuple):
    """What a text has got since the last one."""

    text: str
    tokens: list[int]
    logprobs: list[TokenLogprobs]
    text_at: list[int]
    """Place in the whole text at which each token begins, or would, where a stop string has cut it off."""
    finish: Finish | None


@dataclass(eq=False)
class Ticket:
    """A request that was accepted."""

    request: Request
    loop: asyncio.AbstractEventLoop
    is_streamed: bool
    """Updates come with every token; otherwise one comes at the end."""
    updates: asyncio.Queue[Update | Failed] = field(default_factory=asyncio.Queue)
    accepted: float = field(default_factory=time.monotonic)
    generation: Generation | None = None
    sent: int = 0
    """Characters that updates have brought."""
    sent_tokens: int = 0

    async def next(self) -> Update:
        """The next update; ``Failed`` where there will be none."""
        update = await self.updates.get()
        if isinstance(update, Failed):
            raise update
        return update


class Events(NamedTuple):
    """What happens before a step, the same for every process."""

    added: list[Request]
    cancelled: list[int]
    """Numbers of requests in the order in which they were added."""
    ends: bool


class Watcher:
    """What a service reports; the methods are called in its thread. Here: nobody is interested."""

    def step(self, seconds: float, running: int, waiting: int, tokens: int) -> None: ...
    def first_token(self, seconds: float) -> None: ...
    def finished(self, seconds: float, finish: str, prompt_tokens: int, tokens: int) -> None: ...


class Service:
    """Runs ``engine``. At most ``max_waiting`` requests wait for a row.

    ``on_failure`` is called in the service's thread if the engine ends with an error.
    """

    def __init__(
        self,
        engine: Engine,
        max_waiting: int,
        watcher: Watcher | None = None,
        on_failure: Callable[[BaseException], None] | None = None,
    ) -> None:
        self.engine, self.max_waiting, self.watcher = engine, max_waiting, watcher or Watcher()
        self.on_failure = on_failure
        self.error: BaseException | None = None
        self._inbox: list[Ticket] = []
        self._given_up: list[Ticket] = []
        self._numbers: dict[Ticket, int] = {}
        self._num_added = 0
        self._ends = False
        self._num_waiting = 0  # in the engine's own queue
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self, timeout_s: float = 30.0) -> None:
        """Give up what is still being written, and end the thread."""
        with self._changed:
            self._ends = True
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join(timeout_s)

    def submit(self, requests: Sequence[Request], is_streamed: bool) -> list[Ticket]:
        """Accept all of these or none. Raises ``QueueFull``, ``Failed``, and ``ValueError`` for a wrong request."""
        for request in requests:
            self.engine.check(request)
        if len(requests) > self.max_waiting:  # to come back later would be of no use
            raise ValueError(f"{len(requests)} texts at once are more than the queue has room for ({self.max_waiting})")
        loop = asyncio.get_running_loop()
        with self._changed:
            if self.error is not None or self._ends:
                raise Failed("the engine has ended")
            if self._num_waiting + len(self._inbox) + len(requests) > self.max_waiting:
                raise QueueFull
            tickets = [Ticket(request, loop, is_streamed) for request in requests]
            self._inbox += tickets
            self._changed.notify()
        return tickets

    def give_up(self, ticket: Ticket) -> None:
        """Nobody waits for this any more."""
        with self._changed:
            self._given_up.append(ticket)
            self._changed.notify()

    # ---- in the thread ----

    def _run(self) -> None:
        try:
            while not self._ends:
                self._turn()
            _tell(self.engine, Events([], [], True))
            self._fail(Failed("the server is stopping"))
        except BaseException as error:  # whatever it is: those who wait must hear of it
            traceback.print_exc()
            self.error = error
            self._fail(Failed(f"the engine failed: {type(error).__name__}"))
            if self.on_failure is not None:
                self.on_failure(error)

    def _turn(self) -> None:
        """Take what has come, tell the other processes, make a step, deliver."""
        engine = self.engine
        with self._changed:
            if engine.is_idle and not (self._inbox or self._given_up or self._ends):
                self._changed.wait(HEARTBEAT_S)
            if self._ends:
                return
            added, self._inbox = self._inbox, []
            given_up, self._given_up = self._given_up, []
            self._num_waiting += len(added)
        for ticket in added:
            self._numbers[ticket] = self._num_added
            self._num_added += 1
        cancelled = [ticket for ticket in dict.fromkeys(given_up) if ticket in self._numbers]
        events = Events([t.request for t in added], [self._numbers[t] for t in cancelled], False)
        _tell(engine, events)
        for ticket in added:
            ticket.generation = engine.add(ticket.request)
        for ticket in cancelled:
            assert ticket.generation is not None
            engine.cancel(ticket.generation)
        if not engine.is_idle:
            started = time.monotonic()
            stepped = engine.step()
            self.watcher.step(time.monotonic() - started, len(engine.running), len(engine.waiting), len(stepped))
        with self._changed:
            self._num_waiting = len(engine.waiting)
        self._deliver()

    def _deliver(self) -> None:
        """Updates of all texts that have something new, in one go for each event loop."""
        updates: dict[asyncio.AbstractEventLoop, list[tuple[Ticket, Update | Failed]]] = {}
        for ticket in list(self._numbers):
            text = ticket.generation
            assert text is not None
            if not text.tokens and text.finish is None:
                continue
            if ticket.is_streamed and ticket.sent_tokens == 0 and text.tokens:
                self.watcher.first_token(time.monotonic() - ticket.accepted)
            is_new = len(text.tokens) > ticket.sent_tokens or text.finish is not None
            if is_new and (ticket.is_streamed or text.finish is not None):
                updates.setdefault(ticket.loop, []).append((ticket, _update(ticket, text)))
            if text.finish is not None:
                del self._numbers[ticket]
                seconds = time.monotonic() - ticket.accepted
                self.watcher.finished(seconds, text.finish, len(ticket.request.prompt), len(text.tokens))
        for loop, found in updates.items():
            _post(loop, found)

    def _fail(self, reason: Failed) -> None:
        with self._changed:
            left, self._inbox = [*self._numbers, *self._inbox], []
            self._ends = True
        for ticket in left:
            _post(ticket.loop, [(ticket, reason)])


def _update(ticket: Ticket, text: Generation) -> Update:
    first, start = ticket.sent_tokens, ticket.sent
    ticket.sent_tokens, ticket.sent = len(text.tokens), len(text.text)
    return Update(text.text[start:], text.tokens[first:], text.logprobs[first:], text.text_at[first:], text.finish)


def _post(loop: asyncio.AbstractEventLoop, updates: list[tuple[Ticket, Update | Failed]]) -> None:
    def put() -> None:
        for ticket, update in updates:
            ticket.updates.put_nowait(update)

    try:
        loop.call_soon_threadsafe(put)
    except RuntimeError:  # the loop is closed: nobody is there any more
        pass


def _tell(engine: Engine, events: Events) -> None:
    """From the first process to the others."""
    if engine.decoder.mesh.world_size > 1:
        dist.broadcast_object_list([events], src=0, group=engine.decoder.mesh.group("world"))


def follow(engine: Engine) -> None:
    """What the other processes of a service do, until it ends."""
    texts: dict[int, Generation] = {}
    num_added = 0
    while True:
        received: list[Any] = [None]
        dist.broadcast_object_list(received, src=0, group=engine.decoder.mesh.group("world"))
        events: Events = received[0]
        if events.ends:
            return
        for request in events.added:
            texts[num_added] = engine.add(request)
            num_added += 1
        for number in events.cancelled:
            if number in texts:
                engine.cancel(texts[number])
        if not engine.is_idle:
            engine.step()
        texts = {number: text for number, text in texts.items() if text.finish is None}
