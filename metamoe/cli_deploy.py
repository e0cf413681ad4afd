"""The commands ``metamoe deploy``: a federation of separate processes, over TLS."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from metamoe.common.config import Settings
from metamoe.common.errors import InputFileError
from metamoe.common.files import write_atomically
from metamoe.common.presets import load_settings, to_toml
from metamoe.options import Preset, Set, console, json_option, notes, put_json
from metamoe.show import show_table

if TYPE_CHECKING:
    from metamoe.deploy.doctor import Finding

deploy = typer.Typer(no_args_is_help=True, help="A federation whose server and clients are separate processes, over TLS.")

DOCTOR_FIELDS = "fine, alike (what must be the same for all parties), findings (what, problem: empty if it is well)"
Folder = Annotated[Path, typer.Argument(help="The federation's folder.")]


@deploy.command()
def keys(
    folder: Folder,
    clients: Annotated[int, typer.Option(min=1, max=1_000, help="Number of clients.")] = 3,
    host: Annotated[str, typer.Option(help="Name or address under which clients reach the server.")] = "localhost",
    port: Annotated[int, typer.Option(min=1, max=65_535, help="The server's one port.")] = 8_000,
    days: Annotated[int, typer.Option(min=1, help="How long the certificates are valid.")] = 365,
) -> None:
    """Make a federation's folder: an authority, the server's certificate, and a key pair for each client."""
    from metamoe.deploy.keys import Federation, make_keys

    make_keys(folder, Federation(host=host, port=port, clients=clients), days, datetime.now(UTC))
    console.print(f"keys for a server and {clients} clients, valid for {days} days: {folder}", soft_wrap=True)


@deploy.command()
def up(folder: Folder) -> None:
    """Start whatever of a federation does not run, as processes on this machine, and wait until all clients are online."""
    from metamoe.deploy.processes import up

    with notes.status("starting") as shown:
        up(folder.absolute(), shown.update)
    status(folder)


@deploy.command()
def down(folder: Folder) -> None:
    """Stop a federation's processes. What clients keep stays."""
    from metamoe.deploy.processes import down

    with notes.status("stopping"):
        stopped = down(folder.absolute())
    console.print(f"stopped: {', '.join(stopped) or 'nothing was running'}")


@deploy.command()
def status(
    folder: Folder,
    as_json: Annotated[bool, json_option("fine, parties (name, running, node, online)")] = False,
) -> None:
    """Show what runs and which clients the server sees; exit code 1 if anything is missing."""
    from metamoe.deploy.processes import status

    with notes.status("asking the server"):
        parties = status(folder.absolute())
    fine = all(party.running and party.online for party in parties)
    if as_json:
        put_json({"fine": fine, "parties": [asdict(party) for party in parties]})
        raise typer.Exit(not fine)
    rows = [[p.name, "running" if p.running else "down", p.node, "yes" if p.online else "no"] for p in parties]
    show_table(console, ["party", "processes", "node", "the server sees it"], rows)
    if not fine:
        raise typer.Exit(1)


@deploy.command()
def register(
    folder: Folder,
    public_key: Annotated[
        Path | None, typer.Argument(help="A client's node.pub. (default: each in the folder that is not registered yet)")
    ] = None,
) -> None:
    """Let nodes into a federation whose server is up, by their public keys."""
    from metamoe.deploy.processes import register, register_clients

    if public_key:
        console.print(f"node {register(folder.absolute(), public_key)}")
        return
    with notes.status("asking the server") as shown:
        new = register_clients(folder.absolute(), shown.update)
    console.print(f"registered: {', '.join(new) or 'all were before'}")


@deploy.command()
def run(
    folder: Folder,
    preset: Preset = "glyphs",
    set_: Set = None,
    out: Annotated[Path | None, typer.Option(help="Run folder, new or empty. (default: FOLDER/runs/TIME)")] = None,
) -> None:
    """Run the three stages over a federation that is up, and follow them; the exit code is the run's."""
    settings, folder = load_settings(preset, set_ or []), folder.absolute()
    target = (out or folder / "runs" / f"{datetime.now(UTC):%Y%m%d-%H%M%S}").absolute()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise InputFileError(f"--out {target} is not an empty folder; give another one")
    from metamoe.common.data.hub import pinned

    settings = pinned(settings)
    write_atomically(target / "settings.toml", to_toml(settings))
    follow(folder, settings, target)


