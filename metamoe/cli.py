"""The command ``metamoe``."""

import os
import shutil
import signal
import sys
import traceback
from concurrent.futures import ProcessPoolExecutor
from enum import StrEnum
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from types import FrameType
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Column, Table

from metamoe.cli_audit import audit
from metamoe.cli_client import client
from metamoe.cli_deploy import deploy
from metamoe.common.config import Settings, load_settings, preset_names, preset_text, to_toml
from metamoe.common.errors import InputFileError, InvalidSettingError, MetaMoEError
from metamoe.common.files import write_atomically
from metamoe.simulations.prepare import prepare

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Turn experts trained apart into one Mixture-of-Experts, without anybody's data moving.",
    epilog="METAMOE_DEBUG=1 shows tracebacks, METAMOE_CACHE=DIR moves the cache.",
)

app.add_typer(deploy, name="deploy")
app.add_typer(client, name="client")
app.add_typer(audit, name="audit")

_console = Console()
_errors = Console(stderr=True)
_DATA_DIR = "Where domains and public set lie, a folder each, in place of the hub (data.folder)."
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


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(version("metamoe-fl"))
        raise typer.Exit


@app.callback()
def _options(
    _version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Options that come before a command."""


class Task(StrEnum):
    """What a model is for."""

    images = "images"
    questions = "questions"


class Backend(StrEnum):
    """Where the clients of a simulation run."""

    ray = "ray"
    local = "local"


@app.command()
def simulate(
    preset: Annotated[
        str, typer.Option(help="Name of a preset (see 'metamoe presets') or a TOML file of settings.")
    ] = "glyphs",
    clients: Annotated[int | None, typer.Option(help="Number of clients K.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of every random choice.")] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change one setting, e.g. router.top-k=2; repeatable."),
    ] = None,
    data_dir: Annotated[Path | None, typer.Option(help=_DATA_DIR)] = None,
    out: Annotated[Path | None, typer.Option(help="Run folder. (default: runs/PRESET)")] = None,
    backend: Annotated[
        Backend, typer.Option(help="ray: Flower clients on Ray; local: one process, for debugging.")
    ] = Backend.ray,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier run in the same folder.")] = False,
) -> None:
    """Run a federation on this machine: stages 1 to 3, then a table of how good every method is."""
    overrides = list(set_ or [])
    overrides += [f"data.folder={data_dir}"] if data_dir is not None else []
    overrides += [f"clients={clients}"] if clients is not None else []
    overrides += [f"seed={seed}"] if seed is not None else []
    settings = load_settings(preset, overrides)
    folder = (out or Path("runs") / Path(preset).stem).absolute()
    _check_folder(folder, overwrite)
    settings = _absolute(settings)
    _console.print(f"preset {settings.preset}, {settings.clients} clients, seed {settings.seed}, {backend} -> {folder}")
    with _console.status("preparing data"):
        _prepare(settings, backend)
    # Only now, when nothing more can be found wrong at once, does an earlier run go.
    _clear_folder(folder)
    write_atomically(folder / "settings.toml", to_toml(settings))
    _simulate(settings, folder, backend)


def _prepare(settings: Settings, backend: Backend) -> None:
    if backend is Backend.local:
        prepare(settings)
        return
    # In a process of its own: the run's processes get the memory back.
    with ProcessPoolExecutor(1, get_context("spawn")) as process:
        process.submit(prepare, settings).result()


def _simulate(settings: Settings, folder: Path, backend: Backend) -> None:
    # Imported where they are needed: help and a wrong setting answer at once, and a run leaves the memory to its own processes.
    from metamoe.progress import live

    with live(settings, folder, _console) as board:
        if backend is Backend.ray:
            from metamoe.simulations.flower import run_flower

            run_flower(settings, folder)
        else:
            from metamoe.simulations.local import run_local

            run_local(settings, folder)
        from metamoe.simulations.results import write_results

        results = write_results(settings, folder, board.evaluation)
    table = Table(title=f"accuracy on {settings.data.evaluate_on} data, %")
    table.add_column("method")
    columns = [*results["routing"], "average"]
    for column in [*columns, "public, held out"]:
        table.add_column(column, justify="right")
    for method, by_domain in results["accuracy"].items():
        cells = [by_domain[column] for column in columns] + [results["public_accuracy"][method]]
        table.add_row(method, *(f"{cell:.1f}" for cell in cells))
    _console.print(table)
    _console.print(f"model: {folder / 'model'}\nreport: {folder / 'report.md'}", soft_wrap=True)


@app.command()
def embed(
    preset: Annotated[str, typer.Option(help="Name of a preset (see 'metamoe presets') or a TOML file of settings.")],
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change one setting; repeatable.")
    ] = None,
    data_dir: Annotated[Path | None, typer.Option(help=_DATA_DIR)] = None,
    ray_address: Annotated[
        str | None, typer.Option(help="A Ray cluster, such as HOST:6379 or auto, to share the work. (default: this process)")
    ] = None,
) -> None:
    """Embed the public set before a run, in shards: a stopped one goes on where it was, and later runs find it in the cache."""
    from metamoe.simulations.embed import embed_public

    overrides = [*(set_ or []), *([f"data.folder={data_dir}"] if data_dir is not None else [])]
    settings = _absolute(load_settings(preset, overrides))
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("left:"), TimeRemainingColumn())
    with Progress(*columns, console=_console, speed_estimate_period=600) as progress:
        task = progress.add_task("embedding", total=None)
        file = embed_public(settings, ray_address, lambda done, total: progress.update(task, completed=done, total=total))
    _console.print(f"embeddings: {file}", soft_wrap=True)


@app.command()
def benchmark(
    preset: Annotated[
        str, typer.Option(help="Name of a preset (see 'metamoe presets') or a TOML file of settings.")
    ] = "glyphs",
    methods: Annotated[
        list[str] | None,
        typer.Option(
            "--methods",
            metavar="NAME",
            help="A method of the main table, or several with commas; repeatable (default: all, or metamoe alone beside "
            "--ablation; an unknown name lists them).",
        ),
    ] = None,
    ablation: Annotated[
        list[str] | None,
        typer.Option(
            "--ablation",
            metavar="NAME",
            help="A group of ablations, or several with commas, or all; repeatable (an unknown name lists them).",
        ),
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="How many seeds: 0, 1, ...")] = 5,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change one setting for every method; repeatable."),
    ] = None,
    data_dir: Annotated[Path | None, typer.Option(help=_DATA_DIR)] = None,
    out: Annotated[Path | None, typer.Option(help="Benchmark folder. (default: runs/benchmark-PRESET)")] = None,
) -> None:
    """Compare methods and ablations over several seeds; stopped and started again, it goes on where it was."""
    from metamoe.simulations.benchmark.methods import chosen
    from metamoe.simulations.benchmark.report import write_report
    from metamoe.simulations.benchmark.run import Plan, run_benchmark
    from metamoe.simulations.benchmark.tables import method_header, method_rows

    folder = (out or Path("runs") / f"benchmark-{Path(preset).stem}").absolute()
    overrides = list(set_ or [])
    overrides += [f"data.folder={data_dir}"] if data_dir is not None else []
    for override in overrides:
        if override.partition("=")[0].strip() in ("seed", "compute.server-threads", "report-accuracy"):
            raise InvalidSettingError(f"--set {override}: a benchmark decides this itself; its seeds are given by --seeds")
    names, groups = _split(methods), _split(ablation)
    # With ablations alone there is still something to compare them with.
    names = names or (["metamoe"] if groups else ["all"])
    settings = _absolute(load_settings(preset, overrides))
    wanted = chosen(settings, names, groups)
    _check_benchmark_folder(folder)
    plan = Plan(settings, tuple(wanted), tuple(range(seeds)), folder)
    _console.print(f"preset {preset}: {len(wanted)} methods x {seeds} seeds -> {folder}", soft_wrap=True)
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("left:"), TimeRemainingColumn())
    with Progress(*columns, TextColumn("{task.description}"), console=_console, speed_estimate_period=3_600) as progress:
        task = progress.add_task("preparing", total=None)

        def show(done: int, total: int, last: str) -> None:
            progress.update(task, completed=done, total=total, description=last)

        results = run_benchmark(plan, show)
    report_file = write_report(folder)
    for records in (results.methods, results.ablations):
        if records:
            # Without the test sets, of which there can be many: they are in the report.
            name, *_, average, better, public, _ = method_header(records)
            table = Table(Column(name, no_wrap=True), average, better, public)
            for method, *_, average, better, public, _ in method_rows(records, results.methods.get("metamoe")):
                table.add_row(method, average, better, public)
            _console.print(table)
    _console.print(f"results: {folder / 'results.json'}\ntables: {folder / 'tables.md'}\nreport: {report_file}", soft_wrap=True)


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="Folder that 'metamoe benchmark' wrote.")],
) -> None:
    """Write a benchmark's results as one self-contained HTML page, report.html in its folder."""
    from metamoe.simulations.benchmark.report import write_report

    _console.print(f"report: {write_report(folder)}", soft_wrap=True)


@app.command()
def predict(
    model: Annotated[Path, typer.Argument(help="Folder of a unified model, e.g. runs/demo/model.")],
    images: Annotated[list[Path], typer.Argument(help="Image files.")],
    top: Annotated[int, typer.Option(min=1, help="How many classes to name.")] = 3,
    classes: Annotated[Path | None, typer.Option(help="Text file with the class names to choose among, one a line.")] = None,
) -> None:
    """Name the most likely classes of images, and show which experts their tokens went to."""
    from metamoe.common.model.artifact import load_model
    from metamoe.predict import predict_images, read_class_names

    loaded = load_model(model)
    names = read_class_names(classes) if classes else loaded.manifest.classes
    for prediction in predict_images(loaded, images, names, top):
        _console.print(str(prediction.image), style="bold", markup=False, highlight=False, soft_wrap=True)
        for name, probability in prediction.classes:
            _console.print(f"  {probability:6.1%}  {name}", markup=False, soft_wrap=True)
        shares = ", ".join(f"{expert} {share:.0%}" for expert, share in prediction.experts if share > 0)
        _console.print(f"  tokens went to: {shares}", markup=False, soft_wrap=True)


@app.command()
def evaluate(
    model: Annotated[Path, typer.Argument(help="Folder of a unified model, e.g. runs/demo/model.")],
    data: Annotated[
        Path, typer.Option(help="A folder with a folder of images for each class, or a file of questions (.jsonl, .jsonl.gz).")
    ],
    task: Annotated[Task | None, typer.Option(help="What the model must be for. (default: what it is for)")] = None,
) -> None:
    """Measure a unified model on labelled samples of your own: accuracy with its 95% interval, and which experts were used."""
    from metamoe.ask import evaluate_on
    from metamoe.common.model.artifact import load_model

    loaded = load_model(model)
    own = Task.images if loaded.seed.is_image_model else Task.questions
    if task not in (None, own):
        raise InvalidSettingError(f"--task {task}: {model} is a model for {own}")
    with _console.status("evaluating"):
        result = evaluate_on(loaded, data)
    low, high = result.interval
    _console.print(f"accuracy: {result.percent:.1f}% [{low:.1f}, {high:.1f}] on {result.count} {own}", markup=False)
    shares = ", ".join(f"{expert} {share:.1%}" for expert, share in result.experts if share > 0)
    _console.print(f"tokens went to: {shares}", markup=False, soft_wrap=True)


@app.command()
def generate(
    model: Annotated[Path, typer.Argument(help="Folder of a unified model made from a decoder.")],
    prompt: Annotated[str, typer.Argument(help="Text to go on from.")],
    max_tokens: Annotated[int, typer.Option(min=1, help="How many tokens at most.")] = 64,
) -> None:
    """Go on from a prompt, taking the most likely token each time, and show which experts were asked."""
    from collections import Counter

    from metamoe.ask import spoken
    from metamoe.common.model.artifact import load_model

    experts: Counter[str] = Counter()
    for text, expert in spoken(load_model(model), prompt, max_tokens):
        typer.echo(text, nl=False)
        experts[expert] += 1
    typer.echo()
    asked = ", ".join(f"{expert} {count / experts.total():.0%}" for expert, count in experts.most_common())
    _errors.print(f"tokens went to: {asked}", markup=False, soft_wrap=True)


@app.command()
def presets(
    name: Annotated[str | None, typer.Argument(help="Preset to show in full.")] = None,
    check: Annotated[
        str | None, typer.Option(metavar="NAME", help="Say what a run of this preset needs and lacks here.")
    ] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="With --check: change one setting; repeatable.")
    ] = None,
    data_dir: Annotated[Path | None, typer.Option(help=f"With --check: {_DATA_DIR[0].lower()}{_DATA_DIR[1:]}")] = None,
) -> None:
    """List the presets, print one, or check what one needs before hours are lost; the exit code is 1 if anything is missing."""
    if check is not None:
        _check_preset(check, set_ or [], data_dir)
        return
    if name is not None:
        _console.print(preset_text(name), markup=False, highlight=False, soft_wrap=True, end="")
        return
    table = Table("preset", "start it with")
    for known in preset_names():
        table.add_row(known, preset_text(known).splitlines()[0].lstrip("# "))
    _console.print(table)


