"""The commands ``metamoe data``: for whoever brings data."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from metamoe.common.errors import InvalidSettingError
from metamoe.options import Set, console, json_option, log, notes, put_json, settings_of
from metamoe.show import show_table, some

data = typer.Typer(no_args_is_help=True, help="For whoever brings data: what it is taken for.")


@data.callback()
def _group() -> None:
    """Keep the name of a single command."""


@data.command()
def check(
    path: Annotated[Path, typer.Argument(help="A folder of pictures or of tables, or a file.")],
    preset: Annotated[
        str, typer.Option(help="Preset or TOML file of settings; its seed shows prompts and pictures as it sees them.")
    ] = "glyphs",
    set_: Set = None,
    sheet: Annotated[
        Path | None, typer.Option(help="PNG file to write: a contact sheet of pictures as the model sees them.")
    ] = None,
    as_json: Annotated[
        bool,
        json_option("source, fine, counts (by part, and class or layout), unusual, wrong, prompts (prompt, choices, answer)"),
    ] = False,
) -> None:
    """Say what a file or a folder is taken for: pictures or text, of which layout, how much of it, what is unusual, and three
    prompts as the model sees them. The exit code is 1 if anything in it cannot be read.
    """
    settings = settings_of(preset, set_)
    from metamoe.common.model.seed import load_seed
    from metamoe.examine import examine

    with notes.status("reading"):
        decoder = load_seed(settings.seed_model) if settings.data.is_text else None
        found = examine(path, settings.data, decoder)
    looked = found.survey
    if sheet:
        if found.pictures is None:
            raise InvalidSettingError(f"--sheet {sheet}: {path} has no pictures")
        from metamoe.sheet import contact_sheet

        seed = load_seed(settings.seed_model)
        log.info("%s shows %d pictures", sheet, contact_sheet(found.pictures, looked, seed, settings.data.background, sheet))
    if as_json:
        fine = {"source": found.source, "fine": not looked.wrong, "counts": looked.counts, "unusual": looked.unusual}
        put_json(fine | {"wrong": looked.wrong, "prompts": [asdict(prompt) for prompt in found.prompts]})
        raise typer.Exit(bool(looked.wrong))
    names = sorted({name for by_name in looked.counts.values() for name in by_name})
    rows = [[name, *(str(by_name.get(name, 0)) for by_name in looked.counts.values())] for name in names]
    console.print(f"{path}: data.source = {found.source}", markup=False, highlight=False, soft_wrap=True)
    show_table(console, ["class" if found.source == "images" else "layout", *looked.counts], rows)
    for what, files in looked.unusual.items():
        console.print(f"{len(files)} {what}: {some(files)}", markup=False, highlight=False, soft_wrap=True)
    for number, prompt in enumerate(found.prompts, start=1):
        console.print(f"prompt {number}", style="bold")
        console.print(prompt.prompt, markup=False, highlight=False, soft_wrap=True)
        for choice, text in enumerate(prompt.choices):
            mark = "->" if choice == prompt.answer else "  "
            console.print(f"{mark} {text}", markup=False, highlight=False, soft_wrap=True)
    for line in looked.wrong:
        console.print(f"wrong: {line}", style="red", markup=False, highlight=False, soft_wrap=True)
    if looked.wrong:
        raise typer.Exit(1)