@deploy.command()
def resume(
    folder: Folder,
    run: Annotated[
        Path | None, typer.Argument(help="Run folder. (default: the last in FOLDER/runs that has not come to its end)")
    ] = None,
) -> None:
    """Go on with a run that was interrupted, where it was and to the same bits, over a federation that is up again."""
    from metamoe.progress import show_standing

    folder = folder.absolute()
    target = run.absolute() if run else _unfinished(folder)
    if not (target / "settings.toml").is_file():
        raise InputFileError(f"{target} holds no settings.toml, so there is no run to go on with")
    settings = load_settings(str(target / "settings.toml"))
    if not (target / "server" / "summary.json").is_file():
        show_standing(target, settings, notes)
    follow(folder, settings, target)


def _unfinished(folder: Path) -> Path:
    runs = sorted(file.parent for file in (folder / "runs").glob("*/settings.toml"))
    left = [run for run in runs if not (run / "server" / "summary.json").is_file()]
    if not left:
        raise InputFileError(f"{folder / 'runs'} holds no run that has not come to its end")
    return left[-1]


def follow(folder: Path, settings: Settings, target: Path) -> None:
    """Have a federation do what is left of the run in a folder, show its progress, and say what it came to."""
    from metamoe.deploy.processes import submit, with_names
    from metamoe.follow import followed, logs_of_run
    from metamoe.progress import shown

    with shown(settings, notes) as board, followed(logs_of_run(settings, target), [board]):
        submit(folder, settings, target)
    summary = target / "server" / "summary.json"
    found = json.loads(summary.read_text())
    for name in found["mean_alone"]:
        console.print(f"[yellow]by its mean alone[/yellow]: {name}: its policy allows no seed-shape", soft_wrap=True)
    for missing in found["missing"]:
        reason = with_names(folder, missing["reason"])
        console.print(f"[yellow]missing[/yellow]: {missing['name']} ({missing['stage']}): {reason}", soft_wrap=True)
    console.print(f"model: {target / 'model'}\nwhat each client sent: {summary}", soft_wrap=True)


@deploy.command()
def doctor(
    folder: Folder,
    preset: Annotated[
        str, typer.Option(help="Preset or TOML file of the run, for the hashes of seed model and data.")
    ] = "glyphs",
    as_json: Annotated[bool, json_option(DOCTOR_FIELDS)] = False,
) -> None:
    """Say what is wrong with a federation: certificates, keys, modes, port, clock, clients; and show what must be the same for
    all parties. The exit code is 1 if anything is wrong.
    """
    from metamoe.deploy.doctor import examine

    show_examined(common_of(load_settings(preset)), examine(folder.absolute(), datetime.now(UTC)), as_json)


def common_of(settings: Settings) -> dict[str, str]:
    """What server and clients must hold alike, to be compared with what the others see."""
    from metamoe.common.data.datasets import public_fingerprint
    from metamoe.common.model.seed import load_seed
    from metamoe.common.wire import PROTOCOL

    with notes.status("hashing seed model and public set"):
        seed, public = load_seed(settings.seed_model).fingerprint, public_fingerprint(settings.data)
    return {"version": f"{version('metamoe-fl')}, protocol {PROTOCOL}", "seed model": seed, "public set": public}


def show_examined(alike: Mapping[str, str], findings: Sequence["Finding"], as_json: bool) -> None:
    """Print what must be the same for all parties, and what a doctor found.

    Raises:
        typer.Exit: with code 1, if anything is wrong.
    """
    fine = not any(finding.problem for finding in findings)
    if as_json:
        put_json({"fine": fine, "alike": alike, "findings": [asdict(finding) for finding in findings]})
        raise typer.Exit(not fine)
    show_table(console, ["the same for all parties", "here"], [[what, here] for what, here in alike.items()])
    for finding in findings:
        mark = "[red]wrong[/red] " if finding.problem else "[green]fine[/green]  "
        console.print(f"{mark}{escape(f'{finding.what} {finding.problem}')}", soft_wrap=True, highlight=False)
    if not fine:
        raise typer.Exit(1)
