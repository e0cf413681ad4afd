"""Runs shown by the trackers that people have: what server and clients write down of themselves, sent on.

Each service is a small file here. Nothing of it reaches a federation: a party tracks what lies on its own disk.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

from metamoe.common.config import Settings
from metamoe.common.errors import InputFileError, InvalidSettingError
from metamoe.common.events import Event
from metamoe.common.files import read_json, write_json

_IDS = "tracking.json"
_NAMES = {"unify": "router"}
_log = logging.getLogger("metamoe")


class Service(StrEnum):
    """A tracker that people have."""

    tensorboard = "tensorboard"
    mlflow = "mlflow"
    wandb = "wandb"


@dataclass(frozen=True)
class Outcome:
    """What a run has come to.

    Attributes:
        model: the unified model's hash.
        numbers: by name, such as ``accuracy/metamoe/digits``.
        tables: by name, a header and rows.
        pictures: by name, PNG files.
        page: the run's page, report.html.
    """

    model: str
    numbers: Mapping[str, float] = field(default_factory=dict)
    tables: Mapping[str, tuple[Sequence[str], Sequence[Sequence[str]]]] = field(default_factory=dict)
    pictures: Mapping[str, bytes] = field(default_factory=dict)
    page: Path | None = None


class Tracker(Protocol):
    """One run at one service. ``id`` is how the service calls the run."""

    id: str

    def number(self, name: str, value: float, step: int, when: float) -> None:
        """A point of a curve; ``when`` in seconds since 1970. The same point again changes nothing."""

    def outcome(self, outcome: Outcome) -> None:
        """What the run has come to."""

    def close(self) -> None:
        """Everything is on disk, or sent."""


class Tracking:
    """Follows a run for a tracker: every number that a training measured becomes a point of its curve. A service that fails is
    not asked again, and the run goes on.
    """

    def __init__(self, service: Service, tracker: Tracker, failures: tuple[type[Exception], ...]) -> None:
        self.service, self.id = service, tracker.id
        self._tracker, self._failures, self._failed = tracker, failures, False

    def show(self, event: Event, own: bool) -> None:
        """Pass on what was measured: the curves of a client under its name, of the server's router under ``router``."""
        by = event.client if own else _NAMES.get(event.stage, event.stage)

        def points(tracker: Tracker) -> None:
            for name, value in event.metrics.items():
                tracker.number(f"{by}/{name}", value, event.done, event.time)

        self._tell(points)

    def tick(self) -> None:
        """Nothing to do."""

    def outcome(self, outcome: Outcome) -> None:
        """Pass on what the run has come to."""
        self._tell(lambda tracker: tracker.outcome(outcome))

    def close(self) -> None:
        """Everything is on disk, or sent."""
        self._tell(lambda tracker: tracker.close())

    def _tell(self, what: Callable[[Tracker], None]) -> None:
        if self._failed:
            return
        try:
            what(self._tracker)
        except self._failures as error:
            self._failed = True
            _log.warning("%s is told no more of this run: %s", self.service, error)


def check_services(services: Sequence[Service]) -> None:
    """Raise unless what the services need is installed.

    Raises:
        InvalidSettingError: it is not.
    """
    for service in services:
        _module(service)


@contextmanager
def tracked(services: Sequence[Service], folder: Path, settings: Settings | None) -> Iterator[list[Tracking]]:
    """While the block runs, each service has a run for the run in a folder: a new one, or of a folder that it was told of
    before, the same.

    Args:
        services: which.
        folder: of the run; what a service keeps on this machine goes there, unless its own environment variables
            (``MLFLOW_TRACKING_URI``, ``WANDB_MODE`` and others) say otherwise.
        settings: of the run, which become its parameters; a client has none.

    Raises:
        InvalidSettingError: what a service needs is not installed, or it cannot be reached.
        InputFileError: the folder's note of earlier trackers cannot be read.
    """
    ids, values = _ids(folder), flat(settings.model_dump(mode="json", by_alias=True)) if settings else {}
    with ExitStack() as stack:
        trackings = []
        for service in services:
            module = _module(service)
            try:
                tracker = module.open_run(folder, values, ids.get(service))
            except module.FAILURES as error:
                raise InvalidSettingError(f"--track {service}: {error}") from error
            trackings.append(Tracking(service, tracker, module.FAILURES))
            stack.callback(trackings[-1].close)
            ids[service] = tracker.id
        if services:
            write_json(folder / _IDS, ids)
        yield trackings


def _module(service: Service) -> ModuleType:
    try:
        return import_module(f"{__name__}.{service}")
    except ModuleNotFoundError as error:
        raise InvalidSettingError(
            f"--track {service} needs the package {error.name}, which is not installed: pip install 'metamoe-fl[{service}]'"
        ) from error


def _ids(folder: Path) -> dict[str, str]:
    try:
        ids: dict[str, str] = read_json(folder / _IDS) if (folder / _IDS).is_file() else {}
    except (OSError, ValueError) as error:
        raise InputFileError(f"{folder / _IDS} cannot be read ({error}); without it, tracking begins anew") from error
    return ids


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Settings in groups as one level, each under its whole name."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return found
