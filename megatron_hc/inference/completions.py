"""The body of POST /v1/completions, checked field by field.

A field that OpenAI knows and this endpoint does not is refused unless it asks for nothing; so is an unknown one.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megatron_hc.data.tokenizer import Tokenizer
from megatron_hc.inference.engine import Request
from megatron_hc.model.generate import Sampling

NOTHING: dict[str, tuple[Any, ...]] = {
    "best_of": (None, 1),
    "frequency_penalty": (None, 0),
    "presence_penalty": (None, 0),
    "logit_bias": (None, {}),
    "suffix": (None, ""),
}
"""Fields that are not offered -> values that ask for nothing."""
IGNORED = ("user", "metadata", "store")
FIELDS = (
    "model prompt max_tokens temperature top_p top_k n stream stream_options logprobs echo stop seed ignore_eos".split()
)
MAX_CHOICES, MAX_STOPS, MAX_STOP_CHARACTERS, MAX_LOGPROBS = 128, 16, 256, 20


class BadRequest(Exception):
    """An answer other than 200, in OpenAI's form."""

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        kind: str = "invalid_request_error",
        param: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.message, self.status, self.kind, self.param, self.headers = message, status, kind, param, headers

    def body(self) -> dict[str, Any]:
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": None}}


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How much one request may ask for."""

    prompt_tokens: int
    new_tokens: int
    total_tokens: int
    """Prompt and continuation together: the model's positions."""
    body_bytes: int = 1 << 20


@dataclass(frozen=True)
class Completion:
    """What a body asks for."""

    requests: list[Request]
    """n for each prompt."""
    echoed: list[str]
    """Text that stands before each continuation."""
    stream: bool
    include_usage: bool
    has_logprobs: bool
    num_prompt_tokens: int


def parse_completion(body: Any, tokenizer: Tokenizer, limits: Limits, model_name: str) -> Completion:
    """Raises ``BadRequest`` at the first field that cannot be."""
    if not isinstance(body, dict):
        raise BadRequest("the body must be a JSON object")
    _check_names(body, model_name)
    prompts = _prompts(body.get("prompt"), tokenizer, limits)
    number = _integer(body, "n", 1, 1, MAX_CHOICES)
    if len(prompts) * number > MAX_CHOICES:
        raise BadRequest(f"{len(prompts)} prompts times n ({number}) are more than {MAX_CHOICES} texts", param="n")
    new_tokens = _integer(body, "max_tokens", 16, 1, limits.new_tokens)
    for prompt, _ in prompts:
        if len(prompt) + new_tokens > limits.total_tokens:
            raise BadRequest(
                f"the prompt has {len(prompt)} tokens and max_tokens is {new_tokens}, but the model has room for "
                f"{limits.total_tokens} together",
                param="max_tokens",
            )
    logprobs = None
    if body.get("logprobs") is not None:
        logprobs = _integer(body, "logprobs", 0, 0, min(MAX_LOGPROBS, tokenizer.vocab_size))
    echo = _boolean(body, "echo")
    if echo and logprobs is not None:
        raise BadRequest("echo with logprobs is not offered: log-probabilities of prompts", param="echo")
    stop = _stop(body.get("stop"))
    sampling = _sampling(body)
    requests = [
        Request(
            prompt=prompt,
            max_new_tokens=new_tokens,
            sampling=Sampling(**{**vars(sampling), "seed": sampling.seed + index}),
            stop=stop,
            num_logprobs=logprobs,
            ignore_eod=_boolean(body, "ignore_eos"),
        )
        for prompt, _ in prompts
        for index in range(number)
    ]
    options = {} if body.get("stream_options") is None else body["stream_options"]
    if not isinstance(options, dict) or set(options) - {"include_usage"}:
        raise BadRequest("stream_options knows include_usage only", param="stream_options")
    return Completion(
        requests=requests,
        echoed=[text if echo else "" for _, text in prompts for _ in range(number)],
        stream=_boolean(body, "stream"),
        include_usage=_boolean(options, "include_usage"),
        has_logprobs=logprobs is not None,
        num_prompt_tokens=sum(len(prompt) for prompt, _ in prompts),
    )


