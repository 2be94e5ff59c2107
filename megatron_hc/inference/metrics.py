"""What the endpoint counts, for Prometheus."""

from __future__ import annotations

from typing import Any

from megatron_hc.inference.service import Watcher

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)


class Metrics(Watcher):
    """Counters in a registry of their own."""

    def __init__(self) -> None:
        from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

        self.registry = CollectorRegistry()

        def made(kind: Any, name: str, text: str, labels: tuple[str, ...] = (), **options: Any) -> Any:
            return kind(f"megatron_hc_{name}", text, labels, registry=self.registry, **options)

        self.answers = made(Counter, "http_answers", "Answers of /v1/completions by status.", ("status",))
        self.finishes = made(Counter, "texts_finished", "Texts that ended, by reason.", ("reason",))
        self.prompt_tokens = made(Counter, "prompt_tokens", "Tokens of the prompts of finished texts.")
        self.tokens = made(Counter, "generated_tokens", "Tokens written.")
        self.running = made(Gauge, "texts_running", "Texts that are being written.")
        self.waiting = made(Gauge, "texts_waiting", "Texts in the queue.")
        self.step_seconds = made(Histogram, "step_seconds", "Seconds of one step of all texts.", buckets=SECONDS)
        self.first_seconds = made(
            Histogram, "first_token_seconds", "Seconds until a streamed text's first token.", buckets=SECONDS
        )
        self.text_seconds = made(Histogram, "text_seconds", "Seconds until a text ended.", buckets=SECONDS)

    def answered(self, status: int) -> None:
        self.answers.labels(str(status)).inc()

    def step(self, seconds: float, running: int, waiting: int, tokens: int) -> None:
        self.step_seconds.observe(seconds)
        self.running.set(running)
        self.waiting.set(waiting)
        self.tokens.inc(tokens)

    def first_token(self, seconds: float) -> None:
        self.first_seconds.observe(seconds)

    def finished(self, seconds: float, finish: str, prompt_tokens: int, tokens: int) -> None:
        self.text_seconds.observe(seconds)
        self.finishes.labels(finish).inc()
        self.prompt_tokens.inc(prompt_tokens)

    def page(self) -> bytes:
        from prometheus_client import generate_latest

        return generate_latest(self.registry)
