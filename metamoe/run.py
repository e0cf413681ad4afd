"""Runs of a federation in Python: making one, and what it left in its folder."""

import heapq
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from operator import attrgetter
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import ValidationError

from metamoe.common.config import Settings
from metamoe.common.errors import InputFileError, InvalidSettingError, RunFailedError, first_problem
from metamoe.common.events import Event, read_events
from metamoe.common.presets import load_settings, with_absolute_paths
from metamoe.progress import python_console
from metamoe.results import RunResults
from metamoe.simulation import Backend, resume_simulation, run_simulation
from metamoe.tracking import Service

if TYPE_CHECKING:
    import pandas

    from metamoe.model import Model

_SETTINGS, _RESULTS = "settings.toml", "results.json"


@dataclass(frozen=True)
class RunEvent(Event):
    """An event, and who wrote it: ``"server"``, or a client's name."""

    by: str = "server"


@dataclass(frozen=True)
class Run:
    """A run that came to its end, as its folder has it. Everything is read when it is asked for."""

    folder: Path

    @cached_property
    def settings(self) -> Settings:
        """Every setting of the run."""
        return load_settings(str(self.folder / _SETTINGS))

    @cached_property
    def results(self) -> RunResults:
        """Accuracy of every method on every domain, routing, what each client sent, times.

        Raises:
            InputFileError: there are none, as the run was not made by a simulation, or they are not a run's.
        """
        file = self.folder / _RESULTS
        try:
            return RunResults.model_validate_json(file.read_bytes())
        except OSError as error:
            raise InputFileError(f"{self.folder} holds no {_RESULTS}, which a simulation writes at its end") from error
        except ValidationError as error:
            raise InputFileError(f"{file} is not a run's: {first_problem(error)}") from error

    @cached_property
    def model(self) -> "Model":
        """The unified model, see :func:`metamoe.load`."""
        from metamoe.model import load

        return load(self.folder / "model")

    def table(self) -> "pandas.DataFrame":
        """Accuracy in percent: a row for each method; a column for each domain, their ``average``, and ``public``, the held-out
        public samples.
        """
        import pandas

        results = self.results
        accuracy = pandas.DataFrame.from_dict(results.accuracy, orient="index", columns=[*results.routing, "average"])
        return accuracy.assign(public=results.public_accuracy).rename_axis("method")

    def events(self) -> Iterator[RunEvent]:
        """What the server and the clients wrote down of their progress, in the order of time."""
        files = {"server": self.folder / "events.jsonl"}
        files |= {name: self.folder / "clients" / name / "events.jsonl" for name in self.settings.member_names}
        logs = (_events(file, by) for by, file in files.items())
        return heapq.merge(*logs, key=attrgetter("time"))

    def remove(self, client: str, out: str | PathLike[str], *, progress: bool = False) -> "Run":
        """The run without this client, to the same bits as from its beginning, while the others compute nothing: the same as
        ``metamoe model remove``. This run stays as it is.

        Args:
            client: its name.
            out: folder of the new run.
            progress: show the bars that the command shows.

        Raises:
            InvalidSettingError: it has no part in the model, or too few would be left.
            InputFileError: the folder is not empty, or this run was not made by a simulation.
            MetaMoEError: what stopped the run, of another kind.
        """
        return self._changed("remove", client, out, progress)

    def add(self, client: str, out: str | PathLike[str], *, progress: bool = False) -> "Run":
        """The run with one client more, which alone is asked: the same as ``metamoe model add``; otherwise as
        :meth:`remove`.
        """
        return self._changed("add", client, out, progress)

    def refresh(self, client: str, out: str | PathLike[str], *, public: Sequence[str] = (), progress: bool = False) -> "Run":
        """The run with one client asked anew, as when its data has changed: the same as ``metamoe model refresh``; otherwise as
        :meth:`remove`.

        Args:
            client, out, progress: as there.
            public: settings of another public set, such as ``["data.public-samples=5000"]``, out of which the client's proxies
                are chosen; it must hold all proxies of the others, who keep theirs.
        """
        return self._changed("refresh", client, out, progress, tuple(public))

    def _changed(
        self,
        kind: Literal["remove", "add", "refresh"],
        client: str,
        out: str | PathLike[str],
        progress: bool,
        public: tuple[str, ...] = (),
    ) -> "Run":
        from metamoe.changes import begin
        from metamoe.server.changes import Change

        if not (self.folder / "clients").is_dir():
            raise InputFileError(f"{self.folder} is a federation's run; change it with 'metamoe model {kind}'")
        target = Path(out).absolute()
        begin(self.folder, Change(kind, client, public), target)
        return resume(target, progress=progress)


