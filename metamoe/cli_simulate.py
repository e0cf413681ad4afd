"""The commands that run a federation on this machine."""

import shutil
from concurrent.futures import ProcessPoolExecutor
from enum import StrEnum
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from metamoe.common.config import Settings
from metamoe.common.errors import InputFileError, InvalidSettingError
from metamoe.common.files import write_atomically
from metamoe.common.loading import loading
from metamoe.common.presets import to_toml
from metamoe.options import DataDir, Preset, Set, console, json_option, log, notes, put_json, settings_of
from metamoe.show import show_table
from metamoe.simulations.prepare import prepare

_RUN = (
    "settings.toml",
    "proxies.json",
    "events.jsonl",
    "results.json",
    "report.md",
    "model",
    "server",
    "clients",
    "flower",
    "audit",
)


class Backend(StrEnum):
    """Where the clients of a simulation run."""

    ray = "ray"
    local = "local"


def simulate(
    preset: Preset = "glyphs",
    clients: Annotated[int | None, typer.Option(help="Number of clients K.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of every random choice.")] = None,
    set_: Set = None,
    data_dir: DataDir = None,
    out: Annotated[Path | None, typer.Option(help="Run folder. (default: runs/PRESET)")] = None,
    backend: Annotated[
        Backend, typer.Option(help="ray: Flower clients on Ray; local: one process, for debugging.")
    ] = Backend.ray,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier run in the same folder.")] = False,
    as_json: Annotated[bool, json_option("what results.json holds, and folder")] = False,
) -> None:
    """Run a federation on this machine: stages 1 to 3, then a table of how good every method is."""
    overrides = list(set_ or [])
    overrides += [f"clients={clients}"] if clients is not None else []
    overrides += [f"seed={seed}"] if seed is not None else []
    settings = settings_of(preset, overrides, data_dir)
    folder = (out or Path("runs") / Path(preset).stem).absolute()
    _check_folder(folder, overwrite)
    what = f"preset {settings.preset}, {settings.clients} clients, seed {settings.seed}, {backend}"
    log.info("%s -> %s", what, folder)
    with notes.status("preparing data"):
        _prepare(settings, backend)
    log.debug("data is prepared")
    # Only now, when nothing more can be found wrong at once, does an earlier run go.
    _clear_folder(folder)
    write_atomically(folder / "settings.toml", to_toml(settings))
    _simulate(settings, folder, backend, as_json)


def _prepare(settings: Settings, backend: Backend) -> None:
    if backend is Backend.local:
        prepare(settings)
        return
    # In a process of its own: the run's processes get the memory back.
    with ProcessPoolExecutor(1, get_context("spawn")) as process:
        process.submit(prepare, settings).result()


def _simulate(settings: Settings, folder: Path, backend: Backend, as_json: bool) -> None:
    # Imported where they are needed: help and a wrong setting answer at once, and a run leaves the memory to its own processes.
    from metamoe.progress import live

    with live(settings, folder, notes) as board:
        if backend is Backend.ray:
            from metamoe.simulations.flower import run_flower

            run_flower(settings, folder)
        else:
            with loading():
                from metamoe.simulations.local import run_local

            run_local(settings, folder)
        log.debug("all stages are done; evaluating")
        with loading():
            from metamoe.simulations.results import write_results

        results = write_results(settings, folder, board.evaluation)
    if as_json:
        put_json({**results, "folder": str(folder)})
        return
    columns = [*results["routing"], "average"]
    rows = [
        [method, *(f"{by_domain[column]:.1f}" for column in columns), f"{results['public_accuracy'][method]:.1f}"]
        for method, by_domain in results["accuracy"].items()
    ]
    title = f"accuracy on {settings.data.evaluate_on} data, %"
    show_table(console, ["method", *columns, "public, held out"], rows, title=title)
    console.print(f"model: {folder / 'model'}\nreport: {folder / 'report.md'}", soft_wrap=True)


def embed(
    preset: Preset,
    set_: Set = None,
    data_dir: DataDir = None,
    ray_address: Annotated[
        str | None, typer.Option(help="A Ray cluster, such as HOST:6379 or auto, to share the work. (default: this process)")
    ] = None,
) -> None:
    """Embed the public set before a run, in shards: a stopped one goes on where it was, and later runs find it in the cache."""
    from metamoe.simulations.embed import embed_public

    settings = settings_of(preset, set_, data_dir)
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("left:"), TimeRemainingColumn())
    with Progress(*columns, console=notes, speed_estimate_period=600) as progress:
        task = progress.add_task("embedding", total=None)
        file = embed_public(settings, ray_address, lambda done, total: progress.update(task, completed=done, total=total))
    console.print(f"embeddings: {file}", soft_wrap=True)


def _check_folder(folder: Path, overwrite: bool) -> None:
    """Raise unless the folder can take a run: it is new or empty, or holds a run that may go, and nothing else."""
    if folder.exists() and not folder.is_dir():
        raise InputFileError(f"--out {folder} is a file; give a folder")
    present = {entry.name for entry in folder.iterdir()} if folder.is_dir() else set()
    if present and not overwrite:
        raise InvalidSettingError(f"--out {folder} is not empty; give another folder, or --overwrite to replace the run in it")
    if present and "settings.toml" not in present:
        raise InvalidSettingError(f"--out {folder} is not empty and not a run, as it has no settings.toml; give another folder")
    # A write that was killed leaves a name of this form.
    if others := sorted(n for n in present - set(_RUN) if not n.startswith(tuple(f".{part}-" for part in _RUN))):
        raise InvalidSettingError(f"--out {folder} holds {others[0]!r}, which is not part of a run; give another folder")


def _clear_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for entry in folder.iterdir():
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    except OSError as error:
        raise InputFileError(f"--out {folder} cannot be used: {error}") from error
