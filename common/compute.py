"""What a computation runs on and with: threads, devices, precision, optimizers, and seeds for its randomness."""

import re
import resource
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from threadpoolctl import threadpool_limits

from metamoe.common.config import DEVICE, Compute, Precision, Weights
from metamoe.common.errors import InvalidSettingError

_TOKENS = 65_536


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
        InvalidSettingError: it names none, or there is none such here.
    """
    if not re.fullmatch(DEVICE, name):
        raise InvalidSettingError(f"device = {name!r} is none of auto, cpu, cuda and cuda:N")
    if name == "auto":
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    device = torch.device("cuda:0" if name == "cuda" else name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        seen = f"{count} GPUs, the last of which is cuda:{count - 1}" if count else "no GPU"
        raise InvalidSettingError(
            f"device {name!r} is not here: torch sees {seen}; set it (compute.client-device or server-device) to auto or cpu"
        )
    return device


def moved(tensor: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """A tensor on a device; to a GPU it goes from pinned memory, and nobody waits for it."""
    device = torch.device(device)
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


@dataclass(frozen=True)
class Place:
    """Where one side computes, and how: the device, the precision of matrix products, how the frozen seed is held, and the
    tokens of a batch (0: as many as is usual there).
    """

    device: torch.device
    precision: Precision = "float32"
    weights: Weights = "auto"
    batch_tokens: int = 0

    @property
    def tokens_at_once(self) -> int | None:
        """Tokens of a batch, by which samples are sorted; None for a fixed number of samples in their order."""
        return self.batch_tokens or (None if self.device.type == "cpu" else _TOKENS)

    def computing(self) -> AbstractContextManager[None]:
        """While open, matrix products have this precision."""
        return precision_of(self.precision, self.device)

    def dtype_of(self, stored: torch.dtype) -> torch.dtype:
        """How a seed is held that is stored so: ``auto`` keeps bfloat16 as it is on a GPU that computes in it."""
        as_stored = self.device.type == "cuda" and self.precision == "bfloat16" and stored == torch.bfloat16
        held = self.weights == "bfloat16" or (self.weights == "auto" and as_stored)
        return torch.bfloat16 if held else torch.float32


ON_CPU = Place(torch.device("cpu"))
"""Where everything computes that nobody has placed elsewhere."""


def place_of(compute: Compute, side: Literal["client", "server"]) -> Place:
    """Where the settings have one side compute.

    Raises:
        InvalidSettingError: there is no such device here, or it does not compute in this precision.
    """
    device = device_of(compute.client_device if side == "client" else compute.server_device)
    return place(device, compute.precision, compute.weights, compute.batch_tokens)


def place(device: torch.device, precision: Precision, weights: Weights = "auto", batch_tokens: int = 0) -> Place:
    """A device with a precision that it has.

    Raises:
        InvalidSettingError: it does not have it.
    """
    if precision == "bfloat16" and device.type == "cuda" and not _computes_bfloat16(device):
        raise InvalidSettingError(
            f"compute.precision = bfloat16: {torch.cuda.get_device_name(device)} ({device}) does not compute in it; set "
            "compute.precision = float32 and compute.weights = auto"
        )
    return Place(device, precision, weights, batch_tokens)


def _computes_bfloat16(device: torch.device) -> bool:
    with torch.cuda.device(device):
        return torch.cuda.is_bf16_supported(including_emulation=False)


def precision_of(name: Precision, device: torch.device) -> AbstractContextManager[None]:
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