def _events(file: Path, by: str) -> Iterator[RunEvent]:
    return (RunEvent(**asdict(event), by=by) for event, _ in read_events(file))


def simulate(
    preset: str | PathLike[str] = "glyphs",
    *,
    clients: int | None = None,
    seed: int | None = None,
    settings: Mapping[str, object] | None = None,
    out: str | PathLike[str] | None = None,
    backend: Literal["ray", "local"] = "ray",
    overwrite: bool = False,
    progress: bool = False,
    track: Sequence[str] = (),
) -> Run:
    """Run a federation on this machine: the same as ``metamoe simulate``, to the same bits.

    Args:
        preset: name of a preset, or a TOML file of settings, such as the ``settings.toml`` of an earlier run.
        clients: how many there are; None for as many as the preset has.
        seed: of every random choice; None for the preset's.
        settings: other changes, each under its whole name, ``{"proxies.count": 100}``, or in groups, ``{"proxies": {"count":
            100}}``. Hyphens can be underscores.
        out: run folder; None for runs/PRESET.
        backend: ray for Flower clients on Ray, local for one process.
        overwrite: replace an earlier run in the folder.
        progress: show the bars that the command shows.
        track: services that are told of it: ``"tensorboard"``, ``"mlflow"``, ``"wandb"``.

    Raises:
        PresetNotFoundError, UnknownSettingError, InvalidSettingError, ProxyCountError: with what was given and what is allowed.
        InputFileError: a folder or file cannot be used.
        EmptyPartitionError: a client would have no data.
        MetaMoEError: what stopped the run, of another kind.
    """
    if backend not in list(Backend):
        raise InvalidSettingError(f"backend = {backend!r} is none of {', '.join(Backend)}")
    given = {name: value for name, value in (("clients", clients), ("seed", seed)) if value is not None}
    chosen = with_absolute_paths(load_settings(str(preset), values={**(settings or {}), **given}))
    folder = Path(out or Path("runs") / Path(preset).stem).absolute()
    run_simulation(chosen, folder, Backend(backend), overwrite, python_console() if progress else None, _services(track))
    return Run(folder)


def _services(names: Sequence[str]) -> list[Service]:
    if unknown := [name for name in names if name not in list(Service)]:
        raise InvalidSettingError(f"track = {unknown[0]!r} is none of {', '.join(Service)}")
    return [Service(name) for name in names]


def resume(folder: str | PathLike[str], *, progress: bool = False, track: Sequence[str] = ()) -> Run:
    """Go on with a simulation that was interrupted, to the same bits: the same as ``metamoe resume``.

    Args:
        folder: of the run.
        progress: show the bars that the command shows.
        track: see :func:`simulate`.

    Raises:
        InputFileError: the folder holds no run.
        StateFileError: what is there is damaged, or of other settings than it began with.
        MetaMoEError: what stopped the run, of another kind.
    """
    place = Path(folder).absolute()
    resume_simulation(place, python_console() if progress else None, _services(track))
    return Run(place)


def open_run(folder: str | PathLike[str]) -> Run:
    """The run in a folder: a simulation's, or another whose model was made.

    Raises:
        InputFileError: the folder holds no run.
        RunFailedError: the run has not come to its end.
    """
    place = Path(folder).absolute()
    if not (place / _SETTINGS).is_file():
        raise InputFileError(f"{folder} holds no {_SETTINGS}; give a run's folder, such as runs/demo")
    if not (place / "server" / "summary.json").is_file():
        raise RunFailedError(f"{folder} holds a run that has not come to its end; metamoe.resume goes on with it")
    return Run(place)