def _check_preset(name: str, overrides: list[str], data_dir: Path | None) -> None:
    from metamoe.check import check_preset

    overrides += [f"data.folder={data_dir}"] if data_dir is not None else []
    settings, missing = _absolute(load_settings(name, overrides)), False
    for finding in check_preset(settings):
        missing |= not finding.fine
        mark, style = ("ok", "green") if finding.fine else ("missing", "red")
        _console.print(f"{mark:>8}", style=style, end="  ")
        _console.print(f"{finding.what}: {finding.found}", markup=False, highlight=False, soft_wrap=True)
    if missing:
        raise typer.Exit(1)


def _absolute(settings: Settings) -> Settings:
    """The settings with all paths as seen from anywhere: a run's processes work in other folders than this one."""
    if Path(settings.seed_model).exists() and settings.seed_model != "glyphs":
        settings = settings.model_copy(update={"seed_model": str(Path(settings.seed_model).absolute())})
    if settings.data.folder:
        folder = str(Path(settings.data.folder).absolute())
        settings = settings.model_copy(update={"data": settings.data.model_copy(update={"folder": folder})})
    return settings


def _check_benchmark_folder(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise InputFileError(f"--out {folder} is a file; give a folder")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / "outcomes").is_dir():
        raise InvalidSettingError(
            f"--out {folder} is not empty and not a benchmark's, as it has no outcomes; give another folder"
        )


def _split(values: list[str] | None) -> list[str]:
    return [name.strip() for value in values or [] for name in value.split(",") if name.strip()]


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


def main() -> None:
    """Entry point: run the command; an expected error is one line and its exit code, an interrupt ends with 130."""
    for sign in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(sign, _interrupt)
    try:
        app()
    except MetaMoEError as error:
        if os.environ.get("METAMOE_DEBUG"):
            traceback.print_exc()
        _errors.print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        sys.exit(error.exit_code)


def _interrupt(_signal: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt
