"""Threads and randomness: what makes the same settings give the same bits."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from threadpoolctl import threadpool_limits


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Compute with exactly ``count`` threads: another number sums in another order and rounds differently."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        with threadpool_limits(count):
            yield
    finally:
        torch.set_num_threads(before)


def derived_seed(seed: int, *purpose: int) -> int:
    """An independent 63-bit seed for one purpose (stage, client, ...) out of the run's seed."""
    return int(np.random.SeedSequence([seed, *purpose]).generate_state(1, np.uint64)[0] >> 1)
