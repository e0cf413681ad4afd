"""What several commands share: where they write, and the options that settings come from."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from metamoe.common.config import Settings
from metamoe.common.presets import load_settings, with_absolute_paths

console = Console()
errors = Console(stderr=True)

Preset = Annotated[str, typer.Option(help="Name of a preset (see 'metamoe presets') or a TOML file of settings.")]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change one setting, e.g. router.top-k=2; repeatable."),
]
DataDir = Annotated[
    Path | None, typer.Option(help="Where domains and public set lie, a folder each, in place of the hub (data.folder).")
]


def settings_of(preset: str, overrides: Sequence[str] | None, data_dir: Path | None = None) -> Settings:
    """The settings that a command was given."""
    of_folder = [f"data.folder={data_dir}"] if data_dir is not None else []
    return with_absolute_paths(load_settings(preset, [*(overrides or []), *of_folder]))
