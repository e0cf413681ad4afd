"""The journal of a run: what is finished, a line each, whole or not believed."""

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from metamoe.common.config import Settings
from metamoe.common.errors import InvalidSettingError, StateFileError

JOURNAL = "journal.jsonl"
_HASH = "hash"


def journal_line(values: Mapping[str, Any]) -> bytes:
    """A line of the journal: what it says as JSON, with the hash of all else in it."""
    return _json({**values, _HASH: _hash(values)}) + b"\n"


def _json(values: Mapping[str, Any]) -> bytes:
    return json.dumps(values, sort_keys=True).encode()


def _hash(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(_json(values)).hexdigest()


def read_journal(out: Path) -> list[dict[str, Any]]:
    """The lines of a run's journal, up to the first that is not whole; none where there is no journal.

    Raises:
        StateFileError: the journal cannot be read, or its first line is not whole.
    """
    file = out / "server" / JOURNAL
    try:
        raw = file.read_bytes().split(b"\n")[:-1] if file.is_file() else []
    except OSError as error:
        raise StateFileError(f"{file} cannot be read: {error}") from error
    lines = []
    for text in raw:
        try:
            line = json.loads(text)
        except ValueError:
            break
        if not isinstance(line, dict) or line.pop(_HASH, None) != _hash(line):
            break
        lines.append(line)
    if raw and not lines:
        raise StateFileError(f"{file} is damaged at its beginning, so the run cannot go on; begin another one")
    return lines


def begin_anew(out: Path) -> None:
    """Make room in a run folder for another run; ledgers are kept.

    Raises:
        InvalidSettingError: the folder holds a run that has not come to its end.
    """
    if read_journal(out) and not (out / "server" / "summary.json").is_file():
        raise InvalidSettingError(
            f"out = {out} holds a run that has not come to its end: go on with it (metamoe resume {out}, or resume=true in the "
            "run config), or give another folder"
        )
    for part in ("model", "proxies.json", "server/experts", "server/replies", "server/training"):
        path = out / part
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    for file in (JOURNAL, "summary.json", "error.json"):
        (out / "server" / file).unlink(missing_ok=True)


def standing(out: Path, settings: Settings) -> dict[str, tuple[int, int]]:
    """How much of each stage a run's journal says is done, of how much: clients where they answer, else one.

    Raises:
        StateFileError: see :func:`read_journal`.
    """
    lines, members = read_journal(out), len(settings.members)
    replies = {(line["kind"], line["name"]) for line in lines if line["what"] == "reply"}
    answered = {kind: sum(of == kind for of, _ in replies) for kind in ("profile", "expert", "deliver")}
    ended = {line["what"] for line in lines}
    return {
        "profile": (answered["profile"], members),
        "select": (int("select" in ended), 1),
        "expert": (answered["expert"], members),
        "unify": (int("unify" in ended), 1),
        "deliver": (answered["deliver"], members),
    }
