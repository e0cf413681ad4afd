"""Weights & Biases: a run of the project ``metamoe``; without WANDB_API_KEY or WANDB_MODE offline, for ``wandb sync``."""

import io
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import wandb
from PIL import Image

from metamoe.tracking import Outcome

_PROJECT = "metamoe"
FAILURES = (wandb.Error, OSError)


class Wandb:
    """A run, in a process of the library's own."""

    def __init__(self, run: wandb.Run) -> None:
        self.id = run.id
        self._run = run
        # Each curve goes by steps of its own, not by the order in which parties were heard of.
        run.define_metric("*", step_metric="epoch")

    def number(self, name: str, value: float, step: int, when: float) -> None:
        """A point of a curve."""
        self._run.log({name: value, "epoch": step, "time": when})

    def outcome(self, outcome: Outcome) -> None:
        """What the run has come to."""
        self._run.summary.update({"model": outcome.model, **outcome.numbers})
        tables = {
            name: wandb.Table(columns=list(header), data=[list(row) for row in rows])
            for name, (header, rows) in outcome.tables.items()
        }
        pictures = {name: wandb.Image(Image.open(io.BytesIO(png))) for name, png in outcome.pictures.items()}
        page = {"report": wandb.Html(outcome.page.read_text())} if outcome.page else {}
        self._run.log({**tables, **pictures, **page})

    def close(self) -> None:
        """Everything is on disk, or sent."""
        self._run.finish()


def open_run(folder: Path, settings: Mapping[str, Any], known: str | None) -> Wandb:
    """The run with a known id, or a new one with this configuration."""
    reachable = bool(os.environ.get("WANDB_MODE") or os.environ.get("WANDB_API_KEY"))
    run = wandb.init(
        project=os.environ.get("WANDB_PROJECT", _PROJECT),
        name=folder.name,
        dir=folder,
        id=known,
        resume="allow",
        config=dict(settings),
        mode=None if reachable else "offline",
        settings=wandb.Settings(silent=True, console="off", disable_git=True, save_code=False),
    )
    return Wandb(run)
