"""Benchmarks: one implementation for the command and for Python, and what one left in its folder."""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from metamoe.common.config import Settings
from metamoe.common.errors import InputFileError, InvalidSettingError
from metamoe.common.presets import by_name, load_settings, with_absolute_paths
from metamoe.progress import python_console
from metamoe.simulations.benchmark.methods import chosen
from metamoe.simulations.benchmark.tables import (
    REFERENCE,
    Record,
    Results,
    mean_and_deviation,
    paired_difference,
    read_results,
)

if TYPE_CHECKING:
    import pandas

_DECIDED = ("seed", "compute.server-threads", "report-accuracy")


@dataclass(frozen=True)
class Benchmark:
    """A benchmark, as its folder has it. Everything is read when it is asked for."""

    folder: Path

    @cached_property
    def results(self) -> Results:
        """Everything that was measured, seed by seed.

        Raises:
            InputFileError: the folder holds no benchmark.
        """
        return read_results(self.folder)

    def table(self) -> "pandas.DataFrame":
        """A row for each method, and after them for each ablation, which has its ``group``; means over the seeds.

        The columns are accuracy in percent on each test set, their ``average`` and its ``deviation`` over the seeds, by how
        much metamoe is ``better`` seed by seed with its 95% interval from ``low`` to ``high`` (none for metamoe itself),
        accuracy on the held-out ``public`` samples, and the share of tokens that reached an expert of their ``own`` domain.
        """
        import pandas

        results = self.results
        records = results.methods | results.ablations
        rows = [_row(record, results.methods.get(REFERENCE)) for record in records.values()]
        return pandas.DataFrame(rows, index=pandas.Index(records, name="method"))

    def report(self) -> Path:
        """Write the benchmark as one self-contained HTML page.

        Returns:
            Its file, report.html in the folder.

        Raises:
            InputFileError: a file is missing or not a benchmark's.
        """
        from metamoe.simulations.benchmark.report import write_report

        return write_report(self.folder)


def benchmark(
    preset: str | PathLike[str] = "glyphs",
    *,
    methods: Sequence[str] = (),
    ablations: Sequence[str] = (),
    seeds: int = 5,
    settings: Mapping[str, object] | None = None,
    out: str | PathLike[str] | None = None,
    progress: bool = False,
) -> Benchmark:
    """Compare methods and ablations over several seeds: the same as ``metamoe benchmark``. Stopped and called again, it goes on
    where it was. It starts processes: in a script, call it under ``if __name__ == "__main__":``.

    Args:
        preset: name of a preset, or a TOML file of settings.
        methods: names of the main table's, or "all"; if empty, all, or metamoe alone with ablations. An unknown one lists them.
        ablations: names of groups, or "all". An unknown one lists them.
        seeds: how many: 0, 1, ...
        settings: changes of the preset's, as :func:`metamoe.simulate` takes them.
        out: benchmark folder; None for runs/benchmark-PRESET.
        progress: show the bar that the command shows.

    Raises:
        PresetNotFoundError, UnknownSettingError, InvalidSettingError, ProxyCountError: with what was given and what is allowed.
        InputFileError: a folder or file cannot be used.
        RunFailedError: a process died.
        MetaMoEError: what stopped a part of it, of another kind.
    """
    check_names(by_name(settings or {}))
    chosen_settings = with_absolute_paths(load_settings(str(preset), values=settings))
    folder = Path(out or Path("runs") / f"benchmark-{Path(preset).stem}").absolute()
    given = {"methods": list(methods), "ablations": list(ablations), "seeds": seeds, "settings": by_name(settings or {})}
    call = ", ".join([repr(str(preset)), *(f"{name}={value!r}" for name, value in given.items() if value)])
    console = python_console() if progress else None
    run_comparison(chosen_settings, methods, ablations, seeds, folder, f"metamoe.benchmark({call})", console)
    return Benchmark(folder)


def check_names(names: Iterable[str]) -> None:
    """Raise if one of these settings is not for a user of a benchmark to change.

    Raises:
        InvalidSettingError: names it.
    """
    for name in names:
        if name in _DECIDED:
            raise InvalidSettingError(
                f"{name}: a benchmark decides this itself; its seeds are given by --seeds, in Python by seeds"
            )


def run_comparison(
    settings: Settings,
    methods: Sequence[str],
    ablations: Sequence[str],
    seeds: int,
    folder: Path,
    command: str,
    console: Console | None = None,
) -> Results:
    """Compare methods and ablations over several seeds, and write the report; what is done already is not done again.

    Args:
        settings: of the preset, with absolute paths.
        methods: names of the main table's, or "all"; if empty, all, or with ablations metamoe alone.
        ablations: names of groups, or "all".
        seeds: how many: 0, 1, ...
        folder: the benchmark's, absolute.
        command: what was called, for the report.
        console: where to show progress; None for nowhere.

    Raises:
        InputFileError, InvalidSettingError: the folder cannot take a benchmark, or a name is unknown.
        MetaMoEError: see :func:`metamoe.simulations.benchmark.run.run_benchmark`.
    """
    if seeds < 1:
        raise InvalidSettingError(f"seeds = {seeds}: at least one is needed")
    # With ablations alone there is still something to compare them with.
    wanted = chosen(settings, methods or ([REFERENCE] if ablations else ["all"]), ablations)
    _check_folder(folder)
    # Only now, so that what is wrong is said at once.
    from metamoe.common.data.hub import pinned
    from metamoe.simulations.benchmark.report import write_report
    from metamoe.simulations.benchmark.run import Plan, run_benchmark

    plan = Plan(pinned(settings), tuple(wanted), tuple(range(seeds)), folder, command)
    if console:
        console.print(f"preset {settings.preset}: {len(wanted)} methods x {seeds} seeds -> {folder}", soft_wrap=True)
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("left:"), TimeRemainingColumn())
    shown = Progress(*columns, TextColumn("{task.description}"), console=console, speed_estimate_period=3_600)
    with shown if console else nullcontext():
        task = shown.add_task("preparing", total=None)

        def show(done: int, total: int, last: str) -> None:
            shown.update(task, completed=done, total=total, description=last)

        results = run_benchmark(plan, show)
    write_report(folder)
    return results


def _check_folder(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise InputFileError(f"out = {folder} is a file; give a folder")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / "outcomes").is_dir():
        raise InvalidSettingError(
            f"out = {folder} is not empty and not a benchmark's, as it has no outcomes; give another folder"
        )


def _row(record: Record, reference: Record | None) -> dict[str, float | str | None]:
    average, deviation = mean_and_deviation(record.average)
    compared = None if record is reference else reference
    better, low, high = paired_difference(record.average, compared.average) if compared else (None, None, None)
    shares = [share for share in record.own_expert_share if share is not None]
    return {
        "group": record.group,
        **{name: mean_and_deviation(values)[0] for name, values in record.domains.items()},
        "average": average,
        "deviation": deviation,
        "better": better,
        "low": low,
        "high": high,
        "public": mean_and_deviation(record.public)[0],
        "own": mean_and_deviation(shares)[0] if shares else None,
    }
