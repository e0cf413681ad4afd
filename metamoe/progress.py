"""Live progress of a run: follows its event files and draws a bar for each stage and each training client."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from metamoe.common.config import Settings
from metamoe.common.events import Event, read_events

_STAGES = {
    "profile": "1 clients describe their data",
    "embed": "1 server embeds the public set",
    "select": "1 server chooses proxies",
    "expert": "2 clients train experts",
    "unify": "3 server trains the router",
    "deliver": "  clients receive and evaluate the model",
    "evaluate": "  table",
}
_POLL_SECONDS = 0.3
_CLIENT_BARS = 20


class Board:
    """The bars on the screen."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._tasks: dict[str, TaskID] = {}
        self._waiting = progress.add_task("waiting for the clients", total=None)

    def show(self, event: Event, own: bool = False) -> None:
        """Draw an event; ``own`` marks those that a client wrote about itself."""
        self._progress.update(self._waiting, visible=False)
        label = f"    {event.client}" if own else _STAGES[event.stage]
        if label not in self._tasks:
            self._tasks[label] = self._progress.add_task(label, total=event.total)
        self._progress.update(self._tasks[label], completed=event.done, total=event.total)

    def evaluation(self, done: int, total: int) -> None:
        """Draw the progress of the final table."""
        self.show(Event("evaluate", done, total))


def python_console() -> Console:
    """Where a call from Python shows its progress. In a notebook Rich moves bars by ipywidgets alone; without it they are drawn
    once, at the end.
    """
    console = Console()
    if console.is_jupyter and find_spec("ipywidgets") is None:
        return Console(force_jupyter=False, force_terminal=False)
    return console


@contextmanager
def live(settings: Settings, out: Path, console: Console) -> Iterator[Board]:
    """Show progress while the block runs."""
    columns = (TextColumn("{task.description:<45}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        board, done = Board(progress), threading.Event()
        follower = threading.Thread(target=_follow, args=(settings, out, board, done), daemon=True)
        follower.start()
        try:
            yield board
        finally:
            done.set()
            follower.join()


def _follow(settings: Settings, out: Path, board: Board, done: threading.Event) -> None:
    files = {out / "events.jsonl": False}
    if settings.clients <= _CLIENT_BARS:
        files |= {out / "clients" / name / "events.jsonl": True for name in settings.client_names}
    positions = dict.fromkeys(files, 0)
    finished = False
    while not finished:
        finished = done.wait(_POLL_SECONDS)
        for file, own in files.items():
            for event, position in read_events(file, positions[file]):
                positions[file] = position
                board.show(event, own)
