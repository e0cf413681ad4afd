"""What several commands share: where they write, and the options that settings come from."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from metamoe.common.config import Settings
from metamoe.common.presets import load_settings

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
    """The settings that a command was given, with all paths as seen from anywhere: a run's processes work in other folders."""
    of_folder = [f"data.folder={data_dir}"] if data_dir is not None else []
    settings = load_settings(preset, [*(overrides or []), *of_folder])
    if Path(settings.seed_model).exists() and settings.seed_model != "glyphs":
        settings = settings.model_copy(update={"seed_model": str(Path(settings.seed_model).absolute())})
    if settings.data.folder:
        folder = str(Path(settings.data.folder).absolute())
        settings = settings.model_copy(update={"data": settings.data.model_copy(update={"folder": folder})})
    return settings
