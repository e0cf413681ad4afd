"""Where a run is, from another terminal: what is done, who is at what, and who is waited for."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Literal

from metamoe.common.errors import InputFileError
from metamoe.common.events import Event, read_events
from metamoe.common.files import worked_on
from metamoe.common.presets import load_settings
from metamoe.deploy.flower import left_running
from metamoe.server.journal import standing


@dataclass(frozen=True)
class RunStatus:
    """Where a run is.

    Attributes:
        state: whether a process works on it, it has come to its end, or neither.
        stages: of each stage how much is done, of how much: clients where they answer, else one.
        clients: the last thing that each client wrote of its own training: epochs (steps, with DP-SGD) done, and in all.
        measured: the last of each thing that a client's training measured, by name: loss, learning rate, validation.
        left: seconds that each training that is going on still takes, at the rate of its steps so far.
        waiting: who dropped out and is waited for, and since when.
        last: when anything was last written down.
    """

    state: Literal["running", "finished", "stopped"]
    stages: dict[str, tuple[int, int]]
    clients: dict[str, tuple[int, int]] = field(default_factory=dict)
    measured: dict[str, dict[str, float]] = field(default_factory=dict)
    left: dict[str, float] = field(default_factory=dict)
    waiting: dict[str, datetime] = field(default_factory=dict)
    last: datetime | None = None


def run_status(folder: Path) -> RunStatus:
    """The status of the run in a folder, whoever works on it.

    Raises:
        InputFileError: the folder holds no run.
        StateFileError: its journal is damaged.
    """
    if not (folder / "settings.toml").is_file():
        raise InputFileError(f"{folder} holds no settings.toml; give a run's folder, such as runs/demo")
    settings = load_settings(str(folder / "settings.toml"))
    ended = (folder / "server" / "summary.json").is_file()
    events = list(_events(folder / "events.jsonl"))
    waiting: dict[str, datetime] = {}
    for event in events:
        if event.stage == "waiting" and not event.done:
            waiting[event.client] = datetime.fromtimestamp(event.time)
        elif event.stage == "waiting":
            waiting.pop(event.client, None)
    own = {name: list(_events(folder / "clients" / name / "events.jsonl")) for name in settings.member_names}
    times = [event.time for log in (events, *own.values()) for event in log]
    state: Literal["running", "finished", "stopped"] = "stopped"
    # Flower and Ray are under way before the server's part, which alone works in server/.
    if ended or worked_on(folder / "server") or left_running(folder / "flower"):
        state = "finished" if ended else "running"
    left = {name: seconds_left(log) for name, log in own.items()} if state == "running" else {}
    return RunStatus(
        state,
        standing(folder, settings),
        {name: (log[-1].done, log[-1].total) for name, log in own.items() if log},
        {name: {key: value for event in log for key, value in event.metrics.items()} for name, log in own.items() if log},
        {name: seconds for name, seconds in left.items() if seconds},
        {} if ended else waiting,
        datetime.fromtimestamp(max(times)) if times else None,
    )


def seconds_left(log: Sequence[Event]) -> float:
    """How long a training still takes, in seconds, at the rate of its steps since it began or was last taken up; 0 where
    that is not known, or nothing is left.
    """
    if not log:
        return 0.0
    last = begun = log[-1]
    for event in reversed(log[:-1]):
        if event.done >= begun.done or (event.stage, event.total) != (last.stage, last.total):
            break
        begun = event
    steps = last.done - begun.done
    return (last.time - begun.time) / steps * (last.total - last.done) if steps else 0.0


def _events(file: Path) -> Iterator[Event]:
    return (event for event, _ in read_events(file))
