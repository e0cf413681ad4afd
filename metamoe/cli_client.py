"""The commands ``metamoe client``: for those who hold data."""

from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer

from metamoe.cli_deploy import DOCTOR_FIELDS, common_of, show_examined
from metamoe.common.errors import InvalidSettingError
from metamoe.common.presets import load_settings
from metamoe.options import Set, console, json_option, log, notes, put_json
from metamoe.show import show_table, some

client = typer.Typer(no_args_is_help=True, help="For those who hold data: what is in it, and what of it would leave.")


@client.command()
def check(
    folder: Annotated[
        Path,
        typer.Argument(help="Data folder: train/CLASS NAME/*.png and test/CLASS NAME/*.png, or tables train.csv and test.csv."),
    ],
    preset: Annotated[str, typer.Option(help="Preset or TOML file of the run, which decides what would be sent.")] = "glyphs",
    set_: Set = None,
    as_json: Annotated[
        bool,
        json_option(
            "fine, kind, counts (by split and class), unusual (what, and the files), "
            "sent (when, name, dtype, shape, optional, bytes), "
            "bytes, wrong"
        ),
    ] = False,
    sheet: Annotated[
        Path | None, typer.Option(help="PNG file to write: a contact sheet of pictures as the model sees them.")
    ] = None,
) -> None:
    """Look through a data folder before its node connects: counts, unreadable files, class names, what is unusual, and what
    would be sent. The exit code is 1 if anything is wrong; what is unusual is used all the same.
    """
    settings = load_settings(preset, set_ or [])
    from metamoe.client.folder import check_folder, check_questions
    from metamoe.common.data.datasets import known_classes
    from metamoe.common.data.pictures import find_pictures
    from metamoe.common.model.seed import load_seed
    from metamoe.common.wire import MESSAGE_TYPE, reply_artifacts

    questions = settings.data.is_text
    if questions and sheet:
        raise InvalidSettingError(f"--sheet {sheet}: data.source = {settings.data.source} has no pictures")
    with notes.status("opening every file"):
        report = check_questions(folder, settings.data) if questions else check_folder(folder, settings.data)
    kind = settings.data.source if questions else "images"
    wrong = list(report.wrong)
    if not questions:
        known = set(known_classes(settings.data))
        trained = report.counts["train"]
        wrong += [f"class {name!r} is neither in data.classes nor public" for name in trained if name not in known]
    seed = load_seed(settings.seed_model)
    if sheet:
        from metamoe.sheet import contact_sheet

        shown = contact_sheet(find_pictures(folder, settings.data), report, seed, settings.data.background, sheet)
        log.info("%s shows %d pictures", sheet, shown)
    artifacts = [(stage, artifact) for stage in MESSAGE_TYPE for artifact in reply_artifacts(stage, settings, seed)]
    if as_json:
        arrays = [{"when": stage, **asdict(artifact), "bytes": artifact.bytes} for stage, artifact in artifacts]
        size = sum(artifact.bytes for _, artifact in artifacts)
        found = {"fine": not wrong, "kind": kind, "counts": report.counts, "unusual": report.unusual}
        put_json(found | {"sent": arrays, "bytes": size, "wrong": wrong})
        raise typer.Exit(bool(wrong))
    names = sorted({name for by_class in report.counts.values() for name in by_class})
    counts = [[name, *(str(by_class.get(name, 0)) for by_class in report.counts.values())] for name in names]
    show_table(console, ["form" if questions else "class", *report.counts], counts, title=kind)
    sent = [[stage, a.name, f"{a.dtype} {list(a.shape)}", f"{a.bytes:,}"] for stage, a in artifacts]
    sent.append(["", "in all", "", f"{sum(artifact.bytes for _, artifact in artifacts):,}"])
    title = "what would be sent, however many samples there are"
    show_table(console, ["when", "array", "form", "bytes"], sent, title=title, grouped=True)
    for what, files in report.unusual.items():
        console.print(f"{len(files)} {what}: {some(files)}", markup=False, highlight=False, soft_wrap=True)
    for line in wrong:
        console.print(f"wrong: {line}", style="red", markup=False, highlight=False, soft_wrap=True)
    if wrong:
        raise typer.Exit(1)


@client.command()
def doctor(
    folder: Annotated[Path, typer.Argument(help="The client's folder, from 'metamoe client keys'.")],
    superlink: Annotated[str, typer.Option(metavar="HOST:PORT", help="Where the server is.")],
    preset: Annotated[
        str, typer.Option(help="Preset or TOML file of the run, for the hashes of seed model and data.")
    ] = "glyphs",
    as_json: Annotated[bool, json_option(DOCTOR_FIELDS)] = False,
) -> None:
    """Say what is wrong with a client whose server is elsewhere: keys, certificates, the server, the clock; and show what must
    be the same for all parties. The exit code is 1 if anything is wrong.
    """
    from metamoe.deploy.doctor import examine_client

    host, _, port = superlink.rpartition(":")
    if not host or not port.isdigit():
        raise InvalidSettingError(f"--superlink {superlink} is not of the form HOST:PORT")
    alike = common_of(load_settings(preset))
    show_examined(alike, examine_client(folder.absolute(), host, int(port), datetime.now(UTC)), as_json)


@client.command()
def keys(
    folder: Annotated[Path, typer.Argument(help="The client's folder, new or empty.")],
    authority: Annotated[Path, typer.Option(help="The operator's ca.crt, by which the server is known.")],
    server: Annotated[Path, typer.Option(help="The operator's audit.pub: the policy is for runs of this server alone.")],
    days: Annotated[int, typer.Option(min=1, help="How long the certificate is valid.")] = 365,
) -> None:
    """Make the folder of a client whose server is elsewhere: keys that nobody else has seen, and a policy."""
    from metamoe.deploy.keys import make_client_keys

    make_client_keys(folder, authority, server, days, datetime.now(UTC))
    console.print(f"give the operator {folder / 'node.pub'}, and nothing else of {folder}", soft_wrap=True)
