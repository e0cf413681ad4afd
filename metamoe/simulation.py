"""One simulation, for the command and for Python: its folder, its data, the run, its results."""

import shutil
from collections.abc import Sequence
from contextlib import nullcontext
from enum import StrEnum
from pathlib import Path
from typing import Any

from rich.console import Console

from metamoe.common.config import Settings
from metamoe.common.errors import InputFileError, InvalidSettingError, RunFailedError
from metamoe.common.files import read_json, write_atomically
from metamoe.common.presets import load_settings, to_toml
from metamoe.deploy import flower
from metamoe.follow import followed, logs_of_run
from metamoe.progress import show_standing, shown
from metamoe.simulations.prepare import Placement, prepare, prepare_apart
from metamoe.tracking import Service, check_services, tracked

_RUN = (
    "settings.toml",
    "proxies.json",
    "changes.jsonl",
    "events.jsonl",
    "results.json",
    "report.md",
    "report.html",
    "model",
    "server",
    "clients",
    "flower",
    "audit",
    "tracking.json",
    "tensorboard",
    "mlflow",
    "mlflow.db",
    "wandb",
)


class Backend(StrEnum):
    """Where the clients of a simulation run."""

    ray = "ray"
    local = "local"


def run_simulation(
    settings: Settings,
    folder: Path,
    backend: Backend,
    overwrite: bool = False,
    console: Console | None = None,
    track: Sequence[Service] = (),
) -> dict[str, Any]:
    """Run a federation on this machine, from data to results.

    Args:
        settings: of the run, with absolute paths.
        folder: the run folder, absolute; an earlier run in it is kept until nothing can be found wrong at once.
        backend: where the clients run.
        overwrite: whether an earlier run in the folder may go.
        console: where to show progress; None for nowhere.
        track: services that are told of it.

    Returns:
        The contents of results.json.

    Raises:
        InputFileError, InvalidSettingError: the folder cannot take a run, or a service cannot be told.
        HubError: a data set's commit cannot be found.
        MetaMoEError: what :func:`prepare` finds, and what stops the run.
    """
    # Loaded here: help and a wrong setting answer at once.
    from metamoe.common.data.hub import pinned

    _check_folder(folder, overwrite)
    check_services(track)
    settings = pinned(settings)
    if console:
        what = f"preset {settings.preset}, {settings.clients} clients, seed {settings.seed}, {backend}"
        console.print(f"{what} -> {folder}", soft_wrap=True)
    placement = _prepared(settings, backend, console)
    # Only now, when nothing more can be found wrong at once, does an earlier run go.
    _clear_folder(folder)
    write_atomically(folder / "settings.toml", to_toml(settings))
    return _run(settings, folder, backend, placement, console, track)


def resume_simulation(folder: Path, console: Console | None = None, track: Sequence[Service] = ()) -> dict[str, Any]:
    """Go on with a simulation that did not come to its end, to the same bits; of a finished one, read its results.

    Args:
        folder: the run folder, absolute.
        console: where to say what is taken over, and to show progress; None for nowhere.
        track: services that are told of it, from its beginning.

    Returns:
        The contents of results.json.

    Raises:
        InputFileError: the folder holds no run.
        StateFileError: what is there is damaged, or of other settings.
        MetaMoEError: what stops the run.
    """
    if not (folder / "settings.toml").is_file():
        raise InputFileError(f"{folder} holds no settings.toml, so there is no run to go on with")
    settings = load_settings(str(folder / "settings.toml"))
    # Of a command that was killed, everything may still run.
    flower.stop_all(folder / "flower")
    if (folder / "results.json").is_file():
        if console:
            console.print(f"{folder}: the run has come to its end, and nothing is left to do", soft_wrap=True)
        results: dict[str, Any] = read_json(folder / "results.json")
        return results
    # Ray leaves Flower's files behind, from the beginning.
    backend = Backend.ray if (folder / "flower").is_dir() else Backend.local
    if console:
        console.print(f"going on: preset {settings.preset}, {backend} -> {folder}", soft_wrap=True)
        show_standing(folder, settings, console)
    check_services(track)
    return _run(settings, folder, backend, _prepared(settings, backend, console), console, track)


def _prepared(settings: Settings, backend: Backend, console: Console | None) -> Placement:
    """Data made ready, and where the run computes, which is said."""
    with console.status("preparing data") if console else nullcontext():
        placement = prepare(settings, on_ray=False) if backend is Backend.local else prepare_apart(settings)
    if console:
        console.print("; ".join(placement.lines), highlight=False, soft_wrap=True)
        for warning in placement.warnings:
            console.print(f"warning: {warning}", style="yellow", markup=False, highlight=False, soft_wrap=True)
    return placement


def _run(
    settings: Settings, folder: Path, backend: Backend, placement: Placement, console: Console | None, track: Sequence[Service]
) -> dict[str, Any]:
    logs = logs_of_run(settings, folder)
    with tracked(track, folder, settings) as trackings:
        with (
            shown(settings, console) if console else nullcontext() as board,
            followed(logs, [board] if board else []),
            followed(logs, trackings),
        ):
            # All but the table may be there.
            if not (folder / "server" / "summary.json").is_file():
                try:
                    _stages(settings, folder, backend, placement)
                except RunFailedError as error:
                    message = f"{error}\nwhat is done is kept: 'metamoe resume {folder}' goes on with it"
                    raise RunFailedError(message) from error
            from metamoe.simulations.results import write_results

            results = write_results(settings, folder, board.evaluation if board else lambda _done, _total: None)
        if trackings:
            from metamoe.tracking.outcome import outcome_of

            outcome = outcome_of(folder)
            for tracking in trackings:
                tracking.outcome(outcome)
        return results


def _stages(settings: Settings, folder: Path, backend: Backend, placement: Placement) -> None:
    # Imported where they are needed: help and a wrong setting answer at once, and a run leaves the memory to its own processes.
    if backend is Backend.ray:
        from metamoe.simulations.flower import run_flower

        run_flower(settings, folder, placement=placement)
    else:
        from metamoe.simulations.local import run_local

        run_local(settings, folder)


def _check_folder(folder: Path, overwrite: bool) -> None:
    """Raise unless the folder can take a run: it is new or empty, or holds a run that may go, and nothing else."""
    if folder.exists() and not folder.is_dir():
        raise InputFileError(f"out = {folder} is a file; give a folder")
    present = {entry.name for entry in folder.iterdir()} if folder.is_dir() else set()
    if "settings.toml" in present and "results.json" not in present and not overwrite:
        raise InvalidSettingError(
            f"out = {folder} holds a run that has not come to its end: 'metamoe resume {folder}' goes on with it, --overwrite "
            "(in Python overwrite=True) begins anew"
        )
    if present and not overwrite:
        raise InvalidSettingError(
            f"out = {folder} is not empty; give another folder, or replace the run in it: --overwrite, in Python overwrite=True"
        )
    if present and "settings.toml" not in present:
        raise InvalidSettingError(f"out = {folder} is not empty and not a run, as it has no settings.toml; give another folder")
    # A write that was killed leaves a name of this form.
    if others := sorted(n for n in present - set(_RUN) if not n.startswith(tuple(f".{part}-" for part in _RUN))):
        raise InvalidSettingError(f"out = {folder} holds {others[0]!r}, which is not part of a run; give another folder")


def _clear_folder(folder: Path) -> None:
    # Of a command that was killed, everything may still run.
    flower.stop_all(folder / "flower")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for entry in folder.iterdir():
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    except OSError as error:
        raise InputFileError(f"out = {folder} cannot be used: {error}") from error
