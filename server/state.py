"""What a run has so far, in its folder, so that it can be stopped at any moment and goes on where it was.

::

    server/journal.jsonl               what is finished, a line each, with the hash of the line and of what it names
    server/replies/<kind>/<name>       what clients sent; experts lie in server/experts/<name> as PEFT adapters
    proxies.json                       what was selected
    server/training/                   the router's training as far as it is
    model/                             the unified model

A stage does what the journal does not name, or what is no longer as the journal says, and reads the rest.
"""

import hashlib
import os
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError

from metamoe.common.arrays import arrays_hash, read_arrays, write_arrays
from metamoe.common.compute import peak_memory
from metamoe.common.config import Settings
from metamoe.common.errors import StateFileError
from metamoe.common.files import write_atomically
from metamoe.common.model.seed import Seed
from metamoe.common.wire import Kind
from metamoe.server.experts import store_expert, stored_arrays
from metamoe.server.journal import JOURNAL, journal_line, read_journal

FORMAT = 1
_FROM, _ASKED = "from", "asked"


class RunState:
    """The state of one run.

    Args:
        out: the run folder.
        settings, seed: the run's.
        about: hashes by what they are of, which a run keeps from its beginning to its end.

    Raises:
        StateFileError: the folder holds a run of other settings, seed, public set or version, or its journal has no beginning.
    """

    def __init__(self, out: Path, settings: Settings, seed: Seed, about: Mapping[str, str]) -> None:
        self._out, self._settings, self._seed = out, settings, seed
        self._file = out / "server" / JOURNAL
        self._lines = read_journal(out)
        terms = {"format": FORMAT, "version": version("metamoe-fl"), **about}
        if not self._lines:
            self.note("run", run=secrets.token_hex(16), **terms)
        for what, value in terms.items():
            if (begun := self._lines[0].get(what)) != value:
                raise StateFileError(
                    f"the run in {out} began with {what} {str(begun)[:12]}, and this is {str(value)[:12]}: go on with what it "
                    "began with, or begin another run in another folder"
                )
        # Of a line that was cut short or changed, and of all after it, nothing is believed and nothing is left.
        whole = b"".join(map(journal_line, self._lines))
        if self._file.read_bytes() != whole:
            write_atomically(self._file, whole)

    @property
    def run(self) -> str:
        """The run's name in all ledgers, from its beginning to its end."""
        return str(self._lines[0]["run"])

    def note(self, what: str, **fields: Any) -> None:
        """Add a line to the journal; when this returns it is on disk."""
        line = {"what": what, **fields}
        self._file.parent.mkdir(parents=True, exist_ok=True)
        with self._file.open("ab") as file:
            file.write(journal_line(line))
            file.flush()
            os.fsync(file.fileno())
        self._lines.append(line)

    def notes(self, what: str) -> list[dict[str, Any]]:
        """The journal's lines of one sort, in their order."""
        return [line for line in self._lines if line["what"] == what]

    def finished(self, what: str, file: Path, **fields: Any) -> None:
        """Note that a stage has come to an end, with the file that it wrote."""
        self.note(what, file=file.relative_to(self._out).as_posix(), sha256=_file_hash(file), **fields)

    def holds(self, what: str, file: Path) -> bool:
        """Whether a stage has come to an end and the file that it wrote is as it was."""
        return is_as_noted(self._lines, what, file)

    def keep(self, kind: Kind, name: str, arrays: Mapping[str, np.ndarray]) -> None:
        """Write down what a client sent; when this returns it is on disk."""
        if kind == "expert":
            store_expert(self.expert_folder(name), self._seed, self._settings.lora, dict(arrays))
        else:
            write_arrays(reply_place(self._out, kind, name), arrays)
        self.note("reply", kind=kind, name=name, sha256=arrays_hash(arrays))

    def reply(self, kind: Kind, name: str) -> dict[str, np.ndarray] | None:
        """What a client sent; None if it has not, or if it is no longer as it was."""
        line = last_reply(self._lines, kind, name)
        return stored_reply(self._out, line) if line else None

    def taken_over(self, kind: Kind, name: str) -> bool:
        """Whether what a client sent was an answer in an earlier run, see :mod:`metamoe.server.changes`."""
        return bool((line := last_reply(self._lines, kind, name)) and _FROM in line)

    def answers(self, kind: Kind, name: str, asked: str) -> bool:
        """Whether what a client sent is the answer to this: what was taken over may be one to something else."""
        line = last_reply(self._lines, kind, name)
        return line is not None and line.get(_ASKED, asked) == asked

    def expert_folder(self, name: str) -> Path:
        """Where a client's expert lies."""
        return reply_place(self._out, "expert", name)

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Note how long the block took, if it comes to its end: seconds on the clock, and of this process on any core."""
        begun = clocks()
        yield
        self.took(stage, begun)

    def took(self, stage: str, begun: tuple[float, float]) -> None:
        """Note how long a stage took, by what :func:`clocks` said at its beginning."""
        wall, cpu = clocks()
        self.note("time", stage=stage, wall=wall - begun[0], cpu=cpu - begun[1], memory=peak_memory())

    def times(self, which: str) -> dict[str, float]:
        """Seconds (``wall`` or ``cpu``) of each stage, all sittings together."""
        total: dict[str, float] = {}
        for line in self.notes("time"):
            total[line["stage"]] = total.get(line["stage"], 0.0) + line[which]
        return {stage: round(seconds, 3) for stage, seconds in total.items()}

    def peak_memory(self) -> dict[str, int]:
        """The largest memory of any sitting, see :func:`metamoe.common.compute.peak_memory`."""
        largest: dict[str, int] = {}
        for line in self.notes("time"):
            largest |= {what: max(size, largest.get(what, 0)) for what, size in line["memory"].items()}
        return largest


def reply_place(out: Path, kind: Kind, name: str) -> Path:
    """Where in a run folder lies what a client sent: a file, or the folder of an expert."""
    if kind == "expert":
        return out / "server" / "experts" / name
    return out / "server" / "replies" / kind / f"{name}.safetensors"


def is_as_noted(lines: Sequence[Mapping[str, Any]], what: str, file: Path) -> bool:
    """Whether a stage has come to an end, by a journal's lines, and the file that it wrote is as it was."""
    notes = [line for line in lines if line["what"] == what]
    return bool(notes) and file.is_file() and notes[-1]["sha256"] == _file_hash(file)


