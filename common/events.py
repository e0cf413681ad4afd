"""Progress of a run as JSON lines that others can follow while it runs."""

import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Event:
    """``done`` of ``total`` steps of ``stage``, at the server or (in its own folder) at a client.

    ``client`` is the one that the server has just heard from, ``time`` when the event was written, in seconds since 1970, and
    ``metrics`` what a training measured since the event before, by name: loss, learning rate, validation.
    """

    stage: str
    done: int
    total: int
    client: str = ""
    time: float = field(default=0.0, compare=False)
    metrics: dict[str, float] = field(default_factory=dict)


class EventLog:
    """Appends events to a file; written by one process, read by any."""

    def __init__(self, path: Path) -> None:
        self._path = path
        path.parent.mkdir(parents=True, exist_ok=True)

    def __call__(self, stage: str, done: int, total: int, client: str = "", metrics: Mapping[str, float] | None = None) -> None:
        with self._path.open("a") as file:
            file.write(json.dumps(asdict(Event(stage, done, total, client, time.time(), dict(metrics or {})))) + "\n")


def read_events(path: Path, start: int = 0) -> Iterator[tuple[Event, int]]:
    """Events from byte ``start`` of a log on, each with the position after it; a line that is still being written waits."""
    if not path.is_file():
        return
    with path.open("rb") as file:
        file.seek(start)
        for line in file:
            if not line.endswith(b"\n"):
                return
            start += len(line)
            values = json.loads(line)
            yield Event(**values), start
