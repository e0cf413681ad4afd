"""The commands that run a federation on this machine."""

from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from metamoe.common.config import Settings
from metamoe.common.presets import load_settings
from metamoe.options import DataDir, Preset, Set, console, json_option, notes, put_json, settings_of
from metamoe.show import show_table
from metamoe.simulation import Backend, resume_simulation, run_simulation
from metamoe.tracking import Service

Track = Annotated[
    list[Service] | None,
    typer.Option(help="Send settings, curves, tables and pictures there too, or into the run's folder; repeatable."),
]


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
    track: Track = None,
    as_json: Annotated[bool, json_option("what results.json holds, and folder")] = False,
) -> None:
    """Run a federation on this machine: stages 1 to 3, then a table of how good every method is."""
    overrides = list(set_ or [])
    overrides += [f"clients={clients}"] if clients is not None else []
    overrides += [f"seed={seed}"] if seed is not None else []
    settings = settings_of(preset, overrides, data_dir)
    folder = (out or Path("runs") / Path(preset).stem).absolute()
    _show(run_simulation(settings, folder, backend, overwrite, notes, track or ()), settings, folder, as_json)


def resume(
    run: Annotated[Path, typer.Argument(help="Folder of a run that did not come to its end.")],
    track: Track = None,
    as_json: Annotated[bool, json_option("what results.json holds, and folder")] = False,
) -> None:
    """Go on with a simulation that was stopped or killed: where it was, to the same bits, with the settings in its folder."""
    folder = run.absolute()
    results = resume_simulation(folder, notes, track or ())
    _show(results, load_settings(str(folder / "settings.toml")), folder, as_json)


def status(
    run: Annotated[Path, typer.Argument(help="Folder of a run, also of one that is going on.")],
    as_json: Annotated[bool, json_option("state, stages, clients, measured, left (seconds), waiting, last")] = False,
) -> None:
    """Show where a run is: what is done, how far each client's training is, its losses and the time left, the memory in use,
    and who is waited for since when.
    """
    from metamoe.progress import measured, memory_used
    from metamoe.status import run_status

    found = run_status(run.absolute())
    if as_json:
        waiting = {name: since.isoformat() for name, since in found.waiting.items()}
        put_json({**asdict(found), "waiting": waiting, "last": found.last.isoformat() if found.last else None})
        return
    console.print(f"{run}: {found.state}", highlight=False, soft_wrap=True)
    for stage, (done, total) in found.stages.items():
        console.print(f"  {stage:<8} {done} of {total}", highlight=False)
    for name, (done, total) in found.clients.items():
        parts = [f"{done} of {total} of its training", measured(found.measured[name])]
        if seconds := found.left.get(name):
            parts.append(f"{timedelta(seconds=round(seconds))} left")
        console.print(f"  {name}: {', '.join(filter(None, parts))}", highlight=False, markup=False, soft_wrap=True)
    for name, since in found.waiting.items():
        console.print(f"  waiting for {name} since {since:%H:%M:%S}", highlight=False, markup=False)
    if found.last:
        console.print(f"  last heard of at {found.last:%Y-%m-%d %H:%M:%S}", highlight=False)
    if found.state == "running":
        console.print(f"  {memory_used()}", highlight=False)
    if found.state == "stopped":
        console.print(f"'metamoe resume {run}' goes on with it", highlight=False, markup=False, soft_wrap=True)


def track(
    folder: Annotated[Path, typer.Argument(help="Folder of a run, or of a client of a deployed federation.")],
    to: Annotated[list[Service], typer.Option(help="Where; repeatable.")],
) -> None:
    """Send what a run or a client wrote down of itself to a tracker: its curves so far, of a run also settings and results."""
    from metamoe.tracking.outcome import track_folder

    for service, name in track_folder(folder.absolute(), to).items():
        console.print(f"{service}: {name}", highlight=False, markup=False, soft_wrap=True)


def _show(results: dict[str, Any], settings: Settings, folder: Path, as_json: bool) -> None:
    if as_json:
        put_json({**results, "folder": str(folder)})
        return
    from metamoe.simulations.results import metric_rows, shown_metrics

    columns = [*results["routing"], "average"]
    rows = [
        [method, *(f"{by_domain[column]:.1f}" for column in columns), f"{results['public_accuracy'][method]:.1f}"]
        for method, by_domain in results["accuracy"].items()
    ]
    what = "told from three others' answers" if settings.data.source == "text" else "accuracy"
    show_table(console, ["method", *columns, "public, held out"], rows, title=f"{what} on {settings.data.evaluate_on} data, %")
    for metric in shown_metrics(settings):
        header = ["method", *results["routing"], "public, held out"]
        show_table(console, header, metric_rows(results, metric), title=metric.replace("-", " "))
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