def last_reply(lines: Sequence[dict[str, Any]], kind: Kind, name: str) -> dict[str, Any] | None:
    """The line of a journal that says what a client sent last in answer to this."""
    found = [line for line in lines if line["what"] == "reply" and (line["kind"], line["name"]) == (kind, name)]
    return found[-1] if found else None


def stored_reply(out: Path, line: Mapping[str, Any]) -> dict[str, np.ndarray] | None:
    """What a client sent, by the journal's line of it; None if it is no longer as it was."""
    place = reply_place(out, line["kind"], line["name"])
    try:
        arrays = stored_arrays(place) if line["kind"] == "expert" else read_arrays(place)[0]
    except (StateFileError, OSError, SafetensorError):
        return None
    return arrays if arrays_hash(arrays) == line["sha256"] else None


def reply_taken_over(line: Mapping[str, Any], run: str, asked: str | None) -> dict[str, Any]:
    """The line of another run's journal for a reply that it takes over.

    Args:
        line: of the run in which the client sent it, or which took it over itself.
        run: that run's name.
        asked: hash of what the client was asked, where there was more to it than settings; None where there was not.
    """
    return {**line, _FROM: line.get(_FROM, run)} | ({} if asked is None else {_ASKED: asked})


def clocks() -> tuple[float, float]:
    """Seconds on the clock, and of this process on any core."""
    return time.monotonic(), time.process_time()


def _file_hash(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()
