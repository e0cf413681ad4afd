"""What several commands share: where they write, and the options that settings come from.

A command's result goes to standard output, as text by ``console`` or as JSON by :func:`put_json`. Progress (``notes``) and
messages (``log``) go to standard error, and ``--quiet`` leaves them out.
"""

import json
import logging
from collections.abc import Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text
from typer.models import OptionInfo

from metamoe.common.config import Settings
from metamoe.common.presets import load_settings, with_absolute_paths

console = Console()
notes = Console(stderr=True)
errors = Console(stderr=True)
log = logging.getLogger("metamoe")

Preset = Annotated[str, typer.Option(help="Name of a preset (see 'metamoe presets') or a TOML file of settings.")]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change one setting, e.g. router.top-k=2; repeatable."),
]
DataDir = Annotated[
    Path | None, typer.Option(help="Where domains and public set lie, a folder each, in place of the hub (data.folder).")
]


class Precision(StrEnum):
    """Of matrix products."""

    float32 = "float32"
    bfloat16 = "bfloat16"


Device = Annotated[str, typer.Option(help="Where it computes: auto (a GPU where there is one), cpu or cuda:N.")]
Precise = Annotated[Precision, typer.Option(help="Of matrix products; bfloat16 is for GPUs.")]


class _Lines(logging.Handler):
    """Log lines above whatever progress is shown."""

    def emit(self, record: logging.LogRecord) -> None:
        notes.print(Text(self.format(record)), soft_wrap=True)


def configure(quiet: bool, verbose: bool) -> None:
    """Set up what is said beside results: nothing with ``quiet``; with ``verbose`` more, and with times."""
    notes.quiet = quiet
    lines = _Lines()
    lines.setFormatter(logging.Formatter("%(asctime)s %(message)s" if verbose else "%(message)s"))
    log.handlers[:] = [lines]
    log.propagate = False
    log.setLevel(logging.DEBUG if verbose else logging.INFO)


def json_option(fields: str) -> OptionInfo:
    """The option ``--json`` of a command whose object has these fields."""
    option: OptionInfo = typer.Option("--json", help=f"Print JSON, and nothing else, to standard output: {fields}.")
    return option


def put_json(data: Mapping[str, Any]) -> None:
    """Print one JSON object on a line of its own."""
    typer.echo(json.dumps(data, ensure_ascii=False))


def settings_of(preset: str, overrides: Sequence[str] | None, data_dir: Path | None = None) -> Settings:
    """The settings that a command was given."""
    of_folder = [f"data.folder={data_dir}"] if data_dir is not None else []
    return with_absolute_paths(load_settings(preset, [*(overrides or []), *of_folder]))
