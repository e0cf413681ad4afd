"""Training that can be stopped at any moment and goes on to the same bits."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from metamoe.common.arrays import read_arrays, write_arrays
from metamoe.common.curve import Curve
from metamoe.common.errors import StateFileError

_KEPT = 2
_OTHERS = "other."


class Checkpoint:
    """The state of a training on disk: what is trained, its optimizer, and where its random numbers come from.

    The newest state that is whole is the one that counts; the one before is kept for the case that it is not.

    Args:
        folder: for this training alone, named by what decides it, and the caller's to remove; None where nothing is to be kept.
        minutes: between two states within an epoch, beside the one of every epoch; 0 for none within.
        parameters: what is trained.
        optimizer: over these parameters; learning rates are the caller's, who knows them by the step.
        generator: where the order of samples, or noise, comes from.
    """

    def __init__(
        self,
        folder: Path | None,
        minutes: float,
        parameters: Sequence[Tensor],
        optimizer: torch.optim.Optimizer,
        generator: torch.Generator,
    ) -> None:
        self._folder, self._seconds = folder, 60 * minutes
        self._parameters, self._optimizer, self._generator = parameters, optimizer, generator
        self._saved = time.monotonic()

    def steps(self, epochs: int, count: int, size: int, curve: Curve) -> Iterator[tuple[int, Tensor]]:
        """The steps of a training that are left: number of the step from the very beginning, and rows of its batch.

        Every epoch is another permutation of ``count`` samples in batches of ``size``. A step counts as done, and may be saved,
        when the next one is asked for.

        Args:
            epochs: in all.
            count: of samples.
            size: of a batch.
            curve: told of every epoch; its state is kept with the training's, and it may end it.
        """
        begun, tensors = self.restore()
        if begun:
            curve.restore(begun["curve"], tensors)
        per_epoch = -(-count // size)
        first = begun.get("step", 0)
        curve.begin(first // per_epoch, epochs)
        for epoch in range(first // per_epoch, epochs):
            if curve.ended:
                break
            before = self._generator.get_state()
            for number, rows in enumerate(torch.randperm(count, generator=self._generator).split(size)):
                step = epoch * per_epoch + number
                if step < first:
                    continue
                yield step, rows
                if number + 1 < per_epoch and self.due():
                    self._save_step(step + 1, curve, before)
            curve.epoch(epoch + 1, epochs)
            self._save_step((epoch + 1) * per_epoch, curve)
        curve.end(epochs)

    def _save_step(self, step: int, curve: Curve, generator_state: Tensor | None = None) -> None:
        about, tensors = curve.state()
        self.save({"step": step, "curve": about}, generator_state, tensors)

    def due(self) -> bool:
        """Whether the last state is as old as the settings allow."""
        return bool(self._seconds) and time.monotonic() - self._saved >= self._seconds

    def save(
        self, about: dict[str, Any], generator_state: Tensor | None = None, others: Mapping[str, Tensor] | None = None
    ) -> None:
        """Write the state as it is now.

        Args:
            about: how far the training is, as JSON; :meth:`restore` gives it back.
            generator_state: the generator's, where it is not the present one.
            others: tensors to keep beside; :meth:`restore` gives them back.
        """
        if self._folder is None:
            return
        tensors = {f"{_OTHERS}{name}": tensor for name, tensor in (others or {}).items()}
        tensors |= {f"parameter.{i}": tensor for i, tensor in enumerate(self._parameters)}
        for i, state in self._optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{i}.{name}": value for name, value in state.items() if isinstance(value, Tensor)}
        tensors["generator"] = self._generator.get_state() if generator_state is None else generator_state
        files = self._files()
        number = int(files[-1].stem) + 1 if files else 0
        write_arrays(
            self._folder / f"{number:09d}.safetensors", {n: t.detach().cpu().numpy() for n, t in tensors.items()}, about
        )
        for file in files[: max(0, len(files) + 1 - _KEPT)]:
            file.unlink(missing_ok=True)
        self._saved = time.monotonic()

    def restore(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Take over the newest state that is whole; what :meth:`save` was told about it, and given beside, or nothing where
        there is none.
        """
        for file in reversed(self._files()):
            # An older state, or none, is as good but for the time: a damaged one is not worth a failure.
            with suppress(StateFileError):
                arrays, about = read_arrays(file)
                tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
                self._take(tensors)
                return about, {n.removeprefix(_OTHERS): t for n, t in tensors.items() if n.startswith(_OTHERS)}
        return {}, {}

    def _files(self) -> list[Path]:
        return sorted(self._folder.glob("*.safetensors")) if self._folder is not None and self._folder.is_dir() else []

    @torch.no_grad()
    def _take(self, tensors: Mapping[str, Tensor]) -> None:
        for i, parameter in enumerate(self._parameters):
            parameter.copy_(tensors[f"parameter.{i}"])
        state: dict[int, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            if name.startswith("optimizer."):
                _, number, part = name.split(".", 2)
                state.setdefault(int(number), {})[part] = tensor
        self._optimizer.load_state_dict({**self._optimizer.state_dict(), "state": state})
        self._generator.set_state(tensors["generator"])
