"""The commands that compare methods."""

from pathlib import Path
from typing import Annotated

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from metamoe.common.errors import InputFileError, InvalidSettingError
from metamoe.common.loading import loading
from metamoe.options import DataDir, Preset, Set, console, json_option, log, notes, put_json, settings_of
from metamoe.show import show_table


def benchmark(
    preset: Preset = "glyphs",
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
    set_: Set = None,
    data_dir: DataDir = None,
    out: Annotated[Path | None, typer.Option(help="Benchmark folder. (default: runs/benchmark-PRESET)")] = None,
    as_json: Annotated[bool, json_option("what results.json holds, and folder")] = False,
) -> None:
    """Compare methods and ablations over several seeds; stopped and started again, it goes on where it was."""
    from metamoe.simulations.benchmark.methods import chosen

    folder = (out or Path("runs") / f"benchmark-{Path(preset).stem}").absolute()
    for override in set_ or []:
        if override.partition("=")[0].strip() in ("seed", "compute.server-threads", "report-accuracy"):
            raise InvalidSettingError(f"--set {override}: a benchmark decides this itself; its seeds are given by --seeds")
    names, groups = _split(methods), _split(ablation)
    # With ablations alone there is still something to compare them with.
    names = names or (["metamoe"] if groups else ["all"])
    settings = settings_of(preset, set_, data_dir)
    wanted = chosen(settings, names, groups)
    _check_benchmark_folder(folder)
    # Only now, so that what is wrong is said at once.
    with loading():
        from metamoe.simulations.benchmark.report import write_report
        from metamoe.simulations.benchmark.run import Plan, run_benchmark
        from metamoe.simulations.benchmark.tables import method_header, method_rows

    plan = Plan(settings, tuple(wanted), tuple(range(seeds)), folder)
    log.info("preset %s: %d methods x %d seeds -> %s", preset, len(wanted), seeds, folder)
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("left:"), TimeRemainingColumn())
    with Progress(*columns, TextColumn("{task.description}"), console=notes, speed_estimate_period=3_600) as progress:
        task = progress.add_task("preparing", total=None)

        def show(done: int, total: int, last: str) -> None:
            progress.update(task, completed=done, total=total, description=last)

        results = run_benchmark(plan, show)
    report_file = write_report(folder)
    if as_json:
        put_json({**results.model_dump(mode="json"), "folder": str(folder)})
        return
    for records in (results.methods, results.ablations):
        if records:
            # Without the test sets, of which there can be many: they are in the report.
            name, *_, average, better, public, _ = method_header(records)
            rows = [[method, *cells[-4:-1]] for method, *cells in method_rows(records, results.methods.get("metamoe"))]
            show_table(console, [name, average, better, public], rows)
    console.print(f"results: {folder / 'results.json'}\ntables: {folder / 'tables.md'}\nreport: {report_file}", soft_wrap=True)


def report(
    folder: Annotated[Path, typer.Argument(help="Folder that 'metamoe benchmark' wrote.")],
) -> None:
    """Write a benchmark's results as one self-contained HTML page, report.html in its folder."""
    from metamoe.simulations.benchmark.report import write_report

    console.print(f"report: {write_report(folder)}", soft_wrap=True)


def _check_benchmark_folder(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise InputFileError(f"--out {folder} is a file; give a folder")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / "outcomes").is_dir():
        raise InvalidSettingError(
            f"--out {folder} is not empty and not a benchmark's, as it has no outcomes; give another folder"
        )


def _split(values: list[str] | None) -> list[str]:
    return [name.strip() for value in values or [] for name in value.split(",") if name.strip()]
