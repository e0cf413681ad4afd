"""How good a model is for each client of a simulation: on its domain's tests, weighted by the client's own classes."""

from collections.abc import Mapping, Sequence

import numpy as np

from metamoe.common.config import Settings
from metamoe.common.data.datasets import load_private

Right = tuple[np.ndarray, np.ndarray]
"""Of the samples of a test set whether each was right, bool [N], and the class of each, int64 [N]."""


def class_counts(settings: Settings) -> dict[str, np.ndarray]:
    """Training samples of each client by class, int64 [C]; of text, which has no classes, nobody's."""
    if settings.data.is_text:
        return {name: np.zeros(0, dtype=np.int64) for name in settings.member_names}
    counts = {}
    for client in settings.members:
        samples = load_private(settings, client, "train")
        classes = len(samples.features["label"].names)
        counts[settings.client_names[client]] = np.bincount(samples["label"], minlength=classes)
    return counts


def client_accuracy(counts: np.ndarray, tests: Sequence[Right]) -> float:
    """Accuracy in percent, sum over classes of n_c a_c / sum of n_c, for a_c the accuracy on class c and n_c the client's
    samples of it, over the classes that are tested; without any, accuracy.

    Args:
        counts: n_c, int64 [C].
        tests: one or more test sets.
    """
    right, classes = (np.concatenate(parts) for parts in zip(*tests, strict=True))
    if not counts.any():
        return 100 * float(right.mean())
    tested = np.bincount(classes, minlength=len(counts))
    hits = np.bincount(classes, weights=right, minlength=len(counts))
    weights = counts * (tested > 0)
    if not weights.any():
        return 100 * float(right.mean())
    return 100 * float((weights * hits / np.maximum(1, tested)).sum() / weights.sum())


def by_client(settings: Settings, counts: Mapping[str, np.ndarray], tests: Mapping[str, Sequence[Right]]) -> dict[str, float]:
    """The same for each client, by the tests of its domain, in percent, to two digits."""
    domains = {settings.client_names[client]: settings.client_domain(client) for client in settings.members}
    return {name: round(client_accuracy(counts[name], tests[domain]), 2) for name, domain in domains.items()}
