"""What a computation runs on and with: threads, devices, precision, optimizers, and seeds for its randomness."""

import resource
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from threadpoolctl import threadpool_limits

from metamoe.common.errors import InvalidSettingError


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


def device_of(name: str) -> torch.device:
    """The device that a setting names.

    Raises:
        InvalidSettingError: there is none such here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InvalidSettingError(
            f"{name!r} is not here: torch sees {torch.cuda.device_count()} GPUs; set compute.client-device or server-device to "
            "auto or cpu"
        )
    return device


def precision_of(name: str, device: torch.device) -> AbstractContextManager[None]:
    """While open, matrix products on this device have this precision."""
    return torch.autocast(device.type, torch.bfloat16) if name == "bfloat16" else nullcontext()


def full_precision(device: torch.device) -> AbstractContextManager[None]:
    """While open, nothing on this device is computed in less than the precision of its inputs."""
    available = torch.amp.is_autocast_available(device.type)
    return torch.autocast(device.type, enabled=False) if available else nullcontext()


def peak_memory() -> dict[str, int]:
    """The largest memory that this process has had, in bytes: ``host``, and of GPUs that it used ``card``, all together."""
    peak = {"host": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        peak["card"] = sum(torch.cuda.max_memory_allocated(card) for card in range(torch.cuda.device_count()))
    return peak


def optimizer_of(name: str, groups: list[dict[str, Any]], weight_decay: float) -> torch.optim.Optimizer:
    """The optimizer that a setting names, over groups of parameters with their learning rates."""
    if name == "sgd":
        return torch.optim.SGD(groups, momentum=0.9, weight_decay=weight_decay)
    return torch.optim.AdamW(groups, weight_decay=weight_decay)


def derived_seed(seed: int, *purpose: int) -> int:
    """An independent 63-bit seed for one purpose (stage, client, ...) out of the run's seed."""
    return int(np.random.SeedSequence([seed, *purpose]).generate_state(1, np.uint64)[0] >> 1)
