"""TensorBoard: event files in the run's folder ``tensorboard``."""

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

from metamoe.simulations.benchmark.tables import table
from metamoe.tracking import Outcome

FAILURES = (OSError,)


class TensorBoard:
    """A folder of event files."""

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        self.id = folder.name
        self._writer = SummaryWriter(str(folder / "tensorboard"))
        self._text("settings", table(["setting", "value"], [[name, str(value)] for name, value in settings.items()]))

    def number(self, name: str, value: float, step: int, when: float) -> None:
        """A point of a curve."""
        self._writer.add_scalar(name, value, step, walltime=when)

    def outcome(self, outcome: Outcome) -> None:
        """What the run has come to."""
        self._text("model", [outcome.model])
        for name, value in outcome.numbers.items():
            self._writer.add_scalar(name, value, 0)
        for name, (header, rows) in outcome.tables.items():
            self._text(name, table(header, rows))
        for name, png in outcome.pictures.items():
            pixels = np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))
            self._writer.add_image(name, pixels, dataformats="HWC")

    def close(self) -> None:
        """Everything is on disk."""
        self._writer.close()

    def _text(self, name: str, lines: list[str]) -> None:
        self._writer.add_text(name, "\n".join(lines))


def open_run(folder: Path, settings: Mapping[str, Any], known: str | None) -> TensorBoard:  # noqa: ARG001
    """The event files of a run's folder; what was written before stays beside it."""
    return TensorBoard(folder, settings)
