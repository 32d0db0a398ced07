"""What a server counts, in Prometheus's format."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from groundup.generation import Engine

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_TOKEN_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1)
_Family = type[GaugeMetricFamily] | type[CounterMetricFamily]
_OF_ENGINES: list[tuple[_Family, str, str, Callable[[Engine], float]]] = [
    (GaugeMetricFamily, "requests_running", "Texts that are being written.", lambda one: one.n_running),
    (GaugeMetricFamily, "requests_waiting", "Requests that wait.", lambda one: one.n_waiting),
    (GaugeMetricFamily, "kv_usage_ratio", "Share of the cache in use.", lambda one: one.n_used / one.capacity),
    (CounterMetricFamily, "engine_steps", "Calls of the model.", lambda one: one.stats.steps),
    (CounterMetricFamily, "prompt_tokens", "Tokens of prompts read.", lambda one: one.stats.prompt_tokens),
    (CounterMetricFamily, "prefix_cache_hits_tokens", "Found in the cache.", lambda one: one.stats.reused_tokens),
    (CounterMetricFamily, "generation_tokens", "Tokens that were written.", lambda one: one.stats.new_tokens),
    (CounterMetricFamily, "spec_draft_tokens", "Tokens that were guessed.", lambda one: one.stats.drafted_tokens),
    (CounterMetricFamily, "spec_accepted_tokens", "Guesses that were right.", lambda one: one.stats.accepted_tokens),
]


class Metrics(Collector):
    """Counters of requests and times, and what the engines say of themselves when they are asked."""

    def __init__(self, engines: Mapping[str, Engine]) -> None:
        self._engines = engines
        self._registry = CollectorRegistry()
        self._registry.register(self)
        own = self._registry
        self.requests = Counter("groundup_requests", "Answered requests.", ["endpoint", "status"], registry=own)
        self.seconds = Histogram(
            "groundup_request_seconds", "From request to answer.", ["endpoint"], buckets=_SECONDS, registry=own
        )
        self.first_token = Histogram(
            "groundup_ttft_seconds", "To the first token.", ["model"], buckets=_SECONDS, registry=own
        )
        self.per_token = Histogram(
            "groundup_time_per_output_token_seconds", "Of a request, behind its first token.", ["model"],
            buckets=_TOKEN_SECONDS, registry=own,
        )  # fmt: skip

    def collect(self) -> Iterable[Metric]:
        """What the engines say."""
        for kind, name, what, value in _OF_ENGINES:
            family = kind(f"groundup_{name}", what, labels=["model"])
            for model, engine in self._engines.items():
                family.add_metric([model], value(engine))
            yield family
        finished = CounterMetricFamily("groundup_texts", "Finished texts.", labels=["model", "reason"])
        for model, engine in self._engines.items():
            for reason, number in list(engine.stats.finished.items()):
                finished.add_metric([model, reason], number)
        yield finished

    def text(self) -> bytes:
        """All of it."""
        return generate_latest(self._registry)
