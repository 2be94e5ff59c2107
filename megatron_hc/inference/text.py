"""Tokens to text as they come: whole characters only, and nothing of a stop string."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_hc.data.tokenizer import Tokenizer

WINDOW = 8  # tokens before the new ones that a tokenizer needs to see: spaces and bytes depend on their neighbours
HALF = "\ufffd"  # what stands for bytes that are not a character, or not yet
MOST_HALVES = 3  # of a character of four bytes that lacks its last one


class TextWriter:
    """Turns the tokens that follow a prompt into text.

    Text is handed out once it is certain: a character when all its bytes are there, and what may be the beginning of a
    stop string when it turned out not to be. Costs the same per token however long the text is.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], stop: Sequence[str] = ()) -> None:
        self.tokenizer, self.stop = tokenizer, tuple(stop)
        self.is_stopped = False
        """A stop string has come: nothing will follow."""
        self._window = _end_of(tokenizer, prompt)
        self._shown = _whole_part(tokenizer, self._window)
        self._held = ""
        self._num_waiting = 0  # tokens whose text has not been given

    @property
    def num_held(self) -> int:
        """Whole characters that have come and were not given: they may begin a stop string."""
        return len(self._held)

    def add(self, token: int) -> str:
        """The text that is certain now, beyond what earlier calls gave."""
        self._window.append(token)
        text = self.tokenizer.detokenize(self._window)
        self._num_waiting += 1
        if text.endswith(HALF) and self._num_waiting < WINDOW:
            return ""
        # The last ones of bytes that are no character may still be the beginning of one.
        halves = _halves(text)
        new = self._beyond_shown(text, halves)
        self._num_waiting = halves
        if len(self._window) >= 4 * WINDOW:
            self._window = _end_of(self.tokenizer, self._window)
            text = self.tokenizer.detokenize(self._window)
        self._shown = text[: len(text) - min(halves, _halves(text))]
        return self._certain(new)

    def finish(self) -> str:
        """What is left when no more tokens come."""
        if self.is_stopped:
            return ""
        text = self.tokenizer.detokenize(self._window)
        certain = self._certain(self._beyond_shown(text, 0) if self._num_waiting else "")
        self._shown, self._num_waiting = text, 0
        if self.is_stopped:
            return certain
        held, self._held = self._held, ""
        return certain + held

    def _beyond_shown(self, text: str, halves: int) -> str:
        """What ``text``, of the window, has beyond what was given, without so many ``halves`` at its end."""
        if text.startswith(self._shown):
            return text[len(self._shown) : len(text) - halves]
        # A byte that fits nothing makes no character of a whole run of bytes in some tokenizers: of the new ones alone.
        new = self.tokenizer.detokenize(self._window[-self._num_waiting :])
        return new[: len(new) - halves]

    def _certain(self, new: str) -> str:
        text, self._held = self._held + new, ""
        found = [at for at in (text.find(stop) for stop in self.stop) if at >= 0]
        if found:
            self.is_stopped = True
            return text[: min(found)]
        held = max((_overlap(text, stop) for stop in self.stop), default=0)
        if held:
            text, self._held = text[:-held], text[-held:]
        return text


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that begins ``stop``."""
    return next((size for size in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:size])), 0)


def _halves(text: str) -> int:
    """How much of the end of ``text`` may become a character."""
    return min(len(text) - len(text.rstrip(HALF)), MOST_HALVES)


def _end_of(tokenizer: Tokenizer, tokens: Sequence[int]) -> list[int]:
    """The last tokens, about ``WINDOW``, of which the first one begins a character.

    That matters: tokenizers that spell characters as bytes may decode a run of bytes as a whole, or as no character.
    """
    last = max(len(tokens) - WINDOW, 0)
    starts = range(last, max(last - MOST_HALVES, 0) - 1, -1)

    def halves(start: int) -> int:
        # The end may lie inside of a character, too.
        ends = range(max(len(tokens) - MOST_HALVES, start), len(tokens) + 1)
        return min(tokenizer.detokenize(tokens[start:end]).count(HALF) for end in ends)

    return list(tokens[min(starts, key=halves) :])


def _whole_part(tokenizer: Tokenizer, tokens: Sequence[int]) -> str:
    """The text of the tokens without a character at the end that lacks bytes."""
    texts = (tokenizer.detokenize(tokens[: len(tokens) - lacking]) for lacking in range(MOST_HALVES + 1))
    return next((text for text in texts if not text.endswith(HALF)), tokenizer.detokenize(tokens).rstrip(HALF))
