"""Writing many texts at a time, each joining and leaving when it wants to (continuous batching).

A step gives every running text one more token, then reads the prompts of as many waiting ones as there are free rows
for, which gives each its first. What a text becomes depends on its request alone, not on what runs beside it.

In several processes each has an engine of its own; with the same requests in the same order they take the same steps.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_hc.data.tokenizer import Tokenizer
from megatron_hc.inference.decoder import Decoder
from megatron_hc.inference.text import TextWriter
from megatron_hc.model.generate import Sampling, check_room, choose, largest

MAX_PREFILL_TOKENS = 4096  # of prompts that are read in one step, padding included: running texts wait for them
Finish = Literal["stop", "length", "cancelled"]


@dataclass(frozen=True, kw_only=True)
class Request:
    """A prompt, and how it is to be continued."""

    prompt: tuple[int, ...]
    max_new_tokens: int
    sampling: Sampling = Sampling()
    stop: tuple[str, ...] = ()
    """The text ends before the first of these, which it does not show."""
    num_logprobs: int | None = None
    """Record the log-probability of every token written, and that many of the most likely ones."""
    ignore_eod: bool = False
    """Go on after end-of-document: for benchmarks."""


class TokenLogprobs(NamedTuple):
    """What the model thought of one written token."""

    logprob: float
    top: dict[int, float]
    """The most likely tokens."""


@dataclass(eq=False)
class Generation:
    """A text that is being written."""

    request: Request
    writer: TextWriter
    tokens: list[int] = field(default_factory=list)
    """Written so far, without end-of-document."""
    text: str = ""
    """What is certain of it."""
    text_at: list[int] = field(default_factory=list)
    """Characters before each token, those included that may yet turn out to begin a stop string."""
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish: Finish | None = None

    def take(self, token: int, eod: int) -> None:
        """One more token."""
        if token == eod and not self.request.ignore_eod:
            self.finish = "stop"
        else:
            self.tokens.append(token)
            self.text_at.append(len(self.text) + self.writer.num_held)
            self.text += self.writer.add(token)
            if self.writer.is_stopped:
                self.finish = "stop"
            elif len(self.tokens) == self.request.max_new_tokens:
                self.finish = "length"
        if self.finish is not None:
            self.text += self.writer.finish()
            if self.writer.is_stopped:
                self.finish = "stop"


class Engine:
    """Writes texts in the rows of ``decoder``."""

    def __init__(self, decoder: Decoder, tokenizer: Tokenizer) -> None:
        self.decoder, self.tokenizer = decoder, tokenizer
        self.running: list[Generation] = []
        """In the order of the decoder's rows, without gaps."""
        self.waiting: deque[Generation] = deque()

    def check(self, request: Request) -> None:
        """Raise ``ValueError`` in one sentence for a request that cannot be fulfilled."""
        request.sampling.validate()
        check_room(len(request.prompt), request.max_new_tokens, self.decoder.max_length)
        if not all(0 <= token < self.tokenizer.vocab_size for token in request.prompt):
            raise ValueError(f"the prompt has token ids outside 0 .. {self.tokenizer.vocab_size - 1}")

    def add(self, request: Request) -> Generation:
        """Put a request at the end of the queue."""
        self.check(request)
        generation = Generation(request, TextWriter(self.tokenizer, request.prompt, request.stop))
        self.waiting.append(generation)
        return generation

    def cancel(self, generation: Generation) -> None:
        """Nobody wants this text any more; its row is free at once."""
        if generation.finish is None:
            generation.finish = "cancelled"
            if generation in self.waiting:
                self.waiting.remove(generation)
            self._leave()

    @property
    def is_idle(self) -> bool:
        return not self.running and not self.waiting

    def step(self) -> list[Generation]:
        """One more token for every text; returns those that got one."""
        going = list(self.running)
        if going:
            self._extend(going, [[text.tokens[-1]] for text in going], 0)
        begun = self._admit()
        if begun:
            first = len(self.running)
            self.running += begun
            self._extend(begun, [text.request.prompt for text in begun], first)
        return going + begun

    def run(self, requests: Sequence[Request]) -> list[Generation]:
        """Write all of these to their ends, those with long prompts first: neighbours are padded to the same length."""
        order = sorted(range(len(requests)), key=lambda i: -len(requests[i].prompt))
        found = {index: self.add(requests[index]) for index in order}
        while not self.is_idle:
            self.step()
        return [found[index] for index in range(len(requests))]

    def _admit(self) -> list[Generation]:
        """Take waiting texts, in order, as far as rows and the budget of a step go; one always fits."""
        begun: list[Generation] = []
        longest = 0
        while self.waiting and len(self.running) + len(begun) < self.decoder.rows:
            longest = max(longest, len(self.waiting[0].request.prompt))
            if begun and longest * (len(begun) + 1) > MAX_PREFILL_TOKENS:
                break
            begun.append(self.waiting.popleft())
        return begun

    def _extend(self, texts: list[Generation], tokens: Sequence[Sequence[int]], first_row: int) -> None:
        logits = self.decoder.extend(tokens, first_row)
        num_top = max((text.request.num_logprobs or 0 for text in texts), default=0)
        has_logprobs = any(text.request.num_logprobs is not None for text in texts)
        shape = (len(texts), 1 + has_logprobs + 2 * num_top)
        chosen = None if logits is None else _chosen(logits, texts, has_logprobs, num_top)
        for text, (token, *rest) in zip(texts, self.decoder.share(chosen, shape).tolist(), strict=True):
            if text.request.num_logprobs is not None:
                top = dict(list(zip(map(int, rest[1::2]), rest[2::2], strict=True))[: text.request.num_logprobs])
                text.logprobs.append(TokenLogprobs(rest[0], top))
            text.take(int(token), self.tokenizer.eod)
        self._leave()

    def _leave(self) -> None:
        """Rows of texts that have ended go to the last ones."""
        for row in reversed(range(len(self.running))):
            if self.running[row].finish is not None:
                last = self.running.pop()
                self.decoder.caches.move(len(self.running), row)
                if row < len(self.running):
                    self.running[row] = last


