"""Following a run while it goes on: what server and clients write down of their progress, given to whoever wants it."""

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from metamoe.common.config import Settings
from metamoe.common.events import Event, read_events

_POLL_SECONDS = 0.3


class Follower(Protocol):
    """Somebody who follows a run."""

    def show(self, event: Event, own: bool) -> None:
        """Take in an event; ``own`` marks those that a client wrote about itself."""

    def tick(self) -> None:
        """Time has passed."""


def logs_of_run(settings: Settings, out: Path) -> dict[Path, bool]:
    """The files in which a run's events are, and which of them a client writes about itself."""
    own = {out / "clients" / name / "events.jsonl": True for name in settings.member_names}
    return {out / "events.jsonl": False, **own}


@contextmanager
def followed(logs: Mapping[Path, bool], followers: Sequence[Follower]) -> Iterator[None]:
    """While the block runs, everybody is told of what is written in these files, from their beginning on."""
    if not followers:
        yield
        return
    done = threading.Event()
    follower = threading.Thread(target=_follow, args=(logs, followers, done), daemon=True)
    follower.start()
    try:
        yield
    finally:
        done.set()
        follower.join()


def _follow(logs: Mapping[Path, bool], followers: Sequence[Follower], done: threading.Event) -> None:
    positions = dict.fromkeys(logs, 0)
    finished = False
    while not finished:
        finished = done.wait(_POLL_SECONDS)
        for file, own in logs.items():
            for event, position in read_events(file, positions[file]):
                positions[file] = position
                for follower in followers:
                    follower.show(event, own)
        for follower in followers:
            follower.tick()
