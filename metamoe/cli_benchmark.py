"""The commands that compare methods."""

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from metamoe.options import DataDir, Preset, Set, console, json_option, notes, put_json, settings_of
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
    from metamoe.comparison import check_names, run_comparison
    from metamoe.simulations.benchmark.tables import REFERENCE, method_header, method_rows

    folder = (out or Path("runs") / f"benchmark-{Path(preset).stem}").absolute()
    check_names(override.partition("=")[0].strip() for override in set_ or [])
    settings = settings_of(preset, set_, data_dir)
    command = shlex.join(["metamoe", *sys.argv[1:]])
    results = run_comparison(settings, _split(methods), _split(ablation), seeds, folder, command, notes)
    if as_json:
        put_json({**results.model_dump(mode="json"), "folder": str(folder)})
        return
    for records in (results.methods, results.ablations):
        if records:
            # Without the test sets, of which there can be many: they are in the report.
            header = method_header(records)
            shown = [header.index(column) for column in ("method", "average", "metamoe is better by", "public, held out")]
            rows = [[cells[k] for k in shown] for cells in method_rows(records, results.methods.get(REFERENCE))]
            show_table(console, [header[k] for k in shown], rows)
    console.print(
        f"results: {folder / 'results.json'}\ntables: {folder / 'tables.md'}\nreport: {folder / 'report.html'}", soft_wrap=True
    )


def report(
    folder: Annotated[Path, typer.Argument(help="Folder of a run that has come to its end, or of a benchmark.")],
) -> None:
    """Write a run's or a benchmark's results as one self-contained HTML page, report.html in its folder."""
    # A run has a server's part; a benchmark has not.
    if (folder / "server").is_dir():
        from metamoe.simulations.page import write_run_page as write
    else:
        from metamoe.simulations.benchmark.report import write_report as write

    console.print(f"report: {write(folder)}", soft_wrap=True)


def _split(values: list[str] | None) -> list[str]:
    return [name.strip() for value in values or [] for name in value.split(",") if name.strip()]
