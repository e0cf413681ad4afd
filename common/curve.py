"""What a training shows of itself while it goes on, and when it ends early."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

LOSS, RATE = "loss", "learning-rate"
VALIDATION_LOSS, VALIDATION_ACCURACY = "validation-loss", "validation-accuracy"


class Progress(Protocol):
    """Told of epochs done and in all, and of what was measured in the last one by name."""

    def __call__(self, done: int, total: int, *, metrics: Mapping[str, float] = ...) -> None: ...


def unwatched(done: int, total: int, *, metrics: Mapping[str, float] | None = None) -> None:
    """The progress of a training that nobody follows."""


class Curve:
    """The course of one training: after every epoch its mean loss and learning rate, and where asked for, how it does on
    validation samples; with patience, it ends where these no longer get better.

    Args:
        progress: told of every epoch.
        parameters: what is trained.
        validate: gives ``validation-loss`` and ``validation-accuracy`` of the parameters as they are.
        every: epochs between two validations; after the last there always is one. 0: none.
        patience: validations without a smaller loss after which training ends; 0: never.
    """

    def __init__(
        self,
        progress: Progress,
        parameters: Sequence[Tensor] = (),
        validate: Callable[[], Mapping[str, float]] | None = None,
        every: int = 0,
        patience: int = 0,
    ) -> None:
        self._progress, self._parameters = progress, parameters
        self._validate, self._every, self._patience = validate, every, patience
        self._losses, self._steps, self._rate = torch.zeros(()), 0, 0.0
        self._lowest, self._since, self._done = math.inf, 0, 0
        self._best: list[Tensor] = []

    @property
    def ended(self) -> bool:
        """Whether patience is at its end."""
        return 0 < self._patience <= self._since

    def begin(self, done: int, total: int) -> None:
        """Say that the training begins; of one that goes on, it has been said."""
        if done == 0:
            self._progress(0, total)

    def step(self, loss: Tensor, rate: float) -> None:
        """Count one step: its loss, a scalar, which is not read before the epoch ends, and its learning rate."""
        self._losses = self._losses.to(loss.device) + loss.detach()
        self._steps += 1
        self._rate = rate

    def epoch(self, done: int, total: int) -> None:
        """Say what the epoch has come to; of one that went on after an interruption, the steps since."""
        metrics = {RATE: self._rate}
        if self._steps:
            metrics[LOSS] = self._losses.item() / self._steps
        self._losses, self._steps = torch.zeros(()), 0
        if self._validate and self._every and (done % self._every == 0 or done == total):
            found = self._validate()
            metrics.update(found)
            self._since += 1
            if self._patience and found[VALIDATION_LOSS] < self._lowest:
                self._lowest, self._since = found[VALIDATION_LOSS], 0
                self._best = [parameter.detach().clone() for parameter in self._parameters]
        self._done = done
        self._progress(done, total, metrics=metrics)

    def end(self, total: int) -> None:
        """The training is over, whether or not all epochs were needed; with patience, the best parameters are put back."""
        with torch.no_grad():
            for parameter, best in zip(self._parameters, self._best, strict=False):
                parameter.copy_(best)
        if self._done < total:
            self._progress(total, total)

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """What a training that goes on must know of it, as JSON and as tensors."""
        return {"lowest": self._lowest, "since": self._since}, {f"best.{i}": best for i, best in enumerate(self._best)}

    def restore(self, about: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Take over a state of :meth:`state`."""
        self._lowest, self._since = about["lowest"], about["since"]
        self._best = [tensors[f"best.{i}"].to(p.device) for i, p in enumerate(self._parameters) if f"best.{i}" in tensors]
