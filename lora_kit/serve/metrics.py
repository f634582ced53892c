"""What a server counts, in Prometheus' text format."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class Metrics:
    """Counters of one server, in a registry of its own.

    engine_stats: called at each scrape; its numbers appear as `lora_kit_engine_<name>`.
    """

    def __init__(self, engine_stats: Callable[[], Mapping[str, float]]):
        self.registry = CollectorRegistry()
        made = {"registry": self.registry}
        self.requests = Counter(
            "lora_kit_http_requests", "HTTP requests answered.", ["path", "status"], **made
        )
        self.finished = Counter(
            "lora_kit_completions", "Completions ended.", ["adapter", "reason"], **made
        )
        self.tokens = Counter(
            "lora_kit_tokens", "Tokens read and written.", ["adapter", "kind"], **made
        )
        self.first_token = Histogram(
            "lora_kit_first_token_seconds", "Time to first token.", buckets=SECONDS, **made
        )
        self.total = Histogram(
            "lora_kit_completion_seconds", "Time of a completion.", buckets=SECONDS, **made
        )
        self.registry.register(_Engine(engine_stats))

    def completion(self, adapter: str, prompt_tokens: int, tokens: int, finished) -> None:
        """Count one ended completion. adapter: its name, or the base's; finished: the engine's
        word on it (reason, first_token_s, total_s)."""
        self.finished.labels(adapter, finished.reason).inc()
        self.tokens.labels(adapter, "prompt").inc(prompt_tokens)
        self.tokens.labels(adapter, "completion").inc(tokens)
        if finished.first_token_s is not None:
            self.first_token.observe(finished.first_token_s)
        self.total.observe(finished.total_s)

    def text(self) -> bytes:
        return generate_latest(self.registry)


class _Engine:
    """The engine's own numbers, read when they are asked for."""

    def __init__(self, stats: Callable[[], Mapping[str, float]]):
        self._stats = stats

    def collect(self):
        for name, value in self._stats().items():
            if isinstance(value, bool) or not isinstance(value, int | float):
                continue
            gauge = GaugeMetricFamily(f"lora_kit_engine_{name}", f"The engine's {name}.")
            gauge.add_metric([], value)
            yield gauge

    def describe(self):  # or registering would collect once, before the engine runs
        return []
