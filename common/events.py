"""Progress of a run as JSON lines that others can follow while it runs."""

import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Event:
    """``done`` of ``total`` steps of ``stage``, at the server or (in its own folder) at a client.

    ``client`` is the one that the server has just heard from, and ``time`` when the event was written, in seconds since 1970.
    """

    stage: str
    done: int
    total: int
    client: str = ""
    time: float = field(default=0.0, compare=False)


class EventLog:
    """Appends events to a file; written by one process, read by any."""

    def __init__(self, path: Path) -> None:
        self._path = path
        path.parent.mkdir(parents=True, exist_ok=True)

    def __call__(self, stage: str, done: int, total: int, client: str = "") -> None:
        with self._path.open("a") as file:
            file.write(json.dumps(asdict(Event(stage, done, total, client, time.time()))) + "\n")


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
            yield Event(values["stage"], values["done"], values["total"], values["client"], values["time"]), start
