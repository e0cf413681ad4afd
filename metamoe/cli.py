"""The command ``metamoe``."""

import atexit
import gc
import logging
import os
import signal
import sys
import tomllib
import traceback
from dataclasses import asdict
from importlib.metadata import version
from types import FrameType
from typing import Annotated

import typer
from rich.padding import Padding
from rich.text import Text

from metamoe.cli_audit import audit
from metamoe.cli_benchmark import benchmark, report
from metamoe.cli_change import model
from metamoe.cli_client import client
from metamoe.cli_data import data
from metamoe.cli_deploy import deploy
from metamoe.cli_export import export, push
from metamoe.cli_gateway import gateway
from metamoe.cli_model import evaluate, predict
from metamoe.cli_serve import route, serve
from metamoe.cli_simulate import embed, resume, simulate, status, track
from metamoe.cli_text import chat, generate
from metamoe.common.config import Settings
from metamoe.common.errors import MetaMoEError
from metamoe.common.presets import preset_names, preset_text
from metamoe.options import DataDir, Set, configure, console, errors, json_option, log, put_json, settings_of
from metamoe.show import show_table

_GARBAGE = 50_000

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Turn experts trained apart into one Mixture-of-Experts, without anybody's data moving.",
    epilog="--quiet and --verbose come before a command. METAMOE_DEBUG=1 shows tracebacks, METAMOE_CACHE=DIR moves the cache.",
)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(version("metamoe-fl"))
        raise typer.Exit


@app.callback()
def _options(
    _version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
    quiet: Annotated[
        bool, typer.Option("--quiet", help="Show no progress and no messages: errors and the result alone.")
    ] = False,
    verbose: Annotated[bool, typer.Option("--verbose", help="Show messages with times, and tracebacks of errors.")] = False,
) -> None:
    """Options that come before a command."""
    if quiet and verbose:
        raise typer.BadParameter("--quiet and --verbose exclude each other")
    configure(quiet, verbose)


def presets(
    name: Annotated[str | None, typer.Argument(help="Preset to show in full.")] = None,
    check: Annotated[
        str | None, typer.Option(metavar="NAME", help="Say what a run of this preset needs and lacks here.")
    ] = None,
    set_: Set = None,
    data_dir: DataDir = None,
    as_json: Annotated[
        bool,
        json_option(
            "presets (name, command); with a NAME its settings; with --check preset, fine, findings (what, found, fine)"
        ),
    ] = False,
) -> None:
    """List the presets, print one, or check what one needs before hours are lost; the exit code is 1 if anything is missing."""
    if check is not None:
        _check_preset(settings_of(check, set_, data_dir), as_json)
        return
    if name is not None and as_json:
        put_json(tomllib.loads(preset_text(name)))
        return
    if name is not None:
        console.print(preset_text(name), markup=False, highlight=False, soft_wrap=True, end="")
        return
    rows = [[known, preset_text(known).splitlines()[0].lstrip("# ")] for known in preset_names()]
    if as_json:
        put_json({"presets": [{"name": known, "command": command} for known, command in rows]})
        return
    show_table(console, ["preset", "start it with"], rows)


def _check_preset(chosen: Settings, as_json: bool) -> None:
    from metamoe.check import check_preset

    findings = []
    for finding in check_preset(chosen):
        findings.append(finding)
        if as_json:
            continue
        mark, style = ("ok", "green") if finding.fine else ("missing", "red")
        console.print(f"{mark:>8}", style=style, end="  ")
        console.print(f"{finding.what}: {finding.found}", markup=False, highlight=False, soft_wrap=True)
    fine = all(finding.fine for finding in findings)
    if as_json:
        put_json({"preset": chosen.preset, "fine": fine, "findings": [asdict(finding) for finding in findings]})
    if not fine:
        raise typer.Exit(1)


def settings(
    group: Annotated[str | None, typer.Argument(help="A group of settings, such as router, or run. (default: all)")] = None,
    as_json: Annotated[bool, json_option("settings, each with group, name, kind, default, about")] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="The page docs/settings.md.")] = False,
) -> None:
    """List every setting: what it may be, its default, and what it is for."""
    from metamoe.reference import all_settings, as_markdown

    if markdown:
        typer.echo(as_markdown(), nl=False)
        return
    found = all_settings(group)
    if as_json:
        put_json({"settings": [asdict(setting) for setting in found]})
        return
    for setting in found:
        console.print(setting.name, style="bold", markup=False, highlight=False, end="")
        console.print(f" = {setting.default}", markup=False, highlight=False, soft_wrap=True)
        console.print(Padding(Text(f"{setting.about} ({setting.kind})"), (0, 0, 0, 4)))


for command in (
    simulate,
    resume,
    status,
    track,
    embed,
    benchmark,
    report,
    predict,
    evaluate,
    generate,
    chat,
    serve,
    route,
    export,
    push,
    gateway,
    presets,
    settings,
):
    app.command()(command)
for group, name in ((model, "model"), (deploy, "deploy"), (client, "client"), (data, "data"), (audit, "audit")):
    app.add_typer(group, name=name)


def main() -> None:
    """Entry point: run the command; an expected error is one line and its exit code, an interrupt ends with 130."""
    # Libraries make half a million objects that live as long as the process: to look for garbage among them again and again
    # takes a quarter of the time of loading them, and to take them apart at the end a second.
    gc.set_threshold(_GARBAGE)
    atexit.register(gc.freeze)
    for sign in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(sign, _interrupt)
    try:
        app()
    except MetaMoEError as error:
        if os.environ.get("METAMOE_DEBUG") or log.isEnabledFor(logging.DEBUG):
            traceback.print_exc()
        errors.print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        sys.exit(error.exit_code)


def _interrupt(_signal: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt
