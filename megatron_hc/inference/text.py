"""Tokens to text as they come: whole characters only, and nothing of a stop string."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_hc.data.tokenizer import Tokenizer

WINDOW = 8  # tokens before the new ones that a tokenizer needs to see: spaces and bytes depend on their neighbours
HALF = "\ufffd"  # what stands for bytes that are not a character, or not yet


class TextWriter:
    """Turns the tokens that follow a prompt into text.

    Text is handed out once it is certain: a character when all its bytes are there, and what may be the beginning of a
    stop string when it turned out not to be. Costs the same per token however long the text is.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], stop: Sequence[str] = ()) -> None:
        self.tokenizer, self.stop = tokenizer, tuple(stop)
        self.is_stopped = False
        """A stop string has come: nothing will follow."""
        self._window = list(prompt[-WINDOW:])
        self._shown = tokenizer.detokenize(self._window).rstrip(HALF)
        self._held = ""
        self._num_waiting = 0  # tokens whose text has not been given

    def add(self, token: int) -> str:
        """The text that is certain now, beyond what earlier calls gave."""
        self._window.append(token)
        text = self.tokenizer.detokenize(self._window)
        self._num_waiting += 1
        if text.endswith(HALF) and self._num_waiting < WINDOW:
            return ""
        self._num_waiting = 0
        new, self._shown = text[len(self._shown) :], text
        if len(self._window) >= 4 * WINDOW:
            self._window = self._window[-WINDOW:]
            self._shown = self.tokenizer.detokenize(self._window)
        return self._certain(new)

    def finish(self) -> str:
        """What is left when no more tokens come."""
        if self.is_stopped:
            return ""
        text = self.tokenizer.detokenize(self._window)
        certain = self._certain(text[len(self._shown) :])
        self._shown = text
        if self.is_stopped:
            return certain
        held, self._held = self._held, ""
        return certain + held

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
