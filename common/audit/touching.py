"""Which settings touch private data: all but those listed here. A new one does until somebody shows that it does not."""

from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any

from metamoe.common.config import Settings

_FREE = {
    *("preset", "quorum", "without", "data.workers", "proxies.pool", "proxies.candidates"),
    "expert-training.checkpoint-minutes",
    *("experts.max", "router.proxy-weights", "router.seed-expert", "router.seed-log-odds", "router.temperature"),
    *("router.top-k", "router.renormalise", "router.context", "router.learn-context"),
}
"""The server's own work, and when things happen: nothing that a client computes and sends depends on them."""
_FREE_GROUPS = {"router-training", "compute"}
_NOT_FREE = {"compute.precision", "compute.micro-batch-size"}


def touching(settings: Settings | Mapping[str, Any]) -> dict[str, Any]:
    """Each setting on which anything depends that a client computes of its private samples, by name, with its value as JSON has
    it.

    Args:
        settings: a run's, or what they are in JSON.
    """
    values = settings.model_dump(mode="json", by_alias=True) if isinstance(settings, Settings) else settings
    return {name: value for name, value in _leaves("", values) if not _is_free(name)}


@lru_cache(maxsize=1)
def touching_names() -> frozenset[str]:
    """The names of all that touch private data."""
    return frozenset(touching(Settings()))


def _is_free(name: str) -> bool:
    return name in _FREE or (name.partition(".")[0] in _FREE_GROUPS and name not in _NOT_FREE)


def _leaves(group: str, values: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _leaves(f"{group}{key}.", value)
        else:
            yield group + key, value
