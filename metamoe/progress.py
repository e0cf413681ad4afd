"""Live progress of a run: a bar for each stage and each training client, with losses and memory; lines in a log."""

import math
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from importlib.util import find_spec
from pathlib import Path

import psutil
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from metamoe.common.config import Settings
from metamoe.common.events import Event
from metamoe.server.journal import standing

_STAGES = {
    "profile": "1 clients describe their data",
    "embed": "1 server embeds the public set",
    "select": "1 server chooses proxies",
    "expert": "2 clients train experts",
    "unify": "3 server trains the router",
    "deliver": "  clients receive and evaluate the model",
    "evaluate": "  table",
}
_CLIENT_BARS = 20
_MINUTE = 60
_MEMORY_SECONDS = 5
_SHORT = {"loss": "loss {:.3f}", "validation-loss": "validation {:.3f}", "validation-accuracy": "{:.1f}%"}


def show_standing(out: Path, settings: Settings, console: Console) -> None:
    """Say of each stage what is taken over from before, and what is to be done."""
    for stage, (done, total) in standing(out, settings).items():
        taken = f"{done} of {total} taken over" if 0 < done < total else "taken over" if done else "to be done"
        console.print(f"  {stage:<8} {taken}", highlight=False)


class Board:
    """The bars on the screen."""

    def __init__(self, progress: Progress, clients: int) -> None:
        self._progress, self._each = progress, clients <= _CLIENT_BARS
        self._tasks: dict[str, TaskID] = {}
        self._memory = progress.add_task("", total=None, note="")
        self._looked = -math.inf
        self._waiting = progress.add_task("waiting for the clients", total=None, note="")

    def show(self, event: Event, own: bool = False) -> None:
        """Draw an event; ``own`` marks those that a client wrote about itself."""
        self._progress.update(self._waiting, visible=False)
        if own and not self._each:
            return
        if event.stage == "waiting":
            self._wait(event)
            return
        label = f"    {event.client}" if own else _STAGES[event.stage]
        if label not in self._tasks:
            self._tasks[label] = self._progress.add_task(label, total=event.total, note="")
        self._progress.update(self._tasks[label], completed=event.done, total=event.total, note=measured(event.metrics))

    def _wait(self, event: Event) -> None:
        """Who is waited for, with the time since when; gone when it is back."""
        label = f"    waiting for {event.client}"
        if label not in self._tasks or event.done == 0:
            self._tasks[label] = self._progress.add_task(label, total=None, note="")
        self._progress.update(self._tasks[label], visible=event.done == 0)

    def evaluation(self, done: int, total: int) -> None:
        """Draw the progress of the final table."""
        self.show(Event("evaluate", done, total))

    def tick(self) -> None:
        """Bars move by themselves; now and then, what memory is used."""
        if time.monotonic() - self._looked > _MEMORY_SECONDS:
            self._looked = time.monotonic()
            self._progress.update(self._memory, description=memory_used())


class Lines:
    """What a log gets in place of bars: a line when a stage begins, when one of few clients has answered, when one is waited
    for, and once a minute.
    """

    def __init__(self, console: Console, clients: int) -> None:
        self._console, self._each = console, clients <= _CLIENT_BARS
        self._stage = Event("", 0, 0)
        self._own: dict[str, Event] = {}
        self._waiting: dict[str, str] = {}
        self._said = time.monotonic()

    def show(self, event: Event, own: bool = False) -> None:
        """Say an event, or remember it until the next minute."""
        if own:
            if self._each:
                self._own[event.client] = event
        elif event.stage == "waiting":
            if event.done:
                self._waiting.pop(event.client, None)
                self._say(f"{event.client} is back, or given up")
            else:
                self._waiting[event.client] = _clock()
                self._say(f"waiting for {event.client}")
        else:
            if event.stage != self._stage.stage or (event.client and self._each):
                label = _STAGES[event.stage].strip()
                self._say(f"{label}: {event.client} ({event.done} of {event.total})" if event.client else label)
            self._stage = event

    def evaluation(self, done: int, total: int) -> None:
        """Say that the final table is being made."""
        if not done:
            self._say(f"{_STAGES['evaluate'].strip()}: {total} evaluations")

    def tick(self) -> None:
        """Once a minute, say what is going on."""
        if time.monotonic() - self._said < _MINUTE or not self._stage.stage:
            return
        parts = [f"{_STAGES[self._stage.stage].strip()}: {self._stage.done} of {self._stage.total}"]
        parts += [
            " ".join(filter(None, (name, f"{own.done}/{own.total}", measured(own.metrics))))
            for name, own in self._own.items()
            if own.done < own.total
        ]
        parts += [f"waiting for {name} since {since}" for name, since in self._waiting.items()]
        self._say("; ".join([*parts, memory_used()]))

    def _say(self, text: str) -> None:
        self._said = time.monotonic()
        self._console.print(f"{_clock()} {text}", markup=False, highlight=False, soft_wrap=True)


def measured(metrics: Mapping[str, float]) -> str:
    """What a training has measured, in a few words."""
    return ", ".join(form.format(metrics[name]) for name, form in _SHORT.items() if name in metrics)


def memory_used() -> str:
    """The memory in use of this machine, by whatever process, and of its cards if it has any."""
    host = psutil.virtual_memory()
    parts = [f"memory {(host.total - host.available) / 2**30:.1f} of {host.total / 2**30:.1f} GiB"]
    if tool := shutil.which("nvidia-smi"):
        asked = [tool, "--query-gpu=index,memory.used,memory.total", "--format=csv,noheader,nounits"]
        try:
            found = subprocess.run(asked, capture_output=True, text=True, timeout=_MEMORY_SECONDS, check=True).stdout
        except (OSError, subprocess.SubprocessError):
            return parts[0]
        for line in found.splitlines():
            card, used, total = (part.strip() for part in line.split(","))
            parts.append(f"card {card} {int(used) / 1024:.1f} of {int(total) / 1024:.1f} GiB")
    return ", ".join(parts)


def _clock() -> str:
    return datetime.now().strftime("%H:%M:%S")


def python_console() -> Console:
    """Where a call from Python shows its progress: in a notebook without ipywidgets, by which alone bars move, as lines."""
    console = Console()
    if console.is_jupyter and find_spec("ipywidgets") is None:
        return Console(force_jupyter=False, force_terminal=False)
    return console


@contextmanager
def shown(settings: Settings, console: Console) -> Iterator["Board | Lines"]:
    """What shows progress while the block runs: bars on a terminal, lines in a log."""
    if not (console.is_terminal or console.is_jupyter):
        yield Lines(console, len(settings.members))
        return
    columns = (
        TextColumn("{task.description:<45}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(elapsed_when_finished=True),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=console) as progress:
        yield Board(progress, len(settings.members))
