"""The commands ``metamoe data``: for whoever brings data."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from metamoe.common.errors import InvalidSettingError
from metamoe.options import DataDir, Set, console, json_option, log, notes, put_json, settings_of
from metamoe.show import show_table, some

if TYPE_CHECKING:
    from metamoe.division import Share

_BAR = 20

data = typer.Typer(no_args_is_help=True, help="For whoever brings data: what it is taken for, and how it is divided.")


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


@data.command()
def partition(
    preset: Annotated[str, typer.Option(help="Preset or TOML file of settings.")] = "glyphs",
    set_: Set = None,
    data_dir: DataDir = None,
    clients: Annotated[int | None, typer.Option(help="Number of simulated clients.")] = None,
    show: Annotated[bool, typer.Option("--show", help="Draw who has what of each class.")] = False,
    picture: Annotated[Path | None, typer.Option(help="File to write the drawing to: .png, .svg or .pdf.")] = None,
    as_json: Annotated[bool, json_option("shares (client, domain, owner, samples, counts by class), left-over")] = False,
) -> None:
    """Say how training samples are divided among simulated clients (data.partition), before anything is trained. The exit code
    is that of the error if a client would have nothing.
    """
    overrides = [*(set_ or []), *([f"clients={clients}"] if clients is not None else [])]
    settings = settings_of(preset, overrides, data_dir)
    from metamoe import division

    with notes.status("dividing"):
        found = list(division.shares(settings))
    if picture:
        division.picture(found, picture)
        log.info("%s shows %d clients", picture, len(found))
    left_over = division.left_over(found)
    if as_json:
        fields = ("client", "domain", "owner", "samples", "counts")
        put_json({"shares": [{name: getattr(s, name) for name in fields} for s in found], "left-over": left_over})
    else:
        _show_shares(found)
        if show:
            _draw_shares(found)
        for domain, (count, whole) in left_over.items():
            console.print(f"{domain}: {count:,} of {whole:,} training samples are no client's", highlight=False)
    division.check_shares(found)


def _show_shares(found: "Sequence[Share]") -> None:
    """A table with a row for each client."""
    owned, classes = any(share.owner for share in found), any(len(share.whole) > 1 for share in found)
    header = ["client", "domain", *(["whose"] if owned else []), "samples", *(["classes"] if classes else [])]
    rows = []
    for share in found:
        numbers = [f"{share.samples:,}", *([f"{share.classes} of {len(share.whole)}"] if classes else [])]
        rows.append([share.client, share.domain, *([share.owner] if owned else []), *numbers])
    show_table(console, header, rows)


def _draw_shares(found: "Sequence[Share]") -> None:
    """A line for each client: how much of each class it has, and a bar of its samples."""
    from metamoe.division import strip

    width, most = max(len(share.client) for share in found), max(share.samples for share in found)
    for domain in dict.fromkeys(share.domain for share in found):
        console.print(f"\n{domain}: from nothing of a class to all of it, █; then samples", highlight=False, markup=False)
        for share in found:
            if share.domain == domain:
                bar = "█" * round(_BAR * share.samples / max(1, most))
                line = f"{share.client:<{width}} |{strip(share)}| {bar} {share.samples:,}"
                console.print(line, highlight=False, markup=False, soft_wrap=True)
