"""Batches by tokens, and in halves where a device has not memory for all of one."""

import logging
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from metamoe.common.errors import NotEnoughMemoryError

_REMEDY = (
    "set compute.precision = bfloat16, a smaller data.prompt-tokens or answer-tokens for text, a larger device, or cpu in "
    "compute.client-device or server-device"
)
_S = TypeVar("_S")
_T = TypeVar("_T")


def by_tokens(lengths: Tensor, most: int) -> list[Tensor]:
    """Sequences in batches of near lengths, each of at most ``most`` tokens with its padding, or of one sequence; the longest
    come first, so that what does not fit is found at once.

    Args:
        lengths: of N sequences, in tokens, int64 [N].
        most: tokens of a batch, padding counted.

    Returns:
        Row numbers of each batch; together they are every row once.
    """
    order = lengths.argsort(descending=True, stable=True)
    ordered = lengths[order].tolist()
    batches, start = [], 0
    for end in range(1, len(ordered) + 1):
        if end == len(ordered) or (end + 1 - start) * ordered[start] > most:
            batches.append(order[start:end])
            start = end
    return batches


class Fitting:
    """Computes some samples at a time, and half as many from then on wherever the device has not memory for them.

    Args:
        cost: what some samples take, in any measure that grows with them: tokens with padding, or their number.
    """

    def __init__(self, cost: Callable[[Tensor], int] = len) -> None:
        self._cost = cost
        self._too_many: int | None = None

    def __call__(self, compute: Callable[[Tensor], _T], rows: Tensor) -> list[tuple[Tensor, _T]]:
        """What ``compute`` makes of these rows, in one part or several, each with its rows, in their order.

        A part that does not fit is computed again in halves, so ``compute`` must leave nothing behind when it fails.

        Raises:
            NotEnoughMemoryError: one row alone does not fit.
        """
        waiting, found = [rows], list[tuple[Tensor, _T]]()
        while waiting:
            some = waiting.pop(0)
            known = self._too_many is not None and self._cost(some) >= self._too_many and len(some) > 1
            result = None if known else _unless_too_large(compute, some, len(some))
            if result is not None:
                found.append((some, result[0]))
                continue
            if not known:
                self._too_many = self._cost(some)
            waiting[:0] = some.tensor_split(2)
        return found


def fits(compute: Callable[[int], None], count: int) -> bool:
    """Whether so many samples could be computed at a time; that they could not is said.

    Raises:
        NotEnoughMemoryError: it was one.
    """
    return _unless_too_large(compute, count, count) is not None


def _unless_too_large(compute: Callable[[_S], _T], what: _S, count: int) -> tuple[_T] | None:
    """What is computed; None where memory does not do for it, which is said."""
    try:
        return (compute(what),)
    except torch.OutOfMemoryError as error:
        if count == 1:
            raise NotEnoughMemoryError(f"one sample does not fit into the device's memory: {error}; {_REMEDY}") from error
    # Outside of the handler, as its error holds on to what was computed so far.
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    logging.getLogger("metamoe").warning(
        "the device has not memory for %d samples at a time; going on with %d", count, -(-count // 2)
    )
    return None