def _check_names(body: dict[str, Any], model_name: str) -> None:
    for name, values in NOTHING.items():
        if name in body and not any(body[name] == value and type(body[name]) is not bool for value in values):
            raise BadRequest(f"{name} is not offered", param=name)
    unknown = [name for name in body if name not in (*FIELDS, *NOTHING, *IGNORED)]
    if unknown:
        raise BadRequest(f"unknown field {unknown[0][:80]!r}", param=unknown[0][:80])
    model = body.get("model", model_name)
    if model != model_name:
        raise BadRequest(f"there is no model {str(model)[:80]!r}, only {model_name!r}", status=404, param="model")


def _prompts(value: Any, tokenizer: Tokenizer, limits: Limits) -> list[tuple[tuple[int, ...], str]]:
    """(tokens, text) of each prompt: text, tokens, or a list of either."""
    is_many = isinstance(value, list) and bool(value) and isinstance(value[0], str | list)
    values = value if is_many else [value]
    if len(values) > MAX_CHOICES:
        raise BadRequest(f"{len(values)} prompts are more than {MAX_CHOICES}", param="prompt")
    return [_prompt(item, tokenizer, limits) for item in values]


def _prompt(value: Any, tokenizer: Tokenizer, limits: Limits) -> tuple[tuple[int, ...], str]:
    if isinstance(value, str):
        try:
            tokens = tuple(int(token) for token in tokenizer.tokenize(value))
        except ValueError as error:
            raise BadRequest(f"the prompt cannot be tokenized: {error}", param="prompt") from error
        text = value
    elif isinstance(value, list) and all(type(token) is int for token in value):
        tokens = tuple(value)
        if any(not 0 <= token < tokenizer.vocab_size for token in tokens):
            raise BadRequest(f"the prompt has token ids outside 0 .. {tokenizer.vocab_size - 1}", param="prompt")
        text = tokenizer.detokenize(tokens)
    else:
        raise BadRequest("prompt must be text, a list of token ids, or a list of either", param="prompt")
    if not tokens:
        raise BadRequest("the prompt is empty", param="prompt")
    if len(tokens) > limits.prompt_tokens:
        raise BadRequest(
            f"the prompt has {len(tokens)} tokens, more than the {limits.prompt_tokens} allowed", param="prompt"
        )
    return tokens, text


def _sampling(body: dict[str, Any]) -> Sampling:
    seed = _integer(body, "seed", random.getrandbits(32), -(2**63), 2**63 - 1)
    return Sampling(
        temperature=_number(body, "temperature", 1.0, 0.0, 100.0),
        top_p=_number(body, "top_p", 1.0, 0.0, 1.0, excludes_low=True),
        top_k=_integer(body, "top_k", 0, 0, 2**31),
        seed=seed,
    )


def _stop(value: Any) -> tuple[str, ...]:
    values: Sequence[Any] = () if value is None else value if isinstance(value, list) else [value]
    is_good = all(isinstance(text, str) and 0 < len(text) <= MAX_STOP_CHARACTERS for text in values)
    if not is_good or len(values) > MAX_STOPS:
        raise BadRequest(
            f"stop must be at most {MAX_STOPS} texts of 1 to {MAX_STOP_CHARACTERS} characters", param="stop"
        )
    return tuple(values)


def _boolean(body: dict[str, Any], name: str) -> bool:
    value = body.get(name)
    if value not in (None, True, False) or isinstance(value, int | float) and not isinstance(value, bool):
        raise BadRequest(f"{name} must be true or false", param=name)
    return bool(value)


def _integer(body: dict[str, Any], name: str, default: int, low: int, high: int) -> int:
    value = body.get(name)
    if value is None:
        return min(default, high)
    if type(value) is not int or not low <= value <= high:
        raise BadRequest(f"{name} must be a whole number in {low} .. {high}", param=name)
    return value


def _number(
    body: dict[str, Any], name: str, default: float, low: float, high: float, *, excludes_low: bool = False
) -> float:
    value = body.get(name)
    if value is None:
        return default
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    # NaN, infinities and integers that no float can hold are outside of any bounds.
    if not is_number or not low <= value <= high or (excludes_low and value == low):
        raise BadRequest(f"{name} must be a number in {'(' if excludes_low else '['}{low:g}, {high:g}]", param=name)
    return float(value)