class Written(NamedTuple):
    """A finished text."""

    text: str
    tokens: list[int]
    finish: Finish


def write_texts(engine: Engine, requests: Sequence[Request]) -> list[Written]:
    """``Engine.run`` with the requests dealt out to the data-parallel copies of the model; the same on every process.

    All processes call together, with the same requests.
    """
    mesh = engine.decoder.mesh
    size, rank = mesh.size("dp"), mesh.rank("dp")
    own = [Written(text.text, text.tokens, _ended(text)) for text in engine.run(requests[rank::size])]
    if size == 1:
        return own
    everyone: list[Any] = [None] * size
    dist.all_gather_object(everyone, own, group=mesh.group("dp"))
    return [everyone[index % size][index // size] for index in range(len(requests))]


def _ended(text: Generation) -> Finish:
    assert text.finish is not None
    return text.finish


@torch.inference_mode()
def _chosen(logits: Tensor, texts: Sequence[Generation], has_logprobs: bool, num_top: int) -> Tensor:
    """[B, 1 + ...] float64: each text's token, its log-probability, pairs of (likely token, its log-probability)."""
    tokens = choose(logits, [text.request.sampling for text in texts], [len(text.tokens) for text in texts])
    parts = [tokens.double().unsqueeze(1)]
    if has_logprobs:
        logprobs = logits.double().log_softmax(-1)
        parts.append(logprobs.gather(1, tokens.unsqueeze(1)))
        if num_top:
            values, indices = largest(logprobs, num_top)
            parts.append(torch.stack((indices.double(), values), dim=-1).flatten(1))
    return torch.cat(parts, dim=1)
