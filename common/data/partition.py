"""One domain's training samples divided among the clients that share it, in the ways that the field uses.

flwr-datasets has the same ways. Version 0.6.1, the newest, needs datasets below 5, and with it an older hub client, for all
else too; and its Dirichlet draws other numbers than those behind the published tables.
"""

from collections.abc import Sequence

import numpy as np
from datasets import Dataset

from metamoe.common.config import Data
from metamoe.common.errors import InvalidSettingError

OWNERS = "owner"
"""The column that holds the values of ``data.partition.column``."""


def divided(domain: Dataset, name: str, data: Data, parts: int, rng: np.random.Generator) -> list[np.ndarray]:
    """Divide a domain as ``data.partition`` says.

    Args:
        domain: its training samples.
        name: of the domain, for errors.
        data: settings of the data.
        parts: number of clients that share it.
        rng: source of randomness.

    Returns:
        Sorted row numbers of each client, int64; no row is in two of them. A part can be empty, and of ``pathological`` classes
        can be left to nobody.

    Raises:
        InvalidSettingError: it cannot be divided so.
    """
    chosen = data.partition
    if chosen.kind == "natural":
        return _natural(domain, name, data, parts)
    if chosen.kind == "iid":
        return _in_shares(len(domain), [1.0] * parts, rng)
    if chosen.kind == "sizes":
        if len(chosen.sizes) != parts:
            raise InvalidSettingError(
                f"data.partition.sizes = {list(chosen.sizes)} has {len(chosen.sizes)} numbers, and {parts} clients share "
                f"{name!r}"
            )
        return _in_shares(len(domain), chosen.sizes, rng)
    if chosen.kind == "pathological":
        if "label" not in domain.features:
            raise InvalidSettingError(f"data.partition.kind = pathological goes by classes, and {name!r} has none")
        return by_few_classes(np.asarray(domain["label"]), parts, chosen.classes, rng)
    labels = np.asarray(domain["label"]) if "label" in domain.features else np.zeros(len(domain), dtype=int)
    return by_dirichlet(labels, parts, data.dirichlet, rng)


def by_dirichlet(labels: np.ndarray, parts: int, concentration: float, rng: np.random.Generator) -> list[np.ndarray]:
    """Divide samples among ``parts`` so that each class is spread by a draw from a symmetric Dirichlet distribution (Hsu et al.
    2019).

    Args:
        labels: int [N].
        parts: number of parts.
        concentration: of the Dirichlet distribution; small values give every part few classes.
        rng: source of randomness.

    Returns:
        Sorted row numbers of each part; together they are every row once. A part can be empty.
    """
    rows: list[list[int]] = [[] for _ in range(parts)]
    for label in np.unique(labels):
        of_class = rng.permutation(np.flatnonzero(labels == label))
        shares = rng.dirichlet(np.full(parts, concentration))
        cuts = (np.cumsum(shares)[:-1] * len(of_class)).round().astype(int)
        for part, chunk in zip(rows, np.split(of_class, cuts), strict=True):
            part.extend(chunk.tolist())
    return [np.array(sorted(part), dtype=np.int64) for part in rows]


def by_few_classes(labels: np.ndarray, parts: int, classes: int, rng: np.random.Generator) -> list[np.ndarray]:
    """Give each part ``classes`` of the C classes, or all if there are no more, and divide each class evenly among those who
    have it (after McMahan et al. 2017).

    Classes are shuffled and dealt in turn, so that the parts of each differ by one at most, and none is left over unless
    parts * classes < C.

    Args:
        labels: int [N].
        parts: number of parts.
        classes: of each part.
        rng: source of randomness.

    Returns:
        Sorted row numbers of each part.
    """
    order = rng.permutation(np.unique(labels))
    each = min(classes, len(order))
    holders: list[list[int]] = [[] for _ in order]
    for part in range(parts):
        for deal in range(each):
            holders[(part * each + deal) % len(order)].append(part)
    rows: list[list[int]] = [[] for _ in range(parts)]
    for label, having in zip(order, holders, strict=True):
        of_class = rng.permutation(np.flatnonzero(labels == label))
        for part, chunk in zip(having, np.array_split(of_class, max(1, len(having))), strict=False):
            rows[part].extend(chunk.tolist())
    return [np.array(sorted(part), dtype=np.int64) for part in rows]


def _in_shares(count: int, shares: Sequence[float], rng: np.random.Generator) -> list[np.ndarray]:
    """A shuffle of ``count`` rows in parts of these relative sizes."""
    cuts = (np.cumsum(shares)[:-1] / np.sum(shares) * count).round().astype(int)
    return [np.sort(part) for part in np.split(rng.permutation(count), cuts)]


def _natural(domain: Dataset, name: str, data: Data, parts: int) -> list[np.ndarray]:
    """The rows of each value of a column, in the order of the values."""
    column = data.partition.column
    owners = domain[OWNERS] if OWNERS in domain.features else [None]
    if missing := sum(owner is None for owner in owners):
        where = f"{missing} of its {len(owners)} rows lack it" if OWNERS in domain.features else "its source has no columns"
        raise InvalidSettingError(f"data.partition.column = {column!r} is none of {name!r}: {where}")
    values = sorted(set(owners))
    if len(values) != parts:
        total = len(values) * len(data.domains)
        raise InvalidSettingError(
            f"data.partition.column = {column!r} has {len(values)} values in {name!r}, each of which gets a client, and "
            f"{parts} clients share it; set clients = {total}"
            + (" (domains are taken in turn, so each has to have as many values)" if len(data.domains) > 1 else "")
        )
    number = np.searchsorted(np.array(values), np.array(owners))
    return [np.flatnonzero(number == part) for part in range(parts)]
