"""Choosing the next token, and the plainest way to continue one text. Dims: B texts, V vocabulary, K candidates."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_hc.model.gpt import GPT


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen."""

    temperature: float = 1.0
    """0: the most likely token."""
    top_k: int = 0
    """Only the k most likely tokens (0: all)."""
    top_p: float = 1.0
    """Only the most likely tokens that together hold this probability."""
    seed: int = 1234
    """Seed of the draws."""

    def validate(self) -> None:
        """Raise ``ValueError`` in one sentence at a value that makes no sense."""
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"--temperature must not be negative, not {self.temperature}")
        if self.top_k < 0:
            raise ValueError(f"--top-k must not be negative, not {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"--top-p must be in (0, 1], not {self.top_p}")


def choose(logits: Tensor, samplings: Sequence[Sampling], steps: Sequence[int]) -> Tensor:
    """logits [B, V], how to choose for each text and how many tokens it has written -> token ids [B].

    A draw depends on the seed and the step alone: a text is the same whatever others are written beside it.
    """
    tokens = logits.argmax(-1)
    drawn = [row for row, sampling in enumerate(samplings) if sampling.temperature > 0]
    is_cut = [samplings[row].top_p < 1 or 0 < samplings[row].top_k < logits.shape[-1] for row in drawn]
    for rows, cuts in (
        ([row for row, cut in zip(drawn, is_cut, strict=True) if not cut], False),
        ([row for row, cut in zip(drawn, is_cut, strict=True) if cut], True),
    ):
        if rows:
            own = [samplings[row] for row in rows]
            uniform = [_uniform(samplings[row].seed, steps[row]) for row in rows]
            index = torch.tensor(rows, device=logits.device)
            tokens[index] = _draw(logits[index], own, uniform, cuts)
    return tokens


def _uniform(seed: int, step: int) -> float:
    """A number in [0, 1) that depends on its arguments only."""
    digest = hashlib.blake2b(f"{seed}/{step}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) / 2**53


def _draw(logits: Tensor, samplings: Sequence[Sampling], uniform: Sequence[float], cuts: bool) -> Tensor:
    """logits [B, V] -> [B]: the token at which the cumulative probability passes ``uniform``."""

    def column(values: Sequence[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64, device=logits.device).unsqueeze(1)

    # From the largest down: at any temperature above 0 its quotient is then 0, and not infinite.
    logits = logits.double() - logits.double().amax(-1, keepdim=True)
    logits = logits / column([sampling.temperature for sampling in samplings])
    candidates = None
    if cuts:
        limits = [sampling.top_k or logits.shape[1] for sampling in samplings]
        logits, candidates = largest(logits, min(max(limits), logits.shape[1]))  # [B, K]
        places = torch.arange(logits.shape[1], device=logits.device)
        probabilities = logits.masked_fill(places >= column(limits), float("-inf")).softmax(-1)
        before = probabilities.cumsum(-1) - probabilities
        probabilities = probabilities.masked_fill(before >= column([s.top_p for s in samplings]), 0.0)
        # In the order of the vocabulary: how nearly equal ones were sorted, a matter of rounding, decides nothing.
        candidates, order = candidates.sort(-1)
        probabilities = probabilities.gather(1, order)
    else:
        probabilities = logits.softmax(-1)
    cumulative = probabilities.cumsum(-1)
    total = cumulative[:, -1:]
    picked = torch.searchsorted(cumulative, column(uniform) * total, right=True)
    # Rounding may reach the total: then the last token that has a probability.
    picked = picked.minimum((cumulative < total).sum(-1, keepdim=True))
    return (picked if candidates is None else candidates.gather(1, picked)).squeeze(1)


def largest(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """[B, V] -> the k largest of each row and where they are, [B, k], in order; of equal ones the lower index first.

    So the first ones are the same whatever k is: what a text takes of them does not depend on what its neighbours need.
    """
    if k < values.shape[1] // 4:
        # topk says nothing about equal values, not even which of them it takes: take all that equal the last one,
        # and sort these few again by index, then by value.
        last = values.topk(k).values[:, -1:]
        count = int((values >= last).sum(-1).max())  # 0 for rows of NaN
        indices = values.topk(max(count, k)).indices.sort(-1).values
        ordered = values.gather(1, indices).sort(dim=-1, descending=True, stable=True)
        return ordered.values[:, :k], indices.gather(1, ordered.indices[:, :k])
    ordered = values.sort(dim=-1, descending=True, stable=True)
    return ordered.values[:, :k], ordered.indices[:, :k]


@torch.no_grad()
def generate(
    model: GPT, prompt: Sequence[int], max_new_tokens: int, sampling: Sampling, *, eod: int, use_cache: bool = True
) -> Iterator[int]:
    """Yield the tokens that follow ``prompt``, up to ``max_new_tokens`` or the end-of-document token.

    One text in one process; ``inference.Engine`` writes many. Without the cache every step reads the whole text: the
    same tokens, for checking. Raises ``ValueError`` where the text would not fit the model's positions.
    """
    check_room(len(prompt), max_new_tokens, model.config.max_positions)
    model.eval()
    text = torch.tensor([list(prompt)], device=next(model.parameters()).device)
    caches = model.new_caches(len(prompt) + max_new_tokens, 1) if use_cache else None
    new = text
    for step in range(max_new_tokens):
        hidden = model(new if use_cache else text, caches=caches)
        token = choose(model.output.logits(hidden[-1:])[0], [sampling], [step])
        if int(token) == eod:
            return
        yield int(token)
        new = token[:, None]
        text = torch.cat((text, new), dim=1)


def check_room(prompt_tokens: int, max_new_tokens: int, room: int) -> None:
    """Refuse a text that would not fit the model's positions."""
    if prompt_tokens == 0:
        raise ValueError("the prompt has no tokens: give --prompt at least one character")
    if max_new_tokens < 1:
        raise ValueError(f"--max-new-tokens must be at least 1, not {max_new_tokens}")
    if prompt_tokens + max_new_tokens > room:
        raise ValueError(
            f"--max-new-tokens ({max_new_tokens}) after a prompt of {prompt_tokens} tokens exceeds "
            f"--max-position-embeddings ({room}) of the model: shorten one of them"
        )
