"""Prometheus metrics of a server."""

from collections.abc import Callable, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest


class Metrics:
    """Counted since the server started.

    Args:
        load: how many requests are computed, and how many wait.
    """

    def __init__(self, load: Callable[[], tuple[int, int]]) -> None:
        self._registry = own = CollectorRegistry()
        self._answers = Counter("metamoe_requests", "Requests answered, by path and status.", ["path", "status"], registry=own)
        self._seconds = Histogram("metamoe_request_seconds", "From a request to its answer's end.", ["path"], registry=own)
        self._tokens = Counter("metamoe_tokens", "Tokens read and written.", ["kind"], registry=own)
        self._experts = Counter("metamoe_expert_tokens", "New tokens, by their experts' weights.", ["expert"], registry=own)
        Gauge("metamoe_computed", "Requests that are computed.", registry=own).set_function(lambda: load()[0])
        Gauge("metamoe_waiting", "Requests that wait.", registry=own).set_function(lambda: load()[1])

    def answered(self, path: str, status: int, seconds: float) -> None:
        self._answers.labels(path, str(status)).inc()
        self._seconds.labels(path).observe(seconds)

    def computed(self, read: int, written: int, experts: Mapping[str, float]) -> None:
        """A text: tokens of its prompt and new ones, and the experts' mean weights."""
        self._tokens.labels("prompt").inc(read)
        self._tokens.labels("completion").inc(written)
        for name, weight in experts.items():
            self._experts.labels(name).inc(weight * written)

    def text(self) -> bytes:
        """As Prometheus reads them."""
        return generate_latest(self._registry)
